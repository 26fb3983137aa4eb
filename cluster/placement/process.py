"""A service's model process: one Ray actor that runs one long main function in a thread, and answers beside it."""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.placement.logs import configure_logs


@dataclass(frozen=True)
class Main:
    """What a process runs: `function` ("package.module:name"), called with these arguments and `on_ready=`.

    on_ready(report: str) has to be called once, when the process can serve; the report is an address. The function
    returns or raises only when the process is finished. It is named, not passed, so that the one who starts
    processes need not import (torch and all) what they run.
    """

    function: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self) -> Callable[..., None]:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


class ServiceProcess:
    """preload: modules to import at once, in the background. threads: of numerical libraries (OMP_NUM_THREADS)."""

    def __init__(self, preload: tuple[str, ...], threads: int) -> None:
        configure_logs()
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported, or it has no effect
        self._ready = threading.Event()
        self._report = ""
        threading.Thread(target=_import_all, args=(preload,), name="preload", daemon=True).start()

    def host(self) -> str:
        """This process's address for others."""
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def pid(self) -> int:
        return os.getpid()

    def ping(self) -> None:
        """Returns while the process is scheduled at all: a stopped one does not."""

    def run(self, main: Main) -> None:
        """Blocks for the life of the service; raises what the main function raises."""
        main.resolve()(*main.arguments, **main.keywords, on_ready=self._on_ready)

    def ready(self, timeout_s: float) -> str:
        """The report of on_ready. Raises TimeoutError."""
        if not self._ready.wait(timeout_s):
            raise TimeoutError(f"not ready after {timeout_s:g} s")
        return self._report

    def _on_ready(self, report: str) -> None:
        self._report = report
        self._ready.set()


def _import_all(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)


def service_actor(role: str) -> Any:
    """The process as a Ray actor class, called `role` in `ps` and in Ray's own listings.

    Several threads, since `run`, `ready` and pings have to answer at the same time.
    """
    return ray.remote(max_restarts=0, max_concurrency=4)(type(role, (ServiceProcess,), {}))  # type: ignore[call-overload]
