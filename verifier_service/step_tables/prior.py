"""What steps and drafts should cost, before an engine has made any: from its tables. Pure policy, in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from verifier_service.step_tables.tables import DraftTable, VerifyTable, read_draft_table, read_verify_table


@dataclass(frozen=True)
class StepPrior:
    """layers: of the whole target, of which a table may hold a part. The shortest context of a table is taken: how long
    contexts will be is not known, and what is measured takes a prior's place soon.
    """

    steps: VerifyTable
    drafts: DraftTable | None
    layers: int

    def plain(self, requests: int) -> float:
        """Of a step without drafts."""
        return self._step(requests, 0)

    def extra(self, requests: int, drafted: float) -> float:
        """What `drafted` drafts in all add to it."""
        return self._step(requests, drafted) - self._step(requests, 0)

    def wait(self, asked: int) -> float | None:
        """For whole blocks of drafts for so many requests; None: not known."""
        if self.drafts is None:
            return None
        return self.drafts.draft_s(asked, self.drafts.block_size, self.drafts.shortest_window)

    def _step(self, requests: int, drafted: float) -> float:
        seconds = self.steps.step_s(requests, 1 + drafted / requests, self.steps.shortest_context)
        return seconds * self.layers / self.steps.layers


def read_prior(step_table: str | None, draft_table: str | None, layers: int) -> StepPrior | None:
    """From these files; None without a table of steps. Raises ConfigError."""
    if step_table is None:
        return None
    drafts = None if draft_table is None else read_draft_table(Path(draft_table))
    return StepPrior(read_verify_table(Path(step_table)), drafts, layers)
