"""Model cards from a report and a training run: the text and the metadata that the Hub shows."""

import hashlib
import html
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, select_autoescape

import timm_batchout.zoo.register  # noqa: F401
from timm_batchout.robustness.report import Report, Score
from timm_batchout.robustness.tables import attack_title, compare, describe, title
from timm_batchout.text import format_radius

__all__ = ['CARD_HASH', 'EXAMPLES', 'Entry', 'card_hash', 'make_card', 'summary', 'templates', 'with_own_section']

DATASETS = {'MNIST': 'ylecun/mnist', 'CIFAR-10': 'uoft-cs/cifar10'}  # on the Hub, by the first word of our data label
CARD_HASH = 'card_sha256'  # in config.json: hash of the card as it was written
OWN_SECTION = ('<!-- Your own text: it is kept. -->', '<!-- End of your own text. -->')
LICENSES = {  # in the Hub's list; any other is 'other' there, with a name
    'apache-2.0', 'mit', 'bsd-2-clause', 'bsd-3-clause', 'gpl-3.0', 'lgpl-3.0', 'agpl-3.0', 'mpl-2.0', 'unlicense',
    'openrail', 'cc0-1.0', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0', 'unknown',
}  # fmt: skip
EXAMPLES = 'examples.png'  # the picture of adversarial images, if there is one
VERSIONS = ('python', 'timm-batchout', 'torch', 'timm')  # shown for the evaluation


@dataclass
class Entry:
    """Everything known about a model to publish.

    Attributes:
        name: Name of its repository, without the namespace.
        repo: 'namespace/name'.
        config: Content of config.json. A BatchOut-trained timm backbone has the stock architecture there.
        report: Its robustness report.
        run: Recipe and metrics of its training; empty if unknown.
        sha256: Hash of the weights file.
        twin: The report of the same net without defence, to compare with; None: no comparison.
        nets: Names of nets by the ``weights_sha256`` of their reports, to name the nets that transferred images.
        examples: Whether the repository has a picture of adversarial images.
    """

    name: str
    repo: str
    config: dict[str, Any]
    report: Report
    run: dict[str, Any]
    sha256: str
    twin: Report | None = None
    nets: dict[str, str] = field(default_factory=dict)
    examples: bool = False

    @property
    def architecture(self) -> str:
        return self.config['architecture']

    @property
    def license(self) -> str:
        """Licence of the weights."""
        return self.config.get('pretrained_cfg', {}).get('license') or 'unknown'

    @property
    def has_curves(self) -> bool:
        """Whether an attack was run at two radii (or iterations) or more, so that a curve can be drawn."""
        drawn = [s.attack for s in self.report.scores if s.radius is not None or s.attack.startswith('deepfool')]
        return any(count > 1 for count in Counter(drawn).values())

    @property
    def recipe(self) -> dict[str, Any]:
        return self.run.get('recipe', {})

    @property
    def batchout(self) -> bool:
        """Whether it was trained with BatchOut."""
        return str(self.config.get('trained_with', '')).startswith('batchout_')

    @property
    def needs_package(self) -> bool:
        """Whether the architecture is one of this package's own, which plain timm does not know."""
        return timm.model_entrypoint(self.architecture).__module__.startswith('timm_batchout.')


def make_card(entry: Entry) -> ModelCard:
    """The README.md of a model's repository.

    Raises:
        ValueError: The report lacks the clean score.
    """
    dataset = DATASETS.get(entry.report.data.partition(' ')[0], '')
    raw, entry = entry, replace(entry, report=replace(entry.report, data=without_markup(entry.report.data)))
    if entry.twin:
        entry = replace(entry, twin=replace(entry.twin, data=without_markup(entry.twin.data)))
    data = ModelCardData(
        model_name=entry.name,
        library_name='timm',
        **license_fields(entry),
        tags=['image-classification', 'timm', 'adversarial-robustness', *(['batchout'] if entry.batchout else [])],
        datasets=[dataset] if dataset else None,
        pipeline_tag='image-classification',
        eval_results=eval_results(raw.report),
    )
    report, twin, run = entry.report, entry.twin, entry.run
    text = (
        templates()
        .get_template('card.md.j2')
        .render(
            card_data=data.to_yaml(),
            name=entry.name,
            repo=entry.repo,
            summary=summary(report),
            architecture=entry.architecture,
            plain_architecture=entry.architecture.removeprefix('batchout_') if entry.batchout else '',
            needs_package=entry.needs_package,
            method=_method(entry),
            report=report,
            preprocessing=report.preprocessing,
            twin=twin,
            table=compare(
                [report, *([twin] if twin else [])],
                ['this model', 'without defence'][: 1 + bool(twin)],
                first_only=True,
                intervals=True,
            ),
            crafted=_crafted(entry),
            audit=report.audit if report.audit and report.audit.pgd else None,
            curves=entry.has_curves,
            examples=EXAMPLES if entry.examples else '',
            run=run,
            train_share=f'{1 - entry.recipe["data"].get("val_fraction", 0):.0%}' if 'data' in entry.recipe else '',
            recipe=yaml.safe_dump(entry.recipe, sort_keys=False).rstrip(),
            own_section=OWN_SECTION,
            sha256=entry.sha256,
            versions=', '.join(f'{name} {report.environment[name]}' for name in VERSIONS if name in report.environment),
        )
    )
    return ModelCard(text)


def templates() -> Environment:
    """The Jinja environment of the templates in this folder; pages are escaped, Markdown is not."""
    loader = FileSystemLoader(Path(__file__).parent)
    escaped = select_autoescape(['html.j2'])
    environment = Environment(
        loader=loader, autoescape=escaped, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters['radius'] = format_radius
    environment.filters['json'] = json.dumps
    environment.filters['short'] = lambda values: [round(value, 4) for value in values]
    return environment


def license_fields(entry: Entry) -> dict[str, Any]:
    """The Hub's licence fields: one that is not in its list is 'other', with name and link."""
    if entry.license in LICENSES:
        return {'license': entry.license}
    origin = entry.config.get('pretrained_cfg', {}).get('origin_url') or f'https://huggingface.co/{entry.repo}'
    return {'license': 'other', 'license_name': entry.license, 'license_link': origin}


def without_markup(text: str) -> str:
    """Foreign text made safe for Markdown: no HTML, no table cells, one line."""
    return html.escape(' '.join(text.split()), quote=False).replace('|', '&#124;').replace('`', "'")


def card_hash(card: str) -> str:
    """Hash of a card without its hand-written section."""
    before, _, after = _parts(card)
    return hashlib.sha256((before + after).encode()).hexdigest()


def with_own_section(card: str, earlier: str, config: dict[str, Any], where: str) -> str:
    """A new card with the hand-written section of an earlier one.

    Args:
        card: The card made from the report.
        earlier: The card it replaces; '' for a first card.
        config: The config.json beside the earlier card.
        where: Place of the earlier card, for the error message.

    Raises:
        ValueError: The earlier card was edited outside its hand-written section.
    """
    if not earlier:
        return card
    if CARD_HASH in config and config[CARD_HASH] != card_hash(earlier):
        raise ValueError(
            f'{where} was edited outside its hand-written section, and the edit would be lost. Move it between the '
            f'lines {OWN_SECTION[0]!r} and {OWN_SECTION[1]!r}, or delete that README.md.'
        )
    before, empty, after = _parts(card)
    return before + (_parts(earlier)[1] or empty) + after


def _parts(card: str) -> tuple[str, str, str]:
    """The text before the hand-written section, the section, and the text after it."""
    begin, end = OWN_SECTION
    if begin not in card or end not in card:
        return card, '', ''
    head, _, rest = card.partition(begin)
    own, _, tail = rest.partition(end)
    return head + begin, own, end + tail


def eval_results(report: Report) -> list[EvalResult]:
    """Results for the Hub's model-index: clean, and the main variants of FGSM, PGD, AutoAttack and DeepFool."""
    dataset = DATASETS.get(report.data.partition(' ')[0], report.data)
    results = []
    for score in report.scores:
        if not _headline(score):
            continue
        name = title(score)
        value, metric = 100 * score.accuracy, 'accuracy'
        shared: dict[str, Any] = dict(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=report.data,
            dataset_split='test',
        )
        settings = report.settings.get(score.attack, {})
        args = {
            **settings,
            'n': score.n,
            'norm': score.norm or None,
            'eps': None
            if score.radius is None
            else format_radius(score.radius),  # this score's own, in place of the list in the settings
        }
        config = 'clean' if score.attack == 'clean' else f'{score.norm}-{describe(score.variant)}'.strip('-')
        label = f'{name} (masked: overstated)' if score.masked else name
        results.append(
            EvalResult(
                **shared,
                metric_type=metric,
                metric_name='Accuracy' if score.attack == 'clean' else label,
                metric_config=f'{score.attack} {config}' if score.attack != 'clean' else config,
                metric_args={key: value for key, value in args.items() if value is not None},
                metric_value=round(value, 2),
            )
        )
        if score.median_distance is not None:
            results.append(
                EvalResult(
                    **shared,
                    metric_type='median_distance',
                    metric_name=f'{name}, median L2 distance in [0, 1] pixels',
                    metric_config=f'{score.attack} distance',
                    metric_args={**settings, 'n': score.n},
                    metric_value=round(score.median_distance, 4),
                )
            )
    return results


def _headline(score: Score) -> bool:
    if score.attack.startswith('deepfool'):
        return score.iteration == 5
    return score.attack == 'clean' or (
        score.attack in ('fgsm', 'pgd', 'autoattack', 'autoattack_l2') and not score.stage
    )


def summary(report: Report) -> str:
    """One sentence that leads with the strongest attack and the audit's verdict."""
    clean = f'{100 * report.score("clean").accuracy:.1f}% clean'
    strongest = [
        score
        for attack in ('autoattack', 'pgd', 'fgsm')
        for score in report.scores
        if score.attack == attack and not score.stage
    ]
    verdict = 'not checked.'
    if report.audit:
        verdict = report.audit.verdict
    if not strongest:
        return f'Accuracy: {clean}. Not attacked. Gradient masking: {verdict}'
    first = [score for score in strongest if score.attack == strongest[0].attack]
    shown = ', '.join(f'{100 * score.accuracy:.1f}% under {title(score)}' for score in first[-2:])
    return f'Accuracy: {shown} (n = {first[0].n}); {clean}. Gradient masking: {verdict}'


def _method(entry: Entry) -> str:
    methods = [_batchout(entry.recipe.get('model_args', {}))] if entry.batchout else []
    objective = entry.recipe.get('objective', {})
    if objective.get('name', 'plain') != 'plain':
        methods.append(_adversarial_training(objective))
    if not methods:
        methods.append('plain training' if entry.run else 'not recorded')
    return '; together with '.join(methods)


OBJECTIVES = {
    'fgsm': 'FGSM adversarial training: the first half of each mini-batch was replaced by FGSM images',
    'fgsm_rs': 'single-step adversarial training from a random start (FGSM-RS, Wong et al., 2020)',
    'n_fgsm': 'single-step adversarial training from noise (N-FGSM, de Jorge et al., 2022)',
    'pgd': 'PGD adversarial training (Madry et al., 2018), {steps} steps for each mini-batch',
    'trades': 'TRADES (Zhang et al., 2019), beta {beta:g}, {steps} steps for each mini-batch',
}


def _adversarial_training(objective: dict[str, Any]) -> str:
    name, norm = objective['name'], objective.get('norm', 'Linf')
    method = OBJECTIVES.get(name, name).format(**{'steps': 10, 'beta': 6.0, **objective})
    return f'{method} (training epsilon {norm} {format_radius(objective["epsilon"])})'


def _batchout(options: dict[str, Any]) -> str:
    """The method in words, with options that differ from the paper's."""
    k, first = options.get('k', 0.5), options.get('select', 'first') == 'first'
    whose = f'{"the first half" if first and k == 0.5 else f"{k:.0%}"} of each mini-batch'
    if options.get('noise') == 'gaussian':
        method = (
            f'Gaussian feature noise (the control for BatchOut): in training, noise was added to features of {whose}'
        )
    else:
        method = (
            f'BatchOut: in training, features of {whose} were pushed a little toward those of other images in the batch'
        )
    return f'{method}. The weights are those of a plain net, and nothing is added at test time'


def _crafted(entry: Entry) -> str:
    """The nets on which the images of 'transfer' were crafted; '' if it was not run."""
    crafted = []
    for whose, report in (('this model', entry.report), ('the net without defence', entry.twin)):
        source = report.settings.get('transfer', {}).get('source_sha256') if report else None
        if source:
            net = f'`{entry.nets[source]}`' if source in entry.nets else f'weights with the hash {source[:12]}...'
            crafted.append(f'those against {whose} were crafted on {net}')
    return f"'{attack_title('transfer')}' uses images crafted on another net: {', '.join(crafted)}." if crafted else ''
