"Contrastive losses, geodesic energy and merging: golden values and gradients, naive loops, closed forms."
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from avdd_nb.core import UserError, rng
from avdd_nb.match.contrast import infonce, low_rank, similarities, soft_infonce, start_low_rank, wbce
from avdd_nb.match.kernels import agreement, discrepancy, energy, kernel
from avdd_nb.match.merge import MERGES, agreement_ratio, displacement_cosine, merge, merged

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'language.npz', allow_pickle=False)


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def leaves(*names):
    return [golden(n).clone().requires_grad_() for n in names]


def close(got, name, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(got.detach().numpy(), GOLDEN[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize('i', range(3))
def test_golden_infonce(i):
    v, t = leaves(f'mdm{i}_img_syn', f'mdm{i}_txt_syn')
    loss = infonce(similarities(v, t)).mean()
    loss.backward()
    close(loss, f'nce{i}_loss')
    close(v.grad, f'nce{i}_grad_img', rtol=1e-4)
    close(t.grad, f'nce{i}_grad_txt', rtol=1e-4)


@pytest.mark.parametrize('i', range(3))
def test_golden_low_rank_targets_and_losses(i):
    parts = dict(zip(('omega', 'left', 'right'), leaves(f'lors{i}_omega', f'lors{i}_A', f'lors{i}_B')))
    alpha, rows = float(GOLDEN[f'lors{i}_alpha']), golden(f'lors{i}_batch_indices')
    close(low_rank(**parts, alpha=alpha), f'lors{i}_S')
    close(low_rank(**parts, alpha=alpha, rows=rows), f'lors{i}_S_batch')
    for name, loss_of in dict(wbce=wbce, nce=soft_infonce).items():
        picked = {k: x.detach()[rows].requires_grad_() for k, x in parts.items()}
        logits, = leaves(f'lors{i}_logits')
        loss = loss_of(logits, low_rank(**picked, alpha=alpha))
        loss.backward()
        close(loss, f'lors{i}_{name}')
        close(logits.grad, f'lors{i}_{name}_grad_logits', atol=1e-6)
        for ours, theirs in dict(omega='omega', left='A', right='B').items():
            close(picked[ours].grad, f'lors{i}_{name}_grad_{theirs}', rtol=1e-4)
        close(loss_of(golden(f'lors{i}_logits'), torch.eye(len(rows))), f'lors{i}_{name}_identity')


def test_low_rank_starts_as_the_identity():
    parts = start_low_rank(7, 3, rng('test'))
    assert torch.equal(low_rank(**parts, alpha=5.), torch.eye(7)) and parts['left'].abs().min() > 0


def test_wbce_of_one_pair_is_finite():
    assert torch.isfinite(wbce(torch.zeros(1, 1), torch.ones(1, 1)))


ENERGIES = [(k, e, r) for k, e, r in product(('geodesic', 'cosine'), ('allpairs', 'offdiag'), (False, True))]


@pytest.mark.parametrize('i', range(3))
@pytest.mark.parametrize('distance,estimator,root', ENERGIES)
@pytest.mark.parametrize('which,joint', [('agree', agreement), ('disagree', discrepancy)])
def test_golden_energies(i, distance, estimator, root, which, joint):
    unit = lambda x: F.normalize(x, dim=1)
    v, t = leaves(f'mdm{i}_img_syn', f'mdm{i}_txt_syn')
    real = joint(unit(golden(f'mdm{i}_img_real')), unit(golden(f'mdm{i}_txt_real')))
    syn = joint(unit(v), unit(t))
    close(syn, f'mdm{i}_{which}_syn')
    found = energy(real, syn, distance=distance, estimator=estimator, root=root)
    found.backward()
    name = f"mdm{i}_{which}_{distance}_{estimator}_{'root' if root else 'squared'}"
    close(found, name, atol=1e-5 if root else 1e-6)
    close(v.grad, f'{name}_grad_img_syn', rtol=1e-3, atol=1e-4 if root else 1e-5)
    close(t.grad, f'{name}_grad_txt_syn', rtol=1e-3, atol=1e-4 if root else 1e-5)


def naive_energy(a, b, sigma, estimator):
    def k(x, y):
        cosine = min(max(float(x @ y), -1 + 1e-6), 1 - 1e-6)
        return math.exp(-math.acos(cosine) ** 2 / (2 * sigma ** 2))

    def within(x):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if estimator == 'allpairs' or i != j]
        return sum(k(x[i], x[j]) for i, j in pairs) / len(pairs)
    return within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


@given(st.integers(2, 6), st.integers(2, 6), st.integers(2, 5), st.integers(0, 10**6), st.floats(.2, 2))
@settings(max_examples=25, deadline=None)
def test_energy_equals_a_double_loop_and_turns_with_the_sphere(n, m, d, seed, sigma):
    g = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=1) for k in (n, m))
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    for estimator in ('allpairs', 'offdiag'):
        found = energy(a, b, sigma, estimator=estimator)
        assert abs(found - naive_energy(a, b, sigma, estimator)) < 1e-9
        assert abs(energy(a @ turn, b @ turn, sigma, estimator=estimator) - found) < 1e-7
        assert abs(energy(b, a, sigma, estimator=estimator) - found) < 1e-12
    assert energy(a, a, sigma).abs() < 1e-12
    assert energy(a, b, min(sigma, .5)) > -1e-9        # wider, the kernel is not positive definite on a sphere


@pytest.mark.parametrize('distance,right', [('geodesic', math.pi / 2), ('cosine', 1.)])
@pytest.mark.parametrize('sigma', (.5, 1., 2.))
def test_energy_of_two_axes_has_a_closed_form_that_may_be_negative(distance, right, sigma):
    x, y = (torch.stack([e, -e]) for e in torch.eye(2, dtype=torch.float64))
    u = math.exp(-right ** 2 / (2 * sigma ** 2))
    assert abs(energy(x, y, sigma, distance=distance) - (1 + u ** 4 - 2 * u)) < 2e-3


def test_kernel_names_are_checked():
    with pytest.raises(UserError, match="did you mean 'geodesic'"):
        kernel(torch.eye(2), torch.eye(2), distance='geodesik')


@pytest.mark.parametrize('i', range(2))
def test_golden_merge(i):
    names = ('w', 'b', 's')
    w0, w1, w2 = ({k: golden(f'merge{i}_{w}_{k}') for k in names} for w in ('w0', 'w1', 'w2'))
    for k in names:
        cosine = displacement_cosine(w0[k], [w1[k], w2[k]])
        close(cosine, f'merge{i}_cos_{k}')
        close(agreement_ratio(cosine, clamp=False), f'merge{i}_ratio_{k}', rtol=1e-4)
    for gamma in (1., .5):
        for k, x in merge(w0, [w1, w2], gamma, clamp=False).items():
            close(x, f'merge{i}_out_gamma{gamma}_{k}', rtol=1e-4, atol=1e-5)


@given(st.integers(2, 5), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_merge_lies_between_the_anchor_and_the_mean(n, seed):
    g = torch.Generator().manual_seed(seed)
    w0, experts = torch.randn(6, generator=g), [torch.randn(6, generator=g) for _ in range(n)]
    out = merge(dict(w=w0), [dict(w=e) for e in experts])['w']
    way = sum(experts) / n - w0
    share = (out - w0) @ way / (way @ way)
    assert -1e-6 <= share <= 1 + 1e-6 and torch.allclose(out, w0 + share * way, atol=1e-5)


def test_merge_at_the_ends_and_what_is_not_float():
    w0 = dict(w=torch.ones(3), n=torch.tensor(5))
    moved = lambda *d: dict(w=w0['w'] + torch.tensor(d), n=torch.tensor(9))
    alike = merge(w0, [moved(1., 2, 3), moved(2., 4, 6)])
    assert torch.allclose(alike['w'], w0['w'] + torch.tensor([1.5, 3, 4.5])) and alike['n'] == 5
    assert torch.equal(merge(w0, [moved(1., 0, 0), moved(0., 1, 0)])['w'], w0['w'])
    assert torch.equal(merge(w0, [moved(1., 0, 0), moved(-1., 0, 0)])['w'], w0['w'])       # would diverge unclamped
    assert torch.equal(merge(w0, [w0, w0])['w'], w0['w'])                                 # nothing moved
    with pytest.raises(UserError, match='two experts'):
        merge(w0, [moved(1., 0, 0)])


@pytest.mark.parametrize('how', MERGES)
def test_every_merge_gives_the_anchors_shapes_and_is_seeded(how):
    w0 = dict(w=torch.zeros(4), n=torch.tensor(3))
    experts = [dict(w=torch.randn(4, generator=rng('e', i)), n=torch.tensor(7)) for i in range(3)]
    one, two = (merged(how, w0, experts, generator=rng('m')) for _ in range(2))
    assert torch.equal(one['w'], two['w']) and one['w'].shape == (4,)


@pytest.mark.parametrize('i', range(2))
def test_golden_tesla_and_unrolled_on_a_linear_classifier(i):
    from avdd_nb.match.pairexperts import tesla, unrolled
    x, y, rate = golden(f'tesla{i}_x').requires_grad_(), golden(f'tesla{i}_y'), golden(f'tesla{i}_lr').requires_grad_()
    start, goal = dict(w=golden(f'tesla{i}_theta0')), dict(w=golden(f'tesla{i}_target'))
    inner = lambda w, k: F.cross_entropy(x[k] @ w['w'].view(-1, x.shape[2]).T, y)
    for found, name in ((tesla(inner, start, goal, dict(w=rate), len(x), [x]), ''),
                        (unrolled(inner, start, goal, dict(w=rate), len(x)), 'mtt_')):
        close(found, f'tesla{i}_{name}loss', rtol=1e-4)
        grad_x, grad_rate = torch.autograd.grad(found, [x, rate])
        close(grad_x, f'tesla{i}_{name}grad_x', rtol=1e-4)
        close(grad_rate, f'tesla{i}_{name}grad_lr', rtol=1e-4)


@pytest.mark.parametrize('i', range(2))
def test_golden_distance_that_remains(i):
    from avdd_nb.match.pairexperts import remaining
    student, = leaves(f'mtt{i}_student')
    loss = remaining(dict(w=student), dict(w=golden(f'mtt{i}_start')), dict(w=golden(f'mtt{i}_target')))
    loss.backward()
    close(loss, f'mtt{i}_loss')
    close(student.grad, f'mtt{i}_grad_student')


def test_distance_is_per_tower_or_joint():
    from avdd_nb.match.pairexperts import remaining
    keys = ('towers.image.a', 'towers.image.b', 'towers.text.a')
    state = lambda *v: {k: torch.tensor([float(x)]) for k, x in zip(keys, v)}
    start, goal, end = state(0, 0, 0), state(3, 4, 1), state(3, 1, 3)
    assert remaining(end, start, goal) == 9 / 25 + 4 / 1
    assert remaining(end, start, goal, joint=True) == (9 + 4) / 26
