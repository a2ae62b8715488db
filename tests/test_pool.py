"The real side: class means equal to a naive loop, kept and shared, drawn anew, and the pairs to start from."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdd_nb import store
from avdd_nb.core import UserError
from avdd_nb.data.catalog import load
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.match import augment, coreset, start
from avdd_nb.match.pool import FeaturePool, FreshDraws, random_nets, real_means

KINDS = dict(audio=Modality('audio', 'spectrogram', (1, 16, 16), (1.,), (2.,)),
             image=Modality('image', 'image', (3, 16, 16), (.5,)*3, (.25,)*3, 1/255))


def made(counts=(6, 9, 4), seed=0):
    g, n = torch.Generator().manual_seed(seed), sum(counts)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(n, generator=g)]
    return PairedData(dict(audio=torch.randn(n, 1, 16, 16, generator=g),
                           image=torch.randint(0, 256, (n, 3, 16, 16), generator=g, dtype=torch.uint8)),
                      KINDS, labels, [f'c{i}' for i in range(len(counts))])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def pool(d, **more): return FeaturePool(d, **(dict(size=5, width=4) | more))


def same(a, b): return all(torch.equal(a[m], b[m]) for m in a)


@torch.no_grad()
def naive(draw, d, idx=None):
    "Means by a loop over classes and single samples, in double precision."
    keep = set(range(len(d)) if idx is None else idx.flatten().tolist())
    rows = {m: [] for m in draw.nets}
    for c in range(d.n_classes):
        mine = [i for i in range(len(d)) if d.labels[i] == c and i in keep]
        for m, net in draw.nets.items():
            x = [augment.apply(d.modalities[m].normalise(d.tensors[m][i:i+1]), draw.omega) for i in mine]
            rows[m].append(sum(net(v).double()[0] for v in x)/len(mine))
    return {m: torch.stack(r).float() for m, r in rows.items()}


@pytest.mark.parametrize('batch', [1, 5, 512])
def test_means_equal_the_naive_loop(batch):
    d = made()
    for k in range(3):
        draw = pool(d).entry(k)
        want = naive(draw, d)
        found = real_means(draw, d, batch=batch)
        for m in want:
            torch.testing.assert_close(found[m], want[m], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(draw.real[m], want[m], atol=1e-5, rtol=1e-5)


def test_capped_means_use_that_many_per_class():
    d = made()
    idx = d.per_class(2, torch.Generator().manual_seed(0))
    draw = pool(d).entry(0)
    want = naive(draw, d, idx)
    for m, x in real_means(draw, d, idx).items(): torch.testing.assert_close(x, want[m], atol=1e-5, rtol=1e-5)
    capped, whole, over = (pool(d, real_batch=n).entry(0).real for n in (2, 0, 100))
    assert not same(capped, whole)
    n = 4                                     # the smallest class sets the cap
    assert same(pool(d, real_batch=n).entry(1).real, pool(d, real_batch=n, keep=False).entry(1).real)
    assert over['image'].shape == whole['image'].shape


def test_kept_entries_are_shared(own_cache, monkeypatch):
    d = made()
    one = pool(d).entry(2).real
    assert len(list((own_cache/'pool').glob('*.safetensors'))) == 1
    from avdd_nb.match import pool as room
    def never(*a): raise AssertionError("computed again")
    monkeypatch.setattr(room, 'real_means', never)
    other = pool(made()).entry(2)             # another object, another method's pool: the same file
    assert same(one, other.real) and pool(d, size=50).entry(2).real['audio'].equal(one['audio'])
    with pytest.raises(AssertionError, match='computed again'): pool(d, seed=1).entry(2)
    with pytest.raises(AssertionError, match='computed again'): pool(made(seed=3)).entry(2)


def test_keep_false_leaves_the_disk_alone(own_cache):
    pool(made(), keep=False).entry(0)
    assert not own_cache.exists()


def weights(draw):
    return torch.cat([p.flatten() for net in draw.nets.values() for p in net.parameters() if p.std() > 0])


def test_entries_and_seeds_share_nothing():
    d = made()
    draws = [pool(d, seed=s, keep=False).entry(k) for s in range(3) for k in range(3)]
    draws += [FreshDraws(d, 4, real_batch=2, seed=s).at(k) for s in range(2) for k in range(2)]
    w = torch.stack([weights(draw) for draw in draws])
    equal = (w[:, None] == w[None]).float().mean(-1) - torch.eye(len(w))
    assert equal.max() == 0
    assert len({(draw.omega.op, str(draw.omega.u)) for draw in draws}) == len(draws)


def test_modalities_have_networks_of_their_own():
    nets = random_nets(dict(a=KINDS['image'], b=KINDS['image']), 4, 'cpu', 's')
    assert not torch.equal(nets['a'].features[0].weight, nets['b'].features[0].weight)
    assert not any(p.requires_grad for net in nets.values() for p in net.parameters())


@settings(max_examples=15)
@given(st.integers(1, 7), st.integers(0, 5))
def test_every_entry_once_per_round(size, seed):
    d = made()
    p = FeaturePool(d, size=size, width=4, seed=seed, keep=False)
    p.entry = lambda k: k
    rounds = [[p.at(r*size + i) for i in range(size)] for r in range(6)]
    assert all(sorted(r) == list(range(size)) for r in rounds)
    if size > 4: assert len({tuple(r) for r in rounds}) > 1
    again = FeaturePool(d, size=size, width=4, seed=seed, keep=False)
    again.entry = lambda k: k
    assert again.at(size*3) == rounds[3][0]                       # no state: a resumed run sees the same order


def test_fresh_draws_depend_on_seed_and_step_alone():
    d = made()
    a, b = FreshDraws(d, 4, real_batch=3, seed=1), FreshDraws(d, 4, real_batch=3, seed=1)
    a.at(0), a.at(1)
    x, y = a.at(2), b.at(2)
    assert same(x.real, y.real) and x.omega == y.omega and torch.equal(weights(x), weights(y))
    assert not same(x.real, a.at(3).real) and not same(x.real, FreshDraws(d, 4, real_batch=3, seed=2).at(2).real)


def test_global_generator_stands_still():
    d = made()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    pool(d, keep=False).at(0)
    FreshDraws(d, 4, real_batch=2).at(0)
    start.pair_features(d, 'random')
    start.starting_pairs(d, 'herding', 2, 'trained')
    assert torch.equal(torch.get_rng_state(), state)


def test_embedding_lets_gradients_through():
    d = made()
    draw = pool(d).entry(0)
    x = {m: v.requires_grad_(True) for m, v in d.batch(torch.arange(6)).items()}
    sum(v.square().sum() for v in draw.means(x, torch.arange(6) % 3, 3).values()).backward()
    assert all(v.grad.abs().sum() > 0 for v in x.values())


def test_starting_pairs():
    d = made((12, 15, 9))
    for init in coreset.SELECTORS:
        idx = start.starting_pairs(d, init, 4, 'random')
        assert idx.shape == (3, 4) and torch.equal(d.labels[idx], torch.arange(3)[:, None].expand(-1, 4))
        assert all(len(set(row)) == 4 for row in idx.tolist())
        assert torch.equal(idx, start.starting_pairs(d, init, 4, 'random'))
    want = coreset.select('herding', start.pair_features(d, 'random', 0), d.labels, 4, 0)
    assert torch.equal(start.starting_pairs(d, 'herding', 4, 'random'), want)
    assert not torch.equal(start.starting_pairs(d, 'random', 4, seed=1), start.starting_pairs(d, 'random', 4, seed=2))


def test_features_are_those_of_the_networks_in_any_batch():
    d = made()
    nets = random_nets(d.modalities, 64, 'cpu', 'features', 0)
    with torch.no_grad(): want = torch.cat([nets[m](x) for m, x in d.batch().items()], 1)
    torch.testing.assert_close(start.pair_features(d, 'random', batch=4), want, atol=1e-5, rtol=1e-5)


def test_modalities_of_any_two_sizes_embed_to_one():
    "A picture of 96 pixels ends at 6×6, a spectrogram of 64×32 at 4×4: AVDD adds them all the same."
    for side in (32, 48, 96, 112, 224):
        kinds = dict(audio=Modality('audio', 'spectrogram', (1, 64, 32)),
                     image=Modality('image', 'image', (3, side, side)))
        dims = {m: net.dim for m, net in random_nets(kinds, 4, 'cpu', 's').items()}
        assert len(set(dims.values())) == 1, (side, dims)


def test_evidence_of_training_against_a_plain_loop():
    from avdd_nb.core import seed_of
    from avdd_nb.nets.fusion import probabilities
    from avdd_nb.train import Recipe, fit, new_model
    d = made()
    recipe = Recipe(epochs=10, width=32, lr_image=1e-3, schedule='constant', strategy='')
    model, said = new_model(d.modalities, d.n_classes, recipe, seed_of('forgetting', 0)), []
    def ask(e): said.append([int(probabilities(model(d.batch())).argmax(1)[i] == d.labels[i]) for i in range(len(d))])
    fit(model, d.modalities, d.batch, d.labels, recipe, seed_of('forgetting', 0), ask)
    want = [sum(a[i] and not b[i] for a, b in zip(said, said[1:])) for i in range(len(d))]
    assert start.evidence(d, 'forgetting')[:, 0].tolist() == want


def test_gradient_scores_are_those_of_backward():
    from avdd_nb.core import seed_of
    from avdd_nb.train import Recipe, fit, new_model
    d = made()
    recipe = Recipe(epochs=1, width=32, lr_image=1e-3, schedule='constant', strategy='')
    model = new_model(d.modalities, d.n_classes, recipe, seed_of('grand', 0, 0))
    fit(model, d.modalities, d.batch, d.labels, recipe, seed_of('grand', 0, 0))
    x, want = d.batch(), []
    for i in range(len(d)):
        loss = model.loss(model({m: v[i:i + 1] for m, v in x.items()}), d.labels[i:i + 1])
        grads = torch.autograd.grad(loss, list(model.heads.parameters()))
        want.append(torch.cat([g.flatten() for g in grads]).norm().item())
    found = start.gradient_scores(d, networks=1)[:, 0]
    torch.testing.assert_close(found, torch.tensor(want), rtol=1e-3, atol=1e-5)


def test_evidence_is_computed_once(monkeypatch):
    d = made(seed=11)
    first = start.starting_pairs(d, 'grand', 2)
    monkeypatch.setitem(start.EVIDENCE, 'grand', None)
    assert torch.equal(start.starting_pairs(d, 'grand', 1)[:, 0], first[:, 0])
    with pytest.raises(UserError, match="did you mean 'grand'"): start.starting_pairs(d, 'grandd', 1)


def test_a_change_of_numbers_asks_for_a_new_revision():
    "What is kept on disk was made by this code: where its numbers change, raise `store.REVISION`, write them anew."
    data = load('soundshapes', n_train=20, n_test=10).train
    found = FeaturePool(data, size=1, width=8, keep=False).at(0).real
    seen = {m: [*x.shape, *(round(v, 3) for v in (x.mean().item(), x.std().item(), x[0, 0].item()))]
            for m, x in found.items()}
    first = {1: dict(audio=[10, 128, .370, .262, .642], image=[10, 128, .383, .351, .423])}
    assert seen == {m: pytest.approx(v, abs=2e-3) for m, v in first[store.REVISION].items()}
