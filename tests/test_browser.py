"""Pictures and reports in a real browser: they draw, they speak, they fit the screen, and nothing leaves here."""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
MISSING = 'there is no chromium here: apt-get install --no-install-recommends chromium'
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300), pytest.mark.skipif(not CHROMIUM, reason=MISSING)]
api = pytest.importorskip('playwright.sync_api', reason="playwright is missing: pip install 'avdd_nb[dev]'")

FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required').split()
SETUP = """
import torch
from avdd_nb.data.audio import MelSpec, log_mel, modality, sample_sounds
from avdd_nb.data.paired import Modality, PairedData
from avdd_nb.views import curves, grid, sound
spec = MelSpec(sr=8000, n_fft=512, win=512, hop=256, n_mels=32, length=8000)
mel = torch.stack([log_mel(w, spec) for w in sample_sounds(8000).values()])
image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
kinds = dict(audio=modality(spec, x=mel), image=Modality('image', 'image', (3, 16, 16), scale=1/255))
names = ['<script>window.hacked=1</script>', '"><img src=x onerror="window.hacked=1">', 'plain']
data = PairedData(dict(audio=mel, image=image), kinds, torch.arange(3), names)
"""
CELLS = [SETUP, "grid.wall(data)", "sound.hear(data.batch()['audio'][0], kinds['audio'], names[1])",
         "sound.players(data)", "curves.loss_curves([dict(step=i, loss=1/(i+1), terms=dict(a=.1)) for i in range(9)])",
         "print('END' + '-MARK')"]


@pytest.fixture(scope='module')
def playwright():
    with api.sync_playwright() as pw: yield pw


@contextlib.contextmanager
def opened_browser(pw, folder, **options):
    "A fresh profile in `folder` that refuses, and remembers in `.outside`, every request to elsewhere."
    context = pw.chromium.launch_persistent_context(str(folder), executable_path=CHROMIUM, headless=True, args=FLAGS,
                                                    **dict(dict(viewport=dict(width=1280, height=1600)), **options))
    context.outside = []

    def gate(route):
        url = route.request.url
        if url.startswith(('http://127.0.0.1:', 'data:', 'blob:', 'file:')): return route.continue_()
        context.outside.append(url)
        route.abort()

    context.route('**/*', gate)
    try: yield context
    finally: context.close()


@pytest.fixture(scope='module')
def browser(playwright, tmp_path_factory):
    with opened_browser(playwright, tmp_path_factory.mktemp('profile')) as context: yield context


@contextlib.contextmanager
def served_lab(folder, dark=False):
    "(folder, address, token) of a JupyterLab on this machine that serves `folder`, with a home of its own in it."
    folder, token = Path(folder), 'only-for-this-test'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(os.environ, HOME=str(folder/'home'), OMP_NUM_THREADS='1', IPYTHONDIR=str(folder/'home'/'ipython'),
               PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    settings, themes = folder/'home'/'.jupyter'/'labconfig', folder/'home'/'.jupyter'/'lab'/'user-settings'
    themes /= '@jupyterlab/apputils-extension'
    for made in (settings, themes): made.mkdir(parents=True)
    news = {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}
    (settings/'page_config.json').write_text(json.dumps(news))
    look = json.dumps(dict(theme=f'JupyterLab {"Dark" if dark else "Light"}'))
    (themes/'themes.jupyterlab-settings').write_text(look)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
               f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder}', '--LabApp.news_url=None',
               '--LabApp.extension_manager=readonly', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(folder/'home'/'log', 'w') as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        _wait_for(f'{address}/api/status?token={token}', folder/'home'/'log')
        yield folder, address, token
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with served_lab(tmp_path_factory.mktemp('lab')) as served: yield served


def _wait_for(url, log, seconds=90):
    for _ in range(seconds*2):
        try: return urllib.request.urlopen(url).read()
        except OSError: time.sleep(.5)
    pytest.fail(f'JupyterLab did not start: {log.read_text()[-2000:]}')


def write_notebook(path, sources, outputs=()):
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='Python 3')))
    nb.cells = [nbformat.v4.new_code_cell(s) for s in sources]
    for cell, out in zip(nb.cells, outputs): cell.outputs = out
    nbformat.write(nb, path)


def open_notebook(browser, lab, name):
    folder, address, token = lab
    page = browser.new_page()
    page.goto(f'{address}/lab/tree/{name}?token={token}&reset')
    page.wait_for_selector('text=/Python 3 .*\\| Idle/', timeout=90_000)
    return page


def enliven(page, k):
    "Points at the k-th figure: its still becomes the live figure."
    figure = page.locator('.jp-RenderedPlotly').nth(k)
    figure.scroll_into_view_if_needed(timeout=30_000)
    figure.locator('img').dispatch_event('mouseenter')
    figure.locator('.main-svg').first.wait_for(state='attached', timeout=30_000)


PLAY = """async audio => { await audio.play(); await new Promise(r => setTimeout(r, 400));
  const bytes = new Uint8Array(await (await fetch(audio.src)).arrayBuffer());
  return {time: audio.currentTime, seconds: audio.duration, bytes: bytes.length,
          riff: String.fromCharCode(...bytes.slice(0, 4))}; }"""


def test_pictures_draw_and_speak_in_jupyterlab(browser, lab, tmp_path):
    folder = lab[0]
    write_notebook(folder/'live.ipynb', CELLS)
    page = open_notebook(browser, lab, 'live.ipynb')
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_selector('.jp-OutputArea-output:has-text("END-MARK")', state='attached', timeout=120_000)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert not errors, errors
    page.screenshot(path=tmp_path/'stills.png')
    for k in range(3): enliven(page, k)
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path/'live.png')
    players = page.locator('audio')
    assert players.count() == 4                                                     # one from hear, three classes
    assert page.evaluate("[...document.querySelectorAll('audio')].every(a => a.paused && a.preload === 'none')")
    heard = players.first.evaluate(PLAY)
    assert heard['riff'] == 'RIFF' and heard['bytes'] == 44 + 2*8000
    assert heard['time'] > 0 and abs(heard['seconds'] - 1) < .01
    assert page.evaluate('window.hacked') is None
    page.keyboard.press('Control+s')
    page.wait_for_timeout(1500)
    page.close()
    assert browser.outside == []


def test_an_untrusted_notebook_still_shows_pictures(browser, lab, tmp_path):
    "Saved outputs of somebody else's notebook: the figure needs no trust; without plotly the still is shown."
    folder = lab[0]
    bundle = _picture()._repr_mimebundle_()
    still = {k: v for k, v in bundle.items() if k != 'application/vnd.plotly.v1+json'}
    outputs = [[nbformat.v4.new_output('display_data', data=b)] for b in (bundle, still)]
    write_notebook(folder/'foreign.ipynb', ['1', '2'], outputs)
    page = open_notebook(browser, lab, 'foreign.ipynb')
    enliven(page, 0)
    page.screenshot(path=tmp_path/'foreign.png')
    width = page.locator('.jp-RenderedImage img').first.evaluate('image => image.naturalWidth')
    assert width > 100 and page.evaluate('window.hacked') is None
    page.close()
    assert browser.outside == []


def _picture():
    space = {}
    exec(SETUP + 'picture = grid.wall(data)', space)
    return space['picture']


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    from avdd_nb.report import Section, write_report
    space = {}
    exec(SETUP, space)
    data, grid, sound, curves, names = (space[k] for k in ('data', 'grid', 'sound', 'curves', 'names'))
    rows = [dict(protocol='paper', modality=m, fusion='', seed=s, accuracy=50. + s)
            for s in (0, 1) for m in ('AV', 'image')]
    frame = curves.accuracy_frame({name: rows for name in names})
    sections = [Section('Look', [grid.wall(data)]), Section('Listen', [sound.players(data)]),
                Section('Measure', [curves.accuracy_plot(frame), *curves.accuracy_tables(frame).values()])]
    return write_report(tmp_path_factory.mktemp('report')/'report.html', names[0], sections, names[1])


BRIGHTNESS = """() => { const style = getComputedStyle(document.body);
  return [style.backgroundColor, style.color].map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)
                                                       / 765); }"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1280, 1920])
def test_a_report_fits_every_screen(browser, report, tmp_path, width, scheme):
    page, said = browser.new_page(), []
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(str(error)))
    page.set_viewport_size(dict(width=width, height=900))
    page.emulate_media(color_scheme=scheme)
    page.goto(f'file://{report}')
    page.wait_for_selector('.plot .main-svg')
    page.wait_for_timeout(300)
    page.screenshot(path=tmp_path/f'report-{width}-{scheme}.png', full_page=True)
    assert said == [] and browser.outside == []
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.locator('.plot .main-svg').count() >= 2
    ground, ink = page.evaluate(BRIGHTNESS)
    assert abs(ground - ink) > .6 and (ground > .5) == (scheme == 'light')
    assert page.evaluate('window.hacked') is None
    page.close()


def test_one_player_at_a_time_and_by_keyboard(browser, report):
    page = browser.new_page()
    page.goto(f'file://{report}')
    first, second = page.locator('audio').nth(0), page.locator('audio').nth(1)
    assert first.evaluate('audio => { audio.loop = true; return audio.paused; }')
    first.focus()
    page.keyboard.press('Space')
    page.wait_for_function("() => document.querySelectorAll('audio')[0].currentTime > .05")
    second.evaluate('audio => { audio.loop = true; return audio.play(); }')
    page.wait_for_function("() => document.querySelectorAll('audio')[0].paused")
    assert not second.evaluate('audio => audio.paused')
    page.close()


def test_a_report_reads_without_scripts(playwright, report, tmp_path):
    "Mail programs and strict browsers run no script: the stills take the place of the figures."
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(f'file://{report}')
    page.screenshot(path=tmp_path/'plain.png', full_page=True)
    sizes = [page.locator('.scroll img').nth(k).bounding_box()['width'] for k in range(2)]
    chromium.close()
    assert min(sizes) > 100


def test_the_saved_notebook_keeps_stills(lab):
    "What the first test saved: every figure has its PNG beside it, for GitHub, nbconvert and mail."
    path = lab[0]/'live.ipynb'
    outputs = [o.get('data', {}) for c in json.loads(path.read_text())['cells'] for o in c['outputs']]
    figures = [d for d in outputs if 'application/vnd.plotly.v1+json' in d]
    if not figures: pytest.skip('the notebook was not saved with outputs: run the whole file')
    assert len(figures) == 3 and all(d.get('image/png') for d in figures)
