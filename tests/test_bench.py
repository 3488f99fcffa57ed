"""The bench: what it promises whoever runs it, proved with rows that cost nothing."""

import asyncio
import json
import re
from pathlib import Path

import asyncpg
import pytest

from benchmarks import __main__ as bench
from benchmarks.results import BEGIN, DOCS, END, write_docs
from benchmarks.rows import Figure, Ground, NotRun, Row, Unbalanced, at_least, at_most, reconcile

AT_LEAST = (at_least(0.4),)


async def half(ground: Ground) -> Figure:
    return Figure([5.0] * ground.rounds, [10.0, 11.0, 9.0][: ground.rounds])


async def broken(ground: Ground) -> Figure:
    reconcile({1, 2}, [1])
    raise AssertionError


async def elsewhere(ground: Ground) -> Figure:
    raise NotRun("oban needs Python 3.12")


async def of_postgres(ground: Ground) -> Figure:
    connection = await asyncpg.connect(ground.dsn)
    lanes = await connection.fetchval("SELECT count(*) FROM lanes")
    await connection.close()
    return Figure([float(lanes)])


def row(name: str, take=half, goals=AT_LEAST, *, long=False, may_not_run="", postgres=False) -> Row:
    return Row(
        name=name, what="something", unit="/s", limit="the limit", goals=goals, seconds=1, take=take, long=long, rounds=3,
        may_not_run=may_not_run, postgres=postgres,
    )  # fmt: skip


def taken(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "figures.json").read_text())["rows"]}


async def test_a_figure_is_one_line_with_its_ratio_its_goal_and_whether_it_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("good"), row("short", goals=(at_least(0.6),)), row("lower-is-better", goals=(at_most(0.6),))]
    assert await bench.main(rows, results=tmp_path) == 0  # short is told, and is no error
    _, good, short, lower = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"good +5 /s +0\.50 × the limit  0\.4545–0\.5556  goal ≥ 0\.4 ×  met", good)
    assert short.endswith("goal ≥ 0.6 ×  SHORT")
    assert lower.endswith("goal ≤ 0.6 ×  met")


async def test_a_figure_that_cannot_be_taken_is_an_error_and_the_others_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await bench.main([row("lossy", broken), row("good")], results=tmp_path) == 1
    assert "lossy              not taken: Unbalanced: of 2 accepted 1 were lost" in capsys.readouterr().out
    assert {name: told["state"] for name, told in taken(tmp_path).items()} == {"lossy": "not taken", "good": "taken"}


@pytest.mark.parametrize(
    ("may_not_run", "code", "told"),
    [
        ("without Python 3.12", 0, "not run: oban needs Python 3.12 (no error without Python 3.12)"),
        ("", 1, "not run: oban needs Python 3.12"),
    ],
)
async def test_what_cannot_be_had_is_an_error_only_where_it_must_be_had(
    may_not_run: str, code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await bench.main([row("peer", elsewhere, may_not_run=may_not_run)], results=tmp_path) == code
    assert capsys.readouterr().out.splitlines()[-1] == f"peer               {told}"


async def test_a_row_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(ground: Ground) -> Figure:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(bench, "GRACE", 0)
    monkeypatch.setattr(bench, "PATIENCE", 0.05)
    assert await bench.main([row("hangs", hangs)], results=tmp_path) == 1
    assert taken(tmp_path)["hangs"]["reason"].startswith("TimeoutError")


async def test_long_rows_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = [row("short"), row("long", long=True)]
    await bench.main(rows, results=tmp_path / "default")
    await bench.main(rows, everything=True, results=tmp_path / "all")
    await bench.main(rows, only="on", results=tmp_path / "only")
    assert list(taken(tmp_path / "default")) == ["short"]
    assert list(taken(tmp_path / "all")) == ["short", "long"]
    await bench.main(rows, only="no such row,or,on", results=tmp_path / "two")
    assert list(taken(tmp_path / "only")) == ["long"]
    assert list(taken(tmp_path / "two")) == ["short", "long"]
    assert await bench.main(rows, only="no such row", results=tmp_path) == 2


async def test_figures_are_kept_with_the_machine_and_the_commit_that_they_were_taken_at(tmp_path: Path) -> None:
    await bench.main([row("first"), row("second", of_postgres, (at_least(0, "/s"),), postgres=True)], results=tmp_path)
    await bench.main([row("first", broken)], results=tmp_path)
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["machine"].keys() == {"cpu", "cores", "system", "python", "fdatasync_us", "versions", "postgres"}
    assert kept["machine"]["postgres"].startswith("18")
    assert kept["machine"]["versions"]["asyncpg"]
    first, second = kept["rows"]
    assert (first["state"], second["state"]) == ("not taken", "taken")  # a run replaces what it took, and only that
    assert (second["value"], second["ratio"], second["met"]) == (0, None, True)
    assert second["commit"]
    table = (tmp_path / "figures.md").read_text()
    assert "| `first` | something | | the limit | | | ≥ 0.4 × | not taken: Unbalanced" in table


def test_the_table_stands_between_its_markers_and_the_prose_around_it_stays(tmp_path: Path) -> None:
    page = tmp_path / "explanation" / "performance.md"
    write_docs(page, "one\n")
    assert page.read_text().endswith(f"{BEGIN}\none\n{END}\n")
    page.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write_docs(page, "two\n")
    assert page.read_text() == f"Before.\n\n{BEGIN}\ntwo\n{END}\n\nAfter.\n"


async def test_a_row_that_was_never_taken_stands_in_the_table(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    await bench.main([row("first"), row("second", long=True)], results=tmp_path, docs=page)
    first, second, _ = page.read_text().splitlines()[-3:]
    assert "| `first` | something | 5 /s | the limit: 10 /s |" in first
    assert second == "| `second` | something | | the limit | | | ≥ 0.4 × | not run yet | |"


def test_the_page_names_every_figure_and_says_which_may_not_be_had_and_where() -> None:
    page = DOCS.read_text()
    figures = page.partition(BEGIN)[2].partition(END)[0]
    for one in bench.ROWS:
        assert f"\n| `{one.name}` | " in figures, "run `make bench DOCS=1`"
    assert [(one.name, one.may_not_run) for one in bench.ROWS if one.may_not_run] == re.findall(
        r"^\| `([\w-]+)` \| (with.+) \|$", page, re.MULTILINE
    )


def test_the_rows_have_names_of_their_own_and_the_default_ones_take_ten_minutes_at_most() -> None:
    assert len({row.name for row in bench.ROWS}) == len(bench.ROWS)
    assert sum(row.seconds for row in bench.ROWS if not row.long) <= 600


@pytest.mark.parametrize("delivered", [[1], [1, 2, 2], [1, 2, 3]])
def test_a_figure_counts_only_where_what_was_accepted_was_delivered(delivered: list[int]) -> None:
    reconcile({1, 2}, [2, 1])
    with pytest.raises(Unbalanced):
        reconcile({1, 2}, delivered)
