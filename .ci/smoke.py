"""What an installed package must be able to do: run outside the source tree, as `python smoke.py SOURCE_TREE`."""

import importlib.resources
import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import sst_kernels as sst
import sst_merge

source = Path(sys.argv[1]).resolve()
for package in (sst, sst_merge):
    place = Path(package.__file__).resolve()
    assert not place.is_relative_to(source), f"{package.__name__} comes from the source tree: {place}"

for package, name in (
    ("sst_kernels", "py.typed"),
    ("sst_kernels", "gevp/crossover.json"),
    ("sst_merge", "py.typed"),
    ("sst_merge", "templates/page.html"),
    ("sst_merge", "templates/charts.js"),
    ("sst_merge", "demo_data/benign_fisher.jsonl"),
    ("sst_merge", "demo_data/safety/adapter_model.safetensors"),
):
    assert importlib.resources.files(package).joinpath(name).is_file(), f"the installed {package} lacks {name}"

result = sst.gevp(
    torch.diag(torch.tensor([3.0, 8.0, 1.0]).double()), torch.diag(torch.tensor([1.0, 2.0, 4.0]).double()), 3
)
torch.testing.assert_close(result.values, torch.tensor([4.0, 3.0, 0.25]).double())

torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, num_hidden_layers=1, **shape))
lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(model, lora, adapter_name="patch")
tokens = torch.randint(32, (3, 8))
with sst.fisher_accumulate(model, "patch") as accumulator:
    model(input_ids=tokens, labels=tokens).loss.backward()
assert accumulator.fisher.counts.sequences == 3
assert accumulator.fisher.rows().norm() > 0

environment = json.loads(subprocess.check_output([sys.executable, "-m", "sst_kernels.env", "--json"]))
assert environment["modules"]["_native_cpu"].startswith("loaded from"), environment["modules"]
for command in ("--help", "merge --help", "env --json"):
    subprocess.check_output([Path(sys.executable).with_name("sst-merge"), *command.split()])
print(
    f"installed and working: {environment['sst_kernels']}, torch {torch.__version__}, Python {sys.version.split()[0]}"
)
