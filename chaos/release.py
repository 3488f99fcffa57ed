"""A newer release of the program, beside the one that is here: the same with another number and further migrations."""

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from chaos.program import SLUICEGATE
from outbox.database import shipped_migrations

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "outbox", "connectors", "dead_letter", "observability")
NEWER = "99.0.0"


class Release:
    """In a folder of its own, which a process has to look into first: `environ`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._migrations = len(shipped_migrations())
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package)
        about = folder / f"sluicegate-{NEWER}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: sluicegate\nVersion: {NEWER}\n")

    @property
    def environ(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self._folder)}

    def bring(self, name: str, sql: str, *, runs_from: str) -> str:
        """A migration; `runs_from` is the oldest release that can live with it.  As the program calls it."""
        self._migrations += 1
        called = f"{self._migrations:04}_{name}"
        (self._folder / "outbox/migrations" / f"{called}.sql").write_text(f"-- runs_from: {runs_from}\n{sql}")
        return called

    async def migrate(self, configuration: Path, environ: Mapping[str, str]) -> tuple[int, str]:
        """`sluicegate migrate` of this release: its status, and what it said."""
        process = await asyncio.create_subprocess_exec(
            SLUICEGATE, "migrate", "--config", str(configuration),
            env={**os.environ, **environ, **self.environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await asyncio.wait_for(process.communicate(), 120)
        return process.returncode or 0, said.decode(errors="replace")
