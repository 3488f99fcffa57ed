"""Records as text for a terminal: aligned, in UTC, one line a thing."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from dead_letter.audit import Deed
from dead_letter.left_behind import LeftPreview, Moved
from dead_letter.letters import Cause, Letter, Preview, Repair
from dead_letter.tokens import TokenRecord
from gateway.destinations import DestinationLine
from gateway.silence import Expectation, SequenceLine
from outbox.page import Page
from outbox.records import AttemptRecord, EventRecord, EventSummary

if TYPE_CHECKING:
    from gateway.diagnosis import Finding
    from gateway.policy_diff import Difference
    from gateway.policy_trial import Trial


def event_story(event: EventRecord, letters: Sequence[Letter] = (), deeds: Sequence[Deed] = ()) -> str:
    """One event: what it is, where its deliveries stand, and everything that happened to it in order."""
    return "\n".join([*_head(event), "", *_deliveries(event), "", *_timeline(event, letters, deeds)])


def diagnosing(source: str, minutes: float, requests: int) -> str:
    return (
        f"Watching what is refused of {source}, for {minutes:g} minutes or {requests} requests; Ctrl-C ends it.\n"
        "Post to it now."
    )


def finding(found: "Finding") -> str:
    """A request that was refused: what can be said of it without a word of what it said."""
    headers = ", ".join(f"{name} ({'+'.join(map(str, sizes))})" for name, sizes in sorted(found.headers.items()))
    clock = (
        "no time"
        if found.clock is None
        else f"{abs(found.clock):g} s {'ahead of' if found.clock > 0 else 'behind'} ours"
    )
    said = found.mistakes or ["nothing is signed here that could be looked at"]
    return "\n".join(
        [
            f"\n{second(found.at)}  {found.reason}",
            *(f"  → {mistake}" for mistake in said),
            f"  its clock   {clock}",
            f"  body        {found.body} bytes",
            f"  headers     {headers}",
        ]
    )


def events(found: Page[EventSummary]) -> str:
    return _list(
        ["RECEIVED", "EVENT", "TYPE", "SUBJECT", "FACILITY", "DELIVERIES"],
        [
            [
                second(event.received_at),
                str(event.id),
                event.type,
                event.subject or "–",
                event.facility or "–",
                ", ".join(f"{delivery.destination} {delivery.state}" for delivery in event.deliveries) or "unrouted",
            ]
            for event in found.items
        ],
        found.next,
        nothing="No events match.",
    )


def letters(found: Page[Letter]) -> str:
    return _list(
        ["DIED", "EVENT", "DESTINATION", "SUBJECT", "TRIES", "CAUSE"],
        [
            [
                second(letter.died_at),
                str(letter.event_id),
                letter.destination,
                letter.subject or "–",
                letter.attempts,
                letter.cause,
            ]
            for letter in found.items
        ],
        found.next,
        nothing="No dead letters match.",
    )


def letter(found: Letter, attempts: Sequence[AttemptRecord], deeds: Sequence[Deed]) -> str:
    """One dead letter: why, what to do, and every try."""
    about = [
        ["event", str(found.event_id)],
        ["type", found.type or "–"],
        ["subject", found.subject or "–"],
        ["facility", found.facility or "–"],
        ["died", f"{second(found.died_at)}, {ago(found.died_at)} ago"],
        ["cause", found.cause],
        ["reason", found.reason],
    ]
    happened = [*_tries(found.destination, attempts), *_deeds(deeds)]
    return "\n".join(
        [
            f"Dead letter for {found.destination}",
            *_aligned(about, indent="  "),
            f"  {found.mend}",
            "",
            *_in_order(happened),
        ]
    )


def causes(found: Page[Cause]) -> str:
    """Each cause is two lines: the numbers, and what to do."""
    if not found.items:
        return "No dead letters."
    rows = [
        [cause.count, cause.cause, cause.reason, second(cause.first_seen), second(cause.last_seen)]
        for cause in found.items
    ]
    head, *lines = _aligned([["COUNT", "CAUSE", "REASON", "FIRST SEEN", "LAST SEEN"], *rows])
    told = [text for line, cause in zip(lines, found.items, strict=True) for text in (line, f"       {cause.mend}")]
    return "\n".join([head, *told, *_more(found.next)])


def preview(found: Preview, verb: str) -> str:
    if not found.count:
        return "No dead letters match."
    where = [
        ["", count, f"{what} {name}"]
        for what, counted in (("to", found.destinations), ("because of", found.causes))
        for name, count in counted.items()
    ]
    oldest = f", the oldest dead for {ago(found.oldest)}" if found.oldest else ""
    return "\n".join(
        [
            f"Would {verb} {dead_letters(found.count)}{oldest}. Nothing was changed.",
            *_aligned(where),
            *(["More match than are taken at once: run it again for the rest."] if found.more else []),
        ]
    )


def repair(done: Repair, verb: str) -> str:
    if not done.count:
        return "No dead letters match: nothing was changed."
    again = " More match than are taken at once: run it again for the rest." if done.more else ""
    return f"{verb.capitalize()}ed {dead_letters(done.count)}; in the audit as {done.id}.{again}"


def left(found: LeftPreview, verb: str, name: str, to: str | None) -> str:
    """What a reassignment or discard of what waits would take."""
    also = f"{name} has {dead_letters(found.dead)}, too: replay them, so that they wait here, or discard them."
    if not found.count:
        return "\n".join([f"Nothing waits for {name}.", *([also] if found.dead else [])])
    where = f" to {to}" if to else ""
    oldest = f", the oldest waiting for {ago(found.oldest)}" if found.oldest else ""
    return "\n".join(
        [
            f"Would {verb} {_deliveries_of(found.count)} of {name}{where}{oldest}. Nothing was changed.",
            *(_owed_already(found.count - found.made, to) if to else []),
            *(["More wait than are taken at once: run it again for the rest."] if found.more else []),
            *([also] if found.dead else []),
        ]
    )


def moved(done: Moved, verb: str, name: str, to: str | None) -> str:
    if not done.count:
        return f"Nothing waits for {name}: nothing was changed."
    where = f" to {to}" if to else ""
    again = " More wait: do it again for the rest." if done.more else ""
    return "\n".join(
        [
            f"{verb.capitalize()}ed {_deliveries_of(done.count)} of {name}{where}; in the audit as {done.id}.{again}",
            *(_owed_already(done.count - done.made, to) if to else []),
        ]
    )


def _deliveries_of(count: int) -> str:
    return f"{count:,} {'delivery' if count == 1 else 'deliveries'}"


def _owed_already(count: int, to: str) -> list[str]:
    """Those whose event owes the new destination as it is."""
    return [f"Of these, {count:,} without a new one: their events owed {to} already."] if count else []


def destinations(found: Sequence[DestinationLine]) -> str:
    return _list(
        ["NAME", "CONNECTOR", "STATE", "WAITING", "OLDEST", "DEAD", "REASON"],
        [
            [
                line.name,
                line.connector or "not configured",
                line.state,
                line.waiting,
                "–" if line.oldest_waiting_seconds is None else span(timedelta(seconds=line.oldest_waiting_seconds)),
                line.dead,
                _why(line),
            ]
            for line in found
        ],
        None,
        nothing="No destinations are configured.",
    )


def expectation(found: Expectation) -> str:
    """Sources, with what is missing of their numbers; below them destinations that are expected to be in time, and
    the secrets of sources that have several.
    """
    numbers = {(line.source, line.facility): line for line in found.sequences}
    sources = [
        [
            line.name,
            line.facility or "–",
            line.state,
            second(line.heard_at) if line.heard_at else "never",
            line.expected or "–",
            _missing(numbers.get((line.name, line.facility))),
        ]
        for line in found.sources
    ]
    told = _list(
        ["SOURCE", "FACILITY", "STATE", "HEARD", "EXPECTED", "MISSING"],
        sources,
        None,
        nothing="No sources are configured.",
    )
    late = [
        [
            line.destination,
            line.state,
            line.within,
            "–" if line.oldest_waiting_seconds is None else span(timedelta(seconds=line.oldest_waiting_seconds)),
        ]
        for line in found.destinations
    ]
    if late:
        told += f"\n\n{_list(['DESTINATION', 'STATE', 'WITHIN', 'OLDEST'], late, None, nothing='')}"
    several = {source for source, n in Counter(line.source for line in found.secrets).items() if n > 1}
    rotated = [
        [line.source, line.secret, second(line.last_used) if line.last_used else "never"]
        for line in found.secrets
        if line.source in several
    ]
    if rotated:
        told += f"\n\n{_list(['SOURCE', 'SECRET', 'VERIFIED LAST'], rotated, None, nothing='')}"
    return told


def _missing(line: SequenceLine | None) -> str:
    return "–" if line is None else f"{line.missing} of {line.first}–{line.last}"


def tokens(found: Sequence[TokenRecord]) -> str:
    return _list(
        ["ID", "NAME", "ROLE", "MADE"],
        [[token.id, token.name, token.role.value, second(token.created_at)] for token in found],
        None,
        nothing="No tokens. Make one: sluicegate token create --name NAME --role ROLE",
    )


def trial(found: "Trial") -> str:
    """What became of one event of a sample."""
    if found.wrong:
        lines = ["It would be refused:", *(f"  {_clean(reason)}" for reason in found.wrong)]
    else:
        about = f", about {found.subject}" if found.subject else ""
        site = f", in {found.facility}" if found.facility else ""
        lines = [f"Accepted by {found.policy}, as {found.type}{about}{site}."]
    kept = [
        (
            each.field,
            _plain(each.value),
            each.kind,
            each.path and f"from {each.path}",
        )
        for each in found.kept
    ]
    for head, table in (("kept", kept), ("dropped", list(found.dropped.items()))):
        if table:
            lines += ["", f"{head}:", *_aligned(table, indent="  ")]
    return "\n".join(lines)


def differences(found: Sequence["Difference"]) -> str:
    lines = []
    for each in found:
        versions = " → ".join("none" if version is None else str(version) for version in (each.before, each.after))
        lines += [f"{each.policy}: version {versions}", *(f"  {_clean(change)}" for change in each.changes)]
        if each.unnumbered:
            lines.append(
                "  It keeps something else under the same number: give it a new version, or no start accepts it."
            )
    return "\n".join(lines) or "No policy differs."


def rows(heads: Sequence[str], found: Iterable[Sequence[object]]) -> str:
    """A small table."""
    return "\n".join(_aligned([list(heads), *map(list, found)]))


def dead_letters(count: int) -> str:
    return counted(count, "dead letter")


def counted(count: int, what: str) -> str:
    """`1 policy`, `2 policies`, `1,200 dead letters`."""
    return f"{count:,} {what if count == 1 else what[:-1] + 'ies' if what.endswith('y') else what + 's'}"


# ── times ────────────────────────────────────────────────────────────────────────────────────────────


def second(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def instant(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}Z"


def ago(at: datetime) -> str:
    return span(datetime.now(UTC) - at)


def span(length: timedelta) -> str:
    """`0.4 s`, `41 s`, `2 h 29 min`, `3 d 4 h`: two units at most."""
    seconds = max(length.total_seconds(), 0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


# ── one event ────────────────────────────────────────────────────────────────────────────────────────


def _head(event: EventRecord) -> Iterator[str]:
    yield f"{event.type}  {event.id}"
    yield from _aligned(
        [
            ["subject", event.subject or "–"],
            ["facility", event.facility or "–"],
            ["source", event.source],
            ["policy", f"{event.policy} {event.policy_version}"],
            ["time", second(event.time)],
            ["data", "  ".join(f"{name}={_plain(value)}" for name, value in event.data.items())],
        ],
        indent="  ",
    )


def _deliveries(event: EventRecord) -> list[str]:
    if not event.deliveries:
        return ["No route wants it: it is kept, and counted as unrouted."]
    return _aligned(
        [["DESTINATION", "STATE", "TRIES", "DUE", "REASON"]]
        + [
            [
                delivery.destination,
                delivery.state,
                len(delivery.attempts),
                second(delivery.due_at) if delivery.due_at else "–",
                delivery.reason or "–",
            ]
            for delivery in event.deliveries
        ]
    )


def _timeline(event: EventRecord, letters: Sequence[Letter], deeds: Sequence[Deed]) -> list[str]:
    return _in_order(
        [
            Happened(event.received_at, "", "accepted", "", "", event.trace_id or ""),
            *(line for delivery in event.deliveries for line in _tries(delivery.destination, delivery.attempts)),
            *(Happened(letter.died_at, letter.destination, "dead letter", "", letter.cause, "") for letter in letters),
            *_deeds(deeds),
        ]
    )


class Happened(NamedTuple):
    """One line of a story."""

    at: datetime
    destination: str
    what: str
    status: str
    says: str
    trace: str


def _in_order(happened: Sequence[Happened]) -> list[str]:
    """What happened, the oldest first; of one instant, in the order in which it was given."""
    lines = [[instant(line.at), *line[1:]] for line in sorted(happened, key=lambda line: line.at)]
    return _aligned([["AT", "DESTINATION", "WHAT", "STATUS", "SAYS", "TRACE"], *lines])


def _tries(destination: str, attempts: Sequence[AttemptRecord]) -> Iterator[Happened]:
    for attempt in attempts:
        status = "" if attempt.status is None else str(attempt.status)
        said = f"{attempt.reason or attempt.receipt or ''} in {attempt.took_ms} ms".strip()
        what = f"try {attempt.number}: {attempt.outcome}"
        yield Happened(attempt.at, destination, what, status, said, attempt.trace_id or "")


def _deeds(deeds: Sequence[Deed]) -> Iterator[Happened]:
    """What people did to deliveries; the audit keeps each by its key, EVENT/DESTINATION."""
    done = {
        "dead-letters.replay": "replayed",
        "dead-letters.discard": "discarded",
        "destination.reassign": "reassigned",
        "destination.discard": "discarded",
    }
    for deed in deeds:
        for delivery in deed.detail["deliveries"]:
            destination = delivery.partition("/")[2]
            yield Happened(deed.at, destination, done[deed.action], "", f"by {deed.actor}: {deed.reason}", "")


def _why(line: DestinationLine) -> str:
    """Why it is held and by whom, and when that ends."""
    reason = f"{line.reason or 'no reason given'} — by {line.held_by}" if line.held_by else line.reason
    until = f"until {second(line.until)}" if line.until else ""
    return ", ".join(filter(None, [reason, until])) or "–"


def _plain(value: object) -> str:
    """A kept value as JSON would write it, but for the quotes."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────


def _list(heads: Sequence[str], found: Sequence[Sequence[Any]], cursor: str | None, *, nothing: str) -> str:
    if not found:
        return nothing
    return "\n".join([*_aligned([list(heads), *map(list, found)]), *_more(cursor)])


def _more(cursor: str | None) -> list[str]:
    return [f"There are more: --cursor {cursor}"] if cursor else []


def _aligned(table: Sequence[Sequence[object]], *, indent: str = "") -> list[str]:
    """Columns as wide as their widest cell; numbers to the right."""
    texts = [[_clean(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numbers = [any(isinstance(row[place], int) for row in table) for place in range(len(widths))]
    return [
        indent
        + "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in texts
    ]


def _clean(cell: object) -> str:
    """A cell is one line and cannot move the cursor of a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(cell))
