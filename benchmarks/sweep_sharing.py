"""What a sweep saves by sharing: 24 jobs (4 methods × 3 budgets × 2 seeds) against 24 runs with caches of their own.

    python benchmarks/sweep_sharing.py      # a few minutes on two cores; writes results/sweep_sharing.txt

Both do the same jobs to the same numbers, two at a time, without notebooks. The sweep computes real statistics,
starting pairs and data once for all jobs; a separate run starts a process and computes all of it again.
"""
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GRID = dict(dataset='soundshapes', method=['herding', 'dm', 'dm+h+f', 'avdd'], ipc=[1, 2, 5], seed=[0, 1], steps=20,
            seeds=1, data_options=dict(n_train=1000, n_test=200), protocol_options=dict(width=16, epochs=5),
            method_options=dict(width=32, pool_size=10, real_batch=0))


def cpu():
    "Seconds of CPU that finished child processes have used."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(work):
    "(wall seconds, CPU seconds) of work()."
    wall, before = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - wall, cpu() - before


def separate(jobs, folder):
    "Every job in a folder, in a process and with a cache of its own, two at a time."
    import subprocess
    code = ('import sys; from avdd_nb.sweep.job import bare, run_job; from avdd_nb.sweep.plan import read_plan; '
            'run_job(read_plan(sys.argv[1])[0], sys.argv[1], bare)')

    def one(job):
        from avdd_nb.sweep.plan import save_plan
        here = folder/job.name
        save_plan([job], here)
        env = os.environ | dict(AVDD_CACHE=str(here/'cache'), OMP_NUM_THREADS='1')
        subprocess.run([sys.executable, '-c', code, str(here)], env=env, check=True)
    with ThreadPoolExecutor(2) as pool: list(pool.map(one, jobs))


def main():
    from avdd_nb.store import read_json
    from avdd_nb.sweep.job import job_folder
    from avdd_nb.sweep.local import sweep
    from avdd_nb.sweep.plan import make_jobs
    jobs, tmp = make_jobs(GRID, baselines=False), Path(tempfile.mkdtemp())
    os.environ['AVDD_CACHE'] = str(tmp/'cache')
    shared = timed(lambda: sweep(jobs, tmp/'sweep', 2, bare=True))
    alone = timed(lambda: separate(jobs, tmp/'alone'))
    numbers = lambda folder, job: [r['accuracy'] for r in read_json(job_folder(folder, job)/'rows.json')]
    same = all(numbers(tmp/'sweep', j) == numbers(tmp/'alone'/j.name, j) for j in jobs)
    lines = [f'{len(jobs)} jobs, two at a time; {platform.machine()}, {os.cpu_count()} cores; same numbers: {same}',
             f'{"":24}{"wall s":>10}{"CPU s":>10}',
             f'{"one sweep":24}{shared[0]:10.1f}{shared[1]:10.1f}',
             f'{"24 separate runs":24}{alone[0]:10.1f}{alone[1]:10.1f}',
             f'{"sweep / separate":24}{shared[0]/alone[0]:10.2f}{shared[1]/alone[1]:10.2f}']
    text = '\n'.join(lines) + '\n'
    print(text, flush=True)
    (Path(__file__).parent/'results'/'sweep_sharing.txt').write_text(text)
    assert same, 'sharing changed a number'


if __name__ == '__main__':
    main()
