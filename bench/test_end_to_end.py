"""From batches to an adapter on disk: reads closed to benign inputs, two Fisher passes, pencil, filter, export."""

import torch

import sst_kernels as sst
from bench import gates, workload
from bench.passes import MU, Forward
from bench.shapes import INPUT_RANK
from sst_merge.adapters import Adapter, LoraTerm, load_adapter, write_adapter
from sst_merge.algebra import transform, with_reads


def adapter_of(model, name):
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    terms = {
        n: LoraTerm(m.lora_A[name].weight.detach().cpu(), m.lora_B[name].weight.detach().cpu(), m.scaling[name])
        for n, m in layers.items()
    }
    return Adapter(terms)


def test_end_to_end(cost, shape, device, tmp_path):
    gates.fisher_gate(device)
    gates.inputs_gate(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size, length, rank, count, sketch = (8, 512, 16, 8, INPUT_RANK) if device == "cuda" else (4, 64, 16, 3, 32)
    model = workload.build_model(shape, rank=rank, length=length, device=device, dtype=dtype).requires_grad_(False)
    adapter = adapter_of(model, "safety")
    batches = [workload.token_batch(shape, size, length, device, seed=seed) for seed in range(2 * count)]

    sides = (batches[:count], batches[count:])

    def read(A):
        for name, weight in A.items():
            model.get_base_model().get_submodule(name).lora_A["safety"].weight.data.copy_(weight)

    def merge():
        read({name: term.A for name, term in adapter.terms.items()})
        moments = []
        for part in sides:
            with sst.input_moments(model, "safety", rank=sketch) as side:
                for batch in part:
                    Forward(model, batch)()
            moments.append(side)
        filtered = with_reads(adapter, sst.filter_inputs(*moments, MU))
        read({name: term.A for name, term in filtered.terms.items()})
        fishers = []
        for part, labels in zip(sides, ("data", "model")):
            with sst.fisher_accumulate(model, "safety") as accumulator:
                for batch in part:
                    sst.sequence_nll(model, batch, labels=labels).backward()
            fishers.append(accumulator.fisher)
        patch = sst.subspace(*fishers).soft(mu=1.0)
        write_adapter(transform(filtered, patch.coordinates), tmp_path)
        return patch

    def loads(patch):
        assert patch.prediction.held_out
        assert set(load_adapter(tmp_path).terms) == set(adapter.terms)

    columns = {"model": shape.name, "rank": rank, "batch": size, "length": length}
    note = f"2 x {count} batches"
    cost("end to end", "SST-Merge global", merge, gate=loads, rounds=2, note=note, **columns)
