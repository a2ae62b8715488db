"""What a step of each method costs: processor time, and the memory that it adds, in a process of its own.

    python benchmarks/avdd_speed.py --data-root DATA            # CPU
    python benchmarks/avdd_speed.py --device cuda --width 128   # GPU: wall time, peak memory of the device

Processor time does not change with what else the machine does. Filling (pools, experts) is told apart from stepping.
Rows go to benchmarks/results/avdd_speed.csv.
"""
import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from avdd_tables import FULL, MTT, SCALES, dm
from cells import read_rows, write_rows

RESULTS = Path(__file__).parent / 'results' / 'avdd_speed.csv'
LEARNERS = dict(dm=dm(), avdd=FULL, mtt=MTT, tesla=('tesla', MTT[1])) | {
    name: (name, {}) for name in ('dm+h+f', 'dc', 'dsa', 'imagebinddc', 'davdd-style')}


def status(word):
    "A figure of /proc/self/status in MB (Linux)."
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(word):
            return int(line.split()[1]) / 1024
    return float('nan')


def forget_peak():
    "Gives free memory back to the system and sets the process's peak to what it holds now (Linux)."
    import ctypes
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')


def cost(label, method, options, ipc, args):
    "One row: seconds before the first step, seconds a step, MB that stepping adds."
    from dataclasses import fields

    import torch

    from avdd_nb.data.catalog import load
    from avdd_nb.distill import distill
    from avdd_nb.methods.base import make_method, methods
    torch.set_num_threads(1)
    cuda = args.device == 'cuda'
    clock = time.perf_counter if cuda else time.process_time
    known = {f.name for f in fields(methods()[method])}
    asked = dict(width=args.width, real_batch=args.real_batch, pool_size=2, features='random') | options
    made = make_method(method, **{k: v for k, v in asked.items() if k in known})
    data = load(args.dataset, args.data_root, **SCALES['small']['data'][args.dataset]).train.to(args.device)
    began = clock()
    syn, source = made.begin(data, ipc, 0).to(args.device), made.source(data, 0)
    steps = distill(made, syn, source, args.steps + 2)
    for _ in range(2):
        next(steps)
    filled = clock() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        forget_peak()
        before = status('VmRSS')
    began = clock()
    list(steps)
    if cuda:
        torch.cuda.synchronize()
    seconds = (clock() - began) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else status('VmHWM')
    return dict(method=label, dataset=args.dataset, ipc=ipc, width=args.width, device=args.device,
                seconds_a_step=seconds, seconds_before=filled, memory_mb=max(0., peak - before), steps=args.steps)


def main():
    "Every method that is there, one process each."
    from avdd_nb.methods.base import methods
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data-root')
    p.add_argument('--dataset', default='avmnist')
    p.add_argument('--methods', nargs='+', default=list(LEARNERS), choices=list(LEARNERS))
    p.add_argument('--ipc', type=int, nargs='+', default=[1, 10])
    p.add_argument('--width', type=int, default=16)
    p.add_argument('--real-batch', type=int, default=64)
    p.add_argument('--steps', type=int, default=5)
    p.add_argument('--device', default='cpu')
    p.add_argument('--results', default=RESULTS, type=Path)
    args = p.parse_args()
    kept = {_key(r): r for r in read_rows(args.results)}
    for ipc in args.ipc:
        for label in args.methods:
            method, options = LEARNERS[label]
            if method not in methods():
                continue
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                row = pool.submit(cost, label, method, options, ipc, args).result()
            kept[_key(row)] = row
            write_rows(args.results, kept.values(), ['device', 'width', 'ipc', 'method'])
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def _key(row):
    return tuple(str(row[k]) for k in ('method', 'dataset', 'ipc', 'width', 'device'))


if __name__ == '__main__':
    sys.exit(main())
