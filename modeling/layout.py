"""Where a checkpoint keeps its text model: names differ between text-only and multimodal exports."""

from __future__ import annotations

from dataclasses import dataclass

from modeling.errors import CheckpointError
from modeling.reader import CheckpointReader

BODIES = ("model.", "model.language_model.", "language_model.model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")


@dataclass(frozen=True)
class TextLayout:
    """body: prefix of embed_tokens, layers and norm. head: name of the output head, None if tied to the embedding."""

    body: str
    head: str | None

    @property
    def embedding(self) -> str:
        return self.body + "embed_tokens.weight"


def text_layout(reader: CheckpointReader) -> TextLayout:
    """Find the text model in a checkpoint. Raises CheckpointError if there is no token embedding."""
    body = next((body for body in BODIES if body + "embed_tokens.weight" in reader), None)
    if body is None:
        raise CheckpointError(
            f"checkpoint {reader.directory} has no token embedding (looked for "
            f"{', '.join(body + 'embed_tokens.weight' for body in BODIES)}): is it a causal language model?"
        )
    return TextLayout(body=body, head=next((head for head in HEADS if head in reader), None))
