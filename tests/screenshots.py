"""The three pictures of the start page, taken from a real run in JupyterLab with a headless Chromium.

python tests/screenshots.py [FOLDER] [--dark]       (default folder: nbs/images; `make screenshots`; 2 minutes)
"""
import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from test_browser import api, open_notebook, opened_browser, served_lab
from test_browser_panel import POINTS, button, panel_notebook, press, run_all, wait_for_news
from test_browser_views import click_point

LINE = ("panel('avdd', steps=120, ipc=1, data=dict(n_train=600, n_test=300), width=24, "
        "evaluation=dict(seeds=2, epochs=100, epochs_whole=10, width=16))")
PANEL = '.jp-OutputArea-output .widget-vbox >> nth=0'
VIEW = dict(width=1660, height=2600)


def keep(page, path, top=None):
    "A picture of the panel, from the element `top` down."
    page.wait_for_timeout(1500)
    page.mouse.move(0, 0)
    panel = page.locator(PANEL)
    picture = Image.open(io.BytesIO(panel.screenshot())).convert('RGB')
    above = round(top.bounding_box()['y'] - panel.bounding_box()['y']) - 4 if top else 0
    picture.crop((0, max(0, above), *picture.size)).quantize(256).save(path, optimize=True)
    print(f'{path.stat().st_size/1000:6.0f} kB  {path}', flush=True)


def take(folder, dark=False):
    "Writes panel.png (a run at work), result.png (finished and measured) and map.png (one of its points) to `folder`."
    with (tempfile.TemporaryDirectory() as home, api.sync_playwright() as pw,
          opened_browser(pw, f'{home}/profile', viewport=VIEW) as browser, served_lab(f'{home}/lab', dark) as lab):
        panel_notebook(lab[0]/'panel.ipynb', LINE)
        page = open_notebook(browser, lab, 'panel.ipynb')
        run_all(page)
        press(page, 'Distil')
        page.wait_for_function(f'({POINTS})() > 60', timeout=300_000)
        keep(page, folder/'panel.png')
        wait_for_news(page, 'finished', 600)
        press(page, 'Evaluate')
        page.locator('.avdd-table th', has_text='whole').first.wait_for(state='attached', timeout=600_000)
        page.get_by_text('evaluation: at work').wait_for(state='detached', timeout=60_000)
        button(page, 'wall').click()
        page.locator('avdd-wall').wait_for(state='attached', timeout=60_000)
        keep(page, folder/'result.png', page.locator('.avdd-title'))
        button(page, 'map').click()
        page.get_by_text('walk from pair to pair').wait_for(timeout=90_000)
        page.wait_for_timeout(1000)
        click_point(page, page.locator('.js-plotly-plot').last, 605)       # 600 real pairs, then synthetic ones
        page.wait_for_selector('.avdd-card audio', timeout=20_000)
        keep(page, folder/'map.png', page.get_by_text('projection', exact=True))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', nargs='?', type=Path, default=Path(__file__).resolve().parents[1]/'nbs'/'images')
    parser.add_argument('--dark', action='store_true')
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    take(args.folder, args.dark)
