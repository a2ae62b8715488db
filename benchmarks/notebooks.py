"""How long each chapter takes from top to bottom: a fresh kernel, every cell, offline, as "Run All" does it.

python benchmarks/notebooks.py [NOTEBOOK …] [--threads 2] [--limit 60]     (default: methods, crossmodal and start)

Each notebook runs twice: cold (an empty cache and no runs) and warm (once more with what the first time kept). Wall
seconds; in brackets those of the processor, which a busy machine changes less.
"""
import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = [*sorted(p for p in (ROOT/'nbs'/'methods').glob('*.ipynb') if p.stem != 'base'),
            ROOT/'nbs'/'crossmodal.ipynb', ROOT/'nbs'/'start.ipynb']


def seconds(path, home, threads):
    "(wall, processor) seconds of all cells of the notebook in a kernel of its own, from its start to its end."
    book = nbformat.read(path, as_version=4)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': str(threads), 'AVDD_CACHE': str(home/'cache'),
           'AVDD_RUNS': str(home/'runs'), 'AVDD_OFFLINE': '1', 'HF_HUB_OFFLINE': '1'}
    env.pop('MPLBACKEND', None)                                                     # the kernel's own
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    began, before = time.perf_counter(), used()
    NotebookClient(book, timeout=900, resources=dict(metadata=dict(path=str(path.parent)))).execute(env=env)
    return time.perf_counter() - began, used() - before


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--limit', type=float, default=60, help='seconds that a cold one may take')
    args, slow = parser.parse_args(), []
    print(f'{"notebook":34}    cold, s         warm, s    ({args.threads} threads, load {os.getloadavg()[0]:.1f})')
    for path in [p.resolve() for p in args.notebooks or CHAPTERS]:
        with tempfile.TemporaryDirectory(prefix='avdd-notebooks-') as home:
            took = [seconds(path, Path(home), args.threads) for _ in range(2)]
        slow += [path.name] if took[0][0] > args.limit else []
        told = '   '.join(f'{wall:6.1f} ({cpu:5.1f})' for wall, cpu in took)
        print(f'{str(path.relative_to(ROOT)):34} {told}', flush=True)
    print(f'over {args.limit:.0f} s: {", ".join(slow) or "none"}')
