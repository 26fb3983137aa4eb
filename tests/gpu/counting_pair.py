"""A target that counts, in any published shape, and a drafter of its shape: random checkpoints of which it is known
beforehand what the target will say.

Every layer is computed and its weights are random, but so small that what it adds hardly moves the embedding, and the
head's row t + 1 is the embedding of t: after token t comes t + 1, in any dtype and whatever rounding does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cluster.link.face import LinkState, VerifierLink
from cluster.link.messages import DraftAnswer, DraftAsk, Heartbeat, Piece, Share
from drafter_service.model import DFlashModel
from modeling.dflash_config import DFlashConfig
from tests.gpu.random_target import cut
from verifier_service.model import touchpoints

DEVIATION = 0.0005  # of the layers' weights


def write_target(architecture: Path, into: Path, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    """A checkpoint of the counting target. overrides: of fields of the architecture's config.json."""
    part = cut(architecture, None, into, **{"tie_word_embeddings": False, **overrides})
    shapes = touchpoints.text_shapes(part.config)
    embedding = torch.randn(shapes.pop("embed_tokens.weight"), dtype=dtype, device=device)
    shapes.pop("lm_head.weight")
    shards = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.roll(1, dims=0)}
    names: dict[str, list[str]] = {}
    for name in shapes:
        names.setdefault(".".join(name.split(".")[:2]), []).append(name)
    index = _save(into, "outside", shards)
    for shard, own in names.items():  # a layer each: no more than that is held
        index |= _save(into, shard, {f"model.{name}": _random(name, shapes[name], dtype, device) for name in own})
    record = {"metadata": {}, "weight_map": index}
    (into / "model.safetensors.index.json").write_text(json.dumps(record), encoding="utf-8")


def write_drafter(architecture: Path, into: Path, dtype: torch.dtype, device: str, **overrides: Any) -> None:
    """A random drafter: it costs what a trained one costs, and its drafts are nobody's words."""
    raw = json.loads(architecture.read_text(encoding="utf-8")) | overrides
    into.mkdir(parents=True, exist_ok=True)
    (into / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config = DFlashConfig.load(into)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DFlashModel(config).state_dict().items()}
    shapes |= {
        "fc.weight": (config.hidden, config.hidden * len(config.target_layer_ids)),
        "hidden_norm.weight": (config.hidden,),
    }
    save_file({name: _random(name, shape, dtype, device) for name, shape in shapes.items()}, into / "model.safetensors")


def _save(into: Path, shard: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    file = f"{shard}.safetensors"
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, into / file)
    return dict.fromkeys(tensors, file)


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, DEVIATION)


def span(vocabulary: int, block_size: int) -> int:
    """Tokens in one of `block_size` equal parts of the vocabulary: a text in part n has n drafts right at each step."""
    return vocabulary // block_size


class ForcedLink:
    """A VerifierLink whose drafter works and travels as ever, but whose drafts are made right to a set number.

    Of a text in part n of the vocabulary (see `span`), n drafts are what the counting target will say, the next is not.
    """

    def __init__(self, link: VerifierLink, vocabulary: int, block_size: int):
        self._link, self._vocabulary, self._span = link, vocabulary, span(vocabulary, block_size)

    @property
    def state(self) -> LinkState:
        return self._link.state

    @property
    def drafter_load(self) -> Heartbeat:
        return self._link.drafter_load

    @property
    def queued_bytes(self) -> int:
        return self._link.queued_bytes

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        self._link.append(pieces, features)

    def share(self, share: Share) -> None:
        self._link.share(share)

    def unshared(self) -> list[str]:
        return self._link.unshared()

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        self._link.ask(asks)

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        bonus = {(ask.context_id, ask.base): ask.bonus_token for ask in asks}
        return [
            self._forced(answer, bonus[answer.context_id, answer.base])
            for answer in self._link.collect(asks, timeout_s)
        ]

    def close_contexts(self, context_ids: Sequence[str]) -> None:
        self._link.close_contexts(context_ids)

    def evicted(self) -> list[str]:
        return self._link.evicted()

    def set_drafters(self, addresses: Sequence[str]) -> None:
        self._link.set_drafters(addresses)

    def stop(self) -> None:
        self._link.stop()

    def _forced(self, answer: DraftAnswer, bonus: int) -> DraftAnswer:
        right, count = bonus // self._span, len(answer.token_ids)
        said = [(bonus + 1 + at + (at >= right)) % self._vocabulary for at in range(count)]
        return DraftAnswer(answer.context_id, answer.base, tuple(said), answer.confidence)
