"""What a draft forward on the kernels reads and writes: buffers whose addresses never change, and one copy each way.

All numbers that describe a batch (which blocks, where their contexts are, which tokens) are packed into one host
buffer, pinned where there is a GPU, and copied to the device in one go; the answers come back the same way. A graph
captured over these buffers can be replayed for every later batch of its bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafter_service.attention import Block
from drafter_service.buckets import Bucket


@dataclass(frozen=True)
class StepInputs:
    """Views of the device's buffer for one bucket, all int64.

    starts [blocks + 1], first_rows, held, bases [blocks]: see kernels.block_attention. token_ids, positions, places,
    rows [bucket.rows]: of the flat block rows; places: in their blocks, 0 for padding; rows: of the pool, -1 for
    padding. asked [bucket.asked]: rows to be read. bonus_tokens [blocks]; asked_starts [blocks + 1]: where each block's
    rows begin among those that are read.
    """

    starts: Tensor
    first_rows: Tensor
    held: Tensor
    bases: Tensor
    token_ids: Tensor
    positions: Tensor
    places: Tensor
    rows: Tensor
    asked: Tensor
    bonus_tokens: Tensor
    asked_starts: Tensor


@dataclass(frozen=True)
class StepAnswers:
    """Views for one bucket: token_ids int32 [asked], confidence float32 [asked]."""

    token_ids: Tensor
    confidence: Tensor


class StepBuffers:
    """For batches of up to `blocks` blocks of `block_size` rows, and buckets no larger than that."""

    def __init__(self, blocks: int, block_size: int, mask_token_id: int, device: torch.device):
        self._mask = mask_token_id
        most = Bucket(blocks, blocks * block_size, blocks * (block_size - 1))
        pinned, size = device.type == "cuda", _parts(most)[-1].stop
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._host_answers = torch.zeros(2 * most.asked, dtype=torch.int32, pin_memory=pinned)
        self._device_answers = torch.zeros(2 * most.asked, dtype=torch.int32, device=device)

    def inputs(self, bucket: Bucket) -> StepInputs:
        return StepInputs(*(self._device[part] for part in _parts(bucket)))

    def answers(self, bucket: Bucket) -> StepAnswers:
        return _answers(self._device_answers, bucket)

    def send(self, bucket: Bucket, blocks: Sequence[Block], bonus_tokens: Sequence[int]) -> None:
        """Describe a batch to the device. The batch before has to be read by then: its copy is under way until then."""
        numbers, parts = self._host.numpy(), _parts(bucket)
        starts, first_rows, held, bases, tokens, positions, places, rows, asked, bonus, asked_starts = (
            numbers[part] for part in parts
        )
        count = len(blocks)
        own = np.array([(b.first_row, b.held, b.base, b.rows) for b in blocks], dtype=np.int64).reshape(count, 4).T
        first_rows[:count], held[:count], bases[:count], sizes = own
        starts[0] = 0
        np.cumsum(sizes, out=starts[1 : count + 1])
        total = int(starts[count])
        starts[count + 1 :] = total  # padding blocks have no rows
        begins = starts[:count]
        within = np.arange(total) - np.repeat(begins, sizes)
        tokens[:] = self._mask
        bonus[:count] = bonus_tokens
        bonus[count:] = self._mask
        tokens[begins] = bonus[:count]
        positions[:total] = np.repeat(own[2], sizes) + within
        positions[total:] = 0
        places[:total] = within
        places[total:] = 0
        rows[:total] = np.repeat(own[0] + own[1], sizes) + within
        rows[total:] = -1
        asked[: total - count] = np.flatnonzero(within)
        asked[total - count :] = 0
        asked_starts[: count + 1] = starts[: count + 1] - np.arange(count + 1)
        asked_starts[count + 1 :] = total - count
        end = parts[-1].stop
        self._device[:end].copy_(self._host[:end], non_blocking=True)

    def receive(self, bucket: Bucket, asked: int) -> tuple[list[int], list[float]]:
        """Token ids and confidences of the first `asked` rows: waits for the device, once."""
        size = 2 * bucket.asked
        self._host_answers[:size].copy_(self._device_answers[:size], non_blocking=True)
        if self._device.is_cuda:
            torch.cuda.current_stream(self._device.device).synchronize()
        answers = _answers(self._host_answers, bucket)
        return answers.token_ids[:asked].tolist(), answers.confidence[:asked].tolist()


def _parts(bucket: Bucket) -> list[slice]:
    """Where a bucket's inputs stand, in the order of StepInputs.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that is aligned differently.
    """
    n, parts, begin = bucket.blocks, [], 0
    for size in (n + 1, n, n, n, *[bucket.rows] * 4, bucket.asked, n, n + 1):
        parts.append(slice(begin, begin + size))
        begin += size + size % 2
    return parts


def _answers(buffer: Tensor, bucket: Bucket) -> StepAnswers:
    return StepAnswers(buffer[: bucket.asked], buffer[bucket.asked : 2 * bucket.asked].view(torch.float32))
