"""make demo: train the paper's MNIST net with and without BatchOut on scikit-learn's digits, attack both, show both.

Everything runs on one CPU in under a minute. The figure lands in runs/demo/fgsm.png.
"""

import shutil
import time
from pathlib import Path

import timm
import torch

import timm_batchout  # noqa: F401
from timm_batchout.data.memory import load_split
from timm_batchout.recipe import parse
from timm_batchout.robustness.harness import evaluate
from timm_batchout.robustness.plots import draw_curves
from timm_batchout.robustness.report import Report
from timm_batchout.robustness.tables import compare
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.launch import train
from timm_batchout.zoo.pretrained import bundled_cards

HERE = Path(__file__).parent
OUTPUT = Path('runs/demo')
EPSILONS = ['0.05', '0.1', '0.15', '0.2', '0.25', '0.3']


def train_and_attack(model_name: str) -> Report:
    run = OUTPUT / model_name
    shutil.rmtree(run, ignore_errors=True)  # the demo's own folder, made anew every time
    config = parse(
        TrainConfig, ['--config', str(HERE / 'digits_batchout.yaml'), '--model', model_name, '--output', str(run)]
    )
    train(config)
    model = timm.create_model(model_name, checkpoint_path=str(run / 'model.safetensors'))
    test = load_split(config.data, train=False)
    return evaluate(model, test.images, test.labels, ['fgsm'], EPSILONS, audit=False, name=model_name, data='digits')


def main() -> None:
    started = time.perf_counter()
    reports = {}
    for name in ('mnist_cnn', 'batchout_mnist_cnn'):
        print(f'\nTraining {name} on digits')
        reports[name] = train_and_attack(name)

    print(f'\n{compare(list(reports.values()))}')
    draw_curves(list(reports.values()), OUTPUT / 'fgsm.png')
    print(f'\nThe curves are in {OUTPUT / "fgsm.png"}. FGSM is a weak attack: see the limitations in README.md.')

    model = timm.create_model('batchout_cifar_vgg', pretrained=True).eval()
    report = Report.from_dict(bundled_cards()[f'batchout_cifar_vgg.{model.pretrained_cfg["tag"]}']['report'])
    clean = report.score('clean')
    with torch.no_grad():
        classes = model(torch.rand(1, 3, 32, 32)).shape[1]
    print(
        f'\ntimm.create_model("batchout_cifar_vgg", pretrained=True): {classes} classes, trained on {report.data}, '
        f'test accuracy {100 * clean.accuracy:.2f} (n = {clean.n}).'
    )
    print(f'Demo finished in {time.perf_counter() - started:.0f} s.')


if __name__ == '__main__':
    main()
