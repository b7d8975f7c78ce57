"""The data to train and test on, and the random augmentation of training images."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ['AugmentConfig', 'DataConfig']


@dataclass
class DataConfig:
    """The data to train and test on.

    Args:
        name: 'mnist' and 'cifar10': torchvision's files under ``root``; 'digits': scikit-learn's bundled 8x8 digits, as
            28x28 images; 'image_folder': ``train/<class>/*`` and ``test/<class>/*`` under a folder or in a .tar file.
            These are held on the device. 'timm': any data set that ``timm.data.create_dataset`` opens, of any size,
            read by worker processes.
        root: Folder or .tar file; 'digits' needs none.
        label: Name of the data in results. Empty: the data set's own name.
        download: Let torchvision download missing files.
        val_fraction: Share of the training set held out for validation, stratified by class ('timm': not stratified).
        split_seed: Seed of the held-out choice; separate from the training seed, so that all seeds share one split.
        broken: An image that does not decode is counted and skipped ('skip'), or ends the run ('stop').
        dataset: 'timm' only: timm's name of the data set: empty for a folder or tar, 'hfds/NAME' and 'hfids/NAME' (the
            Hugging Face Hub, the latter streamed), 'wds/NAME' (WebDataset shards in ``root``), 'torch/NAME', ...
        options: 'timm' only: further arguments of ``create_dataset``, e.g. ``{input_key: img}`` or
            ``{num_samples: 1000}``.
        train_split: 'timm' only: name of the training split.
        val_split: 'timm' only: name of the validation split. Empty: ``val_fraction`` of the training split.
        test_split: 'timm' only: name of the test split.
        image_size: 'timm' only: height and width of the resized images; 0: those of the model's cfg.
        workers: 'timm' only: processes that read and augment; for files, at most the number of CPU cores.
    """

    name: Literal['mnist', 'cifar10', 'digits', 'image_folder', 'timm'] = 'mnist'
    root: str = 'data'
    label: str = ''
    download: bool = False
    val_fraction: float = 0.1
    split_seed: int = 0
    broken: Literal['skip', 'stop'] = 'skip'
    dataset: str = ''
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = 'train'
    val_split: str = ''
    test_split: str = 'validation'
    image_size: int = 0
    workers: int = 4


@dataclass
class AugmentConfig:
    """Random augmentation of training images; off by default.

    Args:
        hflip: Probability of a horizontal flip.
        padding: Random crops from the image with this many black pixels added on each side; not with 'timm' data.
        scale: Random crops of a share of the area in this range, resized; 'timm' data only.
        color_jitter: Strength of the colour jitter; 'timm' data only.
        auto_augment: A policy of timm's, e.g. 'rand-m7-mstd0.5-inc1'; 'timm' data only.
        mixup: Alpha of Mixup (``timm.data.Mixup``).
        cutmix: Alpha of CutMix; with ``mixup``, each batch gets one of the two.
    """

    hflip: float = 0.0
    padding: int = 0
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    color_jitter: float = 0.0
    auto_augment: str = ''
    mixup: float = 0.0
    cutmix: float = 0.0
