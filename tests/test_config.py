"""sluicegate.yaml: what is good is loaded, and every mistake is named with its file, line, key and mend."""

import base64
import hashlib
import json
import pickle
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from connectors import Connector, Kind, Opening
from connectors.settings import (
    Network,
    Rate,
    Secret,
    Settings,
    SigningSecret,
    Url,
    duration,
    size,
    written,
    written_size,
)
from gateway.config import Config, ConfigurationError, Hmac, OdooNative, StandardWebhooks, load, schema
from gateway.config_patterns import LONGEST_CODE, characters_of, ways_of, why_unsafe
from gateway.config_sections import SCHEMES, EnumField, GitHub, IntField, Listen, Shopify, Slack


def whsec(text: str) -> str:
    return "whsec_" + base64.b64encode(text.encode()).decode()


ENVIRON = {
    "SHOP_SECRET": whsec("shop-secret-of-32-bytes-00000000"),
    "SHOP_SECRET_NEXT": whsec("next-secret-of-32-bytes-00000000"),
    "METER_SECRET": "meter-secret-of-32-bytes-0000000",
    "ODOO_TOKEN": "odoo-token-of-32-bytes-000000000",
    "CRM_KEY": "partner.crm-key-of-32-bytes-000000000000",
    "ERP_KEY": "erp-key",
    "OUT_SECRET": whsec("out-secret-of-32-bytes-000000000"),
    "KEY": "key-of-digests-of-32-bytes-00000",
    "LEVEL": "free_text",
    "PROCESSES": "3",
    "COLON": "a:b",
    "PRIVATE": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
    "EMPTY": "",
}

GOOD = """\
serve: {listen: 127.0.0.1:8470, workers: 2, trusted_proxies: [10.0.0.1]}
database: embedded
facilities:
  north: {name: North Hospital, timezone: Europe/Berlin}
  south: {name: South Clinic}
systems:
  erp: {connector: erp, url: https://erp.example, key: env:ERP_KEY}
sources:
  shop:
    scheme: standard-webhooks
    secrets:
      - env:SHOP_SECRET
      - {secret: env:SHOP_SECRET_NEXT, not_before: 2026-12-01T00:00:00Z, not_after: 2027-12-01T01:00:00+01:00}
    accepts: [refund, order]
    limit: 200/s
    body: 64KiB
  meter:
    scheme: hmac
    header: X-Signature
    signed: "{id}.{timestamp}.{body}"
    timestamp: X-Timestamp
    tolerance: 5m
    id: X-Delivery
    prefix: "sha256="
    secrets: [env:METER_SECRET]
    accepts: [order]
    from: [10.20.0.0/16]
  odoo: {scheme: odoo-native, token: env:ODOO_TOKEN, accepts: [order]}
  crm: {scheme: api-key, header: X-Api-Key, keys: [env:CRM_KEY], accepts: [order]}
  lab:
    scheme: jwt
    issuer: https://id.example
    audience: sluicegate
    jwks: https://id.example/keys
    body_hash: request_body_sha256
    accepts: [order]
policies:
  refund:
    version: 1
    purpose: money back
    match: {kind: refund, final: true}
    type: shop.refund
    keep: {id: {from: id, type: int}, more: {from: more, type: int, optional: true}}
  order:
    version: 1
    purpose: shop orders
    match: {kind: refund}
    type: shop.order.{status}
    subject: order/{id}
    time: "{at}"
    facility:
      from: site
      of: {N: north, S: south}
    keep:
      id: {from: id, type: int, min: 1}
      status: {from: status, type: enum, of: {paid: paid, "to pay": open, "to collect": open}}
      total: {from: payment.total, type: decimal, round: 2}
      at: {from: at, type: timestamp}
      buyer: {from: buyer, type: int, token: staff, optional: true}
      lines: {from: lines, type: [int], max: 200, optional: true}
      code: {from: code, type: code, pattern: "[A-Z]{3}"}
    dedup: [id, status, at]
routes:
  paid:
    when:
      source: [shop, meter]
      type: shop.order.paid
      facility: north
      data: {total: {gte: 10.5}, status: {not: open}, code: [ABC, DEF]}
    to: [ledger, note]
    order: subject
    give_up: 2h
  rest:
    when: {type: shop.*}
    to: [ledger]
destinations:
  ledger:
    connector: post
    url: https://ledger.example/events
    secret: env:OUT_SECRET
    rate: 20/s
    timeout: 5s
    retry: {first: 100ms, cap: 500ms, give_up: 1m}
  note: {system: erp, text: "{type}"}
observability: {sample: 0.5, logs: console}
retention: {events: 30d, dedup: 7d}
"""


class Post(Settings):
    url: Url
    """Where to."""
    secret: SigningSecret
    """Signs it."""
    allow: tuple[Network, ...] = ()
    """Addresses."""


class Erp(Settings):
    url: Url
    """Where."""
    key: Secret
    """Logs in."""


class Note(Settings):
    text: Annotated[str, Field(max_length=100)]
    """What to say."""


def connect(opening: Opening) -> Connector:
    raise NotImplementedError


KINDS = {
    "post": Kind(name="post", settings=Post, connect=connect),
    "erp": Kind(name="erp", settings=Note, connect=connect, system=Erp),
}

Load = Callable[..., Config]


@pytest.fixture
def configured(tmp_path: Path) -> Load:
    def load_text(text: str = GOOD, environ: Mapping[str, str] = ENVIRON) -> Config:
        path = tmp_path / "sluicegate.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path, environ, KINDS)

    return load_text


@pytest.fixture
def mistakes(configured: Load, tmp_path: Path) -> Callable[..., list[str]]:
    def of(text: str, environ: Mapping[str, str] = ENVIRON) -> list[str]:
        with pytest.raises(ConfigurationError) as error:
            configured(text, environ)
        assert str(error.value).splitlines() == [str(mistake) for mistake in error.value.mistakes]
        return [str(mistake).replace(f"{tmp_path}/", "") for mistake in error.value.mistakes]

    return of


# ── what is good ───────────────────────────────────────────────────────────────────────────────────


def test_a_good_configuration_becomes_typed_values(configured: Load) -> None:
    config = configured()
    shop, meter, odoo = config.sources["shop"], config.sources["meter"], config.sources["odoo"]
    assert isinstance(shop, StandardWebhooks)
    assert shop.name == "shop"
    assert shop.body == 64 * 1024
    assert shop.limit == Rate(200, timedelta(seconds=1))
    assert shop.tolerance == timedelta(minutes=5)
    assert shop.secrets[0].secret.reveal() == ENVIRON["SHOP_SECRET"]
    assert shop.secrets[0].not_before is None
    assert shop.secrets[1].not_after == datetime(2027, 12, 1, tzinfo=UTC)
    assert isinstance(meter, Hmac)
    assert (meter.algorithm, meter.encoding, meter.from_) == ("sha256", "hex", (ip_network("10.20.0.0/16"),))
    assert isinstance(odoo, OdooNative)
    assert odoo.token.matches(b"odoo-token-of-32-bytes-000000000")
    assert config.serve.listen == (Listen("127.0.0.1", 8470),)
    assert config.retention.audit == timedelta(days=6 * 366)


def test_policies_and_routes_say_what_they_mean(configured: Load) -> None:
    config = configured()
    order = config.policies["order"]
    assert (order.name, order.class_, order.match) == ("order", "metadata", {"kind": "refund"})
    assert order.facility is not None
    assert order.facility.of == {"N": "north", "S": "south"}
    status, lines = order.keep["status"], order.keep["lines"]
    assert isinstance(status, EnumField)
    assert status.of == {"paid": "paid", "to pay": "open", "to collect": "open"}
    assert isinstance(lines, IntField)
    assert (lines.kind, lines.many, lines.most) == ("int", True, 200)
    paid = config.routes["paid"]
    assert (paid.order, paid.give_up) == ("subject", timedelta(hours=2))
    assert (paid.when.source, paid.when.facility) == (("shop", "meter"), ("north",))
    assert paid.when.data["total"].bounds == {"gte": Decimal("10.5")}
    assert paid.when.data["status"].not_ == ("open",)
    assert paid.when.data["code"].in_ == ("ABC", "DEF")


def test_a_destination_has_the_settings_of_its_kind_or_of_the_kind_of_its_system(configured: Load) -> None:
    config = configured()
    ledger, note, erp = config.destinations["ledger"], config.destinations["note"], config.systems["erp"]
    assert isinstance(ledger.settings, Post)
    assert (ledger.connector, ledger.system, ledger.timeout) == ("post", None, timedelta(seconds=5))
    assert ledger.retry.give_up == timedelta(minutes=1)
    assert isinstance(note.settings, Note)
    assert (note.connector, note.system, note.concurrency, note.receives) == ("erp", "erp", 8, "metadata")
    assert isinstance(erp.settings, Erp)
    assert erp.settings.key.reveal() == "erp-key"


def test_the_configuration_of_the_contract_is_loaded_with_the_kinds_that_are_installed() -> None:
    config = load(Path(__file__).parent / "sluicegate.yaml", ENVIRON)
    assert set(config.destinations) == {"ledger", "shaky", "picky", "patient"}
    assert config.warnings == ()


def test_nothing_in_a_configuration_can_be_changed(configured: Load) -> None:
    config = configured()
    with pytest.raises(ValidationError):
        config.database = "embedded"
    with pytest.raises(ValidationError):
        config.sources["shop"].limit = None
    for table in (config.sources, config.policies["order"].keep, config.policies["order"].match):
        with pytest.raises(TypeError):
            table["other"] = None  # type: ignore[index]


def test_the_digest_is_that_of_the_file_and_changes_with_it(configured: Load, tmp_path: Path) -> None:
    before, after = configured(), configured(GOOD + "# changed\n")
    assert before.digest == hashlib.sha256(GOOD.encode()).hexdigest()
    assert after.digest != before.digest
    assert (after.path, after.folder) == (tmp_path / "sluicegate.yaml", tmp_path)


def test_one_key_that_changed_is_all_that_differs_after_a_reload(configured: Load) -> None:
    before, after = configured(), configured(GOOD.replace("workers: 2", "workers: 3"))
    assert before.serve != after.serve
    assert before.sources == after.sources
    assert before.destinations == after.destinations


def test_an_almost_empty_file_is_a_configuration_that_lets_nothing_in(configured: Load) -> None:
    config = configured("sources:\n")
    assert (config.sources, config.routes, config.database) == ({}, {}, "embedded")
    assert config.observability.sample == 0.1


def test_the_tags_of_the_core_schema_say_what_a_value_is(configured: Load) -> None:
    text = GOOD.replace("workers: 2", 'workers: !!int "2"').replace("purpose: money back", "purpose: !!str 2026")
    config = configured(text.replace("sources:\n", "sources: !!map\n", 1).replace("to: [ledger]", "to: !!seq [ledger]"))
    assert (config.serve.workers, config.policies["refund"].purpose) == (2, "2026")
    assert config.routes["rest"].to == ("ledger",)


@pytest.mark.parametrize(
    "asked",
    [
        "{total: {gte: 10, lte: 10}}",
        "{id: {gt: 4, lt: 6}}",
        "{code: {in: [ABC, DEF], not: ABC}}",
        "{total: {gt: 1, gte: 2}}",
    ],
)
def test_conditions_that_leave_something_are_no_mistake(configured: Load, asked: str) -> None:
    configured(GOOD.replace("{total: {gte: 10.5}, status: {not: open}, code: [ABC, DEF]}", asked))


def test_anchors_and_aliases_are_understood(configured: Load) -> None:
    text = GOOD.replace("accepts: [refund, order]", "accepts: &all [refund, order]").replace(
        "from: [10.20.0.0/16]",
        "from: [10.20.0.0/16]\n  again: {scheme: odoo-native, token: env:ODOO_TOKEN, accepts: *all}",
    )
    assert configured(text).sources["again"].accepts == ("refund", "order")


def test_texts_that_other_yaml_takes_for_something_else_stay_texts(configured: Load) -> None:
    text = GOOD.replace("money back", "yes").replace("shop orders", "12:30:00")
    config = configured(text)
    assert [policy.purpose for policy in config.policies.values()] == ["yes", "12:30:00"]


def test_characters_that_json_writes_as_two_are_one(configured: Load) -> None:
    assert configured(GOOD.replace("money back", '"money \\ud83d\\ude00"')).policies["refund"].purpose == "money 😀"


# ── env: and file: ─────────────────────────────────────────────────────────────────────────────────


def test_any_value_may_come_from_the_environment_or_from_a_file(configured: Load, tmp_path: Path) -> None:
    (tmp_path / "purpose").write_text("as the board decided\n")
    text = GOOD.replace("workers: 2", "workers: env:PROCESSES").replace("money back", "file:purpose")
    config = configured(text)
    assert config.serve.workers == 3
    assert config.policies["refund"].purpose == "as the board decided"


@pytest.mark.parametrize("environ", [{}, {"OTLP": ""}], ids=["not set", "empty"])
def test_an_optional_value_that_the_environment_does_not_have_is_not_given(
    configured: Load, environ: dict[str, str]
) -> None:
    text = GOOD.replace("sample: 0.5", "sample: env:SAMPLE, otlp: env:OTLP")
    config = configured(text, ENVIRON | environ)
    assert (config.observability.otlp, config.observability.sample) == (None, 0.1)


def test_a_secret_in_a_file_is_read_without_its_last_line_end(configured: Load, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text("token-of-24-bytes-0000000\n")
    (tmp_path / "secrets" / "token").chmod(0o600)
    config = configured(GOOD.replace("token: env:ODOO_TOKEN", "token: file:secrets/token"))
    odoo = config.sources["odoo"]
    assert isinstance(odoo, OdooNative)
    assert odoo.token.reveal() == "token-of-24-bytes-0000000"
    assert odoo.token.origin == "file:secrets/token"
    assert config.warnings == ()


def test_a_secret_in_a_file_that_everyone_may_read_is_a_warning(configured: Load, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token-of-24-bytes-0000000\n")
    (tmp_path / "token").chmod(0o644)
    config = configured(GOOD.replace("token: env:ODOO_TOKEN", "token: file:token"))
    [warning] = config.warnings
    assert (
        "sources.odoo.token comes from token, which others on this machine may read or change; chmod 600 it" in warning
    )


def test_a_secret_of_two_sources_is_a_warning_where_the_url_is_not_signed(configured: Load) -> None:
    twice = WITH_URL.replace(CRM, "scheme: SCHEME, secrets: [env:METER_SECRET]")
    [warning] = configured(twice.replace("SCHEME", "github")).warnings
    assert (
        'sources.crm.secrets[0] is a secret of "meter", too, so that what is signed for one counts for the other'
        in warning
    )
    assert "meter-secret" not in warning
    assert configured(twice.replace("SCHEME", "twilio")).warnings == ()


WITH_URL = GOOD.replace("workers: 2", "workers: 2, public_url: https://gateway.example/")
CRM = "scheme: api-key, header: X-Api-Key, keys: [env:CRM_KEY]"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [(".{body}", ".{body}{url}", "meter.signed"), (CRM, "scheme: twilio, secrets: [env:CRM_KEY]", "crm.scheme")],
)
def test_a_signed_url_needs_to_be_told_how_it_begins(
    mistakes: Callable[..., list[str]], configured: Load, old: str, new: str, key: str
) -> None:
    assert configured(WITH_URL.replace(old, new, 1)).serve.public_url == "https://gateway.example"
    [told] = mistakes(GOOD.replace(old, new, 1))
    assert f"sources.{key} has the URL that is called from outside, which only you know" in told
    assert "write serve.public_url: https://gateway.example" in told


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "{timestamp}.{body}",
            "{url}{timestamp}.{body}",
            "sources.meter.signed has {url} right before {timestamp}, so that nobody can tell where one ends; name what stands between them",
        ),
        (
            CRM,
            "scheme: twilio, algorithm: md5, secrets: [env:CRM_KEY]",
            'sources.crm.algorithm is "md5", but must be sha1 or sha256',
        ),
    ],
)
def test_what_cannot_be_verified_of_a_url_is_told(
    mistakes: Callable[..., list[str]], old: str, new: str, said: str
) -> None:
    [told] = mistakes(WITH_URL.replace(old, new, 1))
    assert told.endswith(said)


def test_a_preset_is_the_generic_scheme_with_its_words_filled_in(configured: Load) -> None:
    presets = {"github": "X-Hub-Signature-256", "shopify": "X-Shopify-Hmac-Sha256", "slack": "X-Slack-Signature"}
    for name, header in presets.items():
        source = configured(GOOD.replace(CRM, f"scheme: {name}, secrets: [env:CRM_KEY]")).sources["crm"]
        assert isinstance(source, GitHub | Shopify | Slack)
        full = source.in_full()
        assert (full.header, full.name, full.secrets[0].secret.origin) == (header, "crm", "env:CRM_KEY")
        assert list(full.contradictions()) == []


def test_a_database_of_ones_own_is_a_secret_and_needs_a_key(configured: Load) -> None:
    dsn = "postgresql://gateway:pass-word-1@db/sluicegate"
    text = GOOD.replace("database: embedded", "database: env:DSN\nkey: env:KEY")
    config = configured(text, ENVIRON | {"DSN": dsn})
    assert isinstance(config.database, Secret)
    assert config.database.reveal() == dsn
    assert config.key == Secret(ENVIRON["KEY"])
    assert configured(text, ENVIRON | {"DSN": "embedded"}).database == "embedded"
    plain = configured(GOOD.replace("database: embedded", "database: postgresql://gateway@db/sluicegate\nkey: env:KEY"))
    assert isinstance(plain.database, Secret)


# ── every mistake: what is changed, where it is found, what is said ───────────────────────────────

MISTAKES = {
    # keys and types
    "an unknown key": ("body: 64KiB", "boddy: 64KiB", "boddy", 'sources.shop.boddy is no key that is known here; did you mean "body"?'),
    "an unknown section": ("retention:", "retentoin:", "retentoin", 'retentoin is no key that is known here; did you mean "retention"?'),
    "an unknown key deep below": ("of: {N: north", "off: {}\n      of: {N: north", "off:", 'policies.order.facility.off is no key that is known here; did you mean "of"?'),
    "an unknown key of a connector": ("rate: 20/s", "alow: []", "alow", 'destinations.ledger.alow is no key that is known here; did you mean "allow"?'),
    "a misspelt common key of a destination": ("timeout: 5s", "tiemout: 5s", "tiemout", 'destinations.ledger.tiemout is no key that is known here; did you mean "timeout"?'),
    "an unknown key of a system": ("url: https://erp.example", "url: https://erp.example, usr: x", "usr", 'systems.erp.usr is no key that is known here; did you mean "url"?'),
    "a name where there is none": ("order: subject", "name: x", "name: x", "routes.paid.name is no key that is known here; there is when, to, order, give_up"),
    "settings where there are none": ("rate: 20/s", "settings: {}", "settings", "destinations.ledger.settings is no key that is known here; there is url, secret, allow, connector, system, concurrency, rate, timeout, retry, receives, reads, retired, expect"),
    "a missing key": ("    url: https://ledger.example/events\n", "", "ledger:\n", "destinations.ledger.url is missing; add it"),
    "a text for a number": ("workers: 2", 'workers: "2"', "serve", 'serve.workers is "2", but must be a whole number'),
    "a decimal for a whole number": ("workers: 2", "workers: 2.5", "serve", "serve.workers is 2.5, but must be a whole number"),
    "a number out of its bounds": ("workers: 2", "workers: 0", "serve", "serve.workers is 0, but must be at least 1"),
    "a number above its bounds": ("sample: 0.5", "sample: 1.5", "sample", "observability.sample is 1.5, but must be at most 1.0"),
    "a word for true or false": ("type: int, token: staff, optional: true", "type: int, token: staff, optional: yes", "staff", 'policies.order.keep.buyer.optional is "yes", but must be true or false'),
    "a word that is none of those known": ("logs: console", "logs: jsn", "jsn", 'observability.logs is "jsn", but must be json or console; did you mean "json"?'),
    "a text for a list": ("accepts: [refund, order]", "accepts: order", "accepts: order", "sources.shop.accepts is a text, but must be a list"),
    "a text for a mapping": ("retention: {events: 30d, dedup: 7d}", "retention: 30d", "30d", "retention is a text, but must be a mapping"),
    "a text for an entry": ("  odoo: {scheme: odoo-native, token: env:ODOO_TOKEN, accepts: [order]}", "  odoo: odoo-native", "odoo: odoo-native", "sources.odoo.scheme is missing; without proof nothing comes in: write one of " + ", ".join(SCHEMES)),
    "a list for a section": ("facilities:\n  north: {name: North Hospital, timezone: Europe/Berlin}\n  south: {name: South Clinic}", "facilities: [north, south]", "facilities", "facilities is a list, but must be a mapping of names; write each under its name"),
    "a mapping for a word": ("purpose: money back", "purpose: {money: back}", "purpose: {money", "policies.refund.purpose is a mapping, but must be a text"),
    "a name with a space": ("  rest:\n", "  the rest:\n", "the rest", 'routes."the rest" is no name; use up to 63 of a-z, 0-9 and -, beginning with a letter or digit'),
    "a field with a capital": ("buyer: {from", "Buyer: {from", "Buyer", "policies.order.keep.Buyer is no name of a field; use a-z, 0-9 and _, and begin with a letter"),
    "nothing to keep": ("keep: {id: {from: id, type: int}, more: {from: more, type: int, optional: true}}", "keep: {}", "keep: {}", "policies.refund.keep is empty; write at least one"),
    # quantities
    "a duration without a unit": ("tolerance: 5m", "tolerance: 300", "300", "sources.meter.tolerance is 300, which is no duration; write one as 500ms, 10s, 5m, 72h, 30d or 6y"),
    "a duration of nothing": ("timeout: 5s", "timeout: 0s", "0s", 'destinations.ledger.timeout is "0s", but must be longer than nothing'),
    "a duration beyond reason": ("events: 30d", "events: 9999y", "9999y", 'retention.events is "9999y", but the longest duration is 100y'),
    "a timeout beyond reason": ("timeout: 5s", "timeout: 1h", "1h", "destinations.ledger.timeout is 1h, but must be at most 10m"),
    "a rate without a time": ("limit: 200/s", "limit: 200", "limit: 200", "sources.shop.limit is 200, which is no rate; write one as 20/s, 600/m, 1000/h or 5000/d"),
    "a rate of nothing": ("limit: 200/s", "limit: 0/s", "0/s", 'sources.shop.limit is "0/s", but must let something through'),
    "a size in another unit": ("body: 64KiB", "body: 64KB", "64KB", 'sources.shop.body is "64KB", which is no size; write one as 512B, 64KiB or 1MiB'),
    "a body beyond reason": ("body: 64KiB", "body: 1GiB", "1GiB", "sources.shop.body is more than 16MiB; a source posts metadata, write less"),
    "an address inside of a network": ("10.20.0.0/16", "10.20.1.0/16", "10.20.1.0", 'sources.meter.from[0] is "10.20.1.0/16", which is an address inside a network; did you mean 10.20.0.0/16?'),
    "no network": ("10.20.0.0/16", "intranet", "intranet", 'sources.meter.from[0] is "intranet", which is no network; write 10.20.0.0/16, fd00::/8 or one address'),
    "no address to listen on": ("127.0.0.1:8470", "localhost", "localhost", 'serve.listen is "localhost", which is no address; write 127.0.0.1:8470, [::1]:8470 or unix:/run/sluicegate.sock'),
    "an address to listen on that stands twice": ("listen: 127.0.0.1:8470", "listen: [127.0.0.1:8470, 127.0.0.1:8470]", "serve", "serve.listen names 127.0.0.1:8470 twice; leave one out"),
    "no time": ("2026-12-01T00:00:00Z", "2026-12-01", "2026-12-01", 'sources.shop.secrets[1].not_before is "2026-12-01", which is no time; write it as 2026-12-01T00:00:00Z'),
    "no time zone": ("Europe/Berlin", "Europe/Berlinn", "Berlinn", 'facilities.north.timezone is "Europe/Berlinn", which is no time zone; write it as Europe/Berlin'),
    "no URL": ("https://ledger.example/events", "ledger.example", "url: ledger", 'destinations.ledger.url is "ledger.example", which is no URL; write it as https://host/path'),
    "keys that come in the clear": ("jwks: https:", "jwks: http:", "jwks", 'sources.lab.jwks is "http://id.example/keys": keys that come in the clear prove nothing; write https'),
    "a type of tokens that no header has": ("audience: sluicegate", "audience: sluicegate\n    typ: a b", "typ:", 'sources.lab.typ is "a b", which has a character that does not belong there; correct it'),
    # secrets
    "a secret that is not set": ("env:METER_SECRET", "env:METER_SECRT", "METER_SECRT", "sources.meter.secrets[0] needs the variable METER_SECRT, which is not set; set it where Sluicegate is started"),
    "a secret that is empty": ("env:METER_SECRET", "env:EMPTY", "EMPTY", "sources.meter.secrets[0] needs the variable EMPTY, which is empty; set it where Sluicegate is started"),
    "a secret in a file that is not there": ("token: env:ODOO_TOKEN", "token: file:nowhere", "nowhere", "sources.odoo.token needs the file nowhere, which cannot be read: No such file or directory; create it, or correct the path"),
    "a secret that never counts": ("2027-12-01T01:00:00+01:00", "2026-11-30T00:00:00Z", "SECRET_NEXT", "sources.shop.secrets[1].not_after is not after its not_before, so the secret never counts; correct one of them"),
    "the same secret twice": ("secret: env:SHOP_SECRET_NEXT", "secret: env:SHOP_SECRET", "not_before", "sources.shop.secrets[1] is the same secret as one above it; leave one out"),
    "a needed value that is not set": ("money back", "env:NOWHERE", "NOWHERE", "policies.refund.purpose needs the variable NOWHERE, which is not set; set it where Sluicegate is started"),
    "no variable behind env:": ("env:METER_SECRET", "env:meter secret", "env:meter", "sources.meter.secrets[0] has no name of a variable after env:; write it as env:NAME"),
    "a shell's way to write a variable": ("money back", "for ${DEPARTMENT}", "DEPARTMENT", "policies.refund.purpose has ${…}, which is not replaced here; write env:NAME as the whole value"),
    "a shared database without a key": ("database: embedded", "database: postgresql://gateway@db/sluicegate", "", "key is missing, but a database that others share needs one; make one with: openssl rand -base64 32"),
    "no database": ("database: embedded", "database: sqlite", "sqlite", "database is no database; write embedded, or postgresql://user@host/name, or env: and a variable with it"),
    "a key of digests that is short": ("database: embedded", "key: env:ERP_KEY", "key: env:ERP_KEY", "key has 7 bytes in env:ERP_KEY, which can be guessed; use at least 32 random ones"),
    # proof
    "an unknown scheme": ("scheme: hmac", "scheme: hmack", "hmack", 'sources.meter.scheme is "hmack", but must be one of ' + ", ".join(SCHEMES) + '; did you mean "hmac"?'),
    "no scheme": ("    scheme: hmac\n", "", "meter:", "sources.meter.scheme is missing; without proof nothing comes in: write one of " + ", ".join(SCHEMES)),
    "no secrets": ("secrets: [env:METER_SECRET]", "secrets: []", "secrets: []", "sources.meter.secrets is empty; write at least one"),
    "an id that is not signed": ("{id}.{timestamp}", "{timestamp}", "X-Delivery", "sources.meter.id is not covered by signed, so anyone can change it; add {id} to signed, or leave it out"),
    "a time that is not signed": ("{id}.{timestamp}", "{id}", "X-Timestamp", "sources.meter.timestamp is not covered by signed, so anyone can change it; add {timestamp} to signed, or leave it out"),
    "a body that is not signed": ("{timestamp}.{body}", "{timestamp}", "signed:", "sources.meter.signed must have {body} once: what is not signed proves nothing; add it"),
    "a signed id without its header": ("    id: X-Delivery\n", "", "signed:", "sources.meter.signed has {id}, but no header is named for it; add id: and its header"),
    "a timestamp without a tolerance": ("    tolerance: 5m\n", "", "X-Timestamp", "sources.meter.timestamp needs a tolerance beside it; add tolerance: 5m"),
    "a tolerance without a timestamp": ('signed: "{id}.{timestamp}.{body}"\n    timestamp: X-Timestamp', 'signed: "{id}.{body}"', "tolerance", "sources.meter.tolerance needs a timestamp beside it; name its header, or leave tolerance out"),
    "a key that never counts": ("keys: [env:CRM_KEY]", "keys: [{secret: env:CRM_KEY, not_before: 2026-12-01T00:00:00Z, not_after: 2026-12-01T00:00:00Z}]", "crm:", "sources.crm.keys[0].not_after is not after its not_before, so the secret never counts; correct one of them"),
    "a key without an id": ("keys: [env:CRM_KEY]", "keys: [env:ERP_KEY]", "env:ERP_KEY]", "sources.crm.keys[0] is no api key (env:ERP_KEY); it is an id of letters and digits, a dot, and at least 16 random bytes"),
    "two keys of one id": ("keys: [env:CRM_KEY]", "keys: [env:CRM_KEY, env:CRM_KEY]", "crm:", "sources.crm.keys[1] has the same id as a key above it (env:CRM_KEY); change one"),
    "a token that stands beside itself": ("token: env:ODOO_TOKEN, accepts", "token: env:ODOO_TOKEN, others: [env:ODOO_TOKEN], accepts", "odoo: {", "sources.odoo.others[0] is the same token as one above it; leave one out"),
    "a user that Basic cannot tell from its password": ("  lab:\n", "  desk: {scheme: basic, user: env:COLON, secrets: [env:METER_SECRET], accepts: [order]}\n  lab:\n", "desk:", "sources.desk.user is no user of Basic (env:COLON), which has no colon and no control character"),
    "a password that can be guessed": ("  lab:\n", "  desk: {scheme: basic, user: env:ERP_KEY, secrets: [env:ERP_KEY], accepts: [order]}\n  lab:\n", "desk:", "sources.desk.secrets[0] has 7 bytes in env:ERP_KEY, which can be guessed; use at least 16 random ones"),
    "a user that is written out": ("  lab:\n", "  desk: {scheme: basic, user: desk, secrets: [env:METER_SECRET], accepts: [order]}\n  lab:\n", "desk:", "sources.desk.user is a secret and must not be written out here; write env:NAME or file:PATH"),
    "anybody's certificate": ("  lab:\n", "  edge: {scheme: client-cert, accepts: [order]}\n  lab:\n", "edge:", "sources.edge.san is missing, and so any certificate would do; name whose it must be, by san, subject or spki"),
    "a name that is none of a certificate": ("  lab:\n", "  edge: {scheme: client-cert, san: [edge.example], accepts: [order]}\n  lab:\n", "edge:", 'sources.edge.san has "edge.example"; write dns:edge-1.example, uri:spiffe://…, email:… or ip:…'),
    "a pin that is no digest of a key": ("  lab:\n", "  edge: {scheme: client-cert, spki: [abc], accepts: [order]}\n  lab:\n", "edge:", 'sources.edge.spki has "abc"; write sha256/ and the base64 of the SHA-256 of its public key'),
    "a body that no signature covers": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ["@path"], accepts: [order]}\n  lab:\n', "edge:", "sources.edge.components lacks content-digest: what is not signed proves nothing; add it"),
    "a path that no signature covers": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ["@method", content-digest], accepts: [order]}\n  lab:\n', "edge:", "sources.edge.components lacks the path, so that a post could be shown to another source; add @path, or @target-uri"),
    "a part that no request has": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ["@path", "@status", content-digest], accepts: [order]}\n  lab:\n', "edge:", 'sources.edge.components[1] is "@status", which is not known here; there is @method, @path, @query, @request-target, @target-uri, @authority, @scheme'),
    "a header in capitals": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ["@path", Content-Digest], accepts: [order]}\n  lab:\n', "edge:", 'sources.edge.components[1] is "Content-Digest", which is no part of a request; write @path, or a header in small letters'),
    "a part that is signed twice": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ["@path", content-digest, "@path"], accepts: [order]}\n  lab:\n', "edge:", 'sources.edge.components names "@path" twice; leave one out'),
    "a URL that only the outside knows": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ["@target-uri", content-digest], accepts: [order]}\n  lab:\n', "edge:", "sources.edge.components has the URL that is called from outside, which only you know; write serve.public_url: https://gateway.example"),
    "no key that could sign": ("  lab:\n", '  edge: {scheme: http-signature, keys: {}, components: ["@path", content-digest], accepts: [order]}\n  lab:\n', "edge:", "sources.edge.keys is empty; write at least one"),
    "a key that can be guessed": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:ERP_KEY}, components: ["@path", content-digest], accepts: [order]}\n  lab:\n', "edge:", "sources.edge.keys.e has 7 bytes, which can be guessed; use at least 32 random ones (env:ERP_KEY)"),
    "a private key where the public one belongs": ("  lab:\n", '  edge: {scheme: http-signature, keys: {e: env:PRIVATE}, components: ["@path", content-digest], accepts: [order]}\n  lab:\n', "edge:", "sources.edge.keys.e holds a private key, which is the sender's alone; give only its public half (env:PRIVATE)"),
    "more connections of one than in all": ("workers: 2", "workers: 2, connections: 500", "serve", "serve.connections_per_address is 1000, but there are only 500 connections in all; lower it"),
    "too few connections for anybody": ("workers: 2", "workers: 2, connections: 5, connections_per_address: 5", "serve", "serve.connections is 5, but must be at least 10"),
    "a limit for an address that is no rate": ("workers: 2", "workers: 2, limit_per_address: 20", "serve", "serve.limit_per_address is 20, which is no rate; write one as 20/s, 600/m, 1000/h or 5000/d"),
    "a public address with a query": ("workers: 2", 'workers: 2, public_url: "https://gw.example?a=1"', "serve", 'serve.public_url is "https://gw.example?a=1", but has a query; write the address alone, as https://gateway.example'),
    "a public URL that is none": ("workers: 2", "workers: 2, public_url: gateway.example", "serve", 'serve.public_url is "gateway.example", which is no URL; write it as https://host/path'),
    "something else that is signed": (".{body}", ".{body}{host}", "signed", "sources.meter.signed has {host}, but there is only {id}, {timestamp}, {body} and {url}; correct it"),
    "what a preset says by itself": ("scheme: api-key, header: X-Api-Key, keys: [env:CRM_KEY]", "scheme: github, tolerance: 5m, secrets: [env:CRM_KEY]", "crm:", "sources.crm.tolerance is no key that is known here; there is " + ", ".join(GitHub.key_names())),
    "a preset without secrets": ("scheme: api-key, header: X-Api-Key, keys: [env:CRM_KEY]", "scheme: slack", "crm:", "sources.crm.secrets is missing; add it"),
    "a preset with a secret written out": ("scheme: api-key, header: X-Api-Key, keys: [env:CRM_KEY]", "scheme: stripe, secrets: [whsec_hunter2hunter2]", "crm:", "sources.crm.secrets[0] is a secret and must not be written out here; write env:NAME or file:PATH"),
    "no header": ("header: X-Signature", "header: X Signature", "X Sig", 'sources.meter.header is "X Signature", which has a character that does not belong there; correct it'),
    # policies
    "a policy that is not there": ("accepts: [refund, order]", "accepts: [refnd, order]", "refnd", 'sources.shop.accepts names "refnd", but there is no such policy; did you mean "refund"?'),
    "a policy that stands twice": ("accepts: [refund, order]", "accepts: [refund, order, refund]", "refund, order, refund", 'sources.shop.accepts names "refund" twice; leave one out'),
    "a policy that another hides": ("accepts: [refund, order]", "accepts: [order, refund]", "order, refund", 'sources.shop.accepts names "refund", but "order" before it matches all that it matches; put "refund" first'),
    "a facility that is not there": ("S: south", "S: sout", "S: sout", 'policies.order.facility.of.S names "sout", but there is no such facility; did you mean "south"?'),
    "a dedup by what is not kept": ("dedup: [id, status, at]", "dedup: [id, statsu, at]", "statsu", 'policies.order.dedup names "statsu", but keep has no such field; did you mean "status"?'),
    "a subject of what is not kept": ("subject: order/{id}", "subject: order/{number}", "order/{number}", 'policies.order.subject names "number", but keep has no such field; there is id, status, total, at, buyer, lines, code'),
    "a subject that may be missing": ("subject: order/{id}", "subject: order/{buyer}", "order/{buyer}", "policies.order.subject has {buyer}, which is optional, so that it may be missing there; leave out optional, or name another field"),
    "a subject with a stray brace": ("subject: order/{id}", 'subject: "order/{id"', "order/{id", 'policies.order.subject is "order/{id", where a brace is no part of a {name}; correct it'),
    "a type with a space": ("type: shop.refund", "type: shop refund", "shop refund", 'policies.refund.type is "shop refund"; a type has letters, digits, _ and -, with dots between; write it as odoo.order.{status}'),
    "a type that may hold anything": ("type: shop.order.{status}", "type: shop.order.{total}", "order.{total}", "policies.order.type has {total}, which may hold what no type can; name an enum, or a code of letters, digits, _ . and -"),
    "a time that is no timestamp": ('time: "{at}"', 'time: "{id}"', 'time: "{id}"', "policies.order.time has {id}, which is no timestamp; name a field of type timestamp"),
    "a time of two fields": ('time: "{at}"', 'time: "{at} {at}"', 'time: "{at}', 'policies.order.time is "{at} {at}"; write one field in braces, as {changed}'),
    "a type that no field has": ("type: int, min: 1", "type: text", "type: text", "policies.order.keep.id has no type that is known here; write one of int, decimal, bool, enum, uuid, timestamp, date, code, or [int] for a list of int"),
    "bounds that let nothing through": ("min: 1", "min: 5, max: 4", "min: 5", "policies.order.keep.id.max is 4, less than min, so that no number is taken; correct one of them"),
    "a longest list of what is no list": ("type: decimal, round: 2", "type: decimal, max: 2", "max: 2", "policies.order.keep.total.max is for lists; write type: [decimal], or leave it out"),
    "a word with a space that is kept": ('"to pay": open', '"to pay": to pay', '"to pay": to pay', 'policies.order.keep.status.of."to pay" is "to pay", but what is kept has no space and no @; write {"as sent": as_kept}'),
    "a path that no body can be read by": ("from: payment.total", "from: 'pay\"ment'", "from: 'pay", 'policies.order.keep.total.from is "pay\\"ment", but a key with a quote or a backslash in it cannot be read; name another'),
    "a value that is read inside of another": ("from: payment.total", "from: at.total", "at.total", 'policies.order.keep.total.from reads inside "at", which keep.at.from takes as a value; read one'),
    "a pattern that matches a space": ('"[A-Z]{3}"', '"[A-Z ]{3}"', "[A-Z ]", 'policies.order.keep.code.pattern is "[A-Z ]{3}", which can match a space, so it may be free text; name the characters, as [A-Z0-9-]'),
    "a pattern that runs for long": ('"[A-Z]{3}"', '"([A-Z]+)+"', "([A-Z]+)+", 'policies.order.keep.code.pattern is "([A-Z]+)+", which repeats a part that repeats or may be left out, where the next character does not tell which; write it as [0-9]+(-[0-9]+)*, with a separator first'),
    "a list of codes that runs for long": ('type: code, pattern: "[A-Z]{3}"', 'type: [code], pattern: "[A-Z]*[A-Z0-9]*"', "[A-Z]*", "policies.order.keep.code.pattern can read one text in 257 ways, so a list of 100 bad ones keeps the door busy; put a separator between parts that take the same characters, or lower max", (", code: [ABC, DEF]}", "}")),
    "a format that is none": ("    body: 64KiB", "    body: 64KiB\n    format: xml", "xml", 'sources.shop.format is "xml", which is no format; write json, form, or form-json: and the field with the JSON'),
    "a form in a field without a name": ("    body: 64KiB", '    body: 64KiB\n    format: "form-json:"', "form-json", 'sources.shop.format is "form-json:", which is no format; write json, form, or form-json: and the field with the JSON'),
    "a form of which keys below others are read": ("    body: 64KiB", "    body: 64KiB\n    format: form", "accepts: [refund", 'sources.shop.accepts names "order", which reads "payment.total", but a form has no keys below others; read one name'),
    "a form of which a list is kept": ("    body: 64KiB", "    body: 64KiB\n    format: form", "accepts: [refund", 'sources.shop.accepts names "order", which keeps a list as "lines", but a form has none; keep one value', ("payment.total", "total")),
    "a form that is matched with null": ("    body: 64KiB", "    body: 64KiB\n    format: form", "accepts: [refund", 'sources.shop.accepts names "refund", which matches "final" with null, but a form has none; match a text', ("final: true", "final: null"), ("payment.total", "total"), ("type: [int], max: 200", "type: int")),
    "a list that begins nowhere": ("    body: 64KiB", "    body: 64KiB\n    each: value", "each", 'sources.shop.each is "value", but it begins where the body does; write $.value, or $ for a body that is a list'),
    "a list at a path that is none": ("    body: 64KiB", "    body: 64KiB\n    each: $.a..b", "each", 'sources.shop.each is "a..b", which is no path of keys; write it as key or key.below'),
    "a list in a form of texts": ("    body: 64KiB", "    body: 64KiB\n    format: form\n    each: $", "each", "sources.shop.each asks for a list, but a form has none; write form-json: and the field with the JSON, or leave it out", ("[refund, order]", "[plain]"), ("policies:\n", "policies:\n  plain: {version: 1, purpose: a test, type: shop.order.paid, keep: {id: {from: id, type: int}, total: {from: total, type: decimal}, status: {const: paid}, code: {const: ABC}}, facility: {from: site, of: {N: north}}}\n")),
    "a part of no list": ("    body: 64KiB", "    body: 64KiB\n    partial: true", "partial", "sources.shop.partial is about lists of events; add each: $.value, or leave it out"),
    "a pseudonym of what is looked up": ("type: int, token: staff", "type: int, token: staff, lookup: {1: one}", "lookup", "policies.order.keep.buyer.lookup is given beside token, but only one of them can be kept; leave one out"),
    "a word for others without a lookup": ("type: int, token: staff", "type: int, otherwise: other", "otherwise", "policies.order.keep.buyer.otherwise is what a lookup does not name; add lookup: {…}"),
    "a lookup by what is never there": ("type: int, token: staff", "type: int, max: 5, lookup: {6: six}", "lookup", "policies.order.keep.buyer.lookup[6] is not between min and max, so nothing is ever looked up by it; leave it out"),
    "a lookup by a text of what is a number": ("type: int, token: staff", "type: int, lookup: {'6': six}", "lookup", "policies.order.keep.buyer.lookup.6 is no whole number, so nothing is ever looked up by it; write one"),
    "a lookup by what the pattern does not match": ('"[A-Z]{3}"', '"[A-Z]{3}", lookup: {EURO: euro}', "EURO", "policies.order.keep.code.lookup.EURO is nothing that the pattern matches, so nothing is ever looked up by it; correct one of them", (", code: [ABC, DEF]}", "}")),
    "a looked up word with a space": ("type: int, token: staff", "type: int, lookup: {1: Maria Example}", "Maria", 'policies.order.keep.buyer.lookup[1] is "Maria Example", but what is kept has no space and no @; write {"as sent": as_kept}'),
    "buckets in no order": ("type: int, token: staff", "type: int, bucket: [0, 65, 18]", "bucket", "policies.order.keep.buyer.bucket is in no order; write each edge once, from the lowest to the highest, as [0, 18, 65]"),
    "buckets of an int with decimals": ("type: int, token: staff", "type: int, bucket: [0, 17.5]", "17.5", "policies.order.keep.buyer.bucket[1] is 17.5, but the edges of an int are whole numbers"),
    "buckets of a pseudonym": ("type: int, token: staff", "type: int, token: staff, bucket: [0]", "bucket", "policies.order.keep.buyer.bucket is given beside token, but only one of them can be kept; leave one out"),
    "buckets of what is rounded": ("type: decimal, round: 2", "type: decimal, round: 2, bucket: [0]", "bucket", "policies.order.keep.total.bucket is given beside round, but only one of them can be kept; leave one out", ("total: {gte: 10.5}, ", "")),
    "a date that is cut to its hour": ("at: {from: at, type: timestamp}", "at: {from: at, type: timestamp}\n      on: {from: on, type: date, truncate: hour}", "hour", 'policies.order.keep.on.truncate is "hour", but must be month or year'),
    "a constant that is free text": ("code: {from: code,", "system: {const: an erp}\n      code: {from: code,", "an erp", 'policies.order.keep.system.const is "an erp", but what is kept has no space and no @; write {"as sent": as_kept}'),
    "a constant that is read": ("code: {from: code,", "system: {const: erp, from: system}\n      code: {from: code,", "from: system", "policies.order.keep.system.from is no key that is known here; there is const"),
    # routes
    "a route of a bucket that no value is in": ("data: {total: {gte: 10.5}", "data: {total: {not: 7}", "total: {not", "routes.paid.when.data.total is never 7, for of it only 0, 5.5 can be kept; write one of them", ("round: 2", "bucket: [0, 5.5]")),
    "a route of a moment that no value is": ("data: {total: {gte: 10.5}", "data: {at: 2026-12-01T10:00:00Z", "at: 2026", 'routes.paid.when.data.at is never "2026-12-01T10:00:00Z", for of it only the day is kept; write 2026-12-01T00:00:00Z', ("at, type: timestamp", "at, type: timestamp, truncate: day")),
    "a route to what is not there": ("to: [ledger]", "to: [ledgr]", "ledgr", 'routes.rest.to names "ledgr", but there is no such destination; did you mean "ledger"?'),
    "a route to no destination": ("to: [ledger]", "to: []", "to: []", "routes.rest.to is empty; write at least one"),
    "a route without to": ("    to: [ledger]\n", "", "rest:", "routes.rest.to is missing; add it"),
    "a route from what is not there": ("source: [shop, meter]", "source: [shop, meeter]", "meeter", 'routes.paid.when.source names "meeter", but there is no such source; did you mean "meter"?'),
    "a route of a facility that is not there": ("facility: north\n", "facility: noth\n", "noth", 'routes.paid.when.facility names "noth", but there is no such facility; did you mean "north"?'),
    "a route of a type that nothing has": ("type: shop.order.paid", "type: shop.order.payed", "payed", 'routes.paid.when.type is "shop.order.payed", which no event that comes here can have; did you mean "shop.order.paid"?'),
    "a route of everything below what nothing has": ("type: shop.*", "type: shopp.*", "shopp", 'routes.rest.when.type is "shopp.*", which no event that comes here can have; there is shop.order.open, shop.order.paid, shop.refund'),
    "a route of no type": ("type: shop.*", 'type: "*"', '"*"', 'routes.rest.when.type has "*", which is no type; write odoo.order.approved, or odoo.order.*'),
    "a route of a field that is not kept": ("data: {total:", "data: {totl:", "totl", 'routes.paid.when.data.totl is kept by no policy whose events come here; did you mean "total"?'),
    "a route of a word that is never kept": ("status: {not: open}", "status: {not: opn}", "opn", 'routes.paid.when.data.status is never "opn"; did you mean "open"?'),
    "a bound for what has no more or less": ("status: {not: open}", "status: {gt: open}", "gt: open", "routes.paid.when.data.status is of type enum, which has no more or less; write the values that are meant"),
    "a number compared with a text": ("{gte: 10.5}", "{gte: ten}", "gte: ten", 'routes.paid.when.data.total is compared with "ten", but is of type decimal; write a number'),
    "a condition on a pseudonym": ("data: {total:", "data: {buyer: 5, total:", "buyer: 5", "routes.paid.when.data.buyer is kept as a pseudonym, which no route can judge; keep what the route needs in a field of its own"),
    "a condition on a list": ("data: {total:", "data: {lines: 5, total:", "lines: 5", "routes.paid.when.data.lines is a list, which no route can judge; keep what the route needs in a field of its own"),
    "a class above what a destination receives": ("purpose: money back", "class: workforce_pii\n    purpose: money back", "to: [ledger]\n", 'routes.rest.to names "ledger", which receives metadata, but what comes here by policy "refund" is workforce_pii; send it elsewhere, or let the destination say receives: workforce_pii'),
    "an order by what no policy has": ("    subject: order/{id}\n", "", "order: subject", "routes.paid.order is by subject, but no policy whose events come here has one; give it a subject, or leave order out"),
    "a condition of fields that no policy keeps together": ("{type: shop.*}", "{type: shop.*, data: {more: 1, total: 1}}", "more: 1", "routes.rest.when.data asks for fields that no policy keeps together; make two routes of it"),
    # destinations
    "an unknown kind": ("connector: post", "connector: pst", "pst", 'destinations.ledger.connector names "pst", but there is no such kind; did you mean "post"?'),
    "no kind": ("    connector: post\n", "", "ledger:\n", "destinations.ledger needs a connector, or a system; write one of post, erp"),
    "a system that is not there": ("system: erp", "system: erpp", "erpp", 'destinations.note.system names "erpp", but there is no such system; did you mean "erp"?'),
    "both a system and a kind": ("{system: erp", "{system: erp, connector: erp", "note:", "destinations.note.connector is given beside system, which says it already; leave it out"),
    "a kind that wants a system": ("{system: erp", "{connector: erp", "note:", 'destinations.note.connector names "erp", which is reached through a system; declare one in systems, and write system: NAME'),
    "a system of a kind that needs none": ("erp: {connector: erp", "erp: {connector: post", "connector: post, url", 'systems.erp.connector names "post", which needs no system; put its keys into the destination'),
    "a cap below the first pause": ("first: 100ms, cap: 500ms", "first: 1s, cap: 500ms", "cap: 500ms", "destinations.ledger.retry.cap is shorter than first; write a longer one"),
    "recognising for longer than keeping": ("dedup: 7d", "dedup: 31d", "dedup: 31d", "retention.dedup is longer than events, but what is recognised leads to an event; shorten it"),
    # YAML
    "a key that stands twice": ("    limit: 200/s\n", "    limit: 200/s\n    limit: 300/s\n", "300/s", "sources.shop.limit stands twice, first in line 15; leave one out"),
    "a merged mapping": ("    limit: 200/s\n", "    <<: {limit: 200/s}\n", "<<", 'sources.shop merges with "<<", which YAML 1.2 does not have; repeat the keys'),
    "a key that is a list": ("    limit: 200/s\n", "    ? [limit]\n    : 200/s\n", "? [limit]", "sources.shop has a key that is no word; write a text, a whole number, true or false"),
    "two bounds that leave nothing between them": ("total: {gte: 10.5}", "total: {gte: 10.5, lt: 10.5}", "total: {gte", "routes.paid.when.data.total contradicts itself, for no value is all that it asks for; correct it"),
    "a list of values of which none is left": ("code: [ABC, DEF]", "code: {in: [ABC], not: [ABC]}", "code: {in", "routes.paid.when.data.code contradicts itself, for no value is all that it asks for; correct it"),
    "a type and a field that contradict each other": ("status: {not: open}", "status: open", "when:", "routes.paid.when takes nothing, for its type and its data contradict each other; correct one of them"),
    "a tag of a type that is not in the core schema": ("of: {N: north", "of: !!omap {N: north", "!!omap", "policies.order.facility.of has a tag of YAML (!) that does not belong there; leave it out") ,
    "a tag that its value contradicts": ("purpose: money back", "purpose: !!int money back", "!!int", "policies.refund.purpose has the tag !!int, but is no int; leave the tag out"),
    "a tag of YAML 1.1": ("purpose: money back", "purpose: !!timestamp 2026-01-01", "!!timestamp", 'policies.refund.purpose begins with "!", a tag of YAML that is not known here; quote it'),
    "a tag before a key": ("purpose: money back", "!!str purpose: money back", "!!str", "policies.refund.purpose has a tag of YAML (!) before its name; leave it out"),
    "a tag": ("purpose: money back", "purpose: !text money back", "!text", 'policies.refund.purpose begins with "!", a tag of YAML that is not known here; quote it'),
    "a tab": ("    limit: 200/s\n", "\tlimit: 200/s\n", "\tlimit", "has a tab where YAML wants spaces; replace it"),
    "a bracket that is not closed": ("retention: {events: 30d, dedup: 7d}\n", "retention: {events: 30d, dedup: 7d\nlast: 1\n", "last", "has a bracket that is never closed, or lacks a comma; close it"),
    "a quotation mark that is not closed": ("logs: console", 'logs: "console', 'logs: "console', "has a quotation mark that is never closed; close it"),
    "a second colon": ("purpose: money back", "purpose: money: back", "money: back", 'has a second ": " in one line; quote the value'),
    "a sign that YAML keeps": ("purpose: money back", "purpose: @money", "@money", "has a value that begins with a sign that YAML keeps for itself; quote it"),
    "a control character": ("money back", "money\x08back", "money\x08", "has a control character; delete it"),
    "a control character in quotes": ("money back", '"money\\0back"', "money\\0", "policies.refund.purpose has a control character, or half of one; delete it"),
    "half a character": ("money back", '"money \\ud83d"', "ud83d", "policies.refund.purpose has a control character, or half of one; delete it"),
    "a key with a control character": ("S: south", '"S\\0": south', "S\\0", "policies.order.facility.of has a key with a control character, or half of one; delete it"),
    "an alias of nothing": ("money back", "*money", "*money", "has an alias (*) of what has no anchor (&) before it; write the value, or quote it"),
    "a second document": ("database: embedded\n", "database: embedded\n---\nmore: x\n", "---", 'has a second document after "---"; leave one'),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_file_line_key_and_mend(
    mistakes: Callable[..., list[str]], mistake: tuple[Any, ...]
) -> None:
    old, new, at, said, *others = mistake
    text = GOOD
    for before, after in [(old, new), *others]:
        assert before in text
        text = text.replace(before, after, 1)
    line = text[: text.index(at)].count("\n") + 1
    assert mistakes(text) == [f"sluicegate.yaml:{line}: {said}"]


CERTIFIED = "  edge: {scheme: client-cert, san: ['dns:edge.example'], accepts: [order]}\n  lab:\n"


def test_a_certificate_that_nobody_could_tell_of_is_a_mistake(mistakes: Callable[..., list[str]]) -> None:
    text = GOOD.replace("  lab:\n", CERTIFIED).replace(", trusted_proxies: [10.0.0.1]", "")
    problem = "is client-cert, which only a proxy can tell of"
    mend = "name it in serve.trusted_proxies, or let serve.listen be a Unix socket"
    assert mistakes(text) == [f"sluicegate.yaml:30: sources.edge.scheme {problem}; {mend}"]


@pytest.mark.parametrize("serve", ["{trusted_proxies: [10.0.0.1]}", "{listen: [':8470', unix:/run/sluicegate.sock]}"])
def test_a_certificate_is_told_of_by_a_trusted_proxy_or_on_a_unix_socket(configured: Load, serve: str) -> None:
    text = re.sub("serve: .*", f"serve: {serve}", GOOD.replace("  lab:\n", CERTIFIED))
    assert configured(text).sources["edge"].accepts == ("order",)


def test_the_outside_of_a_signed_url_is_what_serve_says(configured: Load) -> None:
    edge = "  edge: {scheme: http-signature, keys: {e: env:METER_SECRET}, components: ['@target-uri', content-digest], accepts: [order]}\n"
    text = GOOD.replace("  lab:\n", edge + "  lab:\n").replace(
        "workers: 2", "workers: 2, public_url: https://gw.example/"
    )
    assert configured(text).serve.public_url == "https://gw.example"


def test_a_broken_serve_raises_no_doubt_about_who_can_tell_of_a_certificate(mistakes: Callable[..., list[str]]) -> None:
    text = GOOD.replace("  lab:\n", CERTIFIED).replace("[10.0.0.1]", "[proxy]")
    assert [line.split(" ")[1] for line in mistakes(text)] == ["serve.trusted_proxies[0]"]


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines(mistakes: Callable[..., list[str]]) -> None:
    text = GOOD
    for old, new in {
        "workers: 2": "workers: two",
        "key: env:ERP_KEY": "key: env:NOWHERE",
        "limit: 200/s": "limit: fast",
        "env:METER_SECRET": "env:EMPTY",
        "purpose: shop orders": "purpos: shop orders",
        "dedup: [id, status, at]": "dedup: [id, stat]",
        "{type: shop.*}": "{type: shop.*, souce: shop}",
        "to: [ledger]": "to: [ledgr]",
        "rate: 20/s": "rate: 20",
        "dedup: 7d": "dedup: 90d",
    }.items():
        assert old in text
        text = text.replace(old, new)
    told = mistakes(text)
    assert [re.sub(r"sluicegate.yaml:([0-9]+): (\S+) .*", r"\1 \2", line) for line in told] == [
        "1 serve.workers",
        "7 systems.erp.key",
        "15 sources.shop.limit",
        "25 sources.meter.secrets[0]",
        "44 policies.order.purpose",
        "46 policies.order.purpos",
        "62 policies.order.dedup",
        "74 routes.rest.when.souce",
        "75 routes.rest.to",
        "81 destinations.ledger.rate",
        "86 retention.dedup",
    ]


def test_a_wrong_part_raises_no_doubt_about_what_refers_to_it(mistakes: Callable[..., list[str]]) -> None:
    """A broken field, policy or source is named once, not again wherever its name stands."""
    text = GOOD.replace("type: enum, of", "type: enum, off").replace("header: X-Signature", "haeder: X-Signature")
    assert [line.split(" ")[1] for line in mistakes(text)] == [
        "sources.meter.header",
        "sources.meter.haeder",
        "policies.order.keep.status.of",
        "policies.order.keep.status.off",
    ]


# ── secrets ────────────────────────────────────────────────────────────────────────────────────────

WRITTEN_OUT = {
    "in a list": ("env:METER_SECRET", "HUNTER"),
    "instead of a list": ("[env:METER_SECRET]", "HUNTER"),
    "as a mapping of itself": ("[env:METER_SECRET]", "[{HUNTER}]"),
    "in a mapping": ("secret: env:SHOP_SECRET_NEXT", "secret: HUNTER"),
    "in a mapping with another key": ("secret: env:SHOP_SECRET_NEXT", "scret: HUNTER"),
    "as a token": ("token: env:ODOO_TOKEN", "token: HUNTER"),
    "as a list of tokens": ("token: env:ODOO_TOKEN", "token: [HUNTER]"),
    "as an api key": ("[env:CRM_KEY]", "[HUNTER]"),
    "as one api key": ("[env:CRM_KEY]", "HUNTER"),
    "in a system": ("key: env:ERP_KEY", "key: HUNTER"),
    "in a destination": ("secret: env:OUT_SECRET", "secret: HUNTER"),
    "as the key of digests": ("database: embedded", "key: HUNTER"),
    "in the address of the database": ("database: embedded", "database: postgresql://gateway:HUNTER@db/sluicegate"),
    "in the parameters of the database": ("database: embedded", "database: postgresql://db/gate?password=HUNTER"),
    "in a URL": ("https://ledger.example", "https://gateway:HUNTER@ledger.example"),
    "as an alias": ("token: env:ODOO_TOKEN", "token: *HUNTER"),
    "as a tag": ("token: env:ODOO_TOKEN", "token: !HUNTER"),
    "with a colon": ("token: env:ODOO_TOKEN", "token: HUNTER: HUNTER"),
    "with quotes": ("token: env:ODOO_TOKEN", 'token: "HUNTER'),
    "behind a wrong env:": ("token: env:ODOO_TOKEN", "token: env:HUNTER-2"),
}


@pytest.mark.parametrize("secret", ["hunter2hunter2hunter2hunter2", whsec("hunter2hunter2hunter2hunter2")])
@pytest.mark.parametrize(("old", "new"), WRITTEN_OUT.values(), ids=WRITTEN_OUT)
def test_a_secret_that_is_written_out_is_refused_and_nothing_of_it_is_repeated(
    mistakes: Callable[..., list[str]], old: str, new: str, secret: str
) -> None:
    assert old in GOOD
    told = "\n".join(mistakes(GOOD.replace(old, new.replace("HUNTER", secret), 1)))
    assert not any(secret[start : start + 6] in told for start in range(6, len(secret) - 5))


UNFIT = {
    "with the v1, of signatures": ("SHOP_SECRET", "v1," + whsec("x" * 32), 'begins with "v1,"'),
    "that is no base64": ("SHOP_SECRET", "whsec_*secret-that-is-no-base64*", "base64"),
    "that is too short to sign": ("SHOP_SECRET", whsec("short"), "24"),
    "without whsec_": ("SHOP_SECRET", "c2hvcC1zZWNyZXQtb2YtMzItYnl0ZXMtMDAwMDAwMDA=", "whsec_"),
    "that is a private key": ("SHOP_SECRET", "whsk_c2hvcC1zZWNyZXQtb2YtMzItYnl0ZXMtMDAwMDA=", "v1a"),
    "that is a public key of another length": (
        "SHOP_SECRET",
        "whpk_c2hvcC1rZXktb2YtMzEtYnl0ZXMtMDAwMDAwMDAwMA==",
        "has 32",
    ),
    "that is a public key and no base64": ("SHOP_SECRET", "whpk_*key-that-is-no-base64-*", "base64"),
    "that can be guessed": ("METER_SECRET", "hunter2hunter2", "use at least 16 random ones"),
    "of an hmac with the v1, of signatures": ("METER_SECRET", "v1,hunter2hunter2hunter2", 'begins with "v1,"'),
    "that breaks its URL": ("ODOO_TOKEN", "hunter2/hunter2/hunter2", "characters that do not belong in a URL"),
    "of an api key without an id": ("CRM_KEY", "hunter2hunter2hunter2", "no api key"),
    "for what is sent": ("OUT_SECRET", "hunter2hunter2hunter2", "whsec_"),
}


@pytest.mark.parametrize(("name", "secret", "said"), UNFIT.values(), ids=UNFIT)
def test_a_secret_that_cannot_work_is_refused_by_the_name_of_its_variable(
    mistakes: Callable[..., list[str]], name: str, secret: str, said: str
) -> None:
    [told] = mistakes(GOOD, ENVIRON | {name: secret})
    assert said in told
    assert f"env:{name}" in told
    assert ("; " in told) or (": " in told.split(said, 1)[-1])
    assert secret[-12:] not in told
    assert secret[6:18] not in told


def test_a_value_from_the_environment_is_not_repeated_either(mistakes: Callable[..., list[str]]) -> None:
    environ = ENVIRON | {
        "URL": "ftp://hunter2hunter2",
        "BODY": "hunter2",
        "WORKERS": "hunter2",
        "CLASS": "hunter2hunter",
    }
    text = GOOD
    for old, new in {
        "https://ledger.example/events": "env:URL",
        "body: 64KiB": "body: env:BODY",
        "workers: 2": "workers: env:WORKERS",
        "version: 1": "class: env:CLASS\n    version: 1",
    }.items():
        text = text.replace(old, new, 1)
    told = mistakes(text, environ)
    assert len(told) == 4
    assert "hunter" not in "".join(told)
    assert "destinations.ledger.url is what env:URL holds, which is no URL" in told[-1]


def test_a_secret_is_shown_nowhere(configured: Load) -> None:
    config = configured()
    secrets = [value for name, value in ENVIRON.items() if name.endswith(("SECRET", "NEXT", "TOKEN", "KEY"))]
    dumps = [repr(config), str(config), json.dumps(config.destinations["ledger"].settings.model_dump(mode="json"))]
    dumps += [source.model_dump_json() for source in config.sources.values()]
    dumps += [json.dumps(schema(KINDS))]
    assert not any(secret in dump for secret in secrets for dump in dumps)
    with pytest.raises(TypeError):
        json.dumps(config.sources["shop"].model_dump())
    with pytest.raises(TypeError):
        pickle.dumps(Secret("hunter2"))


def test_secrets_are_equal_by_what_they_hold() -> None:
    assert Secret("one") == Secret("one", origin="env:ONE")
    assert Secret("one") != Secret("two")
    assert Secret("one") != "one"
    assert Secret("one").matches(b"one")
    assert not Secret("one").matches(b"one ")
    assert hash(Secret("one")) == hash(Secret("one"))
    assert Secret(whsec("k" * 32)).signing_key() == b"k" * 32


# ── files that are hardly one ──────────────────────────────────────────────────────────────────────


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere.yaml: cannot be read: No such file or directory; name the"):
        load(tmp_path / "nowhere.yaml", {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# a\n# b\nx: \xff\n", ":3: is not UTF-8; save it as UTF-8"),
        (b"- a\n- b\n", ":1: the file is no mapping; write serve:, sources:, policies:, routes: and destinations:"),
        (b"sources\n", ":1: the file is no mapping; write serve:, sources:, policies:, routes: and destinations:"),
        (b"x: 1\n" * 300_000, ": is larger than 1 MiB; is it the right file?"),
        (b"a: " + b"[" * 3_000, ": is no YAML; check it with a YAML editor"),
        (
            b"sources: &all\n  shop: *all\n",
            ":2: sources.shop repeats itself without an end; write it out, without an alias",
        ),
    ],
    ids=["not UTF-8", "a list", "a word", "too large", "too deep", "endless"],
)
def test_what_is_no_configuration_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "sluicegate.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as error:
        load(path, {})
    assert str(error.value) == f"{path}{said}"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "env:KEY", "env:X", "file:.", "{id}", "*"])
    | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "from", "type", "of", "in", "secret"]) | st.integers() | st.booleans(), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in inside for place in places_in(inner, (*at, key)))]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_stands_in_the_file_it_is_a_configuration_or_its_mistakes_are_told(
    tmp_path: Path, data: st.DataObject
) -> None:
    values = YAML(typ="safe", pure=True).load(GOOD)
    for place in data.draw(st.lists(st.sampled_from(places_in(values)), min_size=1, max_size=3)):
        anything, inside = data.draw(ANYTHING), values
        with suppress(KeyError, IndexError, TypeError):
            for key in place[:-1]:
                inside = inside[key]
            if place:
                inside[place[-1]] = anything
            else:
                values = anything
    path = tmp_path / "sluicegate.yaml"
    path.write_text(json.dumps(values, default=str), encoding="utf-8")
    told = ""
    with suppress(ConfigurationError):
        try:
            load(path, ENVIRON, KINDS)
        except ConfigurationError as error:
            told = str(error)
            raise
    assert not re.search(r"Input should|validat|pydantic|<[a-z]+>|what belongs there", told)


def test_aliases_that_multiply_do_not_keep_it_busy(tmp_path: Path) -> None:
    path = tmp_path / "sluicegate.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path.write_text("\n".join(lines))
    began = time.process_time()
    with pytest.raises(ConfigurationError, match="repeats itself without an end"):
        load(path, {})
    assert time.process_time() - began < 5


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sluicegate.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").replace("to: [ledger]", "to: [ledgr]").encode())
    with pytest.raises(ConfigurationError, match=r":75: routes.rest.to names .ledgr."):
        load(path, ENVIRON, KINDS)


# ── warnings ───────────────────────────────────────────────────────────────────────────────────────


def test_what_is_perhaps_not_meant_is_a_warning(configured: Load) -> None:
    text = (
        GOOD.replace("scheme: hmac\n", "scheme: hmac\n    algorithm: sha1\n")
        .replace("    body_hash: request_body_sha256\n", "")
        .replace("accepts: [refund, order]", "accepts: [order]")
        .replace("to: [ledger, note]", "to: [ledger]")
    )
    told = [warning.partition("sluicegate.yaml:")[2] for warning in configured(text).warnings]
    assert told == [
        "19: sources.meter.algorithm is sha1, which is weak; prefer sha256 if the sender can",
        "31: sources.lab has no body_hash, so that a token proves who posts, but not what",
        "38: policies.refund is accepted by no source",
        "84: destinations.note is reached by no route",
    ]


# ── the JSON Schema ────────────────────────────────────────────────────────────────────────────────


def test_the_schema_is_one_and_takes_the_configuration_of_the_contract() -> None:
    for_editors = schema()
    Draft202012Validator.check_schema(for_editors)
    contract = YAML(typ="safe", pure=True).load(Path(__file__).parent / "sluicegate.yaml")
    assert list(Draft202012Validator(for_editors).iter_errors(contract)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("body: 64KiB", "boddy: 64KiB"),
        ("body: 64KiB", "body: 64"),
        ("connector: post", "connector: pst"),
        ("    secret: env:OUT_SECRET\n", ""),
        ("env:METER_SECRET", "hunter2"),
        ("{system: erp", "{connector: erp"),
        ("type: decimal, round: 2", "type: decmal"),
        ("scheme: hmac", "scheme: hmack"),
        ("logs: console", "logs: jsn"),
        ("  rest:\n", "  the rest:\n"),
    ],
)
def test_the_schema_underlines_what_the_program_refuses(old: str, new: str) -> None:
    validator = Draft202012Validator(schema(KINDS))
    yaml = YAML(typ="safe", pure=True)
    good = json.loads(json.dumps(yaml.load(GOOD), default=str))
    bad = json.loads(json.dumps(yaml.load(GOOD.replace(old, new, 1)), default=str))
    assert list(validator.iter_errors(good)) == []
    assert list(validator.iter_errors(bad)) != []


def test_every_key_of_the_schema_has_a_description() -> None:
    for_editors = schema()
    definitions = for_editors["$defs"]

    def undescribed(part: Any, place: str) -> list[str]:
        missing = []
        if isinstance(part, dict):
            for key, inner in part.get("properties", {}).items():
                target = definitions[inner["$ref"].rpartition("/")[2]] if "$ref" in inner else {}
                missing += [] if inner.get("description") or target.get("description") else [f"{place}.{key}"]
            for key, inner in part.items():
                missing += undescribed(inner, f"{place}.{key}")
        if isinstance(part, list):
            for inner in part:
                missing += undescribed(inner, place)
        return missing

    assert undescribed(for_editors, "") == []


def test_defaults_in_the_schema_are_written_as_in_the_file() -> None:
    definitions = schema(KINDS)["$defs"]
    assert definitions["Retention"]["properties"]["audit"]["default"] == "6y"
    assert definitions["StandardWebhooks"]["properties"]["body"]["default"] == "256KiB"
    assert definitions["RetrySettings"]["properties"]["first"]["default"] == "2s"


def test_a_list_whose_events_are_told_apart_by_their_bytes_alone_is_warned_of(configured: Load) -> None:
    warned = configured(GOOD.replace("    body: 64KiB", "    body: 64KiB\n    each: $.value", 1)).warnings
    told = [warning for warning in warned if "each" in warning]
    assert len(told) == 1
    assert 'takes "refund", which has no dedup' in told[0]


# ── quantities ─────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 30_000), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_a_duration_that_is_written_is_read_as_the_same(count: int, unit: str) -> None:
    length = duration(f"{count}{unit}")
    assert duration(written(length)) == length


@given(st.integers(1, 10**6), st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_a_size_that_is_written_is_read_as_the_same(count: int, unit: str) -> None:
    assert size(written_size(size(f"{count}{unit}"))) == size(f"{count}{unit}")


def test_six_years_are_never_shorter_than_the_calendar_says() -> None:
    assert duration("6y") >= datetime(2030, 3, 1, tzinfo=UTC) - datetime(2024, 2, 29, tzinfo=UTC)


# ── patterns of codes ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "pattern",
    ["[A-Z]{3}", "[A-Z]{2}-[0-9]{1,6}", "[0-9]+(\\.[0-9]+)*", "([0-9]+\\.)*[0-9]+", "(PO|SO)[0-9]+", "\\d{6}", "\\w+",
     "[a-z]*[0-9a-z]*", "(a|b|cd)+", "(ab){3}", "[A-Za-z0-9._-]+?", "Straße[0-9]?", "(?P<year>[0-9]{4})-(?:[A-Z]+)"],
)  # fmt: skip
def test_a_pattern_that_says_what_a_code_is_made_of_is_accepted(pattern: str) -> None:
    assert why_unsafe(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "because"),
    [
        ("[A-Z ]+", "a space"),
        ("[ -~]+", "a space"),
        ("[@-Z]", "an @"),
        ("A B", "a space"),
        ("[\t]", "U+0009"),
        ("[\u00a0]", "U+00A0"),
        ("[\u2000-\u200f]", "U+2000"),
        ("[\uff01-\uff5e]", "U+FF20"),
        ("[\u2800-\u28ff]", "U+2800"),
        ("[\u3131-\u3164]", "U+3164"),
        ("A\ufe0f?", "U+FE0F"),
        ("[\ue000-\uf8ff]", "U+E000"),
        (".*", '"."'),
        ("\\s", "not"),
        ("\\S+", "not"),
        ("\\W", "not"),
        ("[^@ ]+", "not"),
        ("[^\\s@]+", "not"),
        ("(?i)[a-z]+", "flags"),
        ("(?i:[a-z])", "flags"),
        ("(?s)a", "flags"),
        ("^[A-Z]+$", "leave them out"),
        ("[A-Z]+\\b", "leave them out"),
        ("([a-z])\\1", "judged"),
        ("(?=[a-z])[a-z]", "judged"),
        ("(?![a-z])[A-Z]", "judged"),
        ("[a-z]++", "judged"),
        ("(?>[a-z]+)", "judged"),
        ("([a-z]+)+", "repeats"),
        ("([a-z]*)*", "empty"),
        ("(ab|[a-c]d)*x", "alternatives that begin alike"),
        ("(ab|ac?|a)*d", "repeats"),
        ("([A-Z]{1,2}){1,30}", "repeats"),
        ("(a?b?)*", "empty"),
        ("[a-z]+[a-z]+[a-z]+", "too many ways"),
        ("[a-z", "no regular expression"),
    ],
)
def test_a_pattern_that_may_be_free_text_or_run_for_long_is_refused_with_the_reason(pattern: str, because: str) -> None:
    assert because in (why_unsafe(pattern) or "")


SETS = st.sampled_from(
    ["a", "b", "[a-c]", "[A-Z0-9]", "\\d", "\\w", "-", "\\.", "[ab-]", "é", " ", "@", ".", "[^a]", "\\s", "\\S"]
)
PATTERNS = st.recursive(
    SETS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda branches: f"({'|'.join(branches)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,30}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300)
@given(st.data())
def test_what_an_accepted_pattern_matches_never_has_a_space_or_an_at_sign(data: st.DataObject) -> None:
    pattern = data.draw(PATTERNS.filter(lambda drawn: why_unsafe(drawn) is None))
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    assert re.fullmatch(pattern, text)
    assert not any(character.isspace() or character in "@\0" for character in text)
    for place in range(len(text) + 1):
        for bad in " @\t\n\u00a0":
            assert not re.fullmatch(pattern, text[:place] + bad + text[place:])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_accepted_pattern_is_done_soon_with_any_text(data: st.DataObject) -> None:
    pattern = data.draw(PATTERNS.filter(lambda drawn: why_unsafe(drawn) is None))
    piece = data.draw(st.from_regex(pattern, fullmatch=True))[:20] or "a"
    text = (piece * LONGEST_CODE)[: LONGEST_CODE - 1] + "!"
    began = time.process_time()
    re.fullmatch(pattern, text)
    assert time.process_time() - began < 0.5


@settings(max_examples=300, deadline=None)
@given(PATTERNS.filter(lambda drawn: why_unsafe(drawn) is None))
def test_a_pattern_takes_no_longer_than_its_ways_allow(pattern: str) -> None:
    """What is counted bounds what the matcher does: one way costs no more than a walk through the text."""
    matches = re.compile(pattern, re.ASCII).fullmatch
    began = time.process_time()
    for piece in ("a", "ab", "0", "a-", "A"):
        matches((piece * LONGEST_CODE)[: LONGEST_CODE - 1] + "!")
    assert time.process_time() - began < 0.1 + 0.00002 * ways_of(pattern)


def test_the_characters_of_a_pattern_are_known_where_they_are_few() -> None:
    assert characters_of("(PO|S)-[0-2]+") == frozenset("POS-012")
    assert characters_of("\\w") is None
