"""The stages of the quality study: which configurations are measured, and the variants that iterate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from quality_lab import Pencil
from quality_runner import ALPHAS, Config, Study
from torch import Tensor

import sst_kernels as sst
from sst_merge.pipeline import over_points

PLAIN = Config("plain", "", "", "", cost_labels="", damping=0.0)
BUDGETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def plain(s: Study) -> None:
    """No patch, and plain addition along α, with what the quadratic predicts for each."""
    for alpha in (0.0, *ALPHAS):
        if s.has("plain", PLAIN, alpha):
            continue
        s.check_time()
        predicted = s.predictions(alpha * s.lab.patch, None)
        full = s.args.scale == "full" and alpha in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
        s.record("plain", PLAIN, alpha, full=full, strength=alpha, **predicted)


def main(s: Study) -> None:
    """The soft filter with all rows: gain from the refusals, or from the patched model's own Fisher on them."""
    s.run("main", Config(), curve=True, full=True)
    s.run("main", Config(gain_labels="probe"), curve=True, full=True)


def newton(s: Study) -> None:
    """Iterated variants, ours: damped Gauss–Newton steps in the patch's span, along decreasing μ."""
    _path(s, Config("newton-refusal", gain_point="path", gain_labels="data+probe", damping=3.0), exact=False)
    _path(s, Config("newton-distil", gain_point="path", gain_labels="patched model+probe", damping=3.0), exact=False)
    _path(s, Config("newton-refusal", gain_point="path", gain_labels="data+probe", damping=0.3), exact=False)
    _path(s, Config("newton-refusal-exact", gain_point="path", gain_labels="data+probe", damping=3.0), exact=True)
    _relinearised(s)


def size(s: Study) -> None:
    """How many rows: harmful prompts, benign prompts, rows per benign prompt, and both together."""
    for harm in (16, 32, 64, 128, 256):
        s.run("size", Config(harm_rows=harm))
    for prompts in (16, 32, 64, 128, 256):
        s.run("size", Config(benign_prompts=prompts))
    for draws in (1, 2, 4):
        s.run("size", Config(draws=draws))
    for rows in (16, 32, 64, 128, 256):
        s.run("size", Config(harm_rows=rows, benign_prompts=rows, draws=1))
        s.run("size", Config(harm_rows=rows, benign_prompts=rows, draws=1, scope="module"))


def labels(s: Study) -> None:
    """Sampled labels, the text's own tokens as labels, and random-sign probes, at equal numbers of rows."""
    for draws in (1, 2, 4):
        s.run("labels", Config(cost_labels="model", draws=draws))
    s.run("labels", Config(cost_labels="data", draws=1))
    s.run("labels", Config(cost_labels="model", benign_prompts=128, draws=1))
    s.run("labels", Config(cost_labels="probe", benign_prompts=128, draws=1))


def points(s: Study) -> None:
    """Where the gain Fisher is taken, and from which labels."""
    for gain in ("reference", "half"):
        for source in ("data", "probe"):
            s.run("points", Config(gain_point=gain, gain_labels=source), curve=True)


def damping(s: Study) -> None:
    for value in (0.03, 0.1, 0.3, 1.0, 10.0, 30.0, 100.0):
        s.run("damping", Config(damping=value))


def scope(s: Study) -> None:
    """Modules apart, and coordinates apart."""
    s.run("scope", Config(scope="module"), curve=True)
    s.run("scope", Config(scope="module", gain_labels="probe"))
    s.run("scope", Config("diagonal", scope="module"), curve=True)
    random_control(s)


def random_control(s: Study) -> None:
    """Control: the patch's projection on random directions of each module, as many as the share kept says."""
    generator = torch.Generator().manual_seed(s.args.seed)
    modules = len(s.lab.sites)
    z = s.lab.patch.reshape(modules, -1)
    bases = torch.linalg.qr(torch.randn(modules, z.shape[1], z.shape[1], dtype=torch.float64, generator=generator))[0]
    bases = bases.to(z.device)
    inside = torch.einsum("mij,mi->mj", bases, z)
    config = Config("random-subspace", "module", "", "", cost_labels="", damping=0.0)
    for share in (0.25, 0.5, 0.75):
        if s.has("scope", config, share):
            continue
        s.check_time()
        kept = round(share * z.shape[1])
        candidate = torch.einsum("mij,mj->mi", bases[:, :, :kept], inside[:, :kept]).flatten()
        s.guard("scope", config, lambda c=candidate, x=share: s.record("scope", config, s.lab.cores(c), full=False, strength=x, **s.predictions(c, None)))  # fmt: skip


def calibration(s: Study) -> None:
    """The library's own subspace(): KL budgets, cross-fitted predictions and the truth; the gain Fisher along the path or patched."""
    for gain_point, where in (("path", "global"), ("patched", "global"), ("path", "module"), ("patched", "module")):
        c = Config("library-budget", where, gain_point, harm_rows=256, benign_prompts=256, draws=2)
        if all(s.has("calibration", c, b) for b in BUDGETS):
            continue

        def body(c: Config = c) -> None:
            gain, cost = _fishers(s, c)
            space = sst.subspace(gain, cost, scope=c.scope, damping=c.damping, folds=4, mix_points=True)
            for budget in BUDGETS:
                if s.has("calibration", c, budget):
                    continue
                s.check_time()
                patch = space.soft(kl_budget=budget)
                values = s.predictions(_z(s, patch), None) | {"strength": patch.parameter, "target": budget}
                values["in_sample"] = patch.prediction.in_sample_cost_per_label
                s.record("calibration", c, patch.coordinates, full=False, benign_rows=len(cost.groups), **values)

        s.guard("calibration", c, body)


def structures(s: Study) -> None:
    """Other Fisher structures, through the library, from 256 harmful and 512 benign rows."""
    harm, benign = s.harm("fisher", 2)[:256], s.own("fisher")[:512]
    for name, options, where in (
        ("full", {}, "global"), ("lowrank", {"rank": 256}, "global"), ("lowrank", {"rank": 64}, "global"),
        ("full", {}, "module"), ("diagonal", {}, "module"), ("kronecker", {}, "module"), ("kronecker_svd", {}, "module"),
    ):  # fmt: skip
        label = "-".join(["structure", name, *map(str, options.values())])
        c = Config(label, where, harm_rows=256, benign_prompts=512, draws=1, cost_labels="model")

        def body(c: Config = c, name: str = name, options: dict = options, where: str = where) -> None:
            gain = _structured(s, harm, "data", 1.0, name, options, where)
            cost = _structured(s, benign, "model", 0.0, name, options, where)
            space = sst.subspace(gain, cost, scope=where, damping=c.damping, folds=2)
            scale = float(space.values[0]) * 1e-3

            def filtered(mu: float) -> Tensor:
                return _z(s, space.soft(mu))

            mu, z = s.to_target(filtered, scale, s.args.target)
            s.record(
                "structures", c, s.lab.cores(z), full=False, strength=mu, target=s.args.target, **s.predictions(z, None)
            )

        if not s.has("structures", c, s.args.target):
            s.check_time()
            s.guard("structures", c, body)


def prompts(s: Study) -> None:
    """More benign prompts instead of more draws: all GSM8K Fisher prompts, then prompts that the base model invents."""
    lab = s.lab
    base = s.cost(Config())
    head = prompt_head(lab)
    everything = s.benign("fisher")
    rest = everything[s.args.prompts :]
    extra = s.once("more gsm8k", lambda: lab.rows(lab.own_answers(rest), "probe", 0.0, 4)) if rest else None
    invented = s.once("invented", lambda: lab.rows(_invented(s, head), "probe", 0.0, 4)) if head else None
    for name, more in (("sst-soft more gsm8k", extra), ("sst-soft invented", invented)):
        c = Config(name)
        if more is None or s.has("prompts", c, s.args.target):
            continue

        def body(c: Config = c, more=more) -> None:
            rows = torch.cat([base.rows, more.rows])
            pencil = Pencil(s.gain(c).rows, rows, c.damping)
            mu, z = s.to_target(lambda m: pencil.soft(lab.patch, m), pencil.scale, s.args.target)
            s.record(
                "prompts",
                c,
                lab.cores(z),
                strength=mu,
                target=s.args.target,
                benign_rows=len(rows),
                **s.predictions(z, base),
            )

        s.guard("prompts", c, body)


def prompt_head(lab) -> list[int]:
    """The tokens in front of a user's words in the chat template, from which the base model can go on to invent a prompt."""
    if not getattr(lab.tokenizer, "chat_template", None):
        return []
    text = lab.tokenizer.apply_chat_template([{"role": "user", "content": "\x00"}], tokenize=False)
    return lab.tokenizer(text.split("\x00")[0], add_special_tokens=False)["input_ids"]


def _invented(s: Study, head: list[int]) -> list:
    from quality_data import tokenize

    count = s.args.limit or 512
    made = s.lab.generate([head] * count, tokens=48, sample=True)
    texts = [s.lab.tokenizer.decode(t, skip_special_tokens=True).strip() for t in made]
    rows = tokenize([(t, "") for t in dict.fromkeys(texts) if len(t) > 12], s.lab.tokenizer, "invented")
    return s.lab.own_answers(rows)


def _path(s: Study, c: Config, *, exact: bool, steps: int = 2) -> None:
    """min harm loss + μ (benign cost + ½ε‖z‖²) by Gauss–Newton, μ falling; benign curvature stays at the reference.

    Harm loss: refusal NLL, or (distil) KL from the patched model; its curvature from random-sign probes at each iterate. Benign
    cost: the quadratic ½ zᵀF_b z, or (exact) the KL itself on half as many prompts. Starts at z = 0, so it uses A and B of
    the patch, and the patch itself in the distilled form only.
    """
    targets = [t for t in s.targets if not s.has("newton", c, t)]
    if not targets:
        return

    def body() -> None:
        lab, harm = s.lab, s.harm("fisher", 1)
        distil = lab.probe(harm, 1.0) if c.method == "newton-distil" else None
        benign = lab.probe(s.own("fisher")[:192]) if exact else None
        cost = s.cost(c)
        pencil, scale, z, before = None, 0.0, torch.zeros_like(lab.patch), None
        for mu in _falling(24):
            for _ in range(steps):
                s.check_time()
                cores = lab.cores(z)
                first = (lab.kl_rows(distil, cores) if distil else lab.rows(harm, "data", cores)).rows.mean(0)
                curvature = lab.rows(harm, "probe", cores).rows
                pencil = pencil.with_gain(curvature) if pencil else Pencil(curvature, cost.rows, c.damping)
                scale = scale or pencil.scale
                unit = mu * scale
                tax = lab.kl_rows(benign, cores).rows.mean(0) + pencil.epsilon * z if exact else pencil.cost_gradient(z)
                z = z - pencil.solve(first + unit * tax, unit)
            nll = s.select_nll(lab.cores(z))
            if not math.isfinite(nll):
                raise ValueError(f"refusal NLL is not finite at μ = {mu:.3g}")
            while targets and nll <= targets[0]:
                target = targets.pop(0)
                at = _between(s, before, (z, nll), target)
                s.record(
                    "newton",
                    c,
                    lab.cores(at),
                    strength=mu,
                    target=target,
                    benign_rows=len(cost.rows),
                    **s.predictions(at, cost),
                )
            if not targets:
                return
            before = (z, nll)
        raise ValueError(f"targets {targets} were not reached: refusal NLL {nll:.3f} at the end of the path")

    s.guard("newton", c, body)


def _relinearised(s: Study) -> None:
    """The soft filter with its gain Fisher taken again at the filtered patch, twice; the aim stays the whole patch."""
    c = Config("sst-relinearised", gain_point="filtered")
    if s.has("newton", c, s.args.target):
        return

    def body() -> None:
        pencil, cost = s.pencil(Config()), s.cost(c)
        mu, z = s.to_target(lambda m: pencil.soft(s.lab.patch, m), pencil.scale, s.args.target)
        for _ in range(2):
            s.check_time()
            again = pencil.with_gain(s.lab.rows(s.harm("fisher", 2), "data", s.lab.cores(z)).rows)
            mu, z = s.to_target(lambda m, p=again: p.soft(s.lab.patch, m), mu, s.args.target)
        s.record(
            "newton",
            c,
            s.lab.cores(z),
            strength=mu,
            target=s.args.target,
            benign_rows=len(cost.rows),
            **s.predictions(z, cost),
        )

    s.guard("newton", c, body)


def _falling(count: int) -> Iterator[float]:
    return (10 ** (1.5 - 0.2 * i) for i in range(count))


def _between(s: Study, before: tuple[Tensor, float] | None, after: tuple[Tensor, float], target: float) -> Tensor:
    """The point of the segment whose refusal NLL on the select split is the target."""
    start = before[0] if before else torch.zeros_like(after[0])
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        above = s.select_nll(s.lab.cores(start + middle * (after[0] - start))) > target
        low, high = (middle, high) if above else (low, middle)
    return start + high * (after[0] - start)


def _z(s: Study, patch: sst.Patch) -> Tensor:
    return s.lab.coordinates.from_cores({name: core.to(s.lab.device) for name, core in patch.coordinates.items()})


def _fishers(s: Study, c: Config) -> tuple[sst.Fisher, sst.Fisher]:
    """The library's (gain, cost) over the rows of a configuration; each pass is kept in DIR/fishers for the next run."""

    def gain(point: float) -> sst.Fisher:
        return _structured(s, s.harm("fisher", 2)[: c.harm_rows], "data", point, "full", {}, "global")

    def cost() -> sst.Fisher:
        return _structured(s, s.own("fisher")[: c.benign_prompts], "probe", 0.0, "full", {}, "global", c.draws)

    points = {"path": (0.0, 0.5, 1.0), "patched": (1.0,), "half": (0.5,), "reference": (0.0,)}[c.gain_point]
    return over_points(points, lambda p: _kept(s, f"gain {p}", lambda: gain(float(p)))), _kept(s, "cost", cost)


def _kept(s: Study, name: str, make: Callable[[], sst.Fisher]) -> sst.Fisher:
    path = s.args.out / "fishers" / f"{s.pair} {name}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        s.once(name, make).save(path)
    return sst.Fisher.load(path, s.lab.device)


def _structured(
    s: Study, rows, labels: str, point: float, structure: str, options: dict, scope: str, draws: int = 1
) -> sst.Fisher:
    lab = s.lab
    loss = lab._probe_loss if labels == "probe" else lab._nll(labels)
    lab.activate(lab.task, lab.safety)
    with sst.fisher_accumulate(
        lab.model, lab.safety, structure=structure, scope=scope, point=point, **options
    ) as accumulator:
        for _ in range(draws or 1):
            for index, batch in lab.batches(rows):
                loss(batch, index).backward()
    return accumulator.fisher


STAGES = {
    f.__name__: f for f in (plain, main, newton, size, labels, points, damping, scope, calibration, structures, prompts)
}
SHORT = ("plain", "main", "newton", "scope")  # for every pair but the first
