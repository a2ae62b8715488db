"""What the tables of benchmarks/ share: a cell is one run, measured; rows are kept as soon as a cell is done.

A cell's folder is named by the hash of its run, so two tables that need the same run share it, and a script that was
stopped goes on where it was.
"""
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path


def measure(config, out, protocol, seeds, splits, root=None, device='cpu', judge=None):
    """Tidy rows of the run `config` (a `RunConfig`) under `protocol`; distils and evaluates what is not on disk yet.

    judge: (synthetic set, test data, protocol, seeds) → rows; without one, classification accuracy.
    """
    from avdd_nb.runs import evaluate_run, load_run, run
    from avdd_nb.store import read_json, write_json
    out, what = Path(out), judge.__name__ if judge else 'rows'
    kept = out / f'{what}-{protocol.digest}-{len(seeds)}.json'
    if kept.exists():
        return read_json(kept)
    list(run(config, out, root, device, splits=splits))
    done = read_json(out / 'done.json')
    facts = dict(run=config.hash, dataset=config.dataset, method=config.method, ipc=config.ipc, steps=config.steps,
                 distill_seed=config.seed, options=json.dumps(config.options, sort_keys=True),
                 distill_seconds=round(done['seconds'], 3))
    measured = (judge(load_run(out)[1].to(device), splits.test, protocol, seeds) if judge
                else evaluate_run(out, protocol, seeds, root, device, splits=splits))
    rows = [facts | {k: v for k, v in row.items() if k not in ('method', 'ipc')} for row in measured]
    write_json(kept, rows)
    return rows


def write_rows(path, rows, order):
    "The rows as a CSV file, whole or not at all, sorted by the columns `order`."
    import pandas as pd

    from avdd_nb.store import atomic_write
    rows = sorted(rows, key=lambda row: [str(row.get(column, '')) for column in order])
    frame = pd.DataFrame(rows)
    first = [column for column in order if column in frame]
    frame = frame[first + sorted(set(frame) - set(first))]
    return atomic_write(path, frame.to_csv(index=False, float_format='%.6g'))


def read_rows(path):
    "The rows of a CSV file of `write_rows` as dicts; none where there is no file."
    import pandas as pd
    if not Path(path).exists():
        return []
    return pd.read_csv(path, keep_default_na=False).to_dict('records')


def run_cells(job, todo, workers=1, keep=None):
    "All rows of job(*item) for the items `todo`, in order or on spawned processes; keep(rows) after every one."
    from tqdm import tqdm
    rows, bar = [], tqdm(total=len(todo), unit='cell', mininterval=5)

    def take(item, found):
        rows.extend(found)
        if keep:
            keep(rows)
        bar.set_postfix_str(' '.join(map(str, item[:3])), refresh=False)
        bar.update()

    if workers <= 1:
        for item in todo:
            take(item, job(*item))
        return rows
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        futures = {pool.submit(job, *item): item for item in todo}
        for future in as_completed(futures):
            take(futures[future], future.result())
    return rows
