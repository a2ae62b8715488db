"""Language and depth in small: image–text retrieval, its ablations, other networks, depth–text, audio–text.

    flock /tmp/exp.lock nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/language_tables.py     # resumable
    python benchmarks/language_tables.py --print                                                  # only the tables

A cell is one distilled set and its scores; a cell that is done is never done twice. Rows go to
benchmarks/results/language.csv after every cell. All on the built-in world, in small: 24 pixels, ConvNets of width 16.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {'soundshapes-text': dict(n_train=700, captions=3, n_val=200, n_test=500, image_size=24),
         'soundshapes-audiotext': dict(n_train=500, captions=5, n_val=100, n_test=500),
         'soundshapes-depth': dict(n_train=700, n_test=500, image_size=24)}
EPOCHS, WIDTH = 30, 16
METHODS = {'Random': ('random', 0), 'Herding': ('herding', 0), 'K-center': ('kcenter', 0),
           'Forgetting': ('forgetting', 0), 'MTT-VL': ('mtt-vl', 40),
           'TESLA_WBCE': ('tesla-wbce', 40), 'LoRS': ('lors', 40), 'MDM': ('mdm', 150)}
EXPERTS = dict(experts=3, expert_epochs=6, expert_lr=.5)
WALKS = dict(EXPERTS, lr_text=10.)
OPTIONS = {   # lr: the best of LRS on the validation split, N = 100
    'mdm': dict(EXPERTS, lr=2.), 'lors': dict(WALKS, lr=100., lr_similarity=1.), 'tesla-wbce': dict(WALKS, lr=1.),
    'mtt-vl': dict(EXPERTS, lr=1000., lr_text=100.)}
LRS = {'MTT-VL': (10., 100., 1000.), 'TESLA_WBCE': (1., 10., 100.), 'LoRS': (1., 10., 100.), 'MDM': (2., 20., 200.)}
ABLATIONS = {
    'data init': {i: dict(init=i) for i in ('noise', 'random', 'image-kmeans', 'text-kmeans', 'joint-kmeans')},
    'model init': {m: dict(merge=m) for m in ('anchor', 'expert', 'weighted', 'interpolation')},
    'loss': {'InfoNCE': dict(lam_agr=0., lam_dis=0.), '+ agreement': dict(lam_dis=0.),
             '+ discrepancy': dict(lam_agr=0.), '+ both': {}},
    'energy': {'geodesic, allpairs, root (paper)': {}, 'geodesic, allpairs': dict(root=False),
               'cosine, offdiag (released code)': dict(distance='cosine', estimator='offdiag', root=False)}}


@dataclass(frozen=True)
class Cell:
    "One setting of one table."
    table: str
    row: str
    dataset: str
    method: str
    n: int
    seed: int
    steps: int = 0
    options: tuple = ()
    archs: tuple = field(default=('ConvNet',))

    @property
    def name(self):
        "File name of its rows."
        text = json.dumps([dataclasses.asdict(self), SIZES[self.dataset], EPOCHS, WIDTH], sort_keys=True)
        return f"{self.table}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json".replace(' ', '_')


def _cell(table, row, dataset, method, n, seed, steps, archs=('ConvNet',), **options):
    # a coreset is the random method with another rule
    rule = dict(init=method) if method in ('random', 'herding', 'kcenter', 'forgetting') else {}
    options = {**OPTIONS.get(method, {}), **rule, **options}
    name = 'random' if rule else method
    return Cell(table, row, dataset, name, n, seed, steps, tuple(sorted(options.items())), archs)


def cells(seeds=3):
    "All cells, seed by seed, the main table first."
    out = [_cell('step size (validation)', f"{row}, lr {lr:g}", 'soundshapes-text', METHODS[row][0], 100, 10,
                 METHODS[row][1], lr=lr) for row, lrs in LRS.items() for lr in lrs]
    for seed in range(seeds):
        for n in (100, 200):
            for row, (method, steps) in METHODS.items():
                other = n == 100 and row in ('Random', 'LoRS', 'MDM')
                archs = ('ConvNet', 'LeNet', 'AlexNet') if other else ('ConvNet',)
                out.append(_cell('retrieval', row, 'soundshapes-text', method, n, seed, steps, archs))
        if seed == 0:
            out.append(Cell('retrieval', 'Full', 'soundshapes-text', '', 0, 0))
        for table, rows in ABLATIONS.items():
            out += [_cell(table, row, 'soundshapes-text', 'mdm', 100, seed, 150, **more) for row, more in rows.items()]
        for row, (method, steps) in {'Random': ('random', 0), 'Herding': ('herding', 0), 'DM': ('dm', 40)}.items():
            more = dict(width=16, pool_size=5, real_batch=64) if method == 'dm' else {}
            out += [_cell('depth-text', row, 'soundshapes-depth', method, n, seed, steps, **more)
                    for n in (1, 2, 5, 10)]
            out.append(_cell('audio-text', row, 'soundshapes-audiotext', method, 20, seed, steps, **more))
        out.append(_cell('audio-text', 'MDM', 'soundshapes-audiotext', 'mdm', 20, seed, 60, head='linear', lr=1.))
    return out


@functools.cache
def data_of(dataset):
    "The splits of a data set, loaded once."
    from avdd_nb.data.catalog import load
    return load(dataset, **SIZES[dataset])


def scores(train, cell, splits):
    "Tidy rows of one training set: retrieval, or accuracy where there are classes."
    from avdd_nb.crossmodal import evaluate_pairs, pair_protocol
    from avdd_nb.evaluate import evaluate, make_protocol
    if splits.train.n_classes:
        protocol = make_protocol('paper', width=WIDTH, batch=32)
        return evaluate(train, splits.test, protocol, [cell.seed], workers=1)
    test = splits.val if 'validation' in cell.table else splits.test
    head = dict(head='linear') if cell.dataset == 'soundshapes-audiotext' else {}
    rows = []
    for arch in cell.archs:
        protocol = pair_protocol('thorough', width=WIDTH, epochs=EPOCHS, arch=arch, **head)
        rows += evaluate_pairs(train, test, protocol, [cell.seed], workers=1)
    return rows


def distilled(cell, splits):
    "(synthetic set, seconds of each step, (step, validation score) on the way) of a cell."
    from avdd_nb.crossmodal import evaluate_pairs, pair_protocol
    from avdd_nb.distill import distill
    from avdd_nb.methods.base import make_method
    method = make_method(cell.method, **dict(cell.options))
    syn = method.begin(splits.train, cell.n, cell.seed)
    if not method.learns:
        return syn, 0., []
    source, looks, took = method.source(splits.train, cell.seed), [], 0.
    watch = cell.table == 'retrieval' and cell.seed == 0 and cell.n == 100
    marks = {0, cell.steps // 4, cell.steps // 2, cell.steps} if watch else set()
    protocol = pair_protocol('thorough', width=WIDTH, epochs=EPOCHS)

    def look(step):
        found = evaluate_pairs(syn, splits.val, protocol, [100], workers=1)
        looks.append((step, found[-1]['accuracy']))
    if 0 in marks:
        look(0)
    for p in distill(method, syn, source, cell.steps):
        took = p.seconds if p.step not in marks else took      # a look at the validation split is not a step
        if p.step in marks:
            look(p.step)
    return syn, took, looks


def run_cell(cell):
    "The rows of one cell."
    splits = data_of(cell.dataset)
    began = time.process_time()
    if not cell.method:
        train, per_step, looks = splits.train, 0., []
    else:
        train, per_step, looks = timed(cell, splits)
    best = max(looks, key=lambda look: look[1]) if looks else (None, None)
    mine = dict(table=cell.table, label=cell.row, dataset=cell.dataset, n=cell.n, seed=cell.seed, steps=cell.steps,
                seconds_per_step=per_step, best_step=best[0], best_val=best[1], looks=json.dumps(looks))
    rows = [mine | {k: v for k, v in row.items() if k not in ('seed', 'n_train', 'seconds')}
            for row in scores(train, cell, splits)]
    return [row | dict(cell_seconds=time.process_time() - began) for row in rows]


def timed(cell, splits):
    "`distilled`, with the CPU seconds that a step takes on its own (three steps, from the start)."
    from avdd_nb.distill import distill
    from avdd_nb.methods.base import make_method
    syn, _, looks = distilled(cell, splits)
    method = make_method(cell.method, **dict(cell.options))
    if not method.learns:
        return syn, 0., looks
    source, trial = method.source(splits.train, cell.seed), method.begin(splits.train, cell.n, cell.seed)
    list(distill(method, trial, source, 1))
    clock = time.process_time()
    list(distill(method, trial, source, 4, start=1))
    return syn, (time.process_time() - clock) / 3, looks


def write(path, rows):
    "The CSV, whole or not at all."
    import pandas as pd

    from avdd_nb.store import atomic_write
    atomic_write(path, pd.DataFrame(rows).to_csv(index=False))


def table(frame, name, columns=('IR@1', 'IR@5', 'IR@10', 'TR@1', 'TR@5', 'TR@10', 'mean')):
    "Mean ± std over seeds of one table as a pandas frame: a line per setting, a column per metric."
    part = frame[frame.table == name]
    keys = ['label', 'n', 'arch'] if 'arch' in part else ['label', 'n']
    wide = part.groupby([*keys, 'metric'], sort=False).accuracy.agg(['mean', 'std', 'count']).reset_index()
    wide['text'] = [f"{m:.1f} ± {s:.1f}" if s == s else f"{m:.1f}" for m, s in zip(wide['mean'], wide['std'])]
    out = wide.pivot_table(index=keys, columns='metric', values='text', aggfunc='first', sort=False)
    seeds = wide.groupby(keys, sort=False)['count'].max()
    return out[[c for c in columns if c in out] or list(out)].assign(seeds=seeds).reset_index()


def main():
    "Runs what is missing, then prints the tables."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, default=Path('runs/language_tables'))
    p.add_argument('--results', type=Path, default=HERE / 'results' / 'language.csv')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--only', nargs='*', help="tables to run")
    p.add_argument('--print', action='store_true', dest='only_print')
    args = p.parse_args()
    if not args.only_print:
        from tqdm import tqdm

        from avdd_nb.store import read_json, write_json
        rows = []
        for cell in tqdm([c for c in cells(args.seeds) if not args.only or c.table in args.only], unit='cell'):
            done = args.out / cell.name
            if not done.exists():
                write_json(done, run_cell(cell))
            rows += read_json(done)
            write(args.results, rows)
    import pandas as pd
    frame = pd.read_csv(args.results, keep_default_na=False, na_values=[''])
    frame['metric'] = frame.metric.fillna(frame.modality + ' ' + frame.fusion.fillna(''))
    for name in frame.table.unique():
        print(f"\n{name}\n\n{table(frame, name).to_string(index=False)}")


if __name__ == '__main__':
    sys.exit(main())
