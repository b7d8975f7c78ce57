"""Does BatchOut help adversarial training? Trains the MNIST net with and without it, from several seeds, and compares.

    python recipes/robust/compare.py --root data/mnist

Short runs of ``mnist_cnn_pgd.yaml``, measured on the held-out images. Finished runs under runs/robust are kept, so that
an interrupted comparison resumes. Writes batchout.json, and RESULTS.md from it and the reports of the published nets.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from timm_batchout.provenance import write_atomically
from timm_batchout.recipe import configure, read_recipe
from timm_batchout.robustness.report import Report, paired_difference
from timm_batchout.robustness.tables import overview
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.launch import train
from timm_batchout.training.run_folder import recipe_changes
from timm_batchout.zoo.pretrained import bundled_cards

HERE = Path(__file__).parent
CONCLUSION = '## Conclusion'
SHORT: dict[str, Any] = {'epochs': 8, 'objective': {'steps': 5}}
WITH = {'model': 'batchout_mnist_cnn'}
ARMS: dict[str, dict[str, Any]] = {
    'none': {},
    "the paper's eta (0.05, 0.1, 0.1)": WITH,
    'eta 0.03 everywhere': {**WITH, 'model_args': {'drop_rate': 0.2, 'eta': 0.03}},
}


def measure(arm: str, seed: int, root: str, runs: Path) -> dict[str, Any]:
    """Train, unless that was done; what came out."""
    number = list(ARMS).index(arm)
    recipe = read_recipe(HERE / 'mnist_cnn_pgd.yaml')
    recipe['data']['root'] = root
    output = runs / f'mnist-{number}-{seed}'
    config = configure(TrainConfig, recipe, **SHORT, **ARMS[arm], seed=seed, output=str(output), resume='auto')
    finished = output / 'result.json'
    result = json.loads(finished.read_text()) if finished.is_file() else train(config)
    if recipe_changes(result['recipe'], config):
        raise SystemExit(f'error: {output} is a run of another recipe. Move it away.')
    last = json.loads((output / 'metrics.jsonl').read_text().splitlines()[-1])
    kept = ('val_correct', 'val_n', 'val_robust_correct', 'val_robust_n', 'train_loss')
    result['recipe']['data']['root'] = ''  # a place on the machine that trained it
    return {
        'batchout': arm,
        'seed': seed,
        **{name: last[name] for name in kept},
        'recipe': result['recipe'],
        'environment': result['environment'],
    }


def write_up(results: list[dict[str, Any]]) -> str:
    """RESULTS.md except for its conclusion, from the JSON files alone."""
    first = results[0]
    objective, robust_val = first['recipe']['objective'], first['recipe']['robust_val']
    seeds = sorted({r['seed'] for r in results})
    bench = json.loads((HERE.parent / 'bench' / 'method.json').read_text())
    cost = bench['objectives']['mnist_cnn']['ratios'][f'PGD, {objective["steps"]} steps']
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
        f'`mnist_cnn_pgd.yaml` in short: {first["recipe"]["epochs"]} epochs, {objective["steps"]} steps of PGD at '
        f'{objective["epsilon"]}; {first["environment"]["hardware"]}. Accuracy in percent on held-out images: '
        f'{first["val_n"]} clean ones, and {first["val_robust_n"]} under PGD with {robust_val["steps"]} steps at '
        f'{robust_val["epsilon"]}; mean and standard deviation over seeds {", ".join(map(str, seeds))}, and the '
        'difference to none, of the same seeds, with its 95% interval (Student). Cost: the time of a training step '
        f'relative to plain training, on a CPU ({bench["environment"]["hardware"]}; `../bench/method.py`).',
        '',
        '| BatchOut | clean | under PGD | difference under PGD | cost |',
        '|---|---|---|---|---|',
    ]  # fmt: skip
    accuracy = {
        arm: {name: [100 * r[f'{name}_correct'] / r[f'{name}_n'] for r in results if r['batchout'] == arm]
              for name in ('val', 'val_robust')}
        for arm in ARMS
    }  # fmt: skip
    none = accuracy['none']['val_robust']
    for arm, values in accuracy.items():
        cells = [f'{mean(v):.2f} ± {stdev(v):.2f}' for v in values.values()]
        gain, half = paired_difference(values['val_robust'], none)
        difference = '' if arm == 'none' else f'{gain:+.1f} ± {half:.1f}'
        lines.append(
            f'| {arm} | {" | ".join(cells)} | {difference} | '
            f'{cost["without_batchout" if arm == "none" else "with_batchout"]:.1f} |'
        )
    return '\n'.join(lines) + '\n\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default='data/mnist')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--runs', type=Path, default=Path('runs/robust'))
    arguments = parser.parse_args()
    if len(arguments.seeds) < 3:
        raise SystemExit('error: --seeds takes three numbers or more.')
    results = [measure(arm, seed, arguments.root, arguments.runs) for arm in ARMS for seed in arguments.seeds]
    write_atomically(HERE / 'batchout.json', json.dumps({'results': results}, indent=1) + '\n')
    path = HERE / 'RESULTS.md'
    conclusion = path.read_text().partition(CONCLUSION)[2] if path.is_file() else ''
    write_atomically(path, write_up(results) + (CONCLUSION + conclusion if conclusion else ''))


if __name__ == '__main__':
    main()
