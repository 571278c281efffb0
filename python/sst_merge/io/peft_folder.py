"""What a PEFT folder may hold, and what is refused of it by name: links, variants of LoRA, tensors that are no factors, patterns."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing write into the names of what they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_PREFIX = "base_model.model."
_TWICE = 2 * _PREFIX  # of a PeftModel around a PeftModel
EMBEDDINGS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings")
# PEFT stores the base model's embeddings beside LoRA weights whenever an adapter targets one of them.
BASE_KEY = re.compile(
    rf"^(?:base_model\.model\.)?(?P<module>(?:.+\.)?(?:{'|'.join(EMBEDDINGS)}))(?:\.base_layer)?\.weight$"
)

# Entries of adapter_config.json that do not change ΔW, or that are resolved below.
_NEUTRAL = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a LoRA bias",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trainable token embeddings",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that change the base weights


def refuse_links(folder: Path) -> None:
    """An adapter from elsewhere must not name files of this machine; links within a hub cache stay inside their repository."""
    try:
        home, *targets = (path.resolve() for path in (folder, folder / CONFIG, folder / WEIGHTS))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a zero byte
        raise AdapterError(f"{str(folder)!r}: expected a PEFT adapter folder ({error})") from error
    root = home.parents[1] if home.parent.name == "snapshots" else home
    for name, target in zip((CONFIG, WEIGHTS), targets):
        if not target.is_relative_to(root):
            raise AdapterError(
                f"{folder / name} is a link to {target}, outside the adapter: copy the file into the folder"
            )


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"{folder}: expected a PEFT adapter folder with {CONFIG} ({error.strerror}){_elsewhere(folder)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f'{path}: expected peft_type "LORA", got {kind!r}; only LoRA adapters can be merged')
    return config


def _elsewhere(folder: Path) -> str:
    """Where the adapter that was meant may be: below the folder, or on the hub."""
    with contextlib.suppress(OSError):
        if folder.is_file():
            return f"; it is a file: give the folder that holds it, {folder.parent}"
        if folder.is_dir():
            below = sorted(str(path.parent) for path in folder.glob("*/" + CONFIG))
            if below:
                return f"; these below it are: {', '.join(below[:5])}"
            if (folder / "config.json").is_file():
                return "; this is a model, with its weights or merged: give the folder of the adapter"
        if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            return (
                f"; if it is one of the Hugging Face hub, download it: hf download {folder} --local-dir {folder.name}"
            )
    return ""


def refuse_variants(folder: Path, config: dict[str, Any]) -> None:
    refused = [name for key, name in _VARIANTS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append(f"trained biases (bias={config['bias']!r})")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OTHER_BASE):
        refused.append(f"initialisation {init!r}, which belongs to changed base weights (convert it to plain LoRA)")
    unknown = sorted(k for k, v in config.items() if v and k not in _NEUTRAL and k not in _VARIANTS and k != "bias")
    refused += [f"the unknown option {key}={config[key]!r}" for key in unknown]
    if refused:
        raise AdapterError(
            f"{folder}: this adapter uses {', '.join(refused)}. Only plain LoRA on linear layers has an exact merge; "
            "fold the rest into the base model, or train without it"
        )


def brought(folder: str | Path) -> tuple[str | None, set[str]]:
    """The chat template (None where there is none, or several) and the added tokens of a tokenizer that stands beside an adapter."""
    folder, told = Path(folder), dict[str, Any]()
    with contextlib.suppress(OSError, ValueError, RecursionError):
        read = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        told = read if isinstance(read, dict) else {}
    template = told.get("chat_template")
    with contextlib.suppress(OSError, ValueError):
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokens: set[str] = set()
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        tokens |= set(json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")))
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        tokens |= {
            t["content"] for t in json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        }
    return template if isinstance(template, str) else None, tokens


def purpose(config: dict[str, Any]) -> tuple[str, ...]:
    """A note where an adapter was trained for another task than language modelling."""
    task = config.get("task_type")
    if task in (None, "CAUSAL_LM"):
        return ()
    return (f"trained for {task}, not for CAUSAL_LM: what it does to answers was not its training's aim",)


def unwrapped(folder: Path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without what wrappers of the trained model added to their names, and a note where there was any."""
    plain, wrapped = {}, set()
    for key, tensor in state.items():
        name = _WRAPPERS.sub("", key)
        if name.startswith("module."):
            name = name.removeprefix("module.")
            wrapped.add("module.")
        while name.startswith(_TWICE):
            name = name.removeprefix(_PREFIX)
            wrapped.add(_PREFIX)
        wrapped |= set(_WRAPPERS.findall(key))
        if name in plain:
            raise AdapterError(f"{folder}: {key} is a second {name}; save one adapter a folder")
        plain[name] = tensor
    note = f"saved from a wrapped model: {', '.join(sorted(wrapped))} left out of the names of its tensors"
    return plain, (note,) if wrapped else ()


def pairs_of(folder: Path, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterError(
                f"{folder}: {_name_of_unsupported(key)} ({key}); only LoRA on linear layers can be merged"
            )
        if tensor.ndim == 1 and tensor.numel() == 0:
            raise AdapterError(
                f"{folder}: {key} is empty, shape (0,): DeepSpeed ZeRO-3 keeps weights in shards, and they were saved without being gathered. "
                "Save again with stage3_gather_16bit_weights_on_model_save, or make the weights of a checkpoint with zero_to_fp32.py"
            )
        if tensor.ndim == 3:
            raise AdapterError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}: LoRA on experts that are kept as one parameter is not supported; only LoRA on "
                "linear layers can be merged"
            )
        if tensor.ndim != 2:
            raise AdapterError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}: LoRA on convolutions is not supported"
            )
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{folder}: {key} is {tensor.dtype}; expected float32, bfloat16, float16 or float64: convert it"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {key} holds values that are not finite")
        sides = pairs.setdefault(match["module"], {})
        if match["side"] in sides:
            raise AdapterError(
                f"{folder}: {key} is a second lora_{match['side']} of {match['module']}; save one adapter a folder"
            )
        sides[match["side"]] = tensor
    if not pairs:
        raise AdapterError(f"{folder}: {WEIGHTS} holds no LoRA weights")
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise AdapterError(f"{folder}: {module} has lora_{next(iter(pair))} but not its partner; save it again")
    return pairs


def _name_of_unsupported(key: str) -> str:
    names = {
        "lora_embedding": "LoRA on an embedding",
        "magnitude": "a DoRA magnitude",
        "bias": "a bias",
        "lora_down": "an adapter in the format of kohya or diffusers: convert it to PEFT's",
        "lora_up": "an adapter in the format of kohya or diffusers: convert it to PEFT's",
        "lora_a": "an adapter of another library (MLX, torchtune): export it to PEFT's format",
        "lora_b": "an adapter of another library (MLX, torchtune): export it to PEFT's format",
        "modules_to_save": "a fully trained module (modules_to_save)",
        "original_module": "a fully trained module (modules_to_save)",
    }
    return next((name for part, name in names.items() if part in key), "a tensor that is not a LoRA factor")


def scaling_of(folder: Path, config: dict[str, Any], module: str, A: Tensor, B: Tensor) -> float:
    rank = _pattern(folder, config, "rank_pattern", module, config.get("r"))
    alpha = _pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    if A.shape[0] != rank or B.shape[1] != rank:
        turned = A.shape[1] == B.shape[0] == rank
        cause = (
            ": they are transposed, as other libraries (MLX) keep them; convert the adapter to PEFT's form"
            if turned
            else ""
        )
        raise AdapterError(
            f"{folder}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, but {CONFIG} gives rank {rank}{cause}"
        )
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise AdapterError(f"{folder}: expected true or false in use_rslora, got {rslora!r}")
    scaling = float(alpha) / (math.sqrt(rank) if rslora else rank)
    if scaling > torch.finfo(torch.float32).max:
        raise AdapterError(f"{folder}: lora_alpha {alpha!r} of {module} is beyond float32")
    return scaling


def _pattern(folder: Path, config: dict[str, Any], key: str, module: str, default: Any) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name at a dot, else the default."""
    value, patterns = default, config.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{folder}: expected a mapping of module names in {key}, got {patterns!r}")
    for pattern, candidate in patterns.items():
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise AdapterError(
                f"{folder}: {key} holds {pattern!r}, which could take forever to match: name the modules"
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(f"{folder}: {key} holds {pattern!r}, which is not a regular expression") from error
        if found:
            value = candidate
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise AdapterError(f"{folder}: expected a positive number for {module} in r/lora_alpha/{key}, got {value!r}")
    return value
