"""Reading one record of an Odoo: only the fields that are named, and ids without the names of what they lead to."""

import asyncio
from collections.abc import Collection, Mapping
from datetime import timedelta

from connectors import Blocked, Outcome, Refused, Retry
from connectors.odoo_deeds import Calls
from connectors.odoo_doors import Failed, Fault, judged
from connectors.odoo_server import Server
from observability.tracing import Tracing


class Reader:
    """Reads with the rights of the system's user."""

    def __init__(self, server: Server, tracing: Tracing, timeout: timedelta) -> None:
        self._server = server
        self._tracing = tracing
        self._calls = Calls(server, tracing)
        self._seconds = timeout.total_seconds()

    async def read(self, model: str, number: int, fields: Collection[str]) -> Mapping[str, object] | Outcome:
        """The record's values with its `id`, as Odoo has them: unset is False.  Or why there are none."""
        try:
            async with asyncio.timeout(self._seconds):
                values = await self._read(model, number, fields)
        except Failed as failed:
            return failed.outcome
        except Fault as fault:
            return judged(fault)
        except TimeoutError:
            return Retry("no answer in time")
        return Refused("the record is gone, or hidden from the user") if values is None else values

    async def check(self, model: str, fields: Collection[str]) -> Outcome | None:
        """What stands in the way of reading these fields, as far as can be told without a record."""
        try:
            async with asyncio.timeout(self._seconds):
                if missing := sorted({*fields} - {"id"} - (await self._calls.kinds(model, sorted(fields))).keys()):
                    return Blocked(f"configuration: {model} has no field {', '.join(missing)}")
                if not await self._calls.may(model, "read"):
                    return Blocked(f"configuration: rights: the user may not read {model}")
        except Failed as failed:
            return failed.outcome
        except Fault as fault:
            return judged(fault)
        except TimeoutError:
            return Retry("no answer in time")
        return None

    async def _read(self, model: str, number: int, fields: Collection[str]) -> Mapping[str, object] | None:
        try:
            found = await self._server.ask(self._tracing, model, "read", [number], fields=[*fields], load=None)
        except Fault as fault:
            if fault.name.endswith("MissingError"):
                return None
            if fault.name.endswith("AccessError") and await self._calls.may(model, "read"):
                return None  # a rule about this record, and no right that is missing for all of them
            raise
        match found:
            case []:
                return None
            case [dict(values)] if values.get("id") == number:
                return values
        raise Failed(Retry("its answer is not Odoo's"))
