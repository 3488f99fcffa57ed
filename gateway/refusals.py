"""What was refused at the door: counted in memory and written once a second, so that a flood of it writes next to nothing."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from observability.metrics import Metrics
from outbox.database import Database

SAMPLE = 10  # digests of bodies kept, of each source and reason, a second


@dataclass(slots=True)
class Refused:
    n: int = 0
    digests: list[UUID] = field(default_factory=list)


class Refusals:
    """Sources and reasons are names of ours, so there are only so many of them; never a body, never a header."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._refused: defaultdict[tuple[str, str], Refused] = defaultdict(Refused)
        self._dropped: defaultdict[tuple[str, str, tuple[str, ...]], int] = defaultdict(int)
        self._counts: dict[tuple[str, str], Callable[[], None]] = {}

    def refused(self, source: str, reason: str, digest: UUID | None = None) -> None:
        """`source` is empty where the caller named none of ours."""
        count = self._counts.get((source, reason))
        if count is None:
            count = self._counts[source, reason] = self._metrics.refused.labels(source, reason).inc
        count()
        refused = self._refused[source, reason]
        refused.n += 1
        if digest is not None and len(refused.digests) < SAMPLE:
            refused.digests.append(digest)

    def dropped(self, source: str, policy: str, names: tuple[str, ...]) -> None:
        """Top-level keys that no policy names: what a privacy officer wants to hear of."""
        self._dropped[source, policy, names] += 1

    async def flush(self) -> None:
        """Write what has come together; what cannot be written now is kept for the next time."""
        refused, self._refused = self._refused, defaultdict(Refused)
        dropped, self._dropped = self._dropped, defaultdict(int)
        try:
            if refused:
                await self._write_refused(refused)
                refused = defaultdict(Refused)
            if dropped:
                await self._write_dropped(dropped)
                dropped = defaultdict(int)
        finally:
            for key, kept in refused.items():
                self._refused[key].n += kept.n
                self._refused[key].digests = (kept.digests + self._refused[key].digests)[:SAMPLE]
            for names, n in dropped.items():
                self._dropped[names] += n

    async def _write_refused(self, refused: dict[tuple[str, str], Refused]) -> None:
        await self._database.execute(
            """
            INSERT INTO rejections (at, source, reason, n, digests)
            SELECT date_trunc('second', now()), source, reason, n, digests::uuid[]
              FROM unnest($1::text[], $2::text[], $3::int[], $4::text[]) AS r (source, reason, n, digests)
            """,
            [source for source, _ in refused],
            [reason for _, reason in refused],
            [r.n for r in refused.values()],
            ["{" + ",".join(map(str, r.digests)) + "}" for r in refused.values()],
        )

    async def _write_dropped(self, dropped: Mapping[tuple[str, str, tuple[str, ...]], int]) -> None:
        summed: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        for (source, policy, names), n in dropped.items():
            for name in names:
                summed[source, policy, name] += n
        await self._database.execute(
            """
            INSERT INTO dropped_keys AS d (source, policy, name, n)
            SELECT source, policy, name, n
              FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS k (source, policy, name, n)
             ORDER BY source, policy, name
                ON CONFLICT (source, policy, name)
                DO UPDATE SET n = d.n + excluded.n, last_seen = clock_timestamp()
            """,
            [source for source, _, _ in summed],
            [policy for _, policy, _ in summed],
            [name for _, _, name in summed],
            list(summed.values()),
        )
