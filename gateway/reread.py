"""Reads again what a hint is about; what a hint is stands in gateway/hints.py."""

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from connectors import Delivered, Delivery, Opening, Outcome, Refused
from connectors.odoo_read import Reader
from connectors.odoo_server import Server
from gateway.hints import ID, MODEL
from outbox.event import Event

Take = Callable[[Event, bytes], Awaitable[Outcome]]
"""Keeps and routes what was read on a hint, as if it had been posted."""


class Reread:
    """Reads the record of a hint, with the fields that the policies name, and hands on what it says now."""

    keeps_keys = True

    def __init__(self, opening: Opening, fields: Mapping[str, tuple[str, ...]], take: Take | None) -> None:
        assert isinstance(opening.system, Server)
        self._reader = Reader(opening.system, opening.tracing, opening.timeout)
        self._fields = fields
        self._take = take

    async def deliver(self, delivery: Delivery) -> Outcome:
        assert self._take is not None, "opened for a check only"
        match delivery.event.data:
            case {"model": str(model), "id": int(number)} if model in self._fields:
                found = await self._reader.read(model, number, self._fields[model])
            case _:
                return Refused("no policy of this source matches any more")
        if not isinstance(found, Mapping):
            return found
        return await self._take(delivery.event, msgspec.json.encode({MODEL: model, ID: number, **found}))

    async def lookup(self, delivery: Delivery) -> Outcome | None:  # noqa: ARG002  # the protocol's
        """To read again changes nothing, and what was told already is found by its `dedup`."""
        return None

    async def check(self) -> Outcome:
        """Finds Odoo, logs in, and asks for the fields and the right to read them; changes nothing."""
        for model, fields in self._fields.items():
            if wrong := await self._reader.check(model, fields):
                return wrong
        return Delivered()

    async def close(self) -> None:
        """The server is shared, and closed by who opened it."""
