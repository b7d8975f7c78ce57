"""Bundle a finished run: its weights, its result and its report become files in timm_batchout/zoo/weights/.

    timm-batchout evaluate mnist_cnn --checkpoint runs/pgd/model.safetensors --output report.json ...
    python recipes/paper/bundle_weights.py runs/pgd mnist_cnn.pgd_at_mnist report.json

``--weights best.safetensors`` takes those of the epoch with the highest validation accuracy. Large nets are bundled in
half precision; what is measured is what is stored, so round first, then evaluate the rounded weights:

    python recipes/paper/bundle_weights.py runs/pgd --half  # writes runs/pgd/half.safetensors
    timm-batchout evaluate mnist_cnn --checkpoint runs/pgd/half.safetensors --output report.json ...
    python recipes/paper/bundle_weights.py runs/pgd mnist_cnn.pgd_at_mnist report.json --weights half.safetensors

README's table is made anew from the reports of all bundled weights.
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import timm

import timm_batchout  # noqa: F401
from timm_batchout.provenance import write_atomically
from timm_batchout.robustness.inputs import weights_sha256
from timm_batchout.robustness.report import Report
from timm_batchout.robustness.tables import overview
from timm_batchout.zoo.checkpoint import as_safetensors, read_checkpoint
from timm_batchout.zoo.pretrained import FOLDER, bundled_cards

README = Path(__file__).parents[2] / 'README.md'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path)
    parser.add_argument('name', nargs='?', help="the bundled model's 'arch.tag'")
    parser.add_argument('report', nargs='?', type=Path)
    parser.add_argument('--weights', default='model.safetensors', help='file of the run')
    parser.add_argument('--half', action='store_true', help='write half.safetensors from the weights, and stop')
    arguments = parser.parse_args()
    if arguments.half:
        write_half(arguments.run / arguments.weights)
        return
    if not arguments.report:
        parser.error('name and report are needed, or --half.')
    arch, tag = arguments.name.split('.')
    result = json.loads((arguments.run / 'result.json').read_text())
    if result['model'] not in (arch, f'batchout_{arch}'):  # a twin's weights are its base's too
        raise SystemExit(f'error: {arguments.run} trained {result["model"]}, not {arch}.')
    file = arguments.run / arguments.weights
    report = replace(Report.load(arguments.report), model=arguments.name)
    if weights_sha256(timm.create_model(arch, checkpoint_path=str(file))) != report.weights_sha256:
        raise SystemExit(f'error: {arguments.report} is a report of other weights. Evaluate {file} first.')
    clean = report.score('clean')
    same = arguments.weights == 'model.safetensors' and clean.n == result['metrics']['test_n']
    if same and clean.correct != result['metrics']['test_correct']:
        raise SystemExit('error: the report and the run disagree on clean accuracy. Nothing was bundled.')
    result.pop('sha256')
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    result['recipe']['data']['root'] = ''  # a place on the machine that trained it
    card = {'model': arch, 'tag': tag, 'sha256': sha256, 'training': result, 'report': report.to_dict()}
    shutil.copyfile(file, FOLDER / f'{arguments.name}.safetensors')
    write_atomically(FOLDER / f'{arguments.name}.json', json.dumps(card, indent=1) + '\n')
    write_readme_table()


def write_half(file: Path) -> None:
    """Beside the file, half.safetensors: its floating tensors rounded to float16."""
    state = read_checkpoint(file)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_atomically(file.with_name('half.safetensors'), as_safetensors(half))


def readme_table() -> str:
    return overview({name: Report.from_dict(card['report']) for name, card in bundled_cards().items()})


def write_readme_table() -> None:
    begin, end = '<!-- bundled weights: begin -->\n', '<!-- bundled weights: end -->'
    head, _, rest = README.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    write_atomically(README, f'{head}{begin}{readme_table()}\n{end}{tail}')


if __name__ == '__main__':
    main()
