"Mosaics against the public implementation (golden), no pixel lost at any size, and sets that survive the disk."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.store import load_tensors, manifest_path, save_tensors
from avdd_nb.synset import SyntheticSet, decode, from_real, load_synset, mosaic, save_synset

GOLDEN = np.load(Path(__file__).parent/'golden'/'factor.npz', allow_pickle=False)
sides = st.integers(4, 19)
orders = st.sampled_from(['column', 'row'])


def golden(key): return torch.from_numpy(GOLDEN[key])


def a_set(x, labels, l=2, order='column', **more):
    m = Modality('m', 'image', tuple(x.shape[1:]))
    return SyntheticSet(dict(m=x), labels, dict(m=m), [f'c{i}' for i in range(int(labels.shape[0]))], l, order, **more)


@pytest.mark.parametrize('i', range(3))
def test_decode_is_the_public_one(i):
    x = golden(f'dec{i}_x').requires_grad_(True)
    y = decode(x, 2)
    torch.testing.assert_close(y, golden(f'dec{i}_y'), atol=1e-6, rtol=0)
    (y*golden(f'dec{i}_w')).sum().backward()
    torch.testing.assert_close(x.grad, golden(f'dec{i}_grad_x'), atol=1e-5, rtol=0)
    tensors, labels = a_set(x, golden(f'dec{i}_labels')).decode()
    assert torch.equal(labels, golden(f'dec{i}_labels_out')) and torch.equal(tensors['m'], y)


@pytest.mark.parametrize('i', range(3))
def test_start_is_the_public_one(i):
    audio, image = golden(f'init{i}_audio'), golden(f'init{i}_image')
    C, n = audio.shape[:2]
    tensors = dict(audio=audio.flatten(0, 1), image=image.flatten(0, 1))
    modalities = {m: Modality(m, 'image', tuple(x.shape[1:])) for m, x in tensors.items()}
    data = PairedData(tensors, modalities, torch.arange(C).repeat_interleave(n), [f'c{c}' for c in range(C)])
    syn = from_real(data, torch.arange(C*n).view(C, n), 2, init='mine')
    for m in tensors: torch.testing.assert_close(syn.tensors[m], golden(f'init{i}_{m}_mosaic'), atol=1e-6, rtol=0)
    assert syn.ipc == GOLDEN[f'init{i}_ipc'] and syn.provenance == dict(init='mine')
    assert torch.equal(syn.labels, torch.arange(C).repeat_interleave(n//4))


@pytest.mark.parametrize('key, l', [('idm_l3', 3), ('ncfm_l2', 2), ('ncfm_l3', 3)])
def test_row_order_is_that_of_idm_and_ncfm_where_sides_divide(key, l):
    torch.testing.assert_close(decode(golden('rowmajor0_x'), l, 'row'), golden(f'rowmajor0_{key}_y'), atol=1e-6, rtol=0)


@given(st.integers(1, 4), sides, sides, orders)
def test_decode_equals_a_loop_over_tiles(l, h, w, order):
    x = torch.randn(2, 3, h, w)
    places = [(r, c) for r in range(l) for c in range(l)]
    if order == 'column': places = [(r, c) for c, r in places]
    cut = lambda r, c: x[:, :, r*h//l:(r + 1)*h//l, c*w//l:(c + 1)*w//l]
    want = [F.interpolate(cut(r, c), (h, w), mode='bilinear') for r, c in places]
    torch.testing.assert_close(decode(x, l, order), torch.cat(want))


@given(st.integers(1, 4), sides, sides, orders)
def test_every_pixel_learns(l, h, w, order):
    x = torch.randn(1, 1, h, w, requires_grad=True)
    decode(x, l, order).sum().backward()
    assert (x.grad > 0).all() and torch.isclose(x.grad.sum(), torch.tensor(float(l*l*h*w)), rtol=1e-4)


@given(st.integers(1, 4), sides, sides, orders)
def test_mosaic_has_every_tile_in_its_place(l, h, w, order):
    x = torch.arange(l*l).float().view(-1, 1, 1, 1, 1).expand(-1, 2, 3, h, w)
    made = mosaic(x, l, order)
    torch.testing.assert_close(made, made.round(), atol=1e-4, rtol=0)
    made = made.round()
    assert made.shape == (2, 3, h, w) and set(made.unique().tolist()) == set(range(l*l))
    back = decode(made, l, order).unflatten(0, (l*l, 2))
    torch.testing.assert_close(back, x.contiguous())
    sizes = torch.bincount(made[0, 0].long().flatten())
    assert sizes.sum() == h*w and sizes.max() - sizes.min() <= h//l + w//l + 1


@given(st.integers(2, 3), orders)
def test_mosaic_is_undone_by_decode_for_smooth_pictures(l, order):
    "Pictures that change slowly pass through the tiles nearly unharmed, each in its own place."
    h = w = 12*l
    ramp = torch.linspace(-1, 1, h)[:, None] + torch.linspace(-2, 2, w)
    x = torch.stack([ramp*(k + 1) for k in range(l*l)]).view(l*l, 1, 1, h, w)
    error = (decode(mosaic(x, l, order), l, order).view_as(x) - x).abs().amax((1, 2, 3, 4))
    assert (error < .25*torch.arange(1, l*l + 1)).all()


def data_of(C=3, n=8, soft=False):
    tensors = dict(a=torch.randn(C*n, 1, 8, 6), v=torch.randint(0, 256, (C*n, 3, 8, 8), dtype=torch.uint8))
    kinds = dict(a=Modality('a', 'spectrogram', (1, 8, 6), (-3.,), (2.,), unit='dB', meta=dict(sr=11000)),
                 v=Modality('v', 'image', (3, 8, 8), (.5,)*3, (.2,)*3, 1/255))
    return PairedData(tensors, kinds, torch.arange(C).repeat_interleave(n), [f'c{c}' for c in range(C)])


def test_factor_one_is_the_real_pairs():
    d = data_of()
    idx = d.per_class(2, torch.Generator().manual_seed(0))
    syn = from_real(d, idx)
    tensors, labels = syn.decode()
    for m, x in d.batch(idx.flatten()).items(): assert torch.equal(tensors[m], x)
    assert torch.equal(labels, d.labels[idx.flatten()]) and syn.ipc == 2


@given(st.integers(1, 3), st.integers(1, 2), st.integers(2, 4), orders)
def test_tiles_come_from_the_right_class_and_rank(l, ipc, C, order):
    "Constant pictures that tell their class and rank."
    n = ipc*l*l
    value = (torch.arange(C)[:, None]*100. + torch.arange(n)).view(C*n, 1, 1, 1)
    tensors = dict(m=value.expand(-1, 1, 7, 5).contiguous())
    kinds = dict(m=Modality('m', 'image', (1, 7, 5)))
    d = PairedData(tensors, kinds, torch.arange(C).repeat_interleave(n), list('abcd'[:C]))
    syn = from_real(d, torch.arange(C*n).view(C, n), l, order)
    x, y = syn.decode()
    want = [c*100. + t*ipc + j for t in range(l*l) for c in range(C) for j in range(ipc)]
    assert x['m'][:, 0, 3, 2].round().tolist() == want and y.tolist() == [int(w//100) for w in want]


def test_uneven_tiles_are_refused():
    with pytest.raises(UserError, match="3 real pairs per class do not fill samples of 2×2"):
        from_real(data_of(), torch.zeros(3, 3, dtype=torch.long), 2)
    with pytest.raises(UserError, match="'colum'; did you mean 'column'"): decode(torch.zeros(1, 1, 4, 4), 2, 'colum')


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('tiles', [False, True])
def test_partial_decode_is_part_of_the_whole(soft, tiles):
    syn = from_real(data_of(), data_of().per_class(8, torch.Generator().manual_seed(1)), 2)
    if soft: syn.labels = torch.rand(len(syn), 3).softmax(1)
    if tiles: syn.tile_labels = torch.rand(4*len(syn), 3).softmax(1)
    whole, labels = syn.decode()
    for idx in (slice(2, 5), torch.tensor([4, 1])):
        rows = torch.arange(4)[:, None]*len(syn) + torch.arange(len(syn))[idx]
        part, y = syn.decode(idx)
        assert torch.equal(y, labels[rows.flatten()])
        for m in part: torch.testing.assert_close(part[m], whole[m][rows.flatten()])


@pytest.mark.parametrize('soft', [False, True])
def test_sets_survive_the_disk(tmp_path, soft):
    d = data_of()
    syn = from_real(d, d.per_class(8, torch.Generator().manual_seed(2)), 2, 'row', seed=4)
    if soft: syn.labels, syn.tile_labels = torch.rand(len(syn), 3), torch.rand(4*len(syn), 3)
    path = save_synset(syn, tmp_path/'deep'/'set.safetensors')
    back = load_synset(path)
    assert (back.factor, back.order, back.classes, back.provenance) == (2, 'row', d.classes, dict(seed=4))
    assert back.modalities == d.modalities and repr(back) == repr(syn)
    for m in syn.tensors: assert torch.equal(back.tensors[m], syn.tensors[m])
    assert torch.equal(back.labels, syn.labels) and torch.equal(back.decode()[1], syn.decode()[1])
    assert (back.tile_labels is None) == (not soft)
    torch.testing.assert_close(back.to('cpu').decode()[0]['a'], syn.decode()[0]['a'])


def test_foreign_files_are_refused(tmp_path):
    save_tensors(tmp_path/'other.safetensors', dict(weight=torch.zeros(3)), dict(kind='net'))
    with pytest.raises(UserError, match="holds no synthetic set"): load_synset(tmp_path/'other.safetensors')
    with pytest.raises(UserError, match="There is no file"): load_synset(tmp_path/'none.safetensors')
    d = data_of()
    path = save_synset(from_real(d, d.per_class(1, torch.Generator().manual_seed(0))), tmp_path/'set.safetensors')
    tensors, meta = load_tensors(path)
    for bad in ({}, meta | dict(modalities=dict(a=3)), []):
        save_tensors(path, tensors, bad)
        with pytest.raises(UserError, match="holds no synthetic set"): load_synset(path)


def test_a_changed_manifest_is_noticed(tmp_path):
    d = data_of()
    path = save_synset(from_real(d, d.per_class(1, torch.Generator().manual_seed(0))), tmp_path/'set.safetensors')
    manifest = json.loads(manifest_path(path).read_text())
    manifest['meta']['factor'] = 3
    manifest_path(path).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not say what"): load_synset(path)


def test_extras_are_learnt_saved_and_moved(tmp_path):
    syn = a_set(torch.rand(2, 1, 8, 8), torch.arange(2), extras=dict(step=torch.tensor(.1)))
    assert list(syn.learnables()) == ['m', 'step']
    back = load_synset(save_synset(syn, tmp_path/'s.safetensors')).to('cpu')
    assert back.extras['step'].equal(syn.extras['step']) and list(back.learnables()) == ['m', 'step']


def test_a_set_without_classes_is_one_group():
    m = Modality('m', 'image', (1, 8, 8))
    data = PairedData(dict(m=torch.rand(9, 1, 8, 8)), dict(m=m))
    syn = from_real(data, torch.tensor([[3, 1, 4, 0]]))
    assert (syn.n_groups, syn.ipc, syn.rows(slice(0, 1))) == (1, 4, slice(0, 4)) and not syn.labels.any()
    assert syn.tensors['m'].equal(data.batch(torch.tensor([3, 1, 4, 0]))['m'])
