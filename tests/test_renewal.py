"""Secrets that change while the program runs are taken without a restart, and what is wrong with one changes nothing."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from connectors.standard_webhooks import Signer
from gateway import config as configuration
from observability.names import LogEvent
from tests.serving import CONFIGURATION, ENVIRON, Partner, Program, order, partner, serving, whsec

OLD, NEW, NEWEST = (whsec(f"{name}-secret-of-32-bytes-0000000000") for name in ("older", "newer", "third"))
IN_FILES = (
    CONFIGURATION.replace("secrets: [env:SHOP_SECRET]", "secrets: [file:in/secret]")
    .replace("secret: env:OUT_SECRET", "secret: file:out")
    .replace("key: env:KEY", "key: file:key")
)


@asynccontextmanager
async def running(folder: Path, dsn: str, partner: str = "http://127.0.0.1:1") -> AsyncIterator[Program]:
    """Its upkeep is not waited for: a test looks by itself."""
    (folder / "in").mkdir(exist_ok=True)
    put(folder / "in/secret", OLD)
    put(folder / "out", ENVIRON["OUT_SECRET"])
    put(folder / "key", ENVIRON["KEY"])
    async with serving(folder, dsn, partner, configured=IN_FILES) as program:
        await program.service.upkeep.stop()
        yield program


def put(path: Path, text: str) -> None:
    """Whole or not at all, as everybody should."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.chmod(0o600)
    beside.rename(path)


async def looks(program: Program, times: int = 2) -> None:
    for _ in range(times):
        await program.service._renew_secrets()


async def status(program: Program, secret: str, number: int = 1) -> int:
    body = json.dumps(order(id=number)).encode()
    headers = {**Signer(secret).headers(f"msg_{number}", int(time.time()), body), "Content-Type": "application/json"}
    async with program.session.post(f"{program.address}/hooks/odoo", data=body, headers=headers) as answer:
        return answer.status


async def unreadable(program: Program) -> list[str]:
    async with program.session.get(f"{program.address}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return [
        line.split('origin="')[1].split('"')[0] for line in lines if line.startswith("sluicegate_secret_unreadable{")
    ]


async def test_a_secret_whose_file_is_replaced_counts_without_a_restart(tmp_path: Path, dsn: str) -> None:
    async with running(tmp_path, dsn) as program:
        assert await status(program, OLD, 1) == 202
        put(tmp_path / "in/secret", NEW)
        await looks(program)
        assert (await status(program, OLD, 2), await status(program, NEW, 3)) == (401, 202)


async def test_it_is_taken_by_itself_within_seconds(tmp_path: Path, dsn: str) -> None:
    async with running(tmp_path, dsn) as program:
        program.service.upkeep.start()
        put(tmp_path / "in/secret", NEW)
        async with asyncio.timeout(20):
            while await status(program, NEW) == 401:
                await asyncio.sleep(0.2)


async def test_a_link_that_turns_is_followed(tmp_path: Path, dsn: str) -> None:
    """As Kubernetes does it: `secret` leads through `..data`, which is turned to another folder."""
    async with running(tmp_path, dsn) as program:
        for name, secret in (("..first", OLD), ("..second", NEW)):
            (tmp_path / "in" / name).mkdir()
            (tmp_path / "in" / name / "secret").write_text(secret)
        (tmp_path / "in/..data").symlink_to("..first")
        (tmp_path / "in/secret").unlink()
        (tmp_path / "in/secret").symlink_to("..data/secret")
        await looks(program)
        assert await status(program, OLD, 1) == 202
        (tmp_path / "in/..tmp").symlink_to("..second")
        (tmp_path / "in/..tmp").rename(tmp_path / "in/..data")
        await looks(program)
        assert (await status(program, OLD, 2), await status(program, NEW, 3)) == (401, 202)


@pytest.mark.parametrize("broken", [None, "", "whsec_MDEy", "v1,whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", "\udcff"])
async def test_what_cannot_be_read_or_used_leaves_the_last_good_one_and_is_told(
    tmp_path: Path, dsn: str, broken: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path, dsn) as program:
        (tmp_path / "in/secret").unlink()
        if broken is not None:
            (tmp_path / "in/secret").write_bytes(broken.encode(errors="surrogateescape"))
        await looks(program, 5)
        assert await status(program, OLD) == 202
        assert await unreadable(program) == ["file:in/secret"]
        told = [line for line in capsys.readouterr().out.splitlines() if LogEvent.SECRET_UNREADABLE in line]
        assert len(told) == 1
        assert not broken or broken not in told[0]
        put(tmp_path / "in/secret", NEW)
        await looks(program)
        assert (await status(program, OLD, 2), await status(program, NEW, 3)) == (401, 202)
        assert await unreadable(program) == []


async def test_one_that_is_wrong_does_not_hold_up_another(tmp_path: Path, dsn: str) -> None:
    async with running(tmp_path, dsn) as program:
        put(tmp_path / "out", "nonsense")
        put(tmp_path / "in/secret", NEW)
        await looks(program)
        assert await status(program, NEW) == 202
        assert await unreadable(program) == ["file:out"]


async def test_one_that_is_still_being_written_is_not_believed(tmp_path: Path, dsn: str) -> None:
    async with running(tmp_path, dsn) as program:
        (tmp_path / "in/secret").write_text(NEW)
        await looks(program, 1)
        (tmp_path / "in/secret").write_text(NEWEST)
        await looks(program, 1)
        assert await status(program, OLD, 1) == 202
        await looks(program, 1)
        assert [await status(program, each, 2) for each in (OLD, NEW, NEWEST)] == [401, 401, 202]


async def test_what_else_the_file_says_by_now_waits_until_it_is_told_to_reload(tmp_path: Path, dsn: str) -> None:
    async with running(tmp_path, dsn) as program:
        path = tmp_path / "sluicegate.yaml"
        path.write_text(path.read_text().replace("body: 64KiB", "body: 1B"))
        put(tmp_path / "in/secret", NEW)
        await looks(program)
        assert await status(program, NEW, 1) == 202
        await program.service.reload()
        assert await status(program, NEW, 2) == 413


async def test_the_key_of_digests_is_not_changed_under_them(tmp_path: Path, dsn: str) -> None:
    async with running(tmp_path, dsn) as program:
        put(tmp_path / "key", "another-key-of-at-least-32-bytes-000")
        put(tmp_path / "in/secret", NEW)
        await looks(program, 3)
        assert await status(program, NEW) == 202
        assert await unreadable(program) == ["file:key"]


async def test_what_goes_out_is_signed_with_the_new_secret(tmp_path: Path, dsn: str) -> None:
    async with partner() as desk, running(tmp_path, dsn, desk.address) as program:
        put(tmp_path / "out", NEW)
        await looks(program)
        assert await status(program, OLD) == 202
        async with asyncio.timeout(10):
            while not desk.received:
                await asyncio.sleep(0.01)
    assert_signed_with(NEW, desk)


def assert_signed_with(secret: str, desk: Partner) -> None:
    (received,) = desk.received
    headers = received.headers
    again = Signer(secret).headers(headers["webhook-id"], int(headers["webhook-timestamp"]), received.body)
    assert headers["webhook-signature"] == again["webhook-signature"]


def test_a_secret_is_not_shown_by_what_remembers_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/secret", "out"):
        put(tmp_path / name, NEW)
    put(tmp_path / "key", ENVIRON["KEY"])
    path = tmp_path / "sluicegate.yaml"
    path.write_text(IN_FILES.format(dsn="env:DSN", partner="https://partner.example", more=""))
    config = configuration.load(path, {"DSN": "postgresql://nobody@nowhere/x"})
    assert NEW not in repr(config)
    assert NEW not in str(config.as_read.references)
