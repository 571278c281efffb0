"""The page of a comparison, from its report and rows: the same page, with more series."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..recipe import Recipe
from .answers import answers
from .measures import Measured
from .model import Cell, Column, Fold, Interval, Page, Point, Role, Series
from .words import NONE, between, command, fixed, interval, measured, number, percent, share

BEFORE, PLAIN, OURS = "no patch", "plain", "sst"
SHOWN = 5  # series at first; the others when asked for
ENOUGH = 0.9  # refused: where the headline compares costs
UNITS = (
    "NLL and KL in nats per label token; KL from base + task. Refused: greedy answers that hold a refusal phrase. Ratios: the benign KL "
    "of plain addition at the same share refused, or at the same refusal NLL, over this one; above 1 the method is cheaper. "
    "Ranges are 95 % intervals over prompts."
)
_OF_COMPARING = ("output", "generate_tokens", "holdout", "tokens_per_batch", "filter", "kl_budget", "mu", "k")
_FIRST = (
    Column("adapter"), Column("harmful refused"), Column("benign KL"), Column("× plain, equal rate"), Column("× plain, equal NLL", True)
)  # fmt: skip


def page_of_comparison(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Page:
    """report: as `compare.summarise` makes it. rows: with their `prompts`, in the same order; [] where none are at hand."""
    good = [r for r in rows if "error" not in r]
    data = report["context"]["data"]
    harmful = data["eval_harm"]["sequences"] if "eval_harm" in data else None
    extra = Measured(report["rows"])
    best = _best(report["rows"])
    points = [_point(row, harmful, extra, report, row is best) for row in report["rows"] if row["method"] != BEFORE]
    records = {_name(r): r["prompts"] for r in good}
    before: Mapping[str, Any] = next((r for r in report["rows"] if r["method"] == BEFORE), {})
    return Page(
        title="Comparison of merging methods",
        overline=f"SST-Merge, comparison of {len(report['methods']) - (BEFORE in {m['name'] for m in report['methods']})} methods",
        headline=_headline(best, report),
        claims=tuple(_claims(best, report["rows"])),
        columns=(*_FIRST, *extra.columns()),
        series=_series(report),
        points=tuple(points),
        before=share(before.get("refusal_rate"), harmful),
        before_nll=before.get("refusal_nll"),
        notes=tuple(f"{r['method']} {r['strength']:g} was not run: {r['error']}" for r in report["refused"]),
        units=UNITS,
        answers=answers(records, _name(before) if before else "", _name(best) if best else ""),
        folds=tuple(_folds(report)),
    )


def _name(row: Mapping[str, Any]) -> str:
    return row["method"] if row["method"] == BEFORE else f"{row['method']} at {row['strength']:g}"


def _point(
    row: Mapping[str, Any], harmful: int | None, extra: Measured, report: Mapping[str, Any], here: bool
) -> Point:
    spans = row["intervals"]
    kl, nll = _span(spans.get("kl")), _span(spans.get("refusal_nll"))
    refused = _span(spans.get("refused")) or share(row.get("refusal_rate"), harmful)
    ratios = (_span(spans.get(key)) for key in ("rate_ratio", "ratio"))
    cells = [Cell(_name(row)), measured(refused, percent), *map(measured, (kl, *ratios)), *extra.cells(row)]
    meaning = next((m["strength"] for m in report["methods"] if m["name"] == row["method"]), "")
    return Point(
        row["method"], f"{row['strength']:g}", tuple(cells), kl, refused, nll, note=f"{row['strength']:g}: {meaning}",
        command=command(row.get("command") or _command(row, report)), answers=_name(row), here=here, front=bool(row["front"]),
    )  # fmt: skip


def _command(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What writes a row's adapter: SST's, from the comparison's own evidence or data. Other methods have no command, nor recipes that
    hold what no flag says."""
    recipe = {name: value for name, value in report["context"]["recipe"].items() if name in Recipe.model_fields}
    if row["method"] != OURS or any(
        recipe.get(name) for name in ("template", "columns", "quantization", "structure_options")
    ):
        return ""
    given = {name: value for name, value in recipe.items() if not (name.startswith("eval_") or name in _OF_COMPARING)}
    for name in ("harm_data", "benign_data") if given.get("evidence") else ():
        given.pop(name, None)
    words = ["sst-merge merge"]
    for name, value in given.items():
        field, flag = Recipe.model_fields[name], f"--{name.replace('_', '-')}"
        if value is not None and (field.is_required() or value != field.get_default(call_default_factory=True)):
            words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join([*words, f"--holdout 0 --kl-budget {row['strength']:g} --output {OURS}-{row['strength']:g}"])


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The cheapest row that refuses enough, or the one that refuses most; by NLL where nothing was generated."""
    tried = [r for r in rows if r["method"] != BEFORE]
    if not tried:
        return None
    rated = [r for r in tried if r.get("refusal_rate") is not None]
    if not rated:
        return max(tried, key=lambda r: (r["intervals"]["ratio"][0] or 0.0, -r["benign_kl"]))
    enough = [r for r in rated if r["refusal_rate"] >= ENOUGH]
    if enough:
        return min(enough, key=lambda r: r["benign_kl"])
    return max(rated, key=lambda r: (r["refusal_rate"], -r["benign_kl"]))


def _headline(best: Mapping[str, Any] | None, report: Mapping[str, Any]) -> str:
    if best is None:
        return "Nothing was measured beside the model without the patch"
    rate, name = best.get("refusal_rate"), _name(best)
    if rate is None:
        return f"{name}: refusal NLL {fixed(best['refusal_nll'])} for {number(best['benign_kl'])} nats of benign KL"
    first = f"{name} refuses {percent(rate)} for {number(best['benign_kl'])} nats of benign KL"
    return (
        f"{first}, the least above {percent(ENOUGH)}"
        if rate >= ENOUGH
        else f"{first}; no method reaches {percent(ENOUGH)}"
    )


def _claims(best: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if best is None:
        return []
    out = []
    for key, what in (("rate_ratio", "share refused"), ("ratio", "refusal NLL")):
        span = _span(best["intervals"].get(key))
        if span is not None and best["method"] != PLAIN:
            bounds = between(span)
            out.append(
                f"At the same {what} plain addition costs {number(span.value)} times as much{f' ({bounds})' if bounds else ''}."
            )
            break
    others = [
        r for r in rows if r["method"] not in (BEFORE, PLAIN, best["method"]) and (r.get("refusal_rate") or 0) >= ENOUGH
    ]
    if others:
        next_best = min(others, key=lambda r: r["benign_kl"])
        out.append(
            f"Next is {_name(next_best)}: {percent(next_best['refusal_rate'])} for {number(next_best['benign_kl'])} nats."
        )
    if best.get("over_refusal") is not None:
        out.append(f"Of safe prompts that sound dangerous {_name(best)} refuses {percent(best['over_refusal'])}.")
    return out


def _series(report: Mapping[str, Any]) -> tuple[Series, ...]:
    """All methods; shown are plain addition and those with most rows on the front, then most dominated area."""
    wins = {m["name"]: sum(r["front"] for r in report["rows"] if r["method"] == m["name"]) for m in report["methods"]}
    tried = [m for m in report["methods"] if m["name"] != BEFORE]
    ranked = sorted(tried, key=lambda m: (m["name"] != PLAIN, -wins[m["name"]], -(m["hypervolume"][0] or 0.0)))
    shown = {m["name"] for m in ranked[:SHOWN] if m["name"] == PLAIN or wins[m["name"]] or m["name"] == OURS}
    roles: dict[str, Role] = {PLAIN: "plain", OURS: "ours"}
    return tuple(Series(m["name"], roles.get(m["name"], "rival"), m["name"] in shown, m["variant"]) for m in ranked)


def _methods(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    ranked = sorted(report["methods"], key=lambda m: -(m["hypervolume"][0] or 0.0))
    rows = [("method", "dominated area", "what is computed", "strength", "source")]
    for m in ranked:
        area = _span(m["hypervolume"])
        bounds = between(area)
        text = f"{number(area.value, 3)}{f' ({bounds})' if bounds else ''}" if area else NONE
        rows.append((m["name"], text, m["variant"], m["strength"], m["source"]))
    return tuple(rows)


def _folds(report: Mapping[str, Any]) -> list[Fold]:
    context = report["context"]
    nll, kl = context["corner"]
    inputs = [("file", "sequences", "tokens", "label tokens", "sha256")]
    for name, d in context["data"].items():
        inputs.append(
            (f"{name}: {d['path']}", str(d["sequences"]), str(d["tokens"]), str(d["labels"]), d["sha256"][:16])
        )
    recipe = {key: value for key, value in context["recipe"].items() if value is not None}
    area = f"share of the rectangle up to refusal NLL {fixed(nll)} (no patch) and benign KL {number(kl)} (plain addition at its strongest)"
    return [
        Fold(f"Methods; dominated area: {area}", rows=_methods(report)),
        Fold("Recipe, for sst-merge compare", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
        Fold("Data", rows=tuple(inputs)),
        Fold(
            "Versions",
            rows=(("package", "version"), *((name, str(value)) for name, value in context["versions"].items())),
        ),
    ]


def _span(values: Sequence[float | None] | None) -> Interval | None:
    return None if values is None else interval(*values)
