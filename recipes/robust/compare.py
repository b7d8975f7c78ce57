"""Does BatchOut help adversarial training? Trains the paper's nets with and without it, from several seeds.

    python recipes/robust/compare.py --mnist data/mnist --cifar10 data/cifar10

Short runs of ``mnist_cnn_pgd.yaml`` and ``cifar_vgg_pgd.yaml``, measured on the held-out images. Finished runs under
runs/robust are kept, so that an interrupted comparison resumes. Writes batchout.json, and RESULTS.md from it and the
reports of the published nets.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
from accelerate import Accelerator

from timm_batchout.data.images import Split
from timm_batchout.data.memory import load_data
from timm_batchout.provenance import write_atomically
from timm_batchout.recipe import configure, read_recipe
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.report import Report, paired_difference
from timm_batchout.robustness.tables import overview
from timm_batchout.text import format_radius
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.launch import train
from timm_batchout.training.run_folder import recipe_changes
from timm_batchout.zoo.pretrained import bundled_cards

HERE = Path(__file__).parent
CONCLUSION = '## Conclusion'
SHORT: dict[str, dict[str, Any]] = {
    'mnist_cnn': {'epochs': 8, 'objective': {'steps': 5}},
    'cifar_vgg': {'epochs': 10, 'batch_size': 256},
}
ETA: dict[str, dict[str, Any]] = {  # per net and arm: the eta of its BatchOut; {}: the net's own, which is the paper's
    'mnist_cnn': {"the paper's eta": {}, 'eta 0.03': {'eta': 0.03}},
    'cifar_vgg': {"the paper's eta": {}, 'eta up to 0.03': {'eta': [0.0, 0.03]}},
}
NONE = 'none'
AUTOATTACK_IMAGES = 500  # of those held out


def measure(net: str, arm: str, seed: int, root: str, runs: Path) -> dict[str, Any]:
    """Train, unless that was done; what came out."""
    number = [NONE, *ETA[net]].index(arm)
    recipe = read_recipe(HERE / f'{net}_pgd.yaml')
    recipe['data']['root'] = root
    if arm != NONE:
        recipe |= {'model': f'batchout_{net}', 'model_args': {**recipe['model_args'], **ETA[net][arm]}}
    output = runs / f'{net}-{number}-{seed}'
    config = configure(TrainConfig, recipe, **SHORT[net], seed=seed, output=str(output), resume='auto')
    finished = output / 'result.json'
    result = json.loads(finished.read_text()) if finished.is_file() else train(config)
    if recipe_changes(result['recipe'], config):
        raise SystemExit(f'error: {output} is a run of another recipe. Move it away.')
    epochs = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    last = epochs[-1]
    kept = ('val_correct', 'val_n', 'val_robust_correct', 'val_robust_n', 'train_loss')
    epsilon = config.robust_val.epsilon or config.objective.epsilon
    score = autoattack(config, epsilon).score('autoattack', epsilon)
    result['recipe']['data']['root'] = ''  # a place on the machine that trained it
    return {
        'net': net,
        'batchout': arm,
        'seed': seed,
        **{name: last[name] for name in kept},
        'best_val_robust_correct': max(epoch['val_robust_correct'] for epoch in epochs),
        'autoattack_correct': score.correct,
        'autoattack_n': score.n,
        'recipe': result['recipe'],
        'environment': result['environment'],
    }


def autoattack(config: TrainConfig, epsilon: float) -> Report:
    """AutoAttack on held-out images; the report is kept in the run folder."""
    path = Path(config.output) / 'autoattack.json'
    if path.is_file():
        return Report.load(path)
    model = timm.create_model(config.model, checkpoint_path=f'{config.output}/model.safetensors', **config.model_args)
    held_out = load_data(config.data)[1]
    assert isinstance(held_out, Split)
    images, labels = held_out.read(slice(AUTOATTACK_IMAGES))
    report = evaluate(
        model.to(Accelerator().device), images, labels, ['autoattack'], [epsilon],
        batch_size=AUTOATTACK_IMAGES, audit=False,
    )  # fmt: skip
    report.save(path)
    return report


def write_up(results: list[dict[str, Any]]) -> str:
    """RESULTS.md except for its conclusion, from the JSON files alone."""
    lines = [
        '# Adversarial training, and BatchOut on top',
        '',
        'Written by `compare.py` from `batchout.json` and from the reports of the published nets.',
        '',
        '## Published nets',
        '',
        overview({
            name: Report.from_dict(card['report'])
            for name, card in bundled_cards().items()
            if card['training']['recipe']['objective']['name'] not in ('plain', 'fgsm')
        }),
        '',
        '## Does BatchOut help PGD training?',
        '',
    ]  # fmt: skip
    for net in dict.fromkeys(r['net'] for r in results):
        lines += _of_one_net(net, [r for r in results if r['net'] == net])
    return '\n'.join(lines) + '\n'


def _of_one_net(net: str, results: list[dict[str, Any]]) -> list[str]:
    first = results[0]
    objective, robust_val = first['recipe']['objective'], first['recipe']['robust_val']
    seeds = sorted({r['seed'] for r in results})
    bench = json.loads((HERE.parent / 'bench' / 'method.json').read_text())
    cost = bench['objectives'][net]['ratios'][f'PGD, {objective["steps"]} steps']
    epsilon = robust_val['epsilon'] or objective['epsilon']
    columns = {'val': 'clean', 'val_robust': 'PGD', 'autoattack': 'AutoAttack'}
    columns = {name: title for name, title in columns.items() if f'{name}_n' in first}
    images = [f'{first["val_n"]} clean', f'{first["val_robust_n"]} under PGD with {robust_val["steps"]} steps']
    if 'autoattack' in columns:
        images.append(f'{first["autoattack_n"]} under AutoAttack')
    lines = [
        f'`{net}_pgd.yaml` in short: {first["recipe"]["epochs"]} epochs, {objective["steps"]} steps of PGD at '
        f'{format_radius(objective["epsilon"])}; {first["environment"]["hardware"]}. Accuracy in percent on held-out '
        f'images ({", ".join(images)}, at {format_radius(epsilon)}): mean and standard deviation over seeds '
        f'{", ".join(map(str, seeds))}; in italics the difference to none, of the same seeds, with its 95% interval '
        '(Student). Cost: the time of a training step relative to plain training, on a CPU '
        f'({bench["environment"]["hardware"]}; `../bench/method.py`).',
        '',
        f'| BatchOut | {" | ".join(columns.values())} | cost |',
        '|---' * (len(columns) + 2) + '|',
    ]
    accuracy = {
        arm: [
            [100 * r[f'{name}_correct'] / r[f'{name}_n'] for r in results if r['batchout'] == arm]
            for name in columns
        ]
        for arm in [NONE, *ETA[net]]
    }  # fmt: skip
    for arm, values in accuracy.items():
        cells = [f'{mean(v):.2f} ± {stdev(v):.2f}' for v in values]
        if arm != NONE:
            differences = map(paired_difference, values, accuracy[NONE])
            cells = [f'{cell}, *{d:+.1f} ± {half:.1f}*' for cell, (d, half) in zip(cells, differences, strict=True)]
        ratio = cost['without_batchout' if arm == NONE else 'with_batchout']
        lines.append(f'| {arm} | {" | ".join(cells)} | {ratio:.1f} |')
    overfitting = max((r['best_val_robust_correct'] - r['val_robust_correct']) / r['val_robust_n'] for r in results)
    best = f'at most {100 * overfitting:.1f} points above its last' if overfitting else 'its last'
    after = f'Robust overfitting: the best epoch of every run under PGD is {best}.'
    return [*lines, '', after, '']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--mnist', default='data/mnist')
    parser.add_argument('--cifar10', default='data/cifar10')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--runs', type=Path, default=Path('runs/robust'))
    arguments = parser.parse_args()
    if len(arguments.seeds) < 3:
        raise SystemExit('error: --seeds takes three numbers or more.')
    roots = {'mnist_cnn': arguments.mnist, 'cifar_vgg': arguments.cifar10}
    results = [
        measure(net, arm, seed, roots[net], arguments.runs)
        for net in SHORT
        for arm in [NONE, *ETA[net]]
        for seed in arguments.seeds
    ]
    write_atomically(HERE / 'batchout.json', json.dumps({'results': results}, indent=1) + '\n')
    path = HERE / 'RESULTS.md'
    conclusion = path.read_text().partition(CONCLUSION)[2] if path.is_file() else ''
    write_atomically(path, write_up(results) + (CONCLUSION + conclusion if conclusion else ''))


if __name__ == '__main__':
    main()
