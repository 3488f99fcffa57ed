"""What is posted as a form is read once, strictly, and kept as the same in JSON would be."""

import json
from urllib.parse import parse_qsl, quote, quote_plus, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import ConfigurationError
from gateway.forms import MOST_FIELDS, FormPolicies, WrappedPolicies
from gateway.minimize import Minimized, Policies, Unmet, Unreadable
from tests.door import KEY, configured, policies

CALL = """\
call:
  version: 1
  purpose: a test
  match: {Kind: call, Version: 2}
  type: phone.call.{status}
  subject: call/{id}
  facility: {from: Site, of: {1: north, S: south}}
  keep:
    id: {from: Sid, type: code, pattern: "[A-Z0-9]{2,34}"}
    status: {from: Status, type: enum, of: {ringing: ringing, 0: failed}}
    media: {from: Num Media, type: int, optional: true}
    price: {from: Price, type: decimal, round: 2, optional: true}
    last: {from: Last, type: bool, optional: true}
    at: {from: At, type: timestamp, optional: true}
    who: {from: Who, type: int, token: staff, optional: true}
    band: {from: Price, type: decimal, bucket: [0, 10], optional: true}
    site: {from: Site, type: enum, of: {1: one, S: two}}
"""
GOOD = {"Kind": "call", "Version": "2", "Sid": "CA1", "Status": "ringing", "Site": "1"}


def form_policies(text: str = CALL) -> FormPolicies:
    config = configured(
        policies=text, sources="posts: {scheme: odoo-native, token: env:TOKEN, accepts: [call], format: form}\n"
    )
    accepts = [config.policies[name] for name in config.sources["posts"].accepts]
    return FormPolicies(accepts, Policies(accepts, key=KEY, texts=True))


CALLS = form_policies()
WRAPPED = WrappedPolicies(
    "payload", policies("only: {version: 1, purpose: a test, type: a.b, keep: {id: {from: id, type: int}}}\n")
)


def accepted(answer: Minimized | Unreadable | Unmet) -> Minimized:
    assert isinstance(answer, Minimized), answer
    return answer


def posted(**changes: str) -> Minimized | Unreadable | Unmet:
    return CALLS.minimize(urlencode({**GOOD, **changes}).encode())


def test_of_a_form_the_policy_keeps_what_it_names_in_its_types() -> None:
    found = accepted(
        posted(
            **{
                "Num Media": "7",
                "Price": "12.345",
                "Last": "false",
                "At": "2026-07-14T12:00:00+02:00",
                "Body": "CANARY",
            }
        )
    )
    assert found.data == {
        "id": "CA1", "status": "ringing", "media": 7, "price": "12.35", "last": False, "at": "2026-07-14T10:00:00Z",
        "band": "10", "site": "one",
    }  # fmt: skip
    assert (found.type, found.subject, found.facility) == ("phone.call.ringing", "call/CA1", "north")
    assert found.dropped == ("Body",)
    assert accepted(posted(Status="0")).type == "phone.call.failed"


def test_a_pseudonym_is_the_same_from_a_form_and_from_json() -> None:
    in_json = policies(
        "only: {version: 1, purpose: a test, type: a.b, keep: {who: {from: Who, type: int, token: staff}}}\n"
    )
    assert accepted(posted(Who="7")).data["who"] == accepted(in_json.minimize(b'{"Who": 7}')).data["who"]


@pytest.mark.parametrize(
    ("name", "given"),
    [("Num Media", text) for text in ("007", "+7", "7.0", "1e3", " 7", "7 ", "٧", "0x7", "true", "null", "9" * 41, "-")]
    + [("Last", text) for text in ("True", "1", "on", "TRUE")]
    + [("Price", text) for text in ("1,5", "NaN", "null", '"1"', "1e99999")]
    + [("Status", "RINGING"), ("Sid", "CA 1"), ("Sid", "CA1\0"), ("Site", "2"), ("Kind", "visit"), ("Version", "02")],
)  # fmt: skip
def test_a_text_that_is_not_of_the_type_is_unmet(name: str, given: str) -> None:
    answer = posted(**{name: given})
    assert isinstance(answer, Unmet)
    assert given not in answer.reason or len(given) == 1


def test_an_empty_text_stands_for_nothing() -> None:
    assert "media" not in accepted(posted(**{"Num Media": "", "Last": "", "Price": ""})).data
    assert posted(Sid="") == Unmet("Sid is missing")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (b"&Status=ringing", "Status stands twice in the body"),
        (b"&%53tatus=ringing", "Status stands twice in the body"),
        (b"&Num+Media=1&Num%20Media=1", "Num Media stands twice in the body"),
        (b"&Sid", "Sid stands twice in the body"),
        (b"&At=%", "the form has a % that escapes nothing"),
        (b"&At=%2", "the form has a % that escapes nothing"),
        (b"&At=%zz", "the form has a % that escapes nothing"),
        (b"&%u0041=1", "the form has a % that escapes nothing"),
        (b"&At=%ff", "the form is not in UTF-8"),
        (b"&At=\xff", "the form is not in UTF-8"),
        (b"&%ED%A0%80=1", "the form is not in UTF-8"),
        (b"&a=1" * MOST_FIELDS, "the form has more than 1000 fields"),
    ],
)
def test_a_form_that_can_be_read_in_two_ways_or_not_at_all_is_unreadable(more: bytes, reason: str) -> None:
    assert CALLS.minimize(urlencode(GOOD).encode() + more) == Unreadable(reason)


def test_what_no_policy_names_may_stand_twice_and_is_not_even_decoded() -> None:
    found = accepted(CALLS.minimize(b"Note=%zz&Note=\xff&&=&" + urlencode(GOOD).encode() + b"&"))
    assert found.dropped == ("Note", "?")


def test_a_semicolon_parts_nothing() -> None:
    assert isinstance(CALLS.minimize(urlencode(GOOD).replace("&", ";").encode()), Unmet)
    assert CALLS.minimize(urlencode(GOOD).encode() + b";Status=0") == Unmet(
        "Site must be one of the values that the policy names"
    )


@pytest.mark.parametrize("escape", [quote, quote_plus])
def test_json_in_a_field_is_read_as_if_it_were_posted(escape: object) -> None:
    assert callable(escape)
    text = json.dumps({"id": 7, "note": "CANARY + 100 % & more = größe"}, ensure_ascii=False)
    found = accepted(WRAPPED.minimize(b"a=1&payload=" + escape(text).encode() + b"&b"))
    assert (found.data, found.dropped) == ({"id": 7}, ("note",))
    assert accepted(WRAPPED.minimize(b"payload=\xef\xbb\xbf{%22id%22:7}")).data == {"id": 7}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the form has no field payload"),
        (b"payloads=%7B%7D", "the form has no field payload"),
        (b"payload=%7B%22id%22:1%7D&p%61yload=%7B%22id%22:2%7D", "payload stands twice in the body"),
        (b"payload=", "the body is not a JSON object"),
        (b"payload=%5B%5D", "the body is not a JSON object"),
        (b"payload=%7B%22id%22:1,%22id%22:2%7D", "id stands twice in the body"),
        (b"payload=%C3", "the form is not in UTF-8"),
        (b'{"id": 1}', "the form has no field payload"),
    ],
)
def test_a_form_without_its_one_field_of_json_is_unreadable(body: bytes, reason: str) -> None:
    assert WRAPPED.minimize(body) == Unreadable(reason)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8) | st.sampled_from([*GOOD, "At", "Num Media"]), st.text(max_size=8), max_size=8)
)
def test_a_form_is_read_as_pythons_own_parser_reads_it_and_only_what_is_declared(fields: dict[str, str]) -> None:
    body = urlencode(
        [(name.encode(errors="replace"), value.encode(errors="replace")) for name, value in fields.items()]
    )
    read = parse_qsl(body, keep_blank_values=True)
    names = [name for name, _ in read]
    if any(names.count(name) > 1 for name in DECLARED):
        assert isinstance(CALLS.minimize(body.encode()), Unreadable)
    else:
        assert json.loads(CALLS._as_json(body.encode())) == {
            name: value if name in DECLARED else None for name, value in read
        }


DECLARED = {*GOOD, "Num Media", "Price", "Last", "At", "Who"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="Sid=&%+;aF0\0é", max_size=60).map(str.encode))
def test_no_bytes_raise(body: bytes) -> None:
    for of in (CALLS, WRAPPED):
        assert isinstance(of.minimize(body), Unreadable | Unmet)


def test_hints_are_posted_by_odoo_in_json_alone() -> None:
    with pytest.raises(ConfigurationError, match="format is not what Odoo posts; leave it out, beside reread"):
        configured(
            sources="posts: {scheme: odoo-native, token: env:TOKEN, accepts: [only], reread: erp, format: form}\n",
            systems="erp: {connector: odoo, url: https://erp.example, database: x, user: y, key: env:TOKEN}\n",
            policies="only: {version: 1, purpose: a test, match: {_model: a.b}, type: a.b, keep: {id: {from: id, type: int}}}\n",
        )
