"""`sluicegate serve` as the demo runs it: a process of its own, asked about over its API."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import click

STOP_WITHIN = 15.0  # seconds; then it is killed


class Program:
    """The process, and its API once it is ready."""

    def __init__(
        self, process: asyncio.subprocess.Process, log: Path, url: str, session: aiohttp.ClientSession
    ) -> None:
        self.url = url
        self._process = process
        self._log = log
        self._session = session
        self._token = ""

    @classmethod
    @asynccontextmanager
    async def running(cls, config: Path, log: Path, url: str) -> AsyncIterator["Program"]:
        """Ready inside the block, and over after it.

        It is in a session of its own: Ctrl-C in the terminal is for the demo, which then stops it in order.
        """
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sandbox.beside", str(os.getpid()), "--config", str(config),
                stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
                program = cls(process, log, url, session)
                await program._ready()
                yield program
        finally:
            await _stop(process)

    def believe(self, token: str) -> None:
        """Ask the API as the holder of this token."""
        self._token = token

    async def ask(self, path: str, **query: str | int) -> Any:
        """What the API answers; None where there is no such thing, or no answer."""
        headers = {"authorization": f"Bearer {self._token}"}
        try:
            async with self._session.get(f"{self.url}/api/v1{path}", params=query, headers=headers) as answer:
                return await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def watch(self) -> None:
        """Ends, with an error, when the process does."""
        status = await self._process.wait()
        raise click.ClickException(f"`sluicegate serve` ended by itself (status {status}).\n{self._last_words()}")

    async def _ready(self) -> None:
        while self._process.returncode is None:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.get(f"{self.url}/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.05)
        raise click.ClickException(f"`sluicegate serve` did not start.\n{self._last_words()}")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-5:]
        return "\n".join([f"The end of {self._log}:", *(f"  {line}" for line in lines)])


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_WITHIN)
        except TimeoutError:
            process.kill()
    await process.wait()
