"""What a policy names is kept in one form; what it does not name is not even read."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from textwrap import dedent

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import ConfigurationError
from gateway.minimize import Minimized, Policies, Unmet, Unreadable
from tests.door import configured, kept, minimized, policies, policy

PURCHASES_AND_ALERTS = dedent(
    """\
    purchase-order:
      version: 3
      purpose: procurement approval
      match: {_model: purchase.order}
      type: odoo.purchase_order.{status}
      subject: purchase.order/{id}
      time: "{changed}"
      facility: {from: company_id, of: {1: north, 2: south}}
      keep:
        id:       {from: _id, type: int, min: 1}
        status:   {from: state, type: enum, of: {draft: draft, "to approve": approval_requested, purchase: approved}}
        amount:   {from: amount_total, type: decimal}
        buyer:    {from: user_id, type: int, token: staff}
        changed:  {from: write_date, type: timestamp}
        lines:    {from: order_line, type: [int], max: 3, optional: true}
        currency: {from: currency, type: code, pattern: "[A-Z]{3}", optional: true}
      dedup: [id, changed, status]
    equipment-alert:
      version: 1
      purpose: keep refrigerated stock safe
      match: {type: equipment.alert}
      type: equipment.alert.{severity}
      subject: equipment/{asset}
      time: "{at}"
      facility: {from: data.site, of: {N: north, S: south}}
      keep:
        asset:    {from: data.asset, type: code, pattern: "[A-Z]{2}-[0-9]{1,6}"}
        severity: {from: data.severity, type: enum, of: [info, warning, critical]}
        celsius:  {from: data.temperature, type: decimal, round: 1, optional: true}
        at:       {from: timestamp, type: timestamp}
    """
)
RECORDED = Path(__file__).parent.parent / "sandbox" / "samples" / "odoo-native-webhooks.jsonl"
BODIES = [json.loads(line)["body"].encode() for line in RECORDED.read_text().splitlines()]
ALERT = {
    "type": "equipment.alert",
    "timestamp": "2025-12-15T16:55:37.20373-05:00",
    "data": {"site": "S", "asset": "FR-12", "severity": "warning", "temperature": 8.25, "note": "near bed 4"},
}


@pytest.fixture(scope="module")
def both() -> Policies:
    return policies(PURCHASES_AND_ALERTS)


def accepted(answer: Minimized | Unreadable | Unmet) -> Minimized:
    assert isinstance(answer, Minimized), answer
    return answer


def order(**changes: object) -> bytes:
    return json.dumps({**json.loads(BODIES[0]), **changes}).encode()


# ── the whole of a payload ─────────────────────────────────────────────────────────────────────────


def test_of_what_odoo_posts_the_policy_keeps_what_it_names(both: Policies) -> None:
    found = accepted(both.minimize(BODIES[0]))
    pseudonym = found.data.pop("buyer")
    assert found.data == {
        "id": 1,
        "status": "draft",
        "amount": "8625.0",
        "changed": "2026-11-23T05:34:57.955067Z",
    }
    assert isinstance(pseudonym, str)
    assert (found.policy, found.version) == ("purchase-order", 3)
    assert (found.type, found.subject, found.facility) == ("odoo.purchase_order.draft", "purchase.order/1", "north")
    assert found.time is not None
    assert found.time.isoformat() == "2026-11-23T05:34:57.955067+00:00"
    assert found.dropped == ("_action", "currency_id", "id", "name", "partner_id")


def test_what_is_stored_is_the_kept_data_as_json(both: Policies) -> None:
    found = accepted(both.minimize(BODIES[0]))
    assert json.loads(found.document) == found.data


def test_identical_posts_of_one_save_are_the_same_and_the_next_save_is_another(both: Policies) -> None:
    same = [accepted(both.minimize(body)).same for body in BODIES[:9]]
    assert len(set(same[:6])) == 1
    assert len(set(same[6:9])) == 1
    assert same[0] != same[6]


def test_the_same_values_under_two_policies_are_not_the_same_event() -> None:
    two = policies(
        dedent(
            """\
            order: {version: 1, purpose: a test, match: {kind: order}, type: a.b, keep: {id: {from: id, type: int}}, dedup: [id]}
            visit: {version: 1, purpose: a test, match: {kind: visit}, type: a.b, keep: {id: {from: id, type: int}}, dedup: [id]}
            """
        )
    )
    one, other = (accepted(two.minimize(b'{"id": 7, "kind": "%b"}' % kind)).same for kind in (b"order", b"visit"))
    assert one != other


def test_a_policy_without_dedup_tells_nothing_the_same(both: Policies) -> None:
    assert accepted(both.minimize(json.dumps(ALERT).encode())).same is None


def test_values_deep_in_a_body_are_found_by_their_path(both: Policies) -> None:
    found = accepted(both.minimize(json.dumps(ALERT).encode()))
    assert found.data == {
        "asset": "FR-12",
        "severity": "warning",
        "celsius": "8.3",
        "at": "2025-12-15T21:55:37.20373Z",
    }
    assert (found.type, found.facility, found.dropped) == ("equipment.alert.warning", "south", ())


def test_a_byte_order_mark_is_skipped(both: Policies) -> None:
    assert both.minimize(b"\xef\xbb\xbf" + BODIES[0]) == both.minimize(BODIES[0])


def test_the_first_policy_that_matches_is_applied() -> None:
    of = policies(
        dedent(
            """\
            urgent: {version: 1, purpose: a test, match: {kind: order, urgent: true}, type: a.urgent, keep: {id: {from: id, type: int}}}
            numbered: {version: 1, purpose: a test, match: {kind.of: 1}, type: a.numbered, keep: {id: {from: id, type: int}}}
            any: {version: 1, purpose: a test, match: {kind: "\\u00e4rztlich"}, type: a.medical, keep: {id: {from: id, type: int}}}
            rest: {version: 1, purpose: a test, type: a.rest, keep: {id: {from: id, type: int}}}
            """
        )
    )
    for body, type_ in {
        '{"id": 1, "kind": "order", "urgent": true}': "a.urgent",
        '{"id": 1, "kind": "order", "urgent": 1}': "a.rest",
        '{"id": 1, "kind": "\\u006frder", "urgent": true}': "a.urgent",
        '{"id": 1, "kind": {"of": 1}, "urgent": []}': "a.numbered",
        '{"id": 1, "kind": {"of": 1.0}}': "a.rest",
        '{"id": 1, "kind": "\\u00e4rztlich"}': "a.medical",
        '{"id": 1, "kind": "ärztlich"}': "a.medical",
        '{"id": 1}': "a.rest",
    }.items():
        assert accepted(of.minimize(body.encode())).type == type_, body


@pytest.mark.parametrize(
    "body", [b"{}", b'{"_model": "res.partner"}', b'{"_model": ["purchase.order"]}', b'{"type": {}}']
)
def test_a_body_that_no_policy_matches_is_unmet(both: Policies, body: bytes) -> None:
    assert both.minimize(body) == Unmet("no policy of this source matches")


def test_a_lone_policy_is_not_applied_to_what_it_does_not_match() -> None:
    only = policy("id: {from: id, type: int}", match="{kind: order}")
    assert only.minimize(b'{"id": 1, "kind": "visit"}') == Unmet("no policy of this source matches")
    assert accepted(only.minimize(b'{"id": 1, "kind": "order"}')).data == {"id": 1}


def test_one_value_may_be_kept_in_two_ways_and_matched_too() -> None:
    twice = policy(
        "whole: {from: n, type: int}, exact: {from: n, type: decimal}, who: {from: n, type: int, token: staff}",
        match="{n: 7}",
        facility="{from: n, of: {7: north}}",
    )
    found = accepted(twice.minimize(b'{"n": 7}'))
    assert (found.data["whole"], found.data["exact"], found.facility) == (7, "7", "north")
    assert isinstance(twice.minimize(b'{"n": 8}'), Unmet)


# ── what is refused, and how it is told ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b'{"_model": "purchase.order"',
        b'{"_model": "purchase.order"}x',
        b"{'_model': 1}",
        b'{"_model": NaN}',
        b'{"_id": "x", ',
        b"\x00",
        b"\xef\xbb\xbf",
        "{}".encode("utf-16"),
        b"_model=purchase.order",
        order()[:-1] + b', "x": "\xff"}',
        order()[:-1] + b', "\xff": 1}',
        order()[:-1] + b', "x": "\xed\xa0\x80"}',
        order()[:-1] + b', "x": "\x00"}',
        order()[:-1] + b', "x": Infinity}',
    ],
)
def test_what_is_no_json_object_is_unreadable(both: Policies, body: bytes) -> None:
    assert isinstance(both.minimize(body), Unreadable)


@pytest.mark.parametrize("where", ["{}", '{"x": %s}', '{"_id": %s}', '{"amount_total": %s}', '{"data": %s}'])
def test_depth_is_refused_and_does_not_raise(both: Policies, where: str) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * 20_000 + ("" if opening == "[" else "1") + closing * 20_000
        inside = where.replace("{", '{"_model": "purchase.order",', 1) if "%" in where else deep
        assert isinstance(both.minimize((inside % deep if "%" in inside else inside).encode()), Unreadable | Unmet)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_id": "CANARY"}, "_id must be an integer from 1"),
        ({"_id": 0}, "_id must be an integer from 1"),
        ({"_id": 1.5}, "_id must be an integer from 1"),
        ({"_id": True}, "_id must be an integer from 1"),
        ({"_id": False}, "_id is missing"),
        ({"_id": None}, "_id is missing"),
        ({"_id": {"CANARY": 1}}, "_id must be an integer from 1"),
        ({"state": "CANARY"}, "state must be one of the values that the policy names"),
        ({"state": "dr\0aft"}, "state must be one of the values that the policy names"),
        ({"amount_total": "CANARY"}, "amount_total must be a decimal number of at most 40 digits"),
        ({"amount_total": ["CANARY"]}, "amount_total must be a decimal number of at most 40 digits"),
        ({"write_date": "CANARY - at `$._id`"}, "write_date must be a timestamp as of RFC 3339"),
        ({"company_id": 3}, "company_id must be one of the values that the policy names"),
        ({"company_id": None}, "company_id is missing"),
        ({"order_line": [1, "CANARY"]}, "order_line must be a list of at most 3, and each must be an integer"),
        ({"order_line": [1, {"CANARY": 1}]}, "order_line must be a list of at most 3, and each must be an integer"),
        ({"order_line": [1, 2, 3, 4]}, "order_line must be a list of at most 3, and each must be an integer"),
        ({"currency": "CANARY"}, "currency must be a code that matches [A-Z]{3}, at most 64 characters long"),
    ],
)
def test_what_does_not_meet_the_policy_is_told_by_its_path_and_rule(
    both: Policies, changes: dict[str, object], reason: str
) -> None:
    assert both.minimize(order(**changes)) == Unmet(reason)


def test_what_should_be_an_object_is_told_too(both: Policies) -> None:
    assert both.minimize(json.dumps({**ALERT, "data": "CANARY"}).encode()) == Unmet("data must be an object")


@pytest.mark.parametrize("absent", ["null", "false", ""])
def test_what_is_optional_may_be_absent_in_any_of_odoos_ways(both: Policies, absent: str) -> None:
    given = f', "order_line": {absent}, "currency": {absent}' if absent else ""
    found = accepted(both.minimize(BODIES[0][:-1] + given.encode() + b"}"))
    assert {"lines", "currency"}.isdisjoint(found.data)
    assert kept("type: decimal, optional: true", absent or "null") is None
    assert kept("type: [decimal], optional: true", absent or "null") is None


def test_a_whole_branch_may_be_absent_if_all_in_it_is_optional() -> None:
    of = policy("id: {from: id, type: int}, celsius: {from: a.b.celsius, type: decimal, optional: true}")
    for branch in ("null", "false", '{"b": null}', '{"b": false}', '{"b": {}}'):
        assert accepted(of.minimize(b'{"id": 1, "a": %b}' % branch.encode())).data == {"id": 1}
    assert of.minimize(b'{"id": 1, "a": {"b": "CANARY"}}') == Unmet("a.b must be an object")


def test_false_is_a_value_where_the_policy_says_so() -> None:
    assert kept("type: bool, optional: true", "false") is False
    assert kept("type: enum, of: {true: open, false: closed}, optional: true", "false") == "closed"


def test_what_is_kept_has_a_limit() -> None:
    of = policy("it: {from: it, type: [code], pattern: '[a-z]+', max: 200}")
    assert isinstance(minimized(of, json.dumps(["x" * 60] * 100)), Minimized)
    assert minimized(of, json.dumps(["x" * 64] * 200)) == Unmet("what the policy keeps is larger than 8192 bytes")


# ── duplicate keys ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        (b'"state": "purchase"', "state"),
        (b'"state" : "purchase"', "state"),
        (b'"\\u0073tate": "purchase"', "state"),
        (b'"_model": "purchase.order"', "_model"),
        (b'"company_id": 2', "company_id"),
        (b'"x": [{"y": {"z": "]}"}}], "state": "draft"', "state"),
        (b'"x": "\\"state\\\\", "state": "draft"', "state"),
        (b'"type": 1, "type": 2', "type"),  # another policy would go by it
        (b'"\\u003a": 1, "state": "purchase"', "state"),  # nobody can hide a name behind a colon that is none
        (b'"\\u003A:": "\\u003a", "state"\n:"purchase"', "state"),
    ],
)
def test_a_declared_name_that_stands_twice_is_refused(both: Policies, extra: bytes, path: str) -> None:
    for body in (BODIES[0][:-1] + b", " + extra + b"}", b"{" + extra + b", " + BODIES[0][1:]):
        assert both.minimize(body) == Unreadable(f"{path} stands twice in the body")


def test_a_name_that_stands_twice_below_is_refused_by_its_path(both: Policies) -> None:
    body = json.dumps(ALERT).encode().replace(b'"severity"', b'"severity": "critical", "severity"')
    assert both.minimize(body) == Unreadable("data.severity stands twice in the body")
    twice = json.dumps(ALERT).encode()[:-1] + b', "data": {"site": "N"}}'
    assert both.minimize(twice) == Unreadable("data stands twice in the body")


@pytest.mark.parametrize(
    "extra",
    [
        b'"x": {"state": 1, "_id": 2}',
        b'"x": [{"state": 1}, {"state": 2}]',
        b'"x": "state", "y": "\\"state\\": 1"',
        b'"x": "\\u0073tate"',
        b'"x": 1, "x": 2',
        b'"x": {"y": 1, "y": 2}',
        b'"x": "\\\\", "y": "state"',
        b'"x:y": ":", ":": {":": ":"}',
        b'"\\u003a": ":", "z": "\\u003a"',
    ],
)
def test_what_only_looks_like_a_name_twice_is_accepted(both: Policies, extra: bytes) -> None:
    assert isinstance(both.minimize(BODIES[0][:-1] + b", " + extra + b"}"), Minimized)


def test_names_of_any_kind_are_found_twice() -> None:
    for name, hidden in {
        ",": '","',
        "größe": '"gr\\u00f6\\u00dfe"',
        "a/b": '"a\\/b"',
        ":": '":"',
    }.items():
        of = policy(f"it: {{from: {json.dumps(name, ensure_ascii=False)}, type: int}}")
        once = f'{{"x": ["p","q"], {json.dumps(name, ensure_ascii=False)}: 1, "y":"z"}}'
        assert accepted(of.minimize(once.encode())).data == {"it": 1}
        for twice in (once[:-1] + f", {hidden}: 2}}", f"{{{hidden}: 2, " + once[1:]):
            assert of.minimize(twice.encode()) == Unreadable(f"{name} stands twice in the body")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["a", "b", '"a":', "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c", "ä", '"']), inner),
    max_leaves=8,
)


@given(
    members=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "\\u0061", "c\\u0022", ":", "\\u003a"]), json_values), max_size=6
    ),
    inner=st.lists(st.tuples(st.sampled_from(["d", "e", "\\u0064"]), json_values), max_size=4),
    gap=st.sampled_from(["", " ", "\n\t"]),
    ascii_only=st.booleans(),
)
@settings(deadline=None)
def test_duplicates_are_found_exactly_where_a_full_parse_finds_them(
    members: list[tuple[str, object]], inner: list[tuple[str, object]], gap: str, ascii_only: bool
) -> None:
    def written(pairs: list[tuple[str, object]]) -> str:
        return ",".join(
            f'{gap}"{name}"{gap}:{value if isinstance(value, Written) else json.dumps(value, ensure_ascii=ascii_only)}'
            for name, value in pairs
        )

    body = "{" + written([*members, ("f", Written("{" + written(inner) + "}")), ("id", 1)]) + "}"
    of = policy(
        "id: {from: id, type: int}, a: {from: a, type: int, optional: true}, d: {from: f.d, type: int, optional: true}"
    )
    names, below = ([json.loads(f'"{name}"') for name, _ in pairs] for pairs in (members, inner))
    twice = names.count("a") > 1 or below.count("d") > 1
    answer = of.minimize(body.encode())
    if twice and not isinstance(answer, Unmet):  # what is unmet is refused anyway
        assert isinstance(answer, Unreadable)
    if not twice:
        assert not isinstance(answer, Unreadable), answer


class Written(str):
    __slots__ = ()


# ── what is dropped ────────────────────────────────────────────────────────────────────────────────


def test_names_that_are_not_declared_are_told_if_they_are_names() -> None:
    of = policy("id: {from: id, type: int}, city: {from: address.city, type: code, pattern: '[a-z]+', optional: true}")
    body = {
        "id": 1,
        "address": {"street": 1},
        "diagnosis": 2,
        "x-y.z": 3,
        "Mrs Smith": 4,
        "ünï": 5,
        "": 6,
        "a" * 65: 7,
        "1a": 8,
    }
    assert accepted(of.minimize(json.dumps(body).encode())).dropped == ("diagnosis", "x-y.z", "?", "?", "?", "?", "?")


def test_of_many_names_the_first_fifty_are_told() -> None:
    of = policy("id: {from: id, type: int}")
    body = json.dumps({"id": 1, **{f"n{number}": 0 for number in range(1000)}}).encode()
    for _ in range(2):
        dropped = accepted(of.minimize(body)).dropped
        assert dropped == tuple(f"n{number}" for number in range(50)) + ("?",) * 50


def test_what_is_remembered_of_names_is_bounded() -> None:
    of = policy("id: {from: id, type: int}")
    for number in range(2000):
        of.minimize(b'{"id": 1, "n%d": 0, "Mrs Smith": 1}' % number)
        of.minimize(b'{"id": 1, "n%d": 0}' % number)
    assert "Smith" not in repr(vars(of._policies[0]._dropped))
    assert len(of._policies[0]._dropped._told) <= 256


def test_what_is_not_declared_never_becomes_a_value(both: Policies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the short way nor when a duplicate is suspected: no str with the canary in it is left or was made."""
    canary = "CANARY-7f3a"
    body = json.dumps({**json.loads(BODIES[0]), "notes": canary, "x": {"state": canary, canary: [canary]}}).encode()
    seen: list[str] = []

    def watch(frame: object, event: str, argument: object) -> object:
        values = [argument, *getattr(frame, "f_locals", {}).values()]
        seen.extend(str(value)[:200] for value in values if isinstance(value, str) and canary in value)
        return watch

    sys.settrace(watch)  # type: ignore[arg-type]
    try:
        found = accepted(both.minimize(body))
    finally:
        sys.settrace(None)
    assert seen == []
    assert canary not in repr(found)


# ── the types ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0", 0),
        ("-7", -7),
        ("9007199254740993", 9007199254740993),
        ("19933688932870350000", 19933688932870350000),
        ("9" * 40, int("9" * 40)),
    ],
)
def test_integers_are_exact(given: str, expected: int) -> None:
    assert kept("type: int", given) == expected
    document = accepted(minimized(policy("it: {from: it, type: int}"), given)).document
    assert json.loads(document)["it"] == expected


@pytest.mark.parametrize("given", ["9" * 41, "9" * 5000, "1.0", "1e3", '"1"', "true", "[]", "1" + "0" * 400])
def test_what_is_no_exact_integer_is_never_another_number(given: str) -> None:
    assert isinstance(kept("type: int", given), Unmet)


def test_integers_keep_their_bounds() -> None:
    assert [isinstance(kept("type: int, min: 2, max: 4", str(n)), int) for n in range(1, 6)] == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("42.50", "42.50"),
        ('"42.50"', "42.50"),
        ('"\\u0034\\u0032.50"', "42.50"),
        ("8625.0", "8625.0"),
        ("0.1", "0.1"),
        ("-0", "0"),
        ("-0.00", "0.00"),
        ("-0.01", "-0.01"),
        ("1E+2", "100"),
        ("12.5e-1", "1.25"),
        ("1e-05", "0.00001"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("1e39", "1" + "0" * 39),
        ("9" * 40, "9" * 40),
        ("-" + "9" * 20 + "." + "9" * 20, "-" + "9" * 20 + "." + "9" * 20),
    ],
)
def test_decimals_are_kept_as_they_were_written_in_plain_notation(given: str, expected: str) -> None:
    assert kept("type: decimal", given) == expected


@pytest.mark.parametrize(
    "given",
    [
        "1e200000", '"1e200000"', "1e-200000", "1e40", "9" * 41, "9" * 100_000, '"NaN"', '"Infinity"', '"-inf"', '"sNaN"',
        '""', '" 1"', '"1 "', '"+1"', '"1,5"', '"1_000"', '"0x10"', '"١"', '"007"', '".5"', '"5."', '"1\\u0000"', '"\\n1"',
        "true", "[]", "{}", "[1]", '"1e"', '"--1"', '"1e99999999999999999999"',
    ],
)  # fmt: skip
def test_what_is_no_bounded_decimal_is_unmet(given: str) -> None:
    assert isinstance(kept("type: decimal", given), Unmet)


def test_decimals_are_rounded_half_up_as_people_do() -> None:
    given = {"8.25": "8.3", "8.35": "8.4", "-8.25": "-8.3", "5": "5.0", "-0.04": "0.0", "9.96": "10.0", "1e2": "100.0"}
    assert {number: kept("type: decimal, round: 1", number) for number in given} == given
    assert kept("type: decimal, round: 0", "2.5") == "3"
    assert isinstance(kept("type: decimal, round: 2", "9" * 40), Unmet)


def test_each_raw_value_of_an_enum_is_itself() -> None:
    numbers, truths = "type: enum, of: {1: one, '1': text}", "type: enum, of: {true: open, 'true': text}"
    assert [kept(numbers, raw) for raw in ("1", '"1"')] == ["one", "text"]
    assert [kept(truths, raw) for raw in ("true", '"true"')] == ["open", "text"]
    assert [kept("type: enum, of: [a, 2, false]", raw) for raw in ('"a"', "2", "false")] == ["a", 2, False]
    for field, raw in ((numbers, "true"), (truths, "1"), (numbers, "1.0"), (numbers, "[]"), (numbers, '"one"')):
        assert isinstance(kept(field, raw), Unmet)


def test_a_uuid_is_kept_in_lower_case() -> None:
    assert kept("type: uuid", '"0190A3F2-7B1C-7D3E-8F4A-5B6C7D8E9F00"') == "0190a3f2-7b1c-7d3e-8f4a-5b6c7d8e9f00"
    for raw in ('"0190a3f27b1c7d3e8f4a5b6c7d8e9f00"', '"{0190a3f2-7b1c-7d3e-8f4a-5b6c7d8e9f00}"', '"x"', "1"):
        assert isinstance(kept("type: uuid", raw), Unmet)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("2026-11-23 05:34:57.955067", "2026-11-23T05:34:57.955067Z"),
        ("2026-11-23 05:34:57", "2026-11-23T05:34:57Z"),
        ("2026-11-23T05:34:57", "2026-11-23T05:34:57Z"),
        ("2026-11-23T05:34:57Z", "2026-11-23T05:34:57Z"),
        ("2026-11-23t05:34:57z", "2026-11-23T05:34:57Z"),
        ("2025-12-15T16:55:37.20373-05:00", "2025-12-15T21:55:37.20373Z"),
        ("2025-12-15T16:55:37.2037300-05:00", "2025-12-15T21:55:37.20373Z"),
        ("2025-12-15T21:55:37.2037300Z", "2025-12-15T21:55:37.20373Z"),
        ("2025-12-15T21:55:37.1234567Z", "2025-12-15T21:55:37.1234567Z"),
        ("2025-12-15T21:55:37.1234567894Z", "2025-12-15T21:55:37.123456789Z"),
        ("2025-12-15T21:55:37.000Z", "2025-12-15T21:55:37Z"),
        ("2026-07-14T12:00:00.000+02:00", "2026-07-14T10:00:00Z"),
        ("2026-07-14T12:00:00+0530", "2026-07-14T06:30:00Z"),
        ("2026-03-01T00:30:00+01:00", "2026-02-28T23:30:00Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
    ],
)
def test_a_timestamp_is_kept_as_one_text_for_one_instant(raw: str, expected: str) -> None:
    assert kept("type: timestamp", json.dumps(raw)) == expected
    assert kept("type: timestamp", json.dumps(expected)) == expected


@pytest.mark.parametrize(
    "raw",
    [
        "", "now", "2026-11-23", "20261123T053457Z", "2026-W47-1T05:34:57Z", "2026-11-23T24:00:00Z", "2026-02-30T00:00:00Z",
        "2026-11-23T05:34Z", "2026-11-23T05:34:57,5Z", "2026-11-23T05:34:57.Z", "2026-11-23T05:34:57+24:00", "2026-11-23T05:34:57+01",
        " 2026-11-23T05:34:57Z", "2026-11-23T05:34:57Z\n", "٢٠٢٦-11-23T05:34:57Z", "0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00",
        "2026-11-23T05:34:57." + "1" * 5000 + "Z", "2026-11-23\u00a005:34:57", "2026-11-23T05:34:57 Mrs Smith",
    ],
)  # fmt: skip
def test_what_is_no_timestamp_is_unmet(raw: str) -> None:
    assert isinstance(kept("type: timestamp", json.dumps(raw)), Unmet)


@given(at=st.datetimes(), offset=st.integers(-14 * 60, 14 * 60), digits=st.integers(6, 9))
@settings(max_examples=300, deadline=None)
def test_every_way_of_writing_an_instant_is_kept_as_one_text(at: datetime, offset: int, digits: int) -> None:
    of = POLICY_OF_TIMESTAMP
    try:
        local = at + timedelta(minutes=offset)
    except OverflowError:
        return
    sign, minutes = ("+", offset) if offset >= 0 else ("-", -offset)
    padding = "0" * (digits - 6)
    fraction = f"{at.microsecond:06d}{padding}"
    ways = [
        f"{local:%H:%M:%S}.{fraction}{sign}{minutes // 60:02d}:{minutes % 60:02d}",
        f"{at:%H:%M:%S}.{fraction}Z",
    ]
    days = [local.date().isoformat(), at.date().isoformat()]
    found = [accepted(minimized(of, json.dumps(f"{day}T{clock}"))) for day, clock in zip(days, ways, strict=True)]
    assert found[0].data == found[1].data
    assert found[0].time == found[1].time
    assert found[0].time is not None
    assert found[0].time.replace(tzinfo=None) == at


POLICY_OF_TIMESTAMP = policy("it: {from: it, type: timestamp}", time='"{it}"')


def test_a_date_stays_on_its_day() -> None:
    assert kept("type: date", '"2026-07-14"') == "2026-07-14"
    for raw in (
        '"2026-07-14T00:00:00Z"',
        '"2026-02-30"',
        '"20260714"',
        '"2026-W01-1"',
        "20260714",
        '"2026-07-14\\n"',
    ):
        assert isinstance(kept("type: date", raw), Unmet)


def test_a_code_is_what_its_pattern_describes_from_end_to_end() -> None:
    field = "type: code, pattern: '[A-Z]{2}-[0-9]{1,6}', max_length: 6"
    assert kept(field, '"FR-12"') == "FR-12"
    for raw in ('"FR-12\\n"', '"xFR-12"', '"FR-12x"', '"FR-1234"', '"FR-\\u0661"', '""', "12", '" FR-12"'):
        assert isinstance(kept(field, raw), Unmet)


@pytest.mark.parametrize(
    "field", ["int", "decimal", "bool", "uuid", "timestamp", "date", "enum, of: [a]", "code, pattern: '[^ @]+'"]
)
@pytest.mark.parametrize(
    "evil", ["\\u0000", "a\\u0000", "\\ud800", "\\udfff\\ud800", "\\u0007", "\\u2028", "\\u00a0", "\\u202e"]
)
def test_no_type_lets_nul_surrogates_or_control_characters_through(field: str, evil: str) -> None:
    for raw in (f'"{evil}"', f'["{evil}"]'):
        many = raw.startswith("[")
        kind, comma, rest = field.partition(",")
        answer = kept_or_refused(f"type: {f'[{kind}]' if many else kind}{comma}{rest}", raw)
        assert isinstance(answer, Unmet | Unreadable), answer


def kept_or_refused(field: str, raw: str) -> object:
    try:
        return kept(field, raw)
    except ConfigurationError:
        return Unmet("such a pattern is refused when it is loaded")


def test_a_pseudonym_is_stable_inside_its_domain_and_says_nothing() -> None:
    staff, again, guests, words = (
        kept(f"type: int, token: {domain}", "7") for domain in ("staff", "staff", "guests", "words")
    )
    assert staff == again
    assert len({staff, guests, words}) == 3
    assert isinstance(staff, str)
    assert len(staff) == len("t1.") + 26
    assert set(staff.removeprefix("t1.")) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
    assert kept("type: int, token: staff", "8") != staff
    assert kept("type: code, pattern: '[0-9]', token: staff", '"7"') == staff  # the same person, however it is written
    assert kept("type: [int], token: staff", "[7, 7]") == [staff, staff]
    assert kept("type: int, token: staff, optional: true", "null") is None


def test_a_pseudonym_hangs_on_the_key_and_on_nothing_else() -> None:
    """It is on disk: a new release must make the same ones."""
    assert kept("type: int, token: staff", "7") == "t1.HPFLQYPIFBON7TYXOZLXU4HLJT"
    config = configured(
        policies="only: {version: 1, purpose: a test, type: a.b, keep: {it: {from: it, type: int, token: staff}}}\n"
    )
    other = Policies([config.policies["only"]], key=b"another-key-of-32-bytes-00000000")
    assert accepted(minimized(other, "7")).data != {"it": kept("type: int, token: staff", "7")}


# ── less than what was posted ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("second", "2026-07-14T21:34:57Z"),
        ("minute", "2026-07-14T21:34:00Z"),
        ("hour", "2026-07-14T21:00:00Z"),
        ("day", "2026-07-14T00:00:00Z"),
        ("month", "2026-07-01T00:00:00Z"),
        ("year", "2026-01-01T00:00:00Z"),
    ],
)
def test_of_a_truncated_moment_only_its_beginning_in_utc_is_kept(unit: str, expected: str) -> None:
    field = f"type: timestamp, truncate: {unit}"
    assert kept(field, '"2026-07-14T23:34:57.955067+02:00"') == expected
    assert (
        kept(f"type: [timestamp], truncate: {unit}", '["2026-07-14 21:34:57", "2026-07-14T21:34:57.5Z"]')
        == [expected] * 2
    )
    found = minimized(policy(f"it: {{from: it, {field}}}", time='"{it}"'), '"2026-07-14 21:34:57"')
    assert accepted(found).time == datetime.fromisoformat(expected)
    assert isinstance(kept(field, '"2026-07"'), Unmet)


def test_of_a_truncated_date_only_its_month_or_year_is_kept() -> None:
    assert kept("type: date, truncate: month", '"1980-07-14"') == "1980-07-01"
    assert kept("type: date, truncate: year", '"1980-07-14"') == "1980-01-01"
    assert isinstance(kept("type: date, truncate: year", '"1980"'), Unmet)
    assert kept("type: date, truncate: year, optional: true", "null") is None


def test_of_a_number_only_the_edge_of_its_bucket_is_kept() -> None:
    field = "type: int, bucket: [0, 18, 65]"
    assert [kept(field, n) for n in ("0", "17", "18", "64", "65", "999999999999999999999")] == [0, 0, 18, 18, 65, 65]
    assert kept(field, "-1") == Unmet("it must be an integer, and at least 0")
    assert kept("type: [int], bucket: [0, 18]", "[3, 18, 30]") == [0, 18, 18]
    decimals = "type: decimal, bucket: [-5, 36.5, 38]"
    assert [kept(decimals, n) for n in ("-5", "36.4999999999999999999", "36.50", '"38"', "1e30")] == [
        "-5",
        "-5",
        "36.5",
        "38",
        "38",
    ]
    assert isinstance(kept(decimals, "-5.0000000000000000000000000001"), Unmet)
    assert kept("type: int, bucket: [0], optional: true", "false") is None


def test_of_a_value_that_is_looked_up_only_the_policys_word_is_kept() -> None:
    field = "type: int, lookup: {101: surgery, 102: surgery, 201: 7}"
    assert [kept(field, n) for n in ("101", "102", "201")] == ["surgery", "surgery", 7]
    assert kept(field, "103") == Unmet("it must be an integer that the policy names")
    assert kept(f"{field}, otherwise: other", "103") == "other"
    assert isinstance(kept(f"{field}, otherwise: other", '"CANARY"'), Unmet)
    assert kept(f"{field}, otherwise: other, optional: true", "null") is None
    code = "type: code, pattern: '[A-Z][0-9]{2}', lookup: {C50: oncology}, otherwise: false"
    assert [kept(code, raw) for raw in ('"C50"', '"J11"')] == ["oncology", False]
    identity = "0190a3f2-7b1c-7d3e-8f4a-5b6c7d8e9f00"
    assert kept(f"type: [uuid], lookup: {{{identity}: main}}", f'["{identity.upper()}"]') == ["main"]


def test_a_constant_is_kept_whatever_was_posted() -> None:
    of = policy("system: {const: erp}, id: {from: id, type: int}", type="orders.{system}", subject='"{system}/{id}"')
    found = accepted(of.minimize(b'{"id": 1, "system": "CANARY"}'))
    assert found.data == {"system": "erp", "id": 1}
    assert (found.type, found.subject, found.dropped) == ("orders.erp", "erp/1", ("system",))
    assert accepted(policy("yes: {const: true}").minimize(b"{}")).data == {"yes": True}


# ── whatever comes ─────────────────────────────────────────────────────────────────────────────────


BOTH = policies(PURCHASES_AND_ALERTS)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(body=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise(body: bytes) -> None:
    assert isinstance(BOTH.minimize(body), Unreadable | Unmet)


@given(
    changes=st.dictionaries(
        st.sampled_from(
            ["_id", "_model", "state", "amount_total", "user_id", "write_date", "company_id", "order_line", "x"]
        ),
        ANYTHING,
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_no_values_raise_and_what_is_kept_is_always_storable(changes: dict[str, object]) -> None:
    match BOTH.minimize(order(**changes)):
        case Minimized() as found:
            assert "\0" not in found.document
            found.document.encode()
            assert msgspec.json.decode(found.document) == found.data
            assert len(found.document) <= 8192
        case Unmet(reason) | Unreadable(reason):
            assert reason.isprintable()
