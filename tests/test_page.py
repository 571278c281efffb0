"""What stands on a page: the headline, the budget's light, points with commands, and nothing of a prompt as markup."""

from __future__ import annotations

import html.parser
import json
import math
import shlex
from dataclasses import asdict

import pytest

from sst_merge.page import html as page_html
from sst_merge.page import page_of_comparison, page_of_merge, render
from sst_merge.page.answers import CHARACTERS, ROWS, answers
from sst_merge.page.model import Interval
from sst_merge.page.words import between, command, number, percent, share
from sst_merge.recipe import Recipe
from tests import page_cases as cases


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """The library takes a second, and nothing here looks at charts."""
    monkeypatch.setattr(render, "library", lambda: ("", "left out"))


def text_of(page):
    """The visible text and the data of a page."""

    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.text, self.data, self.inside = [], [], "", None

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.inside = dict(attributes).get("id", tag) if tag in ("script", "style") else None

        def handle_endtag(self, tag):
            self.inside = None

        def handle_data(self, data):
            if self.inside is None:
                self.text.append(data)
            elif self.inside == "data":
                self.data += data

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.text).split()), json.loads(reader.data), reader.tags


def words_of(command):
    """The words of a command as a shell reads it, which joins lines that end in a backslash."""
    return shlex.split(command.replace("\\\n", " "))


def test_headline_and_claims_say_gain_cost_and_what_plain_addition_does():
    page = page_of_merge(cases.evaluated(task_accuracy=0.6, over_refusal=0.1), {})
    assert page.headline == "Refusals rise from 25\u202f% to 80\u202f% for 0.042 nats of benign KL"
    assert page.claims == (
        "Plain addition (α = 1) refuses 100\u202f% for 1.2 nats.", "Task accuracy: 60\u202f%.", "Safe prompts refused: 10\u202f%."
    )  # fmt: skip
    nearer = cases.evaluated()
    nearer["evaluation"]["plain addition, α = 0.2"] = {"refusal_rate": 0.71, "benign_kl": 0.039}
    assert page_of_merge(nearer, {}).claims[0] == "Plain addition (α = 0.2) refuses 71\u202f% for 0.039 nats."


@pytest.mark.parametrize(
    ("change", "headline"),
    [
        ({"refusal_rate": None}, "The NLL of refusals: 3.000 → 0.700 for 0.042 nats of benign KL"),
        ({"refusal_rate": None, "refusal_nll": None}, "Costs 0.042 nats of benign KL; refusals were not measured"),
        ({"benign_kl": None}, "Refusals rise from 25\u202f% to 80\u202f%; the benign KL was not measured"),
        ({"refusal_rate": 0.2}, "Refusals fall from 25\u202f% to 20\u202f% for 0.042 nats of benign KL"),
        ({"refusal_rate": 0.25}, "Refusals stay at 25\u202f% for 0.042 nats of benign KL"),
        (dict.fromkeys(("refusal_rate", "refusal_nll", "benign_kl", "benign_nll")),
         "Predicted to cost 0.005 nats of benign KL; nothing was measured"),
    ],
)  # fmt: skip
def test_headlines_of_less(change, headline):
    assert page_of_merge(cases.evaluated(**change), {}).headline == headline


def test_a_report_that_measured_nothing_makes_a_page():
    page = page_of_merge(cases.bare(), {})
    assert page.headline == "Predicted to cost 0.005 nats of benign KL; nothing was measured"
    assert (page.light.state, page.light.measured, page.points) == ("unmeasured", None, ())
    text, _, tags = text_of(page_html(page))
    assert "was not measured" in text
    assert "table" in tags
    old = cases.bare()
    for name in ("budget", "evaluation", "failed_evaluations"):
        del old[name]
    assert page_of_merge(old, {}).light is None
    page_html(page_of_merge(old, {}))


@pytest.mark.parametrize(
    ("budget", "state"),
    [
        (cases.budget(), "kept"),
        (cases.budget(more_rows=40), "unsure"),
        (cases.budget(0.0), "unsure"),
        (cases.budget(0.04), "broken"),
    ],
)
def test_the_light_follows_the_measured_budget(budget, state):
    report = cases.evaluated(benign_kl=budget["kl"]) | {"budget": budget}
    light = page_of_merge(report, {}).light
    assert (light.state, light.asked, light.measured) == (
        state,
        0.02,
        Interval(budget["kl"], budget["low"], budget["high"]),
    )
    assert budget["words"][1:] in light.words
    here = next(p for p in page_of_merge(report, {}).points if p.here)
    assert here.kl == light.measured  # its interval is the budget's
    told = report | {"calibration": [{"parameter": 1.0, "predicted_kl": 0.01, "measured_kl": budget["kl"]}]}
    assert [p.measured for p in page_of_merge(told, {}).predictions] == [light.measured] * bool(budget["kl"])


def test_a_budget_measured_only_by_the_evaluation_is_judged():
    assert page_of_merge(cases.evaluated(), {}).light.state == "broken"
    assert page_of_merge(cases.evaluated(benign_kl=0.01), {}).light.state == "unsure"


def test_the_front_is_on_the_page_with_its_commands():
    report = cases.evaluated() | {"front": cases.front()}
    page = page_of_merge(report, {})
    offered = [p for p in page.points if p.label.endswith("allowed")]
    assert [p.kl.value for p in offered] == [0.002, 0.011]  # the third is the adapter that was written
    assert offered[0].refused == Interval(0.3, 0.3 - 0.1, 0.3 + 0.08)
    assert words_of(offered[0].command) == shlex.split(report["front"][0]["command"])
    assert [p.predicted for p in page.predictions] == [0.001, 0.005, 0.02]
    assert [c.name for c in page.columns if not c.minor] == [
        "adapter",
        "harmful refused",
        "benign KL",
        "safe prompts refused",
    ]
    assert all(len(p.cells) == len(page.columns) for p in page.points)
    assert [p.here for p in page.points] == [False, False, False, True]  # it has a row, and no second point
    front = [*cases.front(), cases.front()[0] | {"allowed": None, "command": None}]
    alone = page_of_merge(cases.bare() | {"front": front}, {})
    assert [(p.label, p.here, bool(p.command)) for p in alone.points][2:] == [
        ("0.02 nats allowed", True, True), ("the whole patch", False, False)
    ]  # fmt: skip


def test_a_wanted_rate_of_refusal_is_a_light_too():
    report = cases.evaluated()
    report["recipe"]["kl_budget"] = None
    found = cases.budget(0.042) | {
        "target": 0.9,
        "reached": False,
        "refused": 0.8,
        "refused_low": 0.6,
        "refused_high": 0.92,
    }
    del found["budget"]
    light = page_of_merge(report | {"measured": found}, {}).light
    assert (light.state, light.title, light.share) == ("broken", "Refuses less often than asked", True)
    assert (light.asked, light.measured) == (0.9, Interval(0.8, 0.6, 0.92))
    del found["target"]
    light = page_of_merge(report | {"measured": found}, {}).light
    assert (light.title, light.asked) == ("Measured", None)
    page_html(page_of_merge(report | {"measured": found}, {}))


def test_whatever_else_was_measured_has_a_column():
    more = {"task_accuracy": 0.6, "first_token_kl": 0.011, "judge_refused": 0.7, "robust_refused": {"role play": 0.5}}
    page = page_of_merge(cases.evaluated(**more), {})
    here = next(p for p in page.points if p.here)
    told = {column.name: cell.text for column, cell in zip(page.columns, here.cells)}
    assert told["task accuracy"] == "60\u202f%"
    assert told["first-token KL"] == "0.011"
    assert told["refused, by log-odds"] == "70\u202f%"
    assert told["refused, role play"] == "50\u202f%"


def test_examples_and_warnings_of_a_report():
    report = cases.evaluated() | {"warnings": ["identical files"], "examples": {"harm": {"prompt": "Q", "labels": "A"}}}
    page = page_of_merge(report, {})
    assert page.notes == ("identical files",)
    assert page.examples == ({"name": "harm", "spans": [{"text": "Q", "label": False}, {"text": "A", "label": True}]},)
    assert "<mark>A</mark>" in page_html(page)


def test_failed_evaluations_are_named():
    report = cases.evaluated() | {"failed_evaluations": {"plain addition": "OutOfMemoryError"}}
    report["evaluation"]["plain addition"] = dict.fromkeys(report["evaluation"]["plain addition"])
    text, _, _ = text_of(page_html(page_of_merge(report, {})))
    assert "plain addition was not measured to the end: OutOfMemoryError" in text


HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "'\"&amp;", "\u2028\u2029\x00\ufeff",
    "مرحبا كيف أصنع", "\U0001f600" * 3, "half \ud800", "",
]  # fmt: skip


@pytest.mark.parametrize("prompt", HOSTILE)
def test_prompts_are_text_and_nothing_else(prompt):
    """In the data of the script, and in the parts that the template writes."""
    report = cases.evaluated() | {
        "budget": cases.budget(0.042),
        "examples": {"harm": [{"text": prompt, "label": True}]},
    }
    report["inputs"]["data"]["eval_harm"]["path"] = prompt
    report["failed_evaluations"] = {"merged": prompt}
    plain = text_of(page_html(page_of_merge(report, cases.records())))
    page = page_html(page_of_merge(report | {"budget": cases.budget(0.042)}, cases.records(prompt, prompt)))
    _, data, tags = text_of(page)
    assert tags == plain[2]
    assert data["answers"]["rows"][0]["prompt"] == prompt.replace("\ud800", "?")
    assert data["answers"]["rows"][0]["of"]["merged"]["answer"] == prompt.replace("\ud800", "?")
    assert "alert" not in tags
    report_, rows = cases.comparison(prompt)
    assert text_of(page_html(page_of_comparison(report_, rows)))[1]["answers"]["rows"][0]["prompt"] == prompt.replace(
        "\ud800", "?"
    )


def test_pages_load_nothing():
    for page in (page_of_merge(*cases.measured("merge")), page_of_comparison(*cases.measured("comparison"))):
        text = page_html(page)
        for sign in ("src=", "href=", "@import", "url(", "<link", "<iframe"):
            assert sign not in text.split('id="data"')[0], sign


def test_numbers_that_are_none_in_json_stay_numbers_that_are_none():
    report = cases.evaluated(benign_nll=math.nan)
    assert json.loads(str(render._json(asdict(page_of_merge(report, {})))))["points"][1]["cells"][4]["value"] is None


def test_answers_are_cut_to_what_a_page_holds():
    many = [{"set": "benign", "line": i, "prompt": "x" * 9000, "benign_kl": float(i)} for i in range(ROWS + 7)]
    harm = [{"set": "harmful", "line": 2, "prompt": "b"}, {"set": "harmful", "line": 1, "prompt": "a"}]
    found = answers({"no patch": [], "merged": many + harm}, "no patch", "merged")
    assert [r["prompt"] for r in found.rows[:2]] == ["a", "b"]
    assert (found.left, len(found.rows), found.names, found.before, found.after) == (
        7,
        ROWS + 2,
        ("merged",),
        "",
        "merged",
    )
    assert found.rows[2]["of"]["merged"]["kl"] == ROWS + 6  # those that moved most are kept
    assert found.rows[2]["prompt"].endswith("(5000 more characters)")
    assert len(found.rows[2]["prompt"]) < CHARACTERS + 40


def test_a_comparison_shows_who_wins_and_keeps_the_rest():
    report, rows = cases.comparison()
    page = page_of_comparison(report, rows)
    shown = [s.name for s in page.series if s.shown]
    assert shown[:2] == ["plain", "sst"]
    assert len(shown) == 5
    assert len(page.series) == 8
    assert {s.name for s in page.series if not s.shown} >= {"rival 4", "rival 5"}  # on no front
    assert page.headline == "plain at 1 refuses 100\u202f% for 0.1 nats of benign KL, the least above 90\u202f%"
    assert "ties 1 was not run: ranks differ" in page.notes
    assert all(len(p.cells) == len(page.columns) for p in page.points)
    weaker, _ = cases.comparison()
    weaker["rows"] = [row for row in weaker["rows"] if row["refusal_rate"] < 0.9]
    headline = page_of_comparison(weaker, []).headline
    assert headline == "rival 0 at 0.5 refuses 70\u202f% for 0.01 nats of benign KL; no method reaches 90\u202f%"
    silent, _ = cases.comparison()
    for row in silent["rows"]:
        row["refusal_rate"] = None
    assert "refusal NLL" in page_of_comparison(silent, []).headline


def test_commands_of_a_comparison_are_recipes_that_make_the_row():
    report, rows = cases.comparison()
    points = page_of_comparison(report, rows).points
    made = {p.answers: words_of(p.command) for p in points}
    assert made["plain at 1"] == []
    words = made["sst at 0.1"]
    flags = dict(zip(words[2::2], words[3::2]))
    assert words[:2] == ["sst-merge", "merge"]
    recipe = Recipe.parse({name[2:].replace("-", "_"): value for name, value in flags.items()})
    assert (recipe.kl_budget, recipe.damping, recipe.holdout, str(recipe.safety)) == (0.1, 2.0, 0.0, "my safety")
    report["context"]["recipe"]["template"] = {"today": "x"}  # no flag says that
    assert not any(p.command for p in page_of_comparison(report, rows).points)


def test_the_study_is_told_in_its_numbers():
    report, rows = cases.measured("comparison")
    page = page_of_comparison(report, rows)
    assert page.headline == "sst at 0.004 refuses 97\u202f% for 0.0082 nats of benign KL, the least above 90\u202f%"
    assert page.claims[0] == "At the same share refused plain addition costs 13 times as much (6.4–37)."
    assert [s.name for s in page.series if s.shown] == ["plain", "sst", "input-filter", "regmean"]


def test_words():
    assert [number(x) for x in (0.0418, 1e-5, 1.155, 123.4, 0.0, None)] == ["0.042", "0.00001", "1.2", "120", "0", "–"]
    assert percent(0.7083) == "71\u202f%"
    assert between(Interval(0.5, 0.59, 0.91), percent) == "59–91\u202f%"
    assert between(Interval(1.0, 1.0, 1.0)) == between(Interval(1.0)) == ""
    wilson = share(19 / 24, 24)
    assert (wilson.low, wilson.high) == pytest.approx((0.5953, 0.9076), abs=1e-4)
    assert share(0.5, None) == Interval(0.5)
    assert command("a b --c 'd e' --f") == "a b \\\n  --c 'd e' \\\n  --f"
    assert command("a '--b") == "a '--b"


def test_a_page_without_its_library_says_why(monkeypatch):
    page = page_html(page_of_merge(cases.evaluated(), {}))
    assert "No charts: left out. The table has the same numbers." in page


def test_the_library_is_one_script_that_closes_no_other(monkeypatch):
    monkeypatch.undo()
    script, missing = render.library()
    assert missing == ""
    assert script.endswith(";")
    assert "window.vegaEmbed" in script
    assert "</script" not in script.lower()
    assert 500_000 < len(script) < 1_500_000
