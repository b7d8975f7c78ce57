"""Weights as timm's train.py, torch.save, DataParallel, torch.compile and Lightning leave them."""

import argparse
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_batchout.cli.main import main
from timm_batchout.zoo.checkpoint import load_checkpoint


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(3)
    return timm.create_model('test_resnet', num_classes=4)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def of_timm(state):
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    return {'epoch': 3, 'arch': 'x', 'args': argparse.Namespace(lr=1.0), 'state_dict': other, 'state_dict_ema': state}


@pytest.mark.parametrize(
    ('name', 'wrap'),
    [
        ('last.pth.tar', of_timm),
        ('plain.pth', dict),
        ('parallel.pth', lambda state: {'state_dict': prefixed(state, 'module.')}),
        ('compiled.pt', lambda state: prefixed(state, '_orig_mod.')),
        ('epoch=3.ckpt', lambda state: {'pytorch-lightning_version': '2.5', 'state_dict': prefixed(state, 'model.')}),
        ('both.ckpt', lambda state: {'state_dict': {**prefixed(state, 'net.'), 'loss.weight': torch.ones(3)}}),
    ],
)
def test_weights_are_found_where_programs_put_them(net, tmp_path, name, wrap):
    torch.save(wrap(net.state_dict()), tmp_path / name)
    model = timm.create_model('batchout_test_resnet', num_classes=4)
    load_checkpoint(model, tmp_path / name)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.state_dict().items())


class Runs:
    """Pickled, it asks for a command to be run."""

    def __reduce__(self):
        return os.system, ('touch RAN',)


def test_no_code_is_run_and_the_remedy_is_named(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': net.state_dict(), 'hook': Runs()}, 'evil.ckpt')
    with pytest.raises(ValueError, match=r'contains more than weights.*safetensors\.torch\.save_file'):
        load_checkpoint(net, 'evil.ckpt')
    assert not os.path.exists('RAN')


def test_files_that_do_not_fit(net, tmp_path, capsys):
    torch.save(net.state_dict(), tmp_path / 'whole.pth')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'whole.pth').read_bytes()[:500])
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save({'state_dict': {'fc.weight': torch.ones(2)}}, tmp_path / 'other.pth')
    save_file(net.state_dict(), tmp_path / 'four.safetensors')
    for name, message in (
        ('cut.pth', 'is damaged'),
        ('list.pth', 'contains no state_dict: got list'),
        ('other.pth', 'does not fit ResNet. Missing:'),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(net, tmp_path / name)
    command = ['evaluate', 'test_resnet', '--data.name', 'digits', '--checkpoint', str(tmp_path / 'four.safetensors')]
    assert main(command) == 2
    assert 'size mismatch' in (error := capsys.readouterr().err) and 'e.g. num_classes' in error
