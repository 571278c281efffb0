"""`sst-merge`: merge, collect, evaluate, compare, demo, env. Flags and recipe entries have the same names; flags win."""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from .compare.command import compare
from .errors import MergeError, out_of_memory
from .flags import takes
from .io.paths import expanded
from .io.refusals import command as refusals
from .progress import Reporter
from .recipe import Recipe, read_yaml
from .report import print_table, spent, unspent

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Add a safety adapter to a language model without paying the safety tax.",
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
Force = Annotated[bool, typer.Option(help="Replace an earlier output.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Save the unfinished reading beside the output every so many batches.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints of an interrupted run.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML recipe; flags override it.")]
STRENGTHS = ("kl_budget", "mu", "k")
READ = (
    "model", "safety", "task", "harm_data", "benign_data", "self_benign", "safe_data", "output", "opening_tokens", "opening_weight", "opening_apart", "benign_labels", "label_draws", "holdout", "input_rank", "form",
    "max_length", "tokens_per_batch", "limit", "skip_bad_lines", "seed", "device", "dtype",
)  # fmt: skip
MEASURE = ("model", "task", "harm_data", "benign_data", "generate_tokens", "max_length", "tokens_per_batch", "limit", "seed", "device", "dtype")  # fmt: skip


@app.command()
@takes(Recipe)
def merge(
    given: dict[str, Any],
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    keep_evidence: Annotated[bool, typer.Option(help="Leave the evidence in the output, for other strengths.")] = True,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Merge a safety adapter into a task adapter; write adapter, report, plots, model card, recipe and evidence.

    With --evidence FILE, of an earlier run or of `collect`, nothing is read again: another strength, filter or scope takes seconds.
    """
    recipe = _recipe(given, config)
    if dry_run:
        from .merge.plan import lines, plan

        print("\n".join(lines(recipe, plan(recipe, force=force))))
        return
    from .merge import pipeline
    from .run.launch import leader, ranks

    with ranks():
        reporter = Reporter(quiet or not leader())
        report = pipeline.merge(
            recipe,
            force=force,
            reporter=reporter,
            checkpoint_every=checkpoint_every,
            resume=resume,
            keep_evidence=keep_evidence,
        )
    if not report:
        return
    if report["evaluation"]:
        print_table(report["evaluation"])
    print(spent(report))
    if note := unspent(report):
        print(note)
    print(f"written to {expanded(recipe.output).absolute()}")


@app.command()
@takes(Recipe, READ)
def collect(
    given: dict[str, Any],
    config: Config = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep gradients over all inputs: tens of times the size.")
    ] = False,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Read the data once and save what they tell about the patch, for `merge --evidence` and `compare --evidence`."""
    from .merge import pipeline
    from .run.launch import leader, ranks

    recipe = _recipe(given, config)
    with ranks():
        reporter = Reporter(quiet or not leader())
        evidence = pipeline.collect_to_file(
            recipe, exact=exact, force=force, reporter=reporter, checkpoint_every=checkpoint_every, resume=resume
        )
    if evidence is None:
        return
    for name, side in (("harm", evidence.gain), ("benign", evidence.cost)):
        counts = side.counts
        print(f"{name}: {counts.sequences} sequences, {side.moments.tokens} tokens read, {counts.labels} label tokens")
    print(f"{evidence.nbytes / 2**20:,.0f} MiB written to {expanded(recipe.output).absolute()}")


@app.command()
@takes(Recipe, MEASURE)
def evaluate(
    given: dict[str, Any],
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "--safety", help="Adapter folder to measure; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Per-prompt JSON file to create.")] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Refusal NLL and rate on harmful prompts, NLL and KL to the reference on benign ones."""
    import torch

    from .io.data import load_dataset
    from .session import evaluate_folders

    # The two entries of a recipe that this command has no use for.
    recipe = Recipe.parse({**given, "safety": ".", "output": output or "-"}, where="flags", reads=False)
    files = [given.get("harm_data"), given.get("benign_data")]
    if not any(files):
        raise MergeError("nothing to measure on: give --harm-data, --benign-data or both")
    if recipe.model is None:
        raise MergeError("model: is required; give --model")
    torch.manual_seed(recipe.seed)
    results = evaluate_folders(
        recipe.model,
        adapter or [],
        recipe.task,
        load=lambda tokenizer: [
            load_dataset(p, tokenizer, max_length=recipe.max_length, limit=recipe.limit) if p is not None else None
            for p in files
        ],
        output=output,
        force=force,
        inputs=[path for path in files if path is not None],
        generate_tokens=recipe.generate_tokens,
        tokens_per_batch=recipe.tokens_per_batch,
        device=recipe.device,
        dtype=recipe.dtype,
        reporter=Reporter(quiet),
    )
    print_table({name: result.summary() for name, result in results.items()})
    if output is not None:
        print(f"per-prompt records in {output.absolute()}")


app.command()(compare)
app.command("refusals")(refusals)


def _recipe(given: dict[str, Any], config: Path | None) -> Recipe:
    """The recipe of a file and flags, which win; a strength among the flags stands for the file's."""
    entries = read_yaml(config) if config is not None else {}
    if given.keys() & set(STRENGTHS):
        entries = {key: value for key, value in entries.items() if key not in STRENGTHS}
    return Recipe.parse({**entries, **given}, where=str(config or "flags"))


@app.command()
@takes(Recipe, ("output", "seed", "device", "dtype"))
def demo(given: dict[str, Any], force: Force = False, quiet: Quiet = False) -> None:
    """Merge two small adapters of SmolLM2-135M-Instruct and compare with plain addition: a few minutes on two cores."""
    from .demo import run

    run(given.pop("output", Path("demo-output")), given, force=force, reporter=Reporter(quiet))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def env(context: typer.Context) -> None:
    """What this installation can do: versions, devices, compiled parts (`--json` for bug reports)."""
    from sst_kernels.env import main

    main(context.args)


def main() -> None:
    """Entry point: a MergeError is the user's to read, so its text is printed without a traceback, and so is a lack of memory.

    SIGTERM, and SIGHUP where it is not ignored, end a run like an error does: unfinished outputs are removed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our arrows is no reason to fail
    _end_on_sigterm()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")  # not the user's to act on
    try:
        app()
    except SystemExit as stop:
        if str(stop) and not str(stop).isdigit():
            print(f"sst-merge: {stop}", file=sys.stderr)
        raise
    except MergeError as error:
        print(f"sst-merge: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(
            f"sst-merge: out of memory ({reason}); lower tokens_per_batch, or use a smaller dtype or another device",
            file=sys.stderr,
        )
        sys.exit(2)


def _end_on_sigterm() -> None:
    """SIGTERM raises SystemExit wherever the run stands, and again shortly after where a finalizer swallowed it."""

    def again() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    def unraisable(what: Any) -> None:
        if isinstance(what.exc_value, SystemExit):
            again()
        else:
            sys.__unraisablehook__(what)

    def stop(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in (unraisable.__code__, again.__code__):  # what is raised here is swallowed, too
                return again()
            frame = frame.f_back
        sys.exit(128 + signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    sys.unraisablehook = unraisable


if __name__ == "__main__":
    main()
