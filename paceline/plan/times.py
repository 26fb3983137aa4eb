"""Seconds of a target's step and of a draft: from measured tables, or where there is none, from a roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paceline.plan.gpus import Gpu
from paceline.plan.memory import DrafterModel
from paceline.plan.timing import TargetCost, draft_s
from verifier_service.step_tables.tables import DraftTable, VerifyTable

ROUND_TRIP_S = 200e-6  # of a link in one machine room, over TCP, frames packed and read: assumed
# What an engine does beside the model with drafts for every request: `paceline bench host`, docs/figures.md.
HOST_S, HOST_REQUEST_S = 0.2e-3, 9e-6


class TargetTimes(Protocol):
    """title: for people. host: the engine's own work is not in step_s and shows where no step runs ahead of it."""

    @property
    def title(self) -> str: ...

    @property
    def host(self) -> bool: ...

    def step_s(self, requests: int, tokens: int, context: float, prefill: int = 0) -> float:
        """Of `requests` verify rows with `tokens` tokens in all and contexts of `context` on average, and of `prefill`
        tokens of prompts. Either may be 0.
        """


class DraftTimes(Protocol):
    """round_trip_s: of the link, where draft_s leaves it out."""

    @property
    def title(self) -> str: ...

    @property
    def round_trip_s(self) -> float: ...

    def draft_s(self, contexts: float, rows: float, window: float) -> float:
        """Of blocks with `rows` rows each, the bonus token's included, over `window` tokens of context KV each."""


@dataclass(frozen=True)
class MeasuredTarget:
    """layers: of the whole model, of which a table may hold a part. all_reduce_s: what each token of a step costs
    beside what one rank computes, and a step of none; estimated, as one rank cannot measure it.
    """

    table: VerifyTable
    layers: int
    beside: TargetCost | None = None
    gpu: Gpu | None = None

    @property
    def title(self) -> str:
        scaled = "" if self.layers == self.table.layers else f", times {self.layers}/{self.table.layers} layers"
        joined = ", all-reduces estimated" if self._joins else ""
        return f"measured: {self.table.title}{scaled}{joined}"

    @property
    def host(self) -> bool:
        return self.table.clock == "device"

    def step_s(self, requests: int, tokens: int, context: float, prefill: int = 0) -> float:
        table = self.table
        if requests:
            seconds = table.step_s(requests, tokens / requests, context) + prefill * table.token_s(context)
        else:
            seconds = table.step_s(1, 1, context) + (prefill - 1) * table.token_s(context)
        seconds *= self.layers / table.layers
        if self._joins and self.beside is not None and self.gpu is not None:
            seconds += self.beside.all_reduces_s(self.gpu, tokens + prefill)
        return seconds

    @property
    def _joins(self) -> bool:
        return self.table.ranks > 1 and self.table.clock == "device" and self.beside is not None


@dataclass(frozen=True)
class EstimatedTarget:
    cost: TargetCost
    gpu: Gpu
    host: bool = True

    @property
    def title(self) -> str:
        return f"estimated, no table: roofline of {self.cost.size} x {self.gpu.name}"

    def step_s(self, requests: int, tokens: int, context: float, prefill: int = 0) -> float:
        rows = max(1, requests + (prefill > 0))  # all prompts of a step read one context's keys and values
        return self.cost.step_s(self.gpu, rows, (tokens + prefill) / rows, context)


@dataclass(frozen=True)
class MeasuredDrafter:
    table: DraftTable

    @property
    def round_trip_s(self) -> float:
        return ROUND_TRIP_S if self.table.clock == "device" else 0.0

    @property
    def title(self) -> str:
        return f"measured: {self.table.title}"

    def draft_s(self, contexts: float, rows: float, window: float) -> float:
        return self.table.draft_s(contexts, rows, window)


@dataclass(frozen=True)
class EstimatedDrafter:
    """The link's round trip is in its constant."""

    model: DrafterModel
    gpu: Gpu
    round_trip_s: float = 0.0

    @property
    def title(self) -> str:
        return f"estimated, no table: roofline of one {self.gpu.name}"

    def draft_s(self, contexts: float, rows: float, window: float) -> float:
        return draft_s(self.model, self.gpu, contexts, rows, window)
