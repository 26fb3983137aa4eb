"""The drafter as a process: its engine behind the link's server. Also `python -m drafter_service.server`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

import torch

from cluster.errors import ConfigError
from cluster.link.drafter_end import DrafterServer
from cluster.own_process import read_settings, when_orphaned
from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine

log = logging.getLogger(__name__)


def serve(
    settings: DrafterSettings,
    host: str,
    port: int,
    on_ready: Callable[[str], None],
    stop: threading.Event | None = None,
    drafter_id: str = "",
) -> None:
    """Load, listen on host:port (0 = any free one), call on_ready("host:port"), return when `stop` is set.

    drafter_id: what verifiers are told in the Welcome; "" = a random one.

    Without `stop` it serves for the life of the process. Raises ConfigError before anything listens, OSError if the
    port cannot be had, and whatever ended the engine: a drafter that cannot draft is of no use.
    """
    stop = stop or threading.Event()
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        stop.set()

    torch.set_num_threads(settings.threads)
    engine = DrafterEngine(settings, on_failure=failed, drafter_id=drafter_id)
    try:
        server = DrafterServer(
            engine,
            host=host,
            port=port,
            token=settings.token,
            tls=settings.tls,
            heartbeat_s=settings.heartbeat_s,
            hard_deadline_s=settings.hard_deadline_s,
            device=settings.device,
            load=engine.load,
        )
        try:
            log.info("drafter %s listens at %s", engine.drafter_id, server.address)
            on_ready(server.address)
            stop.wait()
        finally:
            server.stop()
    finally:
        engine.stop()
    if failures:
        raise failures[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM or SIGINT, 1 if the engine failed, 2 for settings that cannot be served."""
    options = _parser().parse_args(arguments)
    settings = read_settings(DrafterSettings, options.settings)
    if settings is None:
        return 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.exit_with_parent is not None:
        when_orphaned(options.exit_with_parent or os.getppid(), stop.set)
    try:
        serve(settings, options.host, options.port, _print_ready, stop)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        print(f"the drafter's engine failed: {error!r}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m drafter_service.server", description=__doc__)
    parser.add_argument("--settings", required=True, help="DrafterSettings as JSON; - = from standard input")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one")
    parser.add_argument(
        "--exit-with-parent",
        type=int,
        nargs="?",
        const=0,
        metavar="PID",
        help="end when this parent process is gone (default: the one at the start)",
    )
    return parser


def _print_ready(address: str) -> None:
    print(json.dumps({"ready": address}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
