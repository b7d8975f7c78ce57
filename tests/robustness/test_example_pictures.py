"""Pictures of adversarial images show what the model saw."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from timm_batchout.cli.main import main
from timm_batchout.data.images import Split
from timm_batchout.robustness import examples


class Brightness(nn.Module):
    """Bright images are of class 1; what moves one over the border is known."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1) * 100


def test_the_picture_shows_the_images_within_the_radius_and_who_is_fooled(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        examples, '_draw', lambda *args: seen.update(zip(('rows', 'before', 'after'), args[:3], strict=True))
    )
    levels = torch.tensor([0.2, 0.45, 0.55, 0.8, 0.9])
    images = (levels.view(-1, 1, 1, 1).expand(5, 1, 4, 4) * 255).to(torch.uint8)
    labels = torch.tensor([0, 0, 1, 1, 0])  # the last one is wrong from the start
    examples.draw_examples(Brightness(), Split(images, labels, ('dark', 'bright')), 0.1, tmp_path / 'x.png')
    clean, magnified, attacked = seen['rows']
    assert len(clean) == 4, 'only those that are classified right'
    assert ((attacked - clean).abs() <= 0.1 + 1e-6).all() and 0 <= magnified.min() <= magnified.max() <= 1
    near = (clean.flatten(1).mean(1) - 0.5).abs() < 0.1
    assert near.sum() == 2
    assert torch.equal(seen['before'].argmax(1) != seen['after'].argmax(1), near)
    with pytest.raises(ValueError, match='None of 1 images is classified correctly'):
        examples.draw_examples(Brightness(), Split(images[4:], labels[4:]), 0.1, tmp_path / 'x.png')


def test_evaluate_draws_them(tmp_path, capsys):
    command = ['evaluate', 'mnist_cnn', '--data.name', 'digits', '--images', '60', '--audit', 'false']
    command += ['--attacks', '[]']
    picture = tmp_path / 'new' / 'grid.png'
    assert main([*command, '--eps', '0.1', '0.3', '--examples', str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.width > 1000 and image.height > 500
        red = (np.asarray(image.convert('RGB')) == (214, 39, 40)).all(2)
        assert red.sum() > 1000, 'an undefended net is fooled at 0.3'
    assert main([*command, '--eps', '0', '--examples', str(picture)]) == 2
    assert 'must be above 0' in capsys.readouterr().err
