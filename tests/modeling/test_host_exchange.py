"""Ranks that exchange parts through shared memory: threads here, which share it trivially."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling import host_exchange
from modeling.host_exchange import CAPACITY, LINE, HostExchange


def ranks(size: int, timeout_s: float = 20.0) -> list[HostExchange]:
    memory = mmap.mmap(-1, size * LINE + 2 * size * CAPACITY)
    return [HostExchange(memory, rank, size, timeout_s) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_sees_all_parts_of_every_turn_in_rank_order(size):
    shapes = [(1, 3), (7, 5), (0, 4), (64, 64), (1, 1)] * 20
    parts = [[torch.randn(shape) for shape in shapes] for _ in range(size)]

    def run(exchange: HostExchange, mine: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack([part.clone() for part in exchange.exchange(one)]) for one in mine]

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, ranks(size), parts))
    for turn in range(len(shapes)):
        want = torch.stack([parts[rank][turn].reshape(-1) for rank in range(size)])
        assert all(torch.equal(result[turn], want) for result in results)


def test_any_dtype_goes_through():
    left, right = ranks(2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(right.exchange, torch.ones(3, dtype=torch.bfloat16))
        assert torch.equal(left.exchange(torch.zeros(3, dtype=torch.bfloat16))[1], torch.ones(3, dtype=torch.bfloat16))
        other.result()


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(TimeoutError, match="rank 1 of the target did not join exchange 1"):
        ranks(2, timeout_s=0.05)[0].exchange(torch.zeros(4))


def test_a_part_beyond_the_capacity_does_not_fit():
    exchange = ranks(2)[0]
    assert exchange.fits(torch.empty(CAPACITY // 4))
    assert not exchange.fits(torch.empty(CAPACITY // 4 + 1))


def test_a_file_whose_name_cannot_be_told_is_not_left_behind(monkeypatch, tmp_path):
    make = host_exchange.tempfile.mkstemp
    monkeypatch.setattr(host_exchange, "_NAME_BYTES", 8)
    monkeypatch.setattr(host_exchange.tempfile, "mkstemp", lambda prefix, dir: make(prefix=prefix, dir=tmp_path))
    assert host_exchange._create(LINE) is None
    assert os.listdir(tmp_path) == []


def test_without_room_for_a_file_there_is_no_exchange(monkeypatch):
    def full(prefix: str, dir: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_exchange.tempfile, "mkstemp", full)
    assert host_exchange._create(LINE) is None
