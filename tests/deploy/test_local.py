"""Ranks and a drafter as real processes on this machine, without Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from cluster.contracts import Configure, EngineRequest, SetDrafters, Submit
from cluster.errors import EngineDiedError
from deploy.local import LocalDrafter, LocalGang
from drafter_service.config import DrafterSettings
from tests.integration.pair import build_pair
from tests.verifier_service.test_port import WAIT_S, Client, eventually
from verifier_service.config import VerifierSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SECRET = "the pair's"
PROMPTS = [tuple(range(5, 8 + 3 * i)) for i in range(6)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_pair(tmp_path_factory.mktemp("pair"))


def verifier(pair: tuple[Path, Path], ranks: int, mode: str) -> VerifierSettings:
    return VerifierSettings.model_validate(
        {
            "target": str(pair[0]),
            "drafter": str(pair[1]),
            "tensor_parallel_size": ranks,
            "dtype": "float32",
            "device": "cpu",
            "kv_cache_tokens": 2048,
            "max_requests": 8,
            "speculation": {"mode": mode, "soft_deadline_s": 2.0},
            "link": {"token": SECRET},
        }
    )


def drafter(pair: tuple[Path, Path]) -> DrafterSettings:
    return DrafterSettings(
        checkpoint=str(pair[1]), target=str(pair[0]), dtype="float32", device="cpu", window=128, token=SECRET
    )


def outputs(client: Client, prefix: str, count: int = 24) -> list[list[int]]:
    names = [f"{prefix}{i}" for i in range(len(PROMPTS))]
    client.send(*[Submit(EngineRequest(n, p, seed=1, max_new_tokens=count)) for n, p in zip(names, PROMPTS)])
    client.until(*names)
    assert {delta.error for delta in client.deltas} == {None}
    return [client.text(name) for name in names]


def test_two_ranks_with_a_drafter_elsewhere_say_what_one_rank_says_alone(pair):
    with LocalGang(verifier(pair, 1, "none")) as alone:
        plain = outputs(Client(alone.address, SECRET), "plain")
    with LocalDrafter(drafter(pair)) as draft, LocalGang(verifier(pair, 2, "disaggregated")) as gang:
        client = Client(gang.address, SECRET)
        client.send(SetDrafters((draft.address,)))
        assert eventually(lambda: client.status().linked)
        assert outputs(client, "drafted") == plain
        assert client.status().counters["drafted_tokens"] > 0
        draft.stop()
        assert eventually(lambda: not client.status().linked)
        assert outputs(client, "alone") == plain


def test_a_stalled_drafter_changes_no_text_and_is_used_again(pair):
    with LocalDrafter(drafter(pair)) as draft, LocalGang(verifier(pair, 1, "disaggregated")) as gang:
        client = Client(gang.address, SECRET)
        client.send(SetDrafters((draft.address,)), Configure(soft_deadline_s=0.05))
        assert eventually(lambda: client.status().linked)
        drafted = outputs(client, "drafted", 200)
        os.kill(draft.pids[0], signal.SIGSTOP)
        try:
            assert outputs(client, "stalled", 200) == drafted
        finally:
            os.kill(draft.pids[0], signal.SIGCONT)
        assert eventually(lambda: client.status().linked)
        before = client.status().counters["draft_answers"]

        def used_again() -> bool:  # after how many tokens depends on what the stall has cost
            assert outputs(client, f"again {client.status().step}", 200) == drafted
            return client.status().counters["draft_answers"] > before

        assert eventually(used_again)


def test_a_colocated_drafter_changes_no_text(pair):
    with LocalGang(verifier(pair, 1, "colocated")) as gang:
        client = Client(gang.address, SECRET)
        drafted = outputs(client, "drafted")
        assert client.status().counters["draft_answers"] > 0
    with LocalGang(verifier(pair, 1, "none")) as gang:
        assert outputs(Client(gang.address, SECRET), "plain") == drafted


def test_a_dead_rank_ends_the_gang_and_its_clients_hear_of_it(pair):
    with LocalGang(verifier(pair, 2, "none")) as gang:
        client = Client(gang.address, SECRET)
        client.send(Submit(EngineRequest("a", PROMPTS[0], seed=1, max_new_tokens=1000)))
        client.codec.receive(client.socket)
        os.kill(gang.pids[1], signal.SIGKILL)
        assert client.is_closed()
        assert eventually(lambda: gang.failure is not None)
        assert eventually(lambda: not any(is_running(pid) for pid in gang.pids))


def test_an_idle_gang_notices_a_dead_rank(pair):
    with LocalGang(verifier(pair, 2, "none")) as gang:
        began = time.monotonic()
        os.kill(gang.pids[1], signal.SIGKILL)
        assert eventually(lambda: gang.failure is not None)
        assert time.monotonic() - began < WAIT_S


def test_a_checkpoint_that_is_not_there_is_told_before_anything_loads(pair):
    settings = verifier(pair, 1, "none").model_copy(update={"target": "/nowhere"})
    with pytest.raises(EngineDiedError, match=r"verifier\.target.*/nowhere does not exist"):
        LocalGang(settings)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
