"""The names that the outside sees stand in one place, and each of them is really used: read from the source itself."""

import ast
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

from observability.metrics import Metrics
from observability.names import Attribute, LogEvent, MetricName, SpanName

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "outbox", "connectors", "dead_letter", "observability")
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
METRICS = {name for name in vars(Metrics()) if not name.startswith("_")}


SOURCES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text())
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}


def test_every_log_line_begins_with_a_log_event() -> None:
    for where, call in log_calls():
        assert call.args, where
        for said in alternatives(call.args[0]):
            assert members_at("LogEvent", said) or isinstance(said, ast.Name), f"{where}: no LogEvent"


def test_no_fact_is_called_event() -> None:
    """So structlog calls the name of the line, and would raise: the id of an event is `event_id`."""
    for where, call in log_calls():
        assert "event" not in {keyword.arg for keyword in call.keywords}, where
    for node in everything_but("observability/logs.py"):
        match node:
            case ast.Assign(targets=[ast.Name(id="facts")], value=ast.Dict(keys=keys)):
                assert "event" not in {key.value for key in keys if isinstance(key, ast.Constant)}, ast.unparse(node)
            case _:
                pass


def test_no_log_line_is_given_a_text_made_of_an_exception() -> None:
    """The log cannot tell a name from a message, so that a message is not even offered."""
    for where, call in log_calls():
        for keyword in call.keywords:
            made = [node for node in ast.walk(keyword.value) if isinstance(node, ast.Call)]
            named = {node.func.id for node in made if isinstance(node.func, ast.Name)}
            errors = {node.id for node in ast.walk(keyword.value) if isinstance(node, ast.Name)} & {"error", "exc", "e"}
            assert not (named & {"str", "repr"} and errors), f"{where}: {keyword.arg}"


def test_nobody_logs_past_the_log() -> None:
    for file, tree in SOURCES.items():
        if file == "observability/logs.py":
            continue
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Import) and any(name.name == "logging" for name in node.names)), file
            assert not (isinstance(node, ast.ImportFrom) and node.module == "logging"), file


def test_every_log_event_is_logged() -> None:
    logged = {name for node in everything_but("observability/names.py") for name in members_at("LogEvent", node)}
    assert set(LogEvent.__members__) - logged == set()


def test_every_metric_is_counted() -> None:
    """At the place, or where the samples of one destination are found once for all that is counted there."""
    counted = {
        node.attr
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_metrics(node.value)
    }
    assert METRICS - counted == set()


@pytest.mark.parametrize("names", [MetricName, SpanName, Attribute])
def test_every_name_is_used(names: type[StrEnum]) -> None:
    used = {name for node in everything_but("observability/names.py") for name in members_at(names.__name__, node)}
    assert set(names.__members__) - used == set()


def test_no_name_is_written_out_a_second_time() -> None:
    names = {*MetricName, *Attribute, *LogEvent}
    written = [node.value for node in everything_but("observability/names.py") if isinstance(node, ast.Constant)]
    assert names.intersection(one for one in written if isinstance(one, str)) == set()


def everything_but(file: str) -> Iterator[ast.AST]:
    return (node for other, tree in SOURCES.items() if other != file for node in ast.walk(tree))


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            match node.func:
                case ast.Attribute(attr=level, value=ast.Name(id="log")) if level in LEVELS:
                    yield f"{file}:{node.lineno}", node
                case ast.Attribute(attr=level, value=ast.Attribute(attr="log" | "_log")) if level in LEVELS:
                    yield f"{file}:{node.lineno}", node
                case ast.Attribute(attr=level, value=ast.Call(func=ast.Attribute(attr="get_logger"))) if (
                    level in LEVELS
                ):
                    yield f"{file}:{node.lineno}", node
                case ast.Call(func=ast.Name(id="getattr"), args=[ast.Call(func=ast.Attribute(attr="get_logger")), *_]):
                    if file != "observability/logs.py" or "LIBRARY_SAID" in members("LogEvent", node):
                        yield f"{file}:{node.lineno}", node
                case ast.Name(id="log_sparingly"):
                    yield f"{file}:{node.lineno}", node
                case _:
                    pass


def alternatives(said: ast.expr) -> list[ast.expr]:
    if isinstance(said, ast.IfExp):
        return [*alternatives(said.body), *alternatives(said.orelse)]
    return [said]


def members(enum: str, within: ast.AST) -> set[str]:
    return {name for node in ast.walk(within) for name in members_at(enum, node)}


def members_at(enum: str, node: ast.AST) -> set[str]:
    match node:
        case ast.Attribute(attr=name, value=ast.Name(id=of)) if of == enum:
            return {name}
        case _:
            return set()


def is_metrics(of: ast.expr) -> bool:
    return (isinstance(of, ast.Name) and of.id == "metrics") or (
        isinstance(of, ast.Attribute) and of.attr in ("metrics", "_metrics")
    )
