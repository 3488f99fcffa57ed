"""A changed policy needs a new number: the number is stored with every event, and an auditor reads it as one text."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from gateway.config import Policy
from outbox.database import Database


class PolicyVersions:
    """Which text each version of a policy stood for when it was first served."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def changed(self, policies: Mapping[str, Policy]) -> list[str]:
        """The policies that say something else than before under the same number, each as a sentence with its mend."""
        rows = await self._database.fetch(
            """
            SELECT p.name, p.version, (SELECT max(version) FROM policies AS every WHERE every.name = p.name) AS latest
              FROM policies AS p
              JOIN unnest($1::text[], $2::int[], $3::uuid[]) AS told (name, version, digest)
                ON (p.name, p.version) = (told.name, told.version)
             WHERE p.digest <> told.digest
             ORDER BY p.name
            """,
            list(policies),
            [policy.version for policy in policies.values()],
            [digest(policy) for policy in policies.values()],
        )
        return [
            f"policies.{row['name']} was changed and still says version {row['version']}, which stands for another text "
            f"in stored events; give it version {row['latest'] + 1}"
            for row in rows
        ]

    async def record(self, policies: Mapping[str, Policy]) -> None:
        """From now on each version stands for this."""
        await self._database.execute(
            """
            INSERT INTO policies (name, version, digest)
            SELECT name, version, digest
              FROM unnest($1::text[], $2::int[], $3::uuid[]) AS told (name, version, digest)
             ORDER BY name
                ON CONFLICT (name, version) DO NOTHING
            """,
            list(policies),
            [policy.version for policy in policies.values()],
            [digest(policy) for policy in policies.values()],
        )


def digest(policy: Policy) -> UUID:
    """Of what the file says of it; what it leaves to the program may grow with the program."""
    told = {key: value for key, value in _plain(policy).items() if key not in {"name", "version", "purpose"}}
    return UUID(bytes=blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).digest())


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return {name: _plain(getattr(value, name)) for name in value.model_fields_set}
        case Mapping():
            return {repr(key): _plain(below) for key, below in value.items()}
        case tuple() | list():
            return [_plain(below) for below in value]
        case _:
            return repr(value)
