"""The commands that run a recipe. Flags and recipe entries have the same names; flags win."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import MergeError, RecipeError
from .flags import Config, Force, Json, Quiet, RecipeFile, Verbose, Yes, takes
from .io.paths import expanded
from .page.facts import unspent
from .progress import Reporter
from .recipe import STRENGTHS, Recipe, read_yaml, summands
from .report import front_table, print_rows, print_table, spent

CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Save the unfinished reading beside the output every so many batches.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints of an interrupted run.")]


class Export(StrEnum):
    """Further forms of a merged adapter: see `io.serving.export`."""

    full = "full"
    gguf_lora = "gguf-lora"


READ = (
    "model", "safety", "task", "harm_data", "benign_data", "self_benign", "safe_data", "output", "opening_tokens", "opening_weight", "opening_apart", "benign_labels", "label_draws", "holdout", "input_rank", "form",
    "template", "columns", "max_length", "tokens_per_batch", "limit", "skip_bad_lines", "seed", "device", "dtype", "quantization",
)  # fmt: skip
MEASURE = (
    "model", "task", "harm_data", "benign_data", "eval_safe_data", "eval_task_data", "generate_tokens", "task_tokens", "robustness", "judge", "template", "columns", "max_length", "tokens_per_batch", "limit", "skip_bad_lines",
    "seed", "device", "dtype", "quantization",
)  # fmt: skip


@takes(Recipe)
def merge(
    given: dict[str, Any],
    recipe: RecipeFile = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing: as `sst-merge check`.")
    ] = False,
    export: Annotated[
        list[Export] | None,
        typer.Option(help="Also write the merged model in full, or the adapter for llama.cpp; may be repeated."),
    ] = None,
    keep_evidence: Annotated[bool, typer.Option(help="Leave the evidence in the output, for other strengths.")] = True,
    pick: Annotated[
        int | None, typer.Option(help="Point of the front in the report beside --evidence: its adapter, in seconds.")
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    yes: Yes = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Merge a safety adapter into a task adapter; write adapter, report, model card, recipe and evidence.

    With --evidence FILE, of an earlier run or of `collect`, nothing is read again: another strength, filter or scope takes seconds.
    """
    entries, front = _picked(given, pick)
    checked = recipe_of({**entries, **given}, recipe, config)
    if dry_run:
        _check(checked, force=force, yes=yes, as_json=as_json)
        return
    from .merge import pipeline
    from .run.launch import leader, ranks

    with ranks():
        reporter = Reporter(quiet or not leader(), verbose)
        report = pipeline.merge(
            checked,
            force=force,
            reporter=reporter,
            checkpoint_every=checkpoint_every,
            resume=resume,
            keep_evidence=keep_evidence,
            front=front,
            exports=[kind.value for kind in export or ()],
            yes=yes,
        )
    if not report:
        return
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        if report["evaluation"]:
            print_table(report["evaluation"])
        if report.get("front"):
            print_rows(front_table(report["front"]))
        print(spent(report))
        if note := unspent(report):
            print(note)
        print(f"written to {expanded(checked.output).absolute()}")
        for words in report["exports"].values():
            print(words)
    if report["failed_exports"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report["failed_exports"].items())
        raise MergeError(f"the adapter is written, an export is not: {reasons}")


def _picked(given: dict[str, Any], number: int | None) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """The recipe entries of a point of a front, and that front."""
    if number is None:
        return {}, None
    from .merge.front import picked

    if given.get("evidence") is None:
        raise MergeError("--pick: takes --evidence, the file in the output whose report has the front")
    if strengths := given.keys() & {*STRENGTHS, "filter", "input_filter", "sweep"}:
        raise MergeError(f"--pick: the point says how strong; leave out {', '.join(sorted(strengths))}")
    return picked(expanded(given["evidence"]), number)


@takes(Recipe, READ)
def collect(
    given: dict[str, Any],
    recipe: RecipeFile = None,
    config: Config = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep gradients over all inputs: tens of times the size.")
    ] = False,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    yes: Yes = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Read the data once and save what they tell about the patch, for `merge --evidence` and `compare --evidence`."""
    from .merge import pipeline
    from .run.launch import leader, ranks

    checked = recipe_of(given, recipe, config)
    with ranks():
        evidence = pipeline.collect_to_file(
            checked,
            exact=exact,
            force=force,
            reporter=Reporter(quiet or not leader(), verbose),
            checkpoint_every=checkpoint_every,
            resume=resume,
            yes=yes,
        )
    if evidence is None:
        return
    path = expanded(checked.output).absolute()
    sides = {
        name: {"sequences": side.counts.sequences, "tokens": side.moments.tokens, "labels": side.counts.labels}
        for name, side in (("harm", evidence.gain), ("benign", evidence.cost))
    }
    if as_json:
        print(json.dumps({"evidence": sides, "bytes": evidence.nbytes, "output": str(path)}, ensure_ascii=False))
        return
    for name, n in sides.items():
        print(f"{name}: {n['sequences']} sequences, {n['tokens']} tokens read, {n['labels']} label tokens")
    print(f"{evidence.nbytes / 2**20:,.0f} MiB written to {path}")


@takes(Recipe)
def check(
    given: dict[str, Any],
    recipe: RecipeFile = None,
    config: Config = None,
    yes: Yes = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say what a merge of this recipe would do, without a pass: one rendered example of each data set, likely mistakes, time and memory."""
    _check(recipe_of(given, recipe, config), force=force, yes=yes, as_json=as_json)


def _check(recipe: Recipe, *, force: bool, yes: bool, as_json: bool) -> None:
    from .merge.check import check

    told = check(recipe, force=force, reporter=Reporter())
    print(json.dumps(told.facts(), ensure_ascii=False) if as_json else told.text())
    if told.mistakes and not yes:
        raise MergeError(f"{len(told.mistakes)} likely mistakes (above); a merge of this would need --yes")


@takes(Recipe, MEASURE)
def evaluate(
    given: dict[str, Any],
    recipe: RecipeFile = None,
    config: Config = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "--safety", help="Adapter folder to measure; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Per-prompt JSON file to create.")] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Refusal NLL and rate on harmful prompts, NLL and KL to the reference on benign ones, over-refusal on safe ones, task accuracy.

    Of a recipe its model, task adapter and settings are taken, and its evaluation data where there are any; its safety adapter only
    without --adapter.
    """
    from .session import evaluate_folders

    entries = _entries(recipe, config)
    for name in ("harm_data", "benign_data"):
        if f"eval_{name}" in entries:
            entries[name] = entries[f"eval_{name}"]
    folders = adapter or (list(summands(entries["safety"])) if "safety" in entries else [])
    kept = {name: value for name, value in entries.items() if name in MEASURE}
    # Two entries that this command has no use for.
    settings = Recipe.parse({**kept, **given, "safety": ".", "output": output or "-"}, where="flags", complete=False)
    results = evaluate_folders(settings, folders, output=output, force=force, reporter=Reporter(quiet, verbose))
    table = {name: result.summary() for name, result in results.items()}
    if as_json:
        print(
            json.dumps({"evaluation": table, "output": str(output.absolute()) if output else None}, ensure_ascii=False)
        )
        return
    print_table(table)
    if output is not None:
        print(f"per-prompt records in {output.absolute()}")


@takes(Recipe, ("output", "seed", "device", "dtype", "quantization"))
def demo(given: dict[str, Any], force: Force = False, quiet: Quiet = False) -> None:
    """Merge two small adapters of SmolLM2-135M-Instruct and compare with plain addition: a few minutes on two cores."""
    from .demo import run

    run(given.pop("output", Path("demo-output")), given, force=force, reporter=Reporter(quiet))


def env(as_json: Json = False) -> None:
    """What this installation can do: versions, devices, compiled parts (`--json` for bug reports)."""
    from sst_kernels.env import main

    main(["--json"] if as_json else [])


def recipe_of(given: dict[str, Any], recipe: Path | None, config: Path | None) -> Recipe:
    """The recipe of a file and flags, which win; a strength among the flags stands for the file's."""
    entries = _entries(recipe, config)
    if given.keys() & set(STRENGTHS):
        entries = {key: value for key, value in entries.items() if key not in STRENGTHS}
    return Recipe.parse({**entries, **given}, where=str(recipe or config or "flags"))


def _entries(recipe: Path | None, config: Path | None) -> dict[str, Any]:
    if recipe is not None and config is not None:
        raise RecipeError(f"two recipes, {recipe} and {config}; give one")
    path = recipe or config
    return read_yaml(path) if path is not None else {}
