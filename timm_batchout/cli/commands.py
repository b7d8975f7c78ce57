"""What each command of the command line takes and does."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError

from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import data_label, load_split
from timm_batchout.robustness import Report, comparison, evaluate
from timm_batchout.robustness.plots import draw_curves
from timm_batchout.robustness.report import differences
from timm_batchout.robustness.tables import overview, table
from timm_batchout.training.config import TrainConfig
from timm_batchout.zoo import pretrained as weights
from timm_batchout.zoo.timm_twins import check_model_name

__all__ = ['COMMANDS']


@dataclass
class EvaluateConfig:
    """Accuracy of a model, clean and under attack, and whether its gradients can be trusted, as one JSON report.

    Args:
        model: A timm model name, with or without tag, or hf-hub:NAMESPACE/NAME.
        checkpoint: Score this .safetensors file instead of the pretrained weights.
        model_args: Keyword arguments for ``timm.create_model``.
        data: The test set.
        images: How many of its images, drawn by the seed; 0: all of it.
        attacks: fgsm, pgd, pgd_l2, deepfool, deepfool_unclipped, ddn, autoattack, autoattack_l2, transfer, noise,
            corruptions.
        eps: L-infinity radii in [0, 1] pixels; fractions are welcome: '[1/255, 2/255]'.
        eps_l2: L2 radii in [0, 1] pixels.
        settings: Of the attacks, in place of their defaults: '{pgd: {steps: 100}}'.
        transfer_from: The model whose adversarial images 'transfer', and the audit, take.
        audit: Check for gradient masking.
        batch_size: Images at a time.
        seed: Of the draw and of the attacks.
        device: Where to compute; empty: a GPU if there is one.
        output: Write the report to this JSON file.
        expect: An earlier report of these weights: show where this one differs, and exit with 1 if it does.
        figure: Draw accuracy over the radius to this file (.svg, .png).
        resume: Go on where a run with the same settings was broken off.
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
    resume: bool = False


@dataclass
class CompareConfig:
    """Reports of several models as one table, and as curves.

    Args:
        reports: JSON files that ``evaluate`` wrote.
        figure: Draw accuracy over the radius to this file (.svg, .png).
    """

    reports: list[str]
    figure: str = ''


@dataclass
class PublishConfig:
    """Stage a model's repository with its robustness card in hub_cards/, show it, and push it to the Hugging Face Hub.

    The token comes from `hf auth login` or HF_TOKEN.

    Args:
        model: A bundled model ('arch.tag'), or the timm name of what --checkpoint holds.
        all: All bundled models, each with its own report.
        report: What `evaluate` wrote for these weights.
        twin: The report of the same net without defence, for comparison.
        repo: NAMESPACE/NAME; by default the model's name in the namespace of TIMM_BATCHOUT_HUB_NAMESPACE.
        checkpoint: A .safetensors file, for weights that are not bundled.
        run: The run folder that trained the checkpoint.
        model_args: Keyword arguments for ``timm.create_model``.
        cards: Folder of all cards.
        private: Create the repository as a private one; one that is there and public is refused.
        dry_run: Stage and show; push nothing.
    """

    model: str = ''
    all: bool = False
    report: str = ''
    twin: str = ''
    repo: str = ''
    checkpoint: str = ''
    run: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    cards: str = 'hub_cards'
    private: bool = False
    dry_run: bool = False


@dataclass
class ListConfig:
    """The bundled weights and their accuracy, as Markdown tables made from their JSON."""


def run_train(config: TrainConfig) -> int:
    from timm_batchout.training.launch import Interrupted, train

    try:
        train(config)
    except Interrupted as stopped:  # asked for, and saved: no failure
        if str(stopped):  # on the main process
            print(stopped)
    return 0


def run_evaluate(config: EvaluateConfig) -> int:
    from timm_batchout.robustness.attacks import check_available

    check_available(config.attacks)
    if config.figure and not config.output:
        raise ValueError('A figure is drawn from a report: name an --output as well.')
    expected = Report.load(config.expect) if config.expect else None
    model = _load(config.model, config.checkpoint, config.model_args)
    split = load_split(config.data, train=False)
    if not 0 <= config.images <= len(split):
        raise ValueError(f'images must lie in [1, {len(split)}], the test set, or be 0 for all; got {config.images}.')
    chunks = Path(f'{config.output}.chunks') if config.output else None
    state = _processes()
    if chunks and not config.resume and state.is_main_process:
        shutil.rmtree(chunks, ignore_errors=True)
    state.wait_for_everyone()
    device = config.device or str(state.device)
    report = evaluate(
        model.to(device),
        split.images.to(device),
        split.labels.to(device),
        config.attacks,
        config.eps,
        config.eps_l2,
        settings=config.settings,
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
        progress=sys.stderr.isatty(),
    )
    if state.is_main_process:
        print(table(report))
        if chunks:
            report.save(config.output)
            shutil.rmtree(chunks, ignore_errors=True)
        if config.figure:
            draw_curves([report], config.figure)
    if expected:
        different = differences(report, expected)
        if state.is_main_process:
            print('\n'.join(['Differs from the expected report:', *different]) if different else 'As expected.')
        return int(bool(different))
    return 0


def run_compare(config: CompareConfig) -> int:
    reports = [Report.load(path) for path in config.reports]
    print(comparison(reports))
    if config.figure:
        draw_curves(reports, config.figure)
    return 0


def run_publish(config: PublishConfig) -> int:
    from timm_batchout.hub.leaderboard import write_gallery
    from timm_batchout.hub.publish import bundled, push, stage

    if config.all == bool(config.model):
        raise ValueError('Name one model to publish, or --all.')
    of_one = ('repo', 'report', 'checkpoint', 'run', 'twin', 'model_args')
    given = [f'--{name}' for name in of_one if getattr(config, name)]
    if config.all and given:
        raise ValueError(f'{", ".join(given)}: for one model, not for --all, which takes the bundled ones as they are.')
    if config.all:
        cards = weights.bundled_cards()
        undefended = {card['training']['data']: name for name, card in cards.items() if '.baseline_' in name}
        todo = []
        for name, card in cards.items():
            twin = undefended[card['training']['data']]
            todo.append((name, *bundled(name), f'{name}.json', f'{twin}.json' if twin != name else ''))
        folder = weights.FOLDER
    else:
        if not config.report:
            raise ValueError('A model is published with its report: name what `evaluate` wrote as --report.')
        run = json.loads((Path(config.run) / 'result.json').read_text()) if config.run else {}
        source = (Path(config.checkpoint), run) if config.checkpoint else bundled(config.model)
        todo = [(config.model, *source, config.report, config.twin)]
        folder = Path()
    gallery = Path(config.cards)
    reports = {path: Report.load(folder / path) for *_, report, twin in todo for path in (report, twin) if path}
    nets = {report.weights_sha256: report.model for report in reports.values()} if config.all else {}
    staged = [
        stage(name, file, reports[report], run, gallery, config.repo, reports.get(twin), config.model_args, nets)
        for name, file, run, report, twin in todo
    ]
    write_gallery(gallery)
    for repository in staged:
        print(repository.repo)
        for path, local in repository.files().items():
            print(f'  {path:20} {local.stat().st_size / 1024:10.1f} KiB')
        if not config.dry_run:
            changed = push(repository, config.private)
            print(f'  pushed: {", ".join(changed)}' if changed else '  nothing has changed: nothing was pushed')
    return 0


def run_list(config: ListConfig) -> int:
    cards = weights.bundled_cards()
    print(overview({name: Report.from_dict(card['report']) for name, card in cards.items()}))
    return 0


def _load(name: str, checkpoint: str, model_args: dict[str, Any] | None = None) -> Any:
    """A model by name, with its pretrained weights or those of a safetensors file."""
    if name.endswith('.safetensors') or Path(name).is_file():
        raise ValueError(f'{name!r} is a file: name the architecture as MODEL, and the file as --checkpoint.')
    check_model_name(name)
    if checkpoint and not checkpoint.endswith('.safetensors'):
        raise ValueError(f'checkpoint must be a .safetensors file, got {checkpoint!r}: pickles can run code.')
    if checkpoint and not Path(checkpoint).is_file():
        raise ValueError(f'checkpoint {checkpoint!r} is not there: name a .safetensors file, e.g. of a run folder.')
    weights_of = {'checkpoint_path': checkpoint} if checkpoint else {'pretrained': True}
    try:
        return timm.create_model(name, **{**weights_of, **(model_args or {})})
    except SafetensorError as error:
        raise ValueError(f'{checkpoint or name} is damaged, write or download it again: {error}.') from error


def _processes() -> Any:
    """Accelerate's view of the processes that share the work."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


COMMANDS: dict[str, tuple[Callable[[Any], int], type]] = {
    'train': (run_train, TrainConfig),
    'evaluate': (run_evaluate, EvaluateConfig),
    'compare': (run_compare, CompareConfig),
    'publish': (run_publish, PublishConfig),
    'list': (run_list, ListConfig),
}
