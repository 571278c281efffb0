"""K-FAC factors and squared per-sample gradients by other libraries, beside ours, on the same model and batches on a CPU.

    python -m bench.peers_cpu [--rounds 5] [--out bench/results/peers_cpu.csv]

One pass is four batches of 8 x 64 tokens through the Llama of `bench/structures_cpu.py` (r = 16, 28 adapted modules, 56 linear maps),
float32, summed loss, every library as its documentation calls it and on a model of its own with the same weights. Values are compared
first (`error`, against ours); whoever differs is not timed. Passes are taken in turn (`passes.beside`).
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import ROOT, Recorder
from bench.passes import beside
from bench.structures_cpu import build
from sst_kernels.fisher import fisher_accumulate
from sst_kernels.fisher.loss import declared_loss

RANK, BATCH, LENGTH, BATCHES = 16, 8, 64, 4
TOKENS = BATCHES * BATCH * LENGTH
ALLOWED = 1e-4
Values = dict[str, Tensor]  # per linear map and side: Σ x xᵀ ("… right"), Σ g gᵀ ("… left"), or per map Σ_n g_n²
Batches = list[tuple[Tensor, Tensor]]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The lora_A and lora_B maps, by their path below the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_" in n}


def factors(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tokens: int = 1) -> Values:
    """Both factors of every map; `tokens` where the right one is a mean over so many."""
    return {f"{n} left": x for n, x in left.items()} | {f"{n} right": x * tokens for n, x in right.items()}


class Plain:
    """A pass of forward and backward steps that leave the gradients of the adapter, and drop them. `values` are what it found."""

    def __init__(self, model: nn.Module):
        self.model = model

    def around(self, ids: Tensor) -> AbstractContextManager:
        """What a step is taken in."""
        return nullcontext()

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Every position has a label of its own, so that no library finds a token without a gradient."""
        logits = self.model(input_ids=ids).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def after(self) -> None:
        """What follows a backward pass."""

    def __call__(self, batches: Batches) -> None:
        for ids, labels in batches:
            with self.around(ids):
                self.loss(ids, labels).backward()
            self.after()
            self.model.zero_grad(set_to_none=True)

    def values(self) -> Values:
        return {}


class Epoch(Plain):
    """An epoch of fine-tuning on the same rows: AdamW on the adapter."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.after = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-9).step


class Ours(Plain):
    """`fisher_accumulate` in factor space."""

    def __init__(self, model: nn.Module, structure: str, **options: Any):
        super().__init__(model)
        self.structure = structure
        self.hooks = functools.partial(
            fisher_accumulate, model, "patch", space="factor", structure=structure, **options
        )

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        with declared_loss(labels) as declared:
            return declared.loss(super().loss(ids, labels))

    def __call__(self, batches: Batches) -> None:
        with self.hooks() as run:
            super().__call__(batches)
        self.fisher = run.fisher

    def values(self) -> Values:
        path = "base_model.model.{}.patch".format
        if self.structure == "diagonal":
            return {path(name): s.diagonal() * s.normaliser for name, s in self.fisher.items()}
        if self.structure != "kronecker":
            return {}
        whole = lambda x: x.tril() + x.tril(-1).mT  # noqa: E731
        states = {path(name): s.state_dict() for name, s in self.fisher.items()}
        return factors(*({name: whole(s[side]) for name, s in states.items()} for side in ("left", "right")))


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

        names, task, self.folder = list(linears(model)), Summed(), tempfile.TemporaryDirectory()
        super().__init__(prepare_model(model, task))
        quiet = {"disable_tqdm": True, "log_level": logging.ERROR}
        self.analyzer = Analyzer("peer", self.model, task, cpu=True, output_dir=self.folder.name, **quiet)
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        self.options = {"per_device_batch_size": BATCH, "factor_args": arguments, "overwrite_output_dir": True}

    def __call__(self, batches: Batches) -> None:
        data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches)))
        self.analyzer.fit_covariance_matrices("factors", data, **self.options)

    def values(self) -> Values:
        found = self.analyzer.load_covariance_matrices("factors")
        return factors(found["gradient_covariance"], found["activation_covariance"])


class Bergson(Plain):
    """The covariance collector of its K-FAC, which writes the factors when it is left."""

    def __init__(self, model: nn.Module):
        from bergson.hessians.kfac import CovarianceCollector

        super().__init__(model)
        self.folder = tempfile.TemporaryDirectory()
        about = {"target_modules": set(linears(model)), "dtype": torch.float32, "path": self.folder.name}
        self.make = functools.partial(CovarianceCollector, model=model, **about)

    def around(self, ids: Tensor) -> AbstractContextManager:
        return self.collector.with_batch(torch.ones_like(ids, dtype=torch.bool))

    def __call__(self, batches: Batches) -> None:
        self.collector = self.make()
        super().__call__(batches)
        self.collector.teardown()

    def values(self) -> Values:
        return factors(self.collector.S_cov_dict, self.collector.A_cov_dict)


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

    def values(self) -> Values:
        right, left = ({name: pair[i] * TOKENS for name, pair in self.callback.result().items()} for i in (0, 1))
        return factors(left, right)


class Opacus(Plain):
    """GradSampleModule, whose per-sample gradients are squared and summed."""

    def __init__(self, model: nn.Module):
        from opacus import GradSampleModule

        self.maps = linears(model.train())  # it hooks modules in training only; there is no dropout
        super().__init__(GradSampleModule(model, loss_reduction="sum", strict=False))
        self.squares = lambda weight: weight.grad_sample.square().sum(0)

    def after(self) -> None:
        for name, layer in self.maps.items():
            self.sums[name] = self.sums.get(name, 0) + self.squares(layer.weight)

    def __call__(self, batches: Batches) -> None:
        self.sums: Values = {}
        super().__call__(batches)

    def values(self) -> Values:
        return self.sums


class Backpack(Opacus):
    """SumGradSquared on the linear maps."""

    def __init__(self, model: nn.Module):
        from backpack import backpack, extend
        from backpack.extensions import SumGradSquared

        Plain.__init__(self, model)
        self.maps = {name: extend(layer) for name, layer in linears(model).items()}
        self.extended, self.squares = lambda: backpack(SumGradSquared()), lambda weight: weight.sum_grad_squared

    def around(self, ids: Tensor) -> AbstractContextManager:
        return self.extended()


class Curvlinops(Plain):
    """KFACLinearOperator.compute_kronecker_factors with the empirical Fisher, expand."""

    class Logits(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits.flatten(0, 1)

    def __call__(self, batches: Batches) -> None:
        from curvlinops import FisherType, KFACLinearOperator

        weights = [layer.weight for layer in linears(self.model).values()]
        data, loss = [(ids, labels.flatten()) for ids, labels in batches], nn.CrossEntropyLoss(reduction="sum")
        settings = {"fisher_type": FisherType.EMPIRICAL, "check_deterministic": False}
        self.operator = KFACLinearOperator(self.Logits(self.model), loss, weights, data, **settings)
        self.operator.compute_kronecker_factors()

    def values(self) -> Values:
        left, right = self.operator._gradient_covariances, self.operator._input_covariances
        bare = lambda found: {name.removeprefix("model."): x for name, x in found.items()}  # noqa: E731
        return factors(bare(left), bare(right), TOKENS)


class BayesianLora(Plain):
    """The hooks of its K-FAC, dense; they see the last token of every sequence only."""

    def __call__(self, batches: Batches) -> None:
        from bayesian_lora.kfac import register_hooks, remove_hooks

        self.right, self.left = {}, {}
        hooks = register_hooks(self.model, self.right, self.left, ["lora_"], n_kfac=None)
        super().__call__(batches)
        remove_hooks(hooks)

    def values(self) -> Values:
        return factors(*({name: x for name, (x, _) in found.items()} for found in (self.left, self.right)))


GROUPS: dict[str, dict[str, Callable[[nn.Module], Plain]]] = {
    "K-FAC": {
        "sst-kernels kronecker": lambda model: Ours(model, "kronecker"),
        "sst-kernels kronecker_lowrank l=64": lambda model: Ours(model, "kronecker_lowrank", rank=64),
        "kronfluence": Kronfluence, "bergson": Bergson, "dattri-llm": Dattri, "curvlinops-for-pytorch": Curvlinops,
        "bayesian-lora": BayesianLora,
    },
    "squared gradients": {
        "sst-kernels diagonal": lambda model: Ours(model, "diagonal"), "opacus": Opacus,
        "backpack-for-pytorch": Backpack,
    },
    "step": {"plain": Plain, "an epoch of fine-tuning, AdamW": Epoch},
}  # fmt: skip


def difference(theirs: Values, ours: Values) -> float:
    """Largest relative Frobenius difference over all matrices that we keep; infinite where one is missing."""
    if not theirs.keys() >= ours.keys():
        return float("inf")
    return max(float((theirs[name].double() - x.double()).norm() / x.double().norm()) for name, x in ours.items())


def right(batches: Batches, record: Recorder) -> Iterator[tuple[str, str, Plain, dict[str, Any]]]:
    """Group, name, pass, error and version of every library that runs and agrees with ours; rows for the others."""
    for group, members in GROUPS.items():
        reference: Values = {}
        for name, make in members.items():
            about: dict[str, Any] = {"note": ""}
            with suppress(PackageNotFoundError):
                about["note"] = version(name)
            try:
                run = make(build(RANK, LENGTH))
                run(batches)
                found = run.values()
            except Exception as problem:  # a library that does not run must not cost the others
                note = f"{about['note']} {type(problem).__name__}: {str(problem)[:120]}"
                record(group, name, basis="failed", note=note)
                continue
            reference = reference or found
            about["error"] = difference(found, reference) if found else None
            if (about["error"] or 0.0) > ALLOWED:
                record(group, name, basis="not the same values", **about)
            else:
                yield group, name, run, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/peers_cpu.csv")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.out.unlink(missing_ok=True)
    where = {"model": "llama-4x256", "targets": "all-linear", "rank": RANK, "batch": BATCH, "length": LENGTH}
    record = Recorder(arguments.out, "cpu", **where)
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(1, 1024, (BATCH, LENGTH), generator=generator)  # noqa: E731
    batches = [(draw(), draw()) for _ in range(BATCHES)]
    found = {(group, name): (run, about) for group, name, run, about in right(batches, record)}
    runs = {name: functools.partial(run, batches) for (_, name), (run, _) in found.items()}
    rows = beside(runs.pop("plain"), runs, "cpu", arguments.rounds)
    for (group, name), (_, about) in found.items():
        record(group, name, **rows.get(name, rows[""] | {"ratio": 1.0}), **about)


if __name__ == "__main__":
    main()
