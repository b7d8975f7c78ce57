"""Round a run's weights to half precision, half the bytes: ``python recipes/paper/half.py runs/net/model.safetensors``.

Beside it, ``half.safetensors`` is then what is evaluated and bundled: what a user loads is what was measured.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    path = Path(sys.argv[1])
    weights = load_file(path)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    too_large = [name for name, tensor in half.items() if not torch.isfinite(tensor).all()]
    if too_large:
        raise SystemExit(f'error: {", ".join(too_large)}: numbers that half precision does not hold.')
    save_file(half, path.with_name('half.safetensors'))


if __name__ == '__main__':
    main()
