"""How long a click in the live map takes, from the mouse to the sound's element, and what a map of many points costs.

python benchmarks/map_click.py [--points 5000 20000] [--browser]   (one thread; --browser: in a real JupyterLab)
"""
import argparse
import os
import statistics
import time

import torch

from avdd_nb.data import soundshapes
from avdd_nb.synset import from_real
from avdd_nb.views.map import pair_map


def clicks(points, n=30):
    "(seconds until the map is built, seconds of each of n clicks inside Python)."
    data = soundshapes.load(n_train=points - 40, n_test=10).train
    syn = from_real(data, torch.stack([i[:4] for i in data.class_indices]), factor=2)
    start = time.perf_counter()
    live = pair_map(data, syn, 'random', max_real=points, cards=0).live().map
    built, took = time.perf_counter() - start, []
    for i in torch.linspace(0, points - 1, n).long().tolist():
        start = time.perf_counter()
        live.show([i])
        took.append(time.perf_counter() - start)
    return built, took


def show(what, seconds):
    ms = sorted(1000*s for s in seconds)
    print(f'{what}: median {statistics.median(ms):.0f} ms, slowest {ms[-1]:.0f} ms, n = {len(ms)}', flush=True)


CELL = """
import torch
from avdd_nb.data import soundshapes
from avdd_nb.synset import from_real
from avdd_nb.views.map import pair_map
data = soundshapes.load(n_train={points} - 40, n_test=10).train
syn = from_real(data, torch.stack([i[:4] for i in data.class_indices]), factor=2)
pair_map(data, syn, 'random', max_real={points}, cards=0).live()
"""
WATCH = """() => { window.took = []; let down = 0, before = null;
  const card = () => document.querySelector('.avdd-card audio');
  document.addEventListener('mousedown', () => { down = performance.now(); before = card(); }, true);
  const look = () => { if (down && card() && card() !== before) {
    window.took.push(performance.now() - down); down = 0; } };
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true}); }"""


FRAMES = """() => { window.frames_ = []; window.drawing = true; let last = performance.now();
  const tick = now => { window.frames_.push(now - last); last = now; if (window.drawing) requestAnimationFrame(tick); };
  requestAnimationFrame(tick); }"""


def drag(page, plot, moves=40):
    "Seconds of each frame that the browser draws while the map is dragged to and fro."
    box = plot.bounding_box()
    x, y = box['x'] + 200, box['y'] + 200
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(FRAMES)
    for k in range(moves): page.mouse.move(x + 3*min(k, moves - k), y + 2*min(k, moves - k))
    frames = page.evaluate('() => { window.drawing = false; return window.frames_; }')
    page.mouse.up()
    return [t/1000 for t in frames[1:]]


def in_browser(points, n=12):
    "(seconds from pressing the mouse to the sound's element for n clicks, of each frame of a drag) in JupyterLab."
    import sys
    import tempfile
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
    import test_browser as tb
    from test_browser_panel import run_all
    from test_browser_views import click_point
    with (tempfile.TemporaryDirectory() as folder, tb.api.sync_playwright() as pw,
          tb.opened_browser(pw, f'{folder}/profile') as browser, tb.served_lab(f'{folder}/lab') as lab):
        tb.write_notebook(lab[0]/'map.ipynb', [CELL.format(points=points), "print('END' + '-MARK')"])
        page = tb.open_notebook(browser, lab, 'map.ipynb')
        run_all(page, seconds=500)
        plot = page.locator('.js-plotly-plot').first
        plot.wait_for(timeout=60_000)
        page.wait_for_timeout(3000)
        page.evaluate(WATCH)
        for k in range(n):
            click_point(page, plot, points - 40 + 3*k)
            page.wait_for_function('k => window.took.length > k', arg=k, timeout=20_000)
        return [t/1000 for t in page.evaluate('window.took')], drag(page, plot)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--points', type=int, nargs='+', default=[5000, 20000])
    parser.add_argument('--browser', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for points in args.points:
        built, took = clicks(points)
        print(f'{points} points, load {os.getloadavg()[0]:.1f}: embedded, placed and drawn in {built:.1f} s')
        show('  click to cards, in Python', took)
        if not args.browser: continue
        took, frames = in_browser(points)
        show('  mouse to sound element, in JupyterLab', took)
        show('  a frame while the map is dragged', frames)
