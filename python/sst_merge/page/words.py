"""Numbers as people read them."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import numpy as np

from .model import Cell, Interval

Show = Callable[[float | None], str]
NONE = "–"
_THIN = "\u202f"  # a narrow space that does not break


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f}{_THIN}%"


def number(value: float | None, digits: int = 2) -> str:
    """To so many significant digits, never in exponents: 0.042, 0.00009, 12.6."""
    if value is None:
        return NONE
    return np.format_float_positional(value, precision=digits, fractional=False, trim="-") if value else "0"


def fixed(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:z.{digits}f}"


def interval(value: float | None, low: float | None = None, high: float | None = None) -> Interval | None:
    """None for what was not measured."""
    return None if value is None else Interval(value, low, high)


def between(found: Interval | None, show: Show = number) -> str:
    """The bounds of an interval, "" where it has none."""
    if found is None or found.low is None or found.high is None:
        return ""
    low, high = show(found.low), show(found.high)
    if low == high:
        return ""
    unit = low[len(low.rstrip(f"{_THIN}%")) :]
    return f"{low.removesuffix(unit)}–{high}"


def measured(found: Interval | None, show: Show = number) -> Cell:
    """A measured value with its interval below."""
    value = None if found is None else found.value
    return Cell(show(value), value, between(found, show))


def share(rate: float | None, of: int | None, low: float | None = None, high: float | None = None) -> Interval | None:
    """A share of so many prompts, with its bounds as given or Wilson's."""
    if rate is None:
        return None
    if low is None and of:
        from scipy.stats import binomtest

        found = binomtest(min(of, round(rate * of)), of).proportion_ci(method="wilson")
        low, high = float(found.low), float(found.high)
    return Interval(rate, low, high)


def moved(what: str, before: float | None, after: float, show: Show = percent) -> str:
    """ "refusals rise from 25 % to 79 %", or fall, or stay."""
    if before is None:
        return f"{what} stand at {show(after)}"
    if show(before) == show(after):
        return f"{what} stay at {show(after)}"
    return f"{what} {'rise' if after > before else 'fall'} from {show(before)} to {show(after)}"


def command(text: str) -> str:
    """A command with a flag a line, as a shell takes it."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    if "\n" in text or shlex.join(words) != text:
        return text
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)
