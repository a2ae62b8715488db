"Language and depth: recalls against a naive ranking, readers of broken files, encoders, runs without classes."
import html
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdd_nb.core import UserError, rng
from avdd_nb.crossmodal import evaluate_pairs, lookup, pair_protocol, protocol_like, recalls, score
from avdd_nb.data import clotho, imagetext, nyuv2
from avdd_nb.data.captions import Captioned, captioned, nearest_captions, tidy, transformer_encoder, words_encoder
from avdd_nb.data.catalog import load
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.evaluate import make_protocol
from avdd_nb.methods.base import make_method
from avdd_nb.methods.mdm import cluster_picks
from avdd_nb.nets.towers import TowerSpec, build_towers
from avdd_nb.runs import evaluate_run, load_run, make_config, run
from avdd_nb.store import load_tensors
from avdd_nb.views.scores import run_scores

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'language.npz', allow_pickle=False)
TINY = dict(n_train=60, n_val=20, n_test=30, image_size=16)
QUICK = dict(width=4, experts=2, expert_epochs=2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path_factory.getbasetemp() / 'language-cache'))


@pytest.mark.parametrize('i', range(2))
def test_golden_recalls(i):
    found = recalls(torch.from_numpy(GOLDEN[f'itm{i}_scores']), torch.from_numpy(GOLDEN[f'itm{i}_caption_image_index']))
    for side, key in (('TR', 'tr'), ('IR', 'ir')):
        want = GOLDEN[f'itm{i}_{key}_1_5_10']
        np.testing.assert_allclose([found[f'{side}@{k}'] for k in (1, 5, 10)], want, atol=1e-4)
    assert abs(found['mean'] - float(GOLDEN[f'itm{i}_mean'])) < 1e-4


@given(st.integers(2, 6), st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_recalls_equal_a_naive_ranking(n, seed, most):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most + 1, (n,), generator=g)
    owner = torch.arange(n).repeat_interleave(counts)
    scores = torch.randn(n, len(owner), generator=g)
    found = recalls(scores, owner, at=(1, 2))
    for k in (1, 2):
        tr = [any(owner[j] == i for j in sorted(range(len(owner)), key=lambda j: -scores[i, j])[:k]) for i in range(n)]
        ir = [owner[j] in sorted(range(n), key=lambda i: -scores[i, j])[:k] for j in range(len(owner))]
        assert abs(found[f'TR@{k}'] - 100 * sum(tr) / len(tr)) < 1e-9
        assert abs(found[f'IR@{k}'] - 100 * sum(ir) / len(ir)) < 1e-9


def test_a_constant_score_finds_nothing():
    assert recalls(torch.zeros(30, 90), torch.arange(30).repeat_interleave(3))['mean'] == 0


def scenes(n=6, captions=2):
    g = rng('scenes', n)
    kinds = dict(image=Modality('image', 'image', (3, 16, 16)))
    images = torch.randn(n, 3, 16, 16, generator=g)
    pairs = PairedData(dict(image=images), kinds, name='toy', ids=[f'p{i}' for i in range(n)])
    said = [[f'picture {i} {k}' for k in range(1 + (i % captions))] for i in range(n)]
    owner = torch.arange(n).repeat_interleave(torch.tensor([len(s) for s in said]))
    return pairs, said, owner


def test_captions_stay_with_their_pictures():
    pairs, said, owner = scenes()
    data = captioned(pairs, said, words_encoder([t for s in said for t in s], owner, epochs=1))
    some = data.subset([5, 0, 3])
    assert [some.sentences[i] for i in some.first.tolist()] == [said[i][0] for i in (5, 0, 3)]
    for r in range(some.n_pairs):
        picture = int(some.sentences[r].split()[1])
        assert torch.equal(some.pair_batch(torch.tensor([r]))['image'][0], pairs.tensors['image'][picture])
    moved = data.to('cpu')
    assert moved.hash == data.hash and moved.sentences == data.sentences
    assert not isinstance(data.select('image'), Captioned) and isinstance(data.select('image', 'text'), Captioned)
    assert nearest_captions(data.texts, data)[3][0][0] == data.sentences[3]


def test_captions_that_do_not_fit_are_refused():
    pairs, said, owner = scenes()
    with pytest.raises(UserError, match='item p5 has no caption'):
        Captioned(pairs, torch.randn(5, 4), torch.arange(5))
    with pytest.raises(UserError, match='do not fit|but there are 6'):
        Captioned(pairs, torch.randn(8, 4), torch.arange(8))
    with pytest.raises(UserError, match='no captions'):
        captioned(pairs, [[] for _ in range(6)], None)


def test_tidy_is_the_reference_codes_cleaning():
    assert tidy('A Dog_runs -- "fast", isn\'t it?') == 'a dog runs fast isn t it'
    assert len(tidy('word ' * 50).split()) == 30 and tidy('...') == ''


def test_a_tiny_bert_embeds_captions(tmp_path):
    hf = pytest.importorskip('transformers')
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'dog', 'cat', 'runs']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    config = hf.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16)
    hf.BertModel(config).save_pretrained(tmp_path)
    hf.BertTokenizer(str(tmp_path / 'vocab.txt')).save_pretrained(tmp_path)
    encoder = transformer_encoder(str(tmp_path))
    one, two, three = encoder.encode(['A dog runs.', 'a dog runs', 'a cat runs'])
    assert encoder.dim == 16 and torch.allclose(one, two, atol=1e-6) and not torch.allclose(one, three, atol=1e-4)
    splits = load('soundshapes-text', encoder=str(tmp_path), **TINY)
    assert splits.train.texts.shape[1] == 16
    with pytest.raises(UserError, match='huggingface-cli download no-such'):
        transformer_encoder('no-such')


@pytest.mark.slow
def test_the_papers_image_network_is_a_tower():
    pytest.importorskip('timm')
    kinds = dict(image=Modality('image', 'image', (3, 32, 32)), text=Modality('text', 'embedding', (768,)))
    towers = build_towers(kinds, TowerSpec(arch='nfnet_l0')).eval()
    z = towers(dict(image=torch.randn(1, 3, 32, 32), text=torch.randn(1, 768)))
    assert z['image'].shape == z['text'].shape == (1, 2304)
    with pytest.raises(UserError, match='nfnet'):
        build_towers(kinds, TowerSpec(arch='nfnet_l00'))


def break_json(folder):
    (folder / 'dataset_flickr8k.json').write_text('{"images": [{"filename": "x.jpg"')


def drop_field(folder):
    path = folder / 'dataset_flickr8k.json'
    found = json.loads(path.read_text())
    del found['images'][0]['sentences']
    path.write_text(json.dumps(found))


def drop_pictures(folder):
    for p in list(folder.glob('*/train_*.jpg'))[:5]:
        p.unlink()


@pytest.mark.parametrize('harm,words', [(break_json, 'not readable JSON'), (drop_field, 'sentences'),
                                        (drop_pictures, '5 of 8 pictures cannot be read')])
def test_broken_flickr8k(tmp_path, harm, words):
    harm(imagetext.write_miniature(tmp_path))
    with pytest.raises(UserError, match=words):
        load('flickr8k', tmp_path, encoder='words', image_size=16)


def test_one_broken_picture_is_left_out_and_named(tmp_path):
    folder = imagetext.write_miniature(tmp_path)
    (folder / 'Flicker8k_Dataset' / 'train_3.jpg').write_bytes(b'no picture')
    splits = load('flickr8k', tmp_path, encoder='words', image_size=16)
    assert len(splits.train) == 7 and list(splits.info['left_out']) == ['train_3.jpg']
    assert 'train_3.jpg' not in splits.train.ids and splits.train.n_pairs == 35


@pytest.mark.parametrize('harm,words', [
    (lambda d: (d / 'Flickr8k.token.txt').write_text('train_0.jpg no tab'), 'line 1: expected'),
    (lambda d: (d / 'Flickr_8k.devImages.txt').unlink(), 'Flickr_8k.devImages.txt is missing'),
    (lambda d: (d / 'Flickr_8k.testImages.txt').write_text('other.jpg'), 'names no picture')])
def test_broken_token_files(tmp_path, harm, words):
    harm(imagetext.write_miniature(tmp_path, layout='tokens'))
    with pytest.raises(UserError, match=words):
        load('flickr8k', tmp_path, encoder='words', image_size=16)


def test_restval_is_training_data_and_rows_of_one_picture_are_joined(tmp_path):
    imagetext.write_miniature(tmp_path, 'coco', 'karpathy')
    assert [len(v) for v in imagetext.read_annotations('coco', tmp_path).values()] == [8, 3, 4]
    (tmp_path / 'coco' / 'dataset_coco.json').unlink()
    imagetext.write_miniature(tmp_path, 'coco', 'rows')
    assert all(len(said) == 5 for v in imagetext.read_annotations('coco', tmp_path).values() for _, said in v)


def test_checks_say_what_is_missing_and_where_to_get_it(tmp_path):
    for name in ('flickr8k', 'flickr30k', 'coco'):
        ready, words = imagetext.check(name, tmp_path)
        assert not ready and 'get them from' in words
    (tmp_path / 'flickr30k').mkdir()
    (tmp_path / 'flickr30k' / 'results_20130124.token').write_text('1.jpg#0\tA dog .')
    assert 'no splits' in imagetext.check('flickr30k', tmp_path)[1]
    assert 'splits.mat' in nyuv2.check(tmp_path)[1] and 'zenodo' in clotho.check(tmp_path)[1]
    with pytest.raises(UserError, match='nyuv2'):
        load('nyuv2', tmp_path)


def test_broken_nyu_files(tmp_path):
    folder = nyuv2.write_miniature(tmp_path)
    whole = (folder / nyuv2.MAT).read_bytes()
    (folder / nyuv2.MAT).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match='cannot be read'):
        load('nyuv2', tmp_path, image_size=16)
    (folder / nyuv2.MAT).write_bytes(whole)
    (folder / nyuv2.SPLIT).write_bytes(b'no matrix')
    with pytest.raises(UserError, match='splits.mat'):
        load('nyuv2', tmp_path, image_size=16)


def test_nyu_pictures_are_upright(tmp_path):
    h5py = pytest.importorskip('h5py')
    folder = nyuv2.write_miniature(tmp_path, width=32, height=16)
    with h5py.File(folder / nyuv2.MAT, 'a') as box:
        box['depths'][0] = np.concatenate([np.full((32, 8), 1.), np.full((32, 8), 10.)], 1)    # near above, far below
    depth = load('nyuv2', tmp_path, image_size=8).train.tensors['depth'][0, 0].float()
    assert depth[:4].min() > 5 * depth[4:].max()


@pytest.mark.parametrize('harm,words', [
    (lambda d: (d / 'clotho_captions_development.csv').write_text('name,text\na,b\n'), 'must name file_name'),
    (lambda d: (d / 'clotho_captions_development.csv').write_text('file_name,caption_1\n'), 'holds no rows'),
    (lambda d: (d / 'clotho_captions_development.csv').write_text('file_name,caption_1\nx.wav,\n'), 'no caption'),
    (lambda d: [p.unlink() for p in list((d / 'evaluation').glob('*.wav'))[:3]], '3 of 6 sounds')])
def test_broken_clotho(tmp_path, harm, words):
    harm(clotho.write_miniature(tmp_path))
    with pytest.raises(UserError, match=words):
        load('clotho', tmp_path, seconds=1)


def test_version_1_of_clotho_has_no_validation_part(tmp_path):
    folder = clotho.write_miniature(tmp_path)
    (folder / 'clotho_captions_validation.csv').unlink()
    splits = load('clotho', tmp_path, seconds=1)
    assert splits.val is None and len(splits.test) == 6


def test_cluster_picks_are_distinct_and_refuse_too_many():
    points = torch.nn.functional.normalize(torch.randn(30, 5, generator=rng('points')), dim=1)
    assert len(set(cluster_picks(points, 30).tolist())) == 30
    with pytest.raises(UserError, match='lower the budget'):
        cluster_picks(points, 31)


WALK = dict(syn_batch=5, syn_steps=2, lr=.01, lr_text=.01, lr_rate=1e-4)
SIMILARITY = dict(WALK, lr_similarity=1e-3)
METHODS = {'mdm': dict(pool_size=2, syn_batch=8, real_batch=16), 'lors': SIMILARITY, 'mtt-vl': WALK}


@pytest.mark.parametrize('name', METHODS)
def test_a_run_without_classes_resumes_to_the_same_bytes_and_is_scored(tmp_path, name):
    splits = load('soundshapes-text', **TINY)
    config = make_config('soundshapes-text', name, 10, 6, data=TINY, options=QUICK | METHODS[name])
    list(run(config, tmp_path / 'whole', splits=splits))
    part = run(config, tmp_path / 'parts', splits=splits)
    for _, _ in pairwise(range(4)):
        next(part)
    part.close()
    list(run(config, tmp_path / 'parts', splits=splits))
    one, two = (load_tensors(tmp_path / d / 'result.safetensors')[0] for d in ('whole', 'parts'))
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    rows = evaluate_run(tmp_path / 'whole', make_protocol('thorough', epochs=2, width=4), 1, splits=splits)
    assert [r['metric'] for r in rows] == ['IR@1', 'IR@5', 'IR@10', 'TR@1', 'TR@5', 'TR@10', 'mean']
    assert rows[0]['epochs'] == 2 and rows[0]['n_train'] == 10 - (name == 'lors') and rows[0]['protocol'] == 'thorough*'


def test_what_a_caption_and_a_picture_find_is_kept_and_shown(tmp_path):
    "The kept orders are those of the cosines of the first network, one query at a time; the page shows the words."
    splits, cosines, out = load('soundshapes-text', **TINY), [], tmp_path / 'run'
    list(run(make_config('soundshapes-text', 'random', 10, data=TINY, options=dict(factor=1)), out, splits=splits))
    protocol = make_protocol('thorough', epochs=2, width=4)
    evaluate_run(out, protocol, 1, splits=splits)
    evaluate_pairs(load_run(out)[1], splits.test, protocol_like(protocol), 1, keep=lambda seed, s: cosines.append(s))
    [path] = out.glob('found-*.safetensors')
    kept, first = load_tensors(path)[0], splits.test.first.tolist()
    for q in range(len(splits.test)):
        assert kept['text/image'][q, 0] == max(range(len(first)), key=lambda i: cosines[0][i, first[q]])
        assert kept['image/text'][q, 0] == max(range(len(first)), key=lambda i: cosines[0][q, first[i]])
    shown = run_scores(out)
    assert {'text asks for image', 'image asks for text'} <= set(shown)
    assert splits.test.captions[0] in html.unescape(shown['text asks for image'].html)


def test_selection_and_methods_for_classes_meet_pairs_without(tmp_path):
    splits = load('soundshapes-text', **TINY)
    for init in ('random', 'herding', 'kcenter'):
        syn = make_method('random', init=init).begin(splits.train, 8, 0)
        assert len(syn) == 8 and syn.n_groups == 1 and syn.tensors['text'].shape == (8, 64)
    with pytest.raises(UserError, match='without classes'):
        make_method('mdm').begin(load('soundshapes', n_train=20, n_test=10).train, 2, 0)


@pytest.mark.parametrize('name,method', [('soundshapes-depth', 'dm'), ('soundshapes-audiotext', 'dm')])
def test_depth_and_sound_with_text(name, method):
    sizes = dict(n_train=40, n_test=20) | (dict(image_size=16) if 'depth' in name else dict(n_val=10))
    splits = load(name, **sizes)
    method = make_method(method, width=4, pool_size=2, real_batch=0)
    syn = method.begin(splits.train, 1 if splits.train.n_classes else 5, 0)
    before = {m: x.clone() for m, x in syn.tensors.items()}
    from avdd_nb.distill import distill
    list(distill(method, syn, method.source(splits.train, 0), 2))
    assert all(not torch.equal(x, before[m]) for m, x in syn.tensors.items())


def test_protocols_are_translated_and_checked():
    assert protocol_like(make_protocol('thorough')) == pair_protocol('thorough')
    assert protocol_like(make_protocol('paper', epochs=7)).epochs == 7
    with pytest.raises(UserError, match='fusion|head_init|no field'):
        protocol_like(make_protocol('paper', head_init='default'))
    with pytest.raises(UserError, match='validation split'):
        splits = load('soundshapes-text', **TINY)
        evaluate_pairs(splits.train, splits.test, pair_protocol('thorough', report='val'), 1)


def test_lookup_ranks_both_ways():
    splits = load('soundshapes-text', **TINY)
    towers = build_towers(splits.train.modalities, TowerSpec(width=4)).eval()
    s = score(towers, splits.test)
    found = lookup(towers, splits.test, 4, captions=[3], items=[2])
    assert found['caption', 3][0][0] == int(s[:, 3].argmax()) and found['item', 2][0][0] == int(s[2].argmax())


def test_own_networks_start_from_the_shapes(monkeypatch):
    from avdd_nb.nets import towers
    weights = towers.shapes_weights
    monkeypatch.setattr(towers, 'shapes_weights', lambda m, arch, width: weights(m, arch, width, n=40))
    kinds = dict(image=Modality('image', 'image', (3, 16, 16), scale=1/255, mean=(.4,)*3, std=(.25,)*3),
                 text=Modality('text', 'embedding', (8,)))
    plain, first, other = (build_towers(kinds, TowerSpec(width=4, pretrained=p), seed).towers
                           for p, seed in ((False, 0), (True, 0), (True, 1)))
    def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert same(first['image'], other['image']) and not same(first['image'], plain['image'])
    assert same(first['text'], plain['text']) and not same(first['text'], other['text'])
    wide = kinds | dict(image=Modality('image', 'image', (3, 16, 24)))
    with pytest.raises(UserError, match='square'):
        build_towers(wide, TowerSpec(width=4, pretrained=True))
