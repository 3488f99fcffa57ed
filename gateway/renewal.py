"""Secrets that change while the program runs: looked at now and then, taken when they are right, and kept while they are not.

    file:PATH         every two seconds; by what it holds, so that it may be replaced, renamed over, or be a link that turns
    vault:PATH#FIELD  every `vault.refresh`
    env:NAME          never: the environment of a process is that of its start

What cannot be read, or is none that could be used, changes nothing: the secret before it goes on counting, and that is told.
"""

import asyncio
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from connectors.settings import Reference, Secret
from gateway.config import Config, ConfigurationError, secrets_of, with_secrets
from gateway.config_document import read_file
from observability.metrics import Metrics
from observability.names import LogEvent

if TYPE_CHECKING:
    from gateway.vault import VaultReader

log = structlog.get_logger()

AGAIN = timedelta(seconds=30)  # a vault that could not tell is asked again


class Renewal:
    """What was seen of the secrets when they were looked at last."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[str, Reference] = {}
        self._wrong: dict[str, str] = {}
        self._vault: VaultReader | None = None
        self._said: dict[str, Reference] = {}
        self._asked_at = float("-inf")

    async def look(self, config: Config) -> Config | None:
        """The configuration with the secrets that are new and right; None if there are none of them."""
        secrets = secrets_of(config)
        read = await asyncio.to_thread(_read, [origin for origin in secrets if origin.startswith("file:")], config)
        asked = await self._ask(config, [origin for origin in secrets if origin.startswith("vault:")])
        found = {**read, **asked}
        wrong = {origin: reference.problem for origin, reference in found.items() if reference.text is None}
        new = {
            origin: reference
            for origin, reference in found.items()
            if reference.text is not None
            and reference.text != secrets[origin].reveal()
            and (origin in asked or reference == self._seen.get(origin))  # a file twice: nobody is still writing it
        }
        self._seen = read
        for origin in new.keys() & _fixed(config):
            wrong[origin] = (
                "has changed, but what the database and the digests hang on cannot while it runs; restart it"
            )
            del new[origin]
        renewed = await asyncio.to_thread(_renewed, config, new, wrong) if new else None
        for origin in wrong.keys() & asked.keys():
            self._said[origin] = Reference(origin=origin, text=None, problem=wrong[origin])
        self._tell(wrong)
        return renewed

    async def _ask(self, config: Config, origins: list[str]) -> Mapping[str, Reference]:
        """What the vault says, if it was not asked for long; else what it could not tell then."""
        if config.vault is None or not origins:
            return {}
        from gateway.vault import VaultReader  # noqa: PLC0415 — whoever has no vault need not wait for what speaks to one

        if self._vault is None or self._vault.vault != config.vault:
            self._vault = VaultReader(config.vault)
            self._asked_at = float("-inf")
        now = time.monotonic()
        patience = AGAIN if any(said.text is None for said in self._said.values()) else config.vault.refresh
        if now - self._asked_at >= min(patience, config.vault.refresh).total_seconds():
            self._asked_at = now
            self._said = dict(await self._vault.read(origins))
            return self._said
        return {origin: said for origin, said in self._said.items() if said.text is None and origin in origins}

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
