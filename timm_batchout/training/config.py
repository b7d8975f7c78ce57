"""A training run as a tree of dataclasses, which is both the YAML recipe and the command line flags.

Numbers may be written as fractions: ``epsilon: 8/255``.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal

import yaml

from timm_batchout.data.config import AugmentConfig, DataConfig

__all__ = [
    'METRICS',
    'CheckpointConfig',
    'ObjectiveConfig',
    'OptimizerConfig',
    'RobustValConfig',
    'ScheduleConfig',
    'TrainConfig',
]

METRICS = 'metrics.jsonl'  # in a run folder: a record for each epoch


@dataclass
class OptimizerConfig:
    """One of timm's optimizers (``timm.optim.list_optimizers()``); biases and norms get no weight decay.

    Args:
        name: 'adamw', 'sgd' (Nesterov momentum), ...
        lr: Peak learning rate.
        scale_lr: Multiply lr by the number of processes (linear scaling with the total batch size).
        weight_decay: Weight decay as the optimizer defines it (AdamW: decoupled).
        momentum: Momentum of SGD.
    """

    name: str = 'adamw'
    lr: float = 1e-3
    scale_lr: bool = False
    weight_decay: float = 0.05
    momentum: float = 0.9


@dataclass
class ScheduleConfig:
    """Linear warm-up, then decay, updated every step.

    Args:
        name: A schedule of timm's: 'cosine', 'tanh', 'poly' (linear, with decay_rate 1), or 'step'.
        warmup_epochs: Length of the warm-up; may be a fraction.
        min_lr: Final learning rate, as a share of the peak ('step': no effect).
        decay_epochs: 'step': epochs between two drops.
        decay_rate: 'step': factor of a drop; 'poly': power.
        eta_warmup_epochs: BatchOut's eta grows linearly from 0 over this many epochs.
    """

    name: Literal['cosine', 'tanh', 'poly', 'step'] = 'cosine'
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    decay_epochs: float = 30.0
    decay_rate: float = 0.1
    eta_warmup_epochs: float = 0.0


@dataclass
class ObjectiveConfig:
    """The loss of a batch: cross-entropy, or a form of adversarial training.

    Args:
        name: 'plain': cross-entropy. 'fgsm': as in the paper (section 6.2), the first half of each mini-batch is
            replaced by FGSM images. 'pgd': the whole mini-batch is replaced by PGD images (Madry et al., 2018).
            'fgsm_rs': by images of one step from a random start (Wong et al., 2020). 'n_fgsm': by images of one step
            from stronger noise (de Jorge et al., 2022). 'trades': cross-entropy of the clean images plus ``beta``
            times the divergence of the adversarial predictions (Zhang et al., 2019).
        epsilon: Radius of the adversarial images, in [0, 1] pixels.
        norm: Norm of the radius; 'L2' for 'pgd' and 'trades' only.
        steps: Gradient steps of 'pgd' and 'trades'.
        step_size: Step size in [0, 1] pixels; 0: 2.5 * epsilon / steps ('fgsm_rs': 1.25 * epsilon, 'n_fgsm':
            epsilon).
        epsilon_warmup: Share of all training steps over which epsilon grows linearly from 0.
        beta: Weight of the divergence in 'trades'.
        attack_mode: Mode of the net during the attack, 'eval' or 'train'.
        attack_batchout: With attack_mode 'train', keep BatchOut on during the attack.
        batchout: The passes of 'trades' that BatchOut augments: 'both', 'clean' or 'adversarial'.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
    """

    name: Literal['plain', 'fgsm', 'fgsm_rs', 'n_fgsm', 'pgd', 'trades'] = 'plain'
    epsilon: float = 0.0
    norm: Literal['Linf', 'L2'] = 'Linf'
    steps: int = 10
    step_size: float = 0.0
    epsilon_warmup: float = 0.0
    beta: float = 6.0
    attack_mode: Literal['eval', 'train'] = 'eval'
    attack_batchout: bool = False
    batchout: Literal['both', 'clean', 'adversarial'] = 'both'
    label_smoothing: float = 0.0

    @property
    def relative_step(self) -> float:
        """Step size as a share of epsilon."""
        if self.step_size:
            return self.step_size / self.epsilon
        return {'fgsm_rs': 1.25, 'n_fgsm': 1.0}.get(self.name, 2.5 / self.steps)


@dataclass
class RobustValConfig:
    """Robust validation accuracy during adversarial training: PGD on a fixed part of the held-out images.

    Args:
        images: Number of held-out images, the first ones; 0: none, and the best weights follow clean accuracy.
        steps: Gradient steps of PGD.
        epsilon: Radius in [0, 1] pixels; 0: that of the objective.
        patience: Stop after this many epochs without a higher robust accuracy; 0: train all epochs.
    """

    images: int = 500
    steps: int = 10
    epsilon: float = 0.0
    patience: int = 0


@dataclass
class CheckpointConfig:
    """Checkpoints for ``--resume``.

    Args:
        steps: Also save every N optimizer steps within an epoch; 0: only at the end of each epoch.
        keep: Number of checkpoints to keep, the newest ones.
    """

    steps: int = 0
    keep: int = 2


@dataclass
class TrainConfig:
    """One training run.

    Args:
        model: Model name, of timm or of this package.
        model_args: Keyword arguments for ``timm.create_model``, e.g. ``{k: 0.3}`` or ``{noise: gaussian}``.
        output: Run folder; must not contain another run unless ``resume`` is set.
        epochs: Passes over the training set.
        batch_size: Images per forward and process. The last, incomplete batch of an epoch is dropped.
        accumulate: Forwards per optimizer step. BatchOut draws its partners within each forward.
        clip_grad: Clip the gradient to this L2 norm; 0: no clipping.
        ema_decay: Evaluate and save an exponential moving average of the weights; 0: the weights themselves.
        eval_epochs: Validate every N epochs, and after the last.
        eval_batch_size: Images per evaluation step.
        seed: Seed of the weights, the order of the data, dropout and BatchOut.
        precision: 'no' (float32), 'bf16' or 'fp16' autocast.
        channels_last: Use the channels_last memory format; faster for convolutions on most hardware.
        compile: Backend of torch.compile, e.g. 'inductor'. Empty: eager.
        non_finite: On a NaN or infinite loss, 'stop' the run or 'skip' the step.
        checkpoint: Checkpoints to resume from.
        quiet: Print nothing but errors.
        trackers: Accelerate's trackers to log to, by name: tensorboard, trackio, wandb, ...
        resume: Continue from the newest intact checkpoint in ``output``. 'auto': or start a new run.
        allow_changes: Resume even if the recipe differs from the checkpoint's.
        dry_run: Print the resolved recipe, parameters, BatchOut sites and estimated memory, and train nothing.
    """

    model: str = 'batchout_mnist_cnn'
    model_args: dict[str, Any] = field(default_factory=dict)
    output: str = ''
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    robust_val: RobustValConfig = field(default_factory=RobustValConfig)
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    clip_grad: float = 0.0
    ema_decay: float = 0.0
    eval_epochs: int = 1
    eval_batch_size: int = 500
    seed: int = 0
    precision: Literal['no', 'bf16', 'fp16'] = 'no'
    channels_last: bool = True
    compile: str = ''
    non_finite: Literal['stop', 'skip'] = 'stop'
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    quiet: bool = False
    trackers: list[str] = field(default_factory=list)
    resume: bool | Literal['auto'] = False
    allow_changes: bool = False
    dry_run: bool = False

    # Fields about how a run is launched. Runs that differ only in these are the same run.
    LAUNCH: ClassVar[tuple[str, ...]] = (
        'output', 'resume', 'allow_changes', 'dry_run', 'quiet', 'trackers', 'data.root', 'data.download',
        'data.workers',
    )  # fmt: skip

    def validate(self) -> None:
        """Raise ValueError on a value out of range, before any work starts."""
        for name, value in _floats(self):
            if not math.isfinite(value):
                raise ValueError(f'{name} must be a finite number, got {value}.')
        at_least = (
            ('epochs', self.epochs, 1), ('batch_size', self.batch_size, 2), ('accumulate', self.accumulate, 1),
            ('eval_batch_size', self.eval_batch_size, 1), ('eval_epochs', self.eval_epochs, 1),
            ('clip_grad', self.clip_grad, 0), ('checkpoint.steps', self.checkpoint.steps, 0),
            ('checkpoint.keep', self.checkpoint.keep, 1),
            ('schedule.eta_warmup_epochs', self.schedule.eta_warmup_epochs, 0), ('data.workers', self.data.workers, 0),
            ('data.image_size', self.data.image_size, 0),
            ('augment.padding', self.augment.padding, 0), ('augment.color_jitter', self.augment.color_jitter, 0),
            ('augment.mixup', self.augment.mixup, 0), ('augment.cutmix', self.augment.cutmix, 0),
            ('objective.steps', self.objective.steps, 1), ('objective.step_size', self.objective.step_size, 0),
            ('objective.beta', self.objective.beta, 0), ('robust_val.images', self.robust_val.images, 0),
            ('robust_val.steps', self.robust_val.steps, 1), ('robust_val.epsilon', self.robust_val.epsilon, 0),
            ('robust_val.patience', self.robust_val.patience, 0),
        )  # fmt: skip
        for name, value, low in at_least:
            if value < low:
                raise ValueError(f'{name} must be at least {low}, got {value}.')
        below_one = (('ema_decay', self.ema_decay), ('objective.label_smoothing', self.objective.label_smoothing))
        for name, share in below_one:
            if not 0 <= share < 1:
                raise ValueError(f'{name} must lie in [0, 1), got {share}.')
        self._validate_augment()
        if self.compile:
            _check_backend(self.compile)
        if not self.output and not self.dry_run:
            raise ValueError('output is empty. Name a folder for the run, e.g. --output runs/first.')
        if not 0 < self.data.val_fraction < 1:
            raise ValueError(f'data.val_fraction must lie between 0 and 1, got {self.data.val_fraction}.')
        if self.optimizer.lr <= 0:
            raise ValueError(f'optimizer.lr must be positive, got {self.optimizer.lr}.')
        if not 0 <= self.schedule.warmup_epochs <= self.epochs:
            raise ValueError(
                f'schedule.warmup_epochs must lie in [0, epochs={self.epochs}], got {self.schedule.warmup_epochs}.'
            )
        if not 0 <= self.schedule.min_lr <= 1:
            raise ValueError(f'schedule.min_lr is a share of the peak, in [0, 1], got {self.schedule.min_lr}.')
        if self.schedule.decay_epochs <= 0 or self.schedule.decay_rate <= 0:
            raise ValueError(
                'schedule.decay_epochs and decay_rate must be positive, got '
                f'{self.schedule.decay_epochs} and {self.schedule.decay_rate}.'
            )
        self._validate_objective()

    def _validate_objective(self) -> None:
        objective, robust_val = self.objective, self.robust_val
        if not 0 <= objective.epsilon_warmup <= 1:
            raise ValueError(f'objective.epsilon_warmup is a share in [0, 1], got {objective.epsilon_warmup}.')
        if objective.name == 'plain':
            return
        if objective.epsilon <= 0 or (objective.norm == 'Linf' and objective.epsilon > 1):
            raise ValueError(
                f'objective.epsilon must be positive for {objective.name}, and at most 1 as an Linf radius (pixels are '
                f'in [0, 1]: divide 8-bit values by 255), got {objective.epsilon}.'
            )
        if objective.norm == 'Linf' and robust_val.epsilon > 1:
            raise ValueError(f'robust_val.epsilon is in [0, 1] pixels, got {robust_val.epsilon}.')
        if objective.norm == 'L2' and objective.name not in ('pgd', 'trades'):
            raise ValueError(
                f"objective.norm L2 needs objective 'pgd' or 'trades', got {objective.name!r}. Set norm to Linf."
            )

    def _validate_augment(self) -> None:
        augment, off = self.augment, AugmentConfig()
        if not 0 <= augment.hflip <= 1:
            raise ValueError(f'augment.hflip is a probability in [0, 1], got {augment.hflip}.')
        if len(augment.scale) != 2 or not 0 < augment.scale[0] <= augment.scale[1] <= 1:
            raise ValueError(f'augment.scale must be [low, high] with 0 < low <= high <= 1, got {augment.scale}.')
        foreign = ('padding',) if self.data.name == 'timm' else ('scale', 'color_jitter', 'auto_augment')
        for name in foreign:
            if getattr(augment, name) != getattr(off, name):
                raise ValueError(f'augment.{name} does not apply to data.name={self.data.name!r}. Leave it out.')
        if augment.mixup or augment.cutmix:
            if self.objective.name != 'plain':
                raise ValueError(f'Mixup and CutMix mix labels; objective {self.objective.name!r} needs one per image.')
            if self.batch_size % 2:
                raise ValueError(f'Mixup and CutMix need an even batch_size, got {self.batch_size}.')

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)

    def recipe(self) -> dict[str, Any]:
        """For result files: everything that decides the result."""
        return {name: value for name, value in asdict(self).items() if name not in self.LAUNCH}


def _check_backend(name: str) -> None:
    import torch  # here, because the command line reads recipes without it

    if name not in torch.compiler.list_backends(exclude_tags=()):
        names = ', '.join(torch.compiler.list_backends())
        raise ValueError(f'compile must name a torch.compile backend ({names}, ...), got {name!r}.')


def _floats(config: Any, prefix: str = '') -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number in a config."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float):
                yield prefix + name, number
        if is_dataclass(value):
            yield from _floats(value, f'{prefix}{name}.')
