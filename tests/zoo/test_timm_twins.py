"""batchout_<arch>: timm's own nets in everything but the training-time forward."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
import timm.data
import timm.optim
import torch
from safetensors.torch import save_file
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import get_pretrained_cfg, register_model, save_for_hf
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm_batchout
from timm_batchout import BatchOut, batchout_sites, register_twins, remove_batchout
from timm_batchout.sites import ImageCount
from timm_batchout.zoo.timm_twins import check_model_name, depth_scaled_eta

TWINS = Path(__file__).parents[2] / 'recipes' / 'twins'
# Families whose smallest net is larger, or slower in the survey (on a busy core), are examined by the slow tests.
QUICK, SMALL = 25, 60_000_000  # seconds, parameters
spec = importlib.util.spec_from_file_location('survey', TWINS / 'survey.py')
survey = importlib.util.module_from_spec(spec)
spec.loader.exec_module(survey)


def walked():
    path = TWINS / 'survey.json'
    return json.loads(path.read_text())['architectures'] if path.is_file() else {}


def one_of_each_family():
    known = walked()

    def marks(arch):
        record = known.get(arch, {})
        return [pytest.mark.slow] if record.get('seconds', 0) > QUICK or record.get('parameters', 0) > SMALL else []

    chosen = survey.representatives(known)
    for arch, family in survey.architectures().items():
        chosen.setdefault(family, arch)  # a family that timm has added since the walk
    return [
        pytest.param(arch, known[arch]['input'][-1] if arch in known else None, marks=marks(arch))
        for arch in chosen.values()
    ]


@pytest.fixture
def images():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def outputs(model, images, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(images)


def twin(name='resnet18', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f'batchout_{name}', **kwargs)


def base(name='resnet18', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


# Registration


def test_every_architecture_has_a_twin_with_the_tags_of_its_base():
    names = survey.architectures()
    assert len(names) > 1300
    assert [name for name in names if not timm.is_model(f'batchout_{name}')] == []
    tagged = timm.list_models(list(names), pretrained=True, include_tags=True)
    twins = set(timm.list_models('batchout_*', pretrained=True, include_tags=True))
    assert [name for name in tagged if f'batchout_{name}' not in twins] == []
    assert 'batchout_resnet50.a1_in1k' in timm.list_models('batchout_resnet*', pretrained=True)
    assert set(timm.list_models(module='timm_twins')) >= {f'batchout_{name}' for name in names}


def test_weights_come_from_the_hub_repository_of_the_base():
    for name in ('resnet50.a1_in1k', 'vit_base_patch16_224.augreg_in21k', 'resnet50'):
        ours, theirs = get_pretrained_cfg(f'batchout_{name}').to_dict(), get_pretrained_cfg(name).to_dict()
        assert ours.pop('architecture') == f'batchout_{theirs.pop("architecture")}'
        assert ours == theirs
    model = twin('resnet18.fb_swsl_ig1b_ft_in1k')
    assert model.pretrained_cfg == base('resnet18.fb_swsl_ig1b_ft_in1k').pretrained_cfg
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/resnet18.fb_swsl_ig1b_ft_in1k'
    model = twin(pretrained_cfg=get_pretrained_cfg('batchout_resnet18.a2_in1k'))
    assert model.pretrained_cfg == base('resnet18.a2_in1k').pretrained_cfg


def test_architectures_registered_later_get_a_twin_by_a_call():
    module = types.ModuleType('other_package.nets')
    sys.modules[module.__name__] = module

    def late_net(pretrained=False, **kwargs):
        return timm.models.resnet18(pretrained, **kwargs)

    late_net.__module__ = module.__name__
    register_model(late_net)
    with pytest.raises(ValueError, match='register_twins'):
        check_model_name('batchout_late_net')
    assert 'batchout_late_net' in register_twins()  # beside what other tests have registered
    assert register_twins() == register_twins(['late_net']) == register_twins('late_net') == []
    assert len(batchout_sites(timm.create_model('batchout_late_net', num_classes=2))) == 17
    check_model_name('batchout_late_net')


def test_entrypoints_are_pickled_by_name():
    entrypoint = timm.model_entrypoint('batchout_resnet18')
    assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint


# Bad input


@pytest.mark.parametrize('call', [lambda name: register_twins([name]), check_model_name])
def test_unknown_architectures_are_answered_with_the_nearest(call):
    with pytest.raises(ValueError, match=r"Unknown model 'resnet5x'\. Did you mean 'resnet5"):
        call('resnet5x')


def test_there_is_no_twin_of_a_twin():
    with pytest.raises(ValueError, match='already has BatchOut'):
        register_twins(['batchout_resnet18'])
    with pytest.raises(ValueError, match='already has BatchOut'):
        check_model_name('batchout_batchout_resnet18')
    with pytest.raises(ValueError, match=r"'batchout_resnet118'\. Did you mean 'batchout_resnet18'"):
        check_model_name('batchout_resnet118.a1_in1k')


@pytest.mark.parametrize(
    ('arch', 'options', 'message'),
    [
        ('resnet18', dict(sites=['layer9.*']), "'layer9.\\*' matches no site"),
        ('resnet18', dict(eta={'layer1.0.act1': 0.1, 'layer1.0.act9': 0.1}), "'layer1.0.act9' matches no"),
        ('resnet18', dict(sites='activations'), "sites must be 'act', 'block', 'stage'"),
        ('resnet18', dict(eta=-0.1), 'eta must be finite and at least 0'),
        ('resnet18', dict(k=1.5), 'k is the share'),
        ('resnet18', dict(noise='uniform'), "noise must be 'batchout' or 'gaussian'"),
        ('vgg11', dict(sites='block'), 'VGG has no blocks'),
        ('hrnet_w18_small', dict(sites='stage'), 'has no stages'),
        ('inception_v3', dict(sites='block'), 'has no blocks'),
    ],
)
def test_bad_options_are_refused_before_weights_are_loaded(monkeypatch, arch, options, message):
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: pytest.fail('weights loaded'))
    with pytest.raises(ValueError, match=message):
        twin(arch, pretrained=True, **options)


def test_a_net_that_cannot_be_built_without_values_is_checked_when_it_is_there(monkeypatch):
    resnet18 = timm.models.resnet18

    def needs_values(pretrained=False, **kwargs):
        assert torch.ones(()).item() == 1  # raises on the meta device
        return resnet18(False, **kwargs)

    monkeypatch.setattr('timm_batchout.zoo.timm_twins.model_entrypoint', lambda name: needs_values)
    assert len(batchout_sites(twin(pretrained=True))) == 17
    with pytest.raises(ValueError, match='matches no site'):
        twin(pretrained=True, sites=['layer9'])


def test_a_site_that_takes_no_tensor_is_refused_in_training():
    model = twin('densenet121', sites='block')
    with pytest.raises(TypeError, match=r"takes a list, not one tensor.*sites='act'"):
        model(torch.rand(2, 3, 32, 32))


# create_model's arguments


@pytest.mark.parametrize(
    ('arch', 'kwargs'),
    [
        ('resnet18', dict(num_classes=7, in_chans=1, drop_rate=0.2, global_pool='max')),
        ('resnet18', dict(features_only=True, out_indices=(1, 3))),
        ('resnet18', dict(exportable=True)),
        ('resnet18', dict(pretrained_cfg_overlay=dict(mean=(0.5, 0.5, 0.5)))),
        ('vit_tiny_patch16_224', dict(img_size=64, drop_path_rate=0.1, num_classes=0, cache_dir='unused')),
        ('efficientnet_b0', dict(features_only=True)),
        ('swin_tiny_patch4_window7_224', dict(img_size=64, features_only=True)),
    ],
)
def test_arguments_reach_the_base(arch, kwargs, images):
    plain, model = base(arch, **kwargs).eval(), twin(arch, **kwargs, eta=0.5).eval()
    images = images[:, :1] if 'in_chans' in kwargs else images
    assert batchout_sites(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    ours, theirs = outputs(model, images), outputs(plain, images)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert model.pretrained_cfg == plain.pretrained_cfg
    ours, theirs = outputs(model.train(), images), outputs(plain.train(), images)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
    assert not any(torch.equal(a, b) for a, b in pairs), 'the features are augmented in training'


def test_weights_from_files(tmp_path, images):
    plain = timm.create_model('test_resnet', num_classes=1000).eval()
    file = tmp_path / 'model.safetensors'
    save_file(plain.state_dict(), file)
    expected = outputs(plain, images)
    overlay = dict(file=str(file), hf_hub_id=None, url='')
    for model in (
        twin('test_resnet', checkpoint_path=str(file)),
        twin('test_resnet', pretrained=True, pretrained_cfg_overlay=overlay),
        twin('test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, sites='block', eta=0.3, k=1.0),
    ):
        assert batchout_sites(model)
        assert torch.equal(outputs(model.eval(), images), expected)
    adapted = twin('test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert outputs(adapted.eval(), images[:, :1]).shape == (4, 5)


def test_published_under_its_stock_name_it_loads_without_this_package(tmp_path, images):
    model = twin('test_resnet', num_classes=5, k=1.0, sites='block')
    expected = outputs(model.eval(), images)
    save_for_hf(remove_batchout(model), tmp_path)
    torch.save(images, tmp_path / 'images.pt')
    torch.save(expected, tmp_path / 'expected.pt')
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'test_resnet'
    code = (
        'import sys, timm, torch; folder = sys.argv[1]; '
        'model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(); '
        'load = lambda name: torch.load(f"{folder}/{name}", weights_only=True); '
        'assert "timm_batchout" not in sys.modules; '
        'assert torch.equal(model(load("images.pt")), load("expected.pt"))'
    )
    subprocess.run([sys.executable, '-c', code, tmp_path], check=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(outputs(again.eval(), images), expected)


def test_scriptable_leaves_batchout_out(caplog):
    model = twin(scriptable=True)
    assert not batchout_sites(model) and 'without BatchOut' in caplog.text
    torch.jit.script(model)


# Options


def test_default_eta_totals_twice_the_papers_net():
    for arch, count in (('resnet18', 17), ('resnet50', 49)):
        layers = batchout_sites(twin(arch)).values()
        assert len(layers) == count
        root_sum_square = sum(layer.eta[1] ** 2 for layer in layers) ** 0.5
        assert root_sum_square == pytest.approx(2 * (4 * 0.1**2 + 3 * 0.15**2) ** 0.5)
        assert {layer.eta for layer in layers} == {depth_scaled_eta(count)}
    assert {layer.eta for layer in batchout_sites(twin(eta=0.2)).values()} == {0.2}


@pytest.mark.parametrize(
    ('arch', 'sites', 'expected'),
    [
        ('resnet18', 'stage', ['layer1', 'layer2', 'layer3', 'layer4']),
        ('resnet18', 'block', [f'layer{i}.{j}' for i in (1, 2, 3, 4) for j in (0, 1)]),
        ('vit_tiny_patch16_224', 'block', [f'blocks.{i}' for i in range(12)]),
        ('convnext_atto', 'stage', [f'stages.{i}' for i in range(4)]),
        ('resnet18', ['layer4.*'], ['layer4.0.act1', 'layer4.0.act2', 'layer4.1.act1', 'layer4.1.act2']),
    ],
)
def test_placements(arch, sites, expected):
    assert list(batchout_sites(twin(arch, sites=sites))) == expected


def test_block_placement_pushes_shortcut_and_branch_alike(images):
    """In front of a block, not inside of its branch: what comes out is the block of the pushed features."""
    model = twin(sites='block', eta=0.4)
    block, layer = model.layer1[0].eval(), batchout_sites(model)['layer1.0']
    x = torch.randn(4, 64, 8, 8)
    block.training = True  # the block's own flag turns BatchOut on; its norms stay as they are
    torch.manual_seed(0)
    actual = block(x)
    torch.manual_seed(0)
    expected = block.forward(layer(x))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ('arch', 'site', 'windows'),
    [
        ('mobilevit_xxs', 'stages.2.1.transformer.0.mlp.act', 4),
        ('efficientvit_m0', 'stages.0.blocks.0.mixer.m.attn.proj.0', 4),
        ('tnt_s_patch16_224', 'blocks.0.mlp_in.act', 196),
        ('tnt_s_patch16_224', 'blocks.0', 196),
    ],
)
def test_all_windows_of_an_image_go_to_the_same_windows_of_one_partner(arch, site, windows):
    """With eta = 1 and k = 1 every image becomes its partner: window by window, as a whole."""
    sites = 'block' if site == 'blocks.0' else 'act'
    model = timm.create_model(f'batchout_{arch}', k=1.0, eta={site: 1.0}, sites=sites)
    module = model.get_submodule(site)
    inputs, partners = [], []
    randint = torch.randint

    def before(module, args):
        inputs.append(args[0])

    def spy(*args, **kwargs):
        partners.append(randint(*args, **kwargs))
        return partners[-1]

    layer_hooks = dict(module._forward_pre_hooks)
    module._forward_pre_hooks.clear()
    module.register_forward_pre_hook(before)
    module._forward_pre_hooks.update(layer_hooks)
    module.register_forward_pre_hook(before)
    size = timm.models.get_pretrained_cfg(arch).input_size
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, 'randint', spy)
        model(torch.rand(3, *size))
    assert len(inputs[0]) == 3 * windows and [len(drawn) for drawn in partners[:1]] == [3]
    x, pushed = (rows.unflatten(0, (3, windows)) for rows in inputs[:2])
    assert torch.allclose(pushed, x[partners[0]], atol=1e-6)


def test_replicas_count_their_own_images():
    """nn.DataParallel's replicas run at the same time and share hooks; each has a device of its own."""
    count = ImageCount()
    block = nn.Identity()
    for device, images in (('cpu', 4), ('meta', 3)):
        count.pre_hook(block, (torch.empty(images, 2, device=device),))
    assert (count.on(torch.device('cpu')), count.on(torch.device('meta'))) == (4, 3)


def test_removed_from_a_windowed_net_nothing_stays():
    model = remove_batchout(timm.create_model('batchout_efficientvit_m0'))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_an_exported_windowed_net_can_be_copied():
    model = timm.create_model('batchout_efficientvit_m0').eval()
    batch = {0: torch.export.Dim('batch', min=2, max=64)}
    torch.export.export(model, (torch.rand(4, 3, 224, 224),), dynamic_shapes=(batch,))
    assert len(batchout_sites(pickle.loads(pickle.dumps(model)))) == len(batchout_sites(model))


# timm's ecosystem


@pytest.fixture
def small():
    return twin('test_resnet', num_classes=5, eta=0.5)


def gradients(model, images):
    torch.manual_seed(3)
    model.zero_grad()
    model(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('arch', ['resnet18', 'test_vit', 'convnext_atto', 'mobilevit_xxs', 'efficientvit_m0'])
def test_gradient_checkpointing_replays_the_pushes(arch):
    size = timm.models.get_pretrained_cfg(arch).input_size
    images = torch.rand(4, *size)
    model = twin(arch, num_classes=5, eta=0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # the running statistics are updated twice, with checkpointing
    expected = gradients(model, images)
    model.set_grad_checkpointing(True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(model, images), expected, strict=True))


def test_ema(small, images):
    ema = ModelEmaV3(small, decay=0.5)
    outputs(small, images)
    ema.update(small)
    plain = timm.create_model('test_resnet', num_classes=5).eval()
    plain.load_state_dict(ema.module.state_dict())
    assert torch.equal(outputs(ema.module, images), outputs(plain, images))


def test_optimizer_groups_and_data_config(small):
    plain = timm.create_model('test_resnet', num_classes=5)
    ours, theirs = (
        timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.7) for model in (small, plain)
    )
    assert [(len(g['params']), g['lr_scale']) for g in ours] == [(len(g['params']), g['lr_scale']) for g in theirs]
    assert timm.data.resolve_model_data_config(small) == timm.data.resolve_model_data_config(plain)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('arch', ['test_resnet', pytest.param('tnt_s_patch16_224', marks=pytest.mark.slow)])
def test_traced_and_exported_for_eval(arch):
    model = twin(arch, num_classes=5, eta=0.5).eval()
    x, y = torch.rand(2, 2, *timm.models.get_pretrained_cfg(arch).input_size)
    expected = outputs(model, y)
    assert torch.allclose(torch.jit.trace(model, x)(y), expected, atol=1e-5)
    exported = torch.export.export(model, (x,))
    assert 'randint' not in str(exported.graph)
    assert torch.allclose(exported.module()(y), expected, atol=1e-5)


def test_fx_graphs_augment_in_training():
    """timm's GELU is no leaf to FX: traced through, it would lose its hook."""
    model = twin('test_convnext', eta=0.5)
    site = 'stages.1.blocks.0.mlp.act'
    options = {'leaf_modules': get_notrace_modules(), 'autowrap_functions': get_notrace_functions()}
    graph = create_feature_extractor(model, {site: 'act'}, tracer_kwargs=options)
    x = torch.rand(8, 3, 64, 64)
    torch.manual_seed(0)
    moved = (graph.train()(x)['act'] - graph.eval()(x)['act']).abs().amax((1, 2, 3))
    assert (moved[:4] > 1e-2).any() and (moved[4:] < 1e-5).all()  # a sample may draw itself


def test_fx_is_told_that_a_windowed_block_counts_images():
    with pytest.raises(TypeError, match=r'Trace the net in eval mode'):
        torch.fx.symbolic_trace(twin('tnt_s_patch16_224').train())


@pytest.mark.filterwarnings('ignore')
def test_onnx(small, tmp_path):
    from onnx.reference import ReferenceEvaluator

    x, y = torch.rand(2, 2, 3, 64, 64)
    torch.onnx.export(small.eval(), (x,), tmp_path / 'model.onnx', dynamo=True)
    evaluator = ReferenceEvaluator(str(tmp_path / 'model.onnx'))
    (actual,) = evaluator.run(None, {evaluator.input_names[0]: y.numpy()})
    assert torch.allclose(torch.from_numpy(actual), outputs(small, y), atol=1e-5)


def test_distributed_data_parallel_finds_no_unused_parameter(tmp_path):
    """BatchOut takes no parameter out of the graph: DDP without find_unused_parameters gets a gradient for each."""
    code = f"""
import timm, timm_batchout, torch, torch.distributed as dist
dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)
model = timm.create_model('batchout_test_vit', num_classes=5)
ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
for _ in range(2):  # a parameter without gradient would make the second forward fail
    ddp(torch.rand(4, *model.pretrained_cfg['input_size'])).sum().backward()
assert all(p.grad is not None for p in model.parameters())
"""
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'GLOO_SOCKET_IFNAME': 'lo'})


# Every family of timm


@pytest.mark.parametrize(('arch', 'side'), one_of_each_family())
def test_family(arch, side):
    memory = 1.5e9  # two families have no member below 150 million parameters: here with fewer blocks
    record = survey.examine(arch, memory=memory, side=side)
    known = {name: value for name, value in walked().get(arch, {}).items() if name not in ('compiled', 'seconds')}
    assert survey.exceptions(record) == (survey.exceptions(known) if known else [])
    if known and 'reduced' not in record:
        assert record['sites'] == known['sites'], 'an activation more or less than the walk has found'


def test_the_walk_has_seen_every_architecture():
    known = walked()
    missing = [arch for arch in survey.architectures() if arch not in known]
    if timm.__version__ == json.loads((TWINS / 'survey.json').read_text())['environment']['timm']:
        assert missing == [], 'run recipes/twins/survey.py: it examines what it does not know'
    unsound = {arch: survey.exceptions(record) for arch, record in known.items() if survey.exceptions(record)}
    stated = json.loads((TWINS / 'survey.json').read_text())['summary']['exceptions']
    assert unsound == stated
    examined = [record for record in known.values() if record['device'] == 'cpu']
    assert all(record[check] is True for record in examined for check in survey.CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_whole_walk(tmp_path):
    """Every architecture again, from nothing: over an hour. Only want of memory may make other exceptions."""
    command = [sys.executable, TWINS / 'survey.py', '--output', tmp_path / 'survey.json']
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / 'survey.json').read_text())['summary']['exceptions']
    stated = json.loads((TWINS / 'survey.json').read_text())['summary']['exceptions']
    assert {arch: why for arch, why in found.items() if arch not in stated and 'memory' not in str(why)} == {}


def test_public_names():
    assert timm_batchout.register_twins is register_twins
    assert all(isinstance(layer, BatchOut) for layer in batchout_sites(twin()).values())
