"""Is SST-Merge better than plain addition, at equal refusal, on a real model? The study behind docs/quality.md.

    python bench/quality_study.py --model FOLDER --data ../shared/data --out DIR [--device cuda] [--minutes 8]
                                  [--stages plain,main,…] [--pairs gsm8k+refuse,…] [--limit N] [--tiny]

Trains the adapters (seeded), collects Fishers, and measures every configuration on held-out prompts; a row of DIR/quality.csv
is written as soon as it is known, and a killed run continues where it stopped. Strengths are KL budgets that the library's own
held-out predictions keep; every reported number is from the `final` split. Confidence intervals are 95 % bootstraps over
prompts, drawn for harmful and benign ones together, of the configuration and the plain curve alike.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from quality_data import SIZES, Row, batches, collate, read_prompts, refusals, tokenize
from quality_lab import Lab
from quality_runner import OutOfTime, Study
from quality_stages import SHORT, STAGES
from torch import Tensor

PAIRS = ("gsm8k+refuse", "gsm8k+mixed", "instruct+refuse", "instruct+mixed")
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EPOCHS = {
    "full": {"gsm8k": 2, "instruct": 3, "refuse": 5, "mixed": 4},
    "cpu": {"gsm8k": 1, "instruct": 2, "refuse": 12, "mixed": 6},
}


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The base model (or, with --tiny, a random one of two small layers) and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.tiny:
        config = AutoConfig.from_pretrained(args.model, local_files_only=True)
        for name, value in {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}.items():  # fmt: skip
            setattr(config, name, value)
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.dtype), local_files_only=True
        )
    return model.to(args.device).eval().requires_grad_(False), tokenizer


def with_adapters(model: Any, tokenizer: Any, splits: dict, names: Sequence[str], args: argparse.Namespace) -> Any:
    """A PeftModel with the named adapters, trained or read from --out/adapters."""
    from peft import LoraConfig, PeftModel, get_peft_model

    for name in names:
        folder = args.out / "adapters" / name
        if (folder / "adapter_config.json").exists():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, name)
            continue
        torch.manual_seed(args.seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGET_MODULES, lora_dropout=0.0, task_type="CAUSAL_LM")
        rows = training_rows(model, tokenizer, splits, name, args)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        model.base_model.set_adapter(name)
        train(model, tokenizer, rows, name, args)
        model.save_pretrained(args.out / "adapters", selected_adapters=[name])
    return model.eval()


def training_rows(model: Any, tokenizer: Any, splits: dict, name: str, args: argparse.Namespace) -> list[Row]:
    """gsm8k, instruct: the data's answers. refuse: refusals. mixed: refusals, and benign prompts with the base model's answers."""
    if name == "gsm8k":
        return tokenize(splits["gsm8k"]["adapter"], tokenizer, "gsm8k")
    if name == "instruct":
        return tokenize(splits["self_instruct"]["adapter"], tokenizer, "self_instruct")
    rows = tokenize(refusals(splits["advbench"]["adapter"]), tokenizer, "advbench")
    if name == "mixed":
        benign = tokenize(splits["self_instruct"]["adapter"], tokenizer, "self_instruct")
        benign += tokenize(splits["gsm8k"]["adapter"][:64], tokenizer, "gsm8k")
        rows += base_answers(model, tokenizer, benign, args)
    return rows


def base_answers(model: Any, tokenizer: Any, rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """Greedy answers of the bare base model."""
    from contextlib import nullcontext

    from quality_data import continued

    lab = object.__new__(Lab)
    lab.model, lab.tokenizer, lab.device, lab.sites = model, tokenizer, next(model.parameters()).device, []
    lab.activate, lab.task, lab.safety = (lambda *names: None), "", ""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        answers = lab.generate([r.tokens[: r.prompt_tokens] for r in rows])
    return continued(rows, answers, tokenizer)


def train(model: Any, tokenizer: Any, rows: list[Row], name: str, args: argparse.Namespace) -> None:
    """AdamW on the answers, batches of 16, cosine schedule; only the active adapter moves."""
    start, device = time.monotonic(), next(model.parameters()).device
    parameters = [p for n, p in model.named_parameters() if f".{name}." in n]
    for p in parameters:
        p.requires_grad_(True)
    generator = torch.Generator().manual_seed(args.seed)
    steps = max(1, math.ceil(len(rows) / 16)) * EPOCHS[args.scale][name]
    steps = max(steps, 20)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1, pct_start=0.1)
    losses: list[Tensor] = []
    while len(losses) < steps:
        for chosen in torch.randperm(len(rows), generator=generator).split(16)[: steps - len(losses)]:
            picked = [rows[i] for i in chosen.tolist()]
            optimizer.zero_grad()
            total = sum(r.labels for r in picked)
            loss = torch.zeros((), device=device)
            for index in batches(picked, args.tokens):
                part = [picked[i] for i in index]
                share = sum(r.labels for r in part) / total
                piece = model(**collate(part, tokenizer.pad_token_id or 0, device)).loss * share
                piece.backward()
                loss += piece.detach()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss)
    values = torch.stack(losses).tolist()
    for p in parameters:
        p.requires_grad_(False)
    print(f"trained {name}: {len(rows)} rows, {steps} steps, loss {values[0]:.3f} -> {sum(values[-8:]) / len(values[-8:]):.3f}, {time.monotonic() - start:.1f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct, or a like model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before the next measurement after this long")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument(
        "--stages", default=",".join(STAGES), help=f"of the first pair; the others run {','.join(SHORT)}"
    )
    parser.add_argument("--lr", type=float, default=5e-4, help="of the adapters' training")
    parser.add_argument("--prompts", type=int, default=240, help="benign Fisher prompts")
    parser.add_argument("--draws", type=int, default=2, help="gradient rows per benign prompt")
    parser.add_argument("--tokens", type=int, help="padded tokens per batch (default 16384 on CUDA, 1024 elsewhere)")
    parser.add_argument("--scale", choices=tuple(SIZES), default="full", help="how many rows and epochs")
    parser.add_argument("--limit", type=int, help="keep this many rows of every split (smoke test)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model with this folder's tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.tokens = args.tokens or (16384 if args.device.startswith("cuda") else 1024)
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.filterwarnings("ignore", message=".*generation flags.*")

    splits = read_prompts(args.data, scale=args.scale, limit=args.limit, seed=args.seed)
    model, tokenizer = load(args)
    pairs = args.pairs.split(",")
    stages = args.stages.split(",")
    try:
        for number, pair in enumerate(pairs):
            task, safety = pair.split("+")
            model = with_adapters(model, tokenizer, splits, [n for n in (task, safety) if not _has(model, n)], args)
            lab = Lab(model, tokenizer, task, safety, tokens=args.tokens, seed=args.seed)
            study = Study(args, lab, splits, pair, deadline)
            for stage in stages if number == 0 else [s for s in stages if s in SHORT]:
                study.say(f"stage {stage}, {(deadline - time.monotonic()) / 60:.1f} min left")
                STAGES[stage](study)
        print("complete", flush=True)
    except OutOfTime:
        print(f"stopped after {args.minutes} min; run again with the same --out to continue", flush=True)


def _has(model: Any, adapter: str) -> bool:
    return adapter in getattr(model, "peft_config", {})


if __name__ == "__main__":
    main()
