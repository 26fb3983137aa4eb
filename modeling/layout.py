"""Where a checkpoint keeps its text model, and what else is in it: both differ between exports."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modeling.errors import CheckpointError
from modeling.reader import CheckpointReader

BODIES = ("model.", "model.language_model.", "language_model.model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
# Beside the text model: towers for other senses, heads that predict several tokens, and what can be computed.
_ASIDE = {
    "model.": r"mtp\.|model\.mtp\.",
    "model.language_model.": r"mtp\.|model\.(visual|vision_tower|multi_modal_projector|audio_tower)\.",
    "language_model.model.": r"(vision_tower|mm_projector|multi_modal_projector|visual)\.|language_model\.mtp\.",
}
_ANYWHERE = re.compile(r"rotary_emb\.inv_freq$|\.(input|output|k|v|q)_scale$|\.input_global_scale$")


@dataclass(frozen=True)
class TextLayout:
    """body: prefix of embed_tokens, layers and norm. head: name of the output head (of its weight, even if that is
    packed and called otherwise), None if it is tied to the embedding.
    """

    body: str
    head: str | None

    @property
    def embedding(self) -> str:
        return self.body + "embed_tokens.weight"

    def is_aside(self, name: str, layers: int) -> bool:
        """Is this stored tensor known not to belong to a text model of so many layers?

        Layers beyond them predict further tokens (DeepSeek-V3); scales of activations serve to quantize those.
        """
        if re.match(_ASIDE[self.body], name) or _ANYWHERE.search(name):
            return True
        layer = re.match(re.escape(self.body) + r"layers\.(\d+)\.", name)
        return layer is not None and int(layer[1]) >= layers


def text_layout(reader: CheckpointReader) -> TextLayout:
    """Find the text model in a checkpoint. Raises CheckpointError if there is no token embedding."""
    body = next((body for body in BODIES if body + "embed_tokens.weight" in reader), None)
    if body is None:
        raise CheckpointError(
            f"checkpoint {reader.directory} has no token embedding (looked for "
            f"{', '.join(body + 'embed_tokens.weight' for body in BODIES)}): is it a causal language model?"
        )
    heads = (head for head in HEADS if head in reader or head + "_packed" in reader)
    return TextLayout(body=body, head=next(heads, None))
