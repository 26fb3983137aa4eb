"""DFlash 2's candidate selector: draft tokens that fit to each other, out of what the head says of each row alone.

Method: z-lab/dflash (PyPI dflash 0.1.0), `CandidateSelector`; the score is spelled out in kernels/candidate_selector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modeling.dflash_config import DFlash2
from modeling.fixed_linear import fixed_linear


class CandidateSelector(nn.Module):
    """Two codebooks [vocabulary, rank] and the projection of a row. Parameters carry the checkpoint's names."""

    def __init__(self, hidden: int, vocabulary: int, sizes: DFlash2):
        super().__init__()
        self.top_k = sizes.selector_top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocabulary, sizes.selector_rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocabulary, sizes.selector_rank))
        self.hidden_projection = nn.Linear(hidden, sizes.selector_rank, bias=False)


class FusedSelector:
    """The selector for serving. project: rows [n, hidden], after the final norm -> [n, rank]."""

    def __init__(self, selector: CandidateSelector):
        self.top_k = selector.top_k
        self.predecessors = selector.predecessor_codebook.detach()
        self.successors = selector.successor_codebook.detach()
        self.project = fixed_linear(selector.hidden_projection.weight)

    def choose(
        self, hidden: Tensor, candidates: Tensor, logits: Tensor, anchors: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Token of each row, the best behind the one before it, and its probability among its row's candidates.

        hidden [rows, hidden], after the final norm; candidates, logits [rows, k]; of block after block: the bonus token
        in front of its rows, how many rows it has. Each row is scored for every candidate of the row before it at once,
        so that the path itself is followed on the host, without a launch a row.
        """
        device = candidates.device
        firsts = torch.tensor([0, *counts[:-1]]).cumsum(0).to(device)
        before = candidates.roll(1, 0)
        before[firsts] = torch.tensor(anchors, device=device)[:, None]
        wanted = self.predecessors[before].float() * self.project(hidden).float()[:, None]  # [rows, k, rank]
        scores = wanted @ self.successors[candidates].float().transpose(1, 2) + logits[:, None]  # [rows, before, own]
        best = scores.argmax(dim=-1, keepdim=True)
        confidence = scores.softmax(dim=-1).gather(-1, best)[..., 0].tolist()
        choices, ids = best[..., 0].tolist(), candidates.tolist()
        path: list[int] = []
        sure: list[float] = []
        for count in counts:
            chosen = 0  # all stand for the bonus token in front of the first row
            for row in range(len(path), len(path) + count):
                sure.append(confidence[row][chosen])
                chosen = choices[row][chosen]
                path.append(ids[row][chosen])
        return path, sure
