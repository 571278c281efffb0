"""What a forward pass optimises: the loss that the accumulator must undo, and what of it belongs to samples."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sst_kernels.fisher.layout import IGNORE as IGNORE
from sst_kernels.fisher.layout import Layout as Layout
from sst_kernels.fisher.layout import read_layout as read_layout
from sst_kernels.fisher.layout import read_spans as read_spans
from sst_kernels.fisher.layout import refuse_leaks, settings
from sst_kernels.fisher.lora import unwrapped

NO_LABELS = "batch has no 'labels': give [N, T] labels with -100 everywhere but on the answer"


@dataclass
class Declaration:
    """Labels, reduction and sample groups of a loss that is computed outside the model (see `declared_loss`)."""

    labels: Tensor
    reduction: str
    source: str
    groups: Sequence[int] | None = None
    watchers: list[Any] = field(default_factory=list)

    def loss(self, value: Tensor) -> Tensor:
        """Name the scalar whose `backward()` will follow, so that any factor put on it later is measured and undone."""
        for watch in self.watchers:
            watch(value)
        self.watchers.clear()
        return value


LabelSource = Literal["empirical", "mc", "data", "model"]  # the last two are the old names, until 0.3
Origin = Literal["data", "model"]  # what Fishers keep


def label_origin(labels: LabelSource) -> Origin:
    """Where labels come from. ValueError for an unknown name, DeprecationWarning for an old one."""
    named: dict[str, Origin] = {"empirical": "data", "mc": "model"}
    if labels in ("data", "model"):
        new = next(name for name, origin in named.items() if origin == labels)
        warnings.warn(f'labels="{labels}" is called labels="{new}" now', DeprecationWarning, stacklevel=3)
        return labels
    if labels not in named:
        raise ValueError(f'labels: expected "empirical" or "mc", got {labels!r}')
    return named[labels]


_declared: ContextVar[Declaration | None] = ContextVar("declared_loss", default=None)


@contextlib.contextmanager
def declared_loss(
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "sum",
    source: str = "data",
    groups: Sequence[int] | None = None,
) -> Iterator[Declaration]:
    """Tell an enclosing `fisher_accumulate` about a loss of your own, for the forward passes inside this context.

    labels: [N, T], -100 where there is no loss, aligned with the input tokens (position t is predicted from t - 1).
    reduction: "sum" or "mean" over all labels of the batch. source: "data" or "model", written into the Fisher.
    groups: one integer per sample; samples of one group (several label draws of one prompt) are never split by
    cross-fitting. Pass the finished scalar to `.loss(value)` and call `backward()` on what it returns.

    Example:
        >>> batch = harm_batches[0]
        >>> with sst.fisher_accumulate(model, "safety") as accumulator:
        ...     with sst.declared_loss(batch["labels"]) as declared:
        ...         logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        ...         loss = torch.nn.functional.cross_entropy(
        ...             logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        ...         )
        ...         declared.loss(loss).backward()
        >>> accumulator.fisher.counts.sequences
        4
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction: expected "sum" or "mean", got {reduction!r}')
    declaration = Declaration(labels, reduction, source, groups)
    token = _declared.set(declaration)
    try:
        yield declaration
    finally:
        _declared.reset(token)


def current_declaration() -> Declaration | None:
    return _declared.get()


def sequence_nll(
    model: nn.Module,
    batch: Mapping[str, Any],
    labels: LabelSource = "empirical",
    *,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Σ over sequences and label positions of −log p, a scalar in nats, ready for `backward()`.

    batch: keyword arguments of the model with `labels` [N, T] (-100 where there is no loss). labels="empirical" takes them
    as they are (empirical Fisher); labels="mc" draws each one anew from the model's own prediction at its position (teacher-forced
    on the batch's tokens; Monte Carlo Fisher), so that the expected outer product of gradients is the true Fisher and ½ φᵀFφ the KL
    divergence (Martens 2014, arXiv:1412.1193). weights: [N, T], factor of each label's term (see `opening_weights`), with labels="empirical"
    only: the Fisher then says "weighted data". Raises FloatingPointError where labels cannot be drawn from logits, and ValueError without `labels` in the batch, with none left unmasked, or with
    weights of another shape or for drawn labels, whose Fisher has none.

    Example:
        >>> with sst.fisher_accumulate(model, "safety", point="reference") as accumulator:
        ...     for batch in benign_batches:
        ...         sst.sequence_nll(model, batch, "mc").backward()  # labels drawn from the model: the MC Fisher
        >>> accumulator.fisher.meta["labels"]
        'model'
    """
    origin = label_origin(labels)
    if batch.get("labels") is None:
        raise ValueError(NO_LABELS)
    if weights is not None and origin == "model":
        raise ValueError(
            'weights go with labels="empirical": the Fisher of drawn labels is that of the model, without weights'
        )
    source = origin if weights is None else "weighted data"
    with declared_loss(batch["labels"], source=source, groups=groups) as declaration:
        logits, answers, _ = label_logits(model, batch)
        if origin == "model":
            (answers,) = draw_labels(logits, 1, generator)
        return declaration.loss(nll(logits, answers, batch["labels"], weights))


def nll(logits: Tensor, answers: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Σ −log p of `answers` [L] under `logits` [L, V]; `weights` [N, T] of the label places of `labels` [N, T] or None.

    Raises ValueError for weights of another shape than the labels.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if weights is None:
        return nn.functional.cross_entropy(logits, answers, reduction="sum")
    if weights.shape != labels.shape:
        raise ValueError(f"weights must have the shape of the labels {tuple(labels.shape)}, got {tuple(weights.shape)}")
    factors = weights[:, 1:][labels[:, 1:] != IGNORE].to(logits)
    return nn.functional.cross_entropy(logits, answers, reduction="none") @ factors


@torch.no_grad()
def draw_labels(logits: Tensor, draws: int, generator: torch.Generator | None) -> list[Tensor]:
    """`draws` times labels [L] from the model's own predictions, by inverting their cumulative probabilities.

    Raises FloatingPointError for logits that are not finite: on a GPU drawing from them would end the process.
    """
    cumulative = logits.float().softmax(-1).cumsum_(-1)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError(
            "the model's logits are not finite, so that no labels can be drawn: load it in bfloat16 or float32, or take the "
            "Fisher at another point"
        )
    drawn = []
    for _ in range(draws):
        level = torch.rand(total.shape, generator=generator, device=total.device) * total
        drawn.append(torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp_max_(logits.shape[-1] - 1))
    return drawn


def opening_weights(labels: Tensor, *, tokens: int = 4, weight: float = 3.0) -> Tensor:
    """[N, T] float32: `weight` on the first `tokens` labels of every row, 1 elsewhere; for `sequence_nll(weights=...)`.

    Whether a model refuses is decided in the first words of its answer (Qi et al. 2024, arXiv:2406.05946), which are a small part of
    a refusal's log-likelihood. One sequence a row: of a packed row only the first would be weighted. Raises ValueError for a negative
    number of tokens, and a weight that is negative or beyond float32.

    Example:
        >>> sst.opening_weights(torch.tensor([[-100, 5, 6, 7, 8]]), tokens=2, weight=3.0)[:, 1:]
        tensor([[3., 3., 1., 1.]])
    """
    if tokens < 0 or not 0 <= weight <= torch.finfo(torch.float32).max:
        raise ValueError(f"tokens and weight must be numbers of float32 and not negative, got {tokens} and {weight}")
    predicted = labels != IGNORE
    predicted[:, 0] = False
    opening = predicted.cumsum(1) <= tokens
    return torch.where(opening, weight, 1.0)


def label_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that predict the labels of a batch, flat: [L, V] in the model's dtype, with labels [L] and their rows [L].

    Position t is predicted from t − 1, padding or not. Only columns that predict a label in some row meet the vocabulary, where the model
    takes `logits_to_keep`: the logits are the largest tensor of a pass over prompts. LoRA layers between the last hidden state and
    the logits must see every token, so there all columns are computed. The forward pass runs without a cache of keys and
    values. Raises ValueError without labels, if every label is masked, and for encoder-decoder models.

    Example:
        >>> found = sst.label_logits(model, harm_batches[0])
        >>> len(found)
        3
    """
    if batch.get("labels") is None:
        raise ValueError(NO_LABELS)
    plain: Any = unwrapped(model)
    plain = unwrapped(plain.get_base_model()) if hasattr(plain, "get_base_model") else plain
    if getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(plain).__name__} is an encoder-decoder model: only decoders are supported")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE
    if len(wanted) and not wanted.any():
        raise ValueError("every label of the batch is masked (-100): no position is left to predict")
    columns = wanted.any(0).nonzero().squeeze(1)
    takes = inspect.signature(plain.forward).parameters
    if "use_cache" in takes:
        inputs["use_cache"] = False
    fewer = "logits_to_keep" in takes and not _adapts_head(plain)
    output = model(**inputs, logits_to_keep=columns.cpu()) if fewer else model(**inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    rows, places = wanted.nonzero(as_tuple=True)
    labels = targets[rows, places].to(logits.device)
    if fewer:
        if logits.shape[1] != len(columns):
            raise ValueError(
                f"{type(plain).__name__} gave logits of {logits.shape[1]} columns where logits_to_keep asked for {len(columns)}: compute "
                "your loss from the model's logits inside declared_loss(labels)"
            )
        places = wanted.any(0).cumsum(0)[places] - 1
    rows, places = rows.to(logits.device), places.to(logits.device)
    return logits[rows, places], labels, rows


def _adapts_head(model: Any) -> bool:
    """Whether LoRA layers stand outside the transformer's body."""
    body = getattr(model, "base_model", model)
    inside = set() if body is model else {id(m) for m in body.modules()}
    return any(hasattr(m, "lora_A") and id(m) not in inside for m in model.modules())


def named_inputs(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward call by name.

    Raises ValueError for positional ones that cannot be named, for sequences packed into rows that this model would not keep apart, and for a
    loss of the model's own that holds more than its samples' terms.
    """
    inputs = _named(model, args, kwargs)
    plain: Any = unwrapped(model)
    plain = unwrapped(plain.get_base_model()) if hasattr(plain, "get_base_model") else plain
    if inputs.get("shift_labels") is not None and current_declaration() is None:
        raise ValueError(
            "the batch has shift_labels, which the model's loss takes in place of labels: pass labels alone, or compute your loss inside "
            "declared_loss(labels)"
        )
    _refuse_router_terms(plain, inputs)
    _refuse_lost_gradients(plain)
    refuse_leaks(plain, inputs)
    return inputs


def _named(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    if not args:
        return kwargs
    forward: Callable = model.forward
    names = forward.__code__.co_varnames[1 : forward.__code__.co_argcount] if hasattr(forward, "__code__") else ()
    if len(names) < len(args):
        raise ValueError(
            "pass the batch by keyword, model(**batch): the positional arguments of this model's forward cannot be named"
        )
    return dict(zip(names, args)) | kwargs


def _refuse_lost_gradients(plain: nn.Module) -> None:
    """bitsandbytes (0.50) packs 4-bit weights for inference where the CPU knows bfloat16, and no gradient passes them from then on."""
    if not (torch.is_grad_enabled() and getattr(plain, "is_loaded_in_4bit", False)):
        return
    for name, module in plain.named_modules():
        if (
            getattr(module, "support_avx512bf16_for_cpu", False)
            and not module.training
            and module.weight.device.type == "cpu"
        ):
            raise ValueError(
                f"{name}: bitsandbytes packs its 4-bit weight on this CPU in evaluation mode, and gradients do not pass it then: set "
                "support_avx512bf16_for_cpu = False on all such modules before the first forward pass"
            )


def _refuse_router_terms(plain: nn.Module, inputs: Mapping[str, Any]) -> None:
    config = settings(plain)
    given = inputs.get("output_router_logits")
    asked = getattr(config, "output_router_logits", False) if given is None else given
    weights = [getattr(config, name, 0) for name in ("router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef")]
    own = inputs.get("labels") is not None and current_declaration() is None and torch.is_grad_enabled()
    if asked and own and any(weights):
        raise ValueError(
            f"the loss of {type(plain).__name__} with output_router_logits=True adds a term for the balance of its experts, which is of the whole "
            "batch and of no sample: pass output_router_logits=False, or use sequence_nll(model, batch)"
        )
