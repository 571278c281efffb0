"""What a run tells its user while it works: one progress bar per long pass with rate and time left, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = "–"
        if task.completed and task.elapsed:
            rate = task.completed / task.elapsed
            scale, suffix = pick_unit_and_suffix(int(rate), ["", "k", "M", "G"], 1000) if rate >= 1e4 else (1, "")
            speed = f"{rate / scale:,.{int(rate < 10)}f}{suffix}"
        return Text(f"{speed:>5} {self.unit}/s", style="cyan", no_wrap=True)


class Reporter:
    """Prints to stderr, so that stdout holds results only. `quiet=True` prints nothing, `verbose=True` details as well."""

    def __init__(self, quiet: bool = False, verbose: bool = False):
        self.verbose = verbose
        self.console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False)

    def say(self, text: str, style: str | None = None) -> None:
        """One line of news as it is, brackets of paths and prompts included; `style` as rich names them."""
        self.console.print(text, style=style)

    def detail(self, text: str) -> None:
        """What only those want to read who asked for it (`--verbose`)."""
        if self.verbose:
            self.say(text, "dim")

    def warn(self, text: str) -> None:
        """News that somebody should read."""
        self.say(text, "yellow")

    def track(
        self, items: Iterable[T], label: str, *, size: Callable[[T], int] = lambda _: 1, unit: str = "tokens"
    ) -> Iterator[T]:
        """Iterate over `items` under a bar; `size(item)` is how much work an item is, in `unit`."""
        items = list(items)
        columns = (
            TextColumn("{task.description:<30}", markup=False),
            BarColumn(bar_width=6),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=sum(map(size, items)))
            for item in items:
                yield item
                progress.advance(task, size(item))


def batch_tokens(batch: object) -> int:
    """Tokens of a `data.Batch`, padding included: what a forward pass costs."""
    return int(batch.input_ids.numel())  # type: ignore[attr-defined]
