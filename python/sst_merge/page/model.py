"""What a page holds. All text is plain, and as it is shown: the template escapes it, the script only places it.

A page is read from top to bottom: what it says in a sentence, what became of the budget, the trade in a chart whose points lead to
commands and answers, the table of the same, what the prompts show, and folded away what repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["ours", "plain", "rival"]
State = Literal["kept", "unsure", "broken", "unmeasured"]


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Column:
    """A heading; `minor` ones are left out of the table where it is narrow, and stand with the chosen point."""

    name: str
    minor: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `value` is what it is sorted by, `detail` stands smaller below."""

    text: str
    value: float | str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Series:
    """A method along its strength; `shown` at first, or when asked for."""

    name: str
    role: Role
    shown: bool = True
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One adapter that was measured: a point in the chart, a row in the table.

    note: what its label means. answers: its name in `Page.answers`, "" where none were kept. command: what makes it, "" where nothing does.
    """

    series: str
    label: str
    cells: tuple[Cell, ...]
    kl: Interval | None = None
    refused: Interval | None = None
    nll: Interval | None = None
    note: str = ""
    command: str = ""
    answers: str = ""
    here: bool = False
    front: bool = False


@dataclass(frozen=True)
class Light:
    """What became of what was asked for: a KL budget in nats per label token, or a share refused (`share`)."""

    state: State
    title: str
    words: str
    asked: float | None = None
    measured: Interval | None = None
    share: bool = False


@dataclass(frozen=True)
class Prediction:
    """A predicted benign KL beside the measured one."""

    label: str
    predicted: float
    measured: Interval


@dataclass(frozen=True)
class Answers:
    """What every prompt met: `rows` hold set, line and prompt, and `of` the records of each adapter by its name; `left` rows are not here."""

    names: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    rows: tuple[dict[str, Any], ...] = ()
    left: int = 0


@dataclass(frozen=True)
class Fold:
    """A folded part: preformatted text, or a table with its header first."""

    title: str
    text: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Page:
    title: str
    overline: str
    headline: str
    claims: tuple[str, ...] = ()
    light: Light | None = None
    columns: tuple[Column, ...] = ()
    series: tuple[Series, ...] = ()
    points: tuple[Point, ...] = ()
    before: Interval | None = None  # refused without the patch
    before_nll: float | None = None
    here: str = ""  # what stands beside the point that is `here`
    notes: tuple[str, ...] = ()
    units: str = ""
    predictions: tuple[Prediction, ...] = ()
    answers: Answers = field(default_factory=Answers)
    worst: tuple[dict[str, Any], ...] = ()  # where no answers hold them: prompt, line, kl
    examples: tuple[dict[str, Any], ...] = ()  # name, spans of {text, label}
    folds: tuple[Fold, ...] = ()
