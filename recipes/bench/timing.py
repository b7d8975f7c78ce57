"""Candidates take turns, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

__all__ = ['in_turns', 'turns', 'wait']


def in_turns(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, at_least: float = 0.0, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each candidate; arguments are those of ``turns``."""
    seconds = turns(candidates, repeats, at_least, warm_up)
    return {name: median(values) for name, values in seconds.items()}


def turns(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, at_least: float = 0.0, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each candidate in each turn.

    Args:
        candidates: Functions by name.
        repeats: Turns that count.
        at_least: Repeat short candidates within a turn to fill this many seconds.
        warm_up: Run each once before the first turn.

    A GPU works on while Python goes on, so every time is taken with nothing left to do on it.
    """
    calls = dict.fromkeys(candidates, 1)
    for name, candidate in candidates.items():
        if warm_up:
            candidate()
        if at_least:
            calls[name] = max(1, round(at_least / max(_seconds(candidate), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            seconds[name].append(_seconds(candidate, calls[name]))
    return seconds


def _seconds(candidate: Callable[[], Any], calls: int = 1) -> float:
    """Mean time of a call."""
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        candidate()
    wait()
    return (time.perf_counter() - started) / calls


def wait() -> None:
    """Return when the GPU, if there is one, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
