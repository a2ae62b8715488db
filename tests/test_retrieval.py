"Retrieval: the golden ranks, ArcFace by its formula, chance by simulation, batches in turn, rows that repeat."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError, seed_of
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.evaluate import cross_architecture, evaluate, make_protocol, summarise
from avdd_nb.retrieval import arcface, chance, first_hits, fit_in_turn, measures, retrieve, shared_model
from avdd_nb.train import Recipe, trained_on

GOLDEN = np.load(Path(__file__).parent/'golden'/'retrieval.npz', allow_pickle=False)
KINDS = dict(audio=Modality('audio', 'spectrogram', (1, 16, 16)), image=Modality('image', 'image', (3, 16, 16)))
FAST = dict(width=4, epochs=2, batch=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))


def data(n=8, classes=3, seed=0, kinds=KINDS):
    gen, labels = torch.Generator().manual_seed(seed), torch.arange(classes).repeat_interleave(n)
    noise = {m: torch.randn(len(labels), *k.shape, generator=gen) for m, k in kinds.items()}
    tensors = {m: x + labels.view(-1, 1, 1, 1) for m, x in noise.items()}
    return PairedData(tensors, kinds, labels, [f'c{c}' for c in range(classes)])


@pytest.mark.parametrize('i', range(3))
@pytest.mark.parametrize('asked,found,name', [('audio', 'visual', 'a2v'), ('visual', 'audio', 'v2a')])
def test_golden_ranks(i, asked, found, name):
    g = lambda what: torch.from_numpy(GOLDEN[f'ret{i}_{what}'])
    ranks = first_hits(g(asked), g(found), g('labels'), g('labels'))
    assert ranks.tolist() == g(f'{name}_first_hit_rank').tolist()
    np.testing.assert_allclose(list(measures(ranks).values()), g(f'{name}_r1_r5_medr'), rtol=1e-6)


@given(st.integers(2, 6), st.integers(1, 5), st.floats(0, .5), st.floats(.5, 10), st.integers(0, 999))
def test_arcface_is_its_formula(classes, n, m, s, seed):
    gen = np.random.default_rng(seed)
    theta, y = gen.uniform(.05, math.pi - .6, (n, classes)), gen.integers(0, classes, n)
    want = []
    for i in range(n):
        right = math.exp(s*math.cos(theta[i, y[i]] + m))
        rest = sum(math.exp(s*math.cos(theta[i, j])) for j in range(classes) if j != y[i])
        want.append(-math.log(right/(right + rest)))
    cosines, y = torch.from_numpy(np.cos(theta)), torch.from_numpy(y)
    found = F.cross_entropy(arcface(cosines, y, s, m), y, reduction='none')
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_arcface_has_a_gradient_at_the_very_ends():
    cosines = torch.tensor([[1., -1.], [-1., 1.]], requires_grad=True)
    arcface(cosines, torch.tensor([0, 0])).sum().backward()
    assert cosines.grad.isfinite().all()


@pytest.mark.parametrize('classes', [3, 10, 28])
def test_chance_by_simulation(classes):
    gen, labels, trials = np.random.default_rng(0), np.repeat(np.arange(classes), 5), 4000
    ranks = torch.tensor([1 + int((gen.permutation(labels) == 0).argmax()) for _ in range(trials)])
    found, want = measures(ranks), chance(classes)
    assert want['R@1'] == pytest.approx(100/classes)
    for k in ('R@1', 'R@5'): assert abs(found[k] - want[k]) < 4*50/math.sqrt(trials)
    assert abs(found['MedR'] - want['MedR']) <= 1


def test_batches_come_in_turn_and_both_modalities_see_everything():
    d, seen = data(), []
    recipe = Recipe(**FAST)
    model, told = shared_model(d.modalities, 3, recipe, 0), []
    plain = model.forward
    def watch(x): seen.append((list(x), len(next(iter(x.values()))))) ; return plain(x)
    model.forward = watch
    fit_in_turn(model, d.modalities, d.batch, d.labels, recipe, 0, told.append)
    assert [names for names, _ in seen] == [['audio'], ['image']]*6 and told[-1] == 2
    assert sum(n for names, n in seen if names == ['audio']) == sum(n for names, n in seen if names == ['image']) == 48


def test_one_classifier_for_all_and_cosines():
    d = data()
    model = shared_model(d.modalities, 3, Recipe(**FAST), 0)
    assert [tuple(h.weight.shape) for h in model.heads] == [(3, model.nets[0].dim)] and model.heads[0].bias is None
    cosines = model(d.batch())
    want = F.cosine_similarity(model.nets[1](d.batch()['image'])[:, None], model.heads[0].weight[None], dim=2)
    torch.testing.assert_close(cosines['image'], want, atol=1e-5, rtol=1e-4)
    hard, soft = model.loss(cosines, d.labels), model.loss(cosines, torch.eye(3)[d.labels])
    torch.testing.assert_close(hard, soft)


def test_rows_are_tidy_repeat_and_learn():
    train, test = data(), data(seed=1)
    protocol = make_protocol('paper', width=8, batch=8, lr_image=1e-3, strategy='', epochs_whole=12)
    rows = retrieve(train, test, protocol, 2)
    assert len(rows) == 2*2*3 and {r['modality'] for r in rows} == {'audio→image', 'image→audio'}
    again = retrieve(train, test, protocol, [1], workers=1)
    assert [r['value'] for r in again] == [r['value'] for r in rows if r['seed'] == 1]
    table = summarise(rows, value='value')
    assert set(table.metric) == {'R@1', 'R@5', 'MedR'} and set(table.n) == {2}
    assert table[table.metric == 'R@1']['mean'].mean() > 2*chance(3)['R@1']*.8


def test_retrieval_refuses_in_one_sentence():
    one = data(kinds=dict(image=KINDS['image']))
    with pytest.raises(UserError, match='two modalities'): retrieve(one, one, 'paper', 1)
    with pytest.raises(UserError, match='4 items, 5'): retrieve(data(), data(n=4), make_protocol(**FAST), 1)


def test_sizes_that_would_end_differently_meet_in_one_grid():
    kinds = dict(audio=Modality('audio', 'spectrogram', (1, 32, 16)), image=Modality('image', 'image', (3, 16, 16)))
    d = data(kinds=kinds)
    dims = {net.dim for net in shared_model(kinds, 3, Recipe(**FAST), 0).nets}
    assert len(dims) == 1 and retrieve(d, d, make_protocol(**FAST, epochs_whole=1), 1)
    rows = evaluate(d, d, make_protocol(**FAST, epochs_whole=1, head='sum'), 1)
    assert {(r['modality'], r['fusion'], r['head']) for r in rows} == {('AV', 'joint', 'sum')}


def test_cross_architecture_means():
    d = data()
    rows = cross_architecture(d, d, make_protocol(**FAST, epochs_whole=1), 2, archs=('LeNet', 'AlexNet'))
    pick = lambda arch, seed: [r['accuracy'] for r in rows if (r['arch'], r['seed']) == (arch, seed)]
    for seed in (0, 1):
        np.testing.assert_allclose(pick('mean', seed), np.mean([pick('LeNet', seed), pick('AlexNet', seed)], 0))
    assert set(summarise(rows, by=('arch',)).arch) == {'LeNet', 'AlexNet', 'mean'}
    with pytest.raises(UserError, match='protocols'): summarise(rows)
    with pytest.raises(UserError, match='at least 28×28'): evaluate(d, d, make_protocol(**FAST, arch='VGG11'), 1)


def test_a_start_from_trained_networks(monkeypatch):
    d, few = data(), data(n=2)
    protocol = make_protocol(**FAST, epochs_whole=2, lr=0, lr_image=0, start='data')
    source = trained_on(d, protocol.for_size(len(d), whole=True), seed_of('start'))
    import importlib
    ev, seen = importlib.import_module('avdd_nb.evaluate'), []
    plain = ev.predict
    monkeypatch.setattr(ev, 'predict', lambda model, *a, **k: seen.append(model) or plain(model, *a, **k))
    evaluate(few, d, protocol, 1, whole=d)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert same(seen[0].nets, source.nets) and not same(seen[0].heads, source.heads)      # a fresh classifier
    with pytest.raises(UserError, match='as `whole`'): evaluate(few, d, protocol, 1)
    other = data(kinds=dict(image=KINDS['image']))
    with pytest.raises(UserError, match="do not fit 'audio'"): evaluate(few, d, protocol, 1, whole=other)


def test_protocol_digests_ignore_fields_at_their_defaults():
    import dataclasses
    import hashlib
    import json
    changed = make_protocol('paper', width=16)
    want = hashlib.sha256(json.dumps(dict(width=16, name='paper*'), sort_keys=True).encode()).hexdigest()[:8]
    assert changed.digest == want and make_protocol(changed, width=128).digest != want
    assert dataclasses.replace(changed, name='other').digest != want
