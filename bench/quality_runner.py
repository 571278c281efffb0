"""Runs configurations of the quality study for one pair of adapters: Fishers, patches, measurements, intervals."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from common import machine
from quality_data import SCARY_BUT_SAFE, Row, continued, refusals, tokenize
from quality_lab import Cores, Lab, Probe
from torch import Tensor

import sst_kernels as sst
from sst_kernels.fisher import Counts, TokenBatch
from sst_merge.compare.pareto import Resample, equal_refusal
from sst_merge.merge.pipeline import over_points

ALPHAS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.85, 0.9, 1.0, 1.2)
GENERATED = (0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1.0)  # plain addition's answers, for its rate of refusals
POINTS = {"path": (0.0, 0.5, 1.0), "patched": (1.0,), "half": (0.5,), "reference": (0.0,)}


@dataclass(frozen=True)
class Config:
    """One way to filter the patch. Prompts: None means all there are. Refusals: two per harmful prompt and point.

    `input_filter`: the price of benign inputs in the patch's reads (None: reads as they are); `input_rank`: columns of their sketch.
    `opening`: weight of a refusal's first tokens (1: all weigh the same).
    """

    method: str = "sst"
    input_filter: float | None = 3.0
    input_rank: int | None = 512
    scope: str = "global"
    metric: str = "kronecker"
    damping: float = 1.0
    filter: str = "soft"
    gain_point: str = "reference"
    opening: float = 3.0
    harm_prompts: int | None = None
    cost_labels: str = "model"
    benign_prompts: int | None = None
    draws: int = 2


KEYS = ("pair", "stage", *(f.name for f in fields(Config)), "strength")
RESULTS = (
    *KEYS, "harm_rows", "benign_rows", "parameter", "refusal_nll", "refusal_nll_lo", "refusal_nll_hi", "kl", "kl_lo", "kl_hi",
    "kl_gsm8k", "kl_self_instruct", "benign_nll", "refusal_rate", "over_refusal",
    "rate_plain_kl", "rate_ratio", "rate_ratio_lo", "rate_ratio_hi", "plain_kl", "ratio", "ratio_lo", "ratio_hi",
    "predicted", "in_sample", "unseen_global", "unseen_module", "norm", "seconds", "error",
    "device", "driver", "versions", "commit", "date",
)  # fmt: skip


class OutOfTime(Exception):
    """The budget of minutes is spent."""


class Study:
    """All that one pair of adapters needs, computed when first asked for; Fishers and measurements are kept in DIR."""

    def __init__(self, args: argparse.Namespace, lab: Lab, splits: dict, pair: str, deadline: float):
        self.args, self.lab, self.splits, self.pair, self.deadline = args, lab, splits, pair, deadline
        self.path = args.out / "quality.csv"
        self.arrays, self.kept = args.out / "arrays", args.out / "fishers"
        for folder in (self.arrays, self.kept):
            folder.mkdir(parents=True, exist_ok=True)
        self.done = set()
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.done = {_key(r) for r in csv.DictReader(file) if not r["error"]}
        self._cache: dict[Any, Any] = {}
        self.whole = sum(float((left * right).sum()) for left, right in (site.metric() for site in lab.sites))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self.check_time()
            start = time.monotonic()
            self._cache[key] = make()
            if (seconds := time.monotonic() - start) > 0.5:
                self.say(f"{key}: {seconds:.1f} s")
        return self._cache[key]

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {self.pair}: {text}", flush=True)

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def tokens(self, pairs: Sequence[tuple[str, str]], source: str) -> list[Row]:
        return tokenize(pairs, self.lab.tokenizer, source)

    def harm(self, split: str, each: int = 1) -> list[Row]:
        rows = self.tokens(refusals(self.splits["advbench"][split], each), "advbench")
        if split == "final":
            rows += self.tokens(refusals(self.splits["harmbench"][split], each), "harmbench")
        return rows

    def benign(self, split: str) -> list[Row]:
        """Benign rows with the data's answers; GSM8K and instructions interleaved (fisher: 2 to 1 while both last)."""
        maths = self.tokens(self.splits["gsm8k_test" if split == "final" else "gsm8k"][split], "gsm8k")
        other = self.tokens(self.splits["self_instruct"][split], "self_instruct")
        if split != "fisher":
            return maths + other
        mixed = [row for i, row in enumerate(other) for row in (row, *maths[2 * i : 2 * i + 2])]
        return mixed + maths[2 * len(other) :]

    def own(self, split: str) -> list[Row]:
        """Benign rows of a split with answers sampled from the reference."""
        rows = self.benign(split)[: self.args.prompts if split == "fisher" else None]
        path = self.kept / f"{self.pair} answers {split} {len(rows)}.json"
        if not path.exists():
            answers = self.once(("answers", split), lambda: self.lab.own_answers(rows))
            path.write_text(json.dumps(answers), encoding="utf-8")
        return continued(rows, json.loads(path.read_text(encoding="utf-8")), self.lab.tokenizer)

    def probes(self) -> dict[str, Probe]:
        """Harmful and benign prompts of the final split, with the reference's log-probabilities on the benign ones."""

        def make() -> dict[str, Probe]:
            return {"harm": Probe(self.harm("final")), "benign": self.lab.probe(self.own("final"))}

        return self.once("probes", make)

    def fisher(
        self,
        name: str,
        rows: Callable[[], list[Row]],
        labels: str,
        point: float,
        draws: int = 1,
        opening: float = 1.0,
    ) -> sst.Fisher:
        """A Fisher pass, kept on disk."""
        path = self.kept / f"{self.pair} {name}.safetensors"
        if not path.exists():
            self.once(path, lambda: self.lab.fisher(rows(), labels, point, draws, opening)).save(path)
        return self.once(("read", path), lambda: sst.Fisher.load(path, self.lab.device))

    def gain(self, c: Config) -> sst.Fisher:
        """Two refusals for each harmful prompt, at each of the points."""

        def at(point: float) -> sst.Fisher:
            name = f"gain {point} x {c.opening:g}{_inputs(c)}"
            whole = self.fisher(name, lambda: self.harm("fisher", 2), "data", point, opening=c.opening)
            return subset(whole, None if c.harm_prompts is None else 2 * c.harm_prompts)

        return over_points(POINTS[c.gain_point], at)

    def cost(self, c: Config) -> sst.Fisher:
        """Benign prompts with the reference's own answers and `draws` label samples or probes each; or with answers as labels, its
        own ("own") or the data's ("data")."""
        prompts, sampled = self.args.prompts, c.cost_labels in ("model", "probe")
        draws, labels = (self.args.draws, c.cost_labels) if sampled else (1, "data")
        rows = (lambda: self.benign("fisher")[:prompts]) if c.cost_labels == "data" else lambda: self.own("fisher")
        name = f"cost {c.cost_labels} {prompts} x {draws}{_inputs(c)}"
        return subset(self.fisher(name, rows, labels, 0.0, draws), c.benign_prompts, c.draws)

    def reads(self, c: Config) -> dict[str, Tensor] | None:
        """What the patch reads by, from the prompts of both Fishers."""
        if c.input_filter is None:
            return None
        path = self.kept / f"{self.pair} reads{_inputs(c)}.pt"
        if not path.exists():
            harm, benign = self.harm("fisher", 2), self.own("fisher")
            made = self.once(path, lambda: self.lab.reads(harm, benign, c.input_filter, c.input_rank))
            torch.save(made, path)
        return torch.load(path)

    def unseen(self, c: Config, cores: Mapping[str, Tensor]) -> dict[str, float]:
        """½ sᵀFs per label over benign prompts that are in no pencil: all modules coupled, and module by module."""
        fisher = self.fisher(f"unseen{_inputs(c)}", lambda: self.own("select"), "probe", 0.0, 2)
        labels, parts, rows = fisher.counts.labels / fisher.counts.sequences, [], fisher.rows().double()
        for own, name in zip(rows.split([b.size for b in fisher.blocks.values()], 1), fisher.blocks):
            parts.append(own @ cores[name].to(own).flatten())
        each = torch.stack(parts, 1)
        coupled, apart = each.sum(1).square(), each.square().sum(1)
        return {"unseen_global": float(coupled.mean()) / 2 / labels, "unseen_module": float(apart.mean()) / 2 / labels}

    def run(self, stage: str, config: Config, strengths: Sequence[float], *, full: bool = False) -> None:
        """One configuration at each of `strengths`: KL budgets in nats per label token."""
        if all(self.has(stage, config, s) for s in strengths):
            return

        def body() -> None:
            self.check_time()
            self.probes(), self.plain_curve(), self.plain_rates()  # of the patch as it is
            with self.lab.reading(self.reads(config)):
                self._along(stage, config, strengths, full)

        self.guard(stage, config, body)

    def _along(self, stage: str, config: Config, strengths: Sequence[float], full: bool) -> None:
        start, gain, cost = time.monotonic(), self.gain(config), self.cost(config)
        options = {name: getattr(config, name) for name in ("scope", "metric", "damping")}
        space = sst.subspace(gain, cost, folds=4, mix_points=True, **options)
        known = {
            "harm_rows": len(gain.groups),
            "benign_rows": len(cost.groups),
            "seconds": time.monotonic() - start,
        }
        for strength in strengths:
            if self.has(stage, config, strength):
                continue
            self.check_time()
            patch = getattr(space, config.filter)(kl_budget=strength)
            values = {
                "parameter": patch.parameter,
                "predicted": patch.prediction.cost_per_label,
                "in_sample": patch.prediction.in_sample_cost_per_label,
            }
            self.record(stage, config, strength, patch.coordinates, full=full, **known, **values)

    def record(
        self, stage: str, config: Config, strength: float, cores: Cores | None, *, full: bool = False, **values: Any
    ) -> None:
        """Measure one patch on the final split and write its row. `full` adds generation and benign NLL."""
        row = {"pair": self.pair, "stage": stage, **asdict(config), "strength": strength, **values}
        if cores is not None:
            row |= self._measured(row, config, cores, full)
        row |= machine(str(self.lab.device))
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RESULTS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({k: _text(row.get(k)) for k in RESULTS})
        self.done.add(_key({k: _text(row.get(k)) for k in RESULTS}))
        shown = ("refusal_nll", "kl", "plain_kl", "ratio", "ratio_lo", "ratio_hi", "predicted", "refusal_rate", "error")
        figures = "  ".join(f"{k} {_short(row[k])}" for k in shown if row.get(k) is not None)
        self.say(f"{stage} {' '.join(map(str, asdict(config).values()))} @ {strength} | {figures}")

    def _measured(self, row: dict[str, Any], config: Config, cores: Cores, full: bool) -> dict[str, Any]:
        name = " ".join(_text(row[k]) for k in KEYS)
        label = f"{self.pair} plain {cores}" if isinstance(cores, float) else name
        harm, benign = self._final(label, cores)
        out: dict[str, Any] = {}
        found = equal_refusal((harm, benign), self.plain_curve(), self.resample(harm, benign))
        out["plain_kl"] = found["plain_kl"][0]
        for name in ("refusal_nll", "kl", "ratio"):
            out |= dict(zip((name, f"{name}_lo", f"{name}_hi"), found[name]))
        for source in ("gsm8k", "self_instruct"):
            own = np.array([r.source == source for r in self.probes()["benign"].rows])
            out[f"kl_{source}"] = benign[own, 0].sum() / max(benign[own, 1].sum(), 1)
        if isinstance(cores, float):
            cores = {s.name: cores * torch.eye(s.rank, dtype=torch.float64) for s in self.lab.sites}
        out |= self.unseen(config, cores) | {"norm": self._norm(cores)}
        if full:
            answers = self.lab.measure(cores, Probe(self.benign("final"))).sum(0)
            out["benign_nll"] = float(answers[0] / answers[2])
            refused, out["over_refusal"] = self._refused(label, cores)
            out["refusal_rate"] = 1 - refused[:, 0].mean()
            if row["method"] != "plain":
                found = equal_refusal((refused, benign), self.plain_rates(), self.resample(harm, benign))
                out["rate_plain_kl"] = found["plain_kl"][0]
                out |= dict(zip(("rate_ratio", "rate_ratio_lo", "rate_ratio_hi"), found["ratio"]))
        return out

    def _norm(self, cores: Mapping[str, Tensor]) -> float:
        """‖ΔW'‖_F / ‖ΔW‖_F over all modules."""
        kept = 0.0
        for site in self.lab.sites:
            left, right = site.metric()
            core = cores[site.name].to(left)
            kept += float((core * (left @ core @ right)).sum())
        return (kept / self.whole) ** 0.5

    def plain_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Per-prompt sums of the α sweep: harm [alphas, N, 2] (NLL, labels), benign [alphas, M, 2] (KL, labels)."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            sums = [self._final(f"{self.pair} plain {a}", a) for a in ALPHAS]
            return np.stack([harm for harm, _ in sums]), np.stack([benign for _, benign in sums])

        return self.once("plain curve", make)

    def plain_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """The same with (not refused, 1) for each harmful prompt, at those α > 0 where answers are generated."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            names = {a: f"{self.pair} plain {a}" for a in GENERATED if a > 0}
            refused = np.stack([self._refused(n, a)[0] for a, n in names.items()])
            return refused, np.stack([self._final(n, a)[1] for a, n in names.items()])

        return self.once("plain rates", make)

    def _refused(self, name: str, cores: Cores) -> tuple[np.ndarray, float]:
        """(not refused, 1) [N, 2] of the greedy answers to harmful prompts, generated once; share refused of the safe ones."""
        file = self.arrays / f"{name} answers.npz"
        if not file.exists():
            self.check_time()
            refused = self.lab.refused([r.prompt for r in self.probes()["harm"].rows], cores)
            np.savez(file, refused=refused, over=self.lab.refused(SCARY_BUT_SAFE, cores))
        with np.load(file) as kept:
            refused = kept["refused"]
            return np.stack([1.0 - refused, np.ones(len(refused))], 1), float(kept["over"].mean())

    def _final(self, name: str, cores: Cores) -> tuple[np.ndarray, np.ndarray]:
        """Sums over each prompt of the final split, measured once: harm [N, 2] (NLL, labels), benign [M, 2] (KL, labels)."""
        file = self.arrays / f"{name}.npz"
        if not file.exists():
            self.check_time()
            harm, benign = (self.lab.measure(cores, self.probes()[k]).numpy() for k in ("harm", "benign"))
            np.savez(file, harm=harm[:, [0, 2]], benign=benign[:, [1, 2]])
        with np.load(file) as loaded:
            return loaded["harm"], loaded["benign"]

    def resample(self, harm: np.ndarray, benign: np.ndarray) -> Resample:
        return self.once("bootstrap", lambda: Resample(len(harm), len(benign), seed=self.args.seed))

    def has(self, stage: str, config: Config, strength: float) -> bool:
        values = {"pair": self.pair, "stage": stage, **asdict(config), "strength": strength}
        return _key({k: _text(v) for k, v in values.items()}) in self.done

    def guard(self, stage: str, config: Config, body: Callable[[], None]) -> None:
        """Run a configuration; an error becomes its row."""
        try:
            body()
        except OutOfTime:
            raise
        except Exception as error:
            traceback.print_exc()
            self.record(stage, config, float("nan"), None, error=f"{type(error).__name__}: {str(error)[:200]}")


def _inputs(c: Config) -> str:
    return "" if c.input_filter is None else f" inputs {c.input_filter:g} of {c.input_rank or 'all'}"


def subset(fisher: sst.Fisher, groups: int | None = None, draws: int | None = None) -> sst.Fisher:
    """The rows of the first `groups` groups, at most `draws` each; tokens and labels are counted at their mean."""
    keep, seen = [], dict[int, int]()
    for group in fisher.groups:
        seen[group] = seen.get(group, 0) + 1
        keep.append((groups is None or group < groups) and (draws is None or seen[group] <= draws))
    chosen, counts, share = torch.tensor(keep), fisher.counts, sum(keep) / len(keep)
    out = sst.Fisher.empty(
        list(fisher.blocks.values()), "full", devices={name: torch.device("cpu") for name in fisher.blocks},
        metric=fisher.metric, scope="global", sample="sequence", count="sequences", options={}, meta=copy.copy(fisher.meta),
    )  # fmt: skip
    rows = fisher.rows()[chosen]
    empty, spans = rows[:0, :1], torch.zeros(len(rows), 2, dtype=torch.int64)
    own = Counts(len(rows), round(counts.tokens * share), round(counts.labels * share))
    out.joint.update(TokenBatch(empty, empty, spans, torch.ones(len(rows)), own, rows))
    out.note(fisher.meta["labels"], len(rows), [g for g, k in zip(fisher.groups, keep) if k])
    return out


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[k] for k in KEYS)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
