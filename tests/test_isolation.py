"""A flood of one party is nobody else's: proven by what is taken in which order, never by the clock."""

import asyncio
import gc
import json
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from gateway import config as configuration
from gateway.listening import Post
from gateway.parties import lanes, parties
from gateway.slow_refusals import AT_ONCE, LONGEST, MOST, SHORTEST, SlowRefusals
from outbox import intake_batch
from outbox.database import Unavailable
from outbox.event import Delivered, Delivery
from outbox.intake_batch import IntakeBatch, Waiting, in_turns, party_of
from outbox.store import Arrival, Debt
from tests.house import House, Partner, house_on, until
from tests.serving import CONFIGURATION, ENVIRON, Program, order, partner, serving, sign


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


def arrival(house: House, facility: str | None, *to: str, source: str = "shop", party: int | None = None) -> Arrival:
    made = house.arrival(*to)
    event = msgspec.structs.replace(made.event, source=source, facility=facility)
    debts = []
    for name in to:
        lane, key = house.destinations[name].place(event.id, event.subject, ordered=False, party=party)
        debts.append(Debt(lane=lane, destination=house.destinations[name].id, key=key, give_up=None))
    return msgspec.structs.replace(made, event=event, debts=tuple(debts))


JSON = {"content-type": "application/json"}

# ── at the door ──────────────────────────────────────────────────────────────────────────────────────


async def test_where_more_wait_than_a_batch_takes_each_party_has_its_turn(house: House) -> None:
    waiting = [
        Waiting(arrival(house, facility), asyncio.get_running_loop().create_future())
        for facility in [*["north"] * 2000, "south", "south", None]
    ]
    first = [party_of(one.arrival)[1] for one in in_turns(waiting)[:6]]
    assert Counter(first) == {"north": 3, "south": 2, None: 1}
    norths = [one for one in in_turns(waiting) if one.arrival.event.facility == "north"]
    assert norths == waiting[:2000]  # in their order


async def test_who_comes_after_a_flood_is_stored_with_the_first_of_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_batch, "LARGEST", 10)
    batch = IntakeBatch(house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, connections=1)
    stored: list[str] = []

    async def add(facility: str) -> None:
        await batch.add(arrival(house, facility))
        stored.append(facility)

    await asyncio.gather(*(add("north") for _ in range(40)), add("south"))
    assert stored.index("south") < 10
    await batch.close()


async def test_a_flood_leaves_room_for_others_in_the_queue_before_the_database(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_batch, "LONGEST_QUEUE", 20)
    sizes: list[int] = []
    batch = IntakeBatch(house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=sizes.append, connections=1)
    flood = [asyncio.create_task(batch.add(arrival(house, "north"))) for _ in range(60)]
    victim = asyncio.create_task(batch.add(arrival(house, "south")))
    answers = await asyncio.gather(*flood, return_exceptions=True)
    refused = sum(isinstance(answer, Unavailable) for answer in answers)
    assert refused == 50
    await victim
    assert len([answer for answer in answers if not isinstance(answer, Unavailable)]) == 10
    assert (await batch.add(arrival(house, "north"))).event  # its places are free again
    await batch.close()


async def test_a_facility_that_floods_is_told_to_wait_and_the_others_of_its_source_are_not(
    tmp_path: Path, dsn: str
) -> None:
    text = CONFIGURATION.replace("body: 64KiB}}", "facility_limit: 3/m}}").replace(
        "of: {{1: north}}", "of: {{1: north, 2: south}}"
    )
    text = text.replace("facilities:\n", "facilities:\n  south: {{name: South Clinic}}\n")
    async with partner() as other, serving(tmp_path, dsn, other.address, configured=text) as program:
        north = [(await program.post(order(id=number)))[0] for number in range(1, 5)]
        south = (await program.post(order(id=9, company_id=2)))[0]
        assert (north, south) == ([202, 429, 429, 429], 202)
        assert (await program.api("GET", "/rejections", role="viewer"))[0] == 200
        assert 'reason="facility_rate_limited",source="odoo"} 3.0' in program.service.metrics.render().decode()


async def test_a_few_refusals_are_answered_at_once_and_a_flood_of_them_late(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly, paused = SlowRefusals(), []

    async def note(seconds: float) -> None:
        paused.append(seconds)
        await held.wait()

    held = asyncio.Event()
    monkeypatch.setattr("gateway.slow_refusals.asyncio.sleep", note)
    answers = [asyncio.create_task(slowly.before("shop")) for _ in range(5000)]
    await asyncio.wait(answers, timeout=0.2)
    assert len(paused) == MOST  # the memory of those that wait is bounded, too
    assert SHORTEST <= min(paused) < max(paused) <= LONGEST  # not all of them come back in the same moment
    assert len(set(paused)) > MOST / 2
    answered = sum(answer.done() for answer in answers)
    assert answered == 5000 - MOST
    assert AT_ONCE < MOST
    calm = asyncio.create_task(slowly.before("lab"))  # another source is not made to wait
    await asyncio.wait([calm], timeout=1)
    assert calm.done()
    held.set()
    await asyncio.gather(*answers)


async def test_a_flood_of_refusals_may_keep_its_connections_for_a_new_one_costs_more_than_a_refusal(
    tmp_path: Path, dsn: str
) -> None:
    async with partner() as other, serving(tmp_path, dsn, other.address) as program:

        async def refused() -> str | None:
            async with program.session.post(f"{program.address}/hooks/odoo", json={}) as answer:
                assert answer.status == 401
                return answer.headers.get("Connection")

        said = await asyncio.gather(*(refused() for _ in range(int(AT_ONCE) + 15)))
        assert set(said) == {None}


async def test_a_connection_that_waits_for_its_next_request_holds_no_body_that_was_refused(
    tmp_path: Path, dsn: str
) -> None:
    body = b'{"pad": "' + b"x" * 60_000 + b'"}'
    async with partner() as other, serving(tmp_path, dsn, other.address) as program:
        waiting = [await posted(program, "/hooks/nobody", body, **JSON) for _ in range(10)]
        assert {status for status, _, _ in waiting} == {404}
        held = [one for one in gc.get_objects() if isinstance(one, Post) and one._whole]
        for _, _, writer in waiting:
            writer.close()
            await writer.wait_closed()
    assert held == []


@pytest.mark.parametrize("pieces", [1, 2])  # of which the first is taken past aiohttp's request
async def test_who_is_refused_is_parted_from_soon_and_who_is_accepted_is_not(
    tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr("gateway.listening.REFUSED_IDLE", timedelta(seconds=0.3))
    body = json.dumps(order(id=1)).encode()
    async with partner() as other, serving(tmp_path, dsn, other.address) as program:
        accepted, kept, writer = await posted(program, "/hooks/odoo", body, pieces=pieces, **sign(body, id="one"))
        refused, parted, end = await posted(program, "/hooks/odoo", body, pieces=pieces, **JSON)
        assert (accepted, refused) == (202, 401)
        assert await asyncio.wait_for(parted.read(), 5) == b""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(kept.read(), 0.7)
        for one in (writer, end):
            one.close()
            await one.wait_closed()


async def posted(
    program: Program, path: str, body: bytes, *, pieces: int = 1, **headers: str
) -> tuple[int, StreamReader, StreamWriter]:
    """Over a connection of its own, which stays: what was answered, and both ends of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", program.service.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: here\r\n{lines}content-length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    writer.write(whole[: len(whole) // pieces])
    if pieces > 1:
        await asyncio.sleep(0.1)
        writer.write(whole[len(whole) // pieces :])
    answer = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
    return int(answer.split(b" ")[1]), reader, writer


async def test_who_is_beyond_a_limit_is_refused_before_any_proof_is_looked_at_and_a_stranger_uses_up_none_of_it(
    tmp_path: Path, dsn: str
) -> None:
    text = CONFIGURATION.replace("body: 64KiB}}", "limit: 3/m}}")
    async with partner() as other, serving(tmp_path, dsn, other.address, configured=text) as program:
        strange = [await strangers(program) for _ in range(5)]
        known = [(await program.post(order(id=number)))[0] for number in (1, 2)]
        assert (strange, known) == ([401] * 5, [202, 429])
        assert await strangers(program) == 429


async def strangers(program: Program) -> int:
    async with program.session.post(f"{program.address}/hooks/odoo", json=order(id=1)) as answer:
        return answer.status


# ── on the way to a destination ──────────────────────────────────────────────────────────────────────


async def test_a_party_does_not_wait_behind_the_backlog_of_another_in_one_destination(house: House) -> None:
    house.destinations |= await house.outbox.ensure_destinations({"ledger": 1}, {"ledger": 2})
    taken: list[str | None] = []

    def note(delivery) -> Delivered:
        taken.append(delivery.event.facility)
        return Delivered()

    for _ in range(4):
        await house.outbox.add([arrival(house, "north", "ledger", party=0) for _ in range(500)], house.buckets())
    await house.outbox.add([arrival(house, "south", "ledger", party=1)], house.buckets())
    async with house.dispatching(house.target("ledger", Partner(note), concurrency=4)):
        await house.drained(30)
    assert len(taken) == 2001
    assert taken.index("south") < 300  # not behind the 2000 that were there before


async def test_a_party_that_fills_a_destination_leaves_a_place_for_another(house: House) -> None:
    house.destinations |= await house.outbox.ensure_destinations({"ledger": 1}, {"ledger": 2})
    held, others = asyncio.Event(), asyncio.Event()

    async def work(delivery: Delivery) -> Delivered:
        if delivery.event.facility == "north":
            await held.wait()
        others.set()
        return Delivered()

    flood = Partner(work)
    await house.outbox.add([arrival(house, "north", "ledger", party=0) for _ in range(30)], house.buckets())
    async with house.dispatching(house.target("ledger", flood, concurrency=16)) as dispatcher:
        await until(lambda: len(flood.asked) == 14)
        await house.outbox.add([arrival(house, "south", "ledger", party=1)], house.buckets())
        dispatcher.wake({lane: house.clock.now() for lane in house.destinations["ledger"].lanes})
        await asyncio.wait_for(others.wait(), 5)  # though none of the flood has ended
        held.set()
        await house.drained(30)


async def test_a_destination_gets_the_lanes_that_it_lacks_and_subjects_keep_theirs(house: House) -> None:
    before = (await house.outbox.ensure_destinations({"ledger": 2}))["ledger"]
    after = (await house.outbox.ensure_destinations({"ledger": 16}, {"ledger": 5}))["ledger"]
    again = (await house.outbox.ensure_destinations({"ledger": 2}, {"ledger": 3}))["ledger"]
    assert after == again
    assert (after.shards, len(after.lanes), after.lanes[:2]) == (2, 5, before.lanes)
    event = house.identities.next()
    for subject in ("order/1", "order/2", "order/3"):
        assert before.place(event, subject, ordered=True) == after.place(event, subject, ordered=True, party=4)
    assert after.place(event, None, ordered=False, party=4)[0] == after.lanes[4]


def test_each_party_whose_events_may_come_to_a_destination_has_a_lane_there(tmp_path: Path) -> None:
    path = tmp_path / "sluicegate.yaml"
    text = CONFIGURATION.replace("of: {{1: north}}", "of: {{1: north, 2: south}}")
    text = text.replace("facilities:\n", "facilities:\n  south: {{name: South Clinic}}\n")
    path.write_text(text.format(dsn="env:DSN", partner="http://127.0.0.1:9", more=""))
    config = configuration.load(path, {**ENVIRON, "DSN": "postgresql://nobody@nowhere/x"})
    sharing = parties(config)["approvers"]
    assert sharing.keys() == {("sluicegate", None), ("odoo", "north"), ("odoo", "south")}
    assert lanes(sharing) == 2
    assert {number % 2 for party, number in sharing.items() if party[0] == "odoo"} == {0, 1}
