"""To the Hub and back, in processes of their own: huggingface_hub reads its settings when it is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import timm_batchout
from timm_batchout.cli.main import main
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.hub.publish import bundled, stage
from timm_batchout.robustness.report import Report
from timm_batchout.zoo.pretrained import bundled_cards

from .loopback import LoopbackHub

pytestmark = pytest.mark.hub
PACKAGE = Path(timm_batchout.__file__).parent
REPORTS = PACKAGE / 'zoo' / 'weights'


def python(code, hub, home, token=None, package=PACKAGE, **variables):
    """Run a script; its output, standard error after standard output."""
    environment = {
        **hub.environment(token, home), 'PYTHONPATH': str(package.parent), 'OMP_NUM_THREADS': '1', **variables,
    }  # fmt: skip
    script = f'import json, sys, timm, torch, timm_batchout\nfrom pathlib import Path\n{code}'
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment, cwd=hub.folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def publish(*arguments, times=1):
    command = ['publish', *map(str, arguments)]
    return f'from timm_batchout.cli.main import main\nfor _ in range({times}): print("exit", main({command!r}))\n'


@pytest.fixture
def images(tmp_path):
    """A few digits, and coloured ones for the CIFAR-10 nets."""
    split = load_split(DataConfig('digits'), train=False)
    small = torch.nn.functional.interpolate(split.images[:6].float(), 32).byte()
    path = tmp_path / 'images.pt'
    torch.save({1: split.images[:6], 3: small.repeat(1, 3, 1, 1), 'labels': split.labels[:6]}, path)
    return path


SCORE = """
from timm_batchout.robustness.harness import evaluate
def score(name, path, **options):
    images = torch.load(path)
    model = timm.create_model(name, pretrained=True, **options)
    channels = model.pretrained_cfg['input_size'][0]
    settings = {'pgd': {'steps': 2, 'n': 4}}
    return evaluate(model, images[channels], images['labels'], ['fgsm', 'pgd', 'deepfool'], ['0.02', '0.1'],
                    settings=settings, audit=True, name=name, data=f'{channels} channels')
"""


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / 'hub') as hub:
        yield hub


@pytest.mark.slow
def test_the_zoo_to_the_hub_and_back(hub, tmp_path, images):
    cards = tmp_path / 'cards'
    code = f"""{SCORE}
for name in {list(bundled_cards())!r}: score(name, {str(images)!r}).save(Path({str(tmp_path)!r}) / f'{{name}}.json')
"""
    code += publish('--all', 'true', '--cards', cards, times=2)
    output = python(code, hub, tmp_path / 'a', 'hf_owner')
    assert output.count('pushed: README.md, config.json, results.json, curves.svg, model.safetensors') == len(
        bundled_cards()
    )
    assert output.count('nothing pushed, because nothing has changed') == len(bundled_cards()), 'the second time'
    assert len([request for request in hub.requests if '/commit/' in request]) == len(bundled_cards())
    assert len([request for request in hub.requests if 'PUT' in request]) == len(bundled_cards())
    assert 'hf_owner' not in output + ''.join(path.read_text() for path in cards.rglob('*.*') if path.is_file())
    assert not list(cards.rglob('*.safetensors')), 'weights are not committed twice'

    # Another machine: an empty cache, no token, and a package without weights.
    slim = tmp_path / 'slim' / 'timm_batchout'
    shutil.copytree(PACKAGE, slim, ignore=shutil.ignore_patterns('*.safetensors', '__pycache__'))
    code = f"""{SCORE}
from huggingface_hub import HfApi
from safetensors.torch import load_file
for info in HfApi().list_models(author='timm-batchout'):
    report = score(f'hf-hub:{{info.id}}', {str(images)!r})
    name = info.id.split('/')[1]
    model = timm.create_model(f'hf-hub:{{info.id}}@{{HfApi().model_info(info.id).sha}}', pretrained=True)
    there = load_file(Path({str(PACKAGE)!r}) / 'zoo' / 'weights' / f'{{name}}.safetensors')
    def as_stored(model):
        return all(torch.equal(value, there[key].to(value.dtype)) for key, value in model.state_dict().items())
    assert as_stored(model) and len(there) > 6
    assert as_stored(timm.create_model(name, pretrained=True))  # by its own name: from the Hub, for want of the file
    print(json.dumps([name, [[s.attack, s.radius, s.correct, s.n] for s in report.scores]]))
"""
    lines = [
        json.loads(line) for line in python(code, hub, tmp_path / 'b', package=slim).splitlines() if line[0] == '['
    ]
    assert {name for name, _ in lines} == set(bundled_cards())
    for name, scores in lines:
        report = Report.load(tmp_path / f'{name}.json')  # of the weights that were published, before they were
        assert scores == [[s.attack, s.radius, s.correct, s.n] for s in report.scores]

    # The server is down: what is cached loads, the rest fails at once and says so.
    hub.stop()
    code = f"""
timm.create_model('batchout_cifar_vgg', pretrained=True)
timm.create_model('hf-hub:timm-batchout/batchout_mnist_cnn.mnist', pretrained=True)
assert str(timm_batchout.__file__).startswith({str(slim)!r})
try: timm.create_model('mnist_cnn', pretrained=True, cache_dir={str(tmp_path / 'c')!r})
except ConnectionError as error: print(error)
card = Path(timm_batchout.__file__).parent / 'zoo' / 'weights' / 'cifar_vgg.fgsm_at_cifar10.json'
card.write_text(json.dumps({{**json.loads(card.read_text()), 'sha256': '0' * 64}}))
timm.create_model('hf-hub:timm-batchout/cifar_vgg.fgsm_at_cifar10', pretrained=True)
try: timm.create_model('cifar_vgg.fgsm_at_cifar10', pretrained=True)
except ValueError as error: print(error)
"""
    down, foreign = python(code, hub, tmp_path / 'b', package=slim).splitlines()
    assert 'The Hub does not answer, and timm-batchout/mnist_cnn' in down
    assert 'timm-batchout says 000000000000' in foreign, 'by its own name, a model has the weights of its package'
    code = """
timm.create_model('hf-hub:timm-batchout/batchout_mnist_cnn.mnist', pretrained=True)
try: timm.create_model('mnist_cnn', pretrained=True)
except ConnectionError as error: print(error)
"""
    variables = {'HF_HUB_OFFLINE': '1', 'TIMM_BATCHOUT_HUB_NAMESPACE': 'me'}
    offline = python(code, hub, tmp_path / 'b', package=slim, **variables)
    assert 'me/mnist_cnn.baseline_mnist is not in the cache, and huggingface_hub is in offline mode' in offline


@pytest.mark.slow
def test_a_trained_twin_is_published_as_the_stock_net(hub, tmp_path):
    """And loads where this package is not."""
    code = """
from safetensors.torch import save_file
from timm_batchout.robustness.harness import evaluate
args = dict(num_classes=10, eta=0.2)
model = timm.create_model('batchout_test_resnet', **args)
model.pretrained_cfg.update(mean=(0.3, 0.4, 0.5), std=(0.2, 0.2, 0.2))
save_file(model.state_dict(), FOLDER / 'weights.safetensors')
data = torch.rand(8, 3, 32, 32), torch.arange(8)
evaluate(model.eval(), *data, ['fgsm'], ['0.1'], data='noise').save(FOLDER / 'report.json')
"""
    code = f'FOLDER = Path({str(tmp_path)!r})\n{code}' + publish(
        'batchout_test_resnet', '--checkpoint', tmp_path / 'weights.safetensors', '--report', tmp_path / 'report.json',
        '--repo', 'alice/resnet', '--cards', tmp_path / 'cards', '--private', 'true',
        '--model_args', '{num_classes: 10, eta: 0.2}',
    )  # fmt: skip
    assert 'exit 0' in python(code, hub, tmp_path / 'a', 'hf_owner')
    assert json.loads((tmp_path / 'cards' / 'resnet' / 'config.json').read_text())['architecture'] == 'test_resnet'
    assert hub.load('alice/resnet')['private']
    assert '![Accuracy' not in (tmp_path / 'cards' / 'resnet' / 'README.md').read_text(), 'one radius is no curve'
    code = f"""
from safetensors.torch import load_file
model = timm.create_model('hf-hub:alice/resnet', pretrained=True)
there = load_file({str(tmp_path / 'weights.safetensors')!r})
assert all(torch.equal(value, there[key].to(value.dtype)) for key, value in model.state_dict().items())
print(type(model).__name__, len(timm.list_models('batchout_*')))
data = timm.data.resolve_model_data_config(model)
print(*data['input_size'], *data['mean'], *data['std'])
"""
    environment = {**hub.environment('hf_owner', tmp_path / 'b'), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', f'import timm, torch\n{code}'], env=environment, capture_output=True, text=True
    )
    assert done.stdout == 'ResNet 0\n3 32 32 0.3 0.4 0.5 0.2 0.2 0.2\n', done.stderr  # as it was evaluated


def test_words_that_were_written_on_the_hub_are_kept_and_edits_elsewhere_are_refused(hub, tmp_path):
    name = 'mnist_cnn.baseline_mnist'
    report = REPORTS / f'{name}.json'
    command = ['publish', name, '--report', report, '--cards', tmp_path / 'cards', '--repo', 'alice/net']
    code = f"""
from timm_batchout.cli.main import main
from timm_batchout.hub.card import OWN_SECTION
from huggingface_hub import HfApi, hf_hub_download
api, command = HfApi(), {[str(word) for word in command]!r}
def card():
    return Path(hf_hub_download('alice/net', 'README.md')).read_text()
def edit(before, after):
    text = card()
    assert before in text
    api.upload_file(path_or_fileobj=text.replace(before, after).encode(), path_in_repo='README.md', repo_id='alice/net')
main(command)
edit(OWN_SECTION[0], OWN_SECTION[0] + '\\n\\nTrained on a boat.')
print('again', main(command), 'boat' in card())
edit('## Robustness', '## Robustness, as I see it')
print('edited', main(command), 'as I see it' in card())
"""
    output = python(code, hub, tmp_path / 'a', 'hf_owner')
    assert 'again 0 True' in output and 'edited 2 True' in output
    assert 'error: README.md of alice/net was edited outside its hand-written section' in output
    assert 'Trained on a boat.' in (tmp_path / 'cards' / 'net' / 'README.md').read_text()


@pytest.mark.slow
def test_pushing_against_the_wind(hub, tmp_path):
    """No token, a bad one, one that may not write; others who push meanwhile; a connection that breaks."""
    name = 'mnist_cnn.baseline_mnist'
    arguments = (name, '--report', REPORTS / f'{name}.json', '--cards', tmp_path / 'cards')
    refused = [None, 'hf_wrong', 'hf_reader', 'hf_other']
    code = f"""
import os
from timm_batchout.cli.main import main
from huggingface_hub import HfApi
def attempt(token, *more):
    os.environ.pop('HF_TOKEN', None)
    if token:
        os.environ['HF_TOKEN'] = token
    return main(['publish', *{[str(argument) for argument in arguments]!r}, *more])
for token in {refused!r}:
    print('exit', attempt(token))
print('there', HfApi().repo_exists('timm-batchout/{name}'))
print('owner', attempt('hf_owner'))
print('private', attempt('hf_owner', '--private'))
"""
    hub.drop_uploads, hub.stale_commits = 1, 1
    output = python(code, hub, tmp_path / 'a')
    assert output.count('exit 2') == 4 and output.count('error: ') == 5
    assert not [token for token in [*refused, 'hf_owner'] if token and token in output]
    assert 'there False' in output and 'owner 0' in output and 'private 2' in output
    assert f'error: timm-batchout/{name} already exists and is public, so nothing was pushed.' in output
    assert len([request for request in hub.requests if '/upload/' in request]) == 2, 'the first one broke off'
    commits = [request for request in hub.requests if '/commit/' in request]
    assert len(commits) == 2, 'the first was stale, the second stood on what had come in between'


def test_what_is_not_to_be_trusted_is_refused(hub, tmp_path):
    name = 'mnist_cnn.baseline_mnist'
    arguments = (name, '--report', REPORTS / f'{name}.json', '--cards', tmp_path / 'cards', '--repo')
    code = """
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
weights = Path(timm_batchout.__file__).parent / 'zoo' / 'weights' / 'mnist_cnn.baseline_mnist.safetensors'
good = json.loads(Path(CONFIG).read_text())
evil = {
    'unknown': {**good, 'architecture': 'os.system'},
    'elsewhere': {**good, 'pretrained_cfg': {**good['pretrained_cfg'], 'hf_hub_filename': '../../../etc/passwd'}},
    'code': {**good, 'pretrained_cfg': {**good['pretrained_cfg'], 'custom_load': True, 'file': '/etc/passwd'}},
    'pickle': good,
    'swapped': {**good, 'sha256': '0' * 64},
    'upper': {**good, 'sha256': good['sha256'].upper()},
    'number': {**good, 'sha256': 5},
    'list': [good],
    'private': good,
    'gated': good,
}
torch.save({}, TMP / 'pickle.bin')
for repo, config in evil.items():
    api.create_repo(f'alice/{repo}', private=repo == 'private')
    file = ('pytorch_model.bin', TMP / 'pickle.bin') if repo == 'pickle' else ('model.safetensors', weights)
    operations = [CommitOperationAdd('config.json', json.dumps(config).encode()), CommitOperationAdd(*file)]
    api.create_commit(f'alice/{repo}', operations, commit_message='x')
api.update_repo_settings('alice/gated', gated='manual')
"""
    config = tmp_path / 'cards' / 'good' / 'config.json'
    code = publish(*arguments, 'alice/good') + f'TMP, CONFIG = Path({str(tmp_path)!r}), {str(config)!r}\n{code}'
    load = """
from huggingface_hub import try_to_load_from_cache
from timm_batchout.zoo.pretrained import fetch
def told(label, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
        print(label, 'loaded')
    except Exception as error:
        print(label, type(error).__name__, error)
def load(*repos):
    for repo in repos: told(repo, timm.create_model, f'hf-hub:alice/{repo}', pretrained=True)
def cached(repo, file):
    return isinstance(try_to_load_from_cache(f'alice/{repo}', file), str)
"""
    hub.corrupt = {'model.safetensors'}
    output = python(f'{code}\n{load}\nload("good")', hub, tmp_path / 'a', 'hf_owner')
    assert 'good ValueError' in output and 'deleted from the cache' in output
    hub.corrupt = set()
    repos = ['good', 'unknown', 'elsewhere', 'code', 'pickle', 'swapped', 'upper', 'number', 'private', 'gated']
    code = f"""{load}
load(*{repos})
print('kept', cached('swapped', 'config.json'), cached('swapped', 'model.safetensors'))
told('list', fetch, 'alice/list')
digest = {bundled_cards()[name]['sha256'].encode()!r}
damages = {{'byte': lambda old: old[:9] + b'\\xff' + old[10:], 'digit': lambda old: old.replace(digest, digest[::-1])}}
for label, damage in damages.items():
    config = Path(try_to_load_from_cache('alice/good', 'config.json')).resolve()
    config.write_bytes(damage(config.read_bytes()))
    told(label, fetch, 'alice/good')
    print(label + '-kept', cached('good', 'config.json'), cached('good', 'model.safetensors'))
    told(label + '-again', fetch, 'alice/good')
"""
    output = python(code, hub, tmp_path / 'a')
    lines = dict(line.split(' ', 1) for line in output.splitlines() if ' ' in line)
    assert lines['good'] == lines['upper'] == 'loaded', 'the cache was not poisoned'
    assert 'Unknown model' in lines['unknown']
    # Neither the other file nor the code is followed: the checked weights are read, and nothing else.
    assert lines['elsewhere'] == lines['code'] == 'loaded'
    assert 'has no model.safetensors' in lines['pickle']
    assert lines['swapped'].startswith('ValueError') and lines['kept'] == 'False False', 'either may be the damaged one'
    assert 'must be a string, got 5' in lines['number'] and 'must be a JSON object' in lines['list']
    assert lines['private'].startswith('RepositoryNotFoundError') and lines['gated'].startswith('GatedRepoError')
    for damage in ('byte', 'digit'):
        assert lines[damage].startswith('ValueError config.json of alice/good was damaged')
        assert lines[f'{damage}-kept'] == 'False True' and lines[f'{damage}-again'] == 'loaded'
    assert not [request for request in hub.requests if 'passwd' in request or 'bin' in request.split('/')[-1][-4:]]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--all', '--repo', 'me/net'], '--repo cannot be combined with --all'),
        (
            ['--all', '--twin', 'x.json', '--model_args', '{num_classes: 5}'],
            '--twin, --model_args cannot be combined with --all',
        ),
        (['--all', '--model', 'mnist_cnn'], 'Name one model'),
        ([], 'Name one model'),
        (['mnist_cnn'], 'with its report'),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, tmp_path, capsys):
    assert main(['publish', *arguments, '--cards', str(tmp_path), '--dry_run', 'true']) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_hub_that_is_down_is_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise ConnectionRefusedError('nobody there')

    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    name = 'mnist_cnn.baseline_mnist'
    assert main(['publish', name, '--report', str(REPORTS / f'{name}.json'), '--cards', str(tmp_path)]) == 2
    assert f'error: The Hub does not answer, so timm-batchout/{name} was not pushed' in capsys.readouterr().err


def test_reports_of_other_weights_are_refused(tmp_path):
    file, run = bundled('mnist_cnn.baseline_mnist')
    report = Report.load(REPORTS / 'mnist_cnn.fgsm_at_mnist.json')
    with pytest.raises(ValueError, match='on other weights than'):
        stage('mnist_cnn.baseline_mnist', file, report, run, tmp_path)
    with pytest.raises(ValueError, match='pickles can run code'):
        stage('mnist_cnn', tmp_path / 'weights.bin', report, run, tmp_path)
    with pytest.raises(ValueError, match='No bundled weights'):
        bundled('mnist_cnn.best')
    for repo in ('a/b/c', 'no spaces/x', 'alone'):
        with pytest.raises(ValueError, match=r'[Rr]epo'):
            stage('mnist_cnn.fgsm_at_mnist', file, report, run, tmp_path, repo)
    assert not list(tmp_path.iterdir())
