"""The same plan on a Ray cluster of two machines (on this one), one killed in the middle; and under submitit."""
import signal
import time
from pathlib import Path

import psutil
import pytest

from avdd_nb.core import UserError
from avdd_nb.store import read_events
from avdd_nb.sweep import on_ray, on_slurm
from avdd_nb.sweep.local import sweep
from avdd_nb.sweep.plan import job_folder, make_jobs
from avdd_nb.sweep.results import gather

GRID = dict(dataset='soundshapes', method='dm', ipc=1, seed=[0, 1, 2, 3], steps=20, seeds=1,
            data_options=dict(n_train=100, n_test=40), method_options=dict(width=8, pool_size=2),
            protocol_options=dict(width=8, epochs=1))


def table(folder):
    keys = ['label', 'ipc', 'seed', 'eval_seed', 'modality', 'fusion', 'digest', 'value']
    return gather(folder)[keys].sort_values(keys).reset_index(drop=True)


def wait_until(happens, seconds=300):
    until = time.time() + seconds
    while not happens():
        assert time.time() < until, 'it did not happen in time'
        time.sleep(.05)


def be_patient(monkeypatch, seconds=150):
    "Ray gives a new node 30 s to report, which a busy machine exceeds: ask for longer."
    from ray._private import services
    ask = services.get_node
    def patient(*args, **kw):
        until = time.time() + seconds
        while True:
            try: return ask(*args, **kw)
            except RuntimeError:
                if time.time() > until: raise
                time.sleep(.5)
    monkeypatch.setattr(services, 'get_node', patient)


@pytest.fixture
def two_machines(monkeypatch):
    "A Ray cluster: a head without CPUs and two nodes of one CPU each."
    monkeypatch.setenv('RAY_AUTH_MODE', 'disabled')
    ray = pytest.importorskip('ray', reason="pip install 'avdd_nb[ray]'")
    from ray.cluster_utils import Cluster
    be_patient(monkeypatch)
    small = dict(object_store_memory=80*2**20)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False, **small))
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    cluster.wait_for_nodes(300)
    yield ray, cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('shared', [True, False])
def test_one_of_two_machines_dies(two_machines, tmp_path, monkeypatch, shared):
    ray, cluster, nodes = two_machines
    jobs, lost = make_jobs(GRID, baselines=False), []
    if not shared: monkeypatch.setattr(on_ray, 'atomic_write', lambda path, data: None if Path(path).name == '.token'
                                       else real(path, data))
    def kill_one():
        begun = list(tmp_path.glob('ray/runs/*/events.jsonl')) if shared else [1]
        if not lost and len(begun) >= 1: lost.append(cluster.remove_node(nodes[0], allow_graceful=False) or True)
    states = on_ray.sweep(jobs, tmp_path/'ray', bare=True, address=cluster.address, show=kill_one)
    assert lost and set(states.values()) == {('done', '')}, states
    sweep(jobs, tmp_path/'here', workers=1, bare=True)
    assert table(tmp_path/'ray').equals(table(tmp_path/'here'))


real = on_ray.atomic_write


def test_no_cluster(monkeypatch, tmp_path):
    pytest.importorskip('ray', reason="pip install 'avdd_nb[ray]'")
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    with pytest.raises(UserError, match='no Ray cluster'):
        on_ray.sweep(make_jobs(GRID, baselines=False), tmp_path, address='127.0.0.1:1')


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_preempted_array_job_goes_on(tmp_path):
    pytest.importorskip('submitit', reason="pip install 'avdd_nb[slurm]'")
    jobs, tasks = make_jobs(GRID | dict(seed=0, steps=150), baselines=False), []
    events = lambda: [e for p in tmp_path.glob('slurm/runs/*/events.jsonl') for e in read_events(p)]
    def preempt():
        if not tasks and len(events()) > 5:
            tasks.append(1)
            task, = psutil.Process(controller(tmp_path)).children()
            task.send_signal(signal.SIGUSR2)                    # submitit's word for: the node is wanted back
    states = on_slurm.sweep(jobs, tmp_path/'slurm', bare=True, cluster='local', show=preempt, timeout_min=20)
    assert tasks and set(states.values()) == {('done', '')}, states
    said = [e.get('state') for e in read_events(job_folder(tmp_path/'slurm', jobs[0])/'events.jsonl')]
    assert said == ['running', 'stopped', 'running', 'done']
    assert [e['step'] for e in events()] == list(range(1, 151))
    sweep(jobs, tmp_path/'here', workers=1, bare=True)
    assert table(tmp_path/'slurm').equals(table(tmp_path/'here'))


def controller(tmp_path):
    "The process that stands for the node of the only local job: its id is the job's."
    return int(next((tmp_path/'slurm'/'slurm').glob('*_submitted.pkl')).name.split('_')[0])


def test_an_array_in_this_process(tmp_path):
    pytest.importorskip('submitit', reason="pip install 'avdd_nb[slurm]'")
    grid = GRID | dict(method='random', method_options={}, seed=[0, 1])
    states = on_slurm.sweep(make_jobs(grid, baselines=False), tmp_path, bare=True, cluster='debug')
    assert set(states.values()) == {('done', '')} and len(states) == 2
