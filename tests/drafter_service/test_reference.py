"""The published implementation (PyPI `dflash`) and ours: same hidden states, same accepted lengths."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.link.local import LocalLink
from cluster.link.messages import DraftAsk, Piece
from drafter_service.engine import DrafterEngine
from drafter_service.model import DFlashModel, block_masks
from drafter_service.training.objective import block_hidden, block_loss, sample_blocks
from modeling.dflash import DFlashConfig, FeatureFuser, read_weights
from tests.drafter_service.pairs import (
    BLOCK,
    FULL,
    HIDDEN,
    SLIDING,
    TAPS,
    second,
    settings_for,
    write_checkpoint,
    write_drafter,
    write_target,
)
from tests.drafter_service.test_model import KINDS

reference: Any = pytest.importorskip("dflash.model")

VOCABULARY, NEW_TOKENS = 16, 40
PROMPTS = [[5, 9, 2, 7, 7, 1], [3], [11, 12, 13, 14, 15, 4, 8, 8, 2, 10, 6]]


def published(drafter: Path) -> Any:
    architecture = DFlashConfig.load(drafter).raw["architectures"][0]
    return getattr(reference, architecture).from_pretrained(drafter, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_published_model_has_the_same_hidden_states(tmp_path: Path, kind: str) -> None:
    drafter = write_drafter(tmp_path, **KINDS[kind])
    torch.manual_seed(1)
    taps, embeddings = torch.randn(1, 13, len(TAPS) * HIDDEN), torch.randn(1, BLOCK, HIDDEN)
    theirs = published(drafter)(
        position_ids=torch.arange(13 + BLOCK)[None], noise_embedding=embeddings, target_hidden=taps
    )
    model = DFlashModel.load(drafter, torch.float32)
    positions, bases = torch.arange(13, 13 + BLOCK)[None], torch.full((1, BLOCK), 13)
    context_positions = torch.arange(13)[None]
    masks = block_masks(model.dflash, positions, bases, context_positions)
    context = model.context_kv(model.features(taps), context_positions)
    ours = model(embeddings, positions, context, masks, positions - bases)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import Qwen3ForCausalLM

    directory = write_target(tmp_path_factory.mktemp("target") / "target", seed=4, vocab_size=VOCABULARY)
    return directory, Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def taps_and_logits(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    output = model(ids, output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[i + 1] for i in TAPS], dim=-1), output.logits


def trained_drafter(directory: Path, target: Any, steps: int, **changes: Any) -> Path:
    """A drafter that has seen enough of the target's own text to be right now and then."""
    write_drafter(directory, scale=0.1, vocab_size=VOCABULARY, **changes)
    model = DFlashModel.load(directory, torch.float32).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, VOCABULARY, (8, 4), generator=generator)
    ids = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    taps, lengths = taps_and_logits(target, ids)[0].detach(), torch.full((8,), ids.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        blocks = sample_blocks(ids, lengths, torch.full((8,), 4), 8, BLOCK, generator)
        hidden = block_hidden(model, target.get_input_embeddings(), taps, ids, lengths, blocks.anchors)
        loss, _ = block_loss(target.lm_head(hidden), blocks, "decay", 7.0, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    codebooks = {name for name in model.state_dict() if name.endswith("_codebook")}  # not trained, but to be heard
    weights = {n: tensor.detach() * (6 if n in codebooks else 1) for n, tensor in model.state_dict().items()}
    return write_checkpoint(directory, model.dflash.raw, weights)


@torch.no_grad()
def our_steps(
    drafter: Path, target_dir: Path, target: Any, prompt: list[int]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Of each step of a greedy loop whose drafts come from our engine: tokens produced, drafts."""
    engine = DrafterEngine(settings_for(target_dir, drafter), threaded=False)
    fuser = FeatureFuser.load(drafter)
    link = LocalLink(engine, **engine.identity)
    ids, end = list(prompt), len(prompt) + NEW_TOKENS
    lengths: list[int] = []
    drafted: list[tuple[int, ...]] = []
    taps, logits = taps_and_logits(target, torch.tensor([ids]))
    rows = fuser(taps[0])
    link.append([Piece("c", 0, len(rows))], rows)
    ids.append(int(logits[0, -1].argmax()))
    while len(ids) < end:
        base = len(ids) - 1
        ask = DraftAsk("c", base, ids[base], min(BLOCK, end - base) - 1)
        link.ask([ask])
        drafts = link.collect([ask], 0)[0].token_ids
        assert len(drafts) == ask.rows
        drafted.append(drafts)
        taps, logits = taps_and_logits(target, torch.tensor([[*ids, *drafts]]))
        chosen = logits[0, base:].argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(drafts) if token != chosen[i]), len(drafts))
        lengths.append(min(accepted + 1, end - base - 1))
        ids += chosen[: lengths[-1]]
        rows = fuser(taps[0, base : base + lengths[-1]])
        link.append([Piece("c", base, len(rows))], rows)
    return lengths, drafted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": [SLIDING, SLIDING], "sliding_window": 8},
        {"layer_types": [FULL, SLIDING], "sliding_window": 8},
    ],
    ids=["full", "sliding", "mixed"],
)
def test_accepted_lengths_per_step_equal_the_published_loop(
    target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(reference, "_cuda_time", time.perf_counter)
    directory, model = target
    drafter = trained_drafter(tmp_path, model, 40, **changes)
    theirs: list[list[int]] = []
    for prompt in PROMPTS:
        stats = reference.dflash_generate(
            published(drafter), model, torch.tensor([prompt]), NEW_TOKENS, None, return_stats=True
        )
        theirs.append(stats.acceptance_lengths)
    assert [our_steps(drafter, directory, model, prompt)[0] for prompt in PROMPTS] == theirs
    steps = [length for lengths in theirs for length in lengths]
    assert 1.3 < sum(steps) / len(steps) < BLOCK - 1, "acceptance is trivial: this proves nothing"
    assert len(set(steps)) >= 3


@pytest.mark.parametrize(
    "changes",
    [
        second(),
        {"layer_types": [SLIDING, SLIDING], "sliding_window": 8, **second(conv_kernel_size=3, selector_top_k=16)},
        {"layer_types": [FULL, SLIDING], "sliding_window": 8, **second(conv_group_size=1)},
    ],
    ids=["full", "sliding", "mixed"],
)
def test_drafts_of_a_second_version_are_those_of_the_published_loop_token_by_token(
    target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    propose = reference.DFlash2DraftModel.propose
    theirs: list[tuple[int, ...]] = []
    alone: list[int] = []  # what the head says of each row by itself

    def noting(self: Any, hidden: Tensor, anchors: Tensor, head: Any, temperature: float) -> Any:
        proposed = propose(self, hidden, anchors, head, temperature)
        theirs.append(tuple(proposed[0][0].tolist()))
        alone.extend(self.compute_logits(hidden, head).argmax(-1)[0].tolist())
        return proposed

    monkeypatch.setattr(reference.DFlash2DraftModel, "propose", noting)
    monkeypatch.setattr(reference, "_cuda_time", time.perf_counter)
    directory, model = target
    drafter = trained_drafter(tmp_path, model, 40, **changes)
    steps: list[int] = []
    chosen: list[int] = []
    for prompt in PROMPTS:
        theirs.clear()
        stats = reference.dflash_generate(
            published(drafter), model, torch.tensor([prompt]), NEW_TOKENS, None, return_stats=True
        )
        lengths, drafts = our_steps(drafter, directory, model, prompt)
        assert (drafts, lengths) == (theirs, stats.acceptance_lengths)
        steps += lengths
        chosen += [token for tokens in theirs for token in tokens]
    assert sum(steps) / len(steps) > 1.2, "acceptance is trivial: this proves nothing"
    assert sum(own != token for own, token in zip(alone, chosen)) > 10, "the selector is not heard"


def test_features_are_the_published_ones(tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path)
    theirs = published(drafter)
    taps = torch.randn(5, len(TAPS) * HIDDEN)
    torch.testing.assert_close(FeatureFuser.load(drafter)(taps), theirs.hidden_norm(theirs.fc(taps)))
    assert set(read_weights(drafter)) == set(theirs.state_dict())
