"""Runs configurations of the quality study for one pair of adapters: rows, pencils, strengths, measurements, intervals."""

from __future__ import annotations

import argparse
import csv
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from common import machine
from quality_data import SCARY_BUT_SAFE, Row, refusals, tokenize
from quality_lab import Cores, DiagonalPencil, Gradients, Lab, ModulePencil, Pencil, Probe
from torch import Tensor

from sst_merge.pareto import Resample, equal_refusal

ALPHAS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
CURVE = (2.2, 1.5, 1.0, 0.75, 0.55)  # refusal NLLs of a whole curve, in units of the target
RESULTS = (
    "pair", "stage", "method", "scope", "gain_point", "gain_labels", "harm_rows", "cost_labels", "benign_prompts", "draws",
    "benign_rows", "damping", "strength", "target", "select_nll", "select_kl", "refusal_nll", "refusal_nll_lo", "refusal_nll_hi",
    "kl", "kl_lo", "kl_hi", "kl_gsm8k", "kl_self_instruct", "benign_nll", "refusal_rate", "over_refusal", "plain_kl", "ratio",
    "ratio_lo", "ratio_hi", "predicted_global", "predicted_module", "in_sample", "seconds", "error",
    "device", "driver", "versions", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One way to filter the patch; None means all rows there are."""

    method: str = "sst-soft"
    scope: str = "global"
    gain_point: str = "patched"
    gain_labels: str = "data"
    harm_rows: int | None = None
    cost_labels: str = "probe"
    benign_prompts: int | None = None
    draws: int | None = None
    damping: float = 3.0


class OutOfTime(Exception):
    """The budget of minutes is spent."""


class Study:
    """All that one pair of adapters needs, computed when first asked for."""

    def __init__(self, args: argparse.Namespace, lab: Lab, splits: dict, pair: str, deadline: float):
        self.args, self.lab, self.splits, self.pair, self.deadline = args, lab, splits, pair, deadline
        self.path = args.out / "quality.csv"
        self.arrays = args.out / "arrays"
        self.arrays.mkdir(parents=True, exist_ok=True)
        self.done = set()
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.done = {_row_key(r) for r in csv.DictReader(file) if not r["error"]}
        self._cache: dict[Any, Any] = {}
        self.targets = [round(args.target * share, 6) for share in CURVE]
        self._plain: tuple[np.ndarray, np.ndarray] | None = None

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
        """Benign rows with the data's answers; GSM8K and instructions interleaved (fisher: 5 to 1 while both last)."""
        maths = self.tokens(self.splits["gsm8k_test" if split == "final" else "gsm8k"][split], "gsm8k")
        other = self.tokens(self.splits["self_instruct"][split], "self_instruct")
        if split != "fisher":
            return maths + other
        most = max(1, 5 * len(other))
        mixed = [row for i, row in enumerate(other) for row in (row, *maths[5 * i : 5 * i + 5])]
        return mixed + maths[most:]

    def probes(self) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            lab = self.lab
            return {
                "select_harm": lab.probe(self.harm("select", 2)),
                "select_benign": lab.probe(self.own("select")),
                "harm": lab.probe(self.harm("final")),
                "benign": lab.probe(self.own("final")),
            }

        return self.once("probes", make)

    def own(self, split: str) -> list[Row]:
        """Benign rows of a split with answers sampled from the reference."""
        rows = self.benign(split)[: self.args.prompts if split == "fisher" else None]
        return self.once(("text", split), lambda: self.lab.own_answers(rows))

    def gain(self, c: Config) -> Gradients:
        alpha = {"patched": 1.0, "reference": 0.0, "half": 0.5}[c.gain_point]
        key = ("harm", c.gain_point, c.gain_labels)
        return self.once(key, lambda: self.lab.rows(self.harm("fisher", 2), c.gain_labels, alpha)).take(
            None if c.harm_rows is None else max(c.harm_rows // 2, 1)
        )

    def cost(self, c: Config) -> Gradients:
        draws = {"probe": self.args.draws, "model": 4, "data": 1}[c.cost_labels]
        key = ("benign", c.cost_labels)
        rows = self.once(key, lambda: self.lab.rows(self.own("fisher"), c.cost_labels, 0.0, draws))
        return rows.take(c.benign_prompts, c.draws)

    def unseen(self) -> Gradients:
        """Rows of prompts that are in no pencil: what predictions are made from."""
        draws = min(self.args.draws, 4)
        return self.once("unseen rows", lambda: self.lab.rows(self.own("select"), "probe", 0.0, draws))

    def pencil(self, c: Config) -> Any:
        gain, cost = self.gain(c).rows, self.cost(c).rows
        if c.method == "diagonal":
            return DiagonalPencil(gain, cost, c.damping)
        if c.scope == "module":
            return ModulePencil(gain, cost, c.damping, len(self.lab.sites))
        return Pencil(gain, cost, c.damping)

    def select_nll(self, cores: Cores) -> float:
        sums = self.lab.measure(cores, self.probes()["select_harm"]).sum(0)
        return float(sums[0] / sums[2])

    def plain_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Per-prompt sums of the α sweep: harm [alphas, N, 2] (NLL, labels), benign [alphas, M, 2] (KL, labels)."""
        if self._plain is None:
            sums = [self._final(f"{self.pair} plain {a}", a) for a in ALPHAS]
            self._plain = np.stack([harm for harm, _ in sums]), np.stack([benign for _, benign in sums])
        return self._plain

    def _final(self, name: str, cores: Cores) -> tuple[np.ndarray, np.ndarray]:
        """Sums over each prompt of the final split, measured once: harm [N, 2] (NLL, labels), benign [M, 2] (KL, labels)."""
        file = self.arrays / f"{name}.npz"
        if not file.exists():
            self.check_time()
            harm, benign = (self.lab.measure(cores, self.probes()[k]).numpy() for k in ("harm", "benign"))
            np.savez(file, harm=harm[:, [0, 2]], benign=benign[:, [1, 2]])
        with np.load(file) as loaded:
            return loaded["harm"], loaded["benign"]

    def record(self, stage: str, config: Config, cores: Cores | None, *, full: bool = True, **values: Any) -> None:
        """Measure one patch on the final split and write its row. `full` adds generation and benign NLL."""
        row = {"pair": self.pair, "stage": stage, **asdict(config), **values}
        if cores is not None:
            row |= self._measured(row, cores, full)
        row |= machine(str(self.lab.device))
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RESULTS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({k: _text(row.get(k)) for k in RESULTS})
        self.done.add(_row_key({k: _text(row.get(k)) for k in RESULTS}))
        shown = {
            k: row.get(k)
            for k in ("strength", "target", "refusal_nll", "kl", "ratio", "ratio_lo", "predicted_global", "error")
        }
        label = f"{stage} {config.method}/{config.scope} {config.gain_point}-{config.gain_labels} {config.cost_labels}"
        self.say(f"{label} {config.harm_rows}+{config.benign_prompts}x{config.draws} d={config.damping} | " + "  ".join(f"{k} {_short(v)}" for k, v in shown.items() if v is not None))  # fmt: skip

    def _measured(self, row: dict[str, Any], cores: Cores, full: bool) -> dict[str, Any]:
        probes = self.probes()
        name = "_".join(_text(row.get(k)) for k in ("pair", "stage", *asdict(Config()), "target", "strength"))
        name = f"{self.pair} plain {cores}" if isinstance(cores, float) else name
        harm, benign = self._final(name, cores)
        out: dict[str, Any] = {}
        if row["stage"] not in ("plain", "calibration"):  # their strengths were not set on the select split
            select = self.lab.measure(cores, probes["select_benign"]).sum(0)
            out = {"select_nll": self.select_nll(cores), "select_kl": float(select[1] / select[2])}
        found = equal_refusal((harm, benign), self.plain_curve(), self.resample(harm, benign))
        out["plain_kl"] = found["plain_kl"][0]
        for name in ("refusal_nll", "kl", "ratio"):
            out |= dict(zip((name, f"{name}_lo", f"{name}_hi"), found[name]))
        for source in ("gsm8k", "self_instruct"):
            own = np.array([r.source == source for r in probes["benign"].rows])
            out[f"kl_{source}"] = benign[own, 0].sum() / max(benign[own, 1].sum(), 1)
        if full:
            answers = self.lab.measure(cores, Probe(self.benign("final"))).sum(0)
            out["benign_nll"] = float(answers[0] / answers[2])
            out["refusal_rate"] = self.lab.refusal_rate([r.prompt for r in probes["harm"].rows], cores)
            out["over_refusal"] = self.lab.refusal_rate(SCARY_BUT_SAFE, cores)
        return out

    def resample(self, harm: np.ndarray, benign: np.ndarray) -> Resample:
        return self.once("bootstrap", lambda: Resample(len(harm), len(benign), seed=self.args.seed))

    def predictions(self, z: Tensor, cost: Gradients | None) -> dict[str, float]:
        unseen, slices = self.unseen(), list(self.lab.coordinates.slices.values())
        out = {"predicted_global": unseen.cost(z), "predicted_module": unseen.cost(z, slices)}
        return out | ({"in_sample": cost.cost(z)} if cost is not None else {})

    def to_target(self, filtered: Callable[[float], Tensor], start: float, target: float) -> tuple[float, Tensor]:
        """The strength μ at which the select split's refusal NLL meets the target: regula falsi in log μ."""
        low, high = (math.log(start) + d * math.log(10) for d in (-4, 2))
        at: dict[float, tuple[float, Tensor]] = {}

        def nll(x: float) -> float:
            z = filtered(math.exp(x))
            at[x] = (self.select_nll(self.lab.cores(z)), z)
            return at[x][0] - target

        f_low, f_high = nll(low), nll(high)
        for _ in range(3):
            if f_low > 0:
                low -= math.log(100)
                f_low = nll(low)
            if f_high < 0:
                high += math.log(100)
                f_high = nll(high)
        if f_low > 0 or f_high < 0:
            raise ValueError(f"refusal NLL {target} is out of reach: {f_low + target:.3f} … {f_high + target:.3f}")
        for i in range(12):
            share = f_low / (f_low - f_high) if i % 3 else 0.5
            x = low + min(max(share, 0.1), 0.9) * (high - low)
            f = nll(x)
            low, high, f_low, f_high = (x, high, f, f_high) if f < 0 else (low, x, f_low, f)
            if abs(f) < 0.01 * target:
                break
        best = min(at, key=lambda x: abs(at[x][0] - target))
        return math.exp(best), at[best][1]

    def run(self, stage: str, config: Config, *, curve: bool = False, full: bool = False) -> None:
        """One configuration of the soft filter at the target, or along the curve of targets."""
        targets = self.targets if curve else [self.args.target]
        todo = [t for t in targets if not self.has(stage, config, t)]
        if not todo:
            return

        def body(target: float) -> None:
            self.check_time()
            start, cost = time.monotonic(), self.cost(config)
            pencil = self.once(("pencil", stage, config), lambda: self.pencil(config))
            mu, z = self.to_target(lambda m: pencil.soft(self.lab.patch, m), pencil.scale, target)
            more = self.predictions(z, cost) | {"benign_rows": len(cost.rows), "seconds": time.monotonic() - start}
            self.record(stage, config, self.lab.cores(z), full=full, strength=mu, target=target, **more)

        for target in todo:
            self.guard(stage, config, lambda t=target: body(t), target=target)
        self._cache.pop(("pencil", stage, config), None)

    def has(self, stage: str, config: Config, last: float) -> bool:
        """Whether the row of this configuration and target (strength, where there is no target) is known."""
        values = {"pair": self.pair, "stage": stage, **asdict(config), "target": last}
        return _row_key({k: _text(v) for k, v in values.items()}) in self.done

    def guard(self, stage: str, config: Config, body: Callable[[], None], **values: Any) -> None:
        """Run a configuration; an error becomes its row."""
        try:
            body()
        except OutOfTime:
            raise
        except Exception as error:
            traceback.print_exc()
            self.record(stage, config, None, **values, error=f"{type(error).__name__}: {str(error)[:200]}")


def _row_key(row: dict[str, str]) -> tuple[str, ...]:
    return (*(row[k] for k in ("pair", "stage", *asdict(Config()))), row["target"] or row.get("strength", ""))


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
