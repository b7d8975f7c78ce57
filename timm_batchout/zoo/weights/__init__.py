"""The bundled weights: one safetensors file per model and tag, and the JSON that its training run wrote."""

import hashlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def read_weights_card(name: str) -> dict[str, Any]:
    """What timm's pretrained cfg takes from a bundled model's JSON: the weights file and a line of provenance.

    Without the file (a slim installation) timm reads the weights from the Hub.
    """
    card_path = FOLDER / f'{name}.json'
    if not card_path.is_file():
        return {}
    card = json.loads(card_path.read_text())
    file = FOLDER / f'{name}.safetensors'
    return dict(file=str(file) if file.is_file() else None, notes=(f'Trained on {card["data"]}.',))


def check_weights(file: str | None) -> None:
    """Raise unless ``file``, where it is one of the bundled weights files, is the one that its JSON describes.

    Raises:
        ValueError: An altered or missing weights file.
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
    """The JSON of every bundled model, by 'arch.tag'."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob('*.json'))}


def table(cards: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of bundled models: clean test accuracy, and FGSM robust accuracy at every epsilon measured."""
    lines = []
    header: list[str] = []
    # By data set; within it the plain nets first.
    order = sorted(cards, key=lambda name: (cards[name]['data'], name.startswith('batchout_'), name))
    for name in order:
        card = cards[name]
        epsilons = list(card['test']['fgsm'])
        if epsilons != header:
            header = epsilons
            columns = [f'{card["data"]}, n = {card["test"]["n"]}', 'clean', *(f'FGSM {epsilon}' for epsilon in header)]
            lines += ['', f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
        scores = [card['test']['clean'], *card['test']['fgsm'].values()]
        percents = ' | '.join(f'{100 * score["accuracy"]:.2f}' for score in scores)
        lines.append(f'| `{name}` | {percents} |')
    return '\n'.join(lines).strip()
