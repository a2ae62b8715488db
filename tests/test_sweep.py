"""Sweeps that are misspelt, killed, run twice at once, or fail half-way: what is done is done once and stays right."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from avdd_nb.core import UserError
from avdd_nb.distill import forget_peak, peak_memory_mb
from avdd_nb.store import cached, lock, read_events, read_json, write_json
from avdd_nb.sweep import job as job_room
from avdd_nb.sweep.job import Handle, bare, by_notebook, run_job
from avdd_nb.sweep.local import find_gpus, make_slots, sweep
from avdd_nb.sweep.plan import done, expand, forecast, job_folder, make_jobs, read_grid, read_plan, save_plan
from avdd_nb.sweep.report import comparison_report, sweep_report
from avdd_nb.sweep.results import gather, significance, summary
from avdd_nb.sweep.watch import snapshot, state, tail

TINY = dict(dataset='soundshapes', method=['herding', 'dm'], ipc=1, steps=3, seeds=1,
            data_options=dict(n_train=60, n_test=40), method_options=dict(width=8, pool_size=1),
            protocol_options=dict(width=8, epochs=1, epochs_whole=1))
FOUR = dict(TINY, method=['herding', 'dm', 'dm+h+f', 'avdd'], seed=[0, 1], steps=40)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))


# -- the plan ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('change, hint', [
    (dict(metod='dm'), "'method'"), (dict(method='avd'), "'avdd'"), (dict(method_options=dict(widht=8)), "'width'"),
    (dict(data_options=dict(n_trian=8)), "'n_train'"), (dict(protocol='papr'), "'paper'"),
    (dict(protocol_options=dict(epoch=1)), "'epochs'"), (dict(notebook='run_on'), "'run_one'"),
    (dict(out='here'), 'parameter of a sweep'), (dict(method_options=dict(width=[8, -8])), 'range')])
def test_mistakes_stop_before_the_first_job(change, hint, tmp_path):
    with pytest.raises(UserError, match=hint): make_jobs(TINY | change)


@pytest.mark.parametrize('text', ['', '3', '- 3', 'a: [1', '[]: {'])
def test_files_that_are_no_grid(tmp_path, text):
    (tmp_path/'grid.yaml').write_text(text)
    with pytest.raises(UserError): make_jobs(tmp_path/'grid.yaml')


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='nowhere'): read_grid(tmp_path/'nowhere.yaml')


def test_expand_counts():
    points = expand(dict(a=[1, 2], b=dict(c=[1, 2, 3], d=0), e=5))
    assert len(points) == 6 and len({json.dumps(p) for p in points}) == 6


def test_what_is_the_same_has_the_same_name():
    name = lambda **change: make_jobs(dict(TINY, method='dm') | change, baselines=False)[0].name
    assert name() == name(device='cuda') == name(method_options=dict(pool_size='1', width=8.))
    names = {name(), name(seed=1), name(ipc=2), name(steps=4), name(seeds=2), name(bf16=True),
             name(protocol='thorough'), name(data_options=dict(n_train=61)), name(method_options=dict(width=9))}
    assert len(names) == 9


def test_selection_does_not_depend_on_steps():
    assert len(make_jobs(TINY | dict(method='random', method_options={}, steps=[1, 2, 3]), baselines=False)) == 1


def test_jobs_know_their_run():
    a, b = make_jobs(TINY | dict(method='dm', protocol=['paper', 'thorough']), baselines=False)
    assert a.run == b.run and a.name != b.name


def test_two_plans_in_a_folder_join(tmp_path):
    first, second = make_jobs(TINY), make_jobs(TINY | dict(ipc=2))
    save_plan(first, tmp_path)
    assert len(save_plan(second, tmp_path)) == len({j.name for j in first + second})
    write_json(tmp_path/'plan.json', dict(jobs=[dict(nonsense=1)]))
    with pytest.raises(UserError, match='not a plan'): read_plan(tmp_path)
    with pytest.raises(UserError, match='no sweep'): read_plan(tmp_path/'elsewhere')


# -- slots ------------------------------------------------------------------------------------------------------------
def test_cpu_threads_are_divided():
    assert make_slots(3, n_cores=8, threads=8) == [dict(OMP_NUM_THREADS='2')]*3
    assert make_slots(n_cores=4, threads=8) == [dict(OMP_NUM_THREADS='1')]*4
    assert make_slots(9, n_cores=2, threads=8)[0] == dict(OMP_NUM_THREADS='1')


@pytest.mark.parametrize('said, means', [('1', '1'), ('3', '3'), ('64', '8'), ('', '8'), ('many', '8'), ('0', '1')])
def test_omp_num_threads_is_heeded(monkeypatch, said, means):
    monkeypatch.setenv('OMP_NUM_THREADS', said)
    assert make_slots(1, n_cores=8) == [dict(OMP_NUM_THREADS=means)]


def test_gpus_are_found_and_shared(tmp_path, monkeypatch):
    tool = tmp_path/'nvidia-smi'
    tool.write_text('#!/bin/sh\necho "0, 24576"\necho "1, 81920"\n')
    tool.chmod(0o755)
    monkeypatch.setenv('PATH', f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert find_gpus() == {'0': 24., '1': 80.}
    seats = [s['CUDA_VISIBLE_DEVICES'] for s in make_slots(gpus=find_gpus(), job_gb=30)]
    assert Counter(seats) == {'0': 1, '1': 2}
    assert len(make_slots(2, gpus=find_gpus(), job_gb=10)) == 2
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')
    assert find_gpus() == {'1': 80.}
    tool.write_text('#!/bin/sh\nexit 9\n')
    assert find_gpus() == {}


# -- jobs -------------------------------------------------------------------------------------------------------------
def starts(folder, job):
    return sum(e.get('state') == 'running' for e in read_events(job_folder(folder, job)/'events.jsonl'))


def test_a_failed_job_never_stops_the_rest(tmp_path):
    grid = TINY | dict(data_options=[dict(n_train=60, n_test=40), dict(n_train=60, n_test=40, difficulty=-1)])
    jobs = make_jobs(grid)
    states = sweep(jobs, tmp_path, workers=1, bare=True)
    assert Counter(s for s, _ in states.values()) == dict(done=4, failed=4)
    assert all('difficulty' in m for s, m in states.values() if s == 'failed')
    assert Counter(r['state'] for r in snapshot(tmp_path)) == dict(done=4, failed=4)
    again = sweep(jobs, tmp_path, workers=1, bare=True)                      # started again: only what failed is tried
    assert again == states
    assert all(starts(tmp_path, j) == (1 if states[j.name][0] == 'done' else 2) for j in jobs)


def test_jobs_that_share_a_run_distil_once(tmp_path):
    jobs = make_jobs(TINY | dict(method='dm', protocol_options=dict(width=8, epochs=[1, 2])), baselines=False)
    assert set(sweep(jobs, tmp_path, workers=2, bare=True).values()) == {('done', '')}
    runs = list((tmp_path/'runs').glob('*/events.jsonl'))
    assert len(runs) == 1 and [e['step'] for e in read_events(runs[0])] == [1, 2, 3]
    assert len(gather(tmp_path).digest.unique()) == 2


class NeverStarts(Exception):
    pass


@pytest.mark.parametrize('failures, expected', [(2, 'done'), (3, 'failed')])
def test_only_a_kernel_that_did_not_start_is_tried_again(tmp_path, monkeypatch, failures, expected):
    tries = []
    def moody(job, folder, handle, **kw):
        tries.append(1)
        if len(tries) <= failures: raise NeverStarts('no port')
        handle.started = True
        write_json(job_folder(folder, job)/'rows.json', [])
    monkeypatch.setattr(job_room, 'by_notebook', moody)
    job, = make_jobs(TINY | dict(method='herding', method_options={}), baselines=False)
    found, message = run_job(job, tmp_path, moody, handle=Handle())
    assert (found, len(tries)) == (expected, 3) and ('did not start' in message) == (expected == 'failed')


def test_an_error_in_the_notebook_is_not_tried_again(tmp_path, monkeypatch):
    tries = []
    def wrong(job, folder, handle, **kw):
        tries.append(1)
        handle.started = True
        raise RuntimeError('no')
    monkeypatch.setattr(job_room, 'by_notebook', wrong)
    job, = make_jobs(TINY | dict(method='herding', method_options={}), baselines=False)
    assert run_job(job, tmp_path, wrong, handle=Handle()) == ('failed', 'RuntimeError: no') and len(tries) == 1


def test_a_notebook_that_leaves_no_rows_is_not_done(tmp_path):
    job, = make_jobs(TINY | dict(method='herding', method_options={}), baselines=False)
    assert run_job(job, tmp_path, lambda job, folder: None)[0] == 'failed' and done(tmp_path, job) is None


def test_busy_elsewhere(tmp_path):
    job, = make_jobs(TINY | dict(method='dm'), baselines=False)
    with lock(tmp_path/'runs'/f'.{job.run}.lock'): assert run_job(job, tmp_path, bare)[0] == 'busy'
    with lock(job_folder(tmp_path, job)/'.lock'):
        assert run_job(job, tmp_path, bare)[0] == 'busy' and state(tmp_path, job) == 'running'
    assert state(tmp_path, job) == 'waiting' and run_job(job, tmp_path, bare) == ('done', '')


def test_the_tail_of_a_file(tmp_path):
    path = tmp_path/'log'
    assert tail(path) == []
    path.write_text('\n'.join(map(str, range(10_000))))
    assert tail(path)[-1] == '9999' and len(tail(path)) < 2000


# -- eight at once ----------------------------------------------------------------------------------------------------
def _ask(folder, k, start):
    os.environ['AVDD_CACHE'] = str(folder/'cache')
    start.wait()
    def make():
        with open(folder/'made', 'a') as f: f.write(f'{k}\n')
        time.sleep(.3)
        return dict(x=torch.arange(3.)), {}
    (folder/f'got-{k}').write_text(str(cached('test', dict(a=1), make)[0]['x'].tolist()))


def test_eight_that_start_together_compute_once(tmp_path):
    fork = multiprocessing.get_context('fork')
    start = fork.Event()
    eight = [fork.Process(target=_ask, args=(tmp_path, k, start)) for k in range(8)]
    for p in eight: p.start()
    start.set()
    for p in eight: p.join(30)
    assert [p.exitcode for p in eight] == [0]*8
    assert len((tmp_path/'made').read_text().split()) == 1
    assert {p.read_text() for p in tmp_path.glob('got-*')} == {'[0.0, 1.0, 2.0]'}


# -- whole sweeps, killed ---------------------------------------------------------------------------------------------
def start(grid, out, *options):
    "`avdd sweep` as a process of its own."
    path = write_json(out.parent/'grid.json', grid)
    command = [sys.executable, '-c', 'from avdd_nb.cli import main; main()', 'sweep', str(path), '--out', str(out)]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=os.environ | dict(COLUMNS='200'))


def wait_until(happens, seconds=600):
    until = time.time() + seconds
    while not (found := happens()):
        assert time.time() < until, 'it did not happen in time'
        time.sleep(.05)
    return found


def n_done(out): return len(list(out.glob('jobs/*/done.json')))


def busy_kernel(out):
    "The process of a kernel that has run some cells of its job, but not all; None where there is none just now."
    for path in out.glob('jobs/*/events.jsonl'):
        said = read_events(path)
        if 'cell' in said[-1] and said[-1]['cell'] < said[-1]['cells'] - 1:
            return next(e['pid'] for e in reversed(said) if 'pid' in e)


def table(out):
    "The numbers of a sweep and all that they depend on, in one order."
    frame = gather(out)
    keys = ['label', 'ipc', 'seed', 'eval_seed', 'modality', 'fusion', 'metric', 'digest', 'data_hash', 'value']
    return frame[keys].sort_values(keys).reset_index(drop=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_and_resumed(tmp_path):
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    sweep(make_jobs(FOUR, baselines=False), whole, workers=2, bare=True)
    parent = start(FOUR, killed, '--workers', '2', '--no-baselines')
    wait_until(lambda: n_done(killed) >= 1)
    os.kill(wait_until(lambda: busy_kernel(killed)), signal.SIGKILL)        # a kernel dies: the parent goes on
    wait_until(lambda: list(killed.glob('jobs/*/failed.json')))
    before = n_done(killed)
    wait_until(lambda: n_done(killed) >= before + 2)
    assert parent.poll() is None
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()                                                            # the parent dies: its kernels follow
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    stamps = {p: p.stat().st_mtime_ns for p in killed.glob('jobs/*/done.json')}
    again = start(FOUR, killed, '--workers', '2', '--no-baselines')
    said, _ = again.communicate(timeout=1500)
    assert again.returncode == 0, said
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())         # what was done was not done again
    assert table(killed).equals(table(whole))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_parents_at_once(tmp_path):
    out, grid = tmp_path/'out', FOUR | dict(steps=5)
    two = [start(grid, out, '--workers', '1', '--bare', '--no-baselines') for _ in range(2)]      # one thread each
    for parent in two:
        said, _ = parent.communicate(timeout=1500)
        assert parent.returncode == 0, said
    runs = [starts(out, j) for j in read_plan(out)]
    assert runs == [1]*len(runs) and n_done(out) == len(runs) == 8
    alone = tmp_path/'alone'
    sweep(make_jobs(grid, baselines=False), alone, workers=2, bare=True)
    assert table(out).equals(table(alone))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize('how', [[], ['--bare']])
def test_ctrl_c_leaves_a_clean_state(tmp_path, how):
    out, grid = tmp_path/'out', TINY | dict(method='dm', steps=3000, seed=[0, 1, 2])
    parent = start(grid, out, '--workers', '2', *how)
    wait_until(lambda: any(read_events(p)[-1:] and read_events(p)[-1].get('step', 0) > 5
                           for p in out.glob('runs/*/events.jsonl')))
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    said, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130 and 'same command' in said, said
    assert not psutil.wait_procs(family, timeout=10)[1]
    found = Counter(r['state'] for r in snapshot(out))
    assert found['stopped'] and not found['running'] and not found['failed']
    assert list(out.glob('runs/*/checkpoint.safetensors'))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_kernel_and_a_process_give_the_same_numbers(tmp_path):
    jobs = make_jobs(TINY)
    sweep(jobs, tmp_path/'a', workers=2, bare=True)
    sweep(jobs, tmp_path/'b', workers=2)
    assert table(tmp_path/'a').equals(table(tmp_path/'b'))
    notebook = read_json(job_folder(tmp_path/'b', jobs[0])/'notebook.ipynb')
    assert not any('look' in c['metadata'].get('tags', []) for c in notebook['cells'])


def test_dry_run_starts_nothing(tmp_path):
    parent = start(TINY, tmp_path/'out', '--dry-run')
    said, _ = parent.communicate(timeout=60)
    assert parent.returncode == 0 and '4 jobs: 0 done, 4 to do' in said and not (tmp_path/'out').exists()


def test_forecast_of_nothing(tmp_path):
    assert forecast([], tmp_path) == '0 jobs: 0 done, 0 to do.'
    assert Path(tmp_path).exists() and by_notebook is not bare


# -- retrieval ---------------------------------------------------------------------------------------------------------
def test_retrieval_stands_beside_accuracy_and_is_never_averaged_with_it(tmp_path):
    grid = TINY | dict(method='dm', seed=[0, 1], data_options=dict(n_train=60, n_test=60))
    jobs = make_jobs([grid, grid | dict(judge='retrieval')])
    assert {s for s, _ in sweep(jobs, tmp_path, workers=1, bare=True).values()} == {'done'}
    frame = gather(tmp_path)
    means = summary(frame)
    assert set(means.metric) == {'accuracy_pct', 'R@1', 'R@5', 'MedR'} and (means.n <= 2).all()
    mine = means[(means.label == 'dm') & (means.metric == 'MedR') & (means.modality == 'audio→image')].iloc[0]
    kept = frame[(frame.label == 'dm') & (frame.metric == 'MedR') & (frame.modality == 'audio→image')]
    assert mine['mean'] == pytest.approx(kept.value.mean()) and mine.chance > 1
    page = sweep_report(tmp_path).read_text()
    for words in ('R@1, %', 'median rank', 'audio→image', 'image→audio', 'Guessing reaches 10.0', 'accuracy, %'):
        assert words in page, words
    assert {*significance(frame).metric} == set(means.metric)
    other = comparison_report(tmp_path, tmp_path, tmp_path/'c.html').read_text()
    assert 'MedR' in other and 'Only in one' not in other


def test_memory_of_a_run_is_its_own():
    before = peak_memory_mb(torch.device('cpu'))
    big = torch.ones(300*2**18)
    assert peak_memory_mb(torch.device('cpu')) > before + 200
    del big
    forget_peak(torch.device('cpu'))
    if os.access('/proc/self/clear_refs', os.W_OK): assert peak_memory_mb(torch.device('cpu')) < before + 200
