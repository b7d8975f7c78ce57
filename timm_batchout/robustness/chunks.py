"""Finished parts of an evaluation on disk, so that a broken-off one goes on, and processes share their work."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_batchout.provenance import write_atomically

__all__ = ['Chunk', 'Chunks']

Chunk = list[dict[str, Any]]  # JSON: a record for each variant of an attack


class Chunks:
    """Chunks of one evaluation, in a folder of their own; each is sealed by a hash.

    Args:
        folder: Where to keep them; None: nowhere.
        resume: Take what an interrupted evaluation left there; False: remove it when this one begins.

    Attributes:
        store: The folder of the evaluation that was opened.
    """

    def __init__(self, folder: Path | None = None, resume: bool = True):
        self.folder = folder
        self.resume = resume
        self.store: Path | None = None

    def open(self, key: list[Any]) -> None:
        """Go on with the evaluation that this key stands for: all that decides what its chunks hold."""
        if self.folder:
            self.store = self.folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def saved(self, name: str, images: str, measure: Callable[[], Chunk]) -> Chunk:
        """The chunk of this name, if it is there, whole, and of these images (their hash); else it is measured."""
        path = self.store / f'{name}.json' if self.store else None
        found = _read(path, images) if path else None
        if found is not None:
            return found
        chunk = json.loads(json.dumps(measure()))  # as it would be read
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({'sha256': _seal(images, chunk), 'records': chunk}))
        return chunk

    def discard(self) -> None:
        """Remove the chunks of the opened evaluation, and nothing else; the folders, too, if they are empty then."""
        if not self.store or not self.folder or not self.store.is_dir() or self.folder.is_symlink():
            return
        for path in self.store.iterdir():
            if re.fullmatch(r'\w+_\d{7}\.json', path.name):
                path.unlink()
        for folder in (self.store, self.folder):
            if not any(folder.iterdir()):
                folder.rmdir()


def _read(path: Path, images: str) -> Chunk | None:
    try:
        content = json.loads(path.read_bytes())
        return content['records'] if content['sha256'] == _seal(images, content['records']) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _seal(images: str, chunk: Chunk) -> str:
    return hashlib.sha256(json.dumps([images, chunk]).encode()).hexdigest()
