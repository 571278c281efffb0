"""`input_moments`: the second moments E[x xᵀ] of what each LoRA module reads, from forward passes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sst_kernels.distributed import raise_together, sum_over_ranks
from sst_kernels.fisher.base import whole
from sst_kernels.fisher.estimate import estimate_moments
from sst_kernels.fisher.lora import LoraSite, find_sites, unwrapped, weight_of, whole_weight
from sst_kernels.fisher.loss import named_inputs, read_spans
from sst_kernels.fisher.memory import require
from sst_kernels.fisher.passes import flat_tokens
from sst_kernels.fisher.structures.moment import Moment, SecondMoment
from sst_kernels.memo import Memo


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
    share one sum. No labels and no backward pass are needed: run it under `torch.no_grad()`.

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
    """
    rank = None if rank is None else whole("rank", rank)
    model = unwrapped(model)
    sites = find_sites(model, adapter, modules)
    _require_memory(model, sites, rank)
    return InputMoments(model, sites, rank, seed, group)


class InputMoments(Mapping[str, Moment]):
    """The open or finished pass: module -> E[x xᵀ] per token. `tokens` counts them; `reads` holds A [r, d_in] of each module."""

    def __init__(self, model: nn.Module, sites: list[LoraSite], rank: int | None, seed: int, group: Any):
        self.tokens = 0
        self.reads = {site.name: whole_weight(site.lora_a).clone() for site in sites}
        self._model, self._sites, self._group = model, sites, group
        self._rank, self._seed = rank, seed
        self._moments: dict[str, SecondMoment] = {}
        self._leaders: dict[str, str] = {}  # module -> the one that keeps the sum of what both read
        self._last = Memo()
        self._seen: set[str] = set()  # modules that this batch has passed
        self._batch: tuple[int, int, Tensor] | None = None  # N, T and the spans of the batch that is run
        self._handles: list[Any] = []

    def __getitem__(self, name: str) -> Moment:
        return self._moments[self._leaders[name]].mean(self.tokens)

    def __iter__(self):
        return iter(self._leaders)

    def __len__(self) -> int:
        return len(self._leaders)

    @property
    def shared(self) -> dict[str, str]:
        """Module -> the module whose moment it shares, itself where it has its own."""
        return dict(self._leaders)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(moment.sum.nbytes for moment in self._moments.values())

    def __enter__(self) -> Self:
        self._handles.append(self._model.register_forward_pre_hook(self._before, with_kwargs=True))
        for site in self._sites:
            self._handles.append(site.layer.register_forward_pre_hook(partial(self._read, site)))
            self._handles.append(site.lora_a.register_forward_hook(_off))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._group is None:
            if kind is None:
                self._complete()
        elif error is None or isinstance(error, Exception):
            raise_together(error, self._group)
            self._all_reduce()
            self._complete()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        n, length, spans, _ = read_spans(named_inputs(model, args, kwargs))
        self.tokens += int((spans[:, 1] - spans[:, 0]).sum())
        self._batch = n, length, spans
        self._seen.clear()

    @torch.no_grad()
    def _read(self, site: LoraSite, module: nn.Module, args: tuple) -> None:
        if self._batch is None:
            raise RuntimeError(f"{site.name} ran outside a forward pass of the model given to input_moments")
        if site.name in self._seen:
            raise RuntimeError(
                f"{site.name} ran twice in one forward pass: run without gradients, so that nothing is computed again; shared (tied) modules "
                "are not supported"
            )
        self._seen.add(site.name)
        x = args[0].detach()
        reader = self._last.value if self._last.holds(x) else self._last.keep(site.name, x)
        leader = self._leaders.setdefault(site.name, reader)
        if leader == site.name:
            n, length, spans = self._batch
            flat = flat_tokens(site.name, x, n, length)
            self._moment(leader, flat).add(flat, spans.to(x.device), None)
        elif leader != reader:
            raise RuntimeError(
                f"{site.name} read what {leader} reads in the first batch, and something else now: give the modules apart with modules="
            )

    def _moment(self, name: str, x: Tensor) -> SecondMoment:
        if name not in self._moments:
            d = x.shape[1]
            self._moments[name] = SecondMoment(d, columns(d, self._rank), self._seed, x.device)
        return self._moments[name]

    def _all_reduce(self) -> None:
        """Ranks without data learn from the others which modules share a sum."""
        told: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, self._leaders, group=self._group)
        self._leaders = next((leaders for leaders in told if leaders), {})
        of = {site.name: site for site in self._sites}
        for leader in dict.fromkeys(self._leaders.values()):
            self._moment(leader, torch.empty(0, self.reads[leader].shape[1], device=of[leader].device))
        total = torch.tensor([self.tokens])
        moments = [self._moments[name] for name in dict.fromkeys(self._leaders.values())]
        sum_over_ranks([total, *(t for m in moments for t in (m.sum, m.trace))], self._group)
        self.tokens = int(total)

    def _complete(self) -> None:
        missing = [site.name for site in self._sites if site.name not in self._leaders]
        if missing:
            raise RuntimeError(
                f"no forward pass ran through {missing[0]} and {len(missing) - 1} more: run model(**batch) of the very model given "
                "to input_moments inside the context"
            )
        for name, moment in self._moments.items():
            if not moment.sum.isfinite().all():
                raise FloatingPointError(
                    f"{name} read values that are not finite: load the model in bfloat16 or float32"
                )


def columns(d: int, rank: int | None) -> int:
    """Of what is kept for inputs of width d: d, or the `rank` of a sketch where that takes less than d² products."""
    return d if rank is None or d <= 4 * rank else rank


def _require_memory(model: nn.Module, sites: list[LoraSite], rank: int | None) -> None:
    readers = one_per_input(model, sites)
    for device in dict.fromkeys(site.device for site in readers):
        widths = [_width(site) for site in readers if site.device == device]
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
        found.setdefault((site.name.rpartition(".")[0], _width(site)) if together else site.name, site)
    return list(found.values())


def _width(site: LoraSite) -> int:
    return weight_of(site.lora_a).shape[1]


def _off(module: nn.Module, args: tuple, h: Tensor) -> Tensor:
    return torch.zeros_like(h)
