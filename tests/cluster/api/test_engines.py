"""Engines that come, go and fall silent; health and metrics as operators see them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.engine_client import EngineClient
from cluster.api.settings import RouterSettings
from cluster.contracts import Configure, EngineRequest, SetDrafters
from cluster.errors import EngineDiedError
from tests.cluster.api.conftest import ANSWER
from tests.cluster.api.harness import WAIT_S, eventually
from tests.cluster.api.test_streams import streaming


def test_health_is_ok_while_an_engine_answers_and_says_why_it_does_not(serve, engine):
    served = serve(engine, health_window_s=0.3)
    healthy = served.get("/health")
    assert (healthy.status_code, healthy.json()["status"]) == (200, "ok")
    engine.answers_probes = False
    unhealthy = eventually(lambda: (r := served.get("/health")).status_code == 503 and r)
    assert "has not answered a probe" in unhealthy.json()["problems"][0]
    engine.answers_probes = True
    eventually(lambda: served.get("/health").status_code == 200)


def test_health_is_bad_without_engines(serve):
    response = serve().get("/health")
    assert response.status_code == 503
    assert response.json()["problems"] == ["no engine has registered yet"]


def test_health_is_bad_as_soon_as_the_engine_is_dead(served, engine):
    served.kill(engine)
    eventually(lambda: served.get("/health").status_code == 503)


def test_a_silent_engine_loses_its_requests(serve, engine):
    served = serve(engine, health_window_s=0.1, engine_silence_s=0.3)
    engine.pause_after = 3
    with streaming(served) as events:
        next(events)
        engine.answers_probes = False
        assert list(events)[-1]["error"]["code"] == "engine_unavailable"


def test_an_engine_that_comes_later_is_used(serve, new_engine):
    served = serve()
    late = new_engine("late")
    served.engines.append(late)
    served.set_engines([served.loop.run(late.start())])
    eventually(lambda: served.get("/health").status_code == 200)
    assert served.complete().json()["choices"][0]["text"] == ANSWER


def test_an_engine_that_is_no_longer_named_finishes_what_it_holds(serve, new_engine):
    engine = new_engine()
    engine.pause_after = 3
    served = serve(engine)
    with streaming(served) as events:
        next(events)
        served.set_engines([])
        assert served.complete().status_code == 503
        assert served.core.engines._leaving
        assert not engine.aborted
    eventually(lambda: engine.aborted and not served.core.engines._leaving)


def test_metrics_count_tokens_drafts_and_latencies(served, engine, answer_ids):
    served.complete()
    generated = len(answer_ids) + 1
    value = served.metric
    assert value("generation_tokens_total") == generated
    assert value("time_to_first_token_seconds_count") == 1
    assert value("inter_token_latency_seconds_count") == generated - 1
    assert value("spec_decode_num_draft_tokens_total") == 4 * value("spec_decode_num_drafts_total") > 0
    by_position = [value("spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(3)]
    assert by_position[0] >= by_position[1] > by_position[2] == 0
    assert sum(by_position) == value("spec_decode_num_accepted_tokens_total")
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("http_responses_total", status="200") >= 1
    assert value("num_requests_running") == 0
    assert value("num_engines_healthy") == 1


def request(request_id: str = "r", choice: int = 0) -> EngineRequest:
    return EngineRequest(request_id, (1, 2), seed=0, max_new_tokens=100, choice=choice, stop_token_ids=frozenset([2]))


def with_client(loop, engine, use):
    """Run use(client) against the engine, on the loop."""

    async def session():
        client = await EngineClient.connect(await engine.start(), WAIT_S)
        try:
            async with asyncio.timeout(WAIT_S):
                return await use(client)
        finally:
            client.close()
            await client.wait_closed()
            await engine.kill()

    return loop.run(session())


def test_metrics_tell_how_often_drafting_failed_in_all_engines(serve, new_engine):
    engines = [new_engine(name) for name in "ab"]
    for failures, engine in enumerate(engines, 2):
        engine.counters = {"drafting_failures": float(failures)}
    served = serve(*engines)
    eventually(lambda: served.metric("drafting_failures") == 5)


def test_metrics_pass_on_what_engines_and_their_drafters_count(serve, new_engine):
    engines = [new_engine(name) for name in "abc"]
    for rows, engine in enumerate(engines, 5):
        engine.counters = {"graph_padding_rows": float(rows), "drafter_rows": 10.0 * rows, "unlisted": 1.0}
        engine.drafter_id = "" if engine is engines[2] else "d"
    served = serve(*engines)
    told = [served.metric("engine_graph_padding_rows_total", engine=name) for name in "abc"]
    assert told == [5, 6, 7]
    assert served.metric("drafter_rows_total", drafter="d") == 60, "both engines speak of one drafter"
    text = served.get("/metrics").text
    assert "unlisted" not in text
    assert 'drafter=""' not in text


def test_every_metric_is_documented(served):
    page = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
    families = [family.name for family in text_string_to_metric_families(served.get("/metrics").text)]
    families = [name for name in families if not name.endswith("_created")]
    assert len(families) > 30
    assert not [name for name in families if f"`{name.removeprefix('paceline_')}`" not in page]


def test_streams_of_one_connection_do_not_mix(loop, engine):
    async def all_tokens(client, choice):
        with client.submit(request(choice=choice)) as deltas:
            return [token async for delta in deltas for token in delta.token_ids]

    async def use(client):
        return await asyncio.gather(*[all_tokens(client, choice) for choice in range(5)])

    assert with_client(loop, engine, use) == [engine.answer] * 5


def test_a_lost_connection_fails_every_stream_and_question(loop, engine):
    engine.pause_after = 0
    engine.answers_probes = False

    async def use(client):
        streams = [client.submit(request(choice=choice)) for choice in range(3)]
        waiting = [asyncio.create_task(anext(stream)) for stream in streams]
        waiting.append(asyncio.create_task(client.probe(WAIT_S)))
        await asyncio.sleep(0)
        await engine.kill()
        return await asyncio.gather(*waiting, return_exceptions=True), client.alive

    results, alive = with_client(loop, engine, use)
    assert [type(result) for result in results] == [EngineDiedError] * 4
    assert not alive


def test_a_dead_connection_takes_no_requests(loop, engine):
    async def use(client):
        client.close("it was enough")
        with pytest.raises(EngineDiedError, match="it was enough"):
            client.submit(request())

    with_client(loop, engine, use)


def test_a_probe_has_a_deadline(loop, engine):
    engine.answers_probes = False

    async def use(client):
        with pytest.raises(EngineDiedError, match=r"within 0\.05 s"):
            await client.probe(0.05)
        return client.alive

    assert with_client(loop, engine, use)


def test_settings_and_drafters_reach_the_engine(loop, engine):
    async def use(client):
        client.send(SetDrafters(("a:1",)))
        client.send(Configure(max_draft_tokens=3))
        await client.probe(WAIT_S)

    with_client(loop, engine, use)
    assert engine.received == [SetDrafters(("a:1",)), Configure(max_draft_tokens=3)]


def test_a_request_cannot_run_twice(loop, engine):
    async def use(client):
        with client.submit(request()), pytest.raises(ValueError, match="already running"):
            client.submit(request())

    with_client(loop, engine, use)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:x", ""])
def test_an_address_where_nobody_answers_is_named(loop, address):
    with pytest.raises(EngineDiedError, match="no engine answers at"):
        loop.run(EngineClient.connect(address, 2.0))


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x00\x01\xc1"])
def test_a_port_of_something_else_is_told_apart(loop, greeting):
    async def connect():
        def greet(_, writer):
            writer.write(greeting)
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        try:
            await EngineClient.connect(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", 2.0)
        finally:
            server.close()

    with pytest.raises(EngineDiedError, match="no engine answers at"):
        loop.run(connect())


def test_a_router_with_another_secret_says_so_and_keeps_its_distance(serve, engine, caplog):
    engine.secret = "the engine's"
    served = serve()
    served.engines.append(engine)
    served.set_engines([served.loop.run(engine.start())])
    eventually(lambda: "verifier.link.token" in served.get("/health").json()["problems"][0])
    assert served.get("/health").status_code == 503
    assert caplog.text.count("verifier.link.token") == 1


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="max_inflight"):
        RouterSettings.model_validate({"max_inflight": 3})
