"""Train the tiny target: the flagship's architecture (qwen3_5_moe text model) at about 9M parameters.

    python -m models.build.target --out models/tiny/target --work build/target

Resumable: a checkpoint with optimizer state lies in --work and is picked up again by the same command.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from models.build import corpus
from models.build import tokenizer as tokens

SEQUENCE, BATCH = 512, 6
STEPS, WARM_UP, PEAK_RATE = 2600, 60, 2.5e-3
CHAT_SHARE = 0.12
SEED = 20261124


def config(tokenizer: Tokenizer) -> Qwen3_5MoeTextConfig:
    return Qwen3_5MoeTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=224,
        shared_expert_intermediate_size=256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(tokens.IM_END),
        pad_token_id=tokenizer.token_to_id(tokens.END_OF_TEXT),
    )


def encode(tokenizer: Tokenizer, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token streams (files, chats) of one side of the split, each document ended by end-of-text."""
    end: list[int] = [tokenizer.token_to_id(tokens.END_OF_TEXT)]  # type: ignore[list-item]
    streams = []
    for documents in (corpus.texts(held_out), [tokens.render_chat(*pair) for pair in corpus.chats(held_out)]):
        random.Random(SEED).shuffle(documents)
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(documents):
            ids += encoding.ids + end
        streams.append(torch.tensor(ids))
    return streams[0], streams[1]


class Windows:
    """Random windows without replacement: every epoch cuts the stream at a new offset and shuffles the pieces."""

    def __init__(self, stream: torch.Tensor, generator: torch.Generator):
        self.stream, self.generator = stream, generator
        self.order: list[int] = []

    def next(self) -> torch.Tensor:
        if not self.order:
            offset = int(torch.randint(0, SEQUENCE, (1,), generator=self.generator))
            starts = torch.arange(offset, len(self.stream) - SEQUENCE, SEQUENCE)
            self.order = starts[torch.randperm(len(starts), generator=self.generator)].tolist()
        start = self.order.pop()
        return self.stream[start : start + SEQUENCE]


def learning_rate(step: int) -> float:
    """Warm-up, constant, then linear decay to nothing over the last 40% of the steps."""
    decay_from = int(STEPS * 0.6)
    if step < decay_from:
        return PEAK_RATE * min(1.0, (step + 1) / WARM_UP)
    return PEAK_RATE * max(0.01, (STEPS - step) / (STEPS - decay_from))


@torch.no_grad()
def held_out_loss(model: Qwen3_5MoeForCausalLM, stream: torch.Tensor, windows: int = 24) -> float:
    model.eval()
    starts = torch.linspace(0, len(stream) - SEQUENCE - 1, windows).long().tolist()
    total = 0.0
    for start in starts:
        ids = stream[start : start + SEQUENCE][None]
        logits = model(ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    model.train()
    return total / windows


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train(out: Path, work: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    files, dialogues = encode(tokenizer, held_out=False)
    held, _ = encode(tokenizer, held_out=True)
    generator = torch.Generator().manual_seed(SEED)
    model = Qwen3_5MoeForCausalLM(config(tokenizer))
    optimizer = optimizer_for(model)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "log": []}
    checkpoint = work / "checkpoint.pt"
    work.mkdir(parents=True, exist_ok=True)
    sources = Windows(files, generator), Windows(dialogues, generator)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        for source, order in zip(sources, saved["orders"], strict=True):
            source.order = order
        state = saved["state"]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(files)} + {len(dialogues)} tokens",
        flush=True,
    )
    began = time.monotonic() - state["seconds"]
    for step in range(state["step"], STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        chat = torch.rand(BATCH, generator=generator) < CHAT_SHARE
        ids = torch.stack([sources[int(is_chat)].next() for is_chat in chat])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == STEPS:
            seconds = time.monotonic() - began
            entry = {
                "step": step + 1,
                "train_loss": loss.item(),
                "held_out_loss": held_out_loss(model, held),
                "seconds": seconds,
            }
            state = {"step": step + 1, "seconds": seconds, "log": [*state["log"], entry]}
            print(json.dumps(entry), flush=True)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "orders": [source.order for source in sources],
                    "state": state,
                },
                checkpoint.with_suffix(".new"),
            )
            checkpoint.with_suffix(".new").replace(checkpoint)
            export(model, out)
    (work / "log.json").write_text(
        json.dumps({"steps": STEPS, "tokens": STEPS * BATCH * SEQUENCE, "log": state["log"]}, indent=1)
    )


def export(model: Qwen3_5MoeForCausalLM, out: Path) -> None:
    """Write the weights in bf16 and the config without the training-only router outputs."""
    served: Any = Qwen3_5MoeForCausalLM(model.config)
    served.to(torch.bfloat16)
    served.load_state_dict(model.state_dict())
    served.config.output_router_logits = False
    served.save_pretrained(out)
    model.config.output_router_logits = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("models/tiny/target"), help="holds tokenizer.json; gets the weights"
    )
    parser.add_argument("--work", type=Path, default=Path("build/target"), help="checkpoint and log")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    train(arguments.out, arguments.work, arguments.threads)


if __name__ == "__main__":
    main()
