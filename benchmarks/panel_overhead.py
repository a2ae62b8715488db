"""What the panel costs a distillation: seconds a step without and with a panel that watches, in one go.

Both run as a panel's run does, in a child process; the second time a `Watch` of this process draws its curves and
pictures. The two take turns, so that a machine that others use as well slows both alike. `share` is the processor
time that the watching process used, per second of the run, once its libraries were loaded: it bounds the overhead
from above on one core, and other load does not blur it as it does the ratio.

    python benchmarks/panel_overhead.py [--steps 200] [--rounds 3]
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from avdd_nb import jobs
from avdd_nb.runs import make_config
from avdd_nb.store import read_events
from avdd_nb.watch import Watch


def pace(folder, config, watched):
    "(mean seconds between steps after the pool is filled, whether curves were drawn, share of a core used here)."
    jobs.start(folder, config=asdict(config))
    view = Watch(folder) if watched else None
    warm = config.options['pool_size'] + 5
    while jobs.at_work(folder) and len(read_events(folder/'events.jsonl')) < warm: time.sleep(.5)
    used, wall = time.process_time(), time.monotonic()
    while jobs.at_work(folder): time.sleep(.5)
    share = (time.process_time() - used)/(time.monotonic() - wall)
    at = [e['seconds'] for e in read_events(folder/'events.jsonl')]
    steps = [b - a for a, b in zip(at[config.options['pool_size']:], at[config.options['pool_size'] + 1:])]
    return statistics.mean(steps), bool(view and view.curves.children), share


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    options = dict(width=48, pool_size=5, real_batch=32, features='random')
    config = make_config('soundshapes', 'avdd', 1, args.steps, data=dict(n_train=500, n_test=100), options=options)
    home, found, shares = Path(tempfile.mkdtemp()), {False: [], True: []}, {False: [], True: []}
    for k in range(args.rounds):
        for watched in (False, True):
            seconds, drew, share = pace(home/f'{k}-{watched}', config, watched)
            assert drew == watched
            found[watched].append(seconds)
            shares[watched].append(share)
    without, with_ = (statistics.median(found[w]) for w in (False, True))
    print(json.dumps(dict(cores=os.cpu_count(), load=os.getloadavg()[0], without=without, watched=with_,
                          ratio=with_/without, share=statistics.median(shares[True]),
                          rounds=found), indent=1, default=str))


if __name__ == '__main__': main()
