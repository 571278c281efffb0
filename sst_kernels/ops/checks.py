"""What the ops accept, checked once and said the same way: shapes, dtypes and devices, never values on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("ieee", "tf32x3", "tf32")


def tokens(name: str, x: Tensor, S: int | None = None) -> None:
    """A flat batch of tokens [S, ·] in float32, bfloat16 or float16."""
    if x.ndim != 2 or (S is not None and x.shape[0] != S):
        want = "[S, ·]" if S is None else f"[{S}, ·]"
        raise ValueError(f"{name}: expected flat tokens {want}, got {list(x.shape)}; reshape [N, T, d] to [N*T, d]")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def spans_and_scale(x: Tensor, spans: Tensor | None, scale: Tensor | None) -> None:
    """`spans` [N, 2] int64 inside [0, S] and `scale` [N] float32, on the device of `x`."""
    if spans is None:
        if scale is not None:
            raise ValueError("scale: expected None when spans is None: there are no samples to scale")
        return
    shape, device = spans.shape, x.device
    if len(shape) != 2 or shape[1] != 2 or spans.dtype != torch.int64:
        raise ValueError(f"spans: expected [N, 2] int64, got {list(shape)} {spans.dtype}")
    if spans.device != device:
        raise ValueError(f"spans: expected on {device} with the tokens, got {spans.device}")
    if scale is None:
        return
    if scale.shape != (shape[0],) or scale.dtype != torch.float32:
        raise ValueError(f"scale: expected [{shape[0]}] float32, got {list(scale.shape)} {scale.dtype}")
    if scale.device != device:
        raise ValueError(f"scale: expected on {device} with the tokens, got {scale.device}")


def accumulator(name: str, out: Tensor, shape: tuple[int, ...], like: Tensor, dtypes=(torch.float32,)) -> None:
    """An output buffer of exactly this shape, in one of `dtypes`, row-major, on the device of `like`."""
    if out.shape != shape or out.dtype not in dtypes:
        want = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected {list(shape)} {want}, got {list(out.shape)} {out.dtype}")
    if out.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} with the tokens, got {out.device}")
    if len(shape) == 2 and shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"{name}: expected the last dimension contiguous, got strides {out.stride()}")


def precision(value: str) -> None:
    """How float32 products are formed on tensor cores."""
    if value not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {value!r}")
