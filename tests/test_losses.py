"Losses on class means: golden values and gradients of AVDD, the identity ICM + CGM = 2·base, naive loops."
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdd_nb.core import UserError
from avdd_nb.match.losses import cgm, class_mean, icm, mean_matching, rscmm, scmm

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'losses_avdd.npz', allow_pickle=False)
SHORT = dict(audio='aud', image='img')


def means_of(i):
    "Leaves (synthetic features) and the dicts of class means of golden case i."
    part = lambda who: {m: torch.from_numpy(GOLDEN[f'avdd{i}_{a}_{who}']) for m, a in SHORT.items()}
    leaves = {m: x.requires_grad_() for m, x in part('syn').items()}

    def mean(x):
        C, n, D = x.shape
        order = torch.randperm(C * n, generator=torch.Generator().manual_seed(i))
        return class_mean(x.reshape(-1, D)[order], torch.arange(C).repeat_interleave(n)[order], C)
    return leaves, {m: mean(x) for m, x in part('real').items()}, {m: mean(x) for m, x in leaves.items()}


def same(got, want):
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('i', range(3))
def test_golden_values_and_gradients(i):
    for row, (a, b) in enumerate(GOLDEN['avdd_lambda_icm_cgm']):
        leaves, real, syn = means_of(i)
        loss = mean_matching(real, syn) + float(a) * icm(real, syn) + float(b) * cgm(real, syn)
        same(loss, GOLDEN[f'avdd{i}_loss_per_class'][row])
        same(loss.sum(), GOLDEN[f'avdd{i}_loss_sum'][row])
        loss.sum().backward()
        same(leaves['audio'].grad, GOLDEN[f'avdd{i}_grad_aud_syn'][row])
        same(leaves['image'].grad, GOLDEN[f'avdd{i}_grad_img_syn'][row])


@pytest.mark.parametrize('i', range(3))
@pytest.mark.parametrize('f', [mean_matching, icm, cgm, scmm, rscmm])
def test_golden_terms(i, f):
    name = f.__name__.replace('mean_matching', 'base')
    leaves, real, syn = means_of(i)
    loss = f(real, syn)
    same(loss, GOLDEN[f'avdd{i}_{name}_per_class'])
    if name.endswith('scmm'):
        loss.sum().backward()
        same(leaves['audio'].grad, GOLDEN[f'avdd{i}_{name}_grad_aud_syn'])
        same(leaves['image'].grad, GOLDEN[f'avdd{i}_{name}_grad_img_syn'])


def drawn(seed, names, C, D, scale=1.):
    gen = torch.Generator().manual_seed(seed)
    new = lambda: {m: scale * torch.randn(C, D, generator=gen, dtype=torch.float64) for m in names}
    return new(), {m: s.requires_grad_() for m, s in new().items()}


shapes = dict(seed=st.integers(0, 2**31), n=st.integers(1, 4), C=st.integers(1, 5), D=st.integers(1, 40),
              scale=st.sampled_from([1e-3, 1., 1e3]), lam=st.floats(0, 50))


@given(**shapes)
@settings(max_examples=50, deadline=None)
def test_icm_plus_cgm_is_twice_base_for_each_pair(seed, n, C, D, scale, lam):
    real, syn = drawn(seed, [f'm{i}' for i in range(n)], C, D, scale)
    base, full = mean_matching(real, syn), mean_matching(real, syn) + lam * (icm(real, syn) + cgm(real, syn))
    factor = 1 + 2 * (n - 1) * lam
    torch.testing.assert_close(full, factor * base, rtol=1e-10, atol=0)
    for g, w in zip(*(torch.autograd.grad(f.sum(), list(syn.values())) for f in (full, base))):
        torch.testing.assert_close(g, factor * w, rtol=1e-9, atol=1e-9 * scale)


@given(**{k: shapes[k] for k in ('seed', 'n', 'C', 'D')})
@settings(max_examples=30, deadline=None)
def test_equal_a_naive_loop_and_do_not_see_the_order_of_modalities(seed, n, C, D):
    names = [f'm{i}' for i in range(n)]
    real, syn = drawn(seed, names, C, D)
    back = lambda d: {m: d[m] for m in names[::-1]}
    terms = {icm: lambda Ra, Rv, Sa, Sv: (Ra + Rv - Sa - Sv)**2, cgm: lambda Ra, Rv, Sa, Sv: (Ra - Rv - Sa + Sv)**2,
             scmm: lambda Ra, Rv, Sa, Sv: (Sa - Sv)**2, rscmm: lambda Ra, Rv, Sa, Sv: (Ra - Sv)**2 + (Rv - Sa)**2}
    for f, term in terms.items():
        want = [sum(sum(term(real[a][c, d], real[b][c, d], syn[a][c, d], syn[b][c, d]).item() for d in range(D))
                    for a, b in combinations(names, 2)) for c in range(C)]
        torch.testing.assert_close(f(real, syn).detach(), torch.tensor(want, dtype=torch.float64))
        torch.testing.assert_close(f(real, syn), f(back(real), back(syn)))


@pytest.mark.parametrize('f', [mean_matching, icm, cgm])
def test_zero_at_equality(f):
    real, _ = drawn(0, 'ab', 3, 5)
    assert f(real, real).eq(0).all()


@given(seed=st.integers(0, 2**31), n=st.integers(1, 30), C=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_class_mean_is_the_mean_of_each_class(seed, n, C):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=gen, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(C, (n,), generator=gen)
    got = class_mean(x, labels, C)
    for c in range(C):
        want = x[labels == c].mean(0) if (labels == c).any() else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(got[c], want)
    assert torch.autograd.gradcheck(lambda x: class_mean(x, labels, C), x)


def test_nan_stays_in_its_class():
    x = torch.tensor([[1.], [float('nan')], [2.]])
    assert class_mean(x, torch.tensor([0, 1, 2]), 3).isnan().flatten().tolist() == [False, True, False]


def test_different_sizes_are_refused_only_where_they_meet():
    real = {'audio': torch.zeros(2, 3), 'image': torch.zeros(2, 4)}
    assert mean_matching(real, real).tolist() == [0, 0]
    for f in (icm, cgm, scmm, rscmm):
        with pytest.raises(UserError, match='different sizes'):
            f(real, real)
