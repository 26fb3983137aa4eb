"""The group of ranks that serve one target together, and the few things they tell each other within a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from modeling.host_exchange import HostExchange, open_host_exchange


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one target. group: a torch.distributed process group of `size` members; None if size is 1.

    host: shortcut for small tensors between CPU ranks of one host; None = the group carries everything.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host: HostExchange | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size} ranks")
        if self.size > 1 and self.group is None:
            raise ValueError(f"{self.size} ranks need a process group")

    def sum_(self, partial: torch.Tensor) -> torch.Tensor:
        """Add the ranks' partial sums, in place; every rank gets the total, the same to the last bit."""
        if self.group is None or self.size == 1:
            return partial
        if self.host is None or not self.host.fits(partial):
            dist.all_reduce(partial, group=self.group)
            return partial
        first, second, *rest = self.host.exchange(partial)
        total = torch.add(first, second)
        for part in rest:
            total.add_(part)
        return partial.copy_(total.view(partial.shape))

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' equally shaped parts, in rank order, on every rank. Copy before the next call."""
        if self.group is None or self.size == 1:
            return [part]
        if self.host is not None and self.host.fits(part):
            return [one.view(part.shape) for one in self.host.exchange(part)]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part, group=self.group)
        return parts

    def broadcast_(self, numbers: torch.Tensor) -> None:
        """Rank 0's become everyone's, in place."""
        if self.group is not None and self.size > 1:
            dist.broadcast(numbers, group=self.group, group_src=0)

    def gather_to_first(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """All ranks' equally shaped parts, in rank order, on rank 0; None elsewhere. Copy before the next call."""
        if self.group is None or self.size == 1:
            return [part]
        if self.host is not None and self.host.fits(part):
            everyones = self.host.exchange(part)
            return [one.view(part.shape) for one in everyones] if self.rank == 0 else None
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, parts, group=self.group, group_dst=0)
        return parts


def join_ranks(rank: int, size: int, group: dist.ProcessGroup | None, device: str | torch.device) -> RankGroup:
    """The group of a target's ranks; between CPU ranks of one host with the shared-memory shortcut. Collective."""
    ranks = RankGroup(rank, size, group)
    if group is None or size == 1 or torch.device(device).type != "cpu":
        return ranks
    return RankGroup(rank, size, group, open_host_exchange(rank, size, group))
