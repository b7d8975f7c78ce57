"""Trained weights from the files bundled with the package or from the Hugging Face Hub, both checked.

From the Hub only safetensors are read, all from one commit, and with the sha256 that config.json states: repositories
made by ``timm-batchout publish`` state the sha256 of their weights at its root.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = [
    'FOLDER',
    'NAMESPACE',
    'WEIGHTS',
    'bundled_cards',
    'check_weights',
    'fetch',
    'from_hub',
    'read_weights_card',
    'trusted',
]

NAMESPACE = os.environ.get('TIMM_BATCHOUT_HUB_NAMESPACE') or 'timm-batchout'
WEIGHTS = 'model.safetensors'
FOLDER = Path(__file__).parent / 'weights'  # bundled: NAME.safetensors, with training and report in NAME.json


def trusted(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Download (if needed) and check pretrained weights; returns the arguments for timm's ``build_model_with_cfg``.

    Raises:
        ValueError: See ``fetch`` and ``check_weights``.
    """
    from timm.models import resolve_pretrained_cfg

    kwargs = from_hub(variant, kwargs)
    sources = {key: kwargs.get(key) for key in ('pretrained_cfg', 'pretrained_cfg_overlay')}
    check_weights(resolve_pretrained_cfg(variant, **sources).file)
    return kwargs


def from_hub(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """If timm would read weights from the Hub, fetch them first and let it read that file instead.

    Args:
        variant: The architecture.
        kwargs: Arguments of timm's ``build_model_with_cfg``.

    Returns:
        ``kwargs``, with a ``pretrained_cfg_overlay`` that names the file; unchanged if the weights are elsewhere.

    Raises:
        ValueError: See ``fetch``.
    """
    from timm.models import resolve_pretrained_cfg  # here, because `timm-batchout list` answers without timm

    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    elsewhere = cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file))
    if elsewhere or not cfg.hf_hub_id:
        return kwargs
    # Other hints in config.json about where the weights are (another file name, custom code) are ignored.
    file = fetch(cfg.hf_hub_id, kwargs.get('cache_dir'), '' if cfg.source == 'hf-hub' else _packaged(cfg.hf_hub_id))
    source = {'file': str(file), 'source': None, 'hf_hub_filename': None, 'custom_load': False}
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, **source}}


def _packaged(hub_id: str) -> str:
    """The sha256 of the weights, known for this package's own models; '' for other repositories and revisions."""
    namespace, _, name = hub_id.partition('/')
    return bundled_cards().get(name, {}).get('sha256', '') if namespace == NAMESPACE else ''


def fetch(name: str, cache_dir: str | Path | None = None, packaged: str = '') -> Path:
    """The weights of a repository, downloaded once and checked every time.

    Args:
        name: 'namespace/name', or 'namespace/name@revision'.
        cache_dir: huggingface_hub's cache; None: its default.
        packaged: The sha256 that the weights must have, whatever their config.json says; '' if unknown.

    Raises:
        ValueError: The repository has no model.safetensors, or one that does not match its config.json or ``packaged``;
            a config.json that is damaged (it is deleted from the cache) or not a JSON object.
        ConnectionError: The Hub does not answer, and the cache does not have the weights.
        huggingface_hub.errors.HfHubHTTPError: The repository or revision does not exist or is not accessible.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = name.partition('@')
    config = _download(repo, 'config.json', revision or None, cache_dir)
    stated = _stated_sha256(name, config)
    try:
        weights = _download(repo, WEIGHTS, config.parent.name, cache_dir)  # the same commit, whoever pushes meanwhile
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise ValueError(
            f'{name} has no {WEIGHTS}. Other formats are not read, because pickles can run code.'
        ) from error
    actual = hashlib.sha256(weights.read_bytes()).hexdigest()
    for witness, expected in (('its config.json', stated), ('timm-batchout', packaged)):
        if expected and actual != expected:
            _delete(weights, config)  # the cache would return them again, and either may be the damaged one
            raise ValueError(
                f'{WEIGHTS} of {name} has the sha256 {actual[:12]}..., {witness} says {expected[:12]}.... It and its '
                'config.json were deleted from the cache. Try again; if the mismatch persists, do not trust this '
                'repository.'
            )
    return weights


def _stated_sha256(name: str, path: Path) -> str:
    """The sha256 in config.json, in lower case; '' if it has none.

    Raises:
        ValueError: The file is damaged (it is then deleted from the cache) or not a valid config.
    """
    content = path.read_bytes()
    blob = path.resolve().name  # the cache names a file by its etag: git's hash of the Hub's file
    damaged = len(blob) == 40 and blob != hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
    try:
        config = json.loads(content)
    except ValueError:
        damaged = True
    if damaged:
        _delete(path)
        raise ValueError(f'config.json of {name} was damaged. It was deleted from the cache: try again.')
    if not isinstance(config, dict):
        raise ValueError(
            f'config.json of {name} must be a JSON object, got {str(config)[:40]!r}. It is not a model of this package.'
        )
    sha256 = config.get('sha256') or ''
    if not isinstance(sha256, str):
        raise ValueError(f'sha256 in config.json of {name} must be a string, got {sha256!r}. Publish the model again.')
    return sha256.lower()


def _delete(*paths: Path) -> None:
    """Delete links and the blobs they point to."""
    for path in paths:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _download(repo: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not isinstance(try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision), str):
        try:  # once, because hf_hub_download retries a dead server for half a minute
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
        except HfHubHTTPError:
            raise
        except OfflineModeIsEnabled as error:
            raise ConnectionError(f'{repo} is not in the cache, and huggingface_hub is in offline mode.') from error
        except Exception as error:  # the HTTP library depends on the version of huggingface_hub
            raise ConnectionError(f'The Hub does not answer, and {repo} is not in the cache: {error}') from error
    return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))


def read_weights_card(name: str) -> dict[str, Any]:
    """The part of timm's pretrained cfg that comes from a bundled model's JSON: its weights and a line of provenance.

    Without the file (a slim installation) timm reads the weights from the Hub.
    """
    card_path = FOLDER / f'{name}.json'
    if not card_path.is_file():
        return {}
    card = json.loads(card_path.read_text())
    file = FOLDER / f'{name}.safetensors'
    return dict(
        file=str(file) if file.is_file() else None,
        hf_hub_id=f'{NAMESPACE}/{name}',
        notes=(f'Trained on {card["training"]["data"]}.',),
    )


def check_weights(file: str | None) -> None:
    """Check a bundled weights file against its JSON; other files are not checked.

    Raises:
        ValueError: The file is altered or missing.
    """
    if file is None or Path(file).parent != FOLDER:
        return
    path = Path(file)
    if not path.is_file():
        raise ValueError(f'{path.name} is missing. Reinstall timm-batchout.')
    expected = json.loads(path.with_suffix('.json').read_text())['sha256']
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f'{path.name} is damaged: its sha256 is {actual[:12]}..., its JSON says {expected[:12]}.... '
            'Reinstall timm-batchout.'
        )


def bundled_cards() -> dict[str, dict[str, Any]]:
    """The JSON of every bundled model, by 'arch.tag': model, tag, sha256, training (the run's result), report."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob('*.json'))}
