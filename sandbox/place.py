"""The folder of a demo, in which no other one works.

    sluicegate.yaml   written anew at each start
    secrets/          made at the first start, mode 0600, and never shown
    serve.log         what `sluicegate serve` writes
    demo.lock         held by the one demo that may work here

Beside them lies `data/`, as beside every configuration.
"""

import base64
import fcntl
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Self

import click

from outbox.embedded_folder import Lock
from sandbox.partners import Ports

SIGNING = ("monitoring", "ledger", "mail", "on-call", "register")
OTHERS = ("odoo-key", "odoo-token", "supplier")
SAMPLE = "sluicegate.yaml"
LISTEN = 8470  # the ports of the sample: the gateway's, and then those of the partners
ODOO, EVENTS, SMTP = 8471, 8472, 8473


class Place:
    """A folder in which no other demo works."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / SAMPLE
        self.log = folder / "serve.log"
        self.token = folder / "secrets" / "api-token"
        self.secrets: dict[str, str] = {}
        self.listen = 0
        self.ports = Ports()

    @classmethod
    @contextmanager
    def taken(cls, folder: Path) -> Iterator[Self]:
        """Ours inside the block; a second demo of the same folder is told so."""
        place = cls(folder)
        try:
            (folder / "secrets").mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = Lock(folder / "demo.lock")
        except OSError as error:
            raise click.ClickException(
                f"{error.filename}: {error.strerror}. Choose a folder that can be written: sluicegate demo --folder DIR"
            ) from error
        try:
            if not lock.take(fcntl.LOCK_EX):
                raise click.ClickException(
                    f"A demo (process {lock.told() or 'unknown'}) is at work in {folder} already. Stop that one with "
                    "Ctrl-C, or give this one a folder of its own: sluicegate demo --folder DIR"
                )
            lock.tell(str(os.getpid()))
            place.prepare()
            yield place
        finally:
            lock.close()

    def prepare(self) -> None:
        """The secrets that are not there yet, free ports, and the configuration with both."""
        for name in SIGNING:
            self.secrets[name] = self._secret(
                name, lambda: "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
            )
        for name in OTHERS:
            self.secrets[name] = self._secret(name, lambda: secrets.token_urlsafe(32))
        free = {port: _free(port) for port in (LISTEN, ODOO, EVENTS, SMTP)}
        self.listen = free[LISTEN]
        self.ports = Ports(odoo=free[ODOO], events=free[EVENTS], smtp=free[SMTP])
        sample = files("sandbox").joinpath("samples", SAMPLE).read_text(encoding="utf-8")
        self.config.write_text(
            re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda port: str(free[int(port[0])]), sample), encoding="utf-8"
        )

    def keep_token(self, token: str) -> None:
        self.token.unlink(missing_ok=True)
        _write_secret(self.token, token)

    def _secret(self, name: str, make: Callable[[], str]) -> str:
        path = self.folder / "secrets" / name
        if not path.exists():
            _write_secret(path, make())
        return path.read_text().strip()


def _write_secret(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")


def _free(port: int) -> int:
    """This port, or another one where it is in use."""
    for wanted in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise click.ClickException("No port is free on 127.0.0.1.")
