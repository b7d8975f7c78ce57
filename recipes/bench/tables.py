"""README.md of this folder, from training.json and evaluation.json: python recipes/bench/tables.py"""

import json
from pathlib import Path
from typing import Any

from timm_batchout.provenance import write_atomically

HERE = Path(__file__).parent


def training(report: dict[str, Any]) -> list[str]:
    """A row for each net; images per second are medians of runs that alternate."""
    rows = [
        '## Training',
        '',
        f'`training.py`: CIFAR-10 images in folders ({report["images"]} of them, the second epoch), batch '
        f'{report["batch"]}, float32, {report["cores"]} cores ({report["environment"]["hardware"]}). Images per '
        f'second, median of {report["repeats"]}.',
        '',
        "| | timm-batchout | timm's train.py | ratio | the same steps on one batch in memory | "
        "of our time not arithmetic | of train.py's | two processes against one, per process |",
        '|---|---|---|---|---|---|---|---|',
    ]
    for name, net in report['models'].items():
        rate = net['images_per_second']
        shares = net['share_of_step_that_is_not_arithmetic'], net['same_share_of_timm_train']
        efficiency = net.get('parallel_efficiency_of_two_processes')
        rows.append(
            f'| `{name}` | {rate["timm-batchout"]:.0f} | {rate["timm train.py"]:.0f} | '
            f'{net["speed_against_timm_train"]:.2f} | {rate["arithmetic alone"]:.0f} | '
            f'{shares[0]:.0%} | {shares[1]:.0%} | {"" if efficiency is None else f"{efficiency:.2f}"} |'
        )
    share = report['checkpoint_and_record_share_of_a_cifar10_epoch']
    return [
        *rows,
        '',
        'Where next to nothing of our time is other than arithmetic, no loop can be faster on these cores; a negative '
        'share is the noise of the machine, which was not idle. '
        f'A checkpoint and a line of metrics each epoch take {share:.2%} of an epoch of CIFAR-10.',
        '',
    ]


def evaluation(report: dict[str, Any]) -> list[str]:
    rows = [
        '## Evaluation',
        '',
        f'`evaluation.py`: `{report["model"]}`, {report["n"]} images, {report["environment"]["cpu_threads"]} thread '
        f'({report["environment"]["hardware"]}); both sides leave the same images right.',
        '',
        '| | seconds | the library by hand | ratio |',
        '|---|---|---|---|',
    ]
    for name, result in report['results'].items():
        seconds = f'{result["ours_seconds"]:.1f} | {result["theirs_seconds"]:.1f}'
        rows.append(f'| {name} | {seconds} | {result["ratio"]:.3f} |')
    return [*rows, '']


def main() -> None:
    lines = ['# How fast', '', 'Written by `tables.py` from the JSON beside it.', '']
    for write in (training, evaluation):
        lines += write(json.loads((HERE / f'{write.__name__}.json').read_text()))
    write_atomically(HERE / 'README.md', '\n'.join(lines))


if __name__ == '__main__':
    main()
