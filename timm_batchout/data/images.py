"""Labelled images by number, decoded only when they are needed: what evaluation reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ['DatasetImages', 'Images', 'Split', 'laid_out']


class Images(Protocol):
    """Labelled images.

    Attributes:
        class_names: Names by class number; empty if the data has none.
    """

    @property
    def class_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def select(self, indices: Tensor) -> 'Images':
        """The images with these numbers, int64 (N,), in this order. A stream is read now, in one pass."""
        ...

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), uint8 or floating in [0, 1], and labels (B,), int64, without broken images."""
        ...


@dataclass
class Split:
    """Images in memory.

    Attributes:
        images: (N, C, H, W), uint8; for evaluation also floating in [0, 1].
        labels: (N,), int64.
        class_names: Names by class number; empty if the data has none.
    """

    images: Tensor
    labels: Tensor
    class_names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def select(self, indices: Tensor) -> 'Split':
        at = [indices.to(tensor.device) for tensor in (self.images, self.labels)]
        return Split(self.images[at[0]], self.labels[at[1]], self.class_names)

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        return self.images[part], self.labels[part]


def laid_out(images: Tensor, channels_last: bool) -> Tensor:
    """Images (B, C, H, W) in a memory format, with unambiguous strides.

    One-channel images are contiguous in both formats, and convolutions would take some strides for channels_last.
    """
    if channels_last:
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous().view(-1).view(images.shape)


class DatasetImages:
    """A map-style dataset of (image, class number), as ``Images``.

    Args:
        dataset: Its images are tensors (C, H, W), uint8 or floating in [0, 1].
        indices: Numbers of the images; None: all.

    Raises:
        ValueError: While reading: not pairs of image and label, or images of several sizes.
    """

    def __init__(self, dataset: Any, indices: Tensor | None = None):
        self.dataset = dataset
        self.class_names: Sequence[str] = tuple(getattr(dataset, 'classes', ()))
        self.indices = torch.arange(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, indices: Tensor) -> 'DatasetImages':
        return DatasetImages(self.dataset, self.indices[indices])

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        try:
            images, labels = zip(*(self.dataset[int(i)] for i in self.indices[part]), strict=True)
            return torch.stack(images), torch.tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                'A data set must yield pairs of an image, a tensor (C, H, W) that is uint8 or in [0, 1], all of one '
                f'size, and a class number: {error}.'
            ) from error
