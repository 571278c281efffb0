"""The `compare` command: `app.command()(compare)` mounts it on a typer application."""

from __future__ import annotations

import json
from typing import Any

import typer

from ..errors import RecipeError
from ..flags import Config, Json, Quiet, RecipeFile, takes
from ..io.paths import expanded
from ..progress import Reporter
from ..recipe import Recipe

ENTRIES = (
    "model", "safety", "task", "harm_data", "benign_data", "safe_data", "guard", "evidence", "eval_harm_data", "eval_benign_data", "eval_safe_data", "eval_task_data", "robustness", "judge", "task_tokens", "output", "rank", "template", "columns",
    "max_length", "tokens_per_batch", "limit", "skip_bad_lines", "generate_tokens", "seed", "device", "dtype", "quantization",
)  # fmt: skip


@takes(Recipe, ENTRIES)
def compare(
    given: dict[str, Any], recipe: RecipeFile = None, config: Config = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Compare merging methods on held-out prompts: a table at equal refusal as Markdown and JSON, a page with chart and answers.

    The recipe has `methods`, `strengths` and evaluation data.
    """
    if (path := recipe or config) is None or (recipe and config):
        raise RecipeError("compare: give one recipe, a YAML file with `methods`, `strengths` and evaluation data")
    from .compare import compare as run
    from .recipe import Comparison
    from .report import UNITS, markdown_table

    comparison = Comparison.load(path, **given)
    report = run(comparison, reporter=Reporter(quiet))
    output = expanded(comparison.output).absolute()
    if as_json:
        typer.echo(json.dumps(report | {"output": str(output)}, ensure_ascii=False))
        return
    typer.echo("\n".join(markdown_table(report)))
    typer.echo(f"\n* not dominated by any other row. {UNITS}")
    typer.echo(f"\nwritten to {output}: report.md, report.json, compare.html")
