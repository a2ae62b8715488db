"""The AV-MNIST table of the README: choosing and distilling at 1, 10 and 20 pairs per class, several seeds each.

    python benchmarks/avmnist_table.py --data-root DATA            # two workers, resumable: stop it and start it again
    python benchmarks/avmnist_table.py --print                     # only the tables, from the results file

Every cell is a run folder; a cell that is done is never done twice. Rows go to benchmarks/results/avmnist.csv.
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
METHODS = {'Random': 'random', 'Herding': 'herding', 'Herding + tiles, undistilled': 'tiled', 'DM': 'dm',
           'DM + herding + tiles': 'dm+h+f', 'AVDD (10, 10)': 'avdd'}
LEARNERS = {'dm', 'dm+h+f', 'avdd'}


def jobs(args):
    "All cells as (label, ipc, seed): small budgets first, the longest of a budget first."
    cells = [(label, ipc, seed) for label in METHODS for ipc in args.ipc for seed in range(args.seeds)]

    def cost(cell):
        label, ipc, _ = cell
        return ipc * (4 if 'tiles' in label or 'AVDD' in label else 1) * (2 if METHODS[label] in LEARNERS else 1)

    return [('Whole data', 0, s) for s in range(args.seeds)] + sorted(cells, key=lambda cell: (cell[1], -cost(cell)))


def cell(label, ipc, seed, args):
    "The tidy rows of one cell; distils and evaluates what is not on disk yet."
    import torch

    from avdd_nb.data.catalog import load
    from avdd_nb.evaluate import evaluate, make_protocol
    from avdd_nb.runs import RunConfig, evaluate_run, run
    from avdd_nb.store import read_json, write_json
    torch.set_num_threads(1)
    protocol = make_protocol(args.protocol, width=args.width)
    seeds = [args.evaluations * seed + i for i in range(args.evaluations)]
    out = Path(args.out) / f"{label.replace(' ', '_').replace(',', '')}-ipc{ipc}-seed{seed}"
    done = out / f'rows-{args.protocol}.json'
    if done.exists():
        return read_json(done)
    splits = load('avmnist', args.data_root)
    if label == 'Whole data':
        rows = evaluate(splits.train, splits.test, protocol, seeds[:1], workers=1)
        seconds = 0.
    else:
        method = METHODS[label]
        options = dict(width=args.width, real_batch=args.real_batch) if method in LEARNERS else {}
        config = RunConfig('avmnist', method, ipc, args.steps, seed, options=options)
        list(run(config, out, args.data_root, splits=splits))
        rows = evaluate_run(out, protocol, seeds, splits=splits)
        seconds = read_json(out / 'done.json')['seconds']
    mine = dict(label=label, ipc=ipc, distill_seed=seed, distill_seconds=seconds)
    rows = [mine | {k: v for k, v in row.items() if k not in ('method', 'ipc')} for row in rows]
    write_json(done, rows)
    return rows


def table(rows, fusion):
    "Markdown: one line per method, one column per budget; AV mean ± std, the branches in brackets."
    import pandas as pd
    frame = pd.DataFrame(rows)
    lines = []
    budgets = sorted(b for b in frame.ipc.unique() if b)

    def text(label, ipc):
        part = frame[(frame.label == label) & (frame.ipc == ipc)]
        if part.empty:
            return ''
        av = part[(part.modality == 'AV') & (part.fusion == fusion)].accuracy
        a, v = (part[part.modality == m].accuracy.mean() for m in ('audio', 'image'))
        return f"{av.mean():.1f} ± {av.std():.1f} ({a:.0f}, {v:.0f})"

    for label in METHODS:
        lines.append([label] + [text(label, ipc) for ipc in budgets])
    lines.append(['Whole data, 3 epochs', text('Whole data', 0)] + [''] * (len(budgets) - 1))
    head = ['AV % (A, V)'] + [f'IPC {b}' for b in budgets]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in [head, ['---'] * len(head), *lines])


def show(rows):
    "Both fusions, and what the numbers were measured with."
    r = rows[0]
    n = len({(x['distill_seed'], x['seed']) for x in rows if x['ipc']})
    print(f"\nprotocol {r['protocol']}, {r['arch']} of width {r['width']}, n = {n} (distillation × evaluation seeds)")
    for fusion in ('mean', 'product'):
        print(f"\nfusion: {fusion}\n\n{table(rows, fusion)}")


def main():
    "Runs what is missing, then prints the tables."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data-root')
    p.add_argument('--out', default='runs/avmnist_table')
    p.add_argument('--results', default=HERE / 'results' / 'avmnist.csv')
    p.add_argument('--ipc', type=int, nargs='+', default=[1, 10, 20])
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--evaluations', type=int, default=3)
    p.add_argument('--steps', type=int, default=100)
    p.add_argument('--width', type=int, default=64)
    p.add_argument('--real-batch', type=int, default=128)
    p.add_argument('--protocol', default='paper')
    p.add_argument('--workers', type=int, default=os.cpu_count())
    p.add_argument('--print', action='store_true', dest='only_print')
    args = p.parse_args()
    import pandas as pd
    if args.only_print:
        return show(pd.read_csv(args.results, keep_default_na=False).to_dict('records'))
    from tqdm import tqdm
    rows, todo = [], jobs(args)
    spawn = get_context('spawn')
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool, tqdm(total=len(todo), unit='cell') as bar:
        futures = {pool.submit(cell, *job, args): job for job in todo}
        for future in as_completed(futures):
            rows += future.result()
            bar.update()
            bar.set_postfix_str(' '.join(map(str, futures[future])))
    rows.sort(key=lambda r: (r['label'], r['ipc'], r['distill_seed'], r['seed']))
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.results, index=False)
    show(rows)


if __name__ == '__main__':
    sys.exit(main())
