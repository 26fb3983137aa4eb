"""The drafter as a process, over the real link."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.link.messages import DraftAnswer, DraftAsk, Piece
from cluster.link.verifier_end import RemoteLink
from drafter_service.engine import DrafterEngine
from drafter_service.server import main, serve
from tests.drafter_service.pairs import BLOCK, settings_for
from tests.drafter_service.peers import CONTEXT, RecordingPeer, ask_for, features

ROOT = Path(__file__).resolve().parents[2]
START_S, LINK_S = 60.0, 20.0
TOKEN = "secret"


def start(target: Path, drafter: Path, *options: str, **changes: object) -> subprocess.Popen[str]:
    settings = settings_for(target, drafter, token=TOKEN, **changes)
    command = [sys.executable, "-m", "drafter_service.server", "--settings", settings.model_dump_json(), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ready(process: subprocess.Popen[str]) -> str:
    """The address that the process prints once it serves."""
    timer = threading.Timer(START_S, process.kill)
    timer.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    timer.cancel()
    assert line, process.communicate()[1]
    return json.loads(line)["ready"]


@pytest.fixture
def process(target_dir: Path, drafter_dir: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(target_dir, drafter_dir)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def local(target_dir: Path, drafter_dir: Path) -> DrafterEngine:
    return DrafterEngine(settings_for(target_dir, drafter_dir), threaded=False)


def linked(engine: DrafterEngine, address: str) -> RemoteLink:
    """A link that introduces itself as `engine`, which has the same checkpoints, would."""
    link = RemoteLink(verifier_id="v", token=TOKEN, **engine.identity)
    link.set_drafters([address])
    deadline = time.monotonic() + LINK_S
    while not link.state.linked:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return link


def expected(engine: DrafterEngine) -> DraftAnswer:
    peer = RecordingPeer()
    engine.linked(peer)
    engine.append(peer, "v/r/0", 0, features(CONTEXT))
    answer = ask_for(engine, peer, "v/r/0", CONTEXT)
    engine.lost(peer)
    return answer


def test_a_drafter_process_drafts_over_the_link_and_ends_on_sigterm(process, local):
    link = linked(local, ready(process))
    try:
        assert (link.state.block_size, link.state.window) == (BLOCK, 256)
        ask = DraftAsk("v/r/0", CONTEXT, 7, BLOCK - 1)
        link.append([Piece("v/r/0", 0, len(features(CONTEXT)[:9]))], features(CONTEXT)[:9])
        link.append([Piece("v/r/0", 9, len(features(CONTEXT)[9:]))], features(CONTEXT)[9:])
        link.ask([ask])
        answer = link.collect([ask], LINK_S)[0]
        assert answer.token_ids == expected(local).token_ids
        assert answer.confidence == pytest.approx(expected(local).confidence, rel=1e-4)
    finally:
        link.stop()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=LINK_S)
    assert (process.returncode, output) == (0, ""), errors


def test_a_checkpoint_that_cannot_be_served_ends_it_with_a_message(target_dir, tmp_path):
    process = start(target_dir, tmp_path)
    output, errors = process.communicate(timeout=START_S)
    assert (process.returncode, output) == (2, "")
    assert "drafter.checkpoint" in errors
    assert "Traceback" not in errors


def test_settings_that_cannot_be_are_named(target_dir, drafter_dir, capsys):
    settings = json.loads(settings_for(target_dir, drafter_dir).model_dump_json()) | {"window": 1, "treads": 2}
    assert main(["--settings", json.dumps(settings)]) == 2
    errors = capsys.readouterr().err
    assert "--settings window: Input should be greater than or equal to 16" in errors
    assert "--settings treads: Extra inputs are not permitted" in errors


PARENT = """
import subprocess, sys
child = subprocess.Popen([*sys.argv[1:], "--exit-with-parent"], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode(), flush=True)
sys.stdin.read()
"""


def test_it_ends_with_its_parent_if_told_to(target_dir, drafter_dir):
    settings = settings_for(target_dir, drafter_dir).model_dump_json()
    command = [sys.executable, "-m", "drafter_service.server", "--settings", settings]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[0])
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + LINK_S
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_serving_in_this_process_ends_when_told_to_and_raises_what_ended_the_engine(
    target_dir, drafter_dir, monkeypatch
):
    stop = threading.Event()
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        stop.set()

    serve(settings_for(target_dir, drafter_dir), "127.0.0.1", 0, on_ready, stop)
    assert addresses[0].startswith("127.0.0.1:")

    def broken(self: DrafterEngine) -> bool:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(DrafterEngine, "run_once", broken)
    monkeypatch.setattr(DrafterEngine, "load", lambda self: self.lost(RecordingPeer()))  # any event will do
    with pytest.raises(RuntimeError, match="the device is gone"):
        serve(settings_for(target_dir, drafter_dir, heartbeat_s=0.05), "127.0.0.1", 0, lambda _: None)
