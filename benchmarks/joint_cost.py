"""Seconds a step and peak memory of the matching methods, by whose space they compare in: ImageBindDC's Table 6.

    python benchmarks/joint_cost.py                             # ConvNets, joint encoder, CLIP + CLAP
    python benchmarks/joint_cost.py --spaces imagebind-size     # towers of ImageBind's size, random: 4 GB and more

Built-in world, 1,280 pairs, ConvNets of width 64, 32 real pairs per class, one tile per sample. Every cell is a
process of its own. `step_s`: one step whose real side is at hand, the fastest of --steps, after one to warm up;
`entry_s`: the real side of one draw, which `draws='pool'` pays K times in all and `draws='fresh'` at every step; *_mb:
the most memory in that time above what the process took before, with its libraries and data; the networks count, and
about 150 MB that PyTorch takes at its first step. Seconds are those of the processor, on --threads threads: one by
default, so that other work on the machine does not matter much. Large encoders have random weights, which cost what
others do; their real side is --few pairs per class.
"""
import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

OUT = Path(__file__).parent / 'results' / 'joint_cost.csv'
METHODS = ('dsa', 'dm', 'avdd', 'imagebinddc')
SPACES = ('convnet', 'joint', 'clip+clap', 'imagebind-size')
BUDGETS = dict.fromkeys(SPACES[:2], (1, 10)) | dict.fromkeys(SPACES[2:], (1,))


def clip_clap(modalities):
    "CLIP ViT-B/32 and CLAP (HTS-AT) as published, with random weights."
    import transformers as t

    from avdd_nb.nets import pretrained
    return pretrained.clip_clap(modalities, t.CLIPModel(t.CLIPConfig()).eval(), t.ClapModel(t.ClapConfig()).eval())


def imagebind_size(modalities):
    "Towers of ImageBind-Huge's size (ViT-H/14 for pictures, ViT-B over 228 patches for sounds), random weights."
    import timm
    import torch
    import torch.nn.functional as F

    from avdd_nb.nets import pretrained

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            vit = dict(num_classes=1024)
            self.vision = timm.create_model('vit_huge_patch14_224', **vit)
            self.audio = timm.create_model('vit_base_patch16_224', img_size=(192, 304), in_chans=1, **vit)

        def forward(self, batch):
            return {k: self.vision(x) if k == 'vision' else self.audio(F.interpolate(x, (192, 304)))
                    for k, x in batch.items()}
    return pretrained.imagebind(modalities, model=Towers().eval())


LARGE = {'clip+clap': clip_clap, 'imagebind-size': imagebind_size}


def source_of(method, space, data):
    "The pool that the method steps on, nothing of it kept on disk; large encoders with random weights."
    from avdd_nb.core import seeded
    from avdd_nb.match.pool import FeaturePool
    from avdd_nb.nets.encoders import EncoderNets
    if space in LARGE:
        with seeded('random towers', space):
            networks = EncoderNets(LARGE[space](data.modalities))
        type(networks).pair_mb = 690. if space == 'imagebind-size' else 110.
        method.networks = lambda: networks
    return FeaturePool(data, 1, strategy=method.strategy, real_batch=method.real_batch, keep=False,
                       networks=method.networks(), lift=method.lift())


def resident_mb():
    "What this process holds now."
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def watched(work):
    "(seconds of the processor, peak MB of this process meanwhile) of work()."
    import torch

    from avdd_nb.distill import forget_peak
    forget_peak(torch.device('cpu'))
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    peak = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    return seconds, int(peak.split()[1]) / 2**10


def cell(name, space, ipc, args):
    "One row: the method `name` in that space with `ipc` pairs per class."
    import torch

    from avdd_nb.data.catalog import load
    from avdd_nb.distill import distill
    from avdd_nb.methods.base import make_method
    from avdd_nb.nets.encoders import joint_encoder
    torch.set_num_threads(args.threads)
    data = load('soundshapes', n_train=1280, n_test=10).train
    options = dict(width=args.width, init='random', real_batch=args.few if space in LARGE else 32)
    method = make_method(name, **options | ({} if name == 'dsa' else dict(factor=1)))
    if name != 'dsa' and space not in LARGE:
        method.encoder = space
    syn = method.begin(data, ipc, 0)
    if space == 'joint':
        joint_encoder(data)                     # learnt once and kept, outside the measurement
    ctypes.CDLL(None).malloc_trim(0)            # what is free is given back, so that it does not hide what comes
    before = resident_mb()
    row = dict(method=name, space=space, ipc=ipc)
    source = method.source(data, 0) if name == 'dsa' else source_of(method, space, data)
    if name != 'dsa':
        entry, entry_peak = watched(lambda: source.entry(0))
        row |= dict(entry_s=entry, entry_mb=entry_peak - before)
    running = distill(method, syn, source, 10**6)
    steps = [watched(lambda: next(running)) for _ in range(args.steps + 1)][-args.steps:]
    return row | dict(step_s=min(s for s, _ in steps), step_mb=max(m for _, m in steps) - before,
                      real_batch=method.real_batch, width=args.width, threads=args.threads, torch=torch.__version__)


def main():
    "Measures cell by cell; writes the file as it grows, in place of older rows of the same cells."
    from cells import read_rows, write_rows
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--spaces', nargs='+', default=SPACES[:3], choices=SPACES)
    p.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS)
    p.add_argument('--steps', type=int, default=2)
    p.add_argument('--width', type=int, default=64)
    p.add_argument('--few', type=int, default=4)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=OUT)
    p.add_argument('--cell', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.cell:
        name, space, ipc = args.cell.split()
        return print(json.dumps(cell(name, space, int(ipc), args)))
    same = ['method', 'space', 'ipc']
    for space in args.spaces:
        for ipc in BUDGETS[space]:
            for name in args.methods:
                if name == 'dsa' and space != 'convnet':
                    continue
                said = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--cell', f'{name} {space} {ipc}'],
                                      check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(said.splitlines()[-1])
                kept = [r for r in read_rows(args.out) if [str(r[k]) for k in same] != [str(row[k]) for k in same]]
                write_rows(args.out, [*kept, row], same)
                print(*(f"{k} {row[k]:.4g}" if isinstance(row[k], float) else row[k] for k in row), flush=True)


if __name__ == '__main__':
    main()
