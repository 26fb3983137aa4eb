"""`bench server` against a small OpenAI-like server in this process."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from paceline.bench import load, server_report
from paceline.bench.cli import app
from paceline.bench.errors import BenchError
from paceline.bench.http_client import Timing
from paceline.bench.server import base_url


@dataclass
class Behaviour:
    """How the server answers. fail_from: index of the first request that gets `status`; cut: no [DONE]."""

    usage: bool = True
    fail_from: int | None = None
    status: int = 503
    cut: bool = False
    bodies: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    together: int = 0
    most_together: int = 0


class Handler(BaseHTTPRequestHandler):
    server: "Server"
    CHUNKS = ("de", "f f", "(n)")

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        behaviour, lock = self.server.behaviour, self.server.lock
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            index = len(behaviour.bodies)
            behaviour.bodies.append(body)
            behaviour.paths.append(self.path)
            behaviour.together += 1
            behaviour.most_together = max(behaviour.most_together, behaviour.together)
        try:
            if behaviour.fail_from is not None and index >= behaviour.fail_from:
                self._json(behaviour.status, {"error": {"message": "no"}})
            else:
                self._stream(behaviour)
        finally:
            with lock:
                behaviour.together -= 1

    def _stream(self, behaviour: Behaviour) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chat = self.path.endswith("chat/completions")
        for text in self.CHUNKS:
            choice = {"delta": {"content": text}} if chat else {"text": text}
            self._event(json.dumps({"choices": [choice]}))
        if behaviour.usage:
            self._event(json.dumps({"choices": [], "usage": {"completion_tokens": 7}}))
        if not behaviour.cut:
            self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviour: Behaviour):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour, self.lock = behaviour, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(Behaviour()) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def bench(server, tmp_path, *options):
    figures = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["server", "--url", server.url, "--json", str(figures), *options])
    return result, json.loads(figures.read_text()) if figures.exists() else None


def test_every_level_sends_its_requests_and_counts_the_servers_tokens(server, tmp_path):
    result, figures = bench(server, tmp_path, "--concurrency", "1", "--concurrency", "4", "--requests", "8")
    assert result.exit_code == 0, result.output
    assert figures["settings"]["model"] == "tiny"
    assert [(level["concurrency"], level["requests"], level["tokens"]) for level in figures["levels"]] == [
        (1, 8, 56),
        (4, 8, 56),
    ]
    for level in figures["levels"]:
        assert level["ttft"]["count"] == 8
        assert level["itl"]["count"] == 16
        assert level["per_token"]["count"] == 8
        assert level["errors"] == {}
    assert len(server.behaviour.bodies) == 1 + 8 + 8  # one to warm up
    assert server.behaviour.most_together <= 4


def test_requests_are_streamed_greedy_completions_with_usage(server, tmp_path):
    bench(server, tmp_path, "--concurrency", "1", "--requests", "1", "--max-tokens", "5")
    body = server.behaviour.bodies[-1]
    assert server.behaviour.paths[-1] == "/v1/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 5, 0.0)
    assert body["stream"]
    assert body["stream_options"] == {"include_usage": True}


def test_turns_are_sent_as_a_chat(server, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"turns": ["Hello", "again"]}\n')
    result, figures = bench(server, tmp_path, "--prompts", str(path), "--concurrency", "1", "--requests", "1")
    assert result.exit_code == 0
    assert server.behaviour.paths[-1] == "/v1/chat/completions"
    assert server.behaviour.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    assert figures["levels"][0]["tokens"] == 7


def test_without_usage_chunks_are_counted_and_the_table_says_so(server, tmp_path):
    server.behaviour.usage = False
    result, figures = bench(server, tmp_path, "--concurrency", "1", "--requests", "2")
    assert figures["levels"][0]["tokens"] == 6
    assert "sends no usage" in result.output


def test_errors_are_counted_by_kind_and_left_out_of_the_figures(server, tmp_path):
    server.behaviour.fail_from = 3
    _, figures = bench(server, tmp_path, "--concurrency", "1", "--requests", "5")
    level = figures["levels"][0]
    assert level["errors"] == {"HTTP 503": 3}
    assert (level["requests"], level["tokens"], level["ttft"]["count"]) == (5, 14, 2)


def test_a_stream_that_breaks_off_is_an_error(server, tmp_path):
    server.behaviour.cut = True
    result, _ = bench(server, tmp_path, "--concurrency", "1")
    assert result.exit_code == 2
    assert "stream ended without [DONE]" in result.output


def test_a_server_that_refuses_the_first_request_is_named(server, tmp_path):
    server.behaviour.fail_from, server.behaviour.status = 0, 401
    result, _ = bench(server, tmp_path)
    assert result.exit_code == 2
    assert "HTTP 401" in result.output


def test_nobody_at_the_address_is_a_clear_error(tmp_path):
    with Server(Behaviour()) as gone:
        url = gone.url
    result = CliRunner().invoke(app, ["server", "--url", url])
    assert result.exit_code == 2
    assert "check the address" in result.output
    assert "Traceback" not in result.output


def test_a_plot_is_written(server, tmp_path):
    plot = tmp_path / "plots" / "server.png"
    bench(server, tmp_path, "--concurrency", "2", "--requests", "2", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_addresses_may_end_in_v1_or_not():
    assert base_url("http://a:1") == base_url("http://a:1/v1/") == "http://a:1/v1"
    with pytest.raises(BenchError, match="http"):
        base_url("localhost:8000")


def test_time_per_token_spreads_the_gaps_over_the_tokens_after_the_first():
    assert Timing(1.0, 0.1, (0.2, 0.4), tokens=7).per_token == pytest.approx(0.1)
    assert Timing(1.0, 0.1, (), tokens=1).per_token is None


def test_a_level_of_errors_only_still_makes_a_table_and_a_plot(tmp_path):
    level = load.summary(2, 1.0, [Timing(1.0, error="timeout")])
    assert level.ttft is None
    assert level.errors == {"timeout": 1}
    server_report.table([level], "title")
    server_report.plot(tmp_path / "empty.png", [level], "title")
