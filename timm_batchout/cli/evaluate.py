"""timm-batchout evaluate"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_batchout.data.config import DataConfig
from timm_batchout.robustness.report import Report, differences
from timm_batchout.robustness.tables import table
from timm_batchout.text import parse_radius

__all__ = ['EvaluateConfig', 'run']


@dataclass
class EvaluateConfig:
    """Measure the accuracy of a model, clean and under attack, and whether its gradients can be trusted.

    Args:
        model: Model name, with or without tag, or hf-hub:NAMESPACE/NAME.
        checkpoint: Evaluate this file instead of the pretrained weights: .safetensors, timm's .pth.tar, .pth or
            Lightning's .ckpt. No code from it is run.
        model_args: Keyword arguments for ``timm.create_model``.
        data: The test set.
        images: Number of test images, drawn at random; 0: all.
        attacks: Names of attacks: fgsm, pgd, pgd_l2, deepfool, deepfool_unclipped, ddn, autoattack, autoattack_l2,
            transfer, noise, corruptions.
        eps: L-infinity radii in [0, 1] pixels, e.g. 1/255 2/255.
        eps_l2: L2 radii in [0, 1] pixels.
        settings: Settings of attacks, by name: '{pgd: {steps: 100}, autoattack: {n: 500}}'.
        transfer_from: The model on which 'transfer', and the audit, craft images.
        audit: Check for gradient masking.
        batch_size: Images at a time.
        seed: Seed of the draw and of the attacks.
        device: Device to compute on; empty: a GPU if there is one.
        output: Write the report to this JSON file.
        expect: An earlier report on these weights: print the differences, and exit with 1 if there are any.
        figure: Draw accuracy over the radius to this file (.svg, .png).
        examples: Draw images, their PGD perturbations at the largest of eps, and the predictions to this file (.png).
        quiet: Print nothing but errors and, with --expect, the differences.
        resume: Continue an interrupted evaluation with the same settings; false: start again.
    """

    model: str
    checkpoint: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    images: int = 0
    attacks: list[str] = field(default_factory=lambda: ['fgsm'])
    eps: list[float | str] = field(default_factory=lambda: ['8/255'])
    eps_l2: list[float | str] = field(default_factory=lambda: ['0.5'])
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    transfer_from: str = ''
    audit: bool = True
    batch_size: int = 100
    seed: int = 0
    device: str = ''
    output: str = ''
    expect: str = ''
    figure: str = ''
    examples: str = ''
    quiet: bool = False
    resume: bool = True


def run(config: EvaluateConfig) -> int:
    from timm_batchout.data.memory import data_label, load_test_set
    from timm_batchout.robustness.attacks import as_attacks
    from timm_batchout.robustness.chunks import Chunks
    from timm_batchout.robustness.harness import evaluate

    attacks = list(as_attacks(config.attacks, config.settings).values())
    if config.figure and not config.output:
        raise ValueError('A figure is drawn from a report. Add an --output.')
    radii = [parse_radius(eps) for eps in config.eps]
    if config.examples and not any(radii):
        raise ValueError(f'examples are drawn at the largest of eps, which must be above 0; got {config.eps}.')
    _check_output(config.output)
    expected = Report.load(config.expect) if config.expect else None
    model = _load(config.model, config.checkpoint, config.model_args)
    images = load_test_set(config.data, model)
    if not 0 <= config.images <= len(images):
        raise ValueError(
            f'images must lie in [1, {len(images)}], the size of the test set, or be 0 for all; got {config.images}.'
        )
    state = _processes()
    chunks = Chunks(Path(f'{config.output}.chunks') if config.output else None, config.resume)
    device = config.device or str(state.device)
    try:
        report = evaluate(
            model.to(device),
            images,
            attacks=attacks,
            eps=config.eps,
            eps_l2=config.eps_l2,
            transfer_from=_load(config.transfer_from, '').to(device) if config.transfer_from else None,
            n=config.images,
            audit=config.audit,
            batch_size=config.batch_size,
            seed=config.seed,
            name=config.checkpoint or config.model,
            data=data_label(config.data),
            chunks=chunks,
            rank=state.process_index,
            world_size=state.num_processes,
            wait=state.wait_for_everyone,
            progress=not config.quiet,
        )
    except KeyboardInterrupt as error:
        if config.output:
            raise KeyboardInterrupt(
                'interrupted. Finished chunks are saved: repeat the command to continue.'
            ) from error
        raise KeyboardInterrupt('interrupted. Add an --output to save finished chunks.') from error
    state.wait_for_everyone()  # all have read the chunks
    if state.is_main_process:
        if not config.quiet:
            print(table(report))
        if config.output:
            report.save(config.output)
            chunks.discard()
        if config.figure:
            from timm_batchout.robustness.plots import draw_curves

            draw_curves([report], config.figure)
        if config.examples:
            from timm_batchout.robustness.examples import draw_examples

            draw_examples(model, images, max(radii), config.examples, seed=config.seed)
    if expected:
        different = differences(report, expected)
        if state.is_main_process:
            if different:
                print('\n'.join(['Differs from the expected report:', *different]))
            elif not config.quiet:
                print('As expected.')
        return int(bool(different))
    return 0


def _check_output(output: str) -> None:
    """Raise ValueError if a report cannot be written there, or would overwrite something else."""
    path = Path(output)
    if not output:
        return
    if path.is_dir():
        raise ValueError(f'output {output!r} is a folder. Name a file in it, e.g. {output.rstrip("/")}/report.json.')
    if path.exists():
        try:
            Report.load(path)
        except ValueError as error:
            raise ValueError(f'output {output!r} is not a report and is not overwritten. {error}') from error


def _load(name: str, checkpoint: str, model_args: dict[str, Any] | None = None) -> Any:
    """A model by name, with its pretrained weights or those of a file."""
    import timm

    import timm_batchout.zoo.register  # noqa: F401
    from timm_batchout.zoo.checkpoint import load_checkpoint
    from timm_batchout.zoo.timm_twins import check_model_name

    if name.endswith('.safetensors') or Path(name).is_file():
        raise ValueError(f'{name!r} is a file. Give the architecture as MODEL, and the file as --checkpoint.')
    check_model_name(name)
    if not checkpoint:
        return timm.create_model(name, **{'pretrained': True, **(model_args or {})})
    if not Path(checkpoint).is_file():
        raise ValueError(f'checkpoint {checkpoint!r} does not exist. Give a weights file, e.g. RUN/model.safetensors.')
    model = timm.create_model(name, **(model_args or {}))
    load_checkpoint(model, checkpoint)
    return model


def _processes() -> Any:
    """Accelerate's view of the processes that share the work."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
