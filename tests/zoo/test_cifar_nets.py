"""The CIFAR ResNets keep timm's contract at 32x32 and have a BatchOut twin."""

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock

import timm_batchout


@pytest.mark.parametrize(('name', 'parameters'), [('resnet18_cifar', 11_173_962), ('resnet18_cifar_w32', 2_797_610)])
def test_size_and_resolution(name, parameters):
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.forward_features(torch.rand(2, 3, 32, 32)).shape[2:] == (4, 4)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_is_the_net_of_the_literature_layer_by_layer():
    """A literal version of the net that robustness papers call ResNet-18 on CIFAR-10, with the same weights."""
    model = timm.create_model('resnet18_cifar', width=8).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # else the zero-initialised ones hide every second convolution
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.uniform_(module.bias)

    def block(module, x):
        assert isinstance(module, BasicBlock)
        out = torch.relu(module.bn1(module.conv1(x)))
        out = module.bn2(module.conv2(out))
        return torch.relu(out + (module.downsample(x) if module.downsample else x))

    x = torch.rand(2, 3, 32, 32)
    y = torch.relu(model.bn1(torch.conv2d(x, model.conv1.weight, padding=1)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for module in stage:
            y = block(module, y)
    torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))))


def test_feature_maps_say_their_resolution():
    model = timm.create_model('resnet18_cifar_w32', features_only=True).eval()
    maps = model(torch.rand(1, 3, 32, 32))
    assert [(m.shape[1], 32 // m.shape[2]) for m in maps] == list(
        zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    )


def test_options_of_timm():
    model = timm.create_model('resnet18_cifar', width=8, num_classes=3, in_chans=1, drop_path_rate=0.1)
    model.reset_classifier(5)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match='even number of channels'):
        timm.create_model('resnet18_cifar', width=7)


def test_twin_shares_every_weight():
    plain = timm.create_model('resnet18_cifar', width=8).eval()
    twin = timm.create_model('batchout_resnet18_cifar', width=8).eval()
    twin.load_state_dict(plain.state_dict())
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(twin(x), plain(x))
    assert len(timm_batchout.batchout_sites(twin)) == 1 + 2 * 8
    assert not torch.equal(twin.train()(x), plain.train()(x))
