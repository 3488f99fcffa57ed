"""Handshakes: what a sender asks once before it sends its first event is answered in memory, and is no event."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from aiohttp import ClientResponse

from gateway.config import ConfigurationError
from tests import serving as way
from tests.door import configured
from tests.serving import Program

SECRET = "handshake-secret-of-32-bytes-000"
SOURCES = """
  slack: {scheme: hmac, header: X-Slack-Signature, prefix: "v0=", signed: "v0:{timestamp}:{body}", timestamp: X-Slack-Request-Timestamp, tolerance: 5m, handshake: slack, secrets: [env:HAND], accepts: [purchase-order]}
  preset: {scheme: slack, handshake: slack, secrets: [env:HAND], accepts: [purchase-order]}
  graph: {scheme: odoo-native, token: env:GRAPH_TOKEN, handshake: microsoft-graph, accepts: [purchase-order]}
  inside: {scheme: odoo-native, token: env:GRAPH_TOKEN, handshake: microsoft-graph, from: [10.1.0.0/16], accepts: [purchase-order]}
  zoom: {scheme: hmac, header: x-zm-signature, prefix: "v0=", signed: "v0:{timestamp}:{body}", timestamp: x-zm-request-timestamp, tolerance: 5m, handshake: zoom, secrets: [env:OTHER, env:HAND], accepts: [purchase-order]}
  xero: {scheme: hmac, header: x-xero-signature, encoding: base64, handshake: xero, secrets: [env:HAND], accepts: [purchase-order]}
  field: {scheme: hmac, header: X-Signature, handshake: {field: hello.word}, secrets: [env:HAND], accepts: [purchase-order]}
  known: {scheme: hmac, header: X-Signature, handshake: {field: word, when: {kind: hello}}, secrets: [env:HAND], accepts: [purchase-order]}
"""
CONFIGURATION = way.CONFIGURATION.replace("sources:\n", "sources:" + SOURCES.replace("{", "{{").replace("}", "}}"))
Ask = Callable[..., "object"]


@pytest.fixture
async def program(tmp_path, dsn, monkeypatch) -> AsyncIterator[Program]:
    for name, value in {
        "HAND": SECRET,
        "OTHER": SECRET[::-1],
        "GRAPH_TOKEN": "graph-token-of-32-bytes-00000000",
    }.items():
        monkeypatch.setitem(way.ENVIRON, name, value)
    async with way.serving(tmp_path, dsn, "http://127.0.0.1:9", configured=CONFIGURATION) as program:
        yield program


def signed(source: str, body: bytes, key: str = SECRET) -> Mapping[str, str]:
    """As each sender signs."""

    def mac(message: bytes) -> bytes:
        return hmac.new(key.encode(), message, hashlib.sha256).digest()

    now = str(int(time.time()))
    timed = f"v0={mac(f'v0:{now}:'.encode() + body).hex()}"
    return {
        "slack": {"X-Slack-Signature": timed, "X-Slack-Request-Timestamp": now},
        "preset": {"X-Slack-Signature": timed, "X-Slack-Request-Timestamp": now},
        "zoom": {"x-zm-signature": timed, "x-zm-request-timestamp": now},
        "xero": {"x-xero-signature": base64.b64encode(mac(body)).decode()},
    }.get(source, {"X-Signature": mac(body).hex()})


async def asked(program: Program, source: str, given: object, *, key: str = SECRET) -> tuple[ClientResponse, str]:
    body = json.dumps(given).encode()
    headers = {"Content-Type": "application/json", **signed(source, body, key)}
    async with program.session.post(f"{program.address}/hooks/{source}", data=body, headers=headers) as answer:
        return answer, await answer.text()


async def events(program: Program) -> list[object]:
    _, told = await program.api("GET", "/events")
    return list(told["items"])


async def counted(program: Program, source: str) -> float:
    async with program.session.get(f"{program.address}/metrics") as answer:
        text = await answer.text()
    found = [line for line in text.splitlines() if line.startswith(f'sluicegate_handshakes_total{{source="{source}"}}')]
    return float(found[0].split()[-1]) if found else 0.0


def is_harmless(answer: ClientResponse) -> bool:
    """To a browser it is nothing but text."""
    return answer.headers["X-Content-Type-Options"] == "nosniff" and answer.content_type == "text/plain"


@pytest.mark.parametrize("source", ["slack", "preset"])
async def test_slack_hears_its_challenge(program: Program, source: str) -> None:
    answer, text = await asked(program, source, {"type": "url_verification", "token": "x", "challenge": "3eZbrw1aB"})
    assert (answer.status, text) == (200, "3eZbrw1aB")
    assert is_harmless(answer)
    assert await events(program) == []
    assert await counted(program, source) == 1


async def test_microsoft_graph_hears_its_token_before_it_has_signed_anything(program: Program) -> None:
    url = f"{program.address}/hooks/graph?validationToken=Validation%3A+Testing+client%3Cb%3E%26"
    async with program.session.post(url, headers={"Content-Type": "text/plain; charset=utf-8"}) as answer:
        assert (answer.status, await answer.text()) == (200, "Validation: Testing client<b>&")
        assert is_harmless(answer)
    async with program.session.post(url.replace("graph", "inside")) as answer:
        assert answer.status in {401, 415}  # not from where it may come
    async with program.session.post(url.replace("graph", "slack")) as answer:
        assert answer.status in {401, 415}  # nor to a source that has no such handshake
    assert await events(program) == []


async def test_zoom_hears_its_token_and_a_proof_under_the_secret_that_it_signed_with(program: Program) -> None:
    question = {"event": "endpoint.url_validation", "payload": {"plainToken": "qgg8vlvZRS6UYooatFL8Aw"}}
    for key in (SECRET, SECRET[::-1]):
        answer, text = await asked(program, "zoom", question, key=key)
        proof = hmac.new(key.encode(), b"qgg8vlvZRS6UYooatFL8Aw", hashlib.sha256).hexdigest()
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert json.loads(text) == {"plainToken": "qgg8vlvZRS6UYooatFL8Aw", "encryptedToken": proof}
    assert await events(program) == []


async def test_xero_hears_yes_only_where_its_signature_is_right(program: Program) -> None:
    intent = {"events": [], "firstEventSequence": 0, "lastEventSequence": 0, "entropy": "S0m3r4nd0mt3xt"}
    answer, text = await asked(program, "xero", intent)
    assert (answer.status, text) == (200, "")
    answer, _ = await asked(program, "xero", intent, key="x" * 32)
    assert answer.status == 401
    assert await events(program) == []


async def test_a_named_field_is_echoed_and_a_body_without_it_is_an_event_like_any_other(program: Program) -> None:
    answer, text = await asked(program, "field", {"hello": {"word": "grüezi"}})
    assert (answer.status, text) == (200, "grüezi")
    assert is_harmless(answer)
    answer, _ = await asked(program, "field", way.order())
    assert answer.status == 202
    answer, text = await asked(program, "known", {"kind": "hello", "word": "w"})
    assert (answer.status, text) == (200, "w")
    answer, _ = await asked(program, "known", {**way.order(id=43), "word": "no handshake"})
    assert answer.status == 202
    assert len(await events(program)) == 2


@pytest.mark.parametrize("source", ["slack", "zoom", "field", "known"])
async def test_nobody_hears_anything_who_is_not_proven_first(program: Program, source: str) -> None:
    question = {
        "type": "url_verification", "challenge": "c", "hello": {"word": "c"}, "kind": "hello", "word": "c",
        "event": "endpoint.url_validation", "payload": {"plainToken": "c"},
    }  # fmt: skip
    answer, text = await asked(program, source, question, key="x" * 32)
    assert answer.status == 401
    assert "challenge" not in text
    assert await counted(program, source) == 0


@pytest.mark.parametrize("challenge", ["", "x" * 1025, "é" * 513, 17, {"a": 1}, ["a"], None])
async def test_what_is_no_short_text_is_not_echoed(program: Program, challenge: object) -> None:
    answer, _ = await asked(program, "slack", {"type": "url_verification", "challenge": challenge})
    assert answer.status == 422
    answer, _ = await asked(program, "slack", {"type": "url_verification", "challenge": "x" * 1024})
    assert answer.status == 200
    assert await events(program) == []


async def test_handshakes_are_rate_limited(program: Program) -> None:
    url = f"{program.address}/hooks/graph?validationToken=t"
    statuses = []
    for _ in range(12):
        async with program.session.post(url) as answer:
            statuses.append(answer.status)
    assert 5 <= statuses.count(200) < 12
    assert set(statuses) == {200, 429}


@pytest.mark.parametrize(
    ("source", "mistake"),
    [
        ("scheme: odoo-native, token: env:TOKEN, handshake: zoom", "proves itself by a secret of scheme: hmac"),
        ("scheme: odoo-native, token: env:TOKEN, handshake: slak", "slack"),
        ("scheme: odoo-native, token: env:TOKEN, handshake: {when: {a: 1}}", "field"),
        ("scheme: odoo-native, token: env:TOKEN, handshake: {fild: a}", "field"),
    ],
)
def test_a_handshake_that_cannot_be_is_told_with_its_mend(source: str, mistake: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        configured(sources=f"posts: {{{source}, accepts: [only]}}\n")
    assert mistake in str(refused.value)
    assert "handshake" in str(refused.value)
