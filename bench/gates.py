"""Correctness before timing: each gate raises AssertionError, and a stage whose gate fails is not timed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import sst_kernels as sst
from bench import baselines
from bench.shapes import Shape
from bench.workload import STRUCTURES, Variant, build_model, token_batch
from sst_kernels.fisher.structures.moment import dense
from sst_kernels.testing import error_ratio

# float32 forward and backward passes of a few hundred terms, taken in two orders.
ALLOWED = 2e-4
GATE_SHAPE = Shape("gate", "llama", 64, 96, 2, 4, 2, 61)


def fisher_gate(device: str) -> float:
    """Core rows against one backward pass per sample by their definition, and every structure fed a padded batch whole against the
    same fed one sample at a time, on random vectors; the worst ratio."""
    model = build_model(GATE_SHAPE, rank=4, device=device, dtype=torch.float32, length=24)
    batch = token_batch(GATE_SHAPE, 3, 24, device)
    batch["attention_mask"][1, 18:] = 0
    batch["labels"][1, 18:] = -100
    whole, singles = [batch], _samples(batch)
    rows = _accumulate(model, whole, STRUCTURES["core/full"]).rows()
    ratios = {"core/full": error_ratio(rows, _core_rows(model, batch))}
    for name, variant in STRUCTURES.items():
        fed, apart = (_accumulate(model, parts, variant) for parts in (whole, singles))
        for block in fed:
            probe = torch.randn(fed[block].size, 2, dtype=torch.float64, device=device)
            ratio = error_ratio(fed[block].matvec(probe), apart[block].matvec(probe))
            ratios[name] = max(ratios.get(name, 0.0), ratio)
    return _worst(ratios)


def evidence_gate(device: str, mu: float = 3.0) -> float:
    """Moments of padded batches against what each sample reads, filters of whole and sketched moments against their formula solved in
    d×d, and rows against one backward pass per sample at S = 0; the worst ratio."""
    model = build_model(GATE_SHAPE, rank=4, device=device, dtype=torch.float32, length=24).requires_grad_(False)
    sides = {"gain": token_batch(GATE_SHAPE, 6, 24, device), "cost": token_batch(GATE_SHAPE, 6, 24, device, seed=1)}
    sides["gain"]["attention_mask"][1, 18:] = 0
    sides["gain"]["labels"][1, 18:] = -100
    ratios = {}
    for rank in (None, 8):
        evidence = sst.Evidence.of(model, "safety", rank=rank)
        for side, batch in sides.items():
            with evidence.accumulate(side) as reading:
                reading.backward(batch)
        gain, cost = evidence.gain.moments, evidence.cost.moments
        for name, filtered in evidence.filter(mu).lora_A.items():
            x, y = dense(gain[name]), dense(cost[name])
            both = x + mu * y
            both.diagonal().mul_(1 + 1e-4 if isinstance(gain[name], Tensor) else 1)
            both.diagonal().add_(1e-6 * both.diagonal().mean())
            expected = torch.linalg.solve(both, x @ evidence.weights.a[name].to(x).mT).mT
            ratios[f"filter of {name} at rank {rank}"] = error_ratio(filtered.to(x), expected)
        if rank is None:
            for name, x in _reads(model, sides["gain"]).items():
                ratios[f"inputs of {name}"] = error_ratio(dense(gain[name]), x.mT @ x / len(x))
            rows = evidence.filter(0.0).gain.rows()
            ratios["rows"] = error_ratio(rows, _core_rows(model, sides["gain"], reference=True))
    return _worst(ratios)


def solve_gate(gain: sst.Fisher, cost: sst.Fisher, scope: str) -> float:
    """The soft filter against what defines it: its patch s' makes (s'−s)ᵀG(s'−s) + μ s'ᵀC s' stationary, where C = F_cost + ε M and
    G = F_gain + λ₀ C.

    In the metric M = ‖ΔW‖², which is public. Returns the gradient in all n coordinates over the sizes of its terms.
    """
    space = sst.subspace(gain, cost, scope=scope, metric="frobenius")
    mu = float(space.values[len(space.values) // 4])
    patch = {name: S.double() for name, S in space.soft(mu=mu).coordinates.items()}
    device = next(iter(patch.values())).device
    full, kept = (
        torch.cat([x.flatten() for x in s]) for s in ([torch.eye(len(S)).to(S) for S in patch.values()], patch.values())
    )
    metric = [gain.metric[name] for name in patch]
    fisher = lambda f, v: _by_block(f.rows().to(device).double(), v, patch.values() if scope == "module" else ())  # noqa: E731

    def costs(v: Tensor) -> Tensor:
        cores = (x.view(S.shape) for x, S in zip(v.split([S.numel() for S in patch.values()]), patch.values()))
        weighed = torch.cat([(b.to(S) @ S @ a.to(S)).flatten() for (b, a), S in zip(metric, cores)])
        return fisher(cost, v) + space.epsilon * weighed

    terms = [fisher(gain, kept - full), space.unseen * costs(kept - full), mu * costs(kept)]
    ratio = float(sum(terms).norm() / max(term.norm() for term in terms))
    assert ratio <= 1e-8, (
        f"{scope}: the filtered patch is not stationary, {ratio:.2e} of the gradient's terms exceeds 1e-8"
    )
    return ratio


def _by_block(rows: Tensor, v: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """RᵀR v / N, of the diagonal blocks alone where blocks are given."""
    widths = [block.numel() for block in blocks] or [len(v)]
    return torch.cat([r.mT @ (r @ x) for r, x in zip(rows.split(widths, 1), v.split(widths))]) / len(rows)


def baseline_gate(device: str) -> float:
    """Factored merges against their dense forms, in float64, where the two define the same thing."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, device=device, dtype=torch.float64)  # noqa: E731
    tasks = [(draw(24, 3), draw(3, 20)) for _ in range(2)]
    total = sum(B @ A for B, A in tasks)
    triples = [torch.linalg.svd(B @ A, full_matrices=False) for B, A in tasks]
    u, vh = torch.cat([t[0][:, :3] for t in triples], 1), torch.cat([t[2][:3] for t in triples])
    tsv = (baselines._orthogonal(u) * torch.cat([t[1][:3] for t in triples])) @ baselines._orthogonal(vh)
    pairs = {
        "Core Space": (baselines.core_space(tasks), total),
        "Core Space QR": (baselines.core_space_qr(tasks), total),
        "TSV-Merge factors": (baselines.tsv_factors(tasks), tsv),
    }
    ratios = {name: error_ratio(left @ right, expected) for name, ((left, right), expected) in pairs.items()}
    return _worst(ratios, 1e-10)


def _worst(ratios: dict[str, float], allowed: float = ALLOWED) -> float:
    for what, ratio in ratios.items():
        assert ratio <= allowed, f"{what}: error ratio {ratio:.2e} exceeds {allowed}"
    return max(ratios.values())


def _accumulate(model: nn.Module, batches: list[dict[str, Tensor]], variant: Variant) -> sst.Fisher:
    """The sum over batches of a summed loss, so that batches of any size add up."""

    def step() -> None:
        for batch in batches:
            sst.sequence_nll(model, batch).backward()
            model.zero_grad(set_to_none=True)

    with variant.hooks(model, step) as accumulator:
        step()
    return accumulator.fisher


def _reads(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens [S, d_in] that each module reads without the adapter, one sample at a time."""
    seen: dict[str, list[Tensor]] = {}
    keep = lambda name: lambda _m, args: seen.setdefault(name, []).append(args[0][0].double())  # noqa: E731
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in _layers(model).items()]
    with torch.no_grad(), model.disable_adapter():
        for sample in _samples(batch):
            model(input_ids=sample["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _samples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    kept = [mask != 0 for mask in batch["attention_mask"]]
    return [{k: v[i][keep][None] for k, v in batch.items()} for i, keep in enumerate(kept)]


def _summed_loss(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=sample["input_ids"]).logits[0, :-1]
    return nn.functional.cross_entropy(logits, sample["labels"][0, 1:], reduction="sum")


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def _core_rows(model: nn.Module, batch: dict[str, Tensor], reference: bool = False) -> Tensor:
    """Σ_t e hᵀ of every module by its definition: an explicit S, 1 or at the reference 0, between lora_A and lora_B, one sample at a time."""
    layers = _layers(model)
    start = lambda m: (1 - reference) * torch.eye(m.r["safety"], device=batch["labels"].device)  # noqa: E731
    cores = {n: start(m).requires_grad_() for n, m in layers.items()}
    handles = [
        m.lora_A["safety"].register_forward_hook(lambda _m, _i, h, s=cores[n]: h @ s.T) for n, m in layers.items()
    ]
    rows = []
    for sample in _samples(batch):
        gradients = torch.autograd.grad(_summed_loss(model, sample), list(cores.values()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    for handle in handles:
        handle.remove()
    return torch.stack(rows)
