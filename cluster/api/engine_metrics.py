"""What engines and drafters count, beside the router's own numbers on its /metrics.

Engines tell theirs with every answer to a probe, and those of the drafter that each is linked to. A router passes them
on as it heard them last, so that every router says the same of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily

ENGINE: Mapping[str, str] = {
    "steps": "Steps.",
    "step_seconds": "Time in steps.",
    "forward_seconds": "Of it, from the launch of the target's forward to its tokens.",
    "draft_seconds": "Of it, waiting for drafts.",
    "gap_seconds": "Between a step's forward and the next, when the device had nothing to do.",
    "verify_rows": "Requests' rows that were verified.",
    "prefill_tokens": "Tokens of prompts that were computed.",
    "preemptions": "Requests that gave up their place for want of KV blocks.",
    "graph_rows": "Tokens of verify steps that ran in a CUDA graph.",
    "graph_padding_rows": "Rows computed beside them to fill the graph's size.",
    "eager_steps": "Steps that ran launch by launch over kernels, prefill included.",
    "graph_failures": "Sizes of a step whose CUDA graph could not be captured.",
    "link_bytes": "Bytes sent to drafters.",
}
DRAFTER: Mapping[str, str] = {
    "asks": "Asks for drafts that were answered.",
    "empty": "Of them, with no drafts.",
    "refused": "Of them, at once, the queue being full.",
    "steps": "Forwards.",
    "drafts": "Blocks that were drafted.",
    "rows": "Rows of those blocks, bonus tokens included.",
    "padding_rows": "Rows computed beside them to fill a CUDA graph's size.",
    "eager_steps": "Forwards over kernels that ran launch by launch.",
    "graphs": "CUDA graphs that were captured.",
    "graph_failures": "Sizes of a forward whose CUDA graph could not be captured.",
    "appended_rows": "Context features that became context KV.",
    "shared_rows": "Rows of context KV copied from other contexts.",
    "evicted": "Contexts that gave way to another link's.",
    "turned_away": "Contexts for which there was no place.",
    "busy_seconds": "Time in passes.",
}
OF_DRAFTER = "drafter_"  # before the names of a drafter's counters among an engine's


@dataclass(frozen=True)
class EngineCounts:
    """One engine's last word. drafter_id: "" while it has no link."""

    engine_id: str
    drafter_id: str = ""
    counters: Mapping[str, float] = field(default_factory=dict)


class EngineMetrics:
    """A collector for Prometheus' registry; `engines` is what it tells."""

    def __init__(self, prefix: str, model: str):
        self._prefix, self._model = prefix, model
        self.engines: Sequence[EngineCounts] = ()

    def collect(self) -> Iterator[CounterMetricFamily]:
        engines = {engine.engine_id: engine.counters for engine in self.engines}
        yield from self._families("engine", ENGINE, engines)
        yield from self._families("drafter", DRAFTER, self._drafters())

    def describe(self) -> list[CounterMetricFamily]:
        return []  # else the registry collects once to know the names

    def _drafters(self) -> dict[str, dict[str, float]]:
        """A drafter that several engines are linked to is heard of more than once: the newest word has most."""
        found: dict[str, dict[str, float]] = {}
        for engine in self.engines:
            if engine.drafter_id:
                own = found.setdefault(engine.drafter_id, {})
                for name in DRAFTER:
                    if (value := engine.counters.get(OF_DRAFTER + name)) is not None:
                        own[name] = max(value, own.get(name, 0.0))
        return found

    def _families(
        self, kind: str, names: Mapping[str, str], members: Mapping[str, Mapping[str, float]]
    ) -> Iterator[CounterMetricFamily]:
        for name, help in names.items():
            family = CounterMetricFamily(f"{self._prefix}_{kind}_{name}", help, labels=("model_name", kind))
            for member, counters in members.items():
                if name in counters:
                    family.add_metric((self._model, member), counters[name])
            yield family
