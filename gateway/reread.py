"""Reads again what a hint is about; what a hint is stands in gateway/hints.py."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from connectors import Blocked, Delivered, Delivery, Opening, Outcome, Refused, Retry
from connectors.odoo_deeds import Calls
from connectors.odoo_doors import Failed, Fault, judged
from connectors.odoo_server import Server
from gateway.hints import ID, MODEL
from outbox.event import Event

Take = Callable[[Event, bytes], Awaitable[Outcome]]
"""Keeps and routes what was read on a hint, as if it had been posted."""


class Reread:
    """Reads the record of a hint, with the rights of the system's user, and hands on what it says now.

    Only the fields that the policies name are asked for; ids stand for the records that they lead to, without names.
    """

    keeps_keys = True

    def __init__(self, opening: Opening, fields: Mapping[str, tuple[str, ...]], take: Take | None) -> None:
        assert isinstance(opening.system, Server)
        self._server = opening.system
        self._calls = Calls(opening.system, opening.tracing)
        self._tracing = opening.tracing
        self._seconds = opening.timeout.total_seconds()
        self._fields = fields
        self._take = take

    async def deliver(self, delivery: Delivery) -> Outcome:
        assert self._take is not None, "opened for a check only"
        model, number = delivery.event.data["model"], delivery.event.data["id"]
        if not isinstance(model, str) or not isinstance(number, int) or model not in self._fields:
            return Refused("no policy of this source matches any more")
        try:
            async with asyncio.timeout(self._seconds):
                values = await self._read(model, number)
        except Failed as failed:
            return failed.outcome
        except Fault as fault:
            return judged(fault)
        except TimeoutError:
            return Retry("no answer in time")
        if values is None:
            return Refused("the record is gone, or hidden from the user")
        return await self._take(delivery.event, msgspec.json.encode({MODEL: model, ID: number, **values}))

    async def lookup(self, delivery: Delivery) -> Outcome | None:  # noqa: ARG002  # the protocol's
        """To read again changes nothing, and what was told already is found by its `dedup`."""
        return None

    async def check(self) -> Outcome:
        """Finds Odoo, logs in, and asks for the fields and the right to read them; changes nothing."""
        try:
            async with asyncio.timeout(self._seconds):
                for model, fields in self._fields.items():
                    if missing := sorted(set(fields) - {"id"} - (await self._calls.kinds(model, fields)).keys()):
                        return Blocked(f"configuration: policies: {model} has no field {', '.join(missing)}")
                    if not await self._calls.may(model, "read"):
                        return Blocked(f"configuration: rights: the user may not read {model}")
        except Failed as failed:
            return failed.outcome
        except Fault as fault:
            return judged(fault)
        except TimeoutError:
            return Retry("no answer in time")
        return Delivered()

    async def close(self) -> None:
        """The server is shared, and closed by who opened it."""

    async def _read(self, model: str, number: int) -> Mapping[str, object] | None:
        try:
            found = await self._server.ask(
                self._tracing, model, "read", [number], fields=list(self._fields[model]), load=None
            )
        except Fault as fault:
            if fault.name.endswith("MissingError"):
                return None
            if fault.name.endswith("AccessError") and await self._calls.may(model, "read"):
                return None
            raise
        match found:
            case []:
                return None
            case [dict(values)] if values.get("id") == number:
                return values
        raise Failed(Retry("its answer is not Odoo's"))
