"""`fisher_accumulate`: Fisher statistics of a LoRA adapter, gathered from the user's own forward and backward passes.

How one sample's core gradient is read without touching the model (DESIGN: ΔW(S) = c · B S A, S = I is the patch):

    1. a forward hook on `lora_A` sees h = A x and replaces it by u = S h, S being the evaluation point;
    2. a tensor hook on u receives e = ∂L/∂u = c Bᵀ ∂L/∂y, brought by the backward pass that runs anyway;
    3. ∂L/∂S of sample n is Σ_t e_t h_tᵀ: [r, r] from r-vectors only, for all modules in one launch per shape.

Factor space reads x in front of `lora_A` and c·∂L/∂y behind `lora_B` in the same way.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sst_kernels.fisher.base import Block, Counts, TokenBatch
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.lora import LoraSite, find_sites, fingerprint
from sst_kernels.fisher.loss import Layout, current_declaration, read_layout
from sst_kernels.ops import core_outer

Point = str | float | Mapping[str, Tensor]
SPACES = ("core", "factor")


def fisher_accumulate(
    model: nn.Module,
    adapter: str = "default",
    *,
    space: str = "core",
    structure: str = "full",
    scope: str = "global",
    point: Point | None = None,
    sample: str = "sequence",
    count: str = "sequences",
    reduction: str = "mean",
    grad_scale: float | None = None,
    nonfinite: str = "raise",
    modules: str | Iterable[str] | None = None,
    **options: Any,
) -> Accumulator:
    """Context manager that accumulates the Fisher matrix of `adapter` over every backward pass run inside it.

    The user's loop stays as it is: `model(**batch).loss.backward()` with labels, or `sequence_nll(model, batch)`, or any
    loss inside `declared_loss`. Parameters, their gradients and the optimizer are untouched. All samples of a batch are told
    apart, so any batch composition, padding side, packing (`cu_seq_lens_q`), gradient accumulation and gradient checkpointing
    gives the statistics of one backward per sample.

    Args:
        model: a model with PEFT LoRA layers (recognised by `lora_A`, `lora_B`, `scaling`), `adapter` among the active ones.
        space: "core" (ΔW(S) = c·B S A, coordinates S [r, r]) or "factor" (A [r, d_in] and B [d_out, r]; depends on the gauge).
        structure: what is kept: see `sst_kernels.fisher.structures`; `**options` go to it (e.g. `rank=64`).
        scope: "global" keeps the correlations between modules where the structure can ("full", "lowrank" in core space),
            "module" keeps each module by itself.
        point: where gradients are taken: "patched" (S = I; the default), "reference" (S = 0: patch off), a number α (S = αI),
            or S [r, r] per module. The model computes at this point while the context is open.
        sample: "sequence" (tokens are summed before squaring) or "token".
        count: what answers are divided by: "sequences", "tokens" or "labels".
        reduction: how the model's own loss reduces: "mean" over the labels of the batch (transformers) or "sum".
        grad_scale: the factor between the loss and what `backward()` is called on (GradScaler, 1/accumulation steps). None
            measures it at the loss tensor, exactly; a number states it for losses that the hook cannot see.
        nonfinite: "raise" names the batch and sample; "skip" leaves such samples out and counts them in `accumulator.skipped`
            ("full", "diagonal" and "lowrank" in core space).
        modules: regular expression for, or names of, the modules to include; all that carry the adapter by default.

    Raises ValueError for what would make the statistics wrong (see `find_sites`, `read_layout`) and RuntimeError on exit when no
    backward pass was seen or a module's hook never fired.
    """
    return Accumulator(
        model,
        adapter,
        space,
        structure,
        scope,
        point,
        sample,
        count,
        reduction,
        grad_scale,
        nonfinite,
        modules,
        options,
    )


class Accumulator:
    """The open pass: `fisher` (mapping from block name to structure), `skipped` sample positions, `save(path)`."""

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        space: str,
        structure: str,
        scope: str,
        point: Point | None,
        sample: str,
        count: str,
        reduction: str,
        grad_scale: float | None,
        nonfinite: str,
        modules: str | Iterable[str] | None,
        options: dict[str, Any],
    ):
        _choice("space", space, SPACES)
        _choice("reduction", reduction, ("mean", "sum"))
        _choice("nonfinite", nonfinite, ("raise", "skip"))
        if grad_scale is not None and not 0 < abs(grad_scale) < float("inf"):
            raise ValueError(f"grad_scale must be finite and not zero, got {grad_scale}")
        self.model = model
        self.sites = find_sites(model, adapter, modules)
        self.space, self.reduction, self.grad_scale, self.nonfinite = space, reduction, grad_scale, nonfinite
        self.point = "patched" if point is None else point
        self._cores = _cores_at(self.point, self.sites)
        self.fisher = Fisher.empty(
            _blocks(self.sites, space),
            structure,
            devices={site.name: site.device for site in self.sites},
            metric={site.name: site.metric() for site in self.sites},
            scope=scope,
            sample=sample,
            count=count,
            options=options,
            meta={
                "space": space,
                "adapter": adapter,
                "fingerprint": fingerprint(self.sites),
                "point": self.point if isinstance(self.point, str | float | int) else "custom",
                "point_given": point is not None,
            },
        )
        if nonfinite == "skip" and self.fisher.joint is None:
            raise ValueError(
                f'nonfinite="skip" cannot take a sample back from the streaming structure {structure!r} in {space} space: '
                'use "full", "diagonal" or "lowrank" in core space, or nonfinite="raise"'
            )
        self.skipped: list[tuple[int, int]] = []
        self._handles: list[Any] = []
        self._waiting: list[_Pass] = []
        self._forward: _Pass | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self._batches = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        hook = self._handles.append
        hook(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        hook(self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
        for site in self.sites:
            hook(site.lora_a.register_forward_hook(partial(self._at_lora_a, site)))
            if self.space == "factor":
                hook(site.lora_b.register_forward_hook(partial(self._at_lora_b, site)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is not None:
            return
        self._read_flags()
        for waiting in self._waiting:
            missing = [site.name for site in self.sites if site.name not in waiting.done]
            if len(missing) < len(self.sites):
                raise RuntimeError(
                    f"batch {waiting.index}: no gradient arrived at {_some(missing)}; each module must be used once between input "
                    "and loss (with reentrant checkpointing call model.enable_input_require_grads())"
                )
        if self._waiting and self._batches > len(self._waiting):
            warnings.warn(
                f"{len(self._waiting)} forward passes were never followed by backward() and do not count", stacklevel=2
            )
        if self._batches == len(self._waiting):
            raise RuntimeError(
                "no hook fired: run model(**batch) of the very model given to fisher_accumulate, with gradients enabled, and call "
                "backward() on its loss inside the context"
            )
        self._waiting.clear()

    def save(self, path: str) -> None:
        """Write the Fisher to a safetensors file (see `Fisher.save`)."""
        self.fisher.save(path)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._read_flags()
        if not torch.is_grad_enabled():
            return
        inputs = _bound(model, args, kwargs)
        declaration = current_declaration()
        if declaration is None:
            labels, reduction, source, groups = inputs.get("labels"), self.reduction, "data", None
            if labels is None:
                raise ValueError(
                    "the forward pass has no labels, so samples and loss scale are unknown: pass labels= to the model, or use "
                    "sequence_nll(model, batch), or compute your loss inside declared_loss(labels)"
                )
        else:
            labels, reduction, source, groups = (
                declaration.labels,
                declaration.reduction,
                declaration.source,
                declaration.groups,
            )
        layout = read_layout(inputs, labels)
        divisor = float(inputs.get("num_items_in_batch") or layout.labels.sum()) if reduction == "mean" else 1.0
        if groups is not None and len(groups) != layout.samples:
            raise ValueError(
                f"groups must hold one integer for each of the {layout.samples} samples of the batch, got {len(groups)}"
            )
        self._forward = _Pass(self._batches, layout, divisor, self.grad_scale, source, groups)
        self._batches += 1
        self._waiting.append(self._forward)
        if declaration is not None:
            declaration.watchers.append(self._forward.watch)

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        current, self._forward = self._forward, None
        loss = getattr(output, "loss", None)
        if current is not None and isinstance(loss, Tensor) and loss.requires_grad:
            current.watch(loss)

    def _at_lora_a(self, site: LoraSite, module: nn.Module, args: tuple, h: Tensor) -> Tensor:
        u = self._at_point(site, h)
        if not torch.is_grad_enabled():
            return u
        u = u if u.requires_grad else u.detach().requires_grad_()
        current = self._claim(site, "a")
        if current is not None:
            x = args[0].detach() if self.space == "factor" else None
            u.register_hook(partial(self._on_e, current, site, h.detach(), x))
        return u

    def _at_lora_b(self, site: LoraSite, module: nn.Module, args: tuple, y: Tensor) -> None:
        if torch.is_grad_enabled() and y.requires_grad:
            current = self._claim(site, "b")
            if current is not None:
                y.register_hook(partial(current.outputs.__setitem__, site.name))

    def _claim(self, site: LoraSite, part: str) -> _Pass | None:
        """The pass this call of the module belongs to, or None when it only recomputes one that has its hook already."""
        current = self._forward
        if current is None:
            open_passes = [p for p in self._waiting if not p.complete]
            if not open_passes:
                raise RuntimeError(
                    f"{site.name} ran outside a forward pass of the model given to fisher_accumulate: call that model itself"
                )
            current = open_passes[-1]
            if (site.name, part) in current.claimed:
                return None
            if len(open_passes) > 1:
                raise RuntimeError(
                    "several forward passes wait for backward() under reentrant checkpointing: call backward() after each"
                )
        elif (site.name, part) in current.claimed:
            raise ValueError(
                f"{site.name} was called twice in one forward pass: shared (tied) modules are not supported"
            )
        current.claimed.add((site.name, part))
        return current

    def _at_point(self, site: LoraSite, h: Tensor) -> Tensor:
        core = self._cores[site.name]
        if core is None:
            return h
        if isinstance(core, float):
            return torch.zeros_like(h) if core == 0 else h * core
        return h @ core.to(h).T

    def _on_e(self, current: _Pass, site: LoraSite, h: Tensor, x: Tensor | None, e: Tensor) -> None:
        with self._lock, torch.no_grad():
            if site.name in current.done:
                raise RuntimeError(
                    f"batch {current.index}: backward() ran twice through the same forward pass, which would count it twice"
                )
            e, h = (current.flat(site, t) for t in (e.detach(), h))
            if self.fisher.joint is not None:
                current.done[site.name] = (e, h)
            else:
                current.done[site.name] = e.sum(1, dtype=torch.float32)
                self._update_blocks(current, site, e, h, x)
            if len(current.done) == len(self.sites):
                self._finish(current)

    def _update_blocks(self, current: _Pass, site: LoraSite, e: Tensor, h: Tensor, x: Tensor | None) -> None:
        if x is None:
            sides = {site.name: (e, h)}
        else:
            g = current.outputs.pop(site.name)
            sides = {
                f"{site.name}.lora_A": (e, current.flat(site, x)),
                f"{site.name}.lora_B": (current.flat(site, g), h),
            }
        for name, (left, right) in sides.items():
            self.fisher[name].update(
                TokenBatch(left, right, current.spans(e.device), current.scale(e.device), current.counts)
            )

    def _finish(self, current: _Pass) -> None:
        current.complete = True
        self._waiting.remove(current)
        joint = self.fisher.joint
        if joint is None:
            tokens = torch.stack([t.to(self.sites[0].device) for t in current.done.values()])
            self._unread.append((current.index, ~_per_sample(tokens.isfinite().all(0), current.layout)))
            current.done = dict.fromkeys(current.done)
            self.fisher.note(current.source, current.layout.samples, current.groups)
            return
        rows = self._core_rows(current, joint.device)
        finite = rows.isfinite().all(1)
        counts, groups = current.counts, current.groups
        if self.nonfinite == "raise":
            self._unread.append((current.index, ~finite))
        elif not (kept := finite.cpu()).all():
            self.skipped += [(current.index, i) for i in (~kept).nonzero().flatten().tolist()]
            rows, counts = rows[finite], current.counts_of(kept)
            groups = None if groups is None else [g for g, keep in zip(groups, kept.tolist()) if keep]
        current.done = dict.fromkeys(current.done)
        n = len(rows)
        self.fisher.note(current.source, n, groups)
        empty, spans = rows.new_empty(0, 1), torch.zeros(n, 2, dtype=torch.int64, device=rows.device)
        joint.update(TokenBatch(empty, empty, spans, rows.new_ones(n), counts, rows))

    def _core_rows(self, current: _Pass, device: torch.device) -> Tensor:
        """[N, Σ r²] float32 on `device`: one `core_outer` per device that holds modules."""
        by_device: dict[torch.device, list[LoraSite]] = {}
        for site in self.sites:
            by_device.setdefault(current.done[site.name][0].device, []).append(site)
        parts = {}
        for where, sites in by_device.items():
            es, hs = zip(*(current.done[site.name] for site in sites))
            out = torch.empty(current.layout.samples, sum(s.rank**2 for s in sites), device=where)
            parts[where] = core_outer(es, hs, current.spans(where), current.scale(where), out)
        if len(parts) == 1:
            return next(iter(parts.values())).to(device)
        pieces = {
            s.name: p
            for where, sites in by_device.items()
            for s, p in zip(sites, parts[where].split([s.rank**2 for s in sites], 1))
        }
        return torch.cat([pieces[site.name].to(device) for site in self.sites], 1)

    def _read_flags(self) -> None:
        """Look at the finished batches' finite flags, one batch behind, so that the device is never waited for in mid-pass."""
        unread, self._unread = self._unread, []
        for index, bad in unread:
            samples = bad.nonzero().flatten().tolist()
            if samples:
                raise FloatingPointError(
                    f"batch {index}: the gradients of samples {samples} are not finite, and the Fisher holds them: accumulate again "
                    'without them, with nonfinite="skip", or with a smaller loss scale (fp16)'
                )


class _Pass:
    """One forward pass and what its backward has brought so far."""

    def __init__(
        self,
        index: int,
        layout: Layout,
        divisor: float,
        grad_scale: float | None,
        source: str,
        groups: Sequence[int] | None,
    ):
        self.index, self.layout, self.divisor, self.grad_scale = index, layout, divisor, grad_scale
        self.source, self.groups = source, groups
        self.claimed: set[tuple[str, str]] = set()
        self.done: dict[str, Any] = {}
        self.outputs: dict[str, Tensor] = {}
        self.complete = False
        self.counts = Counts(layout.samples, layout.tokens, int(layout.labels.sum()))
        self._measured: Tensor | None = None
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def watch(self, loss: Tensor) -> None:
        """Measure ∂(what backward was called on)/∂loss when the backward pass enters at `loss`."""
        loss.register_hook(self._measure)

    def _measure(self, grad: Tensor) -> None:
        self._measured = grad.detach().float()

    def flat(self, site: LoraSite, tensor: Tensor) -> Tensor:
        tokens = self.layout.batch * self.layout.length
        flat = tensor.reshape(-1, tensor.shape[-1])
        if len(flat) != tokens:
            raise ValueError(
                f"{site.name} saw {len(flat)} tokens where the batch has {self.layout.batch} x {self.layout.length}: modules that see "
                "routed or pooled tokens (mixture-of-experts, poolers) cannot be attributed to samples; leave them out with modules="
            )
        return flat.float() if flat.dtype == torch.float64 else flat

    def spans(self, device: torch.device) -> Tensor:
        return self._on(device)[0]

    def scale(self, device: torch.device) -> Tensor:
        return self._on(device)[1]

    def counts_of(self, kept: Tensor) -> Counts:
        spans = self.layout.spans[kept]
        return Counts(len(spans), int((spans[:, 1] - spans[:, 0]).sum()), int(self.layout.labels[kept].sum()))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            spans = self.layout.spans.to(device, non_blocking=True)
            factor: float | Tensor = self.divisor
            if self.grad_scale is not None:
                factor = self.divisor / self.grad_scale
            elif self._measured is not None:
                factor = self.divisor / self._measured.to(device)
            else:
                raise RuntimeError(
                    f"batch {self.index}: the loss that backward() was called on does not come from the model's own loss, sequence_nll or "
                    "declared_loss, so its scale is unknown: use one of them, or state grad_scale="
                )
            self._on_device[device] = spans, torch.ones(self.layout.samples, device=device) * factor
        return self._on_device[device]


def _blocks(sites: list[LoraSite], space: str) -> list[Block]:
    if space == "core":
        return [Block(s.name, s.name, (s.rank, s.rank)) for s in sites]
    pairs = ((s, part, w.weight.shape) for s in sites for part, w in (("lora_A", s.lora_a), ("lora_B", s.lora_b)))
    return [Block(f"{s.name}.{part}", s.name, (shape[0], shape[1])) for s, part, shape in pairs]


def _cores_at(point: Point, sites: list[LoraSite]) -> dict[str, float | Tensor | None]:
    """Per module: None for S = I, a float α for αI, or S itself."""
    if isinstance(point, str):
        _choice("point", point, ("patched", "reference"))
        return dict.fromkeys((s.name for s in sites), None if point == "patched" else 0.0)
    if isinstance(point, Mapping):
        for site in sites:
            core = point.get(site.name)
            if core is None or tuple(core.shape) != (site.rank, site.rank):
                got = None if core is None else tuple(core.shape)
                raise ValueError(f"point[{site.name!r}] must be a [{site.rank}, {site.rank}] tensor, got {got}")
        return {s.name: point[s.name].detach() for s in sites}
    return dict.fromkeys((s.name for s in sites), None if point == 1 else float(point))


def _per_sample(tokens_ok: Tensor, layout: Layout) -> Tensor:
    bad = torch.cat([tokens_ok.new_zeros(1, dtype=torch.int64), (~tokens_ok).cumsum(0)])
    spans = layout.spans.to(bad.device, non_blocking=True)
    return bad[spans[:, 1]] == bad[spans[:, 0]]


def _bound(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    if not args:
        return kwargs
    forward: Callable = getattr(model, "module", model).forward
    names = forward.__code__.co_varnames[1 : forward.__code__.co_argcount] if hasattr(forward, "__code__") else ()
    if len(names) < len(args):
        raise ValueError(
            "pass the batch by keyword, model(**batch): the positional arguments of this model's forward cannot be named"
        )
    return dict(zip(names, args)) | kwargs


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
