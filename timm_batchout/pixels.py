"""One wrapper for all that feeds images to a model: [0, 1] pixels in, logits out."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['PixelModel']


class PixelModel(nn.Module):
    """A model in eval mode with its normalisation inside.

    Args:
        model: Any classifier. It is set to eval mode; a training loop sets the mode that it needs.
        cfg: Gives ``mean`` and ``std`` per channel; None: the model's ``pretrained_cfg``, where it has one.

    Shape:
        Images (B, C, H, W), floating, in [0, 1] pixels; to float32 logits (B, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, cfg: dict[str, Any] | None = None):
        super().__init__()
        self.model = model
        cfg = cfg or getattr(model, 'pretrained_cfg', None) or {}
        self.register_buffer('mean', torch.tensor(cfg.get('mean', (0.0,))).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(cfg.get('std', (1.0,))).view(-1, 1, 1), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std).float()
