"""How fast the command line answers, and what importing the package adds to importing timm, into commands.json.

    python recipes/bench/commands.py

Each command runs in a process of its own; they take turns, and medians are given.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from timing import in_turns

from timm_batchout.provenance import environment, write_atomically

CLI = [sys.executable, '-m', 'timm_batchout.cli']
COMMANDS = {
    'python -c pass': [sys.executable, '-c', 'pass'],
    'timm-batchout --help': [*CLI, '--help'],
    'timm-batchout train --help': [*CLI, 'train', '--help'],
    'timm-batchout list': [*CLI, 'list'],
    'timm-batchout train --epoch 3 (misspelt)': [*CLI, 'train', '--epoch', '3'],
    'import timm': [sys.executable, '-c', 'import timm'],
    'import timm, timm_batchout': [sys.executable, '-c', 'import timm, timm_batchout'],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--times', type=int, default=9)
    arguments = parser.parse_args()
    runs = {name: partial(subprocess.run, command, capture_output=True) for name, command in COMMANDS.items()}
    seconds = in_turns(runs, arguments.times)  # the warm-up fills the disk cache
    report = {
        'times': arguments.times,
        'median_seconds': {name: round(value, 3) for name, value in seconds.items()},
        'environment': environment(),
    }
    write_atomically(Path(__file__).with_suffix('.json'), json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
