"""A distilled set on its way: through folders, a web server that cuts, changes and refuses, and a hub on 127.0.0.1."""
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from avdd_nb.core import UserError
from avdd_nb.hub import card, digest, export, listing, pull, push, verify
from avdd_nb.runs import make_config, run
from avdd_nb.store import read_json, write_json
from avdd_nb.synset import load_synset


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run with an evaluation."
    out = tmp_path_factory.mktemp('hub')/'run'
    config = make_config('soundshapes', 'random', 1, data=dict(n_train=40, n_test=20))
    for _ in run(config, out): pass
    rows = [dict(method='random', ipc=1, protocol='paper', digest='abc', arch='ConvNet', width=8, epochs=1, n_train=10,
                 seed=s, modality='AV', fusion='mean', accuracy=50. + s, seconds=1.) for s in (0, 1)]
    write_json(out/'evaluation-paper.json', rows)
    return out


@pytest.fixture(scope='module')
def folder(finished): return export(finished, finished.parent/'shared')


class Server(ThreadingHTTPServer):
    "Serves `files` (path → bytes); `cut`, `changed`, `refused` are names that arrive so, as often as they are listed."
    daemon_threads = True

    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.cut, self.changed, self.refused, self.asked = files, [], [], [], []
        self.repos, self.sha, self.tokens = set(), 'a'*40, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def answer(self, code, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        headers.setdefault('Content_Length', len(body))
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def misbehaves(self, how, name):
        if self.command == 'HEAD' or name not in how: return False
        how.remove(name)
        return True

    def do_GET(self):
        s, path = self.server, self.path.split('?')[0]
        name = path.rsplit('/', 1)[-1]
        s.asked.append(path)
        if path.startswith('/api/datasets/'): return self.repo_info(path)
        data = s.files.get(name)
        if data is None: return self.answer(404, {'error': 'not found'})
        if self.misbehaves(s.refused, name): return self.answer(403, {'error': 'go away'})
        if self.misbehaves(s.changed, name): data = data[:-1] + bytes([data[-1] ^ 1])
        headers = dict(ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=s.sha, X_Linked_Size=len(data))
        if self.misbehaves(s.cut, name):
            self.close_connection = True
            return self.answer(200, data[:len(data)//2], Content_Length=len(data), **headers)
        self.answer(200, data, **headers)

    do_HEAD = do_GET

    def repo_info(self, path):
        repo = '/'.join(path.split('/')[3:5])
        if repo not in self.server.repos: return self.answer(404, {'error': 'none'}, X_Error_Code='RepoNotFound')
        self.answer(200, dict(id=repo, sha=self.server.sha, siblings=[], private=True))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        s, path = self.server, self.path.split('?')[0]
        s.tokens.append(self.headers.get('Authorization'))
        if path == '/api/repos/create':
            asked = json.loads(body)
            s.repos.add(f"{asked.get('organization') or 'me'}/{asked['name']}")
            return self.answer(200, dict(url=f"{s.url}/datasets/me/{asked['name']}"))
        if '/preupload/' in path:
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]
            return self.answer(200, dict(files=files))
        if '/commit/' in path: return self.commit(body)
        if path.endswith('/validate-yaml'): return self.answer(200, dict(errors=[], warnings=[]))
        self.answer(404, {'error': path})

    def commit(self, body):
        s = self.server
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry['key'] == 'file': s.files[entry['value']['path']] = base64.b64decode(entry['value']['content'])
        s.sha = hashlib.sha1(body).hexdigest()
        where = f'{s.url}/datasets/me/set/commit/{s.sha}'
        self.answer(200, dict(commitUrl=where, commitOid=s.sha, pullRequestUrl=None))


@pytest.fixture
def web(folder):
    server = Server({p.name: p.read_bytes() for p in folder.iterdir()})
    yield server
    server.shutdown()
    server.server_close()


def same(a, b):
    a, b = verify(a), verify(b)
    return all(torch.equal(a.tensors[m], b.tensors[m]) for m in a.tensors) and a.classes == b.classes


# -- folder and card --------------------------------------------------------------------------------------------------
def test_the_card_says_what_matters(finished, folder):
    text = (folder/'README.md').read_text()
    assert text == card(finished)
    for word in ('license: other', 'made by this library', '50.5', 'abc', '![', 'soundshapes', 'synthetic.safetensors'):
        assert word in text, word
    assert (folder/'pairs.png').read_bytes()[:4] == b'\x89PNG'


def test_what_is_exported_is_what_was_made(finished, folder, tmp_path):
    assert digest(folder/'synthetic.safetensors') == digest(finished/'result.safetensors')
    assert same(pull(folder, tmp_path/'copy'), folder)
    with pytest.raises(UserError, match='not empty'): export(finished, folder)
    with pytest.raises(UserError, match='not empty'): pull(folder, folder)


@pytest.mark.parametrize('name', ['../evil', '/etc/passwd', '.hidden', 'a/b', '', 'files.json', 'x'*200])
def test_names_that_leave_the_folder(folder, tmp_path, name):
    found = read_json(folder/'files.json')
    found['files'][name] = dict(sha256='0'*64, bytes=1)
    path = write_json(tmp_path/'files.json', found)
    with pytest.raises(UserError, match='do not trust'): listing(path)


@pytest.mark.parametrize('found', [[], {}, dict(format='x'), dict(format='avdd_nb distilled set'),
                                   dict(format='avdd_nb distilled set', files=[1]),
                                   dict(format='avdd_nb distilled set', files=dict(a=1)),
                                   dict(format='avdd_nb distilled set', files={})])
def test_lists_that_are_none(tmp_path, found):
    with pytest.raises(UserError): listing(write_json(tmp_path/'files.json', found))


def test_a_folder_that_is_not_whole(folder, tmp_path):
    copy = pull(folder, tmp_path/'copy')
    (copy/'pairs.png').unlink()
    with pytest.raises(UserError, match='pairs.png'): verify(copy)
    with pytest.raises(UserError, match='pairs.png'): pull(copy, tmp_path/'again')
    assert not (tmp_path/'again').exists() and not [p for p in tmp_path.iterdir() if p != copy]


def test_nowhere(tmp_path):
    with pytest.raises(UserError, match='no folder'): pull('no such place', tmp_path/'x')


# -- the web ----------------------------------------------------------------------------------------------------------
def test_from_the_web(web, folder, tmp_path):
    assert same(pull(web.url, tmp_path/'copy', sha256=digest(folder/'files.json')), folder)


@pytest.mark.parametrize('how', ['cut', 'changed', 'refused'])
def test_it_is_tried_again(web, folder, tmp_path, how):
    setattr(web, how, ['synthetic.safetensors', 'pairs.png'])
    assert same(pull(f'{web.url}/', tmp_path/'copy'), folder)


@pytest.mark.parametrize('how', ['cut', 'changed', 'refused'])
def test_it_is_given_up(web, tmp_path, how):
    setattr(web, how, ['synthetic.safetensors']*99)
    with pytest.raises(UserError, match='synthetic.safetensors could not be fetched'): pull(web.url, tmp_path/'copy')
    assert list(tmp_path.iterdir()) == []


def test_another_set_than_the_one_asked_for(web, tmp_path):
    with pytest.raises(UserError): pull(web.url, tmp_path/'copy', sha256='0'*64)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='could not be fetched'): pull('http://127.0.0.1:9', tmp_path/'copy')


# -- the hub ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip('huggingface_hub', reason="pip install 'avdd_nb[hub]'")
    monkeypatch.setenv('HF_HOME', str(tmp_path/'hf'))
    server = Server({})
    yield server
    server.shutdown()
    server.server_close()


def test_pushed_and_pulled(hub, folder, tmp_path):
    there = push(folder, 'me/set', token='hf_test', endpoint=hub.url)
    assert there == dict(repo='me/set', revision=hub.sha, sha256=digest(folder/'files.json'))
    assert set(hub.tokens) == {'Bearer hf_test'}
    copy = pull('me/set', tmp_path/'copy', there['revision'], there['sha256'], hub.url)
    assert same(copy, folder) and {p.name for p in copy.iterdir()} == {p.name for p in folder.iterdir()}
    assert all(hub.sha in path for path in hub.asked if 'resolve' in path)              # one commit, not a branch


@pytest.mark.parametrize('how', ['cut', 'changed', 'refused'])
def test_a_bad_hub(hub, folder, tmp_path, how):
    push(folder, 'me/set', token='hf_test', endpoint=hub.url)
    setattr(hub, how, ['synthetic.safetensors']*99)
    with pytest.raises(UserError, match='could not be fetched'): pull('me/set', tmp_path/'copy', endpoint=hub.url)
    assert not (tmp_path/'copy').exists()


def test_no_such_repository(hub, tmp_path):
    with pytest.raises(UserError, match='could not be read'): pull('me/nothing', tmp_path/'copy', endpoint=hub.url)


def test_a_changed_set_is_not_pushed(hub, folder, tmp_path):
    copy = pull(folder, tmp_path/'copy')
    (copy/'config.json').write_text('{}')
    with pytest.raises(UserError, match='config.json'): push(copy, 'me/set', token='hf_test', endpoint=hub.url)
    assert not hub.tokens and load_synset(folder/'synthetic.safetensors')
