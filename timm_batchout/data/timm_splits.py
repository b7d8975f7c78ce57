"""Splits of the data sets that timm.data opens: folders, tars, Hugging Face data sets, WebDataset shards."""

from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from timm_batchout.data.config import DataConfig
from timm_batchout.data.decode import is_class
from timm_batchout.data.tars import whole_tar
from timm_batchout.pixels import normalization

__all__ = ['TimmSplit', 'input_cfg', 'load_timm_splits', 'load_timm_test_split']


class TimmSplit:
    """One split of a data set that ``timm.data.create_dataset`` opens. Images are read only when they are needed.

    Args:
        config: The data set.
        split: Name of the split.
        training: Streamed sets are shuffled, and cut into equal shares.
        class_to_idx: Labels by class name, if another split has fixed them; folders only.

    Attributes:
        streamed: It can only be read in order (WebDataset, streamed Hugging Face data sets).
        indices: Numbers of its images, (N,) int64; None if streamed.
        classes: Number of classes that the data set names; 0: unknown.

    Raises:
        ValueError: The data set, split or images are missing; a class folder is empty, or unknown to the training
            split.
    """

    def __init__(
        self, config: DataConfig, split: str, training: bool = False, class_to_idx: dict[str, int] | None = None
    ):
        self.config, self.split, self.training = config, split, training
        self.class_to_idx = class_to_idx
        self._check_tar()
        self.dataset = self.open()
        self.streamed = isinstance(self.dataset, IterableDataset)
        self.total = len(self.dataset)
        self.indices = None if self.streamed else torch.arange(self.total)
        found = getattr(getattr(self.dataset, 'reader', self.dataset), 'class_to_idx', None) or {}
        self.classes = len(class_to_idx or found)
        if self.class_to_idx is None:
            self.class_to_idx = found
        if training and not self.total:
            raise ValueError(f'No images in split {split!r} of {self._name}. Streamed sets need options.num_samples.')

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class number; empty if the data set has none."""
        reader = getattr(self.dataset, 'reader', None)
        features = getattr(getattr(reader, 'dataset', None), 'features', None) or {}
        names = getattr(features.get(getattr(reader, 'label_key', '')), 'names', None)
        return tuple(names or sorted(self.class_to_idx or (), key=(self.class_to_idx or {}).__getitem__))

    @property
    def _name(self) -> str:
        return repr(self.config.dataset or self.config.root)

    def __len__(self) -> int:
        return self.total if self.indices is None else len(self.indices)

    def subset(self, indices: Tensor) -> 'TimmSplit':
        part = object.__new__(TimmSplit)
        part.__dict__ |= self.__dict__ | {'indices': self.indices[indices]}  # type: ignore[index]
        return part

    def check_labelled(self) -> None:
        """Test splits of public sets often have no labels (-1): look at the first image before any training."""
        try:
            _, label = next(iter(self.dataset)) if self.streamed else self.dataset[0]
        except (RuntimeError, OSError, StopIteration):  # images that do not decode are handled where they are read
            return
        if label is None or int(label) < 0:
            raise ValueError(
                f'Split {self.split!r} of {self._name} has no labels (the first is {label}). Choose another one '
                '(data.val_split, data.test_split).'
            )

    def open(self, seed: int = 0, batch_size: int = 1, image_mode: str = 'RGB') -> Any:
        """The data set, which yields PIL images and labels."""
        config = self.config
        options: dict[str, Any] = {'download': config.download, **config.options}
        root, folder = config.root or None, None
        if config.dataset in ('', 'folder'):
            folder = self._folder()
            root, options['search_split'] = str(folder), False
            if self.class_to_idx:
                options['class_map'] = self.class_to_idx
        try:
            dataset: Any = create_dataset(
                config.dataset,
                root=root,
                split=self.split,
                is_training=self.training,
                seed=seed,
                batch_size=batch_size,
                input_img_mode=image_mode,
                **options,
            )
        except (OSError, RuntimeError, ValueError, AssertionError, KeyError, ImportError) as error:
            raise ValueError(
                f'timm.data cannot open split {self.split!r} of {self._name} (data.dataset, data.root): {error}'
            ) from error
        if folder and folder.is_dir():
            self._check_classes(folder, dataset.reader)
        return dataset

    def _check_tar(self) -> None:
        """Check a tar file: timm takes a truncated or damaged one for a complete one."""
        if self.config.dataset in ('', 'folder') and (path := self._folder()).is_file():
            with whole_tar(path) as tar:
                for _ in tar:
                    pass

    def _check_classes(self, folder: Path, reader: Any) -> None:
        """Check class folders: timm skips those that are empty or unknown to the training split."""
        present = {label for _, label in reader.samples}
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_class(path.name))
        unknown = [name for name in classes if self.class_to_idx and name not in self.class_to_idx]
        if unknown:
            raise ValueError(f'{str(folder)!r} has classes that the training split lacks: {", ".join(unknown[:5])}.')
        empty = [name for name in classes if reader.class_to_idx.get(name) not in present]
        if empty:
            raise ValueError(f'Class folders without an image in {str(folder)!r}: {", ".join(empty[:5])}.')

    def _folder(self) -> Path:
        for path in (Path(self.config.root, self.split), Path(self.config.root, f'{self.split}.tar')):
            if path.exists():
                return path
        raise ValueError(
            f'Neither {self.split!r} (a folder of class folders) nor {self.split + ".tar"!r} exists in '
            f'{self.config.root!r} (data.root). Set data.train_split, val_split and test_split.'
        )


def load_timm_splits(config: DataConfig) -> tuple[TimmSplit, TimmSplit, TimmSplit]:
    """Training, validation and test split; validation is held out of the training split unless it has its own."""
    train = TimmSplit(config, config.train_split, training=True)
    test = _labelled(config, config.test_split, train)
    if config.val_split:
        return train, _labelled(config, config.val_split, train), test
    if train.streamed:
        raise ValueError('Images of a streamed training set cannot be held out. Set data.val_split.')
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.split_seed))
    count = round(config.val_fraction * len(train))
    if not count:
        raise ValueError(f'data.val_fraction={config.val_fraction} holds out no image. Raise it.')
    return train.subset(order[count:].sort().values), train.subset(order[:count].sort().values), test


def load_timm_test_split(config: DataConfig) -> TimmSplit:
    """The test split. If it is a folder with a training split beside it, that split numbers the classes."""
    try:
        train = TimmSplit(config, config.train_split)
    except ValueError:  # data without a training split
        return _labelled(config, config.test_split)
    return _labelled(config, config.test_split, train)


def _labelled(config: DataConfig, split: str, train: TimmSplit | None = None) -> TimmSplit:
    found = TimmSplit(config, split, class_to_idx=train.class_to_idx if train else None)
    found.check_labelled()
    return found


def input_cfg(model: nn.Module, config: DataConfig) -> dict[str, Any]:
    """The model's input (``timm.data.resolve_model_data_config``), at ``data.image_size`` if that is set.

    Mean and std come from ``normalization``: timm would assume ImageNet's for a net that states none.
    """
    cfg = resolve_model_data_config(model)
    cfg['mean'], cfg['std'] = normalization(model)
    if config.image_size:
        cfg['input_size'] = (cfg['input_size'][0], config.image_size, config.image_size)
    return cfg
