"""The paper's nets keep timm's model contract, and the appendix's numbers."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import nn

import timm_batchout  # noqa: F401
from timm_batchout import batchout_sites
from timm_batchout.zoo import pretrained as weights

PLAIN = ['mnist_cnn', 'cifar_vgg']
NAMES = PLAIN + [f'batchout_{name}' for name in PLAIN]
BUNDLED = [
    'batchout_cifar_vgg.cifar10',
    'batchout_mnist_cnn.mnist',
    'cifar_vgg.baseline_cifar10',
    'cifar_vgg.fgsm_at_cifar10',
    'cifar_vgg.pgd_at_cifar10',
    'mnist_cnn.baseline_mnist',
    'mnist_cnn.fgsm_at_mnist',
    'mnist_cnn.pgd_at_mnist',
    'resnet18_cifar_w32.baseline_cifar10',
    'resnet18_cifar_w32.batchout_cifar10',
    'resnet18_cifar_w32.trades_cifar10',
]


def images(model, batch=2):
    return torch.rand(batch, *model.pretrained_cfg['input_size'])


def logits(model, x, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(x)


def layers(name):
    """The net as one line per layer of the appendix's tables."""
    model = timm.create_model(name)
    sites = batchout_sites(model)
    lines = []

    def record(module_name, module):
        def hook(module, args, out):
            if module_name in sites:
                lines.append(f'BatchOut {sites[module_name].k} {sites[module_name].eta}')
            if isinstance(module, nn.Conv2d):
                lines.append(f'Conv {module.kernel_size[0]} {module.out_channels} {module.stride[0]}')
            elif isinstance(module, nn.Linear):
                lines.append(f'FC {module.out_features}')
            elif isinstance(module, nn.Dropout):
                lines.append(f'Dropout {module.p}')
            else:
                lines.append(type(module).__name__)

        return hook

    for module_name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Flatten):
            module.register_forward_hook(record(module_name, module))
    model(images(model))
    return lines


def test_mnist_net_is_table_1():
    assert layers('batchout_mnist_cnn') == [
        'Conv 5 32 1', 'BatchOut 0.5 0.05', 'ReLU', 'MaxPool2d',
        'Conv 5 32 1', 'BatchOut 0.5 0.1', 'ReLU', 'MaxPool2d', 'Dropout 0.5',
        'FC 256', 'BatchOut 0.5 0.1', 'ReLU', 'Dropout 0.5', 'FC 10',
    ]  # fmt: skip


def test_cifar_net_is_table_2():
    low, high = 'BatchOut 0.5 (0.0, 0.1)', 'BatchOut 0.5 (0.0, 0.15)'
    assert layers('batchout_cifar_vgg') == [
        'Conv 3 32 1', low, 'ReLU', 'Conv 3 64 1', low, 'ReLU', 'MaxPool2d',
        'Conv 3 64 1', low, 'ReLU', 'Conv 3 64 1', low, 'ReLU', 'Conv 3 64 1', high, 'ReLU', 'MaxPool2d',
        'Dropout 0.5', 'FC 512', high, 'ReLU', 'FC 512', high, 'ReLU', 'Dropout 0.5', 'FC 10',
    ]  # fmt: skip


@pytest.mark.parametrize('name', PLAIN)
def test_plain_net_is_the_twin_without_batchout(name):
    assert [line for line in layers(f'batchout_{name}') if not line.startswith('BatchOut')] == layers(name)
    plain, twin = timm.create_model(name), timm.create_model(f'batchout_{name}')
    assert batchout_sites(plain) == {}
    assert list(plain.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(plain.state_dict())
    x = images(plain, 8)
    assert torch.equal(logits(plain.eval(), x), logits(twin.eval(), x))
    assert not torch.equal(logits(plain.train(), x), logits(twin.train(), x))


def test_listed_by_timm():
    assert set(NAMES) <= set(timm.list_models())
    assert {'batchout_mnist_cnn', 'batchout_cifar_vgg'} <= set(timm.list_models('batchout_*'))
    assert set(BUNDLED) <= set(timm.list_pretrained())


def test_overrides():
    model = timm.create_model('batchout_cifar_vgg', k=0.3, eta=0.2)
    assert {(s.k, s.eta) for s in batchout_sites(model).values()} == {(0.3, 0.2)}
    assert len(batchout_sites(model)) == 7
    model = timm.create_model('batchout_cifar_vgg', eta={'pre_logits.*': 0.4}, noise='gaussian', stop_gradient=False)
    assert {n: s.eta for n, s in batchout_sites(model).items()} == {'pre_logits.act1': 0.4, 'pre_logits.act2': 0.4}
    layer = batchout_sites(model)['pre_logits.act1']
    assert (layer.noise, layer.stop_gradient) == ('gaussian', False)
    with pytest.raises(ValueError, match='matches no site'):
        timm.create_model('batchout_cifar_vgg', eta={'blocks.*': 0.1})
    with pytest.raises(ValueError, match='k is the share'):
        timm.create_model('batchout_cifar_vgg', k=2)


@pytest.mark.parametrize('name', NAMES)
def test_head_and_pooling(name):
    model = timm.create_model(name, num_classes=7, in_chans=2, img_size=(40, 24)).eval()
    assert model.num_classes == 7
    x = torch.rand(3, 2, 40, 24)
    assert model(x).shape == (3, 7)
    features = model.forward_features(x)
    assert features.shape == (3, model.num_features, 10, 6)
    assert model.forward_head(features, pre_logits=True).shape == (3, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(x).shape == (3, model.head_hidden_size)
    model.reset_classifier(5, 'avg')
    assert model(x).shape == (3, 5)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match='Create a new one'):
        model.reset_classifier(5, 'avg')
    assert timm.create_model(name, drop_rate=0.1).drop.p == 0.1


@pytest.mark.parametrize('name', ['batchout_mnist_cnn', 'batchout_cifar_vgg'])
def test_a_new_pool_keeps_batchout_before_the_fully_connected_layers(name):
    model = timm.create_model(name)
    before = {site: layer.eta for site, layer in batchout_sites(model).items()}
    model.reset_classifier(4, 'avg')
    assert {site: layer.eta for site, layer in batchout_sites(model).items()} == before


@pytest.mark.parametrize('name', NAMES)
def test_features(name):
    model = timm.create_model(name).eval()
    x = images(model)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    expected = [(info['num_chs'], x.shape[-1] // info['reduction']) for info in model.feature_info]
    assert [(m.shape[1], m.shape[2]) for m in maps] == expected
    assert torch.equal(maps[-1], final)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert len(early) == 1 and torch.equal(early[0], maps[0])

    torch.manual_seed(0)
    reference = timm.create_model(name).eval()
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, out_indices=(0, 1)).eval()
    found = extractor(x)
    expected = reference.forward_intermediates(x, intermediates_only=True)[:2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert extractor.feature_info.channels() == [m.shape[1] for m in found]
    assert bool(batchout_sites(extractor)) == name.startswith('batchout')
    with pytest.raises(ValueError, match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('name', NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = timm.create_model(name)
    x = images(model, 8)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(x).pow(2).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize('name', NAMES)
def test_group_matcher_covers_every_parameter(name):
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups['stages.0.conv1.weight'] == 0
    assert groups['head.weight'] == max(groups.values())


@pytest.mark.parametrize('name', NAMES)
def test_compiles_to_one_graph_in_training(name):
    torch._dynamo.reset()
    model = timm.create_model(name)
    x = images(model, 4)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.manual_seed(0)
    compiled(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('name', NAMES)
def test_export_in_eval(name):
    model = timm.create_model(name).eval()
    x = images(model)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))


def test_data_config():
    config = resolve_model_data_config(timm.create_model('cifar_vgg'))
    assert (config['input_size'], config['mean'], config['std']) == ((3, 32, 32), (0.0,) * 3, (1.0,) * 3)


def test_wrong_images_are_named():
    model = timm.create_model('cifar_vgg')
    for x in (torch.rand(2, 1, 32, 32), torch.rand(2, 3, 28, 28), torch.rand(3, 32, 32)):
        with pytest.raises(ValueError, match=r'\(batch, 3, 32, 32\), got \[' + ', '.join(map(str, x.shape))):
            model(x)
    with pytest.raises(ValueError, match='too small'):
        timm.create_model('cifar_vgg', img_size=2)
    with pytest.raises(ValueError, match='requires num_classes=0'):
        timm.create_model('cifar_vgg', global_pool='')


@pytest.mark.parametrize('name', BUNDLED)
def test_bundled_weights(name):
    """The file is what its JSON says; the model is the file, bit for bit; plain net and twin give the same logits."""
    card = weights.bundled_cards()[name]
    arch, tag = name.split('.')
    assert (card['model'], card['tag'], card['report']['scores'][0]['n']) == (arch, tag, 10_000)
    model = timm.create_model(name, pretrained=True).eval()
    file = load_file(weights.FOLDER / f'{name}.safetensors')
    assert list(model.state_dict()) == sorted(file, key=list(model.state_dict()).index)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in file.items())
    assert card['training']['data'] in model.pretrained_cfg['notes'][0]
    other = timm.create_model(arch.removeprefix('batchout_'))
    other.load_state_dict(file)
    x = images(model)
    assert torch.equal(logits(model, x), logits(other.eval(), x))


def test_default_tags():
    for name in ('batchout_cifar_vgg', 'batchout_mnist_cnn', 'cifar_vgg', 'mnist_cnn'):
        model = timm.create_model(name, pretrained=True)
        assert f'{name}.{model.pretrained_cfg["tag"]}' in BUNDLED
    assert timm.create_model('cifar_vgg').pretrained_cfg['tag'] == 'baseline_cifar10'


def test_pretrained_adapts_to_other_channels_and_classes():
    model = timm.create_model('batchout_cifar_vgg', pretrained=True, in_chans=1, num_classes=4)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    file = load_file(weights.FOLDER / 'batchout_cifar_vgg.cifar10.safetensors')
    assert torch.equal(model.stages[1].conv1.weight, file['stages.1.conv1.weight'])


def test_unknown_tag():
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(imagenet\) for cifar_vgg'):
        timm.create_model('cifar_vgg.imagenet', pretrained=True)


def test_missing_and_damaged_weights_are_refused(tmp_path, monkeypatch):
    name = 'mnist_cnn.baseline_mnist'
    for suffix in ('.json', '.safetensors'):
        (tmp_path / f'{name}{suffix}').write_bytes((weights.FOLDER / f'{name}{suffix}').read_bytes())
    monkeypatch.setattr(weights, 'FOLDER', tmp_path)
    file = tmp_path / f'{name}.safetensors'

    def create():
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(file)})

    create()
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'damaged.*sha256'):
        create()
    file.unlink()
    with pytest.raises(ValueError, match='missing'):
        create()


def test_pretrained_offline_in_a_fresh_process():
    """The README's first lines, with the network out of reach."""
    code = (
        'import socket; socket.socket.connect = None\n'
        'import timm, timm_batchout\n'
        'print(timm.create_model("batchout_cifar_vgg", pretrained=True).eval().num_classes)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '10', result.stderr
