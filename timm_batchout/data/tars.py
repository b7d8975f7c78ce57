"""Tar files of images, checked to their end: Python's tarfile takes a damaged header, or a cut, for the end."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['content', 'whole_tar']

LARGEST_FILE = 64 * 2**20  # bytes of an image, because a small archive may claim any size


class _Member(tarfile.TarInfo):
    """Remembers why the archive ended."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> '_Member':
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ended = error  # type: ignore[attr-defined]
            raise


@contextmanager
def whole_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """An open tar file. All of its members must be iterated over inside.

    Raises:
        ValueError: On leaving: the file is not a tar, is damaged, or lacks its end.
    """
    count = 0
    try:
        with tarfile.open(path, tarinfo=_Member) as tar:
            yield tar
            count = len(tar.getmembers())
            if not isinstance(getattr(tar, 'ended', None), tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise ValueError(
                    f'{str(path)!r} (data.root) is truncated or damaged after {count} members. Copy it again.'
                )
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f'{str(path)!r} (data.root) is not a complete tar file: {error}. Copy it again.') from error


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    """The bytes of a member; or, as text, the reason why it has none."""
    if member.size > LARGEST_FILE:
        return f'it has {member.size / 2**20:.0f} MiB'
    try:
        file = tar.extractfile(member)
    except (KeyError, RecursionError):
        return f'it is a link to {member.linkname!r}, which is not in the archive'
    return file.read(LARGEST_FILE) if file else 'not a regular file'
