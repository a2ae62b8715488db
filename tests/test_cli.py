"The command line as a person meets it: one sentence for bad input, lists and JSON that parse, Ctrl-C and on."
import json
import signal
import subprocess
import sys
import time

import pytest

CODE = "from avdd_nb.cli import main; main()"
FEW = ['--data', 'n_train=60', '--data', 'n_test=30']
SMALL = [*FEW, '--set', 'width=4', '--set', 'features=random', '--set', 'pool_size=4']


@pytest.fixture(autouse=True, scope='module')
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AVDD_CACHE', str(tmp_path_factory.mktemp('cache')))
        m.setenv('OMP_NUM_THREADS', '1')
        m.setenv('COLUMNS', '200')
        m.chdir(tmp_path_factory.mktemp('here'))
        yield


def avdd(*args):
    return subprocess.run([sys.executable, '-c', CODE, *map(str, args)], capture_output=True, text=True, timeout=120)


def direct(capsys, monkeypatch, *args):
    "The same in this process: (exit code, stdout, stderr). Saves a second of imports per case."
    from avdd_nb.cli import main
    monkeypatch.setattr(sys, 'argv', ['avdd', *map(str, args)])
    with pytest.raises(SystemExit) as e:
        main()
        sys.exit(0)
    out, err = capsys.readouterr()
    return e.value.code or 0, out, err


@pytest.fixture(scope='module')
def folders(tmp_path_factory, surroundings):
    "A finished run, and copies of it with a flaw."
    root = tmp_path_factory.mktemp('folders')
    p = avdd('distill', '--method', 'random', *FEW, '--out', root/'run')
    assert p.returncode == 0, p.stderr
    import shutil
    for name in ('config', 'torn config', 'result', 'no result', 'unfinished', 'manifest'):
        shutil.copytree(root/'run', root/name)
    (root/'config'/'config.json').write_text('[]')
    (root/'torn config'/'config.json').write_bytes((root/'run'/'config.json').read_bytes()[:40])
    result = root/'result'/'result.safetensors'
    result.write_bytes(result.read_bytes()[:-1] + b'\xff')
    (root/'no result'/'result.safetensors').unlink()
    (root/'unfinished'/'done.json').unlink()
    (root/'manifest'/'result.safetensors.json').write_text('{}')
    (root/'file').write_text('not a folder')
    (root/'photos').mkdir()
    (root/'photos'/'cat.jpg').touch()
    return root


def sentence(code, out, err):
    lines = [line for line in err.splitlines() if line.strip() and 'step/s' not in line and '|' not in line]
    assert code == 2, (code, out, err)
    assert 'Traceback' not in err + out and len(lines) <= 3, err
    assert lines[-1].startswith('avdd: '), err
    return lines[-1]


BAD_DISTILL = {
    'dataset': (['--dataset', 'soundshape'], "did you mean 'soundshapes'"),
    'unknown dataset': (['--dataset', 'zzzzzz'], "no data set called 'zzzzzz'"),
    'method': (['--method', 'avd'], "did you mean 'avdd'"),
    'base class as a method': (['--method', 'matching'], "no method called 'matching'"),
    'field': (['--set', 'momentun=0.5'], "did you mean 'momentum'"),
    'field of another method': (['--method', 'dm', '--set', 'lam_icm=1'], "lam_icm"),
    'field called name': (['--set', 'name=x'], "name"),
    'option': (['--data', 'n_trian=60'], "did you mean 'n_train'"),
    'option called name': (['--data', 'name=x'], "name"),
    'option called root': (['--data', 'root=x'], "root"),
    'no equals sign': (['--set', 'lr'], "name=value"),
    'no equals sign in data': (['--data', 'n_train'], "name=value"),
    'out of range': (['--set', 'lr=-1'], "lr is -1.0, outside its range"),
    'not a number': (['--set', 'lr=fast'], "lr is 'fast'"),
    'nan': (['--set', 'lr=nan'], "lr is nan"),
    'not a whole number': (['--set', 'pool_size=2.5'], "pool_size is '2.5'"),
    'not a truth value': (['--set', 'per_class_steps=maybe'], "per_class_steps is 'maybe'"),
    'choice': (['--set', 'init=herdin'], "did you mean 'herding'"),
    'device': (['--device', 'gpu'], "no device called 'gpu'"),
    'data size': (['--data', 'n_train=many'], "n_train is 'many'"),
    'data size too small': (['--data', 'n_train=3'], ""),
    'augmentation': ([*SMALL, '--set', 'strategy=flipp'], "flip"),
    'more per class than there are': ([*FEW, '--ipc', '100', '--method', 'random'], "100 are asked for"),
    'modality': (['--data', 'modalities=audio,imag'], "did you mean 'image'"),
    'caption in tiles': ([*SMALL, '--data', 'modalities=image,caption'], ""),
    'difficulty': (['--data', 'n_train=60', '--data', 'difficulty=nan'], "difficulty"),
    'image size': (['--data', 'n_train=60', '--data', 'image_size=-3'], "image_size"),
}

@pytest.mark.parametrize('name', BAD_DISTILL)
def test_bad_distill(capsys, monkeypatch, tmp_path, name):
    args, words = BAD_DISTILL[name]
    assert words in sentence(*direct(capsys, monkeypatch, 'distill', '--steps', 1, '--out', tmp_path/'r', *args))
    assert not (tmp_path/'r'/'result.safetensors').exists()


BAD_FOLDERS = {'file': "Could not write", 'file/deeper': "Could not write", 'photos': "holds no run",
               'run': "another run", 'config': "config.json", 'torn config': "config.json"}

@pytest.mark.parametrize('name', BAD_FOLDERS)
def test_bad_folders(capsys, monkeypatch, folders, name):
    told = sentence(*direct(capsys, monkeypatch, 'distill', *SMALL, '--steps', 1, '--out', folders/name))
    assert BAD_FOLDERS[name] in told and str(folders/name.split('/')[0]) in told


BAD_RUNS = {'nowhere': "There is no file", 'file': "file", 'photos': "There is no file", 'config': "config.json",
            'torn config': "config.json", 'result': "SHA-256", 'no result': "result.safetensors", 'manifest': "SHA-256",
            'unfinished': "--resume"}

@pytest.mark.parametrize('name', BAD_RUNS)
def test_bad_runs(capsys, monkeypatch, folders, name):
    assert BAD_RUNS[name] in sentence(*direct(capsys, monkeypatch, 'evaluate', folders/name, '--seeds', 1))


BAD_EVALUATE = {
    'protocol': (['--protocol', 'papper'], "did you mean 'paper'"),
    'field': (['--set', 'epoch=3'], "did you mean 'epochs'"),
    'range': (['--set', 'epochs=0'], "epochs is 0"),
    'number': (['--set', 'lr=slow'], "lr is 'slow'"),
    'schedule': (['--set', 'schedule=cosin'], "did you mean 'cosine'"),
    'network': (['--set', 'arch=ConvNe', '--set', 'epochs=1'], "did you mean 'ConvNet'"),
    'device': (['--device', 'tpu'], "no device called 'tpu'"),
    'no equals sign': (['--set', 'lr'], "name=value"),
}

@pytest.mark.parametrize('name', BAD_EVALUATE)
def test_bad_evaluate(capsys, monkeypatch, folders, name):
    args, words = BAD_EVALUATE[name]
    assert words in sentence(*direct(capsys, monkeypatch, 'evaluate', folders/'run', '--seeds', 1, *args))


BAD_DATA = {'action': (['lst'], "did you mean 'list'"), 'no name': (['prepare'], "Which data set"),
            'name': (['prepare', 'avmnst'], "did you mean 'avmnist'"),
            'option': (['prepare', 'soundshapes', '--data', 'sead=3'], "did you mean 'seed'"),
            'nothing there': (['prepare', 'videos', '--data-root', '/nonexistent'], "")}

@pytest.mark.parametrize('name', BAD_DATA)
def test_bad_data(capsys, monkeypatch, name):
    args, words = BAD_DATA[name]
    assert words in sentence(*direct(capsys, monkeypatch, 'data', *args))


BAD_USAGE = [['distill', '--methd', 'dm'], ['distill', '--ipc', 'one'], ['distill', '--ipc', '0'],
             ['distill', '--steps', '-1'], ['distill', 'extra'], ['distil'], ['evaluate'],
             ['evaluate', 'x', '--seeds', '0']]

@pytest.mark.parametrize('args', BAD_USAGE, ids=' '.join)
def test_bad_usage(capsys, monkeypatch, args):
    "What the option parser itself refuses: it names the word, points to --help, and ends with 2 too."
    code, out, err = direct(capsys, monkeypatch, *args)
    assert code == 2 and 'Traceback' not in out + err and 'Usage' in err


def test_one_bad_input_through_a_real_process(tmp_path):
    p = avdd('distill', '--method', 'avd', '--out', tmp_path/'r')
    assert "did you mean 'avdd'" in sentence(p.returncode, p.stdout, p.stderr) and not (tmp_path/'r').exists()


def test_data_lists_what_is_there(capsys, monkeypatch):
    code, out, _ = direct(capsys, monkeypatch, 'data')
    assert code == 0 and all(name in out for name in ('soundshapes', 'avmnist', 'videos'))
    code, out, _ = direct(capsys, monkeypatch, 'data', 'prepare', 'soundshapes', *FEW)
    assert code == 0 and '60 pairs in 10 classes' in out and '30 pairs' in out


def test_distil_then_evaluate(capsys, monkeypatch, tmp_path):
    out = tmp_path/'r'
    code, told, _ = direct(capsys, monkeypatch, 'distill', *SMALL, '--steps', 3, '--out', out)
    assert code == 0 and str(out) in told and (out/'done.json').exists()
    assert direct(capsys, monkeypatch, 'distill', *SMALL, '--steps', 3, '--out', out)[0] == 0    # finished: at once
    quick = ['--set', 'epochs=1', '--set', 'width=4']
    code, told, err = direct(capsys, monkeypatch, 'evaluate', out, '--seeds', 2, '--json', *quick)
    rows = json.loads(told)
    assert code == 0 and len(rows) == 2*4 and {r['seed'] for r in rows} == {0, 1}
    assert all(0 <= r['accuracy'] <= 100 and r['method'] == 'avdd' and r['protocol'].startswith('paper') for r in rows)
    code, told, err = direct(capsys, monkeypatch, 'evaluate', out, '--seeds', 1, *quick)
    assert code == 0 and 'audio' in told and 'product' in told


def test_default_folder_tells_runs_apart(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        args = ['distill', '--method', 'random', *FEW, '--seed', seed]
        assert direct(capsys, monkeypatch, *args)[0] == 0
    assert len(list((tmp_path/'runs').iterdir())) == 2


def test_doctor_and_help():
    p = avdd('doctor')
    assert p.returncode == 0 and 'torch' in p.stdout and 'Traceback' not in p.stderr
    p = avdd('--help')
    assert p.returncode == 0 and all(c in p.stdout for c in ('distill', 'evaluate', 'data', 'demo', 'lab', 'doctor'))


def heed_ctrl_c():
    "A test run started in the background of a script has SIGINT ignored, and its children inherit that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_130_and_can_be_resumed(tmp_path):
    def start(out, *more):
        command = [sys.executable, '-c', CODE, 'distill', *SMALL, '--steps', '60', '--out', str(out), *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                preexec_fn=heed_ctrl_c)
    whole = start(tmp_path/'whole')
    p, events = start(tmp_path/'r'), tmp_path/'r'/'events.jsonl'
    while p.poll() is None and not (events.exists() and events.read_text().count('\n') > 3): time.sleep(.005)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate()
    assert p.returncode == 130 and 'Traceback' not in err and '--resume' in err
    assert (tmp_path/'r'/'checkpoint.safetensors').exists() and not (tmp_path/'r'/'done.json').exists()
    done = events.read_text().count('\n')
    p = start(tmp_path/'r')
    assert '--resume' in sentence(p.wait(), *p.communicate())
    p = start(tmp_path/'r', '--resume')
    assert p.communicate() and p.returncode == 0 and whole.communicate() and whole.returncode == 0
    steps = [json.loads(line)['step'] for line in events.read_text().splitlines()]
    assert steps == list(range(1, 61)) and done < 60
    assert (tmp_path/'r'/'result.safetensors').read_bytes() == (tmp_path/'whole'/'result.safetensors').read_bytes()


def test_under_nohup_a_closed_terminal_stops_nothing():
    from avdd_nb import cli
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        cli._stop_like_ctrl_c()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for n, handler in before.items(): signal.signal(n, handler)


def test_watching_a_folder_without_a_sweep(tmp_path):
    from avdd_nb import cli
    from avdd_nb.core import UserError
    from avdd_nb.sweep.plan import make_jobs, save_plan
    (tmp_path/'grid.yaml').write_text('method: random')
    with pytest.raises(UserError, match='holds no sweep'): cli._plan(tmp_path/'nowhere', None, True, watch=True)
    jobs = save_plan(make_jobs(dict(method='random'), baselines=False), tmp_path/'out')
    for grid, out in ((tmp_path/'out', None), (tmp_path/'grid.yaml', tmp_path/'out')):
        assert cli._plan(grid, out, True, watch=True) == (jobs, tmp_path/'out')
