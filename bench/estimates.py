"""Arithmetic that the report prints beside measurements, and marks as estimated: memory that fits, hours that a study takes."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from bench.shapes import Shape
from sst_kernels.inputs.moments import columns as kept_columns
from sst_kernels.subspace.memory import estimate_solve

GIB = 2**30
SKETCH_ARRAYS = (
    10  # float64 arrays the size of a module's sketch that filter_inputs holds at its peak: at most 9 measured
)
WHOLE_ARRAYS = 5  # and of whole moments: 4.75 measured
INPUT_RANK = 512  # of the recipe
INPUT_BATCHES = 32 + 32  # a merge of 256 + 256 sequences, 8 at a time
FISHER_BATCHES = 32 + 2 * 32  # labels of benign prompts are drawn twice
RATE = 0.4 * 989e12  # operations per second, assumed: 40 % of an H100's dense bfloat16 peak (NVIDIA's data sheet)


def coordinates(shape: Shape, rank: int, targets: str = "all-linear") -> int:
    """Core coordinates of all modules together: n = r² · modules."""
    return rank**2 * len(shape.modules(targets))


def weight_bytes(shape: Shape) -> int:
    """bfloat16 weights, input embedding included."""
    return 2 * (shape.weights + shape.hidden * shape.vocabulary)


def activation_bytes(shape: Shape, batch: int, length: int) -> int:
    """A checkpointed frozen pass: layer inputs, one layer's intermediates, logits in bfloat16 and three times float32."""
    tokens = batch * length
    kept = 2 * tokens * shape.hidden * shape.layers
    live = tokens * (24 * shape.hidden + 10 * shape.intermediate)
    return kept + live + tokens * shape.vocabulary * 14


def row_bytes(shape: Shape, rank: int, samples: int) -> int:
    """Both float32 row buffers of `samples` sequences each."""
    return 2 * 4 * samples * coordinates(shape, rank)


def solve_bytes(shape: Shape, rank: int, samples: int) -> int:
    """The peak of `subspace()`, as the library foresees it (and its tests hold against the allocator)."""
    return estimate_solve([rank**2] * len(shape.modules("all-linear")), samples, samples)


def input_bytes(shape: Shape, columns: int | None, targets: str = "all-linear") -> int:
    """float32 second moments of one side: [d, d] for each tensor that modules read, or [d, columns] where it is sketched."""
    return 4 * sum(d * kept_columns(d, columns) for d in shape.read_widths(targets))


def input_flops(shape: Shape, columns: int | None, targets: str = "all-linear") -> int:
    """Operations per token that the moments add to a forward pass: half of x xᵀ, or X Ω and Xᵀ (X Ω)."""
    kept = ((d, kept_columns(d, columns)) for d in shape.read_widths(targets))
    return sum(d * d if d == k else 4 * d * k for d, k in kept)


def input_traffic(shape: Shape, columns: int | None, tokens: int, itemsize: int, targets: str = "all-linear") -> int:
    """Least bytes that they move for a batch: every tensor read once, the sums read and written."""
    return tokens * itemsize * sum(shape.read_widths(targets)) + 2 * input_bytes(shape, columns, targets)


def input_peak(shape: Shape, columns: int | None, batch: int = 8, length: int = 512) -> int:
    """The moments of both sides beside the larger of a forward pass without logits and the solve of the widest input."""
    live = 2 * batch * length * (6 * shape.hidden + 3 * shape.intermediate)
    widest = max(shape.read_widths())
    kept = kept_columns(widest, columns)
    arrays = WHOLE_ARRAYS if kept == widest else SKETCH_ARRAYS
    return 2 * input_bytes(shape, columns) + max(live, 8 * arrays * widest * kept)


def input_share(shape: Shape, columns: int | None, rank: int = 16, batch: int = 8, length: int = 512) -> float:
    """Operations of the input pass over those of a training step on the same batch."""
    tokens = batch * length
    work = shape.forward_flops(batch, length, rank) + tokens * input_flops(shape, columns)
    return work / shape.step_flops(batch, length, rank)


def step_ms(shape: Shape, batch: int = 8, length: int = 512, rank: int = 16) -> float:
    """A training step at RATE; a Fisher step is taken to be as long."""
    return 1e3 * shape.step_flops(batch, length, rank) / RATE


def input_ms(shape: Shape, batch: int = 8, length: int = 512) -> float:
    """A batch of the input pass at RATE."""
    return input_share(shape, INPUT_RANK, 16, batch, length) * step_ms(shape, batch, length)


def fits_inputs(shape: Shape, columns: int | None, gib: float) -> bool:
    """Whether the input pass and its solve fit beside the weights."""
    return weight_bytes(shape) + input_peak(shape, columns) <= gib * GIB * 0.94


def most_samples(shape: Shape, rank: int, gib: float, batch: int = 8, length: int = 512) -> int:
    """Largest N (rows of each Fisher) whose pass and solve both fit beside the weights, after an input pass that fits too."""
    room = gib * GIB * 0.94 - weight_bytes(shape)
    if not fits_inputs(shape, INPUT_RANK, gib):
        return 0

    def fits(samples: int) -> bool:
        working = max(activation_bytes(shape, batch, length), solve_bytes(shape, rank, samples))
        return row_bytes(shape, rank, samples) + working <= room

    return bisect.bisect_left(range(1, 1 << 20), True, key=lambda samples: not fits(samples))


@dataclass(frozen=True)
class Study:
    """The safety-tax study of the next phase: what is run, how often."""

    models: int = 2
    tasks: int = 3
    seeds: int = 3
    methods: int = 8
    strengths: int = 6
    input_sequences: int = 512 + 512
    fisher_sequences: int = 512 + 2 * 512
    train_sequences: int = 3 * 10_000
    evaluated_tokens: int = 400 * 256 + 1319 * 256
    generated_per_second: float = 2000.0

    @property
    def merges(self) -> int:
        return self.models * self.tasks * self.seeds * self.methods * self.strengths

    def hours(self, train_ms: float, fisher_ms: float, input_ms: float, batch: int = 8) -> dict[str, float]:
        """GPU hours per part from the measured time of a training step, of a Fisher step and of an input step."""
        runs = self.models * self.tasks * self.seeds
        return {
            "training task and safety adapters": 2 * runs * self.train_sequences / batch * train_ms / 3.6e6,
            "Fisher passes": runs * self.fisher_sequences / batch * fisher_ms / 3.6e6,
            "input passes": runs * self.input_sequences / batch * input_ms / 3.6e6,
            "generation and judging of every merge": self.merges
            * self.evaluated_tokens
            / self.generated_per_second
            / 3600,
        }
