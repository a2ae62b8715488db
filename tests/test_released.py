"Files of the layout that AVDD released, written small; and files that only pretend to be."
import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError, rng
from avdd_nb.data import released as R
from avdd_nb.data.catalog import SOURCES, load
from avdd_nb.synset import from_real


def pairs(n, classes, seed=0, size=8, frames=56):
    g = rng('test released', seed)
    return (torch.randint(0, 256, (n, 3, size, size), generator=g).float(),
            torch.randn(n, 1, 128, frames, generator=g)*20 - 40, torch.arange(n) % classes)


def write_split(path, split, n, classes, names=None, seed=0, legacy=False):
    image, audio, labels = pairs(n, classes, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {f'images_{split}': image, f'audio_{split}': audio, f'labels_{split}': labels, 'classes': names or []}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return image, audio, labels


def test_a_data_set_as_released(tmp_path):
    write_split(tmp_path/'train_data/ave_train.pt', 'train', 60, 28)
    image, audio, labels = write_split(tmp_path/'test_data/ave_test.pt', 'test', 30, 28, seed=1)
    splits = load('ave', tmp_path)
    assert len(splits.train) == 60 and splits.train.classes[27] == 'Mandolin'
    assert splits.test.labels.equal(labels) and splits.test.tensors['audio'].equal(audio)
    seen = splits.test.batch()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (R.MEAN, R.STD))
    assert torch.allclose(seen['image'], (image/255 - mean)/std, atol=1e-5)        # as the authors' loader does it
    assert seen['audio'].equal(audio)                                              # decibels as they are
    scaled = load('ave', tmp_path, raw='false')
    assert abs(scaled.train.batch()['audio'].mean()) < .01
    assert scaled.test.modalities == scaled.train.modalities


def test_old_format_and_wrong_class_list(tmp_path):
    path = tmp_path/'train_data/vgg_subset_train.pt'
    write_split(path, 'train', 20, 10, ['vid', 'num', 'label', 'split', 'label_id'], legacy=True)
    data = R.read_split(path, 'train', 'vggs10k')
    assert data.classes == list(R.VGGS10K) and len(data) == 20
    many = tmp_path/'vgg_test.pt'
    write_split(many, 'test', 309, 309, [f'sound {c}' for c in range(309)])
    assert R.read_split(many, 'test', 'vggsound').classes[308] == 'sound 308'
    write_split(many, 'test', 309, 309, ['three', 'wrong', 'names'])
    assert R.read_split(many, 'test', 'vggsound').classes[308] == 'class 308'


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_classwise(tmp_path, kind):
    image, audio, labels = pairs(63, 21)
    inside = tmp_path/'classwise_train_data/class_wise_music_21'
    inside.mkdir(parents=True)
    for c in range(21): torch.save(dict(images=image[labels == c], audio=audio[labels == c]), inside/f'train_{c}.pt')
    if kind == 'zip':
        with zipfile.ZipFile(f'{inside}.zip', 'w') as z:
            for p in inside.iterdir():
                z.write(p, f'class_wise_music_21/{p.name}')
                p.unlink()
        inside.rmdir()
    write_split(tmp_path/'test_data/music_21_test.pt', 'test', 42, 21)
    data = load('music21', tmp_path).train
    assert data.labels.tolist() == sorted(labels.tolist()) and data.classes[20] == 'erhu'
    assert data.tensors['audio'].equal(audio[labels.argsort(stable=True)])
    assert data.tensors['image'].equal(image[labels.argsort(stable=True)].to(torch.uint8))


def test_missing_classes_and_files_are_named(tmp_path):
    (tmp_path/'c').mkdir()
    torch.save(dict(images=torch.zeros(1, 3, 4, 4), audio=torch.zeros(1, 1, 128, 56)), tmp_path/'c/train_0.pt')
    with pytest.raises(UserError, match='train_1.pt'): R.read_classwise(tmp_path/'c', 'vggs10k')
    with pytest.raises(UserError, match='hf download'): load('vggsound', tmp_path)
    for name in R.RELEASED: assert SOURCES[name].state(tmp_path)[0] is False


def test_ten_seconds_are_longer_pictures(tmp_path):
    image, audio, labels = pairs(20, 10, frames=551)
    folder = tmp_path/'class_wise_vgg_subset_10s'
    folder.mkdir()
    for c in range(10): torch.save(dict(images=image[labels == c], audio=audio[labels == c]), folder/f'train_{c}.pt')
    assert R.read_classwise(folder, 'vggs10k').modalities['audio'].shape == (1, 128, 551)


@pytest.mark.parametrize('change', [dict(images_train=torch.zeros(4, 1, 8, 8)),
                                    dict(audio_train=torch.zeros(3, 1, 128, 56)),
                                    dict(labels_train=torch.tensor([0, 1, 2, 77])), dict(images_train='no tensor')])
def test_wrong_contents_are_one_sentence(tmp_path, change):
    image, audio, labels = pairs(4, 4)
    torch.save(dict(images_train=image, audio_train=audio, labels_train=labels) | change, tmp_path/'x.pt')
    with pytest.raises(UserError) as e: R.read_split(tmp_path/'x.pt', 'train', 'vggs10k')
    assert '\n' not in str(e.value)


# distilled sets

def distilled_files(folder, layout, ipc=2, classes=10):
    audio, image = torch.randn(classes*ipc, 1, 128, 56), torch.randn(classes*ipc, 3, 8, 8)
    for it, add in ((0, 5.), (5000, 0.)):
        if layout in ('pt', 'pth'):
            torch.save(audio + add, folder/f'exp_1_audSyn_{it}.{layout}')
            torch.save((image + add).requires_grad_(True), folder/f'exp_1_imgSyn_{it}.{layout}')
    if layout == 'class':
        for c in range(classes):
            mine = slice(c*ipc, (c + 1)*ipc)
            torch.save({e: dict(audio_syn={it: audio[mine] + add + e - 1 for it, add in ((0, 5.), (5000, 0.))},
                                image_syn={it: image[mine] + add for it, add in ((0, 5.), (5000, 0.))})
                        for e in range(3)}, folder/f'class:{c}.pt')
    return audio, image


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize('layout', ['pt', 'pth', 'class'])
def test_distilled_sets(tmp_path, layout, zipped):
    inside = tmp_path/'syn'
    inside.mkdir()
    audio, image = distilled_files(inside, layout)
    source = inside
    if zipped:
        source = tmp_path/'VGG_subset_ipc2.zip'
        with zipfile.ZipFile(source, 'w') as z:
            for p in inside.iterdir(): z.write(p, f'VGG_subset_ipc2/{p.name}')
    syn = R.read_distilled(source, 'vggs10k', exp=1)
    for m, x in dict(audio=audio, image=image).items(): assert torch.allclose(syn.tensors[m], x, atol=1e-5)
    assert not syn.tensors['image'].requires_grad
    assert syn.labels.tolist() == [c for c in range(10) for _ in range(2)] and syn.order == 'column' and syn.factor == 2
    x, y = syn.decode()
    assert torch.allclose(x['image'][20:40].mean((1, 2, 3)), image[:, :, 4:, :4].mean((1, 2, 3)), atol=1e-5)  # below
    assert y.tolist() == syn.labels.tolist()*4
    assert torch.allclose(R.read_distilled(source, 'vggs10k', 1, 0).tensors['audio'], audio + 5, atol=1e-5)
    with pytest.raises(UserError, match='7'): R.read_distilled(source, 'vggs10k', exp=1, iteration=7)
    with pytest.raises(UserError): R.read_distilled(source, 'vggs10k', exp=9)
    if layout == 'pt':
        with pytest.raises(UserError, match='not the same number'): R.read_distilled(source, 'ave', exp=1)


def test_buffers(tmp_path):
    means = torch.randn(2, 4, 6)
    one = lambda e: dict(syn_aud=torch.zeros(1, 1, 128, 56), syn_img=torch.zeros(1, 3, 8, 8)) | {
        t: dict(embd_aud_real=means[e, t], embd_img_real=-means[e, t]) for t in range(4)}
    torch.save({e: one(e) for e in range(2)}, tmp_path/'class:3.pth')
    audio, image, start = R.read_buffer(tmp_path/'class:3.pth', exp=1)
    assert audio.equal(means[1]) and image.equal(-means[1]) and set(start) == {'audio', 'image'}
    with pytest.raises(UserError, match='no run 2'): R.read_buffer(tmp_path/'class:3.pth', exp=2)
    broken = {0: one(0)}
    del broken[0][2]
    torch.save(broken, tmp_path/'gap.pth')
    with pytest.raises(UserError, match='gaps'): R.read_buffer(tmp_path/'gap.pth')


# herding orders

def herding(kind, classes=10, k=8):
    make = dict(array=np.array, list=list, small=lambda r: np.array(r, dtype=np.int32),
                scalars=lambda r: [np.int64(v) for v in r])[kind]
    return {c: {m: make([(7*i + c + len(m)) % 50 for i in range(k)]) for m in ('audio', 'frame', 'av')}
            for c in range(classes)}


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('kind', ['array', 'list', 'small', 'scalars'])
def test_herding_orders_of_every_protocol(tmp_path, kind, protocol):
    path = tmp_path/'h.pkl'
    path.write_bytes(pickle.dumps(herding(kind), protocol=min(protocol, 4)))
    expected = [[(7*i + c + 2) % 50 for i in range(8)] for c in range(10)]
    assert R.herding_order(path).tolist() == expected
    assert R.herding_order(path, 'audio')[0, 0] == 5
    with pytest.raises(UserError, match="'x'"): R.herding_order(path, 'x')


def test_arrays_come_back_whole(tmp_path):
    for i, x in enumerate((np.arange(6.).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 2)),
                           np.array([1, 2], dtype='>i4'), np.array([True, False]))):
        (tmp_path/f'{i}.pkl').write_bytes(pickle.dumps([x, 'text', None, 2.5], protocol=4))
        back = R.read_pickle(tmp_path/f'{i}.pkl')
        assert np.array_equal(back[0], x) and back[1:] == ['text', None, 2.5]


def test_a_local_order_counts_within_its_class(tmp_path):
    image, audio, labels = pairs(40, 10)
    (tmp_path/'local.pkl').write_bytes(pickle.dumps({c: dict(av=[3, 0, 2, 1]) for c in range(10)}))
    write_split(tmp_path/'train.pt', 'train', 40, 10)
    data = R.read_split(tmp_path/'train.pt', 'train', 'vggs10k')
    idx = R.herding_order(tmp_path/'local.pkl', data=data)
    assert idx[4].tolist() == [34, 4, 24, 14]
    assert len(from_real(data, idx, factor=2)) == 10
    (tmp_path/'far.pkl').write_bytes(pickle.dumps({c: dict(av=[4]) for c in range(10)}))
    with pytest.raises(UserError, match='beyond'): R.herding_order(tmp_path/'far.pkl', data=data)


class Calls:
    "A pickle that calls `function` when it is read."
    def __init__(self, function, *args): self.call = function, args

    def __reduce__(self): return self.call


HOSTILE = {
    'shell': lambda ran: Calls(os.system, f'touch {ran}'),
    'eval': lambda ran: Calls(eval, f"open('{ran}', 'w')"),
    'file': lambda ran: Calls(open, str(ran), 'w'),
    'getattr': lambda ran: Calls(getattr, 'text', 'upper'),
    'object array': lambda ran: np.array([Calls(os.system, f'touch {ran}')], dtype=object),
    'ordered dict': lambda ran: collections.OrderedDict(a=1),
    'set': lambda ran: {1, 2},
    'bytes': lambda ran: b'abc',
    'complex array': lambda ran: np.zeros(2, dtype=complex),
    'record array': lambda ran: np.zeros(2, dtype='i4,f4'),
    'tensor': lambda ran: torch.zeros(2),
}


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name, protocol):
    ran = tmp_path/'ran'
    (tmp_path/'x.pkl').write_bytes(pickle.dumps({0: HOSTILE[name](ran)}, protocol=protocol))
    with pytest.raises(UserError) as e: R.read_pickle(tmp_path/'x.pkl')
    assert not ran.exists() and '\n' not in str(e.value)


RAW = {
    'global of numpy': b"cnumpy\nload\n(S'x'\ntR.",
    'nested module': b"cnumpy.core.multiarray\nfromfile\n(S'/etc/passwd'\ntR.",
    'stack underflow': b'0.', 'cut': pickle.dumps(herding('array'))[:300], 'empty': b'', 'not a pickle': b'hello',
    'persistent id': b"Px\n.", 'huge array': pickle.dumps([1])[:-1] + b"cnumpy\nndarray\n((I1000000000000\nttR.",
    'deep': b'('*5000 + b't'*5000 + b'.',
    'array without bytes': b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",
    'wrong shape': pickle.dumps(np.arange(3), 2).replace(b'K\x03\x85', b'K\x09\x85'),
    'build on dtype': b"cnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'O'\nNNNI-1\nI-1\nI0\ntb.",
}


@pytest.mark.parametrize('name', RAW)
def test_crafted_bytes_are_refused(tmp_path, name):
    (tmp_path/'x.pkl').write_bytes(RAW[name])
    with pytest.raises(UserError) as e: R.read_pickle(tmp_path/'x.pkl')
    assert '\n' not in str(e.value)


@given(st.binary(max_size=300))
def test_no_bytes_at_all_do_anything_but_read_or_refuse(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/'fuzz.pkl'
    path.write_bytes(data)
    try: R.read_pickle(path)
    except UserError: pass


def test_a_pt_file_that_runs_code_is_refused(tmp_path):
    ran = tmp_path/'ran'
    torch.save({'images_train': Calls(os.system, f'touch {ran}')}, tmp_path/'x.pt')
    with pytest.raises(UserError, match='not read') as e: R.read_split(tmp_path/'x.pt', 'train', 'vggs10k')
    assert not ran.exists() and '\n' not in str(e.value)
    (tmp_path/'y.pt').write_bytes(b'PK\x03\x04 not a zip')
    with pytest.raises(UserError, match='not a readable'): R.read_split(tmp_path/'y.pt', 'train', 'vggs10k')
    with pytest.raises(UserError, match='no file'): R.read_pt(tmp_path/'z.pt')


@pytest.mark.parametrize('layout, starts', [('pth', True), ('class', False)])
def test_a_released_set_as_a_run(tmp_path, layout, starts):
    "`avdd adopt`, then what `avdd evaluate --baselines` does."
    from avdd_nb.evaluate import make_protocol
    from avdd_nb.hub import adopt_set
    from avdd_nb.runs import evaluate_run, load_run
    (tmp_path/'syn').mkdir()
    audio, image = distilled_files(tmp_path/'syn', layout)
    if not starts:
        for p in (tmp_path/'syn').iterdir():
            found = torch.load(p, weights_only=True)
            for run in found.values(): del run['audio_syn'][0]
            torch.save(found, p)
    for split in ('train', 'test'): write_split(tmp_path/f'{split}_data/vgg_subset_{split}.pt', split, 40, 10)
    out = adopt_set(tmp_path/'syn', tmp_path/'run', 'vggs10k', exp=1)
    config, syn = load_run(out)
    assert (config.dataset, config.method, config.ipc, config.steps, config.seed) == ('vggs10k', 'avdd', 2, 5000, 1)
    assert torch.allclose(syn.tensors['image'], image, atol=1e-5)
    rows = evaluate_run(out, make_protocol(width=4, epochs=1, epochs_whole=1), 1, tmp_path, baselines=True)
    start = {'undistilled start'} if starts else set()
    assert {r['method'] for r in rows} == {'avdd', 'random pairs', 'whole data'} | start
    with pytest.raises(UserError, match='already'): adopt_set(tmp_path/'syn', out, 'vggs10k', exp=1)
    with pytest.raises(UserError, match='--dataset'): adopt_set(tmp_path/'syn', tmp_path/'other')
