"""Adversarial objectives, against the formulas of their papers written out for one mini-batch."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_batchout import BatchOutConfig, add_batchout, batchout_sites
from timm_batchout.cli.main import main
from timm_batchout.training.config import ObjectiveConfig
from timm_batchout.training.objectives import Objective, perturb, robust_correct

EPSILON = 8 / 255


@pytest.fixture
def net():
    """Smooth, with batch norm, dropout and a BatchOut site."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 5)
    )
    net(torch.rand(64, 3, 8, 8))  # statistics that are not those of a new layer
    return add_batchout(net, BatchOutConfig(eta=0.5)).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 8, 8, generator=generator)
    images[0] = 0.0  # where the box [0, 1] cuts the ball
    return images, torch.tensor([0, 1, 2, 3, 4, 0])


def objective(net, name, **changes):
    return Objective(ObjectiveConfig(name, epsilon=EPSILON, **changes), list(batchout_sites(net).values()))


def gradient(loss, x):
    x = x.clone().requires_grad_()
    loss(x).backward(inputs=[x])
    return x.grad


def cross_entropy(net, labels):
    net.eval()
    return lambda x: F.cross_entropy(net(x), labels, reduction='sum')


def projected(x, images):
    """The nearest point within EPSILON of the images and within [0, 1]."""
    return torch.maximum(torch.minimum(x, images + EPSILON), images - EPSILON).clamp(0, 1)


def length(x):
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def test_pgd_is_that_of_madry(net, batch):
    images, labels = batch
    torch.manual_seed(3)
    found = objective(net, 'pgd', steps=4, step_size=0.01).attack(net, *batch)
    torch.manual_seed(3)
    x = (images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    for _ in range(4):
        x = x + 0.01 * gradient(cross_entropy(net, labels), x).sign()
        x = projected(x, images)
    assert torch.allclose(found, x, atol=1e-6) and not found.requires_grad
    assert (found - images).abs().max() <= EPSILON + 1e-6 and found.min() >= 0 and found.max() <= 1


def test_pgd_in_l2_steps_along_the_gradient_and_projects_each_image(net, batch):
    images, labels = batch
    images = images * 0.8 + 0.1  # inside the box, where the start is the ball's
    torch.manual_seed(3)
    found = Objective(ObjectiveConfig('pgd', epsilon=0.5, norm='L2', steps=4)).attack(net, images, labels)
    torch.manual_seed(3)
    noise, share = torch.randn_like(images), torch.rand(6, 1, 1, 1)
    x = (images + 0.5 * share ** (1 / 192) * noise / length(noise)).clamp(0, 1)
    for _ in range(4):
        slope = gradient(cross_entropy(net, labels), x)
        delta = x + 2.5 * 0.5 / 4 * slope / length(slope) - images
        x = (images + delta * (0.5 / length(delta)).clamp(max=1)).clamp(0, 1)
    assert torch.allclose(found, x, atol=1e-6)
    assert length(found - images).max() <= 0.5 + 1e-5
    assert length(found - images).min() > 0.4, 'an attack goes to the edge'


def test_one_step_from_a_random_start_is_that_of_wong(net, batch):
    images, labels = batch
    torch.manual_seed(3)
    found = objective(net, 'fgsm_rs').attack(net, *batch)
    torch.manual_seed(3)
    x = (images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    x = x + 1.25 * EPSILON * gradient(cross_entropy(net, labels), x).sign()
    x = projected(x, images)
    assert torch.allclose(found, x, atol=1e-6)


def test_n_fgsm_starts_in_twice_the_radius_and_does_not_project(net, batch):
    images, labels = batch
    torch.manual_seed(3)
    found = objective(net, 'n_fgsm').attack(net, *batch)
    torch.manual_seed(3)
    x = (images + torch.empty_like(images).uniform_(-2 * EPSILON, 2 * EPSILON)).clamp(0, 1)
    x = (x + EPSILON * gradient(cross_entropy(net, labels), x).sign()).clamp(0, 1)
    assert torch.allclose(found, x, atol=1e-6)
    assert 1.5 * EPSILON < (found - images).abs().max() <= 3 * EPSILON + 1e-6


def test_trades_is_that_of_zhang_down_to_the_gradients(net, batch):
    """Also through the clean predictions, which the divergence draws toward the adversarial ones."""
    images, labels = batch
    for layer in batchout_sites(net).values():
        layer.active = False
    net[3].p = 0.0
    ours = copy.deepcopy(net)  # its training passes update the batch-norm statistics
    torch.manual_seed(3)
    loss = objective(ours, 'trades', steps=3, step_size=0.01, beta=6.0)(ours, *batch)
    found = torch.autograd.grad(loss, list(ours.parameters()))
    torch.manual_seed(3)
    net.eval()
    with torch.no_grad():
        p = F.softmax(net(images), 1)
    x = images + 0.001 * torch.randn_like(images)
    x = x.clamp(0, 1)
    for _ in range(3):
        slope = gradient(lambda x: F.kl_div(F.log_softmax(net(x), 1), p, reduction='sum'), x)
        x = x + 0.01 * slope.sign()
        x = projected(x, images)
    net.train()
    clean, attacked = net(images), net(x)
    divergence = (F.softmax(clean, 1) * (F.log_softmax(clean, 1) - F.log_softmax(attacked, 1))).sum(1).mean()
    expected = F.cross_entropy(clean, labels) + 6.0 * divergence
    assert torch.allclose(loss, expected, atol=1e-6)
    for own, literal in zip(found, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        assert torch.allclose(own, literal, atol=1e-5)


def test_the_papers_fgsm_training_replaces_the_first_half(net, batch):
    images, labels = batch
    seen = []
    ours = copy.deepcopy(net)
    ours.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    objective(ours, 'fgsm')(ours, *batch)
    x = images[:3] + EPSILON * gradient(cross_entropy(net, labels[:3]), images[:3]).sign()
    assert torch.allclose(seen[-1][:3], x.clamp(0, 1), atol=1e-6)
    assert torch.equal(seen[-1][3:], images[3:])


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('name', ['pgd', 'fgsm_rs', 'n_fgsm', 'trades'])
def test_an_attack_leaves_no_trace_in_the_net(net, batch, name, mode):
    net[3].eval()  # a layer that the user has frozen
    net[0].weight.grad = torch.ones_like(net[0].weight)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    objective(net, name, steps=2, attack_mode=mode).attack(net, *batch)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items()), 'batch-norm statistics'
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight)) and net[5].weight.grad is None
    assert net.training and net[1].training and not net[3].training
    assert all(layer.active for layer in batchout_sites(net).values())


def passes(net, batch, name, **changes):
    """Of each forward: is the net training, and is BatchOut on?"""
    (layer,) = batchout_sites(net).values()
    log = []
    handle = net.register_forward_pre_hook(lambda module, args: log.append((module.training, layer.active)))
    objective(net, name, **changes)(net, *batch)
    handle.remove()
    return log


def test_batchout_is_off_while_attacking_unless_asked(net, batch):
    on, off, evaluating = (True, True), (True, False), (False, False)
    assert passes(net, batch, 'pgd', steps=2) == [evaluating, evaluating, on]
    assert passes(net, batch, 'pgd', steps=2, attack_mode='train') == [off, off, on]
    assert passes(net, batch, 'pgd', steps=2, attack_mode='train', attack_batchout=True) == [on, on, on]
    assert passes(net, batch, 'fgsm') == [evaluating, on]


@pytest.mark.parametrize(('where', 'clean', 'adversarial'), [
    ('both', True, True), ('clean', True, False), ('adversarial', False, True)
])  # fmt: skip
def test_trades_augments_the_passes_that_it_is_told_to(net, batch, where, clean, adversarial):
    assert passes(net, batch, 'trades', steps=1, batchout=where)[-2:] == [(True, clean), (True, adversarial)]


def test_epsilon_grows_linearly_to_its_value(net, batch):
    warming = objective(net, 'pgd', epsilon_warmup=0.4, steps=1)
    for share, epsilon in ((0.0, 0.0), (0.1, EPSILON / 4), (0.4, EPSILON), (0.9, EPSILON)):
        warming.warm_up(share)
        assert warming.epsilon == pytest.approx(epsilon)
        moved = (warming.attack(net, *batch) - batch[0]).abs().max().item()
        assert moved == pytest.approx(epsilon, rel=0.02), 'steps shrink with the radius'
    constant = objective(net, 'pgd')
    constant.warm_up(0.0)
    assert constant.epsilon == EPSILON


def test_the_random_start_in_l2_is_uniform_in_the_ball():
    images = torch.full((4000, 1, 1, 3), 0.5)
    torch.manual_seed(0)
    radii = (perturb(torch.sum, images, 0.3, 0.1, 0, 'L2') - images).flatten(1).norm(dim=1)
    assert radii.max() <= 0.3 + 1e-6
    assert (radii < 0.15).float().mean().item() == pytest.approx(0.5**3, abs=0.02), 'volume grows with the cube'


def test_robust_accuracy_of_a_linear_net_is_known():
    """The worst image of the ball lies at its corner: right if the margin is above epsilon times the L1 norm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).eval()
    images, labels = 0.3 + 0.4 * torch.rand(200, 3, 2, 2), torch.randint(2, (200,))
    w = net[1].weight.detach()
    margin = ((images.flatten(1) @ (w[0] - w[1])) * (1 - 2 * labels)).detach()
    bound = 0.02 * (w[0] - w[1]).abs().sum()
    clear = (margin - bound).abs() > 1e-5
    assert torch.equal(robust_correct(net, images, labels, 0.02)[clear], (margin > bound)[clear])
    assert 0 < (margin > bound).sum() < (margin > 0).sum(), 'some are right, and fall'


def test_trades_resumes_in_the_same_bits_and_keeps_the_most_robust_weights(tmp_path):
    command = [
        'train', '--model', 'batchout_test_resnet', '--data.name', 'digits', '--batch_size', '64', '--epochs', '2',
        '--model_args', '{in_chans: 1, num_classes: 10, pretrained_cfg_overlay: {mean: [0.4], std: [0.3]}}',
        '--objective.name', 'trades', '--objective.epsilon', '0.1', '--objective.steps', '2',
        '--objective.epsilon_warmup', '0.5', '--robust_val.images', '100', '--robust_val.steps', '2',
    ]  # fmt: skip
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    assert main([*command, '--output', str(whole)]) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(max((cut / 'checkpoints').iterdir()))
    (cut / 'model.safetensors').unlink()
    assert main([*command, '--output', str(cut), '--resume', 'true']) == 0
    for name in ('model.safetensors', 'best.safetensors'):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert '"val_robust_n": 100' in (whole / 'metrics.jsonl').read_text()
