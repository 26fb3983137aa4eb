"""Was this drafter made for this target? Asked of their configurations alone, by both services. No torch."""

from __future__ import annotations

from modeling.dflash_config import DFlashConfig
from modeling.target_config import TargetConfig, configuration_file

CURE = "use a drafter that was trained for this target"


class PairError(ValueError):
    """Two checkpoints that are each fine, but not made for each other."""


def check_pair(draft: DFlashConfig, target: TargetConfig) -> None:
    """Raises PairError that names the keys, both values and both files."""
    of_draft, of_target = configuration_file(draft.directory), configuration_file(target.directory)
    beyond = [layer for layer in draft.target_layer_ids if layer >= target.layers]
    if beyond:
        raise PairError(
            f"target_layer_ids has {beyond} in {of_draft}, but {of_target} has layers 0..{target.layers - 1}: {CURE}"
        )
    for key, value, other, expected in (
        ("hidden_size", draft.hidden, "hidden_size", target.hidden),
        ("vocab_size", draft.vocabulary, "vocab_size", target.vocabulary),
        ("num_target_layers", draft.num_target_layers, "num_hidden_layers", target.layers),
    ):
        if value != expected:
            raise PairError(f"{key} is {value} in {of_draft}, but {other} is {expected} in {of_target}: {CURE}")
    if not 0 <= draft.mask_token_id < target.vocabulary:
        raise PairError(
            f"mask_token_id is {draft.mask_token_id} in {of_draft}, outside the vocabulary of {target.vocabulary} in "
            f"{of_target}: {CURE}"
        )
    if draft.block_size < 2:
        raise PairError(f"block_size is {draft.block_size} in {of_draft}: no draft fits in it")
