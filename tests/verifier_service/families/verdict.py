"""What transformers says of a text, and whether an outcome says the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tests.verifier_service.families.ranks import Outcome
from tests.verifier_service.families.schedule import OUTPUT, TAPS, Ask, Texts, asks

TIE = 1e-4  # two logits so close may win in either order
CLOSE = 1e-4  # float32 sums in another order


@dataclass(frozen=True)
class Verdict:
    """tokens: output that was compared. ties: where the outcome took the other of two equal logits.

    wrong: the first contradiction in words, "" = exact. logits, taps: largest differences to the stock forward.
    """

    tokens: int
    ties: int
    wrong: str
    logits: float
    taps: float


def generate(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """transformers' own greedy continuation."""
    tokens = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)  # type: ignore[operator]
    return tuple(output[0, len(prompt) :].tolist())


def texts(model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> Texts:
    return [(prompt, generate(model, prompt, OUTPUT)) for prompt in prompts]


class Judge:
    """Compares outcomes of one target with its stock model; forwards over a text are made once."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def verdict(self, texts: Texts, seed: int, outcome: Outcome) -> Verdict:
        tokens = ties = 0
        logits = taps = 0.0
        wrong = ""
        for ask in asks(texts, seed):
            prompt, text = texts[ask.text]
            output, finish = outcome.outputs.get(ask.name, []), outcome.finishes.get(ask.name, "none")
            tied, why = self._compare(prompt, text, output, ask, finish)
            tokens, ties, wrong = tokens + len(output), ties + tied, wrong or why
            if not output:
                continue
            stock, hidden = self._forward((*prompt, *output), (*prompt, *text))
            for index in range(len(output)):
                row, at = outcome.rows[ask.name, index], len(prompt) + index - 1
                logits = max(logits, (row.logits - stock[at]).abs().max().item())
                taps = max(taps, (row.taps - hidden[at]).abs().max().item())
        return Verdict(tokens, ties, wrong, logits, taps)

    def _compare(
        self, prompt: tuple[int, ...], text: tuple[int, ...], output: list[int], ask: Ask, finish: str
    ) -> tuple[int, str]:
        """Ties, and what is wrong."""
        ties = 0
        for index, token in enumerate(output):
            if token == text[index]:
                continue
            seen = (*prompt, *output[:index])
            best = self._forward(seen, seen)[0][-1].topk(2)
            if token not in best.indices or best.values[0] - best.values[1] > TIE:
                gap = best.values[0] - best.values[1]
                return ties, f"{ask.name}: token {index} is {token}, not {text[index]} (by {gap:.4f})"
            ties += 1
            rest = OUTPUT - index - 1
            text = (*output[: index + 1], *(generate(self._model, (*seen, token), rest) if rest else ()))
        stop = next((i for i, token in enumerate(text[: ask.limit]) if token in ask.stops), None)
        due = ("length", ask.limit) if stop is None else ("stop", stop + 1)
        if (finish, len(output)) != due and not (finish == "abort" and len(output) < due[1] and not ask.resumes):
            return ties, f"{ask.name}: ended by {finish} after {len(output)} tokens, not by {due[0]} after {due[1]}"
        return ties, ""

    @torch.no_grad()
    def _forward(self, tokens: tuple[int, ...], usual: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, vocabulary] and taps of at least `tokens`; of `usual`, if it begins with them."""
        whole = usual if usual[: len(tokens)] == tokens else tokens
        if whole not in self._known:
            output = self._model(torch.tensor([whole]), use_cache=False, output_hidden_states=True)
            taps = torch.cat([output.hidden_states[layer + 1][0] for layer in TAPS], dim=-1)
            self._known[whole] = output.logits[0], taps
        logits, taps = self._known[whole]
        return logits[: len(tokens)], taps[: len(tokens)]
