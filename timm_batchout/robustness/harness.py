"""A model under attack: chunk by chunk, each saved as soon as it is done, to one Report."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_batchout.data.images import DatasetImages, Images, Split
from timm_batchout.pixels import PixelModel, frozen, modes_kept, seeded, stated_cfg, states_normalization
from timm_batchout.provenance import environment
from timm_batchout.robustness.attacks import ATTACKS, Outcome, check_available
from timm_batchout.robustness.chunks import Chunk, Chunks
from timm_batchout.robustness.masking import judge, measure, misled
from timm_batchout.robustness.report import Audit, Report, Score, Variant
from timm_batchout.text import parse_radius

__all__ = ['drawn', 'evaluate', 'filled_in', 'in_pixels', 'read_pixels', 'weights_sha256']

AUDIT_IMAGES = 200  # the audit looks at those of them that are classified right
AUDIT = ('audit', 0)  # its job
OF_EVERY_ATTACK = ('n', 'eps')  # settings
REMEDY = 'look for broken weights, or for a precision that is too low for them.'

Job = tuple[str, int]  # an attack, and the first image of a chunk
Plan = tuple[int, list[float]]  # how many images an attack is run on, and its radii


@torch.enable_grad()  # attacks need gradients, also where the caller is inside no_grad
def evaluate(
    model: nn.Module,
    images: Tensor | Images | Dataset[Any],
    labels: Tensor | None = None,
    attacks: Sequence[str] = ('fgsm',),
    eps: Sequence[str | float] = ('8/255',),
    eps_l2: Sequence[str | float] = ('0.5',),
    *,
    settings: dict[str, dict[str, Any]] | None = None,
    transfer_from: nn.Module | None = None,
    n: int = 0,
    audit: bool = True,
    batch_size: int = 100,
    seed: int = 0,
    name: str = '',
    data: str = '',
    chunks: Chunks | None = None,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> Report:
    """Accuracy of a model, clean and under each attack; robust means right before and right after.

    Images are attacked in chunks, each with a seed of its own: an interrupted run continues where it stopped, several
    processes share the work, and the numbers stay the same.

    Args:
        model: Any classifier of normalised images; mean and std are taken from its ``pretrained_cfg``. Left in the mode
            that it came in.
        images: (N, C, H, W), uint8, or floating in [0, 1]. Or a set that has the labels, too, and is read chunk by
            chunk: ``Images``, or a map-style data set of (image, class number).
        labels: (N,), class numbers.
        attacks: Names of ``ATTACKS``.
        eps: L-infinity radii, and standard deviations of 'noise', in [0, 1] pixels: numbers, or text such as '8/255'.
        eps_l2: L2 radii in [0, 1] pixels.
        settings: Per attack, in place of its defaults, e.g. ``{'pgd': {'steps': 100}}``; for every attack also ``n``,
            to attack so many of the drawn images only, and ``eps``, for radii of its own.
        transfer_from: The model that 'transfer', and the audit, craft images on.
        n: How many images, drawn at random: data sets sorted by class are common; 0: all.
        audit: Check for gradient masking, and mark what it spoils.
        batch_size: Images per chunk.
        seed: Of the draw and of the attacks.
        name, data: For the report; without a name, timm's of the architecture, or the class.
        chunks: Where finished chunks are kept, for an interrupted evaluation to resume from; None: in memory only.
        rank, world_size: This process takes every world_size-th chunk; ``chunks`` must be shared.
        wait: Returns when all processes have come to it.
        progress: Show a bar.

    Returns:
        The report; on all processes the same.

    Raises:
        ValueError: An unknown attack or setting, or a setting of the wrong type; a package that is missing; a radius
            outside [0, 1] (L2: below 0); n outside the images; images outside [0, 1], labels outside the classes; fewer
            than two classes, logits that are no numbers, an output that is no tensor. Before the first attack.
    """
    check_available(attacks)
    options = filled_in(attacks, settings or {})
    if 'transfer' in options and transfer_from is None:
        raise ValueError("'transfer' needs transfer_from, the model that its images are crafted on.")
    radii = {'L2': _radii(eps_l2, 'L2'), 'Linf': _radii(eps, 'Linf')}
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    everything = _as_images(images, labels)
    chunks = chunks or Chunks()
    if world_size > 1 and chunks.folder is None:
        raise ValueError('Several processes share their work in a folder: name one as chunks.')
    started = time.perf_counter()
    with modes_kept(model, *([] if transfer_from is None else [transfer_from])):
        pixel_model, source = in_pixels(model), None if transfer_from is None else in_pixels(transfer_from)
        chosen = everything.select(drawn(len(everything), n, seed))
        classes, shape = check_input(pixel_model, chosen)
        plans: dict[str, Plan] = {'clean': (len(chosen), [])}
        plans |= {attack: _plan(attack, options[attack], radii, len(chosen)) for attack in attacks}
        sha256 = weights_sha256(model)
        crafted_on = None if transfer_from is None else weights_sha256(transfer_from)
        stated = {name: dict(options[name]) for name in attacks}
        if 'transfer' in options:
            stated['transfer']['source_sha256'] = crafted_on
            options['transfer']['source'] = source
        preprocessing = {
            'mean': pixel_model.mean.flatten().tolist(),
            'std': pixel_model.std.flatten().tolist(),
            'input_size': list(shape),
            'crop_pct': getattr(chosen, 'crop_pct', 1.0),
            'stated': states_normalization(model),
        }
        machine = environment(pixel_model.mean.device, sorted({ATTACKS[name].extra for name in attacks} - {''}))
        versions = {name: value for name, value in machine.items() if name not in ('hardware', 'cpu_threads')}
        chunks.open([sha256, crafted_on, preprocessing, stated, plans, batch_size, seed, versions])
        if rank == 0 and not chunks.resume:
            chunks.discard()
        wait()
        jobs = [AUDIT] if audit else []
        jobs += [(attack, start) for attack, (size, _) in plans.items() for start in range(0, size, batch_size)]

        def chunk(attack: str, start: int) -> Chunk:
            audited = (attack, start) == AUDIT
            size, eps_of = (min(AUDIT_IMAGES, len(chosen)), []) if audited else plans[attack]
            end = size if audited else min(start + batch_size, size)
            x, y = read_pixels(chosen, slice(start, end), classes, pixel_model.mean.device)

            def measured() -> Chunk:
                if audited:
                    return [asdict(measure(pixel_model, x, y, seed, source))]
                return _chunk(pixel_model, x, y, attack, eps_of, seed + start, options.get(attack, {}))

            return chunks.saved(f'{attack}_{start:07d}', _hash_tensors(x, y), measured)

        with frozen(pixel_model):
            done = {job: chunk(*job) for job in _bar(jobs[rank::world_size], progress and rank == 0)}
            wait()
            done |= {job: chunk(*job) for job in jobs if job not in done}  # those of the other processes
    scores = [score for attack in plans for score in _scores(attack, [done[job] for job in jobs if job[0] == attack])]
    found = None
    if audit:
        right = {score.key: _column([done[job] for job in jobs if job[0] == score.attack], score) for score in scores}
        found = judge(Audit(**done[AUDIT][0]), scores, right)
        for score in scores:
            score.masked = score.attack != 'clean' and misled(ATTACKS[score.attack].loss, found)
    return Report(
        model=name or stated_cfg(model).get('architecture') or type(model).__name__,
        data=data,
        n=scores[0].n,
        indices=f'the first n of torch.randperm({len(everything)}), seed {seed}',
        batch_size=batch_size,
        seed=seed,
        weights_sha256=sha256,
        preprocessing=preprocessing,
        settings=stated,
        scores=scores,
        audit=found,
        environment=machine,
        seconds=round(time.perf_counter() - started, 1),
    )


def in_pixels(model: nn.Module) -> PixelModel:
    either_format = states_normalization(model)  # a timm net
    device = next(model.parameters(), torch.empty(0)).device
    return PixelModel(model, channels_last=either_format).to(device)


def _as_images(images: Any, labels: Tensor | None) -> Images:
    if isinstance(images, Tensor) and labels is not None:
        if len(images) != len(labels):
            raise ValueError(f'There are {len(images)} images, {len(labels)} labels: give every image its label.')
        if len(labels):
            _check_labels(labels)
        return Split(images.detach(), labels.long())
    if isinstance(images, Tensor) or labels is not None:
        raise ValueError('Give images and labels as two tensors, or a data set of (image, label) instead of both.')
    return images if hasattr(images, 'read') else DatasetImages(images)


def drawn(total: int, n: int, seed: int) -> Tensor:
    """n images in random order, so that any first part of them is a fair sample."""
    if not total:
        raise ValueError('There are no images to evaluate on.')
    if not 0 <= n <= total:
        raise ValueError(f'n must lie in [1, {total}], the images, or be 0 for all; got {n}.')
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: n or None]


def read_pixels(images: Images, part: slice, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A chunk in [0, 1] pixels, float32, and its labels, checked.

    Raises:
        ValueError: Images that are no images, labels that are no classes of the model, no image that can be read.
    """
    x, y = images.read(part)
    if not len(x):
        raise ValueError(f'None of the images {part.start} to {part.stop} can be read.')
    _check_batch(x, y, classes)
    pixels = x.contiguous().float()
    if x.dtype == torch.uint8:
        pixels = pixels / 255  # before the GPU has them, which divides to other bits
    return pixels.to(device), y.to(device).long()


def _check_batch(x: Tensor, y: Tensor, classes: int) -> None:
    """Raise ValueError unless these are images and class numbers; the latter below ``classes``, if that is known."""
    _check_labels(y)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f'Images must be uint8, or floating in [0, 1], got {x.dtype}: images.to(torch.uint8)?')
    if x.is_floating_point() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f'Images must lie in [0, 1], got [{x.min():.3g}, {x.max():.3g}]. Unnormalise them.')
    if classes and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f'Labels must lie in [0, {classes}), the classes of the model; got [{int(y.min())}, {int(y.max())}].'
        )


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f'Labels must be class numbers (N,), int64, got {list(labels.shape)}, {labels.dtype}.')


def check_input(model: PixelModel, images: Images) -> tuple[int, torch.Size]:
    """Raise ValueError on what no attack could make sense of; returns the model's classes and the images' shape.

    Images in memory are looked at as a whole, others at their beginning and then as they are read.
    """
    x, y = images.read(slice(0, len(images) if isinstance(images, Split) else 2))
    _check_batch(x, y, 0)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if dtypes:
        raise ValueError(f'The weights are {dtypes.pop()}; attacks are reported in float32: evaluate model.float().')
    if model.mean.numel() not in (1, x.shape[1]):
        raise ValueError(
            f'The images have {x.shape[1]} channels, the model takes {model.mean.numel()} by its mean: set mean '
            'and std of its pretrained_cfg, one value per channel.'
        )
    with torch.no_grad(), seeded(0):
        try:
            first, _ = read_pixels(images, slice(0, 2), 0, model.mean.device)
            logits = model(first)
        except AttributeError as error:
            raise ValueError(f'The model must return a tensor of logits (B, classes): {error}.') from error
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f'The model must return logits (B, classes) of two classes or more, got {list(logits.shape)}.')
    if not torch.isfinite(logits).all():
        raise ValueError(f'The logits are NaN or infinite: {REMEDY}')
    _check_batch(x, y, logits.shape[1])
    return logits.shape[1], x.shape[1:]


def filled_in(attacks: Sequence[str], settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of each attack, with its defaults.

    Raises:
        ValueError: A setting of an attack that is not run, that there is not, or of another type than its default.
    """
    unused = sorted(set(settings) - set(attacks))
    if unused:
        raise ValueError(f'There are settings for {", ".join(unused)}, which is not among the attacks.')
    options = {}
    for name in attacks:
        defaults, given = ATTACKS[name].settings, dict(settings.get(name) or {})
        for setting, value in given.items():
            if setting == 'eps':
                given['eps'] = _listed(value)
            elif setting in defaults or setting == 'n':
                _check_setting(f'{setting} of {name}', value, defaults.get(setting, 0))
            else:
                raise ValueError(f'{name} has no setting {setting!r}; it has {[*defaults, *OF_EVERY_ATTACK]}.')
        options[name] = {**defaults, **given}
    return options


def _check_setting(name: str, value: Any, default: Any) -> None:
    """Values are of the type of the default; lists are choices from it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), 'true or false'
    elif isinstance(default, int):  # a default of 0: the range is checked where it is known
        fits, wanted = number and isinstance(value, int) and (value > 0 or not default), 'a whole number, 1 or more'
    elif isinstance(default, float):
        fits, wanted = number and 0 <= value < math.inf, 'a number, 0 or more'
    else:
        fits, wanted = isinstance(value, (list, tuple)) and len(value) > 0, f'some of {default}'
        fits = fits and all(choice in default for choice in value)
    if not fits:
        raise ValueError(f'{name} must be {wanted}, got {value!r}.')


def _plan(attack: str, options: dict[str, Any], radii: dict[str, list[float]], images: int) -> Plan:
    n = options.get('n', images)
    if not 0 < n <= images:
        raise ValueError(f'n of {attack} must lie in [1, {images}], the images, got {n}.')
    norm = 'L2' if ATTACKS[attack].norm == 'L2' else 'Linf'  # standard deviations of 'noise' are bounded as Linf radii
    return n, _radii(options['eps'], norm) if 'eps' in options else radii[norm]


def _listed(eps: Any) -> list[Any]:
    return list(eps) if isinstance(eps, (list, tuple)) else [eps]


def _radii(eps: Any, norm: str) -> list[float]:
    return list(dict.fromkeys(parse_radius(epsilon, norm) for epsilon in _listed(eps)))


def _chunk(
    model: PixelModel,
    images: Tensor,
    labels: Tensor,
    attack: str,
    radii: Sequence[float],
    seed: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """The outcome on some images, as JSON: a record for each variant of the attack."""
    with seeded(seed):  # the model may draw, too
        if attack == 'clean':
            outcome = _clean(model, images, labels)
        else:
            own = {name: value for name, value in options.items() if name not in OF_EVERY_ATTACK}
            outcome = ATTACKS[attack].run(model, images, labels, radii, seed, **own)
    # JSON knows no infinity: None where nothing was found.
    records = []
    for variant, right in outcome.right.items():
        record: dict[str, Any] = {**variant._asdict(), 'right': right.int().tolist()}
        if variant in outcome.distance:
            record['distance'] = [value if value < torch.inf else None for value in outcome.distance[variant].tolist()]
        records.append(record)
    return records


@torch.no_grad()
def _clean(model: PixelModel, images: Tensor, labels: Tensor) -> Outcome:
    logits = model(images)
    broken = ~torch.isfinite(logits).all(1)
    if broken.any():
        raise ValueError(f'The logits of {int(broken.sum())} of {len(images)} images are NaN or infinite: {REMEDY}')
    return Outcome({Variant(): logits.argmax(1) == labels})


def _scores(attack: str, chunks: list[Chunk]) -> list[Score]:
    norm = '' if attack == 'clean' else ATTACKS[attack].norm
    scores = []
    for records in zip(*chunks, strict=True):
        variant = Variant(**{name: records[0][name] for name in Variant._fields})
        right = [value for record in records for value in record['right']]
        score = Score(attack, sum(right), len(right), norm, *variant)
        if 'distance' in records[0]:
            found = [value for record in records for value in record['distance']]
            middle = torch.tensor([torch.inf if value is None else value for value in found]).median().item()
            known = [value for value in found if value is not None]
            score.median_distance = middle if middle < torch.inf else None
            score.mean_distance = sum(known) / len(known) if known else None
        scores.append(score)
    return scores


def _column(chunks: list[Chunk], score: Score) -> list[int]:
    """1 for every image that is right."""
    same = (record for chunk in chunks for record in chunk)
    return [
        value
        for record in same
        if all(record[name] == getattr(score, name) for name in Variant._fields)
        for value in record['right']
    ]


def weights_sha256(model: nn.Module) -> str:
    """Of the state_dict: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash_tensors(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f'{tensor.dtype} {list(tensor.shape)}'.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bar(jobs: Sequence[Job], show: bool) -> Any:
    """With the time that is left; a line a minute where there is no terminal."""
    if not show:
        return jobs
    from tqdm import tqdm

    return tqdm(jobs, 'chunks', unit=' chunk', mininterval=0.1 if sys.stderr.isatty() else 60)
