"""An engine that crashes leaves its last steps behind; run again, they give the same tokens."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest
import torch
import typer

from cluster.contracts import EngineInfo, EngineRequest, GrammarSpec, SamplingParams
from modeling.target_config import target_fingerprint
from paceline.replay import replay
from tests.verifier_service.fake_runner import FakeRunner
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.test_engine import Inbox, request
from tests.verifier_service.test_grammar import tokenizer
from tests.verifier_service.test_real_model import PROMPTS, Oracle
from verifier_service.engine import Engine
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.model.face import ForwardOutput
from verifier_service.model.runner import TargetRunner
from verifier_service.plan import StepPlan
from verifier_service.recorder import Flight, FlightRecorder, FlightTarget, read_flight
from verifier_service.replay import Replay, sizes
from verifier_service.scheduler import SchedulerLimits

KEPT = 12  # steps
BLOCK = 4


class Fragile:
    """A runner that fails once request "1", whose grammar is compiled beside the steps, has said a few tokens."""

    def __init__(self, runner: TargetRunner, inbox: Inbox):
        self._runner, self._inbox = runner, inbox
        self.shape, self.set_taps, self.feed = runner.shape, runner.set_taps, runner.feed
        self.counters = runner.counters

    def forward(self, plan: StepPlan) -> ForwardOutput:
        if len(self._inbox.text("1")) > 10:
            raise RuntimeError("the card fell off the bus")
        return self._runner.forward(plan)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of greedy, sampled, penalised and constrained requests, drafted with random success, preempted now and then."""
    return crashed(tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def record_ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of greedy and sampled requests, without drafts; steps are launched before the one before is read."""
    return crashed(tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("records"), ahead=True)


def crashed(directory: Path, records: Path, ahead: bool = False) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_targets.build("qwen3_5_moe", directory)
    tokenizer().save(str(directory / "tokenizer.json"))
    runner = TargetRunner(
        directory, num_blocks=40, block_tokens=BLOCK, num_slots=4, dtype=torch.float32, device="cpu", max_context=128
    )
    target = FlightTarget(str(directory), target_fingerprint(directory), "float32", 1, BLOCK)
    recorder = FlightRecorder(records, "replica/1", target, steps=KEPT)
    texts = {str(i): [(7 * i + j) % 250 for j in range(80)] for i in range(len(PROMPTS))}
    inbox = Inbox()
    engine = Engine(
        Fragile(runner, inbox),
        SchedulerLimits(slots=4, blocks=40, block_tokens=BLOCK, step_tokens=24, max_waiting=9),
        EngineInfo("replica/1", "f", 128, runner.shape.vocabulary, 4, 8),
        proposer=None if ahead else Oracle(texts, "partly"),
        recorder=recorder,
        grammars=GrammarCompiler.load(directory, runner.shape.vocabulary),
        runs_ahead=ahead,
    )
    for i, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(
            temperature=float(i % 2), top_p=0.9, frequency_penalty=0.0 if ahead else 0.5 * (i == 2)
        )
        grammar = GrammarSpec("regex", "[a-z]{69}") if i == 1 and not ahead else None
        engine.submit(EngineRequest(str(i), prompt, i, 70, sampling=sampling, grammar=grammar), inbox)
    with pytest.raises(RuntimeError, match="bus"):
        engine.run()
    (path,) = records.iterdir()
    return path


def run(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = 0
    try:
        replay(path)
    except typer.Exit as error:
        code = error.exit_code
    return code, capsys.readouterr().out


def test_the_last_steps_are_kept_for_their_owner_only(record):
    flight = read_flight(record)
    first = flight.steps[0].step
    assert [step.step for step in flight.steps] == list(range(first, first + KEPT))
    assert [step.samples is None for step in flight.steps] == [False] * (KEPT - 1) + [True]
    assert "the card fell off the bus" in flight.reason
    assert any(one.request.grammar is not None for one in flight.requests)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600


def test_the_same_steps_give_the_same_tokens(record, capsys):
    code, out = run(record, capsys)
    compared = sum(len(step.samples or ()) for step in read_flight(record).steps)
    assert code == 0, out
    assert f"{compared} tokens compared, 0 differ" in out


def test_steps_that_were_launched_before_the_one_before_was_read_give_the_same_tokens(record_ahead, capsys):
    flight = read_flight(record_ahead)
    assert [step.samples is None for step in flight.steps] == [False] * (KEPT - 2) + [True] * 2
    unread = [row.token_ids for row in flight.steps[-1].rows]
    assert (-1,) in unread, "the step before was never read"
    assert all(row.token_ids[0] >= 0 for step in flight.steps[:-1] for row in step.rows)
    code, out = run(record_ahead, capsys)
    compared = sum(len(step.samples or ()) for step in flight.steps)
    assert code == 0, out
    assert compared > 3 * KEPT
    assert f"{compared} tokens compared, 0 differ" in out


def test_a_token_that_the_target_did_not_say_is_named(record, tmp_path, capsys):
    flight = read_flight(record)
    step = flight.steps[5]
    assert step.samples is not None
    wrong = msgspec.structs.replace(step, samples=(step.samples[0] ^ 1, *step.samples[1:]))
    code, out = run(rewritten(flight, tmp_path, (*flight.steps[:5], wrong)), capsys)
    row = step.rows[0]
    request = flight.requests[row.request].request.request_id
    assert code == 1
    assert "1 differ" in out
    assert f"step {step.step}, request {request!r} choice 0, position {row.start + 1}: recorded" in out


def test_chunks_of_one_prompt_in_one_step_go_on_from_each_other(tmp_path):
    """A target with recurrent state stops where a checkpoint is to be taken, and a state knows one position only."""
    recorder = FlightRecorder(tmp_path, "e", FlightTarget("t", "f", "float32", 1, BLOCK))
    limits = SchedulerLimits(slots=4, blocks=40, block_tokens=BLOCK, step_tokens=16, max_waiting=9)
    info = EngineInfo("e", "f", 128, 64, 4, 8)
    engine, inbox = Engine(FakeRunner(4, 40, BLOCK, checkpoints=4), limits, info, recorder=recorder), Inbox()
    engine.start()
    engine.submit(request("a", prompt=27), inbox)
    inbox.wait("a")
    engine.stop()
    path = recorder.write("to see what it did")
    assert path is not None
    flight = read_flight(path)
    assert [(row.start, len(row.token_ids)) for row in flight.steps[1].rows] == [(16, 8), (24, 3)]
    slots, blocks, _ = sizes(flight)
    steps = list(Replay(flight, FakeRunner(slots, blocks, BLOCK, checkpoints=1)).steps())
    assert len(steps) == len(flight.steps)
    assert all(step.error is None and not step.differences for step in steps)


def test_rows_that_came_to_nothing_are_not_compared(tmp_path):
    """Launched before it was known that their requests were over: the engine had no use for a token of theirs."""
    recorder = FlightRecorder(tmp_path, "e", FlightTarget("t", "f", "float32", 1, BLOCK))
    limits = SchedulerLimits(slots=4, blocks=40, block_tokens=BLOCK, step_tokens=24, max_waiting=9)
    info = EngineInfo("e", "f", 128, 64, 4, 8)
    engine, inbox = Engine(FakeRunner(4, 40, BLOCK), limits, info, recorder=recorder, runs_ahead=True), Inbox()
    names = [f"r{i}" for i in range(8)]
    engine.submit(request("long", output=60), inbox)
    for i, name in enumerate(names):
        stops, penalised = frozenset(range(0, 64, 7)), SamplingParams(frequency_penalty=1.5, presence_penalty=1.5)
        engine.submit(request(name, 3 + i, 40, stop_token_ids=stops, sampling=penalised), inbox)
    engine.start()
    inbox.wait("long", *names)
    engine.stop()
    path = recorder.write("to see what it did")
    assert path is not None
    flight = read_flight(path)
    slots, blocks, _ = sizes(flight)
    steps = list(Replay(flight, FakeRunner(slots, blocks, BLOCK)).steps())
    assert all(step.error is None and not step.differences for step in steps)
    recorded = sum(len(step.samples or ()) for step in flight.steps)
    assert recorded - sum(step.compared for step in steps) == engine.status().counters["rows_in_vain"] > 0


def test_what_is_no_record_is_refused(record, tmp_path, capsys):
    (tmp_path / "x.flight").write_bytes(b"\x93abc")
    assert run(tmp_path / "x.flight", capsys)[0] == 2
    assert run(tmp_path / "absent.flight", capsys)[0] == 2
    future = msgspec.structs.replace(read_flight(record), format=9)
    assert run(rewritten(future, tmp_path, future.steps), capsys)[0] == 2


def rewritten(flight: Flight, directory: Path, steps) -> Path:
    path = directory / "changed.flight"
    path.write_bytes(msgspec.msgpack.encode(msgspec.structs.replace(flight, steps=tuple(steps))))
    return path
