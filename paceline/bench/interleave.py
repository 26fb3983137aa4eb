"""In which order decoders run: A B C, C B A, ... so that a machine's ups and downs meet all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.bench.runs import Decoder, Run

WARM_UP_TOKENS = 16


def order(names: Sequence[str], repeats: int) -> list[str]:
    """Every name once per repeat, each second repeat backwards."""
    return [name for repeat in range(repeats) for name in (names if repeat % 2 == 0 else reversed(names))]


def measure(
    decoders: Sequence[Decoder],
    prompts: Sequence[tuple[int, ...]],
    concurrency: int,
    max_tokens: int,
    repeats: int,
    advance: Callable[[int, str], None],
) -> dict[str, list[Run]]:
    """Runs of each decoder by name, one a repeat, after a short warm-up of each. advance(1, note) after each run."""
    by_name = {decoder.name: decoder for decoder in decoders}
    for decoder in decoders:
        decoder.run(prompts[:concurrency], concurrency, min(WARM_UP_TOKENS, max_tokens))
    runs: dict[str, list[Run]] = {name: [] for name in by_name}
    for name in order(list(by_name), repeats):
        run = by_name[name].run(prompts, concurrency, max_tokens)
        runs[name].append(run)
        advance(1, f"{name}, concurrency {concurrency}: {run.tokens / run.seconds:.1f} tokens/s")
    return runs
