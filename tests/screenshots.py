"""The two pictures of the start page, taken from a real run in JupyterLab with a headless Chromium.

python tests/screenshots.py [FOLDER] [--dark]       (default folder: nbs/images; `make screenshots`; 2 minutes)
"""
import argparse
import tempfile
from pathlib import Path

from test_browser import api, open_notebook, opened_browser, served_lab
from test_browser_panel import POINTS, button, panel_notebook, press, run_all, wait_for_news

from avdd_nb.dev import small_png

LINE = ("panel('avdd', steps=200, ipc=1, data=dict(n_train=600, n_test=300), width=24, "
        "evaluation=dict(seeds=2, epochs=100, epochs_whole=15, width=24))")
PANEL = '.jp-OutputArea-output .widget-vbox >> nth=0'
VIEW = dict(width=1280, height=2400)


def keep(page, selector, path):
    "A picture of the first element that `selector` finds, in few colours."
    page.wait_for_timeout(1500)
    page.mouse.move(0, 0)
    path.write_bytes(small_png(page.locator(selector).first.screenshot(), 250_000))
    print(f'{path.stat().st_size/1000:6.0f} kB  {path}')


def take(folder, dark=False):
    "Writes panel.png (a run at work) and result.png (finished and measured) into `folder`."
    with (tempfile.TemporaryDirectory() as home, api.sync_playwright() as pw,
          opened_browser(pw, f'{home}/profile', viewport=VIEW) as browser, served_lab(f'{home}/lab', dark) as lab):
        panel_notebook(lab[0]/'panel.ipynb', LINE)
        page = open_notebook(browser, lab, 'panel.ipynb')
        run_all(page)
        press(page, 'Distil')
        page.wait_for_function(f'({POINTS})() > 60', timeout=300_000)
        keep(page, PANEL, folder/'panel.png')
        wait_for_news(page, 'finished', 600)
        press(page, 'Evaluate')
        page.locator('.avdd-table th', has_text='whole').first.wait_for(state='attached', timeout=600_000)
        button(page, 'wall').click()
        page.locator('avdd-wall').wait_for(state='attached', timeout=60_000)
        keep(page, PANEL, folder/'result.png')
        button(page, 'map').click()
        page.get_by_text('walk from pair to pair').wait_for(timeout=90_000)
        keep(page, PANEL, folder/'map.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', nargs='?', type=Path, default=Path(__file__).resolve().parents[1]/'nbs'/'images')
    parser.add_argument('--dark', action='store_true')
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    take(args.folder, args.dark)
