"Paired data: normalisation, draws by class, splits, the hash, and every refusal."
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError
from avdd_nb.data.paired import Modality, PairedData

IMAGE = Modality('image', 'image', (3, 4, 4), (.5, .4, .3), (.2, .3, .1), 1/255)
AUDIO = Modality('audio', 'spectrogram', (1, 4, 6), (-30.,), (20.,), unit='dB', meta=dict(sr=11000))


def made(counts=(5, 7, 4), seed=0, **more):
    "Shuffled pairs; item i's first audio number is i."
    gen, n = torch.Generator().manual_seed(seed), sum(counts)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(n, generator=gen)]
    audio = torch.randn(n, 1, 4, 6, generator=gen).half()
    audio[:, 0, 0, 0] = torch.arange(n)
    tensors = dict(audio=audio, image=torch.randint(0, 256, (n, 3, 4, 4), generator=gen, dtype=torch.uint8))
    words = dict(ids=[f'id{i}' for i in range(n)], captions=[f'text {i}' for i in range(n)])
    return PairedData(**(dict(tensors=tensors, modalities=dict(audio=AUDIO, image=IMAGE), labels=labels,
                              classes=[f'c{i}' for i in range(len(counts))], name='made') | words | more))


def gen(seed=0): return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_denormalise_undoes_normalise(shape, n, data):
    number = lambda low, high: st.lists(st.floats(low, high), min_size=shape[0], max_size=shape[0]).map(tuple)
    mean, std, scale = data.draw(number(-50, 50)), data.draw(number(.05, 20)), data.draw(st.floats(.004, 3))
    m = Modality('m', 'image', tuple(shape), mean, std, scale)
    x = torch.randn(n, *shape, generator=gen(1))*30
    torch.testing.assert_close(m.denormalise(m.normalise(x)), x, rtol=1e-4, atol=1e-2)
    want = np.empty(x.shape)
    for c in range(shape[0]): want[:, c] = (x[:, c].double().numpy()*m.scale - m.mean[c])/m.std[c]
    np.testing.assert_allclose(m.normalise(x).numpy(), want, rtol=1e-4, atol=1e-3)


def test_pictures_come_back_as_bytes():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    m = dataclasses.replace(IMAGE, shape=(3, 16, 16))
    assert m.normalise(x).dtype == torch.float32 and torch.equal(m.denormalise(m.normalise(x)).round().byte(), x)


@given(st.integers(1, 4), st.floats(.1, 10), st.floats(-20, 20))
def test_fit_gives_zero_mean_and_unit_std(channels, spread, shift):
    x = torch.randn(50, channels, 3, 5, generator=gen())*spread + shift
    m = Modality('m', 'image', (channels, 3, 5)).fit(x)
    np.testing.assert_allclose(m.mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    y = m.normalise(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-3 and (y.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_fit_on_constant_data_stays_finite():
    x = torch.zeros(5, 1, 2, 2)
    assert torch.isfinite(Modality('m', 'image', (1, 2, 2)).fit(x).normalise(x)).all()


def test_text_passes_as_integers():
    m, x = Modality('t', 'text', (4,)), torch.randint(0, 9, (3, 4), dtype=torch.int16)
    assert torch.equal(m.normalise(x), x.long()) and m.normalise(x).dtype == torch.long and m.denormalise(x) is x


def test_modality_survives_json():
    import json
    assert Modality.from_json(json.loads(json.dumps(AUDIO.to_json()))) == AUDIO


def test_storage_keeps_its_type():
    d = made()
    for part in (d, d.subset(torch.arange(16)), d.select('image', 'audio'), d.to('cpu'), *d.split(.25)):
        assert part.tensors['image'].dtype == torch.uint8 and part.tensors['audio'].dtype == torch.float16
    b = d.batch([0, 3])
    assert {v.dtype for v in b.values()} == {torch.float32} and b['image'].shape == (2, 3, 4, 4)
    torch.testing.assert_close(b['image'], IMAGE.normalise(d.tensors['image'][[0, 3]]))
    assert 'uint8' in repr(d) and len(d.batch()['audio']) == len(d) == 16


def test_class_indices():
    d = made()
    for c, idx in enumerate(d.class_indices):
        assert idx.tolist() == [i for i, y in enumerate(d.labels.tolist()) if y == c]


@given(st.lists(st.integers(3, 9), min_size=1, max_size=6), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_per_class_draws_the_right_class(counts, n, replace, seed):
    d = made(counts)
    idx = d.per_class(n, gen(seed), replace)
    assert idx.shape == (len(counts), n)
    assert torch.equal(d.labels[idx], torch.arange(len(counts))[:, None].expand(-1, n))
    if not replace: assert all(len(set(row)) == n for row in idx.tolist())
    assert torch.equal(idx, d.per_class(n, gen(seed), replace))


@pytest.mark.parametrize('replace', [False, True])
def test_per_class_is_uniform(replace):
    from scipy.stats import chisquare
    d, g = made((6, 9, 4)), gen(3)
    counts = torch.zeros(19)
    for _ in range(3000): counts += torch.bincount(d.per_class(2, g, replace).flatten(), minlength=19)
    for idx in d.class_indices: assert chisquare(counts[idx].numpy()).pvalue > 1e-4


def test_per_class_positions_are_uniform_too():
    "Not only who is drawn, but who comes first: ranks would otherwise follow the order on disk."
    from scipy.stats import chisquare
    d, g = made((5, 5)), gen(4)
    first = torch.stack([d.per_class(3, g)[0, 0] for _ in range(2000)])
    assert chisquare(torch.bincount(first, minlength=10)[d.class_indices[0]].numpy()).pvalue > 1e-4


def test_replacement_does_repeat():
    assert any(len(set(made((4, 4)).per_class(4, gen(s), True)[0].tolist())) < 4 for s in range(9))


@given(st.lists(st.integers(2, 20), min_size=1, max_size=5), st.floats(.05, .9), st.integers(0, 9))
def test_split_is_stratified_disjoint_and_deterministic(counts, fraction, seed):
    d = made(counts)
    rest, held = d.split(fraction, seed)
    one, other = set(rest.ids), set(held.ids)
    assert not one & other and one | other == set(d.ids)
    for c, n in enumerate(counts):
        k = (held.labels == c).sum().item()
        assert 1 <= k <= n - 1 and abs(k - fraction*n) <= 1
    again = d.split(fraction, seed)
    assert again[1].ids == held.ids and again[0].hash == rest.hash


def test_split_depends_on_the_seed():
    d = made((40, 40))
    assert len({tuple(d.split(.5, s)[1].ids) for s in range(5)}) == 5


def test_subset_keeps_pairs_together():
    d, idx = made(), torch.tensor([8, 0, 15, 3, 11, 2])
    if len(set(d.labels[idx].tolist())) < 3: idx = d.per_class(2, gen()).flatten()
    s = d.subset(idx)
    assert s.tensors['audio'][:, 0, 0, 0].tolist() == idx.tolist() == [int(i[2:]) for i in s.ids]
    assert torch.equal(s.labels, d.labels[idx]) and s.captions == [f'text {i}' for i in idx.tolist()]
    assert torch.equal(s.tensors['image'], d.tensors['image'][idx])


def test_select():
    d = made().select('image')
    assert list(d.tensors) == ['image'] == list(d.modalities) and len(d) == 16
    with pytest.raises(UserError, match="'imge'; did you mean 'image'"): made().select('imge')


def changed(which):
    "The same data with one ingredient changed."
    d = made()
    tensors, labels = {m: x.clone() for m, x in d.tensors.items()}, d.labels.clone()
    classes, kinds = list(d.classes), dict(d.modalities)
    if which == 'pixel': tensors['image'][7, 2, 3, 1] ^= 1
    if which == 'sound': tensors['audio'][15, 0, 3, 5] += 1
    if which == 'label': labels[d.class_indices[1][0]] = 0
    if which == 'class name': classes[2] = 'other'
    if which == 'order of classes': classes[:2] = classes[1::-1]
    if which == 'mean': kinds['audio'] = dataclasses.replace(AUDIO, mean=(-31.,))
    if which == 'std': kinds['image'] = dataclasses.replace(IMAGE, std=(.2, .3, .11))
    if which == 'scale': kinds['image'] = dataclasses.replace(IMAGE, scale=1.)
    if which == 'meta': kinds['audio'] = dataclasses.replace(AUDIO, meta=dict(sr=16000))
    if which == 'type': tensors['audio'] = tensors['audio'].view(torch.int16)
    if which == 'order': tensors, labels = {m: x.flip(0) for m, x in tensors.items()}, labels.flip(0)
    return PairedData(tensors, kinds, labels, classes)


CHANGES = ['pixel', 'sound', 'label', 'class name', 'order of classes', 'mean', 'std', 'scale', 'meta', 'type', 'order']

@pytest.mark.parametrize('which', CHANGES)
def test_hash_sees_every_ingredient(which): assert changed(which).hash != made().hash


def test_hash_of_equal_data_is_equal():
    assert changed('nothing').hash == made().hash == made().to('cpu').hash
    assert len({changed(w).hash for w in CHANGES}) == len(CHANGES)
    assert made(labels=None).hash != made().hash and made().select('image').hash != made().hash
    d = made()
    swapped = {m: d.tensors[m] for m in reversed(d.tensors)}
    assert made(tensors=swapped).hash == d.hash                  # a dict's order is not an ingredient
    strided = {m: torch.stack([x, x], -1)[..., 0] for m, x in d.tensors.items()}
    assert made(tensors=strided).hash == d.hash



def tensors_with(m, x): return made().tensors | {m: x}

def with_item(x, i, value):
    x = x.float().clone()
    x[i].view(-1)[-1] = value
    return x


D = made()
IMAGES, SOUNDS = D.tensors['image'], D.tensors['audio']
REFUSED = {
    "'image' has 15 items, the others have 16": dict(tensors=tensors_with('image', IMAGES[:15])),
    "'image' have shape .3, 4, 2., its modality says .3, 4, 4.": dict(tensors=tensors_with('image', IMAGES[..., :2])),
    "Item 9 of 'audio' holds NaN": dict(tensors=tensors_with('audio', with_item(SOUNDS, 9, float('nan')))),
    "Item 0 of 'audio' holds NaN or infinity": dict(tensors=tensors_with('audio', with_item(SOUNDS, 0, float('-inf')))),
    "There are 15 labels for 16 items": dict(labels=D.labels[:15]),
    "Item 4 has label 3, but there are 3 classes": dict(labels=D.labels.clone().index_fill_(0, torch.tensor([4]), 3)),
    "Item 6 has label -1": dict(labels=D.labels.clone().index_fill_(0, torch.tensor([6]), -1)),
    "Class 'c3' has no items": dict(classes=['c0', 'c1', 'c2', 'c3']),
    "Class 'c1' has no items": dict(labels=D.labels.masked_fill(D.labels == 1, 0)),
    "at least one modality": dict(tensors={}, modalities={}),
    r"Tensors \['audio', 'image'\] and modalities \['audio'\] differ": dict(modalities=dict(audio=AUDIO)),
    "'made' is empty": dict(tensors={m: x[:0] for m, x in D.tensors.items()}, labels=D.labels[:0]),
}

@pytest.mark.parametrize('sentence', REFUSED)
def test_refusals_name_the_item(sentence):
    with pytest.raises(UserError, match=sentence) as e: made(**REFUSED[sentence])
    assert '\n' not in str(e.value)


def test_refusals_of_draws():
    with pytest.raises(UserError, match="Class 'c2' has 4 items, 5 were asked for"): made().per_class(5, gen())
    whole = made(labels=None, classes=[])
    with pytest.raises(UserError, match="'made' has .* items, 99 were asked for"): whole.per_class(99, gen())
    with pytest.raises(UserError, match="Class 'c1' has a single item"): made((3, 1)).split(.5)
    assert made().per_class(5, gen(), replace=True).shape == (3, 5)


def test_data_without_classes_are_one_group():
    d = made(labels=None, classes=[])
    assert (d.n_classes, d.n_groups) == (0, 1) and not d.group_labels.any()
    drawn = d.per_class(5, gen())
    assert drawn.shape == (1, 5) and len(set(drawn[0].tolist())) == 5
    rest, held = d.split(.25)
    assert len(rest) + len(held) == len(d) and len(held) == round(.25*len(d)) and held.labels is None


@pytest.mark.cuda
def test_the_gpu_holds_the_stored_bytes():
    d = made().to('cuda')
    assert d.tensors['image'].dtype == torch.uint8 and d.device.type == 'cuda' and d.hash == made().hash
    torch.testing.assert_close(d.batch([1, 2])['image'].cpu(), made().batch([1, 2])['image'])
    assert torch.equal(d.per_class(2, gen()).cpu(), made().per_class(2, gen()))
    assert d.subset(torch.arange(16)).device.type == 'cuda'


def test_the_hash_does_not_depend_on_threads():
    x, threads, found = torch.rand(160, 1, 64, 32, generator=torch.Generator().manual_seed(0))*80 - 80, [1, 2, 3], []
    before = torch.get_num_threads()
    for n in threads:
        torch.set_num_threads(n)
        found.append(Modality('audio', 'spectrogram', (1, 64, 32)).fit(x))
        assert torch.get_num_threads() == n
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
