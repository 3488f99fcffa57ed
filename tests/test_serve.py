"""`sluicegate serve` from outside: started, reloaded, stopped, killed, and left without its Postgres."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Self

import pytest

from gateway.config_sections import Listen
from gateway.listening import AddressError, bound
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


@pytest.fixture
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@pytest.fixture(scope="module")
def started_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which it was at work before: a first start takes longer than to copy that."""
    folder = tmp_path_factory.mktemp("started-once")
    with partner() as sink, serving(folder, configuration(partner=sink.address)) as program:
        assert program.stop() == 0
    return folder


@pytest.fixture
def folder(started_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(started_once / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture
def program(folder: Path, sink: Partner) -> Iterator[Program]:
    """At work, on an embedded Postgres."""
    with serving(folder, configuration(partner=sink.address)) as program:
        yield program


@dataclass(frozen=True)
class Place:
    """A program and its partner, for tests that leave them as they were."""

    program: Program
    sink: Partner
    text: str


@pytest.fixture(scope="module")
def shared(started_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(started_once / "data", folder / "data")
    with partner() as sink, serving(folder, text := configuration(partner=sink.address)) as program:
        yield Place(program, sink, text)
        assert program.stop() == 0
        assert not program.log("task.failed") + program.log("process.failed")


@contextmanager
def serving(
    folder: Path, text: str, *arguments: str, name: str = "sluicegate", **how: dict[str, str]
) -> Iterator[Program]:
    program = Program(folder, text, *arguments, name=name, **how)
    with ended_with(program):
        program.start().ready()
        yield program


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_told_to_and_leaves_nothing_running(program: Program, by: signal.Signals) -> None:
    program.accept()
    began = time.monotonic()
    os.killpg(program.running.pid, by)  # a terminal sends Ctrl-C to all of them
    assert program.ended() == 0
    assert time.monotonic() - began < 5, "0.4 s on an idle machine"
    assert program.family() == set()
    assert [line["event"] for line in program.log("serve.stopped")] == ["serve.stopped"]


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
    assert program.running.poll() is None, "it waits for the delivery"
    leave.set()
    assert program.ended() == 0
    program.start().ready()
    assert program.accept() != event
    until(lambda: len(sink.events()) == 2, 10, "second delivery")
    assert [received.event for received in sink.received].count(event) == 1


def test_a_request_that_is_under_way_at_the_end_is_answered(program: Program) -> None:
    program.signal(program.postgres(), signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(program.post, order())
        time.sleep(0.3)
        program.running.send_signal(signal.SIGTERM)
        until(lambda: program.log("serve.stopping"), 5, "stopping")
        program.signal(program.postgres(), signal.SIGCONT)
        assert answer.result(10).status == 202
    assert program.ended() == 0


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


# ── another configuration ───────────────────────────────────────────────────────────────────────────


def reloaded(program: Program, text: str) -> None:
    before = len(program.log("config.reloaded"))
    program.configure(text)
    program.hangup()
    until(lambda: len(program.log("config.reloaded")) > before, 5, lambda: f"reload: {program.output[-1500:]}")


def test_a_new_route_destination_and_secret_count_without_a_restart(folder: Path, sink: Partner) -> None:
    (folder / "secret").write_text(SECRETS["SHOP_SECRET"])
    text = configuration(partner=sink.address).replace("env:SHOP_SECRET", "file:secret")
    with serving(folder, text) as program:
        event = program.accept()
        until(lambda: event in sink.events(), 10, "delivery")

        archive = f"""
  archive: {{connector: http, url: "{sink.address}/archive", secret: env:OUT_SECRET, allow: [127.0.0.1/32]}}"""
        more = configuration(partner=sink.address, routes="  all: {to: [archive]}", destinations=archive)
        (folder / "secret").write_text(SECRETS["SHOP_SECRET_NEXT"])
        reloaded(program, more.replace("env:SHOP_SECRET", "file:secret"))

        body = order(status="sent")
        assert program.post(body).status == 401, "signed by the old secret"
        answer = program.post(body, **signed(body, secret=SECRETS["SHOP_SECRET_NEXT"]))
        assert answer.status == 202
        until(lambda: answer.json["id"] in sink.events("/archive"), 10, "delivery by the new route")


def test_a_bad_configuration_is_refused_with_all_its_mistakes_and_the_old_one_goes_on(shared: Place) -> None:
    program, before = shared.program, len(shared.program.log("config.refused"))
    program.configure(shared.text.replace("body: 64KiB", "boddy: 64KiB").replace("to: [ledger]", "to: [ledgr]"))
    program.hangup()
    until(lambda: len(program.log("config.refused")) == before + 2, 5, lambda: f"refusal: {program.output[-1500:]}")
    told = " ".join(line["mistake"] for line in program.log("config.refused"))
    for word in ("sluicegate.yaml:", "boddy", "ledgr", '"ledger"'):
        assert word in told
    program.path.unlink()
    program.hangup()
    until(lambda: len(program.log("config.refused")) == before + 3, 5, "refusal of no file")
    event = program.accept()
    until(lambda: event in shared.sink.events(), 10, "delivery")
    reloaded(program, shared.text)


def test_what_cannot_change_while_it_runs_is_refused_by_name(shared: Place) -> None:
    program, before = shared.program, len(shared.program.log("config.refused"))
    changes = {
        "serve.listen": ("127.0.0.1:PORT", "127.0.0.1:1"),
        "serve.workers": ('"127.0.0.1:PORT"', '"127.0.0.1:PORT", workers: 2'),
        "database": ("database: embedded", "database: postgresql://somebody@nowhere/else\nkey: env:KEY"),
        "observability": ("sources:", "observability: {sample: 1.0}\nsources:"),
        "key": ("sources:", "key: env:KEY\nsources:"),
    }
    for number, (name, (old, new)) in enumerate(changes.items(), before + 1):
        program.configure(shared.text.replace(old, new, 1))
        program.hangup()
        until(lambda count=number: len(program.log("config.refused")) == count, 5, f"refusal of another {name}")
        assert name in program.log("config.refused")[-1]["mistake"]
    assert program.get("/ready").status == 200
    reloaded(program, shared.text)


def test_many_hangups_at_once_are_no_more_than_a_few(shared: Place) -> None:
    before = len(shared.program.log("config.reloaded"))
    for _ in range(20):
        shared.program.hangup()
        time.sleep(0.005)
    event = shared.program.accept()
    until(lambda: event in shared.sink.events(), 10, "delivery")
    assert 1 <= len(shared.program.log("config.reloaded")) - before <= 20


def test_a_destination_that_is_taken_away_keeps_what_it_is_owed_until_it_is_back(folder: Path, sink: Partner) -> None:
    sink.mood = lambda received: 503 if received.path == "/archive" else 200
    archive = f"""
  archive: {{connector: http, url: "{sink.address}/archive", secret: env:OUT_SECRET, allow: [127.0.0.1/32], concurrency: 1, retry: {{first: 100ms, cap: 200ms, give_up: 5m}}}}"""
    both = configuration(partner=sink.address, routes="  all: {to: [archive]}", destinations=archive)
    with serving(folder, both) as program:
        events = {program.accept() for _ in range(20)}
        until(lambda: sink.events("/archive"), 10, "attempt")
        reloaded(program, configuration(partner=sink.address))
        later = program.accept()
        until(lambda: events | {later} <= sink.events(), 10, "deliveries to the other one")
        time.sleep(2)
        seen = len(sink.received)
        sink.mood = lambda _: 200
        time.sleep(1)
        assert len(sink.received) == seen, "nothing is sent where the configuration names nobody"
        reloaded(program, both)
        delivered = {received.event for received in sink.received[seen:]}
        until(lambda: events <= {r.event for r in sink.received[seen:]}, 15, f"deliveries once it is back; {delivered}")
        assert not program.log("task.failed") + program.log("process.failed")


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


def killed_alone(program: Program) -> None:
    program.running.kill()
    program.ended()


def without_postgres(program: Program) -> None:
    program.signal(program.postgres(), signal.SIGKILL)


def killed_with_all(program: Program) -> None:
    program.kill()


@pytest.mark.parametrize("death", [killed_alone, without_postgres, killed_with_all])
def test_whatever_is_killed_nothing_acknowledged_is_lost_and_all_is_soon_well_again(
    program: Program, sink: Partner, death: Callable[[Program], None]
) -> None:
    with Burst(program) as burst:
        until(lambda: len(burst.accepted) > 100, 20, "a hundred accepted")
        death(program)
        if program.running.poll() is not None:
            program.start()
        took = program.ready()
        until(lambda: len(burst.accepted) > (before := len(burst.accepted)) - 1 and before > 120, 20, "more accepted")
    assert took < 8, "1 to 2 s on an idle machine"
    assert burst.statuses <= {202, 503}
    until(lambda: set(burst.accepted) <= sink.events(), 20, "delivery of all that was acknowledged")
    keys: dict[str, set[str]] = {}
    for received in list(sink.received):
        keys.setdefault(received.event, set()).add(received.key)
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
def test_while_postgres_is_away_it_says_so_at_once_and_it_recovers_by_itself(
    program: Program, sink: Partner, trouble: Callable[[Program], Callable[[], None]]
) -> None:
    program.accept()
    back = trouble(program)
    waits = []
    with ThreadPoolExecutor(40) as pool:  # more than there are connections
        for _ in range(2):
            began = time.monotonic()
            for answer in pool.map(lambda _: program.post(order()), range(40)):
                assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
                assert int(answer.headers["retry-after"]) >= 1
            waits.append(time.monotonic() - began)
    assert max(waits) < 3
    began = time.monotonic()
    ready = program.get("/ready")
    assert (ready.status, ready.json["ready"]) == (503, False)
    assert "the database does not answer" in ready.json["missing"]
    assert program.get("/live").status == 200
    assert program.get("/metrics").status == 200
    assert time.monotonic() - began < 3
    back()
    took = program.ready(20)
    assert took < 12
    until(lambda: program.post(order()).status == 202, 5, "acceptance")
    event = program.accept()
    until(lambda: event in sink.events(), 15, "delivery")
    assert not program.log("request.failed") + program.log("task.failed") + program.log("process.failed")


def test_it_can_be_stopped_while_postgres_is_away(program: Program) -> None:
    back = gone(program)
    program.running.send_signal(signal.SIGTERM)
    until(lambda: program.log("serve.stopping"), 5, "stopping")
    time.sleep(0.2)
    back()
    assert program.ended(20) == 0
    assert program.family() == set()


def test_it_waits_for_a_postgres_that_is_not_there_yet_and_can_be_stopped_meanwhile(
    tmp_path: Path, sink: Partner
) -> None:
    program = Program(tmp_path, configuration(partner=sink.address, database="postgresql://nobody@127.0.0.1:1/nothing"))
    with ended_with(program):
        program.start()
        until(lambda: program.log("postgres.away"), 10, "word of it")
        assert program.stop(within=5) == 0
        assert not program.log("serve.ready")


# ── more than one ───────────────────────────────────────────────────────────────────────────────────


def test_a_second_one_in_the_same_folder_is_told_who_is_there_and_hurts_nobody(shared: Place) -> None:
    second = Program(shared.program.folder, shared.text, name="second")
    assert second.start().ended(15) == 1
    assert f"(process {shared.program.running.pid}) is at work here already" in second.output
    assert "Traceback" not in second.output
    event = shared.program.accept()
    until(lambda: event in shared.sink.events(), 10, "delivery")


def test_a_gateway_and_a_dispatcher_are_two_processes_on_one_postgres(tmp_path: Path, sink: Partner, dsn: str) -> None:
    text, environ = configuration(partner=sink.address, database="env:DSN"), {"DSN": dsn}
    with (
        serving(tmp_path, text, "--role", "gateway", name="gateway", environ=environ) as gateway,
        serving(tmp_path, text, "--role", "dispatcher", name="dispatcher", environ=environ) as dispatcher,
    ):
        events = {gateway.accept() for _ in range(20)}
        until(lambda: events <= sink.events(), 10, "deliveries")
        assert dispatcher.post(order()).status == 404, "it has no door"
        assert dispatcher.stop() == 0
        waiting = gateway.accept()
        time.sleep(0.5)
        assert waiting not in sink.events()
        assert gateway.get("/ready").status == 200
        dispatcher.start().ready()
        until(lambda: waiting in sink.events(), 10, "delivery of what had waited")
        assert gateway.stop() == dispatcher.stop() == 0


def test_what_a_dispatcher_that_was_killed_had_is_delivered_by_another(tmp_path: Path, sink: Partner, dsn: str) -> None:
    environ = {"DSN": dsn}
    other = f"""
  other: {{connector: http, url: "{sink.address}/other", secret: env:OUT_SECRET, allow: [127.0.0.1/32]}}"""
    text = configuration(partner=sink.address, database="env:DSN", routes="  all: {to: [other]}", destinations=other)
    with (
        serving(tmp_path, text, "--role", "gateway", name="gateway", environ=environ) as gateway,
        serving(tmp_path, text, "--role", "dispatcher", name="one", environ=environ) as one,
        serving(tmp_path, text, "--role", "dispatcher", name="two", environ=environ) as two,
    ):
        until(
            lambda: one.metric("sluicegate_lanes_owned") == two.metric("sluicegate_lanes_owned") == 1, 10, "fair shares"
        )
        with Burst(gateway, senders=2) as burst:
            until(lambda: len(burst.accepted) > 30, 20, "thirty accepted")
            killed_alone(one)
            killed = time.monotonic()
            until(lambda: len(burst.accepted) > 60, 20, "thirty more")
        until(lambda: set(burst.accepted) <= sink.events() & sink.events("/other"), 15, "all deliveries")
        assert time.monotonic() - killed < 12
        assert two.metric("sluicegate_lanes_owned") == 2
        assert two.log("lanes.taken_over")[-1]["careful"] is True


def test_an_address_that_is_taken_is_named_and_nothing_stays_behind(folder: Path, sink: Partner) -> None:
    for arguments in ((), ("--workers", "2")):
        program = Program(folder, configuration(partner=sink.address), *arguments)
        program.configure(configuration(partner=sink.address).replace("PORT", str(sink.server_port)))
        assert program.start().ended(20) == 1
        assert f"serve.listen: 127.0.0.1:{sink.server_port} cannot be had: Address already in use" in program.output
        assert "Traceback" not in program.output
        assert program.family() == set()


def test_a_unix_socket_is_an_address_too_and_is_taken_from_the_dead_only(folder: Path, sink: Partner) -> None:
    address = Listen(path=str(folder / "door"))
    text = configuration(partner=sink.address).replace('"127.0.0.1:PORT"', f'["127.0.0.1:PORT", "{address}"]')
    with serving(folder, text) as program:
        with pytest.raises(AddressError, match="already in use"):
            bound(address, share=False)
        program.kill()
        program.start().ready()
        asked = ["curl", "-sf", "--unix-socket", address.path, "http://sluicegate/live"]
        assert subprocess.run(asked, capture_output=True, check=True).stdout == b'{"live": true}'
    (folder / "file").write_text("somebody's")
    with pytest.raises(AddressError, match="cannot be had"):
        bound(Listen(path=str(folder / "file")), share=False)
    assert (folder / "file").read_text() == "somebody's"


def test_a_database_that_was_not_migrated_is_left_alone_and_the_mend_is_told(
    tmp_path: Path, sink: Partner, empty_dsn: str
) -> None:
    program = Program(tmp_path, configuration(partner=sink.address, database="env:DSN"), environ={"DSN": empty_dsn})
    with ended_with(program):
        assert program.start().ended(15) == 1
        assert "run `sluicegate migrate`" in program.output
        assert "Traceback" not in program.output


# ── several processes on one port ───────────────────────────────────────────────────────────────────


@pytest.fixture
def two(folder: Path, sink: Partner) -> Iterator[Program]:
    """Two workers, both of which answer."""
    with serving(folder, configuration(partner=sink.address), "--workers", "2") as program:
        until(lambda: len(program.log("serve.ready")) == 2, 15, "second worker")
        yield program


def test_workers_share_the_work_and_their_metrics_add_up(two: Program, sink: Partner) -> None:
    events = {two.accept() for _ in range(60)}
    until(lambda: events <= sink.events(), 10, "deliveries")
    assert len(two.workers()) == 2
    accepted = 'sluicegate_accepted_total{source="shop"}'
    for _ in range(8):  # whichever of them is asked
        until(lambda: two.metric(accepted) == 60, 5, "sum")


def test_a_worker_that_is_killed_is_replaced_and_what_it_counted_stays(two: Program, sink: Partner) -> None:
    accepted = 'sluicegate_accepted_total{source="shop"}'
    for _ in range(40):
        two.accept()
    until(lambda: two.metric(accepted) == 40, 5, "sum")
    time.sleep(1.2)  # what a worker counted in its last second dies with it
    killed, left = sorted(two.workers())
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(two.workers()) == 2 and killed not in two.workers(), 10, "a new worker")
    until(lambda: len(two.log("serve.ready")) == 3, 10, "its readiness")
    assert left in two.workers()
    until(lambda: two.metric(accepted) == 40, 5, "sum as before")
    events = {two.accept() for _ in range(40)}
    until(lambda: events <= sink.events(), 15, "deliveries")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_together_when_the_program_is_told_to(two: Program, by: signal.Signals) -> None:
    two.accept()
    os.killpg(two.running.pid, by)
    assert two.ended() == 0
    assert two.family() == set()
    assert len(two.log("serve.stopping")) == 2
    assert not two.log("worker.died")


def test_workers_do_not_outlive_the_program(two: Program) -> None:
    two.running.kill()
    two.ended()
    until(lambda: not two.family(), 15, "end of the workers and of Postgres")
    two.start().ready()


def test_all_workers_take_on_another_configuration(two: Program, sink: Partner) -> None:
    two.configure(
        configuration(
            partner=sink.address,
            sources="""
  more: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order]}""",
        )
    )
    two.hangup()
    until(lambda: len(two.log("config.reloaded")) == 2, 5, "reload by both")
    body = order()
    assert {two.post(body, "/hooks/more", **signed(body, id="msg_1")).status for _ in range(20)} == {202, 200}


def test_a_program_that_is_stopped_while_its_workers_start_ends_well(folder: Path, sink: Partner) -> None:
    program = Program(folder, configuration(partner=sink.address), "--workers", "2")
    with ended_with(program):
        program.start()
        until(lambda: len(program.log("worker.started")) == 2, 15, "workers")
        program.hangup()
        assert program.stop() == 0
        assert program.family() == set()


# ── as whom ─────────────────────────────────────────────────────────────────────────────────────────


def test_it_runs_as_a_user_without_any_rights(tmp_path: Path, sink: Partner) -> None:
    nobody = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
    with serving(
        tmp_path, configuration(partner=sink.address), prefix=nobody, environ={"HOME": "/nonexistent"}
    ) as program:
        event = program.accept()
        until(lambda: event in sink.events(), 10, "delivery")
        assert program.stop() == 0
        assert program.family() == set()
