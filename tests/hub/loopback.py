"""A Hub on 127.0.0.1 that huggingface_hub's own client talks to over real HTTP, with its storage on disk.

It is written from the calls that the client makes, for model repos only: no pull requests, no xet, no .gitignore.
A test against it shows that the client's calls are accepted, not that the real Hub would accept a card.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

TOKENS = {'hf_owner': ('alice', 'write'), 'hf_reader': ('alice', 'read'), 'hf_other': ('bob', 'write')}
ORGS = {'timm-batchout': ('alice',)}
POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n'
ATTRIBUTES = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'
CARD = re.compile(r'\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)', re.DOTALL)
REPO_ID = r'(?P<repo_id>\w[\w.-]*/\w[\w.-]*)'
API = '/api/models/' + REPO_ID
ROUTES = [
    (methods.split(), re.compile(pattern, re.ASCII), action)
    for methods, pattern, action in [
        ('GET', '/api/whoami-v2', 'whoami'),
        ('POST', '/api/validate-yaml', 'validate_card'),
        ('POST', '/api/repos/create', 'create_repo'),
        ('DELETE', '/api/repos/delete', 'delete_repo'),
        ('GET', '/api/models', 'list_models'),
        ('GET', API + '(/revision/(?P<rev>[^/]+))?', 'info'),
        ('PUT', API + '/settings', 'settings'),
        ('GET', API + '/auth-check(?P<write>/write)?', 'auth_check'),
        ('POST', API + '/preupload/(?P<rev>[^/]+)', 'preupload'),
        ('POST', f'/{REPO_ID}.git/info/lfs/objects/batch', 'lfs_batch'),
        ('POST', f'/{REPO_ID}.git/info/lfs/objects/verify', 'lfs_verify'),
        ('PUT', '/upload/(?P<key>[0-9a-f]+)', 'upload'),
        ('POST', API + '/commit/(?P<rev>[^/]+)', 'commit'),
        ('GET', API + '/tree/(?P<rev>[^/]+)(/(?P<path>.+))?', 'tree'),
        ('POST', API + '/paths-info/(?P<rev>[^/]+)', 'paths_info'),
        ('GET', API + '/refs', 'refs'),
        ('GET', API + '/commits/(?P<rev>[^/]+)', 'commits'),
        ('POST', API + '/(?P<kind>branch|tag)/(?P<name>[^/]+)', 'create_ref'),
        ('DELETE', API + '/(?P<kind>branch|tag)/(?P<name>[^/]+)', 'delete_ref'),
        ('GET HEAD', f'/{REPO_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'resolve'),
    ]
]


class Refusal(Exception):
    """An answer other than 200; the client chooses its exception by ``code``, sent as X-Error-Code.

    The real Hub answers strangers 401 for a missing or gated repo. The client sees past that by a pattern that only
    matches https, so here it is 404 or 403, always with the code.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body: Any):
        super().__init__(message)
        self.status, self.body = status, {'error': message, **body}
        # A header is one line of latin-1.
        self.headers = {'X-Error-Message': ascii(message)[1:-1], **({'X-Error-Code': code} if code else {})}
        self.headers.update(headers or {})


class LoopbackHub:
    """The server, its storage and its faults.

    A repo is one folder: ``repo.json`` (settings, refs and every commit with its complete path -> blob map), renamed
    into place whenever it changes, and ``blobs``, named by their sha256. In memory are only the upload URLs handed out.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        tokens: dict[str, tuple[str, str]] | None = None,
        orgs: dict[str, tuple[str, ...]] | None = None,
        lfs_threshold: int = 1 << 20,
    ):
        self.folder = Path(folder)
        self.tokens = TOKENS if tokens is None else tokens  # token: (user, 'read' or 'write')
        self.orgs = ORGS if orgs is None else orgs  # org: the users who may write to it
        self.lfs_threshold = lfs_threshold
        self.requests: list[str] = []  # 'METHOD path', the path as sent, without its query
        self.drop_uploads = 0  # so many of the next upload PUTs lose their connection half-way
        self.stale_commits = 0  # before so many of the next commits, somebody else commits
        self.corrupt: set[str] = set()  # files (name or path) served with one byte changed
        self.uploads: dict[str, tuple[str, str, int]] = {}  # key of an upload URL: repo, oid, size
        self.lock = threading.RLock()
        self.port = 0
        self._server: Server | None = None

    def __enter__(self) -> 'LoopbackHub':
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def start(self) -> None:
        """On the port of the last time, if there was one."""
        self._server = Server(('127.0.0.1', self.port), Handler)
        self._server.hub, self.port = self, self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Connections are cut, open ones too, and no request is at work any more when this returns."""
        if self._server is not None:
            self._server.shutdown()
            self._server.cut_connections()
            self._server.server_close()
            self._server = None

    def environment(self, token: str | None = None, home: str | os.PathLike | None = None) -> dict[str, str]:
        """For a subprocess: all of this process's environment, but for the client's settings, which are ours."""
        ours = {
            'HF_ENDPOINT': self.endpoint,
            'HF_HOME': str(home or self.folder.with_name(f'{self.folder.name}-cache')),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'NO_PROXY': '127.0.0.1',
            'no_proxy': '127.0.0.1',
            **({'HF_TOKEN': token} if token else {}),
        }
        return {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))} | ours

    def load(self, repo_id: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / repo_id / 'repo.json').read_text())
        except FileNotFoundError:
            return None

    def save(self, repo: dict[str, Any]) -> None:
        self._write(self.folder / repo['id'] / 'repo.json', json.dumps(repo).encode())

    def remove(self, repo_id: str) -> None:
        (self.folder / repo_id / 'repo.json').unlink()  # from here on it is gone, however far the rest gets
        shutil.rmtree(self.folder / repo_id)

    def repo_ids(self) -> list[str]:
        return sorted('/'.join(path.parts[-3:-1]) for path in self.folder.glob('*/*/repo.json'))

    def blob(self, repo_id: str, sha256: str) -> Path:
        if not re.fullmatch('[0-9a-f]{64}', sha256):
            raise Refusal(400, f'Not a sha256: {sha256!r}')
        return self.folder / repo_id / 'blobs' / sha256

    def add_blob(self, repo_id: str, data: bytes) -> dict[str, Any]:
        """Store a regular file; the answer is its entry in a commit."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._write(self.blob(repo_id, sha256), data)
        return {'sha256': sha256, 'size': len(data), 'oid': git_oid(data)}

    def add_commit(self, repo: dict, branch: str, files: dict, user: str, title: str, message: str = '') -> str:
        """Advance the branch, in ``repo`` only: nothing has happened before it is saved."""
        commit = {'parent': repo['branch'].get(branch), 'user': user, 'title': title, 'message': message}
        commit |= {'date': now(), 'files': files}
        sha = hashlib.sha1(json.dumps(commit).encode()).hexdigest()
        repo['commits'][sha], repo['branch'][branch] = commit, sha
        return sha

    def members(self, namespace: str) -> tuple[str, ...]:
        return self.orgs.get(namespace, (namespace,))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
        temporary.write_bytes(data)
        temporary.replace(path)


class Server(ThreadingHTTPServer):
    """Knows its connections: a kept-alive one would still be served after the server has stopped."""

    hub: LoopbackHub
    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 64

    def __init__(self, *args: Any):
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has gone is no news
            super().handle_error(request, client_address)

    def cut_connections(self) -> None:
        for connection in list(self.connections):
            cut(connection)


class Handler(BaseHTTPRequestHandler):
    """One method per route; what it returns is sent as JSON, and None means that it has answered itself."""

    server: Server
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time otherwise

    def dispatch(self) -> None:
        path, _, query = self.path.partition('?')
        self.hub, self.query = self.server.hub, parse_qs(query)
        self.hub.requests.append(f'{self.command} {path}')
        try:
            # The body is read before anything is refused, or the next request would be read from its middle.
            self.body = b'' if path.startswith('/upload/') else b''.join(self.chunks())
            for methods, pattern, action in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(path)):
                    given = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    answer = getattr(self, action)(**given)
                    break
            else:
                raise Refusal(404, 'Sorry, this page does not exist.')
            if answer is not None:
                self.reply(200, answer)
        except Refusal as refusal:
            self.reply(refusal.status, refusal.body, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.reply(500, {'error': f'The loopback Hub failed:\n{traceback.format_exc()}'})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def log_message(self, *args: Any) -> None:
        pass

    def chunks(self) -> Iterator[bytes]:
        """The request's body. The client always announces its length, also when it reads from a file."""
        if 'Transfer-Encoding' in self.headers:
            self.close_connection = True
            raise Refusal(411, 'The loopback Hub must know the length')
        left = int(self.headers.get('Content-Length', 0))
        while left:
            chunk = self.rfile.read(min(left, 1 << 16))
            if not chunk:
                raise ConnectionResetError
            left -= len(chunk)
            yield chunk

    def reply(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer, default=str).encode()  # a card may hold dates
        self.send(status, data, {'Content-Type': 'application/json', **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def json(self, line: bytes | None = None) -> dict[str, Any]:
        try:
            value = json.loads(self.body if line is None else line)
        except ValueError as error:
            raise Refusal(400, f'Not JSON: {error}') from None
        if not isinstance(value, dict):
            raise Refusal(400, 'Not a JSON object')
        return value

    # Who may do what

    def identity(self) -> tuple[str | None, str | None]:
        header = self.headers.get('Authorization')
        if header is None:
            return None, None
        if (token := header.removeprefix('Bearer ')) not in self.hub.tokens:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return self.hub.tokens[token]

    def repo(self, repo_id: str, write: bool = False, files: bool = False) -> dict[str, Any]:
        """The repo, if the sender may see it, write to it, or read its ``files``: a gate hides nothing else."""
        user, _ = self.identity()
        repo, member = self.hub.load(repo_id), user in self.hub.members(repo_id.split('/')[0])
        if repo is None or (repo['private'] and not member):
            raise Refusal(404, 'Repository not found', 'RepoNotFound')
        if write:
            self.require_writer(repo_id.split('/')[0], 'RepoNotFound')
        if files and repo['gated'] and not member:
            raise Refusal(403, f'Access to model {repo_id} is restricted.', 'GatedRepo')
        return repo

    def require_writer(self, namespace: str, code: str | None = None) -> str:
        user, role = self.identity()
        if user is None:
            raise Refusal(401, 'Invalid username or password.', code)
        if user not in self.hub.members(namespace):
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace}")
        if role != 'write':
            raise Refusal(403, 'You must use a write token')
        return user

    def revision(self, repo: dict, rev: str) -> str:
        """The commit that a branch, a tag or (the beginning of) a sha stands for."""
        for refs, prefix in ((repo['branch'], 'refs/heads/'), (repo['tag'], 'refs/tags/')):
            if sha := refs.get(rev.removeprefix(prefix)):
                return sha
        found = [sha for sha in repo['commits'] if len(rev) >= 7 and sha.startswith(rev)]
        if len(found) != 1:
            raise Refusal(404, f'Invalid rev id: {rev}', 'RevisionNotFound')
        return found[0]

    def files(self, repo: dict, rev: str) -> dict[str, dict]:
        return repo['commits'][self.revision(repo, rev)]['files']

    # Users and repos

    def whoami(self) -> dict:
        user, role = self.identity()
        if user is None:
            raise Refusal(401, 'Invalid username or password.')
        orgs = [{'type': 'org', 'name': org} for org, members in self.hub.orgs.items() if user in members]
        return {'type': 'user', 'name': user, 'orgs': orgs, 'auth': {'accessToken': {'role': role}}}

    def validate_card(self) -> dict:
        """Only what is surely wrong: the real Hub knows schemas, this one does not."""
        try:
            card = metadata(self.json()['content'])
        except ValueError as error:
            raise Refusal(400, 'Invalid metadata', errors=[{'message': str(error)}], warnings=[]) from None
        missing = [] if card else [{'message': 'empty or missing yaml metadata in repo card'}]
        return {'errors': [], 'warnings': missing}

    def create_repo(self) -> dict:
        wanted = self.json()
        namespace = wanted.get('organization') or self.identity()[0] or ''
        user, repo_id = self.require_writer(namespace), f'{namespace}/{wanted["name"]}'
        if wanted.get('type') not in (None, 'model') or not re.fullmatch(REPO_ID, repo_id, re.ASCII):
            raise Refusal(400, f'Not a model repo: {repo_id}')
        url = f'{self.hub.endpoint}/{repo_id}'
        with self.hub.lock:
            if self.hub.load(repo_id) is not None:
                raise Refusal(409, 'You already created this model repo', url=url)
            private = wanted.get('visibility') == 'private' or wanted.get('private') is True
            repo = {'id': repo_id, 'private': private, 'gated': False, 'created': now()}
            repo |= {'branch': {}, 'tag': {}, 'commits': {}}
            files = {'.gitattributes': self.hub.add_blob(repo_id, ATTRIBUTES)}
            self.hub.add_commit(repo, 'main', files, user, 'initial commit')
            self.hub.save(repo)
        return {'url': url, 'name': repo_id}

    def delete_repo(self) -> dict:
        wanted = self.json()
        with self.hub.lock:
            namespace = wanted.get('organization') or self.identity()[0]
            self.hub.remove(self.repo(f'{namespace}/{wanted["name"]}', write=True)['id'])
        return {}

    def settings(self, repo_id: str) -> dict:
        wanted = self.json()
        with self.hub.lock:
            repo = self.repo(repo_id, write=True)
            repo['gated'] = wanted.get('gated', repo['gated'])
            repo['private'] = wanted['visibility'] == 'private' if 'visibility' in wanted else repo['private']
            self.hub.save(repo)
        return {'gated': repo['gated'], 'private': repo['private']}

    def auth_check(self, repo_id: str, write: str | None = None) -> dict:
        self.repo(repo_id, write=bool(write), files=True)
        return {}

    def list_models(self) -> list[dict]:
        """In the order of their names; of the many filters, the author and a search in the name."""
        user, _ = self.identity()
        author, search = self.query.get('author', [None])[0], self.query.get('search', [''])[0]
        found = []
        for repo_id in self.hub.repo_ids():
            namespace, repo = repo_id.split('/')[0], self.hub.load(repo_id)
            seen = repo and (not repo['private'] or user in self.hub.members(namespace))
            if seen and author in (None, namespace) and search.lower() in repo_id.lower():
                found.append(self.describe(repo, repo['branch']['main']))
        return found

    def info(self, repo_id: str, rev: str = 'main') -> dict:
        repo = self.repo(repo_id)
        return self.describe(repo, self.revision(repo, rev))

    def describe(self, repo: dict, sha: str) -> dict:
        files, card = repo['commits'][sha]['files'], {}
        if 'README.md' in files:
            text = self.hub.blob(repo['id'], files['README.md']['sha256']).read_text(errors='replace')
            with suppress(ValueError):  # a card that cannot be read is no reason to hide the model
                card = metadata(text)
        library = card.get('library_name')
        tags = [*([library] if library else []), *(card.get('tags') or [])]
        tags += [f'license:{card["license"]}'] if 'license' in card else []
        siblings = []
        for path, file in sorted(files.items()):
            siblings.append({'rfilename': path})
            if 'blobs' in self.query:
                siblings[-1] |= {'size': file['size'], 'blobId': file['oid'], 'lfs': lfs(file, 'sha256')}
        return {
            'id': repo['id'], 'modelId': repo['id'], 'author': repo['id'].split('/')[0], 'sha': sha,
            'private': repo['private'], 'gated': repo['gated'], 'disabled': False, 'downloads': 0, 'likes': 0,
            'createdAt': repo['created'], 'lastModified': repo['commits'][sha]['date'], 'siblings': siblings,
            'tags': list(dict.fromkeys(tags)), 'library_name': library, 'pipeline_tag': card.get('pipeline_tag'),
            'cardData': card,
        }  # fmt: skip

    # Uploads and commits

    def preupload(self, repo_id: str, rev: str) -> dict:
        present = self.files(self.repo(repo_id, write=True), rev)
        answers = []
        for file in self.json()['files']:
            path = checked_path(file['path'])
            large = file['size'] > self.hub.lfs_threshold or path.endswith('.safetensors')
            answer = {'path': path, 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False}
            if path in present:  # by its oid the client drops files that have not changed
                answer['oid'] = present[path]['sha256' if 'pointer' in present[path] else 'oid']
            answers.append(answer)
        return {'files': answers}

    def lfs_batch(self, repo_id: str) -> dict:
        self.repo(repo_id, write=True)
        answers = []
        for wanted in self.json()['objects']:
            answer = {'oid': wanted['oid'], 'size': wanted['size']}
            if not self.hub.blob(repo_id, wanted['oid']).exists():
                # The URL is the permission: the PUT comes without a token.
                self.hub.uploads[key := uuid.uuid4().hex] = repo_id, wanted['oid'], wanted['size']
                verify = f'{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify'
                upload = {'href': f'{self.hub.endpoint}/upload/{key}'}
                answer['actions'] = {'upload': upload, 'verify': {'href': verify}}
            answers.append(answer)
        return {'transfer': 'basic', 'objects': answers}

    def upload(self, key: str) -> dict:
        repo_id, oid, size = self.hub.uploads.get(key, (None, None, 0))
        if repo_id is None:
            for _ in self.chunks():
                pass
            raise Refusal(403, 'No such upload')
        with self.hub.lock:
            drop, self.hub.drop_uploads = self.hub.drop_uploads > 0, max(0, self.hub.drop_uploads - 1)
        blob, sha256, received = self.hub.blob(repo_id, oid), hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=blob.parent, suffix='.tmp', delete=False) as file:
            try:
                for chunk in self.chunks():
                    file.write(chunk)
                    sha256.update(chunk)
                    received += len(chunk)
                    if drop and received >= size / 2:
                        cut(self.connection)
                        raise ConnectionResetError
                if received != size or sha256.hexdigest() != oid:
                    raise Refusal(400, 'The content is not what was announced')
                file.flush()
                os.replace(file.name, blob)
            finally:
                Path(file.name).unlink(missing_ok=True)
        return {}

    def lfs_verify(self, repo_id: str) -> dict:
        self.repo(repo_id, write=True)
        wanted = self.json()
        self.pointed_to(repo_id, wanted['oid'], wanted['size'])
        return {}

    def pointed_to(self, repo_id: str, oid: str, size: int | None) -> dict[str, Any]:
        """The entry in a commit of an LFS file, which must have been uploaded."""
        blob = self.hub.blob(repo_id, oid)
        if not blob.exists() or size not in (None, blob.stat().st_size):
            raise Refusal(400, f'LFS pointer to a file that was not uploaded: {oid}')
        pointer = POINTER.format(oid, blob.stat().st_size).encode()
        return {'sha256': oid, 'size': blob.stat().st_size, 'oid': git_oid(pointer), 'pointer': len(pointer)}

    def commit(self, repo_id: str, rev: str) -> dict:
        lines = [self.json(line) for line in self.body.splitlines() if line.strip()]
        if 'create_pr' in self.query or not lines or lines[0]['key'] != 'header':
            raise Refusal(400, 'Not a commit that the loopback Hub can make')
        header = lines[0]['value']
        with self.hub.lock:
            repo, user = self.repo(repo_id, write=True), self.identity()[0] or ''
            if rev not in repo['branch']:
                raise Refusal(404, f'Invalid rev id: {rev}', 'RevisionNotFound')
            if self.hub.stale_commits > 0:
                self.hub.stale_commits -= 1
                self.hub.add_commit(repo, rev, self.files(repo, rev), 'somebody-else', 'Somebody else was faster')
                self.hub.save(repo)
            head = repo['branch'][rev]
            if not head.startswith(header.get('parentCommit') or ''):
                raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
            files = dict(repo['commits'][head]['files'])
            for line in lines[1:]:
                self.change(repo_id, files, line['key'], line['value'])
            if clashes := [path for path in files for folder in PurePosixPath(path).parents if str(folder) in files]:
                raise Refusal(400, f'Both a file and a folder: above {clashes[0]}')
            sha = self.hub.add_commit(repo, rev, files, user, header['summary'], header.get('description', ''))
            self.hub.save(repo)
        return {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.endpoint}/{repo_id}/commit/{sha}'}

    def change(self, repo_id: str, files: dict[str, dict], key: str, value: dict) -> None:
        """One line of a commit, done to the map of its files."""
        path = checked_path(value['path'].rstrip('/') if key == 'deletedFolder' else value['path'])
        doomed = [path] if key == 'deletedFile' else [name for name in files if name.startswith(f'{path}/')]
        if key == 'file':
            files[path] = self.hub.add_blob(repo_id, base64.b64decode(value['content']))
        elif key == 'lfsFile':
            files[path] = self.pointed_to(repo_id, value['oid'], value.get('size'))
        elif key not in ('deletedFile', 'deletedFolder'):
            raise Refusal(400, f'The loopback Hub does not know {key!r}')
        elif not doomed or doomed[0] not in files:
            raise Refusal(404, "A file with this name doesn't exist", 'EntryNotFound')
        else:
            for name in doomed:
                del files[name]

    # What is there

    def tree(self, repo_id: str, rev: str, path: str = '') -> list[dict]:
        files, start = self.files(self.repo(repo_id), rev), f'{path}/' if path else ''
        names = [name for name in sorted(files) if name.startswith(start)]
        if path and not names:
            raise Refusal(404, f'{path} does not exist on "{rev}"', 'EntryNotFound')
        folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
        inside = [name for name in sorted(folders) if name != '.' and name.startswith(start)] + names
        if self.query.get('recursive') != ['true']:
            inside = [name for name in inside if '/' not in name.removeprefix(start)]
        return [entry(name, files) for name in inside]

    def paths_info(self, repo_id: str, rev: str) -> list[dict]:
        files = self.files(self.repo(repo_id), rev)
        folders = {str(folder) for name in files for folder in PurePosixPath(name).parents}
        wanted = parse_qs(self.body.decode()).get('paths', [])
        return [entry(name, files) for name in wanted if name in files or name in folders]

    def refs(self, repo_id: str) -> dict:
        repo = self.repo(repo_id)
        answer: dict[str, list] = {'converts': [], 'pullRequests': []}
        for kind, told, prefix in (('branch', 'branches', 'refs/heads/'), ('tag', 'tags', 'refs/tags/')):
            refs = repo[kind].items()
            answer[told] = [{'name': name, 'ref': prefix + name, 'targetCommit': sha} for name, sha in refs]
        return answer

    def commits(self, repo_id: str, rev: str) -> list[dict]:
        repo = self.repo(repo_id)
        sha, answer = self.revision(repo, rev), []
        while sha:
            commit = repo['commits'][sha]
            told = {name: commit[name] for name in ('title', 'message', 'date')}
            answer.append({'id': sha, 'authors': [{'user': commit['user']}], **told})
            sha = commit['parent']
        return answer

    def create_ref(self, repo_id: str, kind: str, name: str) -> dict:
        """For a branch the URL has its name; for a tag, what to tag."""
        wanted = self.json()
        name, rev = (name, wanted.get('startingPoint') or 'main') if kind == 'branch' else (wanted['tag'], name)
        with self.hub.lock:
            repo = self.repo(repo_id, write=True)
            if name in repo[kind]:
                raise Refusal(409, f'Reference already exists: {name}')
            if not re.fullmatch(r'\w[\w./+-]*', name) or '..' in name:
                raise Refusal(400, f'Not a name for a reference: {name!r}')
            repo[kind][name] = self.revision(repo, rev)
            self.hub.save(repo)
        return {}

    def delete_ref(self, repo_id: str, kind: str, name: str) -> dict:
        with self.hub.lock:
            repo = self.repo(repo_id, write=True)
            if (kind, name) == ('branch', 'main'):
                raise Refusal(403, 'The main branch stays')
            if repo[kind].pop(name, None) is None:
                raise Refusal(404, f'Invalid rev id: {name}', 'RevisionNotFound')
            self.hub.save(repo)
        return {}

    def resolve(self, repo_id: str, rev: str, path: str) -> None:
        repo = self.repo(repo_id, files=True)
        sha = self.revision(repo, rev)
        headers = {'X-Repo-Commit': sha}
        file = repo['commits'][sha]['files'].get(path)
        if file is None:
            raise Refusal(404, 'Entry not found', 'EntryNotFound', headers)
        data = self.hub.blob(repo_id, file['sha256']).read_bytes()
        if data and {path, PurePosixPath(path).name} & self.hub.corrupt:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        headers['Content-Type'] = 'application/octet-stream'
        headers['ETag'] = f'"{file["sha256" if "pointer" in file else "oid"]}"'
        if 'pointer' in file:
            headers |= {'X-Linked-Etag': headers['ETag'], 'X-Linked-Size': str(file['size'])}
        self.send(200, data, headers)


def metadata(text: str) -> dict[str, Any]:
    """What the head of a card says; ValueError if that cannot be."""
    match = CARD.match(text)
    try:
        card = (yaml.safe_load(match[1]) if match else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(card, dict):
        raise ValueError('The metadata must be a mapping')
    if not isinstance(tags := card.get('tags') or [], list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError('"tags" must be an array of strings')
    if not isinstance(card.get('model-index') or [], list):
        raise ValueError('"model-index" must be an array')
    return card


def checked_path(path: str) -> str:
    """The client refuses such paths before it sends them; that is no reason to believe everybody who sends one."""
    parts = path.split('/')
    if any(part in ('', '.', '..') or part.lower() == '.git' for part in parts) or re.search(r'[\0-\x1f\\]', path):
        raise Refusal(400, f'Not a path in a repo: {path!r}')
    return path


def entry(path: str, files: dict[str, dict]) -> dict[str, Any]:
    """As the tree and paths-info calls tell of a file, or of a folder: its oid is not git's, but as good."""
    if path not in files:
        inside = [f'{name} {file["oid"]}' for name, file in sorted(files.items()) if name.startswith(f'{path}/')]
        return {'type': 'directory', 'path': path, 'size': 0, 'oid': git_oid('\n'.join(inside).encode())}
    file = files[path]
    told = {'type': 'file', 'path': path, 'size': file['size'], 'oid': file['oid']}
    return told | ({'lfs': lfs(file, 'oid')} if 'pointer' in file else {})


def lfs(file: dict[str, Any], oid: str) -> dict[str, Any] | None:
    """The real Hub names the sha256 differently in different answers."""
    if 'pointer' not in file:
        return None
    return {oid: file['sha256'], 'size': file['size'], 'pointerSize': file['pointer']}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def now() -> str:
    return datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.%fZ')


def cut(connection: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RDWR)
