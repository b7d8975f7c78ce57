"""The command line: answers at once, says what is wrong, ends cleanly."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

import timm_batchout
from timm_batchout.cli.main import COMMANDS, main


def test_list_prints_the_table_without_the_extra_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'jsonargparse', None)
    assert main(['list']) == 0
    assert '`batchout_cifar_vgg.cifar10`' in capsys.readouterr().out
    assert main(['train', '--epochs', '1']) == 2
    assert 'jsonargparse is missing. In a checkout: pip install -e' in capsys.readouterr().err


def test_command_line_without_or_with_a_wrong_command(capsys):
    assert main(['--help']) == 0
    assert 'train' in capsys.readouterr().out
    assert main(['trian']) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert main(['help']) == 0 and main(['--version']) == 0
    assert f'timm-batchout {timm_batchout.__version__}' in capsys.readouterr().out
    assert main(['compare', 'missing.json']) == 2
    assert capsys.readouterr().err == "error: 'missing.json' does not exist.\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f'{sys.executable} -m timm_batchout.cli list | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '0' and done.stderr == ''


@pytest.mark.parametrize(
    'words', [['--help'], ['list'], ['list', '--json'], ['train', '--epoch', '3'], ['trian'], ['evaluate', '--help']]
)
def test_answers_without_loading_torch_or_timm(words):
    code = (
        'import sys; sys.argv[0] = "timm-batchout"\n'
        f'from timm_batchout.cli.main import main; main({words!r})\n'
        'assert not {"torch", "timm", "numpy"} & set(sys.modules), "heavy modules were loaded"'
    )
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


@pytest.mark.parametrize('command', COMMANDS)
def test_help_describes_every_flag(command, capsys):
    config_class, _ = COMMANDS[command]
    groups = {field.name: field.type for field in fields(config_class) if is_dataclass(field.type)}
    for group, config in {'': config_class, **groups}.items():
        assert main([command, '--help', *filter(None, [group])]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) < 80 and max(map(len, lines)) <= 150
        for name in {field.name for field in fields(config)} - (set() if group else set(groups)):
            flag = f'--{group}.{name}' if group else f'--{name}'
            ((i, line),) = [(i, line) for i, line in enumerate(lines) if line.split()[:1] == [flag]]
            described = line.split()[1:] or lines[i + 1].split()
            assert described and described[0] != '(default:', f'{flag} of {command} has no text'
    if groups:
        assert main([command, '--help', next(iter(groups)) + 'x']) == 2
        assert f'Did you mean {next(iter(groups))!r}?' in capsys.readouterr().err


def test_list_as_json_is_the_most_robust_first(capsys):
    assert main(['list', '--json', '--data', 'mnist']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]['name'] == 'mnist_cnn.pgd_at_mnist' and found[0]['epsilon'] == 0.3
    at = [entry['accuracy'] for entry in found if entry['epsilon'] == 0.3]
    assert at == sorted(at, reverse=True) and len(at) == 4
    assert [entry._asdict() for entry in timm_batchout.list_robust('mnist', 'Linf')] == found
    assert timm_batchout.list_robust('mnist', 'L2') == []
    for words, message in (
        (['--data', 'svhn'], 'Available: CIFAR-10'),
        (['--norm', 'Linf'], '--norm filters the records of --json'),
        (['--json', '--norm', 'L1'], "norm must be 'Linf' or 'L2'"),
    ):
        assert main(['list', *words]) == 2
        assert message in capsys.readouterr().err


def test_compare_as_comma_separated_values(tmp_path, capsys):
    report = timm_batchout.hub.listing.bundled_reports('cifar10')['batchout_cifar_vgg.cifar10']
    report.save(tmp_path / 'report.json')
    assert main(['compare', str(tmp_path / 'report.json'), '--csv']) == 0
    head, clean, *rest = capsys.readouterr().out.splitlines()
    assert head == 'model,data,attack,norm,radius,iteration,stage,corruption,correct,n,accuracy,masked'
    correct = report.score('clean').correct
    assert clean == f'{report.model},CIFAR-10,clean,,,,,,{correct},10000,{correct / 10000},False'
    assert len(rest) == len(report.scores) - 1


def test_public_names_are_what_they_say():
    for name in timm_batchout.__all__:
        value = getattr(timm_batchout, name)
        if name == 'attacks':
            assert value.PGD.name == 'pgd'
            continue
        assert callable(value) and not isinstance(value, type(sys)), f'{name} is hidden by a module'
    assert set(timm_batchout.__all__) <= set(dir(timm_batchout))
    with pytest.raises(AttributeError, match='no attribute'):
        timm_batchout.nothing  # noqa: B018
