"""The second moments E[x xᵀ] of what each LoRA module reads: their sums, and the pass of forward calls alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sst_kernels.distributed import gather_objects, raise_together, sum_over_ranks
from sst_kernels.fisher.base import whole
from sst_kernels.fisher.estimate import estimate_moments
from sst_kernels.fisher.lora import LoraSite, find_sites, unwrapped, weight_of, whole_weight
from sst_kernels.fisher.loss import named_inputs, read_spans
from sst_kernels.fisher.memory import require
from sst_kernels.fisher.passes import flat_tokens
from sst_kernels.fisher.structures.moment import Columns, Moment, SecondMoment, Triangle
from sst_kernels.fisher.taps import LayerTap, Signal, eager
from sst_kernels.memo import Memo


class MomentSums(Mapping[str, Moment]):
    """Module -> E[x xᵀ] per token. Modules that read one tensor (q, k, v; gate, up) share one sum.

    Args:
        widths: module -> d_in, in the model's order.
        rank: columns ℓ of a streaming Nyström sketch [d_in, ℓ] for modules with d_in > 4ℓ; None keeps [d_in, d_in] for all.
        seed: of the sketch's test matrix.
    """

    def __init__(self, widths: Mapping[str, int], rank: int | None, seed: int):
        self.widths, self.rank, self.seed = dict(widths), rank, seed
        self.tokens = 0
        self.shared: dict[str, str] = {}  # module -> the one that keeps the sum of what both read
        self._sums: dict[str, SecondMoment] = {}
        self._last = Memo()

    def __getitem__(self, name: str) -> Moment:
        return self._sums[self.shared[name]].mean(self.tokens)

    def half(self, name: str) -> Triangle | Columns:
        """The same for products and Cholesky factors."""
        return self._sums[self.shared[name]].half(self.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared)

    def __len__(self) -> int:
        return len(self.shared)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(moment.sum.nbytes for moment in self._sums.values())

    def add(self, name: str, x: Tensor, flat: Tensor, spans: Tensor, *, known: set[str] | None = None) -> None:
        """The tokens `flat` [S, d_in] that `name` reads as the tensor x; those in `spans` [N, 2] count.

        known: the modules whose sums hold this batch already, and those that take it in now. RuntimeError when a module reads
        something else than the one it shared its sum with before.
        """
        reader = self._last.value if self._last.holds(x) else self._last.keep(name, x)
        leader = self.shared.setdefault(name, reader)
        if leader == name:
            if known is None or name not in known:
                self._sum(name, flat.device).add(flat, spans, None)
                if known is not None:
                    known.add(name)
        elif leader != reader:
            raise RuntimeError(
                f"{name} read what {leader} reads in the first batch, and something else now: give the modules apart with modules="
            )

    def check_same(self, other: MomentSums) -> None:
        """ValueError when the sums of both cannot be added: they are of other modules, or kept otherwise."""
        mine, theirs = ((m.widths, m.rank, m.seed) for m in (self, other))
        if mine != theirs or (self.shared and other.shared and self.shared != other.shared):
            raise ValueError("input moments of other modules, or with another rank or seed, cannot be added")

    def merge(self, other: MomentSums) -> None:
        """Add the sums over other tokens. ValueError as of `check_same`."""
        self.check_same(other)
        self.shared = self.shared or dict(other.shared)
        for name, moment in other._sums.items():
            own = self._sum(name, moment.sum.device)
            own.sum += moment.sum.to(own.sum.device)
            own.trace += moment.trace.to(own.trace.device)
        self.tokens += other.tokens

    def projected(self, columns: Mapping[str, Tensor]) -> MomentSums:
        """The sums of y = Q x, with Q [m, d_in] of each module: Q X Qᵀ, kept whole."""
        out = MomentSums({name: len(q) for name, q in columns.items()}, None, self.seed)
        out.tokens = self.tokens
        halves: dict[str, Triangle | Columns] = {}
        for name, leader in self.shared.items():
            half = halves.get(leader)
            if half is None:
                halves = {leader: (half := self.half(leader))}
            q = columns[name].to(half.device, torch.float64)
            out.shared[name] = name
            out._sum(name, half.device).sum.copy_(self.tokens * (q @ (half @ q.mT)))
        return out

    def all_reduce(self, group: Any, devices: Mapping[str, torch.device]) -> None:
        """The total of all ranks, on each; ranks without data learn from the others which modules share a sum."""
        self.shared = next((shared for shared in gather_objects(self.shared, group) if shared), {})
        total = torch.tensor([self.tokens])
        moments = [self._sum(name, devices[name]) for name in dict.fromkeys(self.shared.values())]
        sum_over_ranks([total, *(t for m in moments for t in (m.sum, m.trace))], group)
        self.tokens = int(total)

    def check_finite(self) -> None:
        """FloatingPointError, naming a module whose inputs were not finite."""
        for name, moment in self._sums.items():
            if not moment.sum.isfinite().all():
                raise FloatingPointError(
                    f"{name} read values that are not finite: load the model in bfloat16 or float32"
                )

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All state as a JSON-able header and tensors by name."""
        about = {
            "widths": self.widths,
            "rank": self.rank,
            "seed": self.seed,
            "tokens": self.tokens,
            "shared": self.shared,
        }
        tensors = {f"{name}/sum": m.sum for name, m in self._sums.items()}
        return about, tensors | {f"{name}/trace": m.trace for name, m in self._sums.items()}

    @classmethod
    def unpack(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device] | None = None
    ) -> MomentSums:
        """What `pack` packed, beside the modules of `devices` or where the tensors lie."""
        out = cls(header["widths"], header["rank"], header["seed"])
        out.tokens, out.shared = int(header["tokens"]), dict(header["shared"])
        for name in dict.fromkeys(out.shared.values()):
            kept = tensors[f"{name}/sum"]
            moment = out._sum(name, kept.device if devices is None else devices[name])
            if moment.sum.shape != kept.shape:
                raise ValueError(
                    f"the saved moments of {name!r} are {list(kept.shape)}, expected {list(moment.sum.shape)}: save them anew"
                )
            moment.sum.copy_(kept)
            moment.trace.copy_(tensors[f"{name}/trace"])
        return out

    def _sum(self, name: str, device: torch.device) -> SecondMoment:
        if name not in self._sums:
            d = self.widths[name]
            self._sums[name] = SecondMoment(d, columns(d, self.rank), self.seed, device)
        return self._sums[name]


def input_moments(
    model: nn.Module,
    adapter: str = "default",
    *,
    rank: int | None = None,
    modules: str | Iterable[str] | None = None,
    seed: int = 0,
    group: Any = None,
) -> InputMoments:
    """Context manager that adds up Σ x xᵀ over the tokens of every forward pass run inside it, with the adapter switched off.

    x [d_in] is what a module that carries `adapter` reads. Padding does not count; modules that read one tensor (q, k, v; gate, up)
    share one sum. No labels and no backward pass are needed: run it under `torch.no_grad()`. `Evidence` takes the same moments from
    the forward passes that bring gradients.

    Args:
        model: a model with PEFT LoRA layers, `adapter` among the active ones; other active adapters stay on.
        rank: columns ℓ of a streaming Nyström sketch [d_in, ℓ] for modules with d_in > 4ℓ, narrower ones being no dearer whole;
            None keeps [d_in, d_in] for all.
        modules: regular expression for, or names of, the modules to include; all that carry the adapter by default.
        seed: of the sketch's test matrix.
        group: torch.distributed group over which the pass is shared; on leaving the context every rank holds the total.

    Raises ValueError for what `find_sites` refuses and for a rank below 1; MemoryError, naming smaller ranks that would fit, when
    the sums would not; on exit RuntimeError when no module was run, and FloatingPointError naming a module whose inputs are not
    finite.

    Example:
        >>> with torch.no_grad(), sst.input_moments(model, "safety") as moments:
        ...     for batch in harm_batches:
        ...         _ = model(**batch)
        >>> moments["model.layers.0.self_attn.q_proj"].shape  # E[x xᵀ]
        torch.Size([32, 32])
    """
    rank = None if rank is None else whole("rank", rank)
    model = unwrapped(model)
    sites = find_sites(model, adapter, modules)
    require_moments(model, sites, rank)
    return InputMoments(model, sites, rank, seed, group)


class InputMoments(Mapping[str, Moment]):
    """The open or finished pass: module -> E[x xᵀ] per token. `tokens` counts them; `reads` holds A [r, d_in] of each module.

    Example:
        >>> with torch.no_grad(), sst.input_moments(model, "safety") as moments:
        ...     _ = model(**harm_batches[0])
        >>> int(moments.tokens), len(moments)
        (33, 14)
    """

    def __init__(self, model: nn.Module, sites: list[LoraSite], rank: int | None, seed: int, group: Any):
        self.lora_A = {site.name: whole_weight(site.lora_a).clone() for site in sites}
        self.sums = MomentSums({site.name: width_of(site) for site in sites}, rank, seed)
        self._model, self._sites, self._group = model, sites, group
        self._seen: set[str] = set()  # modules that this batch has passed
        self._batch: tuple[int, int, Tensor] | None = None  # N, T and the spans of the batch that is run
        self._spans: dict[torch.device, Tensor] = {}

    def __getitem__(self, name: str) -> Moment:
        return self.sums[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def tokens(self) -> int:
        return self.sums.tokens

    @property
    def shared(self) -> dict[str, str]:
        """Module -> the module whose moment it shares, itself where it has its own."""
        return dict(self.sums.shared)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self.sums.nbytes

    def __enter__(self) -> Self:
        with ExitStack() as hooks:
            hooks.enter_context(eager(self._model))
            hooks.callback(self._model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            for site in self._sites:
                if LayerTap.fits(site):
                    hooks.enter_context(LayerTap(self, site, None))
                else:
                    hooks.callback(site.layer.register_forward_pre_hook(partial(self._in_front_of, site)).remove)
                    hooks.callback(site.lora_a.register_forward_hook(_off).remove)
            self._open = hooks.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()
        if self._group is None:
            if kind is None:
                self._complete()
        elif error is None or isinstance(error, Exception):
            raise_together(error, self._group)
            self.sums.all_reduce(self._group, {site.name: site.device for site in self._sites})
            self._complete()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        n, length, spans, _ = read_spans(named_inputs(model, args, kwargs))
        self.sums.tokens += int((spans[:, 1] - spans[:, 0]).sum())
        self._batch = n, length, spans
        self._spans = {}
        self._seen.clear()

    def claim(self, site: LoraSite) -> None:
        """See `taps.Owner`: no gradient is waited for."""

    def receive(self, current: Any, site: LoraSite, signal: Signal) -> None:
        """See `taps.Owner`."""

    def _in_front_of(self, site: LoraSite, module: nn.Module, args: tuple) -> None:
        self.see(site, args[0].detach(), args[0].detach())

    @torch.no_grad()
    def see(self, site: LoraSite, x: Tensor, kept: Tensor) -> None:
        """See `taps.Owner`."""
        if self._batch is None:
            raise RuntimeError(f"{site.name} ran outside a forward pass of the model given to input_moments")
        if site.name in self._seen:
            raise RuntimeError(
                f"{site.name} ran twice in one forward pass: run without gradients, so that nothing is computed again; shared (tied) modules "
                "are not supported"
            )
        self._seen.add(site.name)
        n, length, spans = self._batch
        if x.device not in self._spans:
            self._spans[x.device] = spans.to(x.device)
        self.sums.add(site.name, x, flat_tokens(site.name, x, n, length), self._spans[x.device])

    def _complete(self) -> None:
        missing = [site.name for site in self._sites if site.name not in self.sums.shared]
        if missing:
            raise RuntimeError(
                f"no forward pass ran through {missing[0]} and {len(missing) - 1} more: run model(**batch) of the very model given "
                "to input_moments inside the context"
            )
        self.sums.check_finite()


def columns(d: int, rank: int | None) -> int:
    """Of what is kept for inputs of width d: d, or the `rank` of a sketch where that takes less than d² products."""
    return d if rank is None or d <= 4 * rank else rank


def require_moments(model: nn.Module, sites: list[LoraSite], rank: int | None) -> None:
    """MemoryError, naming smaller ranks that would fit, when the sums of a pass would not."""
    readers = one_per_input(model, sites)
    for device in dict.fromkeys(site.device for site in readers):
        widths = [width_of(site) for site in readers if site.device == device]
        sizes = {r: estimate_moments([(d, columns(d, r)) for d in widths]) for r in (rank, 1024, 512, 256, 128, 64)}
        needed = sizes.pop(rank)
        smaller = {f"rank={r}": size for r, size in sizes.items() if size.state < needed.state}
        require("the moments of inputs", needed, device, smaller, "take fewer modules")


def one_per_input(model: nn.Module, sites: Iterable[LoraSite]) -> list[LoraSite]:
    """Of the modules that will read one tensor the first, as far as can be known before the model is run.

    Modules side by side read one where the model's tensor-parallel plan splits them by columns (transformers); without a plan each
    is taken to read its own.
    """
    config = getattr(model, "config", None)
    plan = getattr(getattr(config, "text_config", config), "base_model_tp_plan", None) or {}
    split = "|".join(re.escape(name).replace(r"\*", r"\d+") for name, how in plan.items() if how.startswith("colwise"))
    found: dict[Any, LoraSite] = {}
    for site in sites:
        together = split and re.search(rf"(^|\.)({split})$", site.name)
        found.setdefault((site.name.rpartition(".")[0], width_of(site)) if together else site.name, site)
    return list(found.values())


def width_of(site: LoraSite) -> int:
    """d_in of a module."""
    return weight_of(site.lora_a).shape[1]


def _off(module: nn.Module, args: tuple, h: Tensor) -> Tensor:
    return torch.zeros_like(h)
