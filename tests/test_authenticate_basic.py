"""A user and a password, as HTTP Basic has them: both are right, or nobody is let in."""

import base64

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized, scheme_for
from gateway.config import Serve
from tests.door import configured

NOW = 1795413918
ENVIRON = {"DESK": "desk", "WORD": "desk-password-0001", "NEXT": "pass:with:colons é", "KEY": "crm-1.key-one-of-32-bytes-000000000000"}  # fmt: skip


def scheme(text: str = "user: env:DESK, secrets: [env:WORD, env:NEXT]", kind: str = "basic") -> Scheme:
    source = f"posts: {{scheme: {kind}, {text}, accepts: [only]}}\n"
    return scheme_for(configured(sources=source, environ=ENVIRON).sources["posts"], Serve())


def presented(*values: str, at: float = NOW, token: str | None = None, header: str = "Authorization") -> Presented:
    headers = CIMultiDict([(header, value) for value in values])
    return Presented(headers=CIMultiDictProxy(headers), body=b"{}", token=token, peer=None, at=at)


def login(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_a_user_with_one_of_its_passwords_is_let_in_and_they_are_told_apart() -> None:
    desk = scheme()
    assert await desk.authenticate(presented(login("desk", ENVIRON["WORD"]))) == Caller(None, secret=0)
    assert await desk.authenticate(presented(login("desk", ENVIRON["NEXT"]))) == Caller(None, secret=1)
    assert await desk.authenticate(presented(login("desk", ENVIRON["WORD"]).replace("Basic", "basic"))) == Caller(
        None, 0
    )


async def test_what_a_client_of_others_sends_is_accepted() -> None:
    sent = aiohttp.encode_basic_auth("desk", ENVIRON["NEXT"], encoding="utf-8")
    assert await scheme().authenticate(presented(sent)) == Caller(None, secret=1)


@pytest.mark.parametrize(
    ("user", "password"),
    [("desk", "desk-password-0002"), ("Desk", "desk-password-0001"), ("", "desk-password-0001"), ("desk", ""), ("", ""),
     ("desk:desk-password-0001", "")],
)  # fmt: skip
async def test_a_wrong_user_and_a_wrong_password_are_refused_alike(user: str, password: str) -> None:
    assert await scheme().authenticate(presented(login(user, password))) == Unauthorized(Reason.WRONG_LOGIN)


@pytest.mark.parametrize(
    "value",
    ["Basic", "Basic ", "Basic !!!!", "Basic ZGVzazp4", "Basic ZGVzazp", "Basic ZGVzazp4=", "Bearer ZGVzazp4", "ZGVzazp4",
     "Basic ZGVz azp4", "Basic ZGVzazp4, Basic ZGVzazp4", "Basic " + "A" * 5000, "Basic é", ""],
)  # fmt: skip
async def test_what_is_no_login_is_refused(value: str) -> None:
    answer = await scheme().authenticate(presented(value))
    assert isinstance(answer, Unauthorized)
    assert answer.reason in {Reason.MALFORMED_HEADER, Reason.WRONG_LOGIN}


async def test_a_login_must_be_there_once() -> None:
    right = login("desk", ENVIRON["WORD"])
    assert await scheme().authenticate(presented()) == Unauthorized(Reason.MISSING_HEADER)
    assert await scheme().authenticate(presented(right, right)) == Unauthorized(Reason.REPEATED_HEADER)


TIMED = "{secret: env:%s, not_before: 2026-11-23T06:00:00Z, not_after: 2026-11-23T06:10:00Z}"
BEGINS, ENDS = 1795413600, 1795414200


@pytest.mark.parametrize("kind", ["basic", "api-key", "odoo-native"])
async def test_a_secret_counts_only_in_its_time_whatever_the_scheme(kind: str) -> None:
    door, right = {
        "basic": (scheme(f"user: env:DESK, secrets: [{TIMED % 'WORD'}]"), lambda at: presented(login("desk", ENVIRON["WORD"]), at=at)),
        "api-key": (scheme(f"header: X-Key, keys: [{TIMED % 'KEY'}]", "api-key"), lambda at: presented(ENVIRON["KEY"], at=at, header="X-Key")),
        "odoo-native": (
            scheme(f"token: env:TOKEN, others: [{TIMED % 'WORD'}]", "odoo-native"),
            lambda at: presented(at=at, token=ENVIRON["WORD"]),
        ),
    }[kind]  # fmt: skip
    for at, counts in {BEGINS - 1: False, BEGINS: True, ENDS - 1: True, ENDS: False}.items():
        assert isinstance(await door.authenticate(right(at)), Caller) is counts


@given(value=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: "Basic " + base64.b64encode(raw).decode()))
@settings(max_examples=300, deadline=None)
async def test_no_login_raises_or_is_believed(value: str) -> None:
    assert isinstance(await scheme_of_all_tests.authenticate(presented(value)), Unauthorized)


scheme_of_all_tests = scheme()
