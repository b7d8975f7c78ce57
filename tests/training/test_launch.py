"""Training by the launch configs: two processes of one machine, two machines, and a process that dies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.multiprocess

LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file']
CONFIGS = Path(__file__).parents[2] / 'recipes' / 'accelerate'
TRAIN = [
    'train', '--model', 'batchout_mnist_cnn', '--data.name', 'digits', '--optimizer.lr', '2e-3',
    '--epochs', '2', '--batch_size', '64', '--checkpoint.steps', '4',
]  # fmt: skip

# The command line, in a process that notes where it ran and what weights it ended with, and may die on the way.
PROGRAM = """
import hashlib, os, signal, sys, time
from pathlib import Path
from timm_batchout.cli.main import main
from timm_batchout.training.trainer import Trainer

notes, rank, finish, step = Path(sys.argv[1]), os.environ['RANK'], Trainer.finish, Trainer._step

def note_and_finish(run):
    weights = b''.join(p.detach().numpy().tobytes() for p in run.weights.parameters())
    namespace = os.readlink('/proc/self/ns/net')
    (notes / f'rank{rank}').write_text(f'{namespace} {hashlib.sha256(weights).hexdigest()}')
    return finish(run)

def step_or_die(run, images, labels):
    if rank == '1' and run.forwards == 7 and (notes / 'die').exists():
        (notes / 'die').rename(notes / 'died')
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '1' and not (notes / 'back').exists():
        (notes / 'back').write_text(f'{run.forwards} {time.time() - (notes / "died").stat().st_ctime}')
    step(run, images, labels)

Trainer.finish, Trainer._step = note_and_finish, step_or_die
sys.exit(main(sys.argv[2:]))
"""


def command(folder, config, *options):
    """Launch the program on the shared recipe; its notes and its run go under the folder."""
    (folder / 'program.py').write_text(PROGRAM)
    program = [str(folder / 'program.py'), str(folder), *TRAIN, '--output', str(folder / 'run')]
    return [*LAUNCH, str(CONFIGS / config), *options, *program]


def environment(interface='lo'):
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': interface, 'ACCELERATE_USE_CPU': 'true'}


def start(arguments, **options):
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **{'env': environment(), **options}
    )


def finish(process):
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return text


def notes(folder):
    """(network namespace, hash of the weights) of both ranks."""
    return [tuple((folder / f'rank{rank}').read_text().split()) for rank in range(2)]


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    finish(start(command(folder, 'two_cpu_processes.yaml')))
    return folder


def test_two_processes_end_with_the_same_weights(two_processes):
    assert len(set(notes(two_processes))) == 1
    result = json.loads((two_processes / 'run' / 'result.json').read_text())
    assert result['environment']['processes'] == 2
    assert result['metrics']['test_n'] == 360, 'each test image once'


@pytest.mark.slow
def test_one_cpu_config(tmp_path):
    environ = {**os.environ, 'OMP_NUM_THREADS': '1'}
    module = ['-m', 'timm_batchout.cli', *TRAIN, '--epochs', '1', '--schedule.warmup_epochs', '0']
    finish(start([*LAUNCH, str(CONFIGS / 'one_cpu.yaml'), *module, '--output', str(tmp_path / 'run')], env=environ))
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['environment']['processes'] == 1


@pytest.mark.slow
def test_a_rank_that_dies_takes_all_down_and_the_launcher_resumes(tmp_path, two_processes):
    """--max_restarts and --resume auto: the end is that of the run that never died, bit for bit."""
    (tmp_path / 'die').touch()
    text = finish(start([*command(tmp_path, 'two_cpu_processes.yaml', '--max_restarts', '1'), '--resume', 'auto']))
    assert (tmp_path / 'died').exists(), text
    forwards, seconds = (tmp_path / 'back').read_text().split()
    assert int(forwards) == 4, 'from the checkpoint after 4 forwards'
    assert float(seconds) < 60, 'rank 0 must not wait for the dead one'
    weights = [(folder / 'run' / 'model.safetensors').read_bytes() for folder in (tmp_path, two_processes)]
    assert weights[0] == weights[1]


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable: (name, address) of each."""
    if os.geteuid() != 0 or not shutil.which('ip'):
        pytest.skip('network namespaces need root and the ip command')
    names = [f'batchout{os.getpid() % 10**5}{letter}' for letter in 'ab']
    cable = [f'{name[-7:]}0' for name in names]

    def ip(*arguments):
        subprocess.run(['ip', *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip('netns', 'add', name)
            ip('link', 'add', cable[0], 'netns', names[0], 'type', 'veth', 'peer', 'name', cable[1], 'netns', names[1])
            for i, (name, end) in enumerate(zip(names, cable, strict=True), 1):
                ip('-n', name, 'address', 'add', f'10.77.0.{i}/24', 'dev', end)
                for device in (end, 'lo'):
                    ip('-n', name, 'link', 'set', device, 'up')
        except subprocess.CalledProcessError as error:
            pytest.skip(f'network namespaces are not allowed here: {error.stderr.strip()}')
        yield list(zip(names, cable, strict=True))
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'delete', name], capture_output=True)


@pytest.mark.slow
def test_two_hosts(hosts, tmp_path, two_processes):
    """One process on each of two machines, over TCP: the same weights as two processes of one machine."""
    launch = command(tmp_path, 'multi_node.yaml', '--num_processes', '2', '--main_process_ip', '10.77.0.1')
    at = launch.index(str(tmp_path / 'program.py'))
    processes = [
        start(
            ['ip', 'netns', 'exec', name, *launch[:at], '--machine_rank', str(rank), *launch[at:]],
            env=environment(interface),
        )
        for rank, (name, interface) in enumerate(hosts)
    ]
    for process in processes:
        finish(process)
    (first_namespace, weights), (second_namespace, others) = notes(tmp_path)
    assert first_namespace != second_namespace
    assert weights == others == notes(two_processes)[0][1]


def test_every_launch_config_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted(path.name for path in CONFIGS.glob('*.yaml'))
    assert len(files) == 7
    for name in files:
        config = load_config_from_file(str(CONFIGS / name))
        assert config.num_processes == yaml.safe_load((CONFIGS / name).read_text())['num_processes']


@pytest.mark.parametrize(
    ('variable', 'flags', 'message'),
    [
        ('ACCELERATE_USE_DEEPSPEED', [], 'DEEPSPEED needs GPUs'),
        ('ACCELERATE_USE_FSDP', [], 'FSDP needs GPUs'),
    ],
)
def test_what_needs_a_gpu_says_so(tmp_path, monkeypatch, capsys, variable, flags, message):
    from timm_batchout.cli.main import main

    monkeypatch.setenv(variable, 'true')
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    assert main([*TRAIN, *flags, '--output', str(tmp_path / 'run')]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_processes_evaluate_to_the_report_of_one(tmp_path):
    command = [
        'timm_batchout.cli', 'evaluate', 'batchout_mnist_cnn', '--data.name', 'digits', '--images', '60',
        '--batch_size', '15', '--attacks', '[fgsm, pgd, ddn]', '--eps', '[0.1]',
        '--settings', '{pgd: {steps: 3}, ddn: {steps: 5}}', '--output', str(tmp_path / 'report.json'),
    ]  # fmt: skip
    reports = []
    two = [*LAUNCH, str(CONFIGS / 'two_cpu_processes.yaml'), '-m']
    for launcher in ([sys.executable, '-m'], *[two] * 5):  # 4 of 5 once failed, reading what another had cleared away
        subprocess.run([*launcher, *command], check=True, env=environment(), timeout=200)
        reports.append({**json.loads((tmp_path / 'report.json').read_text()), 'seconds': 0})
        assert [path.name for path in tmp_path.iterdir()] == ['report.json'], 'chunks are cleared away'
    assert reports[0]['audit']['n'] >= 50 and all(report == reports[0] for report in reports)
