"""Scores of nets whose right answer is known on paper."""

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_batchout.pixels import PixelModel, normalization
from timm_batchout.robustness.harness import evaluate
from timm_batchout.text import format_radius, parse_radius


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


def correct(report):
    return {score.radius: score.correct for score in report.scores}


def test_counts_of_a_linear_net():
    report = evaluate(Threshold(), IMAGES, LABELS, ['fgsm'], [0.0, 0.1, '0.2', '1/2'], batch_size=3)
    assert report.n == 10
    assert correct(report) == {None: 10, 0.0: 10, 0.1: 8, 0.2: 6, 0.5: 0}


def test_robust_means_right_before_and_after():
    """With the labels swapped every image is wrong at first; FGSM moves them further away, and none counts."""
    report = evaluate(Threshold(), IMAGES, 1 - LABELS, ['fgsm'], [0.6])
    assert correct(report) == {None: 0, 0.6: 0}


def test_vanished_gradients_leave_every_image_right():
    report = evaluate(Threshold(scale=1e6), IMAGES, LABELS, ['fgsm'], [0.2])
    assert report.score('fgsm', 0.2).correct == 10, 'the attack did nothing, which is the point'


def test_uint8_images_and_mode():
    net = nn.Sequential(nn.Dropout(0.9), Threshold())
    net.train()
    pixels = (IMAGES * 255).round().to(torch.uint8)
    assert evaluate(net, pixels, LABELS, []).score('clean').correct == 10, 'dropout was on'
    assert net.training
    assert [score.attack for score in evaluate(net.eval(), pixels, LABELS, []).scores] == ['clean']
    assert not net.training


@pytest.mark.parametrize(
    ('radius', 'text'), [(0.3, '0.3'), (8 / 255, '8/255'), (0.05, '0.05'), (0, '0'), (1, '1'), (0.1234567, '0.123457')]
)
def test_radius_as_people_write_it(radius, text):
    assert format_radius(radius) == text


def test_pixel_model_normalises():
    net = Threshold()
    net.pretrained_cfg = {'mean': (0.5,), 'std': (0.25,)}
    x = torch.rand(4, 1, 1, 1)
    assert torch.equal(PixelModel(net)(x), net((x - 0.5) / 0.25))


@pytest.mark.parametrize('epsilon', [-0.1, 2, '8', 'a/b', '1/0', 'nan'])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match='epsilon'):
        parse_radius(epsilon)


@pytest.mark.parametrize(
    'wrap', [nn.DataParallel, ModelEmaV3, AveragedModel, lambda m: nn.DataParallel(AveragedModel(m))]
)
def test_normalisation_is_found_inside_wrappers(wrap):
    net = timm.create_model('test_resnet')
    assert normalization(wrap(net)) == normalization(net) == (net.pretrained_cfg['mean'], net.pretrained_cfg['std'])


def test_a_net_that_states_no_normalisation_takes_plain_pixels():
    assert normalization(Threshold()) == ((0.0,), (1.0,))
