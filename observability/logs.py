"""One line for one thing that happened: its name and the facts, and nothing that a policy did not let through.

    log = structlog.get_logger()
    log.info(LogEvent.DELIVERY_SETTLED, event_id=event.id, destination="odoo", outcome="retry", attempt=3)

A fact is a number, a name, an id or a time. Anything else (a payload, a header, an exception) is replaced by the name
of its type, whoever passes it. An exception is told by its type and the places that it passed, since its message may
quote what it failed on, and asyncpg's detail does. What libraries log is told by who and where: aiohttp, for one,
quotes a malformed header.
"""

import atexit
import logging
import re
import sys
import threading
import time
import traceback
import warnings
from asyncio import AbstractEventLoop, Task
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO
from uuid import UUID

import msgspec
import structlog
from structlog.typing import EventDict, WrappedLogger

from observability.line_writer import LineWriter
from observability.names import LogEvent
from observability.spans import current

Form = Literal["json", "console"]
Level = Literal["debug", "info", "warning", "error"]
DEBUG = logging.DEBUG
"""For `log.is_enabled_for`, where the facts of a line cost something and hardly anybody wants it."""


def configure(
    form: Form = "json",
    *,
    level: Level = "info",
    to: TextIO | None = None,
    dropped: Callable[[int], object] = lambda lines: None,  # noqa: ARG005 — named for the reader
) -> "Logs":
    """Send what this process and its libraries log to standard output; close what this returns at the end.

    To be called in the process that works: the thread that writes does not live through a fork. `dropped` hears of
    lines that standard output did not take in time.
    """
    return Logs(form, level=level, to=sys.stdout if to is None else to, dropped=dropped)


def log_sparingly(event: LogEvent, *, level: Level = "warning", **facts: object) -> None:
    """Log what may happen a thousand times a second: one line a second for its name, with the number left out."""
    _log_sparingly(event, level, event, facts)


def _log_sparingly(key: str, level: str, event: LogEvent, facts: dict[str, object]) -> None:
    """One line a second for each key.  Judged before anything is made of it, since in a flood that costs most."""
    now = time.monotonic()
    written, left_out = _sparingly.get(key, (float("-inf"), 0))
    if now - written < 1:
        _sparingly[key] = (written, left_out + 1)
        return
    _sparingly[key] = (now, 0)
    if left_out:
        facts["left_out"] = left_out
    getattr(structlog.get_logger(), level)(event, **facts)


_sparingly: dict[str, tuple[float, int]] = {}  # when the last line was written, and how many were left out since


class Logs:
    """The process's log while it works: this takes every way out that a line, a warning or an exception has."""

    def __init__(self, form: Form, *, level: Level, to: TextIO, dropped: Callable[[int], object]) -> None:
        self._writer = LineWriter(to, dropped=dropped, missed=tell_missed)
        _sparingly.clear()
        self._structlog_before = structlog.get_config()
        render = _as_json if form == "json" else _for_people
        structlog.configure(
            processors=[_facts, render],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=lambda *_: _Lines(self._writer),
            cache_logger_on_first_use=False,
        )
        root = logging.getLogger()
        self._root_before = (root.handlers[:], root.level)
        root.handlers[:] = [_FromLibraries()]
        root.setLevel(logging.WARNING)
        self._hooks_before = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread
        sys.unraisablehook = _uncaught_in_finalizer
        warnings.showwarning = _warned
        atexit.register(self.close)

    def loop_failed(self, _loop: AbstractEventLoop, context: dict[str, Any]) -> None:
        """For `loop.set_exception_handler`: asyncio's own would print the exception and the arguments of callbacks."""
        task = context.get("task") or context.get("future")
        structlog.get_logger().error(
            LogEvent.PROCESS_FAILED,
            where="event loop",
            task=task.get_name() if isinstance(task, Task) else None,
            exc_info=context.get("exception"),
        )

    def close(self) -> None:
        """Write what waits, within a second, and give every way out back to whoever had it."""
        atexit.unregister(self.close)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = self._hooks_before
        root = logging.getLogger()
        root.handlers[:], level = self._root_before
        root.setLevel(level)
        structlog.configure(**self._structlog_before)
        self._writer.close(within=timedelta(seconds=1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.close()


def tell_missed(lines: int) -> None:
    log_sparingly(LogEvent.LOG_LINES_DROPPED, lines=lines)


class _Lines:
    """What structlog hands finished lines to."""

    def __init__(self, writer: LineWriter) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = writer.write


def _facts(_logger: WrappedLogger, method: str, line: EventDict) -> EventDict:
    told: dict[str, object] = {
        "ts": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": "error" if method == "exception" else method,
        "event": _name(line.pop("event")),
    }
    raised = line.pop("exc_info", None)
    told.update((key, _fact(value)) for key, value in line.items())
    if (head := current.get()) is not None:
        told["trace_id"] = head.trace_id
    if raised:
        told.update(_exception(raised))
    return told


def _name(event: object) -> str:
    """A name; a sentence, which can hold anything, is none."""
    return str(event) if re.fullmatch(r"[a-z_]{1,32}(\.[a-z_]{1,32}){1,3}", str(event)) else "unnamed"


def _fact(value: object) -> object:
    match value:
        case Enum():
            return _fact(value.value)
        case None | bool() | int():
            return value
        case float():
            return value if isfinite(value) else str(value)
        case str():
            short = value if len(value) <= 200 else value[:199] + "…"
            return short if short.isprintable() else short.encode("unicode_escape").decode()
        case UUID() | Path() | IPv4Address() | IPv6Address():
            return str(value)
        case datetime() | date():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case tuple() | list() | set() | frozenset():
            return [_fact(one) for one in list(value)[:20]]
        case type():
            return value.__qualname__
        case _:
            return f"<{type(value).__qualname__}>"


def _exception(raised: object) -> dict[str, object]:
    """Its type, the places that it passed, and the types of what led to it; no message, no locals."""
    error = raised[1] if isinstance(raised, tuple) else raised if isinstance(raised, BaseException) else sys.exception()
    if error is None:
        return {}
    told: dict[str, object] = {"error": _type_name(error), "stack": _places(error)}
    if because := [f"{_type_name(earlier)} at {(_places(earlier) or ['?'])[-1]}" for earlier in _before(error)]:
        told["because"] = because
    return told


def _before(error: BaseException) -> Iterator[BaseException]:
    """What it was raised from, or what it carries, ten at the most."""
    seen = {id(error)}
    line = [error]
    while line and len(seen) <= 10:
        of = line.pop(0)
        more = list(of.exceptions) if isinstance(of, BaseExceptionGroup) else []
        for earlier in (of.__cause__ or (None if of.__suppress_context__ else of.__context__), *more):
            if earlier is not None and id(earlier) not in seen:
                seen.add(id(earlier))
                line.append(earlier)
                yield earlier


def _places(error: BaseException) -> list[str]:
    frames = traceback.walk_tb(error.__traceback__)
    return [f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in frames][-20:]


def _short(file: str) -> str:
    """A file as its package names it."""
    roots = [root for root in sys.path if root and file.startswith(root + "/")]
    return file[len(max(roots, key=len)) + 1 :] if roots else file


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _as_json(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
    return msgspec.json.encode(line).decode()


def _for_people(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
    stack = line.pop("stack", [])
    opening = f"{line.pop('ts')} {line.pop('level'):7} {line.pop('event')}"
    facts = [f"{key}={_word(value)}" for key, value in line.items()]
    return "\n    ".join([" ".join([opening, *facts]), *stack])


def _word(value: object) -> str:
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w.:/@+<>…-]+", value) else msgspec.json.encode(value).decode()
    return msgspec.json.encode(value).decode()


def silence(logger: str) -> None:
    """Let nothing of a library's logger through, at any level: it is known to tell what nobody may read."""
    logging.getLogger(logger).addFilter(lambda _: False)


class _FromLibraries(logging.Handler):
    """The way from the standard library's logging: a record's text and arguments stay behind."""

    def emit(self, record: logging.LogRecord) -> None:
        at = f"{_short(record.pathname)}:{record.lineno}"
        level: Level = (
            "error"
            if record.levelno >= logging.ERROR
            else "warning"
            if record.levelno >= logging.WARNING
            else "info"
            if record.levelno >= logging.INFO
            else "debug"
        )
        error = record.exc_info[1] if record.exc_info else None
        facts: dict[str, object] = {"logger": record.name, "at": at, "exc_info": error}
        _log_sparingly(f"{record.name} {at} {_exception(error)}", level, LogEvent.LIBRARY_SAID, facts)


def _uncaught(kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, stack)
    else:
        structlog.get_logger().error(LogEvent.PROCESS_FAILED, where="main", exc_info=error)


def _uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else None
    structlog.get_logger().error(LogEvent.PROCESS_FAILED, where="thread", thread=name, exc_info=failure.exc_value)


def _uncaught_in_finalizer(failure: Any) -> None:
    structlog.get_logger().error(LogEvent.PROCESS_FAILED, where="finalizer", exc_info=failure.exc_value)


def _warned(
    message: Warning | str,  # noqa: ARG001
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    at = f"{_short(filename)}:{lineno}"
    log_sparingly(LogEvent.LIBRARY_SAID, logger="warnings", error=category, at=at)
