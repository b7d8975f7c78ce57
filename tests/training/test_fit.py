"""Before anything is written: does the model take these images, and does a step of training work?"""

import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import register_model
from torch import nn

from timm_batchout.cli.main import main
from timm_batchout.data.images import laid_out
from timm_batchout.training.launch import _try_a_step

DIGITS = ['--data.name', 'digits', '--epochs', '1', '--schedule.warmup_epochs', '0']


class ViewNet(nn.Module):
    """As people write them: ``.view`` on features."""

    def __init__(self, in_chans=1, num_classes=10):
        super().__init__()
        self.num_classes = num_classes
        self.features = nn.Sequential(nn.Conv2d(in_chans, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.head = nn.Linear(8 * 36, num_classes)
        cfg = dict(architecture='view_net', input_size=(in_chans, 28, 28), mean=(0.0,), std=(1.0,))
        self.pretrained_cfg = cfg

    def forward(self, x):
        x = self.features(x)
        return self.head(x.view(x.shape[0], -1))


@pytest.fixture(scope='module', autouse=True)
def view_net():
    module = types.ModuleType('somebody.nets')
    sys.modules[module.__name__] = module

    def view_net(pretrained=False, **kwargs):
        kwargs.pop('cache_dir', None)
        return ViewNet(**{key: value for key, value in kwargs.items() if key in ('in_chans', 'num_classes')})

    view_net.__module__ = module.__name__
    register_model(view_net)


def test_view_on_features_is_found_before_anything_is_written_and_the_remedy_works(tmp_path, capsys):
    command = ['train', 'view_net', *DIGITS, '--output', str(tmp_path / 'run')]
    assert main(command) == 2
    assert 'uses .view on features' in (error := capsys.readouterr().err) and 'channels_last to false' in error
    assert not (tmp_path / 'run').exists()
    for more in ([], ['--augment.padding', '2', '--resume', 'auto']):
        assert main([*command, '--channels_last', 'false', *more]) == 0
        command[-1] = str(tmp_path / 'other')


def test_images_of_one_channel_have_the_strides_of_their_layout():
    images = torch.rand(2, 5, 5, 1).permute(0, 3, 1, 2)
    assert images.is_contiguous() and laid_out(images, False).stride() == (25, 25, 5, 1) != images.stride()
    assert torch.equal(laid_out(images, False), images)
    assert laid_out(torch.rand(2, 3, 5, 5), True).stride() == (75, 1, 15, 3)


def test_the_step_that_is_tried_changes_nothing():
    model = timm.create_model('batchout_test_resnet')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    _try_a_step(model, nn.Sequential(model), images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ('arguments', 'remedy'),
    [
        (['--data.image_size', '96'], ['--data.image_size', '224']),
        (['--model_args', '{img_size: 128, num_classes: 2}'], ['--data.image_size', '128']),
        (['--data.image_size', '96'], ['--model_args', '{img_size: 96, num_classes: 2}']),
    ],
)
def test_the_remedy_for_an_input_size_works(tmp_path, capsys, arguments, remedy):
    for part in ('train', 'validation'):
        for label in 'ab':
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(5):
                Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(tmp_path / part / label / f'{i}.png')
    assert timm.create_model('vit_tiny_patch16_224').pretrained_cfg['input_size'] == (3, 224, 224)
    command = [
        'train',
        'batchout_vit_tiny_patch16_224',
        '--data.name',
        'timm',
        '--data.root',
        str(tmp_path),
        '--data.workers',
        '0',
    ]
    command += ['--batch_size', '4', '--dry-run', *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    name, value = remedy[0].removeprefix('--'), remedy[1]
    assert (f'{name}={value}' if 'img_size' in arguments[-1] else name.removesuffix('_args')) in error
    assert main([*command, *remedy]) == 0
