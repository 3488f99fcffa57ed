"""The story of one event, from the door to its destination, as its sender, its partner and an operator see it."""

import base64
import hashlib
import hmac
import json
from pathlib import Path
from uuid import UUID

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.house import until
from tests.serving import CANARY, ENVIRON, Received, order, partner, serving
from tests.test_tracing import otlp_server

SENDER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_purchase_order_reaches_its_approvers(tmp_path: Path, dsn: str) -> None:
    async with partner() as approvers, serving(tmp_path, dsn, approvers.address) as program:
        # Odoo posts that an order waits for approval, and is told that this is now durable.
        status, answer = await program.post(order(), id="msg_first")
        assert (status, answer["duplicate"]) == (202, False)
        event = answer["id"]
        assert UUID(event).version == 7

        # It did not hear the answer and posts again: the same event, and nothing new.
        assert await program.post(order(), id="msg_first") == (200, {"id": event, "duplicate": True})

        # The approvers get one CloudEvent, signed, of what the policy keeps and nothing else.
        await until(lambda: approvers.received)
        [received] = approvers.received
        assert verifies(received)
        assert received.headers["webhook-id"] == event
        assert received.headers["idempotency-key"] == f"{event}/approvers"
        cloud_event = json.loads(received.body)
        assert {name: cloud_event[name] for name in ("source", "type", "subject", "facility", "time", "data")} == {
            "source": "/sources/odoo",
            "type": "odoo.purchase_order.approval_requested",
            "subject": "purchase.order/42",
            "facility": "north",
            "time": "2026-11-23T05:34:57.955067Z",
            "data": {
                "id": 42,
                "status": "approval_requested",
                "amount": "8625.0",
                "changed": "2026-11-23T05:34:57.955067Z",
            },
        }
        assert CANARY.encode() not in received.body

        # Whoever asks where the order is gets one answer.
        await until(lambda: program.is_delivered(event))
        _, found = await program.api("GET", "/events?subject=purchase.order/42")
        assert [one["id"] for one in found["items"]] == [event]
        delivery = await program.delivery(event)
        assert [(a["number"], a["outcome"], a["status"]) for a in delivery["attempts"]] == [(1, "delivered", 200)]

        # And the books balance.
        _, books = await program.api("GET", "/invariants")
        assert books["balanced"]
        assert books["deliveries"] | {"owed": 1, "delivered": 1} == books["deliveries"]


async def test_its_whole_life_is_one_connected_story(tmp_path: Path, dsn: str) -> None:
    """Accepted, retried, given up, mended by a person: every span leads back to the post."""
    async with otlp_server() as collector:
        told = f"observability: {{otlp: '{collector.address}', sample: 1.0}}"
        async with partner() as approvers, serving(tmp_path, dsn, approvers.address, more=told) as program:
            approvers.mood = lambda nth: {1: 503, 2: 400}.get(nth, 200)
            _, answer = await program.post(order(), traceparent=SENDER)
            event = answer["id"]
            await until(lambda: program.is_dead(event))
            select = {"events": [event], "destination": "approvers"}
            status, _ = await program.api(
                "POST", "/dead-letters/replay", {"select": select, "reason": "they mended it"}
            )
            assert status == 202
            await until(lambda: program.is_delivered(event))
            attempts = (await program.delivery(event))["attempts"]
            assert [a["outcome"] for a in attempts] == ["retry", "refused", "delivered"]
        spans = {span.span_id: span for span in collector.spans}
        server = only(spans, "POST /hooks/{source}")
        send = only(spans, "send")
        assert send.parent_span_id == server.span_id
        assert [link.trace_id.hex() for link in server.links] == [SENDER[3:35]], "the sender's trace is a link"
        tries = sorted(
            (s for s in spans.values() if s.name == "process approvers"), key=lambda s: s.start_time_unix_nano
        )
        assert [s.trace_id.hex() for s in tries] == [a["trace_id"] for a in attempts]
        assert tries[0].parent_span_id == send.span_id
        for later in (*tries, only(spans, "dead letter"), only(spans, "replay")):
            assert [link.span_id for link in later.links] == [send.span_id], later.name
        for call, received in zip(
            sorted(calls(spans), key=lambda s: s.start_time_unix_nano), approvers.received, strict=True
        ):
            assert spans[call.parent_span_id].name == "process approvers"
            assert received.headers["traceparent"].split("-")[1:3] == [call.trace_id.hex(), call.span_id.hex()]


def only(spans: dict[bytes, Span], name: str) -> Span:
    [span] = [span for span in spans.values() if span.name == name]
    return span


def calls(spans: dict[bytes, Span]) -> list[Span]:
    return [span for span in spans.values() if span.kind == Span.SpanKind.SPAN_KIND_CLIENT]


def verifies(received: Received) -> bool:
    """As the partner would check it."""
    key = base64.b64decode(ENVIRON["OUT_SECRET"].removeprefix("whsec_"))
    text = f"{received.headers['webhook-id']}.{received.headers['webhook-timestamp']}.".encode() + received.body
    mac = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    return f"v1,{mac}" in received.headers["webhook-signature"].split()
