"""The method against a literal transcription of the paper's Algorithm 1, and every promise of its docstring."""

import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from timm_batchout import BatchOut, BatchOutConfig, batchout, functional, gaussian_noise

METHODS = [batchout, gaussian_noise]
SHAPES = [(6,), (6, 5), (6, 4, 3), (6, 3, 4, 5), (7, 2, 3, 3, 2)]


def algorithm_1(x, R, eta, k):
    """The paper's Algorithm 1, line by line; R and eta are given, k is the number of samples to augment."""
    x = x.clone()
    x_r = x[R]  # X_r <- X[R]
    d = x_r - x  # d <- X_r - X
    x[:k] = x[:k] + eta * d[:k]  # X[1:k] <- X[1:k] + eta . d[1:k]
    return x


def in_channels_last(x):
    """The same values, of a map (4 or 5 dims) with the channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 3 else x


def draws(x, n, eta, per_sample=True):
    """The partners and magnitudes that batchout() takes from the global generator, in its order."""
    partners = torch.randint(len(x), (n,))
    if isinstance(eta, float):
        return partners, eta
    low, high = eta
    shape = (n if per_sample else 1,) + (1,) * (x.ndim - 1)
    return partners, torch.rand(shape) * (high - low) + low


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('eta', [0.1, (0.0, 0.15)])
@pytest.mark.parametrize('k', [0.3, 0.5, 1.0])
def test_equals_algorithm_1(shape, eta, k):
    x = torch.randn(shape, dtype=torch.float64)
    n = int(k * len(x))
    torch.manual_seed(3)
    actual = batchout(x, k=k, eta=eta)
    torch.manual_seed(3)
    partners, magnitude = draws(x, n, eta)
    # Algorithm 1 draws m integers; only the first n of them are read.
    R = torch.cat([partners, torch.zeros(len(x) - n, dtype=torch.long)])
    if not isinstance(magnitude, float):
        magnitude = magnitude.double()
    expected = algorithm_1(x, R, magnitude, n)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(actual[n:], x[n:])


def test_partners_are_read_before_any_sample_is_changed():
    """With eta = 1 every augmented sample becomes an original one, never one that was already overwritten."""
    x = torch.arange(64.0)[:, None]
    out = batchout(x, k=1.0, eta=1.0)
    torch.manual_seed(0)
    assert set(out[:, 0].tolist()) <= set(x[:, 0].tolist())
    torch.manual_seed(5)
    out = batchout(x, k=1.0, eta=1.0)
    torch.manual_seed(5)
    assert torch.equal(out, x[torch.randint(64, (64,))])


def test_partners_are_uniform_over_the_whole_batch_with_replacement():
    x = torch.arange(8.0)[:, None]
    counts = torch.zeros(4, 8)
    torch.manual_seed(0)
    for _ in range(4000):
        partner = batchout(x, k=0.5, eta=1.0)[:4, 0].long()
        counts[torch.arange(4), partner] += 1
    # 4000 draws over 8 partners: 500 each, standard deviation 21; 5 of them.
    assert (counts - 500).abs().max() < 105


@pytest.mark.parametrize('method', METHODS)
def test_eta_range_per_sample_and_per_batch(method):
    x = torch.cat([torch.ones(50, 4), torch.zeros(50, 4)])
    torch.manual_seed(0)
    push = (method(x, k=0.5, eta=(0.2, 0.4)) - x)[:50].abs().amax(dim=1)
    moved = push[push > 0]
    assert moved.unique().numel() > 10
    assert method is gaussian_noise or (moved.min() >= 0.2 - 1e-6 and moved.max() <= 0.4 + 1e-6)
    torch.manual_seed(0)
    push = (batchout(x, k=0.5, eta=(0.2, 0.4), per_sample=False) - x)[:50].abs().amax(dim=1)
    assert push[push > 0].unique().numel() == 1


@pytest.mark.parametrize('method', METHODS)
def test_select_random_augments_a_random_choice(method):
    x = torch.randn(40, 3)
    torch.manual_seed(0)
    changed = (method(x, k=0.25, select='random') != x).any(dim=1)
    assert changed.sum() <= 10
    assert changed.nonzero().max() >= 10, 'the first ten were taken'
    first = (method(x, k=0.25) != x).any(dim=1)
    assert not first[10:].any()
    # Without replacement: noise moves each of the chosen.
    for _ in range(5):
        assert (gaussian_noise(x, k=0.25, select='random') != x).any(dim=1).sum() == 10


def test_gaussian_noise_is_relative_to_the_sample_that_is_pushed():
    x = torch.randn(40, 30) * torch.arange(1.0, 41.0)[:, None]
    out = gaussian_noise(x, k=0.5, eta=0.25, select='random')
    moved = (out != x).any(dim=1)
    assert torch.allclose((out - x)[moved].norm(dim=1), 0.25 * x[moved].norm(dim=1), rtol=1e-4)
    shares = [
        ((gaussian_noise(x, eta=(0.1, 0.3), per_sample=per_sample) - x)[:20].norm(dim=1) / x[:20].norm(dim=1))
        for per_sample in (True, False)
    ]
    assert shares[0].std() > 0.01 and shares[1].std() < 1e-5


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_gaussian_noise_equals_equation_5(shape, channels_last):
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        x = in_channels_last(x)
    torch.manual_seed(1)
    out = gaussian_noise(x, k=0.5, eta=0.1)
    torch.manual_seed(1)
    if channels_last and x.ndim > 3:  # drawn in the order of memory
        n = torch.randn((3, *shape[2:], shape[1]), dtype=torch.float64).movedim(-1, 1)
    else:
        n = torch.randn((3, *shape[1:]), dtype=torch.float64)
    for j in range(3):
        torch.testing.assert_close(out[j], x[j] + 0.1 * x[j].norm() * n[j] / n[j].norm())
    assert torch.equal(out[3:], x[3:])


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('select', ['first', 'random'])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_push_stays_in_one_memory_format(method, select, shape):
    """Across two of them (index_select makes its result contiguous) it takes five times as long."""

    class Strides(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if 'lerp' in function.__name__:
                seen.append((args[0].stride(), args[1].stride()))
            return function(*args, **(kwargs or {}))

    for x in (torch.randn(shape), in_channels_last(torch.randn(shape))):
        seen = []
        with Strides():
            method(x, eta=(0.0, 0.1), select=select)
        assert seen == [(x.stride(), x.stride())]


@pytest.mark.parametrize('shape', SHAPES)
def test_the_memory_format_changes_no_bit(shape):
    x = torch.randn(shape)
    outs = []
    for same in (x, in_channels_last(x)):
        torch.manual_seed(1)
        outs.append(batchout(same, eta=(0.0, 0.1)))
    assert torch.equal(*outs)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('eta', [0.1, (0.0, 0.1), torch.tensor(0.1)])
@pytest.mark.parametrize('select', ['first', 'random'])
@pytest.mark.parametrize('stop_gradient', [True, False])
def test_dtype_device_and_strides_are_kept(method, dtype, eta, select, stop_gradient):
    for x in (
        torch.randn(16, 4, 5, 5),
        torch.randn(16, 4, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(16, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
        torch.randn(16, 4, 1, 1).to(memory_format=torch.channels_last),
        torch.randn(4, 16).t(),
    ):
        x = x.to(dtype)
        out = method(x, eta=eta, select=select, stop_gradient=stop_gradient)
        assert (out.dtype, out.device, out.shape, out.stride()) == (x.dtype, x.device, x.shape, x.stride())
        assert out is not x
        assert not torch.equal(out, x)


@pytest.mark.parametrize('method', METHODS)
def test_identity_returns_x_itself(method):
    x = torch.randn(8, 3)
    assert method(x, training=False) is x
    assert method(x, k=0) is x
    assert method(x, k=0.1) is x  # floor(0.8) = 0
    assert method(x, eta=0) is x
    assert method(x, eta=0.0) is x
    assert method(x[:1], k=1) is not None
    one = x[:1]
    assert method(one, k=1) is one
    empty = x[:0]
    assert method(empty, k=1) is empty


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('select', ['first', 'random'])
def test_backward_is_the_upstream_gradient_itself(method, select):
    x = torch.randn(6, 4, requires_grad=True)
    out = method(x, eta=(0.0, 0.5), select=select)
    seen = []
    out.grad_fn.register_hook(lambda grad_in, grad_out: seen.append((grad_in, grad_out)))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert torch.equal(x.grad, upstream)
    ((grad_in, grad_out),) = seen
    assert grad_in[0].data_ptr() == grad_out[0].data_ptr(), 'the gradient was copied'


@pytest.mark.parametrize('method', METHODS)
def test_nothing_is_saved_for_backward(method):
    saved = []
    x = torch.randn(6, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        method(x, eta=(0.0, 0.5))
    assert saved == []


def test_nothing_is_kept_alive_for_backward(monkeypatch):
    targets = []
    push = functional._push

    def spy(x, target, *rest):
        targets.append(weakref.ref(target))
        return push(x, target, *rest)

    monkeypatch.setattr(functional, '_push', spy)
    out = batchout(torch.randn(6, 4, requires_grad=True))
    assert out.grad_fn is not None and targets[0]() is None


def test_gradient_is_that_of_the_net_with_the_push_held_fixed():
    """Numerically, in float64: finite differences of f(x + c) with c = the push at this point and these draws."""
    weight = torch.randn(5, 5, dtype=torch.float64)

    def rest_of_the_net(z):
        return (z @ weight).tanh().pow(2).sum()

    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    rest_of_the_net(batchout(x, eta=(0.0, 0.5))).backward()
    torch.manual_seed(0)
    push = (batchout(x, eta=(0.0, 0.5)) - x).detach()
    numeric = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[i] = 1e-6
        step = step.view_as(x)
        with torch.no_grad():
            numeric.view(-1)[i] = (rest_of_the_net(x + step + push) - rest_of_the_net(x - step + push)) / 2e-6
    torch.testing.assert_close(x.grad, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('select', ['first', 'random'])
def test_without_stop_gradient_the_push_is_differentiated(method, select):
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(0)
        return method(x, eta=0.3, select=select, stop_gradient=False)

    assert torch.autograd.gradcheck(run, x)
    torch.manual_seed(0)
    assert torch.equal(run(x), (torch.manual_seed(0), method(x, eta=0.3, select=select))[1])


def test_input_is_not_changed_and_output_survives_an_in_place_activation():
    x = torch.randn(6, 4, requires_grad=True)
    before = x.detach().clone()
    hidden = x * 1.0
    out = torch.relu_(batchout(hidden, eta=0.3))
    out.sum().backward()
    assert torch.equal(x.detach(), before)
    assert torch.equal(hidden, before), 'a shortcut that reads the same tensor would see the push'
    assert torch.equal(x.grad, (out > 0).to(x.dtype))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_gradient_checkpointing_replays_the_draws(use_reentrant):
    net = nn.Sequential(nn.Linear(4, 8), BatchOut(eta=(0.0, 0.5)), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(10, 4, requires_grad=True)

    def gradients(run):
        net.zero_grad()
        torch.manual_seed(0)
        run(x).pow(2).sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    plain = gradients(net)
    replayed = gradients(lambda x: checkpoint(net, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_activation_dtype(dtype):
    net = nn.Sequential(nn.Linear(4, 8), BatchOut(eta=(0.0, 0.5)))
    with torch.autocast('cpu', dtype):
        out = net(torch.randn(6, 4))
        assert out.dtype == dtype
    out.float().sum().backward()
    assert torch.isfinite(net[0].weight.grad).all()


def test_half_precision_norms_do_not_overflow():
    x = torch.full((4, 1000), 3000.0, dtype=torch.float16)  # the norm is 9e4; float16 ends at 65504
    assert torch.isfinite(gaussian_noise(x, eta=0.1)).all()


@pytest.mark.parametrize('noise', ['batchout', 'gaussian'])
def test_compile_one_graph_and_no_recompilation(noise):
    """The graph survives a new eta and new batch sizes: dynamo compiles once, then once for a dynamic batch."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = BatchOut(eta=0.1, noise=noise)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(8, 4, requires_grad=True)
    for eta in (0.1, 0.2, (0.0, 0.3), 0.7):
        layer.set_eta(eta)
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        assert torch.equal(compiled(x), expected)
    assert len(graphs) == 1
    compiled(torch.randn(10, 4, requires_grad=True))
    settled = len(graphs)
    for size in (12, 16, 22, 34):
        compiled(torch.randn(size, 4, requires_grad=True))
    assert len(graphs) == settled <= 2


@pytest.mark.parametrize('noise', ['batchout', 'gaussian'])
def test_compile_takes_any_k_and_any_batch_size(noise):
    torch._dynamo.reset()
    for k in (0.3, 0.5, 0.7, 1.0):
        layer = BatchOut(k=k, eta=0.1, noise=noise)
        compiled = torch.compile(layer, backend='eager', fullgraph=True, dynamic=True)
        for size in (10, 7, 32):
            x = torch.randn(size, 4, requires_grad=True)
            torch.manual_seed(0)
            expected = layer(x)
            torch.manual_seed(0)
            assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_compile_takes_any_strides(order):
    """Some nets (EfficientViT) hand permuted tensors on, of which not even a slice of the batch is dense."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: batchout(x, eta=(0.0, 0.5)), backend='aot_eager', fullgraph=True)
    sizes = [6, 3, 4, 5]
    x = torch.randn([sizes[i] for i in order]).permute(*(order.index(i) for i in range(4)))
    assert list(x.shape) == sizes
    torch.manual_seed(0)
    expected = batchout(x, eta=(0.0, 0.5))
    torch.manual_seed(0)
    actual = compiled(x)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride() == x.stride()


def test_compile_with_the_default_autograd_backend_gives_the_stated_gradient():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: batchout(x, eta=(0.0, 0.5)) * 3, backend='aot_eager', fullgraph=True)
    x = torch.randn(8, 4, requires_grad=True)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(k=-0.1), r'k .*\[0, 1\].*-0.1'),
        (dict(k=1.5), r'k .*\[0, 1\].*1.5'),
        (dict(k=float('nan')), 'k .*nan'),
        (dict(eta=-0.1), 'eta .*-0.1'),
        (dict(eta=float('nan')), 'eta .*nan'),
        (dict(eta=float('inf')), 'eta .*inf'),
        (dict(eta=(0.2, 0.1)), r'low <= high.*\(0.2, 0.1\)'),
        (dict(eta=(0.0, 0.1, 0.2)), 'pair'),
        (dict(eta='0.1'), "eta .*'0.1'"),
        (dict(eta=torch.rand(2)), 'eta, or a bound of it, must be a 0-d tensor'),
        (dict(k='0.5'), "k .*'0.5'"),
        (dict(k=None), 'k .*None'),
        (dict(select='last'), "select .*'last'"),
    ],
)
def test_bad_arguments(arguments, message):
    x = torch.randn(4, 2)
    for method in METHODS:
        with pytest.raises(ValueError, match=message):
            method(x, **arguments)
    with pytest.raises(ValueError, match=message):
        BatchOutConfig(**arguments)
    with pytest.raises(ValueError, match=message):
        BatchOut(**arguments)


@pytest.mark.parametrize(
    'arguments',
    [
        dict(eta=torch.tensor(float('nan'))),
        dict(eta=torch.tensor(-1.0)),
        dict(eta=(torch.tensor(0.2), torch.tensor(0.1))),
        dict(eta={1: 0.1}),
        dict(sites=None),
        dict(sites=5),
        dict(sites=[3]),
    ],
)
def test_a_config_has_values_and_checks_them(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        BatchOutConfig(**arguments)


def test_numbers_of_numpy_and_torch_are_numbers():
    assert BatchOutConfig(k=np.float32(0.5), eta=np.float32(0.25)) == BatchOutConfig(k=0.5, eta=0.25)
    assert BatchOutConfig(eta=(torch.tensor(0.0), np.float64(0.5))).eta == (0.0, 0.5)
    x = torch.randn(4, 2)
    torch.manual_seed(0)
    expected = batchout(x, eta=(0.0, 0.5))
    torch.manual_seed(0)
    assert torch.equal(batchout(x, eta=[0.0, 0.5]), expected)


@pytest.mark.parametrize(
    'options', [dict(k=0.75), dict(select='random'), dict(per_sample=False), dict(stop_gradient=False)]
)
@pytest.mark.parametrize('noise', ['batchout', 'gaussian'])
def test_the_layer_is_the_function_with_its_options(options, noise):
    method = {'batchout': batchout, 'gaussian': gaussian_noise}[noise]
    results = []
    for run in (
        BatchOut(eta=(0.1, 0.4), noise=noise, **options),
        lambda x: method(x, eta=(torch.tensor(0.1), torch.tensor(0.4)), **options),
    ):
        torch.manual_seed(0)
        x = torch.randn(8, 3, requires_grad=True)
        out = run(x)
        out.square().sum().backward()
        results.append((out, x.grad))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][1], 2 * results[0][0]) == ('stop_gradient' not in options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(method, dtype):
    x = torch.randn(16, 4, 5, 5, device='cuda', dtype=dtype, requires_grad=True)
    for select in ('first', 'random'):
        out = method(x, eta=(0.0, 0.5), select=select)
        assert (out.device, out.dtype) == (x.device, dtype) and not torch.equal(out, x)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


def test_config_reads_what_yaml_can_write():
    assert BatchOutConfig(eta=[0, 0.1]).eta == (0, 0.1)
    assert BatchOutConfig(eta={'act*': [0, 0.1]}).eta == {'act*': (0, 0.1)}
    with pytest.raises(ValueError, match='empty'):
        BatchOutConfig(eta={})
    with pytest.raises(ValueError, match='noise'):
        BatchOutConfig(noise='salt')
    with pytest.raises(ValueError, match='sites'):
        BatchOutConfig(sites='everywhere')


def test_layer_has_no_state_and_says_what_it_does():
    layer = BatchOut(k=0.25, eta=(0.0, 0.1))
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    assert 'k=0.25' in repr(layer) and '(0.0, 0.1)' in repr(layer)
    x = torch.randn(8, 2)
    assert layer.eval()(x) is x
    clone = pickle.loads(pickle.dumps(layer)).train()
    clone.set_eta(0.0)
    assert clone(x) is x
    assert layer.eta == (0.0, 0.1)


def test_half_model_does_not_round_eta():
    layer = BatchOut(eta=0.1).half()
    assert layer.eta_high.dtype == torch.float32
    x = torch.randn(8, 2, dtype=torch.float16)
    assert layer(x).dtype == torch.float16


def test_k_is_the_decimal_that_was_written():
    x = torch.randn(100, 2)
    torch.manual_seed(0)
    out = batchout(x, k=0.29, eta=0.5)
    assert torch.equal(out[29:], x[29:]) and (out[:29] != x[:29]).any(1).sum() >= 25
    shares = [(share / 100, m) for share in range(1, 100) for m in (100, 128, 1000)]
    wrong = [
        (k, m)
        for k, m in shares
        if functional._num_augmented(torch.empty(m), k, 0.1, True, 'first') != round(100 * k) * m // 100
    ]
    assert wrong == []
