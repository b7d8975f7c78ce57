"""Which eta, and where, for nets deeper than the paper's? Trains small deep nets on CIFAR-10 and compares.

    python recipes/twins/compare_eta.py --data image_folder --root PATH --label "CIFAR-10 (JPEG q75 copy)"

Finished runs under runs/twins are kept, so an interrupted comparison continues where it stopped. Writes eta.json and,
from it, RESULTS.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_batchout import batchout_sites
from timm_batchout.data.config import DataConfig
from timm_batchout.data.images import Split
from timm_batchout.data.memory import data_label, load_split
from timm_batchout.pixels import PixelModel
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.report import wilson
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
# Placement, and how many times the magnitude whose total matches the paper's net; None: no BatchOut.
CANDIDATES: dict[str, tuple[str, float] | None] = {
    'no BatchOut': None,
    'every activation': ('act', 1.0),
    'every activation, doubled': ('act', 2.0),
    'every block': ('block', 1.0),
}
EPSILONS = ['1/255', '2/255', '4/255']
DEEPFOOL_IMAGES = 500


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


def measure(net: str, candidate: str, data: DataConfig, epochs: int, seed: int, runs: Path, test: Split) -> dict:
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
                batch_size=64,
                seed=seed,
                resume=(output / 'checkpoints').is_dir(),
            )
        )
    result = json.loads((output / 'result.json').read_text())
    # Image folders are sorted by class: the first images of one would all be of one class.
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:DEEPFOOL_IMAGES]
    model = timm.create_model(name, checkpoint_path=str(output / 'model.safetensors'), **model_args)
    record = {
        'net': net,
        'candidate': candidate,
        'seed': seed,
        'eta': model_args.get('eta'),
        'sites': len(batchout_sites(model)),
        'train_loss': result['metrics']['train_loss'],
        'test': fgsm_accuracy(model, test),
        'deepfool': median_distance(model, test.images[some], test.labels[some]),
        'recipe': result['recipe'],
        'environment': environment(),
    }
    write_atomically(scores, json.dumps(record, indent=1))
    return record


def fgsm_accuracy(model: nn.Module, test: Split) -> dict[str, Any]:
    """Counts of the test images that are right: clean, and under FGSM at each radius."""
    report = evaluate(model, test.images, test.labels, ['fgsm'], EPSILONS, batch_size=500, audit=False)
    scores = {epsilon: report.score('fgsm', epsilon) for epsilon in EPSILONS} | {'clean': report.score('clean')}
    counts = {name: {'correct': s.correct, 'accuracy': s.accuracy} for name, s in scores.items()}
    return {'n': report.n, 'clean': counts.pop('clean'), 'fgsm': counts}


def median_distance(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Median L2 distance, in [0, 1] pixels, to the adversarial image that DeepFool finds, of the images that are right.

    Images that it cannot fool count as infinitely far.
    """
    net, distances = PixelModel(model).eval(), []
    for batch, truth in zip(images.split(100), labels.split(100), strict=True):
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
    n = first['test']['n']
    intervals = [wilson(r['test']['clean']['correct'], n) for r in report['results']]
    widest = max(50 * (high - low) for low, high in intervals)
    lines = [
        '# eta for deep nets: a comparison',
        '',
        'Written by `compare_eta.py` from `eta.json`.',
        '',
        f'{report["data"]}, {recipe["epochs"]} epochs on {1 - recipe["data"]["val_fraction"]:.0%} of the training set, '
        f'{recipe["optimizer"]["name"]} '
        f'{recipe["optimizer"]["lr"]:g}, batch {recipe["batch_size"]}; {n} test images, so 95% intervals of '
        f'±{widest:.1f} points or less for each accuracy. DeepFool: median L2 distance of those of '
        f'{first["deepfool"]["n"]} test images that are classified right, {first["deepfool"]["steps"]} steps. Short '
        'runs on a CPU: they rank choices, and say little about what long training reaches.',
        '',
    ]
    for net in dict.fromkeys(r['net'] for r in report['results']):
        lines += [
            f'## {net}',
            '',
            '| BatchOut at | sites | eta up to | train loss | clean | '
            + ' | '.join(f'FGSM {epsilon}' for epsilon in EPSILONS)
            + ' | DeepFool |',
            '|---' * (6 + len(EPSILONS)) + '|',
        ]
        for r in (r for r in report['results'] if r['net'] == net):
            seed = f' (seed {r["seed"]})' if len({x['seed'] for x in report['results']}) > 1 else ''
            row = [
                r['candidate'] + seed,
                str(r['sites'] or ''),
                f'{r["eta"][1]:.3f}' if r['eta'] else '',
                f'{r["train_loss"]:.3f}',
                f'{100 * r["test"]["clean"]["accuracy"]:.2f}',
                *(f'{100 * r["test"]["fgsm"][epsilon]["accuracy"]:.2f}' for epsilon in EPSILONS),
                f'{r["deepfool"]["median_l2"]:.3f}',
            ]
            lines.append(f'| {" | ".join(row)} |')
        lines.append('')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='cifar10', help='data.name of the training config')
    parser.add_argument('--root', required=True)
    parser.add_argument('--label', default='')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--nets', nargs='+', choices=list(NETS), default=list(NETS))
    parser.add_argument('--candidates', nargs='+', choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument('--runs', type=Path, default=Path('runs/twins'))
    arguments = parser.parse_args()
    data = DataConfig(name=arguments.data, root=arguments.root, label=arguments.label, val_fraction=0.7)
    test = load_split(data, train=False)
    results = [
        measure(net, candidate, data, arguments.epochs, seed, arguments.runs, test)
        for net in arguments.nets
        for candidate in arguments.candidates
        for seed in arguments.seeds
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
