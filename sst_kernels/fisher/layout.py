"""Where the samples of a batch lie, in rows or packed, and whether the model keeps packed ones apart."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
_STATEFUL = re.compile(r"Mamba|RWKV|Rwkv|xLSTM|RecurrentBlock|GatedDelta|Lightning|ShortConv|LinearAttention|DeltaNet")


@dataclass
class Layout:
    """Host-side description of one batch: where each sample's tokens lie and how many labels each carries.

    After left padding the label of a sample's first token is predicted from padding: the loss averages over it, but it has no
    gradient in the sample and is none of its labels, as it is none where the sample stands alone.
    """

    batch: int  # dense [batch, length] input shape
    length: int
    spans: Tensor  # [N, 2] int64, cpu
    labels: Tensor  # [N] int64, cpu
    loss_labels: int

    @property
    def samples(self) -> int:
        return len(self.spans)

    @property
    def tokens(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def read_layout(inputs: Mapping[str, Any], labels: Tensor) -> Layout:
    """Samples, spans and label counts of a batch.

    Dense batches have one sample per row, within it the span of `attention_mask` [N, T] (left or right padding).
    Packed batches ([1, ΣT]) are recognised by `cu_seq_lens_q`, or by `position_ids` that do not go on by one somewhere, without an attention
    mask, which is also how transformers separates them. Raises ValueError for masks with holes, with numbers of documents, with more than
    two dimensions unless they are plainly causal, for positions that start again under a mask, samples without labels and
    labels that would be predicted across a sequence boundary.
    """
    n, length, spans, packed = read_spans(inputs)
    if tuple(labels.shape) != (n, length):
        raise ValueError(f"labels must have the shape of the input tokens {(n, length)}, got {tuple(labels.shape)}")
    labelled = labels.detach().cpu() != IGNORE
    labelled[:, 0] = False
    flat = labelled.flatten()
    if packed and flat[spans[:, 0]].any():
        raise ValueError(
            "a packed sequence has a label on its first token, which the sequence before would predict: mask it with -100"
        )
    running = torch.cat([torch.zeros(1, dtype=torch.int64), flat.cumsum(0)])
    counts, total = running[spans[:, 1]] - running[spans[:, 0]], int(running[-1])
    if int(counts.sum()) != total:
        raise ValueError("labels lie on padding tokens: mask them with -100")
    held = spans[:, 1] > spans[:, 0]
    counts[held] -= flat[spans[held, 0]].long()
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"samples {empty} of this batch have no labels (all -100): drop them, or check the truncation of their prompts"
        )
    return Layout(n, length, spans, counts, total)


def read_spans(inputs: Mapping[str, Any]) -> tuple[int, int, Tensor, bool]:
    """Batch N, length T, spans [samples, 2] (int64, CPU) of the samples' tokens in the flat batch, and whether they are packed.

    Raises ValueError as `read_layout` does.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError("the forward pass has neither input_ids nor inputs_embeds: pass one by keyword")
    n, length = tokens.shape[:2]
    if n == 0 or length == 0:
        raise ValueError(f"the batch holds no sequences: input_ids has shape {(n, length)}")
    packed = _packed_starts(inputs, n, length)
    if packed is None:
        spans = _mask_spans(inputs.get("attention_mask"), n, length)
        _refuse_restarts(inputs, spans, length)
        return n, length, spans, False
    return n, length, torch.stack([packed[:-1], packed[1:]], 1), True


def _packed_starts(inputs: Mapping[str, Any], n: int, length: int) -> Tensor | None:
    boundaries = inputs.get("cu_seq_lens_q")
    if boundaries is not None:
        starts = boundaries.detach().cpu().to(torch.int64)
        if n != 1 or starts[0] != 0 or starts[-1] != length or (starts.diff() <= 0).any():
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to the {length} packed tokens of a batch of 1, got {starts.tolist()} for a batch of {n}"
            )
        return starts
    positions = text_positions(inputs)
    if positions is None or inputs.get("attention_mask") is not None:
        return None
    if n != 1:
        if (positions.diff() != 1).any():
            raise ValueError(
                f"position_ids start again within a row, so the {n} rows hold several sequences each: pack all of them "
                "into one row, or give an attention_mask"
            )
        return None
    starts = restarts(positions[0])
    return torch.cat([starts, torch.tensor([length])]) if len(starts) > 1 else None


def _refuse_restarts(inputs: Mapping[str, Any], spans: Tensor, length: int) -> None:
    """ValueError where position_ids start again among the tokens of one sample, which the mask does not part."""
    positions = text_positions(inputs)
    if positions is None or inputs.get("attention_mask") is None:
        return
    backwards = positions.detach().cpu().diff() <= 0
    inside = torch.arange(1, length)
    for row, (start, end) in enumerate((spans - torch.arange(len(spans))[:, None] * length).tolist()):
        if (backwards[row % len(backwards)] & (inside > start) & (inside < end)).any():
            raise ValueError(
                f"position_ids start again within sample {row}, but its attention_mask covers all of it, so that sequences would see each other: "
                "pack without an attention_mask and with use_cache=False, or pass one sequence a row"
            )


def _mask_spans(mask: Tensor | None, n: int, length: int) -> Tensor:
    begin = torch.arange(n) * length
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, which does not tell padding: pass the [N, T] mask of 0 and 1"
        )
    if mask is not None and mask.ndim != 2 and not _plainly_causal(mask):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} parts or hides tokens, which does not tell samples: pass the [N, T] mask of 0 and 1, or "
            "pack with position_ids and no mask"
        )
    if mask is None or mask.ndim != 2:
        return torch.stack([begin, begin + length], 1)
    mask = mask.detach().cpu()
    kept = mask != 0
    if mask.dtype != torch.bool and not torch.equal(kept.to(mask.dtype), mask):
        raise ValueError(
            "attention_mask holds other values than 0 and 1: numbers of documents (multipack) part nothing in transformers itself. Pack with "
            "position_ids that start again, without a mask and with use_cache=False, or pass one sequence a row"
        )
    if tuple(kept.shape) != (n, length):
        raise ValueError(
            f"attention_mask must have the shape of the input tokens {(n, length)}, got {tuple(kept.shape)}"
        )
    lengths = kept.sum(1)
    first = kept.to(torch.int8).argmax(1)
    last = length - kept.flip(1).to(torch.int8).argmax(1)
    holes = ((lengths > 0) & (last - first != lengths)).nonzero().flatten().tolist()
    if holes:
        raise ValueError(
            f"attention_mask of samples {holes} has holes: pad on one side only, or pack with cu_seq_lens_q"
        )
    first = torch.where(lengths > 0, first, 0)
    return torch.stack([begin + first, begin + first + lengths], 1)


def _plainly_causal(mask: Tensor) -> bool:
    """Whether a mask [..., T, T] of booleans or added numbers lets every token see itself and all before it, and nothing else."""
    if mask.ndim not in (3, 4) or mask.shape[-1] != mask.shape[-2]:
        return False
    seen = mask.detach() if mask.dtype == torch.bool else mask.detach() == 0
    return bool((seen == torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()).all())


def settings(plain: nn.Module) -> Any:
    """The configuration of the decoder, which models of several modalities keep inside theirs."""
    config: Any = getattr(plain, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def refuse_leaks(plain: nn.Module, inputs: Mapping[str, Any]) -> None:
    """ValueError for packed sequences whose tokens would see those of others: transformers parts them under conditions only."""
    positions, boundaries = text_positions(inputs), inputs.get("cu_seq_lens_q")
    if inputs.get("attention_mask") is not None:
        return  # `read_spans` tells whether it is plain padding
    starts = torch.zeros(1, dtype=torch.int64)
    if positions is not None and len(positions) == 1:
        starts = restarts(positions[0])
    if boundaries is None and len(starts) < 2:
        return
    name, config = type(plain).__name__, settings(plain)
    kind = str(getattr(config, "_attn_implementation", "") or "")
    packing = "the batch packs several sequences into one row (its position_ids start again, or it has cu_seq_lens_q)"
    if recurrent := _recurrent(plain):
        raise ValueError(
            f"{packing}, and {recurrent} of {name} carries one into the next: pass one sequence a row, padded"
        )
    flash = "flash" in kind
    varlen = all(inputs.get(n) is not None for n in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    if flash and varlen:
        return
    takes = inspect.signature(plain.forward).parameters
    sources = {type(module).__module__ for module in plain.modules()}
    masks = flash or any(hasattr(sys.modules.get(source), "create_causal_mask") for source in sources)
    if not (flash or kind in ("eager", "sdpa", "flex_attention")) or "position_ids" not in takes or not masks:
        raise ValueError(
            f"{packing}, and {name} with {kind or 'its own'} attention is not known to part them: pass one sequence a row, padded"
        )
    if boundaries is not None and boundaries.detach().cpu().tolist()[:-1] != starts.tolist():
        raise ValueError(
            f"{packing}, but {kind} attention does not part them by cu_seq_lens_q"
            + (" without cu_seq_lens_k, max_length_q and max_length_k" if flash else "")
            + ": pass position_ids that start again at the same places"
        )
    if flash:
        if positions is not None and (positions[0].cpu()[starts] != 0).any():
            raise ValueError(f"{packing}, which flash attention parts at positions of 0 alone: start them again at 0")
        return
    caches = inputs.get("use_cache")
    caches = getattr(config, "use_cache", False) if caches is None else caches
    checkpointed = plain.training and getattr(plain, "is_gradient_checkpointing", False)
    if inputs.get("past_key_values") is not None or (caches and not checkpointed and "use_cache" in takes):
        raise ValueError(
            f"{packing}, which {name} does not part while it fills a cache of keys and values: pass use_cache=False (model(**batch, "
            "use_cache=False), or model.config.use_cache = False)"
        )


def _recurrent(plain: nn.Module) -> str:
    """The class of a module that carries state from token to token outside of attention, "" where there is none."""
    kinds = {type(module): None for module in plain.modules()}
    names = [kind.__name__ for kind in kinds if issubclass(kind, nn.Conv1d) or _STATEFUL.search(kind.__name__)]
    return next((name for name in names if not name.endswith(("Model", "LM"))), "")


def text_positions(inputs: Mapping[str, Any]) -> Tensor | None:
    """position_ids [N or 1, T]; of the four rows of multimodal ones (text, time, height, width) the first."""
    positions = inputs.get("position_ids")
    if positions is not None and positions.ndim == 3 and len(positions) == 4:
        return positions[0]
    return positions if positions is not None and positions.ndim == 2 else None


def restarts(positions: Tensor) -> Tensor:
    """Where sequences start in a row of positions [T]: wherever they do not go on by one, which is how transformers parts them."""
    jumps = (positions.detach().cpu().diff() != 1).nonzero().flatten() + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), jumps])
