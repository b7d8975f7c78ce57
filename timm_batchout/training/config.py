"""A training run as data: one tree of dataclasses is the YAML recipe and the command line flags alike."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

__all__ = ['DataConfig', 'ObjectiveConfig', 'OptimizerConfig', 'ScheduleConfig', 'TrainConfig']


@dataclass
class DataConfig:
    """What to train and test on.

    Args:
        name: 'mnist' and 'cifar10': torchvision's files under ``root``; 'digits': scikit-learn's bundled 8x8 digits, as
            28x28 images; 'image_folder': ``train/<class>/*`` and ``test/<class>/*`` under a folder or in a .tar file.
        root: Folder or .tar file; 'digits' needs none.
        label: How the data is named in results. Empty: the dataset's own name.
        download: Let torchvision download missing files.
        val_fraction: Share of the training set held out for validation, the same number of images of each class.
        split_seed: Seed of the held-out choice, apart from the training seed: all seeds share one split.
    """

    name: Literal['mnist', 'cifar10', 'digits', 'image_folder'] = 'mnist'
    root: str = 'data'
    label: str = ''
    download: bool = False
    val_fraction: float = 0.1
    split_seed: int = 0


@dataclass
class OptimizerConfig:
    """timm's optimizers by name (``timm.optim.list_optimizers()``); biases and norms get no weight decay.

    Args:
        name: 'adamw', 'sgd' (Nesterov momentum), ...
        lr: Peak learning rate.
        weight_decay: As the optimizer defines it (AdamW: decoupled).
        momentum: SGD's momentum.
    """

    name: str = 'adamw'
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9


@dataclass
class ScheduleConfig:
    """Linear warm-up, then cosine decay, updated every step.

    Args:
        warmup_epochs: May be a fraction.
        min_lr: Learning rate at the end, as a share of the peak.
    """

    warmup_epochs: float = 1.0
    min_lr: float = 0.0


@dataclass
class ObjectiveConfig:
    """How a batch becomes a loss.

    Args:
        name: 'plain': cross-entropy. 'fgsm': adversarial training as in the paper (section 6.2): the first half of
            each mini-batch is replaced by its FGSM images of the current net.
        epsilon: FGSM's L-infinity radius, in [0, 1] pixels.
    """

    name: Literal['plain', 'fgsm'] = 'plain'
    epsilon: float = 0.0


@dataclass
class TrainConfig:
    """One training run.

    Args:
        model: A timm model name, or one of this package's.
        model_args: Keyword arguments for ``timm.create_model``, e.g. ``{k: 0.3}`` or ``{noise: gaussian}``.
        output: Run folder; must not hold another run unless ``resume`` is set.
        epochs: Passes over the training set.
        batch_size: Images per step and process. The last, incomplete batch of an epoch is dropped.
        eval_batch_size: Images per evaluation step.
        seed: Of the weights, the order of the data, dropout and BatchOut.
        precision: 'no' (float32), 'bf16' or 'fp16' autocast.
        channels_last: Memory format of convolution nets; faster on CPUs and on GPUs with tensor cores.
        resume: Go on from the newest checkpoint in ``output``.
    """

    model: str = 'batchout_mnist_cnn'
    model_args: dict[str, Any] = field(default_factory=dict)
    output: str = ''
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    epochs: int = 10
    batch_size: int = 128
    eval_batch_size: int = 500
    seed: int = 0
    precision: Literal['no', 'bf16', 'fp16'] = 'no'
    channels_last: bool = True
    resume: bool = False

    def validate(self) -> None:
        """Raise ValueError on a value out of range, before any work starts."""
        for name, low in (('epochs', 1), ('batch_size', 2), ('eval_batch_size', 1)):
            if getattr(self, name) < low:
                raise ValueError(f'{name} must be at least {low}, got {getattr(self, name)}.')
        if not self.output:
            raise ValueError('output is empty: name a folder for the run, e.g. --output runs/first.')
        if not 0 < self.data.val_fraction < 1:
            raise ValueError(f'data.val_fraction must lie between 0 and 1, got {self.data.val_fraction}.')
        if self.optimizer.lr <= 0:
            raise ValueError(f'optimizer.lr must be positive, got {self.optimizer.lr}.')
        if not 0 <= self.schedule.warmup_epochs < self.epochs:
            raise ValueError(
                f'schedule.warmup_epochs must lie in [0, epochs={self.epochs}), got {self.schedule.warmup_epochs}.'
            )
        if self.objective.name == 'fgsm' and not 0 < self.objective.epsilon <= 1:
            raise ValueError(
                f'objective.epsilon is in [0, 1] pixels and must be positive for fgsm, got {self.objective.epsilon}.'
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)
