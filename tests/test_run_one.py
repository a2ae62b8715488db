"""The page behind `make demo`, run small through papermill: it ends in a report that holds what it says."""
import json

import pytest

papermill = pytest.importorskip('papermill', reason='papermill runs the page')


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('method', ['avdd', 'random'])
def test_one_run_from_data_to_report(repo, tmp_path, method):
    parameters = dict(out=str(tmp_path/'out'), method=method, steps=2, seeds=1,
                      data_options=dict(n_train=60, n_test=20),
                      method_options=dict(pool_size=1, width=8) if method == 'avdd' else {},
                      protocol_options=dict(width=8, epochs=1, epochs_whole=1))
    papermill.execute_notebook(repo/'nbs'/'sweeps'/'run_one.ipynb', tmp_path/'done.ipynb', parameters,
                               kernel_name='python3', progress_bar=False, cwd=str(tmp_path))
    report = (tmp_path/'out'/'report.html').read_text()
    assert all(name in report for name in (method, 'undistilled start', 'random pairs', 'whole data'))
    assert report.count('<audio') >= 20
    done = json.loads((tmp_path/'done.ipynb').read_text())
    shown = [o['data'] for c in done['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert len(shown) >= 4 and all('text/plain' in d for d in shown)


def test_parameters_can_be_read_one_by_one(repo):
    names = papermill.inspect_notebook(repo/'nbs'/'sweeps'/'run_one.ipynb')
    assert {'dataset', 'method', 'ipc', 'steps', 'seed', 'seeds', 'data_root', 'out', 'device'} <= set(names)
