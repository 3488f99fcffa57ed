"""`sluicegate serve` from outside: started, reloaded, stopped, killed, and left without its Postgres."""

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Self

import pytest

from gateway.config_sections import Listen
from gateway.listening import AddressError, bound
from tests.conftest import TEMPLATE, as_superuser, in_database
from tests.program import (
    SECRETS,
    Partner,
    Program,
    Received,
    configuration,
    ended_with,
    order,
    partner,
    signed,
    until,
)
from tests.wire import connected, post

DEFECTS = ("request.failed", "delivery.failed", "task.failed", "process.failed")


@pytest.fixture(scope="module")
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@pytest.fixture(scope="module")
def text(sink: Partner) -> str:
    """The shop's secret comes from a file, and it listens on a Unix socket as well."""
    listening = configuration(partner=sink.address).replace(
        '"127.0.0.1:PORT"', '["127.0.0.1:PORT", "unix:FOLDER/door"]'
    )
    return listening.replace("env:SHOP_SECRET", "file:secret")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, text: str) -> Iterator[Program]:
    """One for all tests, since a start takes a second; a test may end it in any way."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "secret").write_text(SECRETS["SHOP_SECRET"])
    program = Program(folder, text)
    with ended_with(program):
        yield program
        assert [line for defect in DEFECTS for line in program.log(defect)] == []


@pytest.fixture
def program(kept: Program, text: str, sink: Partner) -> Program:
    """At work on an embedded Postgres."""
    sink.mood = lambda _: 200
    return at_work(kept, text)


@pytest.fixture(scope="module")
def kept_two(tmp_path_factory: pytest.TempPathFactory, sink: Partner) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("workers"), configuration(partner=sink.address), "--workers", "2")
    with ended_with(program):
        yield program
        assert [line for defect in DEFECTS for line in program.log(defect)] == []


@pytest.fixture
def two(kept_two: Program, sink: Partner) -> Program:
    """Two workers, both of which answer."""
    sink.mood = lambda _: 200
    began = not kept_two.alive
    program = at_work(kept_two, configuration(partner=sink.address))
    if began:
        until(lambda: len(program.log("serve.ready")) == 2, 15, "second worker")
    return program


def at_work(program: Program, text: str) -> Program:
    program.begin_a_new_page()
    program.configure(text)
    if not program.alive:
        program.start()
    program.ready()
    return program


@contextmanager
def serving(
    folder: Path, text: str, *arguments: str, name: str = "sluicegate", environ: Mapping[str, str] | None = None
) -> Iterator[Program]:
    program = Program(folder, text, *arguments, name=name, environ=environ)
    with ended_with(program):
        program.start().ready()
        yield program


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────


def test_ctrl_c_ends_it_and_leaves_nothing_running(program: Program) -> None:
    program.accept()
    began = time.monotonic()
    os.killpg(program.running.pid, signal.SIGINT)  # as a terminal does
    assert program.ended() == 0
    assert time.monotonic() - began < 5, "0.4 s on an idle machine"
    assert program.family() == set()
    assert len(program.log("serve.stopped")) == 1


def test_what_is_under_way_at_the_end_is_finished_and_not_done_again(program: Program, sink: Partner) -> None:
    leave, entered = threading.Event(), threading.Event()

    def slowly(_: Received) -> int:
        entered.set()
        leave.wait(20)
        return 200

    sink.mood = slowly
    event = program.accept()
    assert entered.wait(10)
    program.running.send_signal(signal.SIGTERM)
    until(lambda: program.log("serve.stopping"), 5, "stopping")
    time.sleep(0.3)
    assert program.alive, "it waits for the delivery"
    leave.set()
    assert program.ended() == 0
    assert program.family() == set()
    program.start().ready()
    later = program.accept()
    until(lambda: later in sink.events(), 10, "a delivery")
    assert [received.event for received in sink.received].count(event) == 1


async def test_a_body_that_still_comes_in_at_the_end_is_heard_and_answered(program: Program) -> None:
    raw = post(order())
    async with connected(program.port) as busy, connected(program.port) as idle:
        assert (await idle.ask(post(order()))).status == 202
        await busy.send(raw[:-20])
        await asyncio.sleep(0.2)
        program.running.send_signal(signal.SIGTERM)
        assert await idle.closed(within=3) < 3
        await busy.send(raw[-20:])
        answer = await busy.answer()
        assert (answer.status, answer.headers["connection"]) == (202, "close")
    assert program.ended(5) == 0


def test_a_second_signal_ends_it_at_once(program: Program, sink: Partner) -> None:
    entered = threading.Event()

    def hangs(_: Received) -> int:
        entered.set()
        time.sleep(3)
        return 200

    sink.mood = hangs
    program.accept()
    assert entered.wait(10)
    program.running.send_signal(signal.SIGTERM)
    until(lambda: program.log("serve.stopping"), 5, "stopping")
    assert program.stop(within=1) == 1
    until(lambda: not program.family(), 5, "end of Postgres")


def test_it_can_be_stopped_while_it_starts(tmp_path: Path, sink: Partner) -> None:
    program = Program(tmp_path, configuration(partner=sink.address))
    with ended_with(program):
        for moment in ("serve.starting", "postgres.started"):
            program.start()
            until(lambda moment=moment: program.log(moment), 20, moment)
            assert program.stop() == 0
            until(lambda: not program.family(), 10, "end of Postgres")
        assert "Traceback" not in program.output


# ── another configuration ───────────────────────────────────────────────────────────────────────────


def with_another(text: str, sink: Partner, name: str) -> str:
    """Every event goes to one destination more."""
    keys = "secret: env:OUT_SECRET, allow: [127.0.0.1/32], retry: {first: 100ms, cap: 200ms, give_up: 5m}"
    another = f'\n  {name}: {{connector: http, url: "{sink.address}/{name}", {keys}}}'
    text = text.replace("\nroutes:", f"\nroutes:\n  all: {{to: [{name}]}}")
    return text.replace("\ndestinations:", f"\ndestinations:{another}")


def reloaded(program: Program, text: str) -> None:
    program.configure(text)
    program.hangup()
    until(lambda: works_by_its_file(program), 15, lambda: f"reload: {program.output[-1500:]}")


def dropped(program: Program, text: str) -> None:
    """A file without a destination, which is refused for as long as something waits for that."""

    def done() -> bool:
        program.hangup()
        time.sleep(0.2)
        return works_by_its_file(program)

    program.configure(text)
    until(done, 30, lambda: f"reload: {program.output[-1500:]}")


def works_by_its_file(program: Program) -> bool:
    digest = hashlib.sha256(program.path.read_bytes()).hexdigest()
    return bool(program.get("/ready").json["configuration"] == digest)


def refusals(program: Program) -> list[str]:
    return [line["mistake"] for line in program.log("config.refused")]


def test_a_new_route_destination_and_secret_count_without_a_restart(program: Program, sink: Partner, text: str) -> None:
    event = program.accept()
    until(lambda: event in sink.events(), 10, "delivery")
    (program.folder / "secret").write_text(SECRETS["SHOP_SECRET_NEXT"])
    try:
        reloaded(program, with_another(text, sink, "archive"))
        body = order(status="sent")
        assert program.post(body).status == 401, "signed by the old secret"
        answer = program.post(body, **signed(body, secret=SECRETS["SHOP_SECRET_NEXT"]))
        assert answer.status == 202
        until(lambda: answer.json["id"] in sink.events("/archive"), 10, "delivery by the new route")
    finally:
        (program.folder / "secret").write_text(SECRETS["SHOP_SECRET"])
        dropped(program, text)


def test_a_bad_configuration_is_refused_with_all_its_mistakes_and_the_old_one_goes_on(
    program: Program, sink: Partner, text: str
) -> None:
    program.configure(text.replace("body: 64KiB", "boddy: 64KiB").replace("to: [ledger]", "to: [ledgr]"))
    program.hangup()
    until(lambda: len(refusals(program)) == 2, 5, lambda: f"refusal: {program.output[-1500:]}")
    for word in ("sluicegate.yaml:", "boddy", "ledgr", '"ledger"'):
        assert word in " ".join(refusals(program))
    program.path.unlink()
    program.hangup()
    until(lambda: len(refusals(program)) == 3, 5, "refusal of no file")
    event = program.accept()
    until(lambda: event in sink.events(), 10, "delivery")
    reloaded(program, text)


def test_what_cannot_change_while_it_runs_is_refused_by_name(program: Program, text: str) -> None:
    changes = {
        "serve.listen": ('"127.0.0.1:PORT"', '"127.0.0.1:1"'),
        "serve.workers": ("serve: {", "serve: {workers: 2, "),
        "database": ("database: embedded", "database: postgresql://somebody@nowhere/else\nkey: env:KEY"),
        "observability": ("sources:", "observability: {sample: 1.0}\nsources:"),
        "key": ("sources:", "key: env:KEY\nsources:"),
    }
    for number, (name, (old, new)) in enumerate(changes.items(), 1):
        program.configure(text.replace(old, new, 1))
        program.hangup()
        until(lambda count=number: len(refusals(program)) == count, 5, f"refusal of another {name}")
        assert name in refusals(program)[-1]
    assert program.get("/ready").status == 200
    reloaded(program, text)


def test_what_is_posted_while_it_is_reloaded_again_and_again_is_taken_and_delivered(
    program: Program, sink: Partner, text: str
) -> None:
    more = with_another(text, sink, "archive")
    less = more.replace("archive: {", "archive: {retired: true, ").replace("\n  all: {to: [archive]}", "")
    with Burst(program, senders=3) as burst:
        for changed in [more, less] * 5:
            program.configure(changed)
            for _ in range(4):
                program.hangup()
                time.sleep(0.02)
    assert burst.statuses == {202}
    until(lambda: set(burst.accepted) <= sink.events(), 20, "delivery of all")
    reloaded(program, less)
    dropped(program, text)


def test_a_destination_that_is_taken_away_keeps_what_it_is_owed_until_it_is_back(
    program: Program, sink: Partner, text: str
) -> None:
    sink.mood = lambda received: 503 if received.path == "/attic" else 200
    reloaded(program, with_another(text, sink, "attic"))
    events = {program.accept() for _ in range(20)}
    until(lambda: sink.events("/attic") & events, 10, "attempt")
    assert program.stop() == 0
    program.configure(text)  # a reload would refuse it
    program.start().ready()
    later = program.accept()
    until(lambda: events | {later} <= sink.events(), 10, "deliveries to the other one")
    time.sleep(1.5)
    seen = len(sink.received)
    sink.mood = lambda _: 200
    time.sleep(0.7)
    assert len(sink.received) == seen, "nothing is sent where the configuration names nobody"
    reloaded(program, with_another(text, sink, "attic"))
    until(lambda: events <= {r.event for r in sink.received[seen:]}, 20, "deliveries once it is back")
    dropped(program, text)


# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────────


class Burst:
    """Senders that post as fast as they are answered, until they are told to stop; each knows what was acknowledged."""

    def __init__(self, program: Program, senders: int = 8) -> None:
        self._program = program
        self._over = threading.Event()
        self._senders = [threading.Thread(target=self._send, daemon=True) for _ in range(senders)]
        self.accepted: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.statuses: set[int] = set()

    def __enter__(self) -> Self:
        for sender in self._senders:
            sender.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for sender in self._senders:
            sender.join()

    def await_more(self, number: int) -> None:
        wanted = len(self.accepted) + number
        until(lambda: len(self.accepted) >= wanted, 20, f"{number} more accepted")

    def _send(self) -> None:
        while not self._over.is_set():
            body = order()
            headers = signed(body)
            try:
                answer = self._program.post(body, **headers)
            except (OSError, HTTPException):
                time.sleep(0.02)
                continue
            self.statuses.add(answer.status)
            if answer.status == 202:
                self.accepted[answer.json["id"]] = body, headers


def alone(program: Program) -> None:
    program.running.kill()
    program.ended()


def its_postgres(program: Program) -> None:
    program.signal(program.postgres(), signal.SIGKILL)


def with_all_that_it_started(program: Program) -> None:
    program.kill()


@pytest.mark.parametrize("killed", [alone, its_postgres, with_all_that_it_started])
def test_whatever_is_killed_nothing_acknowledged_is_lost_and_all_is_soon_well_again(
    program: Program, sink: Partner, killed: Callable[[Program], None]
) -> None:
    with Burst(program) as burst:
        burst.await_more(100)
        killed(program)
        if not program.alive:
            program.start()
        took = program.ready()
        burst.await_more(20)
    assert took < 8, "1 to 2 s on an idle machine"
    assert burst.statuses <= {202, 503}
    until(lambda: set(burst.accepted) <= sink.events(), 20, "delivery of all that was acknowledged")
    keys: dict[str, set[str]] = {}
    for received in list(sink.received):
        keys.setdefault(received.event + received.path, set()).add(received.key)
    assert all(len(of_one) == 1 for of_one in keys.values()), "sent twice under another key"
    event, (body, headers) = next(iter(burst.accepted.items()))
    again = program.post(body, **headers)
    assert (again.status, again.json) == (200, {"id": event, "duplicate": True})


# ── without its Postgres ────────────────────────────────────────────────────────────────────────────


def gone(program: Program) -> Callable[[], None]:
    """Killed, and nobody there who would start it again."""
    keeper = program.keeper()
    os.kill(keeper, signal.SIGSTOP)
    program.signal(program.postgres(), signal.SIGKILL)
    return lambda: os.kill(keeper, signal.SIGCONT)


def frozen(program: Program) -> Callable[[], None]:
    processes = program.postgres()
    program.signal(processes, signal.SIGSTOP)
    return lambda: program.signal(processes, signal.SIGCONT)


@pytest.mark.parametrize("trouble", [gone, frozen])
async def test_while_postgres_is_away_it_says_so_at_once_and_it_recovers_by_itself(
    program: Program, sink: Partner, trouble: Callable[[Program], Callable[[], None]]
) -> None:

    async def refused() -> float:
        began = time.monotonic()
        async with connected(program.port) as line:
            answer = await line.ask(post(order()))
        assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
        assert int(answer.headers["retry-after"]) >= 1
        return time.monotonic() - began

    program.accept()
    back = trouble(program)
    for _ in range(2):
        assert max(await asyncio.gather(*(refused() for _ in range(40)))) < 3, "more than there are connections"
    began = time.monotonic()
    ready = program.get("/ready")
    assert ready.status == 503
    assert "the database does not answer" in ready.json["missing"]
    assert program.get("/live").status == 200
    assert program.get("/metrics").status == 200
    assert time.monotonic() - began < 3
    back()
    assert program.ready(20) < 12
    until(lambda: program.post(order()).status == 202, 5, "acceptance")
    event = program.accept()
    until(lambda: event in sink.events(), 15, "delivery")


def test_it_can_be_stopped_while_postgres_is_away(program: Program) -> None:
    back = gone(program)
    program.running.send_signal(signal.SIGTERM)
    until(lambda: program.log("serve.stopping"), 5, "stopping")
    time.sleep(0.2)
    back()
    assert program.ended(20) == 0
    assert program.family() == set()


def test_where_there_is_no_postgres_yet_it_is_alive_and_asks_to_come_back_until_there_is_one(
    tmp_path: Path, sink: Partner, server: str
) -> None:
    text = configuration(partner=sink.address, database="env:DSN")
    program = Program(tmp_path, text, environ={"DSN": in_database(server, "later")})
    with ended_with(program):
        program.start()
        until(lambda: program.log("postgres.away"), 10, "word of it")
        assert "InvalidCatalogNameError" in program.log("postgres.away")[0]["reason"]
        assert program.get("/live").status == 200
        assert program.get("/ready").json == {"ready": False, "missing": ["the database does not answer"]}
        answer = program.post(order())
        assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
        assert int(answer.headers["retry-after"]) >= 1
        program.hangup()
        asyncio.run(as_superuser(server, f"CREATE DATABASE later TEMPLATE {TEMPLATE} OWNER sluicegate"))
        program.ready(15)
        event = program.accept()
        until(lambda: event in sink.events(), 10, "delivery")
        assert program.stop() == 0


def test_it_can_be_stopped_while_it_waits_for_a_postgres(tmp_path: Path, sink: Partner) -> None:
    program = Program(tmp_path, configuration(partner=sink.address, database="postgresql://nobody@127.0.0.1:1/nothing"))
    with ended_with(program):
        program.start()
        until(lambda: program.log("postgres.away"), 10, "word of it")
        assert program.stop(within=5) == 0
        assert not program.log("serve.ready")


def test_a_database_that_was_not_migrated_is_left_alone_and_the_mend_is_told(
    tmp_path: Path, sink: Partner, empty_dsn: str
) -> None:
    program = Program(tmp_path, configuration(partner=sink.address, database="env:DSN"), environ={"DSN": empty_dsn})
    with ended_with(program):
        assert program.start().ended(15) == 1
        assert "run `sluicegate migrate`" in program.output
        assert "Traceback" not in program.output


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_address_that_is_taken_is_named_and_nothing_stays_behind(
    tmp_path: Path, sink: Partner, dsn: str, workers: str
) -> None:
    text = configuration(partner=sink.address, database="env:DSN").replace("PORT", str(sink.server_port))
    program = Program(tmp_path, text, "--workers", workers, environ={"DSN": dsn})
    assert program.start().ended(20) == 1
    assert f"serve.listen: 127.0.0.1:{sink.server_port} cannot be had: Address already in use" in program.output
    assert "Traceback" not in program.output
    assert program.family() == set()


def test_a_unix_socket_is_an_address_too(program: Program) -> None:
    asked = ["curl", "-sf", "--unix-socket", str(program.folder / "door"), "http://sluicegate/live"]
    assert subprocess.run(asked, capture_output=True, check=True).stdout == b'{"live": true}'
    with pytest.raises(AddressError, match="already in use"):
        bound(Listen(path=str(program.folder / "door")), share=False)


def test_a_unix_socket_is_taken_from_the_dead_and_from_nobody_else(tmp_path: Path) -> None:
    address = Listen(path=str(tmp_path / "door"))
    bound(address, share=False).close()  # which leaves the file there
    bound(address, share=False).close()
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(AddressError, match="cannot be had"):
        bound(Listen(path=str(tmp_path / "file")), share=False)
    assert (tmp_path / "file").read_text() == "somebody's"


def test_an_address_without_a_host_is_every_address() -> None:
    with bound(Listen(port=0), share=False) as every:
        every.listen()
        port = every.getsockname()[1]
        for host in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
            socket.create_connection((host, port), timeout=5).close()


# ── more than one ───────────────────────────────────────────────────────────────────────────────────


def test_a_second_one_in_the_same_folder_is_told_who_is_there_and_hurts_nobody(
    program: Program, sink: Partner, text: str
) -> None:
    second = Program(program.folder, text, name="second")
    assert second.start().ended(15) == 1
    assert f"(process {program.running.pid}) is at work here already" in second.output
    assert "Traceback" not in second.output
    event = program.accept()
    until(lambda: event in sink.events(), 10, "delivery")


def test_a_gateway_and_dispatchers_are_processes_on_one_postgres_and_any_of_them_may_die(
    tmp_path: Path, sink: Partner, dsn: str
) -> None:
    text = with_another(configuration(partner=sink.address, database="env:DSN"), sink, "archive")
    environ = {"DSN": dsn}
    with (
        serving(tmp_path, text, "--role", "gateway", name="gateway", environ=environ) as gateway,
        serving(tmp_path, text, "--role", "dispatcher", name="one", environ=environ) as one,
        serving(tmp_path, text, "--role", "dispatcher", name="two", environ=environ) as two,
    ):
        assert one.post(order()).status == 404, "it has no door"
        until(
            lambda: one.metric("sluicegate_lanes_owned") == two.metric("sluicegate_lanes_owned") == 1, 10, "fair shares"
        )
        with Burst(gateway, senders=2) as burst:
            burst.await_more(30)
            alone(one)
            killed = time.monotonic()
            burst.await_more(30)
        until(lambda: set(burst.accepted) <= sink.events() & sink.events("/archive"), 15, "all deliveries")
        assert time.monotonic() - killed < 12
        assert two.metric("sluicegate_lanes_owned") == 2
        assert two.log("lanes.taken_over")[-1]["careful"] is True

        assert two.stop() == 0
        waiting = gateway.accept()
        time.sleep(0.5)
        assert waiting not in sink.events()
        assert gateway.get("/ready").status == 200
        two.start().ready()
        until(lambda: waiting in sink.events(), 10, "delivery of what had waited")
        assert gateway.stop() == two.stop() == 0


# ── several processes on one port ───────────────────────────────────────────────────────────────────

ACCEPTED = 'sluicegate_accepted_total{source="shop"}'


def test_workers_share_the_work_and_their_metrics_add_up(two: Program, sink: Partner) -> None:
    before = two.metric(ACCEPTED)
    events = {two.accept() for _ in range(60)}
    until(lambda: events <= sink.events(), 10, "deliveries")
    assert len(two.workers()) == 2
    for _ in range(8):  # whichever of them is asked
        until(lambda: two.metric(ACCEPTED) == before + 60, 5, "sum")


def test_a_worker_that_is_killed_is_replaced_and_what_it_counted_stays(two: Program, sink: Partner) -> None:
    for _ in range(20):
        two.accept()
    time.sleep(1.2)  # what a worker counted in its last second dies with it
    counted = two.metric(ACCEPTED)
    assert counted >= 20
    killed, left = sorted(two.workers())
    os.kill(killed, signal.SIGKILL)
    until(lambda: two.log("worker.died"), 5, "word of it")
    until(lambda: two.log("serve.ready"), 10, "a new worker")
    assert left in two.workers()
    assert len(two.workers()) == 2
    until(lambda: two.metric(ACCEPTED) == counted, 5, "sum as before")
    events = {two.accept() for _ in range(40)}
    until(lambda: events <= sink.events(), 15, "deliveries")


def test_all_workers_take_on_another_configuration(two: Program, sink: Partner) -> None:
    more = """
  more: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order]}"""
    two.configure(configuration(partner=sink.address, sources=more))
    two.hangup()
    until(lambda: len(two.log("config.reloaded")) == 2, 5, "reload by both")
    body = order()
    assert {two.post(body, "/hooks/more", **signed(body, id="msg_1")).status for _ in range(20)} == {202, 200}


def test_workers_do_not_outlive_the_program(two: Program) -> None:
    alone(two)
    until(lambda: not two.family(), 30, "end of the workers and of Postgres")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_together_when_the_program_is_told_to(two: Program, by: signal.Signals) -> None:
    two.accept()
    os.killpg(two.running.pid, by)  # as a supervisor does, and a terminal
    assert two.ended() == 0
    assert two.family() == set()
    assert len(two.log("serve.stopping")) == 2
    assert not two.log("worker.died")


def test_a_program_that_is_stopped_while_its_workers_start_ends_well(kept_two: Program) -> None:
    if kept_two.alive:
        assert kept_two.stop() == 0
    kept_two.begin_a_new_page()
    kept_two.start()
    until(lambda: len(kept_two.log("worker.started")) == 2, 15, "workers")
    kept_two.hangup()
    assert kept_two.stop() == 0
    assert kept_two.family() == set()


# ── as whom ─────────────────────────────────────────────────────────────────────────────────────────


def test_it_runs_as_a_user_without_any_rights(tmp_path: Path, sink: Partner) -> None:
    nobody = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
    program = Program(tmp_path, configuration(partner=sink.address), prefix=nobody, environ={"HOME": "/nonexistent"})
    with ended_with(program):
        program.start().ready()
        event = program.accept()
        until(lambda: event in sink.events(), 10, "delivery")
        assert program.stop() == 0
        assert program.family() == set()
