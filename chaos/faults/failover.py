"""The server that is written to becomes another kind of server, under open sockets.

Two servers, of which one takes over with all that was acknowledged, are in tests/test_failover.py: a standby has to be
let in by its primary, and the embedded Postgres lets in nobody.
"""

import asyncio

from chaos.faults import fault
from chaos.stage import Stage

TIMES = 2


@fault("17b", "the primary only reads for a while, and no socket is cut")
async def only_reads(stage: Stage) -> None:
    """As one that was demoted, or whose disk is all but full: reads, locks and notifications would go on for ever."""
    for _ in range(TIMES):
        await asyncio.sleep(1)
        async with stage.disturb("only reads", aftermath=5):
            await stage.postgres.order("ALTER SYSTEM SET default_transaction_read_only = on")
            await stage.postgres.order("SELECT pg_reload_conf()")
            await asyncio.sleep(3)
            await stage.postgres.order("ALTER SYSTEM RESET default_transaction_read_only")
            await stage.postgres.order("SELECT pg_reload_conf()")
        await stage.recovered()
