"""Identities are UUIDs of version 7 that only grow."""

from itertools import chain, pairwise, repeat
from uuid import RFC_4122

from outbox.clock import Identities, instant_of

NOW = 1795413918.25


def test_identities_only_grow_whatever_the_clock_does() -> None:
    """More in one millisecond than its counter counts, then a clock that goes back, then one that goes on."""
    clock = chain(repeat(NOW, 10_000), repeat(NOW - 3600, 10_000), repeat(NOW + 1, 10))
    identities = Identities(lambda: next(clock))
    made = [identities.next() for _ in range(20_010)]
    assert all(one.version == 7 and one.variant == RFC_4122 for one in made)
    assert all(one.int >> 64 < other.int >> 64 for one, other in pairwise(made))
    assert len({one.int & 2**62 - 1 for one in made}) == len(made)
    assert [instant_of(one).timestamp() for one in (made[0], made[4095], made[4096], made[-1])] == [
        NOW, NOW, NOW + 0.001, NOW + 1,
    ]  # fmt: skip
