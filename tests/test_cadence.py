"""When something is overdue: only hours in which it is expected count, on the wall of the place where it is expected."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.cadence import Cadence

HOUR = timedelta(hours=1)
BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> datetime:
    """A time on the wall in Berlin, such as `11-24 06:00`; `06:00*` is the second of two."""
    wall = datetime.fromisoformat("2026-" + text.rstrip("*"))
    return wall.replace(tzinfo=BERLIN, fold=int(text.endswith("*"))).astimezone(UTC)


def cadence(window: str = "", every: timedelta = HOUR, days: str = "0123456") -> Cadence:
    opens, _, closes = window.partition("-")
    return Cadence(
        every=every,
        zone=BERLIN,
        opens=time.fromisoformat(opens) if window else None,
        closes=time.fromisoformat(closes) if window else None,
        days=frozenset(map(int, days)),
    )


@pytest.mark.parametrize(
    ("expected", "heard", "overdue"),
    [
        pytest.param(cadence(), "11-24 03:10", "11-24 04:10", id="always open"),
        pytest.param(cadence(), "11-24 23:30", "11-25 00:30", id="always open, over midnight"),
        pytest.param(cadence("06:00-20:00"), "11-24 08:15", "11-24 09:15", id="inside the window"),
        pytest.param(cadence("06:00-20:00"), "11-24 19:40", "11-25 06:40", id="the night does not count"),
        pytest.param(cadence("06:00-20:00"), "11-24 22:00", "11-25 07:00", id="heard in the night"),
        pytest.param(cadence("06:00-20:00"), "11-24 19:00", "11-24 20:00", id="to the minute at which it closes"),
        pytest.param(cadence("22:00-06:00"), "11-24 23:30", "11-25 00:30", id="a window over midnight"),
        pytest.param(cadence("22:00-06:00"), "11-25 05:40", "11-25 22:40", id="a window over midnight, the day between"),
        pytest.param(cadence("08:00-00:00"), "11-24 23:30", "11-25 08:30", id="to midnight"),
        pytest.param(cadence("08:00-10:00", 5 * HOUR), "11-24 07:00", "11-26 09:00", id="longer than one window"),
        pytest.param(cadence("06:00-20:00", days="01234"), "11-27 19:30", "11-30 06:30", id="no weekends"),
        pytest.param(cadence("22:00-06:00", days="4"), "11-28 05:30", "12-04 22:30", id="a night belongs to its evening"),
        pytest.param(cadence(), "03-29 01:30", "03-29 03:30", id="spring: an hour is missing"),
        pytest.param(cadence("01:00-05:00", 3 * HOUR), "03-29 00:30", "03-29 05:00", id="spring: a window is an hour shorter"),
        pytest.param(cadence("02:10-02:50"), "03-28 02:00", "03-30 02:30", id="spring: a window that does not exist"),
        pytest.param(cadence(every=2 * HOUR), "10-25 01:30", "10-25 02:30*", id="autumn: an hour comes twice"),
        pytest.param(cadence("01:00-03:00", 3 * HOUR), "10-25 00:30", "10-25 03:00", id="autumn: a window is an hour longer"),
        pytest.param(cadence("06:00-20:00"), "03-28 19:30", "03-29 06:30", id="the night in which clocks change"),
    ],
)  # fmt: skip
def test_it_is_overdue_once_so_much_open_time_has_passed(expected: Cadence, heard: str, overdue: str) -> None:
    since = at(overdue)
    assert expected.overdue(at(heard), since) == since
    assert expected.overdue(at(heard), since + 40 * 24 * HOUR) == since
    assert expected.overdue(at(heard), since - timedelta(seconds=1)) is None


MINUTES = st.integers(0, 24 * 60 - 1).map(lambda minute: time(minute // 60, minute % 60))
INSTANTS = st.integers(0, 366 * 24 * 60).map(
    lambda minute: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)
)


@settings(max_examples=50, deadline=None)
@given(opens=MINUTES, closes=MINUTES, heard=INSTANTS, minutes=st.integers(1, 600))
def test_it_is_never_overdue_sooner_than_every_and_only_in_its_window(
    opens: time, closes: time, heard: datetime, minutes: int
) -> None:
    every = timedelta(minutes=minutes)
    expected = Cadence(every=every, zone=BERLIN, opens=opens, closes=closes)
    since = expected.overdue(heard, heard + timedelta(days=3))
    if since is None:
        return
    assert since - heard >= every
    wall = since.astimezone(BERLIN).time()
    if opens < closes:
        assert opens <= wall <= closes
    elif opens > closes:
        assert wall >= opens or wall <= closes
