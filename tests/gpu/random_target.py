"""A target with random weights in a published shape, or one rank's slice of it, over the kernels. Nothing is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling.families import ShardMap, family_of, shard_map
from modeling.footprint import cache_footprint
from modeling.layout import TextLayout
from modeling.ranks import RankGroup
from modeling.target_config import TargetConfig, read_target_config
from verifier_service.model import touchpoints
from verifier_service.model.forms import FAST
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage
from verifier_service.model.loading import load_rank

STANDARD_DEVIATION = 0.02  # of weights, as transformers initialises them
ROUTED = ".mlp.experts."


@dataclass(frozen=True)
class Slice:
    """config: of the whole model, cut to as many layers as are measured; of `ranks`, this is the first."""

    config: TargetConfig
    ranks: int = 1


def cut(config_file: Path, layers: int | None, into: Path, ranks: int = 1, **overrides: Any) -> Slice:
    """The configuration with only its first `layers` layers (None: all), written to `into`/config.json."""
    raw = json.loads(config_file.read_text(encoding="utf-8"))
    text = raw.get("text_config", raw)
    text |= overrides
    if layers is not None:
        text["num_hidden_layers"] = layers
        for key in ("layer_types", "mlp_layer_types"):
            if text.get(key) is not None:
                text[key] = text[key][:layers]
    into.mkdir(parents=True, exist_ok=True)
    (into / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return Slice(read_target_config(into), ranks)


class RandomWeights:
    """As RankWeights hands out a rank's tensors, but random. read: bytes of what a step reads of all of them at most;
    routed: of these, of routed experts.
    """

    def __init__(self, part: Slice, dtype: torch.dtype, device: str):
        self.config, self.rank, self.size, self.dtype, self.device = part.config, 0, part.ranks, dtype, device
        self.shards: ShardMap = shard_map(part.config, part.ranks)
        self.layout = TextLayout("model.", None if part.config.tied else "lm_head.weight")
        self.read = self.routed = 0

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        own = self.shards.of(name).part_shape(tuple(shape), 0, self.size)
        tensor = torch.empty(own, dtype=dtype or self.dtype, device=self.device)
        if name.endswith("norm.weight"):
            tensor.fill_(0.0 if family_of(self.config).zero_centered_norms else 1.0)
        else:
            tensor.normal_(0.0, STANDARD_DEVIATION)
        if "embed_tokens" not in name:
            self.read += tensor.nbytes
        elif self.layout.head is None:
            self.read += tensor.nbytes // self.size
        if ROUTED in name:
            self.routed += tensor.nbytes
        return tensor

    take_matrix = take

    def take_transposed(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.take(name, shape).transpose(1, 2).contiguous()

    def finish(self) -> None: ...


class AloneOfMany(RankGroup):
    """The first of several ranks, that hears nothing of the others: its own part stands for the sum."""

    def __post_init__(self) -> None: ...

    def sum_(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather_to_first(self, part: torch.Tensor) -> list[torch.Tensor]:
        return [part]


@dataclass(frozen=True)
class RandomTarget:
    """executor: a KernelExecutor. read, routed: as RandomWeights. token_bytes: of the KV cache; state_bytes: of one
    request's recurrent state.
    """

    executor: Any
    config: TargetConfig
    read: int
    routed: int
    token_bytes: int
    state_bytes: int

    def floor_bytes(self, requests: int, rows: int, context: int) -> int:
        """Of a verify: weights once (of routed experts, those expected to be hit by evenly spread choices), the cache
        of every request, states read and written.
        """
        experts, chosen = self.config.text.get("num_experts") or 0, self.config.text.get("num_experts_per_tok") or 0
        hit = 1 - (1 - chosen / experts) ** rows if experts else 1.0
        weights = self.read - int(self.routed * (1 - hit))
        return weights + requests * (context * self.token_bytes + 2 * self.state_bytes)


@torch.inference_mode()
def random_target(
    part: Slice,
    *,
    requests: int,
    longest_row: int,
    tokens: int,
    max_context: int,
    block_tokens: int,
    taps: Sequence[int],
    dtype: torch.dtype,
    device: str,
) -> RandomTarget:
    """tokens: KV capacity. Keys and values of the cache are zeros: what they are does not change what is computed."""
    from modeling.kernel_operations import TritonOperations  # decides on import whether kernels are compiled
    from verifier_service.model.device.executor import KernelExecutor
    from verifier_service.model.device.loading import kernel_layer, kernel_norm

    weights: Any = RandomWeights(part, dtype, device)
    ranks = AloneOfMany(0, part.ranks) if part.ranks > 1 else RankGroup()
    model = load_rank(
        touchpoints.empty_model(part.config, dtype, FAST.attention),
        weights,
        family_of(part.config),
        ranks,
        TritonOperations(),
        FAST,
        kernel_layer,
        kernel_norm,
    )
    blocks = -(-tokens // block_tokens)
    executor = KernelExecutor(
        model,
        BlockTables(requests, -(-max_context // block_tokens), block_tokens, blocks),
        KvStorage(blocks, block_tokens, "auto", dtype, device),
        first=True,
        vocabulary=part.config.vocabulary,
        num_slots=requests,
        max_context=max_context,
        checkpoint_bytes=0,
        path=KernelPath("triton", longest_row=longest_row, taps=tuple(taps)),
    )
    footprint = cache_footprint(
        part.config, touchpoints.text_shapes(part.config), weights.shards, part.ranks, dtype.itemsize
    )
    return RandomTarget(
        executor, part.config, weights.read, weights.routed, footprint.token_bytes, footprint.state_bytes
    )
