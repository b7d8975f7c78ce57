"""Hooks on a net: nothing but the training-time forward may change, and everything that copies a net must copy them."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn

from timm_batchout import BatchOut, BatchOutConfig, add_batchout, batchout, batchout_sites, remove_batchout
from timm_batchout.sites import activation_sites


class Net(nn.Module):
    """A pre-activation residual block (its shortcut reads what the activation reads), a gate, and a shared ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act2 = nn.GELU()
        self.gate = nn.Sigmoid()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)
        self.act3 = nn.SiLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.act1(self.stem(x))
        x = x + self.conv(self.act2(x))
        x = (x * self.gate(x)).mean((2, 3))
        x = self.act3(self.fc1(x))
        return self.head(self.act3(self.fc2(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def outputs(model, images, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(images)


def test_every_activation_and_no_gate(net):
    assert list(batchout_sites(add_batchout(net))) == ['act1', 'act2', 'act3']


def test_training_changes_features_and_eval_does_not(net, images):
    plain = copy.deepcopy(net)
    add_batchout(net, BatchOutConfig(eta=0.3))
    assert not torch.equal(outputs(net, images), outputs(plain, images))
    assert torch.equal(outputs(net.eval(), images), outputs(plain.eval(), images))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))
    assert [n for n, _ in net.named_modules()] == [n for n, _ in plain.named_modules()]


def test_one_call_of_a_hooked_activation_is_the_function_before_it(net):
    add_batchout(net, BatchOutConfig(eta=0.25))
    x = torch.randn(6, 8)
    torch.manual_seed(0)
    actual = net.act2(x)
    torch.manual_seed(0)
    assert torch.equal(actual, nn.functional.gelu(batchout_sites(net)['act2'](x)))


def test_remove_restores_exactly(net, images):
    seen = []
    net.act1.register_forward_pre_hook(lambda module, args: seen.append(1))
    before = {name: dict(module._forward_pre_hooks) for name, module in net.named_modules()}
    expected = outputs(net, images)
    assert remove_batchout(add_batchout(net)) is net
    assert {name: dict(module._forward_pre_hooks) for name, module in net.named_modules()} == before
    assert torch.equal(outputs(net, images), expected)
    assert batchout_sites(net) == {}
    assert seen
    assert remove_batchout(net) is net, 'a second removal is harmless'
    add_batchout(net)
    assert len(batchout_sites(net)) == 3


def test_eta_by_name_and_glob_last_match_wins(net):
    add_batchout(net, BatchOutConfig(eta={'act*': 0.1, 'act2': (0.0, 0.2)}))
    assert {name: layer.eta for name, layer in batchout_sites(net).items()} == {
        'act1': 0.1, 'act2': (0.0, 0.2), 'act3': 0.1,
    }  # fmt: skip
    remove_batchout(net)
    add_batchout(net, BatchOutConfig(eta={'act3': 0.5}))
    assert list(batchout_sites(net)) == ['act3']
    remove_batchout(net)
    add_batchout(net, BatchOutConfig(sites=['act[12]'], eta=0.4))
    assert {name: layer.eta for name, layer in batchout_sites(net).items()} == {'act1': 0.4, 'act2': 0.4}


@pytest.mark.parametrize('option', [dict(select='random'), dict(per_sample=False), dict(stop_gradient=False)])
def test_options_reach_every_site(net, option):
    layers = batchout_sites(add_batchout(net, BatchOutConfig(**option))).values()
    ((name, value),) = option.items()
    assert all(getattr(layer, name) == value for layer in layers)


def test_further_arguments_of_an_activation_are_handed_on(images):
    class Scaled(nn.ReLU):
        def forward(self, x, scale):
            return super().forward(x) * scale

    net = nn.ModuleDict({'act': Scaled()})
    add_batchout(net, BatchOutConfig(eta=0.0))
    assert torch.equal(net['act'](images, 3.0), 3 * images)


def test_gaussian_noise_can_be_hooked_instead(net, images):
    add_batchout(net, BatchOutConfig(noise='gaussian'))
    same = images[:1].expand(6, -1, -1, -1)
    out = outputs(net, same)
    assert not torch.equal(out[0], out[5]), 'a push toward an equal sample would be zero; noise is not'


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(eta={'act9': 0.1}), r"'act9' matches no site.*act1, act2, act3"),
        (dict(eta={'act1': 0.1, 'gate': 0.1}), "'gate' matches no site"),
        (dict(sites=['blocks.*']), "'blocks.*' matches no"),
        (dict(sites=[]), 'no common site'),
        (dict(sites=['act1'], eta={'act2': 0.1}), 'no common site'),
    ],
)
def test_a_pattern_that_matches_nothing_leaves_the_model_untouched(net, config, message):
    with pytest.raises(ValueError, match=message):
        add_batchout(net, BatchOutConfig(**config))
    assert all(not module._forward_pre_hooks for module in net.modules())


def test_adding_twice_is_refused(net):
    add_batchout(net)
    hooks = [list(module._forward_pre_hooks.items()) for module in net.modules()]
    with pytest.raises(ValueError, match='already has BatchOut'):
        add_batchout(net)
    assert [list(module._forward_pre_hooks.items()) for module in net.modules()] == hooks


def test_nets_that_hooks_cannot_reach_are_refused(net):
    with pytest.raises(ValueError, match='Linear has no activation module'):
        add_batchout(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no activation module'):
        add_batchout(nn.ReLU())  # a hook on the root would break compiled graphs
    with pytest.raises(ValueError, match='compiled'):
        add_batchout(torch.compile(net))
    with pytest.raises(ValueError, match='compiled'):
        add_batchout(nn.Sequential(torch.compile(net)))
    in_place = copy.deepcopy(net)
    in_place.compile()
    with pytest.raises(ValueError, match='compiled'):
        add_batchout(in_place)
    scripted = torch.jit.trace(net.eval(), torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match='scripted'):
        add_batchout(scripted)


def independent(original, clone, images):
    """The clone augments as the original does, and its layers are its own."""
    assert torch.equal(outputs(clone, images), outputs(original, images))
    expected = outputs(original, images)
    for layer in batchout_sites(clone).values():
        layer.set_eta(0.9)
    assert not torch.equal(outputs(clone, images), expected)
    assert torch.equal(outputs(original, images), expected)
    clone.eval()
    assert not torch.equal(outputs(original, images), outputs(clone, images)), 'eval() of a copy stopped the original'


def test_deepcopy(net, images):
    add_batchout(net, BatchOutConfig(eta=(0.1, 0.3)))
    independent(net, copy.deepcopy(net), images)


def test_pickle(net, images):
    add_batchout(net, BatchOutConfig(eta=(0.1, 0.3)))
    independent(net, pickle.loads(pickle.dumps(net)), images)


def test_ema_copy_is_inert_and_keeps_plain_keys(net, images):
    plain = copy.deepcopy(net)
    add_batchout(net, BatchOutConfig(eta=0.3))
    ema = ModelEmaV3(net, decay=0.5)
    ema.update(net)
    assert torch.equal(outputs(ema.module, images), outputs(plain.eval(), images))
    assert list(ema.module.state_dict()) == list(plain.state_dict())


def test_data_parallel_replicas_augment_their_share(net):
    """nn.DataParallel replicates module by module; replicas share hooks and carry their own training flag."""
    add_batchout(net, BatchOutConfig(eta=1.0))
    x = torch.randn(4, 8)
    replica = net.act2._replicate_for_data_parallel()
    torch.manual_seed(0)
    expected = net.act2(x)
    torch.manual_seed(0)
    assert torch.equal(replica(x), expected)
    replica.training = False
    assert torch.equal(replica(x), nn.functional.gelu(x))


def test_compile_fires_the_hooks_in_one_graph(net, images):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    add_batchout(net, BatchOutConfig(eta=0.3))
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for eta in (0.3, 0.5, (0.0, 0.2)):
        for layer in batchout_sites(net).values():
            layer.set_eta(eta)
        assert torch.equal(outputs(compiled, images), outputs(net, images))
    assert len(graphs) == 1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(net, images, dtype):
    add_batchout(net, BatchOutConfig(eta=(0.0, 0.3)))
    seen = []
    net.act2.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    net.act3.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', dtype):
        loss = net(images).float().pow(2).mean()
    loss.backward()
    assert set(seen) == {dtype}
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(('name', 'count'), [('resnet18', 17), ('convnext_atto', 12), ('vit_tiny_patch16_224', 12)])
def test_timm_nets(name, count):
    model = timm.create_model(name, num_classes=3)
    expected = copy.deepcopy(model).eval()
    add_batchout(model, BatchOutConfig(eta=0.2))
    assert len(batchout_sites(model)) == count
    size = 224 if 'vit' in name else 64
    x = torch.rand(4, 3, size, size)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.load_state_dict(expected.state_dict())
    assert torch.equal(outputs(model.eval(), x), outputs(expected, x))


def test_channel_attention_is_left_out():
    sites = activation_sites(timm.create_model('efficientnet_b0'))
    assert len(sites) == 33 and not any('.se.' in name for name in sites)
    sites = activation_sites(timm.create_model('seresnet50'))
    assert len(sites) == 49 and not any('.se.' in name for name in sites)
    sites = activation_sites(torchvision.models.mobilenet_v3_small())  # its class is SqueezeExcitation
    assert len(sites) == 24 and not any(name.endswith('.activation') for name in sites)


def test_import_is_light():
    """The face of the package loads nothing that only training, attacks or the Hub need, and no code of nets."""
    code = (
        'import sys, timm; before = set(sys.modules); import timm_batchout; '
        'heavy = ("accelerate", "foolbox", "matplotlib", "scipy", "sklearn", "jsonargparse", "timm", "torchvision"); '
        'print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] in heavy))'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == '[]'


def test_layer_type_is_public(net):
    assert all(isinstance(layer, BatchOut) for layer in batchout_sites(add_batchout(net)).values())


class Reused(nn.Module):
    """Reads a pre-activation again that its in-place ReLU has overwritten, as some of timm's nets do."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        out = self.act(x)
        return out + x


def test_with_eta_to_zero_a_net_that_reuses_an_overwritten_tensor_is_the_plain_net():
    net, x = Reused().train(), torch.randn(6, 3, 8, 8)
    plain = net(x)
    assert torch.equal(add_batchout(net, eta=1e-12)(x), plain)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('noise', ['batchout', 'gaussian'])
@pytest.mark.parametrize('select', ['first', 'random'])
def test_an_inplace_activation_changes_neither_outputs_nor_gradients(inplace, noise, select):
    results = []
    for act in (nn.ReLU(), nn.ReLU(inplace)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act, nn.Flatten(), nn.Linear(144, 3))
        add_batchout(net, eta=(0, 0.5), noise=noise, select=select).train()
        out = net(torch.rand(6, 3, 8, 8))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_functional_transforms_see_the_gradient_of_backward():
    from torch.func import functional_call, grad, jvp, vjp, vmap

    torch.manual_seed(0)
    net = add_batchout(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), eta=0.3).train()
    x, parameters = torch.rand(6, 4), {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters):
        torch.manual_seed(1)
        return functional_call(net, parameters, (x,)).square().sum()

    torch.manual_seed(1)
    net(x).square().sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    found = grad(loss)(parameters)
    (pulled,) = vjp(loss, parameters)[1](torch.tensor(1.0))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pulled, expected)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = jvp(loss, (parameters,), (direction,))[1]
    torch.testing.assert_close(slope, sum((expected[name] * direction[name]).sum() for name in expected))
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    both = vmap(grad(loss), randomness='same')(stacked)
    torch.testing.assert_close({name: g[1] for name, g in both.items()}, expected)


def test_activations_and_blocks_may_be_called_with_keywords():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(input=self.fc(x))

    net, x = Keyword().train(), torch.rand(6, 4)
    plain = net(x)
    add_batchout(net, eta=0.5)
    torch.manual_seed(0)
    by_keyword = net(x)
    torch.manual_seed(0)
    assert torch.equal(by_keyword, torch.relu(batchout(net.fc(x), eta=0.5))) and not torch.equal(by_keyword, plain)


def test_reset_classifier_keeps_the_site_of_an_mlp_head():
    model = timm.create_model('caformer_s18', num_classes=10)
    add_batchout(model, eta=(0, 0.2))
    before = list(batchout_sites(model))
    model.reset_classifier(5)
    assert list(batchout_sites(model)) == before and model.num_classes == 5
    copied = copy.deepcopy(model)
    copied.reset_classifier(7)
    assert (copied.num_classes, model.num_classes) == (7, 5), 'the copy resets its own head'
    assert list(batchout_sites(copied)) == before
    assert 'reset_classifier' not in vars(remove_batchout(model)) and not batchout_sites(model)
    model.reset_classifier(3)
    assert not batchout_sites(model)


def test_positions_first_attention_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU())
    with pytest.raises(ValueError, match='positions first'):
        add_batchout(layer)
    assert not layer.activation._forward_pre_hooks
    first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, activation=nn.GELU(), batch_first=True)
    assert list(batchout_sites(add_batchout(first))) == ['activation']


def test_a_config_or_keywords_but_not_both():
    net = add_batchout(Net(), eta=(0, 0.2), sites=['act1'])
    assert {name: layer.eta for name, layer in batchout_sites(net).items()} == {'act1': (0.0, 0.2)}
    with pytest.raises(ValueError, match='config and eta'):
        add_batchout(Net(), BatchOutConfig(), eta=0.2)
