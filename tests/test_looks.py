"""The views of runs by button: what is kept is what is shown; runs measured differently are not put side by side."""
import base64
import json
import os

import numpy as np
import pytest
import torch

from avdd_nb.data import soundshapes
from avdd_nb.data.audio import log_mel, wav_bytes
from avdd_nb.data.catalog import load
from avdd_nb.evaluate import make_protocol
from avdd_nb.looks import ONE, SEVERAL, Looks
from avdd_nb.runs import evaluate_run, load_run, make_config, run
from avdd_nb.store import load_tensors
from avdd_nb.synset import from_real
from avdd_nb.views import map as maps
from avdd_nb.views.compare import compare_runs, measured_alike, name_runs
from avdd_nb.views.ear import nearest, recorded, run_ear
from avdd_nb.views.scores import retrieval_scores, run_scores
from avdd_nb.views.sound import spec_of
from avdd_nb.watch import results_html

SMALL = dict(n_train=120, n_test=60)
QUICK = make_protocol('paper', epochs=2, width=8, epochs_whole=1)


@pytest.fixture(scope='module')
def splits(): return load('soundshapes', **SMALL)


@pytest.fixture
def two(tmp_path, splits):
    "Two finished runs of the same data."
    for method in ('random', 'herding'):
        options = {} if method == 'random' else dict(features='random')
        config = make_config('soundshapes', method, data=SMALL, options=options)
        for _ in run(config, tmp_path/method, splits=splits): pass
    return [tmp_path/'random', tmp_path/'herding']


def test_what_was_found_is_kept_and_shown(two, splits):
    "R@1 recomputed from the kept order, one query at a time, is the row's; the examples show that order."
    rows = evaluate_run(two[0], QUICK, 2, splits=splits, judge='retrieval')
    [path] = two[0].glob('found-*.safetensors')
    kept = load_tensors(path)[0]
    of = splits.test.labels[kept['items']]
    for pair in ('audio/image', 'image/audio'):
        right = np.mean([100.*bool(splits.test.labels[kept[pair][q, 0]] == of[q]) for q in range(len(of))])
        [row] = [r for r in rows if r['seed'] == 0 and r['metric'] == 'R@1' and r['modality'] == pair.replace('/', '→')]
        assert abs(row['value'] - right) < 1e-9
    shown = run_scores(two[0])
    assert list(shown) == ['retrieval', 'audio asks for image', 'image asks for audio']
    html = shown['audio asks for image'].html
    assert html.count('✓ right<') + html.count('✗ wrong<') == 4*4 and shown['retrieval'].png
    assert 'MedR' in results_html(two[0]) and 'median rank' in results_html(two[0])


def test_a_random_order_stands_beside_retrieval():
    row = dict(method='dm', protocol='paper', seed=0, chance=12.5)
    rows = [row | dict(modality='a→b', metric=k, value=v) for k, v in (('R@1', 40.), ('MedR', 3.))]
    [dots] = [t for t in retrieval_scores(rows).figure.data if t.name]
    assert list(dots.x) == [40., 12.5]


def test_only_runs_measured_alike_stand_side_by_side(two, splits):
    named, other = name_runs(two), make_protocol('paper', epochs=1, width=8)
    assert measured_alike(named) == (None, list(named))
    assert not compare_runs(two, pieces=('accuracy', 'confusion', 'gains'))
    evaluate_run(two[0], QUICK, 2, splits=splits)
    evaluate_run(two[1], other, 2, splits=splits)               # both are called paper*, but they are not the same
    digest, apart = measured_alike(named)
    assert digest in (QUICK.digest, other.digest) and len(apart) == 1
    ticks = compare_runs(two, pieces=('accuracy',))['accuracy'].figure.layout.yaxis.ticktext
    assert len(ticks) == 1 and apart[0] not in ticks
    assert 'gains' not in compare_runs(two, pieces=('confusion', 'gains'))
    evaluate_run(two[1], QUICK, 2, splits=splits)
    assert measured_alike(named) == (QUICK.digest, [])
    both = compare_runs(two, pieces=('accuracy', 'confusion', 'gains'))
    assert list(both) == ['accuracy', 'confusion', 'gains'] and len(both['confusion'].figure.data) == 2


def test_every_view_opens(two, splits):
    for r in two: evaluate_run(r, QUICK, 1, splits=splits)
    for runs, views in ((two[:1], ONE), (two, SEVERAL)):
        looks = Looks(runs)
        for name in views:
            looks.turn_to(name)
            looks.wait()
            assert looks.made.get(name) is looks.stage.children[0], looks.stage.children[0]


def test_the_map_by_keyboard(splits):
    "The buttons walk over the synthetic pairs, then the real ones; the ring is where the pair is."
    data = splits.train
    syn = from_real(data, torch.stack([i[:1] for i in data.class_indices]))
    live = maps.pair_map(data, syn, 'random', cards=0).live().map
    live.walk(1)
    assert live.points.source[len(data)] == 1 and 'synthetic' in live.panel.cards
    ring = live.figure.data[-1]
    assert (ring.x[0], ring.y[0]) == tuple(live.points.xy[len(data)])
    live.walk(-1)
    assert live.at == len(live.points) - 1 and 'real' in live.panel.cards
    live.embed.value = 'trained'
    assert live.cloud.embed == 'trained' and live.at == -1


@pytest.mark.slow
def test_umap_keeps_clusters_and_repeats_itself():
    pytest.importorskip('umap')
    g = np.random.default_rng(0)
    x = np.concatenate([g.normal(c, .3, (40, 6)) for c in (-4, 0, 4)])
    threads = torch.get_num_threads()
    a, b = maps.project(x, 'umap', seed=3), maps.project(x, 'umap', seed=3)
    assert (a == b).all() and a.shape == (120, 2)
    assert torch.get_num_threads() == threads           # else whatever is distilled afterwards has other last digits
    groups = a.reshape(3, 40, 2)
    inside = np.linalg.norm(groups - groups.mean(1, keepdims=True), axis=2).max()
    apart = min(np.linalg.norm(groups[i].mean(0) - groups[j].mean(0)) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert apart > inside


def test_the_views_of_av_mnist(real_data, tmp_path):
    from avdd_nb.panel import panel
    os.environ['AVDD_RUNS'], before = str(tmp_path), os.environ.get('AVDD_RUNS')
    try:
        mine = panel('random', 'avmnist', root=real_data, data=dict(n_train=100, n_test=60))
        assert not mine.distil.disabled
        for _ in run(mine.config, tmp_path/'digits', real_data): pass
        evaluate_run(tmp_path/'digits', QUICK, 1, real_data)
        looks = Looks([tmp_path/'digits'], real_data)
        for name in ONE:
            looks.turn_to(name)
            looks.wait()
            assert name in looks.made, looks.stage.children[0]
        assert json.loads((tmp_path/'digits'/'config.json').read_text())['run']['dataset'] == 'avmnist'
    finally:
        os.environ.pop('AVDD_RUNS')
        if before: os.environ['AVDD_RUNS'] = before


def test_soundshapes_has_what_the_ear_needs(two):
    looks = Looks(two[:1], first='ear').wait()
    choice = looks.stage.children[0].children[0]
    assert len(choice.options) == 10 and choice.options[0][0].startswith(soundshapes.load(**SMALL).train.classes[0])
    choice.value = 9
    assert 'audio' in str(looks.stage.children[0].children[1].children[0].children[0].outputs)


def test_the_ear_plays_the_recording_that_a_tile_came_from(two, splits):
    "Tiles (those at one place of all mosaics together) find the pairs they were made of; the page has their bytes."
    picked = torch.stack([i[:4] for i in splits.train.class_indices])
    tensors, labels = from_real(splits.train, picked, factor=2).decode()
    assert nearest(splits.train, tensors, labels, 'audio') == picked.T.flatten().tolist()
    data, record = recorded(two[0])
    row = nearest(data, *load_run(two[0], 'initial')[1].decode(slice(3, 4)), 'audio')[0]
    spec = spec_of(data.modalities['audio'])
    [wave] = soundshapes.waveforms([data.ids[row]], spec.sr)
    assert (log_mel(wave, spec).half() == data.tensors['audio'][row]).all()
    html = run_ear(two[0], 3, data, record).html
    assert base64.b64encode(wav_bytes(wave, spec.sr)).decode() in html
    assert [w in html for w in ('"original"', '"round trip"', '"start"', '"now"')] == [True]*4
    assert run_ear(two[0], 3).html.count('<audio') == 2
