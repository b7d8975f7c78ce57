"""The inputs of an evaluation, checked before the first attack: model, images, labels."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from timm_batchout.data.images import DatasetImages, Images, Split
from timm_batchout.pixels import PixelModel, seeded, states_normalization

__all__ = ['REMEDY', 'as_images', 'check_input', 'drawn', 'in_pixels', 'read_pixels', 'weights_sha256']

REMEDY = 'check the weights, and whether the precision is too low for them.'


def in_pixels(model: nn.Module) -> PixelModel:
    either_format = states_normalization(model)  # a timm net
    device = next(model.parameters(), torch.empty(0)).device
    return PixelModel(model, channels_last=either_format).to(device)


def as_images(images: Any, labels: Tensor | None) -> Images:
    if isinstance(images, Tensor) and labels is not None:
        if len(images) != len(labels):
            raise ValueError(f'Got {len(images)} images but {len(labels)} labels.')
        if len(labels):
            _check_labels(labels)
        return Split(images.detach(), labels.long())
    if isinstance(images, Tensor) or labels is not None:
        raise ValueError('Give images and labels as two tensors, or one data set of (image, label) pairs.')
    return images if hasattr(images, 'read') else DatasetImages(images)


def drawn(total: int, n: int, seed: int) -> Tensor:
    """The numbers of n images in random order, so that any first part of them is a fair sample."""
    if not total:
        raise ValueError('The data set has no images.')
    if not 0 <= n <= total:
        raise ValueError(f'n must lie in [1, {total}], the number of images, or be 0 for all; got {n}.')
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: n or None]


def read_pixels(images: Images, part: slice, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A checked chunk: images in [0, 1], float32, and labels.

    Raises:
        ValueError: Images outside [0, 1] or of another dtype, labels outside the classes, no readable image.
    """
    x, y = images.read(part)
    if not len(x):
        raise ValueError(f'None of the images {part.start} to {part.stop} can be read.')
    _check_batch(x, y, classes)
    pixels = x.contiguous().float()
    if x.dtype == torch.uint8:
        pixels = pixels / 255  # on the CPU, because a GPU's division rounds differently
    return pixels.to(device), y.to(device).long()


def _check_batch(x: Tensor, y: Tensor, classes: int) -> None:
    """Raise ValueError unless these are images and class numbers, below ``classes`` if that is not 0."""
    _check_labels(y)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(
            f'Images must be uint8, or floating in [0, 1], got {x.dtype}. Convert 8-bit values: images.to(torch.uint8).'
        )
    if x.is_floating_point() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f'Images must lie in [0, 1], got [{x.min():.3g}, {x.max():.3g}]. Undo their normalisation.')
    if classes and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f'Labels must lie in [0, {classes}), the classes of the model; got [{int(y.min())}, {int(y.max())}].'
        )


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f'Labels must be class numbers (N,), int64, got {list(labels.shape)}, {labels.dtype}.')


def check_input(model: PixelModel, images: Images) -> tuple[int, torch.Size]:
    """Check model and images before any attack; returns the number of classes and the shape of an image.

    Images in memory are all checked, others only at the beginning and then as they are read.

    Raises:
        ValueError: Images, labels, dtypes or logits that no attack can work with.
    """
    x, y = images.read(slice(0, len(images) if isinstance(images, Split) else 2))
    _check_batch(x, y, 0)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if dtypes:
        raise ValueError(
            f'The weights are {dtypes.pop()}, but attacks are reported in float32. Evaluate model.float().'
        )
    if model.mean.numel() not in (1, x.shape[1]):
        raise ValueError(
            f'The images have {x.shape[1]} channels, but the mean of the model has {model.mean.numel()} values. Set '
            'mean and std of its pretrained_cfg, one value per channel.'
        )
    with torch.no_grad(), seeded(0):
        try:
            first, _ = read_pixels(images, slice(0, 2), 0, model.mean.device)
            logits = model(first)
        except AttributeError as error:
            raise ValueError(f'The model must return a tensor of logits (B, classes): {error}.') from error
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f'The model must return logits (B, classes) of two classes or more, got {list(logits.shape)}.')
    if not torch.isfinite(logits).all():
        raise ValueError(f'The logits are NaN or infinite: {REMEDY}')
    _check_batch(x, y, logits.shape[1])
    return logits.shape[1], x.shape[1:]


def weights_sha256(model: nn.Module) -> str:
    """Hash of the state_dict: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
