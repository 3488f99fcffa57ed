"""When to ask again, and what an outcome means for its delivery."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.event import Blocked, Delivered, Duplicate, Outcome, Pending, Refused, Retry, Unknown
from outbox.retry import LONGEST_WISH, Decision, Schedule, Verdict, decide, wait_for

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
SCHEDULE = Schedule(first=2 * SECOND, cap=timedelta(hours=1), give_up=timedelta(hours=72))


def judged(
    outcome: Outcome,
    *,
    tries: int = 1,
    now: datetime = NOW,
    deadline: datetime = NOW + timedelta(hours=72),
    keeps: bool = True,
) -> Decision:
    return decide(
        outcome, schedule=SCHEDULE, tries=tries, now=now, deadline=deadline, repeatable=keeps, random=lambda: 0.5
    )  # fmt: skip


@pytest.mark.parametrize("outcome", [Delivered(), Duplicate(receipt="there")])
def test_what_the_partner_has_is_delivered(outcome: Outcome) -> None:
    assert judged(outcome).verdict == Verdict.DELIVERED


def test_a_refusal_is_never_asked_again() -> None:
    assert judged(Refused("no")).verdict == Verdict.DEAD


def test_waits_double_up_to_the_cap_and_are_spread_over_their_whole_length() -> None:
    longest = [wait_for(SCHEDULE, tries=n, asked=None, random=lambda: 1.0) for n in range(1, 15)]
    assert longest[:4] == [2 * SECOND, 4 * SECOND, 8 * SECOND, 16 * SECOND]
    assert longest[-1] == SCHEDULE.cap
    assert wait_for(SCHEDULE, tries=5, asked=None, random=lambda: 0.0) == timedelta(0)


@given(tries=st.integers(0, 10**6), share=st.floats(0, 1), asked=st.none() | st.timedeltas())
def test_a_wait_is_never_negative_and_never_beyond_what_is_honoured(
    tries: int, share: float, asked: timedelta | None
) -> None:
    wait = wait_for(SCHEDULE, tries=tries, asked=asked, random=lambda: share)
    assert timedelta(0) <= wait <= (SCHEDULE.cap if asked is None else LONGEST_WISH + SCHEDULE.first)


def test_what_the_partner_asks_for_is_the_least_that_is_waited() -> None:
    assert judged(Retry("busy", after=30 * SECOND)).delay == 31 * SECOND


def test_the_deadline_is_judged_only_after_an_attempt_has_failed() -> None:
    past = NOW - timedelta(days=30)
    assert judged(Retry("busy"), deadline=past).verdict == Verdict.DEAD
    assert judged(Delivered(), deadline=past).verdict == Verdict.DELIVERED


def test_the_last_try_is_made_at_the_deadline_and_not_after_it() -> None:
    assert judged(Retry("busy"), tries=12, deadline=NOW + 10 * SECOND).delay == 10 * SECOND


def test_what_may_have_happened_is_repeated_only_where_the_partner_keeps_keys() -> None:
    assert judged(Unknown("cut"), keeps=True).verdict == Verdict.LATER
    assert judged(Unknown("cut"), keeps=False).verdict == Verdict.DEAD


def test_a_partner_that_is_away_or_blocked_costs_a_delivery_none_of_its_tries() -> None:
    assert judged(Retry("away", whole_destination=True)).spared
    assert judged(Blocked("credentials: 401")).spared
    assert not judged(Retry("busy")).spared


def test_a_blocked_delivery_is_never_given_up_for_it() -> None:
    assert judged(Blocked("credentials: 401"), deadline=NOW - SECOND).verdict == Verdict.LATER


def test_what_is_taken_and_not_finished_is_asked_for_at_its_time() -> None:
    decision = judged(Pending(receipt="job-1", until=NOW + 90 * SECOND))
    assert (decision.verdict, decision.delay) == (Verdict.LATER, 90 * SECOND)
