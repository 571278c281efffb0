"""The `compare` command: `app.command()(compare)` mounts it on a typer application."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..flags import takes
from ..io.paths import expanded
from ..progress import Reporter
from ..recipe import Recipe


@takes(
    Recipe,
    (
        "output",
        "evidence",
        "eval_safe_data",
        "eval_task_data",
        "robustness",
        "judge",
        "limit",
        "seed",
        "device",
        "dtype",
    ),
)
def compare(
    given: dict[str, Any],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with `methods`, `strengths` and evaluation data.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")] = False,
) -> None:
    """Compare merging methods on held-out prompts: Pareto table and plot, at equal refusal, as Markdown, JSON and HTML."""
    from .compare import compare as run
    from .recipe import Comparison
    from .report import markdown_table

    comparison = Comparison.load(recipe, **given)
    report = run(comparison, reporter=Reporter(quiet))
    typer.echo("\n".join(markdown_table(report)))
    typer.echo(
        f"\nwritten to {expanded(comparison.output).absolute()}: report.md, report.json, compare.html, pareto.png"
    )
