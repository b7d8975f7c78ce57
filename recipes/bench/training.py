"""How fast is training, and where does the time go? Ratios measured side by side, in one run, into training.json.

    python recipes/bench/training.py --timm-train PATH/train.py --cores 0 1

Images per second of this package's loop against timm's own train.py (on the same images, in an image folder; same net,
batch, precision, cores), and against the same steps on one batch in memory, which is what the arithmetic costs; two
processes against one; the time that checkpoints and records take. Timings alternate and are given as medians.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timing import wait
from timm.optim import create_optimizer_v2

import timm_batchout  # noqa: F401
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.provenance import environment, write_atomically

HERE = Path(__file__).parent
ACCELERATE = HERE.parent / 'accelerate'
IMAGE = (3, 32, 32)
RATE = re.compile(r'Train: 1 .*\(\s*([\d.]+)s?,\s*([\d.]+)/s\)')  # timm's log: the average of the second epoch so far


def extract(root: str, folder: Path, per_class: int) -> int:
    """CIFAR-10's first images of each class as ``train/<class>/*.png``, a few in ``test``; how many to train on."""
    for part, limit in (('train', per_class), ('test', 10)):
        split = load_split(DataConfig('cifar10', root), train=part == 'train')
        for label in range(10):
            path = folder / part / str(label)
            path.mkdir(parents=True)
            for i in torch.nonzero(split.labels == label)[:limit, 0].tolist():
                Image.fromarray(split.images[i].permute(1, 2, 0).numpy()).save(path / f'{i}.png')
    return 10 * per_class


def ours(folder: Path, model: str, batch: int, launcher: tuple[str, ...] = (), **flags: str) -> float:
    """Images per second of the second epoch."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            *(launcher or (sys.executable,)), '-m', 'timm_batchout.cli', 'train', '--model', model, '--data.name',
            'image_folder', '--data.root', str(folder), '--data.val_fraction', '0.01', '--epochs', '2',
            '--schedule.warmup_epochs', '0', '--batch_size', str(batch), '--output', f'{output}/run',
        ]  # fmt: skip
        command += [text for name, value in flags.items() for text in (f'--{name}', value)]
        _output(command)
        lines = (Path(output) / 'run' / 'metrics.jsonl').read_text().splitlines()
        return json.loads(lines[-1])['images_per_second']


def timms(folder: Path, model: str, batch: int, train: Path, workers: int, device: str) -> float:
    """The same of timm's train.py, without augmentation, by its own log."""
    run = 'import runpy, sys, timm_batchout; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable, '-c', run, str(train), str(folder), '--train-split', 'train', '--val-split', 'test',
            '--model', model, '--batch-size', str(batch), '--opt', 'adamw', '--lr', '1e-3', '--epochs', '2',
            '--warmup-epochs', '0', '--no-aug', '--workers', str(workers), '--device', device, '--channels-last',
            '--log-interval', '1', '--output', output, '--input-size', *map(str, IMAGE),
        ]  # fmt: skip
        rates = RATE.findall(_output(command))
    return float(rates[-1][1])


def _output(command: list[str]) -> str:
    """What it prints; its complaint, and the end, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(command)}\n{done.stderr}')
    return done.stdout + done.stderr


def arithmetic(model: str, batch: int, device: str, seconds: float = 20) -> float:
    """Images per second of forward, backward and update on one batch that is there already."""
    net = timm.create_model(model).to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(net, 'adamw', lr=1e-3)
    images = torch.rand(batch, *IMAGE, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    steps, started = -3, time.perf_counter()
    while steps < 0 or time.perf_counter() - started < seconds:
        if steps == 0:
            wait()
            started = time.perf_counter()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    wait()
    return batch * steps / (time.perf_counter() - started)


def bookkeeping(folder: Path, model: str, batch: int) -> dict[str, float]:
    """Seconds that one checkpoint and one record take, in a run of one epoch."""
    from timm_batchout.cli.main import main
    from timm_batchout.training.trainer import Trainer

    spent: dict[str, float] = {}

    def timed(name: str) -> None:
        method = getattr(Trainer, name)

        def wrapper(self: Trainer, *args: Any) -> Any:
            started = time.perf_counter()
            result = method(self, *args)
            spent[name.strip('_')] = time.perf_counter() - started
            return result

        setattr(Trainer, name, wrapper)

    timed('_save')
    timed('_report')
    with tempfile.TemporaryDirectory() as output:
        flags = ['--data.name', 'image_folder', '--data.root', str(folder), '--data.val_fraction', '0.01']
        flags += ['--epochs', '1', '--schedule.warmup_epochs', '0', '--batch_size', str(batch)]
        assert main(['train', '--model', model, *flags, '--output', f'{output}/run']) == 0
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='data/cifar10', help='folder of CIFAR-10')
    parser.add_argument('--timm-train', type=Path, required=True, help="timm's train.py")
    parser.add_argument('--models', nargs='+', default=['batchout_cifar_vgg', 'batchout_test_resnet'])
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--per-class', type=int, default=200)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--cores', type=int, nargs='+', help='run on these CPU cores only')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, arguments.cores)
        torch.set_num_threads(len(arguments.cores))
        os.environ['OMP_NUM_THREADS'] = str(len(arguments.cores))
    cores = len(os.sched_getaffinity(0))
    report: dict[str, Any] = {'cores': cores, 'batch': arguments.batch, 'repeats': arguments.repeats, 'models': {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report['images'] = extract(arguments.data, folder, arguments.per_class)
        for model in arguments.models:
            report['models'][model] = compare(folder, model, arguments, cores)
        report['checkpoint_and_record_seconds'] = bookkeeping(folder, arguments.models[0], arguments.batch)
    first = report['models'][arguments.models[0]]
    epoch = 49_000 / first['images_per_second']['timm-batchout']
    report['checkpoint_and_record_share_of_a_cifar10_epoch'] = round(
        sum(report['checkpoint_and_record_seconds'].values()) / epoch, 5
    )
    report['environment'] = environment(torch.device(arguments.device))
    name = 'training' if arguments.device == 'cpu' else f'training-{arguments.device}'
    write_atomically(HERE / f'{name}.json', json.dumps(report, indent=1) + '\n')
    print(json.dumps(report, indent=1))


def compare(folder: Path, model: str, arguments: argparse.Namespace, cores: int) -> dict[str, Any]:
    size = {'model_args': '{num_classes: 10}'} if 'test_resnet' in model else {}
    rates: dict[str, list[float]] = {}

    def note(name: str, rate: float) -> None:
        rates.setdefault(name, []).append(rate)
        print(f'{model:24} {name:40} {rate:8.1f} images/s', flush=True)

    for _ in range(arguments.repeats):
        note('timm-batchout', ours(folder, model, arguments.batch, **size))
        note('timm train.py', timms(folder, model, arguments.batch, arguments.timm_train, cores, arguments.device))
        note('arithmetic alone', arithmetic(model, arguments.batch, arguments.device))
        if arguments.device == 'cpu':
            with _threads(1):
                launcher = (sys.executable, '-m', 'accelerate.commands.launch', '--config_file')
                two = (*launcher, str(ACCELERATE / 'two_cpu_processes.yaml'))
                note('one process, one thread', ours(folder, model, arguments.batch, **size))
                note('two processes, one thread each', ours(folder, model, arguments.batch, two, **size))
    medians = {name: round(median(values), 1) for name, values in rates.items()}
    ours_rate = medians['timm-batchout']
    record: dict[str, Any] = {
        'images_per_second': medians,
        'all': rates,
        'speed_against_timm_train': round(ours_rate / medians['timm train.py'], 3),
        'share_of_step_that_is_not_arithmetic': round(1 - ours_rate / medians['arithmetic alone'], 3),
        'same_share_of_timm_train': round(1 - medians['timm train.py'] / medians['arithmetic alone'], 3),
    }
    if arguments.device == 'cpu':
        two_rate, one = medians['two processes, one thread each'], medians['one process, one thread']
        record['parallel_efficiency_of_two_processes'] = round(two_rate / (2 * one), 3)
    return record


class _threads:
    def __init__(self, count: int):
        self.count = str(count)

    def __enter__(self) -> None:
        self.before = os.environ.get('OMP_NUM_THREADS')
        os.environ['OMP_NUM_THREADS'] = self.count

    def __exit__(self, *exception: Any) -> None:
        if self.before is None:
            del os.environ['OMP_NUM_THREADS']
        else:
            os.environ['OMP_NUM_THREADS'] = self.before


if __name__ == '__main__':
    main()
