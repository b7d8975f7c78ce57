"""Training on real data: scikit-learn's digits, whole runs of the command line, resumed runs, and bad input."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from timm_batchout import batchout_sites
from timm_batchout.cli.main import main
from timm_batchout.data.config import AugmentConfig, DataConfig
from timm_batchout.data.images import Split
from timm_batchout.data.memory import TensorLoader, load_data, load_split
from timm_batchout.data.timm_splits import input_cfg
from timm_batchout.pixels import fgsm, normalization
from timm_batchout.recipe import parse, read_recipe
from timm_batchout.robustness.report import Report
from timm_batchout.training.config import ObjectiveConfig, TrainConfig
from timm_batchout.training.objectives import Objective
from timm_batchout.training.run_folder import RunFolder

PGD = ['--objective.name', 'pgd', '--objective.epsilon']
DIGITS = ['--data.name', 'digits', '--batch_size', '64', '--schedule.warmup_epochs', '0.5']


def run(output, *arguments):
    return main(['train', *DIGITS, '--output', str(output), *arguments])


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run of four epochs."""
    output = tmp_path_factory.mktemp('runs') / 'four'
    assert run(output, '--epochs', '4', '--optimizer.lr', '2e-3') == 0
    return output


def test_the_recorded_config_repeats_the_run_bit_for_bit_and_quietly_if_told(finished, tmp_path, capfd):
    again = tmp_path / 'again'
    capfd.readouterr()
    assert main(['train', '--config', str(finished / 'config.yaml'), '--output', str(again), '--quiet']) == 0
    assert ''.join(capfd.readouterr()) == ''
    assert lines(again) == lines(finished)
    assert (again / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()


def test_a_quiet_evaluation_prints_nothing(finished, tmp_path, capfd):
    model = str(finished / 'model.safetensors')
    capfd.readouterr()
    command = ['evaluate', 'mnist_cnn', '--checkpoint', model, '--data.name', 'digits', '--images', '20', '--quiet']
    assert main([*command, '--audit', 'false', '--output', str(tmp_path / 'report.json')]) == 0
    assert main([*command, '--audit', 'false', '--expect', str(tmp_path / 'report.json')]) == 0
    assert ''.join(capfd.readouterr()) == ''


def lines(output):
    timing = ('seconds', 'images_per_second')
    records = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


def test_run_folder(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        '.timm-batchout-run', 'best.safetensors', 'checkpoints', 'config.yaml', 'metrics.jsonl', 'model.safetensors',
        'result.json',
    ]  # fmt: skip
    result = json.loads((finished / 'result.json').read_text())
    assert result['metrics']['test_n'] == 360
    assert result['metrics']['test_accuracy'] > 0.9
    assert result['metrics']['test_accuracy'] == result['metrics']['test_correct'] / 360
    assert result['data'] == 'scikit-learn digits (28x28)'
    assert result['environment']['torch'] and result['environment']['hardware']
    assert set(lines(finished)[-1]['val_norms']) == {'stages.0.act1', 'stages.1.act1', 'pre_logits.act1'}
    assert lines(finished)[-1]['val_logit_std'] > 0
    config = yaml.safe_load((finished / 'config.yaml').read_text())
    assert (config['model'], config['epochs'], config['data']['name']) == ('batchout_mnist_cnn', 4, 'digits')


def test_weights_are_the_plain_nets_and_score_as_stated(finished, tmp_path):
    result = json.loads((finished / 'result.json').read_text())
    file = finished / 'model.safetensors'
    assert set(load_file(file)) == set(timm.create_model('mnist_cnn').state_dict())
    output = tmp_path / 'report.json'
    arguments = ['mnist_cnn', '--checkpoint', str(file), '--data.name', 'digits', '--eps', '[0.1, 8/255]']
    assert main(['evaluate', *arguments, '--audit', 'false', '--output', str(output)]) == 0
    report = Report.load(output)
    assert report.score('clean').correct == result['metrics']['test_correct']
    assert report.score('fgsm', '0.1').correct < report.score('fgsm', '8/255').correct
    assert report.score('fgsm', '8/255').correct <= report.score('clean').correct


def test_a_run_whose_recipe_is_older_than_a_field_resumes(finished, tmp_path):
    cut = tmp_path / 'cut'
    shutil.copytree(finished, cut)
    recipe = yaml.safe_load((cut / 'config.yaml').read_text())
    recipe['output'] = str(cut)
    asked = tmp_path / 'asked.yaml'
    asked.write_text(yaml.safe_dump(recipe))
    del recipe['clip_grad'], recipe['data']['options']
    (cut / 'config.yaml').write_text(yaml.safe_dump(recipe))
    assert main(['train', '--config', str(asked), '--resume', 'true']) == 0
    recipe['data']['val_fraction'] = 0.3  # a field that is there, and differs, is a change
    (cut / 'config.yaml').write_text(yaml.safe_dump(recipe))
    assert main(['train', '--config', str(asked), '--resume', 'true']) == 2


def test_resume_ends_with_the_same_weights(finished, tmp_path):
    """A run cut off after its third epoch, and resumed from the checkpoint of that epoch."""
    cut = tmp_path / 'cut'
    shutil.copytree(finished, cut)
    shutil.rmtree(max((cut / 'checkpoints').iterdir()))
    (cut / 'model.safetensors').unlink()
    config = cut / 'config.yaml'
    assert main(['train', '--config', str(config), '--output', str(finished), '--resume', 'true']) == 0  # at its end
    text = config.read_text().replace(str(finished), str(cut))
    config.write_text(text)
    assert main(['train', '--config', str(config), '--resume', 'true']) == 0
    assert lines(cut) == lines(finished)
    assert (cut / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()


def test_resume_refuses_a_changed_recipe_and_nothing_to_resume(finished, tmp_path, capsys):
    assert run(finished, '--epochs', '4', '--optimizer.lr', '5e-3', '--resume', 'true') == 2
    message = capsys.readouterr().err
    assert 'optimizer.lr: saved 0.002, now 0.005' in message and 'allow-changes' in message
    assert run(tmp_path / 'none', '--resume', 'true') == 2
    assert 'Nothing to resume' in capsys.readouterr().err
    assert not (tmp_path / 'none').exists()


def test_a_used_output_folder_is_refused(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob('*')}
    assert run(finished) == 2
    assert 'already contains a run' in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob('*')} == before


ONE_CHANNEL = '{in_chans: 1, num_classes: 10, pretrained_cfg_overlay: {mean: [0.4], std: [0.3]}}'


@pytest.mark.parametrize(
    ('model', 'extra'),
    [
        ('mnist_cnn', ['--objective.name', 'fgsm', '--objective.epsilon', '0.2']),
        ('batchout_mnist_cnn', ['--model_args', '{noise: gaussian}']),
        ('test_resnet', ['--model_args', ONE_CHANNEL]),
    ],
)
def test_objectives_and_options_learn(tmp_path, model, extra):
    assert run(tmp_path / 'run', '--model', model, '--epochs', '2', '--optimizer.lr', '2e-3', *extra) == 0
    first, last = lines(tmp_path / 'run')
    assert last['train_loss'] < first['train_loss']
    assert last['val_accuracy'] > 0.3  # chance is 0.1
    weights = load_file(tmp_path / 'run' / 'model.safetensors').values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float32}


def test_bf16_autocast_keeps_float32_weights(tmp_path):
    """A CPU without bf16 units is slow at it: a few steps only."""
    few = ['--model', 'test_resnet', '--model_args', ONE_CHANNEL, '--epochs', '2', '--data.val_fraction', '0.9']
    losses = {}
    for precision in ('no', 'bf16'):
        assert run(tmp_path / precision, *few, '--precision', precision) == 0
        losses[precision] = [line['train_loss'] for line in lines(tmp_path / precision)]
        weights = load_file(tmp_path / precision / 'model.safetensors').values()
        assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float32}
    assert losses['bf16'] != losses['no']
    assert losses['bf16'] == pytest.approx(losses['no'], rel=0.02)


@pytest.mark.parametrize('ema_decay', ['0', '0.5'])
def test_a_bf16_run_reports_what_its_weights_do_in_float32(tmp_path, ema_decay):
    few = ['--model', 'mnist_cnn', '--epochs', '1', '--data.val_fraction', '0.9', '--precision', 'bf16']
    assert run(tmp_path / 'run', *few, '--ema_decay', ema_decay) == 0
    metrics = json.loads((tmp_path / 'run' / 'result.json').read_text())['metrics']
    net = timm.create_model('mnist_cnn', checkpoint_path=str(tmp_path / 'run' / 'model.safetensors')).eval()
    test = load_split(DataConfig('digits'), train=False)
    with torch.no_grad():
        logits = net(test.images / 255)
    assert metrics['test_correct'] == int((logits.argmax(1) == test.labels).sum())
    assert metrics['test_loss'] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-6)


def test_fgsm_training_sees_half_a_batch_of_attacks_on_the_eval_mode_net():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            seen.append((self.training, x.detach().clone()))
            return self.drop(self.fc(x))

    torch.manual_seed(0)
    net = Spy()
    images, labels = torch.rand(8, 4), torch.randint(3, (8,))
    loss = Objective(ObjectiveConfig('fgsm', 0.1))(net, images, labels)
    (attack_mode, _), (loss_mode, batch) = seen
    assert (attack_mode, loss_mode, net.training) == (False, True, True)
    assert torch.equal(batch[4:], images[4:])
    net.eval()
    assert torch.equal(batch[:4], fgsm(net, images[:4], labels[:4], 0.1))
    assert net.fc.weight.grad is None, 'the attack left gradients on the parameters'
    loss.backward()
    assert net.fc.weight.grad is not None


def test_fgsm_is_equation_4():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2), torch.randint(3, (5,))
    x = images.clone().requires_grad_()
    F.cross_entropy(net(x), labels).backward()
    expected = (images + 0.1 * x.grad.sign()).clamp(0, 1)
    assert torch.equal(fgsm(net, images, labels, 0.1), expected)


def test_validation_is_held_out_and_stratified():
    config = DataConfig('digits', val_fraction=0.2)
    whole = load_split(config, train=True)
    train, val, test = load_data(config)
    assert len(train) + len(val) == len(whole) == 1437
    assert len(test) == 360
    share = val.labels.bincount() / whole.labels.bincount()
    assert (share - 0.2).abs().max() < 0.01
    rows = {image.numpy().tobytes() for image in train.images}
    assert not rows & {image.numpy().tobytes() for image in val.images}
    assert torch.equal(load_data(config)[1].images, val.images)
    other = load_data(DataConfig('digits', val_fraction=0.2, split_seed=1))[1]
    assert not torch.equal(other.images, val.images)


def test_loader_order_depends_on_seed_and_epoch_alone():
    split = load_split(DataConfig('digits'), train=False)

    def order(seed, epoch):
        loader = TensorLoader(split, 50, shuffle=True, seed=seed)
        loader.epoch = epoch
        torch.rand(seed + epoch)  # draws elsewhere must not matter
        return torch.cat([labels for _, labels in loader])

    assert len(order(0, 0)) == 350, 'the incomplete batch is dropped'
    assert torch.equal(order(0, 1), order(0, 1))
    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))
    batches = list(TensorLoader(split, 50, channels_last=True))
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() <= 1
    assert torch.equal((images * 255).round().to(torch.uint8), split.images)


def test_image_folder_and_tar_hold_the_same_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / 'tiny'
    for part in ('train', 'test'):
        for name in ('cat', 'ant'):
            (folder / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
                Image.fromarray(pixels).save(folder / part / name / f'{i}.png')
    with tarfile.open(tmp_path / 'tiny.tar.xz', 'w:xz') as tar:
        for part in ('test', 'train'):
            tar.add(folder / part, part)
    a = load_split(DataConfig('image_folder', str(folder)), train=True)
    b = load_split(DataConfig('image_folder', str(tmp_path / 'tiny.tar.xz')), train=True)
    assert a.images.shape == (8, 3, 8, 8) and a.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    Image.new('RGB', (9, 8)).save(folder / 'train' / 'cat' / '9.png')
    with pytest.raises(ValueError, match='differ in size'):
        load_split(DataConfig('image_folder', str(folder)), train=True)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--epochs', '0'], 'epochs must be at least 1, got 0'),
        (['--epochs', 'many'], "Expected a <class 'int'>"),
        (['--batch_size', '5000'], 'batch_size=5000 is larger than the training set'),
        (['--optimizer.lr', '-1'], 'optimizer.lr must be positive'),
        (['--optimizer.lrr', '1'], "Did you mean 'optimizer.lr'?"),
        (['--data.name', 'imagenet'], 'imagenet'),
        (['--data.name', 'mnist', '--data.root', 'nowhere'], "'nowhere' (data.root)"),
        (['--data.name', 'image_folder', '--data.root', 'nowhere'], "'nowhere' (data.root)"),
        (['--objective.name', 'fgsm'], 'objective.epsilon must be positive for fgsm'),
        (
            ['--model', 'cifar_vgg'],
            'The images have 1 channels, but the mean of the model has 3 values. Set model_args.in_chans=1',
        ),
        (['--model', 'batchout_mnist_cnm'], 'batchout_mnist_cnm'),
        (['--model_args', '{num_classes: 5}'], 'The model has 5 classes, the data 10'),
        (['--model_args', '{k: 3}'], 'k is the share'),
        (['--output', ''], 'output is empty'),
        (['--optimizer.name', 'adamx'], 'adamx'),
        (['--data.val_fraction', '0.0001'], 'holds out no image'),
        (['--model', 'mnist_cnn', '--model_args', '{img_size: 32}'], 'takes images of shape (batch, 1, 32, 32)'),
        (['--schedule.warmup_epochs', '99'], 'warmup_epochs must lie in'),
        (['--optimizer.lr', '.nan'], 'optimizer.lr must be a finite number, got nan'),
        (['--optimizer.weight_decay', '.inf'], 'optimizer.weight_decay must be a finite number, got inf'),
        (['--optimizer.momentum', '.nan'], 'optimizer.momentum must be a finite number'),
        (['--augment.mixup', '.nan'], 'augment.mixup must be a finite number'),
        (['--schedule.decay_rate', '.nan'], 'schedule.decay_rate must be a finite number'),
        ([*PGD, '-0.1'], 'objective.epsilon must be positive for pgd'),
        ([*PGD, '8'], 'divide 8-bit values by 255'),
        ([*PGD, '0.1', '--objective.steps', '0'], 'objective.steps must be at least 1, got 0'),
        ([*PGD, '0.1', '--objective.epsilon_warmup', '2'], 'objective.epsilon_warmup is a share in [0, 1], got 2'),
        ([*PGD, '0.1', '--robust_val.steps', '0'], 'robust_val.steps must be at least 1, got 0'),
        ([*PGD, '0.1', '--augment.mixup', '0.2'], 'Mixup and CutMix mix labels'),
        (
            ['--objective.name', 'fgsm', '--objective.norm', 'L2', '--objective.epsilon', '0.1'],
            "L2 needs objective 'pgd'",
        ),
        (
            ['--objective.name', 'fgsm_rs', '--objective.norm', 'L2', '--objective.epsilon', '0.5'],
            "needs objective 'pgd' or 'trades'",
        ),
        (['--model_args', '{num_classes: 1000000000000000}'], 'cannot be created with model_args'),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run('out', *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert any(part in error for part in message.split('|'))
    assert list(tmp_path.iterdir()) == []


class Plain(nn.Module):
    """A registered net that states no normalisation, and uses one module twice."""

    def __init__(self, num_classes=1000, shared=False, **kwargs):
        super().__init__()
        self.num_classes = num_classes
        self.first = nn.Linear(784, 784)
        self.again = self.first if shared else nn.Identity()
        self.act1 = nn.ReLU()
        self.head = nn.Linear(784, num_classes)

    def forward(self, x):
        return self.head(self.act1(self.again(self.first(x.flatten(1)))))


@pytest.fixture
def plain_net(monkeypatch):
    """``plain_net`` among timm's models, for one test."""
    from timm.models import _registry

    def plain_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
        return Plain(**kwargs)

    monkeypatch.setitem(_registry._model_entrypoints, 'plain_net', plain_net)
    monkeypatch.setitem(_registry._model_to_module, 'plain_net', __name__)
    return 'plain_net'


def test_a_net_without_pretrained_cfg_is_trained_and_scored_on_the_same_pixels(tmp_path, plain_net, capsys):
    output = tmp_path / 'run'
    assert run(output, '--model', plain_net, '--epochs', '1') == 0
    assert 'num_classes=10, from the data' in capsys.readouterr().out
    assert yaml.safe_load((output / 'config.yaml').read_text())['model_args'] == {'num_classes': 10}
    result = json.loads((output / 'result.json').read_text())
    model = timm.create_model(plain_net, num_classes=10)
    model.load_state_dict(load_file(output / 'model.safetensors'))
    assert normalization(model) == ((0.0,), (1.0,))
    assert input_cfg(model, DataConfig('digits'))['mean'] == (0.0,)
    split = load_split(DataConfig('digits'), train=False)
    right = int((model.eval()(split.images / 255).argmax(1) == split.labels).sum())
    assert right == result['metrics']['test_correct'] > 180  # half of 360
    assert run(output, '--model', plain_net, '--epochs', '1', '--resume') == 0


def test_a_net_that_uses_a_module_twice_is_saved_and_resumed(tmp_path, plain_net):
    output = tmp_path / 'run'
    arguments = ('--model', plain_net, '--model_args', '{shared: true, num_classes: 10}', '--optimizer.lr', '1e-4')
    assert run(output, *arguments, '--epochs', '2') == 0
    file = output / 'model.safetensors'
    whole, weights = file.read_bytes(), load_file(file)
    assert torch.equal(weights['first.weight'], weights['again.weight'])
    assert file.stat().st_mode == (output / 'config.yaml').stat().st_mode
    shutil.rmtree(max((output / 'checkpoints').iterdir()))
    file.unlink()
    assert run(output, *arguments, '--epochs', '2', '--resume') == 0
    assert file.read_bytes() == whole
    assert [line['epoch'] for line in lines(output)] == [1, 2]


def test_fewer_epochs_than_were_trained_end_with_a_validation(tmp_path):
    output = tmp_path / 'run'
    assert run(output, '--epochs', '3', '--eval_epochs', '3', '--checkpoint.keep', '3') == 0
    shutil.rmtree(max((output / 'checkpoints').iterdir()))
    assert run(output, '--epochs', '2', '--eval_epochs', '3', '--resume', '--allow-changes') == 0
    assert 0 < json.loads((output / 'result.json').read_text())['metrics']['val_accuracy'] <= 1


def test_training_stops_when_robust_accuracy_no_longer_rises(tmp_path):
    """With a learning rate of almost nothing no epoch beats the first."""
    patient = ['--robust_val.patience', '2', '--robust_val.images', '20', '--optimizer.lr', '1e-12']
    assert run(tmp_path / 'run', *PGD, '0.1', '--objective.steps', '1', '--epochs', '9', *patient) == 0
    assert len(lines(tmp_path / 'run')) == 3


@pytest.mark.parametrize('files', [['config.yaml', 'best.safetensors', 'result.json'], ['notes.txt'], ['config.yaml']])
def test_somebody_elses_folder_is_left_alone(tmp_path, capsys, files):
    for name in files:
        (tmp_path / name).write_text('mine')
    for resume in ([], ['--resume', 'auto']):
        assert run(tmp_path, *resume) == 2
        assert 'choose another --output' in capsys.readouterr().err.lower()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(files, 'mine')


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path, capsys):
    folder = RunFolder(tmp_path / 'run')
    folder.claim(TrainConfig(output=str(tmp_path / 'run')))
    assert run(tmp_path / 'run', '--epochs', '1') == 2
    assert 'Another process is training into' in capsys.readouterr().err
    folder.release()
    assert run(tmp_path / 'run', '--epochs', '1') == 0


RECIPES = Path(__file__).parents[2] / 'recipes'


@pytest.mark.parametrize('folder', ['', 'paper', 'cifar10', 'imagenet'])
def test_every_recipe_is_valid(folder):
    recipes = sorted(
        path
        for path in (RECIPES / folder).glob('*.yaml')
        if path.stem != 'base' and not path.stem.startswith('evaluate_')
    )
    assert recipes
    for recipe in recipes:
        config = parse(TrainConfig, ['--config', str(recipe), '--output', 'x'])
        config.validate()
        with torch.device('meta'):
            model = timm.create_model(config.model, **{**config.model_args, 'pretrained': False})
        assert bool(batchout_sites(model)) == config.model.startswith('batchout_')


def test_recipes_of_a_dataset_share_optimizer_schedule_and_epochs():
    folder = RECIPES / 'paper'
    names = ('data', 'optimizer', 'schedule', 'epochs', 'batch_size', 'seed')
    for data in ('mnist', 'cifar10'):
        recipes = [read_recipe(path) for path in folder.glob(f'{data}_*.yaml')]
        assert len(recipes) == 4
        shared = {str([recipe[name] for name in names]) for recipe in recipes}
        assert len(shared) == 1


def test_nan_loss_stops_with_the_step(tmp_path, capsys):
    assert run(tmp_path / 'run', '--optimizer.name', 'sgd', '--optimizer.lr', '1e20', '--epochs', '3') == 2
    error = capsys.readouterr().err
    assert 'The loss became' in error and 'step' in error
    assert not (tmp_path / 'run' / 'model.safetensors').exists()


def test_ranks_share_an_epoch_without_overlap():
    split = load_split(DataConfig('digits'), train=False)
    whole = TensorLoader(split, 40, shuffle=True, seed=3)
    parts = [TensorLoader(split, 20, shuffle=True, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert [len(part) for part in parts] == [len(whole)] * 2
    for batch, *shares in zip(whole, *parts, strict=True):
        union = torch.stack([shares[0][0], shares[1][0]], dim=1).flatten(0, 1)
        assert torch.equal(union, batch[0])


@pytest.mark.parametrize(
    'text, message',
    [
        ('data: null', 'data is empty'),
        ('precision: fp16\ndata: {name: digits}', 'fp16 needs a GPU'),
        ('trackers: [nowhere]\ndata: {name: digits}', "'nowhere' is not installed"),
        ('schedule: {min_lr: -1}', 'min_lr is a share'),
        ('schedule: {name: step, decay_epochs: 0}', 'decay_epochs and decay_rate must be positive'),
        ('data: {name: digits, val_fraction: 0.9999}', 'holds out every image. Lower it'),
    ],
)
def test_more_that_is_refused_before_anything_is_written(tmp_path, capsys, text, message):
    (tmp_path / 'recipe.yaml').write_text(text)
    assert main(['train', '--config', str(tmp_path / 'recipe.yaml'), '--output', str(tmp_path / 'run')]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_trackers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path / 'run', '--epochs', '1', '--schedule.warmup_epochs', '0', '--trackers', '[tensorboard]') == 0
    (events,) = (tmp_path / 'run').rglob('events.out.*.0')
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = [event.value for event in accumulator.Scalars('val_accuracy')]
    assert logged == pytest.approx([line['val_accuracy'] for line in lines(tmp_path / 'run')])


def test_crops_and_flips_on_the_device_depend_on_seed_epoch_and_step_alone():
    split = Split(torch.arange(64 * 3 * 64, dtype=torch.int64).view(64, 3, 8, 8).to(torch.uint8), torch.arange(64))

    def batches(augment, seed=0, start=0):
        loader = TensorLoader(split, 16, shuffle=True, seed=seed, augment=augment)
        loader.start = start
        return [(images * 255).round().to(torch.uint8) for images, _ in loader]

    plain = torch.cat(batches(AugmentConfig()))
    flipped = torch.cat(batches(AugmentConfig(hflip=1.0)))
    assert torch.equal(flipped, plain.flip(3))
    augment = AugmentConfig(hflip=0.5, padding=2)
    once, again = batches(augment), batches(augment)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once[2:], batches(augment, start=2), strict=True))
    # Each is a window of the padded image, flipped or not.
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    for image, source in zip(torch.cat(once), padded, strict=True):
        windows = source.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)
    assert not torch.equal(torch.cat(once), plain)


def test_broken_images_and_empty_classes_of_a_folder(tmp_path, capsys):
    folder = tmp_path / 'tiny'
    for part in ('train', 'test'):
        for name in ('cat', 'ant'):
            (folder / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new('RGB', (8, 8)).save(folder / part / name / f'{i}.png')
    (folder / 'train' / 'cat' / 'torn.png').write_bytes(b'no image')
    config = DataConfig('image_folder', str(folder))
    with pytest.warns(UserWarning, match=r'Skipping 1 images that do not decode: .*torn\.png'):
        assert len(load_split(config, train=True)) == 6
    with pytest.raises(ValueError, match=r'torn\.png does not decode .*data\.broken=skip'):
        load_split(DataConfig('image_folder', str(folder), broken='stop'), train=True)
    (folder / 'test' / 'dog').mkdir()
    for train in (True, False):
        with pytest.raises(ValueError, match=r'Classes of .* without an image in .*: dog\.'):
            load_split(DataConfig('image_folder', str(folder)), train=train)
