"""README.md of this folder, from the JSON beside it: python recipes/bench/tables.py"""

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
        "| | timm-batchout | timm's train.py | ratio | the same steps on one batch in memory | of our time not "
        "arithmetic | of train.py's | two processes against one, per process |",
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
    rates = (net['images_per_second'] for net in report['models'].values())
    bounds = ' and '.join(f'{rate["arithmetic alone"] / rate["timm train.py"]:.2f}' for rate in rates)
    return [
        *rows,
        '',
        f"No loop is faster on these cores than the same steps on one batch in memory: {bounds} of train.py's speed. "
        f'A checkpoint and a line of metrics per epoch take {share:.2%} of an epoch of CIFAR-10.',
        '',
    ]


def evaluation(report: dict[str, Any]) -> list[str]:
    rows = [
        '## Evaluation',
        '',
        f'`evaluation.py`: `{report["model"]}`, {report["n"]} images, {report["environment"]["cpu_threads"]} thread '
        f'({report["environment"]["hardware"]}). Both sides leave the same number of images right.',
        '',
        '| | seconds | without, or by hand | ratio | share of our time inside the model |',
        '|---|---|---|---|---|',
    ]
    for name, result in report['results'].items():
        share = result.get('share_inside_the_model')
        what = f' (`{result["model"]}`, n = {result["n"]})' if 'model' in result else ''
        rows.append(
            f'| {name}{what} | {result["ours_seconds"]:.1f} | {result["theirs_seconds"]:.1f} | {result["ratio"]:.2f} | '
            f'{"" if share is None else f"{share:.0%}"} |'
        )
    return [
        *rows,
        '',
        'The share inside the model bounds what any harness can save without changing the attack. The audit takes the '
        'same time whatever the attacks: about 250 gradient steps and 500 queries on up to 100 images.',
        '',
    ]


def commands(report: dict[str, Any]) -> list[str]:
    rows = [
        '## Command line and import',
        '',
        f'`commands.py`: {report["environment"]["hardware"]}; medians of {report["times"]}.',
        '',
        '| | seconds |',
        '|---|---|',
    ]
    return [*rows, *(f'| `{name}` | {value:.2f} |' for name, value in report['median_seconds'].items()), '']


def method(report: dict[str, Any]) -> list[str]:
    """The layer against a copy, a training step of a twin against one of the plain net, and adversarial training."""
    environment = report['environment']
    gpu = environment['device'] != 'cpu'
    where = environment['hardware'] if gpu else f'{environment["cpu_threads"]} thread ({environment["hardware"]})'
    bf16 = ', forward in bfloat16' * report.get('steps_in_bfloat16', False)
    lines = [
        f'## BatchOut{" on a GPU" * gpu}',
        '',
        f'`method.py`: {where}, torch {environment["torch"]}; candidates take turns, medians of {report["repeats"]} or '
        'more repeats.',
        '',
        f'A training step (forward, loss, backward, SGD{bf16}) of the twin, relative to the same step of the plain '
        'net: median of the turns, and quartiles:',
        '',
        '| net | batch | sites | eager | compiled (inductor) |',
        '|---|---|---|---|---|',
    ]
    for name, step in report['step'].items():
        compiled = report['compiled_step'].get(name)
        size = f'{step["batch"]} x {step["side"]}x{step["side"]}'
        ratios = _with_quartiles(step), _with_quartiles(compiled) if compiled else ''
        lines.append(f'| `{name}` | {size} | {step["sites"]} | {" | ".join(ratios)} |')
    lines += [
        '',
        'The layer alone. The floor is the time to read and write the batch once and to read the partners, at the '
        'speed of a copy of the batch into a new tensor, or into memory at hand; in place, only the augmented half '
        'moves. The kernels are `clone` (not in place), `index_select` and `lerp_` without the rest. `gaussian_noise` '
        'also draws normals:',
        '',
        '| tensor | dtype | new tensor: of the floor, new | at hand | kernels, of the time '
        '| in place: of the floor, new | at hand | kernels, of the time '
        '| `gaussian_noise` / `batchout` | normal draws |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for title, by_dtype in report['layer'].items():
        for dtype, values in by_dtype.items():
            shares = ' | '.join(
                f'{share:.0%}'
                for form, floors in values['share_of_floor'].items()
                for share in (*floors.values(), values['share_in_kernels'][form])
            )
            noise = values['gaussian_noise_over_batchout'], values['normal_draws_over_batchout']
            lines.append(f'| {title} | {dtype} | {shares} | {noise[0]:.1f} | {noise[1]:.1f} |')
    if gpu:
        return [*lines, '', *adversarial(report)]
    lines += [
        '',
        'The partners are copied, because they are read before any sample changes. So the kernels move the batch '
        '4.5 times for a new tensor and 2.5 times in place (before an in-place activation), where the floors are '
        '2.5 and 1.5: 56% and 60% is what they can reach where no cache helps, and only a fused kernel, as '
        'inductor has one, needs less. A large new tensor may also pay for its pages, where the allocator has '
        'given them back to the system; large pages (THP_MEM_ALLOC_ENABLE=1) take that away. Small tensors cost '
        'what the operator calls cost. bfloat16 is emulated on processors without AVX512-BF16 or AMX, where a '
        'copy is not. For `gaussian_noise` the floor is drawing the normals.',
        '',
    ]
    return [*lines, *adversarial(report)]


def _with_quartiles(step: dict[str, Any]) -> str:
    low, high = step['quartiles']
    return f'{step["ratio"]:.2f} ({low:.2f} to {high:.2f})'


def adversarial(report: dict[str, Any]) -> list[str]:
    """A table of the cost of adversarial training."""
    nets = report['objectives']
    heads = [f'`{name}`{" with BatchOut" * which}' for name in nets for which in (False, True)]
    lines = [
        'A training step of each objective, relative to plain training without BatchOut:',
        '',
        f'| objective | {" | ".join(heads)} |',
        '|---' * (len(heads) + 1) + '|',
    ]
    for title in next(iter(nets.values()))['ratios']:
        ratios = [net['ratios'][title][f'{which}_batchout'] for net in nets.values() for which in ('without', 'with')]
        lines.append(f'| {title} | {" | ".join(f"{ratio:.1f}" for ratio in ratios)} |')
    return [*lines, '']


def gpu(report: dict[str, Any]) -> list[str]:
    """What ran on a GPU: the tests, and each launch config with an interruption."""
    lines = [
        '## Launching on GPUs',
        '',
        f'`gpu.py`: {report["gpus"]} {report["environment"]["hardware"]}, torch {report["environment"]["torch"]}, '
        f'`{report["model"]}`. The run is stopped after a checkpoint, resumed, and compared with one that was not.',
        '',
        '| | outcome | seconds |',
        '|---|---|---|',
    ]
    rows = (f'| {name} | {step["outcome"]} | {step["seconds"]:.0f} |' for name, step in report['steps'].items())
    return [*lines, *rows, '']


SECTIONS = {
    'method': method,
    'method-cuda': method,
    'training': training,
    'training-cuda': training,
    'evaluation': evaluation,
    'commands': commands,
    'gpu': gpu,
}


def main() -> None:
    lines = ['# Speed', '', 'Written by `tables.py` from the JSON beside it.', '']
    for name, write in SECTIONS.items():
        path = HERE / f'{name}.json'
        if path.is_file():  # those of a GPU only where one was at hand
            lines += write(json.loads(path.read_text()))
    write_atomically(HERE / 'README.md', '\n'.join(lines))


if __name__ == '__main__':
    main()
