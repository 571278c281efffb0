"""What adapted modules read, as sums over tokens: for methods that solve least squares on activations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class Grams:
    """Inside the context: module -> Σ [x; 1][x; 1]ᵀ [d_in + 1, d_in + 1] float64 over the tokens that `mask` [N, T] marks.

    Its last column holds Σ x and the number of tokens.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]):
        self.modules = {name: network.get_submodule(name) for name in names}
        self.sums: dict[str, Tensor] = {}
        self.mask: Tensor = torch.empty(0, dtype=torch.bool)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [m.register_forward_pre_hook(partial(self._see, n)) for n, m in self.modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0][self.mask].double()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.sums[name] = self.sums.get(name, 0) + (x.T @ x).cpu()
