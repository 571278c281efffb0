"""Models, batches, adapters and Fishers of a given shape, from random numbers, built where they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bench.common  # sets the import paths, so before the library  # noqa: F401
from bench.shapes import TARGETS, Shape

import sst_kernels as sst  # isort: skip
from sst_kernels.fisher import Fisher
from sst_kernels.fisher.base import Block, Counts
from sst_merge.io.adapters import Adapter, LoraTerm

SCALING = 2.0


@dataclass(frozen=True)
class Variant:
    """One way to run a Fisher pass: drop-in passes run in the user's training step, which also computes the adapter's own
    gradients; frozen ones are the passes of a merge, which do not."""

    space: str
    structure: str
    options: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    sampled: bool = False

    def hooks(self, model: Any, step: Callable[[], Any]) -> Any:
        """The accumulator; EK-FAC's starts from the K-FAC pass of one step."""
        options = dict(self.options)
        if self.structure == "eigen_kronecker":
            with sst.fisher_accumulate(model, "safety", space=self.space, structure="kronecker") as first:
                step()
            options["basis"] = first.fisher
        return sst.fisher_accumulate(model, "safety", space=self.space, structure=self.structure, **options)


STRUCTURES = {
    name: Variant(*name.split("/"), options)
    for name, options in {
        "core/full": {}, "core/lowrank": {"rank": 32}, "core/diagonal": {}, "core/kronecker": {}, "core/eigen_kronecker": {},
        "core/kronecker_svd": {}, "factor/diagonal": {}, "factor/vila": {}, "factor/kronecker": {},
        "factor/kronecker_lowrank": {"rank": 64}, "factor/eigen_kronecker": {}, "factor/lowrank": {"rank": 16},
    }.items()
}  # fmt: skip


def build_model(
    shape: Shape,
    *,
    rank: int,
    targets: str = "all-linear",
    modules: tuple[str, ...] | None = None,
    length: int = 512,
    device: str,
    dtype: torch.dtype,
    adapters: tuple[str, ...] = ("safety",),
    attention: str = "sdpa",
    seed: int = 0,
) -> Any:
    """A PEFT model with random base and adapter weights of one dtype (PEFT's own default for a 16-bit base is float32 adapters); only
    the adapters are trainable."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(shape.config(length, attention), dtype=dtype)
        options = {"r": rank, "lora_alpha": SCALING * rank, "target_modules": list(modules or TARGETS[targets])}
        model = get_peft_model(base, LoraConfig(**options), adapter_name=adapters[0], autocast_adapter_dtype=False)
        for name in adapters[1:]:
            model.add_adapter(name, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
    model.base_model.set_adapter(list(adapters))
    return model.eval()


def token_batch(shape: Shape, batch: int, length: int, device: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Full-length sequences whose first quarter carries no loss, as prompts do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, shape.vocabulary, (batch, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    mask = torch.ones_like(ids)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def random_adapter(shape: Shape, rank: int, targets: str, *, device: str, seed: int = 0) -> Adapter:
    """LoRA terms of all targeted modules, float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device) * size[1] ** -0.5

    return Adapter(
        {name: LoraTerm(draw(rank, q), draw(p, rank), SCALING) for name, (p, q) in shape.modules(targets).items()},
        base_model=shape.name,
    )


def core_fisher(adapter: Adapter, samples: int, *, device: str, seed: int, decay: float = 0.02) -> Fisher:
    """A core-space `full` Fisher of `adapter` with random aligned rows, as a pass over `samples` sequences leaves it."""
    blocks = [Block(name, name, (term.rank, term.rank)) for name, term in adapter.terms.items()]
    metric = {}
    for name, term in adapter.terms.items():
        a, b = term.A.cpu().double(), term.B.cpu().double()
        metric[name] = (term.scaling**2 * (b.T @ b), a @ a.T)
    fisher = Fisher.empty(
        blocks,
        "full",
        devices={block.name: torch.device(device) for block in blocks},
        metric=metric,
        scope="global",
        sample="sequence",
        count="sequences",
        options={},
        meta={
            "space": "core", "adapter": "safety", "fingerprint": adapter.base_model,
            "point": "patched", "point_given": True,
        },
    )  # fmt: skip
    width = sum(block.size for block in blocks)
    fisher.joint.append(spectral_rows(samples, width, device, seed=seed, decay=decay))
    fisher.joint.counts += Counts(samples, samples * 512, samples * 384)
    fisher.note("data", samples, None)
    return fisher


def spectral_rows(count: int, width: int, device: str, *, seed: int = 0, decay: float = 0.02) -> Tensor:
    """Random rows [count, width] float32 whose Gram spectrum decays like that of measured Fishers: e^(-decay·i)."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(count, width, device=device, generator=generator)
    return rows * torch.exp(-decay / 2 * torch.arange(count, device=device))[:, None]
