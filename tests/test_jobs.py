"""Jobs and what stands on them: killed, stopped, in line, beyond a quota; plugins; forms."""
import dataclasses
import os
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb import jobs, plugins
from avdd_nb.controls import Form, control
from avdd_nb.core import UserError, hp, listening
from avdd_nb.runs import load_run, make_config, run
from avdd_nb.store import lock, read_json, write_json
from avdd_nb.watch import clock, shell_line, watch

TINY = dict(width=8, pool_size=2, real_batch=6, features='random')
DATA = dict(n_train=60, n_test=20)


def tiny(steps=150, **options):
    return make_config('soundshapes', 'dm', steps=steps, data=DATA, options=TINY | options)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_RUNS', str(tmp_path/'runs'))
    monkeypatch.setenv('AVDD_SLOTS', str(tmp_path/'turns'))


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it did not happen in time'
        time.sleep(.05)


def test_a_killed_run_says_so_and_goes_on_to_the_same_bits(tmp_path):
    config = tiny()
    out = jobs.begin(config)
    until(lambda: jobs.standing(out).step >= 3)
    with pytest.raises(UserError, match='at work already'): jobs.begin(config)
    os.kill(read_json(out/'.job'/'distill.pid'), signal.SIGKILL)
    at = jobs.wait(out)
    assert at.phase == 'failed' and at.reason == jobs.DIED
    assert not watch(out).resume.disabled
    jobs.begin(config)
    assert jobs.wait(out).phase == 'done'
    list(run(config, tmp_path/'whole'))
    whole, mine = load_run(tmp_path/'whole')[1], load_run(out)[1]
    assert all(torch.equal(whole.tensors[m], mine.tensors[m]) for m in mine.tensors)
    assert 'avdd distill' in shell_line(out) and '--set width=8' in shell_line(out)


def test_a_run_says_what_it_prepares_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))
    config, heard = tiny(2, init='herding', features='trained', width=4), []
    with listening(lambda words: heard.append(dict(doing=words))):
        jobs.distil(tmp_path/'run', lambda **facts: heard.append(facts), dataclasses.asdict(config))
    words = [h['doing'] for h in heard if h.get('phase') != 'running' and 'doing' in h]
    trained = [w for w in words if w.startswith('training a classifier, epoch ')]
    assert trained and trained[-1].split()[-3] == trained[-1].split()[-1] == str(len(trained))
    steps = [h for h in heard if h.get('phase') == 'running']
    assert heard[-2:] == steps and all(h['doing'] == '' for h in steps)


def test_a_failure_is_one_sentence_in_the_view():
    out = jobs.start(jobs.runs_dir()/'odd', config=dataclasses.asdict(tiny()) | dict(dataset='<b>soundshape</b>'))
    at = jobs.wait(out)
    assert at.phase == 'failed' and at.reason.count('\n') == 0 and 'There is no data set' in at.reason
    view = watch(out)
    assert 'There is no data set' in view.news.value and '<b>soundshape' not in view.news.value + view.logs.value


def test_only_so_many_work_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_QUOTA', 'runs=1, steps=200')
    with lock(tmp_path/'turns'/'0.lock'):
        out = jobs.begin(tiny(5))
        until(lambda: jobs.standing(out).phase == 'waiting')
        time.sleep(.5)
        assert jobs.standing(out).phase == 'waiting'
    assert jobs.wait(out).phase == 'done'
    with pytest.raises(UserError, match='at most 200'): jobs.begin(tiny(201))


def test_a_quota_that_makes_no_sense_is_a_sentence(monkeypatch):
    for text, words in (('runs', 'name=number'), ('run=2', "did you mean 'runs'"), ('runs=-1', 'outside its range')):
        monkeypatch.setenv('AVDD_QUOTA', text)
        with pytest.raises(UserError, match=words): jobs.quota()


def test_waiting_in_line_keeps_no_files_open(tmp_path):
    with lock(tmp_path/'0.lock'), jobs.contextlib.ExitStack() as held:
        before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
        for _ in range(50): assert not jobs._sits(tmp_path/'0.lock', held)
        assert before == (len(os.listdir('/proc/self/fd')) if before else 0)
    with jobs.contextlib.ExitStack() as held: assert jobs._sits(tmp_path/'0.lock', held)


def test_a_foreign_run_can_be_watched(tmp_path):
    config = tiny(4)
    steps = run(config, tmp_path/'mine')
    next(steps)
    assert jobs.at_work(tmp_path/'mine') and jobs.standing(tmp_path/'mine').phase == 'running'
    steps.close()
    at = jobs.standing(tmp_path/'mine')
    assert (at.phase, at.step, at.steps) == ('stopped', 1, 4)


def test_a_plugin_is_read_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_METHODS', '')
    text = ("from dataclasses import dataclass\nfrom avdd_nb.methods.selection import Random\n"
            "@dataclass\nclass Lucky(Random, name='lucky-of-this-test'):\n    'Ours.'\n")
    (tmp_path/'lucky.py').write_text(text)
    plugins.use_methods(tmp_path/'lucky.py')
    config = make_config('soundshapes', 'lucky-of-this-test', data=DATA)
    first = jobs.run_folder(config)
    out = jobs.begin(config)
    assert jobs.wait(out).phase == 'done'                                           # the child has found it
    (tmp_path/'lucky.py').write_text(text + '# changed')
    assert jobs.run_folder(config) != first
    from avdd_nb.methods.base import METHODS
    del METHODS['lucky-of-this-test']


@given(st.floats(0, 1e6))
def test_clock_never_says_nonsense(seconds):
    assert clock(seconds) and '60 s' not in clock(seconds)[-5:].replace('160 s', '')


@given(st.integers(-5, 5), st.integers(0, 1000), st.booleans())
def test_a_control_keeps_to_its_range(low, span, whole):
    high = low + span
    default = low if whole else float(low)
    made = dataclasses.make_dataclass('Any', [('x', type(default), hp(default, low, high, 'some <b>help</b>'))])
    form = Form(made)
    assert form.values() == {}
    w = form.controls['x']
    if span:
        w.value = high + 1
        assert low <= w.value <= high
    assert '<b>' not in form.children[0].children[0].children[1].value


def test_every_method_has_controls():
    from avdd_nb.methods.base import methods
    for name, cls in methods().items():
        for field in dataclasses.fields(cls): assert control(field).value == field.default, (name, field.name)


def test_a_torn_status_is_no_crash(tmp_path):
    write_json(tmp_path/'.job'/'distill.status', dict(phase='running', step=3, new_field_of_tomorrow=1))
    assert jobs.standing(tmp_path).phase == 'failed'
