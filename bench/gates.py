"""Correctness before timing: each gate raises AssertionError, and a stage whose gate fails is not timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sst_kernels as sst
from bench import baselines
from bench.shapes import Shape
from bench.workload import build_model, token_batch
from sst_kernels.fisher.structures.moment import dense
from sst_kernels.subspace.coordinates import Coordinates
from sst_kernels.testing import error_ratio

# float32 forward and backward passes of a few hundred terms, taken in two orders.
ALLOWED = 2e-4
GATE_SHAPE = Shape("gate", "llama", 64, 96, 2, 4, 2, 61)


def fisher_gate(device: str) -> float:
    """Core rows, factor diagonals and streamed Kronecker factors against one backward pass per sample; the worst ratio."""
    rank = 4
    model = build_model(GATE_SHAPE, rank=rank, device=device, dtype=torch.float32, length=24)
    batch = token_batch(GATE_SHAPE, 3, 24, device)
    batch["attention_mask"][1, 18:] = 0
    batch["labels"][1, 18:] = -100
    ratios = {"core/full": error_ratio(_accumulate(model, batch, "core", "full").rows(), _core_rows(model, batch))}
    gradients = _factor_gradients(model, batch)
    diagonal = _accumulate(model, batch, "factor", "diagonal")
    for name in list(diagonal)[:4]:
        expected = gradients[name].square().mean(0).flatten()
        actual = diagonal[name].matvec(torch.ones(len(expected), dtype=torch.float64, device=device))
        ratios[f"factor/diagonal {name}"] = error_ratio(actual, expected)
    dense, streamed = (
        _accumulate(model, batch, "factor", kind, **options)
        for kind, options in (("kronecker", {}), ("kronecker_lowrank", {"rank": 96}))
    )
    name = next(iter(dense))
    probe = torch.randn(dense[name].size, 2, dtype=torch.float64, device=device)
    ratios["factor/kronecker_lowrank"] = error_ratio(streamed[name].matvec(probe), dense[name].matvec(probe))
    for what, ratio in ratios.items():
        assert ratio <= ALLOWED, f"{what}: error ratio {ratio:.2e} exceeds {ALLOWED}"
    return max(ratios.values())


def inputs_gate(device: str) -> float:
    """Moments of a padded batch against those of its samples one by one, the filter of whole and sketched moments against its formula
    solved in d×d; the worst ratio."""
    model = build_model(GATE_SHAPE, rank=4, device=device, dtype=torch.float32, length=24).requires_grad_(False)
    sides = []
    for seed, end in ((0, 18), (1, 24)):
        batch = token_batch(GATE_SHAPE, 6, 24, device, seed=seed)
        batch["attention_mask"][1, end:] = 0
        sides.append((batch, {rank: _input_moments(model, batch, rank) for rank in (None, 8)}))
    batch, found = sides[0]
    ratios = {}
    for name, x in _reads(model, batch).items():
        ratios[f"inputs of {name}"] = error_ratio(dense(found[None][name]), x.mT @ x / len(x))
    for rank in (None, 8):
        gain, cost = (moments[rank] for _, moments in sides)
        for name, filtered in sst.filter_inputs(gain, cost, 3.0).items():
            x, y = dense(gain[name]), dense(cost[name])
            both = x + 3.0 * y
            both.diagonal().mul_(1 + 1e-4 if isinstance(gain[name], Tensor) else 1)
            both.diagonal().add_(1e-6 * both.diagonal().mean())
            expected = torch.linalg.solve(both, x @ gain.reads[name].double().mT).mT
            ratios[f"filter of {name} at rank {rank}"] = error_ratio(filtered, expected)
    for what, ratio in ratios.items():
        assert ratio <= ALLOWED, f"{what}: error ratio {ratio:.2e} exceeds {ALLOWED}"
    return max(ratios.values())


def gevp_gate(space: sst.Subspace) -> float:
    """What a soft patch z' leaves of F_gain (z' − z) + μ (F_cost + εM) z' = 0, in all n coordinates, relative to F_gain z."""
    gain, cost = (f.rows() for f in (space.gain, space.cost))
    z = Coordinates(list(space.gain.blocks.values()), space.gain.metric, gain.device)
    if space.metric == "kronecker":
        (z,) = z.kronecker(*z.moments(cost, [slice(None)]))
    blocks = list(z.slices.values()) if space.scope == "module" else [slice(0, z.size)]
    sides = [z.gradients(rows) / len(rows) ** 0.5 for rows in (gain, cost)]
    whole, worst = z.patch(), 0.0
    for mu in space.values[[0, len(space.values) // 4]].tolist():
        kept = z.from_cores(space.soft(mu=mu).coordinates)
        for block in blocks[:3]:
            u, w = (rows[:, block] for rows in sides)
            pull = u.T @ (u @ (whole - kept)[block])
            push = mu * (w.T @ (w @ kept[block]) + space.epsilon * kept[block])
            worst = max(worst, float((pull - push).norm() / (u.T @ (u @ whole[block])).norm()))
    assert worst <= 1e-8, f"soft patch: residual {worst:.2e} exceeds 1e-8"
    return worst


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
    for name, ratio in ratios.items():
        assert ratio <= 1e-10, f"{name}: error ratio {ratio:.2e} exceeds 1e-10"
    return max(ratios.values())


def _accumulate(model: nn.Module, batch: dict[str, Tensor], space: str, structure: str, **options) -> sst.Fisher:
    with sst.fisher_accumulate(model, "safety", space=space, structure=structure, **options) as accumulator:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return accumulator.fisher


def _input_moments(model: nn.Module, batch: dict[str, Tensor], rank: int | None) -> sst.InputMoments:
    with torch.no_grad(), sst.input_moments(model, "safety", rank=rank) as moments:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return moments


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


def _core_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Σ_t e hᵀ of every module by its definition: an explicit S between lora_A and lora_B, one sample at a time."""
    layers = _layers(model)
    cores = {n: torch.eye(m.r["safety"], device=batch["labels"].device).requires_grad_() for n, m in layers.items()}
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


def _factor_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {
        f"{name}.{part}": getattr(layer, part)["safety"].weight
        for name, layer in _layers(model).items()
        for part in ("lora_A", "lora_B")
    }
    rows = [torch.autograd.grad(_summed_loss(model, sample), list(weights.values())) for sample in _samples(batch)]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(weights)}
