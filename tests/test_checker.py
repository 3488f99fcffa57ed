"""Each rule of the checker catches its fault: a ledger that is in order passes, and one with that fault does not."""

from dataclasses import replace
from pathlib import Path

import pytest

from chaos.checker import RULES, Evidence, Stored, check
from chaos.ledger import Disturbance, Ledger, Process, Receipt, Said, Sample, Saw, Sent, by_order, lines, receipts

EVENT = "0197"
KEY = f"{EVENT}/keeper"


def sent(n: int = 1, said: Said = Said.OK, *, event: str | None = EVENT, at: float = 1) -> Sent:
    return Sent(n=n, at=at, ended=at + 0.1, said=said, status=202 if said is Said.OK else None, event=event)


def received(
    key: str = KEY, *, n: int = 1, at: float = 2, took: float = 0.1, status: int | None = 200, effect: bool = True
) -> Receipt:
    return Receipt(
        partner="keeper",
        key=key,
        n=n,
        began=at,
        ended=at + took,
        status=status,
        subject="lot/1",
        digest="d",
        effect=effect,
        via="dispatcher-1",
    )


def stored(n: int = 1, *, event: str = EVENT, state: str | None = "delivered") -> Stored:
    return Stored(event=event, n=n, deliveries={"keeper": state})


def books(owed: int = 1, delivered: int = 1, pending: int = 0) -> dict[str, int]:
    return {"owed": owed, "delivered": delivered, "pending": pending, "dead": 0, "discarded": 0}


def held(*, rss: int = 80, files: int = 50, sockets: int = 30) -> Sample:
    return Sample(at=5, processes=(Process(name="gateway-1", pid=7, rss=rss << 20, files=files, sockets=sockets),))


IN_ORDER = Evidence(
    sent=[sent(), sent(2, Said.REFUSED, event=None), sent(3, Said.UNKNOWN, event=None)],
    receipts=[received()],
    stored=[stored()],
    owed=frozenset({"keeper"}),
    keeps_keys=frozenset({"keeper"}),
    in_order=frozenset({"keeper"}),
    disturbances=[Disturbance(name="kill", began=100, ended=101)],
    samples=[Sample(at=4, rows=books(), told=True), held(), held()],
    finals=[{(EVENT, "keeper"): "delivered"}],
)


def broken(**changes: object) -> set[str]:
    return {told.partition(":")[0] for told in check(replace(IN_ORDER, **changes)).broken}


def test_what_is_in_order_passes() -> None:
    verdict = check(IN_ORDER)
    assert (verdict.broken, verdict.accepted, verdict.lost, verdict.doubled) == ([], 1, 0, 0)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("every_accepted_order_is_somewhere", {"stored": [], "finals": []}),
        ("every_accepted_order_is_somewhere", {"stored": [stored(state=None)], "finals": []}),
        ("every_accepted_order_is_somewhere", {"stored": [stored(state="waiting and dead")], "finals": []}),
        ("every_accepted_order_is_somewhere", {"owed": frozenset({"keeper", "line"})}),
        ("somebody_looked", {"samples": [held()]}),
        ("somebody_looked", {"samples": [Sample(at=4, rows=books())]}),
        ("every_accepted_order_is_somewhere", {"sent": [sent(event="another")], "finals": []}),
        ("what_was_refused_left_no_row", {"stored": [stored(), stored(2, event="0198", state="waiting")]}),
        ("each_order_is_there_once_or_not_at_all", {"stored": [stored(), stored(event="0198", state="waiting")]}),
        (
            "each_order_is_there_once_or_not_at_all",
            {"stored": [stored(), stored(3, event="0198", state="waiting"), stored(3, event="0199", state="waiting")]},
        ),
        ("each_order_is_there_once_or_not_at_all", {"stored": [stored(), stored(9, event="0198", state="waiting")]}),
        ("each_order_is_there_once_or_not_at_all", {"sent": [sent(), sent(event="0198")]}),
        ("one_effect_a_delivery_where_keys_are_kept", {"receipts": [received(), received(at=99)]}),
        ("one_effect_a_delivery_where_keys_are_kept", {"receipts": [received(), received("0198/keeper", at=99)]}),
        ("one_key_is_one_delivery", {"receipts": [received(), received("0198/keeper", at=99, effect=False)]}),
        ("what_is_delivered_was_taken", {"receipts": []}),
        ("what_is_delivered_was_taken", {"receipts": [received(status=503, effect=False)]}),
        ("only_what_was_in_flight_is_sent_again", {"receipts": [received(), received(at=50, effect=False)]}),
        (
            "attempts_of_one_key_do_not_overlap",
            {"receipts": [received(status=503, took=5, effect=False), received(at=3)]},
        ),
        (
            "one_subject_at_a_time_where_order_is_asked_for",
            {"receipts": [received(took=5), received("0198/keeper", n=2, at=3)]},
        ),
        ("what_is_final_stays", {"stored": [stored(state="waiting")]}),
        ("what_is_final_stays", {"finals": [{(EVENT, "keeper"): "dead"}]}),
        ("what_is_final_stays", {"finals": [{("0198", "keeper"): "delivered"}, {(EVENT, "keeper"): "delivered"}]}),
        ("the_books_balance_at_each_moment", {"samples": [Sample(at=4, rows=books(owed=2))]}),
        ("the_books_balance_at_each_moment", {"samples": [Sample(at=4, rows=books(pending=1))]}),
        ("the_books_balance_at_each_moment", {"samples": [Sample(at=4, rows=books(), told=False)]}),
        ("what_it_holds_is_bounded", {"samples": [held(rss=500)]}),
        ("what_it_holds_is_bounded", {"samples": [held(), held(), held(rss=200)]}),
        ("what_it_holds_is_bounded", {"samples": [held(files=5000)]}),
        ("what_it_holds_is_bounded", {"samples": [held(sockets=5000)]}),
        ("nothing_leaked", {"leaked": ["gateway-1"]}),
        ("what_the_fault_itself_demands", {"unaccounted": ["recovered within 5 s"]}),
    ],
)
def test_each_rule_catches_its_fault(rule: str, changes: dict[str, object]) -> None:
    assert rule in broken(**changes)


def test_no_rule_is_without_a_fault_that_it_catches() -> None:
    (cases,) = (mark.args[1] for mark in test_each_rule_catches_its_fault.pytestmark if mark.name == "parametrize")
    assert {rule for rule, _ in cases} == {rule.__name__ for rule in RULES}


def test_what_was_in_flight_at_a_disturbance_may_be_sent_again() -> None:
    again = [received(at=99.5), received(at=101, effect=False)]
    verdict = check(replace(IN_ORDER, receipts=again))
    assert (verdict.broken, verdict.doubled) == ([], 1)


def test_attempts_may_overlap_where_the_first_one_s_owner_was_struck() -> None:
    overlapping = [received(at=99, took=4, status=None, effect=False), received(at=102)]
    assert broken(receipts=overlapping) == set()


def test_what_one_had_in_flight_is_not_excused_by_kills_of_another() -> None:
    kills = [Disturbance(name="kill", began=at, ended=at, struck="gateway-1") for at in range(200)]
    kills += [Disturbance(name="kill", began=at, ended=at, struck="dispatcher-2") for at in range(200)]
    again = [received(at=99.5), received(at=101, effect=False)]
    assert broken(receipts=again, disturbances=kills) == {"only_what_was_in_flight_is_sent_again"}
    mine = Disturbance(name="kill", began=100, ended=100, struck="dispatcher-1")
    assert broken(receipts=again, disturbances=[*kills, mine]) == set()


def test_one_yes_is_a_yes_and_a_doubt_outweighs_a_no() -> None:
    said = by_order([
        sent(1, Said.UNKNOWN), sent(1, Said.OK), sent(1, Said.REFUSED),
        sent(2, Said.REFUSED), sent(2, Said.UNKNOWN), sent(3, Said.REFUSED),
    ])  # fmt: skip
    assert said == {1: Said.OK, 2: Said.UNKNOWN, 3: Said.REFUSED}


def test_a_ledger_is_read_up_to_the_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    ledger = Ledger(path)
    ledger.add(sent(1), sent(2))
    ledger.close()
    ledger.close()
    with path.open("ab") as file:
        file.write(b'{"n":3,"at":')
    assert [line.n for line in lines(path, Sent)] == [1, 2]


def test_a_partner_that_was_never_able_to_answer_is_still_at_it(tmp_path: Path) -> None:
    path = tmp_path / "keeper.jsonl"
    ledger = Ledger(path)
    ledger.add(Saw(number=1, partner="keeper", key=KEY, n=1, subject=None, digest="d", at=2, effect=True))
    ledger.close()
    [receipt] = receipts(path)
    assert (receipt.ended, receipt.status, receipt.taken) == (float("inf"), None, False)
