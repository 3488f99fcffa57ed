"""Stops and deploys with the real program: what senders see of them is nothing, and what was accepted is not lost."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from tests.program import Partner, Program, configuration, ended_with, order, partner, signed, until


@pytest.fixture(scope="module")
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@dataclass
class Senders:
    """Some who keep their connection and some who open one each time; none of them tries again."""

    port: int
    events: list[str] = field(default_factory=list)
    answers: Counter[int] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def send(self, *, keeps: bool, pause: float) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self.stopping.wait(pause):
            self.send_one(connection, keeps=keeps)
        connection.close()

    def send_one(self, connection: HTTPConnection, *, keeps: bool) -> None:
        body = order()
        try:
            connection.request("POST", "/hooks/shop", body, signed(body))
            answer = connection.getresponse()
            told = answer.read()
        except (OSError, HTTPException) as trouble:
            self.troubles.append(f"{'kept' if keeps else 'new'}: {trouble!r}")
            connection.close()
            return
        self.answers[answer.status] += 1
        if answer.status == 202:
            self.events.append(json.loads(told)["id"])
        if not keeps:
            connection.close()


@contextmanager
def sending(program: Program, *, keeping: int = 4, fresh: int = 4, pause: float = 0.05) -> Iterator[Senders]:
    senders = Senders(program.port)
    threads = [
        threading.Thread(target=senders.send, kwargs={"keeps": n < keeping, "pause": pause})
        for n in range(keeping + fresh)
    ]
    for thread in threads:
        thread.start()
    try:
        yield senders
    finally:
        senders.stopping.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def text(dsn: str, sink: Partner) -> str:
    sink.mood = _takes_a_moment
    return configuration(partner=sink.address, database="env:DATABASE")


def test_workers_are_renewed_one_after_another_and_no_sender_notices(
    tmp_path: Path, dsn: str, sink: Partner, text: str
) -> None:
    program = Program(tmp_path, text, "--workers", "2", environ={"DATABASE": dsn})
    with ended_with(program):
        program.start()
        until(lambda: len(program.log("serve.ready")) == 2, 60, "both workers")
        before = program.workers()
        with sending(program) as senders:
            until(lambda: len(senders.events) > 50, 30, "some load")
            good = program.path.read_text()
            program.path.write_text("serve: 42")
            program.running.send_signal(signal.SIGUSR2)
            until(lambda: program.log("worker.not_renewed"), 60, "word of a successor that does not come to work")
            assert program.workers() == before
            program.path.write_text(good)
            program.running.send_signal(signal.SIGUSR2)
            until(lambda: len(program.log("worker.renewed")) == 2, 120, "renewal")
            until(lambda: len(program.workers()) == 2, 60, "end of those that were there before")
            so_far = len(senders.events)
            until(lambda: len(senders.events) > so_far + 20, 30, "some load")
        assert not program.workers() & before
        assert senders.troubles == []
        assert set(senders.answers) == {202}
        until(lambda: set(senders.events) <= sink.events(), 30, "deliveries")
        assert sent_twice(sink) == [], "what was answered is not sent again"
        assert not program.log("worker.died")
        assert program.stop(within=60) == 0
        assert program.family() == set()


def test_behind_a_proxy_that_minds_readiness_programs_are_restarted_in_turn_and_no_sender_notices(
    tmp_path: Path, dsn: str, sink: Partner, text: str
) -> None:
    text = text.replace("serve: {", "serve: {notice: 1s, ")
    two = [Program(tmp_path, text, name=name, environ={"DATABASE": dsn}) for name in ("one", "two")]
    with ended_with(*two):
        for program in two:
            program.start()
        for program in two:
            program.ready(60)
        with proxied(two) as senders:
            for program, other in (two, two[::-1]):
                so_far = len(senders.events)
                until(lambda: len(senders.events) > so_far + 20, 30, "some load")  # noqa: B023
                other.begin_a_new_page()
                assert program.stop(within=60) == 0
                taken = until(lambda: other.log("lanes.taken_over"), 30, "a take-over")  # noqa: B023
                assert not any(lane["careful"] for lane in taken), "what is handed over needs no care"
                program.start().ready(60)
        assert senders.troubles == []
        assert set(senders.answers) == {202}
        until(lambda: set(senders.events) <= sink.events(), 30, "deliveries")
        assert sent_twice(sink) == [], "what was answered is not sent again"


def sent_twice(sink: Partner) -> list[str]:
    keys = Counter(received.key for received in sink.received)
    return [key for key, times in keys.items() if times > 1]


def _takes_a_moment(_: object) -> int:
    time.sleep(0.05)
    return 200


@contextmanager
def proxied(programs: list[Program]) -> Iterator[Senders]:
    """Each sender takes whichever program was ready when it was last asked, five times a second."""
    senders = Senders(0)
    ready: list[int] = [program.port for program in programs]

    def look() -> None:
        while not senders.stopping.wait(0.2):
            ready[:] = [program.port for program in programs if is_ready(program)]

    def send(number: int) -> None:
        while not senders.stopping.wait(0.02):
            if ports := list(ready):
                senders.send_one(HTTPConnection("127.0.0.1", ports[number % len(ports)], timeout=20), keeps=False)

    threads = [threading.Thread(target=look), *(threading.Thread(target=send, args=(n,)) for n in range(4))]
    for thread in threads:
        thread.start()
    try:
        yield senders
    finally:
        senders.stopping.set()
        for thread in threads:
            thread.join()


def is_ready(program: Program) -> bool:
    with suppress(OSError, HTTPException):
        return program.get("/ready").status == 200
    return False
