"""Pictures of adversarial images, with their perturbations and the model's predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_batchout.data.images import Images
from timm_batchout.drawing import literal, pyplot, save_figure
from timm_batchout.pixels import PixelModel, frozen, gradient_sign, modes_kept
from timm_batchout.robustness.inputs import drawn, in_pixels, read_pixels
from timm_batchout.text import format_radius

__all__ = ['draw_examples']

STEPS = 40
LOOKED_AT = 100  # images, to find some that are classified correctly


def draw_examples(
    model: nn.Module, images: Images, radius: float, path: str | Path, count: int = 8, seed: int = 0
) -> None:
    """Draw a column for each image: the image, the perturbation, and the adversarial image, with the predictions.

    The images are the first ones, in the order of ``evaluate``, that are classified correctly, whether or not the
    attack (PGD with 40 steps on the cross-entropy) fools the model. If it does, the frame is red.

    Args:
        model: Any classifier of normalised images, as for ``evaluate``.
        images: The images to draw from.
        radius: L-infinity radius in [0, 1] pixels.
        path: The file; its suffix decides the format (.png, .svg, .pdf).
        count: Number of columns.
        seed: Seed of the draw.

    Raises:
        ValueError: None of the first 100 images is classified correctly.
    """
    with modes_kept(model):
        net = in_pixels(model)
        some = images.select(drawn(len(images), min(LOOKED_AT, len(images)), seed))
        pixels, labels = read_pixels(some, slice(0, LOOKED_AT), 0, net.mean.device)
        with torch.no_grad():
            chosen = (net(pixels).argmax(1) == labels).nonzero()[:count, 0]
        if not len(chosen):
            raise ValueError(f'None of {len(pixels)} images is classified correctly, so there is nothing to attack.')
        pixels, labels = pixels[chosen], labels[chosen]
        with frozen(net):
            attacked = _pgd(net, pixels, labels, radius)
        with torch.no_grad():
            before, after = net(pixels).softmax(1), net(attacked).softmax(1)
    magnified = (0.5 + (attacked - pixels) / (2 * radius)).clamp(0, 1)  # grey: not moved
    _draw([pixels, magnified, attacked], before, after, list(images.class_names), radius, Path(path))


def _pgd(net: PixelModel, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    x = images
    for _ in range(STEPS):
        x = x + 2.5 / STEPS * radius * gradient_sign(net, x, labels)
        x = torch.minimum(torch.maximum(x, images - radius), images + radius).clamp(0, 1)
    return x


def _draw(rows: Sequence[Tensor], before: Tensor, after: Tensor, names: list[str], radius: float, path: Path) -> None:
    def seen(probabilities: Tensor) -> str:
        number = int(probabilities.argmax())
        return literal(f'{names[number] if names else number} {probabilities.max():.0%}')

    count = len(before)
    figure, axes = pyplot().subplots(
        3, count, figsize=(1.25 * count + 0.5, 4.6), squeeze=False, layout='constrained', dpi=150
    )
    for column in range(count):
        fooled = bool(before[column].argmax() != after[column].argmax())
        for row, ax in enumerate(axes[:, column]):
            image = rows[row][column].permute(1, 2, 0).cpu().numpy()
            ax.imshow(image if image.shape[2] == 3 else image[..., 0], cmap='gray', vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            if row == 2 and fooled:
                options: dict[str, Any] = {'color': 'tab:red', 'linewidth': 3}
                ax.spines[:].set(**options)
        axes[0, column].set_title(seen(before[column]), fontsize=9)
        axes[2, column].set_title(seen(after[column]), fontsize=9, color='tab:red' if fooled else 'black')
    for row, text in enumerate(('image', f'perturbation,\nup to {format_radius(radius)}', 'both')):
        axes[row, 0].set_ylabel(text)
    save_figure(figure, path)
