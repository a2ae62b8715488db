"A run as a folder: killed for real at any moment and resumed to the same bytes; other folders are refused."
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from avdd_nb import runs
from avdd_nb.core import UserError
from avdd_nb.data.catalog import load
from avdd_nb.evaluate import make_protocol
from avdd_nb.runs import RunConfig, evaluate_run, load_run, run
from avdd_nb.store import load_state, read_events, write_json
from avdd_nb.synset import load_synset
from avdd_nb.views.curves import accuracy_frame

DATA = dict(n_train=60, n_test=30)
OPTIONS = dict(width=4, features='random', pool_size=4, real_batch=0, factor=2)
PROTOCOL = make_protocol('paper', width=4, epochs=1, epochs_whole=1)


def config(method='avdd', ipc=1, steps=8, seed=0, **options):
    options = {} if method == 'random' else OPTIONS | options
    return RunConfig('soundshapes', method, ipc, steps, seed, dict(DATA), options)


@pytest.fixture(scope='module')
def splits(): return load('soundshapes', **DATA)


@pytest.fixture(autouse=True, scope='module')
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AVDD_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def finished(splits, tmp_path_factory):
    "An uninterrupted run."
    out = tmp_path_factory.mktemp('runs')/'whole'
    return out, list(run(config(), out, splits=splits))


def result(out): return (out/'result.safetensors').read_bytes()


def steps_of(out): return [e['step'] for e in read_events(out/'events.jsonl')]


def test_a_finished_run_leaves_what_it_promises(finished):
    out, progress = finished
    assert [p.step for p in progress] == steps_of(out) == list(range(1, 9))
    names = {p.name for p in out.iterdir() if not p.name.startswith('.')}
    assert names == {'config.json', 'events.jsonl', 'done.json', 'initial.safetensors', 'initial.safetensors.json',
                     'result.safetensors', 'result.safetensors.json', 'snapshots'}
    read, syn = load_run(out)
    assert read == config() and read.hash == config().hash and syn.provenance['versions']['torch'] == torch.__version__
    start = load_run(out, 'initial')[1]
    assert all(not torch.equal(syn.tensors[m], start.tensors[m]) for m in syn.tensors)
    assert {'loss', 'terms', 'seconds', 'step'} <= set(read_events(out/'events.jsonl')[0])
    done = json.loads((out/'done.json').read_text())
    assert done['steps'] == 8 and done['seconds'] > 0


def test_a_finished_run_returns_at_once(finished):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.iterdir() if p.name != '.lock'}
    for resume in (True, False): assert list(run(config(), out, resume=resume)) == []
    assert {p: p.stat().st_mtime_ns for p in out.iterdir() if p.name != '.lock'} == before


def test_it_repeats_in_another_folder_and_not_with_another_seed(finished, splits, tmp_path):
    list(run(config(), tmp_path/'a', splits=splits))
    list(run(config(seed=1), tmp_path/'b', splits=splits))
    assert result(tmp_path/'a') == result(finished[0]) != result(tmp_path/'b')


@pytest.mark.parametrize('stop', [1, 3, 7])
def test_closed_and_resumed(finished, splits, tmp_path, stop):
    gen = run(config(), tmp_path/'r', splits=splits)
    for _ in range(stop): next(gen)
    gen.close()
    with pytest.raises(UserError, match="unfinished: pass --resume"): next(run(config(), tmp_path/'r', resume=False))
    with pytest.raises(UserError, match="not finished"): load_run(tmp_path/'r')
    assert [p.step for p in run(config(), tmp_path/'r', splits=splits)] == list(range(stop + 1, 9))
    assert result(tmp_path/'r') == result(finished[0]) and steps_of(tmp_path/'r') == list(range(1, 9))


@pytest.mark.parametrize('per_class', [False, True])
@pytest.mark.parametrize('hit', [1, 4, 7])
def test_an_interrupt_in_the_middle_of_a_step_changes_nothing(splits, tmp_path, monkeypatch, per_class, hit):
    "Ctrl-C while pixels are half updated: the checkpoint is that of the last whole step."
    wanted = config(steps=3, per_class_steps=per_class)
    list(run(wanted, tmp_path/'whole', splits=splits))
    room = importlib.import_module('avdd_nb.distill')
    plain, calls = room._update, []
    def update(*a):
        calls.append(0)
        plain(*a)
        if len(calls) == (4*hit if per_class else max(1, hit//3)): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(room, '_update', update)
        list(run(wanted, tmp_path/'r', splits=splits))
    list(run(wanted, tmp_path/'r', splits=splits))
    assert result(tmp_path/'r') == result(tmp_path/'whole') and steps_of(tmp_path/'r') == [1, 2, 3]


CHILD = """
import json, sys
import torch
from avdd_nb.runs import RunConfig, run
torch.set_num_threads(1)
config, out, every = RunConfig(**json.loads(sys.argv[1])), sys.argv[2], float(sys.argv[3])
for p in run(config, out, checkpoint_every=every): print(p.step, flush=True)
"""

def child(cfg, out, every=.2):
    import dataclasses
    command = [sys.executable, '-c', CHILD, json.dumps(dataclasses.asdict(cfg)), str(out), str(every)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS='1'))


def wait_for(ready, process, limit=60):
    end = time.monotonic() + limit
    while not ready() and process.poll() is None and time.monotonic() < end: time.sleep(.002)


MOMENTS = {
    'before the configuration': lambda out: True,
    'before the first step': lambda out: (out/'config.json').exists(),
    'after the first step': lambda out: (out/'events.jsonl').exists() and (out/'events.jsonl').stat().st_size,
    'just after a checkpoint': lambda out: (out/'checkpoint.safetensors').exists(),
    'later': lambda out: (out/'events.jsonl').exists() and len(steps_of(out)) > 25,
}

def test_kill_9_at_many_moments_then_the_same_bytes(tmp_path, splits):
    cfg, killed = config(steps=40), tmp_path/'killed'
    whole = child(cfg, tmp_path/'whole')
    assert whole.communicate()[0].split() == [str(s) for s in range(1, 41)]
    for ready in MOMENTS.values():
        p = child(cfg, killed, .02)
        wait_for(lambda ready=ready: ready(killed), p)
        p.send_signal(signal.SIGKILL)
        p.communicate()
    assert not (killed/'done.json').exists(), "the run was over before the last kill: make it longer"
    p = child(cfg, killed)
    told, err = p.communicate()
    assert p.returncode == 0, err
    assert int(told.split()[0]) > 1                                                # it went on, it did not begin anew
    assert result(killed) == result(tmp_path/'whole') and steps_of(killed) == list(range(1, 41))
    assert load_run(killed)[1].factor == 2 and not (killed/'checkpoint.safetensors').exists()


def test_a_torn_configuration_file_does_not_block_the_folder(tmp_path, splits):
    (tmp_path/'.config.json.abc.tmp').write_text('{"ru')               # what kill -9 leaves in the middle of a write
    assert len(list(run(config(steps=1), tmp_path, splits=splits))) == 1


def test_a_second_process_is_told(tmp_path, splits):
    gen = run(config(), tmp_path/'r', splits=splits)
    next(gen)
    p = child(config(), tmp_path/'r')
    err = p.communicate()[1]
    assert p.returncode == 1 and 'is already going on in another process' in err
    list(gen)
    assert steps_of(tmp_path/'r') == list(range(1, 9))


def test_other_folders_are_refused(tmp_path, finished, splits):
    out, _ = finished
    for other in (config(seed=1), config(steps=9), config(lr=.1), config('random')):
        with pytest.raises(UserError, match="holds another run"): next(run(other, out))
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'cat.jpg').touch()
    with pytest.raises(UserError, match="holds no run"): next(run(config(), tmp_path/'photos'))
    assert [p.name for p in (tmp_path/'photos').iterdir()] == ['cat.jpg']
    with pytest.raises(UserError, match="Could not write"): next(run(config(), tmp_path/'photos'/'cat.jpg'))


def test_a_run_that_cannot_begin_leaves_the_folder_free(tmp_path, splits):
    "The first try has a mistake; the second, without it, may use the same folder."
    out = tmp_path/'r'
    for bad in (RunConfig('soundshape', 'random'), *(RunConfig('soundshapes', 'random', data={k: 3})
                                                     for k in ('n_trian', 'name', 'root')),
                RunConfig('soundshapes', 'randm'), RunConfig('soundshapes', 'avdd', options=dict(name='x')),
                RunConfig('soundshapes', 'random', ipc=7, data=dict(DATA)), RunConfig('avmnist', 'random')):
        with pytest.raises(UserError): list(run(bad, out, root=tmp_path/'nothing'))
    assert list(run(config('random'), out, splits=splits)) == [] and (out/'done.json').exists()


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', 'null', '{"run": 3, "hash": "x"}', '{"run": {"dataset": "x"}}'])
def test_a_corrupted_configuration_is_one_sentence(tmp_path, finished, text):
    (tmp_path/'config.json').write_text(text)
    with pytest.raises(UserError, match='config.json'): load_run(tmp_path)
    with pytest.raises(UserError, match='config.json'): next(run(config(), tmp_path))


def test_an_edited_configuration_is_noticed(tmp_path, splits):
    list(run(config('random'), tmp_path/'r', splits=splits))
    text = (tmp_path/'r'/'config.json').read_text()
    (tmp_path/'r'/'config.json').write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match='was changed'): load_run(tmp_path/'r')


def test_a_damaged_result_or_checkpoint_is_noticed(tmp_path, splits):
    out = tmp_path/'r'
    gen = run(config(), out, splits=splits)
    next(gen)
    gen.close()
    data = (out/'checkpoint.safetensors').read_bytes()
    assert load_state(out/'checkpoint.safetensors')[1]['step'] == 1
    (out/'checkpoint.safetensors').write_bytes(data[:-9])
    with pytest.raises(UserError, match="is not a tensor file"): next(run(config(), out, splits=splits))
    (out/'checkpoint.safetensors').write_bytes(data)
    list(run(config(), out, splits=splits))
    (out/'result.safetensors').write_bytes(result(out)[:-1] + b'!')
    with pytest.raises(UserError, match="does not match the SHA-256"): load_run(out)


def test_nan_keeps_the_last_finite_state_on_disk(tmp_path, splits, monkeypatch):
    from avdd_nb.match.pool import FeaturePool
    plain = FeaturePool.at
    def at(self, step):
        draw = plain(self, step)
        if step == 2: draw.real['image'][3] = float('nan')
        return draw
    monkeypatch.setattr(FeaturePool, 'at', at)
    with pytest.raises(UserError, match="term 'base' is nan"): list(run(config(), tmp_path/'r', splits=splits))
    tensors, meta = load_state(tmp_path/'r'/'checkpoint.safetensors')
    assert meta['step'] == 2 and all(torch.isfinite(x).all() for x in tensors.values())
    assert steps_of(tmp_path/'r') == [1, 2]


def test_selection_methods_run_without_steps(tmp_path, splits):
    assert list(run(config('random', ipc=2), tmp_path/'r', splits=splits)) == []
    _, syn = load_run(tmp_path/'r')
    assert len(syn) == 20 and torch.equal(syn.labels, torch.arange(10).repeat_interleave(2))


def test_hash_names_everything_that_a_result_depends_on():
    base = config()
    others = [config(seed=1), config(steps=9), config(ipc=2), config('dm'), config(lr=1), RunConfig('avmnist', 'avdd'),
              RunConfig('soundshapes', 'avdd', data=dict(n_train=61), options=OPTIONS)]
    assert len({c.hash for c in [base, *others]}) == len(others) + 1 and config().hash == base.hash


def test_snapshots_are_those_of_the_step_and_survive_a_stop(splits, tmp_path):
    seen = {}
    for p in run(config(), tmp_path/'a', splits=splits):
        if p.step in runs.snapshot_steps(8): seen[p.step] = runs.snapshot_path(tmp_path/'a', p.step).read_bytes()
    for p in run(config(), tmp_path/'b', splits=splits):
        if p.step == 3: break
    for _ in run(config(), tmp_path/'b', splits=splits): pass
    assert {int(p.stem): p.read_bytes() for p in (tmp_path/'b'/'snapshots').glob('*.safetensors')} == seen and seen
    small = load_synset(runs.snapshot_path(tmp_path/'b', 2))
    assert small.n_classes == len(small) == 10 and small.factor == load_run(tmp_path/'a')[1].factor
    for _ in run(config(), tmp_path/'c', splits=splits, snapshots=0): pass
    assert not (tmp_path/'c'/'snapshots').exists()


def test_confusions_are_kept_and_agree_with_the_rows(finished, splits, monkeypatch):
    out, _ = finished
    rows = evaluate_run(out, PROTOCOL, 2, splits=splits)
    monkeypatch.setattr(runs, 'confusions', None)                                   # a second training would fail
    counts = runs.run_confusions(out, PROTOCOL, 2, splits=splits)
    for r in rows:
        found = counts[r['modality'], r['fusion']][r['seed']]
        assert 100*found.diag().sum().item()/found.sum().item() == pytest.approx(r['accuracy'])
        assert found.sum(1).tolist() == splits.test.labels.bincount(minlength=10).tolist()


def test_evaluation_rows_and_file(finished, splits):
    out, _ = finished
    done = []
    rows = evaluate_run(out, PROTOCOL, 2, splits=splits, baselines=True, progress=done.append)
    rivals = {('undistilled start', 1), ('random pairs', 1), ('whole data', 0)}
    assert {(r['method'], r['ipc']) for r in rows} == {('avdd', 1)} | rivals
    assert len(rows) == 4*2*4 and done[-1] == pytest.approx(1) and done == sorted(done)
    assert {r['n_train'] for r in rows if r['method'] == 'whole data'} == {60}
    assert {r['n_train'] for r in rows if r['method'] == 'random pairs'} == {10}
    written = json.loads(next(out.glob('evaluation-paper*.json')).read_text())
    assert written == json.loads(json.dumps(rows))
    alone = evaluate_run(out, PROTOCOL, 2, splits=splits)
    strip = lambda rows: [r['accuracy'] for r in rows if r['method'] == 'avdd']
    assert strip(alone) == strip(rows) and {r['method'] for r in alone} == {'avdd'}


def test_two_changed_protocols_live_side_by_side(finished, splits):
    out, _ = finished
    other = make_protocol('paper', width=4, epochs=2, epochs_whole=1)
    rows = {p.digest: evaluate_run(out, p, 1, splits=splits) for p in (PROTOCOL, other)}
    kept = {json.loads(p.read_text())[0]['digest']: p for p in out.glob('evaluation-*.json')}
    assert set(kept) >= set(rows) and len({p.name for p in kept.values()}) == len(kept)
    frame = accuracy_frame({'x': [r for found in rows.values() for r in found]})
    assert set(frame.protocol) == {f'paper* {d}' for d in rows} and frame.n.eq(1).all()
    counts = [runs.run_confusions(out, p, 1, splits=splits) for p in (PROTOCOL, other)]
    assert not all(counts[0][k].equal(counts[1][k]) for k in counts[0])


def test_the_name_that_changed_protocols_once_shared_is_still_read(finished, splits, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path/'run')
    rows, old = evaluate_run(out, PROTOCOL, 1, splits=splits), 'paper-changed'
    for path in [*out.glob(f'*-paper-{PROTOCOL.digest}.*')]:
        path.rename(path.with_name(path.name.replace(f'paper-{PROTOCOL.digest}', old)))
    with monkeypatch.context() as m:
        m.setattr(runs, 'confusions', None)                                         # a second training would fail
        assert runs.run_confusions(out, PROTOCOL, 1, splits=splits)
    assert evaluate_run(out, PROTOCOL, 1, splits=splits)[0]['accuracy'] == rows[0]['accuracy']
    assert not (out/f'evaluation-{old}.json').exists()                              # the same rows are not kept twice
    write_json(out/f'evaluation-{old}.json', [dict(digest='another')])
    evaluate_run(out, PROTOCOL, 1, splits=splits)
    assert (out/f'evaluation-{old}.json').exists()


def test_networks_of_one_protocol_are_told_by_name():
    rows = [dict(protocol='paper*', digest=a, arch=a, modality='AV', fusion='mean', accuracy=1.) for a in ('A', 'B')]
    assert list(accuracy_frame({'x': rows}).protocol) == ['paper* A', 'paper* B']


def test_evaluating_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="There is no file"): evaluate_run(tmp_path, PROTOCOL)
    write_json(tmp_path/'config.json', [])
    with pytest.raises(UserError, match="config.json"): evaluate_run(tmp_path, PROTOCOL)


def test_versions(): assert set(runs.versions()) >= {'torch', 'python', 'avdd_nb'}


@pytest.mark.parametrize('make', [torch.optim.SGD, torch.optim.Adam])
def test_whatever_is_learnt_and_the_optimiser_resume(splits, tmp_path, monkeypatch, make):
    "A method with a learnt scalar beside its pixels, and another optimiser: stopped and resumed to the same bytes."
    from avdd_nb.methods.avdd import AVDD
    begin, terms = AVDD.begin, AVDD.terms

    def with_scalar(self, data, ipc, seed):
        syn = begin(self, data, ipc, seed)
        syn.extras['scale'] = torch.tensor(1.)
        return syn

    def scaled(self, syn, draw, groups):
        return {k: v*syn.extras['scale']**2 for k, v in terms(self, syn, draw, groups).items()}

    monkeypatch.setattr(AVDD, 'begin', with_scalar)
    monkeypatch.setattr(AVDD, 'terms', scaled)
    monkeypatch.setattr(AVDD, 'optimiser', lambda self, syn: make(
        [x.requires_grad_(True) for x in syn.learnables().values()], lr=.01))
    list(run(config(), tmp_path/'whole', splits=splits))
    for p in run(config(), tmp_path/'r', splits=splits):
        if p.step == 3: break
    list(run(config(), tmp_path/'r', splits=splits))
    assert result(tmp_path/'r') == result(tmp_path/'whole')
    assert load_run(tmp_path/'r')[1].extras['scale'] != 1


def test_the_frozen_judge_learns_its_encoder_on_the_real_pairs(tmp_path, monkeypatch):
    from avdd_nb import frozen
    monkeypatch.setattr(frozen, 'joint_encoder', functools.partial(frozen.joint_encoder, updates=3, width=4))
    list(run(config('random'), tmp_path / 'r'))
    rows = evaluate_run(tmp_path / 'r', PROTOCOL, seeds=2, judge='frozen', baselines=True)
    assert {r['arch'] for r in rows} == {'frozen encoder'} and {r['modality'] for r in rows} == {'AV', 'audio', 'image'}
    assert {r['method'] for r in rows} == {'random', 'undistilled start', 'random pairs', 'whole data'}
    with pytest.raises(UserError, match='real pairs'):
        runs.JUDGES['frozen'](load_run(tmp_path / 'r')[1], load('soundshapes', **DATA).test, PROTOCOL, 1)
