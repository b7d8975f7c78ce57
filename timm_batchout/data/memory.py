"""Data sets small enough to be held on the device as uint8 tensors, and the loader that draws batches from them."""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from timm_batchout.data.config import AugmentConfig, DataConfig
from timm_batchout.data.decode import is_class, to_mode
from timm_batchout.data.images import Images, Split, laid_out
from timm_batchout.data.tars import content, whole_tar
from timm_batchout.data.timm_splits import TimmSplit, input_cfg, load_timm_splits, load_timm_test_split
from timm_batchout.data.workers import TimmImages

__all__ = ['TensorLoader', 'data_label', 'load_data', 'load_split', 'load_test_set']

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


def load_data(config: DataConfig) -> tuple[Split, Split, Split] | tuple[TimmSplit, TimmSplit, TimmSplit]:
    """Training, validation and test split. Validation is held out of the training set, stratified by class.

    Raises:
        ValueError: The data is missing or not in the expected layout.
    """
    if config.name == 'timm':
        return load_timm_splits(config)
    whole = load_split(config, train=True)
    generator = torch.Generator().manual_seed(config.split_seed)
    held_out = torch.zeros(len(whole), dtype=torch.bool)
    for label in whole.labels.unique():
        members = (whole.labels == label).nonzero()[:, 0]
        count = round(config.val_fraction * len(members))
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    train, val = (whole.select(chosen.nonzero()[:, 0]) for chosen in (~held_out, held_out))
    if len(val) == 0 or len(train) == 0:
        none, change = ('no image', 'Raise') if len(val) == 0 else ('every image', 'Lower')
        raise ValueError(f'data.val_fraction={config.val_fraction} holds out {none}. {change} it.')
    return train, val, load_split(config, train=False)


def load_split(config: DataConfig, train: bool) -> Split:
    """The training or the test set, whole and in its original order.

    Raises:
        ValueError: The data is missing or not in the expected layout, or is not held in memory ('timm').
    """
    if config.name == 'timm':
        raise ValueError("data.name='timm' is not held in memory. Use load_test_set.")
    loaders = {'mnist': _torchvision, 'cifar10': _torchvision, 'digits': _digits, 'image_folder': _image_folder}
    return loaders[config.name](config, train)


def load_test_set(config: DataConfig, model: nn.Module) -> Images:
    """The test set, for evaluation.

    Args:
        config: The data; 'timm' data is resized and cropped as in training this model.
        model: See ``input_cfg``.

    Raises:
        ValueError: The data is missing or not in the expected layout.
    """
    if config.name != 'timm':
        return load_split(config, train=False)
    return TimmImages(load_timm_test_split(config), input_cfg(model, config))


def data_label(config: DataConfig) -> str:
    """The data's name for results and cards."""
    names = {'mnist': 'MNIST', 'cifar10': 'CIFAR-10', 'digits': 'scikit-learn digits (28x28)'}
    return config.label or names.get(config.name) or Path(config.root).name


def _torchvision(config: DataConfig, train: bool) -> Split:
    from torchvision import datasets

    cls = {'mnist': datasets.MNIST, 'cifar10': datasets.CIFAR10}[config.name]
    try:
        dataset = cls(config.root, train=train, download=config.download)
    except RuntimeError as error:
        raise ValueError(
            f'{config.name} not found in {config.root!r} (data.root). Set data.root to the folder that contains it, '
            'or data.download=true to download it.'
        ) from error
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    names = tuple(name.partition(' - ')[0] for name in dataset.classes)  # MNIST's: '0 - zero'
    return Split(images.contiguous(), torch.as_tensor(dataset.targets), names)


def _digits(config: DataConfig, train: bool) -> Split:
    """The 1,797 handwritten 8x8 digits that come with scikit-learn, as 28x28 images; every fifth is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data.name='digits' needs scikit-learn. In a checkout: pip install -e .[train]") from error

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(28, 28), mode='bilinear', align_corners=False)
    is_test = torch.arange(len(images)) % 5 == 0
    keep = ~is_test if train else is_test
    labels = torch.from_numpy(digits.target).long()
    return Split((images * 255).round().to(torch.uint8)[keep], labels[keep], tuple(map(str, digits.target_names)))


def _image_folder(config: DataConfig, train: bool) -> Split:
    """``train/<class>/*`` or ``test/<class>/*`` of a folder or tar file; classes in alphabetical order."""
    from PIL import Image

    part = 'train' if train else 'test'
    images, classes, broken = [], [], []
    names = {'train': set[str](), 'test': set[str]()}
    for file in _files(Path(config.root)):
        names[file.part].add(file.label)
        if file.part != part or not file.name:
            continue
        try:
            with Image.open(file.open()) as image:
                images.append(np.asarray(to_mode(image, 'RGB')))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if config.broken == 'stop':
                raise ValueError(
                    f'{file.name} does not decode ({error}). Set data.broken=skip to skip such images.'
                ) from error
            broken.append(file.name)
            continue
        classes.append(file.label)
    if not images:
        raise ValueError(f'No images in {config.root!r} (data.root). Expected {part}/<class>/<image>.')
    if broken:
        warnings.warn(f'Skipping {len(broken)} images that do not decode: {broken[0]}, ...', stacklevel=2)
    empty = sorted((names['train'] | names['test']) - set(classes))
    if empty:
        raise ValueError(f'Classes of {config.root!r} without an image in {part!r}: {", ".join(empty[:5])}.')
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"The images in {config.root!r} differ in size. Use data.name='timm', which resizes them.")
    index = {name: i for i, name in enumerate(sorted(set(classes)))}
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(tensor, torch.tensor([index[name] for name in classes]), tuple(index))


@dataclass
class _File:
    """An image file of a class; without a name, only the class.

    Attributes:
        content: A path, the bytes of a member of a tar, or the reason why it cannot be read.
    """

    part: str
    label: str
    name: str = ''
    content: Path | bytes | str = ''

    def open(self) -> BinaryIO:
        if isinstance(self.content, str):
            raise OSError(self.content)
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        if not self.content.is_file():  # a pipe would block forever
            raise OSError('not a regular file')
        return self.content.open('rb')


def _files(root: Path) -> Iterator[_File]:
    """All images, in sorted order, and all classes."""
    if root.is_dir():
        for part in ('test', 'train'):
            for folder in sorted(path for path in (root / part).glob('*') if path.is_dir() and is_class(path.name)):
                yield _File(part, folder.name)
                for path in sorted(folder.glob('*')):
                    if _is_image(path):
                        yield _File(part, folder.name, str(path), path)
    elif root.is_file():
        found = []
        with whole_tar(root) as tar:
            for member in tar:  # one sequential read: seeking in a compressed tar starts it over
                path = Path(member.name)
                part, label = path.parent.parent.name, path.parent.name
                if _is_image(path) and part in ('train', 'test') and is_class(label):
                    found.append(_File(part, label, member.name, content(tar, member)))
        yield from sorted(found, key=lambda file: file.name)
    else:
        raise ValueError(f'{str(root)!r} (data.root) is neither a folder nor a tar file.')


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')


class TensorLoader:
    """Batches of float images in [0, 1] from a split that stays on the device: no workers, no copy per step.

    Training batches come in an order that depends only on seed and epoch, without the last incomplete one. Evaluation
    batches come in the order of the split, all of them.

    Args:
        split: The images.
        batch_size: Images per batch.
        device: Device that holds them.
        channels_last: Memory format of the batches.
        shuffle: Training mode.
        seed: Seed of the order and the augmentation.
        rank, world_size: This process takes every world_size-th image of the common order, starting at the rank-th.
        augment: Training mode: random augmentation (``hflip`` and ``padding``).

    Attributes:
        epoch: The epoch whose order the next iteration takes; set it before each.
        start: The first batch of the next iteration; above 0 if a run is resumed within an epoch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device | str = 'cpu',
        channels_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        augment: AugmentConfig | None = None,
    ):
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.channels_last = channels_last
        self.shuffle = shuffle
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.augment = augment if shuffle else None
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        if self.shuffle:
            return len(self.labels) // (self.batch_size * self.world_size)  # the same on every rank
        return -(-len(range(self.rank, len(self.labels), self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.labels))
        if self.shuffle:
            # Not the global generator: the order must not depend on what was drawn before.
            order = torch.randperm(
                len(order), generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            )
        order = order[self.rank :: self.world_size].to(self.labels.device)
        for i in range(self.start, len(self)):
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            images = self.images[batch]
            if self.augment:
                images = self._augmented(images, self.augment, i)
            images = images.float().div_(255)
            yield laid_out(images, self.channels_last), self.labels[batch]

    def _augmented(self, images: Tensor, augment: AugmentConfig, step: int) -> Tensor:
        """Crops and flips that depend only on seed, epoch, step and rank."""
        key = [self.seed, self.epoch, step, self.rank]
        generator = np.random.default_rng(key)
        count, _, height, width = images.shape
        pad = augment.padding
        top, left = torch.from_numpy(generator.integers(0, 2 * pad + 1, (2, count))).to(images.device)
        flip = torch.from_numpy(generator.random(count) < augment.hflip).to(images.device)
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        columns = left[:, None] + torch.where(flip[:, None], columns.flip(0), columns)
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        image = torch.arange(count, device=images.device)[:, None, None]
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
