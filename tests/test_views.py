"""Views that carry what they claim: bytes that decode, text that cannot become markup, colours that are the data's."""
import base64
import html
import io
import json
import re
import wave
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from avdd_nb.core import UserError
from avdd_nb.data.audio import MelSpec, log_mel, modality
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.synset import from_real
from avdd_nb.views import curves, grid, page, picture, sound

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "$\\frac{ %{x} \n'&amp;"]
SPEC = MelSpec(sr=8000, n_fft=512, win=512, hop=256, n_mels=32, length=8000)


class Tags(HTMLParser):
    "Every element with its attributes, in order."
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))

    def named(self, tag): return [attrs for name, attrs in self.found if name == tag]


def decoded(uri):
    head, _, data = uri.partition(',')
    return head, base64.b64decode(data, validate=True)


@pytest.fixture(scope='module')
def pairs():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(6)
    image = torch.randint(0, 256, (18, 3, 16, 16), generator=g, dtype=torch.uint8)
    waves = .3*torch.sin(400*2.**labels[:, None]*torch.arange(8000)/8000) + .01*torch.randn(18, 8000, generator=g)
    mel = log_mel(waves, SPEC)
    pixels = Modality('image', 'image', (3, 16, 16), mean=(.4, .5, .6), std=(.2, .3, .25), scale=1/255)
    return PairedData(dict(audio=mel, image=image), dict(audio=modality(SPEC, x=mel), image=pixels), labels, HOSTILE)


@pytest.fixture(scope='module')
def syn(pairs):
    return from_real(pairs, torch.stack([i[:4] for i in pairs.class_indices]), factor=2)


@pytest.fixture(scope='module')
def shown(pairs, syn):
    rows = [dict(protocol='paper', modality=m, fusion='', seed=s, accuracy=50. + s)
            for s in (0, 1) for m in ('AV', 'image')]
    events = [dict(step=i, loss=2./(i + 1), terms={HOSTILE[0]: 1./(i + 1), '_b': 1./(i + 1)}) for i in range(9)]
    return dict(wall=grid.wall(pairs, 2), beside=grid.real_beside_synthetic(pairs, syn, 2, tiles=True),
                grid=grid.grid(pairs.batch()['image'], pairs.modalities['image'], labels=HOSTILE*6),
                hear=sound.hear(syn.tensors['audio'][0], pairs.modalities['audio'], HOSTILE[1]),
                players=sound.players(dict(real=pairs, synthetic=syn)), loss=curves.loss_curves(events),
                accuracy=curves.accuracy_plot(curves.accuracy_frame({name: rows for name in HOSTILE})))


NAMES = ['wall', 'beside', 'grid', 'hear', 'players', 'loss', 'accuracy']


@pytest.mark.parametrize('name', NAMES)
def test_every_view_has_a_still_and_words(shown, name):
    still = Image.open(io.BytesIO(shown[name].png))
    assert still.format == 'PNG' and min(still.size) > 60 and shown[name].alt
    assert still.mode == 'RGBA' and still.getpixel((0, 0))[3] == 0                 # no ground of its own: any theme


@pytest.mark.parametrize('name', NAMES)
def test_the_mime_bundle_works_offline_and_without_trust(shown, name):
    bundle = shown[name]._repr_mimebundle_()
    assert base64.b64decode(bundle['image/png']).startswith(b'\x89PNG') and bundle['text/plain'] == shown[name].alt
    json.dumps(bundle)
    assert not ({'text/html', 'application/vnd.plotly.v1+json'} <= set(bundle))     # one would hide the other
    assert 'http' not in json.dumps(bundle.get('application/vnd.plotly.v1+json', {}))


@pytest.mark.parametrize('name', NAMES)
def test_no_text_from_data_becomes_markup(shown, name):
    fragment = shown[name].as_html()
    tags = Tags(fragment)
    assert {tag for tag, _ in tags.found} <= {'figure', 'div', 'script', 'noscript', 'img', 'figcaption', 'audio', 'h3'}
    assert all(attrs == {'type': 'application/json'} for attrs in tags.named('script'))
    assert not [k for _, attrs in tags.found for k in attrs if k.startswith('on')]
    figure = json.dumps(shown[name]._repr_mimebundle_().get('application/vnd.plotly.v1+json', {}))
    assert '<script' not in figure and '<img' not in figure


@pytest.mark.parametrize('name', ['hear', 'players'])
def test_players_hold_their_sound_and_keep_silent(shown, name):
    players = Tags(shown[name].html).named('audio')
    assert len(players) == dict(hear=1, players=6)[name]
    for attrs in players:
        assert attrs['preload'] == 'none' and 'autoplay' not in attrs and 'controls' in attrs and attrs['aria-label']
        head, data = decoded(attrs['src'])
        assert head == 'data:audio/wav;base64'
        with wave.open(io.BytesIO(data)) as f:
            assert (f.getnchannels(), f.getframerate(), f.getnframes()) == (1, 8000, 8000)
            assert np.abs(np.frombuffer(f.readframes(8000), '<i2')).max() > 1000


def test_a_player_plays_the_pitch_of_its_class(pairs):
    "The loudest frequency of each class's rebuilt sound is that of the recording: 400·2^c rad/s at 8 kHz."
    for c, attrs in enumerate(Tags(sound.players(pairs).html).named('audio')):
        with wave.open(io.BytesIO(decoded(attrs['src'])[1])) as f: x = np.frombuffer(f.readframes(8000), '<i2')
        heard = np.abs(np.fft.rfft(x)).argmax()*8000/len(x)
        assert abs(heard - 400*2**c/(2*np.pi)) < 40


def test_players_of_factor_tiles(syn):
    assert sound.players(syn, per_class=4, tiles=True).html.count('<audio') == 12
    assert sound.players(syn, per_class=4, tiles=False).html.count('<audio') == 3


def test_images_show_the_stored_pixels(pairs):
    rgb = grid.paint(pairs.batch()['image'], pairs.modalities['image'])
    stored = pairs.tensors['image'].permute(0, 2, 3, 1).numpy()
    assert np.abs(rgb.astype(int) - stored).max() <= 1


def test_one_channel_and_float_pictures():
    x = torch.rand(2, 1, 5, 4)
    plain = Modality('image', 'image', (1, 5, 4), mean=(.2,), std=(.5,))
    rgb = grid.paint(plain.normalise(x), plain)
    assert rgb.shape == (2, 5, 4, 3) and np.abs(rgb[..., 0]/255 - x[:, 0].numpy()).max() < .01


def test_spectrograms_have_low_notes_at_the_bottom_and_common_limits(pairs):
    part = pairs.modalities['audio']
    mel = torch.full((1, 1, 32, 8), -80.)
    mel[:, :, :4] = 0.
    rgb = grid.paint(part.normalise(mel), part, (-80., 0.))[0].astype(int)
    assert rgb[-1].sum() > rgb[0].sum()
    half = grid.paint(part.normalise(mel.clamp(max=-40.)), part, (-80., 0.))[0].astype(int)
    assert half[-1].sum() < rgb[-1].sum() and (half[0] == rgb[0]).all()


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=3), st.integers(4, 20))
def test_every_cell_of_a_mosaic_lies_where_it_is_said_to(counts, height):
    "`counts`: per group, cells per row. Each cell has a colour of its own; the pixel at its centre must show it."
    number, groups = 0, []
    for g, rows in enumerate(counts):
        made = []
        for n in rows:
            made.append([np.full((6, 4 + g, 3), number + k + 1, np.uint8) for k in range(n)])
            number += n
        groups.append((f'group {g}', made))
    mosaic, centres = grid.compose(groups, height)
    assert len(centres) == number
    for value, (x, y, *_) in enumerate(centres, 1):
        assert tuple(mosaic[int(y), int(x)]) == (value, value, value, 255)


def test_soft_labels_and_uneven_classes():
    soft = torch.tensor([[.9, .1], [.2, .8], [.6, .4]])
    assert [i.tolist() for i in grid.by_class(soft, 2, 5)] == [[0, 2], [1]]


def test_what_cannot_be_drawn_says_so(pairs):
    words = Modality('caption', 'text', (4,))
    text = PairedData(dict(caption=torch.zeros(2, 4, dtype=torch.int16)), dict(caption=words), [0, 1], ['a', 'b'])
    with pytest.raises(UserError, match='caption'): grid.wall(text)
    with pytest.raises(UserError, match='spectrogram'): sound.players(pairs.select('image'))
    with pytest.raises(UserError, match='image'): grid.wall(pairs, modalities=['imag'])


def test_band_frequencies_match_librosa():
    librosa = pytest.importorskip('librosa', reason='librosa gives the second opinion on mel bands')
    theirs = librosa.mel_frequencies(SPEC.n_mels + 2, fmin=0, fmax=SPEC.sr//2, htk=True)[1:-1]
    assert np.allclose(sound.band_hz(SPEC), theirs)


def test_axes_are_in_seconds_and_hertz(pairs):
    fig = sound.hear(pairs.batch()['audio'][0], pairs.modalities['audio']).figure
    assert fig.layout.xaxis.title.text == 'seconds' and fig.layout.yaxis.title.text == 'Hz'
    assert np.isclose(fig.data[0].x[-1], 31*256/8000, atol=1e-3)
    row = dict(zip(fig.layout.yaxis.ticktext, fig.layout.yaxis.tickvals))['1k']
    assert np.isclose(np.interp(row, np.arange(32), sound.band_hz(SPEC)), 1000)
    assert np.allclose(fig.data[0].z, pairs.tensors['audio'][0, 0], atol=.06)         # dB again, not normalised


def test_curves_read_files_objects_and_torn_lines(tmp_path):
    from types import SimpleNamespace
    events = [dict(step=i, loss=float(i + 1), terms=dict(a=.5, b=i + .5)) for i in range(4)]
    path = tmp_path/'events.jsonl'
    path.write_text('\n'.join(map(json.dumps, events)) + '\n{"step": 4, "lo')
    objects = [SimpleNamespace(**e) for e in events]
    assert curves.loss_series(path) == curves.loss_series(tmp_path) == curves.loss_series(objects)
    assert curves.loss_series(path)['b'] == ((0, 1, 2, 3), (.5, 1.5, 2.5, 3.5))
    with pytest.raises(UserError, match='no events'): curves.loss_curves(tmp_path/'absent.jsonl')


def test_curves_live_through_zero_nan_and_one_point():
    nan = float('nan')
    picture = curves.loss_curves([dict(step=0, loss=nan, terms=dict(a=0.)), dict(step=1, loss=-1., terms=dict(a=0.))])
    assert picture.png and json.dumps(picture._repr_mimebundle_(), allow_nan=False)
    two = [dict(step=0, loss=nan, terms={}), dict(step=1, loss=1., terms={})]
    assert curves.loss_series(two) == {'loss': ((1,), (1.,))}
    assert curves.loss_curves([dict(step=3, loss=1.)]).figure.data[0].mode == 'markers'


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_mean_and_spread_are_those_of_numpy(values):
    rows = [dict(protocol='p', modality='AV', fusion='mean', seed=i, accuracy=v) for i, v in enumerate(values)]
    line = curves.accuracy_frame({'x': rows}).iloc[0]
    assert np.isclose(line['mean'], np.mean(values)) and line['n'] == len(values)
    assert np.isnan(line['std']) if len(values) == 1 else np.isclose(line['std'], np.std(values, ddof=1), atol=1e-6)


def test_protocols_are_never_mixed():
    rows = [dict(protocol=p, modality='AV', fusion='mean', seed=0, accuracy=a)
            for p, a in (('paper', 10.), ('fast', 90.))]
    frame = curves.accuracy_frame({'x': rows})
    tables = curves.accuracy_tables(frame)
    assert list(tables) == ['paper', 'fast'] and tables['paper'].loc['x', 'AV mean'] == '10.0'
    assert [list(curves.accuracy_plot(frame, p).figure.data[0].x) for p in tables] == [[10.], [90.]]
    with pytest.raises(UserError, match='nope'): curves.accuracy_plot(frame, 'nope')


@given(st.text(max_size=60))
def test_escaping_is_undone_by_a_browser_only(text):
    assert html.unescape(page.esc(text)) == html.unescape(html.escape(text))
    assert not set('<>"\'') & set(page.esc(text)) and not set('<>') & set(page.label(text))
    island = page.json_island({'t': text})
    inner = re.fullmatch('<script type="application/json">(.*)</script>', island, re.DOTALL)[1]
    assert '<' not in inner and json.loads(inner)['t'] == text


def test_png_is_exact_and_drawn_once():
    x = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(picture.png_of_array(x, 3)))) == x.repeat(3, 0).repeat(3, 1)).all()
    calls = []
    lazy = picture.Picture(png=lambda: calls.append(1) or picture.png_of_array(x), alt='x')
    assert not calls and lazy.png == lazy.png and calls == [1]


def test_a_picture_is_saved_whole_or_refused(tmp_path, shown):
    assert shown['loss'].save(tmp_path/'a.png').read_bytes() == shown['loss'].png
    assert '<audio' in shown['players'].save(tmp_path/'a.html').read_text()
    with pytest.raises(UserError, match='html'): shown['loss'].save(tmp_path/'a.gif')
