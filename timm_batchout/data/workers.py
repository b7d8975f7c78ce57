"""Data sets too large to hold in memory, read and transformed by worker processes.

timm's own loader draws order and augmentation from the global random state, so a run resumed within an epoch would end
with other weights. Here they depend only on seed, epoch and image, whatever the number of workers and processes.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from timm.data import create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from timm_batchout.data.config import AugmentConfig
from timm_batchout.data.decode import to_mode
from timm_batchout.data.images import Images, Split, laid_out
from timm_batchout.data.timm_splits import TimmSplit

__all__ = ['TimmImages', 'TimmLoader']

CONSECUTIVE_BROKEN = 10  # this many in a row are no accident
# Raised by decoders, and by links in a tar whose target is missing.
BROKEN = (RuntimeError, OSError, SyntaxError, KeyError, RecursionError, DecompressionBombError)
Sample = tuple[np.ndarray, int, str]  # uint8 (C, H, W), label, error


class TimmLoader:
    """Batches of float images in [0, 1], decoded, cropped and augmented by workers.

    Order and sharding are those of ``TensorLoader``. For streamed sets, timm's reader distributes the training shards,
    and a resumed epoch is read from its start again. In evaluation every process reads all and takes its batches.

    Args:
        split: The images.
        batch_size: Images per batch and process.
        model_cfg: ``input_cfg`` of the model: size, interpolation, crop.
        classes: Number of classes; labels must be smaller.
        augment: Training mode: random augmentation.
        device, channels_last, shuffle, seed, rank, world_size: See ``TensorLoader``.

    Attributes:
        epoch, start: See ``TensorLoader``.
        broken: Images that could not be read since the iteration began. Training replaces each by the next one,
            evaluation leaves it out.

    Raises:
        ValueError: While iterating: a label outside the classes; an image that cannot be read, if ``data.broken`` is
            'stop', or ten of them in a row in any case.
    """

    def __init__(
        self,
        split: TimmSplit,
        batch_size: int,
        model_cfg: dict[str, Any],
        classes: int,
        augment: AugmentConfig | None = None,
        device: torch.device | str = 'cpu',
        channels_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.split, self.batch_size, self.classes = split, batch_size, classes
        self.device = torch.device(device)
        self.channels_last = channels_last
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.image_mode = 'L' if model_cfg['input_size'][0] == 1 else 'RGB'
        self.transform = make_transform(model_cfg, augment if shuffle else None)
        self.epoch = 0
        self.start = 0
        self.broken = 0
        self._keys: list[tuple[int, int]] = []  # (epoch, index) of the coming images: workers outlive an epoch
        self._batches: Any = None if split.streamed else self._indexed()

    def __len__(self) -> int:
        if self.shuffle:
            return len(self.split) // (self.batch_size * self.world_size)  # the same on every rank
        return -(-len(range(self.rank, len(self.split), self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.broken = 0
        for images, labels, errors in self._stream() if self.split.streamed else self._ordered():
            self.broken += sum(map(bool, errors))
            if any(errors) and self.split.config.broken == 'stop':
                raise ValueError(f'{next(filter(None, errors))}. Set data.broken=skip to skip such images.')
            good = labels >= 0
            if (~good).sum() > sum(map(bool, errors)):
                raise ValueError(
                    f'The data has the label {int(labels.min())}: an image without a label. Choose another split '
                    '(data.train_split, val_split or test_split).'
                )
            if not good.all():  # in evaluation
                images, labels = images[good], labels[good]
            if len(labels) and labels.max() >= self.classes:
                raise ValueError(
                    f'The data has the label {int(labels.max())}, but the model {self.classes} classes. Set '
                    'model_args.num_classes.'
                )
            images = images.to(self.device, non_blocking=True).float().div_(255)
            yield laid_out(images, self.channels_last), labels.to(self.device, non_blocking=True)

    def _ordered(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        order = self.split.indices
        assert order is not None
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            order = order[torch.randperm(len(order), generator=generator)]
        mine = order[self.rank :: self.world_size][self.start * self.batch_size : len(self) * self.batch_size]
        self._keys[:] = [(self.epoch, int(index)) for index in mine]
        yield from self._batches

    def _indexed(self) -> DataLoader[Any]:
        dataset = self.split.open(image_mode=self.image_mode)
        workers = min(self.split.config.workers, os.cpu_count() or 1)  # the number does not change any image
        return self._data_loader(
            IndexedImages(dataset, self.transform, self.seed, replace_broken=self.shuffle),
            workers,
            sampler=self._keys,
            persistent_workers=workers > 0,
        )

    def _stream(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        dataset = self.split.open(self.seed, self.batch_size, self.image_mode)
        dataset.set_epoch(self.epoch)
        if not self.shuffle and hasattr(dataset.reader, 'dist_rank'):
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        workers = self.split.config.workers
        dataset.set_loader_cfg(num_workers=workers)
        images = StreamedImages(dataset, self.transform, (self.seed, self.epoch))
        for i, batch in enumerate(self._data_loader(images, workers, drop_last=self.shuffle)):
            if self.shuffle and i == len(self):
                return
            if i >= self.start and (self.shuffle or i % self.world_size == self.rank):
                yield batch

    def _data_loader(self, images: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            images,
            self.batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.device.type == 'cuda',
            generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch),
            **options,
        )


class TimmImages:
    """The images of a split as ``Images``, resized and cropped as ``TimmLoader`` does in evaluation.

    Args:
        split: The images.
        model_cfg: ``input_cfg`` of the model: size, interpolation, crop.

    Attributes:
        crop_pct: Share of the resized image that is kept.
        broken: Images that could not be read so far and were left out.

    Raises:
        ValueError: While reading: an image that cannot be read, if ``data.broken`` is 'stop'.
    """

    def __init__(self, split: TimmSplit, model_cfg: dict[str, Any]):
        self.split, self.model_cfg = split, model_cfg
        self.class_names, self.crop_pct = split.class_names, float(model_cfg['crop_pct'])
        self.broken = 0
        dataset = split.open(image_mode='L' if model_cfg['input_size'][0] == 1 else 'RGB')
        transform = make_transform(model_cfg, None)
        self.samples: Any = (
            StreamedImages(dataset, transform, (0, 0))
            if split.streamed
            else IndexedImages(dataset, transform, 0, replace_broken=False)
        )

    def __len__(self) -> int:
        return len(self.split)

    def select(self, indices: Tensor) -> Images:
        if not self.split.streamed:
            chosen = object.__new__(TimmImages)
            chosen.__dict__ |= self.__dict__ | {'split': self.split.subset(indices)}
            return chosen
        wanted = set(indices.tolist())
        kept = {i: sample for i, sample in enumerate(self.samples) if i in wanted}
        images, labels = self._good([kept[i] for i in indices.tolist() if i in kept])
        return Split(images, labels, self.class_names)

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        assert self.split.indices is not None, 'a stream is read by select'
        return self._good([self.samples[0, int(i)] for i in self.split.indices[part]])

    def _good(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        images, labels, errors = collate(samples)
        broken = [error for error in errors if error]
        if broken and self.split.config.broken == 'stop':
            raise ValueError(f'{broken[0]}. Set data.broken=skip to skip such images.')
        self.broken += len(broken)
        return images[labels >= 0], labels[labels >= 0]


class IndexedImages(Dataset[Any]):
    """Images by (epoch, index), transformed with random numbers that depend only on these and the seed.

    Args:
        dataset: A data set of timm's that yields PIL images.
        transform: PIL image to uint8 array (C, H, W).
        seed: Seed of the transforms.
        replace_broken: Replace a broken image by the next one that can be read; otherwise it is black, with label -1.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], np.ndarray], seed: int, replace_broken: bool):
        self.dataset, self.transform, self.seed, self.replace_broken = dataset, transform, seed, replace_broken
        dataset._max_retries = 1  # timm would replace a broken image without telling the caller
        self.mode = getattr(dataset, 'input_img_mode', None) or ''
        self.in_folder = isinstance(getattr(dataset, 'reader', None), ReaderImageFolder)
        dataset.input_img_mode = ''  # timm's conversion would clip 16-bit greyscale

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        broken = ''
        for step in range(CONSECUTIVE_BROKEN):
            try:
                image, label = self._read((index + step) % len(self.dataset))
                image = to_mode(image, self.mode)
            except BROKEN as error:  # timm's ImageDataset; torchvision's
                broken = broken or f'Image {self._filename(index)} cannot be read ({error})'
                if self.replace_broken:
                    continue
                from PIL import Image

                image, label = Image.new('RGB', (8, 8)), -1
            with drawn_from(self.seed, epoch, index):
                return self.transform(image), label, broken
        raise ValueError(f'{broken}, nor can the {CONSECUTIVE_BROKEN - 1} images after it.')

    def _read(self, index: int) -> tuple[Any, int]:
        if self.in_folder and not Path(self.dataset.filename(index, absolute=True)).is_file():
            raise OSError('not a regular file')  # a pipe would block for ever
        return self.dataset[index]

    def _filename(self, index: int) -> str:
        return str(self.dataset.filename(index)) if hasattr(self.dataset, 'filename') else str(index)


class StreamedImages(IterableDataset[Any]):
    """The images of a stream, transformed with random numbers that depend only on seed, epoch, worker and count."""

    def __init__(self, dataset: Any, transform: Callable[[Any], np.ndarray], key: tuple[int, int]):
        self.dataset, self.transform, self.key = dataset, transform, key

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        for count, (image, label) in enumerate(self.dataset):
            with drawn_from(*self.key, worker.id if worker else 0, count):
                yield self.transform(image), label, ''


def make_transform(model_cfg: dict[str, Any], augment: AugmentConfig | None) -> Callable[[Any], np.ndarray]:
    """timm's transform from a PIL image to a uint8 array (C, H, W); with ``augment``, the random one for training."""
    size = {name: model_cfg[name] for name in ('input_size', 'interpolation')}
    low, high = (augment or AugmentConfig()).scale
    if augment is None:
        crop = {name: model_cfg[name] for name in ('crop_pct', 'crop_mode')}
        return create_transform(**size, **crop, use_prefetcher=True)
    return create_transform(
        **size,
        is_training=True,
        scale=(low, high),
        ratio=None if low < 1 else (1.0, 1.0),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment or None,
        use_prefetcher=True,
    )


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels, errors = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels), list(errors)


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's random numbers by a key, and restore their states afterwards."""
    seed = int(np.random.SeedSequence([part % 2**32 for part in key]).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the CPU's only
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
