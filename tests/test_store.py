"Files whole or absent under real kills and full disks, tensors that cannot run code, a cache for many processes."
import contextlib
import hashlib
import io
import json
import multiprocessing as mp
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avdd_nb import store
from avdd_nb.core import UserError

HERE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.int64, torch.bool]


def child(code, *args, **more):
    command = [sys.executable, '-c', code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def write_forever(path, pipe):
    i = 0
    while True:
        i += 1
        store.atomic_write(path, bytes([i % 251])*3_000_000)
        pipe.send(i)


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path, dice, seen = tmp_path/'file', random.Random(0), set()
    for _ in range(10):
        here, there = mp.Pipe(False)
        p = mp.get_context('fork').Process(target=write_forever, args=(path, there), daemon=True)
        p.start()
        last = here.recv()
        end = time.monotonic() + dice.random()*.1
        while time.monotonic() < end:
            data = path.read_bytes()
            seen.add((len(set(data)), len(data)))
        p.kill()
        p.join()
        there.close()
        with contextlib.suppress(EOFError):
            while here.poll(): last = here.recv()
        data = path.read_bytes()
        assert len(data) == 3_000_000 and len(set(data)) == 1
        assert data[0] in (last % 251, (last + 1) % 251)              # what was told is on the disk
    assert seen <= {(1, 3_000_000)}                                  # a reader never saw a mixture


def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    "Without the fsync in front, a power cut could leave the new name on an empty file."
    calls = []
    for name in ('fsync', 'replace'):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, plain=plain: calls.append(name) or plain(*a))
    store.atomic_write(tmp_path/'file', 'x')
    assert calls == ['fsync', 'replace', 'fsync']                     # bytes, name, folder


FULL = """
import resource, signal, sys
from avdd_nb.core import UserError
from avdd_nb.store import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try: atomic_write(sys.argv[1], b'x'*1_000_000)
except UserError as e: print('UserError', e)
"""

def test_full_disk_keeps_the_old_file(tmp_path):
    path = store.atomic_write(tmp_path/'file', 'old')
    out, err = child(FULL, path).communicate()
    assert out.startswith(f"UserError Could not write {path}: File too large") and not err
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']       # no half-written leftover


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('a file')
    with pytest.raises(UserError, match="Could not write"): store.atomic_write(tmp_path/'file'/'inner', 'x')
    with pytest.raises(UserError, match="Could not write"): store.write_json('/proc/nothing/here.json', {})
    with pytest.raises(UserError, match="Could not write"): store.atomic_write(tmp_path, 'x')


@HERE
@given(st.binary(max_size=300) | st.text(max_size=100))
def test_atomic_write_writes(tmp_path, data):
    path = store.atomic_write(tmp_path/'a'/'b', data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data) and len(os.listdir(path.parent)) == 1


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                           lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3), max_leaves=8)

@HERE
@given(json_values)
def test_json_round_trip(tmp_path, obj): assert store.read_json(store.write_json(tmp_path/'x.json', obj)) == obj


@pytest.mark.parametrize('data', [b'', b'{"a": 1', b'\xff\xfe', b'{"a": 1}}', bytes(100)])
def test_torn_json_is_one_sentence(tmp_path, data):
    (tmp_path/'x.json').write_bytes(data)
    with pytest.raises(UserError, match="x.json is not readable JSON"): store.read_json(tmp_path/'x.json')
    with pytest.raises(UserError, match="There is no file"): store.read_json(tmp_path/'y.json')


def test_json_where_no_file_can_be(tmp_path):
    (tmp_path/'file').write_text('a file')
    for path in (tmp_path/'file'/'config.json', tmp_path):
        with pytest.raises(UserError): store.read_json(path)


kinds = st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3))
tensors = st.dictionaries(st.text('abc.', min_size=1, max_size=4), kinds, min_size=1, max_size=4)

@HERE
@given(tensors, st.dictionaries(st.text(), json_values, max_size=2))
def test_tensors_round_trip(tmp_path, kinds, meta):
    made = {k: (torch.randn(shape)*50).to(dtype) for k, (dtype, shape) in kinds.items()}
    for save, load in ((store.save_tensors, store.load_tensors), (store.save_state, store.load_state)):
        back, m = load(save(tmp_path/f'{save.__name__}.safetensors', made, meta))
        assert m == meta and set(back) == set(made)
        for k, x in made.items():
            assert back[k].dtype == x.dtype and back[k].shape == x.shape and torch.equal(back[k], x)


def test_names_come_back_in_one_order(tmp_path):
    names = [f'{i:02}' for i in range(20)]
    path = store.save_tensors(tmp_path/'x.safetensors', {n: torch.zeros(1) for n in reversed(names)})
    assert list(store.load_tensors(path)[0]) == names


def test_strided_and_learning_tensors_are_saved(tmp_path):
    x = torch.arange(12.).view(3, 4)
    made = dict(t=x.t(), part=x[:, 1], shared=x, leaf=torch.ones(2, requires_grad=True), wide=torch.ones(1).expand(5))
    back, _ = store.load_tensors(store.save_tensors(tmp_path/'x', made))
    for k, v in made.items(): assert torch.equal(back[k], v) and not back[k].requires_grad


def test_any_changed_byte_is_noticed(tmp_path):
    path = store.save_tensors(tmp_path/'x', dict(a=torch.arange(6), b=torch.zeros(2)), dict(classes=['cat', 'dog']))
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 16]) + data[i+1:])
        with pytest.raises(UserError, match="does not match the SHA-256"): store.load_tensors(path)
    for cut in (0, 7, 8, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="does not match"): store.load_tensors(path)
    path.unlink()
    with pytest.raises(UserError, match="There is no file"): store.load_tensors(path)


def test_any_changed_byte_of_the_manifest_is_noticed_or_harmless(tmp_path):
    path = store.save_tensors(tmp_path/'x', dict(a=torch.arange(3)), dict(seed=12345))
    manifest = store.manifest_path(path)
    data, refused = manifest.read_bytes(), 0
    for i in range(len(data)):
        manifest.write_bytes(data[:i] + bytes([data[i] ^ 2]) + data[i+1:])
        try: assert torch.equal(store.load_tensors(path)[0]['a'], torch.arange(3))
        except UserError: refused += 1
    assert refused > 64                                     # each digit of the SHA-256 at least
    for text in ('[]', '{}', 'null', '{"sha256": 3}', '7'):
        manifest.write_text(text)
        with pytest.raises(UserError): store.load_tensors(path)


def bombs():
    class Bomb:
        def __reduce__(self): return os.system, ('touch /tmp/avdd_bomb_went_off',)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data.pkl', b'\0'*10_000_000)
    torch_file = io.BytesIO()
    torch.save(dict(a=torch.zeros(2)), torch_file)
    huge = json.dumps(dict(a=dict(dtype='F32', shape=[2**40], data_offsets=[0, 2**42]))).encode()
    return dict(pickle=pickle.dumps(Bomb()), zip=archive.getvalue(), torch=torch_file.getvalue(), text=b'hello, world',
                long_header=(2**62).to_bytes(8, 'little') + b'{}', empty=b'',
                huge=len(huge).to_bytes(8, 'little') + huge, list_header=(2).to_bytes(8, 'little') + b'[]',
                null_header=(4).to_bytes(8, 'little') + b'null')

@pytest.mark.parametrize('name', bombs())
def test_bombs_are_refused(tmp_path, name):
    data, path = bombs()[name], tmp_path/'x'
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not a tensor file"): store.load_state(path)
    store.write_json(store.manifest_path(path), dict(sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(UserError, match="is not a tensor file"): store.load_tensors(path)
    assert not Path('/tmp/avdd_bomb_went_off').exists()


def test_a_torn_checkpoint_is_refused(tmp_path):
    data = store.save_state(tmp_path/'x', dict(a=torch.arange(4.)), dict(step=3)).read_bytes()
    for cut in range(0, len(data), 7):
        (tmp_path/'x').write_bytes(data[:cut])
        with pytest.raises(UserError, match="is not a tensor file"): store.load_state(tmp_path/'x')


@HERE
@given(st.lists(st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False) | st.text(), max_size=2), max_size=5),
       st.data())
def test_events_survive_a_torn_last_line(tmp_path, events, data):
    path = tmp_path/'events.jsonl'
    path.unlink(missing_ok=True)
    assert store.read_events(path) == []
    for e in events: store.append_event(path, e)
    assert store.read_events(path) == events
    if not events: return
    whole = path.read_bytes()
    last = len(whole.rstrip(b'\n').split(b'\n')[-1])
    path.write_bytes(whole[:-1 - data.draw(st.integers(1, last))])
    assert store.read_events(path) == events[:-1]
    store.truncate_events(path, 0)                          # mends the torn line, so that the next one starts a line
    store.append_event(path, dict(step=9))
    assert store.read_events(path)[-1] == dict(step=9)


@HERE
@given(st.integers(0, 8), st.integers(0, 8))
def test_truncate_events(tmp_path, n, step):
    path = tmp_path/'events.jsonl'
    path.write_text(''.join(json.dumps(dict(step=i)) + '\n' for i in range(1, n + 1)) + '{"step": 1')
    store.truncate_events(path, step)
    assert path.read_text() == ''.join(json.dumps(dict(step=i)) + '\n' for i in range(1, min(n, step) + 1))


HOLDER = """
import sys, time
from avdd_nb.store import lock
with lock(sys.argv[1], wait=False) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""

def test_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    path = tmp_path/'.lock'
    holder = child(HOLDER, path)
    assert holder.stdout.readline() == 'True\n'
    with store.lock(path, wait=False) as mine: assert mine is False
    holder.kill()
    holder.communicate()
    with store.lock(path, wait=False) as mine: assert mine is True
    with store.lock(path) as mine: assert mine is True


def _make(folder):
    def make():
        (Path(folder)/f'made-{os.getpid()}').touch()
        time.sleep(.2)
        return dict(x=torch.arange(5)), dict(by=os.getpid())
    return make

def _ask(folder):
    tensors, meta = store.cached('kind', dict(a=1), _make(folder))
    return tensors['x'].tolist(), meta['by']

def test_six_processes_make_one_entry(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))
    with mp.get_context('fork').Pool(6) as pool: answers = pool.map(_ask, [tmp_path]*6, chunksize=1)
    assert len(list(tmp_path.glob('made-*'))) == 1 and {len(a) for a in answers} == {2}
    assert all(x == [0, 1, 2, 3, 4] for x, _ in answers) and len({by for _, by in answers}) == 1


DIES = """
import os, signal, sys, torch
from avdd_nb.store import cached
def make():
    print('making', flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
cached('kind', 'key', make)
"""

def test_cache_after_the_maker_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path))
    p = child(DIES)
    assert p.communicate()[0] == 'making\n' and p.returncode == -signal.SIGKILL
    assert store.cached('kind', 'key', lambda: (dict(x=torch.ones(1)), {}))[0]['x'].item() == 1


def test_cache_keys_and_damage(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path))
    calls = []
    def get(key):
        def make(): return calls.append(key), (dict(x=torch.full((2,), float(len(calls)))), dict(n=len(calls)))
        return store.cached('kind', key, lambda: make()[1])
    assert get(dict(a=1, b=2))[1] == get(dict(b=2, a=1))[1] == dict(n=1)
    assert get(dict(a=1, b=3))[1] == dict(n=2) and len(calls) == 2
    for suffix in ('.safetensors', '.safetensors.json'):
        for file in (tmp_path/'kind').glob(f'*{suffix}'): file.write_bytes(file.read_bytes()[:-3] + b'???')
        n = len(calls)
        again = get(dict(a=1, b=2))
        assert again[1] == dict(n=n + 1) == get(dict(a=1, b=2))[1] and again[0]['x'].tolist() == [n + 1]*2
    for file in (tmp_path/'kind').glob('*.safetensors'): file.unlink()
    n = len(calls)
    assert get(dict(a=1, b=2))[1] == dict(n=n + 1)
    with pytest.raises(ZeroDivisionError): store.cached('kind', 'bad', lambda: 1/0)
    assert store.cached('kind', 'bad', lambda: (dict(x=torch.ones(1)), {}))[1] == {}


def test_what_earlier_code_made_is_never_read(tmp_path, monkeypatch):
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path))
    make = lambda n: lambda: (dict(x=torch.full((1,), float(n))), {})
    assert store.cached('kind', 'key', make(1))[0]['x'].item() == 1
    monkeypatch.setattr(store, 'REVISION', store.REVISION + 1)
    assert store.cached('kind', 'key', make(2))[0]['x'].item() == 2
    assert store.cached('kind', 'key', make(3))[0]['x'].item() == 2
