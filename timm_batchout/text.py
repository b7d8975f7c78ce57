"""Radii such as '8/255' to numbers and back, and suggestions for misspelt names. Imports nothing heavy."""

import difflib
import math
from collections.abc import Iterable
from fractions import Fraction

__all__ = ['did_you_mean', 'format_radius', 'parse_radius']


def parse_radius(radius: str | float, norm: str = 'Linf') -> float:
    """``'8/255'``, ``'0.3'`` or a number, in [0, 1] pixels.

    Args:
        radius: The text or number.
        norm: 'Linf' radii are at most 1; 'L2' radii may be larger.

    Raises:
        ValueError: Not a number, negative or infinite, or an Linf radius above 1.
    """
    try:
        if isinstance(radius, bool):
            raise TypeError
        value = float(Fraction(radius)) if isinstance(radius, str) else float(radius)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"epsilon must be a number such as 0.3 or '8/255', got {radius!r}.") from error
    if norm == 'L2':
        if not 0 <= value < math.inf:
            raise ValueError(f'An L2 radius must be finite and at least 0, got {radius!r}.')
    elif not 0 <= value <= 1:
        raise ValueError(f'epsilon is in [0, 1] pixels, got {radius!r}. Divide 8-bit values by 255.')
    return value


def format_radius(radius: float) -> str:
    """A radius in [0, 1] pixels as people write it: '0.3', or '8/255' where that is exact and two decimals are not."""
    if math.isclose(radius, round(radius, 2), abs_tol=1e-9):
        return f'{radius:.2f}'.rstrip('0').rstrip('.')
    levels = radius * 255
    return f'{round(levels)}/255' if math.isclose(levels, round(levels), abs_tol=1e-6) else f'{radius:.6g}'


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """' Did you mean ...?', or '' if no word is close.

    Args:
        word: The misspelt word.
        words: The valid words. Dotted keys are also compared by their last part, because errors name nested keys with
            and without their path.
    """
    words = list(words)
    by_last_part = {candidate.rpartition('.')[2]: candidate for candidate in reversed(words)}
    for form, candidates in ((word, {w: w for w in words}), (word.rpartition('.')[2], by_last_part)):
        close = difflib.get_close_matches(form, candidates, n=1)
        if close:
            return f' Did you mean {candidates[close[0]]!r}?'
    return ''
