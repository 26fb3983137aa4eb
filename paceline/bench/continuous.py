"""The row `continuous`: transformers' own continuous batching, in this process, on the weights of the reference.

It keeps keys and values in pages, and decodes one token a request and step. Targets with other state have no such row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from paceline.bench.errors import BenchError
from paceline.bench.reference import Reference
from paceline.bench.runs import Output, Run

PAGED = {"full_attention", "sliding_attention"}
PAGE_TOKENS = 16
STEP_TOKENS = 2048  # both as the engines' defaults
PATIENCE_S = 900.0
STOP_S = 30.0


def why_not(config: Any) -> str | None:
    """The reason why there can be no such row for a target of this (text) configuration, or None."""
    other = sorted(set(getattr(config, "layer_types", None) or ()) - PAGED)
    if other:
        return f"it pages keys and values only; this target has {', '.join(other)} layers"
    if getattr(config, "kv_lora_rank", None):
        return "it takes keys and values for as wide as heads are; this target has latent attention"
    return None


class ContinuousBatching:
    """Shares the target's weights with `reference`. Every run has a cache of its own, made before its clock starts."""

    name = "continuous"
    note = "transformers' continuous batching, in this process"

    def __init__(self, reference: Reference, temperature: float):
        self._reference, self._temperature = reference, temperature
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what it says of memory and psutil

    def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int) -> Run:
        longest = max(map(len, prompts)) + max_tokens
        paging = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=concurrency * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=concurrency,
        )
        with self._reference.model.continuous_batching_context_manager(
            generation_config=self._sampling(max_tokens), continuous_batching_config=paging, timeout=STOP_S
        ) as manager:
            started = perf_counter()
            outputs = self._all(manager, prompts, concurrency, max_tokens)
            seconds = perf_counter() - started
        return Run(seconds, outputs)

    def _all(
        self, manager: Any, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int
    ) -> tuple[Output, ...]:
        """A prompt comes when one is done, as it does from the other rows' clients."""
        ends = sorted(self._reference.stop_token_ids) or -1
        waiting = iter(enumerate(prompts))
        done: dict[int, Output] = {}

        def submit(count: int) -> None:
            for _, (index, prompt) in zip(range(count), waiting):
                manager.add_request(list(prompt), str(index), max_tokens, eos_token_id=ends)

        submit(concurrency)
        until = time.monotonic() + PATIENCE_S
        while len(done) < len(prompts):
            result = manager.get_result(timeout=1.0)
            if result is None:
                if not manager.is_running() or time.monotonic() > until:
                    raise BenchError(f"{self.name}: {len(prompts) - len(done)} requests came to no end")
                continue
            if result.error is not None:
                raise BenchError(f"{self.name}: request {result.request_id} failed: {result.error}")
            if result.is_finished():
                done[int(result.request_id)] = Output(tuple(result.generated_tokens))
                submit(1)
        return tuple(done[index] for index in range(len(prompts)))

    def _sampling(self, max_tokens: int) -> GenerationConfig:
        settings: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            settings = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        ends = sorted(self._reference.stop_token_ids) or -1
        return GenerationConfig(max_new_tokens=max_tokens, eos_token_id=ends, **settings)
