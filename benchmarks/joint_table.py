"""One table for the methods that claim to use the pairing: accuracy, other networks, cross-modal measures, cost.

    python benchmarks/joint_table.py --data-root DATA        # resumable: stop it and start it again
    python benchmarks/joint_table.py --print                 # only the tables, from the results file
    python benchmarks/joint_table.py --tune                  # step sizes, on a validation split of the training data
    python benchmarks/joint_table.py --ablate                # parts taken away, on the same split

The committed rows are of the default sizes; at IPC 1 with `--archs LeNet AlexNet`, and tuned with `--trial-seeds 1` at
IPC 10 and 20. All of it takes about two hours of one core.

Tune first: the table takes each method's best step size from benchmarks/results/joint_tuning.csv. Every method gets the
same number of step sizes (DAVDD-style's weights had trials of their own: --ablate), and none sees the test data. Every
cell (data set, method, budget, seed) is a run folder with one file of rows for each measure; what is there is never
done twice. After each cell benchmarks/results/joint.csv is written anew, whole or not at all.
"""
import argparse
import sys
import time
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / 'results' / 'joint.csv'
TUNING = HERE / 'results' / 'joint_tuning.csv'
DATASETS = ('soundshapes', 'avmnist')
SIZE, LARGER = dict(n_train=800, n_test=400), dict(n_train=2000, n_test=400)   # 20 tiled pairs of ten classes hold 800
TILED = dict(init='herding', factor=2)
LABELS = {   # row of the table → (method, its options)
    'Random': ('random', {}),
    'Herding': ('herding', {}),
    'Herding + tiles, undistilled': ('tiled', {}),
    'DM': ('dm+h+f', {}),
    'AVDD (10, 10)': ('avdd', {}),
    'DM, lr × 21': ('dm+h+f', {}),
    'ImageBindDC, ConvNet': ('imagebinddc', dict(TILED, encoder='convnet', n_freq=512)),
    'ImageBindDC, joint encoder': ('imagebinddc', dict(TILED, encoder='joint', n_freq=512)),
    'DAVDD-style': ('davdd-style', dict(bank_epochs=4)),
}
FROZEN = 'frozen encoder'
SELECTION = {'random', 'herding', 'tiled'}
# Step sizes at one pair per class, times IPC (see `rates`), such that a step moves pixels alike. Where the second was
# the best of the last three at IPC 1, the first was tried as well.
RATES = {
    'DM': (.2, 1., 5., 25.),
    'AVDD (10, 10)': (.01, .05, .2, 1.),
    'ImageBindDC, ConvNet': (.04, .2, 1., 5.),
    'ImageBindDC, joint encoder': (.02, .1, .5, 2.5),
    'DAVDD-style': (10., 50., 250., 1250.),
}
BARE = dict(lam_dis=0., lam_sample=0., lam_cim=0.)                  # no cross-modal term is left
GUESS = dict(lam_feature=0., lam_private=1., lam_common=1.)         # the first weights: parts alone are matched
LADDER = [GUESS | dict(lam_dis=1., lam_sample=.1, lam_cim=1., lr=lr) for lr in (.2, 1., 5., 25.)] + [
    GUESS | BARE | dict(trained_bank=bank, decouple=apart, lr=lr) for bank, apart in
    ((True, True), (True, False), (False, True), (False, False)) for lr in (.2, 1., 5., 25., 125.)]
WEIGHTS = [dict(lam_private=w, lam_common=w, lam_cim=w, lam_sample=w/10, lam_dis=w) for w in (0., .001, .1)]
ABLATIONS = {
    'DAVDD-style': [dict(lam_feature=0.), dict(lam_private=0., lam_common=0.), dict(lam_cim=0.), dict(lam_sample=0.),
                    dict(lam_dis=0.), BARE, dict(ema=1.), dict(decouple=False), dict(trained_bank=False),
                    dict(mix_private=True)],
    'ImageBindDC, joint encoder': [dict(lam_cross=0.), dict(lam_joint=0.), dict(lam_cross=0., lam_joint=0.)] + [
        dict(discrepancy='mmd', lam_cross=0., lam_joint=0., lr=lr) for lr in (2., 10., 50.)],
}


def rates(label, ipc):
    """Step sizes tried at this budget: a mean over n times as many pairs gives each 1/n of the gradient.

    The largest, never the best at 1 or 10 pairs, is left out above.
    """
    return [round(lr*ipc, 6) for lr in RATES[label]][:None if ipc <= 10 else -1]


def tuned(label, dataset, ipc, path=None):
    "The step size with the best mean validation accuracy (AV), as an option; the method's own where none was tried."
    if label == 'DM, lr × 21':
        found = tuned('AVDD (10, 10)', dataset, ipc, path)
        return {k: round(21*v, 6) for k, v in found.items()}
    rows = read_rows(path or TUNING)
    if rows is None or label not in RATES: return {}
    mine = rows[(rows.label == label) & (rows.dataset == dataset) & (rows.ipc == ipc) & (rows.fusion == 'mean')]
    tried = mine[mine.trial.isin([name_of(dict(lr=lr)) for lr in rates(label, ipc)])]
    if tried.empty: return {}
    return dict(lr=float(tried.groupby('trial').accuracy.mean().idxmax().removeprefix('lr=')))


def ablations(label, dataset, ipc):
    "Trials with parts of a method taken away; DAVDD-style's ladder to DM, and its weights, in one world."
    more = LADDER + WEIGHTS if (label, dataset, ipc) == ('DAVDD-style', 'soundshapes', 1) else []
    return ABLATIONS.get(label, []) + more


def name_of(trial):
    "What a trial is called in the results."
    return ' '.join(f'{k}={v}' for k, v in trial.items())


def options_of(label, args, dataset=None, ipc=1):
    "(method, options) of one row of the table at this size, with its tuned step size."
    method, options = LABELS[label]
    if method in SELECTION: return method, options
    size = dict(width=args.width, pool_size=args.pool_size)
    size |= {} if method == 'davdd-style' else dict(real_batch=args.real_batch)
    return method, size | options | tuned(label, dataset, ipc)


def data_of(ipc):
    "Options of both worlds at this budget."
    return SIZE if ipc <= 10 else LARGER


def accuracy_rows(syn, splits, args, seed, archs=('ConvNet',)):
    "Accuracy by network, modality and fusion, as (measure, what, metric, seed, value)."
    from avdd_nb.evaluate import evaluate, make_protocol
    rows = []
    for arch in archs:
        protocol = make_protocol('thorough', updates=args.updates, width=args.width, arch=arch)
        rows += evaluate(syn, splits.test, protocol, [100 * seed + i for i in range(args.evaluations)], workers=1)
    return tidy(rows)


def tidy(rows):
    "Rows of a judge in the table's columns."
    return [dict(measure='accuracy', what=f"{r['modality']} {r['fusion']}".strip(), metric=r['arch'], seed=r['seed'],
                 value=r['accuracy']) for r in rows]


def frozen_rows(syn, splits, args, seed):
    "Accuracy of linear heads on the frozen joint encoder of the real training data."
    from avdd_nb.frozen import frozen_heads
    return tidy(frozen_heads(syn, splits.test, seeds=[100 * seed + i for i in range(args.evaluations)],
                             whole=splits.train))


def pairing_rows(syn, splits, args, seed):
    "The three cross-modal measures."
    from avdd_nb.pairing import pairing
    return pairing(syn, splits.test, updates=args.pairing_updates)


MEASURES = {   # file of a cell → its rows, from (syn, splits, args, seed)
    'accuracy': accuracy_rows,
    'others': lambda syn, splits, args, seed: accuracy_rows(syn, splits, args, seed, args.archs),
    'frozen': frozen_rows,
    'pairing': pairing_rows,
}


def cost_rows(out, config, splits):
    "Distils into `out`; seconds and memory. In a process of its own."
    import psutil

    from avdd_nb.runs import run
    from avdd_nb.store import read_json
    before = psutil.Process().memory_info().rss / 2**20
    began = time.process_time()
    list(run(config, out, splits=splits))
    spent, done = time.process_time() - began, read_json(out / 'done.json')
    values = {'seconds': done['seconds'], 'CPU seconds': spent, 'MB above start': max(0., done['memory_mb'] - before)}
    return [dict(measure='cost', what='distilling', metric=k, seed=0, value=v) for k, v in values.items()]


def cell(dataset, label, ipc, seed, splits, args):
    "Distils and measures what of a cell is not there yet, each to its file. Runs in a process of its own."
    import torch

    from avdd_nb.runs import load_run, make_config
    from avdd_nb.store import write_json
    torch.set_num_threads(1)
    out = folder(dataset, label, ipc, seed, args)
    method, options = options_of(label, args, dataset, ipc)
    same = dict(dataset=dataset, label=label, ipc=ipc, distill_seed=seed, steps=args.steps, width=args.width,
                lr=options.get('lr', ''), n_train=len(splits.train), updates=args.updates)
    keep = lambda name, rows: write_json(out / 'rows' / f'{name}.json', [same | row for row in rows])
    if 'cost' in missing(out):
        keep('cost', cost_rows(out, make_config(dataset, method, ipc, args.steps, seed, data_of(ipc), options), splits))
    syn = load_run(out)[1]
    for name in missing(out): keep(name, MEASURES[name](syn, splits, args, seed))


def missing(out):
    "What of the cell in `out` has no file yet."
    return [name for name in ('cost', *MEASURES) if not (out / 'rows' / f'{name}.json').exists()]


def folder(dataset, label, ipc, seed, args):
    "Where a cell lives."
    name = ''.join(c if c.isalnum() else '_' for c in label)
    return Path(args.out) / f'{dataset}-{name}-ipc{ipc}-seed{seed}'


def tune(args, fork, trials):
    "Every trial of `trials(label, dataset, ipc)` that is not done yet, scored on a fifth of the training data."
    for ipc in args.ipc:
        for dataset in args.datasets:
            rest, val = load_data(dataset, ipc, args).train.split(.2, seed=1)
            for label in args.labels:
                for trial in trials(label, dataset, ipc): one_trial(fork, dataset, label, ipc, trial, rest, val, args)


def one_trial(fork, dataset, label, ipc, trial, rest, val, args):
    "One trial in a process of its own, unless it is done; then all trials' rows to the results file."
    from avdd_nb.store import read_json
    name = ''.join(c if c.isalnum() or c == '.' else '_' for c in f'{label}-{name_of(trial)}')
    path = Path(args.out) / f'trial-{dataset}-ipc{ipc}-{name}.json'
    if not path.exists(): in_child(fork, trial_rows, dataset, label, ipc, trial, rest, val, path, args)
    write_csv([r for p in sorted(Path(args.out).glob('trial-*.json')) for r in read_json(p)], TUNING)
    print(dataset, label, ipc, name_of(trial), flush=True)


def trial_rows(dataset, label, ipc, trial, rest, val, path, args):
    "Distils and scores one trial with each of its seeds."
    import torch

    from avdd_nb.distill import distill
    from avdd_nb.evaluate import evaluate, make_protocol
    from avdd_nb.methods.base import make_method
    from avdd_nb.store import write_json
    torch.set_num_threads(1)
    method, options = options_of(label, args, dataset, ipc)
    made, rows = make_method(method, **(options | trial)), []
    for seed in range(args.trial_seeds):
        syn = made.begin(rest, ipc, seed)
        list(distill(made, syn, made.source(rest, seed), args.steps))
        protocol = make_protocol('thorough', updates=args.updates, width=args.width)
        rows += [dict(dataset=dataset, label=label, trial=name_of(trial), lr=made.lr, ipc=ipc, seed=seed,
                      modality=r['modality'], fusion=r['fusion'], accuracy=r['accuracy'])
                 for r in evaluate(syn, val, protocol, [seed], workers=1)]
    write_json(path, rows)


def load_data(dataset, ipc, args):
    "`Splits` of one of the two worlds at the size for this budget."
    from avdd_nb.data.catalog import load
    return load(dataset, args.data_root, **data_of(ipc))


def in_child(fork, job, *args):
    "Runs `job(*args)` in a forked process, so that its peak memory is its own; a failure is told and stops nothing."
    child = fork.Process(target=job, args=args)
    child.start()
    child.join()
    if child.exitcode: print('failed:', *[a for a in args if isinstance(a, str | int)], flush=True)


def write_csv(rows, path):
    "Writes `rows` to `path`, whole or not at all."
    import pandas as pd

    from avdd_nb.store import atomic_write
    if rows: atomic_write(path, pd.DataFrame(rows).round(5).to_csv(index=False))


def gather(args):
    "The rows of all finished cells, written to the results file."
    from avdd_nb.store import read_json
    rows = [r for path in sorted(Path(args.out).glob('*/rows/*.json')) for r in read_json(path)]
    write_csv(rows, args.results)
    return rows


def read_rows(path=RESULTS):
    "The measured rows as a frame; None where nothing has been measured yet."
    import pandas as pd
    return pd.read_csv(path, keep_default_na=False) if Path(path).exists() else None


def _mean(frame, **where):
    "mean, standard deviation over distillations and their number, of the rows where columns have these values."
    for column, value in where.items(): frame = frame[frame[column] == value]
    each = frame.groupby('distill_seed').value.mean()
    return each.mean(), each.std(), len(each)


def line(part, fusion='mean'):
    "One line of the table, from the rows of one method at one budget."
    av, std, n = _mean(part, measure='accuracy', metric='ConvNet', what=f'AV {fusion}')
    acc = part[part.measure == 'accuracy']
    others = [_mean(acc[acc.what == f'AV {fusion}'], metric=a)[0] for a in acc.metric.unique()
              if a not in ('ConvNet', FROZEN)]
    kept = _mean(part, measure='shuffle', what='kept')[0]
    return dict(AV=av, std=std, n=n, audio=_mean(acc, metric='ConvNet', what='audio')[0],
                image=_mean(acc, metric='ConvNet', what='image')[0],
                others=sum(others) / len(others) if others else float('nan'),
                frozen=_mean(acc, metric=FROZEN, what=f'AV {fusion}')[0],
                retrieval=_mean(part, measure='retrieval', metric='class@1')[0],
                covariance=_mean(part, measure='covariance', metric='all')[0],
                together=kept, within=kept - _mean(part, measure='shuffle', what='within')[0],
                across=kept - _mean(part, measure='shuffle', what='across')[0],
                seconds=part[(part.measure == 'cost') & (part.metric == 'CPU seconds')].value.median(),
                MB=_mean(part, measure='cost', metric='MB above start')[0])


def table(rows, dataset, ipc, fusion='mean'):
    "One line per method: accuracy, other networks, cross-modal measures, cost. Empty where nothing was measured."
    import pandas as pd
    mine = rows[(rows.dataset == dataset) & (rows.ipc == ipc)]
    lines = {label: line(mine[mine.label == label], fusion) for label in LABELS if (mine.label == label).any()}
    return pd.DataFrame(lines).T


def show(path):
    "The tables, one per data set and budget."
    import pandas as pd
    rows = read_rows(path)
    for dataset, ipc in sorted({(d, i) for d, i in zip(rows.dataset, rows.ipc)}):
        print(f'\n{dataset}, IPC {ipc}')
        with pd.option_context('display.width', 200, 'display.max_columns', 20):
            print(table(rows, dataset, ipc).astype(float).round(2))


def main():
    "Runs what is missing, then prints the table."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data-root')
    p.add_argument('--out', default='runs/joint_table')
    p.add_argument('--results', type=Path, default=RESULTS)
    p.add_argument('--datasets', nargs='+', default=list(DATASETS))
    p.add_argument('--ipc', type=int, nargs='+', default=[1, 10, 20])
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--evaluations', type=int, default=1)
    p.add_argument('--archs', nargs='*', default=['LeNet'])
    p.add_argument('--steps', type=int, default=40)
    p.add_argument('--width', type=int, default=16)
    p.add_argument('--pool-size', type=int, default=6)
    p.add_argument('--real-batch', type=int, default=64)
    p.add_argument('--updates', type=int, default=80)
    p.add_argument('--pairing-updates', type=int, default=30)
    p.add_argument('--print', action='store_true', dest='only_print')
    p.add_argument('--tune', action='store_true')
    p.add_argument('--ablate', action='store_true')
    p.add_argument('--labels', nargs='+', default=list(RATES), help='whose trials')
    p.add_argument('--trial-seeds', type=int, default=2)
    args = p.parse_args()
    if args.only_print: return show(args.results)
    fork = get_context('fork')
    if args.tune: return tune(args, fork, lambda label, _, ipc: [dict(lr=lr) for lr in rates(label, ipc)])
    if args.ablate: return tune(args, fork, ablations)
    todo = [(d, label, ipc, seed) for ipc in args.ipc for d in args.datasets for seed in range(args.seeds)
            for label in LABELS]
    splits = {}
    for i, (dataset, label, ipc, seed) in enumerate(todo):
        if missing(folder(dataset, label, ipc, seed, args)):
            if (dataset, ipc) not in splits: splits = {(dataset, ipc): load_data(dataset, ipc, args)}
            in_child(fork, cell, dataset, label, ipc, seed, splits[dataset, ipc], args)
        gather(args)
        print(f'{i + 1}/{len(todo)}', dataset, label, ipc, seed, flush=True)
    show(args.results)


if __name__ == '__main__':
    sys.exit(main())
