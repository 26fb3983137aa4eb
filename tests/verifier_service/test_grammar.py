"""Constrained decoding through the engine: what comes out follows the grammar, whatever is drafted or interrupted."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence

import pytest
from llguidance import LLMatcher
from msgspec.structs import replace
from tokenizers import Tokenizer, decoders, models

from cluster.contracts import EngineInfo, EngineRequest, GrammarSpec, SamplingParams
from cluster.grammar import MAX_CHARACTERS, GrammarError, check, source
from tests.cluster.test_tiktoken_file import write as write_tiktoken
from tests.verifier_service.fake_runner import ORDER, FakeRunner, history_key, table
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import MODEL, WAIT_S, Inbox, request, running
from verifier_service.engine import Engine
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.grammar.constraint import Constraint
from verifier_service.scheduler import SchedulerLimits

__all__ = ["running"]
END = 0
PIECES = ["<|end|>", *'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-+', "Ġ", "Ċ", '":', '{"', "true", "ab", "12", "],"]
VOCABULARY = 64
OUTPUT = 40

SCHEMA = GrammarSpec(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x", "yy"]}}},
            "required": ["a"],
            "additionalProperties": False,
        }
    ),
)
SHORT = GrammarSpec("regex", "[a-c]{6}x(12|[3-5]){2}")
OPEN = GrammarSpec("regex", "[a-z]{3}[a-z0-9]*")
CHOICE = GrammarSpec("lark", 'start: "true" | "abc" | "abcd" | "12"')
SPECS = {"schema": SCHEMA, "short": SHORT, "open": OPEN, "choice": CHOICE}


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[]))
    made.add_special_tokens(PIECES[:1])
    made.decoder = decoders.ByteLevel()
    return made


def text_of(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids if i != END).replace("Ġ", " ").replace("Ċ", "\n")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer().to_str(), VOCABULARY, frozenset({END}))


def test_a_target_without_a_tokenizer_json_has_grammars_too(tmp_path):
    words = [bytes([byte]) for byte in range(256)] + [b"tr", b"ue", b"true"]
    compiler = GrammarCompiler.load(write_tiktoken(tmp_path, words), len(words) + 7)
    constraint = compiler.compile(request("r", grammar=CHOICE))
    assert constraint.take((258,)) == 1
    assert constraint.take((ord("x"),)) == 0


def make_engine(compiler: GrammarCompiler | None, proposer=None, blocks: int = 80, max_waiting: int = 50) -> Engine:
    limits = SchedulerLimits(slots=6, blocks=blocks, block_tokens=4, step_tokens=48, max_waiting=max_waiting)
    runner = FakeRunner(6, blocks, 4, VOCABULARY, max_context=128)
    return Engine(runner, limits, EngineInfo("e", "f", 128, VOCABULARY, 6, 8), proposer=proposer, grammars=compiler)


def constrained(name: str, spec: GrammarSpec | None, **changes) -> EngineRequest:
    return request(name, **{"output": OUTPUT, "grammar": spec, "stop_token_ids": frozenset({END}), **changes})


def texts(
    running, compiler, requests: Sequence[EngineRequest], known: Mapping[str, Sequence[int]] | None = None, **limits
) -> tuple[dict[str, list[int]], dict[str, str | None], Engine]:
    engine = make_engine(compiler, None if known is None else PartlyRight(known, VOCABULARY), **limits)
    inbox = Inbox()
    for each in requests:
        engine.submit(each, inbox)
    running(engine)
    inbox.wait(*(each.request_id for each in requests))
    names = [each.request_id for each in requests]
    assert not [delta.error for name in names for delta in inbox.deltas[name] if delta.error]
    return {name: inbox.text(name) for name in names}, {name: inbox.finish(name) for name in names}, engine


def mixed(temperature: float = 0.0) -> list[EngineRequest]:
    """Every kind of grammar, and a request without one."""
    sampling = SamplingParams(temperature=temperature)
    all_of = [constrained(name, spec, sampling=sampling, seed=i) for i, (name, spec) in enumerate(SPECS.items())]
    return [*all_of, constrained("free", None, sampling=sampling)]


def reference(asked: EngineRequest, compiler: GrammarCompiler) -> list[int]:
    """Greedy, one token at a time, with a matcher of its own."""
    assert asked.grammar is not None
    matcher = LLMatcher(compiler._tokenizer, source(asked.grammar))
    known, output, logits = list(asked.prompt_ids), list[int](), table(VOCABULARY)
    while len(output) < asked.max_new_tokens and not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        row = logits[history_key(known[-ORDER:], len(known) - 1)].tolist()
        allowed = [i for i in range(VOCABULARY) if mask[i // 8] >> i % 8 & 1]
        output.append(max(allowed, key=row.__getitem__))
        known.append(output[-1])
        matcher.consume_token(output[-1])
    return output


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_text_follows_its_grammar_and_is_the_same_whatever_is_drafted(running, compiler, temperature):
    requests = mixed(temperature)
    plain, finishes, _ = texts(running, compiler, requests)
    drafted, _, engine = texts(running, compiler, requests, plain)
    preempted, _, small = texts(running, compiler, requests, plain, blocks=13)
    assert drafted == plain == preempted
    assert engine.status().counters["accepted_tokens"] > 0
    assert small.status().counters["preemptions"] > 0
    assert re.fullmatch(SHORT.text, text_of(plain["short"]))
    assert text_of(plain["choice"]) in ("true", "abc", "abcd", "12")
    assert re.match(OPEN.text, text_of(plain["open"]))
    assert finishes["short"] == finishes["choice"] == "stop"
    if finishes["schema"] == "stop":
        value = json.loads(text_of(plain["schema"]))
        assert isinstance(value["a"], int)
    if temperature == 0:
        assert plain["free"] == MODEL.greedy(requests[-1].prompt_ids, OUTPUT)[: len(plain["free"])]
        for each in requests[:-1]:
            assert plain[each.request_id] == reference(each, compiler)


def test_a_draft_that_the_grammar_forbids_takes_no_row(running, compiler):
    asked = constrained("a", SHORT)
    plain, _, _ = texts(running, compiler, [asked])
    _, _, engine = texts(running, compiler, [asked], plain)
    runner = engine._runner
    assert isinstance(runner, FakeRunner)
    drafted = [row for plan in runner.plans for row in plan.verify if len(row.token_ids) > 1]
    assert drafted
    for row in drafted:
        output = plain["a"][: row.start + 1 - len(asked.prompt_ids)]
        here = compiler.compile(replace(asked, generated_ids=tuple(output)))
        assert here.allowed(row.token_ids[1:]) == len(row.token_ids) - 1


def test_a_complete_grammar_ends_the_request_without_an_end_token(running, compiler):
    (texts_, finishes, _) = texts(running, compiler, [constrained("a", SHORT, stop_token_ids=frozenset())])
    assert finishes["a"] == "stop"
    assert END not in texts_["a"]


def test_a_grammar_that_is_complete_at_the_limit_stops(running, compiler):
    whole, _, _ = texts(running, compiler, [constrained("a", SHORT)])
    exact, finishes, _ = texts(running, compiler, [constrained("a", SHORT, output=len(whole["a"]))])
    assert (exact, finishes["a"]) == (whole, "stop")
    cut, finishes, _ = texts(running, compiler, [constrained("a", SHORT, output=len(whole["a"]) - 1)])
    assert (cut["a"], finishes["a"]) == (whole["a"][:-1], "length")


@pytest.mark.parametrize("least", [0, 12])
def test_an_end_comes_where_the_grammar_allows_one_and_after_min_new_tokens(running, compiler, least):
    bias = SamplingParams(logit_bias=((END, 100.0),))
    asked = [constrained("a", OPEN, sampling=bias, min_new_tokens=least)]
    plain, finishes, _ = texts(running, compiler, asked)
    drafted, _, _ = texts(running, compiler, asked, plain)
    assert drafted == plain
    assert finishes["a"] == "stop"
    assert plain["a"].index(END) == len(plain["a"]) - 1
    assert len(text_of(plain["a"])) >= 3
    assert least <= len(plain["a"]) - 1 <= max(least, 3)


def test_a_grammar_that_ends_before_min_new_tokens_ends(running, compiler):
    _, finishes, _ = texts(running, compiler, [constrained("a", CHOICE, min_new_tokens=20)])
    assert finishes["a"] == "stop"


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_a_resumed_request_goes_on_in_its_grammar(running, compiler, kept):
    whole, _, _ = texts(running, compiler, [constrained("a", SHORT)])
    begun = tuple(whole["a"][:kept])
    rest, _, _ = texts(running, compiler, [constrained("a", SHORT, generated_ids=begun)])
    assert [*begun, *rest["a"]] == whole["a"]


def test_a_resumed_request_whose_grammar_is_complete_ends_at_once(running, compiler):
    whole, _, _ = texts(running, compiler, [constrained("a", SHORT)])
    rest, finishes, _ = texts(running, compiler, [constrained("a", SHORT, generated_ids=tuple(whole["a"]))])
    assert (rest["a"], finishes["a"]) == ([], "stop")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("regex", "a(b"), ["grammar.text", "unclosed group"]),
        (GrammarSpec("json_schema", '{"type": "intger"}'), ["grammar.text", "intger"]),
        (GrammarSpec("json_schema", "not json"), ["grammar.text"]),
        (GrammarSpec("lark", "start: nothing"), ["grammar.text", "nothing"]),
        (GrammarSpec("regex", "a" * (MAX_CHARACTERS + 1)), ["grammar.text", str(MAX_CHARACTERS)]),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_by_name_and_hurts_nobody(running, compiler, spec, words):
    engine = running(make_engine(compiler))
    inbox = Inbox()
    engine.submit(constrained("bad", spec), inbox)
    engine.submit(constrained("good", SHORT), inbox)
    inbox.wait("bad", "good")
    last = inbox.last("bad")
    assert (last.finish, last.error_kind) == ("error", "request")
    for word in words:
        assert word in (last.error or "")
    assert inbox.finish("good") == "stop"
    with pytest.raises(GrammarError):
        check(spec)


def test_a_request_that_did_not_follow_its_grammar_is_not_resumed(running, compiler):
    engine = running(make_engine(compiler))
    inbox = Inbox()
    engine.submit(constrained("a", SHORT, generated_ids=(1, 30)), inbox)
    inbox.wait("a")
    assert "generated_ids[1] is 30, which the grammar forbids" in (inbox.last("a").error or "")


def test_without_a_tokenizer_a_grammar_is_refused(running):
    engine = running(make_engine(None))
    inbox = Inbox()
    engine.submit(constrained("a", SHORT), inbox)
    inbox.wait("a")
    assert "tokenizer.json" in (inbox.last("a").error or "")


class Slow(GrammarCompiler):
    """Compiles when it is let."""

    def __init__(self) -> None:
        super().__init__(tokenizer().to_str(), VOCABULARY, frozenset({END}))
        self.may = threading.Event()

    def compile(self, asked: EngineRequest) -> Constraint:
        assert self.may.wait(WAIT_S)
        return super().compile(asked)


def test_others_go_on_while_a_grammar_is_compiled(running):
    slow = Slow()
    engine = running(make_engine(slow, max_waiting=3))
    inbox = Inbox()
    for name in ("waits", "aborted", "late"):
        deadline = time.time() + 0.05 if name == "late" else None
        engine.submit(constrained(name, SHORT, deadline=deadline), inbox)
    engine.submit(request("other"), inbox)
    engine.submit(constrained("too many", SHORT), inbox)
    inbox.wait("other", "late", "too many")
    assert inbox.finish("late") == "deadline"
    assert inbox.last("too many").error_kind == "overloaded"
    assert inbox.finish("waits") is None
    engine.submit(constrained("waits", SHORT), inbox := Inbox())
    inbox.wait("waits")
    assert "already running" in (inbox.last("waits").error or "")


def test_a_request_aborted_and_sent_again_while_it_compiles_runs_once(running):
    slow = Slow()
    engine = running(make_engine(slow))
    first, second = Inbox(), Inbox()
    engine.submit(constrained("a", SHORT), first)
    engine.abort("a")
    first.wait("a")
    engine.submit(constrained("a", SHORT), second)
    slow.may.set()
    second.wait("a")
    assert (first.finish("a"), first.text("a")) == ("abort", [])
    assert re.fullmatch(SHORT.text, text_of(second.text("a")))


def test_stopping_ends_requests_that_wait_for_their_grammar():
    slow = Slow()
    engine = make_engine(slow)
    inbox = Inbox()
    engine.submit(constrained("a", SHORT), inbox)
    engine.submit(request("b", output=100), inbox)
    engine.start()
    inbox.wait_for_token("b")
    engine.stop()
    slow.may.set()
    assert (inbox.finish("a"), inbox.last("a").error_kind) == ("error", "engine")


def test_equal_grammars_are_compiled_once(compiler):
    fresh = GrammarCompiler(tokenizer().to_str(), VOCABULARY, frozenset({END}))
    asked = constrained("a", SHORT)
    one, two = fresh.compile(asked), fresh.compile(replace(asked, choice=1))
    assert len(fresh._compiled) == 1
    assert one.take([1]) == 1
    assert two.take([2, 2, 2]) == 3  # each stands where its own text does
    assert (one.allowed([1] * 9), two.allowed([1] * 9)) == (5, 3)


def test_white_space_of_a_json_text_ends(compiler):
    space = PIECES.index("Ġ")
    here = compiler.compile(constrained("a", SCHEMA))
    assert here.take([PIECES.index("{")]) == 1
    assert here.allowed([space] * 60) == 40


def test_a_grammar_that_is_costly_at_every_token_ends_its_request_instead_of_holding_up_the_others(running, compiler):
    costly = GrammarSpec("lark", 'start: ("a"? "b"? "c"?){0,1000}')
    inbox = Inbox()
    engine = running(make_engine(compiler))
    engine.submit(constrained("a", costly, min_new_tokens=30), inbox)
    inbox.wait("a")
    assert inbox.last("a").finish == "error"
    assert "grammar.text" in (inbox.last("a").error or "")


def test_whatever_a_compiler_raises_ends_its_request_only(running, compiler, monkeypatch):
    def panic(_spec: GrammarSpec) -> LLMatcher:
        raise SystemExit("the library has panicked")

    monkeypatch.setattr(compiler, "_matcher", panic)
    inbox = Inbox()
    engine = running(make_engine(compiler))
    engine.submit(constrained("a", SHORT), inbox)
    engine.submit(request("b"), inbox)
    inbox.wait("a", "b")
    assert "has panicked" in (inbox.last("a").error or "")
    assert inbox.finish("b") == "length"
