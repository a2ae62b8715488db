"The joint table: lines from tidy rows, cells that are never done twice, no rows where nothing was measured."
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import joint_table


def rows(seed, av, label='DM', **more):
    same = dict(dataset='soundshapes', label=label, ipc=1, distill_seed=seed, seed=0)
    values = {('accuracy', 'AV mean', 'ConvNet'): av, ('accuracy', 'AV mean', 'LeNet'): av - 10,
              ('accuracy', 'audio', 'ConvNet'): 50., ('accuracy', 'image', 'ConvNet'): 30.,
              ('retrieval', 'audio ↔ image', 'class@1'): 20., ('covariance', 'audio ↔ image', 'all'): .5,
              ('shuffle', 'kept', 'accuracy'): 60., ('shuffle', 'within', 'accuracy'): 58.,
              ('shuffle', 'across', 'accuracy'): 40., ('cost', 'distilling', 'CPU seconds'): 2.,
              ('cost', 'distilling', 'MB above start'): 100.}
    return [same | dict(measure=a, what=b, metric=c, value=v) for (a, b, c), v in values.items()]


def test_a_line_averages_over_distillations():
    found = joint_table.table(pd.DataFrame(rows(0, 60.) + rows(1, 70.)), 'soundshapes', 1).loc['DM']
    assert (found.AV, found.n, found.others, found.within, found.across) == (65., 2, 55., 2., 20.)
    assert found['std'] == pytest.approx(50**.5)


def test_methods_keep_the_order_of_the_table_and_missing_ones_are_left_out():
    frame = pd.DataFrame(rows(0, 60.) + rows(0, 50., 'Random'))
    assert list(joint_table.table(frame, 'soundshapes', 1).index) == ['Random', 'DM']
    assert joint_table.table(frame, 'avmnist', 1).empty


def test_nothing_measured_is_none(tmp_path): assert joint_table.read_rows(tmp_path / 'none.csv') is None


def test_every_row_names_a_method_and_its_options():
    from argparse import Namespace

    from avdd_nb.methods.base import make_method
    args = Namespace(width=8, pool_size=2, real_batch=4)
    for label in joint_table.LABELS:
        name, options = joint_table.options_of(label, args)
        make_method(name, **options)
    for label, trials in joint_table.ABLATIONS.items():
        for trial in trials: make_method(joint_table.LABELS[label][0], **trial)
    assert set(joint_table.RATES) <= set(joint_table.LABELS)


def test_the_best_step_size_on_validation_is_taken(tmp_path):
    row = dict(dataset='soundshapes', label='AVDD (10, 10)', ipc=10, fusion='mean', modality='AV')
    tried = [row | dict(trial=t, accuracy=a) for t, a in
             (('lr=0.5', 50.), ('lr=2.0', 60.), ('lr=10.0', 55.), ('lr=2.0', 62.), ('lam_icm=0.0', 99.))]
    pd.DataFrame(tried).to_csv(tmp_path / 't.csv', index=False)
    find = lambda label, ipc=10: joint_table.tuned(label, 'soundshapes', ipc, tmp_path / 't.csv')
    assert find('AVDD (10, 10)') == dict(lr=2.) and find('DM, lr × 21') == dict(lr=42.)
    assert find('DM') == find('AVDD (10, 10)', 1) == find('Random') == {}


@pytest.mark.slow
def test_a_cell_is_distilled_once_and_only_what_is_missing_is_measured_later(tmp_path):
    from argparse import Namespace

    from avdd_nb.data.catalog import load
    args = Namespace(out=tmp_path, steps=1, width=4, updates=1, evaluations=1, archs=['LeNet'], pairing_updates=1,
                     results=tmp_path / 'joint.csv')
    where = 'soundshapes', 'Random', 1, 0
    out, splits = joint_table.folder(*where, args), load('soundshapes', n_train=40, n_test=20)
    joint_table.cell(*where, splits, args)
    assert joint_table.missing(out) == []
    (out / 'rows' / 'others.json').unlink()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.is_file()}
    joint_table.cell(*where, splits, args)
    assert joint_table.missing(out) == [] and kept == {p: p.stat().st_mtime_ns for p in kept}
    found = joint_table.table(pd.DataFrame(joint_table.gather(args)), 'soundshapes', 1).loc['Random']
    assert all(found[c] == found[c] for c in ('AV', 'others', 'frozen', 'retrieval', 'covariance', 'across', 'seconds'))
