"""How many images does a model get right, clean and under FGSM?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_batchout.pixels import PixelModel, gradient_sign, modes_kept, parse_epsilon

__all__ = ['fgsm_scores']


def fgsm_scores(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[str | float] = (),
    batch_size: int = 500,
) -> dict[str, Any]:
    """Clean accuracy, and robust accuracy under FGSM at every epsilon.

    Robust means right before and right after the attack. Single-step attacks say little about robustness: they are
    here because the paper reports them.

    Args:
        model: Takes normalised images to logits; left in the mode it came in.
        images: (N, C, H, W), uint8, or floating in [0, 1].
        labels: (N,), int64.
        epsilons: L-infinity radii, as numbers or strings such as '8/255'.
        batch_size: Images at a time; the numbers do not depend on it beyond float rounding.

    Returns:
        ``{'n', 'clean': {'correct', 'accuracy'}, 'fgsm': {epsilon: {'correct', 'accuracy'}}, 'zero_gradient_share'}``;
        the last one is the share of images whose input gradient is exactly zero: above 0, FGSM cannot be trusted.

    Raises:
        ValueError: No images, images without labels or outside [0, 1]; an epsilon outside [0, 1].
    """
    radii = {str(epsilon): parse_epsilon(epsilon) for epsilon in epsilons}
    if len(images) == 0:
        raise ValueError('There are no images to evaluate on.')
    if len(images) != len(labels):
        raise ValueError(f'There are {len(images)} images, {len(labels)} labels: give every image its label.')
    if images.is_floating_point() and (images.min() < 0 or images.max() > 1):
        raise ValueError(f'Images must lie in [0, 1], got [{images.min():.3g}, {images.max():.3g}]. Unnormalise them.')
    counts = dict.fromkeys(['clean', *radii], 0)
    zero_gradients = 0
    with modes_kept(model):
        pixel_model = PixelModel(model)
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            batch = batch / 255 if batch.dtype == torch.uint8 else batch
            with torch.no_grad():
                right = pixel_model(batch).argmax(1) == target
            counts['clean'] += int(right.sum())
            if radii:
                sign = gradient_sign(pixel_model, batch, target)  # one gradient serves all radii
                zero_gradients += int((sign.flatten(1) == 0).all(1).sum())
            for name, radius in radii.items():
                with torch.no_grad():
                    after = pixel_model((batch + radius * sign).clamp(0, 1)).argmax(1) == target
                counts[name] += int((right & after).sum())
    n = len(images)
    scores = {name: {'correct': correct, 'accuracy': correct / n} for name, correct in counts.items()}
    clean = scores.pop('clean')
    return {'n': n, 'clean': clean, 'fgsm': scores, 'zero_gradient_share': zero_gradients / n}
