"""Tables of the documentation that the program itself says: keys, metrics, what the API answers, what a role may.

A comment `<!-- table: NAME -->` stands before each.  `python tests/tables.py` writes them anew.
"""

import json
import re
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from gateway import config as configuration
from gateway.api import ROUTES
from gateway.permissions import RIGHTS, Permission
from observability.metrics import Metrics
from observability.names import MetricName
from observability.workers import Reported

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs/configuration.md", ROOT / "docs/operations.md")
TABLE = re.compile(r"(<!-- table: ([\w /-]+) -->\n)((?:\|.*\n)*)")

PARTS = (
    "Serve", "Vault", "Facility", "Echo", "Expected", "ExpectedDelivery", "Policy", "FacilityRule", "ConstField", "Route", "When", "Reads", "RetrySettings", "Observability", "Retention",
)  # fmt: skip
WITH_A_SHORT_FORM = ("Condition", "TimedSigningSecret")
SCHEMES = (
    "StandardWebhooks", "Hmac", "GitHub", "Shopify", "Slack", "Stripe", "Twilio", "ApiKey", "Basic", "Jwt", "HttpSignature", "ClientCert", "OdooNative",
)  # fmt: skip
FIELDS = ("IntField", "DecimalField", "BoolField", "EnumField", "UuidField", "TimestampField", "DateField", "CodeField")

Keys = Mapping[str, Mapping[str, Any]]


def written(page: str) -> str:
    """The page with its tables as they should be."""
    known = tables()
    return TABLE.sub(lambda found: found[1] + "".join(f"{line}\n" for line in known[found[2]]), page)


def tables() -> dict[str, list[str]]:
    """Every table by its name."""
    return {
        **{name: list(_of_keys(keys)) for name, keys in parts().items()},
        "metrics": list(_table(["Metric", "Labels", "What it says"], sorted(_metrics()))),
        "api": list(_table(["", "Below /api/v1", "What it does", "Needs"], _api())),
        "roles": list(_table(["Role", *(f"`{permission}`" for permission in Permission)], _roles())),
    }


# ── the keys of the configuration ────────────────────────────────────────────────────────────────────


def parts() -> dict[str, Keys]:
    """The keys of each part of the file, by the name of its table; what several have in common stands once."""
    schema = configuration.schema()
    defined = schema["$defs"]
    systems = {f"system {_kind(one)}": one["properties"] for one in _each(schema, "systems")}
    found: dict[str, Keys] = {
        "the file": schema["properties"],
        **{name: defined[name]["properties"] for name in PARTS},
        **{name: defined[name]["anyOf"][-1]["properties"] for name in WITH_A_SHORT_FORM},
        **_with_common("every source", {name: defined[name]["properties"] for name in SCHEMES}),
        **_with_common("every field", {name: defined[name]["properties"] for name in FIELDS}),
        **_with_common("every destination", {_kind(one): one["properties"] for one in _each(schema, "destinations")}),
        **systems,
    }
    filled: dict[str, Keys] = {
        name: {key: {**defined.get(said.get("$ref", "")[8:], {}), **said} for key, said in keys.items()}
        for name, keys in found.items()
        if keys
    }
    return filled


def _each(schema: Mapping[str, Any], table: str) -> list[Any]:
    """Every alternative of a table, but a destination that is nothing but retired."""
    found: list[Any] = schema["properties"][table]["additionalProperties"]["anyOf"]
    return [one for one in found if {"connector", "system"} & one["properties"].keys()]


def _kind(one: Mapping[str, Any]) -> str:
    """`http` has a connector of its own; what is reached through a system is called by the only system that there is."""
    return str(one["properties"].get("connector", {}).get("const", "odoo"))


def _with_common(name: str, several: Mapping[str, Keys]) -> Mapping[str, Keys]:
    """What all of them have, as most of them say it; and of each what is left."""
    everywhere = [key for key in next(iter(several.values())) if all(key in keys for keys in several.values())]
    common: dict[str, Any] = {}
    for key in everywhere:
        said = [keys[key] for keys in several.values()]
        told, times = Tally(one.get("description") for one in said).most_common(1)[0]
        if times > len(several) / 2:
            common[key] = next(one for one in said if one.get("description") == told)
    return {name: common} | {
        one: {
            key: said
            for key, said in keys.items()
            if key not in common or said.get("description") != common[key].get("description")
        }
        for one, keys in several.items()
    }


def _of_keys(keys: Keys) -> Iterator[str]:
    rows = [[f"`{key}`", said.get("description", ""), _default(said)] for key, said in keys.items()]
    return _table(["Key", "What it says", "Default"], rows)


def _default(said: Mapping[str, Any]) -> str:
    """Empty where there is none, or where the description tells it."""
    default = said.get("default")
    if default in (None, [], {}, ""):
        return ""
    if isinstance(default, list):
        default = ", ".join(map(str, default))
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


# ── the others ───────────────────────────────────────────────────────────────────────────────────────


def _metrics() -> Iterator[list[str]]:
    yield [f"`{MetricName.BUILD}`", "`version`", "The version that runs."]
    for metric in vars(Metrics()).values():
        match metric:
            case Counter():
                name, labels = f"{metric._name}_total", metric._labelnames
            case Gauge() | Histogram():
                name, labels = metric._name, metric._labelnames
            case Reported():
                name, labels = metric._name, metric._labels
            case _:
                continue
        yield [f"`{MetricName(name)}`", " ".join(f"`{label}`" for label in labels), metric._documentation]


def _api() -> Iterator[list[str]]:
    for route in ROUTES:
        yield [route.method, f"`{route.path}`", route.does, f"`{route.permission}`" if route.permission else ""]


def _roles() -> Iterator[list[str]]:
    for role, rights in RIGHTS.items():
        yield [f"`{role}`", *("yes" if permission in rights else "" for permission in Permission)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
