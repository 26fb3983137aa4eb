"""The embedding and head that a drafter borrows from its target."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from modeling.errors import CheckpointError
from modeling.head import load_embedding_and_head

EMBEDDING, HEAD = torch.randn(6, 4), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_text_and_multimodal_names_are_found(tmp_path, embedding, head):
    save_file({embedding: EMBEDDING, head: HEAD}, tmp_path / "model.safetensors")
    got_embedding, got_head = load_embedding_and_head(tmp_path, torch.float32, "cpu")
    assert torch.equal(got_embedding, EMBEDDING)
    assert torch.equal(got_head, HEAD)


def test_a_tied_head_is_the_embedding_itself(tmp_path):
    save_file({"model.embed_tokens.weight": EMBEDDING}, tmp_path / "model.safetensors")
    embedding, head = load_embedding_and_head(tmp_path, torch.bfloat16, "cpu")
    assert head is embedding
    assert head.dtype == torch.bfloat16


def test_a_checkpoint_without_an_embedding_is_refused(tmp_path):
    save_file({"fc.weight": HEAD}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no token embedding"):
        load_embedding_and_head(tmp_path, torch.float32, "cpu")
