"""What evaluation costs beside the attack libraries called by hand, and what the audit adds, into evaluation.json.

    python recipes/bench/evaluation.py --root PATH_OF_MNIST

The two sides of each ratio take turns, on the same net, images and settings, and must leave the same number of images
right. The share of our time inside the model (its forwards and backwards) says how much any harness could save.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import foolbox
import timm
import torch
from pyautoattack import AutoAttack
from timing import in_turns
from torch import Tensor, nn

import timm_batchout  # noqa: F401
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_split
from timm_batchout.pixels import PixelModel
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.robustness.attacks import AutoAttack as AutoAttackSettings
from timm_batchout.robustness.deepfool import deepfool
from timm_batchout.robustness.harness import evaluate

MODEL = 'batchout_mnist_cnn.mnist'
EPSILON = 0.1
ROBUST = 'mnist_cnn.pgd_at_mnist'  # standard AutoAttack takes longest where images withstand it
ROBUST_EPSILON = 0.3
ITERATIONS = 5


def in_turn(first: Callable[[], int], second: Callable[[], int], times: int, warm_up: bool = True) -> dict[str, Any]:
    """Median seconds of both, and how many images each leaves right.

    Args:
        first, second: The two sides.
        times: Runs of each that count.
        warm_up: Run each once more before; not worth it for minutes.
    """
    right: dict[str, int] = {}

    def noted(name: str, run: Callable[[], int]) -> Callable[[], None]:
        return lambda: right.update({name: run()})

    sides = {'ours': noted('ours', first), 'theirs': noted('theirs', second)}
    seconds = in_turns(sides, times, warm_up=warm_up)
    ratio = seconds['ours'] / seconds['theirs']
    return {
        'ours_seconds': seconds['ours'],
        'theirs_seconds': seconds['theirs'],
        'ratio': ratio,
        'right': list(right.values()),
    }


@contextmanager
def inside(model: nn.Module) -> Iterator[list[float]]:
    """Seconds inside the forwards of a model and inside ``torch.autograd.grad``, as they are spent."""
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    with mock.patch.object(model, 'forward', timed(model.forward)), \
            mock.patch.object(torch.autograd, 'grad', timed(torch.autograd.grad)):  # fmt: skip
        yield seconds


def standard_autoattack(images: Tensor, labels: Tensor, times: int) -> dict[str, Any]:
    """All four stages, through this package and by hand."""
    model = timm.create_model(ROBUST, pretrained=True).eval().requires_grad_(False)
    net = PixelModel(model)

    def ours() -> int:
        attack = AutoAttackSettings(eps=[ROBUST_EPSILON])
        return evaluate(model, images, labels, [attack], audit=False, batch_size=len(images)).scores[-1].correct

    def by_hand() -> int:
        attack = AutoAttack(net, eps=ROBUST_EPSILON, norm='Linf', seed=0, device='cpu')
        attacked, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
        with torch.no_grad():
            return int(((net(images).argmax(1) == labels) & (net(attacked).argmax(1) == labels)).sum())

    result = in_turn(ours, by_hand, times, warm_up=False)
    start = time.perf_counter()
    with inside(model) as seconds:
        ours()
    share = sum(seconds) / (time.perf_counter() - start)
    return {**result, 'model': ROBUST, 'n': len(images), 'epsilon': ROBUST_EPSILON, 'share_inside_the_model': share}


def audit(model: nn.Module, images: Tensor, labels: Tensor, times: int) -> dict[str, Any]:
    """The audit beside the attacks of an everyday report: FGSM and PGD."""

    def report(audited: bool) -> int:
        return evaluate(model, images, labels, ['fgsm', 'pgd'], [EPSILON], audit=audited).scores[-1].correct

    return in_turn(lambda: report(True), lambda: report(False), times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='mnist')
    parser.add_argument('--root', default='data/mnist')
    parser.add_argument('--n', type=int, default=300)
    parser.add_argument('--n_autoattack', type=int, default=40)
    parser.add_argument('--times', type=int, default=5)
    arguments = parser.parse_args()
    split = load_split(DataConfig(arguments.data, arguments.root), train=False)
    given, truth = split.images[: arguments.n].float() / 255, split.labels[: arguments.n]
    order = torch.randperm(arguments.n, generator=torch.Generator().manual_seed(0))  # which evaluate takes them in
    images, labels = given[order], truth[order]
    model = timm.create_model(MODEL, pretrained=True).eval()
    model.requires_grad_(False)
    net = PixelModel(model)
    target = foolbox.PyTorchModel(net, bounds=(0, 1), device='cpu')

    def left(attacked: Tensor) -> int:
        """Right before and after, as a user of the libraries would count it."""
        with torch.no_grad():
            return int(((net(images).argmax(1) == labels) & (net(attacked).argmax(1) == labels)).sum())

    def harness(attack: str, **settings: Any) -> Callable[[], int]:
        def run() -> int:
            report = evaluate(
                model,
                given,
                truth,
                [attack],
                [EPSILON],
                settings={attack: settings},
                batch_size=arguments.n,
                audit=False,
            )
            return report.scores[-1].correct

        return run

    def pgd() -> int:
        torch.manual_seed(0)
        attack = foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.125, random_start=True)
        return left(attack(target, images, labels, epsilons=EPSILON)[1])

    def autoattack() -> int:
        attack = AutoAttack(net, eps=EPSILON, norm='Linf', seed=0, device='cpu')
        attack.attacks_to_run = ['apgd-ce']
        with torch.no_grad():
            right = (net(images).argmax(1) == labels).nonzero()[:, 0]
        attacked = images.clone()
        attacked[right] = attack.run_standard_evaluation(images[right], labels[right], batch_size=len(right))[0]
        return left(attacked)

    def ours() -> int:
        return int(deepfool(net, images, labels, ITERATIONS).right[-1].sum())

    def one_run(steps: int) -> int:
        attack = foolbox.attacks.L2DeepFoolAttack(steps=steps, overshoot=0.02)
        return left(attack(target, images, labels, epsilons=None)[1])

    def all_runs() -> int:
        return [one_run(steps) for steps in range(1, ITERATIONS + 1)][-1]

    results = {
        'harness against foolbox, PGD': in_turn(harness('pgd'), pgd, arguments.times),
        'harness against pyautoattack, APGD-CE': in_turn(
            harness('autoattack', stages=['apgd-ce']), autoattack, max(1, arguments.times // 2)
        ),
        f'DeepFool, {ITERATIONS} iterations, against one run of foolbox': in_turn(
            ours, lambda: one_run(ITERATIONS), arguments.times
        ),
        f'DeepFool after 1 to {ITERATIONS} iterations, against a run of foolbox for each': in_turn(
            ours, all_runs, arguments.times
        ),
    }
    results['audit, FGSM and PGD, against FGSM and PGD'] = audit(model, given, truth, arguments.times // 2)
    few = slice(0, arguments.n_autoattack)
    results['AutoAttack standard, against pyautoattack'] = standard_autoattack(given[few], truth[few], 1)
    for name, result in results.items():
        assert result['right'][0] == result['right'][1], (name, result)
        print(f'{name}: {result["ratio"]:.3f} of the time')
    report = {
        'model': MODEL,
        'data': arguments.data,
        'n': arguments.n,
        'epsilon': EPSILON,
        'results': results,
        'environment': environment(),
    }
    write_atomically(Path(__file__).with_suffix('.json'), json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
