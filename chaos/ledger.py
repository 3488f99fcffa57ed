"""What happened, written down outside the system: requests, receipts, disturbances, samples.

Lines of JSON, each handed to the kernel before anything follows from it, so that what a ledger says survives whatever
becomes of who wrote it.  (It would not survive the machine, but no fault here ends that; and to flush each line would make
the partners the slowest part.)
Times are Unix seconds of this machine's clock, which no fault touches for the harness itself.
"""

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

Line = TypeVar("Line", bound=msgspec.Struct)


class Said(StrEnum):
    """What a sender knows of one request."""

    OK = "ok"  # 200 or 202: it is the program's responsibility
    REFUSED = "refused"  # 4xx: it must not be there
    UNKNOWN = "unknown"  # no answer, or 5xx: it may be there, and is sent again under the same id


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the order `n`, with its answer."""

    n: int
    at: float
    ended: float
    said: Said
    status: int | None = None
    event: str | None = None
    duplicate: bool = False


class Saw(msgspec.Struct, frozen=True, kw_only=True, tag="saw"):
    """A partner has read a request."""

    number: int  # of the request, at this partner
    partner: str
    key: str
    n: int
    subject: str | None
    digest: str
    at: float
    effect: bool  # it did something; one that keeps keys does it once a key
    via: str = ""  # the process that sent it


class Answered(msgspec.Struct, frozen=True, kw_only=True, tag="answered"):
    """The partner has answered, or whoever asked has hung up (`status` is None)."""

    number: int
    at: float
    status: int | None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Both ends of one attempt, as the partner saw it."""

    partner: str
    key: str
    n: int
    began: float
    ended: float
    status: int | None
    subject: str | None = None
    digest: str = ""
    effect: bool = False
    via: str = ""

    @property
    def taken(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Disturbance(msgspec.Struct, frozen=True, kw_only=True):
    """Something was killed, stopped or cut between these times: what was in flight may be sent again.

    `struck` is the one process that it happened to; what others had in flight was not in danger.  Empty: all of them.
    """

    name: str
    began: float
    ended: float
    struck: str = ""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of the program holds."""

    name: str
    pid: int
    rss: int  # bytes
    files: int
    sockets: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The books at one moment, from the rows and as the program tells them; None where nobody answered."""

    at: float
    rows: Mapping[str, int] | None = None
    told: bool | None = None
    processes: tuple[Process, ...] = ()


class Ledger:
    """A file that only grows, each line whole and out of our hands before the next thing happens."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def add(self, *lines: msgspec.Struct) -> None:
        os.write(self._file, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def lines(path: Path, kind: type[Line]) -> list[Line]:
    """All of one kind; a last line that was cut off is none."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
    return [msgspec.json.decode(line, type=kind) for line in whole]


def receipts(path: Path) -> list[Receipt]:
    """What one partner saw; what it has not answered yet is still under way."""
    if not path.exists():
        return []
    decode = msgspec.json.Decoder(Saw | Answered).decode
    told = [decode(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]
    ended = {line.number: line for line in told if isinstance(line, Answered)}
    return [_receipt(line, ended.get(line.number)) for line in told if isinstance(line, Saw)]


def _receipt(saw: Saw, answered: Answered | None) -> Receipt:
    return Receipt(
        partner=saw.partner,
        key=saw.key,
        n=saw.n,
        began=saw.at,
        ended=answered.at if answered else float("inf"),
        status=answered.status if answered else None,
        subject=saw.subject,
        digest=saw.digest,
        effect=saw.effect,
        via=saw.via,
    )


def by_order(sent: Iterable[Sent]) -> dict[int, Said]:
    """What became of each order, over all its requests: one yes is a yes, and a doubt outweighs a no."""
    said: dict[int, Said] = {}
    for line in sent:
        before = said.get(line.n)
        if line.said is Said.OK or before is Said.OK:
            said[line.n] = Said.OK
        elif line.said is Said.UNKNOWN or before is Said.UNKNOWN:
            said[line.n] = Said.UNKNOWN
        else:
            said[line.n] = Said.REFUSED
    return said
