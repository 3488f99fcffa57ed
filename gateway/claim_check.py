"""What a destination needs beyond what is kept: read at delivery, handed over, and kept nowhere.

The values exist during one try: in no event, attempt or dead letter, no log, span or metric.  A retry reads them again.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

import msgspec

from connectors import Blocked, Connector, Delivered, Delivery, Duplicate, Outcome, Pending, Refused, Retry, Unknown
from connectors.odoo_read import Reader
from gateway.config_sections import Reads
from outbox.event import Read


class ClaimCheck:
    """A connector whose deliveries bring along what was read for them."""

    def __init__(self, connector: Connector, reads: Reads, reader: Reader) -> None:
        self._connector = connector
        self._reads = reads
        self._reader = reader

    @property
    def keeps_keys(self) -> bool:
        return bool(getattr(self._connector, "keeps_keys", False))

    async def deliver(self, delivery: Delivery) -> Outcome:
        number = delivery.event.data.get(self._reads.key)
        if not isinstance(number, int) or isinstance(number, bool):
            return Refused("the event names no record to read")
        found = await self._reader.read(self._reads.model, number, self._reads.fields)
        if isinstance(found, Mapping):
            read = Read({name: found[name] for name in self._reads.fields if name in found})
            return await self._connector.deliver(msgspec.structs.replace(delivery, read=read))
        return _of_the_source(found)

    async def lookup(self, delivery: Delivery) -> Outcome | None:
        return await self._connector.lookup(delivery)

    async def check(self) -> Outcome:
        wrong = await self._reader.check(self._reads.model, self._reads.fields)
        return await self._connector.check() if wrong is None else _of_the_source(wrong)

    async def close(self) -> None:
        await self._connector.close()


def _of_the_source(outcome: Outcome) -> Outcome:
    """What came of reading, in words that tell it from what the destination says."""
    match outcome:
        case Delivered() | Duplicate() | Pending():
            return outcome
        case Blocked(reason=reason):
            kind, _, words = reason.partition(": ")
            return replace(outcome, reason=f"{kind}: reads: {words}")
        case Retry() | Refused() | Unknown():
            return replace(outcome, reason=f"reads: {outcome.reason}")
    assert_never(outcome)
