"""Nets that mask their gradients, planted, and honest ones: how many of each does the masking audit accuse?

    python recipes/audit/planted.py --output recipes/audit/planted.json

All are made here, on scikit-learn's digits, from a seed. Each is audited as ``timm-batchout evaluate`` does by default
(beside FGSM at 8/255), and beside standard AutoAttack. What the output knows already is not measured again.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_batchout
from timm_batchout.data.config import DataConfig
from timm_batchout.data.images import Split
from timm_batchout.data.memory import load_split
from timm_batchout.pixels import fgsm
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.training.objectives import perturb

__all__ = ['HONEST', 'MASKING', 'Through', 'trained']

IMAGES = 150
CONTRIBUTING = Path(__file__).parents[2] / 'CONTRIBUTING.md'
BEGIN, END = '<!-- planted nets: begin -->\n', '<!-- planted nets: end -->'
ONE_CHANNEL: dict[str, Any] = {
    'in_chans': 1, 'num_classes': 10, 'pretrained_cfg_overlay': {'mean': (0.0,), 'std': (1.0,)},
}  # fmt: skip


@cache
def digits(train: bool) -> Split:
    return load_split(DataConfig('digits'), train)


def mlp(hidden: int = 64, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), activation(), nn.Linear(hidden, 10))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)
    )


def cnn(name: str = 'mnist_cnn', **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **kwargs)


def trained(
    make: Callable[[], nn.Module],
    epsilon: float = 0.0,
    attack: str = 'pgd',
    seed: int = 0,
    epochs: int = 15,
    temperature: float = 1.0,
    noise: float = 0.0,
    smoothing: float = 0.0,
    weight_decay: float = 0.0,
) -> nn.Module:
    """A net trained on the digits; with an epsilon, on adversarial images of that L-infinity radius alone."""
    torch.manual_seed(seed)
    model = make()
    images, labels = digits(True).images.float() / 255, digits(True).labels
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=weight_decay)
    steps = epochs * (len(images) // 64)
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        x, y = images[batch], labels[batch]
        radius = epsilon * min(1.0, 2 * step / steps)
        if radius and attack == 'fgsm':
            x = fgsm(model.eval(), x, y, epsilon)
        elif radius:
            x = perturb(lambda z, y=y: F.cross_entropy(model(z), y, reduction='sum'), x, radius, radius / 3, 7)
        x = x + noise * torch.randn_like(x)
        loss = F.cross_entropy(model.train()(x) / temperature, y, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@cache
def plain() -> nn.Module:
    return trained(conv)


@cache
def plain_mlp() -> nn.Module:
    return trained(mlp)


@cache
def robust() -> nn.Module:
    return trained(conv, 0.2, epochs=30)


@cache
def robust_mlp() -> nn.Module:
    return trained(mlp, 0.15)


@cache
def fgsm_trained() -> nn.Module:
    return trained(conv, 0.3, 'fgsm', epochs=40)


class Through(nn.Module):
    """Images changed, then a net, then logits changed.

    Args:
        model: The net.
        before: Of images.
        after: Of logits.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
    ):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Decoy(nn.Module):
    """The logits of one net with the gradient of another."""

    def __init__(self, model: nn.Module, decoy: nn.Module):
        super().__init__()
        self.model, self.decoy = model, decoy

    def forward(self, x: Tensor) -> Tensor:
        shown = self.decoy(x)
        return self.model(x.detach()).detach() + shown - shown.detach()


class HashEnsemble(nn.Module):
    """The last bits of the image choose which net answers."""

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.detach().flatten(1).double().sum(1) * 1e6).long() % len(self.nets)
        logits = torch.stack([net(x) for net in self.nets], 1)
        return logits[torch.arange(len(x)), chosen]


def partial_view(net: nn.Module, which: int, parts: int) -> nn.Module:
    """The net, on one of ``parts`` disjoint sets of pixels."""
    part = torch.randint(parts, (1, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    return Through(net, lambda x: x * (part == which))


class WinnersTakeAll(nn.Module):
    """The largest activations of a layer pass, the others are 0 (Xiao et al., 2019)."""

    def __init__(self, share: float = 0.1):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), 1).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(x)


def winners(share: float, layers: int) -> nn.Module:
    hidden = [[nn.Linear(2048 if i else 784, 2048), WinnersTakeAll(share)] for i in range(layers)]
    return nn.Sequential(nn.Flatten(), *(layer for pair in hidden for layer in pair), nn.Linear(2048, 10))


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


class Noise(nn.Module):
    """New noise at every call."""

    def __init__(self, scale: float, of: Callable[[Tensor], Tensor] = torch.randn_like):
        super().__init__()
        self.scale, self.of = scale, of

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.of(x)


class WrongGradient(torch.autograd.Function):
    """The identity; its gradient is changed by one of the functions below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.change(gradient), None


def quantised(levels: int) -> Callable[[Tensor], Tensor]:
    return lambda x: (x * levels).round() / levels


def thermometer(x: Tensor) -> Tensor:
    return torch.stack([(x > level / 8).float() for level in range(8)]).mean(0)


def sine(amplitude: float, frequency: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + amplitude * torch.sin(frequency * x)


def randomly_shifted(x: Tensor) -> Tensor:
    rows, columns = (int(torch.randint(-3, 4, ())) for _ in range(2))
    return torch.roll(x, (rows, columns), (2, 3))


def randomly_masked(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > 0.3)


def flipped(gradient: Tensor) -> Tensor:
    return -gradient


def drowned(gradient: Tensor) -> Tensor:
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    return gradient + 5 * gradient.abs().mean() * noise


def one_hot(logits: Tensor) -> Tensor:
    return 10 * F.one_hot(logits.argmax(1), logits.shape[1]).float()


def saturated(logits: Tensor) -> Tensor:
    return torch.sigmoid(60 * (logits - logits.amax(1, keepdim=True)) + 60)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: WrongGradient.apply(x, change)


MASKING: dict[str, Callable[[], nn.Module]] = {
    'logits x 1e4': lambda: Through(plain(), after=lambda z: z * 1e4),
    'logits x 1e3, robust': lambda: Through(robust(), after=lambda z: z * 1e3),
    'temperature 1e-4, MLP': lambda: Through(plain_mlp(), after=lambda z: z / 1e-4),
    'defensive distillation': lambda: Through(trained(mlp, temperature=50.0, epochs=40)),
    'saturated logits': lambda: Through(plain(), after=saturated),
    'one-hot logits': lambda: Through(plain(), after=one_hot),
    'quantised to 4 levels': lambda: Through(plain(), quantised(4)),
    'quantised to 16 levels, robust': lambda: Through(robust(), quantised(16)),
    'thermometer coding': lambda: Through(plain(), thermometer),
    'detached input': lambda: Through(plain(), lambda x: x.detach()),
    'quantised activations': lambda: nn.Sequential(*plain_mlp()[:3], Rounded(), plain_mlp()[3]),  # type: ignore[index]
    'sine shattering, MLP': lambda: Through(plain_mlp(), sine(0.03, 600)),
    'sine shattering, CNN': lambda: Through(plain(), sine(0.03, 600)),
    'sine shattering, robust': lambda: Through(robust(), sine(0.02, 1000)),
    'sine shattering, strong': lambda: Through(robust_mlp(), sine(0.1, 400)),
    'noise 0.3': lambda: Through(plain(), Noise(0.3)),
    'noise 0.1, robust': lambda: Through(robust(), Noise(0.1)),
    'random shift': lambda: Through(plain(), randomly_shifted),
    'random mask': lambda: Through(plain_mlp(), randomly_masked),
    'noise on logits': lambda: Through(plain(), after=Noise(1.0)),
    'k-winners': lambda: trained(lambda: winners(0.01, 1)),
    'k-winners, two layers': lambda: trained(lambda: winners(0.02, 2)),
    'hash ensemble': lambda: HashEnsemble([trained(lambda i=i: partial_view(mlp(), i, 4), seed=i) for i in range(4)]),
    'hash ensemble, convolutions': lambda: HashEnsemble(
        [trained(lambda i=i: partial_view(conv(), i, 3), seed=i) for i in range(3)]
    ),
    'decoy: linear': lambda: Decoy(plain(), trained(linear)),
    'decoy: FGSM-trained': lambda: Decoy(plain(), fgsm_trained()),
    'decoy: untrained': lambda: Decoy(plain(), conv()),
    'decoy of a robust net': lambda: Decoy(robust(), plain_mlp()),
    'decoy of a linear net': lambda: Decoy(trained(linear), plain()),
    'gradient reversed': lambda: Through(plain(), changed(flipped)),
    'gradient drowned in noise': lambda: Through(plain(), changed(drowned)),
    'gradient of NaN': lambda: Through(plain(), changed(lambda g: g * torch.nan)),
    'FGSM training': fgsm_trained,
    'FGSM training, MLP': lambda: trained(lambda: mlp(256), 0.3, 'fgsm', epochs=40),
}

HONEST: dict[str, Callable[[], nn.Module]] = {
    'CNN': plain,
    'CNN, another seed': lambda: trained(conv, seed=1),
    'CNN, long training': lambda: trained(conv, epochs=60),
    'MLP': plain_mlp,
    'MLP, tanh': lambda: trained(lambda: mlp(64, nn.Tanh)),
    'MLP, GELU': lambda: trained(lambda: mlp(128, nn.GELU)),
    'linear': lambda: trained(linear),
    'PGD training 0.2': robust,
    'PGD training 0.1': lambda: trained(conv, 0.1),
    'PGD training, MLP': robust_mlp,
    'BatchOut': lambda: trained(lambda: timm_batchout.add_batchout(conv(), eta=0.3)),
    'mnist_cnn, dropout': lambda: trained(lambda: cnn('mnist_cnn'), epochs=8),
    'Gaussian noise in training': lambda: trained(conv, noise=0.3),
    'label smoothing': lambda: trained(conv, smoothing=0.2),
    'weight decay': lambda: trained(conv, weight_decay=1.0),
    'blurred': lambda: Through(plain(), lambda x: F.avg_pool2d(x, 3, 1, 1)),
    'logits x 5': lambda: Through(plain(), after=lambda z: z * 5),
    'mean of two': lambda: Through(plain(), after=lambda z: z / 2),
    'ResNet': lambda: trained(lambda: cnn('test_resnet', **ONE_CHANNEL), epochs=8),
    'ViT': lambda: trained(lambda: cnn('test_vit', img_size=28, patch_size=7, **ONE_CHANNEL), epochs=8),
}


ASKED: dict[str, dict[str, Any]] = {  # what the audit stands beside
    'fgsm': {'attacks': ['fgsm'], 'eps': ['8/255']},
    'fgsm+pgd+autoattack': {
        'attacks': ['fgsm', 'pgd', 'autoattack'], 'eps': ['0.1'], 'settings': {'autoattack': {'n': 40}},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path(__file__).with_suffix('.json'))
    parser.add_argument('--only', default='', help='audit the nets with this in their names, in place of what is known')
    parser.add_argument('--seeds', type=int, default=2, help='audits of each net, with other images and random starts')
    arguments = parser.parse_args()
    test = digits(False)
    known = json.loads(arguments.output.read_text())['nets'] if arguments.output.is_file() else []
    records = {
        (r['net'], r['beside'], r['seed']): r for r in known if not arguments.only or arguments.only not in r['net']
    }
    for masking, nets in ((True, MASKING), (False, HONEST)):
        for name, make in nets.items():
            jobs = [
                (name, beside, seed) for beside in ASKED for seed in range(arguments.seeds if beside == 'fgsm' else 1)
            ]
            jobs = [job for job in jobs if job not in records and arguments.only in name]
            model = make() if jobs else None
            for job in jobs:
                started = time.perf_counter()
                report = timm_batchout.evaluate(
                    model, test.images, test.labels, **ASKED[job[1]], n=IMAGES, seed=job[2]
                )  # fmt: skip
                assert report.audit is not None
                records[job] = {
                    'net': name, 'masking': masking, 'beside': job[1], 'seed': job[2],
                    'clean': report.score('clean').accuracy, 'accused': bool(report.audit.suspicions),
                    'audit': asdict(report.audit), 'seconds': round(time.perf_counter() - started, 1),
                }  # fmt: skip
                right = records[job]['accused'] == masking
                print(
                    f'{name:34} {job[2]} {job[1]:22} {report.audit.suspicions}{"" if right else "  WRONG"}', flush=True
                )
                save(arguments.output, records)
    write_table(json.loads(arguments.output.read_text()))


def save(output: Path, records: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    order = [*MASKING, *HONEST]
    found = sorted(records.values(), key=lambda r: (order.index(r['net']), r['beside'], r['seed']))
    content = {'images': IMAGES, 'asked': ASKED, 'audits': counted(found), 'nets': found, 'environment': environment()}
    write_atomically(output, json.dumps(content, indent=1) + '\n')


def counted(found: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Audits by what was asked for: of masking nets, of those that were caught, and the same of honest nets."""
    counts = {}
    for beside in ASKED:
        same = [record for record in found if record['beside'] == beside]
        counts[beside] = {
            'masking': sum(record['masking'] for record in same),
            'caught': sum(record['masking'] and record['accused'] for record in same),
            'honest': sum(not record['masking'] for record in same),
            'accused': sum(not record['masking'] and record['accused'] for record in same),
        }
    return counts


def table(content: dict[str, Any]) -> str:
    nets = {masking: len({r['net'] for r in content['nets'] if r['masking'] == masking}) for masking in (True, False)}
    lines = [
        f'| beside | masking nets ({nets[True]}) caught | honest nets ({nets[False]}) accused |',
        '|---|---|---|',
    ]
    for attacks, count in content['audits'].items():
        caught, accused = (
            f'{count[a]} of {count[b]} audits' for a, b in (('caught', 'masking'), ('accused', 'honest'))
        )
        lines.append(f'| {attacks} | {caught} | {accused} |')
    missed = sorted({r['net'] for r in content['nets'] if r['masking'] and not r['accused']})
    return '\n'.join(lines) + f'\n\nMissed at least once: {", ".join(missed) or "none"}.'


def write_table(content: dict[str, Any]) -> None:
    head, _, rest = CONTRIBUTING.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_atomically(CONTRIBUTING, f'{head}{BEGIN}{table(content)}\n{END}{tail}')


if __name__ == '__main__':
    main()
