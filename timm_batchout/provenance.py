"""The provenance that every result file records, and atomic writes."""

import os
import platform
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads and writes results without torch
    import torch

__all__ = ['environment', 'free_space', 'write_atomically']

PACKAGES = ('timm-batchout', 'torch', 'timm', 'accelerate')


def environment(device: 'torch.device | str' = 'cpu', packages: Iterable[str] = ()) -> dict[str, Any]:
    """Versions and hardware for a result file, including the versions of ``packages``."""
    import torch

    device = torch.device(device)
    hardware = torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()
    return {
        'python': platform.python_version(),
        **{name: _version(name) for name in (*PACKAGES, *packages)},
        'device': device.type,
        'hardware': hardware,
        'cpu_threads': torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's model name, where Linux reports it, and its widest vector unit."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        pass
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file, then rename it: readers see the old content or the new. A failure leaves no file."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def free_space(error: Exception, folder: Path) -> str:
    """A failed write in words, with the free space: torch and safetensors do not say that a disk is full."""
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f'{first_line} ({shutil.disk_usage(folder).free / 2**20:.1f} MiB are free)'
