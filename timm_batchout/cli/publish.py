"""timm-batchout publish"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_batchout.robustness.report import Report

__all__ = ['PublishConfig', 'run']


@dataclass
class PublishConfig:
    """Stage a model's repository with its robustness card in hub_cards/, show it, and push it to the Hugging Face Hub.

    The token comes from `hf auth login` or HF_TOKEN.

    Args:
        model: A bundled model ('arch.tag'), or the model name of the --checkpoint.
        all: All bundled models, each with its own report.
        report: The report of `evaluate` on these weights.
        twin: The report of the same net without defence, for comparison.
        repo: NAMESPACE/NAME; by default the model's name in the namespace of TIMM_BATCHOUT_HUB_NAMESPACE.
        checkpoint: A .safetensors file, for weights that are not bundled.
        run: The run folder that trained the checkpoint.
        model_args: Keyword arguments for ``timm.create_model``.
        cards: Folder of all cards.
        license: Licence of the weights: mit, apache-2.0, ...; by default that of the architecture's weights in timm.
        examples: A picture that `evaluate --examples` drew, to show in the card.
        private: Create the repository as a private one; an existing public one is refused.
        dry_run: Stage and show the files, and push nothing.
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
    license: str = ''
    examples: str = ''
    private: bool = False
    dry_run: bool = False


def run(config: PublishConfig) -> int:
    from timm_batchout.hub.leaderboard import write_gallery
    from timm_batchout.hub.publish import bundled, push, stage
    from timm_batchout.zoo import pretrained as weights

    if config.all == bool(config.model):
        raise ValueError('Name one model to publish, or --all.')
    of_one = ('repo', 'report', 'checkpoint', 'run', 'twin', 'model_args', 'examples')
    given = [f'--{name}' for name in of_one if getattr(config, name)]
    if config.all and given:
        raise ValueError(f'{", ".join(given)} cannot be combined with --all.')
    if config.all:
        cards = weights.bundled_cards()
        undefended = {_net_and_data(card): name for name, card in cards.items() if '.baseline_' in name}
        todo = []
        for name, card in cards.items():
            twin = undefended.get(_net_and_data(card), name)
            todo.append((name, *bundled(name), f'{name}.json', f'{twin}.json' if twin != name else ''))
        folder = weights.FOLDER
    else:
        if not config.report:
            raise ValueError('A model is published with its report. Give the report of `evaluate` as --report.')
        run = json.loads((Path(config.run) / 'result.json').read_text()) if config.run else {}
        source = (Path(config.checkpoint), run) if config.checkpoint else bundled(config.model)
        todo = [(config.model, *source, config.report, config.twin)]
        folder = Path()
    gallery = Path(config.cards)
    reports = {path: Report.load(folder / path) for *_, report, twin in todo for path in (report, twin) if path}
    nets = {report.weights_sha256: report.model for report in reports.values()} if config.all else {}
    staged = [
        stage(
            name, file, reports[report], run, gallery, config.repo, reports.get(twin), config.model_args, nets,
            config.license, config.examples,
        )
        for name, file, run, report, twin in todo
    ]  # fmt: skip
    write_gallery(gallery)
    for repository in staged:
        print(repository.repo)
        for path, local in repository.files().items():
            print(f'  {path:20} {local.stat().st_size / 1024:10.1f} KiB')
        if not config.dry_run:
            changed = push(repository, config.private)
            print(f'  pushed: {", ".join(changed)}' if changed else '  nothing pushed, because nothing has changed')
    return 0


def _net_and_data(card: dict[str, Any]) -> tuple[str, str]:
    return card['model'].removeprefix('batchout_'), card['training']['data']
