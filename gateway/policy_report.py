"""The auditor's page: what is kept of what, for which purpose, and where it goes.  In Markdown or HTML, of one configuration.

It says nothing of any event: only what the configuration lets happen, so that it can be signed, and compared by its digest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from connectors.settings import written
from gateway.config import Config
from gateway.config_references import destinations_of
from gateway.config_sections import (
    AnyField,
    CodeField,
    ConstField,
    DateField,
    DecimalField,
    EnumField,
    IntField,
    Policy,
    TimestampField,
    UuidField,
    is_pseudonym,
)


@dataclass(frozen=True, slots=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


Part = Heading | Table | str


def report(config: Config, *, html: bool) -> str:
    parts = list(_parts(config))
    return "\n".join([_HTML_HEAD, *map(_as_html, parts), "</body></html>"] if html else map(_as_markdown, parts))


def _parts(config: Config) -> Iterator[Part]:
    yield Heading(1, "What is kept, and where it goes")
    yield (
        f"Of the configuration whose SHA-256 is {config.digest}. What a policy does not name is read by nobody and kept nowhere: "
        "not in the database, a log, a trace or an error. No field can hold free text."
    )
    yield Table(
        ("Policy", "Version", "Purpose", "Class", "Fields", "Destinations"),
        [
            (name, str(policy.version), policy.purpose, policy.class_, str(len(policy.keep)), _listed(reached))
            for name, policy in config.policies.items()
            for reached in [destinations_of(policy, config)]
        ],
    )
    for name, policy in config.policies.items():
        yield from _of_policy(name, policy, config)
    yield Heading(2, "Destinations")
    yield Table(
        ("Destination", "Kind", "Receives at most", "Reads at delivery, and keeps nowhere"),
        [
            (name, destination.connector, destination.receives, _read_for(config, name))
            for name, destination in config.destinations.items()
        ],
    )
    yield Heading(2, "For how long")
    retention = config.retention
    yield Table(
        ("What", "How long"),
        [
            ("events and what became of their deliveries", written(retention.events)),
            ("what was discarded, by whom and why", written(retention.dead_letters)),
            ("digests by which the same post is recognised", written(retention.dedup)),
            ("who did what", written(retention.audit)),
        ],
    )


def _of_policy(name: str, policy: Policy, config: Config) -> Iterator[Part]:
    yield Heading(2, f"{name}, version {policy.version}")
    sources = [source for source, posts in config.sources.items() if name in posts.accepts]
    yield Table(
        ("", ""),
        [
            ("Purpose", policy.purpose),
            ("Class", policy.class_),
            ("From", _listed([f"{source} ({config.sources[source].scheme})" for source in sources])),
            ("Of posts where", _listed([f"{path} is {_word(value)}" for path, value in policy.match.items()], "all")),
            ("Is told as", policy.type),
            ("About", policy.subject or "no record"),
            ("Site", f"by {policy.facility.from_}" if policy.facility else "none"),
            ("To", _listed(destinations_of(policy, config))),
        ],
    )
    yield Table(
        ("Field", "From", "What can be in it"),
        [
            (field, "" if isinstance(kept, ConstField) else kept.from_, _said_of(kept))
            for field, kept in policy.keep.items()
        ],
    )


def _said_of(field: AnyField) -> str:
    said = (
        f"a list of up to {field.most}, each {_of_one(field)}"
        if not isinstance(field, ConstField) and field.many
        else _of_one(field)
    )
    return f"{said}; may be missing" if field.optional else said


def _of_one(field: AnyField) -> str:
    if is_pseudonym(field):
        domain = getattr(field, "token", "")
        return f"a pseudonym, the same for the same {field.kind} within {domain}; it stays personal data"
    match field:
        case ConstField():
            return f"always {_word(field.const)}"
        case EnumField():
            return f"one of {_listed(sorted(set(map(_word, field.of.values()))))}"
        case IntField() | UuidField() | CodeField() if field.lookup is not None:
            others = [] if field.otherwise is None else [_word(field.otherwise)]
            return f"one of {_listed(sorted({*map(_word, field.lookup.values()), *others}))}, looked up by the {field.kind}"
        case IntField() | DecimalField() if field.bucket is not None:
            return f"one of {_listed([str(edge) for edge in field.bucket])}, the bucket of a number"
        case TimestampField() | DateField() if field.truncate is not None:
            return f"the {field.truncate} of a {field.kind}"
        case DecimalField() if field.round is not None:
            return f"a number, rounded to {field.round} decimals"
        case IntField():
            return "a whole number"
        case DecimalField():
            return "a number"
        case CodeField():
            return f"a code of up to {field.max_length} characters that matches {field.pattern}"
        case _:
            return {"bool": "yes or no", "uuid": "a UUID", "timestamp": "a moment", "date": "a day"}[field.kind]


def _read_for(config: Config, name: str) -> str:
    reads = config.destinations[name].reads
    return "nothing" if reads is None else f"{_listed(reads.fields)} of {reads.model}, from {reads.system}"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(names: Sequence[str], nothing: str = "none") -> str:
    return ", ".join(names) or nothing


# ── how it is written ────────────────────────────────────────────────────────────────────────────────

_HTML_HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>What is kept, and where it goes</title>'
    "<style>body{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{border:1px solid #999;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top}</style></head><body>"
)


def _as_html(part: Part) -> str:
    match part:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Table(heads, rows):
            head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table>{f'<thead><tr>{head}</tr></thead>' if any(heads) else ''}<tbody>{body}</tbody></table>"
        case text:
            return f"<p>{escape(text)}</p>"


def _as_markdown(part: Part) -> str:
    match part:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}\n"
        case Table(heads, rows):
            lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
            return "".join(f"| {' | '.join(line)} |\n" for line in lines)
        case text:
            return f"{_plain(text)}\n"


def _plain(text: str) -> str:
    """What Markdown would take for something else is escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>|#" else letter for letter in " ".join(text.split()))
