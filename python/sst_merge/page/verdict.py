"""The first screen of a merge's page: what was gained at which cost, in a sentence, and what became of what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .model import Light
from .words import fixed, interval, moved, number, percent

BEFORE, PLAIN, HERE = "no patch", "plain addition", "merged"  # what evaluations of a merge are called


def written(rows: Mapping[str, Any]) -> str:
    """The evaluation of the adapter that was written: `merged`, or the last that is no rival's; "" where there is none."""
    ours = [name for name in rows if name != BEFORE and not name.startswith(PLAIN)]
    return HERE if HERE in rows else ours[-1] if ours else ""


def alpha(name: str) -> str:
    """The strength in the name of an evaluation of plain addition."""
    return name.removeprefix(PLAIN).strip(" ,") or "α = 1"


def headline(report: Mapping[str, Any]) -> str:
    """What the merge did, as far as it was measured."""
    rows = report.get("evaluation") or {}
    ours, before = rows.get(written(rows), {}), rows.get(BEFORE, {})
    kl, rate, nll = (ours.get(key) for key in ("benign_kl", "refusal_rate", "refusal_nll"))
    cost = f" for {number(kl)} nats of benign KL" if kl is not None else "; the benign KL was not measured"
    if rate is not None:
        return moved("Refusals", before.get("refusal_rate"), rate) + cost
    if nll is not None:
        first = f"{fixed(before['refusal_nll'])} → " if before.get("refusal_nll") is not None else ""
        return f"The NLL of refusals: {first}{fixed(nll)}{cost}"
    if kl is None:
        kl = (asked_for(report) or {}).get("kl")
    if kl is not None:
        return f"Costs {number(kl)} nats of benign KL; refusals were not measured"
    return f"Predicted to cost {number(report['patch']['prediction']['cost_per_label'])} nats of benign KL; nothing was measured"


def claims(report: Mapping[str, Any]) -> list[str]:
    """What stands below the headline: plain addition nearest in cost, and what else was measured."""
    rows, out = report.get("evaluation") or {}, []
    ours, before = rows.get(written(rows), {}), rows.get(BEFORE, {})
    plain = {name: row for name, row in rows.items() if name.startswith(PLAIN) and row.get("benign_kl") is not None}
    if ours.get("benign_kl") is not None and plain:
        name, near = min(plain.items(), key=lambda p: abs(p[1]["benign_kl"] - ours["benign_kl"]))
        rate = near.get("refusal_rate")
        does = (
            f"refuses {percent(rate)}" if rate is not None else f"has a refusal NLL of {fixed(near.get('refusal_nll'))}"
        )
        out.append(f"Plain addition ({alpha(name)}) {does} for {number(near['benign_kl'])} nats.")
    for key, what in (("task_accuracy", "Task accuracy"), ("over_refusal", "Safe prompts refused")):
        if ours.get(key) is not None:
            first = f"{percent(before[key])} → " if before.get(key) is not None else ""
            out.append(f"{what}: {first}{percent(ours[key])}.")
    return out


def asked_for(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured of what was asked for: a KL budget or a rate of refusal."""
    return report.get("measured") or report.get("budget")


def light(report: Mapping[str, Any]) -> Light | None:
    """Whether the KL budget, or the rate of refusal that was asked for, was kept by measurement."""
    found, asked = asked_for(report), report["recipe"].get("kl_budget")
    if found and found.get("target") is not None:
        title = "Refuses as often as asked" if found["reached"] else "Refuses less often than asked"
        refused = interval(found["refused"], found["refused_low"], found["refused_high"])
        return Light("kept" if found["reached"] else "broken", title, _sentence(found), found["target"], refused, True)
    if found and found.get("budget") is not None:
        kl = interval(found["kl"], found["low"], found["high"])
        state, title = _state(found)
        return Light(state, title, _sentence(found), found["budget"], kl)
    if found:
        return Light("kept", "Measured", _sentence(found))
    if asked is None or "budget" not in report:  # the demo sets strengths by other rules
        return None
    rows, cost = report.get("evaluation") or {}, report["patch"]["prediction"]["cost_per_label"]
    kl = interval(rows.get(written(rows), {}).get("benign_kl"))
    if kl is None:
        words = f"{number(asked)} nats were asked for and {number(cost)} are predicted. Give --eval-benign-data, and a model, to measure it."
        return Light("unmeasured", "The budget was not measured", words, asked)
    words = (
        f"Measured {number(kl.value)} nats per label token; {number(asked)} were asked for, {number(cost)} predicted."
    )
    return (
        Light("unsure", "Within the budget", words, asked, kl)
        if kl.value <= asked
        else Light("broken", "Over the budget", words, asked, kl)
    )


def _state(budget: Mapping[str, Any]) -> tuple[Any, str]:
    if not budget["kept"]:
        return "broken", "Over the budget"
    if budget["kl"] == 0:
        return "unsure", "Nothing of the patch fits into the budget"
    return (
        ("unsure", "Within the budget, as far as few rows tell")
        if budget.get("more_rows")
        else ("kept", "Within the budget")
    )


def _sentence(found: Mapping[str, Any]) -> str:
    words = found["words"]
    return f"{words[:1].upper()}{words[1:]}."
