"""Weights from the Hugging Face Hub: safetensors and nothing else, of one commit, with the sha256 of its config.json.

A repository that ``timm-batchout publish`` made states the sha256 of its weights at the root of config.json.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from timm.models import resolve_pretrained_cfg

__all__ = ['NAMESPACE', 'WEIGHTS', 'fetch', 'from_hub']

NAMESPACE = os.environ.get('TIMM_BATCHOUT_HUB_NAMESPACE') or 'timm-batchout'
WEIGHTS = 'model.safetensors'


def from_hub(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where timm would read weights from the Hub, fetch them first and have it read that file instead.

    Args:
        variant: The architecture.
        kwargs: Arguments of timm's ``build_model_with_cfg``.

    Returns:
        ``kwargs``, with a ``pretrained_cfg_overlay`` that names the file, or as they are if the weights are elsewhere.

    Raises:
        ValueError: See ``fetch``.
    """
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    elsewhere = cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file))
    if elsewhere or not cfg.hf_hub_id:
        return kwargs
    # What else a config.json may say of where its weights are (another file name, custom code) is not followed.
    file = fetch(cfg.hf_hub_id, kwargs.get('cache_dir'))
    source = {'file': str(file), 'source': None, 'hf_hub_filename': None, 'custom_load': False}
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, **source}}


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """The weights of a repository, downloaded once and checked every time.

    Args:
        name: 'namespace/name', or 'namespace/name@revision'.
        cache_dir: huggingface_hub's cache; None: its default.

    Raises:
        ValueError: The repository has no model.safetensors, or one that is not what its config.json says.
        ConnectionError: The Hub does not answer, and the cache does not have the weights.
        huggingface_hub.errors.HfHubHTTPError: No such repository or revision, or no access to it.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = name.partition('@')
    config = _download(repo, 'config.json', revision or None, cache_dir)
    try:
        weights = _download(repo, WEIGHTS, config.parent.name, cache_dir)  # the same commit, whoever pushes meanwhile
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise ValueError(f'{name} holds no {WEIGHTS}; other formats are not read: pickles can run code.') from error
    expected = json.loads(config.read_text()).get('sha256')
    actual = hashlib.sha256(weights.read_bytes()).hexdigest()
    if expected and actual != expected:
        weights.resolve().unlink()  # else the cache would hand it out again
        weights.unlink(missing_ok=True)
        raise ValueError(
            f'{WEIGHTS} of {name} has the sha256 {actual[:12]}..., its config.json says {expected[:12]}.... It was '
            'deleted from the cache. Try again; if it stays so, do not trust this repository.'
        )
    return weights


def _download(repo: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not isinstance(try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision), str):
        try:  # once: hf_hub_download would try a dead server for half a minute
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
        except HfHubHTTPError:
            raise
        except OfflineModeIsEnabled as error:
            raise ConnectionError(f'{repo} is not in the cache, and huggingface_hub is set to be offline.') from error
        except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
            raise ConnectionError(f'The Hub does not answer, and {repo} is not in the cache: {error}') from error
    return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
