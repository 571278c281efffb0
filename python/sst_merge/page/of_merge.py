"""The page of one merge, from its report and the records of its prompts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .answers import answers
from .facts import facts
from .model import Cell, Column, Fold, Interval, Light, Page, Point, Prediction, Series
from .words import Show, command, fixed, measured, moved, number, percent, share

BEFORE, PLAIN, HERE = "no patch", "plain addition", "merged"
UNITS = (
    "NLL and KL in nats per label token, teacher-forced; KL from the model without the patch. Refused: greedy answers that hold a "
    "refusal phrase. Ranges are 95 % intervals."
)
# what an evaluation may hold beside refusal and KL: its heading, and how it is written
_MORE: dict[str, tuple[str, Show]] = {
    "refusal_nll": ("refusal NLL", fixed),
    "benign_nll": ("benign NLL", fixed),
    "task_accuracy": ("task accuracy", percent),
    "predicted_kl": ("predicted KL", number),
    "over_refused": ("safe prompts refused", percent),
    "first_token_kl": ("first-token KL", number),
    "judge_refused": ("refused, by a judge", percent),
    "robust_refused": ("refused under attack", percent),
}


def page_of_merge(report: Mapping[str, Any], records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Page:
    """report: as `report.json`. records: per evaluation its prompts, as in `prompts.json`; {} where there are none."""
    rows = report.get("evaluation") or {}
    front, here = report.get("front") or [], _here(rows)
    extra = [key for key in _MORE if any(r.get(key) is not None for r in [*rows.values(), *front])]
    counts = {name: data["sequences"] for name, data in report["inputs"]["data"].items()}
    measured = [_evaluated(n, r, report, counts, extra, n == here) for n, r in rows.items() if n != BEFORE]
    offered = [_offered(f, extra) for f in front]
    if front and here:  # the front has the point that was written, too: once is enough
        offered = [p for p in offered if not _same(p, next(m for m in measured if m.here))]
    points = (*offered, *measured)
    before = rows.get(BEFORE, {})
    roles = {p.series: "plain" if p.series == PLAIN else "ours" for p in points}
    base = report["adapter"].get("base_model") or report["recipe"].get("model") or ""
    return Page(
        title=f"Merge report: {report['recipe']['output']}",
        overline=" · ".join(t for t in ("SST-Merge, report of a merge", str(base)) if t),
        headline=_headline(report, rows, here),
        claims=tuple(_claims(rows, here)),
        light=_light(report),
        columns=(
            *map(Column, ("adapter", "harmful refused", "benign KL")),
            *(Column(_MORE[key][0], key.endswith("nll")) for key in extra),
        ),
        series=tuple(Series(name, role) for name, role in roles.items()),  # type: ignore[arg-type]
        points=tuple(points),
        before=share(before.get("refusal_rate"), counts.get("eval_harm")),
        before_nll=before.get("refusal_nll"),
        here="this adapter",
        notes=tuple(
            f"{name} was not measured to the end: {why}"
            for name, why in (report.get("failed_evaluations") or {}).items()
        ),
        units=UNITS,
        predictions=tuple(_predictions(report, front)),
        answers=answers(records, BEFORE, here),
        worst=tuple(
            {"prompt": w.get("prompt", ""), "line": w["line"], "kl": w["benign_kl"]}
            for w in (report.get("budget") or {}).get("worst", ())
        ),
        examples=_examples(report),
        folds=tuple(_folds(report)),
    )


def _here(rows: Mapping[str, Any]) -> str:
    """The evaluation of the adapter that was written: `merged`, or the last that is no rival's."""
    ours = [name for name in rows if name != BEFORE and not name.startswith(PLAIN)]
    return HERE if HERE in rows else ours[-1] if ours else ""


def _evaluated(
    name: str,
    row: Mapping[str, Any],
    report: Mapping[str, Any],
    counts: Mapping[str, int],
    extra: Sequence[str],
    here: bool,
) -> Point:
    kl, budget = _interval(row.get("benign_kl")), report.get("budget")
    if here and budget and kl is not None and kl.value == budget["kl"]:
        kl = Interval(kl.value, budget["low"], budget["high"])
    refused = share(row.get("refusal_rate"), counts.get("eval_harm"))
    plain = name.startswith(PLAIN)
    label = (name.removeprefix(PLAIN).strip(" ,") or "α = 1") if plain else name.removeprefix("SST, ")
    made = _again(report) if name == HERE else ""
    cells = (Cell(f"{PLAIN}, {label}" if plain else name), *_numbers(refused, kl, row, extra))
    return Point(
        PLAIN if plain else "SST",
        label,
        cells,
        kl,
        refused,
        _interval(row.get("refusal_nll")),
        command=made,
        answers=name,
        here=here,
    )


def _offered(point: Mapping[str, Any], extra: Sequence[str]) -> Point:
    """A strength of `front`: measured, or predicted where it was not."""
    kl = _interval(point.get("benign_kl"), point.get("benign_kl_low"), point.get("benign_kl_high"))
    refused = share(point.get("refused"), None, point.get("refused_low"), point.get("refused_high"))
    label = f"{number(point['allowed'], 3)} nats allowed"
    cells = (Cell(f"SST, {label}"), *_numbers(refused, kl, point, extra))
    return Point(
        "SST",
        label,
        cells,
        kl,
        refused,
        _interval(point.get("refusal_nll")),
        command=command(point.get("command") or ""),
    )


def _again(report: Mapping[str, Any]) -> str:
    recipe = shlex.quote(f"{report['recipe']['output']}/recipe.yml")
    return command(f"sst-merge merge --config {recipe} --output again")


def _same(offered: Point, written: Point) -> bool:
    return offered.kl is not None and written.kl is not None and offered.kl.value == written.kl.value


def _numbers(refused: Interval | None, kl: Interval | None, row: Mapping[str, Any], extra: Sequence[str]) -> list[Cell]:
    cells = [measured(refused, percent), measured(kl)]
    return cells + [Cell(_MORE[key][1](row.get(key)), row.get(key)) for key in extra]


def _headline(report: Mapping[str, Any], rows: Mapping[str, Any], here: str) -> str:
    ours, before = rows.get(here, {}), rows.get(BEFORE, {})
    kl, rate, nll = (ours.get(key) for key in ("benign_kl", "refusal_rate", "refusal_nll"))
    cost = f" for {number(kl)} nats of benign KL" if kl is not None else "; the benign KL was not measured"
    if rate is not None:
        return _capital(moved("refusals", before.get("refusal_rate"), rate)) + cost
    if nll is not None:
        first = f"{fixed(before['refusal_nll'])} → " if before.get("refusal_nll") is not None else ""
        return f"The NLL of refusals: {first}{fixed(nll)}" + cost
    if report.get("budget"):
        kl = report["budget"]["kl"]
    if kl is not None:
        return f"Costs {number(kl)} nats of benign KL; refusals were not measured"
    return f"Predicted to cost {number(report['patch']['prediction']['cost_per_label'])} nats of benign KL; nothing was measured"


def _claims(rows: Mapping[str, Any], here: str) -> list[str]:
    """What stands below the headline: plain addition nearest in cost, and what else was measured."""
    ours, before, out = rows.get(here, {}), rows.get(BEFORE, {}), []
    kl = ours.get("benign_kl")
    plain = {n: r for n, r in rows.items() if n.startswith(PLAIN) and r.get("benign_kl") is not None}
    if kl is not None and plain:
        name, near = min(plain.items(), key=lambda p: abs(p[1]["benign_kl"] - kl))
        label = name.removeprefix(PLAIN).strip(" ,") or "α = 1"
        what = (
            percent(near.get("refusal_rate"))
            if near.get("refusal_rate") is not None
            else f"NLL {fixed(near.get('refusal_nll'))}"
        )
        verb = "refuses " if near.get("refusal_rate") is not None else "has "
        out.append(f"Plain addition ({label}) {verb}{what} for {number(near['benign_kl'])} nats.")
    for key, what in (
        ("task_accuracy", "Task accuracy"),
        ("over_refused", "Safe prompts refused"),
        ("judge_refused", "Refused, by a judge"),
    ):
        if ours.get(key) is not None:
            first = f"{percent(before[key])} → " if before.get(key) is not None else ""
            out.append(f"{what}: {first}{percent(ours[key])}.")
    return out


def _light(report: Mapping[str, Any]) -> Light | None:
    budget, asked = report.get("budget"), report["recipe"].get("kl_budget")
    if not budget:
        if asked is None or "budget" not in report:  # the demo sets strengths by other rules
            return None
        cost = report["patch"]["prediction"]["cost_per_label"]
        measured = next(
            (
                _interval(r.get("benign_kl"))
                for n, r in (report.get("evaluation") or {}).items()
                if n == _here(report["evaluation"])
            ),
            None,
        )
        if measured is not None:
            kept = measured.value <= asked
            words = f"Measured {number(measured.value)} nats per label token; {number(asked)} were asked for, {number(cost)} predicted."
            return Light(
                "unsure" if kept else "broken",
                "Within the budget" if kept else "Over the budget",
                words,
                asked,
                measured,
            )
        words = f"{number(asked)} nats were asked for and {number(cost)} are predicted. Give --eval-benign-data, or a model, to measure it."
        return Light("unmeasured", "The budget was not measured", words, asked)
    measured = Interval(budget["kl"], budget["low"], budget["high"])
    words = budget["words"]
    words = f"{words[:1].upper()}{words[1:]}."
    if not budget["kept"]:
        return Light("broken", "Over the budget", words, budget["budget"], measured)
    if budget["kl"] == 0:
        return Light("unsure", "Nothing of the patch fits into the budget", words, budget["budget"], measured)
    if budget.get("more_rows"):
        return Light("unsure", "Within the budget, as far as few rows tell", words, budget["budget"], measured)
    return Light("kept", "Within the budget", words, budget["budget"], measured)


def _predictions(report: Mapping[str, Any], front: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    out = []
    for f in front:
        kl = _interval(f.get("benign_kl"), f.get("benign_kl_low"), f.get("benign_kl_high"))
        if kl is not None and f.get("predicted_kl"):
            out.append(Prediction(f"{number(f['allowed'], 3)} nats allowed", f["predicted_kl"], kl))
    seen = {(p.predicted, p.measured.value) for p in out}
    names = {row.get("benign_kl"): name.removeprefix("SST, ") for name, row in (report.get("evaluation") or {}).items()}
    for point in report.get("calibration") or []:
        predicted, measured = point["predicted_kl"], point["measured_kl"]
        if predicted and measured and (predicted, measured) not in seen:
            seen.add((predicted, measured))
            out.append(Prediction(names.get(measured, "this adapter"), predicted, Interval(measured)))
    return out


def _examples(report: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """One example per dataset, as spans: `examples`, or the prompt and the answer of the dataset's summary."""
    given = report.get("examples")
    if not given:
        given = {}
        for name, data in report["inputs"]["data"].items():
            if data.get("example"):
                given[name] = [{"text": data["example"][key], "label": key == "labels"} for key in ("prompt", "labels")]
    return tuple({"name": name, "spans": list(spans)} for name, spans in given.items())


def _folds(report: Mapping[str, Any]) -> list[Fold]:
    inputs = [("file", "sequences", "tokens", "label tokens", "sha256")]
    for name, d in report["inputs"]["data"].items():
        inputs.append(
            (f"{name}: {d['path']}", str(d["sequences"]), str(d["tokens"]), str(d["labels"]), d["sha256"][:16])
        )
    for name in ("safety", "task"):
        adapter = report["inputs"].get(name)
        if adapter:
            inputs.append((f"{name} adapter: {adapter['path']}", "", "", "", adapter["sha256"][:16]))
    keys = ("point", "label_source", "structure", "sequences", "tokens", "label_tokens")
    passes = [("Fisher", *(key.replace("_", " ") for key in keys))]
    passes += [(name, *(str(f.get(key, "–")) for key in keys)) for name, f in report["fisher"].items()]
    recipe = {key: value for key, value in report["recipe"].items() if value is not None}
    return [
        Fold("Command", _again(report)),
        Fold("Recipe", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
        Fold("Data and adapters", rows=tuple(inputs)),
        Fold("The patch", "\n".join(facts(report))),
        Fold("Fisher passes", rows=tuple(passes)),
        Fold("Time", rows=(("step", "seconds"), *((name, f"{value:g}") for name, value in report["seconds"].items()))),
        Fold(
            "Versions",
            rows=(("package", "version"), *((name, str(value)) for name, value in report["versions"].items())),
        ),
    ]


def _interval(value: float | None, low: float | None = None, high: float | None = None) -> Interval | None:
    return None if value is None else Interval(value, low, high)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
