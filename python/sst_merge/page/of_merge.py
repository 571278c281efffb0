"""The page of one merge, from its report and the records of its prompts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .answers import answers
from .facts import facts
from .measures import Measured
from .model import Cell, Column, Fold, Interval, Page, Point, Prediction, Role, Series
from .verdict import BEFORE, HERE, PLAIN, alpha, asked_for, claims, headline, light, written
from .words import command, interval, measured, number, percent, share

UNITS = (
    "NLL and KL in nats per label token, teacher-forced; KL from the model without the patch. Refused: greedy answers that hold a "
    "refusal phrase. Ranges are 95 % intervals."
)


def page_of_merge(report: Mapping[str, Any], records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Page:
    """report: as `report.json`. records: per evaluation its prompts, as in `prompts.json`; {} where there are none."""
    rows = report.get("evaluation") or {}
    extra = Measured([*rows.values(), *(report.get("front") or [])])
    points, before = _points(report, extra), rows.get(BEFORE, {})
    roles: dict[str, Role] = {p.series: "plain" if p.series == PLAIN else "ours" for p in points}
    base = report["adapter"].get("base_model") or report["recipe"].get("model") or ""
    failed = (report.get("failed_evaluations") or {}).items()
    worst = (asked_for(report) or {}).get("worst", ())
    return Page(
        title=f"Merge report: {report['recipe']['output']}",
        overline=" · ".join(t for t in ("SST-Merge, report of a merge", str(base)) if t),
        headline=headline(report),
        claims=tuple(claims(report)),
        light=light(report),
        columns=(*map(Column, ("adapter", "harmful refused", "benign KL")), *extra.columns()),
        series=tuple(Series(name, role) for name, role in roles.items()),
        points=tuple(points),
        before=share(before.get("refusal_rate"), _harmful(report)),
        before_nll=before.get("refusal_nll"),
        here="this adapter",
        notes=(
            *(report.get("warnings") or ()),
            *(f"{name} was not measured to the end: {why}" for name, why in failed),
        ),
        units=UNITS,
        predictions=tuple(_predictions(report)),
        answers=answers(records, BEFORE, written(rows)),
        worst=tuple({"prompt": w.get("prompt", ""), "line": w["line"], "kl": w["benign_kl"]} for w in worst),
        examples=_examples(report),
        folds=tuple(_folds(report)),
    )


def _harmful(report: Mapping[str, Any]) -> int | None:
    return report["inputs"]["data"].get("eval_harm", {}).get("sequences")


def _points(report: Mapping[str, Any], extra: Measured) -> list[Point]:
    """The strengths that were offered, then what was evaluated; the adapter that was written is both, and stands once."""
    rows, front = report.get("evaluation") or {}, report.get("front") or []
    here = written(rows)
    offered = [_offered(point, extra) for point in front if not (here and point.get("chosen"))]
    return offered + [_evaluated(name, row, report, extra) for name, row in rows.items() if name != BEFORE]


def _evaluated(name: str, row: Mapping[str, Any], report: Mapping[str, Any], extra: Measured) -> Point:
    plain, here = name.startswith(PLAIN), name == written(report["evaluation"])
    kl = _bounded(row.get("benign_kl"), report) if here else interval(row.get("benign_kl"))
    refused = share(row.get("refusal_rate"), _harmful(report))
    label = alpha(name) if plain else name.removeprefix("SST, ")
    cells = (Cell(f"{PLAIN}, {label}" if plain else name), measured(refused, percent), measured(kl), *extra.cells(row))
    return Point(
        PLAIN if plain else "SST", label, cells, kl, refused, interval(row.get("refusal_nll")),
        command=_again(report) if name == HERE else "", answers=name, here=here,
    )  # fmt: skip


def _bounded(kl: float | None, report: Mapping[str, Any]) -> Interval | None:
    """A measured KL, with the interval of what was asked for where it is that."""
    found = asked_for(report) or {}
    return interval(kl, found["low"], found["high"]) if found and kl == found["kl"] else interval(kl)


def _offered(point: Mapping[str, Any], extra: Measured) -> Point:
    """A strength of `front`, with the command that makes it."""
    kl = interval(point.get("kl"), point.get("kl_low"), point.get("kl_high"))
    refused = interval(point.get("refused"), point.get("refused_low"), point.get("refused_high"))
    label = _allowed(point)
    cells = (Cell(f"SST, {label}"), measured(refused, percent), measured(kl), *extra.cells(point))
    return Point(
        "SST", label, cells, kl, refused, interval(point.get("refusal_nll")),
        command=command(point.get("command") or ""), here=bool(point.get("chosen")),
    )  # fmt: skip


def _allowed(point: Mapping[str, Any]) -> str:
    whole = point.get("whole") or point.get("allowed") is None
    return "the whole patch" if whole else f"{number(point['allowed'], 3)} nats allowed"


def _again(report: Mapping[str, Any]) -> str:
    recipe = shlex.quote(f"{report['recipe']['output']}/recipe.yml")
    return command(f"sst-merge merge --config {recipe} --output again")


def _predictions(report: Mapping[str, Any]) -> list[Prediction]:
    """Of the front, and of what was written; none twice."""
    rows = report.get("evaluation") or {}
    names = {row.get("benign_kl"): name.removeprefix("SST, ") for name, row in rows.items()}
    pairs = [
        (_allowed(p), p.get("predicted_kl"), interval(p.get("kl"), p.get("kl_low"), p.get("kl_high")))
        for p in report.get("front") or []
    ]
    for point in report.get("calibration") or []:
        pairs.append(
            (
                names.get(point["measured_kl"], "this adapter"),
                point["predicted_kl"],
                _bounded(point["measured_kl"], report),
            )
        )
    out: dict[tuple[float, float], Prediction] = {}
    for label, predicted, found in pairs:
        if predicted and found is not None and found.value:
            out.setdefault((predicted, found.value), Prediction(label, predicted, found))
    return list(out.values())


def _examples(report: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """One example of each dataset, as spans; it may come as prompt and labels."""
    given = report.get("examples") or {name: data.get("example") for name, data in report["inputs"]["data"].items()}
    out = []
    for name, example in given.items():
        if isinstance(example, Mapping):
            example = [{"text": example.get(key, ""), "label": key == "labels"} for key in ("prompt", "labels")]
        if example:
            out.append({"name": name, "spans": list(example)})
    return tuple(out)


def _folds(report: Mapping[str, Any]) -> list[Fold]:
    inputs = [("file", "sequences", "tokens", "label tokens", "sha256")]
    for name, d in report["inputs"]["data"].items():
        inputs.append(
            (f"{name}: {d['path']}", str(d["sequences"]), str(d["tokens"]), str(d["labels"]), d["sha256"][:16])
        )
    for name in ("safety", "task"):
        if adapter := report["inputs"].get(name):
            inputs.append((f"{name} adapter: {adapter['path']}", "", "", "", adapter["sha256"][:16]))
    keys = ("point", "label_source", "structure", "sequences", "tokens", "label_tokens")
    passes = [("Fisher", *(key.replace("_", " ") for key in keys))]
    passes += [(name, *(str(f.get(key, "–")) for key in keys)) for name, f in report["fisher"].items()]
    recipe = {key: value for key, value in report["recipe"].items() if value is not None}
    seconds = [(name, f"{value:g}") for name, value in report["seconds"].items()]
    versions = [(name, str(value)) for name, value in report["versions"].items()]
    return [
        Fold("Command", _again(report)),
        Fold("Recipe", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
        Fold("Data and adapters", rows=tuple(inputs)),
        Fold("The patch", "\n".join([*facts(report), *report["adapter"].get("notes", ())])),
        Fold("Fisher passes", rows=tuple(passes)),
        Fold("Time", rows=(("step", "seconds"), *seconds)),
        Fold("Versions", rows=(("package", "version"), *versions)),
    ]
