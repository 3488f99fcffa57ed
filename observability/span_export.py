"""Spans on their way to a collector: beside the work, never in its way."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID, uuid4

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

from observability.logs import log_sparingly
from observability.metrics import Metrics
from observability.names import Attribute, LogEvent
from observability.spans import Span
from observability.traceparent import Context

QUEUE = 8_192  # spans: some 10 MB, the most that a collector that is away can cost
BATCH = 512
PAUSE = timedelta(seconds=1)
PATIENCE = timedelta(seconds=10)  # for one batch, tries again included


class SpanExport:
    """A bounded queue and the thread that empties it.

    A collector that is away or slow costs spans, which are counted, and nothing else.
    """

    def __init__(self, endpoint: str, *, version: str, metrics: Metrics | None) -> None:
        self._exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=PATIENCE.total_seconds())
        self._resource = Resource.create(
            {"service.name": "sluicegate", "service.version": version, "service.instance.id": str(uuid4())}
        )
        self._scope = InstrumentationScope("sluicegate", version, Schemas.V1_44_0.value)
        self._metrics = metrics
        self._waiting: deque[Span] = deque()
        self._awake = threading.Event()
        self._lost: dict[str, int] = {"queue full": 0, "collector": 0, "stopping": 0}
        self._in_hand = 0
        self._stopping = False
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="span export", daemon=True)
        self._thread.start()

    def take(self, story: Sequence[Span]) -> None:
        """Queue spans that belong together, all or none of them; never waits."""
        if self._stopping:
            self._lost["stopping"] += len(story)
        elif len(self._waiting) + len(story) > QUEUE:
            self._lost["queue full"] += len(story)
        else:
            self._waiting.extend(story)
            if len(self._waiting) >= BATCH:
                self._awake.set()

    def close(self, within: timedelta) -> None:
        """Send what waits, as far as that is possible in the time."""
        deadline = time.monotonic() + within.total_seconds()
        self._stopping = True
        self._awake.set()
        self._thread.join(within.total_seconds() * 0.8)
        self._given_up = True
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # wakes the thread from its pause between two tries
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._lost["stopping"] += len(self._waiting) + self._in_hand
        self._waiting.clear()
        self._tell_lost()

    def _work(self) -> None:
        while not self._stopping:
            self._awake.wait(PAUSE.total_seconds())
            self._awake.clear()
            self._export()
            self._tell_lost()
        self._export()

    def _export(self) -> None:
        while self._waiting and not self._given_up:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._in_hand = len(batch)
            if self._exporter.export([self._readable(span) for span in batch]) is not SpanExportResult.SUCCESS:
                self._lost["collector"] += len(batch)
            self._in_hand = 0
            self._tell_lost()  # while it is away more come than go: the queue is never empty

    def _tell_lost(self) -> None:
        for reason, count in self._lost.items():
            if count:
                self._lost[reason] -= count
                if self._metrics is not None:
                    self._metrics.spans_dropped.labels(reason).inc(count)
                log_sparingly(LogEvent.SPANS_DROPPED, spans=count, reason=reason)

    def _readable(self, span: Span) -> ReadableSpan:
        attributes = {str(name): str(value) if isinstance(value, UUID) else value for name, value in span.facts}
        if span.error is not None:
            attributes[str(Attribute.ERROR_TYPE)] = span.error
        parent = span.parent if span.head is None else span.head
        return ReadableSpan(
            name=span.name,
            kind=span.kind,
            context=_context(span, remote=False),
            parent=None if parent is None else _context(parent, remote=span.head is None),
            links=[Link(_context(link, remote=True)) for link in span.links],
            attributes=attributes,
            status=Status(StatusCode.ERROR if span.failed else StatusCode.UNSET),
            start_time=span.began,
            end_time=span.ended,
            resource=self._resource,
            instrumentation_scope=self._scope,
        )


def traces_url(endpoint: str) -> str:
    """The address to post spans to, for a collector's address with or without the path."""
    path = "/v1/traces"
    endpoint = endpoint.rstrip("/")
    return endpoint if endpoint.endswith(path) else endpoint + path


def _context(span: Span | Context, *, remote: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if span.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(span.trace_id, 16), int(span.span_id, 16), is_remote=remote, trace_flags=flags)
