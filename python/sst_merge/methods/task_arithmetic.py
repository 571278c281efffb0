"""Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089): the sum, by concatenation."""

from __future__ import annotations

from .base import Method, check_strength, with_task

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def _merge(inputs, strength):
    check_strength(strength)
    return with_task(inputs, inputs.safety, strength)


METHODS = [
    Method("plain", "arXiv:2212.04089", "ΔW = task + α · safety", "α", ALPHAS, _merge),
    Method("no patch", "–", "ΔW = task", "none", (0.0,), lambda inputs, _: with_task(inputs, inputs.safety, 0.0)),
]
