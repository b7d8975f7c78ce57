"""One wrapper for everything that looks at a model from outside: [0, 1] images in, logits out."""

import torch
from torch import Tensor, nn

__all__ = ['PixelModel']


class PixelModel(nn.Module):
    """A model in eval mode with its normalisation inside.

    Args:
        model: Any classifier; ``pretrained_cfg`` gives mean and std where it has one. It is set to eval mode.

    Shape:
        Images (B, C, H, W), floating, in [0, 1] pixels; to float32 logits (B, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        self.register_buffer('mean', torch.tensor(cfg.get('mean', (0.0,))).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(cfg.get('std', (1.0,))).view(-1, 1, 1), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std).float()
