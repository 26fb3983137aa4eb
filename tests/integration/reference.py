"""What transformers says: the stock model in fp32, and whether a greedy text is its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TIE = 1e-4  # logits closer than this may go either way


class Reference:
    def __init__(self, directory: Path):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy continuation by transformers' own generate; ends at its end-of-sequence token."""
        ids = torch.tensor([list(prompt)])
        return self.model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def ties(self, prompt: Sequence[int], text: Sequence[int]) -> int:
        """How many tokens of `text` are not generate's own but lie within TIE of its best logit, teacher-forced.

        Fails at a token that is neither: the text is then not this model's greedy text.
        """
        if list(text) == self.generate(prompt, len(text)):
            return 0
        logits = self.model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
        count = 0
        for place, (row, token) in enumerate(zip(logits, text, strict=True)):
            best = int(row.argmax())
            gap = float(row[best] - row[token])
            assert gap <= TIE, f"token {place} is {token}, transformers says {best}: {gap:.6f} better"
            count += best != token
        return count
