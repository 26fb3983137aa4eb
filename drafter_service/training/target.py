"""The frozen target as the trainer uses it: continuations of prompts, tap-layer outputs, embedding and head.

Any transformers causal language model; nothing is loaded from a hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafter_service.training.sequences import Prompt, TrainingSequence, cut_cycle


class TrainingTarget:
    """A target checkpoint, frozen, in `dtype` on `device`."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: str):
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"--target {str(directory)!r} holds no config.json: give a checkpoint directory")
        self.directory, self.device = directory, device
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.embedding: nn.Module = model.get_input_embeddings()
        self.head: nn.Module = model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self.layers: nn.ModuleList = model.get_decoder().layers

    def taps(self, ids: Tensor, layer_ids: Sequence[int]) -> Tensor:
        """`observe` without the final states."""
        return self.observe(ids, layer_ids)[0]

    @torch.no_grad()
    def observe(self, ids: Tensor, layer_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(concatenated outputs of the tap layers [N, T, taps x hidden], final states [N, T, hidden]) of ids [N, T].

        Rows may be padded on the right: layers are causal, so that padding changes nothing before it.
        """
        kept: dict[int, Tensor] = {}

        def keep(index: int):
            def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
                kept[index] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.layers[i].register_forward_hook(keep(i)) for i in layer_ids]
        try:
            final = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([kept[i] for i in layer_ids], dim=-1), final

    def continue_prompts(
        self, prompts: Sequence[Prompt], new_tokens: int, temperature: float, batch: int
    ) -> Iterator[list[TrainingSequence]]:
        """The target's own text after each prompt, batch by batch; cut at the end-of-sequence token and at cycles.

        Prompts of one length are batched together, so that no padding reaches a recurrent state.
        """
        ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
        for length, group in itertools.groupby(ordered, key=lambda prompt: len(prompt.ids)):
            members = list(group)
            for first in range(0, len(members), batch):
                ids = torch.tensor([prompt.ids for prompt in members[first : first + batch]], device=self.device)
                yield [self._finished(row, length) for row in self.generate(ids, new_tokens, temperature)]

    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int, temperature: float) -> list[list[int]]:
        """Prompts [N, P] of one length and what the target writes after them; rows may run on past their end."""
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=0 if temperature > 0 else None,
            top_p=1.0 if temperature > 0 else None,
            pad_token_id=0,
        )
        return output.tolist()

    def end_of_answer(self, row: Sequence[int], prompt_length: int) -> int:
        """Index after the first end-of-sequence token of the answer, or len(row)."""
        ends = self.config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        return next((i + 1 for i in range(prompt_length, len(row)) if row[i] in stops), len(row))

    def _finished(self, row: list[int], prompt_length: int) -> TrainingSequence:
        end = self.end_of_answer(row, prompt_length)
        return TrainingSequence(tuple(row[: cut_cycle(row[:end], prompt_length)]), prompt_length)
