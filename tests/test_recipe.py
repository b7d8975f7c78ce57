"""Recipes and flags: what they become, and what is refused."""

import pytest

from timm_batchout.cli.main import main
from timm_batchout.data.config import AugmentConfig, DataConfig
from timm_batchout.recipe import configure, parse, read_recipe
from timm_batchout.training.config import ObjectiveConfig, TrainConfig


def test_unknown_key_in_a_recipe_names_the_nearest(tmp_path, capsys):
    recipe = tmp_path / 'recipe.yaml'
    for text, nearest in (
        ('modle: mnist_cnn', 'model'),
        ('data: {roots: x}', 'data.root'),
        ('data: {nme: digits}', 'data.name'),
        ('epoch: 3', 'epochs'),
    ):
        recipe.write_text(text)
        assert main(['train', '--config', str(recipe)]) == 2
        assert f'Did you mean {nearest!r}?' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words, expected',
    [
        (['--dry-run'], {'dry_run': True}),
        (['--dry-run', '--resume', '--seed', '3'], {'dry_run': True, 'resume': True, 'seed': 3}),
        (['--allow-changes=false', '--resume', 'auto'], {'allow_changes': False, 'resume': 'auto'}),
        (['--data.download', '--eval-batch-size=7'], {'data': DataConfig(download=True), 'eval_batch_size': 7}),
        (['--trackers', 'tensorboard', 'wandb', '--epochs', '2'], {'trackers': ['tensorboard', 'wandb'], 'epochs': 2}),
        (['--augment.scale', '0.5', '1'], {'augment': AugmentConfig(scale=[0.5, 1.0])}),
        (['--trackers=[tensorboard]'], {'trackers': ['tensorboard']}),
        (['--output', '--dry-run'], None),  # a flag that takes a value still needs one
    ],
)
def test_switches_need_no_value_lists_no_brackets_and_dashes_are_underscores(words, expected):
    if expected is None:
        with pytest.raises(ValueError, match='output'):
            parse(TrainConfig, words)
    else:
        assert parse(TrainConfig, words) == TrainConfig(**expected)


def test_a_recipe_states_what_differs_from_its_base(tmp_path, capsys):
    (tmp_path / 'base.yaml').write_text('epochs: 7\nmodel_args: {k: 0.25, eta: 0.2}\noptimizer: {name: sgd, lr: 0.1}\n')
    middle = tmp_path / 'middle' / 'middle.yaml'
    middle.parent.mkdir()
    middle.write_text('base: ../base.yaml\nmodel_args: {eta: 0.1}\n')
    (tmp_path / 'recipe.yaml').write_text('base: middle/middle.yaml\noptimizer: {lr: 0.2}\nmodel: batchout_cifar_vgg\n')
    for flag in (['--config', str(tmp_path / 'recipe.yaml')], [f'--config={tmp_path / "recipe.yaml"}']):
        config = parse(TrainConfig, [*flag, '--optimizer.momentum', '0.5'])
        assert (config.epochs, config.model) == (7, 'batchout_cifar_vgg')
        assert config.model_args == {'k': 0.25, 'eta': 0.1}
        assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ('sgd', 0.2, 0.5)
    middle.write_text('base: nowhere.yaml')
    assert main(['train', '--config', str(tmp_path / 'recipe.yaml')]) == 2
    assert 'nowhere.yaml' in capsys.readouterr().err
    middle.write_text('base: ../recipe.yaml')
    assert main(['train', '--config', str(tmp_path / 'recipe.yaml')]) == 2
    assert 'which is based on it' in capsys.readouterr().err
    middle.write_text('base: ../base.yaml\nepoch: 3')
    assert main(['train', '--config', str(tmp_path / 'recipe.yaml')]) == 2
    assert "Did you mean 'epochs'?" in capsys.readouterr().err


def test_from_python_as_from_the_command_line(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('optimizer: {name: sgd, lr: 1/4}\nmodel: batchout_cifar_vgg\n')
    words = ['--config', str(recipe), '--optimizer.momentum', '0.5', '--epochs', '3']
    config = configure(TrainConfig, recipe, optimizer={'momentum': 0.5}, epochs=3)
    assert config == parse(TrainConfig, words)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ('sgd', 0.25, 0.5)
    assert configure(TrainConfig, {'model': 'x'}, output=tmp_path) == TrainConfig(model='x', output=str(tmp_path))
    with pytest.raises(ValueError, match="Did you mean 'epochs'"):
        configure(TrainConfig, None, epoch=3)
    with pytest.raises(ValueError, match='epochs'):
        configure(TrainConfig, {'epochs': 'many'})


def test_radii_are_written_alike_everywhere(tmp_path):
    expected = ObjectiveConfig(name='pgd', epsilon=8 / 255, step_size=2 / 255)
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('objective: {name: pgd, epsilon: 8/255, step_size: 2/255}')
    flags = ['--objective.name', 'pgd', '--objective.epsilon', '8/255', '--objective.step_size=2/255']
    assert parse(TrainConfig, ['--config', str(recipe)]).objective == expected
    assert parse(TrainConfig, flags).objective == expected
    with pytest.raises(ValueError, match='8/x'):
        parse(TrainConfig, ['--objective.epsilon', '8/x'])


def bomb(path):
    lines = ['a0: &a0 {k: 1}'] + [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 30)]
    path.write_text('\n'.join(lines))


def chain(path):
    for i in range(1500):
        path.with_name(f'{i}.yaml').write_text(f'base: {i + 1}.yaml')
    path.write_text('base: 0.yaml')


@pytest.mark.parametrize(
    'write, message',
    [
        (bomb, 'more than 100 aliases'),
        (chain, 'a chain of more than 20 bases'),
        (lambda path: path.write_text('model_args: ' + '[' * 3000 + ']' * 3000), 'more than 50 levels'),
        (lambda path: path.write_text('a: [1'), 'cannot be read as YAML'),
        (lambda path: path.write_bytes(b'\xff\xfe\x00'), 'cannot be read as YAML'),
        (lambda path: path.write_text('- 1'), 'must contain a mapping'),
        (lambda path: None, "recipe.yaml' does not exist"),
        (lambda path: path.mkdir(), 'cannot be read as YAML'),
    ],
)
def test_files_that_are_no_recipe(tmp_path, capsys, write, message):
    write(tmp_path / 'recipe.yaml')
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / 'recipe.yaml')
    assert main(['train', '--config', str(tmp_path / 'recipe.yaml')]) == 2
    assert message in capsys.readouterr().err


def test_a_name_that_no_file_can_have():
    with pytest.raises(ValueError, match='not a file name'):
        parse(TrainConfig, ['--config', 'a\0b'])
    for name in ('output', 'data.root'):
        with pytest.raises(ValueError, match=f'{name} contains a NUL character'):
            parse(TrainConfig, [f'--{name}', 'a\0b'])
