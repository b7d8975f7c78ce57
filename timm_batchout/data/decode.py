"""From a decoded picture to eight bits per channel."""

from typing import Any

import numpy as np

__all__ = ['is_class', 'to_mode']


def to_mode(image: Any, mode: str) -> Any:
    """A PIL image in another mode; 16-bit greyscale is scaled to 8 bits, where Pillow's ``convert`` clips at 255.

    Args:
        image: As Pillow opened it.
        mode: 'RGB' or 'L'; empty: as it is.

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
    """Folders that tools leave behind (.ipynb_checkpoints, __MACOSX) hold no class."""
    return not folder.startswith('.') and folder != '__MACOSX'
