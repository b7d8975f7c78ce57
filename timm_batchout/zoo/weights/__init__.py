"""The bundled weights: one safetensors file per model and tag, and the JSON that its training run wrote."""

import hashlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def read_weights_card(name: str) -> dict[str, Any]:
    """What timm's pretrained cfg takes from a bundled model's JSON: the weights file and a line of provenance.

    A card without weights file still registers: the error comes when the weights are asked for.
    """
    card_path = FOLDER / f'{name}.json'
    if not card_path.is_file():
        return {}
    card = json.loads(card_path.read_text())
    return dict(file=str(FOLDER / f'{name}.safetensors'), notes=(f'Trained on {card["data"]}.',))


def check_weights(file: str | None) -> None:
    """Raise unless ``file``, where it is one of the bundled weights files, is the one that its JSON describes.

    Raises:
        ValueError: Missing or altered weights file.
    """
    if file is None or Path(file).parent != FOLDER:
        return
    path = Path(file)
    if not path.is_file():
        raise ValueError(f'{path.name} is missing from the installed package. Reinstall timm-batchout.')
    expected = json.loads(path.with_suffix('.json').read_text())['sha256']
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f'{path.name} is damaged: its sha256 is {actual[:12]}..., its JSON says {expected[:12]}.... '
            'Reinstall timm-batchout.'
        )
