"""Log probabilities of chosen tokens, and of the most probable ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.contracts import TokenLogprobs


def logprobs(logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of token_ids[i] at row rows[i], with the `top` most probable tokens. The model's own: before any edit,
    temperature and truncation."""
    device = logits.device
    chosen = torch.log_softmax(logits.index_select(0, torch.tensor(rows, device=device)), dim=-1)
    own = chosen.gather(1, torch.tensor(token_ids, device=device)[:, None])[:, 0].tolist()
    if top == 0:
        return [TokenLogprobs(value) for value in own]
    best = chosen.topk(min(top, chosen.shape[1]), dim=-1)
    pairs = zip(own, best.indices.tolist(), best.values.tolist())
    return [TokenLogprobs(value, tuple(zip(ids, values))) for value, ids, values in pairs]
