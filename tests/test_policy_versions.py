"""A changed policy needs a new number, or stored events of one number mean two things."""

from pathlib import Path

import pytest

from gateway import config as configuration
from gateway.policy_versions import digest
from gateway.service import Place, Service
from observability.metrics import Metrics
from outbox.database import UnsuitableError
from tests.serving import CONFIGURATION, ENVIRON, serving


def written(folder: Path, dsn: str, *changes: tuple[str, str]) -> configuration.Config:
    text = CONFIGURATION.format(dsn="env:DSN", partner="http://127.0.0.1:9", more="")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "sluicegate.yaml"
    path.write_text(text)
    return configuration.load(path, {**ENVIRON, "DSN": dsn})


CHANGED = ("amount:  {from: amount_total, type: decimal}", "amount:  {from: amount_total, type: decimal, round: 0}")


async def test_a_policy_that_changes_under_its_number_is_refused_at_the_start(tmp_path: Path, dsn: str) -> None:
    async with serving(tmp_path, dsn, "http://127.0.0.1:9"):
        pass
    config = written(tmp_path, dsn, CHANGED)
    service = Service(config, Place(role="all", dsn=dsn, workers=1, metrics=None), {**ENVIRON, "DSN": dsn})
    with pytest.raises(UnsuitableError, match=r"policies\.purchase-order was changed .* version 3.* give it version 4"):
        await service.start(Metrics())
    await service.stop()


async def test_a_reload_of_it_is_refused_and_the_old_one_goes_on(tmp_path: Path, dsn: str) -> None:
    async with serving(tmp_path, dsn, "http://127.0.0.1:9") as program:
        before = program.service._config
        written(tmp_path, dsn, CHANGED)
        await program.service.reload()
        assert program.service._config is before
        written(tmp_path, dsn, CHANGED, ("version: 3", "version: 4"))
        await program.service.reload()
        assert program.service._config.policies["purchase-order"].version == 4


def test_what_does_not_change_what_is_kept_needs_no_number(tmp_path: Path) -> None:
    before = written(tmp_path, "postgresql://nowhere/x").policies["purchase-order"]
    purpose = ("procurement approval", "approval of procurement")
    assert digest(written(tmp_path, "postgresql://nowhere/x", purpose).policies["purchase-order"]) == digest(before)
    assert digest(written(tmp_path, "postgresql://nowhere/x", CHANGED).policies["purchase-order"]) != digest(before)


@pytest.mark.parametrize(
    "transform",
    [", bucket: [0, 5000]", ", round: 1", ", optional: true"],
)
def test_whatever_changes_what_is_kept_of_a_field_needs_a_number(tmp_path: Path, transform: str) -> None:
    before = written(tmp_path, "postgresql://nowhere/x").policies["purchase-order"]
    change = ("type: decimal}", f"type: decimal{transform}}}")
    assert digest(written(tmp_path, "postgresql://nowhere/x", change).policies["purchase-order"]) != digest(before)


def test_a_word_of_a_lookup_or_a_constant_that_changes_needs_a_number(tmp_path: Path) -> None:
    digests = {
        digest(
            written(tmp_path, "postgresql://nowhere/x", ("amount:  {", f"{more}\n      amount:  {{")).policies[
                "purchase-order"
            ]
        )
        for more in (
            "site: {from: site, type: int, lookup: {1: north}}",
            "site: {from: site, type: int, lookup: {1: south}}",
            "site: {from: site, type: int, lookup: {1: south}, otherwise: other}",
            "site: {const: north}",
            "site: {const: south}",
            "day: {from: at, type: timestamp, truncate: day}",
            "day: {from: at, type: timestamp, truncate: month}",
        )
    }
    assert len(digests) == 7
