"""Seconds a step: Algorithm 1 of AVDD as printed, and ours with the pool; all ratios from one run.

    python benchmarks/distill_step.py --data-root DATA                # a few steps each, about five minutes
    python benchmarks/distill_step.py --data-root DATA --accuracy     # time to Algorithm 1's accuracy after 100 steps

Without --data-root it uses the built-in world. The real side is 128 pairs per class in both; networks have --width
channels, those of `narrow` half as many. Steps alternate between the variants: a busy machine slows all of them alike.
With --accuracy they run one after the other, so seconds are then those of the processor (all threads added up).
"""
import argparse
import copy
import time
from statistics import median

import torch
from plain import algorithm_1

from avdd_nb.data.catalog import load
from avdd_nb.distill import distill
from avdd_nb.evaluate import evaluate, make_protocol
from avdd_nb.match.pool import FeaturePool
from avdd_nb.methods.base import make_method


def timed(steps, clock=time.perf_counter):
    "Seconds of the next step of a running distillation."
    start = clock()
    next(steps)
    return clock() - start


def variants(data, start, args):
    "name → (running distillation, its pool or None, its synthetic set)."
    def ours(width, bf16=False):
        method = make_method('avdd', width=width)
        pool = FeaturePool(data, args.pool, width, real_batch=128, keep=False)
        syn = copy.deepcopy(start)
        return distill(method, syn, pool, 10**6, bf16=bf16), pool, syn

    literal = copy.deepcopy(start)
    made = {'Algorithm 1': (algorithm_1(data, literal, 10**6, args.width), None, literal), 'pool': ours(args.width),
            'pool, narrow': ours(args.width // 2)}
    return made | ({'pool, bf16': ours(args.width, True)} if args.bf16 else {})


def fill(pool, data):
    "Seconds to fill one entry of the pool (median of two)."
    seconds = []
    for k in range(2):
        start = time.perf_counter()
        pool.entry(k)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def speed(data, ipc, args):
    "Prints one line a variant: seconds a step, ratio to Algorithm 1, seconds to fill the pool."
    start = make_method('avdd', features='random').begin(data, ipc, seed=0)
    made = variants(data, start, args)
    filled = {name: fill(pool, data) for name, (_, pool, _) in made.items() if pool}
    for _, pool, _ in made.values():
        if pool:
            pool.size = 2                       # only filled entries, so that a step is a step
    seconds = {name: [] for name in made}
    for _ in range(args.steps + 1):
        for name, (steps, _, _) in made.items():
            seconds[name].append(timed(steps))
    step = {name: median(s[1:]) for name, s in seconds.items()}
    for name in made:
        extra = f"   {filled[name]:6.2f} s an entry, {args.pool} entries once" if name in filled else ''
        ratio = step['Algorithm 1'] / step[name]
        print(f"IPC {ipc:3}  {name:14} {step[name]:8.3f} s a step   {ratio:5.1f} ×{extra}", flush=True)


def accuracy(data, test, ipc, args):
    "Prints accuracy and processor time (pools included): Algorithm 1 after 100 steps, the pool at several marks."
    protocol = make_protocol('paper', width=args.width // 2)

    def score(syn):
        rows = evaluate(syn, test, protocol, 3)
        found = torch.tensor([r['accuracy'] for r in rows if (r['modality'], r['fusion']) == ('AV', 'mean')])
        return f"{found.mean():.1f} ± {found.std():.1f} %"

    start = make_method('avdd', features='random').begin(data, ipc, seed=0)
    print(f"IPC {ipc:3}  undistilled start                      {score(start)}", flush=True)
    for name, marks in (('pool, narrow', (10, 25, 50, 100)), ('pool', (25, 100)), ('Algorithm 1', (100,))):
        steps, _, syn = variants(data, start, args)[name]
        spent = 0.
        for step in range(1, max(marks) + 1):
            spent += timed(steps, time.process_time)
            if step in marks:
                print(f"IPC {ipc:3}  {name:14} {step:4} steps {spent:8.1f} s   {score(syn)}", flush=True)


def main():
    "Runs the comparison."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data-root')
    p.add_argument('--ipc', type=int, nargs='+', default=[1, 10, 20])
    p.add_argument('--width', type=int, default=128)
    p.add_argument('--pool', type=int, default=20)
    p.add_argument('--steps', type=int, default=5)
    p.add_argument('--bf16', action='store_true')
    p.add_argument('--accuracy', action='store_true')
    args = p.parse_args()
    splits = load('avmnist', args.data_root) if args.data_root else load('soundshapes')
    print(f"{splits.train!r}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, width {args.width}")
    for ipc in args.ipc:
        (accuracy(splits.train, splits.test, ipc, args) if args.accuracy else speed(splits.train, ipc, args))


if __name__ == '__main__':
    main()
