"""The first moments of `sluicegate serve`: its configuration, then its Postgres, and only then the rest of the program.

A Postgres of its own takes a second to be made and started, and reading the program nearly as long: so the one goes on
while the other does.  A configuration with mistakes starts nothing.
"""

import os
from pathlib import Path

import click

from gateway import config as configuration
from observability.failpoints import VARIABLE, arm
from outbox.embedded_folder import EmbeddedFolder

WORKER = "SLUICEGATE_WORKER"  # how a process knows that it is one of several: the DSN that its parent found


def serve(path: Path, role: str, workers: int | None) -> int:
    """The exit status.  Raises what `expected` in gateway/commands.py can tell a person."""
    arm(os.environ.get(VARIABLE, ""))
    config = configuration.load(path, os.environ)
    its_own = config.database == "embedded" and WORKER not in os.environ
    folder = EmbeddedFolder.begin(config.folder) if its_own else None

    from gateway import app  # noqa: PLC0415 — all that is to be read while Postgres starts
    from gateway.listening import AddressError  # noqa: PLC0415

    try:
        return app.serve(config, folder, role=role, workers=workers or config.serve.workers, environ=os.environ)
    except AddressError as error:
        raise click.ClickException(str(error)) from error
