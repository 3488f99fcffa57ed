"""What is asked of every scheme, and docs/reference/schemes.md, which says what these tests found."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus
from uuid import uuid4

import pytest
import pytest_asyncio
import standardwebhooks
from aiohttp import ClientSession
from hypothesis import given, settings
from hypothesis import strategies as st
from slack_sdk.signature import SignatureVerifier
from twilio.request_validator import RequestValidator
from yarl import URL

from gateway import config as configuration
from gateway.authenticate import Caller, Scheme, Unauthorized, scheme_for
from gateway.config import Serve
from gateway.config_sections import AnySource
from gateway.send import Signed
from gateway.service import Place, Service
from observability.metrics import Metrics
from tests.conftest import TEMPLATE, made_of
from tests.door import PUBLIC_URL, presented
from tests.schemes import JSON, ROWS, Message, Oracle, Row, by_ourselves
from tests.wire import connected, post

PAGE = Path(__file__).parent.parent / "docs/reference/schemes.md"


def now() -> int:
    """When it is asked: hundreds of other tests may run between the collection of this file and its turn."""
    return int(time.time())


BODIES = (b'{"kind":"order"}', '{"kind":"order","note":"Zoë, ☕"}'.encode(), b'{ "kind" : "order" }\n')
CONFIGURATION = """
serve: {{listen: "127.0.0.1:0", public_url: {public_url}, trusted_proxies: [127.0.0.1]}}
database: env:DSN
key: env:KEY
sources:
{sources}
policies:
  order: {{version: 1, purpose: a test, type: a.test, keep: {{id: {{from: id, type: int}}}}}}
"""


@dataclass(frozen=True)
class Door:
    """A gateway with three sources of each scheme: itself, one with another secret, one with the same."""

    session: ClientSession
    address: str

    async def post(self, sent: Signed) -> tuple[int, dict[str, Any]]:
        url = URL(self.address + sent.path, encoded=True)
        async with self.session.post(url, data=sent.body, headers=sent.headers) as answer:
            return answer.status, await answer.json(content_type=None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(server: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    entries = []
    for row in ROWS:
        one, _, other = row.references
        for name, secret in ((row.name, one), (f"{row.name}-other", other), (f"{row.name}-twin", one)):
            lines = ["accepts: [order]", *row.written(secret).splitlines()]
            entries.append(f"  {name}:\n" + "".join(f"    {line}\n" for line in lines))
    path = tmp_path_factory.mktemp("schemes") / "sluicegate.yaml"
    path.write_text(CONFIGURATION.format(public_url=PUBLIC_URL, sources="".join(entries)))
    async for dsn in made_of(TEMPLATE, server):
        environ = {"DSN": dsn, "KEY": "key-of-digests-of-at-least-32-bytes"}
        for row in ROWS:
            environ |= row.environ
        loaded = configuration.load(path, environ)
        service = Service(loaded, Place(role="all", dsn=dsn, workers=1, metrics=None), environ)
        await service.start(Metrics(version="test"))
        async with ClientSession() as session:
            yield Door(session, f"http://127.0.0.1:{service.port}")
        await service.stop()


# ── what is asked of each, and what the page says of the answer ─────────────────────────────────────


def message(body: bytes | None = None, **changes: Any) -> Message:
    """A new one, at a time that tolerances are not asked about."""
    body = body or b'{"kind":"order","id":%d}' % (uuid4().int % 10**12)
    return Message(**{"body": body, "at": now() - 30, "id": f"msg_{uuid4().hex}", **changes})


async def proven(row: Row, sent: Signed, *secrets: str) -> Caller | Unauthorized:
    return await ask(row.source(*secrets), sent)


async def ask(source: AnySource, sent: Signed, *, at: int | None = None) -> Caller | Unauthorized:
    scheme: Scheme = scheme_for(source, Serve(public_url=PUBLIC_URL))
    try:
        return await scheme.authenticate(
            presented(
                sent.headers,
                sent.body,
                at=now() if at is None else at,
                target=sent.path,
                token=sent.path.split("/")[-1],
                vouched=True,
            )
        )
    finally:
        await scheme.close()


async def what_they_sign_we_accept(row: Row, _: Door) -> str:
    oracles = [oracle for oracle in heard(row) if oracle.signs or oracle.signed]
    for oracle in oracles:
        for body in BODIES if oracle.signs else ():
            sent = oracle.signs(row.secrets[0], message(body))
            assert isinstance(await ask(row.source(row.references[0], name="posts"), sent), Caller), oracle.name
        for recorded in oracle.signed:
            by_them = replace(row, secrets=(recorded.secret, *row.secrets[1:]))
            answer = await ask(by_them.source(row.references[0], name="posts"), recorded.sent, at=recorded.at)
            assert isinstance(answer, Caller), oracle.name
    return names_of(oracles)


async def what_we_sign_they_accept(row: Row, _: Door) -> str:
    oracles = [oracle for oracle in heard(row) if oracle.accepts]
    for oracle in oracles:
        for body in BODIES if oracle.accepts else ():
            sent = row.signs(row.source(row.references[0]), message(body))
            assert oracle.accepts(row.secrets[0], sent), oracle.name
            assert not oracle.accepts(row.secrets[2], sent), oracle.name
    return names_of(oracles)


def heard(row: Row) -> tuple[Oracle, ...]:
    if not all(oracle.is_there() for oracle in row.oracles):
        pytest.skip("its library could not be had here; the end of the run says why")
    return row.oracles


def names_of(oracles: Sequence[Oracle]) -> str:
    return ", ".join(f"`{oracle.name}`" for oracle in oracles) or "–"


async def both_secrets_count_and_each_in_its_time(row: Row, _: Door) -> str:
    one, following, other = row.references
    posts = {secret: row.signs(row.source(secret), message()) for secret in row.references}
    second = 1 if row.tells_which else 0
    assert [await place(row, posts[secret], one, following) for secret in (one, following, other)] == [0, second, None]
    over = f"{{secret: {one}, not_after: 2020-01-01T00:00:00Z}}"
    early = f"{{secret: {one}, not_before: 2120-01-01T00:00:00Z}}"
    for retired in (over, early):
        assert [await place(row, posts[secret], following, retired) for secret in (one, following)] == [None, 0]
    return "yes"


async def place(row: Row, sent: Signed, *secrets: str) -> int | None:
    answer = await proven(row, sent, *secrets)
    return answer.secret if isinstance(answer, Caller) else None


async def posted_again_it_is_the_same_event(row: Row, door: Door) -> str:
    """As it was, many times at once or later; signed anew at another time, as senders do who hear no answer; spelled otherwise."""
    first = message()
    source = row.source(row.references[0])
    sent = row.signs(source, first)
    answers = await asyncio.gather(*[door.post(sent) for _ in range(50)])
    (told,) = [told for status, told in answers if status == 202]
    assert {(status, told["id"]) for status, told in answers} == {(202, told["id"]), (200, told["id"])}
    same = [sent, row.signs(source, replace(first, at=first.at + 20))]
    if row.unsigned_id:
        same += [replace(sent, headers={**sent.headers, row.unsigned_id: uuid4().hex}) for _ in range(2)]
    for respelled in (respell(sent) for respell in row.respelled):
        assert respelled != sent
        same.append(respelled)
    for again in same:
        assert await door.post(again) == (200, {"id": told["id"], "duplicate": True})
    if row.signs_id:
        return "the same event, by its signed id"
    ignored = f"; `{row.unsigned_id}` is not signed and changes nothing" if row.unsigned_id else ""
    return f"the same event, by what it says{ignored}"


async def another_body_under_a_signed_id_is_refused(row: Row, door: Door) -> str:
    first, source = message(), row.source(row.references[0])
    assert (await door.post(row.signs(source, first)))[0] == 202
    other = replace(first, body=message().body)
    status, told = await door.post(row.signs(source, other))
    assert (status, told.get("title")) == ((409, "Same id, other body") if row.signs_id else (202, None))
    return "409" if row.signs_id else "no id is signed"


async def shown_to_another_source_or_path_it_is_refused(row: Row, door: Door) -> str:
    sent = row.signs(row.source(row.references[0]), message())
    status, told = await door.post(sent)
    assert status == 202

    async def at(path: str) -> int:
        return (await door.post(replace(sent, path=sent.path.replace(f"/hooks/{row.name}", path))))[0]

    assert await at(f"/hooks/{row.name}-other") == 401
    assert await at(f"/hooks/{row.name}/more") == 404
    assert await at(f"/hooks/{row.name}-twin") == (401 if row.binds_source else 202)
    mark = "&" if "?" in sent.path else "?"
    elsewhere = await door.post(replace(sent, path=f"{sent.path}{mark}more=1"))
    assert elsewhere[0] == 401 or elsewhere == (200, {"id": told["id"], "duplicate": True})
    return "refused" if row.binds_source else "refused, unless both have the same secret"


async def each_part_that_is_signed_is_refused_when_it_was_changed(row: Row, _: Door) -> str:
    source = row.source(row.references[0])
    sent = row.signs(source, message())
    assert isinstance(await ask(source, sent), Caller)
    for part, change in row.parts.items():
        changed = change(sent)
        assert changed != sent
        assert isinstance(await ask(source, changed), Unauthorized), part
    return ", ".join(row.parts) or "nothing is signed"


Check = Callable[[Row, Door], Awaitable[str]]
COLUMNS: dict[str, Check] = {
    "what they sign, we accept": what_they_sign_we_accept,
    "what we sign, they accept": what_we_sign_they_accept,
    "two secrets count at once, each in its time": both_secrets_count_and_each_in_its_time,
    "posted again": posted_again_it_is_the_same_event,
    "another body under the same id": another_body_under_a_signed_id_is_refused,
    "shown to another source": shown_to_another_source_or_path_it_is_refused,
    "refused when it was changed": each_part_that_is_signed_is_refused_when_it_was_changed,
}
CELLS: dict[tuple[str, str], str] = {}
STANDARD, SLACK, STRIPE, TWILIO = (
    next(row for row in ROWS if row.scheme == name) for name in ("standard-webhooks", "slack", "stripe", "twilio")
)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS, ids=[row.scheme for row in ROWS])
@pytest.mark.asyncio(loop_scope="module")
async def test_every_scheme_keeps_its_promise(door: Door, row: Row, column: str) -> None:
    CELLS[row.scheme, column] = await COLUMNS[column](row, door)


PROSE = """\
# What each scheme withstands

Made by the tests (`tests/test_schemes.py`), which fail where this page says anything else: each cell was tried, with the real
door and a real database where it is about events, and with other people's code, or posts that they published, where one is
named.
[Security](../security.md) says what each scheme proves, [configuration](../configuration.md) how it is written.

"""


@pytest.mark.asyncio(loop_scope="module")
async def test_the_page_says_what_these_tests_found(door: Door) -> None:
    for row in ROWS:
        for column, check in COLUMNS.items():
            if (row.scheme, column) not in CELLS:
                CELLS[row.scheme, column] = await check(row, door)
    lines = [["scheme", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[f"`{row.scheme}`", *(CELLS[row.scheme, column] for column in COLUMNS)] for row in ROWS]
    page = PROSE + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if os.environ.get("DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run `DOCS=1 pytest tests/test_schemes.py`"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_signed_url_is_verified_as_it_went_over_the_wire(door: Door) -> None:
    """Not sorted, not decoded, not encoded anew, and never by the Host header; a target that is a whole URL is none."""
    target = f"/hooks/{TWILIO.name}?z=1&b=a+b%27c&a=%c3%A9~"
    sent = TWILIO.signs(TWILIO.source(TWILIO.references[0]), message())
    path = f"{target}&{sent.path.partition('?')[2]}"
    signature = RequestValidator(TWILIO.secrets[0]).compute_signature(PUBLIC_URL + path, {})
    headers = {**JSON, "X-Twilio-Signature": signature}
    for changed in (path.replace("+", "%20"), path.replace("z=1&b", "b"), path.replace("%c3", "%C3"), path + "&"):
        assert (await door.post(Signed(changed, headers, sent.body)))[0] == 401, changed
    assert (await door.post(Signed(path, headers | {"Host": "attacker.example"}, sent.body)))[0] == 202
    async with connected(int(door.address.rpartition(":")[2])) as line:
        answer = await line.ask(post(sent.body, headers, f"{PUBLIC_URL}{path}"))
        assert answer.status == 401


# ── where we are stricter than they are, and why ─────────────────────────────────────────────────────


def by_library(**changes: str) -> dict[str, str]:
    """Headers of Standard Webhooks whose signature the library made for the plain id and time."""
    oracle = STANDARD.oracles[0]
    assert oracle.signs is not None
    return {**oracle.signs(STANDARD.secrets[0], Message(body=BODIES[0], at=now())).headers, **changes}


LOOSE: dict[str, Callable[[str], str]] = {
    "a time that is no whole number": lambda at: f"{at}.99",
    "a time with an exponent": lambda at: f"{int(at) / 1e9:.9f}e9",
    "a time with an underscore": lambda at: f"{at[:1]}_{at[1:]}",
    "a time with a blank": lambda at: f" {at}",
    "a time in other digits": lambda at: "".join(chr(0x660 + int(digit)) for digit in at),
}


@pytest.mark.parametrize("written", LOOSE.values(), ids=LOOSE)
async def test_a_header_that_can_be_written_in_two_ways_counts_in_one(written: Callable[[str], str]) -> None:
    """The library reads any of these as the number that was signed; so could nobody tell what stood in a log."""
    headers = by_library()
    headers["webhook-timestamp"] = written(headers["webhook-timestamp"])
    sent = Signed("/hooks/posts", headers, BODIES[0])
    library = standardwebhooks.Webhook(STANDARD.secrets[0])
    assert library.verify(sent.body.decode(), dict(sent.headers))
    assert isinstance(await proven(STANDARD, sent, STANDARD.references[0]), Unauthorized)


async def test_junk_in_a_signature_is_no_signature() -> None:
    """The library drops it before it compares, so that one signature has many spellings."""
    right = by_library()["webhook-signature"]
    sent = Signed("/hooks/posts", by_library(**{"webhook-signature": right[:10] + "!" + right[10:]}), BODIES[0])
    assert standardwebhooks.Webhook(STANDARD.secrets[0]).verify(sent.body.decode(), dict(sent.headers))
    assert isinstance(await proven(STANDARD, sent, STANDARD.references[0]), Unauthorized)


async def test_an_id_with_a_dot_could_hide_another_time() -> None:
    """`msg.1` at 2 and `msg` at `1.2` are signed alike; the library takes both."""
    oracle = STANDARD.oracles[0]
    assert oracle.signs is not None
    assert oracle.accepts is not None
    sent = oracle.signs(STANDARD.secrets[0], message(id="msg.1"))
    assert oracle.accepts(STANDARD.secrets[0], sent)
    assert isinstance(await proven(STANDARD, sent, STANDARD.references[0]), Unauthorized)


@pytest.mark.parametrize("signature", ["v1", "v1,a", "v1,a,b"])
async def test_what_is_malformed_is_refused_where_the_library_breaks(signature: str) -> None:
    """An error of another kind than its own would be a 500, and the sender would try again for days."""
    sent = Signed("/hooks/posts", by_library(**{"webhook-signature": signature}), BODIES[0])
    with pytest.raises(Exception) as broken:
        standardwebhooks.Webhook(STANDARD.secrets[0]).verify(sent.body.decode(), dict(sent.headers))
    assert not isinstance(broken.value, standardwebhooks.WebhookVerificationError)
    assert isinstance(await proven(STANDARD, sent, STANDARD.references[0]), Unauthorized)


async def test_a_time_in_the_future_is_outside_of_a_tolerance_too() -> None:
    """The library of Stripe looks at the past alone, so a post that is signed for next year could be shown all year."""
    oracle = STRIPE.oracles[0]
    assert oracle.signs is not None
    assert oracle.accepts is not None
    sent = oracle.signs(STRIPE.secrets[0], message(at=now() + 365 * 86400))
    assert oracle.accepts(STRIPE.secrets[0], sent)
    assert isinstance(await proven(STRIPE, sent, STRIPE.references[0]), Unauthorized)


async def test_a_signature_of_stripe_that_says_its_time_twice_is_none() -> None:
    """The library takes the first; somebody else could take the last."""
    sent = STRIPE.signs(STRIPE.source(STRIPE.references[0]), message())
    twice = replace(sent, headers={"Stripe-Signature": sent.headers["Stripe-Signature"] + ",t=1"})
    assert STRIPE.oracles[0].accepts is not None
    assert STRIPE.oracles[0].accepts(STRIPE.secrets[0], twice)
    assert isinstance(await proven(STRIPE, twice, STRIPE.references[0]), Unauthorized)


async def test_a_signature_of_slack_in_other_letters_is_refused_and_not_an_error() -> None:
    """The library compares texts in constant time, which Python does for ASCII alone."""
    headers = {**JSON, "X-Slack-Signature": "v0=é", "X-Slack-Request-Timestamp": str(now())}
    with pytest.raises(TypeError):
        SignatureVerifier(SLACK.secrets[0]).is_valid_request(BODIES[0], headers)
    assert isinstance(
        await proven(SLACK, Signed("/hooks/posts", headers, BODIES[0]), SLACK.references[0]), Unauthorized
    )


async def test_a_body_of_twilio_whose_digest_stands_twice_is_refused() -> None:
    """The library takes the first; a proxy or a framework could take the last."""
    sent = TWILIO.signs(TWILIO.source(TWILIO.references[0]), message())
    path = f"{sent.path}&bodySHA256=0"
    validator = RequestValidator(TWILIO.secrets[0])
    headers = {**JSON, "X-Twilio-Signature": validator.compute_signature(PUBLIC_URL + path, {})}
    assert validator.validate(PUBLIC_URL + path, sent.body.decode(), headers["X-Twilio-Signature"])
    assert isinstance(await proven(TWILIO, Signed(path, headers, sent.body), TWILIO.references[0]), Unauthorized)


# ── whatever they sign ───────────────────────────────────────────────────────────────────────────────

FORMS = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=12), max_size=6)
POSTS = TWILIO.source(TWILIO.references[0], name="posts")


@given(
    fields=FORMS,
    query=st.sampled_from(["", "?b=2&a=1", "?q=a+b%27c", "?é=%c3%A9"]),
    sha256=st.booleans(),
    port=st.booleans(),
)
@settings(max_examples=100, deadline=None)
async def test_a_form_that_twilio_signs_is_accepted_whatever_stands_in_it(
    fields: dict[str, str], query: str, sha256: bool, port: bool
) -> None:
    algorithm = "sha256" if sha256 else "sha1"
    keys = replace(TWILIO, keys=f"{TWILIO.keys}\nformat: form\nalgorithm: {algorithm}")
    target = f"/hooks/posts{query}"
    url = PUBLIC_URL + (":443" if port else "") + target
    signature = RequestValidator(TWILIO.secrets[0]).compute_signature(url, fields, f"HMAC_{algorithm.upper()}")
    form = "&".join(f"{quote_plus(name)}={quote_plus(value)}" for name, value in fields.items()).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Twilio-Signature": signature}
    answer = await ask(keys.source(TWILIO.references[0], name="posts"), Signed(target, headers, form))
    assert isinstance(answer, Caller)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@given(body=TEXT)
@settings(max_examples=60, deadline=None)
async def test_what_slack_and_stripe_sign_is_accepted_whatever_stands_in_it(body: str) -> None:
    for row in (SLACK, STRIPE):
        (oracle,) = row.oracles
        assert oracle.signs is not None
        assert oracle.accepts is not None
        theirs = oracle.signs(row.secrets[0], message(body.encode()))
        assert isinstance(await ask(row.source(row.references[0], name="posts"), theirs), Caller)
        assert oracle.accepts(row.secrets[0], by_ourselves(row.source(row.references[0]), message(body.encode())))
