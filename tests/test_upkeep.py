"""A periodic task that nothing calls does not exist: each of them runs, and does what it is there for."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from outbox import partitions
from outbox.upkeep import Upkeep
from tests.house import until
from tests.serving import Program, order, partner, serving


@pytest_asyncio.fixture
async def program(tmp_path: Path, dsn: str) -> AsyncIterator[Program]:
    async with partner() as approvers, serving(tmp_path, dsn, approvers.address) as program:
        yield program


def runs(program: Program, sample: str = "task_runs") -> dict[str, float]:
    metric = getattr(program.service.metrics, sample)
    [family] = metric.collect()
    return {s.labels["task"]: s.value for s in family.samples if s.name.endswith("_total")}


async def test_the_running_service_keeps_at_its_tasks(program: Program) -> None:
    """The one that is due first is seen to run by itself; the others are on the same list."""
    await until(lambda: runs(program).get("refusals", 0) >= 2)
    names = {task.name for task in program.service.upkeep.tasks}
    about_others = {"primary", "fleet", "heard", "silence", "secrets", "renewal"}
    assert names == {"clock", "partitions", "retention", "tally", "proof", "books", "refusals"} | about_others
    assert len(program.service.upkeep._running) == len(names)


async def test_each_task_runs_at_its_pace_and_does_not_fail(program: Program) -> None:
    quicker = [replace(task, every=timedelta(milliseconds=20)) for task in program.service.upkeep.tasks]
    upkeep = Upkeep(quicker, program.service.metrics)
    upkeep.start()
    await until(lambda: all(runs(program).get(task.name, 0) >= 3 for task in quicker), 20)
    await upkeep.stop()
    assert runs(program, "task_failures") == {}


async def test_partitions_are_made_ahead_by_the_running_service(program: Program) -> None:
    database = program.service._operators_database
    [*_, last] = await program.service.partitions.of("events")
    await database.execute(f"DROP TABLE {last.name}")
    await run(program, "partitions")
    assert [p.name for p in await program.service.partitions.of("events")][-1] == last.name
    assert "sluicegate_partitions_ahead" in program.service.metrics.render().decode()


async def test_too_few_partitions_ahead_is_told_while_somebodys_lock_keeps_new_ones_from_being_made(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "TRIES", 2)
    service = program.service
    [*_, next_day, _, _, _, _, _, _] = await service.partitions.of("events")
    for partition in await service.partitions.of("events"):
        if partition.begins > next_day.begins:
            await service._operators_database.execute(f"DROP TABLE {partition.name}")
    async with service._dispatch_database.transaction() as somebody:
        await somebody.execute("LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE")
        with capture_logs() as told:
            await run(program, "partitions")
    assert [line for line in told if line["event"] == "partitions.low"] == [
        {"event": "partitions.low", "log_level": "error", "table": "events", "ahead": 1}
    ]
    assert 'sluicegate_partitions_ahead{table="events"} 1.0' in service.metrics.render().decode()
    assert runs(program, "task_failures") == {"partitions": 1}
    with capture_logs() as told:
        await run(program, "partitions")
    assert told == []
    assert 'sluicegate_partitions_ahead{table="events"} 7.0' in service.metrics.render().decode()


async def test_a_partition_whose_days_are_over_is_dropped_by_the_running_service(program: Program) -> None:
    service = program.service
    for days in (200, 4):  # it has run for some days without a gap: a clock that leapt would look otherwise
        await service.partitions.ensure(service.clock.now() - timedelta(days=days))
    before = len(await service.partitions.of("events"))
    await run(program, "retention")
    assert len(await service.partitions.of("events")) < before
    assert all(p.ends > service.clock.now() - timedelta(days=91) for p in await service.partitions.of("attempts"))


async def test_refusals_are_written_by_the_running_service_and_never_a_body(program: Program) -> None:
    async with program.session.post(f"{program.address}/hooks/odoo", json=order()) as answer:
        assert answer.status == 401
    async with program.session.post(f"{program.address}/hooks/nobody", json=order()) as answer:
        assert answer.status == 404

    async def written() -> bool:
        _, told = await program.api("GET", "/rejections")
        return {(r["source"], r["reason"]) for r in told["items"]} == {
            ("odoo", "missing_header"),
            ("", "unknown_source"),
        }

    await until(written)


async def test_dropped_keys_are_counted_by_name(program: Program) -> None:
    await program.post(order())
    await run(program, "refusals")
    rows = await program.service._operators_database.fetch("SELECT name, n FROM dropped_keys ORDER BY name")
    assert [tuple(row) for row in rows] == [("notes", 1), ("partner_name", 1)]
    program.service.intake.tell()
    text = program.service.metrics.render().decode()
    assert 'sluicegate_dropped_keys_total{policy="purchase-order",source="odoo"} 2.0' in text


async def test_the_books_are_reported_as_metrics(program: Program) -> None:
    await program.api("POST", "/destinations/approvers/hold", {"reason": "a test"})
    await asyncio.sleep(0.2)
    await program.post(order())
    await run(program, "books")
    text = program.service.metrics.render().decode()
    assert 'sluicegate_held{destination="approvers"} 1.0' in text
    assert "sluicegate_balanced 1.0" in text


async def run(program: Program, name: str) -> None:
    [task] = [task for task in program.service.upkeep.tasks if task.name == name]
    await program.service.upkeep.run(task)
