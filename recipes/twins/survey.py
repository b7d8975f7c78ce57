"""Examine the BatchOut twin of every architecture of timm, and write the results to survey.json.

    python recipes/twins/survey.py                     all that are not yet examined with values
    python recipes/twins/survey.py --only 'vit_*'      only these, and again

Each net runs on the CPU with three images of the smallest size it accepts. A net too large for the memory runs with
fewer blocks or, if it has no argument for that, on torch's meta device, which has shapes but no values. Its record
says so.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load
from timm.models._registry import _model_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from timm_batchout import BatchOut, batchout_sites
from timm_batchout.provenance import environment, write_atomically
from timm_batchout.sites import windowed_blocks
from timm_batchout.zoo.checkpoint import as_safetensors

RESULT = Path(__file__).with_name('survey.json')
IMAGES = 3  # k = 0.5 pushes the first one of three
SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
FEWER_BLOCKS: tuple[dict[str, Any], ...] = ({'depth': 2}, {'depths': (1, 1, 1, 1)})


def architectures() -> dict[str, str]:
    """Architecture -> timm's model family (its module); without what other packages have registered."""
    names = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm.')]
    return {name: _model_to_module[name] for name in names}


def representatives(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Family -> its architecture with the fewest parameters, of those examined."""
    smallest: dict[str, str] = {}
    for arch, record in sorted(records.items(), key=lambda item: item[1].get('parameters', math.inf)):
        smallest.setdefault(record['family'], arch)
    return dict(sorted(smallest.items()))


def examine(arch: str, compiled: bool = False, memory: float = math.inf, side: int | None = None) -> dict[str, Any]:
    """Run all checks of a twin.

    Args:
        arch: timm's architecture.
        compiled: Also compile a training forward and backward into one graph (backend 'aot_eager').
        memory: Bytes that a training step may need; larger nets run with fewer blocks or on the meta device.
        side: Side of the input; None: the smallest that works.

    Returns:
        The record for survey.json.
    """
    started = time.perf_counter()
    size, model_args = _smallest_input(arch, side)
    parameters = _parameters(arch, model_args)
    fits = memory / 10  # weights and gradients are 8 bytes a parameter
    reduced = {} if parameters < fits else _fewer_blocks(arch, model_args, fits)
    device = 'cpu' if parameters < fits or reduced else 'meta'
    model_args |= reduced
    images = torch.empty(IMAGES, *size, device='meta')
    if device == 'cpu':
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))

    plain = _create(arch, model_args, device).eval()
    expected = _logits(plain, images)
    weights = _fingerprint(plain)
    del plain
    twin = _create(f'batchout_{arch}', model_args, device).eval()
    found = batchout_sites(twin)
    record: dict[str, Any] = {
        'family': _model_to_module[arch],
        'device': device,
        'parameters': parameters,
        'input': [IMAGES, *size],
        **({'reduced': reduced} if reduced else {}),
        'sites': len(found),
        'state_dict_equal': _fingerprint(twin) == weights,
    }
    if device == 'cpu':
        with _rows(twin, found) as before, _FunctionalActivations() as called:
            logits = _logits(twin, images)
        record |= {'functional': sorted(called.by)} if called.by else {}
        with _rows(twin, found) as after:
            _logits(twin, torch.cat([1 - images[:1], images[1:]]))
        record['logits_equal'] = all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
        record['rows_are_images'] = _rows_are_images(before, after)

    with _pushes() as pushed:
        outputs = _training_step(twin, images)
    calls = [pushed.get(id(layer), []) for layer in found.values()]
    record['fired'] = sum(bool(shapes) for shapes in calls)
    record['windowed'] = sum(layer.images is not None for layer in found.values())
    record['leading_dimension_is_images'] = all(shape == IMAGES for shapes in calls for shape, _ in shapes)
    if device == 'cpu':
        changed = [rows for shapes in calls for _, rows in shapes]
        record['pushes'] = sum(map(len, changed))  # fewer than sites fired: a partner may be the sample itself
        record['pushed_first_image_only'] = all(rows <= {0} for rows in changed)
        grads = [p.grad for p in twin.parameters() if p.grad is not None]
        finite = [bool(torch.isfinite(tensor).all()) for tensor in (*outputs, *grads)]
        record['backward_finite'] = bool(grads) and all(finite)
        del twin, outputs, grads
        record |= {name: check(arch, record) for name, check in CHECKS.items()}
    if compiled:
        record['compiled'] = _compiles(f'batchout_{arch}', arch, model_args, images)
    record['seconds'] = round(time.perf_counter() - started, 1)
    return record


def limit_equal(arch: str, record: dict[str, Any]) -> bool:
    """Whether the twin's training forward equals the plain net's, up to rounding, when eta is next to 0.

    It is not where a net reads a pre-activation again that its in-place activation should have overwritten.
    """
    _, channels, side, _ = record['input']
    images = torch.rand(IMAGES, channels, side, side, generator=torch.Generator().manual_seed(0))
    resized = {'img_size': side} if _is_resized(arch, side) else {}
    outputs = []
    for name, eta in ((arch, {}), (f'batchout_{arch}', {'eta': 1e-30})):
        model = _create(name, {**resized, **record.get('reduced', {}), **eta}, 'cpu').train()
        for module in model.modules():
            if 'drop' in type(module).__name__.lower():
                module.eval()  # BatchOut draws random numbers, too, so that dropout would draw others
        torch.manual_seed(1)
        with torch.no_grad(), mock.patch.object(F, 'dropout', lambda x, *args, **kwargs: x):
            outputs.append(_tensors(model(images)))
        del model
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*outputs, strict=True))


def saved_and_loaded(arch: str, record: dict[str, Any]) -> bool:
    """Whether the file that training writes of the twin gives the plain net the same weights."""
    side = record['input'][-1]
    model_args = {**({'img_size': side} if _is_resized(arch, side) else {}), **record.get('reduced', {})}
    weights = _create(f'batchout_{arch}', model_args, 'cpu').state_dict()
    with torch.device('meta'):
        plain = timm.create_model(arch, **model_args)
    plain.load_state_dict(load(as_safetensors(weights)), assign=True)  # raises where a name or a shape differs
    return all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {  # added to records that lack them
    'limit_equal': limit_equal,
    'saved_and_loaded': saved_and_loaded,
}


def _is_resized(arch: str, side: int) -> bool:
    cfg = timm.models.get_pretrained_cfg(arch)
    return bool(cfg and cfg.fixed_input_size and side != cfg.input_size[-1])


def exceptions(record: dict[str, Any]) -> list[str]:
    """What fails in a record; empty for a sound twin."""
    if 'error' in record:
        return [record['error']]
    named = [name for name, value in record.items() if value is False]
    if record['fired'] < record['sites']:
        named.append(f'{record["sites"] - record["fired"]} sites never fired')
    if record.get('pushes') == 0:
        named.append('nothing was pushed')
    if 'functional' in record:
        named.append(f'activations called as functions are no sites: {", ".join(record["functional"])}')
    if record['device'] == 'meta':
        named.append('too large for the memory of this machine: shapes checked, values not')
    if record.get('compiled') not in (None, 'one graph'):
        named.append(record['compiled'])
    return named


def _smallest_input(arch: str, side: int | None = None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The smallest image that the net trains on, and the create_model arguments it takes for that."""
    cfg = timm.models.get_pretrained_cfg(arch)
    default = cfg.input_size if cfg else (3, 224, 224)
    fixed = bool(cfg and cfg.fixed_input_size)
    if side:
        return (default[0], side, side), {'img_size': side} if fixed and side != default[-1] else {}
    with torch.device('meta'):
        if any(windowed_blocks(timm.create_model(arch))):
            return default, {}  # a small image may be one window
    for side in [side for side in SIZES if side < default[-1]]:
        size = (default[0], side, side)
        model_args = {'img_size': side} if fixed else {}
        try:
            with torch.device('meta'):
                model = timm.create_model(f'batchout_{arch}', **model_args)
                _training_step(model, torch.empty(IMAGES, *size))
        except Exception:  # whatever a net raises when it cannot take an image of this size
            continue
        return size, model_args
    return default, {}


def _parameters(arch: str, model_args: dict[str, Any]) -> int:
    with torch.device('meta'):
        return sum(p.numel() for p in timm.create_model(arch, **model_args).parameters())


def _fewer_blocks(arch: str, model_args: dict[str, Any], fits: float) -> dict[str, Any]:
    """create_model arguments with which the net fits; {} if none do."""
    for fewer in FEWER_BLOCKS:
        try:
            if _parameters(arch, {**model_args, **fewer}) < fits:
                return fewer
        except Exception:  # whatever a net raises at an argument that it does not know
            continue
    return {}


def _create(name: str, model_args: dict[str, Any], device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device), _FastInit():
        return timm.create_model(name, **model_args)


class _FastInit(TorchFunctionMode):
    """Random weights by copying one small table: drawing them takes most of the time in a billion parameters."""

    TABLE = torch.randn(2**16 + 1, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.normal_, Tensor.uniform_) and args[0].device.type == 'cpu':
            return self._fill(function, *args, **(kwargs or {}))
        if function is Tensor.erfinv_:  # how a truncated normal is made from a uniform; the table is truncated already
            return args[0]
        return function(*args, **(kwargs or {}))

    def _fill(self, function, tensor, first=0.0, second=1.0, generator=None, **kwargs):
        first, second = kwargs.get('mean', kwargs.get('from', first)), kwargs.get('std', kwargs.get('to', second))
        if function is Tensor.uniform_:
            first, second = (first + second) / 2, (second - first) / 4
        flat = tensor.detach().view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel())
        for chunk in flat.split(len(self.TABLE)):
            torch.add(first, self.TABLE[: len(chunk)].to(chunk.dtype), alpha=second, out=chunk)
        if not tensor.is_contiguous():
            tensor.detach().copy_(flat.view(tensor.shape))
        return tensor


def _logits(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(model(images))


def _tensors(output: Any) -> list[Tensor]:
    """Some nets return a pair (distillation) or a dict."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _tensors(value)]


def _training_step(model: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    outputs = _tensors(model.train()(images))
    torch.stack([output.float().square().mean() for output in outputs]).mean().backward()
    return [output.detach() for output in outputs]


def _fingerprint(model: nn.Module) -> list[tuple]:
    """Keys, shapes, dtypes and sums of the state_dict, in order."""
    return [
        (name, t.shape, t.dtype, None if t.is_meta else t.sum(dtype=torch.float64).item())
        for name, t in model.state_dict().items()
    ]


@contextmanager
def _rows(model: nn.Module, names: dict[str, BatchOut]) -> Iterator[list[Tensor]]:
    """For each call of a site: the sums over each row of its input."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].flatten(1).sum(1, dtype=torch.float64))

    handles = [model.get_submodule(name).register_forward_pre_hook(note) for name in names]
    yield seen
    for handle in handles:
        handle.remove()


class _FunctionalActivations(TorchFunctionMode):
    """Which forwards call an activation as a function, so that no hook sees it: 'file.py: function'."""

    FUNCTIONS = (F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish)
    MODULES = ('torch/nn/', 'timm/layers/')  # whose own modules call them: what hooks see

    def __init__(self) -> None:
        super().__init__()
        self.by: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FUNCTIONS:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.endswith(('torch/nn/functional.py', 'torch/overrides.py')):
                frame = frame.f_back
            path = frame.f_code.co_filename
            if not any(part in path for part in self.MODULES):
                self.by.add(f'{Path(path).name}: {frame.f_code.co_name}')
        return function(*args, **(kwargs or {}))


def _rows_are_images(before: list[Tensor], after: list[Tensor]) -> bool:
    """Another first image changes the first rows of every site's input (one, or all of its windows), and no other."""
    same = []
    for a, b in zip(before, after, strict=True):
        rows = len(a) // IMAGES
        same.append(len(a) % IMAGES == 0 and torch.allclose(a[rows:], b[rows:], rtol=1e-4, atol=1e-4))
    return all(same)


@contextmanager
def _pushes() -> Iterator[dict[int, list[tuple[int, set[int]]]]]:
    """For each BatchOut layer that is called: the leading dimension it saw, and which samples came out changed."""
    seen: dict[int, list[tuple[int, set[int]]]] = {}
    augment = BatchOut.augment

    def spy(self: BatchOut, x: Tensor, training: bool, inplace: bool = False) -> Tensor:
        before = x.detach().clone() if inplace else x
        out = augment(self, x, training, inplace)
        changed = set() if x.is_meta else set((out != before).flatten(1).any(1).nonzero()[:, 0].tolist())
        seen.setdefault(id(self), []).append((len(x), changed))
        return out

    BatchOut.augment = spy
    try:
        yield seen
    finally:
        BatchOut.augment = augment


def _compiles(name: str, arch: str, model_args: dict[str, Any], images: Tensor) -> str:
    """'one graph', or the reason for a failure and whether the plain net fails as well."""
    if _breaks(name, model_args, images) is None:
        return 'one graph'
    if (fault := _breaks(arch, model_args, images)) is not None:
        return f'torch.compile(fullgraph=True) fails without BatchOut as well: {fault}'
    return f'torch.compile(fullgraph=True) fails: {_breaks(name, model_args, images)}'


def _breaks(name: str, model_args: dict[str, Any], images: Tensor) -> str | None:
    torch._dynamo.reset()
    model = _create(name, model_args, 'cpu')
    try:
        _training_step(torch.compile(model, backend='aot_eager', fullgraph=True), images)
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {error}'.strip().splitlines()[0][:200]


def _work(connection: Any, memory: float) -> None:
    """A worker: architectures in, records out, until None comes in."""
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        try:
            arch, compiled, record = job
            if record:
                record.pop('error', None)  # of an earlier try
                record |= {name: check(arch, record) for name, check in CHECKS.items() if name not in record}
            connection.send(record or examine(arch, compiled, memory))
        except Exception as error:
            connection.send({'family': _model_to_module[job[0]], 'error': _first_line(error)})


def _walk(jobs: list[tuple[str, bool, dict]], workers: int, memory: float, done: Callable[[str, dict], None]) -> None:
    """Examine all on several processes; one that is killed (by want of memory, say) costs its own net only."""
    context = multiprocessing.get_context('spawn')
    running: dict[Any, tuple[Any, str]] = {}

    def start() -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, memory), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    idle = [start() for _ in range(min(workers, len(jobs)))]
    while jobs or running:
        while idle and jobs:
            (connection, process), job = idle.pop(), jobs.pop()
            connection.send(job)
            running[connection] = (process, job[0])
        for connection in wait(list(running)):
            process, arch = running.pop(connection)
            try:
                done(arch, connection.recv())
                idle.append((connection, process))
            except EOFError:
                process.join()
                done(arch, {'family': _model_to_module[arch], 'error': f'process ended with {process.exitcode}'})
                idle.append(start())
    for connection, _ in idle:
        connection.send(None)


def _memory() -> int:
    """Bytes of memory that are free now."""
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='glob of architectures to examine again')
    parser.add_argument('--workers', type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument(
        '--memory', type=float, default=_memory() / 2**30, help='GiB for all workers; default: what is free'
    )
    parser.add_argument('--output', type=Path, default=RESULT)
    arguments = parser.parse_args()

    families = architectures()
    known = json.loads(arguments.output.read_text())['architectures'] if arguments.output.is_file() else {}
    known = {arch: record for arch, record in known.items() if arch in families}
    wanted = [arch for arch in families if fnmatchcase(arch, arguments.only)] if arguments.only else families
    todo = [arch for arch in wanted if arguments.only or known.get(arch, {}).get('device') != 'cpu']

    def save() -> None:
        records = {arch: known[arch] for arch in families if arch in known}
        odd = {arch: exceptions(record) for arch, record in records.items() if exceptions(record)}
        summary = {
            'architectures': len(families),
            'examined': len(records),
            'sound': len(records) - len(odd),
            'families': len(set(families.values())),
            'compiled_to_one_graph': sum(record.get('compiled') == 'one graph' for record in records.values()),
            'with_fewer_blocks': sum('reduced' in record for record in records.values()),
            'devices': dict(Counter(record.get('device', 'none') for record in records.values())),
            'exceptions': odd,
        }
        text = {'summary': summary, 'environment': environment(), 'architectures': records}
        write_atomically(arguments.output, json.dumps(text, indent=1) + '\n')

    def walk(archs: list[str], compiled: bool, add_to: dict[str, dict[str, Any]]) -> None:
        with tqdm(total=len(archs), unit='net') as progress:

            def done(arch: str, record: dict[str, Any]) -> None:
                known[arch] = {**add_to.get(arch, {}), **record} if 'error' in record else record
                progress.update()
                if exceptions(record):
                    tqdm.write(f'{arch}: {"; ".join(exceptions(record))}')
                if progress.n % 20 == 0:
                    save()

            jobs = [(arch, compiled, add_to.get(arch, {})) for arch in reversed(archs)]
            _walk(jobs, arguments.workers, arguments.memory * 2**30 / arguments.workers, done)
        save()

    lacking = {
        arch: record
        for arch, record in known.items()
        if record.get('device') == 'cpu' and not set(CHECKS) <= set(record)
    }
    walk(list(lacking), compiled=False, add_to=lacking)
    walk(todo, compiled=False, add_to={})
    # Again, compiled, the smallest net of every family: only now are the sizes known.
    smallest = [arch for arch in representatives(known).values() if not arguments.only or arch in wanted]
    walk([arch for arch in smallest if 'compiled' not in known[arch]], compiled=True, add_to={})


if __name__ == '__main__':
    main()
