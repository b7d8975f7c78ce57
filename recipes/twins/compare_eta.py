"""Which eta, and where, for nets deeper than the paper's? Trains small deep nets on CIFAR-10 and compares.

    python recipes/twins/compare_eta.py --root data/cifar10

Measured on training images that are held out, because the default is chosen by it. Finished runs under runs/twins are
kept, so an interrupted comparison continues where it stopped. Writes eta.json and, from it, RESULTS.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_batchout import batchout_sites
from timm_batchout.data.config import DataConfig
from timm_batchout.data.images import Split
from timm_batchout.data.memory import data_label, load_data
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.inputs import in_pixels
from timm_batchout.robustness.report import paired_difference
from timm_batchout.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from timm_batchout.training.launch import train
from timm_batchout.zoo.timm_twins import depth_scaled_eta

HERE = Path(__file__).parent
PIXELS = {'num_classes': 10, 'pretrained_cfg_overlay': {'mean': [0.0, 0.0, 0.0], 'std': [1.0, 1.0, 1.0]}}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet18': ('resnet18', PIXELS),
    'small ViT': (
        'vit_tiny_patch16_224',
        {**PIXELS, 'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 6, 'num_heads': 4},
    ),
}
NONE = 'no BatchOut'
# Placement, and how many times the magnitude whose total matches the paper's net; None: no BatchOut.
CANDIDATES: dict[str, tuple[str, float] | None] = {
    NONE: None,
    'every activation': ('act', 1.0),
    'every activation, x 2': ('act', 2.0),
    'every activation, x 3': ('act', 3.0),
    'every activation, x 4': ('act', 4.0),
    'every block': ('block', 1.0),
}
EPSILONS = ['1/255', '2/255', '4/255']
IMAGES, DEEPFOOL_IMAGES = 5000, 500  # of those held out


def options(net: str, candidate: str) -> tuple[str, dict[str, Any]]:
    """The model's name and its arguments."""
    arch, model_args = NETS[net]
    choice = CANDIDATES[candidate]
    if choice is None:
        return arch, model_args
    sites, factor = choice
    with torch.device('meta'):
        count = len(batchout_sites(timm.create_model(f'batchout_{arch}', sites=sites, **model_args)))
    return f'batchout_{arch}', {**model_args, 'sites': sites, 'eta': list(depth_scaled_eta(count, factor))}


def measure(net: str, candidate: str, data: DataConfig, epochs: int, seed: int, runs: Path, held_out: Split) -> dict:
    """Train (unless that was done), then clean accuracy, FGSM and DeepFool."""
    output = runs / f'{net}-{candidate}-{seed}'.replace(' ', '_').replace(',', '')
    scores = output / 'scores.json'
    if scores.is_file():
        return json.loads(scores.read_text())
    name, model_args = options(net, candidate)
    if not (output / 'result.json').is_file():
        train(
            TrainConfig(
                model=name,
                model_args=model_args,
                output=str(output),
                data=data,
                optimizer=OptimizerConfig('adamw', lr=1e-3, weight_decay=0.05),
                schedule=ScheduleConfig(warmup_epochs=1),
                epochs=epochs,
                eval_epochs=epochs,
                channels_last=True,
                batch_size=64,
                seed=seed,
                resume=(output / 'checkpoints').is_dir(),
            )
        )
    result = json.loads((output / 'result.json').read_text())
    model = timm.create_model(name, checkpoint_path=str(output / 'model.safetensors'), **model_args)
    device = Accelerator().device
    model = model.to(device)
    record = {
        'net': net,
        'candidate': candidate,
        'seed': seed,
        'eta': model_args.get('eta'),
        'sites': len(batchout_sites(model)),
        'train_loss': result['metrics']['train_loss'],
        'held_out': fgsm_accuracy(model, held_out),
        'deepfool': median_distance(model, *held_out.read(slice(DEEPFOOL_IMAGES))),
        'recipe': result['recipe'],
        'environment': environment(device),
    }
    write_atomically(scores, json.dumps(record, indent=1))
    return record


def fgsm_accuracy(model: nn.Module, split: Split) -> dict[str, Any]:
    """Counts of the images that are right: clean, and under FGSM at each radius."""
    report = evaluate(model, split.images, split.labels, ['fgsm'], EPSILONS, batch_size=500, audit=False)
    scores = {epsilon: report.score('fgsm', epsilon) for epsilon in EPSILONS} | {'clean': report.score('clean')}
    counts = {name: {'correct': s.correct, 'accuracy': s.accuracy} for name, s in scores.items()}
    return {'n': report.n, 'clean': counts.pop('clean'), 'fgsm': counts}


def median_distance(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Median L2 distance, in [0, 1] pixels, to the adversarial image that DeepFool finds, of the images that are right.

    Images that it cannot fool count as infinitely far.
    """
    net, distances = in_pixels(model).eval(), []
    device = net.mean.device
    for batch, truth in zip(images.to(device).split(100), labels.to(device).split(100), strict=True):
        with torch.no_grad():
            right = net(batch / 255).argmax(1) == truth
        found = deepfool(net, batch[right] / 255, truth[right], iterations=50)
        distances.append(torch.where(found.right[-1], torch.inf, found.distance[-1]))
    distance = torch.cat(distances)
    return {'n': len(images), 'right': len(distance), 'steps': 50, 'median_l2': distance.median().item()}


def write_up(report: dict[str, Any]) -> str:
    """RESULTS.md, from the JSON alone."""
    first = report['results'][0]
    recipe = first['recipe']
    seeds = sorted({r['seed'] for r in report['results']})
    lines = [
        '# eta for deep nets: a comparison',
        '',
        'Written by `compare_eta.py` from `eta.json`.',
        '',
        f'{report["data"]}, {recipe["epochs"]} epochs on {1 - recipe["data"]["val_fraction"]:.0%} of the training set, '
        f'{recipe["optimizer"]["name"]} {recipe["optimizer"]["lr"]:g}, batch {recipe["batch_size"]}. Accuracy in '
        f'percent on {first["held_out"]["n"]} held-out training images: mean and standard deviation over seeds '
        f'{", ".join(map(str, seeds))}; in italics the difference to no BatchOut, of the same seeds, with its 95% '
        f'interval (Student). DeepFool: median L2 distance of those of {first["deepfool"]["n"]} images that are '
        f'classified right, {first["deepfool"]["steps"]} steps. Hardware: {first["environment"]["hardware"]}. Short '
        'runs: they rank choices, and say little about what long training reaches.',
        '',
    ]
    for net in dict.fromkeys(r['net'] for r in report['results']):
        head = [
            'BatchOut at',
            'sites',
            'eta up to',
            'train loss',
            'clean',
            *(f'FGSM {e}' for e in EPSILONS),
            'DeepFool',
        ]
        lines += [f'## {net}', '', f'| {" | ".join(head)} |', '|---' * len(head) + '|']
        by_candidate: dict[str, list[dict[str, Any]]] = {}
        for r in report['results']:
            if r['net'] == net:
                by_candidate.setdefault(r['candidate'], []).append(r)
        for candidate, runs in by_candidate.items():
            columns = zip(*map(_figures, runs), strict=True)
            plain = zip(*map(_figures, by_candidate[NONE]), strict=True)
            cells = [
                _cell(values, None if candidate == NONE or i == 0 else others, digits)
                for i, (values, others, digits) in enumerate(zip(columns, plain, (3, 2, 2, 2, 2, 3), strict=True))
            ]
            eta = f'{runs[0]["eta"][1]:.3f}' if runs[0]['eta'] else ''
            lines.append(f'| {candidate} | {runs[0]["sites"] or ""} | {eta} | {" | ".join(cells)} |')
        lines.append('')
    return '\n'.join(lines)


def _figures(run: dict[str, Any]) -> list[float]:
    """Of one run: train loss, accuracies in percent, median distance."""
    scores = [run['held_out']['clean'], *run['held_out']['fgsm'].values()]
    return [run['train_loss'], *(100 * s['accuracy'] for s in scores), run['deepfool']['median_l2']]


def _cell(values: Sequence[float], others: Sequence[float] | None, digits: int) -> str:
    """Mean and standard deviation; then the difference to ``others``, the same seeds without BatchOut."""
    text = f'{mean(values):.{digits}f} ± {stdev(values):.{digits}f}'
    if others is None:
        return text
    gain, half = paired_difference(values, others)
    return f'{text}, *{gain:+.{digits}f} ± {half:.{digits}f}*'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default='data/cifar10')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--nets', nargs='+', choices=list(NETS), default=list(NETS))
    parser.add_argument('--candidates', nargs='+', choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument('--runs', type=Path, default=Path('runs/twins'))
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        raise SystemExit('error: --seeds takes two numbers or more.')
    data = DataConfig('cifar10', arguments.root, val_fraction=0.7)
    held_out = load_data(data)[1].select(torch.arange(IMAGES))
    results = [
        measure(net, candidate, data, arguments.epochs, seed, arguments.runs, held_out)
        for seed in arguments.seeds
        for net in arguments.nets
        for candidate in arguments.candidates
    ]
    if arguments.nets != list(NETS) or arguments.candidates != list(CANDIDATES):
        return  # a part of the comparison, run beside another: the last one, over all, writes
    for result in results:
        result['recipe']['data']['root'] = ''  # a place on the machine that trained it
    report = {'data': data_label(data), 'results': results}
    write_atomically(HERE / 'eta.json', json.dumps(report, indent=1) + '\n')
    text = write_up(report)
    path = HERE / 'RESULTS.md'
    conclusion = path.read_text().partition('## Conclusion')[2] if path.is_file() else ''
    write_atomically(path, text + ('\n## Conclusion' + conclusion if conclusion else ''))


if __name__ == '__main__':
    main()
