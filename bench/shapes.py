"""Model shapes that the cost is measured at: public configurations, random weights, exact compute cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

INPUT_RANK = 512  # columns of the sketch of inputs in a recipe
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TARGETS = {"all-linear": LINEAR, "attention": ATTENTION}


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family; `kind` is the transformers model type."""

    name: str
    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self, targets: str = "all-linear") -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of the targeted linear maps of one layer, in the model's order."""
        head = self.hidden // self.heads
        kv = head * self.kv_heads
        every = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {name: shape for name, shape in every.items() if name.split(".")[1] in TARGETS[targets]}

    def modules(self, targets: str = "all-linear") -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every targeted module by its PEFT name."""
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in self.linears(targets).items()
        }

    def with_layers(self, layers: int) -> Shape:
        """The same widths with fewer layers: for costs that are sums over layers."""
        return replace(self, layers=layers)

    @property
    def weights(self) -> int:
        """Parameters that multiply every token: the linear maps of all layers and the output head."""
        return self.layers * sum(p * q for p, q in self.linears().values()) + self.hidden * self.vocabulary

    def step_flops(self, batch: int, length: int, rank: int, targets: str = "all-linear") -> float:
        """Forward plus backward with a frozen base, without recomputation: each weight multiplies every token once forward
        and once for the activation gradient; each LoRA factor once more for its own gradient; causal attention twice
        forward and four times backward, over half the square. The first layer's q, k, v need no input gradient; that is left in."""
        tokens = batch * length
        lora = sum(rank * (p + q) for p, q in self.modules(targets).values())
        attention = 6 * 2 * batch * length**2 * self.hidden * self.layers / 2
        return 4.0 * self.weights * tokens + 6.0 * lora * tokens + attention

    def read_widths(self, targets: str = "all-linear") -> list[int]:
        """d_in of every tensor that targeted modules read: q, k and v read one, gate and up another."""
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        reads = {shared.get(name := n.split(".")[1], name): q for n, (_, q) in self.linears(targets).items()}
        return list(reads.values()) * self.layers

    def kfac_bytes(self, targets: str = "all-linear") -> int:
        """float32 factors E[xxᵀ] [d_in, d_in] and E[ggᵀ] [d_out, d_out] of dense K-FAC over the adapted modules."""
        return 4 * sum(p * p + q * q for p, q in self.modules(targets).values())

    def kept(self, columns: int | None, targets: str = "all-linear") -> list[tuple[int, int]]:
        """(d, columns kept) of every tensor that is read: all d of them unless a sketch takes less than d² products."""
        return [(d, d if columns is None or d <= 4 * columns else columns) for d in self.read_widths(targets)]

    def input_bytes(self, columns: int | None, targets: str = "all-linear") -> int:
        """float32 second moments of one side: [d, d] for each tensor that modules read, or [d + columns, columns] where it is sketched."""
        return 4 * sum((d + k * (k < d)) * k for d, k in self.kept(columns, targets))

    def input_flops(self, columns: int | None, targets: str = "all-linear") -> int:
        """Operations per token that the moments add to a forward pass: half of x xᵀ, or X Ω and Xᵀ (X Ω)."""
        return sum(d * d if d == k else 4 * d * k for d, k in self.kept(columns, targets))

    def reading_flops(self, columns: int | None, draws: int, rank: int, batch: int, length: int) -> float:
        """One reading: forward without the patch, moments, and for each draw a backward pass, e = Bᵀ ∂L/∂y and e xᵀ."""
        lora = sum(rank * (p + q) for p, q in self.modules().values())
        attention = (1 + 2 * draws) * 2 * batch * length**2 * self.hidden * self.layers
        a_token = 2.0 * (1 + draws) * self.weights + self.input_flops(columns) + 2 * draws * lora
        return batch * length * a_token + attention

    def reading_share(
        self, columns: int | None, draws: int = 1, rank: int = 16, batch: int = 8, length: int = 512
    ) -> float:
        """Operations of one reading over those of a training step on the same batch."""
        return self.reading_flops(columns, draws, rank, batch, length) / self.step_flops(batch, length, rank)

    def evidence_bytes(self, rank: int, rows: int) -> int:
        """float32 gradients [rank, d_in] of every module that an evidence keeps, for so many rows."""
        return 4 * rows * rank * sum(q for _, q in self.modules().values())

    def row_bytes(self, rank: int, samples: int) -> int:
        """float32 rows of both core Fishers, `samples` sequences each."""
        return 2 * 4 * samples * rank**2 * len(self.modules())

    def config(self, length: int, attention: str) -> Any:
        """The transformers configuration."""
        from transformers import LlamaConfig, Qwen2Config

        config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.kind](
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(length, 512),
            tie_word_embeddings=False,
            use_cache=False,
        )
        config._attn_implementation = attention
        return config


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 32000),
        Shape("llama-3.1-8b", "llama", 4096, 14336, 32, 32, 8, 128256),
        Shape("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064),
        Shape("llama-2-13b", "llama", 5120, 13824, 40, 40, 40, 32000),
        Shape("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 49152),
        # The first of these at 1/16 and 1/8 of its width, for machines without a GPU.
        Shape("llama-small", "llama", 512, 1376, 8, 8, 8, 4000),
        Shape("llama-tiny", "llama", 256, 688, 4, 4, 4, 1000),
        Shape("llama-4x256", "llama", 256, 688, 4, 4, 4, 1024),  # of structures_cpu and peers_cpu
    )
}
