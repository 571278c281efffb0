"""`sst-merge init`: a commented recipe from what lies in a folder."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
import yaml

from .errors import DataError, MergeError
from .flags import Force, Json
from .io.paths import expanded
from .recipe import Recipe

_DEPTH, _SEEN = 3, 50  # folders below the given one, and rows of a file that are looked at
_SAFE = re.compile(r"(?i)safe|refus|harmless|guard|align")
_TASK = re.compile(r"(?i)\btask")
_HELD = re.compile(r"(?i)eval|valid|test|held|dev")
_DATA = re.compile(r"(?i)\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?$")
_OTHER = ("config.json", "tokenizer.json", "report.json", "prompts.json", "package.json")
_OURS = {"report.html", "compare.html"}  # what an earlier merge or comparison wrote is no input
_NEEDED = ("model", "safety", "harm_data", "benign_data")
_COMMON = (
    "model", "task", "safety", "harm_data", "benign_data", "eval_harm_data", "eval_benign_data", "output", "kl_budget", "template", "columns",
    "max_length", "device", "dtype",
)  # fmt: skip


@dataclass
class Found:
    """What a folder holds: models, adapters, and data files by what their answers are."""

    models: list[Path] = field(default_factory=list)
    adapters: list[Path] = field(default_factory=list)
    harm: list[Path] = field(default_factory=list)
    benign: list[Path] = field(default_factory=list)
    unread: dict[Path, str] = field(default_factory=dict)


def look(folder: Path) -> Found:
    """Models, adapters and data files in a folder and up to three levels below it; hidden ones and earlier outputs are left out."""
    found = Found()
    _look(folder, 0, found)
    return found


def _look(folder: Path, depth: int, found: Found) -> None:
    names = {p.name for p in folder.iterdir()}
    if names & _OURS:
        return
    if "adapter_config.json" in names:
        found.adapters.append(folder)
        return
    if "config.json" in names:
        found.models.append(folder)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and depth < _DEPTH:
            _look(path, depth + 1, found)
        elif path.is_file() and _DATA.search(path.name) and path.name not in _OTHER:
            try:
                (found.harm if _refuses(path) else found.benign).append(path)
            except DataError as error:
                found.unread[path] = str(error)


def _refuses(path: Path) -> bool:
    from .io.files import open_source
    from .io.forms import conversation
    from .judges import is_refusal

    said = []
    for record in islice(open_source(path).records, _SEEN):
        if record.error is not None:
            raise record.error
        said.append(is_refusal(conversation(record.value, record.where, {})[1][-1]["content"]))
    if not said:
        raise DataError(f"{path}: holds no rows")
    return 2 * sum(said) > len(said)


def choose(found: Found) -> dict[str, list[Path]]:
    """Candidates for recipe entries, the likeliest first: by what answers hold, and by names of adapters and held-out files."""
    safe = [a for a in found.adapters if _SAFE.search(a.name)]
    others = [a for a in found.adapters if a not in safe]
    named = sorted(others, key=lambda a: not _TASK.search(a.name))  # of several the one that is called so
    chosen = {"model": found.models, "safety": safe or named[1:], "task": named}
    for side in ("harm", "benign"):
        files = getattr(found, side)
        held = [p for p in files if _HELD.search(p.stem)]
        fitting = [p for p in files if p not in held]
        chosen[f"{side}_data"], chosen[f"eval_{side}_data"] = fitting or held[:1], held if fitting else held[1:]
    return {name: paths for name, paths in chosen.items() if paths}


def recipe_text(chosen: Mapping[str, Sequence[str]]) -> str:
    """A recipe that explains every entry: chosen ones are set to the first candidate, others stand as comments at their defaults."""
    lines = ["# A recipe of sst-merge: `sst-merge check` says what it would do, `sst-merge merge` does it.", ""]
    for name in [*_COMMON, *(n for n in Recipe.model_fields if n not in _COMMON)]:
        entry = Recipe.model_fields[name]
        default = None if entry.is_required() else entry.get_default(call_default_factory=True)
        value, said = next(iter(chosen.get(name, ())), default), entry.description or ""
        if name == "kl_budget":
            value, said = 0.02, f"{said}; or target_refusal, mu or k; none of them: the knee of what is measured"
        if others := chosen.get(name, ())[1:]:
            said += f"; also found: {', '.join(others)}"
        flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).split("\n")[0]
        written = f"{name}: {flow}"
        kept = name in chosen or name == "kl_budget"
        lines += [f"# {line}" for line in textwrap.wrap(said, 110)]
        lines += [written if kept else f"# {written}{'  <- needed' if name in _NEEDED else ''}", ""]
    return "\n".join(lines)


def command(
    folder: Annotated[Path, typer.Argument(help="Where to look for a model, adapters and data.")] = Path("."),
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to create.")] = Path("recipe.yml"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a commented recipe from what lies in a folder: a model, adapters, and data whose answers refuse or do not."""
    from .io.output import output_file

    folder, output = expanded(folder), expanded(output).absolute()
    if not folder.is_dir():
        raise MergeError(f"{folder}: expected a folder to look in")
    found = look(folder.absolute())
    chosen = {name: [os.path.relpath(p, output.parent) for p in paths] for name, paths in choose(found).items()}
    chosen["output"] = ["merged"]
    with output_file(output, force=force) as partial:
        partial.write_text(recipe_text(chosen), encoding="utf-8")
    missing = [name for name in _NEEDED if name not in chosen]
    unread = {os.path.relpath(p, output.parent): why for p, why in found.unread.items()}
    if as_json:
        print(
            json.dumps(
                {"entries": chosen, "missing": missing, "unread": unread, "output": str(output)}, ensure_ascii=False
            )
        )
        return
    for name, paths in chosen.items():
        also = f"   (also found: {', '.join(paths[1:])})" if paths[1:] else ""
        print(f"{name:<16} {paths[0]}{also}")
    for name in missing:
        print(f"{name:<16} not found: write it into the recipe")
    for path, why in unread.items():
        print(f"left out         {path}: {why}")
    print(f"written to {output}; next: sst-merge check {output.name}")
