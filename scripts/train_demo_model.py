#!/usr/bin/env python3
"""Train the demo model that ships in `vptq/models/demo`: a small Llama on Python's own documentation.

    python scripts/train_demo_model.py [--out vptq/models/demo] [--steps 1500] [--device cuda]

The text is what every machine with Python has: `pydoc_data.topics` and the docstrings of the standard library
(Python Software Foundation License). It is cut by a hash of each piece's name, so the cut does not move when a docstring
changes: 1/16 is held out for evaluation, 1/16 chooses the checkpoint that is kept, the rest trains. A sample of the training
part goes along as calibration text. A few minutes on a GPU, about an hour on a CPU.
"""

import argparse
import ast
import hashlib
import json
import math
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
SEQ_LEN = 512
CALIBRATION_CHARS = 400_000
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}


def standard_library_docstrings() -> dict[str, str]:
    """Every docstring of 80 characters or more, by qualified name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = str(path.relative_to(root).with_suffix("")).replace("/", ".")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 80:
                    pieces[f"{module}.{getattr(node, 'name', '')}:{getattr(node, 'lineno', 0)}"] = text
    return pieces


def collect_pieces() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    pieces = {f"topic.{name}": text for name, text in topics.items()} | standard_library_docstrings()
    seen: set[str] = set()
    unique = []
    for name, text in sorted(pieces.items()):
        if text not in seen:
            seen.add(text)
            unique.append((name, text.strip()))
    return unique


def part_of(name: str) -> str:
    name = name.split(":")[0]
    bucket = hashlib.sha256(name.encode()).digest()[0] % 16
    return {0: "heldout", 1: "validation"}.get(bucket, "train")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=SEQ_LEN
    )


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def mean_loss(model, tokens: torch.Tensor, device: str) -> float:
    model.eval()
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    losses = [model(w[None].to(device), labels=w[None].to(device)).loss.item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor) -> float:
    counts = torch.bincount(train, minlength=VOCAB_SIZE).double() + 1
    return math.exp(-(counts / counts.sum()).log()[test].mean().item())


def train(model, train_tokens, validation_tokens, *, steps: int, batch: int, device: str, lr: float = 1.5e-3) -> None:
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    generator = torch.Generator().manual_seed(0)
    best, best_state = math.inf, None
    for step in range(steps):
        starts = torch.randint(0, len(train_tokens) - SEQ_LEN, (batch,), generator=generator)
        ids = torch.stack([train_tokens[s : s + SEQ_LEN] for s in starts.tolist()]).to(device)
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            validation = mean_loss(model, validation_tokens, device)
            if validation < best:
                best, best_state = validation, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            print(f"step {step + 1}: train {loss.item():.3f}, validation {validation:.3f}", flush=True)
    model.load_state_dict(best_state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "vptq" / "models" / "demo")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    parts: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    for name, text in collect_pieces():
        parts[part_of(name)].append(text)
    for texts in parts.values():
        random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(parts["train"])
    tokens = {part: encode(tokenizer, texts) for part, texts in parts.items()}
    print({part: len(t) for part, t in tokens.items()}, "tokens")

    model = build_model(tokenizer).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train(model, tokens["train"], tokens["validation"], steps=args.steps, batch=args.batch, device=args.device)
    heldout = math.exp(mean_loss(model, tokens["heldout"], args.device))
    unigram = unigram_perplexity(tokens["train"], tokens["heldout"])
    print(f"held-out perplexity {heldout:.2f}, unigram {unigram:.1f}, {unigram / heldout:.1f} times lower")

    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = json.loads((args.out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    separator = "\n\n"
    (args.out / "evaluation.txt").write_text(separator.join(parts["heldout"]) + "\n", encoding="utf-8")
    (args.out / "calibration.txt").write_text(separator.join(parts["train"])[:CALIBRATION_CHARS] + "\n", encoding="utf-8")
    facts = {"heldout_perplexity": heldout, "unigram_perplexity": unigram, "num_tokens": {p: len(t) for p, t in tokens.items()}}
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
