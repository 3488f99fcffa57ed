"""What the ledgers and the database must agree on.  Pure: it is given everything, and asks nobody.

Each rule is a function from the evidence to what breaks it, in words.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.ledger import Disturbance, Process, Receipt, Said, Sample, Sent, by_order

FINAL = {"delivered", "discarded", "dead"}
STANDS = {"delivered", "waiting", "held", "dead", "discarded"}
SETTLES = 2.0  # seconds in which an answer is written down on a busy machine, and so is no longer in flight
MOST_MEMORY = 400 * 2**20
MOST_GROWTH = 100 * 2**20
MOST_FILES = 700
MOST_SOCKETS = 600


Standings = Mapping[tuple[str, str], str | None]  # event and destination, and where it stands


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An event in the database, and where each of its deliveries stands (None: nowhere)."""

    event: str
    n: int
    deliveries: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    sent: Sequence[Sent]
    receipts: Sequence[Receipt]
    stored: Sequence[Stored]
    owed: frozenset[str] = frozenset()  # the partners to whom each order is owed
    keeps_keys: frozenset[str] = frozenset()
    in_order: frozenset[str] = frozenset()  # the partners that get one delivery of a subject at a time
    disturbances: Sequence[Disturbance] = ()
    samples: Sequence[Sample] = ()
    finals: Sequence[Standings] = ()  # what stood as final, the oldest first
    replayed: frozenset[tuple[str, str]] = frozenset()  # dead letters that somebody sent again
    leaked: Sequence[str] = ()  # where a canary was found
    unaccounted: Sequence[str] = field(default_factory=tuple)  # what a fault itself found broken


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: int
    lost: int
    doubled: int
    broken: list[str]

    @property
    def holds(self) -> bool:
        return not self.broken


def check(evidence: Evidence) -> Verdict:
    broken = [f"{rule.__name__}: {what}" for rule in RULES for what in _some(list(rule(evidence)))]
    return Verdict(
        accepted=sum(said is Said.OK for said in by_order(evidence.sent).values()),
        lost=len(set(lost(evidence))),
        doubled=len(doubled(evidence)),
        broken=broken,
    )


def _some(found: list[str]) -> list[str]:
    """Three examples tell as much as a thousand."""
    return found if len(found) <= 3 else [*found[:3], f"and {len(found) - 3} more"]


def lost(evidence: Evidence) -> Iterator[int]:
    """Orders that were accepted and are nowhere, in whole or in part: each is owed to the same partners."""
    there = {(stored.n, stored.event): stored for stored in evidence.stored}
    for line in evidence.sent:
        if line.said is Said.OK:
            stored = there.get((line.n, line.event or ""))
            if (
                stored is None
                or not evidence.owed <= stored.deliveries.keys()
                or not all(state in STANDS for state in stored.deliveries.values())
            ):
                yield line.n


def doubled(evidence: Evidence) -> list[tuple[Receipt, Receipt]]:
    """A delivery that was taken, and the one after it with the same key."""
    return [
        (first, again)
        for attempts in _by_key(evidence).values()
        for first, again in pairwise(attempts)
        if first.taken and again.status is not None
    ]


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────


def every_accepted_order_is_somewhere(evidence: Evidence) -> Iterator[str]:
    for n in sorted(set(lost(evidence))):
        yield f"order {n} was accepted and is neither delivered, waiting, held nor dead"


def what_was_refused_left_no_row(evidence: Evidence) -> Iterator[str]:
    said = by_order(evidence.sent)
    for stored in evidence.stored:
        if said.get(stored.n) is Said.REFUSED:
            yield f"order {stored.n} was refused, and is stored as {stored.event}"


def each_order_is_there_once_or_not_at_all(evidence: Evidence) -> Iterator[str]:
    said = by_order(evidence.sent)
    events: dict[int, list[str]] = defaultdict(list)
    for stored in evidence.stored:
        events[stored.n].append(stored.event)
    for n, there in events.items():
        if len(there) > 1:
            yield f"order {n} is stored {len(there)} times"
        if n not in said:
            yield f"order {n} is stored, and nobody sent it"
    ids: dict[int, set[str]] = defaultdict(set)
    for line in evidence.sent:
        if line.said is Said.OK and line.event:
            ids[line.n].add(line.event)
    for n, told in ids.items():
        if len(told) > 1:
            yield f"order {n} was told {len(told)} different ids"


def one_effect_a_delivery_where_keys_are_kept(evidence: Evidence) -> Iterator[str]:
    """Counted by order, not by key: a delivery that changes its key would otherwise look like two."""
    effects: dict[tuple[str, int], int] = defaultdict(int)
    for receipt in evidence.receipts:
        if receipt.effect and receipt.partner in evidence.keeps_keys:
            effects[receipt.partner, receipt.n] += 1
    for (partner, n), times in effects.items():
        if times > 1:
            yield f"order {n} took effect {times} times at {partner}"


def one_key_is_one_delivery(evidence: Evidence) -> Iterator[str]:
    keys: dict[tuple[str, int], set[str]] = defaultdict(set)
    bodies: dict[str, set[str]] = defaultdict(set)
    for receipt in evidence.receipts:
        keys[receipt.partner, receipt.n].add(receipt.key)
        bodies[receipt.key].add(receipt.digest)
    for (partner, n), used in keys.items():
        if len(used) > 1:
            yield f"order {n} came to {partner} under {len(used)} keys"
    for key, digests in bodies.items():
        if len(digests) > 1:
            yield f"{key} came with {len(digests)} different bodies"


def what_is_delivered_was_taken(evidence: Evidence) -> Iterator[str]:
    taken = {(receipt.partner, receipt.n) for receipt in evidence.receipts if receipt.taken}
    for stored in evidence.stored:
        for partner, state in stored.deliveries.items():
            if state == "delivered" and (partner, stored.n) not in taken:
                yield f"order {stored.n} is delivered to {partner}, which never took it"


def only_what_was_in_flight_is_sent_again(evidence: Evidence) -> Iterator[str]:
    for first, again in doubled(evidence):
        if not _disturbed(evidence, first, first.ended + SETTLES):
            yield f"{again.key} was taken, written down in peace, and sent again"


def attempts_of_one_key_do_not_overlap(evidence: Evidence) -> Iterator[str]:
    for key, attempts in _by_key(evidence).items():
        for first, again in pairwise(attempts):
            if again.began < first.ended and not _disturbed(evidence, first, again.began):
                yield f"{key} was tried twice at the same time"


def one_subject_at_a_time_where_order_is_asked_for(evidence: Evidence) -> Iterator[str]:
    by_subject: dict[tuple[str, str], list[Receipt]] = defaultdict(list)
    for receipt in evidence.receipts:
        if receipt.partner in evidence.in_order and receipt.subject:
            by_subject[receipt.partner, receipt.subject].append(receipt)
    for (partner, subject), attempts in by_subject.items():
        for first, again in pairwise(sorted(attempts, key=lambda receipt: receipt.began)):
            if again.began < first.ended and not _disturbed(evidence, first, again.began):
                yield f"{partner} got two deliveries of {subject} at the same time"


def what_is_final_stays(evidence: Evidence) -> Iterator[str]:
    now: Standings = {(s.event, partner): state for s in evidence.stored for partner, state in s.deliveries.items()}
    each: list[Standings] = [*evidence.finals, now]
    for before, after in pairwise(each):
        for delivery, state in before.items():
            if delivery not in evidence.replayed and after.get(delivery) != state:
                yield f"{'/'.join(delivery)} was {state}, and is {after.get(delivery) or 'nowhere'}"


def the_books_balance_at_each_moment(evidence: Evidence) -> Iterator[str]:
    for sample in evidence.samples:
        if sample.told is False:
            yield f"at {sample.at:.0f} the program itself said that they do not"
        if rows := sample.rows:
            ended = rows["delivered"] + rows["pending"] + rows["dead"] + rows["discarded"]
            if rows["owed"] != ended:
                yield f"at {sample.at:.0f} {rows['owed']} were owed, and {ended} accounted for"


def somebody_looked(evidence: Evidence) -> Iterator[str]:
    """A rule about samples is worth nothing without any."""
    if not any(sample.rows for sample in evidence.samples):
        yield "the books were never counted from the rows"
    if not any(sample.told for sample in evidence.samples):
        yield "the program was never heard to say that its books balance"
    if not any(sample.processes for sample in evidence.samples):
        yield "no process was ever looked at"


def what_it_holds_is_bounded(evidence: Evidence) -> Iterator[str]:
    for (name, pid), held in _by_process(evidence.samples).items():
        if (most := max(p.rss for p in held)) > MOST_MEMORY:
            yield f"{name} ({pid}) used {most >> 20} MiB"
        settled = held[len(held) // 3 :]  # it has warmed up
        if (growth := settled[-1].rss - settled[0].rss) > MOST_GROWTH:
            yield f"{name} ({pid}) grew by {growth >> 20} MiB"
        if (files := max(p.files for p in held)) > MOST_FILES:
            yield f"{name} ({pid}) had {files} files open"
        if (sockets := max(p.sockets for p in held)) > MOST_SOCKETS:
            yield f"{name} ({pid}) had {sockets} sockets open"


def nothing_leaked(evidence: Evidence) -> Iterator[str]:
    for place in evidence.leaked:
        yield f"what no policy names is in {place}"


def what_the_fault_itself_demands(evidence: Evidence) -> Iterator[str]:
    yield from evidence.unaccounted


RULES: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    every_accepted_order_is_somewhere,
    what_was_refused_left_no_row,
    each_order_is_there_once_or_not_at_all,
    one_effect_a_delivery_where_keys_are_kept,
    one_key_is_one_delivery,
    what_is_delivered_was_taken,
    only_what_was_in_flight_is_sent_again,
    attempts_of_one_key_do_not_overlap,
    one_subject_at_a_time_where_order_is_asked_for,
    what_is_final_stays,
    the_books_balance_at_each_moment,
    somebody_looked,
    what_it_holds_is_bounded,
    nothing_leaked,
    what_the_fault_itself_demands,
)


# ── how the evidence is laid out ────────────────────────────────────────────────────────────────────


def _by_key(evidence: Evidence) -> dict[str, list[Receipt]]:
    """The attempts of each delivery, in the order in which they began."""
    found: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in sorted(evidence.receipts, key=lambda receipt: receipt.began):
        found[receipt.key].append(receipt)
    return found


def _disturbed(evidence: Evidence, first: Receipt, until: float) -> bool:
    """Whether something happened to the process that sent the first, from then on."""
    return any(
        d.began <= until and d.ended >= first.began and d.struck in {"", first.via} for d in evidence.disturbances
    )


def _by_process(samples: Sequence[Sample]) -> dict[tuple[str, int], list[Process]]:
    found: dict[tuple[str, int], list[Process]] = defaultdict(list)
    for sample in samples:
        for process in sample.processes:
            found[process.name, process.pid].append(process)
    return found
