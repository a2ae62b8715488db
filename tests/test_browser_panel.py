"""The panel in a real browser: a slider, Distil, Stop, reload, Resume, Evaluate; nothing leaves here."""
import base64
import importlib.util
import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from test_browser import CHROMIUM, MISSING, _wait_for, browser, lab, open_notebook, playwright, write_notebook
from test_browser_views import click_point

__all__ = ['browser', 'lab', 'playwright']                                          # fixtures of that file, used here
pytestmark = [pytest.mark.browser, pytest.mark.timeout(400), pytest.mark.skipif(not CHROMIUM, reason=MISSING)]

TINY = "steps=400, data=dict(n_train=100, n_test=50), width=8, pool_size=2, real_batch=8, features='random'"
POINTS = """() => Math.max(0, ...[...document.querySelectorAll('.js-plotly-plot')].map(
  g => g.calcdata?.[0]?.length || 0))"""


def panel_notebook(path, line):
    write_notebook(path, [f'from avdd_nb.panel import panel\n{line}', "print('END' + '-MARK')"])


def run_all(page, seconds=120):
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_selector('.jp-OutputArea-output:has-text("END-MARK")', state='attached',
                           timeout=seconds*1000)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert not errors, errors


def button(page, name):
    return page.get_by_role('button', name=name, exact=True).first


def press(page, name):
    "Presses a button of the panel once it can be pressed."
    button(page, name).wait_for(state='visible', timeout=60_000)
    page.wait_for_function("b => !b.disabled", arg=button(page, name).element_handle(), timeout=120_000)
    button(page, name).click()


def wait_for_news(page, words, seconds=120):
    page.locator('.avdd-say').get_by_text(re.compile(words)).first.wait_for(state='attached', timeout=seconds*1000)


def slide(page, name, key='ArrowRight'):
    "Moves the slider of the field `name` by one key press; returns what it shows."
    row = page.locator('.widget-inline-hbox', has=page.get_by_text(name, exact=True)).first
    row.locator('.noUi-handle').press(key)
    page.wait_for_timeout(300)
    return row.locator('.widget-readout').inner_text()


def type_in(page, name, value):
    "Types a value into the box of the field `name`."
    box = page.locator('.widget-inline-hbox', has=page.get_by_text(name, exact=True)).first.locator('input')
    box.fill(str(value))
    box.press('Tab')
    page.wait_for_timeout(300)


def distil_and_stop(page, shots):
    page.screenshot(path=shots/'panel.png')
    assert slide(page, 'factor') == '2'
    press(page, 'Distil')
    wait_for_news(page, 'at work')
    page.screenshot(path=shots/'begun.png')
    page.wait_for_function(f'({POINTS})() > 5', timeout=120_000)
    first = page.evaluate(POINTS)
    page.wait_for_function(f'({POINTS})() > {first}', timeout=60_000)
    assert page.locator('.avdd-now img').count() == 1
    page.screenshot(path=shots/'running.png')
    press(page, 'Stop')
    wait_for_news(page, 'stopped.*step')


def test_panel_in_jupyterlab(browser, lab, tmp_path):
    folder = lab[0]
    quick = 'evaluation=dict(seeds=1, baselines=False, width=8, epochs=5)'
    panel_notebook(folder/'panel.ipynb', f"panel('dm', {TINY}, {quick})")
    page = open_notebook(browser, lab, 'panel.ipynb')
    run_all(page)
    distil_and_stop(page, tmp_path)
    page.keyboard.press('Control+s')
    page.wait_for_timeout(2500)
    page.reload()                                                                   # the kernel lives, the page is new
    page.wait_for_selector('text=/Python 3 .*\\| Idle/', timeout=90_000)
    wait_for_news(page, 'stopped.*step')
    page.screenshot(path=tmp_path/'reloaded.png')
    press(page, 'Resume')
    wait_for_news(page, 'finished.*step 400 of 400')
    press(page, 'Evaluate')
    page.locator('.avdd-table th', has_text='dm').first.wait_for(state='attached', timeout=180_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=tmp_path/'scores.png')
    button(page, 'wall').click()
    page.locator('avdd-wall').wait_for(state='attached', timeout=60_000)
    page.locator('avdd-wall').scroll_into_view_if_needed()
    page.screenshot(path=tmp_path/'finished.png')
    heard = click_in_the_map(page)
    page.screenshot(path=tmp_path/'map.png')
    [run] = (folder/'runs').iterdir()
    assert heard == sound_of(run, 5)
    button(page, 'ear').click()
    page.locator('avdd-ear').wait_for(state='attached', timeout=60_000)
    assert page.locator('.avdd-tabs b').all_inner_texts() == [f'tile {k}' for k in range(1, 5)]
    last = page.locator('.avdd-tabs .avdd-row').last.get_by_role('button')
    assert last.all_inner_texts() == ['original', 'round trip', 'start', 'now']
    last.last.click()
    assert page.locator('.avdd-player audio:not([hidden])').get_attribute('aria-label').startswith('tile 4 now')
    page.locator('avdd-ear').scroll_into_view_if_needed()
    page.screenshot(path=tmp_path/'ear.png')
    page.close()
    assert browser.outside == []


def click_in_the_map(page, number=105):
    "Opens the map of the run and clicks a point: 100 real pairs, then the synthetic ones. Returns the sound it brings."
    button(page, 'map').click()
    page.get_by_text('walk from pair to pair').wait_for(timeout=90_000)
    plot = page.locator('.js-plotly-plot').last
    page.wait_for_timeout(1000)
    click_point(page, plot, number)
    page.wait_for_selector('.avdd-card audio', timeout=20_000)
    return page.locator('.avdd-card audio').first.get_attribute('src')


def sound_of(run, number):
    "The data URI that belongs to the synthetic pair of this number."
    from avdd_nb.data.audio import wav_bytes
    from avdd_nb.views.live import render
    from avdd_nb.views.map import run_map
    cloud = run_map(run, embed='random', cards=0).cloud
    part = render(cloud.pair(1, number)[0], cloud.whole.modalities, cloud.limits)['audio']
    return 'data:audio/wav;base64,' + base64.b64encode(wav_bytes(part.wave, part.sr)).decode()


ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(p.stem for p in (ROOT/'nbs'/'methods').glob('*.ipynb') if p.stem != 'base')
SAMPLE = ['dm']                                                                     # CHAPTERS=all opens every one


@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', CHAPTERS if os.environ.get('CHAPTERS') == 'all' else SAMPLE)
def test_a_chapter_from_top_to_bottom(browser, lab, tmp_path, name):
    "Opened as it stands, run all; then, in its panel: Distil, the curve moves, Stop, Resume."
    book = json.loads((ROOT/'nbs'/'methods'/f'{name}.ipynb').read_text())
    for cell in book['cells']: cell |= dict(outputs=[], execution_count=None) if cell['cell_type'] == 'code' else {}
    book['cells'].append(dict(cell_type='code', id='end', metadata={}, source="print('END' + '-MARK')", outputs=[],
                              execution_count=None))
    (lab[0]/f'{name}.ipynb').write_text(json.dumps(book))
    page = open_notebook(browser, lab, f'{name}.ipynb')
    run_all(page, seconds=240)
    button(page, 'Distil').scroll_into_view_if_needed()
    page.screenshot(path=tmp_path/f'{name}.png')
    if name != 'selection': type_in(page, 'steps', 2000)                            # long enough to be stopped
    press(page, 'Distil')
    if name == 'selection': wait_for_news(page, 'finished')
    else:
        page.wait_for_function(f'({POINTS})() > 2', timeout=400_000)       # some train networks first
        press(page, 'Stop')
        wait_for_news(page, 'stopped.*step')
    page.screenshot(path=tmp_path/f'{name}-distilled.png')
    page.close()
    assert browser.outside == []


@pytest.fixture(scope='module')
def classroom(tmp_path_factory):
    "(folder, address) of a class served with Voilà: two chapters, a small quota, everything below a folder of its own."
    if not importlib.util.find_spec('voila'): pytest.skip("voila is missing: pip install 'avdd_nb[demo]'")
    from avdd_nb import classroom as room
    home = tmp_path_factory.mktemp('class')
    nbs = home/'nbs'
    (nbs/'methods').mkdir(parents=True)
    panel_notebook(nbs/'methods'/'dm.ipynb', f"panel('dm', {TINY})")
    nb = json.loads((nbs/'methods'/'dm.ipynb').read_text())
    head = '# DM: a chapter\n\n$x^2$, [the other one](avdd.ipynb), [not served](../index.ipynb)'
    nb['cells'].insert(0, dict(cell_type='markdown', id='head', metadata={}, source=head))
    (nbs/'methods'/'dm.ipynb').write_text(json.dumps(nb))
    nb['cells'][0]['source'] = '# AVDD: another'
    (nbs/'methods'/'avdd.ipynb').write_text(json.dumps(nb))
    room.write_pages(nbs, home/'pages')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = room.class_env(home) | dict(HOME=str(home), AVDD_QUOTA='runs=1,steps=400,ipc=2',
                                      PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    command = room.class_command(home/'pages', port, browser=False)
    with open(home/'log', 'w') as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        _wait_for(f'http://127.0.0.1:{port}/', home/'log')
        yield home, f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(20)


def test_a_class_distils_in_voila(browser, classroom, tmp_path):
    home, address = classroom
    page = browser.new_page()
    page.goto(address)                                                              # the list of chapters
    chapter = page.get_by_role('link', name='DM a chapter')
    assert 'theme' not in chapter.get_attribute('href')
    page.emulate_media(color_scheme='dark')
    page.reload()
    page.screenshot(path=tmp_path/'list.png')
    chapter.click()
    distil_and_stop(page, tmp_path)
    page.reload()                                                                   # a new kernel finds the run again
    page.screenshot(path=tmp_path/'again.png')
    slide(page, 'factor')
    press(page, 'Distil')
    wait_for_news(page, 'step')
    assert len(list((home/'runs').iterdir())) == 1                                  # the same settings, the same run
    page.screenshot(path=tmp_path/'attached.png')
    assert page.get_by_role('link', name='not served').count() == 0
    page.get_by_role('link', name='the other one').click()                          # from page to page
    page.get_by_role('heading', name='AVDD: another').wait_for(timeout=60_000)
    assert page.url.endswith('?theme=dark')                                         # handed on from page to page
    assert page.evaluate("document.body.dataset.jpThemeLight") == 'false'
    page.get_by_role('link', name='All chapters').click()
    page.get_by_role('link', name='DM a chapter').wait_for(timeout=30_000)
    page.close()
    assert browser.outside == []
