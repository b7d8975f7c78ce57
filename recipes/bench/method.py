"""What BatchOut and adversarial training cost, as ratios measured side by side in one run, into method.json.

    python recipes/bench/method.py                          about ten minutes on one idle core
    python recipes/bench/method.py --device cuda --bf16     a few minutes, into method-cuda.json

The candidates of each comparison take turns, and the medians of their times are compared: the layer with a copy of the
same tensor, a training step of a twin with one of the plain net, an adversarial training step with a plain one.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from timing import in_turns, turns
from torch import Tensor, nn

from timm_batchout import batchout, batchout_sites, gaussian_noise
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.training.config import ObjectiveConfig
from timm_batchout.training.objectives import Objective

HERE = Path(__file__).parent
SHAPES = {
    'conv map 128x64x32x32': (128, 64, 32, 32),
    'tokens 64x197x384': (64, 197, 384),
    'features 128x512': (128, 512),
}
FILL = 0.005  # seconds of a turn
# A batch of m samples is read and written once, and n = m / 2 partners are read: 2.5 m; a copy moves 2 m. In place
# only the augmented half moves: 1.5 m.
FLOOR = {'new tensor': 1.25, 'in place': 0.75}
COPIES = ('new tensor', 'memory at hand')  # the first access to a page costs more than the copy
STEPS = {  # model -> (batch size, image side)
    'mnist_cnn': (128, 28),
    'cifar_vgg': (128, 32),
    'resnet18_cifar_w32': (128, 32),
    'resnet18': (16, 160),
    'vit_tiny_patch16_224': (16, 224),
    'convnext_atto': (16, 160),
}
COMPILED = ('cifar_vgg', 'resnet18')
OBJECTIVES = {
    'FGSM, half of the batch': ObjectiveConfig('fgsm', epsilon=8 / 255),
    'FGSM-RS': ObjectiveConfig('fgsm_rs', epsilon=8 / 255),
    'N-FGSM': ObjectiveConfig('n_fgsm', epsilon=8 / 255),
    'PGD, 5 steps': ObjectiveConfig('pgd', epsilon=8 / 255, steps=5),
    'PGD, 10 steps': ObjectiveConfig('pgd', epsilon=8 / 255, steps=10),
    'TRADES, 10 steps': ObjectiveConfig('trades', epsilon=8 / 255, steps=10),
}


def layer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """The share of the memory floor that ``batchout`` reaches, and the time of ``gaussian_noise`` relative to it.

    The floor is taken from copies into a new tensor and into memory at hand. The kernels are what remains of the
    method without its draws and checks: the partners have to be copied in place, where they are read before any sample
    changes, and in a new tensor no kernel of torch reads them where they are.
    """
    x = torch.rand(shape).to(device, dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    as_in_memory = x.movedim(1, -1) if len(shape) == 4 else x
    eta, n = (0.0, 0.1), len(x) // 2
    partners = torch.randint(len(x), (n,), device=device)
    weight = torch.full((n,) + (1,) * (x.ndim - 1), 0.05, device=device, dtype=dtype)

    def kernels(out: Tensor) -> None:
        out[:n].lerp_(as_in_memory.index_select(0, partners), weight)

    seconds = in_turns(
        {
            'copy, new tensor': x.clone,
            'copy, memory at hand': partial(torch.empty_like(x).copy_, x),
            'new tensor': partial(batchout, x, eta=eta),
            'new tensor, kernels': lambda: kernels(as_in_memory.clone()),
            'in place': partial(batchout, x, eta=eta, inplace=True),
            'in place, kernels': partial(kernels, as_in_memory),
            'gaussian': partial(gaussian_noise, x, eta=eta),
            'normal draws': lambda: torch.randn_like(as_in_memory[:n]),
        },
        repeats,
        FILL,
    )
    return {
        'seconds': seconds,
        'share_of_floor': {
            name: {copy: round(floor * seconds[f'copy, {copy}'] / seconds[name], 3) for copy in COPIES}
            for name, floor in FLOOR.items()
        },
        'share_in_kernels': {name: round(seconds[f'{name}, kernels'] / seconds[name], 3) for name in FLOOR},
        'gaussian_noise_over_batchout': round(seconds['gaussian'] / seconds['new tensor'], 2),
        'normal_draws_over_batchout': round(seconds['normal draws'] / seconds['new tensor'], 2),
    }


@dataclass
class Bench:
    """Training steps on a device, with the forward pass in bfloat16 if asked for."""

    device: torch.device
    bf16: bool
    repeats: int

    def twin(self, name: str, size: int, side: int, compiled: bool) -> dict[str, Any]:
        """The time of a training step of ``batchout_<name>`` relative to one of ``name``."""
        plain = Objective(ObjectiveConfig())
        candidates = {}
        for which in (name, f'batchout_{name}'):
            model = self._create(which, side)
            sites = len(batchout_sites(model))
            images, labels = self._batch(model, size, side)
            if compiled:
                model.compile(backend='inductor')
            candidates[which] = self._step(model, plain, images, labels)
        plain_seconds, seconds = turns(candidates, self.repeats, FILL).values()
        # Of the two steps of a turn: a machine that slows down for a while slows both.
        ratios = [twin / plain for twin, plain in zip(seconds, plain_seconds, strict=True)]
        lower, middle, upper = (round(ratio, 3) for ratio in quantiles(ratios, n=4))
        return {
            'batch': size,
            'side': side,
            'sites': sites,
            'seconds': median(plain_seconds),
            'ratio': middle,
            'quartiles': [lower, upper],
        }

    def objectives(self, name: str, size: int, side: int) -> dict[str, Any]:
        """The time of an adversarial training step relative to a plain one, without and with BatchOut."""
        nets = {'without': self._create(name, side), 'with': self._create(f'batchout_{name}', side)}
        images, labels = self._batch(nets['without'], size, side)
        steps = {
            (title, which): self._step(net, Objective(config, list(batchout_sites(net).values())), images, labels)
            for title, config in {'cross-entropy': ObjectiveConfig(), **OBJECTIVES}.items()
            for which, net in nets.items()
        }
        repeats = max(3, self.repeats // 3)
        seconds = in_turns({f'{title}|{which}': step for (title, which), step in steps.items()}, repeats, FILL)
        plain = seconds['cross-entropy|without']
        ratios = {
            title: {f'{which}_batchout': round(seconds[f'{title}|{which}'] / plain, 2) for which in nets}
            for title in ('cross-entropy', *OBJECTIVES)
        }
        return {'batch': size, 'seconds_of_a_plain_step': plain, 'ratios': ratios}

    def _create(self, name: str, side: int) -> nn.Module:
        args = {'img_size': side} if 'vit' in name and side != 224 else {}
        torch.manual_seed(0)
        return timm.create_model(name, **args).to(self.device, memory_format=torch.channels_last)

    def _batch(self, model: nn.Module, size: int, side: int) -> tuple[Tensor, Tensor]:
        channels = model.pretrained_cfg['input_size'][0]  # type: ignore[index]
        images = torch.rand(size, channels, side, side, device=self.device)
        labels = torch.randint(int(model.num_classes), (size,), device=self.device)  # type: ignore[arg-type]
        return images.contiguous(memory_format=torch.channels_last), labels

    def _step(self, model: nn.Module, objective: Objective, images: Tensor, labels: Tensor) -> Callable[[], None]:
        """Forward, loss, backward and an SGD step on the same batch."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        model.train()

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = objective(model, images, labels)
            loss.backward()
            optimizer.step()

        return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', type=torch.device, default='cpu')
    parser.add_argument('--bf16', action='store_true', help='training steps with the forward pass in bfloat16')
    parser.add_argument('--output', type=Path, help='default: method.json, or method-DEVICE.json, beside this file')
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = arguments.device
    bench = Bench(device, arguments.bf16, arguments.repeats)
    report: dict[str, Any] = {
        'environment': environment(device), 'repeats': arguments.repeats, 'steps_in_bfloat16': arguments.bf16
    }  # fmt: skip
    report['layer'] = {
        title: {
            str(dtype).removeprefix('torch.'): layer(shape, dtype, device, 3 * arguments.repeats)
            for dtype in (torch.float32, torch.bfloat16)
        }
        for title, shape in SHAPES.items()
    }
    report['step'] = {name: bench.twin(name, *size, False) for name, size in STEPS.items()}
    report['compiled_step'] = {name: bench.twin(name, *STEPS[name], True) for name in COMPILED}
    report['objectives'] = {name: bench.objectives(name, *STEPS[name]) for name in ('mnist_cnn', 'cifar_vgg')}
    output = arguments.output or HERE / ('method.json' if device.type == 'cpu' else f'method-{device.type}.json')
    write_atomically(output, json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
