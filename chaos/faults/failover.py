"""The server that is written to becomes another one, or another kind of server; or somebody stands before it."""

import asyncio
from urllib.parse import parse_qs, urlsplit

from chaos.faults import fault
from chaos.pair import Pair
from chaos.stage import Plan, Stage
from tests import pgbouncer

TIMES = 2


@fault(17, "failover to a synchronous standby under load", Plan(standby=True, gateways=2))
async def fails_over(stage: Stage) -> None:
    """All that was acknowledged is there, and every connection goes along."""
    assert isinstance(stage.postgres, Pair)
    await asyncio.sleep(3)
    async with stage.disturb("failover", aftermath=5):
        await stage.postgres.fail_over()
        await stage.postgres.back()
    await stage.recovered(at_most=5)


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


def why_no_pooler() -> str | None:
    return None if pgbouncer.found() else "there is no pgbouncer on this machine, and apt-get brings none"


@fault("17c", "a pooler that lends connections for one transaction stands before Postgres", why_not=why_no_pooler)
async def pooler(stage: Stage) -> None:
    """Refused at the start, with the mend: through it, locks and notifications would be lost now and then."""
    found = pgbouncer.found()
    assert found is not None
    sockets = parse_qs(urlsplit(stage.dsn).query)["host"][0]
    for mode in ("transaction", "statement"):
        with pgbouncer.serving(found, sockets, pool_mode=mode) as port:
            program = stage.program(f"behind-{mode}", "gateway")
            program.reconfigure(stage.dsn, f"postgresql://sluicegate@127.0.0.1:{port}/{stage.database}?sslmode=disable")
            program.start()
            status = await program.ended()
            stage.demand(status != 0, f"pool_mode {mode} is refused, and it ended with {status}")
            stage.demand("pool_mode = session" in program.said(), f"with the mend: {program.said()[-300:]}")
            stage.injected += 1
    await stage.recovered()
    stage.note = "refused at the start, with the mend"
