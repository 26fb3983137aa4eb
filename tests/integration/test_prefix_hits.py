"""The shipped pair: acceptance after a prefix hit is what it is without the prefix cache, and so is the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.contracts import EngineRequest
from deploy.link import make_link
from tests.verifier_service.test_engine import Inbox
from verifier_service.config import VerifierSettings
from verifier_service.engine import Engine
from verifier_service.rank import build_engine, build_runner

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SOURCE = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of a file without their ends."""
    with open(path, encoding=encoding) as file:
        return [line.rstrip("\\n") for line in file]


def count_words(lines):
'''


def start(prefix_cache: bool) -> Engine:
    torch.set_num_threads(1)
    settings = VerifierSettings.model_validate(
        {
            "target": str(TINY / "target"),
            "drafter": str(TINY / "drafter"),
            "dtype": "float32",
            "device": "cpu",
            "kv_cache_tokens": 4096,
            "max_requests": 2,
            "prefix_cache": prefix_cache,
            "checkpoint_bytes": 16 << 20,
            "speculation": {"mode": "colocated", "adaptive": False, "soft_deadline_s": 10},
        }
    )
    engine = build_engine(settings, build_runner(settings), None, "hits", make_link)
    engine.start()
    return engine


@pytest.mark.slow
def test_accepted_lengths_after_a_hit_equal_those_after_a_miss():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "target" / "tokenizer.json"))
    first = tokenizer.encode(SOURCE).ids
    engines = {prefix_cache: start(prefix_cache) for prefix_cache in (False, True)}
    said: dict[bool, list[list[tuple[tuple[int, ...], int]]]] = {}
    for prefix_cache, engine in engines.items():
        inbox, prompt, said[prefix_cache] = Inbox(), first, []
        for turn in range(3):
            name = f"turn{turn}"
            engine.submit(EngineRequest(name, tuple(prompt), seed=1, max_new_tokens=40), inbox)
            inbox.wait(name)
            said[prefix_cache].append([(delta.token_ids, delta.accepted) for delta in inbox.deltas[name]])
            prompt = [*prompt, *inbox.text(name), *tokenizer.encode("\n\ndef count_words(lines):\n").ids]
        engine.stop()
    counters = engines[True].status().counters
    assert counters["prefix_hit_tokens"] > 0.7 * counters["prefix_queried_tokens"] - len(first)
    assert counters["context_tokens_shared"] > 0.7 * counters["prefix_hit_tokens"], "the drafter was sent them again"
    assert counters["accepted_tokens"] > 0.3 * counters["output_tokens"]
    assert said[True] == said[False]
