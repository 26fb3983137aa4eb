"""Model processes on this machine without Ray: what the benchmark and tests run against.

with LocalDrafter(drafter) as draft, LocalGang(verifier) as gang:
    gang.address  # of the engine port; send it SetDrafters((draft.address,))
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from cluster.errors import EngineDiedError
from drafter_service.config import DrafterSettings
from verifier_service.config import VerifierSettings

CHECKOUT = Path(__file__).resolve().parent.parent
END_S = 10.0  # after SIGTERM, before SIGKILL
TAIL_BYTES = 4000


class LocalProcesses:
    """Processes that start, serve and end together.

    Each is `told` its settings on standard input and prints a JSON line {"ready": ...} on its standard output. Raises
    EngineDiedError with the last words of the one that ended, or that was not ready, within timeout_s. If one ends
    later, the others are killed and `failure` says why. Standard error goes to a file that only `failure` quotes.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], told: str, timeout_s: float
    ):
        self.failure: str | None = None
        self._stopping = False
        self._guard = threading.Lock()
        self._reports: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._logs = [tempfile.TemporaryFile() for _ in commands]  # noqa: SIM115 (they outlive this call)
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, environment, log in zip(commands, environments, self._logs):
                self._processes.append(_spawn(command, environment, told, log.fileno()))
            self._watches = [
                threading.Thread(target=self._watch, args=(index,), name=f"local-process-{index}", daemon=True)
                for index in range(len(self._processes))
            ]
            for watch in self._watches:
                watch.start()
            self.reports = self._ready(timeout_s)
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    @property
    def address(self) -> str:
        """What the first process reported: "host:port"."""
        return self.reports[0]

    def stop(self) -> None:
        """End all of them and wait until they are gone. May be called any number of times."""
        with self._guard:
            self._stopping = True
        until = time.monotonic() + END_S
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _ready(self, timeout_s: float) -> list[str]:
        until = time.monotonic() + timeout_s
        reports: dict[int, str] = {}
        while len(reports) < len(self._processes):
            try:
                index, report = self._reports.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(len(self._processes))) - set(reports))
                raise EngineDiedError(f"processes {missing} were not ready after {timeout_s:g} s") from None
            if report is None:
                raise EngineDiedError(self.failure or f"process {index} ended")
            reports[index] = report
        return [reports[index] for index in range(len(self._processes))]

    def _watch(self, index: int) -> None:
        """Reads one process until its end, which ends the others too."""
        process = self._processes[index]
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b'{"ready"'):
                self._reports.put((index, json.loads(line)["ready"]))
        status = process.wait()
        with self._guard:
            if self._stopping:
                return
            self._stopping = True
            self.failure = f"process {index} ended with status {status}: {self._last_words(index)}"
        for other in self._processes:
            other.kill()
        self._reports.put((index, None))

    def _last_words(self, index: int) -> str:
        log = self._logs[index]
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - TAIL_BYTES))
        return log.read().decode(errors="replace").strip() or "it said nothing"


class LocalGang(LocalProcesses):
    """All ranks of one verifier. `address`: of its engine port."""

    def __init__(
        self,
        settings: VerifierSettings,
        *,
        engine_id: str = "local",
        host: str = "127.0.0.1",
        start_timeout_s: float = 300.0,
    ):
        size = settings.tensor_parallel_size
        shared = ["--settings", "-", "--engine-id", engine_id, "--host", host]
        shared += ["--rendezvous", f"{host}:{_free_port(host)}", "--exit-with-parent"]
        commands = [_python("deploy.rank_process", *shared, "--rank", str(rank)) for rank in range(size)]
        environments = [_environment(settings.threads_per_rank) for _ in range(size)]
        if settings.device == "cuda":
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if size > 1 else []
            for rank in range(size if size > 1 else 0):
                environments[rank]["CUDA_VISIBLE_DEVICES"] = devices[rank] if len(devices) >= size else str(rank)
        super().__init__(commands, environments, settings.model_dump_json(), start_timeout_s)


class LocalDrafter(LocalProcesses):
    """One drafter. `address`: where verifiers link to it. port 0: any free one."""

    def __init__(
        self, settings: DrafterSettings, *, host: str = "127.0.0.1", port: int = 0, start_timeout_s: float = 300.0
    ):
        command = _python("drafter_service.server", "--settings", "-", "--host", host)
        command += ["--port", str(port), "--exit-with-parent", str(os.getpid())]
        super().__init__([command], [_environment(settings.threads)], settings.model_dump_json(), start_timeout_s)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def _spawn(command: Sequence[str], environment: dict[str, str], told: str, log: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as channel:  # one that has ended already says why
        channel.write(told.encode())
    return process


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
