"""A rate limit that lets a second's worth through at once; pure but for what it remembers."""


class TokenBucket:
    def __init__(self, *, per_second: float) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second)
        self._tokens = self._most
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """One, if there is one; `now` in seconds of a monotonic clock."""
        if self.is_empty(now):
            return False
        self._tokens -= 1
        return True

    def is_empty(self, now: float) -> bool:
        """Whether nobody could take one."""
        if self._at is not None:
            self._tokens = min(self._most, self._tokens + (now - self._at) * self._per_second)
        self._at = now
        return self._tokens < 1

    @property
    def wait(self) -> float:
        """Seconds until there is one again."""
        return max(0.0, (1 - self._tokens) / self._per_second)
