"""`sst-merge`: merge, collect, check, evaluate, compare, refusals, init, demo, env."""

from __future__ import annotations

import signal
import sys
import warnings
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any

import typer

from . import commands
from .compare.command import compare
from .errors import MergeError, out_of_memory
from .init import command as init
from .io.refusals import command as refusals

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Add a safety adapter to a language model without paying the safety tax.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"sst-merge {version('sst-kernels')}")
        except PackageNotFoundError:  # a source tree that was not installed
            from sst_kernels import __version__

            print(f"sst-merge {__version__} (not installed)")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for command in (
    commands.merge,
    commands.collect,
    commands.check,
    commands.evaluate,
    compare,
    commands.demo,
    commands.env,
):
    app.command()(command)
app.command("refusals")(refusals)
app.command("init")(init)


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
