"""The `compare` command: `app.command()(compare)` mounts it on a typer application."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .paths import expanded
from .progress import Reporter


def compare(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with `methods`, `strengths` and evaluation data.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report; finished rows in it are kept.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first examples of each file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help='"auto" (default), "cpu", "cuda", …')] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")] = False,
) -> None:
    """Compare merging methods on held-out prompts: Pareto table and plot, at equal refusal, as Markdown, JSON and HTML."""
    from .compare import compare as run
    from .compare_plan import Comparison
    from .compare_report import markdown_table

    given: dict[str, Any] = {"output": output, "limit": limit, "seed": seed, "device": device, "dtype": dtype}
    comparison = Comparison.load(recipe, **{k: v for k, v in given.items() if v is not None})
    report = run(comparison, reporter=Reporter(quiet))
    typer.echo("\n".join(markdown_table(report)))
    typer.echo(
        f"\nwritten to {expanded(comparison.output).absolute()}: report.md, report.json, compare.html, pareto.png"
    )
