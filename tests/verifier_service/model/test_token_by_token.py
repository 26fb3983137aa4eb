"""The delta rule token by token: the blocked form's numbers, and the same bits wherever a block begins or ends."""

from __future__ import annotations

import pytest
import torch

from verifier_service.model.delta_rule import one_block, replayed_token_by_token, token_by_token, unit

LAYERS, ROWS, HEADS, TOKENS, KEY, VALUE = 2, 3, 4, 7, 16, 8
FLAT = LAYERS * ROWS * HEADS


@pytest.fixture
def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "query": unit(random(FLAT, TOKENS, KEY)) * KEY**-0.5,
        "key": unit(random(FLAT, TOKENS, KEY)),
        "value": random(FLAT, TOKENS, VALUE),
        "decay": torch.rand(FLAT, TOKENS, generator=generator),
        "beta": torch.rand(FLAT, TOKENS, generator=generator),
        "memory": random(FLAT, KEY, VALUE),
    }


def run(
    drawn: dict[str, torch.Tensor], first: int, stop: int, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, decay, beta = (drawn[name][:, first:stop] for name in ("query", "key", "value", "decay", "beta"))
    return token_by_token(query, key, value, decay, beta, memory)


def test_it_is_the_blocked_delta_rule(drawn):
    memory = drawn["memory"].clone()
    output, corrected = run(drawn, 0, TOKENS, memory)
    expected, _, also_corrected = one_block(
        drawn["query"], drawn["key"], drawn["value"], drawn["decay"].log(), drawn["beta"], drawn["memory"]
    )
    assert torch.allclose(output, expected, atol=1e-5)
    assert torch.allclose(corrected, also_corrected, atol=1e-5)


def test_two_blocks_are_one_to_the_bit(drawn):
    whole, parts = drawn["memory"].clone(), drawn["memory"].clone()
    output, _ = run(drawn, 0, TOKENS, whole)
    cut = torch.cat([run(drawn, 0, 3, parts)[0], run(drawn, 3, TOKENS, parts)[0]], dim=1)
    assert torch.equal(cut, output)
    assert torch.equal(parts, whole)


def test_a_replayed_prefix_leaves_the_bits_that_the_prefix_alone_leaves(drawn):
    kept = torch.tensor([4, 1, TOKENS])
    _, corrected = run(drawn, 0, TOKENS, drawn["memory"].clone())

    def shaped(x: torch.Tensor) -> torch.Tensor:
        return x.view(LAYERS, ROWS, HEADS, *x.shape[1:])

    memory = replayed_token_by_token(
        shaped(drawn["memory"]).clone(), shaped(drawn["key"]), shaped(drawn["decay"]), shaped(corrected), kept
    )
    for row, count in enumerate(kept.tolist()):
        alone = drawn["memory"].clone()
        run(drawn, 0, count, alone)
        assert torch.equal(memory[:, row], shaped(alone)[:, row])
