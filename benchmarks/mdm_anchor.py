"""Does MDM gain from distilling where towers are pretrained? Random against pretrained towers, on the validation split.

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/mdm_anchor.py        # about two CPU minutes

700 scenes of 24 pixels with three captions, ConvNets of width 16, 100 pairs. A row is one distillation seed and one
step: mean recall (percent) on 500 validation scenes, averaged over two trainings of 30 epochs. No test score is taken.
"""
import argparse
from pathlib import Path

SIZES = dict(n_train=700, captions=3, n_val=500, n_test=500, image_size=24)
EXPERTS = dict(experts=3, expert_epochs=8, expert_lr=.5, width=16)


def looks(val, train, seed, pretrained, marks, lr):
    "Rows of one distillation: a row at every step of `marks`."
    from avdd_nb.crossmodal import evaluate_pairs, pair_protocol
    from avdd_nb.distill import distill
    from avdd_nb.methods.base import make_method
    method = make_method('mdm', lr=lr, pretrained=pretrained, **EXPERTS)
    syn, source = method.begin(train, 100, seed), method.source(train, seed)
    protocol = pair_protocol('thorough', width=16, epochs=30, pretrained=pretrained)

    def row(step):
        found = evaluate_pairs(syn, val, protocol, [100, 101], workers=1)
        means = [r['accuracy'] for r in found if r['metric'] == 'mean']
        return dict(pretrained=pretrained, lr=lr, seed=seed, step=step, val_mean=sum(means)/len(means))
    yield row(0)
    for p in distill(method, syn, source, max(marks)):
        if p.step in marks:
            yield row(p.step)


def main():
    "Runs all, writing the file after every row."
    import pandas as pd

    from avdd_nb.data.catalog import load
    from avdd_nb.store import atomic_write
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--results', type=Path, default=Path(__file__).parent/'results'/'mdm_anchor.csv')
    p.add_argument('--seeds', type=int, default=3)
    args = p.parse_args()
    splits, rows = load('soundshapes-text', **SIZES), []
    for seed in range(args.seeds):
        for pretrained in (False, True):
            for row in looks(splits.val, splits.train, seed, pretrained, (50, 100), 20.):
                rows.append(row)
                print(row, flush=True)
                atomic_write(args.results, pd.DataFrame(rows).to_csv(index=False, float_format='%.4g'))


if __name__ == '__main__':
    main()
