"""What answers while there is no Postgres to begin with: alive, not ready, come back."""

from collections.abc import Sequence
from typing import Self

import msgspec
from aiohttp import web

from gateway.config_sections import Listen
from gateway.listening import Listening
from gateway.problems import problems_only, unavailable

NOT_READY = msgspec.json.encode({"ready": False, "missing": ["the database does not answer"]})


class WaitingRoom:
    """On the addresses of the program, until that is there itself.

    Without it a supervisor would find nobody alive and start the program anew, and senders would find a closed port,
    where many of them give up.
    """

    def __init__(self, addresses: Sequence[Listen], *, share: bool) -> None:
        self._addresses = addresses
        self._share = share
        self._listening: Listening | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Raises AddressError."""
        if self._listening is None:
            self._listening = Listening(_application())
            await self._listening.open(self._addresses, share=self._share)

    async def close(self) -> None:
        if self._listening is not None:
            await self._listening.close()
            self._listening = None


def _application() -> web.Application:
    application = web.Application(middlewares=[problems_only])
    application.router.add_get("/live", _live)
    application.router.add_get("/ready", _ready)
    application.router.add_route("*", "/{anything:.*}", _come_back)
    return application


async def _live(_: web.Request) -> web.Response:
    return web.json_response({"live": True})


async def _ready(_: web.Request) -> web.Response:
    headers = {"Cache-Control": "no-store", "Retry-After": "2"}
    return web.Response(status=503, body=NOT_READY, content_type="application/json", headers=headers)


async def _come_back(_: web.Request) -> web.Response:
    return unavailable()
