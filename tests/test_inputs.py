"""Input moments and the filter of a patch's reads, against forward hooks, least squares and the pencil's own eigenvectors."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

import sst_kernels as sst
from sst_kernels.fisher.structures.moment import dense
from tests.models import lora_layers, one_by_one, position_ids, tiny_batch, tiny_lora

ADAPTERS = ("task", "safety")


def seen_inputs(model, batch):
    """Tokens [S, d_in] that each module reads with `safety` off, one unpadded sample at a time."""
    seen, handles = {}, []
    for name, layer in lora_layers(model, "safety").items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda _m, args, n=name: seen.setdefault(n, []).append(args[0].flatten(0, 1))
            )
        )
    model.base_model.set_adapter("task")
    with torch.no_grad():
        for sample in one_by_one(batch):
            model(input_ids=sample["input_ids"])
    for handle in handles:
        handle.remove()
    model.base_model.set_adapter(list(ADAPTERS))
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def moments_of(model, batches, **options):
    with torch.no_grad(), sst.input_moments(model, "safety", **options) as moments:
        for batch in batches:
            model(**{k: v for k, v in batch.items() if k != "labels"})
    return moments


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_moments_are_those_of_unpadded_samples_at_the_reference(kind, padding):
    model = tiny_lora(kind, adapters=ADAPTERS)
    batch = tiny_batch(5, padding=padding)
    expected = seen_inputs(model, batch)
    moments = moments_of(model, [batch | {"position_ids": position_ids(batch)}])
    assert moments.tokens == int(batch["attention_mask"].sum())
    assert list(moments) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(dense(moments[name]), x.mT @ x / len(x), rtol=1e-5, atol=1e-5)


def test_packed_and_split_batches_give_the_same():
    model, batch = tiny_lora(adapters=ADAPTERS, attention="eager"), tiny_batch(4)
    samples = one_by_one(batch)
    lengths = [s["input_ids"].shape[1] for s in samples]
    packed = {
        "input_ids": torch.cat([s["input_ids"] for s in samples], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    together, apart, flat = (moments_of(model, b) for b in ([batch], samples, [packed]))
    assert together.tokens == apart.tokens == flat.tokens
    for name in together:
        whole = dense(together[name])
        for other in (apart, flat):
            assert float((dense(other[name]) - whole).norm() / whole.norm()) < 2e-6


def test_modules_that_read_one_tensor_share_its_sum():
    moments = moments_of(tiny_lora(adapters=ADAPTERS), [tiny_batch(2)])
    prefix = "model.layers.0."
    leaders = {
        n.removeprefix(prefix): to.removeprefix(prefix) for n, to in moments.shared.items() if n.startswith(prefix)
    }
    assert leaders == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    assert moments.nbytes == 2 * 4 * (3 * 32**2 + 48**2)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [None, 7])
def test_a_gpu_keeps_what_the_host_keeps(rank):
    model = tiny_lora(adapters=ADAPTERS).double()
    batches = [tiny_batch(20, seed=seed, longest=16) for seed in (1, 2)]
    host = moments_of(model, batches, rank=rank)
    model.to("cuda")
    device = moments_of(
        model, [{name: tensor.cuda() for name, tensor in batch.items()} for batch in batches], rank=rank
    )
    assert (device.tokens, device.shared, device.nbytes) == (host.tokens, host.shared, host.nbytes)
    for name, factor in device.items():
        assert factor.device.type == "cuda"
        expected = dense(host[name])
        assert (dense(factor).cpu() - expected).norm() <= 1e-5 * expected.norm()  # float32 sums in another order


def test_the_pass_leaves_the_model_as_it_was():
    model, batch = tiny_lora(adapters=ADAPTERS), tiny_batch(3)
    before = model(**batch).logits
    moments_of(model, [batch])
    assert torch.equal(model(**batch).logits, before)


def both(model, rank=None):
    gain = moments_of(model, [tiny_batch(40, seed=1, longest=16)], rank=rank)
    cost = moments_of(model, [tiny_batch(40, seed=2, longest=16)], rank=rank)
    return gain, cost


@pytest.mark.parametrize("mu", [0.3, 3.0, 100.0])
def test_the_filter_is_least_squares_over_the_inputs(mu):
    model = tiny_lora(adapters=ADAPTERS).double()
    gain, cost = both(model)
    harm, benign = (seen_inputs(model, tiny_batch(40, seed=s, longest=16)) for s in (1, 2))
    for name, new in sst.filter_inputs(gain, cost, mu).items():
        a = gain.lora_A[name].double()
        x = torch.cat([harm[name] / len(harm[name]) ** 0.5, (mu / len(benign[name])) ** 0.5 * benign[name]])
        y = torch.cat([harm[name] @ a.mT / len(harm[name]) ** 0.5, benign[name].new_zeros(len(benign[name]), len(a))])
        exact = torch.linalg.lstsq(x, y, driver="gelsd").solution.mT
        found, least = (float((x @ z.mT - y).square().sum()) for z in (new.double(), exact))
        ridge = 1e-4 * x.square().sum(0) + 1e-6 * x.square().sum() / x.shape[1]
        assert least <= found <= least + float((exact.square() * ridge).sum()), name


def test_the_filter_is_the_soft_one_of_the_pencil_of_inputs():
    """In the generalised eigenvectors of (X_gain, X_cost + εI): A' = Σ w_i A-part along v_i, w = λ/(λ+μ)."""
    model, mu = tiny_lora(adapters=ADAPTERS), 3.0
    gain, cost = both(model)
    for name, new in sst.filter_inputs(gain, cost, mu).items():
        x_gain, x_cost, a = dense(gain[name]), dense(cost[name]), gain.lora_A[name].double()
        total = x_gain + mu * x_cost
        ridge = 1e-4 * total.diagonal() + 1e-6 * total.trace() * (1 + 1e-4) / len(total)
        values, v = scipy.linalg.eigh(x_gain, x_cost + torch.diag(ridge) / mu)
        values, v = torch.from_numpy(values).clamp_min(0), torch.from_numpy(v)
        part = torch.linalg.solve(v, a.mT)
        expected = (v @ (values[:, None] / (values[:, None] + mu) * part)).mT
        assert float((new.double() - expected).norm() / a.norm()) < 1e-5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_fewer_tokens_than_inputs_are_wide(scale):
    """The sums are singular, or indefinite by their rounding: the filter is still no dearer than the patch, and no longer."""
    model = tiny_lora(adapters=ADAPTERS)
    for layer in model.get_base_model().model.layers:  # one coordinate far above the others
        layer.input_layernorm.weight.data[3] *= scale
    gain, cost = (moments_of(model, [tiny_batch(1, seed=seed, longest=9)]) for seed in (1, 2))
    assert max(gain.tokens, cost.tokens) < 32
    for name, new in sst.filter_inputs(gain, cost, 3.0).items():
        a, x, y = gain.lora_A[name].double(), dense(gain[name]), dense(cost[name])
        ridge = 1e-4 * (x + 3 * y).diagonal() + 1e-6 * (x + 3 * y).trace() / len(x)

        def objective(z, a=a, x=x, y=y, ridge=ridge):
            return float((((z - a) @ x) * (z - a) + 3 * (z @ y) * z + z.square() * ridge).sum())

        assert objective(new.double()) <= objective(a)


def test_no_price_keeps_what_is_read_and_a_high_one_closes_the_patch():
    gain, cost = both(tiny_lora(adapters=ADAPTERS))
    for name, free in sst.filter_inputs(gain, cost, 0.0).items():
        a, x = gain.lora_A[name].double(), dense(gain[name])
        lost = (free.double() - a) @ x @ (free.double() - a).mT
        assert float(lost.trace()) < 1e-6 * float((a @ x @ a.mT).trace())
    for name, shut in sst.filter_inputs(gain, cost, 1e9).items():
        assert float(shut.norm()) < 1e-2 * float(gain.lora_A[name].norm())


def test_the_filter_does_not_depend_on_the_gauge():
    model = tiny_lora(adapters=ADAPTERS)
    gain, cost = both(model)
    old = sst.filter_inputs(gain, cost, 3.0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0] * 2
    for layer in lora_layers(model, "safety").values():
        layer.lora_A["safety"].weight.data = torch.linalg.inv(turn) @ layer.lora_A["safety"].weight
        layer.lora_B["safety"].weight.data = layer.lora_B["safety"].weight @ turn
    for name, new in sst.filter_inputs(*both(model), 3.0).items():
        torch.testing.assert_close(turn @ new, old[name], rtol=1e-4, atol=1e-5)


def test_a_sketch_of_enough_columns_filters_as_the_whole_and_a_small_one_nearly():
    """Measured by what is minimised, over its value for the unfiltered patch."""
    model, mu = tiny_lora(adapters=ADAPTERS), 3.0
    whole = both(model)

    def objective(name, new):
        change, a = new.double() - whole[0].lora_A[name], new.double()
        return float((change @ dense(whole[0][name]) @ change.mT + mu * a @ dense(whole[1][name]) @ a.mT).trace())

    exact = sst.filter_inputs(*whole, mu)
    for rank, allowed in ((12, 1e-6), (7, 0.3), (4, 0.4)):
        gain, cost = both(model, rank)
        for name, new in sst.filter_inputs(gain, cost, mu).items():
            excess = (objective(name, new) - objective(name, exact[name])) / objective(name, gain.lora_A[name])
            assert -1e-6 < excess < allowed, (rank, name, excess)
    assert gain.nbytes < whole[0].nbytes / 2


@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e4])
def test_a_sketch_is_read_as_its_eigenvalues_are(outlier):
    """Also where one coordinate holds nearly all of the trace, and the shift that steadies the sketch is as large as the rest."""
    from sst_kernels.fisher.structures.moment import SecondMoment
    from sst_kernels.ops.spans import spans_from_lengths

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 384, generator=generator) * torch.logspace(0, -3, 384)
    x[:, 0] *= outlier
    moment = SecondMoment(384, 64, 0, torch.device("cpu"))
    moment.add(x, spans_from_lengths(1, 2000, None), None)
    sketched, factor = moment.mean(2000).dense(), moment.factor(2000)
    difference = sketched - factor @ torch.eye(384, dtype=torch.float64)
    assert float(difference.abs().max()) < 1e-12 * float(factor.trace)


@pytest.mark.parametrize("outlier", [1.0, 1e4])
def test_sketches_without_cholesky_factors(outlier, monkeypatch):
    """Where rounding leaves no Cholesky factor, eigendecompositions give the same; a sketch of an indefinite sum gives a PSD one."""
    from sst_kernels.fisher.structures.moment import SecondMoment, sign_matrix

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 384, generator=generator) * torch.logspace(0, -3, 384)
    x[:, 0] *= outlier
    moment, omega = SecondMoment(384, 64, 0, torch.device("cpu")), sign_matrix(384, 64, 0, x.device, x.dtype)
    z = x @ omega
    moment.sum += torch.cat([x.T @ z, z.T @ z])
    moment.trace += x.double().square().sum()
    usual = moment.mean(2000).dense()
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", lambda a: (a, torch.ones((), dtype=torch.int32)))
        other = moment.mean(2000).dense()
    assert float((usual - other).abs().max()) < 1e-12 * float(usual.trace())

    moment.sum -= 0.5 * moment.trace.float() * torch.cat([omega, omega.T @ omega])  # M - tr(M)/2 I
    indefinite = moment.mean(2000)
    assert torch.isfinite(indefinite.columns).all()
    assert indefinite.rest >= 0


def test_sketches_are_inverted_through_their_columns():
    """Woodbury and the dense Cholesky factor agree where the sketches have fewer columns than d_in."""
    from sst_kernels.fisher.structures.moment import Columns
    from sst_kernels.inputs.filter import _inverse

    generator = torch.Generator().manual_seed(0)

    def sketched(d, k):
        columns = torch.randn(d, k, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, k) / d**0.5
        return Columns(columns, torch.tensor(1e-4, dtype=torch.float64))

    gain, cost, mu = sketched(60, 7), sketched(60, 9), 3.0
    x = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    whole = dense(gain) + mu * dense(cost)
    whole += 1e-6 * whole.diagonal().mean() * torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(_inverse("q", gain, cost, mu)(x), torch.linalg.solve(whole, x), rtol=1e-9, atol=1e-9)


def test_sums_that_rounding_made_indefinite_are_steadied_or_refused_by_name():
    from sst_kernels.inputs.filter import _inverse

    nearly = torch.tensor([[1.0, 1.0 + 5e-4], [1.0 + 5e-4, 1.0]], dtype=torch.float64)  # smallest eigenvalue -5e-4
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    wider = nearly + torch.diag(1e-3 * nearly.diagonal()) + 1e-6 * (1 + 1e-3) * eye
    torch.testing.assert_close(_inverse("q", nearly, nothing, 3.0)(eye), torch.linalg.inv(wider), rtol=1e-8, atol=1e-8)
    with pytest.raises(FloatingPointError, match="the sums of what q reads are not positive definite"):
        _inverse("q", torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), nothing, 3.0)
    with pytest.raises(ValueError, match="what q reads is zero in every token"):
        _inverse("q", nothing, nothing, 3.0)
    for bad in (torch.nan, torch.inf):
        broken = eye.clone()
        broken[1, 0] = bad
        with pytest.raises(FloatingPointError, match="the sums of what q reads are not positive definite"):
            _inverse("q", broken, nothing, 3.0)


def test_what_is_refused():
    model = tiny_lora(adapters=ADAPTERS)
    gain, cost = both(model)
    with pytest.raises(ValueError, match="mu must lie in 0 … 1e100, got -1"):
        sst.filter_inputs(gain, cost, -1.0)
    with pytest.raises(ValueError, match="mu must lie in 0 … 1e100, got nan"):
        sst.filter_inputs(gain, cost, float("nan"))
    with pytest.raises(ValueError, match="different adapters or modules"):
        sst.filter_inputs(gain, moments_of(tiny_lora(adapters=ADAPTERS, seed=5), [tiny_batch(2)]), 1.0)
    with pytest.raises(TypeError, match="expected the moments of two passes of input_moments, got dict"):
        sst.filter_inputs({}, {}, 1.0)
    with pytest.raises(ValueError, match="rank: expected a whole number"):
        sst.input_moments(model, "safety", rank=0)
    with pytest.raises(ValueError, match="no module carries the adapter 'other'"):
        sst.input_moments(model, "other")
    with pytest.raises(RuntimeError, match="no forward pass ran through"):
        moments_of(model, [])
    with (
        pytest.raises(RuntimeError, match="ran twice in one forward pass"),
        sst.input_moments(model, "safety") as twice,
    ):
        model(input_ids=tiny_batch(1)["input_ids"])
        next(iter(lora_layers(model, "safety").values()))(torch.zeros(1, 12, 32))
    assert len(twice) == 14
    broken = tiny_lora(adapters=ADAPTERS)
    broken.get_base_model().model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.self_attn\.q_proj read values that are not finite"):
        moments_of(broken, [tiny_batch(2)])
    with (
        pytest.raises(RuntimeError, match="outside a forward pass of the model given"),
        sst.input_moments(model, "safety"),
    ):
        model.get_base_model()(input_ids=tiny_batch(1)["input_ids"])
