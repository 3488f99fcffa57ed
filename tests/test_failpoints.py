"""The program fails where it is told to, only if it is told to, and says that it was told."""

import ast
import dis
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from observability import failpoints
from observability.failpoints import POINTS, FailpointError, FailpointsError, Point, arm, armed, failpoint
from tests.program import Program, configuration, ended_with, order, partner, signed, until

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def nothing_armed() -> Iterator[None]:
    yield
    arm("")


def test_each_point_is_passed_at_one_place_of_the_product() -> None:
    passed: Counter[str] = Counter()
    for package in ("gateway", "outbox", "connectors", "dead_letter", "observability"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(func=ast.Name(id="failpoint"), args=[ast.Constant(value=str(point))]):
                        passed[point] += 1
                    case _:
                        pass
    assert passed == Counter(POINTS)


def test_what_is_not_armed_calls_nothing_and_costs_one_look_into_an_empty_dictionary() -> None:
    """Counted in instructions of the interpreter: a clock would measure what else the machine does."""
    assert type(failpoints._armed) is dict
    assert failpoints._armed == {}
    passed = instructions_of_passing("intake.committed")
    assert [each.argval for each in passed if each.opcode in dis.hasname] == ["_armed"]
    assert calls_in(passed) == 0
    assert len(passed) <= 10
    arm("intake.committed=raise@2")
    assert calls_in(instructions_of_passing("intake.committed")) == 2  # it is found, and comes by


def test_it_fails_each_time_or_only_the_nth_time() -> None:
    arm("intake.committed=raise; intake.read = raise@3")
    for _ in range(2):
        with pytest.raises(FailpointError, match=r"intake\.committed"):
            failpoint("intake.committed")
    failpoint("intake.read")
    failpoint("intake.read")
    with pytest.raises(FailpointError):
        failpoint("intake.read")
    failpoint("intake.read")
    failpoint("dispatch.answered")
    assert armed() == ["intake.committed=raise", "intake.read = raise@3"]


def test_chance_is_the_same_for_the_same_seed_and_about_as_often_as_was_said() -> None:
    def fails(seed: int) -> list[int]:
        arm(f"intake.committed=raise%0.2; seed={seed}")
        return [n for n in range(500) if failed()]

    def failed() -> bool:
        try:
            failpoint("intake.committed")
        except FailpointError:
            return True
        return False

    assert fails(7) == fails(7) != fails(8)
    assert 50 < len(fails(7)) < 150


def test_sleep_holds_the_whole_process() -> None:
    arm("intake.committed=sleep(0.05)@1")
    began = time.monotonic()
    failpoint("intake.committed")
    failpoint("intake.committed")
    assert 0.05 <= time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("spoken", "said"),
    [
        ("intake.comitted=exit", 'no failpoint "intake.comitted"; did you mean "intake.committed"?'),
        ("intake.committed=exot", 'cannot do "exot"; did you mean "exit"?'),
        ("intake.committed", "NAME=ACTION@NTH"),
        ("intake.committed=sleep", r"sleep(0.5), with its seconds"),
        ("intake.committed=exit(3)", "exit, without seconds"),
        ("intake.committed=exit@0", "count from @1"),
        ("intake.committed=exit%0", "0 < % <= 1"),
        ("intake.committed=exit%1.5", "0 < % <= 1"),
        ("intake.committed=exit, intake.read=exit", "cannot be read"),
        ("intake.committed=exit; intake.committed=stop", "armed twice"),
        ("zzz=exit", "; there are intake.read, "),
    ],
)
def test_what_makes_no_sense_is_an_error_that_says_what_would(spoken: str, said: str) -> None:
    arm("intake.read=raise")
    with pytest.raises(FailpointsError) as error:
        arm(spoken)
    assert said in str(error.value)
    assert armed() == ["intake.read=raise"]


def test_the_program_refuses_to_start_with_a_failpoint_that_does_not_exist(tmp_path: Path) -> None:
    program = Program(
        tmp_path, configuration(partner="http://127.0.0.1:9"), environ={failpoints.VARIABLE: "intake.comitted=exit"}
    )
    with ended_with(program):
        assert program.start().ended() == 1
        assert 'did you mean "intake.committed"?' in program.output
        assert "Traceback" not in program.output


def test_the_program_says_what_is_armed_and_ends_there_as_if_killed(tmp_path: Path, dsn: str) -> None:
    with partner() as ledger:
        text = configuration(partner=ledger.address, database=dsn)
        program = Program(tmp_path, text, environ={failpoints.VARIABLE: "intake.committed=exit@2"})
        with ended_with(program):
            program.start().ready()
            [line] = program.log("failpoints.armed")
            assert (line["level"], line["points"]) == ("error", ["intake.committed=exit@2"])
            first, second = order(), order()
            program.accept(first)
            headers = signed(second)
            with pytest.raises(OSError, match=r"closed|reset"):
                program.post(second, **headers)
            assert program.ended() == 137
            program = Program(tmp_path, text, name="again")
            with ended_with(program):
                program.start().ready()
                assert program.log("failpoints.armed") == []
                answer = program.post(second, **headers)
                assert (answer.status, answer.json["duplicate"]) == (200, True)
                until(lambda: len(ledger.events()) == 2, 20, "both deliveries")


def test_a_stopped_process_goes_on_when_it_is_told_to(tmp_path: Path, dsn: str) -> None:
    with partner() as ledger:
        program = Program(
            tmp_path,
            configuration(partner=ledger.address, database=dsn),
            environ={failpoints.VARIABLE: "dispatch.answered=stop@1"},
        )
        with ended_with(program):
            program.start().ready()
            event = program.accept()
            until(lambda: state_of(program.running.pid) == "T", 20, "stop")
            program.signal({program.running.pid}, signal.SIGCONT)
            until(
                lambda: program.metric('sluicegate_attempts_total{destination="ledger",outcome="delivered"}'), 20, event
            )
            assert ledger.events() == {event}


def state_of(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def instructions_of_passing(point: Point) -> list[dis.Instruction]:
    """Each that is executed, in turn."""
    known = {each.offset: each for each in dis.get_instructions(failpoint)}
    passed: list[dis.Instruction] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not failpoint.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            passed.append(known[frame.f_lasti])
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one only when tracing begins
    sys.settrace(trace)
    try:
        failpoint(point)
    finally:
        sys.settrace(before)
    return passed


def calls_in(passed: list[dis.Instruction]) -> int:
    return sum(each.opname.startswith("CALL") for each in passed)
