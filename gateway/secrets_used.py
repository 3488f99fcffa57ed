"""Which secrets of the sources verify what is posted, and which do not any more, so that these can be retired."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from dead_letter.letters import Instant
from gateway.config import Config
from gateway.config_sections import Proof
from observability.metrics import Metrics
from outbox.database import Database
from outbox.secret_uses import Origin, SecretUses


class SecretsUsed:
    """The door's memory of it, written down once a minute at most: no request writes anything."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._uses = SecretUses(database)
        self._metrics = metrics
        self._used: dict[Origin, datetime] = {}

    def note(self, source: str, origin: str, at: datetime) -> None:
        self._used[source, origin] = at

    async def flush(self) -> None:
        """Write it down; what cannot be written now is kept for the next time."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await self._uses.write(used)
        except BaseException:
            self._used = used | self._used
            raise

    async def report(self, config: Config) -> None:
        """What this door and the others have seen, of the secrets that there are."""
        await self.flush()
        lines = secret_lines(config, await self._uses.all())
        self._metrics.secret_last_used.report(
            {(line.source, line.secret): line.last_used.timestamp() for line in lines if line.last_used}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretLine:
    """One of the secrets of a source, by where it comes from, and when it last verified something."""

    source: str
    secret: str
    last_used: Instant | None
    not_before: Instant | None
    not_after: Instant | None


def secret_lines(config: Config, uses: Mapping[Origin, datetime]) -> list[SecretLine]:
    """In the order of the file."""
    return [
        SecretLine(
            source=source.name,
            secret=proof.origin,
            last_used=uses.get((source.name, proof.origin)),
            not_before=proof.not_before,
            not_after=proof.not_after,
        )
        for source in config.sources.values()
        for proof in source.proofs
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to tell of the secrets of a source that has several."""

    source: str
    says: str
    doubtful: bool  # one of them can go


def advice(config: Config, uses: Mapping[Origin, datetime], now: datetime) -> Iterator[Advice]:
    """Of every source whose secrets are being rotated: which of them verify, and which can be taken out."""
    for source in config.sources.values():
        if len(source.proofs) < 2:
            continue
        told = [_told(proof, uses.get((source.name, proof.origin)), now) for proof in source.proofs]
        over = [proof.origin for proof in source.proofs if proof.not_after is not None and proof.not_after <= now]
        says = ", ".join(told)
        if over:
            says += f"; take {' and '.join(over)} out of the file"
        yield Advice(source=source.name, says=says, doubtful=bool(over))


def _told(proof: Proof, last: datetime | None, now: datetime) -> str:
    verified = f"verified last at {last:%Y-%m-%d %H:%MZ}" if last else "has verified nothing yet"
    if proof.not_after is not None and proof.not_after <= now:
        return f"{proof.origin} {verified}, and counts no more"
    if proof.not_before is not None and now < proof.not_before:
        return f"{proof.origin} counts from {proof.not_before:%Y-%m-%d %H:%MZ} on"
    return f"{proof.origin} {verified}"
