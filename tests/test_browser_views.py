"""The interactive views in a real browser: click, lasso, slider, keys; the right bytes; nothing leaves the machine."""
import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_browser import CHROMIUM, MISSING, _wait_for, browser, lab, open_notebook, playwright, write_notebook

__all__ = ['browser', 'lab', 'playwright']                                          # fixtures of that file, used here
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300), pytest.mark.skipif(not CHROMIUM, reason=MISSING)]

SETUP = """
import base64, json, torch
from avdd_nb.data import soundshapes
from avdd_nb.data.audio import wav_bytes
from avdd_nb.synset import from_real
from avdd_nb.views.ear import tiles_ear
from avdd_nb.views.live import render
from avdd_nb.views.map import pair_map
from avdd_nb.views.wall import wall
real = soundshapes.load(n_train=100, n_test=10).train
real.classes[3] = '<img src=x onerror="window.hacked=1">'
syn = from_real(real, torch.stack([i[:4] for i in real.class_indices]), factor=2)
m = pair_map(real, syn, 'random', cards=16)
def sound(source, item):
    parts = render(m.cloud.pair(source, item)[0], real.modalities, m.cloud.limits)
    return 'data:audio/wav;base64,' + base64.b64encode(wav_bytes(parts['audio'].wave, parts['audio'].sr)).decode()
"""


def run_all(page, mark='END-MARK'):
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_selector(f'.jp-OutputArea-output:has-text("{mark}")', state='attached', timeout=120_000)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert not errors, errors


PLACE = """([g, number]) => { const l = g._fullLayout, r = g.getBoundingClientRect();
  for (const t of g._fullData) { const i = t.customdata ? [...t.customdata].indexOf(number) : -1; if (i >= 0) return [
    r.left + l.xaxis._offset + l.xaxis.d2p(t.x[i]), r.top + l.yaxis._offset + l.yaxis.d2p(t.y[i])]; } }"""


def click_point(page, plot, number):
    plot.scroll_into_view_if_needed()
    where = [plot.element_handle(), number]
    page.wait_for_function(PLACE, arg=where, timeout=30_000)                          # drawn, with its points
    x, y = page.evaluate(PLACE, where)
    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=5)
    page.wait_for_timeout(300)
    page.mouse.click(x, y)


def lasso(page, plot):
    "Around the left two thirds of the plot."
    page.locator('.js-plotly-plot .modebar-btn[data-val="lasso"]').first.click()
    box = plot.bounding_box()
    corners = [(.05, .05), (.7, .05), (.7, .95), (.05, .95), (.05, .06)]
    at = [(box['x'] + 20 + (box['width'] - 220)*u, box['y'] + 25 + (box['height'] - 50)*v) for u, v in corners]
    page.mouse.move(*at[0])
    page.mouse.down()
    for p in at[1:]: page.mouse.move(*p, steps=6)
    page.mouse.up()


def sounds(page, within='.avdd-card'): return page.locator(f'{within} audio').evaluate_all('all => all.map(a => a.src)')


def test_click_and_lasso_in_the_live_map_play_those_pairs(browser, lab, tmp_path):
    folder = lab[0]
    cells = [SETUP, 'm.live()', "json.dump(sound(1, 5), open('right.json', 'w')); print('END' + '-MARK')"]
    write_notebook(folder/'map.ipynb', cells)
    page = open_notebook(browser, lab, 'map.ipynb')
    run_all(page)
    plot = page.locator('.js-plotly-plot').first
    plot.wait_for(timeout=30_000)
    page.wait_for_timeout(1000)
    click_point(page, plot, 105)                                                    # 100 real pairs, then synthetic 5
    page.wait_for_selector('.avdd-card audio', timeout=15_000)
    page.wait_for_function("() => document.querySelector('.avdd-card audio').currentTime > 0")
    page.screenshot(path=tmp_path/'map-live.png')
    [heard] = sounds(page)
    assert heard == json.loads((folder/'right.json').read_text())
    assert base64.b64decode(heard.split(',')[1])[:4] == b'RIFF'
    lasso(page, plot)
    page.wait_for_function("() => document.querySelectorAll('.avdd-card').length === 12", timeout=15_000)
    page.screenshot(path=tmp_path/'map-lasso.png')
    assert len(set(sounds(page))) == 12
    assert page.evaluate('window.hacked') is None
    page.close()
    assert browser.outside == []


OTHERS = ["m", "wall(dict(start=syn, now=syn), tiles=True, per_class=2)", "tiles_ear(syn, 3)",
          "json.dump(sound(1, 5), open('right.json', 'w')); print('END' + '-MARK')"]


def test_saved_views_answer_without_a_kernel(browser, lab, tmp_path):
    "In a notebook, with the embedded cards only: the map's click, the wall's cells and slider, the ear's play-head."
    folder = lab[0]
    write_notebook(folder/'views.ipynb', [SETUP, *OTHERS])
    page = open_notebook(browser, lab, 'views.ipynb')
    run_all(page)
    page.evaluate("document.body.scrollTop = 0")
    figure = page.locator('.jp-RenderedPlotly').first
    figure.scroll_into_view_if_needed(timeout=30_000)
    figure.locator('img').dispatch_event('mouseenter')
    plot = page.locator('.js-plotly-plot').first
    plot.wait_for(timeout=30_000)
    page.wait_for_timeout(800)
    cards = page.evaluate("JSON.parse(document.querySelector('avdd-map > script').textContent).cards")
    point = next(c['point'] for c in cards if c['point'] >= 100)
    click_point(page, plot, point)
    page.wait_for_function("() => document.querySelector('avdd-map audio')?.currentTime > 0")
    page.screenshot(path=tmp_path/'map-saved.png')
    assert sounds(page, 'avdd-map')[0] in next(c['html'] for c in cards if c['point'] == point)
    wall, ear = page.locator('avdd-wall'), page.locator('avdd-ear')
    wall.locator('[data-cell="4"]').click()
    page.wait_for_function("() => document.querySelector('avdd-wall audio').currentTime > 0")
    assert page.evaluate("document.querySelector('avdd-map audio').paused")           # one player at a time
    page.screenshot(path=tmp_path/'wall.png')
    ear.scroll_into_view_if_needed()
    ear.locator('.avdd-sheet').focus()
    page.keyboard.press('Space')
    page.wait_for_function("() => parseFloat(document.querySelector('.avdd-head').style.left) > 5")
    page.screenshot(path=tmp_path/'ear.png')
    assert page.evaluate('window.hacked') is None
    page.close()
    assert browser.outside == []


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    from avdd_nb.report import Section, write_report
    space = {}
    exec(SETUP, space)
    m, wall, ear, syn = (space[k] for k in ('m', 'wall', 'tiles_ear', 'syn'))
    pictures = dict(Map=m, Wall=wall(dict(start=syn, now=syn), tiles=True, per_class=2), Ear=ear(syn, 3))
    path = tmp_path_factory.mktemp('views')/'views.html'
    return write_report(path, 'Views', [Section(k, [p]) for k, p in pictures.items()])


@pytest.mark.parametrize('scheme,width', [('light', 1280), ('dark', 400)])
def test_a_report_is_alive_by_keyboard(browser, report, tmp_path, scheme, width):
    page, said = browser.new_page(), []
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(str(error)))
    page.set_viewport_size(dict(width=width, height=900))
    page.emulate_media(color_scheme=scheme)
    page.goto(f'file://{report}')
    page.wait_for_selector('.plot .main-svg')
    page.locator('avdd-map button', has_text='next').focus()
    page.keyboard.press('Enter')
    page.wait_for_function("() => document.querySelector('avdd-map audio')?.currentTime > 0")
    page.locator('avdd-wall [data-cell="0"]').focus()
    page.keyboard.press('ArrowRight')
    page.keyboard.press('Enter')
    page.wait_for_function("() => document.querySelector('avdd-wall audio').currentTime > 0")
    assert page.locator('avdd-wall [data-cell="1"]').get_attribute('aria-pressed') == 'true'
    page.locator('avdd-wall [data-cell="1"]').hover()                                 # still shows its picture
    seen = "b => getComputedStyle(b).backgroundImage.slice(0, 20)"
    assert page.locator('avdd-wall [data-cell="1"]').evaluate(seen).startswith('url("data:image/png')
    page.locator('avdd-wall input[type=range]').focus()
    page.keyboard.press('Home')
    assert page.locator('avdd-wall input[type=range]').get_attribute('aria-valuetext') == 'start'
    page.locator('avdd-ear .avdd-sheet').focus()
    for _ in range(4): page.keyboard.press('ArrowRight')
    assert 15 < float(page.locator('.avdd-head').evaluate('head => parseFloat(head.style.left)')) < 25
    page.keyboard.press('+')
    assert page.locator('.avdd-inner').evaluate('inner => inner.style.width') == '200%'
    page.screenshot(path=tmp_path/f'report-{scheme}-{width}.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate('window.hacked') is None and said == [] and browser.outside == []
    page.close()


@pytest.fixture(scope='module')
def voila(tmp_path_factory):
    "(folder, address) of one page of views served with Voilà and the template that asks no network."
    pytest.importorskip('voila', reason="voila is missing: pip install 'avdd_nb[demo]'")
    root, home = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp('voila')
    right = "json.dump(sound(1, 5), open('right.json', 'w'))"
    views = ['m.live()', 'wall(syn, tiles=True, per_class=2)', 'tiles_ear(syn, 3)']
    write_notebook(home/'page.ipynb', [SETUP, *views, right])
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(os.environ, HOME=str(home), PYTHONPATH=str(root), JUPYTER_PATH=str(root/'avdd_nb'/'share'/'jupyter'))
    command = [sys.executable, '-m', 'voila', str(home/'page.ipynb'), '--no-browser', '--Voila.ip=127.0.0.1',
               f'--port={port}', '--template=offline']
    with open(home/'log', 'w') as log: server = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=log)
    try:
        _wait_for(f'http://127.0.0.1:{port}/voila/static/voila.js', home/'log')
        yield home, f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(20)


def test_the_live_map_answers_in_voila(browser, voila, tmp_path):
    home, address = voila
    page = browser.new_page()
    page.goto(address, wait_until='commit', timeout=120_000)                        # the page comes cell by cell
    plot = page.locator('.js-plotly-plot').first
    plot.wait_for(timeout=120_000)
    page.wait_for_timeout(1500)
    click_point(page, plot, 105)
    page.wait_for_function("() => document.querySelector('.avdd-card audio')?.currentTime > 0", timeout=30_000)
    assert sounds(page) == [json.loads((home/'right.json').read_text())]
    assert plot.bounding_box()['width'] > 400                                       # a bare figure shrinks to nothing
    page.locator('avdd-wall [data-cell="4"]').click()
    page.wait_for_function("() => document.querySelector('avdd-wall audio').currentTime > 0")
    assert page.locator('avdd-ear audio').count() == 4
    page.screenshot(path=tmp_path/'voila.png', full_page=True)
    assert page.evaluate('window.hacked') is None
    page.close()
    assert browser.outside == []
