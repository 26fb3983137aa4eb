"""Rank 0's engine: requests in, Deltas out, one step after the other.

A step: plan -> tell the other ranks -> target forward -> accept -> commit -> send features and ask for drafts -> emit,
while the drafter works -> collect drafts. On a GPU the next step is planned and launched before this one is read, where
no outcome of this one matters for that; its tokens for which one does are taken after the commit. Everything but the
calls marked thread-safe runs on the engine's own thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from cluster.contracts import Configure, Delta, EngineInfo, EngineRequest, Status
from cluster.errors import OverloadedError
from cluster.grammar import GrammarError
from verifier_service.beside import Beside
from verifier_service.commands import Abort, Command, Compiled, Drop, Start
from verifier_service.deadlines import Deadlines
from verifier_service.drafting import Drafting
from verifier_service.emission import Emission, Sink, error_delta
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.grammar.constraint import Constraint
from verifier_service.grammar.decoding import ConstrainedDecoding
from verifier_service.grammar.desk import GrammarDesk, Ticket
from verifier_service.launch import Launched, Launcher, size_of, with_draws
from verifier_service.live_settings import usable
from verifier_service.marks import Mark
from verifier_service.model.face import Runner
from verifier_service.packing import PlanChannel
from verifier_service.plan import StepPlan
from verifier_service.proposers.face import Proposer
from verifier_service.proposers.plain import NoProposer
from verifier_service.recorder import FlightRecorder
from verifier_service.sampling.shaping import shaping_of
from verifier_service.scheduler import Scheduler, SchedulerLimits
from verifier_service.sequence import Key, RunningRequest, key_of
from verifier_service.step_watch import StepWatch
from verifier_service.tally import Tally
from verifier_service.validation import RequestLimits, already_ended, problem

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
SPARE_COMMANDS = 64  # a step's worth beyond what can wait and run


class Engine:
    """One target's engine. Use: start (a thread) or run (this thread); submit and abort from any thread; stop.

    info: what clients are told. channel: to the other ranks. block_size in info is 1 for plain decoding.
    make_proposer: builds the successor of a proposer that failed, on another thread. grammars: without, requests that
    have one are refused. runs_ahead: launch steps before the one before is read; None = where the runner has a GPU.
    """

    def __init__(
        self,
        runner: Runner,
        limits: SchedulerLimits,
        info: EngineInfo,
        *,
        proposer: Proposer | None = None,
        make_proposer: Callable[[], Proposer] = NoProposer,
        channel: PlanChannel | None = None,
        recorder: FlightRecorder | None = None,
        grammars: GrammarCompiler | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        runs_ahead: bool | None = None,
    ):
        self.info = info
        self._runner = runner
        self._scheduler = Scheduler(replace(limits, checkpoints=runner.shape.checkpoints))
        self._limits = RequestLimits(info.vocabulary, info.max_context, limits.blocks * limits.block_tokens)
        self._drafting = Drafting(proposer or NoProposer(), make_proposer, runner.set_taps)
        self._channel = channel or PlanChannel(None)
        self._recorder = recorder
        self._heartbeat_s = heartbeat_s
        self._desk = GrammarDesk(grammars, lambda ticket: self._command(Compiled(ticket)))
        self._constrained = ConstrainedDecoding(info.vocabulary)
        self._emission = Emission()
        self._deadlines = Deadlines()
        self._tally = Tally()
        self._runs_ahead = runner.shape.device.startswith("cuda") if runs_ahead is None else runs_ahead
        self._launcher = Launcher(runner, self._constrained, self._runs_ahead)
        self._beside = Beside(runner.shape.device)
        self._under_way: Launched | None = None
        self._idle_from: Mark | None = None  # when the device was done with the step read last
        self._max_commands = limits.max_waiting + limits.slots + SPARE_COMMANDS
        self._commands: deque[Command] = deque()
        self._arrived = threading.Condition(threading.Lock())
        self._stopping = False
        self._closed = False  # commands are no longer taken
        self._begun = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._step_ended = time.monotonic()
        self._watch = StepWatch()
        self._step_limit_s = float("inf")

    # Thread-safe.

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Start or resume a request. `sink(deltas)` is called on the engine's thread, once a step with all it has.

        Whatever is wrong with a request is told by a Delta with finish "error": nothing is raised.
        """
        if len(self._commands) >= self._max_commands:
            why = f"{self._max_commands} requests came within one step, which is the limit: try again later"
            sink([error_delta(request, why, "overloaded")])
        elif not self._command(Start(request, sink)):
            sink([error_delta(request, "the engine has stopped: send the request elsewhere", "engine")])

    def abort(self, request_id: str, choice: int = 0, sink: Sink | None = None) -> None:
        """Free a request's resources now; its Delta with finish "abort" still comes. Unknown ids are ignored.

        With a sink, a request of another sink is left alone.
        """
        self._command(Abort((request_id, choice), sink))

    def drop(self, sink: Sink) -> None:
        """Abort all requests of a sink, because nobody listens there any more."""
        self._command(Drop(sink))

    def configure(self, settings: Configure) -> None:
        """A value that cannot be leaves its setting as it is, which the log tells."""
        self._drafting.configure(usable(settings))

    def set_drafters(self, addresses: Sequence[str]) -> None:
        self._drafting.set_drafters(addresses)

    def status(self, nonce: int = 0) -> Status:
        scheduler, drafting = self._scheduler, self._drafting.state()
        return Status(
            nonce=nonce,
            step=scheduler.step,
            seconds_since_step=time.monotonic() - self._step_ended,
            running=scheduler.running,
            waiting=scheduler.waiting + len(self._desk) + len(self._commands),
            free_blocks=scheduler.pool.free,
            total_blocks=scheduler.pool.total,
            linked=drafting.linked,
            drafter_id=drafting.drafter_id,
            epoch=drafting.epoch,
            counters={**self._tally.counters(), **scheduler.counters(), **drafting.counters, **self._runner.counters()},
            step_limit_s=self._step_limit_s,
        )

    def start(self) -> None:
        """Run on a thread of its own."""
        self._begun = True
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End after the step under way; returns once requests in flight have had an error Delta.

        Raises TimeoutError if that takes longer than timeout_s. An engine that was never run has nothing to end.
        """
        with self._arrived:
            self._stopping = True
            self._arrived.notify_all()
        if self._begun and not self._ended.wait(timeout_s):
            raise TimeoutError(f"the engine's step did not end within {timeout_s:g} s")

    # The engine's thread.

    @torch.inference_mode()
    def run(self) -> None:
        """Until stop. Raises what a step raised, after every request in flight has had an error Delta."""
        self._begun = True
        try:
            while not self._stopping:
                if self._under_way is None:
                    self._drafting.refresh()
                self._take_commands()
                self._expire()
                if self._under_way is not None or len(self._scheduler):
                    self._step()
                elif not self._wait_for_work():
                    self._beat()
            self._channel.send(StepPlan(step=self._scheduler.step + 1, stop=True))
            self._end("the engine is stopping: send the request to another one, or again later")
        except BaseException as error:
            log.exception("step %d failed", self._scheduler.step)
            self._write_record(f"{type(error).__name__}: {error}")
            self._end(f"the engine failed in step {self._scheduler.step} and restarts ({type(error).__name__})")
            raise
        finally:
            self._ended.set()

    def _step(self) -> None:
        """Finish a step; before it is read, launch the one after it if that need not wait.

        Device: forward n+1 | tokens of n+1. Host, meanwhile: read n, commit n | emit n, plan n+2.
        """
        step, self._under_way = self._under_way, None
        if step is None:
            step = self._launch(None)
            assert step is not None, "only what is under way can keep a step from being planned"
        if self._runs_ahead and self._drafting.resting():
            self._under_way = self._launch(step)
        self._finish_step(step)

    def _launch(self, before: Launched | None) -> Launched | None:
        """The next step, after `before` if that is not read yet. None: what it comes to has to be known first."""
        began = time.monotonic()
        self._constrained.trim()
        plan = self._scheduler.plan() if before is None else self._scheduler.plan_ahead()
        if plan is None:
            return None
        work = self._scheduler.planned
        if self._runner.shape.draws:
            plan = with_draws(plan, work)
        if self._recorder is not None:
            self._recorder.planned(plan.step, work)
        limit = self._watch.limit(size_of(plan))
        self._step_limit_s = limit if before is None else max(limit, self._watch.limit(before.size))
        self._channel.send(plan)
        if evicted := self._scheduler.cache.take_evicted():
            self._drafting.evicted(evicted)
        return self._launcher.launch(plan, work, began)

    def _finish_step(self, step: Launched) -> None:
        samples = step.samples.read()
        progress = self._scheduler.commit(samples)
        for ended in self._constrained.advance(progress):
            self._scheduler.remove(ended.sequence.key)
        self._launcher.take_late()
        with self._beside.after(step.last) if self._under_way is not None else nullcontext():
            self._drafting.advance(progress, step.output.taps)
            self._emission.emit(progress, step.logits)
        self._forget([p.sequence for p in progress if p.finish is not None])
        drafting = self._drafting.collect()
        before, self._step_ended = self._step_ended, time.monotonic()
        seconds = self._step_ended - max(step.began, before)  # one that began before the last ended has the rest
        limit = self._watch.ended(step.size, seconds)
        self._step_limit_s = limit if self._under_way is None else self._watch.limit(self._under_way.size)
        self._drafting.learn(progress, bool(step.plan.prefill), seconds - drafting)
        forward, gap = step.device_seconds(self._idle_from)
        self._idle_from = step.last if len(self._scheduler) else None  # waiting for requests is no gap
        self._tally.step(step.plan, progress, seconds, forward, drafting, gap)
        if self._recorder is not None:
            self._recorder.done(step.plan.step, samples, seconds)

    def _beat(self) -> None:
        """An empty step, so that a rank that has died is noticed while nothing else happens."""
        began = time.monotonic()
        plan = self._scheduler.plan()
        self._channel.send(plan)
        self._runner.forward(plan)
        self._scheduler.commit(())
        self._step_ended = time.monotonic()
        self._step_limit_s = self._watch.ended(0, self._step_ended - began)

    def _wait_for_work(self) -> bool:
        """False if nothing has come within a heartbeat."""
        with self._arrived:
            return self._arrived.wait_for(lambda: self._stopping or bool(self._commands), self._heartbeat_s)

    def _write_record(self, reason: str) -> None:
        if self._recorder is None:
            return
        try:
            if path := self._recorder.write(reason):
                log.error("the last steps are in %s: run them again with `paceline replay %s`", path, path)
        except Exception as error:  # what is in flight has still to be ended
            log.error("the last steps could not be written (%r)", error)

    # Requests come and go.

    def _command(self, command: Command) -> bool:
        """False if the engine has ended."""
        with self._arrived:
            if self._closed:
                return False
            self._commands.append(command)
            self._arrived.notify_all()
            return True

    def _take_commands(self) -> None:
        for _ in range(len(self._commands)):  # those that come meanwhile wait for the next step
            match self._commands.popleft():
                case Start(request, sink):
                    self._admit(request, sink)
                case Abort(key, sink):
                    if sink is None or sink in (self._scheduler.sink_of(key), self._desk.sink_of(key)):
                        self._finish(key, "abort")
                case Drop(sink):
                    for request, theirs in self._held():
                        if theirs == sink:
                            self._finish(key_of(request), "abort")
                case Compiled(ticket):
                    if self._desk.collect(ticket):
                        self._enter_compiled(ticket)

    def _admit(self, request: EngineRequest, sink: Sink) -> None:
        if why := problem(request, self._limits):
            sink([error_delta(request, why, "request")])
        elif key_of(request) in self._scheduler or key_of(request) in self._desk:
            sink([error_delta(request, f"request_id {request.request_id!r} is already running here", "request")])
        elif ended := already_ended(request):
            sink([Delta(request.request_id, request.choice, (), finish=ended)])
        elif request.grammar is None:
            self._enter(request, sink, None)
        else:
            self._await_grammar(request, sink)

    def _await_grammar(self, request: EngineRequest, sink: Sink) -> None:
        if not self._desk.open:
            why = "grammar is set, but this target has no tokenizer.json to use it with"
            sink([error_delta(request, why, "request")])
        elif len(self._desk) >= self._scheduler.limits.max_waiting:
            why = f"{len(self._desk)} requests wait for their grammars, which is the limit: try again later"
            sink([error_delta(request, why, "overloaded")])
        else:
            self._desk.begin(request, sink)
            self._mind_deadline(request)

    def _enter_compiled(self, ticket: Ticket) -> None:
        request, sink = ticket.request, ticket.sink
        self._deadlines.forget(key_of(request))
        try:
            constraint = ticket.compiled.result()
        except GrammarError as error:
            sink([error_delta(request, str(error), "request")])
        else:
            if constraint.complete:  # resumed after its last token, or the grammar knows but the empty text
                sink([Delta(request.request_id, request.choice, (), finish="stop")])
            else:
                self._enter(request, sink, constraint)

    def _enter(self, request: EngineRequest, sink: Sink, constraint: Constraint | None) -> None:
        try:
            sequence = self._scheduler.add(request, sink, shaping_of(request, constraint))
        except OverloadedError as error:
            sink([error_delta(request, str(error), "overloaded")])
            return
        if constraint is not None:
            self._constrained.add(sequence)
        self._mind_deadline(request)

    def _mind_deadline(self, request: EngineRequest) -> None:
        if request.deadline is not None:
            self._deadlines.add(key_of(request), request.deadline)

    def _expire(self) -> None:
        for key in self._deadlines.passed(time.time()):
            self._finish(key, "deadline")

    def _finish(self, key: Key, finish: str) -> None:
        if (ticket := self._desk.leave(key)) is not None:
            self._tally.finished(finish)
            self._deadlines.forget(key)
            ticket.sink([Delta(*key, (), finish=finish)])
        elif (sequence := self._scheduler.remove(key)) is not None:
            self._tally.finished(finish)
            self._forget([sequence])
            sequence.sink([Delta(*key, (), finish=finish)])

    def _held(self) -> list[tuple[EngineRequest, Sink]]:
        """All requests that are in, with their sinks."""
        compiling = [(ticket.request, ticket.sink) for ticket in self._desk.tickets()]
        return [*compiling, *((sequence.request, sequence.sink) for sequence in self._scheduler.requests())]

    def _end(self, why: str) -> None:
        with self._arrived:
            self._closed = True
            left = [command for command in self._commands if isinstance(command, Start)]
            self._commands.clear()
        by_sink: dict[Sink, list[Delta]] = {}
        for request, sink in (*((start.request, start.sink) for start in left), *self._held()):
            by_sink.setdefault(sink, []).append(error_delta(request, why, "engine"))
        for sink, deltas in by_sink.items():
            sink(deltas)
        self._ended.set()
        self._desk.close()
        self._constrained.close()
        self._drafting.stop()

    def _forget(self, sequences: list[RunningRequest]) -> None:
        if sequences:
            for sequence in sequences:
                self._deadlines.forget(sequence.key)
                self._constrained.forget(sequence)
            self._drafting.forget(sequences)


def follow(runner: Runner, channel: PlanChannel) -> None:
    """Every other rank: execute plans until rank 0 says stop. Raises RuntimeError when rank 0 is gone."""
    with torch.inference_mode():
        while not (plan := channel.receive()).stop:
            runner.forward(plan)
