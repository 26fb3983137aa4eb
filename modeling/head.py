"""The target's token embedding and output head, which a drafter borrows."""

from __future__ import annotations

from pathlib import Path

import torch

from modeling.layout import text_layout
from modeling.reader import CheckpointReader


def load_embedding_and_head(
    target_dir: str | Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding [vocabulary, hidden] and head [vocabulary, hidden] of a target; one tensor twice if they are tied.

    Reads these two tensors only. Raises CheckpointError if the directory holds no text model.
    """
    with CheckpointReader(target_dir) as reader:
        layout = text_layout(reader)
        embedding = reader.read(layout.embedding, dtype=dtype).to(device)
        if layout.head is None:
            return embedding, embedding
        return embedding, reader.read(layout.head, dtype=dtype).to(device)
