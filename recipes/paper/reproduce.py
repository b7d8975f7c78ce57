"""Reproduce the paper's figures: ``python recipes/paper/reproduce.py 2 --data '{mnist: {root: MNIST}}'``."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from claims import over_seeds, results
from draw import draw
from figures import FIGURES, Paper

from timm_batchout.provenance import write_atomically
from timm_batchout.recipe import parse
from timm_batchout.robustness.report import Report

READING = '## Reading'


@dataclass
class ReproduceConfig:
    """The paper's figures: train what they need by the recipes, attack it, draw, and judge each claim.

    Args:
        figure: 2, 2-adamw (its nets trained with AdamW), 3, 4a, 4b, 5a, 5b or all.
        data: Where the data sets are: '{mnist: {root: PATH}, cifar10: {root: PATH}}', or other fields of the recipe's
            data, e.g. '{cifar10: {name: image_folder, root: PATH, label: NAME}}'.
        seeds: One run of every net for each.
        recipes: Folder of the recipes.
        runs: Folder of the training runs. Finished runs are reused, whatever their precision; interrupted ones resumed.
        output: Folder for figN.json, figN.svg, seeds.json and RESULTS.md; what stands there of other figures is kept.
            Reports of ``evaluate`` in its folders reports/ and variants/ become tables of RESULTS.md.
        sweep_epochs: Epochs of the nets of figures 4b, 5a and 5b; 0: as in the recipe.
        quick: One epoch and 200 test images, to see whether everything works.
        images: Test images for FGSM; 0: all.
        deepfool_images: Test images for DeepFool.
    """

    figure: Literal['2', '2-adamw', '3', '4a', '4b', '5a', '5b', 'all']
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    recipes: str = 'recipes/paper'
    runs: str = 'runs/paper'
    output: str = 'runs/paper'
    sweep_epochs: int = 0
    quick: bool = False
    images: int = 0
    deepfool_images: int = 1000


def reproduce(config: ReproduceConfig) -> None:
    paper = Paper(
        Path(config.recipes), Path(config.runs), config.data, config.seeds, config.sweep_epochs, config.quick,
        config.images, config.deepfool_images,
    )  # fmt: skip
    output = Path(config.output)
    for name in FIGURES if config.figure == 'all' else [config.figure]:
        figure = paper.measure(name)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / f'fig{name}.json', json.dumps(figure, indent=1) + '\n')
        draw(figure, output / f'fig{name}.svg')
    known = {name: output / f'fig{name}.json' for name in FIGURES}
    figures = {name: json.loads(path.read_text()) for name, path in known.items() if path.is_file()}
    reports, variants = (
        [Report.load(path) for path in sorted((output / folder).glob('*.json'))] for folder in ('reports', 'variants')
    )
    path = output / 'RESULTS.md'
    reading = path.read_text().partition(READING)[2] if path.is_file() else ''  # what people wrote
    write_atomically(output / 'seeds.json', json.dumps(over_seeds(figures), indent=1) + '\n')
    write_atomically(path, results(figures, reports, variants) + (READING + reading if reading else ''))
    print(path.read_text())


def main(argv: list[str] | None = None) -> int:
    try:
        reproduce(parse(ReproduceConfig, sys.argv[1:] if argv is None else argv))
    except (ValueError, FloatingPointError, RuntimeError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
