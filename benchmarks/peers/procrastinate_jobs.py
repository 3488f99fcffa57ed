"""procrastinate, filled and drained; runs in an environment of its own."""

import json
import sys
import time

import uvloop
from procrastinate import App, PsycopgConnector


async def main(dsn: str, count: int, at_once: int) -> None:
    app = App(connector=PsycopgConnector(conninfo=dsn, min_size=4, max_size=20))
    delivered = []

    @app.task(name="job", pass_context=True)
    async def job(context, payload: str) -> None:
        delivered.append(context.job.id)

    async with app.open_async():
        rows = await app.connector.execute_query_all_async(
            "SELECT to_regclass('procrastinate_jobs') IS NOT NULL AS there"
        )
        if not rows[0]["there"]:
            await app.schema_manager.apply_schema_async()
        accepted = await job.batch_defer_async(*({"payload": "x" * 300} for _ in range(count)))
        began = time.monotonic()
        await app.run_worker_async(concurrency=at_once, wait=False, listen_notify=False, install_signal_handlers=False)
        seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds, "accepted": accepted, "delivered": delivered}))


uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
