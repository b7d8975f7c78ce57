"""Pictures of more than eight bits, as both readers of image folders see them."""

import numpy as np
import pytest
from PIL import Image

from timm_batchout.data.config import DataConfig
from timm_batchout.data.decode import to_mode
from timm_batchout.data.memory import load_split
from timm_batchout.data.timm_splits import TimmSplit
from timm_batchout.data.workers import TimmLoader

LEVELS = {'dark': 2_000, 'light': 40_000}  # Pillow's own conversion makes 255 of both


@pytest.fixture
def folder(tmp_path):
    for part in ('train', 'test'):
        for name, level in LEVELS.items():
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / part / name / '0.png')
    return tmp_path


def test_16_bit_greyscale_is_scaled_to_8_bits_in_memory(folder):
    split = load_split(DataConfig('image_folder', root=str(folder)), train=True)
    assert split.images.flatten(1).unique(dim=1).tolist() == [[8], [156]]


@pytest.mark.parametrize(('channels', 'mode'), [(1, 'L'), (3, 'RGB')])
def test_16_bit_greyscale_is_scaled_to_8_bits_by_workers(folder, channels, mode):
    config = DataConfig('timm', root=str(folder), dataset='folder', workers=0)
    cfg = {'input_size': (channels, 8, 8), 'interpolation': 'bilinear', 'crop_pct': 1.0, 'crop_mode': 'center'}
    ((images, labels),) = TimmLoader(TimmSplit(config, 'train'), 2, cfg, 2)
    assert (images * 255).round().flatten(1).unique(dim=1).tolist() == [[8], [156]] and labels.tolist() == [0, 1]
    assert images.shape[1] == channels


def test_other_modes_are_pillows():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert np.array_equal(to_mode(image, 'RGB'), image.convert('RGB')) and to_mode(image, '') is image
