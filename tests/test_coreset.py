"Selections: golden orders, naive second implementations, and what every selector promises."
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdd_nb.core import UserError
from avdd_nb.match.coreset import (
    SELECTORS,
    forgetting,
    forgetting_events,
    gradient_norms,
    herding,
    kcenter,
    select,
    unforgettable,
)

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'select.npz', allow_pickle=False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('i', range(3))
@pytest.mark.parametrize('f', [herding, kcenter])
def test_golden_orders(f, i, dtype):
    want = GOLDEN[f'sel{i}_{f.__name__}']
    got = f(torch.from_numpy(GOLDEN[f'sel{i}_features']).to(dtype), len(want))
    assert got.tolist() == want.tolist()


def herding_cost(f, picks, j):
    return np.linalg.norm((len(picks) + 1) * f.mean(0) - f[picks].sum(0) - f[j])


def kcenter_cost(f, picks, j):
    return -min((np.linalg.norm(f[j] - f[p]) for p in picks), default=-np.linalg.norm(f[j] - f.mean(0)))


@given(n=st.integers(1, 25), D=st.integers(1, 6), shift=st.sampled_from([0., 100.]), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_each_pick_is_a_best_one(n, D, shift, seed):
    "Compared by cost, not by index: two samples alone are equally far from their mean."
    f = np.random.default_rng(seed).normal(size=(n, D)) + shift
    for select_, cost in ((herding, herding_cost), (kcenter, kcenter_cost)):
        picks = select_(torch.from_numpy(f), n).tolist()
        assert sorted(picks) == list(range(n))
        for i, pick in enumerate(picks):
            best = min(cost(f, picks[:i], j) for j in range(n) if j not in picks[:i])
            assert cost(f, picks[:i], pick) <= best + 1e-9


@pytest.mark.parametrize('name', SELECTORS)
def test_every_selector(name):
    gen = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=gen), torch.randint(3, (60,), generator=gen)
    if SELECTORS[name].evidence not in ('nothing', 'features'): features = features[:, :1]       # a score
    smallest = torch.bincount(labels).min().item()
    state = torch.random.get_rng_state()
    table = select(name, features, labels, smallest, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert table.shape == (3, smallest) and table.dtype == torch.long
    assert torch.equal(labels[table], torch.arange(3)[:, None].expand(3, smallest))
    assert table.flatten().unique().numel() == table.numel()
    assert torch.equal(table, select(name, features, labels, smallest, seed=1))
    assert torch.equal(table[:, :4], select(name, features, labels, 4, seed=1))
    assert torch.equal(table, select(name, features, labels, smallest, seed=2)) == (name != 'random')


@pytest.mark.parametrize('name', SELECTORS)
def test_duplicates_are_picked_once_each(name):
    table = select(name, torch.ones(12, 1), torch.arange(12) % 2, 6)
    assert table.sort().values.tolist() == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_random_is_uniform_and_differs_by_class():
    features, labels = torch.zeros(20, 1), torch.arange(20) // 10
    tables = torch.stack([select('random', features, labels, 1, seed=s)[:, 0] for s in range(600)])
    assert torch.bincount(tables.flatten(), minlength=20).min() > 30
    assert not torch.equal(tables[:, 0], tables[:, 1] - 10)


def test_refusals():
    with pytest.raises(UserError, match='class 1 has 0'):
        select('random', torch.zeros(4, 1), torch.tensor([0, 0, 2, 2]), 1)
    with pytest.raises(UserError, match='NaN'):
        select('herding', torch.full((4, 1), torch.nan), torch.zeros(4, dtype=torch.long), 1)


@pytest.mark.parametrize('i', range(2))
def test_golden_forgetting_and_gradients(i):
    g = lambda what: torch.from_numpy(GOLDEN[what])
    events = forgetting_events(g(f'forget{i}_correct'))
    assert events.tolist() == g(f'forget{i}_events').tolist()
    never = forgetting_events(g(f'forget{i}_correct'), unlearned=torch.inf).isinf()
    assert never.tolist() == g(f'forget{i}_never_learned').bool().tolist()
    logits, features, labels = (g(f'grand{i}_{what}') for what in ('logits', 'features', 'labels'))
    np.testing.assert_allclose(gradient_norms(logits, features, labels), GOLDEN[f'grand{i}_scores'], rtol=1e-5)


@given(epochs=st.integers(1, 8), n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_events_counted_in_a_loop(epochs, n, seed):
    right = np.random.default_rng(seed).integers(0, 2, (epochs, n))
    want = [sum(right[t - 1, i] == 1 and right[t, i] == 0 for t in range(1, epochs)) for i in range(n)]
    assert forgetting_events(torch.from_numpy(right)).tolist() == want


@given(n=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_the_two_directions_and_their_ties(n, seed):
    "Sorted by score, whichever way; all of a tie have a chance."
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (n, 1))).double()
    most, least = (f(scores, n, torch.Generator().manual_seed(seed)) for f in (forgetting, unforgettable))
    assert scores[most].flatten().tolist() == sorted(scores.flatten().tolist(), reverse=True)
    assert scores[least].flatten().tolist() == sorted(scores.flatten().tolist())
    assert sorted(most.tolist()) == sorted(least.tolist()) == list(range(n))


def test_ties_are_fair():
    scores, labels = torch.zeros(5, 1), torch.zeros(5, dtype=torch.long)
    first = [select('forgetting', scores, labels, 1, seed=s).item() for s in range(200)]
    assert min(first.count(i) for i in range(5)) > 20


def test_a_ranking_needs_scores():
    with pytest.raises(UserError, match='one score a sample'):
        select('grand', torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), 1)
