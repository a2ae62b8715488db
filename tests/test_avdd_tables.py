"The tables of the AVDD paper at a tiny scale: all have rows, shared runs are run once, a second start does nothing."
import subprocess
import sys
import time

import pytest


@pytest.fixture(scope='module')
def tables(repo):
    sys.path.insert(0, str(repo/'benchmarks'))
    import avdd_tables
    yield avdd_tables
    sys.path.remove(str(repo/'benchmarks'))


def call(repo, tmp_path, *words):
    done = subprocess.run([sys.executable, repo/'benchmarks/avdd_tables.py', '--scale', 'tiny', '--seeds', '1', '--out',
                           tmp_path/'runs', '--results', tmp_path/'avdd.csv', *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_rows_are_measured_once_and_kept(repo, tmp_path, tables):
    words = ['--tables', '2', '3', '8', '--rows', 'Random', 'AVDD', 'DM, sum', 'DM, ensemble', 'AVDD (factor l=2)',
             'Whole data']
    printed = call(repo, tmp_path, *words)
    rows = tables.read_rows(tmp_path/'avdd.csv')
    assert len({r['run'] for r in rows}) == 4                           # AVDD of Table 3 is the l = 2 of Table 8
    assert {r['head'] for r in rows} == {'ensemble', 'sum'}
    assert set(tables.rows_of(rows, '3', 'soundshapes', 1, scale='tiny')) == {'Random', 'DM', 'AVDD', 'Whole data'}
    assert set(tables.rows_of(rows, '2', 'soundshapes', 1, scale='tiny')) == {'DM, ensemble', 'DM, sum'}
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').rglob('*.json')}
    time.sleep(.01)
    assert call(repo, tmp_path, *words) == printed
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').rglob('*.json')} == stamps


def test_the_tables_name_real_fields(tables):
    from avdd_nb.methods.base import make_method, methods
    for table in tables.TABLES:
        for _label, method, options, _changes in tables.rows_asked(table):
            for scale in tables.SCALES:
                if method in methods(): make_method(method, **tables.settings(method, options, scale))


def test_rows_have_the_papers_names(tables):
    from avdd_nb.papers import paper_rows
    for table in ('3', '4 (left: losses)', '4 (right: herding and factor)', '7', '8', '11'):
        printed = set(paper_rows('AVDD', table, dataset='VGGS-10K').method)
        assert set(tables.TABLES[table]) <= printed | {'Herding', 'Random'}, table


def test_the_control_multiplies_what_the_weights_do(tables):
    for k in (1, 10, 20):
        _, options = tables.TABLES['control'][f'AVDD, λ = {k}']
        assert options['lam_icm'] == options['lam_cgm'] == k
        assert tables.TABLES['control'][f'DM, step size × {1 + 2*k}'][1]['lr'] == pytest.approx(.2*(1 + 2*k))
    for label, (_, options) in tables.TABLES['unequal'].items():
        alpha = options['lam_base'] + options['lam_icm'] + options['lam_cgm']
        assert alpha == pytest.approx(21) or 'β' not in label
        assert (options['lam_icm'] - options['lam_cgm'])/alpha == pytest.approx(float(label.split()[-1]))
