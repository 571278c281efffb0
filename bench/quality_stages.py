"""The stages of the quality study: which configurations are measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from quality_runner import ALPHAS, GENERATED, Config, Study

PLAIN = Config("plain", None, None, "", "", 0.0, "", "", opening=1.0, cost_labels="", draws=0)
BUDGETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.04, 0.06)
WIDE = (0.004, 0.015, 0.04)
FEW = (0.004, 0.015)
ONE = (0.004,)  # where the filter still chooses: the patch of the default reads is whole near 0.01


def plain(s: Study) -> None:
    """No patch, and plain addition along α."""
    for alpha in (0.0, *ALPHAS):
        if not s.has("plain", PLAIN, alpha):
            s.check_time()
            s.record("plain", PLAIN, alpha, alpha, full=alpha in GENERATED)


def main(s: Study) -> None:
    """The library's defaults along KL budgets."""
    s.run("main", Config(), WIDE, full=True)
    s.run("main", Config(), BUDGETS, full=True)


def reads(s: Study) -> None:
    """The price of benign inputs in what the patch reads, and the columns of the sketch that tells them."""
    s.run("reads", Config(input_filter=10.0), WIDE, full=True)
    s.run("reads", Config(input_filter=None, input_rank=None), BUDGETS, full=True)
    s.run("reads", Config(input_filter=1.0), WIDE, full=True)
    for rank in (32, None):
        s.run("reads", Config(input_rank=rank), FEW)
    for mu in (3.0, 10.0, 30.0):
        reads_alone(s, mu)


def reads_alone(s: Study, mu: float) -> None:
    """The patch with these reads and no Fisher: RegMean between the patch and none."""
    config = replace(PLAIN, method="input-filter", input_filter=mu, input_rank=Config.input_rank)
    if not s.has("reads", config, mu):
        s.check_time()
        s.probes(), s.plain_curve(), s.plain_rates()
        with s.lab.reading(s.reads(config)):
            whole = {site.name: torch.eye(site.rank, dtype=torch.float64) for site in s.lab.sites}
            s.record("reads", config, mu, whole, full=True)


def lighter(s: Study) -> None:
    """For a patch whose filter ends early: small budgets, and lower prices of benign inputs."""
    s.run("main", Config(), BUDGETS[:2], full=True)
    for mu in (1.0, 0.3):
        s.run("reads", Config(input_filter=mu), FEW, full=True)


def opening(s: Study) -> None:
    """The weight of a refusal's first words."""
    for weight in (1.0, 6.0):
        s.run("opening", Config(opening=weight), WIDE, full=True)


def metric(s: Study) -> None:
    """Damping by ‖ΔW‖² instead."""
    s.run("metric", Config(metric="frobenius"), WIDE, full=True)


def points(s: Study) -> None:
    """Where the gain Fisher is taken."""
    for where in ("path", "patched", "half"):
        s.run("points", Config(gain_point=where), FEW, full=True)


def scope(s: Study) -> None:
    """Modules apart; and the patch's part in random directions of each module, as a control."""
    s.run("scope", Config(scope="module"), FEW)
    s.run("scope", Config(scope="module", metric="frobenius"), FEW)
    random_control(s)


def filters(s: Study) -> None:
    """Hard choices of directions."""
    for name in ("top_k", "threshold"):
        s.run("filters", Config(filter=name), FEW)


def size(s: Study) -> None:
    """How many prompts: harmful, benign, draws of each, and in either metric with few of both."""
    for prompts in (16, 32, 64, 128):
        s.run("size", Config(benign_prompts=prompts), ONE)
        s.run("size", Config(harm_prompts=prompts), ONE)
    s.run("size", Config(draws=1), ONE)
    for prompts in (16, 32, 64):
        for shape in ("kronecker", "frobenius"):
            s.run("size", Config(harm_prompts=prompts, benign_prompts=prompts, draws=1, metric=shape), ONE)


def damping(s: Study) -> None:
    for value in (0.01, 0.1, 10.0, 100.0):
        s.run("damping", Config(damping=value), ONE)


def labels(s: Study) -> None:
    """Answers as labels, the reference's own or the data's; and random-sign probes in place of sampled labels."""
    for answers in ("own", "data"):
        s.run("labels", Config(cost_labels=answers, draws=1), ONE)
    s.run("labels", Config(draws=1), ONE)
    for draws in (1, 2):
        s.run("labels", Config(cost_labels="probe", draws=draws), ONE)


def random_control(s: Study) -> None:
    """The patch's projection on random directions of each module, as many as the share says."""
    generator = torch.Generator().manual_seed(s.args.seed)
    config = replace(PLAIN, method="random-subspace")
    rank = {site.name: site.rank for site in s.lab.sites}
    bases = {n: torch.linalg.qr(torch.randn(r * r, r * r, dtype=torch.float64, generator=generator))[0] for n, r in rank.items()}  # fmt: skip
    for share in (0.25, 0.5, 0.75):
        if s.has("scope", config, share):
            continue
        s.check_time()
        cores = {}
        for name, r in rank.items():
            kept = bases[name][:, : round(share * r * r)]
            cores[name] = (kept @ (kept.T @ torch.eye(r, dtype=torch.float64).flatten())).reshape(r, r)
        s.record("scope", config, share, cores)


STAGES = {
    f.__name__: f for f in (plain, main, reads, lighter, opening, metric, points, scope, filters, size, damping, labels)
}
SHORT = ("plain", "main", "metric")  # for every pair but the first
