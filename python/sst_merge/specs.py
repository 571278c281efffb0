"""What a merge is made of, in frozen pieces that are handed on whole: what is read, which Fishers, which pencil, how strong."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Point = str | float


@dataclass(frozen=True)
class Collection:
    """What one reading of the data depends on, beside model, adapters and data.

    opening_tokens, opening_weight: the first tokens of a refusal, and what each of them counts (others 1); None keeps their gradient and
    the rest's apart, for decisions to weigh, which takes a second backward pass. labels, draws: of benign answers.
    input_rank: see `Evidence.of`. form: "exact" keeps gradients over all of d_in, "basis" in a basis from a pilot over a share of the
    prompts, "auto" the first of float32, bfloat16 and the basis that memory holds.
    """

    opening_tokens: int = 4
    opening_weight: float | None = 3.0
    labels: Literal["mc", "empirical"] = "mc"
    draws: int = 2
    tokens_per_batch: int = 1024
    input_rank: int | None = 512
    form: Literal["auto", "exact", "basis"] = "auto"
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fishers:
    """Which Fishers of the patch stand in the pencil. The default ones follow from the evidence, others take passes of their own.

    input_filter: what benign inputs weigh in the filter of the patch's inputs, 0 to leave A as it is. opening_weight: what each of the first tokens of
    a refusal counts; others 1. harm_points, benign_point: where gradients are taken on the patch's path. guard: trace of the rows of
    unwanted refusals over that of F_benign, where there are some.
    """

    input_filter: float = 3.0
    opening_weight: float = 3.0
    structure: str = "full"
    options: tuple[tuple[str, Any], ...] = ()
    space: Literal["core", "factor"] = "core"
    scope: Literal["global", "module"] = "global"
    harm_points: tuple[Point, ...] = ("reference",)
    benign_point: Point = "reference"
    guard: float = 0.01

    @property
    def from_evidence(self) -> bool:
        """Whether the kept gradients have them."""
        at_reference = (*self.harm_points, self.benign_point) == ("reference", "reference")
        return at_reference and (self.structure, self.space, self.options) == ("full", "core", ())


@dataclass(frozen=True)
class Pencil:
    """Which pencil is solved: see `sst_kernels.subspace`."""

    fishers: Fishers = field(default_factory=Fishers)
    scope: Literal["global", "module"] = "global"
    metric: Literal["kronecker", "frobenius"] = "kronecker"
    damping: float = 1.0
    folds: int = 4


@dataclass(frozen=True)
class Strength:
    """How much of the patch is kept: a filter, and a KL budget in nats per label token, a μ, a k, or a rate of refusal.

    Nothing of these: the knee of the measured curve.
    """

    filter: Literal["soft", "top_k", "threshold"] = "soft"
    kl_budget: float | None = None
    mu: float | None = None
    k: int | None = None
    target_refusal: float | None = None
