// graphile-worker, filled and drained; runs beside its modules, in a folder of its own.
import { Logger, runMigrations, run } from "graphile-worker";
import pg from "pg";

const [dsn, count, atOnce] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const url = new URL(dsn.replace("@/", "@localhost/"));
const pgPool = new pg.Pool({
  host: url.searchParams.get("host") ?? url.hostname,
  port: Number(url.searchParams.get("port") ?? (url.port || 5432)),
  user: url.username,
  database: url.pathname.slice(1),
  max: 20,
});
const logger = new Logger(() => () => {});
const delivered = [];
await runMigrations({ pgPool, logger });
const { rows } = await pgPool.query(
  `SELECT (job).id::int AS id
     FROM (SELECT graphile_worker.add_job('job', json_build_object('payload', repeat('x', 300))) AS job
             FROM generate_series(1, $1)) AS added`,
  [count],
);
const began = process.hrtime.bigint();
const runner = await run({
  pgPool,
  logger,
  concurrentJobs: atOnce,
  noHandleSignals: true,
  taskList: { job: async (_payload, helpers) => void delivered.push(Number(helpers.job.id)) },
  preset: { worker: { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } },
});
for (;;) {
  await new Promise((resolve) => setTimeout(resolve, 5));
  if (delivered.length < count) continue;
  const left = await pgPool.query("SELECT count(*)::int AS n FROM graphile_worker._private_jobs");
  if (left.rows[0].n === 0) break;
}
const seconds = Number(process.hrtime.bigint() - began) / 1e9;
await runner.stop();
await pgPool.end();
console.log(JSON.stringify({ seconds, accepted: rows.map((row) => row.id), delivered }));
