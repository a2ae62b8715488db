"The ConvNets and heads against the public implementation (golden), their own promises, and a naive norm."
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avdd_nb.core import UserError
from avdd_nb.nets.convnet import ConvNet, build
from avdd_nb.nets.fusion import Ensemble, probabilities

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'nets.npz', allow_pickle=False)
CASES = dict(audio=((1, 128, 56), 'spectrogram'), visual=((3, 224, 224), 'image'))
U = np.uint64


def hashed(n, k, salt):
    "The README's H(i, k, salt) for i = 0…n−1."
    m = U(2**32)
    h = (np.arange(n, dtype=U) + U(1000003 * k + 7919 * salt + 1)) % m
    h = h * U(2654435761) % m
    h ^= h >> U(16)
    h = h * U(2246822519) % m
    h ^= h >> U(13)
    h = h * U(3266489917) % m
    h ^= h >> U(16)
    return 2 * h.astype(np.float64) / 2**32 - 1


def by_rule(net, shape, case, is_audio):
    "Weights into `net` and the input x, from the rule of golden case `case`."
    rule, p = str(GOLDEN['rule'][case]), float(GOLDEN['rule_parameter_f64'][case])
    for k, (name, w) in enumerate(net.named_parameters()):
        i = np.arange(w.numel(), dtype=np.float64)
        v = .05 * np.sin(i * p + k) if rule == 'sin' else .08 * hashed(w.numel(), k, int(p))
        v += w.ndim == 1 and name.endswith('weight')
        w.data = torch.from_numpy(v.astype(np.float32)).reshape(w.shape)
    i = np.arange(np.prod(shape), dtype=np.float64)
    wave = np.sin(.7 * i) if rule == 'sin' else 1.5 * hashed(len(i), 100, int(p))
    x = wave + .5 * np.sin(.0137 * i)
    x = torch.from_numpy((-30 + 20 * x if is_audio else x).astype(np.float32)).reshape(1, *shape)
    return x, rule


@pytest.mark.parametrize('case', range(4))
@pytest.mark.parametrize('name', CASES)
def test_golden_embeddings_and_gradients(name, case):
    shape, kind = CASES[name]
    net = build('ConvNet', shape, kind=kind)
    x, rule = by_rule(net, shape, case, name == 'audio')
    want = lambda what: GOLDEN[f'{name}_{case}_{what}']
    np.testing.assert_array_equal(x.flatten()[:16].numpy(), want('x_first16'))
    x.requires_grad_()
    e = net.embed(x)[0]
    atol = 1e-3 if rule == 'sin' else 1e-5
    np.testing.assert_allclose(e[:64].detach(), want('embed_first64'), atol=atol, rtol=0)
    np.testing.assert_allclose(e[::98].detach(), want('embed_every98'), atol=atol, rtol=0)
    np.testing.assert_allclose(e.double().sum().item(), want('embed_sum_f64'), rtol=1e-5)
    np.testing.assert_allclose(e.double().norm().item(), want('embed_norm_f64'), rtol=1e-5)
    if rule == 'hash':
        (e * torch.cos(.11 * torch.arange(6272, dtype=torch.float64)).float()).sum().backward()
        np.testing.assert_allclose(x.grad.flatten()[:16], want('grad_first16'), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(x.grad.double().norm().item(), want('grad_norm_f64'), rtol=1e-3)


@pytest.mark.parametrize('name', CASES)
def test_golden_parameters(name):
    shape, kind = CASES[name]
    net = build('ConvNet', shape, kind=kind)
    shapes = [tuple(w.shape) for w in net.parameters()]
    assert shapes == [tuple(s[s > 0]) for s in GOLDEN[f'{name}_param_shapes']]
    assert sum(w.numel() for w in net.parameters()) == GOLDEN[f'{name}_param_count']


@pytest.mark.parametrize('shape,kind,dim', [
    ((3, 224, 224), 'image', 6272), ((1, 128, 56), 'spectrogram', 6272), ((3, 32, 32), 'image', 2048),
    ((1, 32, 32), 'image', 2048), ((1, 64, 32), 'spectrogram', 2048), ((1, 32, 32), 'spectrogram', 2048),
    ((3, 16, 16), 'image', 2048), ((1, 128, 551), 'spectrogram', 6272)])
def test_dimensions(shape, kind, dim):
    assert build('ConvNet', shape, width=128, kind=kind).dim == dim


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', ['image', 'spectrogram'])
@pytest.mark.parametrize('size', [(16, 16), (17, 23), (28, 28), (40, 16), (64, 31), (96, 96), (224, 100), (224, 224)])
def test_any_size_gives_the_announced_dimension(size, kind, channels):
    net = build('ConvNet', (channels, *size), width=2, kind=kind)
    assert net.embed(torch.randn(2, channels, *size)).shape == (2, net.dim)


def naive(net, x):
    "The same network with the norm written out as its formula and pooling as a mean of slices."
    mods = list(net.features)
    for conv, norm, _, pool in zip(*[iter(mods)] * 4):
        x = F.conv2d(x, conv.weight, conv.bias, padding=conv.padding)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp_min(0)
        if isinstance(pool, torch.nn.AvgPool2d):
            x = x[..., :x.shape[-2] // 2 * 2, :x.shape[-1] // 2 * 2]
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        else:
            x = pool(x)
    return x.flatten(1)


def test_equals_naive_formula_in_value_and_gradients():
    net = build('ConvNet', (3, 32, 30), width=8, seed=0).double()
    for w in net.parameters():
        w.data += .1 * torch.randn_like(w)
    x = torch.randn(5, 3, 32, 30, dtype=torch.float64, requires_grad=True)
    e, want = net(x), naive(net, x)
    torch.testing.assert_close(e, want)
    ask = torch.randn_like(e)
    inputs = [x, *net.parameters()]
    for g, w in zip(torch.autograd.grad((e * ask).sum(), inputs), torch.autograd.grad((want * ask).sum(), inputs)):
        torch.testing.assert_close(g, w)


def test_mouthfuls_equal_the_whole_batch():
    net = build('ConvNet', (1, 32, 32), seed=0)
    assert 1 < net.at_a_time < 20 and build('ConvNet', (3, 224, 224), width=128).at_a_time == 1
    results = []
    for run in (net.embed, lambda x: net.features(x).flatten(1)):
        x = torch.randn(21, 1, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        e = run(x)
        results.append((e, *torch.autograd.grad(e.square().sum(), [x, *net.parameters()])))
    for ours, want in zip(*results):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5 * max(1, want.abs().max().item()))


def test_seed_is_the_only_source_of_weights():
    state = torch.random.get_rng_state()
    first = build('ConvNet', (1, 32, 32), width=4, seed=3).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(10)
    again = build('ConvNet', (1, 32, 32), width=4, seed=3).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = build('ConvNet', (1, 32, 32), width=4, seed=4).state_dict()
    assert not any(torch.equal(first[k], other[k]) for k in first if first[k].std() > 0)


def test_refusals_name_the_cure():
    with pytest.raises(UserError, match='smaller depth'):
        ConvNet(3, (16, 16), depth=5)
    with pytest.raises(UserError, match='ConvNet'):
        build('Convnet', (3, 32, 32))


@pytest.mark.parametrize('n', [1, 2, 3])
def test_ensemble_any_number_and_names(n):
    names = ['a.b', 'depth', 'image'][:n]
    model = Ensemble({m: build('ConvNet', (1, 16, 16), width=2, seed=m) for m in names}, 5)
    x = {m: torch.randn(6, 1, 16, 16) for m in names}
    logits = model(x)
    assert list(logits) == names and all(v.shape == (6, 5) for v in logits.values())
    y = torch.arange(6) % 5
    want = sum(F.nll_loss(v.log_softmax(1), y) for v in logits.values())
    torch.testing.assert_close(model.loss(logits, y), want)
    torch.testing.assert_close(model.loss(logits, F.one_hot(y, 5).float()), want)
    assert all(h.weight.std() < 2e-4 and h.bias.std() > 1e-3 for h in model.heads)
    for fusion in ('mean', 'product'):
        torch.testing.assert_close(probabilities(logits, fusion).sum(1), torch.ones(6))
    want = sum(v.log_softmax(1) for v in logits.values()).argmax(1)
    assert torch.equal(probabilities(logits, 'product').argmax(1), want)


def test_golden_ensemble():
    "Probability and prediction of AVDD's evaluate()."
    ens = np.load(Path(__file__).parent / 'golden' / 'ens.npz', allow_pickle=False)
    for i in range(sum(k.endswith('_prob') for k in ens)):
        logits = {m: torch.from_numpy(ens[f'ens{i}_logits_{m}']) for m in ('audio', 'visual')}
        p = probabilities(logits, 'mean')
        np.testing.assert_allclose(p, ens[f'ens{i}_prob'], rtol=1e-5)
        np.testing.assert_array_equal(p.argmax(1), ens[f'ens{i}_pred'])
