"""Command-line flags that are the entries of a recipe: one place for each name, default and help text.

Mappings are given as `--template enable_thinking=false,today=2026-01-31`, lists as `--harm-points reference,0.5`, their values in YAML.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel

from .errors import RecipeError

# What commands take beside a recipe's entries, under one name everywhere.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show one rendered example of each data set, too.")]
Force = Annotated[bool, typer.Option(help="Replace an earlier output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Go on where the inputs look like a mistake.")]
RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="YAML recipe; flags override it.", show_default=False)
]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="The recipe, for those who like flags.")]

ALIASES = {
    "harm_data": ("--harmful",), "benign_data": ("--benign",), "eval_safe_data": ("--safe-data",), "eval_task_data": ("--task-data",),
    "output": ("-o",), "columns": ("--map",),
}  # fmt: skip
REPEATED = ("safety", "task")  # adapters, which add up


def takes(
    model: type[BaseModel], entries: Iterable[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command `f(given, **own)`: it takes a flag for each of the `entries` of the recipe model (all of one value by
    default), and `given` holds those that were used. Flags that a user leaves out stay out: the recipe's own default counts."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [
            p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(command, eval_str=True).parameters.items()
            if name != "given"
        ]
        names = [n for n in (entries or model.model_fields) if n not in {p.name for p in own}]
        spellings = {name: _spellings(name, names) for name in names}
        ours = [_flag(name, model.model_fields[name], spellings[name]) for name in names]

        def run(**values: Any) -> Any:
            given = {}
            for name in names:
                if (value := values.pop(name)) is not None and value != []:
                    given[name] = _read(name, spellings[name], value, model.model_fields[name].annotation)
            return command(given, **values)

        run.__signature__ = inspect.Signature([*ours, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*ours, *own)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _spellings(name: str, names: Iterable[str]) -> list[str]:
    """The flags of an entry. An alias that is the name of another entry of the command is that entry's: `merge --safe-data`."""
    taken = {"--" + other.replace("_", "-") for other in names}
    return ["--" + name.replace("_", "-"), *(alias for alias in ALIASES.get(name, ()) if alias not in taken)]


def _flag(name: str, entry: Any, spellings: list[str]) -> inspect.Parameter:
    kind = _kind(entry.annotation)
    help = (entry.description or "").removesuffix(".")
    choices = (
        get_args(_without_none(entry.annotation)) if get_origin(_without_none(entry.annotation)) is Literal else ()
    )
    if choices and "," not in help:
        help = f"{help}: {', '.join(map(str, choices))}" if help else ", ".join(map(str, choices))
    default = entry.get_default(call_default_factory=True) if not entry.is_required() else None
    if default not in (None, False, "", {}):
        help += f" [{','.join(map(str, default)) if isinstance(default, list) else default}]"
    named = {Path: "PATH", int: "N", float: "NUMBER"}.get(kind, "TEXT")
    shown = "A=B,…" if _holds(entry.annotation, dict) else "A,B,…" if _holds(entry.annotation, list) else named
    option = typer.Option(*spellings, help=help, show_default=False, metavar=None if kind is bool else shown)
    # Lists, so that a flag given twice is seen: of plain values the last would win in silence.
    annotation = Annotated[Optional[kind if kind is bool else list[kind]], option]  # type: ignore[valid-type]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _read(name: str, spellings: list[str], value: Any, annotation: Any) -> Any:
    """The value of an entry from what its flag was given. RecipeError for a flag given twice and for no mapping."""
    spelled = " or ".join(spellings)
    if not isinstance(value, list) or name in REPEATED:
        return value
    if _holds(annotation, dict):
        pairs = (_pair(spelled, part) for text in value for part in _parts(text))
        texts = get_args(_without_none(annotation))[1] is str
        return {key: part if texts else _scalar(spelled, part) for key, part in pairs}
    if _holds(annotation, list):
        return [_scalar(spelled, part) for text in value for part in _parts(text)]
    if len(value) > 1:
        raise RecipeError(f"{spelled}: given {len(value)} times, as {' and '.join(map(str, value))}; give one")
    return value[0]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pair(spelled: str, part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"{spelled}: expected name=value, or several of them with commas between, got {part!r}")
    return name.strip(), value.strip()


def _scalar(spelled: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{spelled}: expected a plain value, got {text!r}") from error
    return value if isinstance(value, bool | int | float | str) else text  # dates and the like are texts


def _kind(annotation: Any) -> Any:
    """The type of a flag for an entry of this type."""
    plain = _without_none(annotation)
    if get_origin(plain) is Annotated:
        return _kind(get_args(plain)[0])
    return plain if isinstance(plain, type) and get_origin(plain) is None else str  # the recipe says what else it takes


def _holds(annotation: Any, kind: type) -> bool:
    return get_origin(_without_none(annotation)) is kind


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [a for a in get_args(annotation) if a is not type(None)]
        return parts[0] if len(parts) == 1 else annotation
    return annotation
