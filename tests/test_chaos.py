"""A short run of `make chaos`: the real program, three faults, a seed; and a loss that is noticed when there is one."""

import asyncio
import signal
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from chaos.__main__ import BEGINS, ENDS, HEAD, PAGE, asked_for
from chaos.checker import check
from chaos.faults import all_faults
from chaos.postgres import Postgres
from chaos.stage import Plan, Stage

DYING = Plan(
    rate=15,
    dispatchers=0,
    wholes=1,
    failpoints={"gateway-1": "intake.committed=exit@20", "whole-1": "dispatch.answered=exit@60"},
)


async def test_what_is_killed_in_turn_loses_nothing_and_a_loss_would_be_noticed(tmp_path: Path) -> None:
    async with (
        Postgres.running(tmp_path / "postgres") as postgres,
        Stage.on(tmp_path / "stage", postgres, DYING, seed=1) as stage,
    ):
        async with stage.disturb("both die"):
            died = await asyncio.gather(*(program.dies(60) for program in stage.programs))
        async with stage.disturb("Postgres", aftermath=10):
            stage.postgres.send_signal(signal.SIGQUIT, only_first=True)
            await asyncio.sleep(0.1)
            await stage.postgres.back()
        await stage.recovered(within=60)
        played = await stage.played(within=60)
        assert died == [137, 137]
        assert played.verdict.broken == []
        assert (played.injected, played.verdict.lost) == (2, 0)
        assert played.verdict.accepted > 10

        connection = await asyncpg.connect(stage.dsn)
        await connection.execute(
            "DELETE FROM sluicegate.attempts WHERE event_id = (SELECT event_id FROM sluicegate.attempts LIMIT 1)"
        )
        await connection.close()
        noticed = check(replace(await stage.evidence(), finals=()))
        assert noticed.lost == 1
        assert [told.partition(":")[0] for told in noticed.broken] == ["every_accepted_order_is_somewhere"]


def test_the_matrix_is_whole() -> None:
    """Rows 1 to 52, each played or with what is missing."""
    faults = all_faults()
    numbers = {number for number, _ in (fault.place for fault in faults)}
    assert numbers - {0} == set(range(1, 53))
    for fault in faults:
        assert fault.deed is not None or fault.not_built
    assert len({fault.name for fault in faults}) == len(faults)


@pytest.mark.parametrize(
    ("only", "rows"),
    [
        ("11", {"11a", "11b", "11c", "11d", "11e"}),
        ("2,6", {"2", "6"}),
        ("7,", {"7"}),
        ("every failpoint", {"sweep"}),
    ],
)
def test_rows_are_chosen_by_number_or_by_a_word(only: str, rows: set[str]) -> None:
    assert {fault.number for fault in all_faults() if asked_for(only, fault)} == rows


def test_the_table_of_the_documentation_has_every_row() -> None:
    table = PAGE.read_text().partition(BEGINS)[2].partition(ENDS)[0]
    assert HEAD in table
    for fault in all_faults():
        assert f"\n| {fault.number} | {fault.name} |" in table, "run `make chaos`"
