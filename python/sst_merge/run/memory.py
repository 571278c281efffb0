"""What the Fishers and the pencil of a recipe take in memory, foreseen from its adapters and data."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sst_kernels.fisher import STRUCTURES, Block
from sst_kernels.fisher.estimate import Estimate
from sst_kernels.fisher.memory import estimate, require
from sst_kernels.subspace.memory import estimate_solve

from ..errors import headlined
from ..io.adapters import Adapter
from ..io.data import Dataset
from ..recipe import Recipe


def fisher_memory(recipe: Recipe, safety: Adapter, data: Mapping[str, Dataset]) -> dict[str, int]:
    """Peak bytes of both Fishers' states, and of the pencil."""
    harm, benign = len(data["harm"]) * len(recipe.harm_points), len(data["benign"]) * recipe.label_draws
    blocks = [Block(name, name, (term.rank, term.rank)) for name, term in safety.terms.items()]
    given = recipe.structure_options
    with headlined("the memory of this recipe cannot be estimated"):
        states = [
            estimate(recipe.structure, blocks, n, space=recipe.space, scope=recipe.fisher_scope, options=given)
            for n in (harm, benign)
        ]
    kind = STRUCTURES[recipe.structure]
    shown = recipe.keeps_rows or recipe.scope == "global"
    rows = [kind.rows_for(n, **given) if shown else 0 for n in (harm, benign)]
    sizes, folds = [b.size for b in blocks], recipe.folds if recipe.keeps_rows else 0
    return {
        "Fisher state": sum(state.peak for state in states),
        "pencil": estimate_solve(sizes, *rows, scope=recipe.scope, metric=recipe.metric, folds=folds),
    }


def check_pencil(recipe: Recipe, safety: Adapter, data: Mapping[str, Dataset], device: torch.device | str) -> None:
    """MergeError, naming what would fit, where the pencil that the passes lead to would not fit on the device."""

    def pencil(**change: object) -> Estimate:
        needed = fisher_memory(recipe.model_copy(update=change), safety, data)["pencil"]
        return Estimate(needed, needed)

    others = {
        "metric: frobenius": pencil(metric="frobenius"),
        "structure: lowrank": pencil(structure="lowrank", structure_options={}),
        "scope: module, structure_options: {rows: fold}": pencil(
            structure="full", scope="module", structure_options={"rows": "fold"}
        ),
    }
    with headlined("the pencil cannot be solved"):
        require("solving the pencil", pencil(), device, others, "take fewer examples (limit)")
