"Reference mode against a plain loop in the public code's order: its seeds, one class after the other, one momentum."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avdd_nb.core import UserError
from avdd_nb.data.catalog import load
from avdd_nb.distill import distill
from avdd_nb.match import augment
from avdd_nb.match.reference import ReferenceDraws, reference_seed
from avdd_nb.methods.base import make_method
from avdd_nb.nets.convnet import build
from avdd_nb.runs import make_config

OPTIONS = dict(width=4, real_batch=3, features='random')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AVDD_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield load('soundshapes', n_train=100, n_test=20, raw=True).train


def quarters(x):
    "The four quarters, down the columns, each doubled in size."
    h, w = x.shape[2]//2, x.shape[3]//2
    parts = [x[:, :, :h, :w], x[:, :, h:, :w], x[:, :, :h, w:], x[:, :, h:, w:]]
    return torch.cat([F.interpolate(p, scale_factor=2, mode='bilinear') for p in parts])


def plain_loop(data, audio, image, exp, steps, lam=10., lr=.2):
    "Algorithm as main_DM_AV.py runs it."
    audio, image = audio.clone().requires_grad_(), image.clone().requires_grad_()
    optimiser = torch.optim.SGD([dict(params=[audio], lr=lr), dict(params=[image], lr=lr)], momentum=.5)
    x, ipc = data.batch(), len(audio)//data.n_classes
    before = torch.get_rng_state()
    for it in range(steps):
        seed = reference_seed(it, exp)
        torch.manual_seed(seed)
        numbers = np.random.RandomState(seed)
        ear = build('ConvNet', data.modalities['audio'], 4)
        eye = build('ConvNet', data.modalities['image'], 4)
        change = lambda v, seed=seed: augment.apply(v, augment.reference_omega(seed, *v.shape[-2:]))
        for c in range(data.n_classes):
            mine = [i for i, y in enumerate(data.labels.tolist()) if y == c]
            real = numbers.permutation(mine)[:3]
            rows = slice(c*ipc, (c + 1)*ipc)
            A, V = (net(change(v[real])).mean(0).detach() for net, v in ((ear, x['audio']), (eye, x['image'])))
            a, v = ear(change(quarters(audio[rows]))).mean(0), eye(change(quarters(image[rows]))).mean(0)
            loss = ((A - a)**2).sum() + ((V - v)**2).sum()
            loss = loss + lam*((A + V - a - v)**2).sum() + lam*((A + v - V - a)**2).sum()
            optimiser.zero_grad(set_to_none=False)
            loss.backward()
            optimiser.step()
    torch.set_rng_state(before)
    return audio.detach(), image.detach()


@pytest.mark.parametrize('exp', [0, 2])
def test_it_is_the_plain_loop(data, exp):
    method = make_method('avdd', preset='reference', **OPTIONS)
    syn = method.begin(data, 2, 0)
    audio, image = plain_loop(data, syn.tensors['audio'], syn.tensors['image'], exp, 3)
    start = {m: x.clone() for m, x in syn.tensors.items()}
    list(distill(method, syn, method.source(data, exp), 3))
    for m, expected in dict(audio=audio, image=image).items():
        moved = (expected - start[m]).abs().max()
        assert moved > 1e-3 and (syn.tensors[m] - expected).abs().max() < 2e-4*moved + 1e-5


def test_one_step_for_all_classes_is_another_order(data):
    ends = []
    for per_class in (True, False):
        method = make_method('avdd', preset='reference', **OPTIONS, per_class_steps=per_class)
        syn = method.begin(data, 1, 0)
        list(distill(method, syn, method.source(data, 0), 2))
        ends.append(syn.tensors['image'].detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_the_global_generator_of_torch_is_left_alone(data):
    before = torch.get_rng_state()
    ReferenceDraws(data, 4, real_batch=3).at(0)
    assert torch.get_rng_state().equal(before)


def test_a_small_class_gives_all_it_has(data):
    few = data.subset(torch.cat([mine[:1 + c] for c, mine in enumerate(data.class_indices)]).tolist())
    idx = ReferenceDraws(few, 4, real_batch=4)._batch(5)
    assert torch.bincount(few.labels[idx]).tolist() == [min(4, 1 + c) for c in range(10)]


def test_kept_means_end(data):
    kept = ReferenceDraws(data, 4, means={m: torch.zeros(2, data.n_classes, 4) for m in data.modalities})
    kept.at(1)
    with pytest.raises(UserError, match='after 2 steps'): kept.at(2)


def test_presets_of_the_paper():
    assert make_config('avmnist', 'avdd', 20, options=dict(preset='paper, IPC 20')).options == dict(
        draws='fresh', lam_icm=20., lam_cgm=20.)
    assert make_method('avdd', preset='reference').per_class_steps
