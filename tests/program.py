"""The program as its users have it: `sluicegate serve` in a process of its own, and a partner that is a real server."""

import base64
import hashlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

COMMAND = (str(Path(sys.executable).with_name("sluicegate")),)
CANARY = "canary-Maria-Example-1980"
T = TypeVar("T")


def whsec(text: str) -> str:
    return "whsec_" + base64.b64encode(text.encode()).decode()


SECRETS = {
    "SHOP_SECRET": whsec("shop-secret-of-32-bytes-00000000"),
    "SHOP_SECRET_NEXT": whsec("next-secret-of-32-bytes-00000000"),
    "ODOO_TOKEN": "odoo-token-of-32-bytes-000000000",
    "OUT_SECRET": whsec("out-secret-of-32-bytes-000000000"),
    "KEY": "key-of-digests-of-at-least-32-bytes",
}


def configuration(
    *,
    partner: str,
    database: str = "embedded",
    sources: str = "",
    routes: str = "",
    destinations: str = "",
    more: str = "",
) -> str:
    """One that works; `sources`, `routes` and `destinations` are further lines of these sections."""
    lines = {
        "SOURCES": sources, "ROUTES": routes, "DESTINATIONS": destinations, "MORE": more,
        "DATABASE": database, "PARTNER": partner, "KEY": "" if database == "embedded" else "key: env:KEY",
    }  # fmt: skip
    text = CONFIGURATION
    for name, value in lines.items():
        text = text.replace(name, value)
    return text


CONFIGURATION = """
serve: {listen: "127.0.0.1:PORT"}
database: DATABASE
KEY
MORE
sources:
  shop: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order], body: 64KiB}
SOURCES
policies:
  order:
    version: 1
    purpose: test of the whole program
    match: {kind: order}
    type: shop.order.{status}
    subject: order/{id}
    keep:
      id:     {from: id, type: int, min: 1}
      status: {from: status, type: enum, of: [paid, sent, lost]}
    dedup: [id, status]
routes:
  paid: {when: {type: shop.order.paid}, to: [ledger]}
ROUTES
destinations:
  ledger: {connector: http, url: "PARTNER/ledger", secret: env:OUT_SECRET, allow: [127.0.0.1/32], retry: {first: 100ms, cap: 1s, give_up: 5m}}
DESTINATIONS
"""


# ── what senders send ───────────────────────────────────────────────────────────────────────────────


def order(**changes: object) -> bytes:
    """A new order, with more in it than any policy keeps."""
    made = {"kind": "order", "id": uuid4().int % 10**9 + 1, "status": "paid", "customer": {"name": CANARY}, **changes}
    return json.dumps(made).encode()


def signed(
    body: bytes,
    *,
    secret: str = SECRETS["SHOP_SECRET"],
    id: str | None = None,  # noqa: A002
    at: int | None = None,
) -> dict[str, str]:
    """The headers of Standard Webhooks, made without the program's own code."""
    message, at = id or f"msg_{uuid4().hex}", at or int(time.time())
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{message}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json", "webhook-id": message, "webhook-timestamp": str(at),
        "webhook-signature": "v1," + base64.b64encode(mac).decode(),
    }  # fmt: skip


# ── the partner ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> str:
        return self.headers["webhook-id"]

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]


class Partner(ThreadingHTTPServer):
    """Notes what it gets, and answers as its mood says."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.received: list[Received] = []
        self.mood: Callable[[Received], int] = lambda _: 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def events(self, path: str = "/ledger") -> set[str]:
        return {received.event for received in list(self.received) if received.path == path}

    def handle_error(self, *_: object) -> None:
        """A program that is killed cuts its connections."""


class _Taking(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Partner

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        body = self.rfile.read(length)
        if len(body) < length:  # its sender was killed half-way: nothing was delivered
            self.close_connection = True
            return
        received = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.server.received.append(received)
        self.send_response(self.server.mood(received))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """It only notes."""


@contextmanager
def partner() -> Iterator[Partner]:
    with Partner() as partner:
        serving = threading.Thread(target=partner.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        yield partner
        partner.shutdown()
        serving.join()


# ── the program ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Program:
    """One `sluicegate serve` on a configuration in a folder; it can be started more than once."""

    def __init__(
        self,
        folder: Path,
        text: str,
        *arguments: str,
        name: str = "sluicegate",
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.path = folder / f"{name}.yaml"
        self._output = folder / f"{name}.log"
        self._page = 0
        self._command = [*prefix, *COMMAND, "serve", "--config", str(self.path), *arguments]
        self.environ = {**without_waiting_for_a_compiler(), **SECRETS, **(environ or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(text)

    def configure(self, text: str) -> None:
        """PORT and FOLDER in it are its own."""
        self.path.write_text(text.replace("PORT", str(self.port)).replace("FOLDER", str(self.folder)))

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> "Program":
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def ready(self, within: float = 30) -> float:
        """Seconds until /ready says so."""
        began = time.monotonic()
        until(self._is_ready, within, lambda: f"readiness; it said: {self.output[-2000:]}")
        return time.monotonic() - began

    def _is_ready(self) -> bool:
        assert self.alive, f"it ended with {self.running.returncode}: {self.output[-2000:]}"
        with suppress(OSError, HTTPException):
            return self.get("/ready").status == 200
        return False

    def stop(self, by: signal.Signals = signal.SIGTERM, within: float = 30) -> int:
        """Its exit status, once it has ended by itself."""
        self.running.send_signal(by)
        return self.ended(within)

    def ended(self, within: float = 30) -> int:
        return self.running.wait(within)

    def kill(self) -> None:
        """kill -9 of everything that it started, Postgres included."""
        while family := self.family():
            for process in family:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)
        self.running.wait(30)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def hangup(self) -> None:
        self.running.send_signal(signal.SIGHUP)

    @property
    def running(self) -> "subprocess.Popen[bytes]":
        assert self.process is not None, "it was not started"
        return self.process

    # ── its processes ────────────────────────────────────────────────────────────────────────────

    def family(self) -> set[int]:
        """Its session, all that was called with a path in its folder, and what these started; no zombies."""
        parents: dict[int, int] = {}
        found: set[int] = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state == "Z" or int(entry.name) == os.getpid():
                    continue
                parents[int(entry.name)] = int(parent)
                started = self.process is not None and int(session) == self.process.pid
                if started or os.fsencode(self.folder) + b"/" in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
        while children := {process for process, parent in parents.items() if parent in found} - found:
            found |= children
        return found

    def postgres(self) -> set[int]:
        return {process for process in self.family() if _name_of(process) == "postgres"}

    def keeper(self) -> int:
        (keeper,) = [p for p in self.family() if b"keeper.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        return keeper

    def workers(self) -> set[int]:
        children = Path(f"/proc/{self.running.pid}/task/{self.running.pid}/children").read_text().split()
        return {int(child) for child in children if b"serve" in Path(f"/proc/{child}/cmdline").read_bytes()}

    def signal(self, processes: Sequence[int] | set[int], number: signal.Signals) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    # ── what it says ─────────────────────────────────────────────────────────────────────────────

    @property
    def output(self) -> str:
        return self._output.read_bytes()[self._page :].decode(errors="replace") if self._output.exists() else ""

    def begin_a_new_page(self) -> None:
        """What it said until now is not read again."""
        self._page = self._output.stat().st_size if self._output.exists() else 0

    def log(self, event: str) -> list[dict[str, Any]]:
        """Its lines of this name, on this page."""
        lines = [json.loads(line) for line in self.output.splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line["event"] == event]

    def get(self, path: str) -> Answer:
        return self.call("GET", path)

    def post(self, body: bytes, path: str = "/hooks/shop", **headers: str) -> Answer:
        return self.call("POST", path, body, headers or signed(body))

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 20,
    ) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def accept(self, body: bytes | None = None) -> str:
        """Post an order that must be taken; its event."""
        answer = self.post(body or order())
        assert answer.status == 202, answer
        return str(answer.json["id"])

    def metric(self, sample: str) -> float:
        """The value of a sample, as `name{labels}`; 0 where there is none."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(f"{sample} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextmanager
def ended_with(*programs: Program) -> Iterator[None]:
    """Nothing of them stays behind, whatever becomes of a test."""
    try:
        yield
    finally:
        for program in programs:
            if program.process is not None:
                program.kill()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def until(probe: Callable[[], T], within: float, what: str | Callable[[], str]) -> T:
    """What `probe` finds, as soon as it finds something."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if found := probe():
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {what if isinstance(what, str) else what()} within {within:g} s")


@cache
def without_waiting_for_a_compiler() -> dict[str, str]:
    """The environment; where no bytecode may be written beside the source, it is kept with the interpreter."""
    environ = dict(os.environ)
    if environ.pop("PYTHONDONTWRITEBYTECODE", None):
        environ["PYTHONPYCACHEPREFIX"] = str(Path(sys.prefix) / "bytecode")
    return environ


def _name_of(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""
