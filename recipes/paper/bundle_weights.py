"""Bundle a finished run's weights: safetensors and JSON into timm_batchout/zoo/weights/.

    python recipes/paper/bundle_weights.py runs/cifar10_batchout batchout_cifar_vgg.cifar10 --root PATH_OF_THE_DATA

Scores the weights on the test set, clean and under FGSM, and writes what it measured; nothing is typed by hand.
"""

import argparse
import json
import shutil
from pathlib import Path

import timm

import timm_batchout  # noqa: F401
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.robustness.fgsm_scores import fgsm_scores
from timm_batchout.zoo.pretrained import FOLDER, bundled_cards, table

README = Path(__file__).parents[2] / 'README.md'

EPSILONS = {
    'mnist': ['0.05', '0.1', '0.2', '0.3', '0.4'],
    'cifar10': ['1/255', '2/255', '4/255', '8/255'],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path)
    parser.add_argument('name', help="the bundled model's 'arch.tag'")
    parser.add_argument('--root', required=True, help='where the test set is')
    arguments = parser.parse_args()
    arch, tag = arguments.name.split('.')
    result = json.loads((arguments.run / 'result.json').read_text())
    if result['model'] != arch:
        raise SystemExit(f'error: {arguments.run} trained {result["model"]}, not {arch}.')
    file = arguments.run / 'model.safetensors'
    recipe = result['recipe']
    split = load_split(DataConfig(**{**recipe['data'], 'root': arguments.root}), train=False)
    recipe['data']['root'] = ''  # a place on the machine that trained it
    model = timm.create_model(arch, checkpoint_path=str(file))
    epsilons = EPSILONS['mnist' if 'mnist' in arch else 'cifar10']
    card = {
        'model': arch,
        'tag': tag,
        'data': result['data'],
        'sha256': result['sha256'],
        'seed': result['seed'],
        'test': fgsm_scores(model, split.images, split.labels, epsilons),
        'training': {**result['metrics'], 'seconds': result['seconds'], 'environment': result['environment']},
        'recipe': recipe,
        'environment': environment(),
    }
    if card['test']['clean']['correct'] != result['metrics']['test_correct']:
        raise SystemExit('error: the weights do not give the test accuracy that the run wrote. Nothing was bundled.')
    shutil.copyfile(file, FOLDER / f'{arguments.name}.safetensors')
    write_atomically(FOLDER / f'{arguments.name}.json', json.dumps(card, indent=2) + '\n')
    write_readme_table()
    print(f'{arguments.name}: clean {card["test"]["clean"]["accuracy"]}, FGSM {card["test"]["fgsm"]}')


def write_readme_table() -> None:
    begin, end = '<!-- bundled weights: begin -->\n', '<!-- bundled weights: end -->'
    head, _, rest = README.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    write_atomically(README, f'{head}{begin}{table(bundled_cards())}\n{end}{tail}')


if __name__ == '__main__':
    main()
