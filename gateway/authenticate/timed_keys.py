"""Several secrets of one sender, each with the time in which it counts: how secrets are rotated without a gap."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from connectors.settings import Secret
from gateway.config_sections import TimedSecret

Key = TypeVar("Key")


class TimedKeys(Generic[Key]):
    def __init__(self, secrets: Sequence[TimedSecret], key_of: Callable[[Secret], Key]) -> None:
        """`key_of` makes of a secret what verifies with it."""
        self._keys = [
            (
                key_of(timed.secret),
                timed.not_before.timestamp() if timed.not_before else float("-inf"),
                timed.not_after.timestamp() if timed.not_after else float("inf"),
            )
            for timed in secrets
        ]

    def active(self, at: float) -> list[tuple[int, Key]]:
        """The keys that count at `at`, each with its place among all."""
        return [(place, key) for place, (key, begins, ends) in enumerate(self._keys) if begins <= at < ends]
