"""The interactive views in a real browser: click, lasso, slider, keyboard; the right bytes; nothing leaves the machine."""
import base64
import json

import pytest
from test_browser import (  # noqa: F401  (fixtures)
    CHROMIUM, FLAGS, MISSING, browser, enliven, lab, open_notebook, playwright, write_notebook)

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300), pytest.mark.skipif(not CHROMIUM, reason=MISSING)]

SETUP = """
import torch
from avdd_nb.data import soundshapes
from avdd_nb.synset import from_real
from avdd_nb.views.map import pair_map
from avdd_nb.views.wall import wall
HOSTILE = '<img src=x onerror="window.hacked=1">'
real = soundshapes.load(n_train=100, n_test=10).train
real.classes[3] = HOSTILE
syn = from_real(real, torch.stack([i[:4] for i in real.class_indices]), factor=2)
"""


def run_all(page, mark='END-MARK'):
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_selector(f'.jp-OutputArea-output:has-text("{mark}")', state='attached', timeout=120_000)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert not errors, errors


PLACE = """([g, number]) => { const l = g._fullLayout, r = g.getBoundingClientRect();
  for (const t of g._fullData) { const i = t.customdata ? [...t.customdata].indexOf(number) : -1;
    if (i >= 0) return [r.left + l.xaxis._offset + l.xaxis.d2p(t.x[i]), r.top + l.yaxis._offset + l.yaxis.d2p(t.y[i])]; }
}"""


def click_point(page, plot, number):
    plot.scroll_into_view_if_needed()
    x, y = page.evaluate(PLACE, [plot.element_handle(), number])
    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=5)
    page.wait_for_timeout(300)
    page.mouse.click(x, y)


def sounds(scope): return [src for src in scope.locator('audio').evaluate_all('all => all.map(a => a.src)')]


def test_a_click_in_the_live_map_plays_that_pair(browser, lab, tmp_path):  # noqa: F811
    folder = lab[0]
    cells = [SETUP, "m = pair_map(real, syn, 'random', cards=0)\nbox = m.live()\nbox",
             "from avdd_nb.data.audio import to_wave, wav_bytes\nfrom avdd_nb.views.live import render\nimport base64, json\n"
             "wav = lambda s, i: [wav_bytes(p.wave, p.sr) for p in render(m.cloud.pair(s, i)[0], real.modalities, "
             "m.cloud.limits).values() if p.wave is not None][0]\n"
             "json.dump([base64.b64encode(wav(0, 7)).decode(), base64.b64encode(wav(1, 5)).decode()], "
             "open('right.json', 'w'))", "print('END' + '-MARK')"]
    write_notebook(folder/'map.ipynb', cells)
    page = open_notebook(browser, lab, 'map.ipynb')
    run_all(page)
    right = ['data:audio/wav;base64,' + b for b in json.loads((folder/'right.json').read_text())]
    plot = page.locator('.js-plotly-plot').first
    plot.wait_for(timeout=30_000)
    page.wait_for_timeout(1000)
    for number, bytes_ in ((105, right[1]),):
        click_point(page, plot, number)
        page.wait_for_selector('.avdd-card audio', timeout=15_000)
        page.wait_for_timeout(300)
        page.screenshot(path=tmp_path/'map-live.png')
        assert sounds(page) == [bytes_]
    player = page.locator('.avdd-card audio').first
    page.wait_for_function("() => document.querySelector('.avdd-card audio').currentTime > 0")
    assert base64.b64decode(player.get_attribute('src').split(',')[1])[:4] == b'RIFF'
    box = plot.bounding_box()
    page.locator('.js-plotly-plot .modebar-btn[data-val="lasso"]').first.click()
    corners = [(.05, .05), (.7, .05), (.7, .95), (.05, .95), (.05, .06)]
    at = [(box['x'] + 20 + (box['width'] - 220)*u, box['y'] + 25 + (box['height'] - 50)*v) for u, v in corners]
    page.mouse.move(*at[0])
    page.mouse.down()
    for p in at[1:]: page.mouse.move(*p, steps=6)
    page.mouse.up()
    page.wait_for_function("() => document.querySelectorAll('.avdd-card').length === 12", timeout=15_000)
    page.screenshot(path=tmp_path/'map-lasso.png')
    assert len(set(sounds(page))) == 12
    assert page.evaluate('window.hacked') is None
    page.close()
    assert browser.outside == []
