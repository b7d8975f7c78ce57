"""Finished parts of an evaluation on disk, so that it can be interrupted, and processes can share the work."""

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
    """The chunks of one evaluation in a folder of their own, each sealed with a hash.

    Args:
        folder: Where to keep them; None: in memory only.
        resume: Reuse the chunks of an interrupted evaluation; False: remove them at the start.

    Attributes:
        store: The folder of the opened evaluation.
    """

    def __init__(self, folder: Path | None = None, resume: bool = True):
        self.folder = folder
        self.resume = resume
        self.store: Path | None = None

    def open(self, key: list[Any]) -> None:
        """Open the evaluation with this key, which contains everything that decides the content of its chunks."""
        if self.folder:
            self.store = self.folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def saved(self, name: str, images: str, measure: Callable[[], Chunk]) -> Chunk:
        """The chunk of this name if it exists, is intact and belongs to these images (their hash); else measure it."""
        path = self.store / f'{name}.json' if self.store else None
        found = _read(path, images) if path else None
        if found is not None:
            return found
        chunk = json.loads(json.dumps(measure()))  # exactly as it will be read
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({'sha256': _seal(images, chunk), 'records': chunk}))
        return chunk

    def discard(self) -> None:
        """Remove the chunks of the opened evaluation, and the folders if they are then empty."""
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
