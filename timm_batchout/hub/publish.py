"""A model's repository on the Hugging Face Hub: staged in a folder, then pushed in one commit."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import save_config_for_hf
from torch import nn

import timm_batchout.zoo.register  # noqa: F401
from timm_batchout.hub.card import CARD_HASH, EXAMPLES, Entry, card_hash, make_card, with_own_section
from timm_batchout.hub.privacy import publishable, redacted
from timm_batchout.layer import BatchOutConfig
from timm_batchout.provenance import write_atomically
from timm_batchout.robustness.inputs import weights_sha256
from timm_batchout.robustness.plots import draw_curves
from timm_batchout.robustness.report import Report
from timm_batchout.zoo.checkpoint import as_safetensors
from timm_batchout.zoo.pretrained import FOLDER, NAMESPACE, WEIGHTS, bundled_cards

__all__ = ['Staged', 'bundled', 'publish', 'push', 'stage']

CARD_FILES = (
    'README.md',
    'config.json',
    'results.json',
    'curves.svg',
    EXAMPLES,
)  # nothing else in the folder is uploaded
TRIES = 3  # if others push to the same repository at the same time


@dataclass(frozen=True)
class Staged:
    """The files to upload: those of a folder, and the weights file wherever it is."""

    repo: str
    folder: Path
    weights: Path

    def files(self) -> dict[str, Path]:
        """Local files by their path in the repository."""
        cards = {name: self.folder / name for name in CARD_FILES if (self.folder / name).is_file()}
        return {**cards, WEIGHTS: self.weights}


def bundled(name: str) -> tuple[Path, dict[str, Any]]:
    """Weights and training run of a bundled model ('arch.tag').

    Raises:
        ValueError: No bundled model has this name.
    """
    cards = bundled_cards()
    if name not in cards:
        raise ValueError(
            f'No bundled weights {name!r}. Available: {", ".join(cards)}. For other weights, use --checkpoint.'
        )
    return FOLDER / f'{name}.safetensors', cards[name]['training']


def publish(
    repo: str,
    model: nn.Module,
    report: Report,
    *,
    run: str | Path | None = None,
    twin: Report | None = None,
    cards: str | Path = 'hub_cards',
    license: str = '',
    examples: str | Path = '',
    private: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Push a net and its robustness card to the Hugging Face Hub, as ``timm-batchout publish`` does with a file.

    Args:
        repo: 'namespace/name'.
        model: A net of timm's or of this package's, with or without BatchOut's hooks.
        report: The report of ``evaluate`` on these weights.
        run: The run folder that trained them.
        twin: The report of the same net without defence, for comparison.
        cards: Folder of all cards; this card is staged in a folder of its own inside.
        license: Licence of the weights; '': that of the architecture's weights in timm.
        examples: A picture that ``evaluate --examples`` drew, to show in the card.
        private: Create the repository as a private one.
        dry_run: Stage the card and push nothing.

    Returns:
        The uploaded files; empty if nothing has changed.

    Raises:
        ValueError: A net that timm does not know by name, a report on other weights, a name that the Hub does not
            allow; ``private`` for a repository that exists and is public.
        ConnectionError: The Hub does not answer.
    """
    if not (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        raise ValueError(
            f'{type(model).__name__} has no architecture name, so timm.create_model could not create it again.'
        )
    result = json.loads((Path(run) / 'result.json').read_text()) if run else {}
    with TemporaryDirectory() as folder:
        weights = Path(folder) / WEIGHTS
        weights.write_bytes(as_safetensors(model.state_dict()))
        staged = stage_net(model, weights, report, result, Path(cards), repo, twin, license=license, examples=examples)
        return [] if dry_run else push(staged, private)


def stage(
    model: str,
    weights: Path,
    report: Report,
    run: dict[str, Any],
    cards: Path,
    repo: str = '',
    twin: Report | None = None,
    model_args: dict[str, Any] | None = None,
    nets: dict[str, str] | None = None,
    license: str = '',
    examples: str | Path = '',
) -> Staged:
    """Write a repository without its weights to ``cards/NAME``, without local paths.

    Args:
        model: timm's name. BatchOut twins of timm's nets are published under the stock architecture.
        weights: A safetensors file.
        report: The report on these weights.
        run: The training run's result.json, or the JSON of bundled weights; empty if unknown.
        cards: The folder of all cards.
        repo: 'namespace/name'; default: the model's name in the default namespace.
        twin: The report of the same net without defence, for comparison.
        model_args: Arguments of the architecture, e.g. ``num_classes``.
        nets: Names of nets by the ``weights_sha256`` of their reports, to name the nets that transferred images.
        license: Licence of the weights; '': that of the architecture's weights in timm, or 'unknown'.
        examples: A picture that ``evaluate --examples`` drew, to show in the card.

    Raises:
        ValueError: Weights that are not safetensors, a report on other weights, a name that the Hub does not allow; a
            card that was edited outside its hand-written section.
    """
    if weights.suffix != '.safetensors':
        raise ValueError(f'Only safetensors are published, because pickles can run code; got {str(weights)!r}.')
    repo = repo or f'{NAMESPACE}/{model}'
    _check_repo(repo)
    net = _plain(model, weights, model_args or {})
    trained_with = run.get('recipe', {}).get('model', model)
    return stage_net(net, weights, report, run, cards, repo, twin, nets, trained_with, license, examples)


def stage_net(
    net: Any,
    weights: Path,
    report: Report,
    run: dict[str, Any],
    cards: Path,
    repo: str,
    twin: Report | None = None,
    nets: dict[str, str] | None = None,
    trained_with: str = '',
    license: str = '',
    examples: str | Path = '',
) -> Staged:
    """``stage`` for an existing net whose state_dict is in the file ``weights``."""
    _check_repo(repo)
    if weights_sha256(net) != report.weights_sha256:
        raise ValueError(f'The report is on other weights than {str(weights)!r}. Evaluate these first.')
    if examples and (Path(examples).suffix != '.png' or not Path(examples).is_file()):
        raise ValueError(
            f'examples {str(examples)!r} is not a .png file. Draw one with `evaluate --examples grid.png`.'
        )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    folder = cards / repo.split('/')[1]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{str(folder)!r} is a file in the place of the card of {repo}. Choose another name.')
    run = publishable(run)
    report = replace(report, model=folder.name)  # it may be named after a local path
    twin = replace(twin, model='without defence') if twin else None
    trained_with = trained_with or run.get('recipe', {}).get('model', net.pretrained_cfg['architecture'])
    config = _config(net, report.preprocessing, run.get('class_names') or [], license)
    entry = Entry(
        folder.name, repo, {**config, 'sha256': digest, 'trained_with': trained_with}, report, run, digest, twin,
        nets or {}, bool(examples),
    )  # fmt: skip
    text = make_card(entry).content
    known = _text(folder / 'README.md'), _json(folder / 'config.json')
    card = with_own_section(text, *known, where=str(folder / 'README.md'))
    config = {**entry.config, CARD_HASH: card_hash(card)}
    results = {'repo': repo, 'report': report.to_dict(), 'run': run, 'sha256': digest}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / 'config.json', json.dumps(config, indent=2) + '\n')
    write_atomically(folder / 'results.json', json.dumps(results, indent=1) + '\n')
    if entry.has_curves:
        draw_curves([report, *([twin] if twin else [])], folder / 'curves.svg')
    else:
        (folder / 'curves.svg').unlink(missing_ok=True)  # of an earlier report
    if examples:
        write_atomically(folder / EXAMPLES, Path(examples).read_bytes())
    else:
        (folder / EXAMPLES).unlink(missing_ok=True)
    write_atomically(folder / 'README.md', card)
    return Staged(repo, folder, weights)


def _check_repo(repo: str) -> None:
    validate_repo_id(repo)
    if repo.count('/') != 1:
        raise ValueError(f'repo must be NAMESPACE/NAME, got {repo!r}.')


def _plain(model: str, weights: Path, model_args: dict[str, Any]) -> Any:
    """The net to publish: twins of timm's architectures become timm's own."""
    net: Any = timm.create_model(model, checkpoint_path=str(weights), **model_args)
    architecture = net.pretrained_cfg['architecture']
    twin, _, tag = model.partition('.')
    if architecture == twin:
        return net
    hooked = {field.name for field in fields(BatchOutConfig)}
    own = {name: value for name, value in model_args.items() if name not in hooked}
    name = f'{architecture}.{tag}' if tag else architecture  # licence and preprocessing depend on the tag
    return timm.create_model(name, checkpoint_path=str(weights), **own)


def _config(net: Any, preprocessing: dict[str, Any], class_names: list[str], license: str) -> dict[str, Any]:
    """config.json as timm writes it, with the evaluated preprocessing and the classes of the training data."""
    mean, std = ([round(value, 6) for value in preprocessing[name]] for name in ('mean', 'std'))  # from float32
    data = {
        'input_size': tuple(preprocessing['input_size']),
        'mean': tuple(mean),
        'std': tuple(std),
        'crop_pct': preprocessing.get('crop_pct', 1.0),
        'crop_mode': 'center',
    }
    names = class_names if len(class_names) == net.num_classes else []
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'config.json'
        save_config_for_hf(net, str(path), model_config={'label_names': names}, data_config=data)
        config = json.loads(path.read_text())
    cfg = config['pretrained_cfg']
    for name in ('label_names', 'label_descriptions'):  # those of the architecture's original weights
        cfg.pop(name, None)
    cfg['license'] = license or cfg.get('license') or 'unknown'
    return config


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ''


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or contains something else."""
    try:
        content = json.loads(_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def push(staged: Staged, private: bool = False) -> list[str]:
    """Upload the files that differ from the Hub's in one commit, creating the repository if needed.

    The token comes from ``hf auth login`` or HF_TOKEN and is read only by huggingface_hub.

    Args:
        staged: The result of ``stage``.
        private: Create the repository as a private one.

    Returns:
        The uploaded files; empty if nothing has changed.

    Raises:
        ValueError: ``private`` for a repository that exists and is public.
        ConnectionError: The Hub does not answer.
        huggingface_hub.errors.HfHubHTTPError: No token, no write access, or others kept pushing.
    """
    try:
        return _push(HfApi(), staged, private)
    except HTTPError as error:  # the HTTP library's, which include the Hub's refusals
        if isinstance(error, HfHubHTTPError):
            error.args = tuple(redacted(str(argument)) for argument in error.args)
            raise
        reason = redacted(str(error))
        raise ConnectionError(f'The Hub does not answer, so {staged.repo} was not pushed: {reason}') from None


def _push(api: HfApi, staged: Staged, private: bool) -> list[str]:
    api.create_repo(staged.repo, private=private, exist_ok=True)
    for attempt in range(TRIES):
        info = api.model_info(staged.repo, files_metadata=True)
        if private and not info.private:
            raise ValueError(
                f'{staged.repo} already exists and is public, so nothing was pushed. --private is for new '
                'repositories. Make this one private in its settings on the Hub, or leave out --private.'
            )
        _keep_own_section(api, staged, info)
        changed = _changed(staged, info.siblings or [])
        if not changed:
            return []
        try:
            api.create_commit(
                staged.repo,
                [CommitOperationAdd(name, path) for name, path in changed.items()],
                commit_message=f'{staged.folder.name}: {", ".join(changed)}',
                parent_commit=info.sha,
            )
            return list(changed)
        except HfHubHTTPError as error:
            stale = error.response is not None and error.response.status_code == 412
            if not stale or attempt == TRIES - 1:
                raise
    raise AssertionError('unreachable')


def _keep_own_section(api: HfApi, staged: Staged, info: Any) -> None:
    """Copy the hand-written section of the card on the Hub.

    Raises:
        ValueError: That card was edited outside its hand-written section.
    """
    with TemporaryDirectory() as folder:
        for name in {'README.md', 'config.json'} & {file.rfilename for file in info.siblings or []}:
            api.hf_hub_download(staged.repo, name, revision=info.sha, local_dir=folder)
        card = staged.folder / 'README.md'
        remote, config = _text(Path(folder, 'README.md')), _json(Path(folder, 'config.json'))
        write_atomically(card, with_own_section(_text(card), remote, config, where=f'README.md of {staged.repo}'))


def _changed(staged: Staged, remote: Sequence[Any]) -> dict[str, Path]:
    """The files that differ from those on the Hub, which knows large ones by sha256 and others by git's hash."""
    known = {file.rfilename: file for file in remote}
    changed = {}
    for name, path in staged.files().items():
        there = known.get(name)
        content = path.read_bytes()
        if there is None:
            same = False
        elif there.lfs:
            same = there.lfs.sha256 == hashlib.sha256(content).hexdigest()
        else:
            same = there.blob_id == hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
        if not same:
            changed[name] = path
    return changed
