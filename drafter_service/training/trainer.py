"""The DFlash trainer: any transformers target, the published recipe, resumable, with curves."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafter_service.model import DFlashModel
from drafter_service.training.objective import block_hidden, block_loss, sample_blocks, teacher_rows
from drafter_service.training.sequences import TrainingSequence
from drafter_service.training.target import TrainingTarget
from modeling.dflash import DFlashConfig


@dataclass(frozen=True)
class DraftShape:
    """What the draft model looks like; the rest of its dimensions are the target's."""

    layers: int = 5
    block_size: int = 16
    taps: tuple[int, ...] = ()
    mask_token_id: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    sliding_window: int | None = None


@dataclass(frozen=True)
class Recipe:
    """steps of `batch` sequences with `anchors` blocks each. learning_rate: peak of a cosine with `warm_up` share.

    optimizer "muon": orthogonalised momentum for matrices (AdamW for vectors), about twice as far a step on small
    drafters. distill: half of the loss against the target's distribution. block_rows: rows of a block in training,
    0 = the block size; a first run with few rows learns the next token cheaply.

    Defaults are the published ones (arXiv 2602.06036) but for the batch, which depends on the machine.
    """

    steps: int = 3000
    batch: int = 8
    anchors: int = 512
    max_length: int = 3072
    learning_rate: float = 6e-4
    optimizer: str = "adamw"
    distill: bool = False
    block_rows: int = 0
    warm_up: float = 0.04
    clip: float = 1.0
    loss: str = "dpace"
    gamma: float = 7.0
    alpha: float = 0.5
    seed: int = 0
    hold_out: int = 64
    evaluate_every: int = 200


@dataclass(frozen=True)
class Progress:
    """One evaluated point of the curves: mean loss and tau since the last point, and on held-out sequences."""

    step: int
    seconds: float
    loss: float
    tau: float
    held_out_loss: float
    held_out_tau: float


def new_config(target: TrainingTarget, shape: DraftShape) -> DFlashConfig:
    """config.json of a fresh drafter for this target, in the published format."""
    config = target.config
    heads = shape.heads or config.num_attention_heads
    window = shape.sliding_window
    kind = "sliding_attention" if window else "full_attention"
    raw: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": shape.block_size,
        "dflash_config": {"mask_token_id": shape.mask_token_id, "target_layer_ids": list(shape.taps)},
        "head_dim": shape.head_dim or getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": shape.intermediate or 3 * config.hidden_size,
        "layer_types": [kind] * shape.layers,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads or config.num_key_value_heads,
        "num_target_layers": config.num_hidden_layers,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    if window:
        raw |= {"sliding_window": window, "use_sliding_window": True, "is_causal": False}
    return DFlashConfig.from_dict(raw, Path("."))


class Trainer:
    """Holds the drafter, its optimizer and the place in the schedule. `run` may be interrupted and run again."""

    def __init__(
        self,
        target: TrainingTarget,
        config: DFlashConfig,
        recipe: Recipe,
        out: Path,
        init: Path | None = None,
    ):
        """`init`: a drafter of the same configuration whose weights to start from. `out` wins where it can resume.

        Raises ValueError for a DFlash 2 configuration: its selector learns from another objective than this one.
        """
        if config.v2 is not None:
            raise ValueError(
                f"{config.directory} is a DFlash 2 drafter: training makes and continues DFlash drafters of the first "
                "version only. Leave out --init, or start from one of those"
            )
        self.target, self.config, self.recipe, self.out = target, config, recipe, out
        torch.manual_seed(recipe.seed)
        self.model = DFlashModel(config).to(target.device)
        for name, parameter in self.model.named_parameters():  # the residual branches start small
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
        if init is not None:
            self.model.load_state_dict(DFlashModel.load(init, torch.float32, target.device).state_dict())
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizers = optimizers(recipe, matrices, vectors)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step, self.seconds, self.order = 0, 0.0, list[int]()
        self.curve: list[Progress] = []
        self._resume()

    def run(self, sequences: Sequence[TrainingSequence], on_step: Callable[[int, float, float], None]) -> None:
        """Train to the recipe's last step; `on_step(step, loss, tau)` after each. Writes checkpoints and drafter."""
        usable = [s for s in sequences if len(s.ids) > max(s.answer_start, 1)]
        if len(usable) <= self.recipe.hold_out:
            raise ValueError(
                f"--data gives {len(usable)} sequences with an answer, but {self.recipe.hold_out} are held out: "
                "give more, or lower --hold-out"
            )
        held, train = usable[: self.recipe.hold_out], usable[self.recipe.hold_out :]
        began, seen = time.monotonic() - self.seconds, list[tuple[float, float]]()
        while self.step < self.recipe.steps:
            loss, tau = self._train_step([train[i] for i in self._next_batch(len(train))])
            self.step += 1
            seen.append((loss, tau))
            on_step(self.step, loss, tau)
            if self.step % self.recipe.evaluate_every == 0 or self.step == self.recipe.steps:
                self.seconds = time.monotonic() - began
                held_loss, held_tau = self.evaluate(held)
                mean_loss, mean_tau = (sum(values) / len(seen) for values in zip(*seen))
                self.curve.append(Progress(self.step, self.seconds, mean_loss, mean_tau, held_loss, held_tau))
                seen.clear()
                self._save()
        self.export()

    @torch.no_grad()
    def evaluate(self, sequences: Sequence[TrainingSequence]) -> tuple[float, float]:
        """(loss, tau) over random anchors of held-out sequences, the same anchors every time."""
        generator = torch.Generator().manual_seed(1)
        totals = [0.0, 0.0]
        batches = [sequences[i : i + self.recipe.batch] for i in range(0, len(sequences), self.recipe.batch)]
        for batch in batches:
            for i, value in enumerate(self._forward(batch, generator)):
                totals[i] += value.item() / len(batches)
        return totals[0], totals[1]

    def export(self) -> None:
        """Write the drafter in the published checkpoint format (bf16)."""
        self.out.mkdir(parents=True, exist_ok=True)
        weights = {
            name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in self.model.state_dict().items()
        }
        save_file(weights, self.out / "model.safetensors", metadata={"format": "pt"})
        (self.out / "config.json").write_text(json.dumps(self.config.raw | {"dtype": "bfloat16"}, indent=2) + "\n")

    def _train_step(self, batch: Sequence[TrainingSequence]) -> tuple[float, float]:
        rate = learning_rate(self.step, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss, tau = self._forward(batch, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), tau.item()

    def _forward(self, batch: Sequence[TrainingSequence], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        recipe, device = self.recipe, self.target.device
        ids, lengths, starts = collate(batch, recipe.max_length)
        rows = recipe.block_rows or self.config.block_size
        blocks = sample_blocks(ids, lengths, starts, recipe.anchors, rows, generator)
        taps, final = self.target.observe(ids.to(device), self.config.target_layer_ids)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16), warnings.catch_warnings():
            # Norm weights stay fp32 beside bf16 rows on purpose; torch remarks that this takes its unfused path.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            hidden = block_hidden(self.model, self.target.embedding, taps.float(), ids, lengths, blocks.anchors, rows)
            logits = self.target.head(hidden)
            with torch.no_grad():
                teacher = self.target.head(teacher_rows(final, blocks)) if recipe.distill else None
        return block_loss(logits, blocks, recipe.loss, recipe.gamma, recipe.alpha, teacher)

    def _next_batch(self, count: int) -> list[int]:
        while len(self.order) < self.recipe.batch:
            self.order += torch.randperm(count, generator=self.generator).tolist()
        batch, self.order = self.order[: self.recipe.batch], self.order[self.recipe.batch :]
        return batch

    @property
    def checkpoint(self) -> Path:
        return self.out / "training.pt"

    def _save(self) -> None:
        self.export()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "place": {"step": self.step, "seconds": self.seconds, "order": self.order},
            "curve": [asdict(point) for point in self.curve],
            "config": self.config.raw,
        }
        fresh = self.checkpoint.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)
        (self.out / "curve.json").write_text(json.dumps(state["curve"], indent=1) + "\n")

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if state["config"] != self.config.raw:
            raise ValueError(
                f"{self.checkpoint} was trained with another draft model configuration: "
                "give the same options, or another --out"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.order = (state["place"][key] for key in ("step", "seconds", "order"))
        self.curve = [Progress(**point) for point in state["curve"]]


def optimizers(recipe: Recipe, matrices: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[torch.optim.Optimizer]:
    """The recipe's optimizer for matrices, AdamW without decay for vectors. Raises ValueError for an unknown one."""
    betas = (0.9, 0.95)
    rest = torch.optim.AdamW(vectors, lr=recipe.learning_rate, betas=betas, weight_decay=0.0)
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(matrices, lr=recipe.learning_rate, betas=betas, weight_decay=0.01), rest]
    if recipe.optimizer == "muon":
        rate = recipe.learning_rate
        return [torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), rest]
    raise ValueError(f"optimizer {recipe.optimizer!r} is unknown: use 'adamw' or 'muon'")


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = max(1, int(recipe.steps * recipe.warm_up))
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, recipe.steps - warm_up)))


def collate(batch: Sequence[TrainingSequence], max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, T] right-padded with 0, lengths [N], answer starts [N]); sequences over max_length are cut."""
    lengths = torch.tensor([min(len(sequence.ids), max_length) for sequence in batch])
    ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(batch):
        ids[row, : lengths[row]] = torch.tensor(sequence.ids[: lengths[row]])
    return ids, lengths, torch.tensor([max(sequence.answer_start, 1) for sequence in batch])
