"""Which secret of a source verifies, and which does not any more: told by where it comes from, and kept over restarts."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from connectors.standard_webhooks import Signer
from gateway import config as configuration
from gateway.check import check
from gateway.secrets_used import advice, secret_lines
from outbox.database import Database
from outbox.secret_uses import SecretUses
from tests.door import configured
from tests.serving import CONFIGURATION, ENVIRON, Program, order, serving, sign

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
ROTATED = CONFIGURATION.replace(
    "secrets: [env:SHOP_SECRET]",
    "secrets: [{{secret: env:OUT_SECRET, not_before: 2020-01-01T00:00:00Z}}, env:SHOP_SECRET]",
)


async def test_the_newest_word_about_a_secret_stands(database: Database) -> None:
    uses = SecretUses(database)
    old, new = ("shop", "env:OLD"), ("shop", "file:new")
    await uses.write({old: NOW, new: NOW})
    await uses.write({old: NOW - timedelta(hours=1), new: NOW + timedelta(hours=1)})
    assert await uses.all() == {old: NOW, new: NOW + timedelta(hours=1)}


async def test_it_is_told_by_origin_everywhere_and_over_a_restart(tmp_path: Path, dsn: str, database: Database) -> None:
    began = datetime.now(UTC) - timedelta(seconds=1)
    async with serving(tmp_path, dsn, "http://127.0.0.1:1", configured=ROTATED) as program:
        assert (await program.post(order()))[0] == 202
        assert await SecretUses(database).all() == {}  # no request writes it
    (used,) = (await SecretUses(database).all()).items()
    assert used[0] == ("odoo", "env:SHOP_SECRET")
    assert began <= used[1] <= datetime.now(UTC)

    async with serving(tmp_path, dsn, "http://127.0.0.1:1", configured=ROTATED) as program:
        _, told = await program.api("GET", "/expectations", role="viewer")
        assert [(line["secret"], line["last_used"] is None) for line in told["secrets"]] == [
            ("env:OUT_SECRET", True),
            ("env:SHOP_SECRET", False),
        ]
        await program.service.secrets_used.report(program.service._config)
        assert await metric(program) == {"env:SHOP_SECRET": pytest.approx(used[1].timestamp(), abs=1)}
        await post_with(program, ENVIRON["OUT_SECRET"])
        program.service.intake.tell()
        await program.service.secrets_used.report(program.service._config)
        assert (await metric(program)).keys() == {"env:OUT_SECRET", "env:SHOP_SECRET"}
    assert len(await SecretUses(database).all()) == 2


async def test_check_says_which_secret_verified_last(tmp_path: Path, dsn: str, database: Database) -> None:
    await SecretUses(database).write({("odoo", "env:SHOP_SECRET"): NOW})
    path = tmp_path / "sluicegate.yaml"
    path.write_text(ROTATED.format(dsn="env:DSN", partner="http://127.0.0.1:1", more=""))
    config = configuration.load(path, {**ENVIRON, "DSN": dsn})
    told = [each.says async for each in check(config, version="test") if each.what == "source odoo"]
    assert told == [
        "env:OUT_SECRET has verified nothing yet, env:SHOP_SECRET verified last at 2026-11-23 12:00Z",
    ]


def test_one_whose_time_is_over_is_to_be_taken_out() -> None:
    config = configured(
        sources="posts: {scheme: api-key, header: X-Key, accepts: [only], keys: ["
        "{secret: env:ONE, not_after: 2026-11-23T11:00:00Z}, {secret: env:TWO, not_before: 2026-11-24T00:00:00Z}, env:THREE]}\n"
        "one: {scheme: odoo-native, token: env:TOKEN, accepts: [only]}\n",
        environ={name: f"{name}.key-of-32-bytes-0000000000000000" for name in ("ONE", "TWO", "THREE")},
    )
    uses = {("posts", "env:ONE"): NOW - timedelta(hours=1), ("posts", "env:THREE"): NOW}
    (told,) = advice(config, uses, NOW)
    assert told.doubtful
    assert told.says == (
        "env:ONE verified last at 2026-11-23 11:00Z, and counts no more, env:TWO counts from 2026-11-24 00:00Z on, "
        "env:THREE verified last at 2026-11-23 12:00Z; take env:ONE out of the file"
    )
    assert [line.secret for line in secret_lines(config, uses)] == ["env:ONE", "env:TWO", "env:THREE", "env:TOKEN"]


async def test_what_cannot_be_written_now_is_written_later(tmp_path: Path, dsn: str, database: Database) -> None:
    async with serving(tmp_path, dsn, "http://127.0.0.1:1", configured=ROTATED) as program:
        used = program.service.secrets_used
        used.note("odoo", "env:SHOP_SECRET", NOW)
        await database.execute("ALTER TABLE secret_uses RENAME TO elsewhere")
        with pytest.raises(Exception, match="secret_uses"):
            await used.flush()
        used.note("odoo", "env:OUT_SECRET", NOW)
        await database.execute("ALTER TABLE elsewhere RENAME TO secret_uses")
        await used.flush()
        assert len(await SecretUses(database).all()) == 2


async def metric(program: Program) -> Mapping[str, float]:
    async with program.session.get(f"{program.address}/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if line.startswith("sluicegate_secret_last_used")]
    return {line.split('origin="')[1].split('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


async def post_with(program: Program, secret: str) -> None:
    body = b'{"model": "purchase.order", "id": 9, "state": "purchase", "amount_total": 1, "company_id": 1, "write_date": "2026-11-23 05:34:57"}'  # fmt: skip
    headers = {**sign(body, id="msg_9"), **Signer(secret).headers("msg_9", int(time.time()), body)}
    async with program.session.post(f"{program.address}/hooks/odoo", data=body, headers=headers) as answer:
        assert answer.status == 202
