"""How often something is expected, and in which hours; pure.

Cadence(every=1 h, opens=06:00, closes=20:00)

          06:00          20:00  06:00          20:00
────────────┤██████████████├──────┤██████████████├────
                        ^ heard 19:40  ^ overdue from 06:40 on: only open hours count
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

A_DAY = timedelta(days=1)
EVERY_DAY = frozenset(range(7))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """Something at least so often, counted over the hours in which it is expected.

    `opens` and `closes` are times on the wall in `zone`, and a window that closes before it opens goes over midnight;
    without them it is always open.  `days` are those on which a window opens, Monday is 0.
    """

    every: timedelta
    zone: ZoneInfo
    opens: time | None = None
    closes: time | None = None
    days: frozenset[int] = EVERY_DAY

    def overdue(self, heard: datetime, now: datetime) -> datetime | None:
        """Since when something is overdue that was heard last then; None while it is not."""
        heard, now = heard.astimezone(UTC), now.astimezone(UTC)  # within one zone Python reckons by the wall
        left, today = self.every, now.astimezone(self.zone).date()
        day = heard.astimezone(self.zone).date() - A_DAY  # yesterday's window may reach into this day
        while day <= today:
            opens, closes = self._window(day)
            begins = max(opens, heard)
            if closes > begins:
                if begins + left <= min(closes, now):
                    return begins + left
                left -= closes - begins
            day += A_DAY
        return None

    def __str__(self) -> str:
        """In words that stay the same while it does."""
        told = f"{in_words(self.every)} {self.zone.key}"
        if self.opens is not None and self.closes is not None:
            told += f" {self.opens:%H:%M}-{self.closes:%H:%M}"
        return told if self.days == EVERY_DAY else f"{told} {''.join(map(str, sorted(self.days)))}"

    def _window(self, day: date) -> tuple[datetime, datetime]:
        """The window that opens on this day; one without length where it does not open.

        Where clocks are set back, an hour that comes twice is open twice.  A bound that falls into an hour which does
        not exist makes the window shorter, never longer: an hour outside of the window is never counted.
        """
        opens = self._instant(day, self.opens or time(0), fold=0)
        if day.weekday() not in self.days:
            return opens, opens
        closes = self.closes or time(0)
        last = day if self.opens is not None and closes > self.opens else day + A_DAY
        return opens, self._instant(last, closes, fold=1 if self.closes else 0)

    def _instant(self, day: date, at: time, *, fold: int) -> datetime:
        return datetime.combine(day, at, tzinfo=self.zone).replace(fold=fold).astimezone(UTC)


def in_words(time: timedelta) -> str:
    """As the configuration would say it: 90s, 15m, 1h."""
    seconds = round(time.total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
