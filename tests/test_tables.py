"""The papers' tables as pages: every table has one, every page can be planned; slowly, every page runs."""
import re
import time

import pandas as pd
import pytest

from avdd_nb.core import UserError
from avdd_nb.papers import paper_rows, plain
from avdd_nb.sweep.plan import make_jobs, page_parameters, read_grid
from avdd_nb.sweep.tables import TABLES, Shown, run_table, table_jobs

# What this library cannot do yet. A row that waits for anything else is a mistake in the table.
WAITS = {'ImageBindDC 5'}


def pages(repo): return sorted((repo/'nbs'/'sweeps').glob('*_*[0-9s].ipynb'))


def test_every_table_has_its_page(repo):
    text = ''.join(p.read_text() for p in pages(repo))
    assert set(re.findall(r'run_table\(\\"([^"\\]+)\\"', text)) == set(TABLES)


def test_the_nightly_grid_has_every_page(repo):
    grid, = read_grid(repo/'nbs'/'sweeps'/'tables.yaml')
    assert sorted(grid['notebook']) == [p.stem for p in pages(repo) if p.stem not in ('run_one', 'whole_data')]
    assert len(make_jobs(grid)) == len(grid['notebook'])


def test_parameters_stand_one_on_a_line(repo):
    for path in pages(repo):
        assert {'dataset', 'seeds', 'device', 'out'} <= set(page_parameters(path)), path.name


@pytest.mark.parametrize('name', TABLES)
def test_rows_are_the_papers(name):
    table = TABLES[name]
    printed = {plain(m) for m in paper_rows(table.paper, table.number, **table.where, dataset=table.dataset).method}
    assert {plain(label) for label in table.rows} <= printed
    jobs, waiting = table_jobs(name)
    assert (name in WAITS) == bool(waiting), waiting
    assert jobs or name in WAITS


def test_data_that_are_missing_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_DATA', str(tmp_path))
    ask = dict(out=tmp_path/'out', workers=1)
    with pytest.raises(UserError, match='hf download'): run_table('AVDD 3', 'paper', 'ave', **ask)
    assert len(list(tmp_path.glob('out/*/jobs/*/failed.json'))) == 1        # the first one says it for all
    with pytest.raises(UserError, match='soundshapes'): run_table('AVDD 3', dataset='soundshape', **ask)


@pytest.mark.parametrize('name, judged', [('AVDD 8', 'accuracy'), ('AVDD 6', 'R@1')])
def test_every_page_has_a_picture(name, judged):
    means = pd.DataFrame([dict(label=l, ipc=10, seconds=1., metric=m, mean=v, std=float('nan'), n=1)
                          for l, v, m in (('a', 1., judged), ('b', 2., judged))])
    shown = Shown(TABLES[name], frame=means, means=means)
    assert judged in shown.over_budget().alt and judged in shown.over_time().alt
    assert Shown(TABLES[name]).over_budget() is None


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize('name', ['avdd_table8', 'avdd_table6', 'imagebinddc_figure4', 'mdm_table2'])
def test_a_page_runs(repo, tmp_path, name):
    papermill, start = pytest.importorskip('papermill'), time.time()
    done = papermill.execute_notebook(repo/'nbs'/'sweeps'/f'{name}.ipynb', tmp_path/'out.ipynb',
                                      dict(out=str(tmp_path/'out')), kernel_name='python3', progress_bar=False)
    print(f'{name}: {time.time() - start:.0f} s')
    shown = [o['data'].get('text/plain', '') for c in done.cells for o in c.get('outputs', []) if 'data' in o]
    assert any('paper' in text and 'whole data' in text for text in shown)
