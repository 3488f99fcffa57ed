"""How gently a destination is treated."""

from datetime import UTC, datetime, timedelta

from outbox.event import Blocked, Delivered, Outcome, Refused, Retry, Unknown
from outbox.gate import BackOff, Gate, HoldForCause
from outbox.store import Standing

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def attempt(gate: Gate, outcome: Outcome, at: datetime = NOW) -> BackOff | HoldForCause | None:
    gate.started()
    return gate.ended(outcome, at, first_wait=2 * SECOND)


def test_as_many_as_configured_go_out_at_once_and_no_more() -> None:
    gate = Gate(most=3)
    for room in (3, 2, 1):
        assert gate.room(NOW) == room
        gate.started()
    assert gate.room(NOW) == 0


def test_a_partner_that_is_busy_gets_fewer_at_once_and_recovers_little_by_little() -> None:
    gate = Gate(most=10)
    attempt(gate, Unknown("no answer"))
    assert gate.limit == 7
    attempt(gate, Retry("503", status=503))
    assert gate.limit == 4
    for _ in range(4):
        attempt(gate, Delivered())
    assert gate.limit == 6
    for _ in range(100):
        attempt(gate, Delivered())
    assert gate.limit == 10


def test_five_failures_in_a_row_open_the_breaker_and_a_success_closes_it() -> None:
    gate = Gate(most=8)
    assert [attempt(gate, Retry("500", status=500)) for _ in range(4)] == [None] * 4
    assert attempt(gate, Retry("500", status=500)) == BackOff(NOW + SECOND)
    assert (gate.room(NOW), gate.paused) == (0, True)
    later = NOW + 2 * SECOND
    assert gate.room(later) == 1, "one is sent to see"
    attempt(gate, Delivered(), later)
    assert not gate.paused


def test_a_breaker_that_stays_open_asks_less_and_less_often() -> None:
    gate = Gate(most=8)
    at, pauses = NOW, []
    for _ in range(5):
        attempt(gate, Retry("500", status=500), at)
    for _ in range(9):
        opens = gate.opens_at(at)
        assert opens is not None
        pauses.append((opens - at).total_seconds())
        at = opens
        attempt(gate, Retry("500", status=500), at)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_one_delivery_that_always_fails_does_not_stop_the_others() -> None:
    gate = Gate(most=8)
    for _ in range(50):
        attempt(gate, Retry("500", status=500))
        for _ in range(3):
            attempt(gate, Delivered())
    assert gate.room(NOW) > 0


def test_a_refusal_of_one_delivery_is_no_sign_of_a_partner_that_is_away() -> None:
    gate = Gate(most=8)
    assert [attempt(gate, Refused("400", status=400)) for _ in range(20)] == [None] * 20
    assert gate.limit == 8


def test_what_the_partner_asks_for_the_whole_of_it_is_done() -> None:
    gate = Gate(most=8)
    asked = Retry("429", after=30 * SECOND, whole_destination=True, status=429)
    assert attempt(gate, asked) == BackOff(NOW + 30 * SECOND)
    assert gate.room(NOW + 29 * SECOND) == 0
    assert gate.room(NOW + 31 * SECOND) > 0


def test_blocked_holds_only_when_a_second_try_five_seconds_later_says_the_same() -> None:
    gate = Gate(most=8)
    assert attempt(gate, Blocked("credentials: 401")) == BackOff(NOW + 5 * SECOND)
    assert attempt(gate, Blocked("credentials: 401"), NOW + SECOND) is None, "it was in flight with the first"
    held = attempt(gate, Blocked("credentials: 401"), NOW + 6 * SECOND)
    assert held == HoldForCause(NOW + 16 * SECOND, "credentials: 401")


def test_a_hold_of_the_program_ends_by_itself_and_grows_up_to_five_minutes() -> None:
    gate = Gate(most=8)
    at, holds = NOW, []
    attempt(gate, Blocked("credentials: 401"), at)
    for _ in range(8):
        at = gate.opens_at(at) or at
        held = attempt(gate, Blocked("credentials: 401"), at)
        assert isinstance(held, HoldForCause)
        holds.append((held.until - at).total_seconds())
    assert holds == [10, 20, 40, 80, 160, 300, 300, 300]
    attempt(gate, Delivered(), gate.opens_at(at) or at)
    assert isinstance(attempt(gate, Blocked("credentials: 401"), at + timedelta(hours=1)), BackOff), "it begins anew"


def test_a_hold_is_kept_to_whoever_made_it() -> None:
    gate = Gate(most=8)
    gate.stand(Standing(NOW + timedelta(days=365), "anna", None), NOW)
    assert gate.held(NOW)
    assert gate.room(NOW) == 0
    gate.stand(None, NOW)
    assert gate.room(NOW) == 8


def test_a_rate_is_kept_to() -> None:
    gate = Gate(most=1000, per_second=20)
    sent = 0
    for tick in range(10_000):  # ten seconds
        now = NOW + tick * timedelta(milliseconds=1)
        for _ in range(gate.room(now)):
            attempt(gate, Delivered(), now)
            sent += 1
    assert 195 <= sent <= 205


def test_a_share_of_the_lanes_is_a_share_of_what_may_go_out() -> None:
    gate = Gate(most=8, per_second=20)
    gate.scale(0.25)
    assert gate.limit == 2
    sent = 0
    for tick in range(4000):
        now = NOW + tick * timedelta(milliseconds=1)
        for _ in range(gate.room(now)):
            attempt(gate, Delivered(), now)
            sent += 1
    assert 18 <= sent <= 23
