"""Ranks start together or not at all, and all of them know why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from verifier_service import joint_start
from verifier_service.joint_start import JointStart, RankFailedError

ROOT = Path(__file__).resolve().parents[2]
REASON = "rank 1 could not start: NoRoomError: kv_cache_tokens is 'auto', but nothing is left"


class Starts:
    """JointStarts of this process, over one store."""

    def __init__(self, size: int):
        self.master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.all = [JointStart(self.open, rank, size) for rank in range(size)]

    def open(self) -> dist.TCPStore:
        return dist.TCPStore("127.0.0.1", self.master.port, wait_for_workers=False)


def test_ranks_that_have_all_loaded_meet():
    met = Starts(3)
    starts = met.all
    threads = [threading.Thread(target=start.meet, daemon=True) for start in starts[1:]]
    for thread in threads:
        thread.start()
    starts[0].meet()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_the_first_failure_is_what_every_rank_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joint_start, "GRACE_S", 600.0)  # this is everybody's process
    failing = Starts(3)
    starts = failing.all
    first = ValueError("no room")
    assert starts[1].failed(first) is first
    after = starts[0].failed(RuntimeError("Connection closed by peer"))
    assert isinstance(after, RankFailedError)
    with pytest.raises(RankFailedError, match="rank 1 could not start: ValueError: no room"):
        starts[2].meet()
    assert str(after) == "rank 1 could not start: ValueError: no room"
    starts[2].failed(after)


def test_a_failure_over_a_path_that_is_no_utf_8_is_told_as_well(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joint_start, "GRACE_S", 600.0)
    failing = Starts(2)
    starts = failing.all
    first = OSError(os.fsdecode(b"no file /models/\xff"))
    assert starts[1].failed(first) is first
    with pytest.raises(RankFailedError, match=r"OSError: no file /models/\\udcff") as error:
        starts[0].meet()
    starts[0].failed(error.value)


def test_a_rank_in_a_collective_ends_soon_after_another_failed_and_says_what_that_one_said():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.verifier_service.failing_rank"]
    waiting, failing = (
        subprocess.Popen(
            [*command, str(rank), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    )
    try:
        assert failing.stdout is not None
        assert failing.stdout.readline() == REASON.removeprefix("rank 1 could not start: ") + "\n"
        began = time.monotonic()
        _, said = waiting.communicate(timeout=60)  # its collective would wait for 120 s
        assert waiting.returncode == 1
        assert REASON in said
        assert time.monotonic() - began < joint_start.GRACE_S + 10
    finally:
        for process in (waiting, failing):
            process.kill()
            process.communicate()
