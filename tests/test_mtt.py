"MTT and TESLA: naive second implementations, settings by modality, resuming to the same bits; experts trained once."
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters

from avdd_nb.core import UserError
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.distill import distill
from avdd_nb.match.experts import Experts
from avdd_nb.match.gradients import as_parameters, kept
from avdd_nb.methods.base import make_method
from avdd_nb.methods.mtt import MTT, differing, walk
from avdd_nb.runs import RunConfig, load_run, run

C, KINDS = 3, dict(audio=Modality('audio', 'spectrogram', (1, 32, 16)), image=Modality('image', 'image', (3, 16, 16)))
SMALL = dict(width=4, experts=2, inner=3, batch=4, lr=10., step_size=.05, differ='', lr_expert=.05, batch_expert=8)


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AVDD_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


def data(n=24, seed=0):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % C
    x = {m: torch.randn(n, *s.shape, generator=gen) + labels[:, None, None, None] for m, s in KINDS.items()}
    return PairedData(x, KINDS, labels, list('abc'))


def method(name='mtt', **options): return make_method(name, **SMALL | options)


def naive(net, way, x, batches, step_size):
    "N steps written out with dictionaries of parameters."
    params = {k: v.clone().requires_grad_(True) for k, v in as_parameters(net, way.start).items()}
    for inputs, labels in batches:
        loss = F.cross_entropy(torch.func.functional_call(net, params, (inputs,)), labels)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - step_size*g for (k, p), g in zip(params.items(), grads)}
    target, start = as_parameters(net, way.target), as_parameters(net, way.start)
    far = sum((params[k] - target[k]).square().sum() for k in params)
    return far/sum((start[k] - target[k]).square().sum() for k in params)


@pytest.mark.parametrize('factor', [1, 2])
def test_the_loss_is_that_of_steps_written_out(factor):
    m, d = method(factor=factor), data(60)
    syn = m.begin(d, 2, 0)
    m.optimiser(syn)
    terms = m.terms(syn, m.source(d, 0).at(3), slice(0, C))
    again, alike = m.source(d, 0).at(3), make_method('tesla', **SMALL, factor=factor)
    tesla = alike.terms(syn, m.source(d, 0).at(3), slice(0, C))
    for mod, way in again.items():
        batches = [make() for make in m.batches(syn, mod, way.generator)]
        assert [len(y) for _, y in batches] == ([4, 2, 4] if factor == 1 else [4, 4, 4])
        leaves = [syn.tensors[mod], syn.extras[f'step_size.{mod}']]
        want = naive(way.net, way, syn.tensors[mod], batches, leaves[1])
        torch.testing.assert_close(terms[mod], want[None], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(tesla[mod], want[None], rtol=1e-4, atol=1e-6)
        for a, b in zip(torch.autograd.grad(terms[mod].sum(), leaves), torch.autograd.grad(want, leaves)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4*b.abs().max().item())


def test_one_step_of_tesla_is_one_of_mtt():
    "With N = 1 nothing is dropped: the same pixels and step sizes."
    ends = []
    for name in ('mtt', 'tesla'):
        m = method(name, inner=1)
        syn = m.begin(data(), 2, 0)
        list(distill(m, syn, m.source(data(), 0), 3))
        ends.append(syn.learnables())
    for k in ends[0]: torch.testing.assert_close(ends[0][k], ends[1][k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['mtt', 'tesla'])
def test_loss_falls_and_the_seed_decides(name):
    m, ends = method(name, max_start=1, ahead=1, experts=1, lr_step_size=1e-4, strategy=''), []
    for seed in (0, 0, 1):
        syn = m.begin(data(), 2, seed)
        losses = [p.loss for p in distill(m, syn, m.source(data(), seed), 10)]
        assert sum(losses[-3:]) < sum(losses[:3])
        ends.append(syn.tensors['audio'].detach())
        assert all(syn.extras[f'step_size.{k}'] != torch.tensor(.05) for k in KINDS)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_a_step_of_tesla_keeps_as_much_for_many_student_steps_as_for_few():
    peaks = {}
    for name in ('mtt', 'tesla'):
        for inner in (2, 10):
            m = method(name, inner=inner)
            syn = m.begin(data(), 2, 0)
            m.optimiser(syn)
            draw = m.source(data(), 0).at(0)
            with kept() as k: sum(m.terms(syn, draw, slice(0, C)).values()).backward()
            peaks[name, inner] = k.peak
    assert peaks['mtt', 10] > 3.5*peaks['mtt', 2] and peaks['tesla', 10] < 1.15*peaks['tesla', 2]


def test_walk_shows_all_before_any_twice():
    plan = walk(7, 3, 6, torch.Generator().manual_seed(0))
    assert [len(p) for p in plan] == [3, 3, 1, 3, 3, 1]
    for part in (plan[:3], plan[3:]): assert sorted(torch.cat(part).tolist()) == list(range(7))
    assert [len(p) for p in walk(3, 20, 2, torch.Generator())] == [3, 3]


def test_settings_of_a_modality():
    m = make_method('mtt', differ='image: inner=5 lr=10; spectrogram: batch=7')
    image, audio = m.of(KINDS['image']), m.of(KINDS['audio'])
    assert (image.inner, image.lr, image.batch) == (5, 10., 20) and (audio.inner, audio.lr, audio.batch) == (10, 1e3, 7)
    groups = m.optimiser(m.begin(data(), 1, 0)).param_groups
    assert [g['lr'] for g in groups] == [1e3, 1e-5, 10., 1e-5]
    assert differing('') == {} and m.of(Modality('depth', 'depth', (1, 16, 16))).inner == 10
    for bad in ('imagine: inner=5', 'image: innr=5', 'image: inner', 'image: inner=-1', 'image inner=5',
                'image: width=4'):
        with pytest.raises(UserError): make_method('mtt', **SMALL | dict(differ=bad)).begin(data(), 1, 0)


def test_table_9_is_in_the_presets():
    for name in MTT.presets: make_method('mtt', preset=name)
    m = make_method('mtt', preset='ave-10')
    audio, image = m.of(KINDS['audio']), m.of(KINDS['image'])
    assert (audio.inner, audio.batch, audio.lr, audio.step_size) == (10, 20, 1e3, 1e-3)
    assert (image.inner, image.batch, image.lr, image.step_size) == (2, 1, 1e5, 1e-4)


def test_data_without_classes_are_refused():
    plain = PairedData(data().tensors, KINDS)
    with pytest.raises(UserError, match="no classes"): method().begin(plain, 1, 0)


# Experts

def test_an_epoch_of_an_expert_is_sgd_written_out():
    d = data()
    experts = Experts(d, count=1, width=4, lr=.1, batch=24, strategy='', seed=5)
    net = experts.network('image')
    sgd = torch.optim.SGD(net.parameters(), lr=.1)
    F.cross_entropy(net(d.batch()['image']), d.labels).backward()
    sgd.step()
    other = experts.network('image')
    vector_to_parameters(experts.at('image', 0, 1), other.parameters())
    for a, b in zip(net.parameters(), other.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_experts_go_on_from_what_is_there(monkeypatch, tmp_path):
    "Interrupted in its third epoch, an expert is trained again from its second; later ones grow it."
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path))
    whole = Experts(data(), 2, 4, .05, 8).at('audio', 1, 4)
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'other'))
    experts, made, plain = Experts(data(), 2, 4, .05, 8), [], Experts._epoch
    def epoch(self, m, expert, e):
        made.append(e)
        if e == 3 and made.count(3) == 1: raise KeyboardInterrupt
        return plain(self, m, expert, e)
    monkeypatch.setattr(Experts, '_epoch', epoch)
    for _ in range(3): experts.at('audio', 1, 2)
    assert sorted(made) == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt): experts.at('audio', 1, 3)
    assert torch.equal(experts.at('audio', 1, 4), whole)
    assert sorted(made) == [0, 1, 2, 3, 3, 4]


def test_two_at_once_train_an_expert_once(monkeypatch, tmp_path):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path))
    made, plain = [], Experts._epoch
    def epoch(self, *link):
        made.append(link)
        time.sleep(.02)
        return plain(self, *link)
    monkeypatch.setattr(Experts, '_epoch', epoch)
    threads = [threading.Thread(target=lambda: Experts(data(), 1, 4, .05, 8).fill(2)) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(made) == len(set(made)) == 2*3


def test_other_data_and_settings_have_other_experts():
    at = lambda d=0, **o: Experts(data(seed=d), **dict(count=1, width=4, lr=.05, batch=8) | o).at('image', 0, 1)
    assert torch.equal(at(), at()) and torch.equal(at(), at(count=5))
    for other in (at(d=1), at(lr=.1), at(batch=4), at(strategy=''), at(seed=1)): assert not torch.equal(at(), other)


# Runs

CONFIG = RunConfig('soundshapes', 'mtt', 1, 6, 0, dict(n_train=60, n_test=30), SMALL | dict(features='random'))
CHILD = """
import json, sys
from avdd_nb.runs import RunConfig, run
for p in run(RunConfig(**json.loads(sys.argv[1])), sys.argv[2], checkpoint_every=0.): print(p.step, flush=True)
"""


@pytest.mark.parametrize('name', ['mtt', pytest.param('tesla', marks=pytest.mark.slow)])
def test_killed_it_resumes_to_the_same_bytes(tmp_path, name, monkeypatch):
    config = dataclasses.replace(CONFIG, method=name)
    command = [sys.executable, '-c', CHILD, json.dumps(dataclasses.asdict(config)), str(tmp_path/'r')]
    env = dict(os.environ, OMP_NUM_THREADS='1', AVDD_CACHE=str(tmp_path/'cache'))     # its experts are killed with it
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    while p.stdout.readline().strip() != '3': assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    list(run(config, tmp_path/'whole'))
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))
    steps = [q.step for q in run(config, tmp_path/'r')]
    assert steps and steps[0] > 1 and steps[-1] == 6
    assert (tmp_path/'r'/'result.safetensors').read_bytes() == (tmp_path/'whole'/'result.safetensors').read_bytes()
    assert set(load_run(tmp_path/'r')[1].extras) == {'step_size.audio', 'step_size.image'}


def test_forecasts():
    few, many = (make_method('mtt', inner=n, differ='') for n in (5, 40))
    syn = few.begin(data(), 2, 0)
    assert many.memory_mb(syn) > 4*few.memory_mb(syn) and few.groups_at_once(syn) == C
    assert "lower" not in few.lighter and "tesla" in few.lighter and 'MB' in few.forecast(syn)
    same = [make_method('tesla', inner=n, differ='').memory_mb(syn) for n in (5, 40)]
    assert same[0] == same[1]
