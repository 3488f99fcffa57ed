"""Several events in one post: each with a policy and a dedup key of its own, all of them stored or none."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from urllib.parse import quote_plus

import asyncpg
import msgspec
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.items import MOST_ITEMS, Items
from gateway.minimize import Unmet, Unreadable
from outbox import intake_batch
from outbox.database import Unavailable
from outbox.intake_batch import LARGEST, IntakeBatch
from outbox.store import Arrival, Seen, Stored
from tests.conftest import TEMPLATE, made_of
from tests.house import House, house_on
from tests.program import CANARY, Partner, Program, configuration, ended_with, partner, signed
from tests.wire import Heard, connected, post

# ── where they stand ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("each", "body", "found"),
    [
        ("$.value", b'{"value": [{"a": 1}, {"b": [2]}], "x": 1}', [b'{"a": 1}', b'{"b": [2]}']),
        ("$.value", b'\xef\xbb\xbf \n{"value": []}', []),
        ("$", b'[{"a": "\xc3\xa9"}, 5, null]', [b'{"a": "\xc3\xa9"}', b"5", b"null"]),
        ("$", b"\xef\xbb\xbf[]", []),
        ("$.data.items", b'{"data": {"items": [{}]}}', [b"{}"]),
    ],
)
def test_the_items_of_a_post_are_its_own_bytes(each: str, body: bytes, found: list[bytes]) -> None:
    assert Items(each, wrapped_in=None).of(body) == found


@pytest.mark.parametrize(
    ("each", "body", "answer"),
    [
        ("$.value", b'{"value": {}}', Unmet("value must be a list")),
        ("$.value", b'{"value": "CANARY"}', Unmet("value must be a list")),
        ("$.value", b"{}", Unmet("value is missing")),
        ("$.value", b'{"value": null}', Unmet("value is missing")),
        ("$.value", b"[]", Unreadable("the body is not a JSON object")),
        ("$.value", b'{"value": [], "value": [{}]}', Unreadable("value stands twice in the body")),
        ("$.value", b'{"value": [], "v\\u0061lue": [{}]}', Unreadable("value stands twice in the body")),
        ("$.value", b'{"value": [', Unreadable("the body is not JSON")),
        ("$.value", b'{"value": [{"a": "\xff"}]}', Unreadable("the body is not JSON")),
        ("$.value", b'{"value": [{}]}x', Unreadable("the body is not JSON")),
        ("$.a.b", b'{"a": {"b": [], "b": [{}]}}', Unreadable("a.b stands twice in the body")),
        ("$.a.b", b'{"a": []}', Unmet("a.b must be a list")),
        ("$", b"{}", Unreadable("the body is not a JSON list")),
        ("$", b"[" * 20_000 + b"]" * 20_000, None),
        ("$", b"", Unreadable("the body is not a JSON list")),
    ],
)
def test_a_post_without_its_list_is_refused(each: str, body: bytes, answer: object) -> None:
    found = Items(each, wrapped_in=None).of(body)
    assert found == answer if answer is not None else isinstance(found, Unreadable)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | st.text(alphabet='{}[]",:value12 ', max_size=60).map(str.encode))
def test_no_bytes_raise(body: bytes) -> None:
    for each in ("$", "$.value", "$.a.b"):
        match Items(each, wrapped_in=None).of(body):
            case list() as found:
                assert all(msgspec.json.decode(item) is None or item for item in found)
            case Unreadable(reason) | Unmet(reason):
                assert reason.isprintable()


@pytest_asyncio.fixture
async def house(dsn: str) -> AsyncIterator[House]:
    async with house_on(dsn) as house:
        yield house


# ── in one transaction ──────────────────────────────────────────────────────────────────────────────


def batching(house: House, **kinds: int) -> IntakeBatch:
    return IntakeBatch(house.outbox, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, **kinds)


class Spy:
    """An outbox that says what came to it in one statement."""

    def __init__(self, house: House) -> None:
        self._outbox = house.outbox
        self.statements: list[list[uuid.UUID]] = []
        self.trouble: set[uuid.UUID] = set()

    async def add(self, arrivals: list[Arrival], buckets: object) -> list[Stored | Seen]:
        self.statements.append([each.event.id for each in arrivals])
        await asyncio.sleep(0.01)
        if self.trouble & set(self.statements[-1]):
            raise ValueError("one of them cannot be stored")
        return await self._outbox.add(arrivals, buckets)  # type: ignore[arg-type]


async def test_what_came_in_one_post_is_in_one_statement_however_many_others_wait(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_batch, "LARGEST", 10)
    spy = Spy(house)
    batch = IntakeBatch(spy, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, connections=1)  # type: ignore[arg-type]
    posts = [[house.arrival() for _ in range(size)] for size in (1, 7, 4, 10, 2, 9, 3)]
    alone = [house.arrival() for _ in range(15)]
    await asyncio.gather(
        *(batch.add_together(each) for each in posts[:4]),
        *(batch.add(each) for each in alone),
        *(batch.add_together(each) for each in posts[4:]),
    )
    for each in posts:
        ids = {one.event.id for one in each}
        assert sum(bool(ids & set(statement)) for statement in spy.statements) == 1, "a post was torn apart"
    assert max(map(len, spy.statements)) <= 10
    assert sum(map(len, spy.statements)) == sum(map(len, posts)) + len(alone)
    assert len(spy.statements) < len(posts) + len(alone), "what waits together is written together"
    await batch.close()


async def test_a_post_with_what_cannot_be_stored_fails_as_a_whole_and_the_others_do_not(house: House) -> None:
    spy = Spy(house)
    batch = IntakeBatch(spy, buckets=house.buckets, wake=lambda _: None, sizes=lambda _: None, connections=1)  # type: ignore[arg-type]
    good, bad, lone = [house.arrival() for _ in range(3)], [house.arrival() for _ in range(3)], house.arrival()
    spy.trouble = {bad[1].event.id}
    answers = await asyncio.gather(
        batch.add(house.arrival()),  # while it is written, the others come together
        batch.add_together(good),
        batch.add_together(bad),
        batch.add(lone),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [Stored, list, ValueError, Stored]
    assert await events(house, [each.event.id for each in [*good, *bad, lone]]) == {
        each.event.id for each in [*good, lone]
    }
    await batch.close()


async def test_whoever_posts_many_events_waits_behind_itself(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_batch, "LARGEST", 10)
    batch, stored = batching(house, connections=1), []

    async def add(name: str, *many: Arrival) -> None:
        await batch.add_together(many)
        stored.append(name)

    flood = [add("flood", *(house.arrival() for _ in range(9))) for _ in range(6)]
    victim = house.arrival()
    other = msgspec.structs.replace(victim, event=msgspec.structs.replace(victim.event, facility="south"))
    await asyncio.gather(*flood, add("victim", other))
    assert stored.index("victim") <= 2
    await batch.close()


async def test_the_queue_has_room_for_so_many_events_in_whatever_posts_they_come(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_batch, "LONGEST_QUEUE", 20)
    batch = batching(house, connections=1)
    posts = [asyncio.create_task(batch.add_together([house.arrival() for _ in range(4)])) for _ in range(5)]
    answers = await asyncio.gather(*posts, return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, list, Unavailable, Unavailable, Unavailable]
    assert len(await batch.add_together([house.arrival() for _ in range(4)])) == 4  # its places are free again
    assert await batch.add_together([]) == []
    await batch.close()


async def events(house: House, ids: list[uuid.UUID]) -> set[uuid.UUID]:
    rows = await house.intake.fetch("SELECT id FROM events WHERE id = ANY ($1)", ids)
    return {row["id"] for row in rows}


# ── at the door ─────────────────────────────────────────────────────────────────────────────────────

SOURCES = """
  graph: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], tolerance: 1h, accepts: [order, note], each: $.value}
  loose: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], tolerance: 1h, accepts: [order], each: $, partial: true}
  hub: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], tolerance: 1h, accepts: [order], each: $.value, format: "form-json:payload"}
  site: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order], each: $, facility_limit: 1/s}
"""
NOTE = (
    "  note: {version: 1, purpose: a test, match: {kind: note}, type: shop.note, keep: {id: {from: id, type: int}}}\n"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dsn(server: str) -> AsyncIterator[str]:
    async for dsn in made_of(TEMPLATE, server):
        yield dsn


@pytest.fixture(scope="module")
def sink() -> Iterator[Partner]:
    with partner() as sink:
        yield sink


@pytest.fixture(scope="module")
def program(dsn: str, sink: Partner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    text = configuration(partner=sink.address, database="env:DSN", sources=SOURCES).replace(
        "\npolicies:\n", f"\npolicies:\n{NOTE}", 1
    )
    program = Program(tmp_path_factory.mktemp("each"), text, environ={"DSN": dsn})
    with ended_with(program):
        program.start().ready()
        yield program
        assert program.stop() == 0
        assert CANARY not in program.output
        assert not program.log("request.failed"), "a defect of ours"


def order(**changes: object) -> dict[str, object]:
    number = uuid.uuid4().int % 10**9 + 1
    return {"kind": "order", "id": number, "status": "paid", "customer": {"name": CANARY}, **changes}


async def posted(program: Program, source: str, *items: object, **headers: str) -> Heard:
    body = json.dumps({"value": items} if source in {"graph", "hub"} else items).encode()
    if source == "hub":
        body = b"payload=" + quote_plus(body.decode()).encode()
        headers["content-type"] = "application/x-www-form-urlencoded"
    async with connected(program.port) as line:
        answer = await line.ask(post(body, {**signed(body), **headers}, f"/hooks/{source}"))
    assert CANARY.encode() not in answer.raw
    return answer


def told(answer: Heard) -> list[tuple[str, bool]]:
    return [(each["id"], each["duplicate"]) for each in answer.json["events"]]


async def test_each_event_of_a_post_is_stored_by_its_policy_and_delivered(
    program: Program, dsn: str, sink: Partner
) -> None:
    answer = await posted(program, "graph", order(id=1), {"kind": "note", "id": 2, "text": CANARY}, order(id=3))
    assert answer.status == 202
    ids = [event for event, duplicate in told(answer) if not duplicate]
    assert len(set(ids)) == 3
    found = {str(row["id"]): (row["policy"], json.loads(row["data"])) for row in await stored(dsn, ids)}
    assert [found[each] for each in ids] == [
        ("order", {"id": 1, "status": "paid"}),
        ("note", {"id": 2}),
        ("order", {"id": 3, "status": "paid"}),
    ]
    async with asyncio.timeout(10):
        while not {ids[0], ids[2]} <= sink.events():
            await asyncio.sleep(0.02)


async def test_what_is_posted_again_in_another_grouping_makes_no_double(program: Program, dsn: str) -> None:
    """Though each post is signed under an id of its own."""
    a, b, c, note = order(), order(), order(), {"kind": "note", "id": 71}
    first = dict(zip("abn", [event for event, _ in told(await posted(program, "graph", a, b, note))], strict=True))
    before = await count(dsn)
    again = await posted(program, "graph", note, b)
    assert (again.status, told(again)) == (200, [(first["n"], True), (first["b"], True)])
    mixed = await posted(program, "graph", c, a)
    assert mixed.status == 202
    (new, is_double), old = told(mixed)
    assert (is_double, old) == (False, (first["a"], True))
    assert new not in first.values()
    assert await count(dsn) == before + 1


async def test_the_same_event_twice_in_one_post_is_one(program: Program, dsn: str) -> None:
    one = order()
    before = await count(dsn)
    answer = await posted(program, "graph", one, {**one, "customer": "other"}, one)
    events = told(answer)
    assert answer.status == 202
    assert len({event for event, _ in events}) == 1
    assert sorted(duplicate for _, duplicate in events) == [False, True, True]
    assert await count(dsn) == before + 1


async def test_a_signed_id_that_comes_again_with_other_events_brings_them_and_hides_none(program: Program) -> None:
    async def under_one_id(*items: object) -> Heard:
        body = json.dumps({"value": items}).encode()
        async with connected(program.port) as line:
            return await line.ask(post(body, signed(body, id="msg_of_several"), "/hooks/graph"))

    first, second = order(), order()
    assert (await under_one_id(first)).status == 202
    assert [duplicate for _, duplicate in told(await under_one_id(first, second))] == [True, False]


@pytest.mark.parametrize(
    ("bad", "status", "reason"),
    [
        (order(status=CANARY), 422, "value[1]: status must be one of the values that the policy names"),
        (order(kind=CANARY), 422, "value[1]: no policy of this source matches"),
        (CANARY, 422, "value[1]: it must be an object"),
        ([], 422, "value[1]: it must be an object"),
        (None, 422, "value[1]: it must be an object"),
    ],
)
async def test_one_event_that_meets_no_policy_refuses_the_whole_post_and_nothing_is_stored(
    program: Program, dsn: str, bad: object, status: int, reason: str
) -> None:
    before = await count(dsn)
    answer = await posted(program, "graph", order(), bad, order())
    assert (answer.status, answer.json["detail"]) == (status, reason)
    assert await count(dsn) == before


async def test_an_event_that_can_be_read_in_two_ways_refuses_the_whole_post(program: Program, dsn: str) -> None:
    before = await count(dsn)
    body = b'{"value": [{"kind": "order", "id": 1, "status": "paid", "id": 2}]}'
    async with connected(program.port) as line:
        answer = await line.ask(post(body, signed(body), "/hooks/graph"))
    assert (answer.status, answer.json["detail"]) == (400, "value[0]: id stands twice in the body")
    assert await count(dsn) == before


async def test_where_the_source_says_so_the_others_are_taken_and_what_was_left_out_is_counted(program: Program) -> None:
    counted = 'sluicegate_refused_total{reason="policy_not_met",source="loose"}'
    before = program.metric(counted) or 0
    one = order()
    answer = await posted(program, "loose", order(status=CANARY), one, CANARY, order())
    assert answer.status == 202
    left_out = [each for each in answer.json["events"] if each["id"] is None]
    assert [each["reason"] for each in left_out] == [
        "status must be one of the values that the policy names",
        "it must be an object",
    ]
    assert [place for place, each in enumerate(answer.json["events"]) if each["id"] is None] == [0, 2]
    assert program.metric(counted) == before + 2
    nothing_new = await posted(program, "loose", one, CANARY)
    assert (nothing_new.status, [each["duplicate"] for each in nothing_new.json["events"]]) == (200, [True, False])


async def test_a_post_without_events_is_taken_and_leaves_nothing(program: Program, dsn: str) -> None:
    before = await count(dsn)
    answer = await posted(program, "graph")
    assert (answer.status, answer.json) == (200, {"events": []})
    assert await count(dsn) == before


async def test_the_most_events_are_taken_in_one_transaction_and_one_more_is_refused(program: Program, dsn: str) -> None:
    assert MOST_ITEMS == LARGEST
    answer = await posted(program, "loose", *[order(customer=None) for _ in range(MOST_ITEMS)])
    assert answer.status == 202
    ids = [event for event, _ in told(answer)]
    rows = await stored(dsn, ids)
    assert len(rows) == MOST_ITEMS
    assert len({row["transaction"] for row in rows}) == 1
    before = await count(dsn)
    answer = await posted(program, "loose", *[order(customer=None) for _ in range(MOST_ITEMS + 1)])
    assert (answer.status, answer.json["detail"]) == (413, "At most 500 events are taken in one post.")
    assert await count(dsn) == before


async def test_events_may_come_in_the_field_of_a_form(program: Program) -> None:
    one = order()
    answer = await posted(program, "hub", one, order())
    assert (answer.status, len(told(answer))) == (202, 2)
    assert (await posted(program, "hub", one)).status == 200


async def test_a_post_counts_once_for_each_facility_that_is_in_it(program: Program) -> None:
    assert (await posted(program, "site", *[order() for _ in range(20)])).status == 202
    assert (await posted(program, "site", order())).status == 429


async def test_whoever_is_not_proven_has_no_list_looked_into(program: Program) -> None:
    async with connected(program.port) as line:
        answer = await line.ask(post(b'{"value": 1}', {"content-type": "application/json"}, "/hooks/graph"))
    assert answer.status == 401


async def test_fifty_copies_at_once_are_one_of_each(program: Program, dsn: str) -> None:
    items = [order() for _ in range(5)]
    before = await count(dsn)
    answers = await asyncio.gather(*(posted(program, "graph", *items[n % 5 :], *items[: n % 5]) for n in range(50)))
    assert {answer.status for answer in answers} <= {200, 202}
    events = [each for answer in answers for each in told(answer)]
    assert len({event for event, _ in events}) == 5
    assert sum(not duplicate for _, duplicate in events) == 5
    assert await count(dsn) == before + 5


async def count(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT count(*) FROM sluicegate.events")
    finally:
        await connection.close()


async def stored(dsn: str, ids: list[str]) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(
            "SELECT id, policy, data, xmin::text AS transaction FROM sluicegate.events WHERE id = ANY ($1::uuid[])", ids
        )
    finally:
        await connection.close()
