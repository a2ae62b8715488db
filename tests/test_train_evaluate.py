"Training and scores: the same for the same seed, step sizes as written, accuracies against scikit-learn and numpy."
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb import train as room
from avdd_nb.core import UserError
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.evaluate import PROTOCOLS, accuracies, evaluate, make_protocol, side_by_side, summarise
from avdd_nb.synset import from_real
from avdd_nb.train import SCHEDULES, Recipe, fit, new_model, predict

KINDS = dict(audio=Modality('audio', 'spectrogram', (1, 16, 16)), image=Modality('image', 'image', (3, 16, 16)))
FAST = dict(width=4, epochs=4, batch=8)


def data(n=10, classes=3, seed=0, shift=1., kinds=KINDS):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(n)
    pattern = torch.Generator().manual_seed(99)
    tensors = {m: torch.randn(classes, *k.shape, generator=pattern)[labels]*shift for m, k in kinds.items()}
    tensors = {m: x + torch.randn(x.shape, generator=gen) for m, x in tensors.items()}
    return PairedData(tensors, kinds, labels, [f'c{c}' for c in range(classes)])


def trained(d, recipe, seed=0):
    model = new_model(d.modalities, d.n_classes, recipe, seed)
    return fit(model, d.modalities, d.batch, d.labels, recipe, seed)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def scores(rows): return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


def test_the_steps_schedule_is_11_10_9():
    lr = [SCHEDULES['steps'](e/30) for e in range(30)]
    assert lr == [1.]*11 + [.1]*10 + [.01]*9


@given(st.integers(1, 500))
def test_schedules_stay_in_range(epochs):
    for f in SCHEDULES.values():
        lr = [f(e/epochs) for e in range(epochs)]
        assert all(0 < v <= 1 for v in lr)
    steps = [SCHEDULES['steps'](e/epochs) for e in range(epochs)]
    assert steps == sorted(steps, reverse=True) and set(steps) <= {1., .1, .01}


def test_cosine_warms_up_and_ends_near_zero():
    f = SCHEDULES['cosine']
    assert f(0) == pytest.approx(.05) and f(.5) == pytest.approx(.5) and f(.999) < 1e-4 and f(.05) > .95


def recorded(monkeypatch, recipe):
    "lr of every group at every update."
    seen, plain = [], torch.optim.Adam.step
    def step(self, *a, **k):
        seen.append([g['lr'] for g in self.param_groups])
        return plain(self, *a, **k)
    monkeypatch.setattr(torch.optim.Adam, 'step', step)
    trained(data(n=4), recipe)
    return np.array(seen)


def test_networks_that_see_pictures_have_their_own_step_size(monkeypatch):
    seen = recorded(monkeypatch, Recipe(width=4, epochs=30, batch=12, lr=1e-3, lr_image=1e-4))
    falls = np.array([1.]*11 + [.1]*10 + [.01]*9)[:, None]
    np.testing.assert_allclose(seen, falls*[1e-3, 1e-4, 1e-3])                  # audio, image, classifiers


def test_updates_per_epoch_and_groups(monkeypatch):
    seen = recorded(monkeypatch, Recipe(width=4, epochs=3, batch=5, schedule='cosine', lr=1., lr_image=0.))
    assert seen.shape == (9, 3) and len(set(seen[:, 0])) == 9         # ceil(12/5) updates, each its own step size
    assert (seen[:, 1] == 0).all()


def test_every_parameter_is_in_one_group():
    d = data()
    recipe = Recipe(width=4)
    model = new_model(d.modalities, 3, recipe, 0)
    groups = room._optimiser(model, d.modalities, recipe).param_groups
    listed = [id(p) for g in groups for p in g['params']]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert all(g['weight_decay'] == recipe.weight_decay for g in groups)


def test_training_repeats_and_depends_on_the_seed():
    d, recipe = data(), Recipe(**FAST)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = weights(trained(d, recipe, 5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(weights(trained(d, recipe, 5)), one)
    assert not torch.equal(weights(trained(d, recipe, 6)), one)


def test_each_epoch_sees_each_sample_once():
    d, seen = data(), []
    def batch_of(idx): return seen.append(idx) or d.batch(idx)
    epochs = []
    model = new_model(d.modalities, 3, Recipe(**FAST), 0)
    fit(model, d.modalities, batch_of, d.labels, Recipe(**FAST), 0, epochs.append)
    assert epochs == [1, 2, 3, 4] and not model.training
    per_epoch = torch.cat(seen).view(4, -1)
    assert all(sorted(e.tolist()) == list(range(30)) for e in per_epoch) and not torch.equal(per_epoch[0], per_epoch[1])


def test_it_learns():
    d, test = data(shift=2.), data(seed=1, shift=2.)
    model = trained(d, Recipe(width=8, epochs=15, batch=8, strategy='', schedule='cosine', lr_image=1e-3))
    assert accuracies(predict(model, test), test.labels)[0]['accuracy'] > 80


def test_soft_labels_equal_hard_ones_when_one_hot():
    d, recipe = data(), Recipe(**FAST)
    model = new_model(d.modalities, 3, recipe, 0)
    soft = fit(model, d.modalities, d.batch, torch.eye(3)[d.labels], recipe, 0)
    torch.testing.assert_close(weights(soft), weights(trained(d, recipe)), atol=1e-4, rtol=1e-3)


def test_predict_in_any_batch():
    d = data()
    model = trained(d, Recipe(**FAST))
    with torch.no_grad(): want = model(d.batch())
    for batch in (1, 7, 500):
        for m, z in predict(model, d, batch).items(): torch.testing.assert_close(z, want[m], atol=1e-5, rtol=1e-4)


@given(st.integers(2, 6), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99))
def test_accuracies_are_those_of_scikit_learn(classes, n, modalities, seed):
    from scipy.special import softmax
    from sklearn.metrics import accuracy_score
    gen = np.random.default_rng(seed)
    z = {f'm{i}': gen.normal(size=(n, classes))*3 for i in range(modalities)}
    y = gen.integers(0, classes, n)
    rows = {(r['modality'], r['fusion']): r['accuracy'] for r in
            accuracies({m: torch.from_numpy(v) for m, v in z.items()}, torch.from_numpy(y))}
    percent = lambda p: 100*accuracy_score(y, p.argmax(1))
    p = [softmax(v, 1) for v in z.values()]
    want = {(m, ''): percent(v) for m, v in z.items()}
    if modalities > 1: want |= {('AV', 'mean'): percent(np.mean(p, 0)), ('AV', 'product'): percent(np.prod(p, 0))}
    assert set(rows) == set(want) and all(rows[k] == pytest.approx(want[k]) for k in want)


def test_the_two_fusions_are_not_the_same_rule():
    p = dict(a=torch.tensor([[.90, .09, .01]]), v=torch.tensor([[.005, .495, .5]]))      # mean says 0, product says 1
    for label, right in {0: 'mean', 1: 'product'}.items():
        rows = accuracies({m: v.log() for m, v in p.items()}, torch.tensor([label]))
        assert {r['fusion'] for r in rows if r['modality'] == 'AV' and r['accuracy'] == 100} == {right}


def test_rows_are_tidy_and_repeat_with_any_number_of_workers():
    d, test = data(), data(seed=1)
    protocol = make_protocol('paper', **FAST)
    threads = torch.get_num_threads()
    rows = [scores(evaluate(d, test, protocol, 3, workers=w)) for w in (1, 2, 3)]
    assert rows[0] == rows[1] == rows[2] and torch.get_num_threads() == threads
    assert len(rows[0]) == 3*4 and [r['seed'] for r in rows[0]] == sorted([0, 1, 2]*4)
    kinds = {(r['modality'], r['fusion']) for r in rows[0]}
    assert kinds == {('AV', 'mean'), ('AV', 'product'), ('audio', ''), ('image', '')}
    assert scores(evaluate(d, test, protocol, [2])) == rows[0][8:]               # a seed does not depend on the others
    assert all(r['protocol'] == 'paper*' and r['n_train'] == 30 and r['width'] == 4 for r in rows[0])


def test_the_test_set_trains_nothing(monkeypatch):
    "Two test sets, and even one of other labels: the networks are the same to the last bit."
    import importlib
    ev = importlib.import_module('avdd_nb.evaluate')
    d, seen, plain = data(), [], ev.predict
    monkeypatch.setattr(ev, 'predict', lambda model, *a, **k: seen.append(weights(model)) or plain(model, *a, **k))
    other = data(seed=5, n=4)
    wrong = PairedData(other.tensors, other.modalities, other.labels.flip(0), other.classes)
    syn = from_real(d, d.per_class(4, torch.Generator().manual_seed(0)), 2)
    for train in (d, syn):
        seen.clear()
        for test in (data(seed=1), other, wrong):
            evaluate(train, test, make_protocol('paper', **FAST, epochs_whole=2), 1)
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_accuracy_of_evaluate_is_that_of_its_own_training():
    d, test = data(), data(seed=1)
    protocol = make_protocol('paper', **FAST, epochs_whole=4)
    row = next(r for r in evaluate(d, test, protocol, [7]) if r['modality'] == 'image')
    guess = predict(trained(d, protocol, 7), test)['image'].argmax(1)
    assert row['accuracy'] == pytest.approx(100*(guess == test.labels).float().mean().item())


def test_a_synthetic_set_is_decoded_for_training():
    d = data()
    syn = from_real(d, d.per_class(8, torch.Generator().manual_seed(0)), 2)
    before = {m: x.clone() for m, x in syn.tensors.items()}
    seen = []
    rows = evaluate(syn, data(seed=1), make_protocol('paper', **FAST), 2, progress=seen.append)
    assert {r['n_train'] for r in rows} == {24} and seen[-1] == 1. and seen == sorted(seen)
    assert all(torch.equal(before[m], x) for m, x in syn.tensors.items())


def test_one_modality_alone():
    d, test = data(kinds=dict(image=KINDS['image'])), data(seed=1)
    rows = evaluate(d, test, make_protocol('paper', **FAST), 1)
    assert [(r['modality'], r['fusion']) for r in rows] == [('image', '')]


def test_sets_that_do_not_fit_are_refused():
    d = data()
    with pytest.raises(UserError, match="audio"): evaluate(d, data(kinds=dict(image=KINDS['image'])), 'paper', 1)
    smaller = dict(KINDS, image=Modality('image', 'image', (3, 12, 12)))
    with pytest.raises(UserError): evaluate(d, data(kinds=smaller), 'paper', 1)
    with pytest.raises(UserError): evaluate(d, data(classes=4), 'paper', 1)
    with pytest.raises(UserError, match="did you mean 'paper'"): evaluate(d, d, 'papper', 1)


def test_protocols_are_named_by_what_they_are():
    assert make_protocol('paper') == PROTOCOLS['paper'] and make_protocol('thorough').name == 'thorough'
    assert make_protocol('paper', lr='0.01').name == 'paper*' and make_protocol('paper', lr=.01).lr == .01
    assert make_protocol('paper', lr=1e-3) == PROTOCOLS['paper']                # nothing changed
    for bad in (dict(lr=-1), dict(epoch=3), dict(schedule='linear'), dict(epochs='many'), dict(bf16='maybe')):
        with pytest.raises(UserError): make_protocol('paper', **bad)
    p = PROTOCOLS['paper']
    assert (p.epochs, p.batch, p.lr, p.lr_image, p.weight_decay, p.schedule) == (30, 32, 1e-3, 1e-4, 1e-4, 'steps')


@given(st.integers(1, 5000))
def test_thorough_trains_for_a_number_of_updates(n):
    p = PROTOCOLS['thorough'].for_size(n)
    per_epoch = math.ceil(n/p.batch)
    assert p.epochs >= 1 and (abs(p.epochs*per_epoch - p.updates) <= per_epoch/2 or p.epochs == 1)
    assert PROTOCOLS['paper'].for_size(n) == PROTOCOLS['paper']
    whole = p.for_size(n, whole=True).epochs
    assert p.epochs_whole <= whole <= max(p.epochs_whole, p.epochs)
    assert whole == p.epochs_whole or whole == p.epochs or (whole - 1)*per_epoch < 150 <= whole*per_epoch


def row(accuracy, seed=0, **more):
    return dict(protocol='paper', digest='0', arch='ConvNet', width=128, epochs=30, n_train=10, seed=seed,
                modality='AV', fusion='mean', method='dm', ipc=1, accuracy=accuracy) | more


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.lists(st.floats(0, 100), min_size=2, max_size=8))
def test_summary_against_numpy(a, b):
    rows = [row(v, s) for s, v in enumerate(a)] + [row(v, s, method='avdd') for s, v in enumerate(b)]
    table = summarise(rows).set_index('method')
    for name, v in dict(dm=a, avdd=b).items():
        assert table.loc[name, 'n'] == len(v) and table.loc[name, 'mean'] == pytest.approx(np.mean(v))
        assert table.loc[name, 'std'] == pytest.approx(np.std(v, ddof=1) if len(v) > 1 else 0, abs=1e-6)


def test_summary_keeps_settings_apart_and_refuses_two_protocols():
    rows = [row(1.), row(2., fusion='product'), row(3., modality='audio', fusion='')]
    rows += [row(4., ipc=10), row(5., method='x')]
    assert len(summarise(rows)) == 5
    for other in (dict(protocol='thorough'), dict(protocol='paper*'), dict(digest='another')):
        with pytest.raises(UserError, match="2 protocols"): summarise([row(1.), row(2., **other)])


def test_side_by_side_keeps_the_order():
    import time
    def job(i):
        time.sleep(.02*(3 - i))
        return i*i
    for workers in (1, 2, 4, None): assert side_by_side(job, [0, 1, 2], workers) == [0, 1, 4]
    with pytest.raises(ZeroDivisionError): side_by_side(lambda i: 1/i, [1, 0], 2)


def test_recipe_defaults_are_within_their_own_ranges():
    for p in PROTOCOLS.values(): assert make_protocol(p.name) == p
    names = lambda cls: {f.name for f in dataclasses.fields(cls)}
    assert names(Recipe) < names(type(PROTOCOLS['paper']))
