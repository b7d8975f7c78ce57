"""Everything that only a GPU shows, into the JSON files of this folder: python recipes/bench/gpu.py

Each step is skipped if its result is there already, and is written when it is done, so the script can be stopped and
started again:

- the tests marked ``gpu``;
- each launch config: a run is stopped after a checkpoint, resumed, and its weights are compared with those of a run
  that was never stopped (FSDP2 and DeepSpeed on as many GPUs as there are; DeepSpeed if it is installed);
- the table of ``method.py`` in bfloat16, and that of ``training.py`` if ``--timm-train`` names timm's train.py.

Then ``tables.py`` writes README.md anew.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # accelerate needs it, too
import torch

from timm_batchout.provenance import environment, write_atomically

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT = HERE / 'gpu.json'
LIMIT = 600  # seconds of a command
CONFIGS = ('one_gpu', 'multi_gpu', 'fsdp2', 'deepspeed_zero2')
TRAIN = [
    '-m', 'timm_batchout.cli', 'train', '--data.name', 'digits', '--batch_size', '64', '--epochs', '4',
    '--checkpoint.steps', '5',
]  # fmt: skip


def run(*arguments: str) -> str:
    """Run this Python; the end of what it printed if it fails, or ''."""
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f'not done after {LIMIT} seconds'
    return '' if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def gpu_tests() -> str:
    return run('-m', 'pytest', '-q', '-m', 'gpu') or 'passed'


def launch(config: str, model: str, processes: int) -> str:
    """Train twice by a launch config, the second time with an interruption, and compare the weights."""
    if config == 'deepspeed_zero2' and not importlib.util.find_spec('deepspeed'):
        return 'not run: DeepSpeed is not installed'
    launcher = ['-m', 'accelerate.commands.launch', '--config_file', str(HERE.parent / 'accelerate' / f'{config}.yaml')]
    launcher += [] if config in ('one_gpu', 'one_cpu') else ['--num_processes', str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        straight, stopped = Path(folder) / 'straight', Path(folder) / 'stopped'
        train = [*launcher, *TRAIN, '--model', model, '--output']
        if error := run(*train, str(straight)):
            return f'failed: {error}'
        if not stop_after_a_checkpoint([*train, str(stopped)], stopped):
            return 'failed: it ended before it could be stopped'
        if error := run(*train, str(stopped), '--resume', 'true'):
            return f'failed to resume: {error}'
        first, second = ((path / 'model.safetensors').read_bytes() for path in (straight, stopped))
    return 'trains and resumes to the same weights' if first == second else 'trains and resumes, to other weights'


def stop_after_a_checkpoint(arguments: list[str], output: Path) -> bool:
    """Kill the launcher and its processes as soon as a checkpoint lies there; whether that was before the end."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )  # fmt: skip
    ends = time.time() + LIMIT
    while process.poll() is None and time.time() < ends and not list(output.glob('checkpoints/step_*')):
        time.sleep(0.02)
    if process.poll() is None:  # torchrun's workers have sessions of their own, and would train on without it
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
    process.wait()
    return not (output / 'result.json').exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--timm-train', help="timm's train.py")
    parser.add_argument('--data', default='data/cifar10', help='CIFAR-10, for training.py')
    parser.add_argument('--model', default='batchout_mnist_cnn')
    parser.add_argument('--configs', nargs='+', default=CONFIGS, help='files of recipes/accelerate')
    parser.add_argument('--output', type=Path, default=RESULT)
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    report: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {'steps': {}}
    report.update(environment=environment('cuda' if gpus else 'cpu'), gpus=gpus, model=arguments.model)

    def step(name: str, measure: Callable[[], str]) -> None:
        if name not in report['steps']:
            started = time.perf_counter()
            outcome = measure()
            print(f'{name}: {outcome}', flush=True)
            report['steps'][name] = {'outcome': outcome, 'seconds': time.perf_counter() - started}
            write_atomically(arguments.output, json.dumps(report, indent=1) + '\n')

    for config in arguments.configs:
        step(f'`{config}.yaml`', lambda config=config: launch(config, arguments.model, gpus or 2))  # type: ignore[misc]
    if gpus:
        step('`pytest -m gpu`', gpu_tests)
        step('`method.py`', lambda: run(str(HERE / 'method.py'), '--device', 'cuda', '--bf16') or 'written')
        if arguments.timm_train:
            options = ['--data', arguments.data, '--timm-train', arguments.timm_train, '--device', 'cuda']
            step('`training.py`', lambda: run(str(HERE / 'training.py'), *options) or 'written')
    if error := run(str(HERE / 'tables.py')):
        raise SystemExit(error)


if __name__ == '__main__':
    main()
