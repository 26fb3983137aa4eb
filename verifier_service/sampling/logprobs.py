"""Log probabilities of chosen tokens, and of the most probable ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.contracts import TokenLogprobs
from modeling.copies import to_device


def logprobs(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """Of token_ids[i] at row rows[i], with the tops[i] most probable tokens; at least one. The model's own: before any
    edit, temperature and truncation. Waits for the device twice at most, however many they are.
    """
    wanted = to_device(torch.tensor([rows, token_ids]), logits.device)
    chosen = torch.log_softmax(logits.index_select(0, wanted[0]), dim=-1)
    own = chosen.gather(1, wanted[1][:, None])[:, 0]
    most = min(max(tops), logits.shape[1])
    if most == 0:
        return [TokenLogprobs(value) for value in own.tolist()]
    best = chosen.topk(most, dim=-1)
    values = torch.cat([own[:, None], best.values], dim=1).tolist()
    return [
        TokenLogprobs(value[0], tuple(zip(ids[:top], value[1:])))
        for value, ids, top in zip(values, best.indices.tolist(), tops)
    ]
