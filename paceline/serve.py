"""`paceline serve FILE`: check the file, start everything, say when it is ready, end everything."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import typer
from rich.console import Console
from rich.text import Text

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from deploy.config import Application
    from deploy.file import DeployFile
    from deploy.session import AppState

POLL_S = 0.5
WATCH_S = 2.0
LEEWAY_S = 120.0
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")

console = Console(stderr=True, highlight=False, soft_wrap=True)


class ServeFailedError(Exception):
    """The application did not come up: why, in Serve's words."""


def serve(
    file: Annotated[Path, typer.Argument(help="deploy file, e.g. deploy/tiny.yaml", show_default=False)],
    address: Annotated[str | None, typer.Option(help="of a running Ray cluster; default: a Ray of its own")] = None,
    logs: Annotated[bool, typer.Option("--logs", help="show the logs of all processes")] = False,
) -> None:
    """Serve FILE until Ctrl-C. Exit codes: 0 ended by the user, 1 the application failed, 2 FILE cannot work."""
    from deploy.file import read_deploy_file

    _interruptible()
    try:
        _serve(read_deploy_file(file), address, logs)
    except ConfigError as error:
        _print("error", str(error))
        raise typer.Exit(2) from error
    except ServeFailedError as error:
        _print("failed", str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _print("ended", "nothing of it is left running")


def _serve(file: DeployFile, address: str | None, logs: bool) -> None:
    from deploy.session import check_room, deploy, ray_session, withdraw

    started = time.monotonic()
    if address is None:
        check_port(file.host, file.port)
    with ray_session(address, logs):
        _interruptible()  # Ray has put its own handlers in place
        check_room(file.application)
        deploy(file)
        try:
            _run(file, started)
        finally:
            if address is not None:  # a Ray of our own ends as a whole
                withdraw(file)


def _run(file: DeployFile, started: float) -> None:
    """From the submitted application to the user's Ctrl-C."""
    from deploy.session import app_state

    url = f"http://{file.host}:{file.port}{file.route_prefix.rstrip('/')}"
    shown = ""
    with console.status("starting") as spinner:
        for progress in _until_ready(lambda: app_state(file.name), url, deadline_s(file.application)):
            spinner.update(progress)
            if progress != shown and not console.is_terminal:
                _print("starting", progress)
            shown = progress
    _print("ready", f"{url} after {time.monotonic() - started:.0f} s")
    console.print(examples(url, file.application.model_name), markup=False)
    _report_changes(lambda: app_state(file.name))


def _interruptible() -> None:
    """SIGTERM ends as Ctrl-C does, and both work where a shell started this in the background with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if somebody listens there already: Serve would wait for the port in vain."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"http_options.port is {port}, but {host}:{port} cannot be had ({error.strerror}): "
                "end what uses it, or choose another port"
            ) from error


def deadline_s(application: Application) -> float:
    """Longest time that starting may take before it counts as failed."""
    drafter = application.drafter.start_timeout_s if application.drafter is not None else 0.0
    return max(application.verifier.start_timeout_s, drafter) + LEEWAY_S


def examples(url: str, model: str) -> str:
    """Two requests to try, ready to paste."""
    completion = json.dumps({"model": model, "prompt": "def fibonacci(n):", "max_tokens": 64})
    chat = {"model": model, "messages": [{"role": "user", "content": "Write a class Stack."}], "stream": True}
    header = "-H 'Content-Type: application/json'"
    return (
        f"Try:\n  curl {url}/v1/completions {header} -d '{completion}'\n"
        f"  curl -N {url}/v1/chat/completions {header} -d '{json.dumps(chat)}'\n"
        "Ctrl-C ends everything."
    )


def _until_ready(state: Callable[[], AppState], url: str, timeout_s: float) -> Iterator[str]:
    """Yields what is still missing until the health check says OK. Raises ServeFailedError."""
    until = time.monotonic() + timeout_s
    missing = ""
    while time.monotonic() < until:
        now = state()
        if now.status in FAILED:
            raise ServeFailedError(why(now))
        if now.status == "RUNNING":
            healthy, missing = _health(url)
            if healthy:
                return
        waiting = [d.name for d in now.deployments if d.status != "HEALTHY"]
        yield f"waiting for {', '.join(waiting)}" if waiting else missing or "the application is being built"
        time.sleep(POLL_S)
    raise ServeFailedError(f"not ready after {timeout_s:.0f} s: {why(state())} {missing}")


def _health(url: str) -> tuple[bool, str]:
    try:
        response = httpx.get(f"{url}/health", timeout=5.0)
    except httpx.HTTPError as error:
        return False, f"{url}/health does not answer yet: {error}"
    return response.status_code == 200, response.text[:500]


def why(state: AppState) -> str:
    """What Serve knows of a failure, deployment by deployment; of a traceback, what it ends with."""
    parts = [state.message, *(f"{d.name} is {d.status}: {d.message}" for d in state.deployments if d.message)]
    known = [_gist(part) for part in parts if part.strip()]
    return "\n".join(known) or f"the application is {state.status}"


def _gist(message: str) -> str:
    """A message as it is, or what a trace in it ends with: frames help only those who read the code."""
    lines = [line for line in message.strip().splitlines() if line.strip()]
    if not any(line.startswith(("  File ", "Traceback")) for line in lines):
        return message.strip()
    ends = [line for line in lines[1:] if not line.startswith((" ", "Traceback", "System error"))]
    return f"{lines[0]} {ends[-1] if ends else ''} (all of it: --logs)"


def _report_changes(state: Callable[[], AppState]) -> None:
    """A line whenever a deployment's condition changes, until the process is told to end."""
    before = _conditions(state())
    while True:
        time.sleep(WATCH_S)
        now = _conditions(state())
        for name, condition in now.items():
            if before.get(name) != condition:
                _print("changed", f"{name} is {condition}")
        before = now


def _conditions(state: AppState) -> dict[str, str]:
    return {d.name: f"{d.status} with {d.running} running" for d in state.deployments}


def _print(word: str, text: str) -> None:
    style = {"error": "red", "failed": "red", "ready": "green"}.get(word, "cyan")
    console.print(Text.assemble((f"{word}: ", style), text))
