"""The row `transformers`: `generate` of the library itself, in this process. Also the judge of the other rows' text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as library_logs

from paceline.bench.errors import BenchError
from paceline.bench.runs import Output, Run


class Reference:
    """A target checkpoint in `dtype` on the CPU, or on the GPU if `device` is "cuda". Nothing is loaded from a hub.

    threads: of torch in this process, as many as the engines' ranks have together. temperature 0 is greedy.
    """

    name = "transformers"

    def __init__(self, target: Path, dtype: str, device: str, threads: int, temperature: float):
        torch.set_num_threads(threads)
        self.note = f"its generate() with {threads} torch thread(s), in left-padded batches"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(target, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype), local_files_only=True)
        self.model: Any = loaded.to(device).eval().requires_grad_(False)
        config = loaded.config.get_text_config()
        self.max_context: int = config.max_position_embeddings
        self.model_type: str = config.model_type
        self.config: Any = config
        self.stop_token_ids = stop_tokens(config.eos_token_id)
        self._device, self._temperature = device, temperature
        self._padding = self.tokenizer.pad_token_id
        if self._padding is None:
            self._padding = min(self.stop_token_ids, default=0)

    def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int) -> Run:
        started = perf_counter()
        outputs: list[Output] = []
        for first in range(0, len(prompts), concurrency):
            outputs += self._generate(prompts[first : first + concurrency], max_tokens)
        return Run(perf_counter() - started, tuple(outputs))

    @torch.inference_mode()
    def gaps(self, prompt: tuple[int, ...], text: tuple[int, ...]) -> list[float]:
        """By how much the best logit exceeds that of each token of `text`, everything before it given."""
        ids = torch.tensor([prompt + text], device=self._device)
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=self._device)
        logits = self.model(ids, use_cache=False, logits_to_keep=rows).logits[0].float()  # [len(text), vocabulary]
        return (logits.amax(-1) - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]).tolist()

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[Output]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            sampling = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        made = self.model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=max_tokens,
            pad_token_id=self._padding,
            eos_token_id=sorted(self.stop_token_ids) or None,
            **sampling,
        )
        return [Output(up_to_stop(row, self.stop_token_ids)) for row in made[:, width:].tolist()]


def stop_tokens(eos: int | list[int] | None) -> frozenset[int]:
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def up_to_stop(token_ids: Sequence[int], stop_token_ids: frozenset[int]) -> tuple[int, ...]:
    """The first stop token included, what follows it (padding) left out."""
    end = next((i + 1 for i, token in enumerate(token_ids) if token in stop_token_ids), len(token_ids))
    return tuple(token_ids[:end])


def load_reference(target: Path, dtype: str, device: str, threads: int, temperature: float) -> Reference:
    """Raises BenchError if TARGET cannot be loaded."""
    if not (target / "config.json").is_file():
        raise BenchError(f"--target {target} holds no config.json: give a checkpoint directory")
    library_logs.set_verbosity_error()  # its hints on faster kernels, and a bar for a second's load
    library_logs.disable_progress_bar()
    try:
        return Reference(target, dtype, device, threads, temperature)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BenchError(f"--target {target} cannot be loaded by transformers: {error}") from error
