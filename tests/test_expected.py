"""What a configuration may expect: each mistake is named with its mend, before anything is silently not watched."""

from pathlib import Path

import pytest

from gateway import config as configuration
from gateway.config import ConfigurationError
from gateway.silence import cadences, expected_within, sequence_fields
from tests.serving import CONFIGURATION, ENVIRON

BEFORE = "accepts: [purchase-order], body: 64KiB"


def loaded(folder: Path, expect: str = "", *, also: tuple[str, str] = ("", "")) -> configuration.Config:
    text = CONFIGURATION.format(dsn="env:DSN", partner="http://127.0.0.1:9", more="")
    text = text.replace(BEFORE, f"accepts: [purchase-order], expect: {{{expect}}}" if expect else BEFORE)
    path = folder / "sluicegate.yaml"
    path.write_text(text.replace(*also) if also[0] else text)
    return configuration.load(path, {**ENVIRON, "DSN": "postgresql://nobody@nowhere/x"})


def test_what_is_expected_is_read_by_facility_on_its_own_wall(tmp_path: Path) -> None:
    config = loaded(
        tmp_path, 'every: 1h, from: "22:00", to: "06:00", days: [mon, fri], facilities: [north], sequence: id'
    )
    assert {party: str(cadence) for party, cadence in cadences(config).items()} == {
        ("odoo", "north"): "1h Europe/Berlin 22:00-06:00 04"
    }
    assert sequence_fields(config) == {"odoo": "id"}
    whole = loaded(tmp_path, "every: 30m, from: 06:00, to: 20:00, timezone: Europe/Berlin")
    assert {party: str(cadence) for party, cadence in cadences(whole).items()} == {
        ("odoo", ""): "30m Europe/Berlin 06:00-20:00"
    }


def test_a_destination_may_be_expected_in_time(tmp_path: Path) -> None:
    config = loaded(tmp_path, also=("    retry:", "    expect: {within: 15m}\n    retry:"))
    assert [str(within) for within in expected_within(config).values()] == ["0:15:00"]


@pytest.mark.parametrize(
    ("expect", "told"),
    [
        ("days: [mon]", "every is missing; write every: 1h"),
        ("every: 10s", "every is 10s, but must be at least 1m"),
        ('every: 1h, from: "06:00"', "from needs to beside it"),
        ('every: 1h, from: "06:00", to: "06:00"', "to is the same as from"),
        ('every: 1h, from: "6 am", to: "20:00"', 'write it as "06:00"'),
        ('sequence: id, from: "06:00", to: "20:00"', "from says when something is expected; add every: 1h"),
        ("every: 1h, facilities: [north], timezone: UTC", "timezone is given, but each facility has its own"),
        ("every: 1h, timezone: Mars/Olympus", "which is no time zone"),
        ("every: 1h, facilities: [nroth]", 'no such facility; did you mean "north"?'),
        ("every: 1h, facilities: [south]", "no policy that it accepts finds this facility"),
        ("sequence: ident", 'which policy "purchase-order" does not keep'),
        ("sequence: amount", "as no plain int; keep it there with type: int"),
        ("every: 1h, days: [mon, mon]", 'names "mon" twice'),
    ],
)
def test_what_cannot_be_expected_is_told_with_its_mend(tmp_path: Path, expect: str, told: str) -> None:
    text = ("  north:", "  south: {name: South Clinic}\n  north:")
    with pytest.raises(ConfigurationError) as error:
        loaded(tmp_path, expect, also=text)
    assert told in str(error.value)
    assert len(error.value.mistakes) == 1


def test_no_source_is_called_as_what_the_program_says_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give it another name"):
        loaded(tmp_path, also=("  odoo: {scheme", "  sluicegate: {scheme"))


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("{source: sluicegate, type: sluicegate.source.silent, facility: north}", None),
        ("{type: sluicegate.sequence.*, data: {missing: {gte: 10}}}", None),
        ("{source: [odoo, sluicegate]}", None),
        ("{type: sluicegate.destination.late, data: {state: [held, flowing]}}", None),
        ("{source: sluicegate, type: sluicegate.source.silnt}", "which no event that comes here can have"),
        ("{type: sluicegate.destination.late, data: {state: dead}}", "is never"),
        ("{source: sluicegate, data: {amount: {gte: 1}}}", "is kept by no policy whose events come here"),
    ],
)
def test_a_route_for_what_the_program_says_is_checked_as_all_others(
    tmp_path: Path, when: str, told: str | None
) -> None:
    text = ("routes:\n", f"routes:\n  watch: {{when: {when}, to: [approvers]}}\n")
    if told is None:
        assert "watch" in loaded(tmp_path, also=text).routes
        return
    with pytest.raises(ConfigurationError) as error:
        loaded(tmp_path, also=text)
    assert told in str(error.value)
