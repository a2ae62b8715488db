"DC and DSA: a naive second implementation, the nested loop as a walk that resumes to the same bits, memory in words."
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from avdd_nb.core import UserError
from avdd_nb.data.catalog import load
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.distill import distill
from avdd_nb.match import augment
from avdd_nb.methods.base import make_method
from avdd_nb.methods.dc import DC, Visit
from avdd_nb.runs import RunConfig, load_run, run

C, KINDS = 3, dict(audio=Modality('audio', 'spectrogram', (1, 32, 16)), image=Modality('image', 'image', (3, 16, 16)))


def data(n=24):
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % C
    x = {m: torch.randn(n, *s.shape, generator=gen) + labels[:, None, None, None] for m, s in KINDS.items()}
    return PairedData(x, KINDS, labels, list('abc'))


def method(name='dsa', **options): return make_method(name, **dict(width=4, real_batch=5) | options)


def walk(m, syn, stop, start=0, **more): return list(distill(m, syn, m.source(data(), 0), stop, start=start, **more))


def naive_terms(m, syn, visit, nets):
    "Per class, per layer, per unit, in loops."
    total = {k: torch.zeros(C) for k in nets}
    for mod, net in nets.items():
        for c in range(C):
            ws = [p for p in net.parameters() if p.dim() > 1]
            real = augment.apply(data().batch(visit.real[c])[mod], visit.omega)
            tensors, labels = syn.decode()
            mine = augment.apply(tensors[mod][labels == c], visit.omega)
            gr, gs = (torch.autograd.grad(F.cross_entropy(net(x), torch.tensor([c]*len(x))), ws) for x in (real, mine))
            for a, b in zip(gr, gs):
                for u in range(len(a)):
                    r, s = a[u].flatten(), b[u].flatten()
                    total[mod][c] += 1 - r @ s/(r.norm()*s.norm() + 1e-6)
    return total


@pytest.mark.parametrize('name, factor', [('dc', 1), ('dsa', 1), ('dsa', 2)])
def test_terms_are_those_of_naive_loops(name, factor):
    m = method(name, factor=factor)
    syn = m.begin(data(), 2, 0)
    for step in range(3):
        visit = m.source(data(), 0).at(step)
        found = m.terms(syn, visit, slice(0, C))
        for mod, want in naive_terms(m, syn, visit, visit.nets).items():
            torch.testing.assert_close(found[mod], want, rtol=1e-3, atol=1e-3)


def test_the_network_is_trained_between_steps_on_the_set_as_it_then_is():
    "Two steps by hand: fresh network, step on S, two epochs of SGD on the new S, step on S."
    m = method('dc', outer=2, inner=2, lr=1., momentum=0.)
    syn = m.begin(data(), 1, 0)
    by_hand = copy.deepcopy(syn)
    walk(m, syn, 2)
    nets = m.networks(KINDS, C, 0, 0, torch.device('cpu'))
    for k in range(2):
        visit = m.source(data(), 0).at(k)
        if k:
            for mod, net in nets.items():
                sgd = torch.optim.SGD(net.parameters(), lr=.01)
                for _ in range(2):
                    sgd.zero_grad()
                    F.cross_entropy(net(by_hand.tensors[mod].detach()), by_hand.labels).backward()
                    sgd.step()
        visit.nets, leaves = nets, [x.requires_grad_(True) for x in by_hand.tensors.values()]
        terms = m.terms(by_hand, visit, slice(0, C))
        for x, g in zip(leaves, torch.autograd.grad(sum(terms.values()).sum(), leaves)): x.data -= g
    for mod in KINDS: torch.testing.assert_close(syn.tensors[mod], by_hand.tensors[mod], rtol=1e-3, atol=1e-4)


def test_chunks_of_classes_change_nothing():
    m, found = method(outer=3, inner=1), []
    for at_once in (1, 2, 3):
        syn = m.begin(data(), 1, 0)
        walk(m, syn, 4, at_once=at_once)
        found.append(syn.tensors['image'].detach())
    assert all((x - found[0]).abs().max() < 1e-4 for x in found)


@pytest.mark.parametrize('name', ['dc', 'dsa'])
def test_loss_falls_and_seeds_decide(name):
    m, ends = method(name, lr=.3, outer=20, inner=0), []                    # one network: nothing else makes it fall
    for seed in (0, 0, 1):
        syn = m.begin(data(), 1, seed)
        losses = [p.loss for p in distill(m, syn, m.source(data(), seed), 10)]
        assert sum(losses[-3:]) < sum(losses[:3])
        ends.append(syn.tensors['audio'].detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_kept_gradients_are_those_that_would_be_computed(monkeypatch):
    m, made = method(pool_size=2, outer=2), []
    plain = Visit._measure
    monkeypatch.setattr(Visit, '_measure', lambda self, *a: made.append(self.stream) or plain(self, *a))
    first = m.begin(data(), 1, 0)
    walk(m, first, 8)
    assert len([s for s in made if s[0] == 'entry']) == 2*len(KINDS) and ('step', 1) in made and ('step', 0) not in made
    made.clear()
    again = m.begin(data(), 1, 0)
    walk(m, again, 8, at_once=2)
    assert not [s for s in made if s[0] == 'entry']
    for mod in KINDS: torch.testing.assert_close(first.tensors[mod], again.tensors[mod], rtol=1e-4, atol=1e-5)
    visit = m.source(data(), 0).at(4)
    visit.nets = m.networks(KINDS, C, 0, visit.number, torch.device('cpu'))
    for mod in KINDS:
        kept, computed = visit.real_gradients(mod, slice(1, 3)), plain(visit, mod, slice(1, 3))
        for k in kept: torch.testing.assert_close(kept[k], computed[k], rtol=1e-5, atol=1e-7)


def test_noise_is_noise_and_says_so():
    syn = method('dc').begin(data(), 4, 0)
    assert syn.provenance['init'] == 'noise' and 'network' not in syn.extras
    assert abs(syn.tensors['image'].mean()) < .1 and abs(syn.tensors['image'].std() - 1) < .1


OPTIONS = dict(width=4, real_batch=4, outer=3, inner=2, features='random')
CONFIG = RunConfig('soundshapes', 'dsa', 1, 7, 0, dict(n_train=60, n_test=30), OPTIONS)


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AVDD_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def splits(): return load('soundshapes', **CONFIG.data)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, splits):
    out = tmp_path_factory.mktemp('runs')/'whole'
    list(run(CONFIG, out, splits=splits))
    return (out/'result.safetensors').read_bytes(), out


CHILD = """
import json, sys
from avdd_nb.runs import RunConfig, run
for p in run(RunConfig(**json.loads(sys.argv[1])), sys.argv[2], checkpoint_every=0.): print(p.step, flush=True)
"""


@pytest.mark.parametrize('stop', [2, 3, 5])
def test_stopped_anywhere_in_a_network_s_life_it_ends_in_the_same_bytes(whole, splits, tmp_path, stop):
    gen = run(CONFIG, tmp_path/'r', splits=splits)
    for _ in range(stop): next(gen)
    gen.close()
    assert [p.step for p in run(CONFIG, tmp_path/'r', splits=splits)] == list(range(stop + 1, 8))
    assert (tmp_path/'r'/'result.safetensors').read_bytes() == whole[0]


@pytest.mark.slow
def test_killed_in_a_network_s_life_it_ends_in_the_same_bytes(whole, splits, tmp_path):
    p = subprocess.Popen([sys.executable, '-c', CHILD, json.dumps(dataclasses.asdict(CONFIG)), str(tmp_path/'r')],
                         stdout=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    while p.stdout.readline().strip() != '4': assert p.poll() is None
    time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    list(run(CONFIG, tmp_path/'r', splits=splits))
    assert (tmp_path/'r'/'result.safetensors').read_bytes() == whole[0]


def test_the_result_does_not_carry_the_network(whole):
    assert load_run(whole[1])[1].extras == {} and 'network' in load_run(whole[1], 'initial')[1].extras


def test_memory_is_told_before_and_explained_after(tmp_path, splits, monkeypatch):
    told = []
    list(run(CONFIG, tmp_path/'told', splits=splits, tell=told.append))
    assert len(told) == 1 and 'MB' in told[0] and '10 of 10 classes' in told[0]
    for error in (MemoryError(), torch.OutOfMemoryError('CUDA out of memory'),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")):
        def short(self, *a, error=error): raise error
        monkeypatch.setattr(DC, 'terms', short)
        with pytest.raises(UserError, match="Out of memory.*Lower ipc, factor or width"):
            list(run(CONFIG, tmp_path/'r', splits=splits))
    monkeypatch.setattr(DC, 'terms', lambda *a: [][1])
    with pytest.raises(IndexError): list(run(CONFIG, tmp_path/'r', splits=splits))


def test_data_without_classes_are_refused():
    plain = PairedData({m: x for m, x in data().tensors.items()}, KINDS)
    m = method(outer=2)
    with pytest.raises(UserError, match="no classes"):
        syn = m.begin(plain, 1, 0)
        next(distill(m, syn, m.source(plain, 0), 1))
