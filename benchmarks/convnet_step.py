"""Seconds of one forward and backward of the ConvNet on this CPU, for ways that give the same numbers (bf16: nearly).

    OMP_NUM_THREADS=2 python benchmarks/convnet_step.py --batch 400 --shape 1 32 32
Every round runs every way once, so that a busy machine slows them alike; the fastest round counts.
"""
import argparse
import os
import subprocess
import sys
import time

import torch

from avdd_nb.nets.convnet import build

ALLOCATOR = dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='8000000000', MALLOC_TOP_PAD_='500000000')


def whole(net):
    "The network on the whole batch at once."
    return lambda x: net.features(x).flatten(1)


def bf16(run):
    "The same under bfloat16 autocast."
    def under_autocast(x):
        with torch.autocast('cpu', torch.bfloat16):
            return run(x).float()
    return under_autocast


def ways(shape, compiled):
    "Name → (network, how to embed)."
    new = lambda: build('ConvNet', shape, seed=0)
    net, last = new(), new().to(memory_format=torch.channels_last)
    out = {'whole batch': (net, whole(net)), 'mouthfuls (ours)': (net, net.embed),
           'whole batch, bf16': (net, bf16(whole(net))), 'mouthfuls, bf16': (net, bf16(net.embed)),
           'mouthfuls, channels last': (last, last.embed)}
    if compiled:
        net = new()
        out['whole batch, torch.compile'] = net, torch.compile(whole(net))
    return out


def seconds(net, run, x, ask, weights):
    "Time of one forward and backward, in the weights or in the input."
    net.requires_grad_(weights).zero_grad()
    x = x.clone().requires_grad_(not weights)
    start = time.perf_counter()
    (run(x) * ask).sum().backward()
    return time.perf_counter() - start


def table(args):
    gen = torch.Generator().manual_seed(0)
    x, all_ways = torch.randn(args.batch, *args.shape, generator=gen), ways(args.shape, args.compile)
    ask = torch.randn(args.batch, all_ways['whole batch'][0].dim, generator=gen)
    print(f'batch {args.batch} of {tuple(args.shape)}, {torch.get_num_threads()} threads, best of {args.repeats}')
    for title, weights in (('gradient in the input, weights frozen', False), ('gradient in the weights', True)):
        rounds = [[seconds(*way, x, ask, weights) for way in all_ways.values()] for _ in range(args.repeats)]
        best = [min(column) for column in zip(*rounds)]
        print(title)
        for name, t in zip(all_ways, best):
            print(f'  {name:28} {t:7.3f} s   {best[0] / t:5.2f} times as fast')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--shape', type=int, nargs=3, default=(1, 32, 32))
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--compile', action='store_true', help='also torch.compile (needs a C++ compiler)')
    parser.add_argument('--allocator', action='store_true', help='once more with glibc told to keep its memory')
    args = parser.parse_args()
    table(args)
    if args.allocator:
        print('\nwith ' + ' '.join(f'{k}={v}' for k, v in ALLOCATOR.items()), flush=True)
        again = [a for a in sys.argv if a != '--allocator']
        subprocess.run([sys.executable, *again], env=os.environ | ALLOCATOR, check=True)
