"""Secrets that change while the program runs: looked at now and then, taken when they are right, and kept while they are not.

    file:PATH  every two seconds; by what it holds, so that it may be replaced, renamed over, or be a link that turns
    env:NAME   never: the environment of a process is that of its start

What cannot be read, or is none that could be used, changes nothing: the secret before it goes on counting, and that is told.
"""

import asyncio
from collections.abc import Mapping

import structlog

from connectors.settings import Reference, Secret
from gateway.config import Config, ConfigurationError, secrets_of, with_secrets
from gateway.config_document import read_file
from observability.metrics import Metrics
from observability.names import LogEvent

log = structlog.get_logger()


class Renewal:
    """What was seen of the secrets when they were looked at last."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[str, Reference] = {}
        self._wrong: dict[str, str] = {}

    async def look(self, config: Config) -> Config | None:
        """The configuration with the secrets that are new and right; None if there are none of them."""
        secrets = secrets_of(config)
        found = await asyncio.to_thread(_read, [origin for origin in secrets if origin.startswith("file:")], config)
        wrong = {origin: reference.problem for origin, reference in found.items() if reference.text is None}
        new = {
            origin: reference
            for origin, reference in found.items()
            if reference.text is not None
            and reference.text != secrets[origin].reveal()
            and reference == self._seen.get(origin)  # twice the same: nobody is still writing it
        }
        self._seen = found
        for origin in new.keys() & _fixed(config):
            wrong[origin] = (
                "has changed, but what the database and the digests hang on cannot while it runs; restart it"
            )
            del new[origin]
        renewed = await asyncio.to_thread(_renewed, config, new, wrong) if new else None
        self._tell(wrong)
        return renewed

    def took(self, before: Config, after: Config) -> None:
        """From now on the secrets of `after` count."""
        old = secrets_of(before)
        origins = [origin for origin, secret in secrets_of(after).items() if old.get(origin) != secret]
        log.info(LogEvent.SECRETS_RENEWED, origins=sorted(origins))

    def _tell(self, wrong: Mapping[str, str]) -> None:
        """Each once, when it begins."""
        self._metrics.secret_unreadable.report(dict.fromkeys(wrong, 1.0))
        for origin, problem in wrong.items():
            if self._wrong.get(origin) != problem:
                log.error(LogEvent.SECRET_UNREADABLE, origin=origin, problem=problem)
        self._wrong = dict(wrong)


def _read(origins: list[str], config: Config) -> dict[str, Reference]:
    return {origin: read_file(origin, config.folder) for origin in origins}


def _fixed(config: Config) -> set[str]:
    return {secret.origin for secret in (config.database, config.key) if isinstance(secret, Secret)}


def _renewed(config: Config, new: Mapping[str, Reference], wrong: dict[str, str]) -> Config | None:
    """All of them, or else those that are right each for itself; what is wrong with the others is added to `wrong`."""
    try:
        return with_secrets(config, new)
    except ConfigurationError:
        renewed: Config | None = None
        for origin, reference in new.items():
            try:
                renewed = with_secrets(renewed or config, {origin: reference})
            except ConfigurationError as error:
                wrong[origin] = str(error.mistakes[0])
        return renewed
