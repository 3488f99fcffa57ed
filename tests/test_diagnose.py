"""`sluicegate sources diagnose`: who operates the gateway hears why posts are refused, and the caller never does."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from gateway import diagnosis
from gateway.diagnosis import Finding, ask
from tests import serving as way
from tests.house import until
from tests.program import COMMAND
from tests.serving import ENVIRON, Program, order

METER = "meter-secret-of-32-bytes-0000000"
TEXT_OF_BASE64 = base64.b64encode(b"what-it-is-the-base64-of-32bytes").decode()
TEXT_OF_HEX = b"what-it-is-the-hex-of-32-bytes-0".hex()
SOURCES = """
  meter: {scheme: hmac, header: X-Signature, prefix: "sha256=", signed: "{timestamp}.{body}", timestamp: X-Timestamp, tolerance: 5m, secrets: [env:METER], accepts: [purchase-order]}
  coded: {scheme: hmac, header: X-Signature, encoding: base64, secrets: [env:CODED, env:HEXED], accepts: [purchase-order]}
  stripe: {scheme: stripe, secrets: [env:METER], accepts: [purchase-order]}
  twilio: {scheme: twilio, secrets: [env:METER], format: form, accepts: [purchase-order]}
  placed: {scheme: hmac, header: X-Signature, signed: "{url}.{body}", secrets: [env:METER], accepts: [purchase-order]}
  keyed: {scheme: api-key, header: X-Key, keys: [env:API_KEY], accepts: [purchase-order]}
"""
CONFIGURATION = way.CONFIGURATION.replace(
    'serve: {{listen: "127.0.0.1:0"}}', 'serve: {{listen: "127.0.0.1:0", public_url: "https://hooks.example/in"}}'
).replace("sources:\n", "sources:" + SOURCES.replace("{", "{{").replace("}", "}}"))


@dataclass
class Watching:
    findings: list[Finding] = field(default_factory=list)

    async def first(self) -> Finding:
        await until(lambda: self.findings)
        return self.findings[0]


@pytest.fixture
async def program(tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Program]:
    for name, value in {
        "METER": METER, "CODED": TEXT_OF_BASE64, "HEXED": TEXT_OF_HEX, "API_KEY": "meter.secret-of-an-api-key-0000",
    }.items():  # fmt: skip
        monkeypatch.setitem(way.ENVIRON, name, value)
    async with way.serving(tmp_path, dsn, "http://127.0.0.1:9", configured=CONFIGURATION) as program:
        yield program


@asynccontextmanager
async def watching(
    program: Program, source: str, *, requests: int = 20, seconds: float = 30
) -> AsyncIterator[Watching]:
    here = Watching()
    begun = asyncio.Event()

    async def watch() -> None:
        async with program.service._operators_database.session() as session:
            async for finding in ask(session, source, seconds=seconds, requests=requests, asking=begun.set):
                here.findings.append(finding)

    task = asyncio.create_task(watch())
    await begun.wait()
    await until(lambda: source in program.service.diagnosis._asked)
    yield here
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def refused(program: Program, source: str, body: bytes, **headers: str) -> None:
    told = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    async with program.session.post(f"{program.address}/hooks/{source}", data=body, headers=told) as answer:
        assert answer.status == 401
        assert await answer.json(content_type=None) == {
            "type": "about:blank", "title": "Not proven", "status": 401,
            "detail": "The request does not prove that it comes from this source.",
        }  # fmt: skip


def mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


NOW = "now"
BODY = json.dumps(order(), indent=1).encode()
WRITTEN_ANEW = json.dumps(order(), separators=(",", ":")).encode()
OF_THE_METER = {
    "a secret with a line break": (METER.encode() + b"\n", NOW, BODY, "sha256={hex}", "the secret and a line break after it"),
    "a body that was written anew": (METER.encode(), NOW, WRITTEN_ANEW, "sha256={hex}", "a body that was written anew"),
    "a line break that is not sent": (METER.encode(), NOW, BODY + b"\n", "sha256={hex}", "a line break at the end of the body"),
    "no body at all": (METER.encode(), NOW, b"", "sha256={hex}", "without any body"),
    "base64 for hex": (METER.encode(), NOW, BODY, "sha256={base64}", "written in base64, and hex is expected"),
    "no prefix": (METER.encode(), NOW, BODY, "{hex}", 'does not begin with "sha256="'),
    "milliseconds": (METER.encode(), "milliseconds", BODY, "sha256={hex}", "the time is in milliseconds"),
    "an old time": (METER.encode(), "old", BODY, "sha256={hex}", "the signature is right: what is wrong is its time"),
    "another secret": (b"another secret of so many bytes", NOW, BODY, "sha256={hex}", "none of the common mistakes"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OF_THE_METER)
async def test_the_mistake_that_a_sender_made_is_named(program: Program, mistake: str) -> None:
    key, at, signed, written, told = OF_THE_METER[mistake]
    stamp = {NOW: time.time(), "old": time.time() - 1000, "milliseconds": time.time() * 1000}[at]
    digest = mac(key, f"{stamp:.0f}.".encode() + signed)
    signature = written.format(hex=digest.hex(), base64=base64.b64encode(digest).decode())
    async with watching(program, "meter") as here:
        await refused(program, "meter", BODY, X_Signature=signature, X_Timestamp=f"{stamp:.0f}")
        found = await here.first()
    assert told in found.mistakes[0]
    assert found.body == len(BODY)
    assert found.headers["x-signature"] == [len(signature)]
    assert found.clock == pytest.approx(-1000 if at == "old" else 0, abs=5)


@pytest.mark.parametrize(
    ("key", "written", "told"),
    [
        (b"what-it-is-the-base64-of-32bytes", "{base64}", "with what the secret is the base64 of"),
        (b"what-it-is-the-hex-of-32-bytes-0", "{base64}", "with what the secret is the hex of"),
        (TEXT_OF_BASE64.encode(), "{hex}", "written in hex, and base64 is expected"),
    ],
)
async def test_a_secret_that_was_decoded_or_a_form_that_differs_is_named(
    program: Program, key: bytes, written: str, told: str
) -> None:
    digest = mac(key, BODY)
    async with watching(program, "coded") as here:
        signature = written.format(hex=digest.hex(), base64=base64.b64encode(digest).decode())
        await refused(program, "coded", BODY, X_Signature=signature)
        assert told in (await here.first()).mistakes[0]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (ENVIRON["SHOP_SECRET"].removeprefix("whsec_").encode(), "the text of the secret, which was to be decoded"),
        (ENVIRON["SHOP_SECRET"].encode(), "the whole text of the secret, whsec_ included"),
    ],
)
async def test_a_secret_of_standard_webhooks_that_was_not_decoded_is_named(
    program: Program, key: bytes, told: str
) -> None:
    stamp = str(int(time.time()))
    signature = "v1," + base64.b64encode(mac(key, f"msg_1.{stamp}.".encode() + BODY)).decode()
    async with watching(program, "odoo") as here:
        await refused(program, "odoo", BODY, webhook_id="msg_1", webhook_timestamp=stamp, webhook_signature=signature)
        assert told in (await here.first()).mistakes[0]


async def test_a_body_that_was_written_anew_is_named_for_stripe_too(program: Program) -> None:
    stamp = str(int(time.time()))
    signature = mac(METER.encode(), f"{stamp}.".encode() + WRITTEN_ANEW).hex()
    async with watching(program, "stripe") as here:
        await refused(program, "stripe", BODY, Stripe_Signature=f"t={stamp},v1={signature}")
        found = await here.first()
    assert "a body that was written anew" in found.mistakes[0]
    assert found.clock == pytest.approx(0, abs=5)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://hooks.example/in", "signed for http://, and serve.public_url says https://"),
        ("https://HOST/in", "signed for the host that the request names, and serve.public_url says another"),
        ("http://HOST/in", "signed for http:// and the host that the request names"),
        ("https://hooks.example", "without the path before it that serve.public_url has"),
    ],
)
@pytest.mark.parametrize("source", ["twilio", "placed"])
async def test_a_url_that_the_sender_sees_otherwise_is_named(
    program: Program, source: str, url: str, told: str
) -> None:
    url = url.replace("HOST", program.address.removeprefix("http://"))
    async with watching(program, source) as here:
        if source == "placed":
            signature = mac(METER.encode(), f"{url}/hooks/placed.".encode() + BODY).hex()
            await refused(program, "placed", BODY, X_Signature=signature)
        else:
            signed = hmac.new(METER.encode(), f"{url}/hooks/twilioBodyhello".encode(), hashlib.sha1).digest()
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            await refused(
                program, "twilio", b"Body=hello", X_Twilio_Signature=base64.b64encode(signed).decode(), **form
            )
        assert told in (await here.first()).mistakes[0]


async def test_no_value_is_told_or_stored(program: Program, dsn: str, capfd: pytest.CaptureFixture[str]) -> None:
    async with watching(program, "meter") as here:
        await refused(program, "meter", BODY, X_Signature="sha256=canary-in-a-header", X_Timestamp="1", X_More="canary")
        found = await here.first()
    assert "canary" not in repr(found)
    assert METER not in repr(found)
    rows = ""

    async def is_counted() -> bool:
        nonlocal rows
        rows = await way.stored(dsn)
        return "too_old" in rows

    await until(is_counted)  # so that what is counted of it is there, and would be found
    seen = rows + "".join(capfd.readouterr())
    assert "canary" not in seen
    assert "common mistakes" not in seen


async def test_a_scheme_that_signs_nothing_tells_what_it_can(program: Program) -> None:
    async with watching(program, "keyed") as here:
        await refused(program, "keyed", BODY, X_Key="meter.another-secret-of-an-api-key")
        found = await here.first()
    assert found.reason == "wrong_key"
    assert found.mistakes == []
    assert found.headers["x-key"] == [34]


async def test_it_ends_after_so_many_requests_and_what_is_not_asked_for_is_not_looked_at(program: Program) -> None:
    async with watching(program, "keyed", requests=3) as here:
        for _ in range(5):
            await refused(program, "keyed", BODY, X_Key="meter.another-secret-of-an-api-key")
            await refused(program, "coded", BODY, X_Signature="x")
        await until(lambda: len(here.findings) == 3)
        await until(lambda: not program.service.diagnosis._asked)
    assert {found.reason for found in here.findings} == {"wrong_key"}


async def test_it_ends_by_itself_when_whoever_asked_is_gone(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "LONGEST", timedelta(seconds=0.2))
    asked = diagnosis.Ask(id="gone", source="keyed", seconds=9999, requests=9999)
    program.service.diagnosis._heard(json.dumps({**vars_of(asked)}))
    await asyncio.sleep(0.3)
    await refused(program, "keyed", BODY, X_Key="meter.another-secret-of-an-api-key")
    assert not program.service.diagnosis._asked
    assert not program.service.diagnosis._telling


def vars_of(asked: diagnosis.Ask) -> dict[str, object]:
    return {name: getattr(asked, name) for name in asked.__struct_fields__}


async def test_the_command_tells_a_person_and_the_audit_tells_who_looked(
    program: Program, tmp_path: Path, dsn: str
) -> None:
    command = await asyncio.create_subprocess_exec(
        *COMMAND, "sources", "diagnose", "meter", "--requests", "1", "--config", str(tmp_path / "sluicegate.yaml"),
        env={**os.environ, **way.ENVIRON, "DSN": dsn}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert command.stdout
    assert b"Watching what is refused of meter" in await command.stdout.readline()
    await until(lambda: "meter" in program.service.diagnosis._asked)
    stamp = str(int(time.time()))
    signature = "sha256=" + mac(METER.encode() + b"\n", f"{stamp}.".encode() + BODY).hex()
    await refused(program, "meter", BODY, X_Signature=signature, X_Timestamp=stamp)
    told = (await command.stdout.read()).decode()
    assert await command.wait() == 0
    assert "→ signed with the secret and a line break after it" in told
    assert "x-signature (71)" in told
    _, audit = await program.api("GET", "/audit", role="auditor")
    assert ("source.diagnose", "meter") in [(deed["action"], deed["target"]) for deed in audit["items"]]
