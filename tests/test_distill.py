"The loop: golden steps of the reference, chunks equal to naive loops, stops that keep the last finite state."
import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.distill import chunks, distill
from avdd_nb.match.pool import FeaturePool
from avdd_nb.methods.base import make_method
from avdd_nb.synset import SyntheticSet, from_real

GOLDEN = np.load(Path(__file__).parent/'golden'/'avddsteps.npz', allow_pickle=False)
KINDS = dict(audio=Modality('audio', 'spectrogram', (1, 32, 32)), image=Modality('image', 'image', (3, 16, 16)))
C = 4


def class_means(f, labels, n): return torch.stack([f[labels == c].mean(0) for c in range(n)])


@dataclass
class Linear:
    "A draw whose networks are matrices."
    W: dict
    real: dict

    def means(self, x, labels, n_classes): return {m: class_means(x[m] @ self.W[m], labels, n_classes) for m in x}


@pytest.mark.parametrize('i', range(2))
def test_reference_steps_are_the_public_ones(i):
    g = {k.split('_', 1)[1]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN if k.startswith(f'avddsteps{i}_')}
    T, classes = g['loss'].shape
    flat = Modality('m', 'image', (5,))
    syn = SyntheticSet(dict(aud=g['syn_aud0'].clone(), img=g['syn_img0'].clone()),
                       torch.arange(classes).repeat_interleave(int(g['ipc'])), dict(aud=flat, img=flat), list('abc'))

    def at(it):
        W = dict(aud=g['W_aud'][it], img=g['W_img'][it])
        return Linear(W, {m: (g[f'real_{m}'][it] @ W[m]).mean(1) for m in W})

    lam, lr = g['lambda_icm_cgm'].tolist(), g['lr_aud_img'].tolist()
    method = make_method('avdd', lam_icm=lam[0], lam_cgm=lam[1], factor=1, per_class_steps=True)
    leaves = [syn.tensors[m].requires_grad_(True) for m in ('aud', 'img')]
    sgd = torch.optim.SGD([dict(params=[x], lr=r) for x, r in zip(leaves, lr)], momentum=.5)
    seen = {m: [] for m in syn.tensors}
    plain = sgd.step
    def step():
        plain()
        for m, x in syn.tensors.items(): seen[m].append(x.detach().clone())
    sgd.step = step
    loss = torch.tensor([p.loss for p in distill(method, syn, SimpleNamespace(at=at), T, sgd)])
    torch.testing.assert_close(loss, g['loss'].sum(1), rtol=1e-4, atol=1e-5)
    for m in seen:
        want = g[f'syn_{m}']
        torch.testing.assert_close(torch.stack(seen[m]).view_as(want), want, rtol=1e-4, atol=1e-6)


def data(n=8, seed=0, classes=C):
    gen = torch.Generator().manual_seed(seed)
    shift = torch.arange(classes).repeat_interleave(n).view(-1, 1, 1, 1)
    return PairedData({m: torch.randn(n*classes, *k.shape, generator=gen) + shift for m, k in KINDS.items()}, KINDS,
                      torch.arange(classes).repeat_interleave(n), [f'class {c}' for c in range(classes)])


def started(name='avdd', ipc=1, **options):
    "(method, synthetic set, source) on small random pairs."
    d = data()
    method = make_method(name, **(dict(width=4, pool_size=3, real_batch=0, init='random') | options))
    idx = d.per_class(ipc*method.factor**2, torch.Generator().manual_seed(1))
    return method, from_real(d, idx, method.factor), FeaturePool(d, method.pool_size, method.width, keep=False)


def pixels(syn): return {m: x.detach().clone() for m, x in syn.tensors.items()}


def assert_same(a, b, **how):
    for m in a: torch.testing.assert_close(a[m], b[m], **(how or dict(rtol=0, atol=0)))


def naive_gradients(method, syn, draw):
    "One class after the other, terms written out, gradients of their sum."
    leaves = {m: x.detach().clone().requires_grad_(True) for m, x in syn.tensors.items()}
    total = 0.
    for c in range(C):
        rows = [i for i in range(len(syn)) if syn.labels[i] == c]
        one = SyntheticSet({m: x[rows] for m, x in leaves.items()}, syn.labels[rows], syn.modalities, syn.classes,
                           syn.factor, syn.order)
        a, v = [draw.embed(one.decode()[0])[m].mean(0) for m in ('audio', 'image')]
        A, V = draw.real['audio'][c], draw.real['image'][c]
        total = total + ((A - a)**2).sum() + ((V - v)**2).sum()
        total = total + method.lam_icm*((A + V - a - v)**2).sum() + method.lam_cgm*((A + v - V - a)**2).sum()
    total.backward()
    return total.item(), {m: x.grad for m, x in leaves.items()}


@pytest.mark.parametrize('ipc, factor', [(1, 2), (2, 1), (2, 3)])
def test_chunks_equal_all_at_once_and_the_naive_loop(ipc, factor):
    d = data(n=20)
    method = make_method('avdd', width=4, factor=factor, lam_icm=3, lam_cgm=7)
    start = from_real(d, d.per_class(ipc*factor**2, torch.Generator().manual_seed(1)), factor)
    source = FeaturePool(d, 3, 4, keep=False)
    loss, grads = naive_gradients(method, start, source.at(0))
    for at_once in (1, 2, 3, C, 99):
        syn = copy.deepcopy(start)
        sgd = method.optimiser(syn)
        p, = distill(method, syn, source, 1, sgd, at_once=at_once)
        assert p.loss == pytest.approx(loss, rel=1e-5) and p.loss == pytest.approx(sum(p.terms.values()))
        for m, x in syn.tensors.items():
            torch.testing.assert_close(x.grad, grads[m], atol=1e-5*float(grads[m].abs().max()), rtol=1e-4)
            torch.testing.assert_close(x.detach(), start.tensors[m] - method.lr*grads[m], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 30), st.integers(1, 40))
def test_chunks_cover_all_classes_once(n, at_once):
    parts = chunks(n, at_once)
    assert [c for s in parts for c in range(s.start, s.stop)] == list(range(n))
    assert max(s.stop - s.start for s in parts) == min(n, at_once)


def test_rows_and_memory():
    method, syn, source = started(ipc=2)
    for c in range(C): assert (syn.labels[syn.rows(slice(c, c + 1))] == c).all()
    assert method.groups_at_once(syn, 1e9) == C and method.groups_at_once(syn, 1e-9) == 1
    terms = method.terms(syn, source.at(0), slice(1, 3))
    assert list(terms) == ['base', 'icm', 'cgm'] and all(v.shape == (2,) for v in terms.values())


# Those that match plain class means; tests/test_method_check.py asks every registered method.
@pytest.mark.parametrize('name', ['dm', 'dm+h+f', 'avdd'])
def test_loss_falls_and_runs_repeat(name):
    runs = []
    for _ in range(2):
        method, syn, source = started(name, lr=.02, pool_size=2)
        progress = list(distill(method, syn, source, 20))
        runs.append((pixels(syn), [p.loss for p in progress]))
    assert_same(runs[0][0], runs[1][0])
    loss = runs[0][1]
    assert loss == runs[1][1] and sum(loss[-4:]) < .9*sum(loss[:4])
    assert [p.step for p in progress] == list(range(1, 21))
    assert all(b.seconds >= a.seconds > 0 for a, b in zip(progress, progress[1:])) and progress[0].memory_mb > 1


@pytest.mark.parametrize('per_class_steps', [False, True])
def test_a_run_goes_on_where_it_stopped(per_class_steps):
    whole = started(per_class_steps=per_class_steps)
    list(distill(*whole, 6))
    method, syn, source = started(per_class_steps=per_class_steps)
    sgd = method.optimiser(syn)
    list(distill(method, syn, source, 2, sgd))
    list(distill(method, syn, source, 6, sgd, start=2))
    assert_same(pixels(syn), pixels(whole[1]))


class Poisoned:
    "A source whose real side holds `value` for one class from one step on."
    def __init__(self, source, step, value): self.source, self.step, self.value = source, step, value

    def at(self, step):
        draw = copy.copy(self.source.at(step))
        draw.real = {m: x.clone() for m, x in draw.real.items()}
        if step >= self.step: draw.real['image'][2, 0] = self.value
        return draw


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('at_once', [1, C])
def test_nan_stops_with_step_class_and_term(value, at_once):
    method, syn, source = started()
    last = pixels(syn)
    with pytest.raises(UserError, match="Step 4, class 'class 2': the term 'base' is (nan|inf)"):
        for _ in distill(method, syn, Poisoned(source, 3, value), 9, at_once=at_once): last = pixels(syn)
    assert_same(pixels(syn), last)
    assert all(torch.isfinite(x).all() for x in last.values())


def test_nan_in_one_term_is_told_from_the_others():
    method, syn, source = started()
    plain = method.loss
    def loss(real, syn_means): return plain(real, syn_means) | dict(cgm=plain(real, syn_means)['cgm']*float('nan'))
    method.loss = loss
    with pytest.raises(UserError, match="class 'class 0': the term 'cgm' is nan"):
        list(distill(method, syn, source, 1))


def test_an_infinite_step_is_undone():
    method, syn, source = started()
    last, sgd = pixels(syn), method.optimiser(syn)
    for group in sgd.param_groups: group['lr'] = float('inf')
    with pytest.raises(UserError, match="would make a pixel infinite"):
        list(distill(method, syn, source, 1, sgd))
    assert_same(pixels(syn), last)


def test_matched_learning_rate():
    "ICM + CGM = 2·base: AVDD with equal weights λ is DM with its step size times 1 + 2λ."
    lam, lr = 10., .002
    one, other = started('avdd', lam_icm=lam, lam_cgm=lam, lr=lr), started('dm+h+f', lr=lr*(1 + 2*lam))
    assert one[0].factor == other[0].factor == 2
    before = pixels(one[1])
    assert_same(before, pixels(other[1]))
    a, b = list(distill(*one, 5)), list(distill(*other, 5))
    assert_same(pixels(one[1]), pixels(other[1]), atol=1e-4, rtol=1e-4)
    assert (pixels(one[1])['image'] - before['image']).abs().max() > 1e-2
    assert [p.loss for p in a] == pytest.approx([p.loss*(1 + 2*lam) for p in b], rel=1e-3)
    unmatched = started('dm+h+f', lr=lr)
    list(distill(*unmatched, 5))
    assert (pixels(unmatched[1])['image'] - pixels(one[1])['image']).abs().max() > 1e-2


def test_zero_weights_are_dm():
    one, other = started('avdd', lam_icm=0, lam_cgm=0), started('dm+h+f')
    list(distill(*one, 3)), list(distill(*other, 3))
    assert_same(pixels(one[1]), pixels(other[1]))
    moved = pixels(one[1])
    assert all(torch.isfinite(x).all() for x in moved.values())


def test_no_steps_change_nothing():
    method, syn, source = started()
    before = pixels(syn)
    assert list(distill(method, syn, source, 0)) == []
    assert_same(pixels(syn), before)
