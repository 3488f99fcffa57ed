"""Spans, as a real OTLP receiver gets them."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings

from observability import span_export
from observability.metrics import Metrics
from observability.names import Attribute, SpanName
from observability.span_export import QUEUE
from observability.tracing import MAX_BELOW, Tracing

SENDER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SOON = timedelta(seconds=1)
CANARY = "PATIENT-SMITH-1980"


async def test_a_retry_a_dead_letter_and_a_replay_tell_one_connected_story(collector: "Collector") -> None:
    event = uuid4()
    tracing = collector.tracing(sample=1)
    with tracing.accept("odoo", SENDER) as accepted:
        with accepted.produce(event, "purchase.order.approved") as created:
            pass
        accepted.answered(202)
    with tracing.attempt(event, "supplier", 1, created, SOON) as first:
        with tracing.call("POST", "supplier.example", 443) as call:
            call.answered(503)
        first.ended("retry", failed=True)
    with tracing.attempt(event, "supplier", 2, created, timedelta(hours=70)) as last:
        with tracing.call("POST", "supplier.example", 443) as call:
            call.failed("timeout")
        last.ended("retry", failed=True)
    died = tracing.note(SpanName.DEAD_LETTER, created, event, {Attribute.MESSAGING_DESTINATION_NAME: "supplier"})
    asked = tracing.note(SpanName.REPLAY, created, event, {Attribute.MESSAGING_DESTINATION_NAME: "supplier"})
    with tracing.attempt(event, "supplier", 3, created, timedelta(days=4), replayed=True) as replay:
        with tracing.call("POST", "supplier.example", 443) as call:
            call.answered(200)
        replay.ended("delivered", failed=False)

    spans = await collector.spans(tracing)

    server, producer, consumer, client = spans[:4]
    assert [span.name for span in spans] == [
        "POST /hooks/{source}", "send", "process supplier", "POST",
        "process supplier", "POST", "dead letter", "replay", "process supplier", "POST",
    ]  # fmt: skip
    assert [kind(span) for span in spans[:4]] == ["SERVER", "PRODUCER", "CONSUMER", "CLIENT"]
    assert linked_to(server) == [SENDER[3:52]]
    assert not server.parent_span_id
    assert producer.parent_span_id == server.span_id
    assert consumer.parent_span_id == producer.span_id
    assert client.parent_span_id == consumer.span_id
    assert len({span.trace_id for span in spans[:4]}) == 1, "the first try is told inside the story of the request"
    assert place(producer) == created[3:52]
    assert all(linked_to(span) == [place(producer)] for span in spans if kind(span) in ("CONSUMER", "INTERNAL"))
    later = spans[4], spans[6], spans[7], spans[8]
    assert len({span.trace_id for span in (server, *later)}) == 5, "what comes later has traces of its own"
    assert spans[5].parent_span_id == spans[4].span_id
    assert [trace_of(span) for span in (consumer, *later)] == [
        first.trace_id,
        last.trace_id,
        died,
        asked,
        replay.trace_id,
    ]
    assert {facts(span)["messaging.message.id"] for span in spans if kind(span) not in ("SERVER", "CLIENT")} == {
        str(event)
    }
    assert [facts(span).get("error.type") for span in spans] == [
        None, None, "retry", "503", "retry", "timeout", None, None, None, None,
    ]  # fmt: skip


async def test_the_call_carries_its_own_span_to_the_partner(collector: "Collector") -> None:
    tracing = collector.tracing(sample=1)
    with tracing.attempt(uuid4(), "odoo", 1, None, SOON) as attempt:
        with tracing.call("POST", "odoo.example", 443) as call:
            call.answered(200)
        attempt.ended("delivered", failed=False)
    _, client = await collector.spans(tracing)
    assert call.traceparent == f"00-{place(client)}-01"


async def test_a_trusted_senders_span_is_the_parent(collector: "Collector") -> None:
    tracing = collector.tracing(sample=0)
    with tracing.accept("addon", SENDER, trust=True):
        pass
    (server,) = await collector.spans(tracing)
    assert f"{server.trace_id.hex()}-{server.parent_span_id.hex()}" == SENDER[3:52]
    assert not server.links


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize(
    "header",
    [
        SENDER + "-extra",  # version 00 has four fields
        SENDER.upper(),
        "ff" + SENDER[2:],
        "0" + SENDER,
        SENDER[:-1],
        SENDER + "\n",
        SENDER.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        SENDER.replace("b7ad6b7169203331", "0" * 16),
        SENDER.replace("0af76519", "٠af76519"),
        "",
        None,
    ],
)
async def test_a_traceparent_that_is_none_starts_a_new_trace(
    collector: "Collector", header: str | None, trust: bool
) -> None:
    tracing = collector.tracing(sample=1)
    with tracing.accept("odoo", header, trust=trust):
        pass
    (server,) = await collector.spans(tracing)
    assert not server.links
    assert not server.parent_span_id
    assert server.trace_id.hex() not in SENDER


@pytest.mark.parametrize(
    "header",
    [
        "00-11111111111111111111111111111111-2222222222222222-00",
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-comes-later",
        "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-09",
    ],
)
async def test_a_valid_traceparent_is_continued_even_of_digits_or_of_a_later_version(
    collector: "Collector", header: str
) -> None:
    tracing = collector.tracing(sample=1)
    with tracing.accept("odoo", header):
        pass
    (server,) = await collector.spans(tracing)
    assert linked_to(server) == [header[3:52]]


async def test_after_a_minute_the_first_try_too_is_a_trace_of_its_own(collector: "Collector") -> None:
    tracing = collector.tracing(sample=1)
    with tracing.attempt(uuid4(), "odoo", 1, SENDER, timedelta(seconds=60)) as attempt:
        attempt.ended("delivered", failed=False)
    (consumer,) = await collector.spans(tracing)
    assert linked_to(consumer) == [SENDER[3:52]]
    assert consumer.trace_id.hex() not in SENDER


async def test_what_goes_well_is_told_for_its_share_of_the_traces_and_then_as_a_whole(collector: "Collector") -> None:
    tracing = collector.tracing(sample=0.25)
    for _ in range(400):
        event = uuid4()
        with tracing.accept("odoo", None) as accepted, accepted.produce(event, "x") as created:
            pass
        with tracing.attempt(event, "odoo", 1, created, SOON) as attempt:
            with tracing.call("POST", "odoo.example", 443) as call:
                call.answered(200)
            attempt.ended("delivered", failed=False)
    spans = await collector.spans(tracing)
    told = {span.trace_id for span in spans}
    assert 50 < len(told) < 150
    assert len(spans) == 4 * len(told)


async def test_from_the_first_failed_attempt_on_everything_is_told_whatever_the_share(collector: "Collector") -> None:
    event = uuid4()
    tracing = collector.tracing(sample=0)
    with tracing.accept("odoo", None) as accepted, accepted.produce(event, "x") as created:
        pass
    with tracing.attempt(event, "odoo", 1, created, SOON) as first:
        with tracing.call("POST", "odoo.example", 443) as call:
            call.answered(200)
        with tracing.call("POST", "odoo.example", 443) as call:
            call.answered(503)
        first.ended("retry", failed=True)
    with tracing.attempt(event, "odoo", 2, created, SOON) as second:
        with tracing.call("POST", "odoo.example", 443) as call:
            call.answered(200)
        second.ended("delivered", failed=False)
    tracing.note(SpanName.DEAD_LETTER, created, event, {})
    with tracing.attempt(event, "odoo", 3, created, SOON, replayed=True) as replay:
        replay.ended("delivered", failed=False)
    spans = await collector.spans(tracing)
    assert [span.name for span in spans] == [
        "process odoo", "POST", "POST", "process odoo", "POST", "dead letter", "process odoo",
    ]  # fmt: skip
    assert created.endswith("-00")
    assert call.traceparent.endswith("-01")


async def test_what_fails_at_the_door_by_our_fault_is_always_told_and_a_refusal_is_no_error(
    collector: "Collector",
) -> None:
    tracing = collector.tracing(sample=0)
    with tracing.accept("odoo", None) as accepted:
        accepted.refused("signature", 401)
    with tracing.accept("odoo", None) as accepted:
        accepted.refused("postgres away", 503)
    with pytest.raises(ZeroDivisionError), tracing.accept("odoo", None):
        _ = 1 / 0
    ours, bug = await collector.spans(tracing)
    assert (facts(ours)["error.type"], facts(ours)["http.response.status_code"]) == ("postgres away", 503)
    assert facts(bug)["error.type"] == "internal"
    assert ours.status.code == bug.status.code == 2

    tracing = collector.tracing(sample=1)
    with tracing.accept("odoo", None) as accepted:
        accepted.refused("signature", 401)
    (refusal,) = await collector.spans(tracing)
    assert facts(refusal)["error.type"] == "signature"
    assert refusal.status.code == 0


async def test_no_word_of_an_exception_reaches_a_span(collector: "Collector") -> None:
    tracing = collector.tracing(sample=1)
    with (
        pytest.raises(ValueError, match=CANARY),
        tracing.accept("odoo", None) as accepted,
        accepted.produce(uuid4(), "x"),
    ):
        raise ValueError(CANARY)
    with (
        pytest.raises(KeyError),
        tracing.attempt(uuid4(), "odoo", 1, None, SOON),
        tracing.call("POST", "odoo.example", 443),
    ):
        raise KeyError(CANARY) from OSError(CANARY)
    spans = await collector.spans(tracing)
    assert len(spans) == 4
    assert all(facts(span)["error.type"] == "internal" for span in spans)
    assert CANARY not in str(spans)


async def test_an_attempt_that_is_cut_short_says_so(collector: "Collector") -> None:
    tracing = collector.tracing(sample=0)

    async def hang() -> None:
        with tracing.attempt(uuid4(), "odoo", 1, None, SOON), tracing.call("POST", "odoo.example", 443):
            await asyncio.sleep(60)

    task = asyncio.create_task(hang())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    spans = await collector.spans(tracing)
    assert [facts(span)["error.type"] for span in spans] == ["cancelled", "cancelled"]


async def test_attempts_side_by_side_keep_their_calls_apart(collector: "Collector") -> None:
    tracing = collector.tracing(sample=1)

    async def deliver(destination: str) -> None:
        with tracing.attempt(uuid4(), destination, 1, None, SOON) as attempt:
            await asyncio.sleep(0)
            with tracing.call("POST", destination, 443) as call:
                await asyncio.sleep(0)
                call.answered(200)
            attempt.ended("delivered", failed=False)

    await asyncio.gather(*(deliver(f"partner-{n}") for n in range(20)))
    spans = await collector.spans(tracing)
    at = {span.span_id: span for span in spans}
    calls = [span for span in spans if kind(span) == "CLIENT"]
    assert len(calls) == 20
    assert all(at[call.parent_span_id].name == f"process {facts(call)['server.address']}" for call in calls)


async def test_a_call_outside_of_any_attempt_stands_for_itself(collector: "Collector") -> None:
    tracing = collector.tracing(sample=0)
    with tracing.call("GET", "id.example", 443) as call:
        call.answered(200)
    with tracing.call("GET", "id.example", 443) as call:
        call.failed("connection refused")
    (failed,) = await collector.spans(tracing)
    assert facts(failed)["error.type"] == "connection refused"


async def test_an_attempt_of_a_thousand_calls_keeps_the_first_of_them(collector: "Collector") -> None:
    tracing = collector.tracing(sample=1)
    with tracing.attempt(uuid4(), "files", 1, None, SOON) as attempt:
        for _ in range(1_000):
            with tracing.call("PROPFIND", "files.example", 443) as call:
                call.answered(207)
        attempt.ended("delivered", failed=False)
    assert len(await collector.spans(tracing)) == MAX_BELOW + 1


async def test_every_attribute_has_a_name_of_ours_and_none_is_a_path(collector: "Collector") -> None:
    tracing = collector.tracing(sample=1)
    with tracing.accept("odoo", SENDER) as accepted:
        with accepted.produce(uuid4(), "x") as created:
            pass
        accepted.duplicate_of(uuid4())
        accepted.answered(200)
    with tracing.attempt(uuid4(), "odoo", 1, created, SOON) as attempt:
        with tracing.call("POST", "odoo.example", 443) as call:
            call.answered(404)
        attempt.ended("refused", failed=True)
    spans = await collector.spans(tracing)
    assert {name for span in spans for name in facts(span)} == set(Attribute)
    assert not any(span.trace_state for span in spans)


async def test_without_a_collector_the_ids_are_valid_and_nothing_else_happens() -> None:
    threads = set(threading.enumerate())
    tracing = Tracing.start(None, 1.0, "0.1")
    ids = set()
    for _ in range(1_000):
        with tracing.accept("odoo", None) as accepted, accepted.produce(uuid4(), "x") as created:
            pass
        with tracing.attempt(uuid4(), "odoo", 2, created, SOON) as attempt, tracing.call("POST", "h", 1) as call:
            pass
        ids |= {created, attempt.traceparent, call.traceparent}
    assert len(ids) == 3_000
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", one) for one in ids)
    assert call.traceparent[3:35] == attempt.trace_id.hex
    assert set(threading.enumerate()) == threads
    tracing.close()


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/behind/a/prefix", "/behind/a/prefix/v1/traces/"])
async def test_the_collectors_address_may_come_with_or_without_the_path(path: str) -> None:
    async with otlp_server() as server:
        tracing = Tracing.start(server.address + path, 1.0, "1.2.3")
        tracing.note(SpanName.REPLAY, None, uuid4(), {})
        await asyncio.to_thread(tracing.close)
    (asked,) = server.paths
    assert asked == path.removesuffix("/").removesuffix("/v1/traces") + "/v1/traces"
    (resource,) = server.requests[0].resource_spans
    said = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (said["service.name"], said["service.version"]) == ("sluicegate", "1.2.3")
    assert resource.scope_spans[0].schema_url == "https://opentelemetry.io/schemas/1.44.0"


async def test_a_collector_that_is_away_holds_up_neither_work_nor_the_stop_and_its_spans_are_counted() -> None:
    metrics = Metrics()
    tracing = Tracing.start(f"http://127.0.0.1:{free_port()}", 1.0, "0.1", metrics)
    longest = work(tracing, requests=QUEUE)
    began = time.monotonic()
    await asyncio.to_thread(tracing.close)
    assert time.monotonic() - began < 3.5
    assert longest < 2
    assert lost(metrics) == 2 * QUEUE


async def test_a_collector_that_never_answers_holds_up_neither_work_nor_the_stop() -> None:
    metrics = Metrics()
    release = asyncio.Event()
    async with otlp_server(wait_for=release.wait) as server:
        tracing = Tracing.start(server.address, 1.0, "0.1", metrics)
        longest = work(tracing, requests=QUEUE)
        began = time.monotonic()
        await asyncio.to_thread(tracing.close)
        assert time.monotonic() - began < 3.5
        assert longest < 2
        assert lost(metrics) == 2 * QUEUE
        release.set()


async def test_spans_that_are_lost_are_counted_while_more_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "PATIENCE", timedelta(seconds=0.2))
    metrics = Metrics()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = Tracing.start(f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0, "0.1", metrics)
        until = time.monotonic() + 6
        while not lost(metrics) and time.monotonic() < until:
            work(tracing, requests=20)
            await asyncio.sleep(0.01)
        assert lost(metrics) > 0
        await asyncio.to_thread(tracing.close)


async def test_a_collector_that_comes_back_gets_what_happens_from_then_on() -> None:
    port = free_port()
    tracing = Tracing.start(f"http://127.0.0.1:{port}", 1.0, "0.1")
    tracing.note(SpanName.REPLAY, None, uuid4(), {})
    await asyncio.sleep(1.2)
    async with otlp_server(port) as server:
        trace = tracing.note(SpanName.DEAD_LETTER, None, uuid4(), {})
        await asyncio.to_thread(tracing.close)
    assert trace in {trace_of(span) for span in server.spans}


class Collector:
    """A real OTLP receiver."""

    def __init__(self, port: int, receiver: OtelTapHttpProtobufReceiver) -> None:
        self._port = port
        self._metrics = Metrics()
        self._received: asyncio.Queue[Span] = asyncio.Queue()
        self._listening = asyncio.create_task(self._listen(receiver.stream_traces()))

    def tracing(self, sample: float) -> Tracing:
        return Tracing.start(f"http://127.0.0.1:{self._port}", sample, "0.1", self._metrics)

    async def spans(self, tracing: Tracing) -> list[Span]:
        """Everything that `tracing` told, in the order in which it began."""
        end = tracing.note(SpanName.REPLAY, None, uuid4(), {})
        await asyncio.to_thread(tracing.close)
        assert lost(self._metrics) == 0
        received: list[Span] = []
        async with asyncio.timeout(10):
            while trace_of(span := await self._received.get()) != end:
                received.append(span)
        return sorted(received, key=lambda span: span.start_time_unix_nano)

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.wait([self._listening])

    async def _listen(self, stream: AsyncIterator[Span]) -> None:
        async for span in stream:
            self._received.put_nowait(span)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    port = free_port()
    async with OtelTapHttpProtobufReceiver(OtelTapHttpProtobufReceiverSettings(http_port=port)) as receiver:
        collector = Collector(port, receiver)
        await asyncio.sleep(0)
        yield collector
        await collector.close()


class OtlpServer:
    """A receiver that keeps what oteltap does not pass on, and that can be slow."""

    def __init__(self, port: int, wait_for: Callable[[], Awaitable[object]] | None) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.paths: list[str] = []
        self.requests: list[ExportTraceServiceRequest] = []
        self._wait_for = wait_for

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    async def take(self, request: web.Request) -> web.Response:
        if self._wait_for is not None:
            await self._wait_for()
        self.paths.append(request.path)
        self.requests.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()


@asynccontextmanager
async def otlp_server(
    port: int = 0, *, wait_for: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[OtlpServer]:
    server = OtlpServer(port or (port := free_port()), wait_for)
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/{path:.*}", server.take)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield server
    finally:
        await runner.cleanup()


def work(tracing: Tracing, *, requests: int) -> float:
    """Accept so many; the longest that one of them took, in seconds."""
    longest = 0.0
    for _ in range(requests):
        began = time.monotonic()
        with tracing.accept("odoo", None) as accepted, accepted.produce(uuid4(), "x"):
            pass
        longest = max(longest, time.monotonic() - began)
    return longest


def lost(metrics: Metrics) -> int:
    counts = re.findall(r"^sluicegate_spans_dropped_total\{.*\} (.+)$", metrics.render().decode(), re.MULTILINE)
    return int(sum(map(float, counts)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kind(span: Span) -> str:
    return str(Span.SpanKind.Name(span.kind)).removeprefix("SPAN_KIND_")


def place(span: Span) -> str:
    return f"{span.trace_id.hex()}-{span.span_id.hex()}"


def trace_of(span: Span) -> UUID:
    return UUID(bytes=span.trace_id)


def linked_to(span: Span) -> list[str]:
    return [f"{link.trace_id.hex()}-{link.span_id.hex()}" for link in span.links]


def facts(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
