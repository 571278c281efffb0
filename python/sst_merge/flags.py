"""Command-line flags that are the entries of a recipe: one place for each name, default and help text."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

import typer
from pydantic import BaseModel

ALIASES = {
    "harm_data": ("--harmful",), "benign_data": ("--benign",), "eval_safe_data": ("--safe-data",), "eval_task_data": ("--task-data",),
    "output": ("-o",),
}  # fmt: skip
REPEATED = ("safety", "task")  # flags that may be given several times


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
        names = [n for n in (entries or model.model_fields) if _kind(model.model_fields[n].annotation) is not None]
        ours = [_flag(name, model.model_fields[name]) for name in names if name not in {p.name for p in own}]

        def run(**values: Any) -> Any:
            given = {p.name: values.pop(p.name) for p in ours}
            return command({name: value for name, value in given.items() if value not in (None, [])}, **values)

        run.__signature__ = inspect.Signature([*ours, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*ours, *own)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _flag(name: str, entry: Any) -> inspect.Parameter:
    kind: Any = list[str] if name in REPEATED else _kind(entry.annotation)
    spelled = "--" + name.replace("_", "-")
    help = (entry.description or "").removesuffix(".")
    choices = (
        get_args(_without_none(entry.annotation)) if get_origin(_without_none(entry.annotation)) is Literal else ()
    )
    if choices and "," not in help:
        help = f"{help}: {', '.join(map(str, choices))}" if help else ", ".join(map(str, choices))
    default = entry.get_default(call_default_factory=True) if not entry.is_required() else None
    if default not in (None, False, ""):
        help += f" [{default}]"
    spellings = [spelled] if kind is bool else [spelled, *ALIASES.get(name, ())]
    option = typer.Option(*spellings, help=help, show_default=False)
    annotation = Annotated[Optional[kind], option]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(annotation: Any) -> Any:
    """The type of a flag for an entry of this type; None for lists and mappings, which a recipe file holds."""
    plain = _without_none(annotation)
    if get_origin(plain) is Annotated:
        return _kind(get_args(plain)[0])
    if get_origin(plain) is Literal:
        return str  # the recipe names the choices, and takes other spellings of them
    if get_origin(plain) in (Union, types.UnionType):
        return str
    return plain if isinstance(plain, type) and get_origin(plain) is None and plain not in (dict, list) else None


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [a for a in get_args(annotation) if a is not type(None)]
        return parts[0] if len(parts) == 1 else annotation
    return annotation
