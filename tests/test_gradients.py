"Gradient and trajectory matching: golden numbers of the public code, naive loops, memory that does not grow."
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avdd_nb.core import rng
from avdd_nb.match.gradients import (
    as_parameters,
    as_vector,
    class_gradients,
    class_gradients_batched,
    gradient_distance,
    kept,
    row_distance,
    step_gradient,
    surrogate,
    tesla_loss,
    trajectory_distance,
    unroll,
)
from avdd_nb.nets.convnet import build

GOLDEN = np.load(Path(__file__).parent/'golden'/'gradients.npz', allow_pickle=False)


def golden(case): return {k.removeprefix(f'{case}_'): torch.from_numpy(np.asarray(GOLDEN[k]))
                          for k in GOLDEN.files if k.startswith(f'{case}_')}


@pytest.mark.parametrize('i', range(3))
def test_dc_distance_and_its_gradient_are_the_public_ones(i):
    g = golden(f'dc{i}')
    names = range(int(g['n']))
    real, syn = ({j: g[f'{side}_{j}'][None] for j in names} for side in ('real', 'syn'))
    syn = {j: x.clone().requires_grad_(True) for j, x in syn.items()}
    loss = gradient_distance(real, syn)
    torch.testing.assert_close(loss, g['ours'][None], rtol=1e-5, atol=1e-6)
    each = torch.stack([row_distance(real[j], syn[j])[0] if real[j].dim() > 2 else torch.tensor(0.) for j in names])
    torch.testing.assert_close(each, g['ours_per_tensor'], rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    for j in names:
        found = torch.zeros_like(syn[j]) if syn[j].grad is None else syn[j].grad
        want = g[f'ours_grad_{j}']
        torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-5*want.abs().max().item())


@pytest.mark.parametrize('i', range(2))
def test_mtt_loss_and_gradient_are_the_public_ones(i):
    g = golden(f'mtt{i}')
    student = g['student'].requires_grad_(True)
    loss = trajectory_distance(student, g['start'], g['target'])
    loss.backward()
    torch.testing.assert_close(loss, g['loss'], rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad, g['grad_student'], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('i', range(2))
def test_tesla_has_the_value_of_the_unroll_and_the_gradients_of_the_recursion(i):
    g = golden(f'tesla{i}')
    line = nn.Linear(4, 3, bias=False)
    gradient = lambda theta, x, graph: step_gradient(line, theta, x, g['y'], graph)
    x, lr = g['x'].requires_grad_(True), g['lr'].requires_grad_(True)
    full = trajectory_distance(unroll(gradient, g['theta0'], list(x), lr), g['theta0'], g['target'])
    cheap = tesla_loss(gradient, g['theta0'], g['target'], [lambda k=k: x[k] for k in range(len(x))], lr, [x])
    for loss, prefix in ((full, 'mtt_'), (cheap, '')):
        gx, glr = torch.autograd.grad(loss, [x, lr])
        torch.testing.assert_close(loss, g[f'{prefix}loss'], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gx, g[f'{prefix}grad_x'], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(glr, g[f'{prefix}grad_lr'], rtol=1e-4, atol=1e-5)


def network(kind='image', shape=(3, 16, 16), classes=3):
    conv = build('ConvNet', shape, width=6, kind=kind, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(conv, nn.Linear(conv.dim, classes))


@pytest.mark.parametrize('kind, shape', [('image', (3, 16, 16)), ('spectrogram', (1, 32, 16))])
def test_class_gradients_are_the_plain_loop_s_and_so_are_their_gradients(kind, shape):
    net, gen = network(kind, shape), rng('test gradients', kind)
    x, real = (torch.randn(3, n, *shape, generator=gen, requires_grad=True) for n in (4, 7))
    target = {k: v.detach() for k, v in class_gradients(net, real, range(3), portion=3).items()}
    naive, losses = {}, 0
    for c in range(3):
        loss = F.cross_entropy(net(x[c]), torch.tensor([c]*4))
        for k, p in net.named_parameters():
            if p.dim() == 1: continue
            g = torch.autograd.grad(loss, p, create_graph=True)[0]
            naive[c, k] = g
            for r, s in zip(target[k][c].flatten(1), g.flatten(1)):
                losses = losses + 1 - r @ s/(r.norm()*s.norm() + 1e-6)
    want = torch.autograd.grad(losses, x)[0]
    ways = [class_gradients(net, x, range(3), create_graph=True, portion=2), class_gradients_batched(net, x, range(3))]
    for found in ways:
        for (c, k), g in naive.items(): torch.testing.assert_close(found[k][c], g, rtol=1e-4, atol=1e-6)
        loss = gradient_distance(target, found)
        assert loss.shape == (3,)
        torch.testing.assert_close(loss.sum(), losses, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], want, rtol=1e-2, atol=1e-4*want.abs().max())


def test_distance_of_zero_gradients_is_finite():
    zero = {'w': torch.zeros(1, 2, 3, requires_grad=True)}
    loss = gradient_distance({'w': torch.ones(1, 2, 3)}, zero)
    loss.sum().backward()
    assert loss.item() == 2 and torch.isfinite(zero['w'].grad).all()


def test_vector_and_parameters_are_inverse():
    net = network()
    parts = as_parameters(net, as_vector(net))
    assert all(torch.equal(parts[k], p) for k, p in net.named_parameters())


def test_unroll_is_sgd():
    net, gen = network(), rng('unroll')
    x, y = torch.randn(3, 2, 3, 16, 16, generator=gen), torch.tensor([0, 2])
    theta = unroll(lambda t, b, graph: step_gradient(net, t, b, y, graph), as_vector(net), list(x), torch.tensor(.1))
    sgd = torch.optim.SGD(net.parameters(), lr=.1)
    for b in x:
        sgd.zero_grad()
        F.cross_entropy(net(b), y).backward()
        sgd.step()
    torch.testing.assert_close(theta, as_vector(net), rtol=1e-5, atol=1e-6)


def test_a_surrogate_has_its_value_and_the_given_gradients():
    x, a = torch.tensor([1., 2.], requires_grad=True), torch.tensor(3., requires_grad=True)
    loss = surrogate(a**2, [x], [torch.tensor([5., 7.])])
    gx, ga = torch.autograd.grad(loss, [x, a])
    assert loss.item() == 9 and gx.tolist() == [5, 7] and ga.item() == 6


def test_tesla_s_memory_does_not_grow_with_the_steps_and_the_unroll_s_does():
    net, y = network(), torch.tensor([0, 1])
    x = torch.randn(2, 3, 16, 16, generator=rng('memory'), requires_grad=True)
    gradient = lambda t, b, graph: step_gradient(net, t, b, y, graph)
    start, lr = as_vector(net), torch.tensor(.01, requires_grad=True)

    def peak(loss_of):
        with kept() as k: loss_of().backward()
        return k.peak

    def unrolled(n): return trajectory_distance(unroll(gradient, start, [x]*n, lr), start, start + 1)
    def recursive(n): return tesla_loss(gradient, start, start + 1, [lambda: x]*n, lr, [x])
    full, cheap = ([peak(partial(loss, n)) for n in (2, 12)] for loss in (unrolled, recursive))
    assert full[1] > 5*full[0] and cheap[1] < 1.1*cheap[0] and cheap[1] < full[0]


def test_kept_counts_what_is_alive():
    x = torch.ones(1000, requires_grad=True)
    with kept() as k:
        for _ in range(5): x.exp().sum().backward()          # exp saves its result: 4000 bytes, then lets it go
    assert k.peak == 4000 and k.now == 0
