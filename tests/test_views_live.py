"""The interactive views without a browser: the right pair at the right place, its own sound, no name that is markup."""
import base64
import io
import json
import os
import re
import wave as wavefile
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avdd_nb.core import UserError
from avdd_nb.data import soundshapes
from avdd_nb.data.audio import to_wave, wav_bytes
from avdd_nb.data.paired import PairedData
from avdd_nb.evaluate import confusion
from avdd_nb.synset import SyntheticSet, from_real, save_synset
from avdd_nb.views import compare, ear, live, scores, wall
from avdd_nb.views import map as maps
from avdd_nb.views.grid import paint
from avdd_nb.views.sound import spec_of

HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(1)</script>'


@pytest.fixture(scope='module')
def world():
    data = soundshapes.load(n_train=60, n_test=10, modalities=('audio', 'image', 'depth', 'caption')).train
    return PairedData(data.tensors, data.modalities, data.labels, [HOSTILE, *data.classes[1:]], 'toy', data.ids,
                      [HOSTILE, *data.captions[1:]])


@pytest.fixture(scope='module')
def syn(world):
    return from_real(world.select('audio', 'image'), torch.stack([i[:4] for i in world.class_indices]), factor=2)


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    before = os.environ.get('AVDD_CACHE')
    os.environ['AVDD_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    os.environ.pop('AVDD_CACHE')
    if before: os.environ['AVDD_CACHE'] = before


class Tags(HTMLParser):
    "Every element with its attributes, in order; a JSON island is text, as it is for a browser."
    CDATA_CONTENT_ELEMENTS = ('script', 'style')

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))


def islands(html): return [json.loads(t) for t in re.findall('<script type="application/json">(.*?)</script>', html)]


def pixels(x): return {m: v.flatten(1) for m, v in x.items()}


# --- the map

def test_pca_agrees_with_a_singular_value_decomposition():
    x = np.random.default_rng(0).normal(size=(50, 12)) @ np.diag(np.arange(12, 0, -1))
    xy, centred = maps.project(x), x - x.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(xy), np.abs(u[:, :2]*s[:2]), atol=1e-3)


@pytest.mark.parametrize('bad', [np.zeros((3, 2)), np.full((9, 2), np.nan)])
def test_what_has_no_place_is_refused(bad):
    with pytest.raises(UserError): maps.project(bad)


def test_one_number_a_point_still_makes_a_map():
    assert maps.project(np.arange(9.)[:, None]).shape == (9, 2)


def test_every_mark_stands_where_its_pair_lies(world, syn):
    m = maps.pair_map(world, syn, pixels, cards=0)
    p, seen = m.points, []
    for trace in m.figure.data:
        if trace.customdata is None: continue
        idx = np.asarray(trace.customdata)
        assert (np.stack([trace.x, trace.y], 1) == p.xy[idx]).all() and len(set(p.label[idx])) == 1
        assert len(set(p.source[idx])) == 1 and trace.type == 'scattergl'
        seen += idx.tolist()
    assert sorted(seen) == list(range(100))
    x, title, _ = m.cloud.pair(int(p.source[77]), int(p.item[77]))
    tensors, labels = syn.decode()
    assert x['image'].equal(tensors['image'][17]) and str(syn.classes[labels[17]]) in title
    assert p.label[77] == labels[17]


def test_places_are_computed_once_and_kept_in_the_folder(world, syn, tmp_path):
    calls = []

    class Eyes:
        key = ['pixels', 1]

        def __call__(self, x):
            calls.append(1)
            return pixels(x)

    first = maps.pair_map(world, syn, Eyes(), folder=tmp_path, cards=0).points
    n = len(calls)
    again = maps.pair_map(world, syn, Eyes(), folder=tmp_path, cards=0).points
    assert n and len(calls) == n and (first.xy == again.xy).all() and list(tmp_path.glob('map-*.safetensors'))
    maps.pair_map(world, syn, Eyes(), seed=1, folder=tmp_path, cards=0)
    assert len(calls) > n                                                            # another seed is another map


def test_a_shared_space_has_a_point_for_each_modality(world):
    flat = world.select('image', 'depth')
    eyes = lambda x: {m: v.mean((1, 2, 3))[:, None]*torch.ones(3) + torch.eye(3)[0] for m, v in x.items()}
    m = maps.pair_map(flat, None, eyes, view='each', cards=0)
    assert len(m.points) == 120 and m.points.parts == ['image', 'depth'] and (m.points.item[60:] == np.arange(60)).all()
    shapes = {t.marker.symbol for t in m.figure.data if t.customdata is not None}
    assert {s.removesuffix('-open') for s in shapes} == {'circle', 'square'}
    with pytest.raises(UserError, match='view'): maps.pair_map(flat, None, eyes, view='imag', cards=0)


def test_ten_classes_are_told_apart_without_relying_on_colour_for_what_is_real(world, syn):
    m = maps.pair_map(world, syn, pixels, cards=0)
    looks = [(t.marker.color, t.marker.symbol) for t in m.figure.data if t.customdata is not None]
    assert len(looks) == len(set(looks)) == 20
    real, made = ({t.marker.symbol.removesuffix('-open') for t in m.figure.data if t.name in names}
                  for names in (['real'], ['synthetic']))
    assert real == {'circle'} and made == {'star'}


@pytest.mark.parametrize('labels', [False, True])
def test_pairs_without_classes_and_soft_labels(world, syn, labels):
    if labels:
        soft = torch.nn.functional.one_hot(syn.labels, 10)*.9 + .01
        made, data = SyntheticSet(syn.tensors, soft, syn.modalities, syn.classes, 2), world.select('audio', 'image')
        assert (maps.pair_map(data, made, pixels, cards=0).points.label[60:] == syn.decoded_labels().numpy()).all()
    else:
        data = PairedData(world.tensors, world.modalities, None, name='loose')
        m = maps.pair_map(data, None, pixels, cards=4)
        assert set(m.points.label) == {-1} and m.png and len(islands(m.html)[0]['cards']) == 4
        assert len(wall.wall(data, per_class=6).made[''].centres) == 6


@given(st.integers(0, 30), st.integers(0, 60), st.integers(1, 50))
def test_carried_points_are_few_distinct_and_mixed(made, real, most):
    n = made + real
    source = np.r_[np.zeros(real, int), np.ones(made, int)]
    p = maps.Points(np.zeros((n, 2)), np.arange(n) % 3, source, np.zeros(n, int), np.arange(n))
    found = maps.spread(p, most)
    assert len(found) == len(set(found)) <= most and all(0 <= i < n for i in found)
    if most >= n: assert len(found) == min(n, real + min(made, most*3//4 if real else most))


def test_the_live_map_shows_and_says(world, syn):
    box = maps.pair_map(world, syn, pixels, cards=0).live()
    box.map.show(np.arange(100))
    assert box.map.panel.cards.count('<figure') == 12 and box.map.panel.note == '12 of 100 points'
    traces = [t for t in box.map.figure.data if t.customdata is not None]
    for t in traces[:-1]: box.map.gather(t, [0])
    assert box.map.panel.note == '12 of 100 points'                                 # the lasso is not complete yet
    box.map.gather(traces[-1], [])
    assert box.map.panel.note == f'12 of {len(traces) - 1} points'
    box.map.view.value = 'each'
    assert 'differ in size' in box.map.panel.note


# --- cards, wall, ear

def test_every_kind_has_its_part(world):
    parts = live.render({m: x[0] for m, x in world.batch(torch.tensor([7])).items()}, world.modalities)
    assert parts['caption'].text == world.captions[7]
    assert np.asarray(Image.open(io.BytesIO(parts['image'].png))).shape == (32, 32, 3)
    stored = world.tensors['image'][7].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(io.BytesIO(parts['image'].png))).astype(int) - stored).max() <= 1
    assert len(parts['audio'].wave) == 8000 and parts['depth'].png and parts['depth'].wave is None


def test_the_wall_shows_each_pair_and_carries_its_sound(syn):
    shown = wall.wall(dict(start=syn, now=syn), tiles=True, per_class=2)
    data, (tensors, labels) = islands(shown.html)[0], syn.decode()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data['states'][1]['image'].split(',')[1]))))
    for c in (0, 3, 9):
        k = next(i for i, cell in enumerate(data['cells']) if cell['row'] == c)
        item = int((labels == c).nonzero()[0])
        cell = data['cells'][k]
        top, left, w = int(cell['top']), int(cell['left']), int(cell['width'])
        image = paint(tensors['image'][[item]], syn.modalities['image'])[0]
        assert (picture[top:top + w, left:left + w, :3] == image.repeat(2, 0).repeat(2, 1)).all()
        kind = syn.modalities['audio']
        sound = to_wave(kind.denormalise(tensors['audio'][[item]]), spec_of(kind))[0]
        carried = base64.b64decode(data['states'][1]['sounds'][str(k)].split(',')[1])
        assert len(carried) == len(wav_bytes(sound, 8000))
        assert np.corrcoef(*(np.frombuffer(b[44:], '<i2') for b in (carried, wav_bytes(sound, 8000))))[0, 1] > .99


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 40))
def test_a_wall_never_carries_more_sounds_than_asked(states, n, most):
    state = wall.State(np.zeros((1, 1, 4)), [(0, 0, i % 3, '', i//3, 0, 0) for i in range(n)], [], {})
    found = wall._audible({str(k): state for k in range(states)}, most)
    assert sum(map(len, found.values())) <= most and set(found) <= set(range(states))
    if most >= n: assert found[states - 1] == list(range(n))


def test_a_film_has_every_state(syn, tmp_path):
    shown = wall.wall({f'step {k}': syn for k in range(3)}, per_class=1)
    with Image.open(shown.save(tmp_path/'run.gif')) as film:
        assert film.n_frames in (1, 3) and film.size == shown.frames()[0].shape[1::-1]   # Pillow merges equal frames
    av = pytest.importorskip('av', reason='PyAV writes MP4')
    with av.open(str(shown.save(tmp_path/'run.mp4', pace=200))) as film:
        assert sum(1 for _ in film.decode(video=0)) == 2 + 2 + 15
    with pytest.raises(UserError, match='html'): shown.save(tmp_path/'run.avi')


def test_a_run_folder_becomes_a_time_lapse(syn, tmp_path):
    with pytest.raises(UserError, match='no synthetic set'): wall.run_states(tmp_path)
    save_synset(syn, tmp_path/'initial.safetensors')
    assert list(wall.run_states(tmp_path)) == ['start']
    for step in (32, 4, 100): save_synset(syn.few(), tmp_path/f'snapshots/{step:08d}.safetensors')
    save_synset(syn, tmp_path/'result.safetensors')
    states = wall.run_states(tmp_path)
    assert list(states) == ['start', 'step 4', 'step 32', 'step 100', 'result']
    assert len({len(s) for s in states.values()}) == 1


@given(st.integers(1, 6), st.integers(1, 4), st.floats(.001, .1))
def test_few_pairs_are_the_first_and_fit(classes, ipc, limit):
    x = torch.arange(classes*ipc).float()[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    labels = torch.arange(classes).repeat_interleave(ipc)
    syn = SyntheticSet(dict(image=x), labels, {}, [str(c) for c in range(classes)])
    few = syn.few(limit_mb=limit)
    each = len(few)//few.n_classes
    assert 1 <= each <= 2 and x[0].numel()*4*len(few) <= max(limit*2**20, x[0].numel()*4)
    for k, c in enumerate(few.labels.tolist()): assert few.tensors['image'][k, 0, 0, 0] == c*ipc + k % each


def test_the_ear_has_decibels_from_the_lowest_band_up(world):
    kind, x = world.modalities['audio'], world.batch(torch.tensor([4]))['audio'][0]
    html = ear.ear(kind, synthetic=x).html
    data = islands(html)[0]
    assert np.allclose(data['sounds'][0]['db'], kind.denormalise(x)[0].numpy(), atol=.51)
    assert data['hz'] == sorted(data['hz']) and data['ticks'][0]['at'] > data['ticks'][-1]['at']
    [src] = [a['src'] for tag, a in Tags(html).found if tag == 'audio']
    with wavefile.open(io.BytesIO(base64.b64decode(src.split(',')[1]))) as f: assert f.getnframes() == 8000


# --- no name becomes markup, nothing is asked of the network

def shown(world, syn):
    counts = torch.ones(2, 10, 10).int()
    yield maps.pair_map(world, syn, pixels, cards=8)
    yield wall.wall({HOSTILE: syn, 'now': syn}, sounds=4)
    yield wall.wall(world, per_class=1)
    yield ear.tiles_ear(syn, 0)
    yield ear.pairs_ear({m: x[:2] for m, x in syn.tensors.items()}, syn.modalities, [HOSTILE, 'b'])
    yield scores.confusion_picture({HOSTILE: counts, 'b': counts}, world.classes)
    yield scores.gains_picture({HOSTILE: counts, 'b': counts}, world.classes)
    yield scores.retrieval_examples(world, [[0, 1, 2]], [0], 'audio', 'caption', 3)
    rows = [dict(method=HOSTILE, protocol='p', modality=HOSTILE, fusion='', accuracy=3., arch='a', seed=0)]
    yield scores.scores(rows)


def harmless(html):
    for tag, attrs in Tags(html).found:
        assert not [k for k in attrs if k.startswith('on')], (tag, attrs)
        assert tag in {'figure', 'figcaption', 'div', 'script', 'style', 'noscript', 'img', 'audio', 'p', 'hr'} or \
            tag.startswith('avdd-')
        if tag in ('img', 'audio'): assert attrs['src'].startswith('data:') and 'autoplay' not in attrs


def test_no_name_becomes_markup_and_every_view_has_a_still(world, syn):
    for picture in shown(world, syn):
        html = picture.as_html()
        harmless(html)
        assert 'alert(1)</script>' not in html and not re.search(r'src="?https?:|import ', html)
        for data in islands(html):
            for card in data.get('cards', []): harmless(card['html'])
        figure = json.dumps(picture._repr_mimebundle_().get('application/vnd.plotly.v1+json', {}))
        assert '<img' not in figure and '<script' not in figure
        still = Image.open(io.BytesIO(picture.png))
        assert min(still.size) > 60 and still.mode == 'RGBA' and picture.alt


# --- scores and comparison

def test_confusion_agrees_with_scikit_learn():
    from sklearn.metrics import confusion_matrix
    g = torch.Generator().manual_seed(0)
    logits, labels = dict(a=torch.randn(80, 4, generator=g), b=torch.randn(80, 4, generator=g)), torch.arange(80) % 4
    found = confusion(logits, labels)
    for m in 'ab': assert (found[m, ''].numpy() == confusion_matrix(labels, logits[m].argmax(1))).all()
    counts = confusion(logits, labels)['AV', 'mean']
    assert np.allclose(scores.recall_matrix(counts), 100*confusion_matrix(
        labels, (logits['a'].softmax(1) + logits['b'].softmax(1)).argmax(1), normalize='true'))


def test_gains_are_paired_by_seed():
    a, b = torch.zeros(2, 2, 2).int(), torch.zeros(2, 2, 2).int()
    for x in (a, b): x[:, 0], x[:, 1] = torch.tensor([5, 5]), torch.tensor([0, 10])
    b[0, 0], b[1, 0] = torch.tensor([7, 3]), torch.tensor([9, 1])
    dots = scores.gains_picture(dict(a=a, b=b), ['x', 'y']).figure.data[0]
    assert list(dots.x) == [30., 0.] and np.allclose(dots.error_x.array, [np.std([20, 40], ddof=1), 0])
    with pytest.raises(UserError, match='two runs'): scores.gains_picture(dict(a=a), ['x', 'y'])


def test_runs_are_named_by_what_sets_them_apart():
    from avdd_nb.runs import RunConfig
    make = lambda **kw: RunConfig('toy', **dict(dict(method='dm'), **kw))
    assert compare._telling_names([make(), make(method='avdd')]) == ['dm', 'avdd']
    assert compare._telling_names([make(ipc=1), make(ipc=10)]) == ['dm, ipc 1', 'dm, ipc 10']
    rates = [make(options=dict(lr=v)) for v in (.1, .2)]
    assert compare._telling_names(rates) == ['dm, lr 0.1', 'dm, lr 0.2']
    with pytest.raises(UserError, match='no run'): compare.name_runs([])
