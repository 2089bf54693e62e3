"""Servers on 127.0.0.1 that play a hub, Google Drive and a web page, for the real huggingface_hub and the real gdown.

They keep everything in memory, write down every request, and fail on demand.
"""
import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_BLOCK = 1 << 14  # bytes


class Fault:
    """How the bodies of files are spoilt, `times` times.

    kind: 'status' answers with `status`; 'truncate' announces everything, sends the first `after` bytes and closes;
    'drop' is the same with a reset connection; 'corrupt' flips a bit; 'slow' sends block by block with `delay` seconds
    between; 'hang' sends `after` bytes and then nothing for `delay` seconds; 'no_ranges' ignores what was asked for.
    """

    def __init__(self, kind, times=10 ** 9, status=500, after=0, delay=0., methods=('GET',), headers=None):
        self.kind, self.times, self.status, self.after, self.delay = kind, times, status, after, delay
        self.methods, self.headers = methods, headers or {}

    def __call__(self, method):
        if method not in self.methods or self.times <= 0:
            return None
        self.times -= 1
        return self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def __getattr__(self, name):
        if name.startswith('do_'):
            return lambda: self._answer(name[3:])
        raise AttributeError(name)

    def _answer(self, method):
        parts = urlsplit(self.path)
        length = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(length) if length else b''
        # huggingface_hub asks for the one once in a while, of its own accord; the other is a look whether we are there
        if 'agent-harnesses' not in self.path and self.path != '/':
            self.server.requests.append((method, self.path, dict(self.headers)))
        try:
            self.server.owner.answer(self, method, unquote(parts.path), parse_qs(parts.query), body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def send(self, status, body=b'', **headers):
        """A complete answer; underscores in the names of headers stand for hyphens."""
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body).encode(), {'Content_Type': 'application/json', **headers}
        self.send_response(status)
        for name, value in {'Content_Length': len(body), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_file(self, data, fault, **headers):
        """A file, or the range of it that was asked for, spoilt by the fault."""
        start, status = 0, 200
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if asked and not (fault and fault.kind == 'no_ranges'):
            start, status = int(asked[1]), 206
            headers['Content_Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        if fault and fault.kind == 'corrupt':
            data = bytearray(data)
            data[len(data) * 3 // 4] ^= 1
        data = bytes(data[start:])
        if self.command == 'HEAD' or not fault or fault.kind in ('corrupt', 'no_ranges'):
            self.send(status, data, Accept_Ranges='bytes', **headers)
            return
        self.send_response(status)
        for name, value in {'Content_Length': len(data), 'Accept_Ranges': 'bytes', **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if fault.kind == 'slow':
            for i in range(0, len(data), _BLOCK):
                self.wfile.write(data[i:i + _BLOCK])
                time.sleep(fault.delay)
            return
        self.wfile.write(data[:fault.after])
        self.wfile.flush()
        if fault.kind == 'hang':
            self.server.stopping.wait(fault.delay)
        elif fault.kind == 'drop':
            self.connection.setsockopt(1, 13, b'\1\0\0\0\0\0\0\0')  # SOL_SOCKET, SO_LINGER: close by a reset
            self.connection.close()
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # of connections that a fault has closed


class Server:
    """Base of them all."""

    def __init__(self):
        self.http = _Server(('127.0.0.1', 0), _Handler)
        self.http.owner, self.http.requests, self.http.stopping = self, [], threading.Event()
        self.url = f'http://127.0.0.1:{self.http.server_address[1]}'
        self.fault = None
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={'poll_interval': .02}, daemon=True)
        self.thread.start()

    @property
    def requests(self):
        """Method, path and headers of every request so far."""
        return self.http.requests

    def take_fault(self, method):
        return self.fault(method) if self.fault else None

    def close(self):
        self.http.stopping.set()
        self.http.shutdown()
        self.http.server_close()


def _git_sha1(data):
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class HubServer(Server):
    """Model repositories with branches, private ones included, and what uploading asks for."""

    def __init__(self, token='hf_right'):
        super().__init__()
        self.token = token
        self.repos = {}  # id: dict(private, branches: {name: commit}, commits: {commit: {path: bytes}})
        self.lfs = {}

    def commit(self, repo_id, files, branch='main', private=False, delete=()):
        """Add a commit to a branch and return its id."""
        repo = self.repos.setdefault(repo_id, dict(private=private, branches={}, commits={}))
        parent = repo['branches'].get(branch)
        tree = {**(repo['commits'][parent] if parent else {}), **files}
        tree = {k: v for k, v in tree.items() if k not in delete}
        content = json.dumps([parent, sorted((k, hashlib.sha256(v).hexdigest()) for k, v in tree.items())])
        commit = hashlib.sha1(content.encode()).hexdigest()
        repo['commits'][commit] = tree
        repo['branches'][branch] = commit
        return commit

    def _error(self, h, status, code, message):
        h.send(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

    def _is_allowed(self, h, repo):
        return not repo['private'] or h.headers.get('Authorization') == f'Bearer {self.token}'

    def answer(self, h, method, path, query, body):
        resolve = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if resolve:
            return self._resolve(h, method, *resolve.groups())
        if not path.startswith('/lfs/') and h.headers.get('Authorization') != f'Bearer {self.token}':
            return self._error(h, 401, 'InvalidToken', 'Invalid username or password.')
        fault = self.take_fault(method)
        if fault and fault.kind == 'status':
            return self._error(h, fault.status, 'Fault', 'planted')
        data = json.loads(body) if body[:1] == b'{' and b'\n' not in body else None
        if path == '/api/repos/create':
            repo_id = f'{data["organization"]}/{data["name"]}' if data.get('organization') else f'me/{data["name"]}'
            is_new = repo_id not in self.repos
            if is_new:
                self.commit(repo_id, {'.gitattributes': b'*.safetensors filter=lfs\n'}, private=bool(
                    data.get('private') or data.get('visibility') == 'private'))
            return h.send(200 if is_new else 409, {'url': f'{self.url}/{repo_id}', 'name': repo_id})
        if path == '/api/validate-yaml':
            return h.send(200, {'errors': [], 'warnings': []})
        if path.startswith('/lfs/'):
            if hashlib.sha256(body).hexdigest() != path[5:]:
                return h.send(400)
            self.lfs[path[5:]] = body
            return h.send(200)
        batch = re.fullmatch(r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', path)
        if batch:
            return h.send(200, {'transfer': 'basic', 'objects': [
                {**o, 'actions': {'upload': {'href': f'{self.url}/lfs/{o["oid"]}'}}} for o in data['objects']]})
        api = re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/([a-z-]+)/(.+))?', path)
        if not api or api[1] not in self.repos:
            return self._error(h, 404, 'RepoNotFound', 'Repository not found')
        repo_id, verb, rev = api.groups()
        repo = self.repos[repo_id]
        if verb == 'branch':
            if rev in repo['branches']:
                return self._error(h, 409, 'Conflict', 'Reference already exists')
            repo['branches'][rev] = repo['branches']['main']
            return h.send(200, {})
        if verb in (None, 'revision'):
            commit = repo['branches'].get(rev or 'main', rev)
            return h.send(200, {'id': repo_id, 'sha': commit, 'private': repo['private'], 'siblings': [
                {'rfilename': k} for k in repo['commits'][commit]]})
        if verb == 'preupload':
            modes = {f['path']: 'lfs' if f['path'].endswith('.safetensors') else 'regular' for f in data['files']}
            return h.send(200, {'files': [
                dict(path=path, shouldIgnore=False, uploadMode=mode) for path, mode in modes.items()]})
        if verb == 'commit':
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line['value']
                if line['key'] == 'file':
                    files[value['path']] = base64.b64decode(value['content'])
                elif line['key'] == 'lfsFile':
                    files[value['path']] = self.lfs[value['oid']]
            commit = self.commit(repo_id, files, rev)
            url = f'{self.url}/{repo_id}/commit/{commit}'
            return h.send(200, {'success': True, 'commitOid': commit, 'commitUrl': url, 'hookOutput': ''})
        if verb == 'paths-info':
            paths = parse_qs(body.decode())['paths'] if data is None else data['paths']
            tree = repo['commits'][repo['branches'].get(rev, rev)]
            return h.send(200, [self._path_info(p, tree[p]) for p in paths if p in tree])
        return h.send(501)

    def _path_info(self, path, data):
        info = dict(type='file', oid=_git_sha1(data), size=len(data), path=path)
        if path.endswith('.safetensors'):
            info['lfs'] = dict(oid=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=130)
        return info

    def _resolve(self, h, method, repo_id, revision, path):
        fault = self.take_fault(method)
        if fault and fault.kind == 'status':
            codes = {401: 'RepoNotFound', 403: 'GatedRepo', 404: 'RepoNotFound'}
            code = codes.get(fault.status, 'Fault')
            return h.send(
                fault.status, {'error': 'planted'}, X_Error_Code=code, X_Error_Message='planted', **fault.headers)
        repo = self.repos.get(repo_id)
        if repo is None or not self._is_allowed(h, repo):
            return self._error(h, 401, 'RepoNotFound', 'Repository not found')
        commit = repo['branches'].get(revision, revision)
        if commit not in repo['commits']:
            return self._error(h, 404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        tree = repo['commits'][commit]
        if path not in tree:
            return h.send(404, X_Error_Code='EntryNotFound', X_Error_Message='Entry not found', X_Repo_Commit=commit)
        data = tree[path]
        is_lfs = path.endswith(('.safetensors', '.bin'))
        etag = hashlib.sha256(data).hexdigest() if is_lfs else _git_sha1(data)
        headers = dict(ETag=f'"{etag}"', X_Repo_Commit=commit)
        if is_lfs:
            headers.update(X_Linked_ETag=f'"{etag}"', X_Linked_Size=len(data))
        h.send_file(data, fault, **headers)


class DriveServer(Server):
    """Files by id, behind the page that asks whether one really wants a file too large to be scanned."""

    def __init__(self):
        super().__init__()
        self.files = {}
        self.page_fault = None  # 'quota' or a status

    def answer(self, h, method, path, query, body):
        file_id = query.get('id', [''])[0]
        if file_id not in self.files or isinstance(self.page_fault, int):
            return h.send(self.page_fault or 404, b'<html>Error</html>', Content_Type='text/html; charset=utf-8')
        if self.page_fault == 'quota':
            return h.send(
                200, b'<html><p class="uc-error-subcaption">Too many users have viewed or downloaded this file'
                b' recently.</p></html>', Content_Type='text/html; charset=utf-8')
        if path == '/uc':
            return h.send(200, (
                '<html><body><p>Google Drive cannot scan this file for viruses.</p><form id="download-form" action='
                '"https://drive.usercontent.google.com/download" method="get"><input type="hidden" name="id" value='
                f'"{file_id}"><input type="hidden" name="export" value="download"><input type="hidden" name="confirm" '
                'value="t"></form></body></html>').encode(), Content_Type='text/html; charset=utf-8')
        if path != '/download' or query.get('confirm') != ['t']:
            return h.send(404)
        name, data = self.files[file_id]
        fault = self.take_fault(method)
        if fault and fault.kind == 'status':
            return h.send(fault.status, b'<html>Error</html>', Content_Type='text/html')
        h.send_file(
            data, fault, Content_Type='application/octet-stream',
            Content_Disposition=f'attachment; filename="{name}"', Last_Modified='Wed, 22 Dec 2021 00:00:00 GMT')

    @property
    def downloads(self):
        """How often the file itself was asked for, and from which byte."""
        return [headers.get('Range') for _, path, headers in self.requests if path.startswith('/download')]


class WebServer(Server):
    """Files by path."""

    def __init__(self):
        super().__init__()
        self.files = {}

    def answer(self, h, method, path, query, body):
        fault = self.take_fault(method)
        if path not in self.files or fault and fault.kind == 'status':
            return h.send(fault.status if fault else 404, b'<html>Error</html>', Content_Type='text/html')
        h.send_file(self.files[path], fault, Content_Type='application/octet-stream')

    @property
    def downloads(self):
        """From which byte a file was asked for, each time."""
        return [headers.get('Range') for _, _, headers in self.requests]


@contextmanager
def redirected_drive(url):
    """Send what the requests package would send to Google to the server at `url`; gdown itself is as installed."""
    from requests.adapters import HTTPAdapter

    from elsa_models.hub import sources
    send, look_up = HTTPAdapter.send, sources._look_up

    def send_here(self, request, *args, **kwargs):
        parts = urlsplit(request.url)
        assert parts.hostname.endswith('.google.com') or parts.hostname == '127.0.0.1', request.url
        request.url = url + parts.path + (f'?{parts.query}' if parts.query else '')
        return send(self, request, *args, **kwargs)

    HTTPAdapter.send, sources._look_up = send_here, lambda host: None
    try:
        yield
    finally:
        HTTPAdapter.send, sources._look_up = send, look_up
