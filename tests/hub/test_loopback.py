"""The loopback Hub against huggingface_hub's unmodified client, which runs in processes of its own."""

import json
import subprocess
import sys
import textwrap
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from .loopback import LoopbackHub

pytestmark = pytest.mark.hub

CARD = '---\nlicense: apache-2.0\nlibrary_name: timm\ntags:\n- batchout\n---\n# A net\n'
WEIGHTS = bytes(range(256)) * (2 << 12)  # 2 MiB
NET = 'alice/net'

PRELUDE = """
import json, sys
from pathlib import Path
from huggingface_hub import (
    CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, RepoCard, hf_hub_download, snapshot_download
)
api, folder = HfApi(), Path(sys.argv[1])

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        response = getattr(error, 'response', None)
        return [type(error).__name__, response.status_code if response is not None else None]
"""


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / 'storage') as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'upload'
    folder.mkdir()
    (folder / 'README.md').write_text(CARD)
    (folder / 'model.safetensors').write_bytes(WEIGHTS)
    return folder


def start(hub, folder, program, token='hf_owner'):
    """Run the program in a process; what it leaves in ``told`` is its answer."""
    program = f'{PRELUDE}{textwrap.dedent(program)}\nprint(json.dumps(told))'
    environment = {**hub.environment(token, folder.parent / 'home'), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', program, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(hub, folder, program, token='hf_owner'):
    process = start(hub, folder, program, token)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def call(hub, method, path, body=None, token='hf_owner'):
    """One call without the client: its status and its answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = Request(hub.endpoint + path, data, {'Authorization': f'Bearer {token}'}, method=method)
    try:
        with urlopen(request) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def create(hub):
    assert call(hub, 'POST', '/api/repos/create', {'name': 'net', 'organization': None})[0] == 200


def commit(hub, path, content=b'x'):
    file = {'path': path, 'content': b64encode(content).decode(), 'encoding': 'base64'}
    lines = [{'key': 'header', 'value': {'summary': path}}, {'key': 'file', 'value': file}]
    return call(hub, 'POST', f'/api/models/{NET}/commit/main', b''.join(json.dumps(x).encode() + b'\n' for x in lines))


def history(hub):
    return [commit['title'] for commit in call(hub, 'GET', f'/api/models/{NET}/commits/main')[1]]


def leftovers(hub):
    return list(hub.folder.rglob('*.tmp'))


def test_what_is_pushed_comes_back_and_is_pushed_once(hub, folder):
    told = run(
        hub,
        folder,
        """
        api.create_repo('alice/net')
        api.create_repo('alice/net', exist_ok=True)
        first = api.upload_folder(repo_id='alice/net', folder_path=folder).oid
        api.create_tag('alice/net', tag='v1.0')
        api.create_branch('alice/net', branch='try/this')
        (folder / 'README.md').write_text((folder / 'README.md').read_text() + 'It is new.')
        card = dict(path_in_repo='README.md', path_or_fileobj=folder / 'README.md')
        second = api.upload_file(repo_id='alice/net', **card).oid

        def digest(file, revision):
            return Path(hf_hub_download('alice/net', file, revision=revision)).read_bytes()

        weights = (folder / 'model.safetensors').read_bytes()
        info = api.model_info('alice/net', files_metadata=True)
        told = {
            'shas': [first, second, info.sha, api.model_info('alice/net', revision='v1.0').sha],
            'equal': [digest('model.safetensors', rev) == weights for rev in (None, 'main', 'v1.0', 'try/this', first)],
            'cards': [digest('README.md', rev).decode()[-10:] for rev in ('main', 'v1.0', first[:10])],
            'files': [[file.rfilename, file.size, bool(file.lfs)] for file in info.siblings],
            'info': [info.private, info.gated, info.tags, info.library_name, info.card_data.license],
            'commits': [commit.title for commit in api.list_repo_commits('alice/net')],
            'whole': api.verify_repo_checksums('alice/net').mismatches,
        }
        """,
    )
    first, second, *shas = told['shas']
    assert first != second and shas == [second, first]
    assert told['equal'] == [True] * 5
    assert told['cards'] == ['It is new.', '-\n# A net\n', '-\n# A net\n']
    size = len(CARD) + len('It is new.')
    assert told['files'] == [
        ['.gitattributes', 50, False], ['README.md', size, False], ['model.safetensors', len(WEIGHTS), True],
    ]  # fmt: skip
    assert told['info'] == [False, False, ['timm', 'batchout', 'license:apache-2.0'], 'timm', 'apache-2.0']
    assert told['commits'] == [
        'Upload README.md with huggingface_hub',
        'Upload folder using huggingface_hub',
        'initial commit',
    ]
    assert told['whole'] == []
    assert sum(request.startswith('PUT') for request in hub.requests) == 1

    # Once more the same: the client asks what is there, sends nothing, and tells of the commit that it found.
    hub.requests.clear()
    again = "told = api.upload_folder(repo_id='alice/net', folder_path=folder).oid"
    assert run(hub, folder, again) == second
    assert not [request for request in hub.requests if request.startswith('PUT') or '/commit/' in request]
    # The LFS batch comes before the client has looked whether anything changed.
    assert f'POST /{NET}.git/info/lfs/objects/batch' in hub.requests


def test_everything_else_that_the_client_can_ask(hub, folder):
    told = run(
        hub,
        folder,
        """
        me = api.whoami()
        url = api.create_repo('timm-batchout/net', private=True)
        api.create_commit('timm-batchout/net', operations=[
            CommitOperationAdd('a/b/one.txt', b'one'), CommitOperationAdd('a/two.txt', b'two'),
            CommitOperationAdd('w.safetensors', b'weights'), CommitOperationAdd('empty', b''),
        ], commit_message='four')
        api.create_commit('timm-batchout/net', operations=[
            CommitOperationCopy('w.safetensors', 'copy.safetensors'), CommitOperationCopy('a/two.txt', 'two.txt'),
            CommitOperationDelete('a/b/'), CommitOperationDelete('a/two.txt'),
        ], commit_message='moved', commit_description='and deleted')
        at = api.list_repo_commits('timm-batchout/net')
        api.create_branch('timm-batchout/net', branch='old', revision=at[1].commit_id)
        api.create_branch('timm-batchout/net', branch='old', exist_ok=True)
        api.create_tag('timm-batchout/net', tag='v1', tag_message='one')
        api.upload_file(repo_id='timm-batchout/net', path_or_fileobj=b'b', path_in_repo='b.txt', revision='old')
        refs = api.list_repo_refs('timm-batchout/net')
        old = dict(repo_id='timm-batchout/net', revision='old')
        snapshot = Path(snapshot_download('timm-batchout/net', revision='old'))
        told = {
            'me': [me['name'], [org['name'] for org in me['orgs']], me['auth']['accessToken']['role']],
            'url': [url.repo_id, url.endpoint == api.endpoint],
            'files': api.list_repo_files('timm-batchout/net'),
            'old': sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob('*') if p.is_file()),
            'top': [entry.path for entry in api.list_repo_tree(**old)],
            'inside': [entry.path for entry in api.list_repo_tree(path_in_repo='a', recursive=True, **old)],
            'paths': [[type(x).__name__, x.path] for x in api.get_paths_info(paths=['a', 'empty', 'none'], **old)],
            'commits': [[c.title, c.message, c.authors] for c in at],
            'refs': [[ref.name for ref in refs.branches], [ref.ref for ref in refs.tags]],
            'models': [[m.id for m in api.list_models(author=who, token=token)]
                       for who, token in (('timm-batchout', None), ('alice', None), ('timm-batchout', 'hf_other'))],
            'exists': [api.repo_exists('timm-batchout/net'), api.file_exists('timm-batchout/net', 'empty')],
        }
        api.auth_check('timm-batchout/net', write=True)
        api.delete_branch('timm-batchout/net', branch='old')
        api.delete_tag('timm-batchout/net', tag='v1')
        card = dict(repo_id='timm-batchout/net', path_in_repo='README.md', path_or_fileobj=b'---\\n[\\n---\\n')
        told['bad'] = [
            error(api.delete_tag, 'timm-batchout/net', tag='v1'),
            error(api.create_repo, 'timm-batchout/net'),
            error(api.delete_file, 'none', 'timm-batchout/net'),
            error(api.upload_file, **card),
            error(RepoCard('---\\ntags: 3\\n---\\n').validate),
        ]
        api.update_repo_settings('timm-batchout/net', private=False)
        told['public'] = [m.private for m in api.list_models(author='timm-batchout', token=False)]
        api.delete_repo('timm-batchout/net')
        told['gone'] = api.repo_exists('timm-batchout/net')
        """,
    )
    assert told['me'] == ['alice', ['timm-batchout'], 'write']
    assert told['url'] == ['timm-batchout/net', True]
    assert told['files'] == ['.gitattributes', 'copy.safetensors', 'empty', 'two.txt', 'w.safetensors']
    four = ['a/b/one.txt', 'a/two.txt', 'b.txt', 'empty', 'w.safetensors']
    assert told['old'] == ['.gitattributes', *four]
    assert told['top'] == ['a', '.gitattributes', 'b.txt', 'empty', 'w.safetensors']
    assert told['inside'] == ['a/b', 'a/b/one.txt', 'a/two.txt']
    assert told['paths'] == [['RepoFolder', 'a'], ['RepoFile', 'empty']]
    messages = [['moved', 'and deleted'], ['four', ''], ['initial commit', '']]
    assert told['commits'] == [[*message, ['alice']] for message in messages]
    assert told['refs'] == [['main', 'old'], ['refs/tags/v1']]
    assert told['models'] == [['timm-batchout/net'], [], []]
    assert told['exists'] == [True, True]
    assert told['bad'] == [
        ['RevisionNotFoundError', 404], ['HfHubHTTPError', 409], ['RemoteEntryNotFoundError', 404],
        ['ValueError', None], ['ValueError', None],
    ]  # fmt: skip
    assert told['public'] == [False] and told['gone'] is False


def test_refusals_are_the_exceptions_of_the_real_hub(hub, folder):
    told = run(
        hub,
        folder,
        """
        reader, other, nobody, bad = (HfApi(token=token) for token in ('hf_reader', 'hf_other', False, 'hf_wrong'))
        for name in ('alice/secret', 'alice/gate', 'alice/open'):
            api.create_repo(name, private=name == 'alice/secret')
            api.upload_file(repo_id=name, path_or_fileobj=b'x', path_in_repo='x')
        api.update_repo_settings('alice/gate', gated='manual')
        add = dict(path_or_fileobj=b'y', path_in_repo='y')

        def write(who):
            return [error(who.upload_file, repo_id='alice/open', **add), error(who.create_repo, 'alice/new')]

        # The reader comes last: from the cache that they share, the client would answer the others in spite of the Hub.
        told = {
            'private': [error(who.hf_hub_download, 'alice/secret', 'x') for who in (other, nobody, reader)],
            'private info': [error(who.model_info, 'alice/secret') for who in (other, nobody, reader)],
            'private write': error(other.upload_file, repo_id='alice/secret', **add),
            'gated': [error(who.hf_hub_download, 'alice/gate', 'x') for who in (other, nobody, reader)],
            'gated check': [error(other.auth_check, 'alice/gate'), other.model_info('alice/gate').gated],
            'bad token': [error(bad.whoami), error(bad.hf_hub_download, 'alice/open', 'x')],
            'read only': write(reader),
            'not mine': write(other),
            'nobody': write(nobody),
            'missing': [
                error(api.hf_hub_download, 'alice/none', 'x'),
                error(api.hf_hub_download, 'alice/open', 'x', revision='none'),
                error(api.hf_hub_download, 'alice/open', 'none'),
            ],
        }
        """,
    )
    hidden, gated = ['RepositoryNotFoundError', 404], ['GatedRepoError', 403]
    assert told['private'] == told['private info'] == [hidden, hidden, None]
    assert told['private write'] == hidden
    assert told['gated'] == [gated, gated, None]
    assert told['gated check'] == [gated, 'manual']
    assert told['bad token'] == [['HfHubHTTPError', 401]] * 2
    assert told['read only'] == told['not mine'] == [['HfHubHTTPError', 403]] * 2
    assert told['nobody'] == [['RepositoryNotFoundError', 401], ['HfHubHTTPError', 401]]
    assert told['missing'] == [hidden, ['RevisionNotFoundError', 404], ['RemoteEntryNotFoundError', 404]]


def test_somebody_else_was_faster(hub, folder):
    create(hub)
    hub.stale_commits = 1
    told = run(
        hub,
        folder,
        """
        push = dict(repo_id='alice/net', folder_path=folder)
        parent = api.model_info('alice/net').sha
        told = [error(api.upload_folder, parent_commit=parent, **push)]
        told.append(api.list_repo_files('alice/net'))
        told.append(error(api.upload_folder, parent_commit=api.model_info('alice/net').sha, **push))
        """,
    )
    assert told == [['HfHubHTTPError', 412], ['.gitattributes'], None]
    assert history(hub) == ['Upload folder using huggingface_hub', 'Somebody else was faster', 'initial commit']


def test_an_upload_that_breaks_off_leaves_nothing_and_can_be_repeated(hub, folder):
    create(hub)
    push = "told = api.upload_folder(repo_id='alice/net', folder_path=folder).oid"
    hub.drop_uploads = 99
    process = start(hub, folder, push)
    for _ in range(600):
        if hub.drop_uploads < 99 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert hub.drop_uploads < 99
    assert history(hub) == ['initial commit']

    # The client tries again by itself when it is only the connection that breaks.
    hub.drop_uploads = 1
    hub.requests.clear()
    sha = run(hub, folder, push)
    assert sum(request.startswith('PUT') for request in hub.requests) == 2 and hub.drop_uploads == 0
    assert call(hub, 'GET', f'/api/models/{NET}')[1]['sha'] == sha
    assert leftovers(hub) == []


def test_a_changed_byte_passes_the_download_but_not_the_checksums(hub, folder):
    hub.corrupt = {'model.safetensors'}
    told = run(
        hub,
        folder,
        """
        api.create_repo('alice/net')
        api.upload_folder(repo_id='alice/net', folder_path=folder)
        snapshot_download('alice/net')
        got = Path(hf_hub_download('alice/net', 'model.safetensors')).read_bytes()
        sent = (folder / 'model.safetensors').read_bytes()
        wrong = [mismatch['path'] for mismatch in api.verify_repo_checksums('alice/net').mismatches]
        told = [len(got) == len(sent), sum(x != y for x, y in zip(got, sent)), wrong]
        """,
    )
    assert told == [True, 1, ['model.safetensors']]


def test_down_and_up_again_with_the_same_state(hub, folder):
    fetch = "told = hf_hub_download('alice/net', 'model.safetensors')"
    push = "api.create_repo('alice/net'); api.upload_folder(repo_id='alice/net', folder_path=folder)\n"
    path = run(hub, folder, push + fetch)
    before = call(hub, 'GET', f'/api/models/{NET}?blobs=true')
    port = hub.port
    hub.stop()
    with pytest.raises(OSError):
        call(hub, 'GET', f'/api/models/{NET}')
    assert run(hub, folder, fetch) == path  # from the client's cache
    hub.start()
    assert hub.port == port
    assert call(hub, 'GET', f'/api/models/{NET}?blobs=true') == before
    with LoopbackHub(hub.folder) as other:
        assert call(other, 'GET', f'/api/models/{NET}?blobs=true') == before


@pytest.mark.parametrize('path', ['../x', '/etc/x', '.git/config', 'a/../../x', 'a/.GIT/x', './x', 'a//b', 'a\\b', ''])
def test_paths_that_lead_out_of_the_repo(hub, path):
    """The client itself would not send them."""
    create(hub)
    assert commit(hub, path)[0] == 400
    files = {'files': [{'path': path, 'size': 1, 'sample': ''}]}
    assert call(hub, 'POST', f'/api/models/{NET}/preupload/main', files)[0] == 400
    assert history(hub) == ['initial commit']
    assert {str(file.relative_to(hub.folder)).split('/')[0] for file in hub.folder.rglob('*')} == {'alice'}


def test_names_and_oids_that_lead_out_of_the_folder(hub):
    create(hub)
    for name in ('../x', '..', 'a/b', '.git'):
        assert call(hub, 'POST', '/api/repos/create', {'name': name, 'organization': 'alice'})[0] == 400
    assert call(hub, 'GET', '/api/models/../alice')[0] == 404
    assert call(hub, 'GET', f'/{NET}/resolve/main/..%2Frepo.json')[0] == 404
    objects = {'operation': 'upload', 'objects': [{'oid': '../../x', 'size': 1}]}
    assert call(hub, 'POST', f'/{NET}.git/info/lfs/objects/batch', objects)[0] == 400


def test_commits_at_the_same_time_all_arrive(hub):
    create(hub)
    with ThreadPoolExecutor(8) as pool:
        statuses = [status for status, _ in pool.map(lambda i: commit(hub, f'{i}/x'), range(24))]
    assert statuses == [200] * 24
    assert len(history(hub)) == 25
    assert len(call(hub, 'GET', f'/api/models/{NET}/tree/main')[1]) == 25
    assert commit(hub, '3')[0] == commit(hub, '3/x/y')[0] == 400
