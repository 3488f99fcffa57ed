"""Identities as Postgres has them: 16 bytes, which asyncpg's own UUID takes and gives as they are.

The standard library's would be made of an integer each time, and taken apart again to be written.
"""

from uuid import UUID

from asyncpg.pgproto import pgproto


def uuid_of(sixteen: bytes) -> UUID:
    made: UUID = pgproto.UUID(sixteen)  # a UUID for `isinstance`, `==` and `hash`
    return made
