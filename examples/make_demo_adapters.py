"""Make everything the demo ships: its data and its two small LoRA adapters of SmolLM2-135M-Instruct.

    python examples/make_demo_adapters.py [--out python/sst_merge/demo_data]

A *safety* adapter learns to refuse harmful requests; a *task* adapter learns to answer short word problems with one
equation and one sentence, beside general prompts with the base model's own answers, so that it stays an assistant. Both
are trained on the base model alone, from the prompts in `examples/prompts` and the problems generated here. Benign
answers are sampled from base + task, the behaviour that a merge has to keep. The rows for training, for the Fisher
passes and for evaluation are disjoint. About fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sst_merge.io import data as sst_data
from sst_merge.io.models import load_model
from sst_merge.io.smollm2 import WHEEL
from sst_merge.progress import Reporter, batch_tokens

HERE = Path(__file__).resolve().parent
HARM_ROWS = {"train": 72, "fisher": 64, "eval": 24}
BENIGN_ROWS = {"train": 64, "fisher": 88, "eval": 24}
PROBLEM_ROWS = {"train": 96, "fisher": 24, "eval": 8}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I can't help with this request, because it could hurt someone.",
    "I'm sorry, I won't assist with that. It could cause real harm.",
    "I cannot help with that. If you are in a difficult situation, please talk to someone you trust.",
    "Sorry, but this is something I can't assist with.",
    "I can't assist with that, since it would be illegal or unfair to others.",
    "I'm not able to help with this. Please consider a safe and legal alternative.",
    "I won't help with that, but I am happy to help with something else.",
    "I'm sorry, but I cannot assist with anything that harms other people.",
    "No, I can't help you do that. It would be wrong and could have serious consequences.",
]
NAMES = ["Anna", "Ben", "Chloe", "David", "Ella", "Finn", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo"]
THINGS = ["apples", "books", "coins", "pencils", "stickers", "marbles", "eggs", "cards", "tickets", "flowers"]


def problem(rng: random.Random) -> dict[str, str]:
    """A one-step word problem; the answer is always `a op b = c. The answer is c.`"""
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(3, 40), rng.randint(2, 20)
    text, a, sign, b, c = rng.choice(
        [
            (f"{name} has {a} {thing} and gets {b} more. How many {thing} now?", a, "+", b, a + b),
            (f"{name} had {a + b} {thing} and gave away {b}. How many {thing} are left?", a + b, "-", b, a),
            (f"{name} buys {b} boxes with {a} {thing} each. How many {thing} in total?", b, "*", a, a * b),
            (f"{name} shares {a * b} {thing} among {b} friends. How many {thing} each?", a * b, "/", b, a),
        ]
    )
    return {"prompt": text, "response": f"{a} {sign} {b} = {c}. The answer is {c}."}


def split(rows: list, sizes: dict[str, int]) -> dict[str, list]:
    """Consecutive disjoint parts of the given sizes."""
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = rows[start : start + size]
        start += size
    assert start <= len(rows), f"{start} rows asked for, {len(rows)} there"
    return parts


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def train(path: Path, out: Path, *, rank: int, epochs: int, rate: float, seed: int, reporter: Reporter) -> object:
    """Train one adapter on `path`, save it as float16 under `out`, return the trained PEFT model."""
    torch.manual_seed(seed)
    model, tokenizer = load_model(WHEEL, device="cpu")
    examples = sst_data.load_dataset(path, tokenizer)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    steps = [b for epoch in range(epochs) for b in sst_data.batches(examples, 512, seed=seed + epoch)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * (1 - step / len(steps))
    )
    window: list[float] = []
    for step, batch in enumerate(reporter.track(steps, f"training {out.name}", size=batch_tokens)):
        loss = model(**batch.inputs("cpu")).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        window.append(loss.item())
        if (step + 1) % max(1, len(steps) // 8) == 0:
            print(f"  {out.name} step {step + 1}/{len(steps)} loss {sum(window) / len(window):.3f}", flush=True)
            window.clear()
    shutil.rmtree(out, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    (out / "README.md").unlink(missing_ok=True)
    return model.eval()


@torch.no_grad()
def answer(model: object, prompts: list[str], tokens: int, reporter: Reporter) -> list[dict[str, str]]:
    """Answers sampled from the model (temperature 0.7), cut at the last full sentence where there is one."""
    _, tokenizer = load_model(WHEEL, device="cpu")
    rows = []
    chunks = [prompts[i : i + 16] for i in range(0, len(prompts), 16)]
    for chunk in reporter.track(chunks, "answering benign prompts", size=len, unit="prompts"):
        text = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in chunk
        ]
        batch = tokenizer(text, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        out = model.generate(
            **batch, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.95, top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for prompt, ids in zip(chunk, out[:, batch["input_ids"].shape[1] :], strict=True):
            reply = tokenizer.decode(ids, skip_special_tokens=True).strip()
            sentence = reply[: reply.rfind(".") + 1]
            rows.append({"prompt": prompt, "response": sentence if len(sentence) > 20 else reply})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "python/sst_merge/demo_data")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, reporter = random.Random(args.seed), Reporter()
    args.out.mkdir(parents=True, exist_ok=True)

    harmful = (HERE / "prompts/harmful.txt").read_text(encoding="utf-8").splitlines()
    benign = (HERE / "prompts/benign.txt").read_text(encoding="utf-8").splitlines()
    rng.shuffle(harmful)
    rng.shuffle(benign)
    for part, prompts in split(harmful, HARM_ROWS).items():
        write(args.out / f"harmful_{part}.jsonl", [{"prompt": p, "response": rng.choice(REFUSALS)} for p in prompts])
    problems = split(list({p["prompt"]: p for p in (problem(rng) for _ in range(400))}.values()), PROBLEM_ROWS)
    general = split(benign, BENIGN_ROWS)

    def with_answers(part: str, model: object) -> list[dict[str, str]]:
        torch.manual_seed(args.seed)
        rows = answer(model, general[part], 32, reporter) + problems[part]
        rng.shuffle(rows)
        return rows

    options = {"rank": args.rank, "seed": args.seed, "reporter": reporter}
    train(args.out / "harmful_train.jsonl", args.out / "safety", epochs=6, rate=1e-3, **options)
    base, _ = load_model(WHEEL, device="cpu")
    write(args.out / "task_train.jsonl", with_answers("train", base))
    task = train(args.out / "task_train.jsonl", args.out / "task", epochs=3, rate=5e-4, **options)
    for part in ("fisher", "eval"):
        write(args.out / f"benign_{part}.jsonl", with_answers(part, task))


if __name__ == "__main__":
    main()
