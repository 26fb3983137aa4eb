"""The target continues prompts with the project's own engine, many at once, each until it stops or begins to cycle.

    python -m models.build.continuations --prompts build/prompts/train.jsonl --out build/own.jsonl --temperature 0

A request that loops makes room for the next one at once, which a batch of transformers' generate cannot. Lines are
appended as they finish; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import queue
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from cluster.contracts import Delta, EngineInfo, EngineRequest, SamplingParams
from drafter_service.training import sequences
from paceline.progress import bar
from verifier_service.engine import Engine
from verifier_service.model.runner import TargetRunner
from verifier_service.scheduler import SchedulerLimits

BLOCK_TOKENS = 16
LONGEST = 768  # tokens of a prompt and its continuation
LOOK_EVERY = 8  # tokens; looking for a cycle costs as much as a token
SILENCE_S = 120.0  # no engine step takes as long

Finished = Callable[[sequences.Prompt, list[int]], None]  # a prompt and its completion


class Writer:
    """Continues prompts on one engine; `concurrency` requests run at once."""

    def __init__(self, target: Path, stop_token_ids: frozenset[int], concurrency: int):
        blocks = concurrency * (LONGEST // BLOCK_TOKENS + 1)
        runner = TargetRunner(
            target,
            num_blocks=blocks,
            block_tokens=BLOCK_TOKENS,
            num_slots=concurrency,
            dtype=torch.float32,
            device="cpu",
            max_context=LONGEST,
        )
        limits = SchedulerLimits(concurrency, blocks, BLOCK_TOKENS, step_tokens=1024, max_waiting=concurrency)
        info = EngineInfo("recipe", "", LONGEST, runner.shape.vocabulary, concurrency, block_size=1)
        self._engine = Engine(runner, limits, info)
        self._stop, self._concurrency = stop_token_ids, concurrency
        self._inbox: queue.SimpleQueue[list[Delta]] = queue.SimpleQueue()

    def run(
        self,
        prompts: list[sequences.Prompt],
        new_tokens: int,
        temperature: float,
        seed: int,
        finished: Finished,
        through_cycles: bool = False,
    ) -> None:
        """Calls `finished` for each, in the order in which they end. Once only: the engine stops at the end.

        through_cycles: texts go on where they begin to repeat themselves, instead of being cut there.
        Raises RuntimeError for a prompt that the engine refuses, queue.Empty if it is silent for SILENCE_S.
        """
        texts: dict[str, list[int]] = {}
        end = len if through_cycles else first_cycle
        waiting = iter(enumerate(prompts))

        def start() -> None:
            for index, prompt in waiting:
                texts[str(index)] = []
                sampling = SamplingParams(temperature=temperature)
                self._engine.submit(
                    EngineRequest(
                        str(index), prompt.ids, seed + index, new_tokens, sampling=sampling, stop_token_ids=self._stop
                    ),
                    self._inbox.put,
                )
                return

        self._engine.start()
        try:
            for _ in range(self._concurrency):
                start()
            while texts:
                for delta in self._inbox.get(timeout=SILENCE_S):
                    name, text = delta.request_id, texts[delta.request_id]
                    text += delta.token_ids
                    if delta.finish == "error":
                        raise RuntimeError(f"prompt {name} cannot be continued: {delta.error}")
                    if delta.finish:
                        prompt = prompts[int(name)]
                        finished(prompt, text[: end(text)])
                        del texts[name]
                        start()
                    elif len(text) % LOOK_EVERY == 0 and end(text) < len(text):
                        self._engine.abort(name)
        finally:
            self._engine.stop()


def first_cycle(text: list[int]) -> int:
    return sequences.cut_cycle(text, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("models/tiny/target"))
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--new-tokens", type=int, default=144)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, local_files_only=True)
    prompts = sequences.read(arguments.prompts, tokenizer)[0]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if arguments.out.exists() and arguments.out.stat().st_size:
        written = sequences.read(arguments.out, tokenizer)[1]
        done = {sequence.ids[: sequence.answer_start] for sequence in written}
    left = [prompt for prompt in prompts if prompt.ids not in done]
    writer = Writer(arguments.target, frozenset({tokenizer.eos_token_id}), arguments.concurrency)
    with arguments.out.open("a", encoding="utf-8") as file, bar("continuations", len(left)) as advance:

        def finished(prompt: sequences.Prompt, completion: list[int]) -> None:
            file.write(json.dumps({"prompt_ids": prompt.ids, "completion_ids": completion}) + "\n")
            file.flush()
            advance(1, "")

        writer.run(left, arguments.new_tokens, arguments.temperature, arguments.seed, finished)


if __name__ == "__main__":
    main()
