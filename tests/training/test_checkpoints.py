"""Runs that are killed, stopped, starved of disk or led astray, and go on to the weights they would have had."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from timm_batchout import batchout_sites
from timm_batchout.cli.main import main
from timm_batchout.data.config import AugmentConfig, DataConfig
from timm_batchout.data.memory import load_data
from timm_batchout.training.checkpoints import newest_checkpoint, restore_checkpoint
from timm_batchout.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from timm_batchout.training.parts import make_trainer
from timm_batchout.training.stopping import StopSignals
from timm_batchout.training.trainer import Trainer
from timm_batchout.training.validate import _all

# Everything that has a state: BatchOut and dropout draws, moving average, accumulated gradients, warm-ups, schedule.
RECIPE = {
    'model': 'batchout_mnist_cnn',
    'data': {'name': 'digits'},
    'optimizer': {'name': 'adamw', 'lr': 2e-3},
    'schedule': {'warmup_epochs': 0.5, 'eta_warmup_epochs': 1.5},
    'objective': {'label_smoothing': 0.1},
    'epochs': 3,
    'batch_size': 32,
    'accumulate': 2,
    'clip_grad': 1.0,
    'ema_decay': 0.9,
    'checkpoint': {'steps': 7, 'keep': 3},
}
ALONE = [sys.executable, '-m', 'timm_batchout.cli']
# Accelerate's own launcher starts several CPU processes by MPI only; torch's does with what torch has.
TWO = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '-m', 'timm_batchout.cli']


def arguments(tmp_path, output, **changes):
    """``train`` by the recipe above; the names of flags are the keys of the recipe."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(RECIPE))
    flags = [text for name, value in changes.items() for text in (f'--{name.replace("__", ".")}', str(value))]
    return ['train', '--config', str(recipe), '--output', str(output), *flags]


def start(launcher, command):
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'GLOO_SOCKET_IFNAME': 'lo',
        'ACCELERATE_USE_CPU': 'true',
    }
    return subprocess.Popen(
        [*launcher, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def outcome(output):
    """Weights and metrics, without what a clock wrote."""
    records = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    clock = ('seconds', 'images_per_second')
    metrics = [{name: value for name, value in record.items() if name not in clock} for record in records]
    return (output / 'model.safetensors').read_bytes(), (output / 'best.safetensors').read_bytes(), metrics


def kill_at(checkpoint, process):
    """The launcher and its workers, which have sessions of their own and would train on without it."""
    wait_for(checkpoint, process)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """As in the processes started here: the sums of several threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """What the uninterrupted run ends with."""
    folder = tmp_path_factory.mktemp('alone')
    assert main(arguments(folder, folder / 'run')) == 0
    return outcome(folder / 'run')


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """A run killed after its first epoch."""
    folder = tmp_path_factory.mktemp('killed')
    process = start(ALONE, arguments(folder, folder / 'run'))
    kill_at(folder / 'run' / 'checkpoints' / 'step_000000040', process)
    assert not (folder / 'run' / 'model.safetensors').exists()
    return folder / 'run'


def resume(tmp_path, output):
    assert main(arguments(tmp_path, output, resume='true')) == 0
    return outcome(output)


# 1,294 training images: 40 forwards an epoch alone, 20 each on two processes; checkpoints every 14 and at epochs' ends.
def test_killed_at_the_end_of_an_epoch_and_resumed(tmp_path, alone, killed):
    """The recipe that it leaves is that of the run that was killed, not of one that resumes."""
    output = shutil.copytree(killed, tmp_path / 'run')
    for later in (output / 'checkpoints').glob('step_*'):  # the kill may have come after another checkpoint
        if later.name > 'step_000000040':
            shutil.rmtree(later)
    assert resume(tmp_path, output) == alone
    before, after = (yaml.safe_load((run / 'config.yaml').read_text()) for run in (killed, output))
    assert after.pop('output') != before.pop('output') and after == before


def test_killed_within_an_epoch_and_resumed_by_another_process(tmp_path, alone):
    output = tmp_path / 'run'
    kill_at(output / 'checkpoints' / 'step_000000054', start(ALONE, arguments(tmp_path, output)))
    assert not (output / 'model.safetensors').exists()
    assert resume(tmp_path, output) == alone


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_killed_and_resumed(tmp_path):
    finish(start(TWO, arguments(tmp_path, tmp_path / 'whole')))
    output = tmp_path / 'run'
    kill_at(output / 'checkpoints' / 'step_000000034', start(TWO, arguments(tmp_path, output)))
    finish(start(TWO, arguments(tmp_path, output, resume='auto')))
    assert outcome(output) == outcome(tmp_path / 'whole')
    result = json.loads((output / 'result.json').read_text())
    assert result['environment']['processes'] == 2 and result['metrics']['test_n'] == 360
    assert result['metrics']['test_accuracy'] > 0.8
    assert set(load_file(output / 'model.safetensors')) == set(timm.create_model('mnist_cnn').state_dict())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_take_the_steps_of_one(tmp_path):
    """Without dropout and BatchOut, 2 x 32 images are 1 x 64."""
    same = dict(model='mnist_cnn', model_args='{drop_rate: 0.0}', accumulate=1, epochs=1, optimizer__name='sgd')
    assert main(arguments(tmp_path, tmp_path / 'one', batch_size=64, **same)) == 0
    finish(start(TWO, arguments(tmp_path, tmp_path / 'two', batch_size=32, **same)))
    one, two = (load_file(tmp_path / name / 'model.safetensors') for name in ('one', 'two'))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    one, two = (json.loads((tmp_path / name / 'metrics.jsonl').read_text()) for name in ('one', 'two'))
    assert one['train_loss'] == pytest.approx(two['train_loss'], abs=1e-5)
    assert one['val_loss'] == pytest.approx(two['val_loss'], abs=1e-5) and one['val_n'] == two['val_n']


def test_accumulated_batches_take_the_steps_of_a_large_one(tmp_path):
    same = dict(model='mnist_cnn', model_args='{drop_rate: 0.0}', epochs=1, optimizer__name='sgd', ema_decay=0.0)
    assert main(arguments(tmp_path, tmp_path / 'large', batch_size=64, accumulate=1, **same)) == 0
    assert main(arguments(tmp_path, tmp_path / 'small', batch_size=16, accumulate=4, **same)) == 0
    large, small = (load_file(tmp_path / name / 'model.safetensors') for name in ('large', 'small'))
    assert all(torch.allclose(large[name], small[name], atol=1e-5) for name in large)


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(tmp_path, alone, number):
    output = tmp_path / 'run'
    process = start(ALONE, arguments(tmp_path, output))
    wait_for(output / 'checkpoints' / 'step_000000014', process)
    os.kill(process.pid, number)
    text = finish(process)
    command = text.rpartition('Resume with: timm-batchout ')[2].split()
    assert not (output / 'model.safetensors').exists()
    assert command == ['train', '--config', str(output / 'config.yaml'), '--resume']
    assert main(command) == 0
    assert outcome(output) == alone


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_stops_two_processes_whose_epochs_are_short(tmp_path):
    """Ten updates an epoch; the launcher hands SIGTERM on, and would kill after half a minute."""
    output = tmp_path / 'run'
    process = start(TWO, arguments(tmp_path, output, epochs=200))
    wait_for(output / 'checkpoints' / 'step_000000014', process)
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert text.count('Stopped and saved. Resume by the launcher, on 2 processes: -m timm_batchout.cli train') == 1
    checkpoint = newest_checkpoint(output)
    stopped_at = int(checkpoint.name[-9:])
    epochs = stopped_at // 20 + 1
    finish(start(TWO, arguments(tmp_path, output, epochs=epochs, resume='true', allow_changes='true')))
    assert len((output / 'metrics.jsonl').read_text().splitlines()) == epochs


def test_processes_look_at_each_others_signals_every_few_seconds(monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr('time.perf_counter', lambda: 2.0 * next(seconds))  # two seconds pass between two looks
    looks = []

    class Two:
        num_processes, device = 2, 'cpu'

        @staticmethod
        def reduce(own, kind):
            looks.append(step)  # of the loop below
            return own + torch.tensor([float(len(looks) == 4), own[1].item()])

    stop = StopSignals(Two)
    for step in range(1, 41):  # noqa: B007
        if stop.seen():
            break
    # One update took two seconds: look after two more. Then two took two: after five. Then after twelve.
    assert looks == [1, 3, 8, 20] and step == 20


def test_a_checkpoint_of_other_processes_batches_or_optimizer_is_refused(tmp_path, killed, capsys):
    output = shutil.copytree(killed, tmp_path / 'run')

    def refused(**changes):
        assert main(arguments(tmp_path, output, resume='true', allow_changes='true', **changes)) == 2
        return capsys.readouterr().err

    assert 'optimizer.name: saved' in refused(optimizer__name='sgd')
    assert 'does not fit this recipe' in refused(model_args='{num_classes: 11}')
    for later in (output / 'checkpoints').glob('step_*'):
        if later.name != 'step_000000040':
            shutil.rmtree(later)
    assert main(arguments(tmp_path, output, resume='true', allow_changes='true', batch_size=64, epochs=2)) == 0

    class Two:
        num_processes = 2

    with pytest.raises(ValueError, match='was written by 1 process; resume with 1, not 2'):
        restore_checkpoint(Two, newest_checkpoint(killed), prepared().progress, None)


def test_a_checkpoint_holds_no_pickle_that_could_run_code(tmp_path, killed, capsys):
    """Whoever changes a checkpoint can change its seal, too."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'pwned'),))

    for name in sorted(
        path.name for path in newest_checkpoint(killed).glob('*') if path.suffix in ('.pt', '.pkl', '.bin')
    ):
        output = shutil.copytree(killed, tmp_path / name)
        checkpoint = newest_checkpoint(output)
        torch.save({'epoch': Evil()}, checkpoint / name)
        seal = json.loads((checkpoint / 'sha256.json').read_text())
        seal[name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        (checkpoint / 'sha256.json').write_text(json.dumps(seal))
        assert main(arguments(tmp_path, output, resume='true', allow_changes='true', epochs=1)) == 2, name
        assert 'contains pickled code' in capsys.readouterr().err, name  # Accelerate would pass over random states
        assert not (tmp_path / 'pwned').exists()


def test_names_that_are_not_ours_take_no_part_in_the_rotation(tmp_path, killed, capsys):
    output = shutil.copytree(killed, tmp_path / 'run')
    checkpoints = output / 'checkpoints'
    for name in ('step_notes', 'step_1', 'step_9999999999'):
        (checkpoints / name).mkdir()
    assert main(arguments(tmp_path, output, resume='true')) == 0
    kept = {path.name for path in checkpoints.iterdir()}
    assert {'step_notes', 'step_1', 'step_9999999999'} < kept and len(kept) == 6, 'and the three newest of the run'
    other = shutil.copytree(killed, tmp_path / 'other')
    (other / 'checkpoints' / 'step_000000080').write_text('mine')
    assert main(arguments(tmp_path, other, resume='true')) == 2
    assert 'is a file in the place of a checkpoint. Move it away.' in capsys.readouterr().err
    assert (other / 'checkpoints' / 'step_000000080').read_text() == 'mine'


def test_when_all_checkpoints_are_damaged_the_advice_does_not_go_in_circles(tmp_path, killed, capsys):
    output = shutil.copytree(killed, tmp_path / 'run')
    for seal in output.glob('checkpoints/*/sha256.json'):
        seal.write_text('null')
    for resume in ('true', 'auto'):
        with pytest.warns(UserWarning, match='Skipping damaged checkpoint'):
            assert main(arguments(tmp_path, output, resume=resume)) == 2
        error = capsys.readouterr().err
        assert 'cannot be resumed' in error and 'move the folder away and start again' in error
        assert 'without --resume' not in error


def test_a_disk_that_is_really_full(tmp_path, capsys):
    """A file system in memory of a few MiB: the weights fit, a checkpoint of them with the optimizer does not."""
    output = tmp_path / 'run'
    output.mkdir()
    size = sum(p.numel() for p in timm.create_model('mnist_cnn').parameters()) * 4
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={int(2.2 * size)}', 'tmpfs', str(output)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('file systems cannot be mounted here')
    try:
        assert main(arguments(tmp_path, output)) == 2
        error = capsys.readouterr().err
        assert 'could not be written' in error and 'MiB are free' in error and 'Traceback' not in error
        assert not list(output.rglob('*.tmp')) and not (output / 'checkpoints' / 'unfinished').exists()
    finally:
        subprocess.run(['umount', str(output)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, alone, monkeypatch, capsys):
    save_state = Accelerator.save_state
    saved = []

    def full_at_the_third(self, folder, **kwargs):
        saved.append(save_state(self, folder, **kwargs))
        if len(saved) == 3:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Accelerator, 'save_state', full_at_the_third)
    output = tmp_path / 'run'
    assert main(arguments(tmp_path, output)) == 2
    error = capsys.readouterr().err
    assert 'No space left on device' in error and f'The last checkpoint is {output}/checkpoints/step_000000028' in error
    assert sorted(path.name for path in (output / 'checkpoints').iterdir()) == ['step_000000014', 'step_000000028']
    monkeypatch.undo()
    assert resume(tmp_path, output) == alone


@pytest.mark.parametrize('damage', ['truncated', 'tampered', 'missing', 'unsealed'])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, alone, killed, damage):
    output = shutil.copytree(killed, tmp_path / 'run')
    *_, before, newest = sorted((output / 'checkpoints').glob('step_*'))
    file = newest / ('sha256.json' if damage == 'unsealed' else 'optimizer.bin')
    content = file.read_bytes()
    if damage == 'truncated':
        file.write_bytes(content[:100])
    elif damage == 'tampered':
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    with pytest.warns(UserWarning, match=rf'Skipping damaged checkpoint .*{newest.name}: .*{file.name}'):
        assert newest_checkpoint(output) == before
    if damage == 'truncated':
        with pytest.warns(UserWarning, match='Skipping damaged'):
            assert resume(tmp_path, output) == alone


def test_a_run_that_never_saved_leaves_a_folder_to_start_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, '_step', lambda *args: (_ for _ in ()).throw(RuntimeError('broken')))
    assert main(arguments(tmp_path, tmp_path / 'run')) == 2
    assert (tmp_path / 'run' / 'config.yaml').exists()
    monkeypatch.undo()
    assert main(arguments(tmp_path, tmp_path / 'run', epochs=1)) == 0
    assert main(arguments(tmp_path, tmp_path / 'run', epochs=1)) == 2
    assert (
        'already contains a run (best.safetensors, model.safetensors, result.json): resume it'
        in capsys.readouterr().err
    )


def test_resume_auto_starts_where_there_is_nothing(tmp_path, capsys):
    output = tmp_path / 'run'
    assert main(arguments(tmp_path, output, resume='auto', epochs=1)) == 0
    assert main(arguments(tmp_path, output, resume='auto', epochs=1)) == 0
    assert main(arguments(tmp_path, output, resume='auto', epochs=2)) == 2
    assert 'epochs: saved 1, now 2' in capsys.readouterr().err
    assert main(arguments(tmp_path, output, resume='auto', epochs=2, allow_changes='true')) == 0
    assert len((output / 'metrics.jsonl').read_text().splitlines()) == 2


def test_a_loss_that_is_no_number(tmp_path, monkeypatch, capsys):
    import timm_batchout.training.objectives as objectives

    plain, calls = objectives.plain, []

    def nan_once(*args):
        calls.append(1)
        return plain(*args) * (float('nan') if len(calls) == 50 else 1.0)

    monkeypatch.setattr(objectives, 'plain', nan_once)
    assert main(arguments(tmp_path, tmp_path / 'stop')) == 2
    error = capsys.readouterr().err
    assert 'nan at step 9 of epoch 2' in error and 'Lower optimizer.lr (0.00' in error and 'step_000000040' in error
    calls.clear()
    assert main(arguments(tmp_path, tmp_path / 'skip', non_finite='skip')) == 0
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / 'skip' / 'model.safetensors').values())
    _, _, metrics = outcome(tmp_path / 'skip')
    assert [record['non_finite_losses'] for record in metrics] == [0, 1, 0]
    monkeypatch.setattr(objectives, 'plain', lambda *args: plain(*args) * float('nan'))
    capsys.readouterr()
    assert main(arguments(tmp_path, tmp_path / 'never', non_finite='skip')) == 2
    assert 'Every loss of epoch 1 was NaN or infinite' in capsys.readouterr().err


def test_a_dry_run_describes_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / 'run'
    assert main(arguments(tmp_path, output, dry_run='true')) == 0
    report = yaml.safe_load(capsys.readouterr().out)
    assert report['parameters'] == sum(p.numel() for p in timm.create_model('mnist_cnn').parameters())
    assert list(report['batchout_sites']) == ['stages.0.act1', 'stages.1.act1', 'pre_logits.act1']
    assert report['recipe']['ema_decay'] == 0.9
    assert report['memory_estimate_mib']['activations of 32 images'] > 1
    assert not output.exists()


def test_compiled_training_takes_the_same_steps(tmp_path, alone):
    torch._dynamo.reset()
    assert main(arguments(tmp_path, tmp_path / 'run', compile='aot_eager')) == 0
    compiled, expected = (load_file(tmp_path / 'run' / 'model.safetensors'), alone[0])
    (tmp_path / 'expected.safetensors').write_bytes(expected)
    for name, tensor in load_file(tmp_path / 'expected.safetensors').items():
        assert torch.allclose(compiled[name], tensor, atol=1e-4)


def prepared(**changes):
    data = DataConfig('digits')
    config = TrainConfig(output='unused', data=data, batch_size=32, **changes)
    return make_trainer(
        config, timm.create_model('batchout_mnist_cnn', eta=0.3), load_data(data), Accelerator(cpu=True)
    )


def test_eta_warms_up_from_nothing():
    run = prepared(schedule=ScheduleConfig(eta_warmup_epochs=2))
    for updates, eta in ((0, 0.0), (40, 0.15), (80, 0.3), (100, 0.3)):
        run._warm_up_eta(updates)
        assert all(layer.eta == pytest.approx(eta) for layer in batchout_sites(run.model).values())


def test_validation_every_few_epochs_and_after_the_last(tmp_path):
    assert main(arguments(tmp_path, tmp_path / 'run', epochs=4, eval_epochs=3, ema_decay=0.0)) == 0
    _, _, metrics = outcome(tmp_path / 'run')
    assert ['val_accuracy' in record for record in metrics] == [False, False, True, True]


def test_the_moving_average_is_one(tmp_path):
    """Weights of the run are those of a run without it; the average is between the first and the last."""
    run = prepared(ema_decay=0.75)
    expected = {name: tensor.clone() for name, tensor in run.ema.module.state_dict().items()}
    for images, labels in list(run.loader)[:3]:
        run._step(images, labels)
        for name, tensor in run.model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in run.weights.state_dict().items())
    assert not torch.equal(run.weights.head.weight, run.model.head.weight)


def test_learning_rates(monkeypatch):
    """Scaled by the number of processes; down to a share of the peak; by the schedule that the recipe names."""

    def rates(**changes):
        run = prepared(epochs=4, optimizer=OptimizerConfig('sgd', lr=0.1), **changes)
        seen = []
        for updates in (0, 1, run.updates_per_epoch, 3 * run.updates_per_epoch, 4 * run.updates_per_epoch):
            run.schedule.step_update(updates)
            seen.append(run.optimizer.param_groups[0]['lr'])
        return seen

    first, second, peak, _, last = rates(schedule=ScheduleConfig(warmup_epochs=1, min_lr=0.1))
    assert first == 0.0 and 0 < second < 0.01 and 0.08 < peak < 0.1 and last == pytest.approx(0.01)
    dropped = rates(schedule=ScheduleConfig('step', warmup_epochs=0, decay_epochs=2, decay_rate=0.5))
    assert dropped == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.025])
    line = rates(schedule=ScheduleConfig('poly', warmup_epochs=0, decay_rate=1.0))
    assert line[-2:] == pytest.approx([0.025, 0.0])
    monkeypatch.setattr(Accelerator, 'num_processes', 2)
    run = prepared(optimizer=OptimizerConfig('sgd', lr=0.1, scale_lr=True))
    assert run.optimizer.param_groups[0]['initial_lr'] == pytest.approx(0.2)


def test_mixup_hands_mixed_labels_to_the_loss():
    run = prepared(augment=AugmentConfig(mixup=0.5))
    targets = []
    objective = run.objective
    run.objective = lambda model, images, labels: targets.append(labels) or objective(model, images, labels)
    run.objective.warm_up = objective.warm_up
    run._step(*next(iter(run.loader)))
    assert targets[0].shape == (32, 10) and torch.allclose(targets[0].sum(1), torch.ones(32))
    assert ((targets[0] > 0).sum(1) == 2).any()


def test_gradients_are_clipped():
    run = prepared(optimizer=OptimizerConfig('sgd', lr=1.0, weight_decay=0.0, momentum=1e-9), clip_grad=0.01)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.schedule.step_update(10**6)
    for group in run.optimizer.param_groups:
        group['lr'] = 1.0
    run.model(torch.rand(4, 1, 28, 28)).square().sum().mul(1e3).backward()
    run._update()
    moved = torch.cat([(p - q).flatten() for p, q in zip(run.model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_shares_of_any_length_are_joined():
    shares = [torch.arange(2.0 * n).view(n, 2) for n in (3, 0, 5)]

    class Three:
        num_processes = 3

        @staticmethod
        def gather(mine):
            if mine.dtype == torch.int64:
                return torch.tensor([len(share) for share in shares])
            return torch.cat([Three.pad_across_processes(share) for share in shares])

        @staticmethod
        def pad_across_processes(share):
            return torch.cat([share, torch.zeros(5 - len(share), 2)])

    assert all(torch.equal(_all(share, Three), torch.cat(shares)) for share in shares)
