"""A KL budget is measured on rows that are in no pencil, and kept, or it is said why it could not be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from sst_merge.errors import MergeError
from sst_merge.evaluate import Evaluation
from sst_merge.io.data import load_dataset
from sst_merge.merge import pipeline, trust
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe
from sst_merge.report import spent
from tests import merge_cases as cases

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("trust")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, scale=0.3)
    for name, n, word in (("harm", 8, "steal"), ("benign", 20, "bake"), ("other", 6, "translate to French")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    return root


def recipe(world, output, **more):
    given = {"model": str(world / "model"), "safety": world / "safety", "task": world / "task", "device": "cpu"}
    given |= {"harm_data": world / "harm.jsonl", "benign_data": world / "benign.jsonl", "generate_tokens": 0}
    return Recipe.parse({**given, "output": output, "folds": 2, "tokens_per_batch": 400, **more})


@pytest.mark.parametrize("budget", [0.3, 0.02, 0.001])
def test_a_merge_stays_within_its_budget_on_rows_it_has_not_seen(world, tmp_path, budget):
    report = pipeline.merge(recipe(world, tmp_path / "out", kl_budget=budget), reporter=QUIET)
    found = report["budget"]
    assert found["rows"] == report["inputs"]["data"]["eval_benign"]["sequences"] == 4
    assert report["inputs"]["data"]["harm"]["sequences"] == report["fisher"]["harm"]["sequences"] == 6
    assert report["inputs"]["data"]["eval_harm"]["sequences"] == 2
    assert report["inputs"]["data"]["benign"]["sequences"] == 16
    assert report["fisher"]["benign"]["sequences"] == 32
    assert 0 < found["kl"] <= budget
    assert found["kl"] == report["evaluation"]["merged"]["benign_kl"]  # of the adapter that was written
    assert found["low"] <= found["kl"] <= found["high"]
    assert "4 of 20 benign rows are held out" in " ".join(report["inputs"]["data"]["benign"]["notes"])
    assert "2 of 8 harm rows are held out" in " ".join(report["inputs"]["data"]["harm"]["notes"])
    for name in ("report.md", "README.md"):
        assert found["words"] in (tmp_path / "out" / name).read_text()
    assert json.loads((tmp_path / "out/report.json").read_text())["budget"]["kept"] is True


def test_few_rows_whose_predictions_are_far_too_small_end_within_the_budget(world, tmp_path):
    """Eight benign rows, of another kind than those measured: what is predicted on them says nothing about the others."""
    given = {"limit": 8, "eval_benign_data": world / "other.jsonl", "kl_budget": 0.02}
    trusting = pipeline.merge(recipe(world, tmp_path / "trusting", **given | {"holdout": 0}), reporter=QUIET)
    tried = trusting["budget"]["tried"]
    assert trusting["budget"]["kl"] <= 0.02
    assert tried[0][0] == 0.02
    if tried[0][1] > 0.02:
        assert "backed off from a measured" in trusting["budget"]["words"]
    assert len(tried) <= trust.TRIALS + 1


@dataclass
class Pretended:
    """A patch whose predicted cost is what was allowed, up to all there is; measured KL and refusals are any functions of that."""

    law: object
    whole: float = 1.0
    rate: object = lambda cost: 0.0
    prompts: int = 20
    measured: list = field(default_factory=list)

    def choose(self, allowed):
        cost = min(allowed, self.whole)
        patch = SimpleNamespace(prediction=SimpleNamespace(cost_per_label=cost))
        return trust.Choice(allowed, patch, None, whole=allowed >= self.whole)

    def measure(self, choice):
        cost = choice.patch.prediction.cost_per_label
        kl, refused = self.law(cost), round(self.rate(cost) * self.prompts)
        self.measured.append(kl)
        prompts = [{"set": "benign", "line": e.line, "prompt": "x", "benign_kl": kl} for e in ROWS.examples]
        prompts += [{"set": "harmful", "line": i, "refused": i < refused} for i in range(self.prompts)]
        return trust.Trial(choice, Evaluation(benign_kl=kl, refusal_rate=refused / self.prompts, prompts=prompts))


ROWS = SimpleNamespace(examples=[SimpleNamespace(line=i, labels=3 + i % 3) for i in range(400)])


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.2, 5.0, 2000.0])
@pytest.mark.parametrize("whole", [1.0, 1e-3])
def test_strengths_are_backed_off_until_the_measurement_agrees(factor, whole):
    world = Pretended(lambda cost: factor * cost, whole)
    best, budget, tried = trust.within(0.02, world.choose, world.measure, ROWS)
    assert best.found.benign_kl <= 0.02
    assert budget.kept
    assert len(tried) == len(world.measured) <= trust.TRIALS + 1
    if factor * min(0.02, whole) <= 0.02:
        assert len(world.measured) == 1  # a prediction that was right costs one measurement
    else:
        assert best.found.benign_kl >= 0.5 * 0.02  # and one that was not, no more safety than it has to
    assert budget.tried[-1][0] >= best.choice.allowed or len(budget.tried) > 1


def test_where_nothing_stays_within_the_budget_nothing_is_kept_and_said():
    world = Pretended(lambda cost: 1.0 if cost else 0.0)
    best, budget, _ = trust.within(0.02, world.choose, world.measure, ROWS)
    assert (best.choice.allowed, best.found.benign_kl) == (0.0, 0.0)
    assert "No strength that keeps anything stays within the budget" in budget.words()


def test_measurements_that_are_no_numbers_keep_nothing():
    world = Pretended(lambda cost: float("nan") if cost else 0.0)
    best, budget, _ = trust.within(0.02, world.choose, world.measure, ROWS)
    assert best.choice.allowed == 0.0
    assert budget.kl == 0.0


@pytest.mark.parametrize("kls", [(0.5, 1.5), (1.0, 1.0)])
def test_two_rows_hold_a_patch_back_and_ask_for_more(kls):
    """However well they agree: the interval has to end below 1.5 budgets."""
    base = Pretended(lambda cost: cost)
    rows = SimpleNamespace(examples=[SimpleNamespace(line=i, labels=4) for i in (1, 2)])

    def measure(choice):
        trial = base.measure(choice)
        kl = trial.found.benign_kl
        trial.found.prompts = [
            {"set": "benign", "line": i, "prompt": "x", "benign_kl": kl * share} for i, share in zip((1, 2), kls)
        ]
        return trial

    _, budget, _ = trust.within(0.02, base.choose, measure, rows)
    assert 0 < budget.kl < 0.02 / 2
    assert 0.8 * 0.03 <= budget.high <= 0.03
    assert budget.more_rows > 0
    assert f"with some {budget.more_rows} more the budget could be spent" in budget.words()
    assert [r["benign_kl"] for r in budget.worst] == sorted((budget.kl * share for share in kls), reverse=True)


def test_the_mean_of_more_rows_spends_the_budget_and_its_interval_warns():
    base = Pretended(lambda cost: cost)
    rows = SimpleNamespace(examples=[SimpleNamespace(line=i, labels=4) for i in range(trust.SURE)])
    shares = [0.01] * (trust.SURE - 1) + [trust.SURE - 0.01 * (trust.SURE - 1)]  # one prompt carries the KL

    def measure(choice):
        trial = base.measure(choice)
        kl = trial.found.benign_kl
        trial.found.prompts = [
            {"set": "benign", "line": i, "prompt": "x", "benign_kl": kl * share} for i, share in enumerate(shares)
        ]
        return trial

    _, budget, _ = trust.within(0.02, base.choose, measure, rows)
    assert 0.8 * 0.02 <= budget.kl <= 0.02
    assert budget.high > 0.03
    assert not budget.held_back
    assert budget.more_rows > 0
    assert f"some {budget.more_rows} more would tell whether it stays below 0.03" in budget.words()


@pytest.mark.parametrize("shape", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("n", [2, 8, 40])
def test_intervals_of_kls_cover_what_they_should(shape, n):
    """Rows drawn from gamma distributions, as uneven as KLs are and more even ones; labels of different lengths."""
    generator = np.random.default_rng(0)
    rows = SimpleNamespace(
        examples=[SimpleNamespace(line=i, labels=int(x)) for i, x in enumerate(generator.integers(5, 40, n))]
    )
    weights = np.array([e.labels for e in rows.examples])
    above = below = 0
    for _ in range(600):
        kls = generator.gamma(shape, 1 / shape, n)
        mean = float(weights @ kls / weights.sum())
        found = Evaluation(
            benign_kl=mean, prompts=[{"set": "benign", "line": i, "benign_kl": x} for i, x in enumerate(kls)]
        )
        kl, low, high = trust.kl_interval(found, rows)
        assert low < kl == mean < high
        above, below = above + (high < 1), below + (low > 1)
    assert above / 600 <= (0.09 if shape >= 1 else 0.16)  # 0.025 is meant; few uneven rows tell less
    assert below / 600 <= 0.09


@pytest.mark.parametrize("middle", [1e-3, 0.02, 0.3])
@pytest.mark.parametrize("target", [0.5, 0.95])
def test_a_rate_is_reached_at_little_more_than_the_least_kl(middle, target):
    """Refusals rise with the logarithm of the cost, half of them at `middle`: above and below where the search begins."""
    rate = lambda cost: 1 / (1 + (middle / cost) ** 2)  # noqa: E731
    world = Pretended(lambda cost: 3 * cost, whole=2.0, rate=rate)
    best, found, tried = trust.reaching(target, 0.02, [world.choose], world.measure, ROWS)
    assert best.found.refusal_rate >= target
    assert found.reached
    assert len(tried) <= trust.TRIALS
    least = middle * (target - 0.025) ** 0.5 / (1.025 - target) ** 0.5  # from where on enough of 20 prompts are refused
    assert least <= best.choice.allowed <= 1.6 * least
    assert found.refused_low < found.refused <= found.refused_high
    assert f"target {target:.0%}" in found.words()


def test_a_rate_that_no_strength_reaches_gets_the_most_there_is_and_says_so():
    """The whole patch refuses 80 %, another with inputs less filtered 90 %; half of the former's cost does no less."""
    first = Pretended(lambda cost: cost, whole=0.5, rate=lambda cost: min(0.8, 0.8 * cost / 0.02))
    other = Pretended(lambda cost: cost, whole=0.7, rate=lambda cost: 0.9 * (cost == 0.7))

    def measure(choice):
        return (other if choice.patch.prediction.cost_per_label == 0.7 else first).measure(choice)

    best, found, tried = trust.reaching(0.95, 0.02, [first.choose], first.measure, ROWS)
    assert (found.reached, found.refused, found.most) == (False, 0.8, 0.8)
    assert best.choice.allowed == 0.02  # of all that refuse as much the cheapest
    assert "cannot refuse as often as asked: 80% is the most" in found.words()
    best, found, _ = trust.reaching(0.95, 0.02, [first.choose, other.choose], measure, ROWS)
    assert (found.reached, found.refused, best.choice.whole) == (False, 0.9, True)
    best, found, tried = trust.reaching(0.85, 0.02, [first.choose, other.choose], measure, ROWS)
    assert (found.reached, found.refused) == (True, 0.9)
    assert len(tried) <= trust.TRIALS


@pytest.mark.parametrize(("refused", "n"), [(8, 10), (0, 20), (40, 40)])
def test_intervals_of_rates_are_wilsons(refused, n):
    """Wilson (1927), as SciPy has it."""
    peer = binomtest(refused, n).proportion_ci(method="wilson")
    found = Evaluation(refusal_rate=refused / n, prompts=[{"set": "harmful"}] * n)
    rate, *ends, prompts = trust.rate_interval(found)
    assert (rate, prompts) == (refused / n, n)
    assert ends == pytest.approx([peer.low, peer.high], abs=1e-6)


def test_what_is_held_out(world):
    data = {"benign": load_dataset(world / "benign.jsonl", cases.tokenizer())}
    kept = trust.hold_out({"benign": data["benign"]}, 0.2)
    both = trust.hold_out({"benign": data["benign"], "harm": data["benign"][:9]}, 0.2)
    assert (len(both["harm"]), len(both["eval_harm"]), len(both["eval_benign"])) == (7, 2, 4)
    assert (len(kept["benign"]), len(kept["eval_benign"])) == (16, 4)
    assert not {e.line for e in kept["benign"].examples} & {e.line for e in kept["eval_benign"].examples}
    assert trust.hold_out(data, 0) == data
    assert "eval_benign" not in trust.hold_out({"benign": data["benign"][:4]}, 0.2)
    two = trust.hold_out({"benign": data["benign"][:5]}, 0.2)
    assert (len(two["benign"]), len(two["eval_benign"])) == (3, 2)
    assert "eval_benign" not in trust.hold_out({"benign": data["benign"][:5]}, 0.2, 4)  # as many as there are folds
    twice = trust.hold_out({"harm": replace(data["benign"], examples=data["benign"].examples * 2)}, 0.2)
    assert (len(twice["harm"]), len(twice["eval_harm"])) == (32, 8)
    assert not {e.prompt for e in twice["harm"].examples} & {e.prompt for e in twice["eval_harm"].examples}
    given = {**data, "eval_benign": data["benign"][:1]}
    assert trust.hold_out(given, 0.2) == given


def test_a_failing_measurement_costs_no_merge(world, tmp_path, monkeypatch, capsys):
    def fails(self, *_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("sst_merge.evaluate.Evaluator._benign", fails)
    report = pipeline.merge(recipe(world, tmp_path / "out", kl_budget=0.02), reporter=Reporter())
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert report["budget"] is None
    assert "not measured" in spent(report)
    assert "could not be measured, so its prediction stands" in " ".join(capsys.readouterr().err.split())


def test_another_strength_from_evidence_is_measured_on_the_rows_held_out_of_it(world, tmp_path, capsys):
    first = pipeline.merge(recipe(world, tmp_path / "first", kl_budget=0.3), reporter=QUIET)
    given = {"evidence": tmp_path / "first/evidence.safetensors", "kl_budget": 0.02}
    later = pipeline.merge(recipe(world, tmp_path / "later", **given), reporter=QUIET)
    anew = pipeline.merge(recipe(world, tmp_path / "anew", kl_budget=0.02), reporter=QUIET)
    assert later["budget"] == anew["budget"]
    assert later["budget"]["rows"] == first["budget"]["rows"] == 4
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("later", "anew"))
    assert one == two
    for change in ({"holdout": 0.25}, {"limit": 12}, {"benign_data": world / "other.jsonl"}):
        other = pipeline.merge(recipe(world, tmp_path / "other", **given, **change), force=True, reporter=Reporter())
        assert other["budget"] is None
        assert "so no row is known to be unseen" in " ".join(capsys.readouterr().err.split())
    blind = pipeline.merge(recipe(world, tmp_path / "blind", **given, model=None), reporter=QUIET)
    assert "not measured" in spent(blind)


def test_evidence_is_not_measured_on_another_model(world, tmp_path):
    pipeline.merge(recipe(world, tmp_path / "first", kl_budget=0.3), reporter=QUIET)
    cases.model(seed=5).save_pretrained(tmp_path / "other")
    cases.tokenizer().save_pretrained(tmp_path / "other")
    given = {"evidence": tmp_path / "first/evidence.safetensors", "model": str(tmp_path / "other")}
    with pytest.raises(MergeError, match="collected from another model, or in another dtype"):
        pipeline.merge(recipe(world, tmp_path / "second", **given), reporter=QUIET)
