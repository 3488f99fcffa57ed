"""Posts events as signed CloudEvents."""

import time
from datetime import UTC, datetime
from typing import Literal

import msgspec
from yarl import URL

from connectors import Blocked, Delivered, Delivery, Event, Opening, Outcome, Read, Refused, Retry
from connectors.http_client import Answer, Client, words
from connectors.http_kind import HttpSettings
from connectors.retry_after import retry_after
from connectors.standard_webhooks import Signer


class Http:
    """One endpoint that takes events as CloudEvents 1.0 in JSON, signed by Standard Webhooks 1.0.

    The body is made of the event alone, so its bytes are the same at every try, unless something is read for it; then
    that stands in `data.read`, as it is at this try.  `idempotency-key` names the delivery, and whoever takes signed
    webhooks knows `webhook-id`.  That is why an `Unknown` may be sent again.
    """

    keeps_keys = True

    def __init__(self, opening: Opening, settings: HttpSettings) -> None:
        self._url = URL(settings.url)
        self._signer = Signer(settings.secret.reveal())
        self._tracing = opening.tracing
        self._client = Client(
            self._url,
            allow=settings.allow,
            ca=settings.ca,
            way=settings,
            timeout=opening.timeout,
            concurrency=opening.concurrency,
            agent=f"sluicegate/{opening.version}",
        )

    async def deliver(self, delivery: Delivery) -> Outcome:
        body = cloud_event(delivery.event, delivery.read)
        headers = self._signer.headers(str(delivery.event.id), int(time.time()), body)
        headers["content-type"] = "application/cloudevents+json; charset=utf-8"
        headers["idempotency-key"] = delivery.key
        answer = await self._client.send("POST", self._url, headers=headers, body=body, tracing=self._tracing)
        return outcome_of(answer) if isinstance(answer, Answer) else answer

    async def check(self) -> Outcome:
        """Connects (allowed addresses, TCP, TLS) and sends nothing: a post would be an event to its receiver."""
        return await self._client.reach(self._url)

    async def lookup(self, delivery: Delivery) -> Outcome | None:  # noqa: ARG002  # the protocol's
        """Nothing can be asked; sending it again with the same key is the answer."""
        return None

    async def close(self) -> None:
        await self._client.close()


class CloudEvent(msgspec.Struct, frozen=True):
    """https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md, in structured mode."""

    id: str
    source: str
    type: str
    time: datetime
    data: object
    subject: str | msgspec.UnsetType = msgspec.UNSET
    facility: str | msgspec.UnsetType = msgspec.UNSET
    datacontenttype: Literal["application/json"] = "application/json"
    specversion: Literal["1.0"] = "1.0"


_encode = msgspec.json.Encoder(order="deterministic").encode


def cloud_event(event: Event, read: Read | None = None) -> bytes:
    """The event as it goes out: a function of the event alone, in an order of its own, and of what was read for it."""
    return _encode(
        CloudEvent(
            id=str(event.id),
            source=f"/sources/{event.source}",
            type=event.type,
            time=event.time.astimezone(UTC),
            data=event.data if read is None else {**event.data, "read": dict(read)},
            subject=event.subject or msgspec.UNSET,
            facility=event.facility or msgspec.UNSET,
        )
    )


def outcome_of(answer: Answer) -> Outcome:
    """Judges by the status alone.  What a partner writes beside it is for people, and can hold anything."""
    status = answer.status
    match status:
        case 401 | 403:
            return Blocked(f"credentials: {words(status)}", status)
        case 410:
            return Blocked(f"configuration: {words(status)}; nobody takes events there any more", status)
        case 408 | 425:
            return Retry(words(status), status=status)
        case 429:
            return Retry(
                words(status), retry_after(answer.headers, datetime.now(UTC)), whole_destination=True, status=status
            )
        case 503:
            after = retry_after(answer.headers, datetime.now(UTC))
            return Retry(words(status), after, whole_destination=after is not None, status=status)
        case _ if 200 <= status < 300:
            return Delivered(status=status)
        case _ if status >= 500:
            return Retry(words(status), status=status)
        case _ if 300 <= status < 400:
            return Refused(f"{words(status)}; a redirect is not followed", status)
    return Refused(words(status), status)
