"""What to train and test on, and what is drawn at random for each training image."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ['AugmentConfig', 'DataConfig']


@dataclass
class DataConfig:
    """What to train and test on.

    Args:
        name: 'mnist' and 'cifar10': torchvision's files under ``root``; 'digits': scikit-learn's bundled 8x8 digits, as
            28x28 images; 'image_folder': ``train/<class>/*`` and ``test/<class>/*`` under a folder or in a .tar file.
            These live on the device as a whole. 'timm': whatever ``timm.data.create_dataset`` opens, read by workers,
            for sets of any size.
        root: Folder or .tar file; 'digits' needs none.
        label: How the data is named in results. Empty: the dataset's own name.
        download: Let torchvision download missing files.
        val_fraction: Share of the training set held out for validation, the same number of images of each class
            ('timm': of all together).
        split_seed: Seed of the held-out choice, apart from the training seed: all seeds share one split.
        broken: An image that does not decode is counted and passed over ('skip'), or ends the run ('stop').
        dataset: 'timm' only, timm's name of the dataset: empty for a folder or tar, 'hfds/NAME' and 'hfids/NAME' (the
            Hugging Face Hub, the latter streamed), 'wds/NAME' (WebDataset shards in ``root``), 'torch/NAME', ...
        options: 'timm' only, more arguments of ``create_dataset``: ``{input_key: img}``, ``{num_samples: 1000}``, ...
        train_split: 'timm' only, name of the training split.
        test_split: 'timm' only, name of the split that is tested on.
        val_split: 'timm' only. Empty: ``val_fraction`` of the training split.
        image_size: 'timm' only, height and width that images are resized to; 0: what the model's cfg says.
        workers: 'timm' only, processes that read and augment; of files, no more than there are CPU cores.
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
    """What is drawn at random for each training image; by default nothing.

    Args:
        hflip: Probability of a horizontal flip.
        padding: Crop at random from the image with so many black pixels on each side; sets on the device only.
        scale: Crop at random a share of the area in this range, and resize it; 'timm' data only.
        color_jitter: Strength; 'timm' data only.
        auto_augment: timm's policy, e.g. 'rand-m7-mstd0.5-inc1'; 'timm' data only.
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
