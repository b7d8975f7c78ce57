"""The loss of a batch: cross-entropy, or a form of adversarial training.

An adversarial objective attacks the current net, then trains on the result. The attack computes gradients of the images
only and leaves the batch-norm statistics unchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_batchout.layer import BatchOut
from timm_batchout.pixels import fgsm, modes_kept
from timm_batchout.training.config import ObjectiveConfig

__all__ = ['Objective', 'perturb', 'robust_correct']

Loss = Callable[[Tensor], Tensor]  # images to a sum over images


def plain(model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of a mini-batch; labels are class numbers (B,) or probabilities (B, classes)."""
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def perturb(
    loss: Loss, images: Tensor, epsilon: float, step_size: float, steps: int, norm: str = 'Linf', start: str = 'uniform'
) -> Tensor:
    """Projected gradient ascent on a loss (Madry et al., 2018).

    Args:
        loss: Maps images to the sum of their losses.
        images: (B, C, H, W), floating, in [0, 1].
        epsilon: Radius in [0, 1] pixels; 0 returns the images.
        step_size: Step size in [0, 1] pixels.
        steps: Gradient steps.
        norm: 'Linf' or 'L2'.
        start: 'uniform' in the ball, or 'near': the images plus Gaussian noise of standard deviation 0.001 (TRADES).

    Returns:
        Images within ``epsilon`` of the given ones and within [0, 1]; detached, same shape and dtype.
    """
    if epsilon == 0:
        return images.detach()
    images = images.detach()
    delta = 1e-3 * torch.randn_like(images) if start == 'near' else _uniform(images, epsilon, norm)
    x = (images + delta).clamp_(0, 1)
    for _ in range(steps):
        gradient = _gradient(loss, x)
        direction = gradient.sign() if norm == 'Linf' else gradient / _length(gradient)
        x = (images + _project(x + step_size * direction - images, epsilon, norm)).clamp_(0, 1)
    return x


def n_fgsm(loss: Loss, images: Tensor, epsilon: float, step_size: float) -> Tensor:
    """Noise, then one step, without projection (N-FGSM, de Jorge et al., 2022).

    It protects single-step training from catastrophic overfitting. The noise is uniform within twice the radius, so
    images may move by up to ``2 * epsilon + step_size``.
    """
    images = images.detach()
    x = (images + _uniform(images, 2 * epsilon, 'Linf')).clamp_(0, 1)
    return (x + step_size * _gradient(loss, x).sign()).clamp_(0, 1)


def _gradient(loss: Loss, images: Tensor) -> Tensor:
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        return torch.autograd.grad(loss(images), images)[0]


def _uniform(images: Tensor, epsilon: float, norm: str) -> Tensor:
    if norm == 'Linf':
        return torch.empty_like(images).uniform_(-epsilon, epsilon)
    noise = torch.randn_like(images)
    share = torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
    return epsilon * share ** (1 / images[0].numel()) * noise / _length(noise)


def _project(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    return delta.clamp_(-epsilon, epsilon) if norm == 'Linf' else delta * (epsilon / _length(delta)).clamp(max=1)


def _length(x: Tensor) -> Tensor:
    """L2 norm of each image, (B, 1, 1, 1); never 0."""
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode normalise by the batch without updating their running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class Objective:
    """``objective(model, images, labels)`` is the mean loss of a mini-batch.

    Args:
        config: The objective and its settings.
        layers: The model's BatchOut layers, which are switched on and off.

    Attributes:
        epsilon: The current training radius, in [0, 1] pixels; set by ``warm_up``.
    """

    def __init__(self, config: ObjectiveConfig, layers: Sequence[BatchOut] = ()):
        self.config, self.layers = config, layers
        self.epsilon = config.epsilon

    def warm_up(self, share: float) -> None:
        """Set the radius, given the share of all training steps that are done."""
        length = self.config.epsilon_warmup
        self.epsilon = self.config.epsilon * (min(1.0, share / length) if length else 1.0)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        config, smoothing = self.config, self.config.label_smoothing
        if config.name == 'plain':
            return plain(model, images, labels, smoothing)
        if config.name == 'fgsm':  # the paper's: one mini-batch, half of it adversarial
            half = len(images) // 2
            with self._attacking(model):
                adversarial = fgsm(model, images[:half], labels[:half], self.epsilon)
            return plain(model, torch.cat([adversarial, images[half:]]), labels, smoothing)
        adversarial = self.attack(model, images, labels)
        if config.name != 'trades':
            return plain(model, adversarial, labels, smoothing)
        with self._batchout(config.batchout in ('both', 'clean')):
            clean = model(images)
        with self._batchout(config.batchout in ('both', 'adversarial')):
            attacked = model(adversarial)
        divergence = _kl(attacked, clean) / len(images)
        return F.cross_entropy(clean, labels, label_smoothing=smoothing) + config.beta * divergence

    def attack(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The adversarial images of this mini-batch, detached."""
        config, epsilon = self.config, self.epsilon
        step_size = epsilon * config.relative_step

        def cross_entropy(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x), labels, reduction='sum')

        with self._attacking(model):
            if config.name == 'n_fgsm':
                return n_fgsm(cross_entropy, images, epsilon, step_size)
            if config.name != 'trades':
                steps = 1 if config.name == 'fgsm_rs' else config.steps
                return perturb(cross_entropy, images, epsilon, step_size, steps, config.norm)
            with torch.no_grad():
                clean = model(images)
            return perturb(
                lambda x: _kl(model(x), clean), images, epsilon, step_size, config.steps, config.norm, 'near'
            )

    @contextmanager
    def _attacking(self, model: nn.Module) -> Iterator[None]:
        training = self.config.attack_mode == 'train'
        with modes_kept(model), statistics_kept(model), self._batchout(training and self.config.attack_batchout):
            model.train(training)
            yield

    @contextmanager
    def _batchout(self, on: bool) -> Iterator[None]:
        before = [layer.active for layer in self.layers]
        for layer, active in zip(self.layers, before, strict=True):
            layer.active = active and on
        try:
            yield
        finally:
            for layer, active in zip(self.layers, before, strict=True):
                layer.active = active


def _kl(attacked: Tensor, clean: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the clean to the attacked predictions, summed over images (TRADES, Eq. 5)."""
    return F.kl_div(F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction='sum', log_target=True)


def robust_correct(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str = 'Linf', steps: int = 10
) -> Tensor:
    """(B,) bool: classified correctly, also after PGD on the cross-entropy; in the model's current mode."""

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels, reduction='sum')

    attacked = perturb(loss, images, epsilon, 2.5 * epsilon / steps, steps, norm)
    with torch.no_grad():
        return (model(images).argmax(1) == labels) & (model(attacked).argmax(1) == labels)
