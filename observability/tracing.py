"""One linked story from the request to the last delivery, over days.

    POST /hooks/{source}       SERVER     a trace of its own, linked to the sender's (its child, where it is trusted)
     └ send                    PRODUCER   its traceparent is stored with the event
        ├ process DESTINATION  CONSUMER   the first try, within a minute: child of `send`, and linked to it
        │  └ POST              CLIENT     its traceparent goes out to the partner
        ┆
    process DESTINATION        CONSUMER   each later try and each replay: a trace of its own, linked to `send`
     └ POST                    CLIENT
    dead letter, replay        INTERNAL   traces of their own, linked to `send`

What goes well is told for a share of the traces, chosen by their ids. What failed is always told: everything is noted,
and when the head of a story ends (the request, the attempt) the whole of it is exported or forgotten. A try that
follows on a failed one, a dead letter and a replay are always told.

A span holds names from the configuration, ids, numbers and codes of ours: never a path, a header or the text of an
exception, which can hold what no policy let through.
"""

import time
from asyncio import CancelledError
from collections.abc import Mapping
from contextvars import Token
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

import msgspec
from opentelemetry.trace import SpanKind

from observability.metrics import Metrics
from observability.names import Attribute, SpanName
from observability.spans import Fact, Span, current
from observability.traceparent import new_span_id, new_trace_id, read, write

if TYPE_CHECKING:
    from observability.span_export import SpanExport

ONE_STORY = timedelta(seconds=60)
"""A first try within this time is shown inside the trace of its request."""

MAX_BELOW = 64
"""Of one story so many spans are kept while it goes on; what comes after is not told."""

STOP = timedelta(seconds=3)


class Tracing:
    """Makes the spans; without an endpoint, only valid ids to hand on."""

    def __init__(self, export: "SpanExport | None", sample: float) -> None:
        self._export = export
        self.recording = export is not None
        self._chosen_below = round(sample * 2**64)

    @classmethod
    def start(cls, endpoint: str | None, sample: float, version: str, metrics: Metrics | None = None) -> Self:
        """To be called in the process that works: a thread does not live through a fork."""
        if endpoint is None:
            return cls(None, sample)
        from observability.span_export import SpanExport  # noqa: PLC0415 — the SDK takes its time

        return cls(SpanExport(endpoint, version=version, metrics=metrics), sample)

    def close(self) -> None:
        """Send what waits; done within 3 s, whatever the collector does. Blocks: call it in a thread."""
        if self._export is not None:
            self._export.close(STOP)

    def accept(self, source: str, incoming: str | None, *, trust: bool = False) -> "Accepted":
        """The way of one request. A `traceparent` that is none is as good as no header."""
        sender = None if incoming is None else read(incoming)
        parent = sender if trust else None
        trace_id = new_trace_id() if parent is None else parent.trace_id
        if not self.recording:
            return Accepted(self, Span(_RECEIVE, _SERVER, trace_id, [], sampled=False))
        span = Span(
            _RECEIVE,
            _SERVER,
            trace_id,
            [_POST, _HOOKS, (_SOURCE, source)],
            sampled=self._chosen(trace_id) if parent is None else parent.sampled,
            parent=parent,
            links=() if sender is None or trust else (sender,),
        )
        return Accepted(self, span)

    def attempt(
        self,
        event_id: UUID,
        destination: str,
        number: int,
        created: str | None,
        age: timedelta,
        *,
        replayed: bool = False,
    ) -> "Attempt":
        """One try of one delivery; `created` is what the event carries, `age` is how long ago it came in."""
        creation = read(created)
        again = replayed or number > 1
        parent = creation if age < ONE_STORY and not again else None
        trace_id = new_trace_id() if parent is None else parent.trace_id
        span = Span(
            _PROCESS + destination,
            _CONSUMER,
            trace_id,
            [],
            sampled=self.recording and (again or (self._chosen(trace_id) if creation is None else creation.sampled)),
            parent=parent,
            links=() if creation is None else (creation,),
        )
        return Attempt(self, span, event_id, destination, number, replayed=replayed)

    def produce(self, event_id: UUID, event_type: str, head: Span) -> "Produced":
        """An event below `head`; where nothing is ever exported, its traceparent and no span."""
        if not self.recording:
            return Produced(write(head.trace_id, new_span_id(), sampled=False))
        span = Span(
            _SEND,
            _PRODUCER,
            head.trace_id,
            [*_SENDING, (_EVENT_ID, event_id), (_EVENT_TYPE, event_type)],
            sampled=head.sampled,
            head=head,
        )
        return Produced(span.traceparent, self, span)

    def follow(self, event_id: UUID, event_type: str) -> "Produced":
        """An event that comes of the attempt that this task works on."""
        head = current.get()
        return (
            self.produce(event_id, event_type, head)
            if head
            else Produced(write(new_trace_id(), new_span_id(), sampled=False))
        )

    def call(self, method: str, host: str, port: int) -> "Call":
        """One request to a partner, below the attempt (or the request) that this task works on."""
        head = current.get()
        trace_id = new_trace_id() if head is None else head.trace_id
        span = Span(
            method,
            _CLIENT,
            trace_id,
            [
                (_METHOD, method),
                (_ADDRESS, host),
                (_PORT, port),
            ],
            sampled=self._chosen(trace_id) if head is None else head.sampled,
            head=head,
        )
        return Call(self, span)

    def note(
        self, name: SpanName, created: str | None, event_id: UUID, attributes: Mapping[Attribute, str | int | bool]
    ) -> UUID:
        """Something that people or rules did to an event, linked to its creation; always told. Returns the trace."""
        creation = read(created)
        span = Span(
            name,
            SpanKind.INTERNAL,
            new_trace_id(),
            [_OUTBOX, (_EVENT_ID, event_id), *attributes.items()],
            sampled=self.recording,
            links=() if creation is None else (creation,),
        )
        self.end(span, None)
        return UUID(span.trace_id)

    def end(self, span: Span, raised: BaseException | None) -> None:
        """Close a span; at the head of a story, decide whether to tell it."""
        if raised is not None and span.error is None:
            span.error = "cancelled" if isinstance(raised, CancelledError) else "internal"
            span.failed = True
        span.ended = time.time_ns()
        if self._export is None:
            return
        head = span.head
        if head is None:
            span.told = span.sampled or span.failed
            if span.told:
                self._export.take([span, *span.below])
            span.below = []
        elif head.told is None:
            if len(head.below) < MAX_BELOW:
                head.below.append(span)
        elif head.told:
            self._export.take([span])

    def _chosen(self, trace_id: str) -> bool:
        return self.recording and int(trace_id[16:], 16) < self._chosen_below


class Accepted:
    """A request at the door."""

    __slots__ = ("_before", "_span", "_tracing")
    _before: Token[Span | None]

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def trace_id(self) -> UUID:
        return UUID(self._span.trace_id)

    def produce(self, event_id: UUID, event_type: str) -> "Produced":
        """The event, from here to its commit; as a context it is the traceparent to store with the event.

        Where nothing is ever exported, it is that and no span.
        """
        return self._tracing.produce(event_id, event_type, self._span)

    def answered(self, status: int) -> None:
        self._span.facts.append((_STATUS, status))

    def duplicate_of(self, event_id: UUID) -> None:
        """The same event had come in before, under this id."""
        self._span.facts.append((_DUPLICATE_OF, event_id))

    def refused(self, code: str, status: int | None = None) -> None:
        """Say why not, in a code of ours. With a status of 5xx the fault is ours, and the trace is always told."""
        self._span.error = code
        if status is not None:
            self._span.facts.append((_STATUS, status))
            self._span.failed = status >= 500

    def __enter__(self) -> Self:
        self._before = current.set(self._span)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, stack: TracebackType | None
    ) -> None:
        current.reset(self._before)
        if self._tracing.recording:
            self._tracing.end(self._span, raised)


class Produced(msgspec.Struct, eq=False):
    """An event on its way into the outbox; a span only where somebody may see it."""

    traceparent: str
    tracing: Tracing | None = None
    span: Span | None = None

    def __enter__(self) -> str:
        return self.traceparent

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self.tracing is not None and self.span is not None:
            self.tracing.end(self.span, raised)


class Attempt:
    """A delivery being tried."""

    __slots__ = ("_before", "_destination", "_event_id", "_number", "_replayed", "_span", "_tracing")
    _before: Token[Span | None]

    def __init__(
        self, tracing: Tracing, span: Span, event_id: UUID, destination: str, number: int, *, replayed: bool
    ) -> None:
        self._tracing = tracing
        self._span = span
        self._event_id = event_id
        self._destination = destination
        self._number = number
        self._replayed = replayed

    @property
    def trace_id(self) -> UUID:
        return UUID(self._span.trace_id)

    @property
    def trace(self) -> str:
        """Its trace's id, in hex."""
        return self._span.trace_id

    @property
    def traceparent(self) -> str:
        return self._span.traceparent

    def ended(self, outcome: str, *, failed: bool) -> None:
        """Say what came of it. An attempt that ends without this, by an exception, has failed."""
        self._span.facts.append((_OUTCOME, outcome))
        self._span.failed = failed
        self._span.error = outcome if failed else None

    def __enter__(self) -> Self:
        self._before = current.set(self._span)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, stack: TracebackType | None
    ) -> None:
        current.reset(self._before)
        if not self._tracing.recording:
            return
        span = self._span
        if span.sampled or span.failed or raised is not None:  # of the others nobody will read the facts
            span.facts[:0] = (
                *_PROCESSING,
                (_DESTINATION, self._destination),
                (_EVENT_ID, self._event_id),
                (_ATTEMPT, self._number),
                (_REPLAYED, self._replayed),
            )
        self._tracing.end(span, raised)


class Call:
    """A request to a partner; it has failed with a status from 400 on, or without any."""

    __slots__ = ("_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def traceparent(self) -> str:
        """The header for the partner."""
        return self._span.traceparent

    def answered(self, status: int) -> None:
        self._span.facts.append((_STATUS, status))
        if status >= 400:
            self.failed(str(status))

    def failed(self, error_type: str) -> None:
        """`error_type` is a code, such as `timeout`; never a message."""
        self._span.error = error_type
        self._span.failed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._tracing.end(self._span, raised)


# Looking a member up in its enum costs as much as making an id: it is done once.
_SERVER, _PRODUCER, _CONSUMER, _CLIENT = SpanKind.SERVER, SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.CLIENT
_RECEIVE, _SEND, _PROCESS = str(SpanName.RECEIVE), str(SpanName.SEND), f"{SpanName.PROCESS} "
_SOURCE = Attribute.SOURCE
_DESTINATION = Attribute.MESSAGING_DESTINATION_NAME
_EVENT_ID = Attribute.MESSAGING_MESSAGE_ID
_ATTEMPT = Attribute.ATTEMPT
_REPLAYED = Attribute.REPLAYED
_METHOD = Attribute.HTTP_REQUEST_METHOD
_ADDRESS = Attribute.SERVER_ADDRESS
_PORT = Attribute.SERVER_PORT
_EVENT_TYPE = Attribute.EVENT_TYPE
_STATUS = Attribute.HTTP_RESPONSE_STATUS_CODE
_DUPLICATE_OF = Attribute.DUPLICATE_OF
_OUTCOME = Attribute.OUTCOME
_POST: Fact = (_METHOD, "POST")
_HOOKS: Fact = (Attribute.HTTP_ROUTE, "/hooks/{source}")
_OUTBOX: Fact = (Attribute.MESSAGING_SYSTEM, "postgresql_outbox")
_SENDING: tuple[Fact, ...] = (
    _OUTBOX,
    (Attribute.MESSAGING_OPERATION_NAME, "send"),
    (Attribute.MESSAGING_OPERATION_TYPE, "send"),
)
_PROCESSING: tuple[Fact, ...] = (
    _OUTBOX,
    (Attribute.MESSAGING_OPERATION_NAME, "process"),
    (Attribute.MESSAGING_OPERATION_TYPE, "process"),
)
