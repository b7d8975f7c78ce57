"""A training run on Accelerate, from its recipe to a run folder.

run/config.yaml          the resolved recipe
run/metrics.jsonl        one line per epoch
run/checkpoints/step_N   the state that --resume needs, after N forwards; the newest ones are kept
run/model.safetensors    the trained weights (their moving average, if ema_decay is set), keys as in the plain net
run/best.safetensors     the weights of the epoch with the highest validation accuracy
run/result.json          test accuracy, recipe, seed, versions, hardware, sha256 of the weights
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env, set_seed
from torch import Tensor, nn

import timm_batchout.zoo.register  # noqa: F401
from timm_batchout.data.images import Split, laid_out
from timm_batchout.data.memory import load_data
from timm_batchout.data.timm_splits import TimmSplit, input_cfg
from timm_batchout.inject import batchout_sites
from timm_batchout.pixels import PixelModel, seeded
from timm_batchout.recipe import configure
from timm_batchout.training.checkpoints import restore_checkpoint
from timm_batchout.training.config import TrainConfig
from timm_batchout.training.parts import make_trainer
from timm_batchout.training.run_folder import RunFolder, recipe_changes
from timm_batchout.training.stopping import Interrupted
from timm_batchout.zoo.timm_twins import check_model_name

__all__ = ['Interrupted', 'recipe_changes', 'train']


def train(recipe: TrainConfig | str | Path | Mapping[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    """Train a model from a recipe, as ``timm-batchout train`` does.

    ``train('recipe.yaml', model='batchout_resnet18', output='runs/a', optimizer={'lr': 1e-3})``

    Args:
        recipe: A YAML file, a mapping, or a config; None: the defaults.
        **overrides: Fields of ``TrainConfig``. A mapping for a nested config changes the keys it names and keeps the
            rest.

    Returns:
        The content of ``result.json``: metrics, recipe, seed, versions, hardware and the sha256 of the weights. A dry
        run returns the description that it prints.

    Raises:
        ValueError: An unknown key, a value out of range, missing data, images that the model does not accept, an
            output folder that contains another run, nothing to resume. Always before the first step.
        FloatingPointError: The loss became NaN or infinite, and ``non_finite`` is 'stop'.
        RuntimeError: A checkpoint could not be written; the previous one is intact.
        Interrupted: SIGTERM or SIGINT. The step was finished and saved.
    """
    if isinstance(recipe, TrainConfig):
        config = configure(TrainConfig, asdict(recipe), **overrides) if overrides else recipe
    else:
        config = configure(TrainConfig, recipe, **overrides)
    config.validate()
    check_model_name(config.model)
    accelerator = _accelerator(config)
    try:
        splits = load_data(config.data)
    except ValueError as error:
        if not config.dry_run:
            raise
        print(f'The data cannot be read, so the input size is that of the model: {error}')
        return _describe(*_create_model(config, 0, accelerator.is_main_process), None)
    say = accelerator.is_main_process and not config.quiet
    config, model = _create_model(config, splits[0].classes, say)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    _check_fit(config, model, splits[0])
    if config.batch_size * accelerator.num_processes > len(splits[0]):
        raise ValueError(f'batch_size={config.batch_size} is larger than the training set ({len(splits[0])} images).')
    if config.dry_run:
        return _describe(config, model, splits[0])
    trainer = make_trainer(config, model, splits, accelerator)
    with _claimed(trainer.folder, config, accelerator) as checkpoint:
        if checkpoint:
            restore_checkpoint(accelerator, checkpoint, trainer.progress, trainer.ema)
        if accelerator.is_main_process:
            trainer.folder.start(replace(config, resume=False, allow_changes=False))
        if config.trackers:
            accelerator.init_trackers('timm-batchout', config={'recipe': json.dumps(config.recipe())})
        with trainer.stop.handled():
            while trainer.progress.epoch < config.epochs and not trainer.overfits():
                trainer.train_epoch()
        result = trainer.finish()
        accelerator.end_training()
    return result


@contextmanager
def _claimed(folder: RunFolder, config: TrainConfig, accelerator: Accelerator) -> Iterator[Path | None]:
    """Lock the run folder (on the main process); yields the checkpoint to resume from, None for a new run."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [folder.claim(config)]
        except ValueError as error:
            found = [error]
    try:
        if accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        yield found[0]
    finally:
        folder.release()


def _create_model(config: TrainConfig, classes: int, say: bool) -> tuple[TrainConfig, nn.Module]:
    """The model and its recipe. Unless ``num_classes`` is set, the model gets an output for each class of the data.

    Args:
        config: The recipe.
        classes: Number of classes of the data; 0: unknown.
        say: Print the number of classes if the data decides it.
    """
    model = _seeded_model(config)
    if classes and 'num_classes' not in config.model_args and int(model.num_classes) != classes:  # type: ignore[arg-type]
        if say:
            print(f'{config.model}: num_classes={classes}, from the data. Set model_args.num_classes to override.')
        config = replace(config, model_args={**config.model_args, 'num_classes': classes})
        model = _seeded_model(config)
    return config, model


def _seeded_model(config: TrainConfig) -> nn.Module:
    # device_specific: ranks must not share their draws of partners and dropout masks.
    set_seed(config.seed, device_specific=True)
    try:
        return timm.create_model(config.model, **config.model_args)
    except TypeError as error:
        raise ValueError(f'{config.model} does not accept these model_args: {error}') from error
    except (MemoryError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f'{config.model} cannot be created with model_args={config.model_args}: {reason}') from error


def _accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of what ``accelerate launch`` or torchrun has set up; on CPUs several processes use gloo."""
    processes = int(os.environ.get('WORLD_SIZE', '1'))
    on_cpu = parse_flag_from_env('ACCELERATE_USE_CPU') or not torch.accelerator.is_available()
    sharded = [name for name in ('DEEPSPEED', 'FSDP') if parse_flag_from_env(f'ACCELERATE_USE_{name}')]
    if config.precision == 'fp16' and on_cpu:
        raise ValueError('precision fp16 needs a GPU. Use bf16 on a CPU.')
    available = [tracker.value for tracker in get_available_trackers()]
    missing = [name for name in config.trackers if name not in available]
    if missing:
        raise ValueError(
            f"Tracker {missing[0]!r} is not installed, or is not one of Accelerate's. Available: {available}."
        )
    if sharded and on_cpu:
        raise ValueError(f'{sharded[0]} needs GPUs. For CPUs, use recipes/accelerate/two_cpu_processes.yaml.')
    if sharded and config.ema_decay:
        raise ValueError(
            f'ema_decay needs whole weights in every process, but {sharded[0]} shards them. Set ema_decay to 0.'
        )
    if sharded == ['DEEPSPEED'] and (config.accumulate > 1 or config.non_finite == 'skip'):
        raise ValueError('DeepSpeed runs the optimizer steps itself: accumulate must be 1, and non_finite stop.')
    _rendezvous_after_restart('gloo' if on_cpu else None)
    AcceleratorState._reset_state()  # so that a second run in one process can choose another precision
    accelerator = Accelerator(
        cpu=on_cpu and processes > 1,
        mixed_precision=config.precision,
        log_with=config.trackers or None,
        project_dir=config.output or None,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.state.deepspeed_plugin.deepspeed_config
        engine['train_micro_batch_size_per_gpu'] = config.batch_size
        engine['gradient_clipping'] = config.clip_grad
    return accelerator


def _rendezvous_after_restart(backend: str | None) -> None:
    """Join the other processes after a launcher on one machine has restarted all of them.

    torch's static rendezvous gives them the key-value store of the processes that died, which still holds their
    addresses; a prefix makes the keys new. (The c10d rendezvous, for several machines, has a new store each time.)
    """
    restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    if restarts == '0' or os.environ.get('GROUP_WORLD_SIZE') != '1' or dist.is_initialized():
        return
    world_size = int(os.environ['WORLD_SIZE'])
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), world_size, is_master=False)
    prefixed = dist.PrefixStore(f'restart_{restarts}', store)
    dist.init_process_group(backend, store=prefixed, rank=int(os.environ['RANK']), world_size=world_size)


def _check_fit(config: TrainConfig, model: nn.Module, split: Split | TimmSplit) -> None:
    """Check that the model accepts these images and has an output for every label, and that a training step works."""
    classes = int(model.num_classes)  # type: ignore[arg-type]
    if classes < split.classes:
        raise ValueError(
            f'The model has {classes} classes, the data {split.classes}. Set model_args.num_classes={split.classes}.'
        )
    cfg = input_cfg(model, config.data)
    images = laid_out(_two_images(cfg, split), config.channels_last)
    for name in ('mean', 'std'):
        if len(cfg[name]) not in (1, images.shape[1]):
            raise ValueError(
                f'The images have {images.shape[1]} channels, but the {name} of the model has {len(cfg[name])} values. '
                f'Set model_args.in_chans={images.shape[1]}, and model_args.pretrained_cfg_overlay={{mean: [...], '
                'std: [...]} with one value per channel.'
            )
    try:
        _try_a_step(model, PixelModel(model, cfg), images)
    except (RuntimeError, AssertionError, ValueError) as error:  # timm's ViTs assert the size
        if 'view size is not compatible' in str(error):
            raise ValueError(
                f'The model uses .view on features whose memory format does not allow it ({error}). Use .reshape '
                'instead, or set channels_last to false.'
            ) from error
        raise ValueError(
            f'The model does not accept images of shape {list(images.shape[1:])}: {error}. {_remedy(config, split)}'
        ) from error
    model.train()


def _try_a_step(model: nn.Module, pixel_model: nn.Module, images: Tensor) -> None:
    """Forward and backward in training mode, leaving the model and the random state unchanged."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with seeded(0), torch.enable_grad():
            pixel_model.train()(images).square().mean().backward()
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for parameter in model.parameters():
            parameter.grad = None


def _remedy(config: TrainConfig, split: Split | TimmSplit) -> str:
    if not isinstance(split, TimmSplit):
        return 'Set model_args.img_size and model_args.in_chans, or choose other data.'
    if 'img_size' in config.model_args:
        return f'Set data.image_size={config.model_args["img_size"]}, the size of the model.'
    return (
        'Set data.image_size to the size that the model accepts, or model_args.img_size and data.image_size to another.'
    )


def _two_images(cfg: dict[str, Any], split: Split | TimmSplit | None) -> Tensor:
    """Two images as the loaders yield them, float in [0, 1]; zeros in place of images that workers will read."""
    if isinstance(split, Split):
        return split.images[:2].float() / 255
    return torch.zeros(2, *cfg['input_size'])


def _describe(config: TrainConfig, model: nn.Module, split: Split | TimmSplit | None) -> dict[str, Any]:
    """A dry run: the resolved recipe, and an estimate of the memory of one process in training."""
    parameters = sum(p.numel() for p in model.parameters())
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = _two_images(input_cfg(model, config.data), split)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(images)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in saved.items() if pointer not in own)
    copies = 4 + bool(config.ema_decay)  # weights, gradients, two moments of Adam, moving average
    report = {
        'recipe': config.recipe(),
        'parameters': parameters,
        'batchout_sites': {name: str(layer) for name, layer in batchout_sites(model).items()},
        'memory_estimate_mib': {
            'weights, gradients, optimizer': round(copies * 4 * parameters / 2**20, 1),
            f'activations of {config.batch_size} images': round(activations / 2 * config.batch_size / 2**20, 1),
        },
    }
    print(yaml.safe_dump(report, sort_keys=False))
    return report
