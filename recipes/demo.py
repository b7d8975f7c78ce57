"""make demo: train the paper's MNIST net with and without BatchOut on scikit-learn's digits, attack both, show both.

Everything runs on one CPU in under a minute. The figure lands in runs/demo/fgsm.png.
"""

import shutil
import time
from pathlib import Path

import matplotlib
import timm
import torch

import timm_batchout  # noqa: F401
from timm_batchout.cli.main import parse
from timm_batchout.data.memory import load_split
from timm_batchout.robustness.fgsm_scores import fgsm_scores
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.launch import train
from timm_batchout.zoo import pretrained as weights

HERE = Path(__file__).parent
OUTPUT = Path('runs/demo')
EPSILONS = ['0', '0.05', '0.1', '0.15', '0.2', '0.25', '0.3']


def train_and_attack(model_name: str) -> dict:
    run = OUTPUT / model_name
    shutil.rmtree(run, ignore_errors=True)  # the demo's own folder, made anew every time
    config = parse(
        TrainConfig, ['--config', str(HERE / 'digits_batchout.yaml'), '--model', model_name, '--output', str(run)]
    )
    train(config)
    model = timm.create_model(model_name, checkpoint_path=str(run / 'model.safetensors'))
    test = load_split(config.data, train=False)
    return fgsm_scores(model, test.images, test.labels, EPSILONS)


def draw(reports: dict[str, dict], path: Path) -> None:
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout='constrained')
    for name, report in reports.items():
        axes.plot([float(e) for e in EPSILONS], [report['fgsm'][e]['accuracy'] for e in EPSILONS], 'o-', label=name)
    axes.set(xlabel='FGSM epsilon (pixels in [0, 1])', ylabel='robust accuracy', ylim=(0, 1))
    axes.set_title(f'scikit-learn digits, {report["n"]} test images, one seed', fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    started = time.perf_counter()
    reports = {}
    for name in ('mnist_cnn', 'batchout_mnist_cnn'):
        print(f'\nTraining {name} on digits')
        reports[name] = train_and_attack(name)

    print('\nRobust accuracy in percent under FGSM\n')
    print(f'{"":20}' + ''.join(f'{"eps " + e:>10}' for e in EPSILONS))
    for name, report in reports.items():
        print(f'{name:20}' + ''.join(f'{100 * report["fgsm"][e]["accuracy"]:10.1f}' for e in EPSILONS))
    draw(reports, OUTPUT / 'fgsm.png')
    print(
        f'\nThe curves are in {OUTPUT / "fgsm.png"}. FGSM is a weak attack: see the README on what this does not show.'
    )

    model = timm.create_model('batchout_cifar_vgg', pretrained=True).eval()
    card = weights.bundled_cards()[f'batchout_cifar_vgg.{model.pretrained_cfg["tag"]}']
    with torch.no_grad():
        classes = model(torch.rand(1, 3, 32, 32)).shape[1]
    print(
        f'\ntimm.create_model("batchout_cifar_vgg", pretrained=True): {classes} classes, trained on {card["data"]}, '
        f'test accuracy {100 * card["test"]["clean"]["accuracy"]:.2f} (n = {card["test"]["n"]}).'
    )
    print(f'Demo finished in {time.perf_counter() - started:.0f} s.')


if __name__ == '__main__':
    main()
