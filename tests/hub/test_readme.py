"""What README.md and recipes/README.md tell people to type works: Python is run, commands are read to the last flag."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from timm_batchout.cli.main import COMMANDS
from timm_batchout.recipe import configure, parse
from timm_batchout.training.config import TrainConfig

from .loopback import LoopbackHub

ROOT = Path(__file__).parents[2]
PAGES = ['README.md', 'recipes/README.md']


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / page).read_text(), re.S)


def commands():
    for page in PAGES:
        for block in blocks(page, 'bash'):
            for line in block.replace('\\\n', ' ').splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == 'timm-batchout':
                    yield pytest.param(words[1:], id=line.split('  ')[0][:60])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the recipes, and a finished run's config."""
    shutil.copytree(ROOT / 'recipes', tmp_path / 'recipes', ignore=shutil.ignore_patterns('*.svg', '*.json'))
    (tmp_path / 'runs' / 'first').mkdir(parents=True)
    shutil.copy(ROOT / 'recipes' / 'digits_batchout.yaml', tmp_path / 'runs' / 'first' / 'config.yaml')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('words', list(commands()))
def test_commands_are_understood(words, checkout):
    config_class, _ = COMMANDS[words[0]]
    config = parse(config_class, words[1:])
    if isinstance(config, TrainConfig):
        config.validate()


def test_data_sources_are_understood():
    lines = [line for block in blocks('recipes/README.md', 'yaml') for line in block.splitlines() if line]
    assert len(lines) == 3
    for line in lines:
        configure(TrainConfig, yaml.safe_load(line), output='run').validate()


def test_files_that_are_named_are_there():
    for page in [*PAGES, 'CONTRIBUTING.md', 'recipes/robust/RESULTS.md']:
        folder, text = (ROOT / page).parent, (ROOT / page).read_text()
        for target in re.findall(r'\]\((?!http|#)([^)#]+)', text):
            assert (folder / target).exists(), f'{page} links to {target}'
        for target in re.findall(r'--config(?:_file)? (recipes/[\w/]+\.yaml)', text):
            assert (ROOT / target).is_file(), f'{page} names {target}'


STAGE = """
import timm, torch
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
my_model = timm.create_model('resnet18')
"""
BEFORE_EVALUATION = """
split = load_split(DataConfig('digits'), train=False)
images, labels = split.images[:6], split.labels[:6]
model = timm.create_model('mnist_cnn', pretrained=True)
other = tb.evaluate(timm.create_model('batchout_mnist_cnn', pretrained=True), images, labels, eps=['8/255'])
"""


@pytest.mark.hub
def test_python_runs(checkout, tmp_path):
    code = STAGE
    for block in blocks('README.md', 'python'):
        code += BEFORE_EVALUATION if 'tb.evaluate' in block else ''
        code += block.replace("a1_in1k', pretrained=True", "a1_in1k', pretrained=False")  # no way to the real Hub here
    with LoopbackHub(tmp_path / 'hub') as hub:
        environment = {**hub.environment('hf_owner', tmp_path / 'home'), 'OMP_NUM_THREADS': '1'}
        code = code.replace("'me/net'", "'alice/net'")  # the owner of the token
        done = subprocess.run(
            [sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=280, cwd=checkout
        )
        assert done.returncode == 0, done.stderr
        assert hub.load('alice/net') is not None
    assert (checkout / 'runs' / 'digits' / 'result.json').is_file()
    assert 'accuracy % | n | mnist_cnn | batchout_mnist_cnn |' in done.stdout
