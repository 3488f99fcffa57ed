"""One `sluicegate serve` of a stage: started, killed, and started again by a supervisor, as in production."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import aiohttp

from chaos.postgres import children_of, is_alive
from observability.failpoints import VARIABLE
from outbox.ending import end

SLUICEGATE = str(Path(sys.executable).with_name("sluicegate"))


class Program:
    """A process of the product, by its name: `gateway-1`, `dispatcher-2`."""

    def __init__(self, folder: Path, name: str, role: str, text: str, environ: Mapping[str, str]) -> None:
        self.name = name
        self.role = role
        self.port = free_port()
        self.deaths: list[int] = []  # the statuses that it ended with
        self.next_lives: list[str] = []  # what is armed in each of them; then nothing
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self.configuration = self._folder / "sluicegate.yaml"
        self.configuration.write_text(text.replace("PORT", str(self.port)))
        self._environ = {**os.environ, **environ}
        self._environ.pop(VARIABLE, None)
        self._process: subprocess.Popen[bytes] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._failpoints = ""
        self.prefix: list[str] = []  # what it is run by
        self.output: int | None = None  # where it writes to, instead of a file

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    def start(self, failpoints: str = "") -> None:
        """The failpoints are armed in this life only."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.prefix, SLUICEGATE, "serve", "--config", str(self.configuration), "--role", self.role],
                env={**self._environ, **({VARIABLE: failpoints} if failpoints else {})},
                stdin=subprocess.DEVNULL,
                stdout=log if self.output is None else self.output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def set_environ(self, **values: str) -> None:
        """From its next life on."""
        self._environ |= values

    def reconfigure(self, old: str, new: str) -> None:
        """Its file says something else; it learns it by SIGHUP."""
        text = self.configuration.read_text()
        if old not in text:
            raise ValueError(f"the configuration does not say {old!r}")
        self.configuration.write_text(text.replace(old, new))

    def supervise(self) -> None:
        """Whenever it ends it is started again, until `end`."""
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            if self._process is not None and (status := self._process.poll()) is not None:
                self.deaths.append(status)
                self.start(self.next_lives.pop(0) if self.next_lives else "")

    async def ready(self, within: float = 90) -> None:
        until = time.monotonic() + within
        while not await self.is_ready():
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} is not ready; it said: {self.said()[-1500:]}")
            await asyncio.sleep(0.05)

    async def is_ready(self) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(4)) as session,
                session.get(f"{self.address}/ready") as answer,
            ):
                return answer.status == 200
        return False

    async def again(self, failpoints: str = "", *then: str) -> None:
        """A new life, with these armed; and then others."""
        await self.stop()
        self.next_lives = list(then)
        self.start(failpoints)
        self.supervise()

    async def stop(self, within: float = 45) -> int:
        """SIGTERM; its status."""
        await self._unwatch()
        assert self._process is not None
        if self._process.poll() is None:
            self.send_signal(signal.SIGCONT)
            self.send_signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(self._process.wait, within)
        except subprocess.TimeoutExpired:
            self.kill()
            return await asyncio.to_thread(self._process.wait)

    async def dies(self, within: float = 90) -> int:
        """The status of its next death."""
        before, until = len(self.deaths), time.monotonic() + within
        while len(self.deaths) == before:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} did not die within {within:g} s")
            await asyncio.sleep(0.02)
        return self.deaths[-1]

    async def ended(self, within: float = 45) -> int:
        """The status of one that ends by itself."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, within)

    async def end(self) -> None:
        await self._unwatch()
        if self._process is not None:
            self.send_signal(signal.SIGCONT)
            self.kill()
            await asyncio.to_thread(self._process.wait)

    async def _unwatch(self) -> None:
        if self._watching is not None:
            await end(self._watching)
            self._watching = None

    # ── what is done to it, and what it says ─────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and is_alive(self._process.pid)

    def processes(self) -> list[int]:
        return [self.pid, *children_of(self.pid)] if self.alive else []

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self._folder / "log"

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def metric(self, sample: str) -> float:
        """As `name{labels}`, or as the name alone for the sum over all labels."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.address}/metrics") as answer:
            text = await answer.text()
        total = 0.0
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample or ("{" not in sample and name.partition("{")[0] == sample):
                total += float(value)
        return total


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
