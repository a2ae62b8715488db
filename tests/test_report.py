"""A report is one file: whole, safe, and without a single address outside itself."""
import base64
import io
import json
import re
import wave
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from PIL import Image

from avdd_nb.core import UserError
from avdd_nb.data.audio import MelSpec, log_mel, modality
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.report import Section, by_name, flat, headline, run_report, table_html, write_report
from avdd_nb.synset import from_real, save_synset

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', '</script></title></style>']
SPEC = MelSpec(sr=8000, n_fft=512, win=512, hop=256, n_mels=32, length=8000)
VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}


class Page(HTMLParser):
    "Elements with attributes, the text of each kind of element, and whether all of them are closed in order."
    def __init__(self, text):
        super().__init__()
        self.found, self.words, self.open, self.crossed = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.crossed.append(tag)

    def handle_data(self, data):
        if self.open: self.words[self.open[-1]] = self.words.get(self.open[-1], []) + [data]

    def named(self, tag): return [attrs for name, attrs in self.found if name == tag]


def make_run(folder, names=HOSTILE):
    "A run folder of three classes and its real data."
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(5)
    mel = log_mel(.1*torch.randn(15, 8000, generator=g), SPEC)
    image = torch.randint(0, 256, (15, 3, 16, 16), generator=g, dtype=torch.uint8)
    pixels = Modality('image', 'image', (3, 16, 16), mean=(.5,)*3, std=(.3,)*3, scale=1/255)
    data = PairedData(dict(audio=mel, image=image), dict(audio=modality(SPEC, x=mel), image=pixels), labels, names)
    syn = from_real(data, torch.stack([i[:4] for i in data.class_indices]), factor=2)
    save_synset(syn, folder/'initial.safetensors')
    save_synset(syn, folder/'result.safetensors')
    run = dict(dataset=HOSTILE[0], method='dm', ipc=1, steps=3, options={'lr': HOSTILE[1]})
    (folder/'config.json').write_text(json.dumps(dict(run=run, hash='ab', versions=dict(torch='9.9'))))
    events = [dict(step=i, loss=1/(i + 1), terms={HOSTILE[2]: .5, 'b': .1}, seconds=i) for i in range(5)]
    (folder/'events.jsonl').write_text('\n'.join(map(json.dumps, events)))
    return data


def rows():
    return [dict(method=m, ipc=1, protocol=p, modality=b, fusion=f, seed=s, accuracy=a + s)
            for m, a in (('dm', 60.), ('random pairs', 30.), ('whole data', 90.), (HOSTILE[1], 10.))
            for p in ('paper', 'thorough') for b, f in (('AV', 'mean'), ('AV', 'product'), ('audio', ''))
            for s in (0, 2)]


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    data = make_run(folder)
    return run_report(folder, rows(), data, facts={'Method': dict(lr=.2)})


@pytest.fixture(scope='module')
def html(report): return report.read_text()


@pytest.fixture(scope='module')
def parsed(html): return Page(html)


def test_nothing_is_loaded_from_outside(html, parsed):
    for tag, attrs in parsed.found:
        for name in ('src', 'href', 'action', 'data', 'poster', 'srcset'):
            assert not attrs.get(name) or attrs[name].startswith(('data:', '#')), (tag, name, attrs[name][:60])
    assert not parsed.named('link') and not re.search(r'@import|url\(\s*["\']?http', ''.join(parsed.words['style']))
    policy = [m['content'] for m in parsed.named('meta') if m.get('http-equiv') == 'Content-Security-Policy']
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'") and 'http' not in policy[0]


def test_plotly_is_there_once_or_not_at_all(html, tmp_path):
    assert html.count('plotly.js v') == 1
    plain = write_report(tmp_path/'plain.html', 'x', [Section('a', ['words', pd.DataFrame({'n': [1]})])])
    assert plain.stat().st_size < 20_000


def test_names_from_data_stay_text(parsed):
    assert not parsed.crossed and not parsed.open
    assert not [k for _, attrs in parsed.found for k in attrs if k.startswith('on')]
    assert not [img for img in parsed.named('img') if not img['src'].startswith('data:image/png;base64,')]
    scripts = [a for a in parsed.named('script') if a != {'type': 'application/json'}]
    assert scripts == [{}, {}, {}]                                                 # plotly, the map's, ours, no other
    assert HOSTILE == parsed.words['h3'] and parsed.words['title'] == parsed.words['h1']


def test_pictures_and_players_hold_their_bytes(parsed):
    images, players = parsed.named('img'), parsed.named('audio')
    assert len(players) == 3*2*2
    for img in images:
        assert img['alt'] and min(Image.open(io.BytesIO(base64.b64decode(img['src'].split(',')[1]))).size) >= 16
    for audio in players:
        assert audio['preload'] == 'none' and 'autoplay' not in audio and audio['aria-label']
        with wave.open(io.BytesIO(base64.b64decode(audio['src'].split(',')[1]))) as f:
            assert f.getframerate() == 8000 and f.getnframes() == 8000


def test_every_figure_has_its_data_and_a_still(html, parsed):
    plots = [a for a in parsed.named('div') if a.get('class') == 'plot']
    assert len(plots) == 6                                                         # 2 protocols, loss, 2 walls, map
    assert all(a['aria-label'] and a['role'] == 'img' for a in plots)
    islands = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    keys = [set(json.loads(x)) for x in islands]
    assert keys.count({'data', 'layout', 'config'}) == 6 and keys.count({'cards', 'hint', 'absent'}) == 1
    assert html.count('<noscript>') == 6 and len(keys) == 7


def cells(table):
    "Rows of the text of their cells, unescaped."
    return [[unescape(re.sub('<.*?>', '', c)) for c in re.findall(r'<t[hd].*?>(.*?)</t[hd]>', row)]
            for row in re.findall(r'<tr>(.*?)</tr>', table)]


def test_numbers_of_the_table(html):
    tables = re.findall(r'<table><thead>.*?</table>', html, re.DOTALL)
    assert len(tables) == 2                                                        # one for each protocol
    for head, *body in map(cells, tables):
        assert head == ['', 'AV mean', 'AV product', 'audio', 'n']
        assert [row[0] for row in body] == ['random pairs', HOSTILE[1], 'dm', 'whole data']
        assert body[2][1:] == ['61.0 ± 1.4'] * 3 + ['2']


def test_headline_and_order():
    assert list(by_name(rows(), 'dm'))[-2:] == ['dm', 'whole data']
    assert headline(rows(), 'dm') == ('dm: 61.0 % AV mean accuracy under protocol paper '
                                      f'(random pairs 31.0 %, {HOSTILE[1]} 11.0 %, whole data 91.0 %).')
    assert headline([], 'dm') == ''


def test_a_run_without_rows_data_or_loss_still_reports(tmp_path):
    make_run(tmp_path)
    (tmp_path/'events.jsonl').unlink()
    (tmp_path/'initial.safetensors').unlink()
    parsed = Page(run_report(tmp_path, path=tmp_path/'b'/'short.html').read_text())
    assert [w.strip() for w in parsed.words['h2']] == ['Listen', 'Settings', 'Versions']


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = write_report(tmp_path/'r.html', 'old', [Section('a', ['x'])])
    before = path.read_text()
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match='No space'): write_report(path, 'new', [Section('a', ['y'])])
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ['r.html']


def test_facts_flatten_and_tables_align():
    @dataclass
    class Inner:
        b: float = .1
    found = list(flat(dict(a=Inner(), c=[1, 2.5], d=None, e=True, f={})))
    assert found == [('a.b', '0.1'), ('c', '1, 2.5'), ('e', 'yes')]
    table = table_html(pd.DataFrame({'n': [1, 2], 'word': ['x', '<y>']}))
    assert table.count('class="number"') == 3 and '&lt;y&gt;' in table and '<th scope="row"' not in table


def test_only_html_is_written(tmp_path):
    with pytest.raises(UserError, match='report.pdf'): write_report(tmp_path/'report.pdf', 'x', [])
