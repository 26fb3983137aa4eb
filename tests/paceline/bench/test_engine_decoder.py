import asyncio
import threading
from collections.abc import Iterator

import pytest

from cluster.contracts import Delta, Status
from paceline.bench.engine_decoder import Collector, EngineDecoder, growth
from paceline.bench.errors import BenchError
from tests.cluster.api.fake_engine import FakeEngine


def delta(*token_ids, finish=None, error=None):
    return Delta("r", 0, token_ids, finish=finish, error=error)


def status(**counters):
    return Status(0, 1, 0.0, 0, 0, 1, 1, True, "d", 1, counters)


def test_the_first_delta_is_the_prefills_and_each_later_one_a_step():
    collector = Collector()
    for each in (delta(5), delta(6, 7, 8), delta(9, finish="length")):
        collector.add(each)
    assert collector.output().token_ids == (5, 6, 7, 8, 9)
    assert collector.output().commits == (3, 1)


def test_a_delta_without_tokens_is_no_step():
    collector = Collector()
    for each in (delta(), delta(5), delta(finish="stop")):
        collector.add(each)
    assert collector.output().commits == ()


@pytest.mark.parametrize("finish", ["error", "abort", "deadline"])
def test_a_request_that_the_engine_gives_up_ends_the_benchmark_with_its_reason(finish):
    with pytest.raises(BenchError, match=f"{finish}.*out of room"):
        Collector().add(delta(finish=finish, error="out of room"))


def test_counters_are_taken_as_growth_between_two_accounts():
    assert growth(status(a=1.0), status(a=3.5), "a") == 2.5
    assert growth(status(), status(a=3.5), "a") == 3.5
    assert growth(status(), status(), "a") is None


@pytest.fixture
def engine() -> Iterator[tuple[FakeEngine, EngineDecoder, asyncio.AbstractEventLoop]]:
    """An engine port in a thread of its own, the decoder that speaks to it, and the port's event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    fake = FakeEngine("engine", range(100, 110), end_id=1)
    address = asyncio.run_coroutine_threadsafe(fake.start(), loop).result(10)
    decoder = EngineDecoder("row", "", address, frozenset({1}), 0.0, drafted=True, remote=True)
    yield fake, decoder, loop
    decoder.close()
    asyncio.run_coroutine_threadsafe(fake.kill(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_a_run_returns_all_texts_in_the_prompts_order_with_their_steps(engine):
    fake, decoder, _ = engine
    run = decoder.run([(5,), (6, 7), (8,)], concurrency=2, max_tokens=6)
    assert run.texts == (tuple(range(100, 106)),) * 3
    assert [output.commits for output in run.outputs] == [(3, 2)] * 3
    assert sorted(request.prompt_ids for request in fake.submitted) == [(5,), (6, 7), (8,)]


def test_seeds_are_the_same_in_every_run_and_prefix_caches_are_not_shared_between_runs(engine):
    fake, decoder, _ = engine
    for _ in range(2):
        decoder.run([(5,), (6,)], concurrency=2, max_tokens=3)
    by_prompt = {request.prompt_ids: request.seed for request in fake.submitted[:2]}
    assert all(by_prompt[request.prompt_ids] == request.seed for request in fake.submitted[2:])
    assert len({request.cache_salt for request in fake.submitted}) == 2


def test_a_refused_request_ends_the_benchmark_with_the_engines_words(engine):
    fake, decoder, _ = engine
    fake.refusal = {"error": "prompt is too long"}
    with pytest.raises(BenchError, match=r"row: .*prompt is too long"):
        decoder.run([(5,), (6,)], concurrency=2, max_tokens=3)


def test_an_engine_that_dies_ends_the_benchmark(engine):
    fake, decoder, loop = engine
    fake.pause_after = 2
    killer = threading.Thread(target=kill_when_busy, args=(fake, loop))
    killer.start()
    with pytest.raises(BenchError, match="row: the engine's connection was lost"):
        decoder.run([(5,), (6,)], concurrency=2, max_tokens=6)
    killer.join(10)


def kill_when_busy(fake: FakeEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def busy() -> None:
        async with asyncio.timeout(10):
            while len(fake.submitted) < 2:
                await asyncio.sleep(0.01)
        await fake.kill()

    asyncio.run_coroutine_threadsafe(busy(), loop).result(20)
