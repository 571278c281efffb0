"""What every Fisher structure receives and answers: blocks, token batches, counts, and the verbs of a structure.

A *block* is one weight matrix θ of shape [p, q] whose per-sample gradient is an outer-product sum over tokens,

    G_n = scale_n · Σ_{t in sample n} left_t right_tᵀ            left: [S, p], right: [S, q], G_n: [p, q]

and whose coordinates are vec(G_n), row-major, of length p·q. The spaces differ in nothing but their blocks:

    core      one block per LoRA module:  left = e (= c Bᵀ ∂L/∂y), right = h (= A x)            [r, r]
    factor    `<module>.lora_A`:          left = e,                right = x                    [r, d_in]
              `<module>.lora_B`:          left = c ∂L/∂y,          right = h                    [d_out, r]

`S` counts the tokens of a batch laid out flat. `spans` [N, 2] holds the half-open token range of each of the N samples in
that layout, so that dense right- or left-padded batches and packed ones (`cu_seqlens`) are one case; tokens outside every
span are padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sst_kernels.distributed import Reduction, Sum, reduce_over_ranks
from sst_kernels.fisher.estimate import Estimate
from sst_kernels.fisher.later import Later
from sst_kernels.memo import Memo

COUNTS = ("sequences", "tokens", "labels")


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int. ValueError, naming the option, for anything but a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


@dataclass
class Counts:
    """How much data stands behind raw sums; which of the three divides them is the reader's choice (`count=`).

    Example:
        >>> gain.counts
        Counts(sequences=8, tokens=67, labels=38)
    """

    sequences: int = 0
    tokens: int = 0
    labels: int = 0

    def __iadd__(self, other: Counts) -> Self:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self


@dataclass(frozen=True)
class Block:
    """One parameter block: its name in the Fisher mapping, the PEFT module it belongs to, and its shape [p, q].

    Example:
        >>> sst.fisher.Block("q_proj", "q_proj", (3, 3)).size
        9
    """

    name: str
    module: str
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class TokenBatch:
    """One batch of one block.

    left [S, p], right [S, q]: floating point, any dtype; `spans` [N, 2] int64 on the same device; `scale` [N] float32,
    the factor that turns the autograd gradient of sample n into the gradient of its summed loss; `counts` of the batch.
    `rows` [N, p*q] float32 are the per-sample gradients, scaled, when somebody has computed them already (the
    accumulator does so for all core blocks in one launch); otherwise `gradients()` computes and keeps them. With `later`, what
    modules share launches for may wait for its `settle`.

    Example:
        >>> from sst_kernels.fisher import Counts, TokenBatch
        >>> spans = torch.tensor([[0, 3], [3, 5]])  # two samples, of three and of two tokens
        >>> batch = TokenBatch(torch.ones(5, 2), torch.ones(5, 4), spans, torch.ones(2), Counts(2, 5, 5))
        >>> batch.gradients()[:, 0]  # Σ_t left_t right_tᵀ
        tensor([3., 2.])
    """

    left: Tensor
    right: Tensor
    spans: Tensor
    scale: Tensor
    counts: Counts
    rows: Tensor | None = field(default=None, repr=False)
    later: Later | None = field(default=None, repr=False)

    def gradients(self) -> Tensor:
        """Per-sample gradients [N, p*q], float32, `scale` applied."""
        if self.rows is None:
            from sst_kernels.ops import factor_rows

            n, size = len(self.spans), self.left.shape[1] * self.right.shape[1]
            out = torch.empty(n, size, dtype=torch.float32, device=self.left.device)
            self.rows = factor_rows(self.left, self.right, self.spans, self.scale, out)
        return self.rows

    def per_token(self) -> TokenBatch:
        """The same tokens with every token of every span a sample of its own (`sample="token"`)."""
        if not _last_tokens.holds(self.spans, self.scale):
            lengths, tokens = (
                self.spans[:, 1] - self.spans[:, 0],
                self.counts.tokens,
            )  # whose number would be waited for
            numbers = torch.arange(len(lengths), device=lengths.device)
            owner = torch.repeat_interleave(numbers, lengths, output_size=tokens)
            first = torch.cumsum(lengths, 0) - lengths
            begin = self.spans[owner, 0] + torch.arange(tokens, device=lengths.device) - first[owner]
            _last_tokens.keep((torch.stack([begin, begin + 1], 1), self.scale[owner]), self.spans, self.scale)
        spans, scale = _last_tokens.value
        return TokenBatch(self.left, self.right, spans, scale, self.counts)


_last_tokens = Memo()  # (spans, scale) of `per_token`: the modules of a batch ask for the same


class Structure(ABC):
    """A positive semi-definite estimate of E[vec(G) vec(G)ᵀ] for one block of shape [p, q], n = p·q coordinates.

    Raw sums are stored together with `counts`; every answer is divided by `counts.<count>`. `sample="sequence"` sums the
    tokens of a sequence before squaring, `sample="token"` takes each token alone. Answers are float64 on `device`.

    Example:
        >>> from sst_kernels.fisher import Counts, TokenBatch, make_structure
        >>> spans = torch.tensor([[0, 3], [3, 5]])
        >>> structure = make_structure("diagonal", (2, 4))
        >>> structure.update(TokenBatch(torch.ones(5, 2), torch.ones(5, 4), spans, torch.ones(2), Counts(2, 5, 5)))
        >>> structure.matvec(torch.ones(8)).dtype, structure.quadratic(torch.eye(8)).shape
        (torch.float64, torch.Size([8]))
    """

    kind: ClassVar[str]

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
        sample: str = "sequence",
        count: str = "sequences",
    ):
        if sample not in ("sequence", "token"):
            raise ValueError(f'sample: expected "sequence" or "token", got {sample!r}')
        if count not in COUNTS:
            raise ValueError(f"count: expected one of {COUNTS}, got {count!r}")
        self.shape = (int(shape[0]), int(shape[1]))
        self.device = torch.device(device)
        self.sample = sample
        self.count = count
        self.counts = Counts()

    @property
    def size(self) -> int:
        """Number of coordinates n = p·q."""
        return self.shape[0] * self.shape[1]

    @property
    def normaliser(self) -> float:
        """What the raw sums are divided by; ValueError when nothing was accumulated."""
        n = getattr(self.counts, self.count)
        if n == 0:
            raise ValueError(f"this {self.kind} Fisher holds no {self.count}: run backward passes before reading it")
        return float(n)

    @classmethod
    @abstractmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        """The memory of a pass over `samples` samples in batches of `batch`, for a block of shape [p, q]."""

    @classmethod
    def separates(cls, **options: Any) -> bool:
        """Whether it will tell the samples apart, as cross-fitting needs."""
        return False

    @classmethod
    def rows_for(cls, samples: int, **options: Any) -> int:
        """How many rows across all blocks it has to show after that many samples; 0 where blocks are kept apart."""
        return 0

    @classmethod
    def spans(cls, **options: Any) -> bool:
        """Whether it keeps the correlations between blocks, where it holds several."""
        return False

    @classmethod
    def per_module(cls, **options: Any) -> dict[str, Any]:
        """The options of a pass that keeps every module by itself."""
        return options

    @property
    def spans_modules(self) -> bool:
        """Whether this one does, with its options."""
        return self.spans(**self.options())

    @property
    def keeps_rows(self) -> bool:
        """Whether the samples can still be told apart, as `rows` [N, n] float32."""
        return False

    def update(self, batch: TokenBatch) -> None:
        """Add one batch. Empty batches (N = 0) change nothing."""
        if len(batch.spans):
            self._update(batch if self.sample == "sequence" else batch.per_token())
            self.counts += batch.counts

    def merge(self, other: Structure) -> None:
        """Add the statistics of `other`, taken over other data with the same options. ValueError when they differ."""
        mine, theirs = self.options(), other.options()
        if type(self) is not type(other) or self.shape != other.shape or mine != theirs:
            raise ValueError(
                f"cannot merge {other.kind} {other.shape} {theirs} into {self.kind} {self.shape} {mine}: "
                "accumulate both with the same structure and options"
            )
        self._merge(other)
        self.counts += other.counts

    def options(self) -> dict[str, Any]:
        """The constructor's keyword options (JSON-able), without `device`; subclasses add theirs."""
        return {"sample": self.sample, "count": self.count}

    def share(self, device: torch.device) -> Self:
        """An empty structure of the same options on `device`; what it takes in, merging adds to this one."""
        return type(self)(self.shape, device=device, **self.options())

    @abstractmethod
    def _update(self, batch: TokenBatch) -> None: ...

    @abstractmethod
    def _merge(self, other: Self) -> None: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that make up the raw state (counts and options are saved by the caller)."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, onto `self.device`."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """F @ vectors, for [n] or [n, k]; float64, same shape."""

    @abstractmethod
    def operator(self) -> Any:
        """F, undamped, as the `sst_kernels.gevp.operators.Operator` that keeps its structure."""

    def quadratic(self, vectors: Tensor) -> Tensor:
        """vᵀ F v for each column of [n, k] ([k]) or for [n] (scalar); float64, never negative."""
        return (vectors.to(self.device, torch.float64) * self.matvec(vectors)).sum(0).clamp_min(0)

    def dense(self) -> Tensor:
        """The n×n matrix, float64: for tests and small n."""
        return self.matvec(torch.eye(self.size, dtype=torch.float64, device=self.device))

    def reduction(self) -> Reduction:
        """What combining the structure over ranks takes (see `sst_kernels.distributed`), counts left out.

        The default adds the raw state tensors, which is exact for structures that are sums; others override it.
        """
        yield Sum(list(self.state_dict().values()))

    def all_reduce(self, group: Any = None) -> None:
        """Combine the structure over the ranks of a torch.distributed group so that all hold the total."""
        reduce_over_ranks([self.reduction(), self.count_reduction()], group)

    def count_reduction(self) -> Reduction:
        """The `counts` of all ranks, added."""
        totals = torch.tensor([self.counts.sequences, self.counts.tokens, self.counts.labels])
        yield Sum([totals])
        self.counts = Counts(*totals.tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored state."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def __repr__(self) -> str:
        c = self.counts
        return (
            f"{type(self).__name__}(shape={self.shape}, sequences={c.sequences}, tokens={c.tokens}, "
            f"labels={c.labels}, bytes={self.nbytes})"
        )


class Joint(Structure):
    """A structure that can also hold the coordinates of many blocks side by side, as one of shape [n_total, 1]."""

    @classmethod
    def joins(cls, **options: Any) -> bool:
        """Whether it does, with these options."""
        return True

    def append(self, rows: Tensor, counts: Counts | None = None) -> None:
        """Add per-sample gradients [M, n] (any float dtype, taken as float32), and their `counts` unless the caller keeps those."""
        self._append(rows)
        if counts is not None:
            self.counts += counts

    @abstractmethod
    def _append(self, rows: Tensor) -> None: ...

    @abstractmethod
    def block(self, offset: int, shape: tuple[int, int]) -> Structure:
        """A view of the coordinates [offset, offset + p·q) as a block of shape [p, q]. ValueError when they do not exist."""
