"""A primary and its synchronous standby, and one name that leads to whichever of them writes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from chaos.postgres import Postgres
from chaos.proxy import Proxy, Streams
from outbox.database import migrate
from tests.postgres import Postgres as Server
from tests.postgres import ended_with, folder_of_servers

DATABASE = "sluicegate"


class Pair(Postgres):
    """What a stage needs of a Postgres, with one that can take over; it has one database."""

    def __init__(self, primary: Server, standby: Server) -> None:
        self.folder = primary.folder.parent
        self._primary, self._standby = primary, standby
        self._leads_to = primary
        self._name = Proxy(self.connect)

    @classmethod
    @asynccontextmanager
    async def of_two(cls) -> AsyncIterator[Self]:
        with folder_of_servers() as folder:
            primary, standby = Server(folder, "primary"), Server(folder, "standby")
            with ended_with(primary, standby):
                pair = cls(primary, standby)
                await pair._name.start()
                try:
                    await asyncio.to_thread(pair._make)
                    await migrate(pair.dsn(DATABASE))
                    yield pair
                finally:
                    await pair._name.close()

    def _make(self) -> None:
        self._primary.make()
        self._standby.copy_of(self._primary, "-R").start()
        self._primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        self._primary.execute("SELECT pg_reload_conf()")

    async def fail_over(self) -> None:
        """The machine of the primary is gone, and the standby takes over under its name."""
        await asyncio.to_thread(self._primary.kill)
        self._name.reset_all()
        await asyncio.to_thread(self._standby.promote)
        self._leads_to = self._standby

    async def create(self, *, empty: bool = False) -> str:  # noqa: ARG002  as its base has it
        return DATABASE

    async def drop(self, name: str) -> None:
        """It goes with its servers."""

    def dsn(self, name: str, *, through: Proxy | None = None, user: str = "sluicegate") -> str:
        return super().dsn(name, through=through or self._name, user=user)

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self._leads_to.port)
