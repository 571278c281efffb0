"""LoRA layers, recognised by the shape of their interface (`lora_A`, `lora_B`, `scaling`), and what is refused of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraSite:
    """One module that carries the adapter: ΔW = scaling · B A, A [r, d_in], B [d_out, r]."""

    name: str
    layer: nn.Module
    lora_a: nn.Module
    lora_b: nn.Module
    scaling: float

    @property
    def rank(self) -> int:
        return weight_of(self.lora_a).shape[0]

    @property
    def device(self) -> torch.device:
        """Where the module computes; its weight may rest elsewhere (accelerate offloading)."""
        weight, hook = weight_of(self.lora_a), getattr(self.lora_a, "_hf_hook", None)
        device = getattr(hook, "execution_device", None) if weight.is_meta else None
        return weight.device if device is None else torch.device(device)

    def metric(self) -> tuple[Tensor, Tensor]:
        """(scaling² BᵀB, A Aᵀ), both [r, r] float64 on the CPU: ‖ΔW(S)‖²_F = tr(Sᵀ (c²BᵀB) S (AAᵀ)) for ΔW(S) = c·B S A."""
        a, b = (whole_weight(m).to("cpu", torch.float64) for m in (self.lora_a, self.lora_b))
        return self.scaling**2 * (b.T @ b), a @ a.T


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or torch.compile.

    Raises TypeError for what is no module, ValueError for DataParallel, which copies modules per call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (a PEFT model), got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel copies the modules in every call: use one process per device (torchrun) instead"
        )
    inner = (
        model.module if isinstance(model, nn.parallel.DistributedDataParallel) else getattr(model, "_orig_mod", None)
    )
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear map as it stands: a shard under FSDP, without data where accelerate offloads it."""
    if not isinstance(module.weight, Tensor):
        raise TypeError(f"a LoRA factor must be a module with a weight tensor, got {module.weight!r} as its weight")
    return module.weight


def whole_weight(module: nn.Module) -> Tensor:
    """The weight of a module, detached: gathered from all ranks where FSDP shards it, fetched where accelerate offloads it."""
    weight = weight_of(module).detach()
    if weight.is_meta:
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is None:
            raise ValueError("a LoRA weight is on the meta device: load the adapter's weights before accumulating")
        weight = weights["weight"].detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def find_sites(model: nn.Module, adapter: str, modules: str | Iterable[str] | None = None) -> list[LoraSite]:
    """All LoRA layers of `model` that carry `adapter`, in the model's order, checked.

    `modules` restricts them: a regular expression that must match the whole module name, or the names themselves.
    Raises ValueError, naming the module and the remedy, for whatever would make core- or factor-space gradients wrong:
    an unknown, inactive, merged or disabled adapter, names in `modules` that do not carry it, LoRA variants (DoRA and others),
    bare parameters, embedding and convolution layers, a bias in `lora_B`, shared (tied) LoRA weights, active dropout.
    """
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(f"modules={modules!r} is no regular expression ({error})") from error
    elif modules is not None:
        modules = set(modules)
    sites: list[LoraSite] = []
    known: set[str] = set()
    seen: dict[int, str] = {}
    for path, layer in model.named_modules():
        if not all(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling")):
            continue
        name = path.removeprefix("base_model.model.")
        known.update(layer.lora_A.keys(), getattr(layer, "lora_embedding_A", {}).keys())
        if adapter in getattr(layer, "lora_embedding_A", {}):
            raise ValueError(f"{name}: LoRA on an embedding is not supported; train the adapter without this module")
        if adapter not in layer.lora_A or not _selected(name, modules):
            continue
        _check_layer(name, layer, adapter)
        site = LoraSite(name, layer, layer.lora_A[adapter], layer.lora_B[adapter], float(layer.scaling[adapter]))
        for part in (site.lora_a, site.lora_b):
            owner = seen.setdefault(id(part.weight), name)
            if owner != name:
                raise ValueError(f"{name} shares its LoRA weights with {owner}: tied LoRA modules are not supported")
        sites.append(site)
    if not sites:
        if adapter not in known:
            raise ValueError(
                f"no module carries the adapter {adapter!r}; this model has {sorted(known) or 'no LoRA adapters'}"
            )
        raise ValueError(f"modules={modules!r} selects none of the modules that carry the adapter {adapter!r}")
    if isinstance(modules, set) and (missing := sorted(modules - {site.name for site in sites})):
        raise ValueError(
            f"modules= names {missing}, which do not carry the adapter {adapter!r}: the first that does is {sites[0].name!r}"
        )
    _check_dropout(model)
    _check_finite(sites)
    return sites


def fingerprint(sites: Iterable[LoraSite]) -> str:
    """SHA-256 over names, scalings and weights: two Fishers belong to one adapter exactly when these agree."""
    return digest_of((s.name, s.scaling, whole_weight(s.lora_a), whole_weight(s.lora_b)) for s in sites)


def digest_of(modules: Iterable[tuple[str, float, Tensor, Tensor]]) -> str:
    """`fingerprint` of modules given as name, scaling, A [r, d_in] and B [d_out, r]."""
    digest = hashlib.sha256()
    for name, scaling, *parts in modules:
        digest.update(f"{name}\0{scaling!r}\0".encode())
        for part in parts:
            digest.update(part.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _selected(name: str, modules: str | Iterable[str] | None) -> bool:
    if modules is None:
        return True
    return re.fullmatch(modules, name) is not None if isinstance(modules, str) else name in modules


def _check_layer(name: str, layer: nn.Module, adapter: str) -> None:
    if getattr(layer, "merged", False):
        raise ValueError(
            f"{name}: adapters {list(getattr(layer, 'merged_adapters', []))} are merged into the base weight; call model.unmerge_adapter() first"
        )
    if getattr(layer, "disable_adapters", False):
        raise ValueError(
            f"{name}: adapters are disabled; leave the disable_adapter() context or call model.enable_adapter_layers()"
        )
    active = getattr(layer, "active_adapters", [adapter])
    if adapter not in active:
        raise ValueError(
            f"{name}: the adapter {adapter!r} is not active (active: {list(active)}); "
            f"activate it, beside others if need be: model.base_model.set_adapter([...])"
        )
    if adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(adapter, False):
        variant = type(getattr(layer, "lora_variant", {}).get(adapter, None)).__name__
        kind = "DoRA" if getattr(layer, "use_dora", {}).get(adapter, False) or "Dora" in variant else variant
        raise ValueError(
            f"{name}: {kind} is not plain LoRA (ΔW = scaling · B A) and is not supported; retrain with plain LoRA"
        )
    if parameter := getattr(layer, "parameter_name", None):
        raise ValueError(
            f"{name}: LoRA on the bare parameter {parameter!r} (target_parameters) is not supported; train linear layers "
            "(target_modules), or leave this module out with modules="
        )
    if getattr(layer, "lora_bias", {}).get(adapter, False):
        raise ValueError(
            f"{name}: lora_bias=True adds a bias to lora_B, which ΔW = scaling · B A does not hold; retrain without it"
        )
    for part in ("lora_A", "lora_B"):
        weight = getattr(getattr(layer, part)[adapter], "weight", None)
        if weight is None or weight.ndim != 2:
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"{name}: {part} must be a linear map with a 2-d weight, got {shape} (convolution LoRA is not supported)"
            )


def _check_finite(sites: Iterable[LoraSite]) -> None:
    for site in sites:
        for part, module in (("lora_A", site.lora_a), ("lora_B", site.lora_b)):
            if not bool(whole_weight(module).isfinite().all()):
                raise ValueError(f"{site.name}: {part} holds values that are not finite; load the adapter again")


def _check_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if not module.training:
            continue
        rate = (
            module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "attention_dropout", 0.0)
        )
        rate = rate.p if isinstance(rate, nn.modules.dropout._DropoutNd) else rate
        if isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"{path}: dropout {rate} is active, so gradients would be those of a random subnetwork; call model.eval() first"
            )
