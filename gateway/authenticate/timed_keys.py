"""Several secrets of one sender, each with the time in which it counts: how secrets are rotated without a gap."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from connectors.settings import Secret
from gateway.config_sections import TimedSecret

Key = TypeVar("Key")
Span = tuple[float, float]
"""From when, and until when, something counts: in Unix seconds."""
ALWAYS: Span = (float("-inf"), float("inf"))


class TimedKeys(Generic[Key]):
    def __init__(self, secrets: Sequence[TimedSecret], key_of: Callable[[Secret], Key | None]) -> None:
        """`key_of` makes of a secret what verifies with it; None if it is of another kind."""
        keys = [(place, key_of(timed.secret), span_of(timed)) for place, timed in enumerate(secrets)]
        self._keys = [(place, key) for place, key, _ in keys if key is not None]
        self._times = [span for _, key, span in keys if key is not None]
        self._always = all(time == ALWAYS for time in self._times)

    def active(self, at: float) -> Sequence[tuple[int, Key]]:
        """The keys that count at `at`, each with its place among all."""
        if self._always:
            return self._keys
        return [key for key, (begins, ends) in zip(self._keys, self._times, strict=True) if begins <= at < ends]


def span_of(timed: TimedSecret) -> Span:
    begins, ends = timed.not_before, timed.not_after
    return (begins.timestamp() if begins else ALWAYS[0], ends.timestamp() if ends else ALWAYS[1])
