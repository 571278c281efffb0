"""Independent implementations of the same matrices, on a small network whose first layer shares its weight over tokens."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from sst_kernels.fisher.base import Counts, TokenBatch
from sst_kernels.fisher.structures import Structure, make_structure

N, T, Q, P, C = 7, 5, 4, 3, 6


class Net(nn.Module):
    """[N, T, Q] → [N·T, C]: a Linear [P, Q] without bias, tanh, a second Linear without bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(Q, P, bias=False), nn.Linear(P, C, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).flatten(0, -2)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return Net(), torch.randn(N, T, Q) + 0.3, torch.randint(0, C, (N * T,))


def tokens(net: Net, x: torch.Tensor, y: torch.Tensor) -> TokenBatch:
    """The first layer's input and output gradient of the summed loss."""
    kept = {}
    handle = net.first.register_forward_hook(lambda m, i, out: kept.update(out=out) or out.retain_grad())
    nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
    handle.remove()
    begin = torch.arange(len(x)) * T
    left = kept["out"].grad.flatten(0, 1)
    net.zero_grad()
    spans = torch.stack([begin, begin + T], 1)
    return TokenBatch(left, x.flatten(0, 1), spans, torch.ones(len(x)), Counts(len(x), len(x) * T, len(x) * T))


def ours(kind: str, batch: TokenBatch, **options) -> Structure:
    structure = make_structure(kind, (P, Q), **options)
    structure.update(batch)
    return structure


def test_single_sample_backward_passes(problem):
    net, x, y = problem
    rows = []
    for sample, labels in zip(x, y.reshape(N, T), strict=True):
        loss = nn.functional.cross_entropy(net(sample[None]), labels, reduction="sum")
        rows.append(torch.autograd.grad(loss, net.first.weight)[0].flatten())
    rows = torch.stack(rows).double()
    structure = ours("full", tokens(net, x, y))
    torch.testing.assert_close(structure.rows.double(), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_curvlinops_kfac(problem, approx):
    peer = pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch")
    net, x, y = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = peer.KFACLinearOperator(
            net,
            nn.CrossEntropyLoss(reduction="sum"),
            [net.first.weight],
            [(x, y)],
            fisher_type=peer.FisherType.EMPIRICAL,
            kfac_approx=approx,
            check_deterministic=False,
        )
        theirs = operator @ torch.eye(P * Q)
    mine = ours("kronecker", tokens(net, x, y), approx=approx)
    torch.testing.assert_close(theirs.double(), N * mine.dense(), rtol=1e-4, atol=1e-5)


def test_curvlinops_ekfac(problem):
    peer = pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch")
    net, x, y = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = peer.EKFACLinearOperator(
            net,
            nn.CrossEntropyLoss(reduction="sum"),
            [net.first.weight],
            [(x, y)],
            fisher_type=peer.FisherType.EMPIRICAL,
            check_deterministic=False,
        )
        theirs = (operator @ torch.eye(P * Q)).double()
    batch = tokens(net, x, y)
    mine = ours("eigen_kronecker", batch, basis=ours("kronecker", batch))
    torch.testing.assert_close(theirs, N * mine.dense(), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_kronfluence_lambda_and_factors(problem, tmp_path):
    pytest.importorskip("kronfluence", reason="pip install --no-deps kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    net, x, y = problem

    class Sum(Task):
        def compute_train_loss(self, batch, model, sample=False):
            inputs, labels = batch
            return nn.functional.cross_entropy(model(inputs), labels.flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return ["first"]

    batch = tokens(net, x, y)
    data = torch.utils.data.TensorDataset(x, y.reshape(N, T))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = Sum()
        analyzer = Analyzer(
            "peer", prepare_model(net, task), task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True
        )
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        analyzer.fit_all_factors("ekfac", data, per_device_batch_size=N, factor_args=arguments)
        lambdas = analyzer.load_lambda_matrices("ekfac")["lambda_matrix"]["first"]
        covariance = analyzer.load_covariance_matrices("ekfac")
        eigen = analyzer.load_eigendecomposition("ekfac")
    first = ours("kronecker", batch)
    right, left = (covariance[f"{side}_covariance"]["first"].double() for side in ("activation", "gradient"))
    state = first.state_dict()
    torch.testing.assert_close(right.tril(), state["right"].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.tril(), state["left"].double(), rtol=1e-5, atol=1e-5)
    mine = make_structure("eigen_kronecker", (P, Q))
    u, v = (eigen[f"{side}_eigenvectors"]["first"] for side in ("gradient", "activation"))
    mine.load_state_dict({"u_left": u, "u_right": v, "moments": torch.zeros(P, Q)})
    mine.update(batch)
    torch.testing.assert_close(N * mine.eigenvalues(), lambdas.double(), rtol=1e-5, atol=1e-5)


def test_opacus_per_sample_gradients(problem):
    opacus = pytest.importorskip("opacus", reason="pip install --no-deps opacus")
    net, x, y = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = opacus.GradSampleModule(net, loss_reduction="sum")
        nn.functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
        theirs = net.first.weight.grad_sample.flatten(1).double()
        wrapped.remove_hooks()
    batch = tokens(net, x, y)
    scale = theirs.abs().max()
    assert (ours("full", batch).rows - theirs).abs().max() <= 1e-6 * scale
    square = theirs.square().mean(0).reshape(P, Q)
    assert (ours("diagonal", batch).diagonal() - square).abs().max() <= 1e-6 * square.max()
    variance = theirs.var(0, unbiased=False).reshape(P, Q)
    assert (ours("vila", batch).variance() - variance).abs().max() <= 1e-6 * square.max()
