"""K-FAC factors and squared per-sample gradients by other libraries, beside ours, on the same model and batches on a CPU.

    python -m bench.peers_cpu [--rounds 5] [--out bench/results/peers_cpu.csv]

One pass is four batches of 8 x 64 tokens through the Llama of `bench/structures_cpu.py` (r = 16, 28 adapted modules, 56 linear maps),
float32, summed loss, every library as its documentation calls it and on a model of its own with the same weights. Values are compared
first (`error`, against ours); whoever differs is not timed. Passes are taken in turn; `ratio` is the median over rounds against the
plain pass of the same round, `above_plain_mib` the peak of the allocator above the plain pass's, for one batch.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import ROOT, Measured, Recorder, measure, peak_mib
from bench.structures_cpu import build
from sst_kernels.fisher import fisher_accumulate
from sst_kernels.fisher.loss import declared_loss

RANK, BATCH, LENGTH, BATCHES = 16, 8, 64, 4
ALLOWED = 1e-4
Values = dict[str, Tensor]  # per linear map and side: Σ x xᵀ ("… right"), Σ g gᵀ ("… left"), or per map Σ_n g_n²
Batches = list[tuple[Tensor, Tensor]]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The lora_A and lora_B maps, by their path below the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_" in n}


class Plain:
    """A forward and a backward pass that leave the gradients of the adapter, and drop them."""

    def __init__(self, model: nn.Module):
        self.model = model

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Every position has a label of its own, so that no library finds a token without a gradient."""
        return nn.functional.cross_entropy(
            self.model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )

    def step(self, ids: Tensor, labels: Tensor) -> None:
        self.loss(ids, labels).backward()
        self.model.zero_grad(set_to_none=True)

    def __call__(self, batches: Batches) -> None:
        for ids, labels in batches:
            self.step(ids, labels)

    def values(self) -> Values:
        """What the last pass found."""
        return {}


class Epoch(Plain):
    """An epoch of fine-tuning on the same rows: AdamW on the adapter."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-9)

    def step(self, ids: Tensor, labels: Tensor) -> None:
        self.loss(ids, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours(Plain):
    """`fisher_accumulate` in factor space."""

    def __init__(self, model: nn.Module, structure: str, **options: Any):
        super().__init__(model)
        self.structure, self.options = structure, options

    def step(self, ids: Tensor, labels: Tensor) -> None:
        with declared_loss(labels) as declared:
            declared.loss(self.loss(ids, labels)).backward()
        self.model.zero_grad(set_to_none=True)

    def __call__(self, batches: Batches) -> None:
        with fisher_accumulate(self.model, "patch", space="factor", structure=self.structure, **self.options) as run:
            super().__call__(batches)
        self.fisher = run.fisher

    def values(self) -> Values:
        found = {}
        for name, structure in self.fisher.items():
            path = f"base_model.model.{name}.patch"
            if self.structure == "kronecker":
                state = structure.state_dict()
                found |= {f"{path} {side}": _mirrored(state[side]) for side in ("left", "right")}
            elif self.structure == "diagonal":
                found[path] = structure.diagonal() * structure.normaliser
        return found


class Kronfluence(Plain):
    """Analyzer.fit_covariance_matrices with the empirical Fisher; it loads the data and writes the factors itself."""

    def __init__(self, model: nn.Module):
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        class Summed(Task):
            def compute_train_loss(task, batch, model, sample=False):
                return Plain(model).loss(*batch)

            def compute_measurement(task, batch, model):
                return Plain(model).loss(*batch)

            def get_influence_tracked_modules(task):
                return names

        names, task = list(linears(model)), Summed()
        super().__init__(prepare_model(model, task))
        self.folder = tempfile.TemporaryDirectory()
        self.analyzer = Analyzer(
            "peer", self.model, task, cpu=True, output_dir=self.folder.name, disable_tqdm=True, log_level=logging.ERROR
        )
        self.arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)

    def __call__(self, batches: Batches) -> None:
        data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches)))
        self.analyzer.fit_covariance_matrices(
            "factors", data, per_device_batch_size=BATCH, factor_args=self.arguments, overwrite_output_dir=True
        )

    def values(self) -> Values:
        found = self.analyzer.load_covariance_matrices("factors")
        sides = {"left": "gradient_covariance", "right": "activation_covariance"}
        return {f"{name} {side}": x for side, key in sides.items() for name, x in found[key].items()}


class Bergson(Plain):
    """The covariance collector of its K-FAC, which writes the factors when it is left."""

    def __init__(self, model: nn.Module):
        from bergson.hessians.kfac import CovarianceCollector

        super().__init__(model)
        self.folder = tempfile.TemporaryDirectory()
        self.make = functools.partial(
            CovarianceCollector,
            model=model,
            target_modules=set(linears(model)),
            dtype=torch.float32,
            path=self.folder.name,
        )

    def __call__(self, batches: Batches) -> None:
        self.collector = self.make()
        for ids, labels in batches:
            with self.collector.with_batch(torch.ones_like(ids, dtype=torch.bool)):
                self.step(ids, labels)
        self.collector.teardown()

    def values(self) -> Values:
        sides = {"left": self.collector.S_cov_dict, "right": self.collector.A_cov_dict}
        return {f"{name} {side}": x for side, found in sides.items() for name, x in found.items()}


class Dattri(Plain):
    """KroneckerCovarianceCallback under its float32 policy; it also assembles every step's per-sample factors."""

    def __init__(self, model: nn.Module):
        from dattri_llm import HookManager, HookManagerConfig, KroneckerCovarianceCallback
        from dattri_llm.gradient import ops

        super().__init__(model)
        self.policy = functools.partial(ops.compute_dtype, "float32")
        self.callback = KroneckerCovarianceCallback(include_bias=False)
        config = HookManagerConfig(hook_types=dict.fromkeys(linears(model), "linear_io"))
        self.manager = HookManager(model, config, callbacks=[self.callback])

    def __call__(self, batches: Batches) -> None:
        self.callback.reset()
        with self.policy(), self.manager.collect():
            super().__call__(batches)
        self.tokens = sum(ids.numel() for ids, _ in batches)

    def values(self) -> Values:
        found = {}
        for name, (right, left) in self.callback.result().items():
            found |= {f"{name} right": right * self.tokens, f"{name} left": left * self.tokens}
        return found


class Opacus(Plain):
    """GradSampleModule, whose per-sample gradients are squared and summed."""

    def __init__(self, model: nn.Module):
        from opacus import GradSampleModule

        self.maps = linears(model.train())  # it hooks modules in training only; there is no dropout
        super().__init__(GradSampleModule(model, loss_reduction="sum", strict=False))
        self.sums: Values = {}

    def step(self, ids: Tensor, labels: Tensor) -> None:
        self.loss(ids, labels).backward()
        for name, layer in self.maps.items():
            self.sums[name] = self.sums.get(name, 0) + layer.weight.grad_sample.square().sum(0)
        self.model.zero_grad(set_to_none=True)

    def __call__(self, batches: Batches) -> None:
        self.sums = {}
        super().__call__(batches)

    def values(self) -> Values:
        return self.sums


class Backpack(Opacus):
    """SumGradSquared on the linear maps."""

    def __init__(self, model: nn.Module):
        from backpack import backpack, extend
        from backpack.extensions import SumGradSquared

        Plain.__init__(self, model)
        self.maps = linears(model)
        for layer in self.maps.values():
            extend(layer)
        self.extended = lambda: backpack(SumGradSquared())

    def step(self, ids: Tensor, labels: Tensor) -> None:
        with self.extended():
            self.loss(ids, labels).backward()
        for name, layer in self.maps.items():
            self.sums[name] = self.sums.get(name, 0) + layer.weight.sum_grad_squared
        self.model.zero_grad(set_to_none=True)


class Curvlinops(Plain):
    """KFACLinearOperator.compute_kronecker_factors with the empirical Fisher, expand."""

    def __init__(self, model: nn.Module):
        super().__init__(_Logits(model))

    def __call__(self, batches: Batches) -> None:
        from curvlinops import FisherType, KFACLinearOperator

        weights = [layer.weight for layer in linears(self.model).values()]
        data = [(ids, labels.flatten()) for ids, labels in batches]
        loss = nn.CrossEntropyLoss(reduction="sum")
        self.operator = KFACLinearOperator(
            self.model, loss, weights, data, fisher_type=FisherType.EMPIRICAL, check_deterministic=False
        )
        self.operator.compute_kronecker_factors()

    def values(self) -> Values:
        tokens = BATCHES * BATCH * LENGTH
        sides = {"left": self.operator._gradient_covariances, "right": self.operator._input_covariances}
        scale = {"left": 1, "right": tokens}
        return {
            f"{name.removeprefix('model.')} {side}": x * scale[side]
            for side, found in sides.items()
            for name, x in found.items()
        }


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits.flatten(0, 1)


class BayesianLora(Plain):
    """The hooks of its K-FAC, dense; they see the last token of every sequence only."""

    def __init__(self, model: nn.Module):
        super().__init__(model)

    def __call__(self, batches: Batches) -> None:
        from bayesian_lora.kfac import register_hooks, remove_hooks

        self.right, self.left = {}, {}
        hooks = register_hooks(self.model, self.right, self.left, ["lora_"], n_kfac=None)
        super().__call__(batches)
        remove_hooks(hooks)

    def values(self) -> Values:
        sides = {"left": self.left, "right": self.right}
        return {f"{name} {side}": x for side, found in sides.items() for name, (x, _) in found.items()}


KFAC: dict[str, Callable[[nn.Module], Plain]] = {
    "sst-kernels kronecker": lambda model: Ours(model, "kronecker"),
    "sst-kernels kronecker_lowrank l=64": lambda model: Ours(model, "kronecker_lowrank", rank=64),
    "kronfluence": Kronfluence,
    "bergson": Bergson,
    "dattri-llm": Dattri,
    "curvlinops-for-pytorch": Curvlinops,
    "bayesian-lora": BayesianLora,
}
SQUARES: dict[str, Callable[[nn.Module], Plain]] = {
    "sst-kernels diagonal": lambda model: Ours(model, "diagonal"),
    "opacus": Opacus,
    "backpack-for-pytorch": Backpack,
}
STEPS: dict[str, Callable[[nn.Module], Plain]] = {"plain": Plain, "an epoch of fine-tuning, AdamW": Epoch}
GROUPS = {"K-FAC": KFAC, "squared gradients": SQUARES, "step": STEPS}


def _mirrored(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).mT


def difference(theirs: Values, ours: Values) -> float:
    """Largest relative Frobenius difference over all matrices that we keep; infinite where one is missing."""
    if not theirs.keys() >= ours.keys():
        return float("inf")
    return max(float((theirs[name].double() - x.double()).norm() / x.double().norm()) for name, x in ours.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/peers_cpu.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.out.unlink(missing_ok=True)
    record = Recorder(
        arguments.out, "cpu", model="llama-4x256", targets="all-linear", rank=RANK, batch=BATCH, length=LENGTH
    )
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(1, 1024, (BATCH, LENGTH), generator=generator)  # noqa: E731
    batches = [(draw(), draw()) for _ in range(BATCHES)]
    passes: dict[tuple[str, str], Plain] = {}
    errors: dict[tuple[str, str], float | None] = {}
    for group, members in GROUPS.items():
        reference: Values = {}
        for name, make in members.items():
            about = {"note": _version(name)}
            try:
                run = make(build(RANK, LENGTH))
                run(batches)
                found = run.values()
            except Exception as problem:  # a library that does not run must not cost the others
                record(
                    group, name, basis="failed", note=f"{about['note']} {type(problem).__name__}: {str(problem)[:120]}"
                )
                continue
            reference = reference or found
            error = difference(found, reference) if found else None
            if error is not None and error > ALLOWED:
                record(group, name, basis="not the same values", error=error, note=about["note"])
                continue
            passes[group, name], errors[group, name] = run, error
    times: dict[tuple[str, str], list[float]] = {key: [] for key in passes}
    for _ in range(arguments.rounds):
        for key, run in passes.items():
            times[key].append(measure(lambda: run(batches), "cpu", repeats=1, warmup=0).median)  # noqa: B023
    bare = times["step", "plain"]
    peak = peak_mib(lambda: passes["step", "plain"](batches[:1]))
    for key, run in passes.items():
        taken = Measured(times[key], peak_mib(lambda: run(batches[:1])))  # noqa: B023
        record(
            *key, taken, error=errors[key], ratio=statistics.median(a / b for a, b in zip(times[key], bare)),
            plain_ms=statistics.median(bare), above_plain_mib=taken.peak_mib - peak, note=_version(key[1]),
        )  # fmt: skip


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
