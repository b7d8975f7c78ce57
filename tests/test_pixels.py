"""Scores of nets whose right answer is known on paper."""

import pytest
import torch
from torch import nn

from timm_batchout.pixels import PixelModel, parse_epsilon
from timm_batchout.robustness.fgsm_scores import fgsm_scores


class Threshold(nn.Module):
    """Class 1 where the single pixel is above 0.5: an FGSM step of e fools every image closer to 0.5 than e."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        z = self.scale * (x.flatten(1) - 0.5)
        return torch.cat([-z, z], dim=1)


IMAGES = torch.linspace(0.05, 0.95, 10).view(10, 1, 1, 1)  # 0.05, 0.15, ..., 0.95
LABELS = (IMAGES.flatten() > 0.5).long()


def test_counts_of_a_linear_net():
    report = fgsm_scores(Threshold(), IMAGES, LABELS, [0.0, 0.1, '0.2', '1/2'], batch_size=3)
    assert report['n'] == 10
    assert report['clean'] == {'correct': 10, 'accuracy': 1.0}
    assert {eps: score['correct'] for eps, score in report['fgsm'].items()} == {'0.0': 10, '0.1': 8, '0.2': 6, '1/2': 0}
    assert report['zero_gradient_share'] == 0


def test_robust_means_right_before_and_after():
    """With the labels swapped every image is wrong at first; FGSM moves them further away, and none counts."""
    report = fgsm_scores(Threshold(), IMAGES, 1 - LABELS, [0.6])
    assert report['clean']['correct'] == 0 and report['fgsm']['0.6']['correct'] == 0


def test_vanished_gradients_are_counted():
    report = fgsm_scores(Threshold(scale=1e6), IMAGES, LABELS, [0.2])
    assert report['zero_gradient_share'] == 1
    assert report['fgsm']['0.2']['correct'] == 10, 'the attack did nothing, which is the point'


def test_uint8_images_and_mode():
    net = nn.Sequential(nn.Dropout(0.9), Threshold())
    net.train()
    pixels = (IMAGES * 255).round().to(torch.uint8)
    assert fgsm_scores(net, pixels, LABELS)['clean']['correct'] == 10, 'dropout was on'
    assert net.training
    assert not fgsm_scores(net.eval(), pixels, LABELS)['fgsm']
    assert not net.training


def test_pixel_model_normalises():
    net = Threshold()
    net.pretrained_cfg = {'mean': (0.5,), 'std': (0.25,)}
    x = torch.rand(4, 1, 1, 1)
    assert torch.equal(PixelModel(net)(x), net((x - 0.5) / 0.25))


@pytest.mark.parametrize('epsilon', [-0.1, 2, '8', 'a/b', '1/0', 'nan'])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match='epsilon'):
        parse_epsilon(epsilon)


def test_bad_images():
    with pytest.raises(ValueError, match=r'must lie in \[0, 1\], got \[0.1, 1.9\]'):
        fgsm_scores(Threshold(), IMAGES * 2, LABELS)
    with pytest.raises(ValueError, match='no images'):
        fgsm_scores(Threshold(), IMAGES[:0], LABELS[:0])
    with pytest.raises(ValueError, match='10 images, 9 labels'):
        fgsm_scores(Threshold(), IMAGES, LABELS[:9])
