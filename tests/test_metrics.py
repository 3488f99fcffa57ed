"""Metrics, as Prometheus reads them: of one process, and of several workers on one host."""

import asyncio
import fcntl
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from observability.metrics import Metrics
from observability.names import MetricName
from observability.workers import Reported, start_afresh
from tests.serving import partner, serving


def test_every_metric_begins_with_our_name_and_says_what_it_is() -> None:
    metrics = Metrics(version="0.1")
    metrics.balanced.report(1)
    families = scrape(metrics)
    assert all(family.name.startswith("sluicegate_") and family.documentation for family in families)
    ours = {family.name for family in families if not family.name.startswith("sluicegate_process_")}
    assert ours == {name.removesuffix("_total") for name in MetricName}
    assert "_created" not in metrics.render().decode()


def test_a_name_says_its_unit() -> None:
    for family in scrape(Metrics()):
        if family.type == "histogram":
            assert family.name.endswith("_seconds") or family.name == MetricName.BATCH_SIZE
    assert all(name.endswith("_total") for name in re.findall(r"# TYPE (\S+) counter", Metrics().render().decode()))


def test_the_process_tells_its_memory_and_cpu() -> None:
    metrics = Metrics()
    assert (value(metrics, "sluicegate_process_resident_memory_bytes") or 0) > 1e6
    assert (value(metrics, "sluicegate_process_cpu_seconds_total") or 0) > 0


def test_two_sets_of_metrics_in_one_process_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.accepted.labels("odoo").inc()
    assert value(one, "sluicegate_accepted_total", source="odoo") == 1
    assert value(other, "sluicegate_accepted_total", source="odoo") is None


async def test_a_post_that_is_under_way_when_the_configuration_changes_is_counted(tmp_path: Path, dsn: str) -> None:
    async with partner() as other, serving(tmp_path, dsn, other.address) as program:
        intake = program.service.intake
        under_way = intake._sources["odoo"]
        await intake.adopt(program.service._config, intake._destinations)
        under_way.counts.accepted += 1
        intake.tell()
        assert value(program.service.metrics, "sluicegate_accepted_total", source="odoo") == 1


def test_a_destination_that_a_report_leaves_out_disappears() -> None:
    metrics = Metrics()
    metrics.waiting.report({"odoo": 3, "supplier": 0})
    assert value(metrics, "sluicegate_waiting", destination="odoo") == 3
    assert value(metrics, "sluicegate_waiting", destination="supplier") == 0
    metrics.waiting.report({"supplier": 1})
    assert value(metrics, "sluicegate_waiting", destination="odoo") is None
    assert value(metrics, "sluicegate_waiting", destination="supplier") == 1


def test_a_destination_that_the_configuration_lost_disappears_and_what_was_counted_for_it_stays() -> None:
    metrics = Metrics()
    metrics.in_flight.labels("old").set(2)
    metrics.breaker_open.labels("old").set(1)
    metrics.in_flight.labels("new").set(1)
    metrics.attempts.labels("old", "delivered").inc()
    metrics.forget_destination("old")
    assert value(metrics, "sluicegate_in_flight", destination="old") is None
    assert value(metrics, "sluicegate_breaker_open", destination="old") is None
    assert value(metrics, "sluicegate_in_flight", destination="new") == 1
    assert value(metrics, "sluicegate_attempts_total", destination="old", outcome="delivered") == 1


async def test_a_report_that_nobody_renews_disappears() -> None:
    reported = Reported("sluicegate_balanced", "…", (), fresh=timedelta(seconds=0.05))
    reported.report(1)
    assert [sample.value for family in reported.collect() for sample in family.samples] == [1]
    await asyncio.sleep(0.06)
    assert [sample.value for family in reported.collect() for sample in family.samples] == []


async def test_whichever_worker_is_asked_answers_for_all(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.accepted.labels("odoo").inc(2)
    metrics.request_seconds.labels("odoo").observe(0.003)
    metrics.in_flight.labels("supplier").set(1)
    metrics.breaker_open.labels("supplier").set(0)
    metrics.clock_offset_seconds.set(0.5)
    async with worker(
        tmp_path,
        """
        metrics.accepted.labels("odoo").inc(5)
        metrics.accepted.labels("crm").inc()
        metrics.request_seconds.labels("odoo").observe(0.003)
        metrics.request_seconds.labels("odoo").observe(2)
        metrics.in_flight.labels("supplier").set(3)
        metrics.breaker_open.labels("supplier").set(1)
        metrics.clock_offset_seconds.set(-2)
        """,
    ):
        assert value(metrics, "sluicegate_accepted_total", source="odoo") == 7
        assert value(metrics, "sluicegate_accepted_total", source="crm") == 1
        assert value(metrics, "sluicegate_request_seconds_bucket", source="odoo", le="0.005") == 2
        assert value(metrics, "sluicegate_request_seconds_bucket", source="odoo", le="+Inf") == 3
        assert value(metrics, "sluicegate_request_seconds_sum", source="odoo") == pytest.approx(2.006)
        assert value(metrics, "sluicegate_in_flight", destination="supplier") == 4
        assert value(metrics, "sluicegate_breaker_open", destination="supplier") == 1
        assert value(metrics, "sluicegate_clock_offset_seconds") == -2
        families = scrape(metrics)
        assert len({family.name for family in families}) == len(families)
    metrics.close()


async def test_the_version_is_one_however_many_workers_tell_it(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, version="1.2.3")
    async with worker(tmp_path, "", version="1.2.3"):
        assert value(metrics, "sluicegate_build_info", version="1.2.3") == 1
    metrics.close()


async def test_of_several_reports_the_last_one_counts_as_a_whole(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.waiting.report({"gone": 9, "odoo": 9})
    async with worker(tmp_path, 'metrics.waiting.report({"odoo": 4})'):
        assert value(metrics, "sluicegate_waiting", destination="odoo") == 4
        assert value(metrics, "sluicegate_waiting", destination="gone") is None
        metrics.waiting.report({"odoo": 2})
        assert value(metrics, "sluicegate_waiting", destination="odoo") == 2
    metrics.close()


@pytest.mark.parametrize("death", ["kill", "stop"])
async def test_what_a_dead_worker_counted_stays_and_what_it_had_in_hand_does_not(tmp_path: Path, death: str) -> None:
    metrics = Metrics(tmp_path)
    metrics.accepted.labels("odoo").inc()
    assert value(metrics, "sluicegate_accepted_total", source="odoo") == 1
    files = set(tmp_path.iterdir())
    for dead in (1, 2, 3):
        async with worker(
            tmp_path,
            """
            metrics.accepted.labels("odoo").inc(10)
            metrics.request_seconds.labels("odoo").observe(0.003)
            metrics.in_flight.labels("supplier").set(3)
            metrics.lanes_owned.set(4)
            """,
        ) as process:
            assert value(metrics, "sluicegate_accepted_total", source="odoo") == 1 + 10 * dead
            assert value(metrics, "sluicegate_in_flight", destination="supplier") == 3
            if death == "kill":
                process.kill()
                await process.wait()
        for _ in range(2):
            assert value(metrics, "sluicegate_accepted_total", source="odoo") == 1 + 10 * dead
            assert value(metrics, "sluicegate_request_seconds_bucket", source="odoo", le="0.005") == dead
            assert value(metrics, "sluicegate_in_flight", destination="supplier") is None
            assert value(metrics, "sluicegate_lanes_owned") == 0
    assert {file.name for file in set(tmp_path.iterdir()) - files} == {"gone.json"}
    metrics.close()


async def test_what_a_worker_counts_reaches_the_others_within_a_second_or_two(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    async with worker(tmp_path, "metrics.fenced.inc()", render=False):
        async with asyncio.timeout(3):
            while value(metrics, "sluicegate_fenced_total") != 1:
                await asyncio.sleep(0.05)
    metrics.close()


def test_a_directory_that_cannot_be_written_costs_the_others_and_not_the_answer(tmp_path: Path) -> None:
    shared = tmp_path / "metrics"
    metrics = Metrics(shared)
    metrics.fenced.inc()
    shared.rename(tmp_path / "elsewhere")
    assert value(metrics, "sluicegate_fenced_total") == 1
    metrics.close()


def test_a_worker_that_hangs_in_the_directory_does_not_stop_the_others(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.fenced.inc()
    with (tmp_path / "directory").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert value(metrics, "sluicegate_fenced_total") == 1
    metrics.close()


def test_a_new_run_starts_afresh(tmp_path: Path) -> None:
    shared = tmp_path / "metrics"
    before = Metrics(shared)
    before.fenced.inc()
    before.close()
    start_afresh(shared)
    metrics = Metrics(shared)
    assert value(metrics, "sluicegate_fenced_total") == 0
    metrics.close()


@asynccontextmanager
async def worker(directory: Path, counts: str, *, render: bool = True, version: str = "") -> AsyncIterator[Process]:
    """Another process that has counted something and lives until the block ends."""
    lines = [
        "import sys, pathlib",
        "from observability.metrics import Metrics",
        f"metrics = Metrics(pathlib.Path({str(directory)!r}), version={version!r})",
        *(line.strip() for line in counts.splitlines()),
        "metrics.render()" if render else "",
        "print('ready', flush=True)",
        "sys.stdin.read()",
        "metrics.close()",
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "\n".join(lines), stdin=PIPE, stdout=PIPE, cwd=Path(__file__).parent.parent
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    try:
        yield process
    finally:
        process.stdin.close()
        await process.wait()


def scrape(metrics: Metrics) -> list[Metric]:
    return list(text_string_to_metric_families(metrics.render().decode()))


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return next(
        (
            sample.value
            for family in scrape(metrics)
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ),
        None,
    )
