"""Evaluate a model under attack, chunk by chunk, each saved as soon as it is done, into one Report."""

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_batchout.data.images import Images
from timm_batchout.pixels import PixelModel, frozen, modes_kept, seeded, stated_cfg, states_normalization
from timm_batchout.provenance import environment
from timm_batchout.robustness.attacks import Attack, Batch, Outcome, as_attacks
from timm_batchout.robustness.chunks import Chunk, Chunks
from timm_batchout.robustness.inputs import (
    REMEDY,
    as_images,
    check_input,
    drawn,
    in_pixels,
    read_pixels,
    weights_sha256,
)
from timm_batchout.robustness.masking import judge, measure, misled
from timm_batchout.robustness.report import Audit, Report, Score, Variant
from timm_batchout.text import parse_radius

__all__ = ['evaluate']

AUDIT_IMAGES = 200  # the audit examines those that are classified correctly
AUDIT = ('audit', 0)  # the audit's job

Job = tuple[str, int]  # an attack, and the first image of a chunk
Plan = tuple[int, list[float]]  # the number of images an attack is run on, and its radii


@torch.enable_grad()  # attacks need gradients, also where the caller is inside no_grad
def evaluate(
    model: nn.Module,
    images: Tensor | Images | Dataset[Any],
    labels: Tensor | None = None,
    attacks: Sequence[str | Attack] = ('fgsm',),
    eps: Sequence[str | float] = ('8/255',),
    eps_l2: Sequence[str | float] = ('0.5',),
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
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
    """Accuracy of a model, clean and under each attack; robust means correct both before and after.

    ``evaluate(model, dataset, attacks=['fgsm', tb.attacks.PGD(steps=100)], eps=['4/255', '8/255'])``

    Images are attacked in chunks, each with a seed of its own: an interrupted run continues where it stopped, several
    processes share the work, and the numbers stay the same.

    Args:
        model: Any classifier of normalised images; mean and std are taken from its ``pretrained_cfg``. Its mode (train
            or eval) is restored.
        images: (N, C, H, W), uint8, or floating in [0, 1]. Or a data set that includes the labels and is read chunk
            by chunk: ``Images``, or a map-style data set of (image, class number).
        labels: (N,), class numbers.
        attacks: Names (see ``tb.attacks.ATTACKS``), or attacks with settings: ``tb.attacks.PGD(steps=100)``.
        eps: L-infinity radii, and standard deviations of 'noise', in [0, 1] pixels: numbers, or text such as '8/255'.
        eps_l2: L2 radii in [0, 1] pixels.
        settings: Settings of attacks given by name, e.g. ``{'pgd': {'steps': 100, 'n': 500}}``.
        transfer_from: The model on which 'transfer', and the audit, craft images.
        n: Evaluate on this many images, drawn at random because data sets are often sorted by class; 0: on all.
        audit: Check for gradient masking, and mark the scores it spoils.
        batch_size: Images per chunk.
        seed: Seed of the draw and of the attacks.
        name: Name of the model in the report; default: its timm architecture, else its class.
        data: Name of the data in the report.
        chunks: Where finished chunks are kept, for an interrupted evaluation to resume from; None: in memory only.
        rank: This process takes every ``world_size``-th chunk, starting at this one.
        world_size: Number of processes, which must share ``chunks``.
        wait: Returns when all processes have called it.
        progress: Show a progress bar.

    Returns:
        The report; on all processes the same.

    Raises:
        ValueError: An unknown attack or setting, or a setting of the wrong type; a missing package; a radius outside
            [0, 1] (L2: below 0); n larger than the data set; images outside [0, 1], labels outside the classes; fewer
            than two classes, logits that are not finite, an output that is not a tensor. All before the first attack.
    """
    chosen = as_attacks(attacks, settings)
    if 'transfer' in chosen and transfer_from is None:
        raise ValueError("'transfer' needs transfer_from, the model that its images are crafted on.")
    radii = {'L2': _radii(eps_l2, 'L2'), 'Linf': _radii(eps, 'Linf')}
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    everything = as_images(images, labels)
    chunks = chunks or Chunks()
    if world_size > 1 and chunks.folder is None:
        raise ValueError('Several processes share their work in a folder: name one as chunks.')
    started = time.perf_counter()
    with modes_kept(model, *([] if transfer_from is None else [transfer_from])):
        pixel_model, source = in_pixels(model), None if transfer_from is None else in_pixels(transfer_from)
        subset = everything.select(drawn(len(everything), n, seed))
        classes, shape = check_input(pixel_model, subset)
        plans: dict[str, Plan] = {'clean': (len(subset), [])}
        plans |= {name: _plan(attack, radii, len(subset)) for name, attack in chosen.items()}
        sha256 = weights_sha256(model)
        crafted_on = None if transfer_from is None else weights_sha256(transfer_from)
        stated = {name: attack.settings() for name, attack in chosen.items()}
        if 'transfer' in stated:
            stated['transfer']['source_sha256'] = crafted_on
        preprocessing = {
            'mean': pixel_model.mean.flatten().tolist(),
            'std': pixel_model.std.flatten().tolist(),
            'input_size': list(shape),
            'crop_pct': getattr(subset, 'crop_pct', 1.0),
            'stated': states_normalization(model),
        }
        machine = environment(pixel_model.mean.device, sorted({attack.package for attack in chosen.values()} - {''}))
        versions = {name: value for name, value in machine.items() if name not in ('hardware', 'cpu_threads')}
        chunks.open([sha256, crafted_on, preprocessing, stated, plans, batch_size, seed, versions])
        if rank == 0 and not chunks.resume:
            chunks.discard()
        wait()
        work = _Work(pixel_model, source, subset, classes, chosen, plans, batch_size, seed, chunks)
        jobs = work.jobs(audit)
        with frozen(pixel_model):
            done = {job: work.chunk(*job) for job in _bar(jobs[rank::world_size], progress and rank == 0)}
            wait()
            done |= {job: work.chunk(*job) for job in jobs if job not in done}  # those of the other processes
    by_attack = {name: [done[job] for job in jobs if job[0] == name] for name in plans}
    norms = {'clean': '', **{name: attack.norm for name, attack in chosen.items()}}
    scores = [score for name, parts in by_attack.items() for score in _scores(name, norms[name], parts)]
    found = None
    if audit:
        right = {score.key: _column(by_attack[score.attack], score) for score in scores}
        found = judge(Audit(**done[AUDIT][0]), scores, right)
        for score in scores:
            score.masked = score.attack != 'clean' and misled(chosen[score.attack].loss, found)
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


@dataclass
class _Work:
    """An evaluation cut into jobs: one for the audit, and one for each attack and chunk of images."""

    model: PixelModel
    source: PixelModel | None
    images: Images
    classes: int
    attacks: Mapping[str, Attack]
    plans: Mapping[str, Plan]
    batch_size: int
    seed: int
    chunks: Chunks

    def jobs(self, audit: bool) -> list[Job]:
        starts = [(name, i) for name, (size, _) in self.plans.items() for i in range(0, size, self.batch_size)]
        return [AUDIT, *starts] if audit else starts

    def chunk(self, name: str, start: int) -> Chunk:
        """The result of a job, read from ``chunks`` if it was done before."""
        audited = (name, start) == AUDIT
        size, radii = (min(AUDIT_IMAGES, len(self.images)), []) if audited else self.plans[name]
        end = size if audited else min(start + self.batch_size, size)
        x, y = read_pixels(self.images, slice(start, end), self.classes, self.model.mean.device)

        def measured() -> Chunk:
            if audited:
                return [asdict(measure(self.model, x, y, self.seed, self.source))]
            batch = Batch(self.model, x, y, radii, self.seed + start, self.source)
            with seeded(batch.seed):  # the model may draw, too
                return _records(_clean(batch) if name == 'clean' else self.attacks[name].run(batch))

        return self.chunks.saved(f'{name}_{start:07d}', _hash_tensors(x, y), measured)


def _plan(attack: Attack, radii: Mapping[str, list[float]], images: int) -> Plan:
    n = images if attack.n is None else attack.n
    if not 0 < n <= images:
        raise ValueError(f'n of {attack.name} must lie in [1, {images}], the images, got {n}.')
    norm = 'L2' if attack.norm == 'L2' else 'Linf'  # standard deviations of 'noise' are bounded like Linf radii
    return n, _radii(attack.eps, norm) if attack.eps else radii[norm]


def _radii(eps: Any, norm: str) -> list[float]:
    listed = eps if isinstance(eps, (list, tuple)) else [eps]
    return list(dict.fromkeys(parse_radius(epsilon, norm) for epsilon in listed))


def _records(outcome: Outcome) -> Chunk:
    """The outcome as JSON: a record for each variant. JSON has no infinity: None where nothing was found."""
    records = []
    for variant, right in outcome.right.items():
        record: dict[str, Any] = {**variant._asdict(), 'right': right.int().tolist()}
        if variant in outcome.distance:
            record['distance'] = [value if value < torch.inf else None for value in outcome.distance[variant].tolist()]
        records.append(record)
    return records


@torch.no_grad()
def _clean(batch: Batch) -> Outcome:
    logits = batch.model(batch.images)
    broken = ~torch.isfinite(logits).all(1)
    if broken.any():
        raise ValueError(
            f'The logits of {int(broken.sum())} of {len(batch.images)} images are NaN or infinite: {REMEDY}'
        )
    return Outcome({Variant(): logits.argmax(1) == batch.labels})


def _scores(attack: str, norm: str, chunks: list[Chunk]) -> list[Score]:
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
    """1 for every image that withstands this variant of the attack, 0 for the others."""
    same = (record for chunk in chunks for record in chunk)
    return [
        value
        for record in same
        if all(record[name] == getattr(score, name) for name in Variant._fields)
        for value in record['right']
    ]


def _hash_tensors(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f'{tensor.dtype} {list(tensor.shape)}'.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bar(jobs: Sequence[Job], show: bool) -> Any:
    """A progress bar with the remaining time; without a terminal, a line a minute."""
    if not show:
        return jobs
    from tqdm import tqdm

    return tqdm(jobs, 'chunks', unit=' chunk', mininterval=0.1 if sys.stderr.isatty() else 60)
