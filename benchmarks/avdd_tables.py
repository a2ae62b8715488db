"""The tables of the AVDD paper, their ablations, and the control that it lacks, on data that anyone has.

    python benchmarks/avdd_tables.py --data-root DATA                       # all tables at a size for two cores
    python benchmarks/avdd_tables.py --tables control 3 --datasets avmnist  # some of them
    python benchmarks/avdd_tables.py --print                                # only what is in the results file
    python benchmarks/avdd_tables.py --scale paper --device cuda            # the paper's sizes; hours on a GPU

Stop it and start it again: every cell is a run folder, rows go to benchmarks/results/avdd.csv after every cell.
nbs/results/avdd.ipynb sets them beside the paper's own rows.
"""
import argparse
import sys
from pathlib import Path

from cells import measure, read_rows, run_cells, write_rows

HERE = Path(__file__).parent
RESULTS = HERE / 'results' / 'avdd.csv'
RETRIEVED = HERE / 'results' / 'avdd_retrieval.csv'
ORDER = ['dataset', 'ipc', 'method', 'options', 'distill_seed', 'digest', 'seed', 'modality', 'fusion',
         'metric']


def avdd(base=1, icm=0, cgm=0, scmm=0, rscmm=0, **options):
    "AVDD with these weights."
    return 'avdd', dict(lam_base=base, lam_icm=icm, lam_cgm=cgm, lam_scmm=scmm, lam_rscmm=rscmm) | options


def dm(times=1, **options):
    "DM with the default step size times `times`."
    return 'dm', dict(lr=.2 * times) | options


TILES = dict(init='herding', factor=2)
CHOOSING = {'Random': ('random', {}), 'Herding': ('herding', {}), 'Herding+Factor': ('tiled', {})}
FULL = avdd(1, 10, 10)
MTT = 'mtt', dict(experts=2, inner=5, batch=10, lr=1000., step_size=.02, differ='', lr_step_size=1e-3, lr_expert=.05,
                  batch_expert=32)
RETRIEVAL = dict(retrieval=True)   # Table 6: recalls and ranks in place of accuracies, in a file of their own

TABLES = {   # table → the paper's name of a row → (method, options)
    'control': {f'DM, step size × {k}': dm(k, **TILES) for k in (.1, .3, 1, 3, 10, 21, 41, 100)}
    | {f'AVDD, λ = {k}': avdd(1, k, k) for k in (1, 10, 20)},
    '2': {f'DM, {head}': dm() + (dict(head=head),) for head in ('ensemble', 'sum', 'concat', 'attention')},
    '3': {'Random': CHOOSING['Random'], 'Herding': CHOOSING['Herding'], 'DC': ('dc', dict(lr=5.)),
          'DSA': ('dsa', dict(lr=5.)), 'MTT': MTT, 'DM': dm(), 'AVDD': FULL, 'Whole data': ('whole', {})},
    '4 (left: losses)': CHOOSING | {
        'Herding+Factor+Base': avdd(1), 'Herding+Factor+ICM': avdd(0, 10), 'Herding+Factor+CGM': avdd(0, 0, 10),
        'Herding+Factor+Base+ICM': avdd(1, 10), 'Herding+Factor+Base+CGM': avdd(1, 0, 10),
        'Herding+Factor+ICM+CGM': avdd(0, 10, 10), 'Herding+Factor+Base+ICM+CGM': FULL},
    '4 (right: herding and factor)': {
        'Random+Base': avdd(1, init='random', factor=1),
        'Random+Base+ICM+CGM': avdd(1, 10, 10, init='random', factor=1),
        'Herding+Base': avdd(1, factor=1), 'Herding+Base+ICM+CGM': avdd(1, 10, 10, factor=1),
        'Random+Factor+Base': avdd(1, init='random'),
        'Random+Factor+Base+ICM+CGM': avdd(1, 10, 10, init='random'),
        'Herding+Factor+Base': avdd(1), 'Herding+Factor+Base+ICM+CGM': FULL},
    '5': {f'{name}, {arch}': method + (dict(arch=arch),) for name, method in (('DM', dm()), ('AVDD', FULL))
          for arch in ('ConvNet', 'VGG11', 'LeNet', 'ResNet18', 'AlexNet')},
    '6': {name: method + (RETRIEVAL,) for name, method in (
        ('Random', CHOOSING['Random']), ('Herding', CHOOSING['Herding']), ('DM', dm()), ('AVDD', FULL))},
    '7': CHOOSING | {
        'Herding+Factor+Base': avdd(1), 'Herding+Factor+Base+SCMM': avdd(1, scmm=1),
        'Herding+Factor+Base+RSCMM': avdd(1, rscmm=1), 'Herding+Factor+Base+SCMM+RSCMM': avdd(1, scmm=1, rscmm=1)},
    '8': {f'AVDD (factor l={k})': avdd(1, 10, 10, **({} if k == 2 else dict(factor=k))) for k in (1, 2, 3)},
    '11': {f'AVDD (lambda_ICM=lambda_CGM={k})': avdd(1, k, k) for k in (1, 10, 20)},
    'unequal': {f'β/α = {r:+.1f}': avdd(1, 10 + 10.5 * r, 10 - 10.5 * r) for r in (-.9, -.6, -.3, 0, .3, .6, .9)},
}
OTHER_SEEDS = {'control': 10}   # DM of the control shares no seed with AVDD: distillation seeds start here

SCALES = {
    'tiny': dict(   # to see that everything runs
        steps=2, ipc=[1], protocol=('thorough', dict(updates=2, width=4)),
        learner=dict(width=4, pool_size=2, real_batch=4, features='random'), choice=dict(features='random'),
        data=dict(soundshapes=dict(n_train=100, n_test=60))),
    'small': dict(
        steps=50, ipc=[1, 10], protocol=('thorough', dict(updates=120, width=16)),
        learner=dict(width=16, pool_size=10, real_batch=64, features='random'), choice=dict(features='random'),
        data=dict(avmnist=dict(n_train=2000, n_test=1000), soundshapes=dict(n_train=2000, n_test=1000))),
    'paper': dict(
        steps=5000, ipc=[1, 10, 20], protocol=('paper', {}), learner=dict(draws='fresh'), choice={},
        data=dict(avmnist={}, soundshapes=dict(n_train=8808, n_test=1000, image_size=224, mel='avdd'))),
}


def rows_asked(table):
    "(label, method, options, changes of the evaluation) of a table, without methods that are not there (yet)."
    from avdd_nb.methods.base import methods
    for label, (method, options, *changes) in TABLES[table].items():
        if method in methods() or method == 'whole':
            yield label, method, options, changes[0] if changes else {}


def settings(method, options, scale):
    "All options of a method at this scale: the row's own over the common ones that it knows."
    from dataclasses import fields

    from avdd_nb.methods.base import methods
    if method in ('random', 'whole'):
        return options
    cls = methods()[method]
    common, known = SCALES[scale]['learner' if cls.learns else 'choice'], {f.name for f in fields(cls)}
    return {k: v for k, v in common.items() if k in known} | options


def first_seed(table, method):
    return OTHER_SEEDS.get(table, 0) if method == 'dm' else 0


def jobs(args):
    "All cells as (dataset, ipc, label, method, options, seed, changes), without repetition: small budgets first."
    seen = {}
    for ipc in args.ipc or SCALES[args.scale]['ipc']:
        for table in args.tables:
            for dataset in args.datasets or SCALES[args.scale]['data']:
                for label, method, options, changes in rows_asked(table):
                    if args.rows and label not in args.rows:
                        continue
                    options = settings(method, options, args.scale)
                    for seed in range(first_seed(table, method), first_seed(table, method) + args.seeds):
                        item = dataset, ipc, label, method, options, seed, changes
                        key = dataset, ipc, method, sorted(options.items()), seed, sorted(plain(changes).items())
                        seen.setdefault(str(key), item)
    return list(seen.values())


def plain(changes):
    "The changes that change something: the default head and network are none."
    return {k: v for k, v in changes.items() if v not in ('ensemble', 'ConvNet')}


SPLITS = {}


def cell(dataset, ipc, label, method, options, seed, changes, args):
    "The rows of one cell."
    from avdd_nb.data.catalog import load
    from avdd_nb.evaluate import make_protocol
    from avdd_nb.runs import make_config
    scale = SCALES[args.scale]
    name, recipe = scale['protocol']
    if dataset not in SPLITS:
        SPLITS[dataset] = load(dataset, args.data_root, **scale['data'][dataset])
    if method == 'whole':
        return whole(SPLITS[dataset], dataset, make_protocol(name, **recipe, epochs_whole=10), seed, args)
    config = make_config(dataset, method, ipc, scale['steps'], seed, scale['data'][dataset], options)
    seeds = [args.evaluations * seed + i for i in range(args.evaluations)]
    judge = None
    if changes == RETRIEVAL:
        from avdd_nb.retrieval import retrieve as judge
        changes = {}
    return measure(config, Path(args.out) / config.hash, make_protocol(name, **recipe | changes), seeds,
                   SPLITS[dataset], args.data_root, args.device, judge)


def whole(splits, dataset, protocol, seed, args):
    "The rows of networks trained on all real pairs, kept beside the runs."
    from avdd_nb.evaluate import evaluate
    from avdd_nb.store import read_json, write_json
    kept = Path(args.out) / f'whole-{splits.train.hash}-{protocol.digest}-{seed}.json'
    if not kept.exists():
        facts = dict(run=f'whole-{splits.train.hash}', dataset=dataset, method='whole', ipc=0, steps=0,
                     distill_seed=seed, options='{}', distill_seconds=0.)
        write_json(kept, [facts | row for row in evaluate(splits.train.to(args.device), splits.test, protocol, [seed])])
    return read_json(kept)


def rows_of(rows, table, dataset, ipc, fusion='mean', scale='small'):
    "The measured rows of one table as label → list of rows; modality 'AV' under `fusion`, and every single one."
    import json
    found = {}
    for label, method, options, changes in rows_asked(table):
        wanted, first = settings(method, options, scale), first_seed(table, method)
        evaluation = {} if changes == RETRIEVAL else dict(arch='ConvNet', head='ensemble') | changes
        mine = [r for r in rows if r['dataset'] == dataset and int(r['ipc']) == (0 if method == 'whole' else ipc)
                and r['method'] == method
                and r.get('fusion', '') in ('', fusion, 'joint') and first <= int(r['distill_seed']) < first + 10
                and json.loads(r['options']) == wanted and all(r[k] == v for k, v in evaluation.items())]
        if mine:
            found[label] = mine
    return found


def curve(rows, table, dataset, ipc, label):
    "A frame over the number that ends a row's name, of the rows called `label`…: mean, std, count of AV accuracies."
    import pandas as pd
    found = {float(name.split()[-1]): [r['accuracy'] for r in mine if r['modality'] == 'AV']
             for name, mine in rows_of(rows, table, dataset, ipc).items() if name.startswith(label)}
    return pd.DataFrame({at: pd.Series(found[at]).agg(['mean', 'std', 'count']) for at in sorted(found)}).T


def show(rows, scale='small'):
    "Every table that has rows, as Markdown: accuracy of AV (mean of softmaxes), of each branch, seconds a run."
    from statistics import mean, stdev
    for table in [t for t in TABLES if t != '6']:
        for dataset in SCALES[scale]['data']:
            for ipc in SCALES[scale]['ipc']:
                found = rows_of(rows, table, dataset, ipc, scale=scale)
                if not found:
                    continue
                print(f"\nTable {table}, {dataset}, IPC {ipc}\n\n| | AV % | A | V | n | s |\n|---|---|---|---|---|---|")
                for label, mine in found.items():
                    by = {m: [r['accuracy'] for r in mine if r['modality'] == m] for m in ('AV', 'audio', 'image')}
                    spread = stdev(by['AV']) if len(by['AV']) > 1 else 0
                    seconds = mean(r['distill_seconds'] for r in mine)
                    branch = [f"{mean(by[m]):.1f}" if by[m] else '' for m in ('audio', 'image')]
                    print(f"| {label} | {mean(by['AV']):.1f} ± {spread:.1f} | {' | '.join(branch)} | "
                          f"{len(by['AV'])} | {seconds:.1f} |")


def main():
    "Runs what is missing, then prints the tables."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data-root')
    p.add_argument('--out', default='runs/avdd_tables')
    p.add_argument('--results', default=RESULTS, type=Path)
    p.add_argument('--scale', default='small', choices=list(SCALES))
    p.add_argument('--tables', nargs='+', default=list(TABLES), choices=list(TABLES))
    p.add_argument('--rows', nargs='+', help="only the rows with these labels")
    p.add_argument('--datasets', nargs='+', help="default: all of the scale")
    p.add_argument('--ipc', type=int, nargs='+')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--evaluations', type=int, default=1)
    p.add_argument('--device', default='cpu')
    p.add_argument('--workers', type=int, default=1)
    p.add_argument('--print', action='store_true', dest='only_print')
    args = p.parse_args()
    if not args.only_print:
        run_cells(cell, [(*item, args) for item in jobs(args)], args.workers, Keeper(args.results))
    show(read_rows(args.results), args.scale)


class Keeper:
    "Writes rows to the results file, those of retrieval to the one beside it, over what is there already."
    def __init__(self, results):
        self.files = {False: results, True: results.with_name(results.stem + '_retrieval.csv')}
        self.kept = {kind: {self.name(r): r for r in read_rows(path)} for kind, path in self.files.items()}

    @staticmethod
    def name(row):
        return tuple(str(row.get(k, '')) for k in ('run', 'digest', 'seed', 'modality', 'fusion', 'metric'))

    def __call__(self, rows):
        for kind, path in self.files.items():
            mine = {self.name(r): r for r in rows if ('metric' in r) == kind}
            if mine:
                write_rows(path, (self.kept[kind] | mine).values(), ORDER)


if __name__ == '__main__':
    sys.exit(main())
