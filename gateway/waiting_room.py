"""What answers while there is no Postgres to begin with: alive, not ready, come back."""

from collections.abc import Sequence
from typing import Self

import msgspec
from aiohttp import web

from gateway.config_sections import Listen
from gateway.listening import Listening
from gateway.problems import problems_only, unavailable

READ_ONLY = "the database only reads: a standby answers, and the primary is waited for"
AWAY = "the database does not answer"


class WaitingRoom:
    """On the addresses of the program, until that is there itself.

    Without it a supervisor would find nobody alive and start the program anew, and senders would find a closed port,
    where many of them give up.
    """

    def __init__(self, addresses: Sequence[Listen], *, inherited: Sequence[int] = ()) -> None:
        self._addresses = addresses
        self._inherited = inherited
        self._listening: Listening | None = None
        self._missing = AWAY

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self, missing: str = AWAY) -> None:
        """With a word on what is waited for; raises AddressError."""
        self._missing = missing
        if self._listening is None:
            self._listening = Listening(self._application())
            await self._listening.open(self._addresses, inherited=self._inherited)

    async def close(self) -> None:
        if self._listening is not None:
            await self._listening.close()
            self._listening = None

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[problems_only])
        application.router.add_get("/live", _live)
        application.router.add_get("/ready", self._ready)
        application.router.add_route("*", "/{anything:.*}", _come_back)
        return application

    async def _ready(self, _: web.Request) -> web.Response:
        body = msgspec.json.encode({"ready": False, "missing": [self._missing]})
        headers = {"Cache-Control": "no-store", "Retry-After": "2"}
        return web.Response(status=503, body=body, content_type="application/json", headers=headers)


async def _live(_: web.Request) -> web.Response:
    return web.json_response({"live": True})


async def _come_back(_: web.Request) -> web.Response:
    return unavailable()
