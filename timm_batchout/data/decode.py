"""Decoded pictures to eight bits per channel."""

from typing import Any

import numpy as np

__all__ = ['is_class', 'to_mode']


def to_mode(image: Any, mode: str) -> Any:
    """Convert a PIL image; 16-bit greyscale is scaled to 8 bits, whereas Pillow's ``convert`` clips it at 255.

    Args:
        image: As opened by Pillow.
        mode: 'RGB' or 'L'; empty: unchanged.

    Raises:
        OSError: Its pixels do not decode.
    """
    if not mode:
        return image
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):  # 'I' in older Pillows
        from PIL import Image

        levels = np.asarray(image).astype(np.float32)
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    return image.convert(mode)


def is_class(folder: str) -> bool:
    """Whether a folder is a class, and not one that tools leave behind (.ipynb_checkpoints, __MACOSX)."""
    return not folder.startswith('.') and folder != '__MACOSX'
