"""Seconds of an evaluation: one network after another with PyTorch's own pool, and ours; same seeds, same accuracy.

    python benchmarks/evaluation.py --data-root DATA

Both train the same networks on the same synthetic set under the paper's protocol (fewer epochs by --epochs).
"""
import argparse
import time

import torch
from plain import plain

from avdd_nb.data.catalog import load
from avdd_nb.evaluate import accuracies, evaluate, make_protocol
from avdd_nb.methods.base import make_method
from avdd_nb.train import fit, new_model, predict


def plainly(syn, test, protocol, seeds):
    "AV accuracies of networks trained one after another, in the plain way."
    x, y = syn.decode()
    found = []
    for seed in range(seeds):
        model = new_model(syn.modalities, syn.n_classes, protocol, seed)
        for net in model.nets:
            plain(net)
        fit(model, syn.modalities, lambda idx: {m: v[idx] for m, v in x.items()}, y, protocol, seed)
        found.append(accuracies(predict(model, test), test.labels)[0]['accuracy'])
    return found


def ours(syn, test, protocol, seeds):
    "The same accuracies from `evaluate`."
    rows = evaluate(syn, test, protocol, seeds)
    return [r['accuracy'] for r in rows if (r['modality'], r['fusion']) == ('AV', 'mean')]


def main():
    "Times both, prints their ratio and both accuracies."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data-root')
    p.add_argument('--ipc', type=int, default=10)
    p.add_argument('--width', type=int, default=128)
    p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--seeds', type=int, default=2)
    args = p.parse_args()
    splits = load('avmnist', args.data_root) if args.data_root else load('soundshapes')
    syn = make_method('tiled', features='random').begin(splits.train, args.ipc, seed=0)
    protocol = make_protocol('paper', width=args.width, epochs=args.epochs)
    half = make_protocol('paper', width=args.width, epochs=args.epochs, bf16=True)
    print(f"{splits.train!r}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, width {args.width}, "
          f"IPC {args.ipc}, {args.epochs} epochs, {args.seeds} seeds")
    base = None
    for name, run, how in (('plain', plainly, protocol), ('ours', ours, protocol), ('ours, bf16', ours, half)):
        start = time.perf_counter()
        found = run(syn, splits.test, how, args.seeds)
        seconds = time.perf_counter() - start
        base = base or seconds
        percent = ', '.join(f'{a:.1f}' for a in found)
        print(f"{name:12} {seconds:7.1f} s   {base / seconds:4.1f} ×   AV {percent} %", flush=True)


if __name__ == '__main__':
    main()
