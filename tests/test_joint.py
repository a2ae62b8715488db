"Characteristic functions and ImageBindDC against the public code's numbers; encoders; contrast."
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avdd_nb.match.cfd import SCALE, cfd, characteristic
from avdd_nb.methods.imagebinddc import ImageBindDC, Spectrum, cross, joint

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'losses_joint.npz')
WEIGHTS = dict(half=(.5, .5), one=(1, 1), amp=(.9, .1))


def golden(name): return torch.from_numpy(np.asarray(GOLDEN[name]))


def mean(x): return x.mean(0, keepdim=True)


def cfd_of(i, weights, normalise=True):
    "(value, synthetic rows) of golden case i."
    t = golden(f'cfd{i}_t')
    rows = [golden(f'cfd{i}_{side}').clone().requires_grad_(side == 'syn') for side in ('real', 'syn')]
    unit = [F.normalize(r, dim=1) if normalise else r for r in rows]
    return cfd(*(mean(characteristic(u, t)) for u in unit), *WEIGHTS[weights])[0], rows[1]


@pytest.mark.parametrize('weights', WEIGHTS)
@pytest.mark.parametrize('i', [0, 2])
def test_cfd_is_the_public_codes(i, weights):
    value, syn = cfd_of(i, weights)
    torch.testing.assert_close(value, golden(f'cfd{i}_{weights}_loss300'), rtol=1e-5, atol=1e-4)
    value.backward()
    torch.testing.assert_close(syn.grad, golden(f'cfd{i}_{weights}_grad_syn'), rtol=1e-4, atol=1e-3)
    raw, _ = cfd_of(i, weights, normalise=False)
    torch.testing.assert_close(raw/SCALE, golden(f'cfd{i}_{weights}_unscaled_raw'), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('weights', WEIGHTS)
def test_cfd_of_the_same_rows_is_rounding(weights):
    assert cfd_of(1, weights)[0] < .1


def test_gradient_is_finite_where_amplitudes_vanish():
    zero = torch.zeros(1, 8, requires_grad=True)
    cfd(zero, torch.zeros(1, 8)).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize('i', [0, 1])
def test_code_terms_are_the_released_ones(i):
    rows = {(m, s): golden(f'ibdc{i}_{m}_{s}').clone().requires_grad_(s == 'syn')
            for m in ('aud', 'img') for s in ('real', 'syn')}
    lifted = {s: Spectrum(4, scaled=True)({m: rows[m, s] for m in ('aud', 'img')}, 'x') for s in ('real', 'syn')}
    R, S = ({k: mean(v) for k, v in lifted[s].items()} for s in ('real', 'syn'))
    terms = dict(cross=cross(R['pair.aud.img'], S['pair.aud.img'], 'code'),
                 joint=joint(R['mean.aud'], R['mean.img'], S['mean.aud'], S['mean.img'], 'code'))
    for name, value in terms.items():
        torch.testing.assert_close(value[0], golden(f'ibdc{i}_code_{name}'), rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(value.sum(), [rows['aud', 'syn'], rows['img', 'syn']], retain_graph=True)
        for m, grad in zip(('aud', 'img'), grads):
            torch.testing.assert_close(grad, golden(f'ibdc{i}_code_{name}_grad_{m}_syn'), rtol=1e-4, atol=1e-5)


def test_three_modalities_have_three_couples():
    g = torch.Generator().manual_seed(0)
    stats = {k: mean(v) for k, v in Spectrum(8)({m: torch.randn(9, 6, generator=g) for m in 'abc'}, 's').items()}
    terms = ImageBindDC().loss(stats, stats)
    assert [t for t in terms if t.startswith('cross')] == ['cross a b', 'cross a c', 'cross b c']
    assert list(ImageBindDC(lam_cross=0, lam_joint=0).loss(stats, stats)) == ['uni']


def test_sizes_that_differ_are_told():
    from avdd_nb.core import UserError
    features = dict(a=torch.randn(4, 6), b=torch.randn(4, 5))
    stats = {k: mean(v) for k, v in Spectrum(8)(features, 's').items()}
    with pytest.raises(UserError, match='joint encoder'): ImageBindDC().loss(stats, stats)


def test_fixed_frequencies_do_not_change():
    f = dict(a=torch.randn(4, 6))
    fixed, drawn = Spectrum(8, redraw=False), Spectrum(8)
    assert torch.equal(fixed(f, 1)['cf.a'], fixed(f, 2)['cf.a'])
    assert not torch.equal(drawn(f, 1)['cf.a'], drawn(f, 2)['cf.a'])


def test_mmd_is_the_distance_of_the_means_and_unlike_cfd():
    rows = {m: torch.randn(30, 8, generator=torch.Generator().manual_seed(k)) for k, m in enumerate('ab')}
    mean = lambda f: {n: x.mean(0, keepdim=True) for n, x in Spectrum(64)(f, 'test').items()}
    real, syn = mean(rows), mean({m: x[:5] for m, x in rows.items()})
    unit = lambda x: torch.nn.functional.normalize(x, dim=1).mean(0)
    want = sum((unit(x) - unit(x[:5])).square().sum() for x in rows.values())
    alone = dict(lam_cross=0., lam_joint=0.)
    found = {d: ImageBindDC(discrepancy=d, **alone).loss(real, syn) for d in ('mmd', 'cfd')}
    torch.testing.assert_close(found['mmd']['uni'][0], want)
    assert set(found['mmd']) == {'uni'} and found['cfd']['uni'] > found['mmd']['uni']


def steps(name, data, **options):
    "Two steps of that method: (method, synthetic set, draw of the first)."
    from avdd_nb.distill import distill
    from avdd_nb.methods.base import make_method
    method = make_method(name, encoder='untrained', pool_size=1, real_batch=8, init='random', **options)
    syn, source = method.begin(data, 1, 0), method.source(data, 0)
    assert len(list(distill(method, syn, source, 2))) == 2
    return method, syn, source.at(0)


def test_any_matching_method_takes_an_encoder():
    from avdd_nb.core import UserError
    from avdd_nb.data.catalog import load
    from avdd_nb.methods.base import make_method
    data = load('soundshapes-depth', n_train=100, n_test=10).train          # features that ConvNets give two sizes
    method, syn, draw = steps('avdd', data, factor=1)
    assert all(r.shape == (10, 64) and r.norm(dim=1).max() <= 1 for r in draw.real.values())
    again, same, _ = steps('avdd', data, factor=1)
    assert all(torch.equal(x, same.tensors[m]) for m, x in syn.tensors.items())
    _, moved, _ = steps('dm', data)
    assert any((x != moved.tensors[m]).any() for m, x in syn.tensors.items())
    assert make_method('dm', encoder='imagebind').memory_mb(syn) > 100*make_method('dm').memory_mb(syn)
    with pytest.raises(UserError, match="draws='reference'"):
        make_method('dm', encoder='joint', draws='reference').source(data, 0)
    with pytest.raises(UserError, match='encoder'): make_method('davdd-style', encoder='joint')
