"""What a model says: greedy answers, and how likely a few continuations of a prompt are."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .io.data import Dataset, prompt_batches
from .progress import Reporter


def greedy_tokens(
    model: Any, tokenizer: Any, data: Dataset, tokens: int, *, reporter: Reporter, label: str = "greedy answers"
) -> list[list[int]]:
    """The greedy answer to every prompt of `data`, at most `tokens` long, without what follows its end.

    Answers end where the longest prompt of their batch meets the model's context.
    """
    device, room = next(model.parameters()).device, getattr(tokenizer, "model_max_length", math.inf)
    answers: list[list[int]] = [[] for _ in data.examples]
    chunks = reporter.track(prompt_batches(data, 32), label, size=lambda c: len(c[0]), unit="prompts")
    with greedy(model, data, tokenizer) as config:
        ends = set(config.eos_token_id or ())
        for rows, ids, mask in chunks:
            config.max_new_tokens = min(tokens, room - ids.shape[1])
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            for row, found in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(found) if token in ends), len(found))
                answers[row] = found[:end]
    return answers


@contextmanager
def greedy(model: Any, data: Dataset, tokenizer: Any) -> Iterator[Any]:
    """A `GenerationConfig` for greedy answers, whatever the model's `generation_config.json` says of penalties, beams, bans or formats.

    Of that file only the tokens that end an answer are kept; the tokenizer's own and those of the data's answers join them. Inside the
    context the model has no other configuration: `generate` fills from it what ours leaves open.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = [m for m in {id(m): m for m in (model, base)}.values() if hasattr(m, "generation_config")]
    kept = [(holder, holder.generation_config) for holder in holders]
    given = [getattr(getattr(base, part, None), "eos_token_id", None) for part in ("generation_config", "config")]
    ends = {
        i
        for ids in (*given, tokenizer.eos_token_id, list(data.stops))
        for i in (ids if isinstance(ids, list) else [ids])
    }
    plain = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=data.pad_id)
    plain.eos_token_id = sorted(i for i in ends if isinstance(i, int)) or None
    for holder in holders:
        holder.generation_config = plain
    try:
        yield plain
    finally:
        for holder, config in kept:
            holder.generation_config = config


def continuation_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], *, tokens: int = 1024
) -> list[Tensor]:
    """log p(choice | prompt) of a few short choices behind every prompt, in nats: float64 [choices of that prompt] each.

    Prompts of one length run together, without padding, and are read once: their choices share keys and values. `tokens` of a forward pass.
    """
    out: list[Tensor] = [torch.empty(0)] * len(prompts)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
        groups[len(prompt), len(own)].append(i)
    for (length, width), members in sorted(groups.items()):
        longest = max(len(c) for i in members for c in choices[i])
        step = max(1, tokens // (length + width * longest))
        for start in range(0, len(members), step):
            rows = members[start : start + step]
            found = _scores(model, torch.tensor([list(prompts[i]) for i in rows]), [choices[i] for i in rows], longest)
            for i, scores in zip(rows, found):
                out[i] = scores
    return out


def _scores(model: Any, prompts: Tensor, choices: Sequence[Sequence[Sequence[int]]], longest: int) -> Tensor:
    """log p [N, C] of C choices for each of N prompts [N, P]."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device, (count, length), width = next(model.parameters()).device, prompts.shape, len(choices[0])
    ids, live = torch.zeros(count * width, longest, dtype=torch.long), torch.zeros(count * width, longest)
    for n, choice in enumerate(c for own in choices for c in own):
        ids[n, : len(choice)], live[n, : len(choice)] = torch.tensor(list(choice)), 1
    ids, prompts = ids.to(device), prompts.to(device)
    takes = inspect.signature(base.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    name = next((n for n in ("cache", "past_key_values") if n in takes), "")
    first = model(input_ids=prompts, use_cache=True, **last)
    logits = [first.logits[:, -1:].repeat_interleave(width, 0)]
    if longest > 1:
        cache: Any = getattr(first, name, None)
        if hasattr(cache, "batch_repeat_interleave"):
            cache.batch_repeat_interleave(width)
            logits.append(model(input_ids=ids[:, :-1], use_cache=True, **{name: cache}).logits)
        else:  # a state of another kind: read once more with each choice
            whole = torch.cat([prompts.repeat_interleave(width, 0), ids[:, :-1]], 1)
            logits.append(model(input_ids=whole, use_cache=False).logits[:, length:])
    nats = torch.cat(logits, 1).float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return (nats.double().cpu() * live).sum(1).view(count, width)
