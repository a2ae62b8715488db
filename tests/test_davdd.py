"DAVDD-style terms against naive loops; prototypes; pairing measures on sets whose truth is known; encoders' corners."
import pytest
import torch
import torch.nn.functional as F

from avdd_nb.core import UserError
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.match.contrast import infonce, ranks
from avdd_nb.methods.base import make_method
from avdd_nb.methods.davdd import Parts, Prototypes, distribution_alignment, intermodal, matching, sample_alignment
from avdd_nb.nets.bank import BankRecipe, PretrainedBank, bank_entry
from avdd_nb.nets.encoders import EncoderNets, JointRecipe, encoded, joint_encoder
from avdd_nb.pairing import SHUFFLES, covariance_gap, shuffle_rows, shuffled_pairs

KINDS = dict(audio=Modality('audio', 'spectrogram', (1, 16, 16)),
             image=Modality('image', 'image', (3, 16, 16), scale=1/255))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('AVDD_CACHE', str(tmp_path / 'cache'))


def made(n=24, classes=3, kinds=KINDS):
    g = torch.Generator().manual_seed(0)
    tensors = {m: torch.randint(0, 256, (n, *s.shape), generator=g, dtype=torch.uint8) for m, s in kinds.items()}
    return PairedData(tensors, kinds, torch.arange(n) % classes, [f'c{i}' for i in range(classes)])


def gen(seed=0): return torch.Generator().manual_seed(seed)


def parts(n, seed, k=4): return {m: torch.randn(n, 2*k, generator=gen(seed + i)) for i, m in enumerate('abc')}


def mean(f): return {name: x.mean(0, keepdim=True) for name, x in Parts(4)(f).items()}


def test_intermodal_is_the_sum_written_out():
    real, syn = parts(7, 0), parts(5, 10)
    R, S = ({m: f[:, :4] for m, f in side.items()} for side in (real, syn))
    want = sum((R[a].mean(0) - S[b].mean(0)).square().sum() for a in 'abc' for b in 'abc' if a != b)
    for a, b in ('ab', 'ac', 'bc'):
        M, N = (sum(torch.outer(x, y) for x, y in zip(side[a], side[b]))/len(side[a]) for side in (R, S))
        want = want + (M - N).square().sum()
    torch.testing.assert_close(intermodal(mean(real), mean(syn))[0], want)


def test_private_parts_stay_out_of_cross_modal_terms():
    real, syn = parts(6, 0), parts(6, 3)
    other = {m: torch.cat([f[:, :4], f[:, 4:]*9], 1) for m, f in syn.items()}
    torch.testing.assert_close(intermodal(mean(real), mean(syn)), intermodal(mean(real), mean(other)))
    assert not torch.allclose(matching(mean(real), mean(syn), 'private'), matching(mean(real), mean(other), 'private'))


def test_sample_alignment_averages_by_class():
    y = torch.tensor([0, 1, 1, 0, 2])
    c = {m: F.normalize(torch.randn(5, 4, generator=gen(i)), dim=1) for i, m in enumerate('ab')}
    rows = infonce(c['a'] @ c['b'].T/.1, y[:, None] == y[None])
    found = sample_alignment(c, y, 3, .1)
    for k in range(3): torch.testing.assert_close(found[k], rows[y == k].mean())


def test_distribution_alignment_is_lowest_at_the_prototypes():
    p = {m: torch.eye(4)[:3] for m in 'ab'}
    far = {m: x.roll(1, 0) for m, x in p.items()}
    assert (distribution_alignment(p, p, .1) < 1e-2).all() and (distribution_alignment(far, p, .1) > 10).all()


def test_prototypes_depend_on_seed_and_step_alone():
    data = made()
    method = make_method('davdd-style', width=4, pool_size=3, bank_pairs=2, bank_epochs=1, init='random')
    straight, jumped = method.source(data, 0), method.source(data, 0)
    for s in range(5): draw = straight.at(s)
    again = jumped.at(4)
    assert all(torch.equal(draw.prototypes[m], again.prototypes[m]) for m in KINDS)
    back = straight.at(1).prototypes
    assert all(torch.equal(back[m], method.source(data, 0).at(1).prototypes[m]) for m in KINDS)
    assert isinstance(straight, Prototypes)


@pytest.mark.parametrize('switch', [dict(decouple=False), dict(trained_bank=False), dict(mix_private=True),
                                    dict(ema=1.), dict(lam_cim=0., lam_sample=0., lam_dis=0.)])
def test_every_switch_runs_and_changes_the_terms(switch):
    from avdd_nb.distill import distill
    data, same = made(), dict(width=4, pool_size=2, bank_pairs=2, bank_epochs=1, init='random')
    method = make_method('davdd-style', **same, **switch)
    syn = method.begin(data, 1, 0)
    progress = list(distill(method, syn, method.source(data, 0), 2))
    assert all(torch.isfinite(torch.tensor(p.loss)) for p in progress)
    assert ('cim' in progress[0].terms) == ('lam_cim' not in switch)


def test_bank_is_kept_and_needs_classes():
    data, recipe = made(), BankRecipe(pairs=2, epochs=1, width=4)
    x = data.batch()['audio']
    one, two = bank_entry(data, recipe, 0), bank_entry(data, recipe, 0)
    assert torch.equal(one['audio'](x), two['audio'](x))
    assert not torch.equal(one['audio'](x), bank_entry(data, recipe, 1)['audio'](x))
    mixed = PretrainedBank(recipe, .5).draw(data, 1)
    assert not any(p.requires_grad for net in mixed.values() for p in net.parameters())
    bare = PairedData(data.tensors, data.modalities)
    with pytest.raises(UserError, match='no labels'): bank_entry(bare, recipe, 0)


def test_joint_encoder_is_kept_deterministic_and_pooled():
    data = made()
    small = dict(updates=2, width=4, batch=8)
    a, b = joint_encoder(data, **small), joint_encoder(data, **small)
    rows, x = encoded(a, data), data.batch()['image']
    assert a.revision == b.revision and torch.equal(a.embed('image', x), b.embed('image', x))
    assert all((rows[m].norm(dim=1) - 1).abs().max() < 1e-5 for m in KINDS)
    assert set(EncoderNets(a).draw(data)) == set(KINDS) and EncoderNets(a).key != EncoderNets(a, True).key
    with pytest.raises(UserError, match='partner'): joint_encoder(data.select('audio'), **small)
    assert JointRecipe(seed=1) != JointRecipe()


def test_ranks_count_ties_half():
    assert ranks(torch.ones(5, 2), torch.ones(5, 2)).tolist() == [3.]*5


@pytest.mark.parametrize('how', SHUFFLES)
def test_shuffles_move_partners_and_nothing_else(how):
    data = made(60)
    x, y = dict(a=torch.arange(60.), b=torch.arange(60.)), data.labels
    moved = shuffled_pairs(x, y, how)
    order = moved['b'].long()
    assert torch.equal(moved['a'], x['a']) and sorted(order.tolist()) == list(range(60))
    assert torch.equal(y[order], y) == (how != 'across') and torch.equal(order, torch.arange(60)) == (how == 'kept')


def test_cross_covariance_knows_who_is_whose_partner():
    g, y = gen(), torch.arange(300) % 3
    a = torch.randn(300, 6, generator=g)
    b = a + .1*torch.randn(300, 6, generator=g)
    same = covariance_gap(a, b, y, a, b, y)
    other = covariance_gap(a, b[torch.randperm(300, generator=g)], y, a, b, y)
    assert same < 1e-6 and other > .8
    assert covariance_gap(a, b, y, a, b, y, within=True) < 1e-6


def test_shuffle_rows_are_tidy():
    rows = shuffle_rows(made(), made(), updates=1, width=4)
    assert [r['what'] for r in rows] == list(SHUFFLES) and all(0 <= r['value'] <= 100 for r in rows)


def test_one_modality_is_refused_in_one_sentence():
    data = made(kinds=dict(audio=KINDS['audio']))
    with pytest.raises(UserError, match='davdd-style needs two modalities.*audio'):
        make_method('davdd-style').begin(data, 1, 0)
