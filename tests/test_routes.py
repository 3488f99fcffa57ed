"""Which events go where: every route that matches applies, and one destination gets one delivery."""

from datetime import timedelta
from textwrap import dedent

import pytest

from gateway.routes import Owed, Routes
from tests.door import routes

KEEP = (
    "amount: {from: amount, type: decimal, optional: true}, count: {from: count, type: int, optional: true}, "
    "status: {from: status, type: enum, of: [draft, sent, paid], optional: true}, "
    "urgent: {from: urgent, type: bool, optional: true}, changed: {from: changed, type: timestamp, optional: true}, "
    "day: {from: day, type: date, optional: true}, code: {from: code, type: code, pattern: '[0-9.A-Z-]+', optional: true}"
)
HOURS = timedelta(hours=1)


def of(text: str) -> Routes:
    return routes(dedent(text), keep=KEEP, to=("ledger", "slack", "mail"))


def reached(
    by: Routes, *, source: str = "odoo", of_type: str = "order.paid", facility: str | None = "north", **kept: object
) -> list[str]:
    return [owed.destination for owed in by.choose(source=source, type=of_type, facility=facility, data=kept)]


def holds(condition: str, **kept: object) -> bool:
    """Whether a condition on the one field in `kept` holds."""
    by = of(f"only: {{when: {{data: {{{next(iter(kept))}: {condition}}}}}, to: [ledger]}}\n")
    return bool(by.choose(source="odoo", type="order.paid", facility=None, data=kept))


def test_a_route_without_conditions_takes_every_event() -> None:
    assert reached(of("all: {to: [ledger, mail]}\n"), of_type="whatever", facility=None) == ["ledger", "mail"]


def test_an_event_that_no_route_takes_goes_nowhere() -> None:
    assert reached(of("labs: {when: {source: lab}, to: [ledger]}\n")) == []


def test_all_that_a_route_asks_for_must_hold() -> None:
    by = of("only: {when: {source: [odoo], type: order.paid, facility: north, data: {count: 1}}, to: [ledger]}\n")
    assert reached(by, count=1) == ["ledger"]
    assert reached(by, count=2) == []
    assert reached(by, count=1, source="lab") == []
    assert reached(by, count=1, of_type="order.sent") == []
    assert reached(by, count=1, facility="south") == []
    assert reached(by, count=1, facility=None) == []


@pytest.mark.parametrize(
    ("wanted", "type_", "taken"),
    [
        ("order.paid", "order.paid", True),
        ("order.paid", "order.paid.late", False),
        ("order.paid", "order.paidx", False),
        ("order.*", "order.paid", True),
        ("order.*", "order.paid.late", True),
        ("order.*", "order", False),
        ("order.*", "orders.paid", False),
        ("order.paid.*", "order.paid.late", True),
    ],
)
def test_a_trailing_star_takes_everything_below(wanted: str, type_: str, taken: bool) -> None:
    assert (reached(of(f'only: {{when: {{type: "{wanted}"}}, to: [ledger]}}\n'), of_type=type_) == ["ledger"]) is taken


def test_a_list_means_any_of_these() -> None:
    by = of(
        "only: {when: {source: [odoo, lab], type: [order.paid, order.sent.*], facility: [south, north]}, to: [ledger]}\n"
    )
    assert reached(by, source="lab", of_type="order.sent.late", facility="south") == ["ledger"]
    assert reached(by, of_type="order.sent") == []


def test_two_routes_to_one_destination_are_one_delivery_in_order_if_any_asks_for_it() -> None:
    by = of(
        """\
        first: {to: [ledger, mail], give_up: 2h}
        second: {to: [slack, ledger], order: subject, give_up: 3h}
        """
    )
    assert by.choose(source="odoo", type="order.paid", facility=None, data={}) == (
        Owed("ledger", ordered=True, give_up=2 * HOURS),
        Owed("mail", ordered=False, give_up=2 * HOURS),
        Owed("slack", ordered=True, give_up=3 * HOURS),
    )


def test_a_route_that_says_no_give_up_means_the_destinations_own() -> None:
    def give_up(text: str) -> timedelta | None:
        (owed,) = of(text).choose(source="odoo", type="order.paid", facility=None, data={})
        return owed.give_up

    assert give_up("silent: {to: [ledger]}\n") is None
    assert give_up("long: {to: [ledger], give_up: 100h}\n") == 100 * HOURS
    assert give_up("long: {to: [ledger], give_up: 100h}\nsilent: {to: [ledger]}\n") == 72 * HOURS
    assert give_up("short: {to: [ledger], give_up: 1h}\nsilent: {to: [ledger]}\n") == 1 * HOURS


@pytest.mark.parametrize(
    ("condition", "amount", "holding"),
    [
        ("{gte: 5000}", "5000", True),
        ("{gte: 5000}", "5000.00", True),
        ("{gte: 5000}", "4999.99", False),
        ("{gte: 5000}", "10000", True),  # as text it would be less
        ("{gt: 9}", "10.0", True),
        ("{lt: 0.3}", "0.30000000000000004", False),
        ("{gte: 0.1}", "0.1", True),
        ("{gte: 0.1}", "0.1000000000000000055511151231257827021181583404541015625"[:42], True),
        ("{gt: 0.1}", "0.1", False),
        ("{lte: -1.5}", "-1.50", True),
        ("42.5", "42.50", True),
        ("[1, 42.5]", "42.500", True),
        ("{not: 42.5}", "42.50", False),
        ("{gte: 1, lt: 2}", "2.0", False),
        ("{gte: 1, lt: 2}", "1.9999999999999999999999999999999999999", True),
        ("{gte: 9007199254740993}", "9007199254740992.9", False),
    ],
)
def test_decimals_are_compared_as_decimals(condition: str, amount: str, holding: bool) -> None:
    assert holds(condition, amount=amount) is holding


@pytest.mark.parametrize(
    ("condition", "changed", "holding"),
    [
        ("{gte: '2026-11-23T12:00:00Z'}", "2026-11-23T12:00:00Z", True),
        ("{gt: '2026-11-23T12:00:00Z'}", "2026-11-23T12:00:00Z", False),
        ("{gt: '2026-11-23T12:00:00Z'}", "2026-11-23T12:00:00.000000001Z", True),
        ("{lt: '2026-11-23T12:00:00.5Z'}", "2026-11-23T12:00:00.25Z", True),
        ("{gte: '2026-11-23T13:00:00+01:00'}", "2026-11-23T12:00:00Z", True),
        ("{gt: '2026-11-23T13:00:00+01:00'}", "2026-11-23T12:00:00Z", False),
        ("'2026-11-23T13:00:00.000+01:00'", "2026-11-23T12:00:00Z", True),
        ("{not: '2026-11-23T13:00:00.000+01:00'}", "2026-11-23T12:00:00Z", False),
    ],
)
def test_timestamps_are_compared_as_instants(condition: str, changed: str, holding: bool) -> None:
    assert holds(condition, changed=changed) is holding


def test_days_are_compared_as_days() -> None:
    assert holds("{gte: '2026-11-23'}", day="2026-11-23")
    assert not holds("{gt: '2026-11-23'}", day="2026-11-23")
    assert holds("'2026-11-23'", day="2026-11-23")


def test_numbers_texts_and_truths_are_not_mistaken_for_each_other() -> None:
    assert holds("true", urgent=True)
    assert not holds("true", urgent=False)
    assert not holds("1", count=True)
    assert holds("'1.0'", code="1.0")
    assert not holds("'1.0'", code="1.00")
    assert not holds("{gte: 1}", count="NaN")
    assert not holds("{gte: 1}", count="many")
    assert not holds("{gte: 1}", count=[5])


def test_not_means_none_of_these() -> None:
    assert not holds("{not: draft}", status="draft")
    assert holds("{not: [draft, sent]}", status="paid")
    assert not holds("{not: [draft, sent]}", status="sent")
    assert holds("[draft, sent]", status="sent")


@pytest.mark.parametrize("condition", ["paid", "[paid, sent]", "{not: paid}"])
def test_of_a_field_that_is_not_there_nothing_holds(condition: str) -> None:
    """Not even `not`: which classes of data reach a destination is judged by the fields that its routes ask for."""
    assert reached(of(f"only: {{when: {{data: {{status: {condition}}}}}, to: [ledger]}}\n")) == []


def test_what_is_remembered_of_types_is_bounded_and_right() -> None:
    by = of("only: {when: {type: 'order.*', data: {count: {gte: 5}}}, to: [ledger]}\nall: {to: [mail]}\n")
    for number in range(10_000):
        expected = ["ledger", "mail"] if number % 2 else ["mail"]
        assert reached(by, of_type=f"order.n{number}", count=5 if number % 2 else 4) == expected
    assert len(by._candidates) <= 4096
