"""What comes after a merge: commands that serve and measure the adapter, and a full model for servers that take no adapters."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .adapters import Adapter
from .fit import base_layer, check_fit, fitted, layer_shape

FULL, GGUF = "full", "adapter.gguf"  # in the output folder
CONVERTER = "convert_lora_to_gguf.py"  # of llama.cpp
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def commands(base: str, folder: str | Path, rank: int, heads: Sequence[str] = ()) -> str:
    """Markdown with a command each for PEFT, vLLM, llama.cpp and lm-eval.

    Args:
        base: folder or hub name of the base model.
        folder: of the adapter.
        rank: of its modules, all of which have it (`adapters.one_rank`).
        heads: output layers and embeddings among its modules, which vLLM and llama.cpp take of few models.
    """
    path, model = shlex.quote(str(folder)), shlex.quote(base)
    allowed = next((r for r in VLLM_RANKS if r >= rank), None)
    vllm = f"vllm serve {model} --enable-lora --max-lora-rank {allowed} --lora-modules merged={path}"
    if allowed is None:
        vllm = f"# vLLM takes ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}: merge again with --rank, or export the full model"
    if heads:
        vllm = f"# vLLM takes LoRA on {heads[0]} of few models only; where it does not, serve a full model (sst-merge merge --export full)\n{vllm}"
    name = Path(folder).name or "adapter"
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(folder)!r})
```

```bash
{vllm}
lm_eval --model hf --model_args {shlex.quote(f"pretrained={base},peft={folder}")} --tasks arc_easy
python {CONVERTER} --base {model} {path} --outfile {shlex.quote(name + ".gguf")}  # of llama.cpp; then llama-server --lora
```

All modules have rank {rank} and one alpha, so that servers with one of each scale every module rightly."""


def export(
    kinds: Sequence[str], adapter: Adapter, folder: Path, output: Path, base: str, load: Callable[[], tuple[Any, Any]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Write an adapter that stands in `folder` in other forms, beside it: "full" in `FULL`, "gguf-lora" in `GGUF`.

    Args:
        output: the name that the folder will have. base: folder of the base model. load: its model and tokenizer.

    Returns what to tell of each kind, and for kinds that could not be made the reason. Where llama.cpp's converter is neither on the PATH nor
    in the folder `$LLAMA_CPP`, the command to run is told.
    """
    told, failed = {}, {}
    for kind in dict.fromkeys(kinds):
        try:
            if kind == "full":
                model, tokenizer = load()
                export_full(model, adapter, folder / FULL, tokenizer=tokenizer)
                told[kind] = f"full model in {output / FULL}"
            else:
                told[kind] = _gguf(folder, output, base)
        except (ModelError, OSError, RuntimeError) as error:
            failed[kind] = str(error)
    return told, failed


def _gguf(folder: Path, output: Path, base: str) -> str:
    home = os.environ.get("LLAMA_CPP")
    found = Path(home) / CONVERTER if home else None
    script = str(found) if found is not None and found.is_file() else shutil.which(CONVERTER)
    if script is None:
        command = ["python", CONVERTER, "--base", base, "--outfile", str(output / GGUF), str(output)]
        return f"for llama.cpp, whose converter is not here (set LLAMA_CPP to its folder), run: {shlex.join(command)}"
    command = [sys.executable, script, "--base", base, "--outfile", str(folder / GGUF), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode or not (folder / GGUF).is_file():
        last = (ended.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ModelError(f"{script} ended with status {ended.returncode}: {last}")
    return f"for llama.cpp: {output / GGUF}"


def export_full(
    model: Any, adapter: Adapter, folder: str | Path, *, tokenizer: Any = None, max_shard_size: str | int = "5GB"
) -> None:
    """Write the base model with the adapter in its weights, W + scaling · B A, as a model folder in safetensors.

    The sum is taken in float32 (float64 for weights of float32) and rounded once to the dtype of the weight. `model` is left as it is; while
    the folder is written, the changed weights exist twice.

    Args:
        model: the base as transformers loads it, with or without PEFT adapters on it, none of them merged.
        folder: to create or fill; see `output.output_folder` for the atomic way.
        tokenizer: written beside the model.
        max_shard_size: of a file, as `save_pretrained` takes it.

    Raises:
        ModelError: the adapter does not fit, changes one of two tied embeddings or single experts that the model keeps as one parameter, or the
            weights are quantised or not in memory.
    """
    from transformers.pytorch_utils import Conv1D

    adapter = fitted(model, adapter)
    if tied := check_fit(model, adapter):
        raise ModelError(f"cannot be exported: {tied[0]}. Serve the adapter instead")
    if adapter.experts:
        raise ModelError(
            "cannot be exported: the adapter changes linears of single experts, which this model keeps as one parameter; use PEFT's "
            "merge_and_unload, or serve the adapter"
        )
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(plain.named_modules())
    state = {
        key.replace(".base_layer.", "."): value for key, value in plain.state_dict().items() if ".lora_" not in key
    }
    for name, term in adapter.terms.items():
        weight = base_layer(modules[name]).weight
        shape = layer_shape(modules[name]) or ()
        if weight.is_meta or not weight.is_floating_point() or tuple(weight.shape) not in (shape, shape[::-1]):
            raise ModelError(
                f"cannot be exported: {name} has its weight quantised or not in memory; load the base whole, in bfloat16 or float32"
            )
        exact = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
        delta = term.scaling * (term.B.to(weight.device, exact) @ term.A.to(weight.device, exact))
        turned = delta.T if isinstance(base_layer(modules[name]), Conv1D) else delta
        state[f"{name}.weight"] = (weight.detach().to(exact) + turned).to(weight.dtype)
    plain.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
