"""A pooler between the program and its Postgres that lends connections for a transaction or a statement: refused.

Through one of these a lock is held by nobody, a notification is heard by nobody, and a prepared statement is
somebody else's; most of the time all goes well, so it is looked for before anything is done.  A pool in session
mode is as good as a connection of one's own.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import asyncpg

from outbox.database import SESSION, Address, UnsuitableError
from outbox.primary import Session

SESSIONS = 3
PATIENCE = 5  # seconds for a notification, which comes with the answer to the statement that sends it
SEEN = ("search_path", "synchronous_commit", "default_transaction_isolation", "lock_timeout")

# One server process at one time; on no other server, and never again on this one.
BACKEND = "SELECT concat_ws(' ', pid, backend_start) FROM pg_stat_activity WHERE pid = pg_backend_pid()"

MEND = (
    "Name Postgres itself in `database:`, or a pool in session mode "
    "(pgbouncer: a database of its own with pool_mode = session)."
)


async def refuse_pooler(dsn: str) -> None:
    """Raises UnsuitableError, with the mend, where a session is not one connection from its beginning to its end.

    Nothing that a direct connection does looks like it, however busy the server is: that is Unavailable at worst.
    """
    address = Address(dsn=dsn, application="sluicegate way")
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(address.session()) for _ in range(SESSIONS)]
        try:
            await _refuse_lent_connections(sessions)
            await _refuse_lost_settings(sessions[0])
            await _refuse_lost_notifications(sessions[0])
        except (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError) as error:
            raise UnsuitableError(
                "database: something between sluicegate and Postgres, a pooler most likely, loses prepared statements. "
                + MEND
            ) from error


async def _refuse_lent_connections(sessions: Sequence[Session]) -> None:
    """While one of them is in a transaction the pooler must give another connection to whoever asks; so all ask, in turn."""
    seen: dict[Session, str] = {}

    async def ask(session: Session) -> None:
        backend = seen.setdefault(session, told := await session.fetchval(BACKEND))
        if backend != told or len(set(seen.values())) < len(seen):
            raise UnsuitableError(
                "database: a pooler between sluicegate and Postgres lends connections for one transaction or statement "
                "at a time. Locks, notifications and prepared statements need one for as long as the session lasts. "
                + MEND
            )

    for session in sessions:
        await ask(session)
    for holder in sessions:
        async with holder.transaction():
            for session in (holder, *sessions):
                await ask(session)


async def _refuse_lost_settings(session: Session) -> None:
    for name in SEEN:
        if await session.fetchval("SELECT current_setting($1)", name) != SESSION[name]:
            raise UnsuitableError(
                f"database: what sluicegate says on connecting does not reach Postgres: {name} is not set. A pooler keeps "
                f"it to itself (pgbouncer: ignore_startup_parameters): take {', '.join(SESSION)} off its list, or name "
                "Postgres itself in `database:`."
            )


async def _refuse_lost_notifications(session: Session) -> None:
    heard = asyncio.Event()
    await session.add_listener("sluicegate_way", lambda *_: heard.set())
    await session.execute("SELECT pg_notify('sluicegate_way', '')")
    try:
        async with asyncio.timeout(PATIENCE):
            await heard.wait()
    except TimeoutError as error:
        raise UnsuitableError(
            f"database: a pooler between sluicegate and Postgres loses notifications. {MEND}"
        ) from error
