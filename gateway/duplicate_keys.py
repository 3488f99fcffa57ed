"""Finds a declared name that a JSON body gives twice: two readers of such a body may see two different facts.  Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class Level:
    """The declared names of one object, and the levels below those that are objects themselves."""

    below: dict[str, "Level"] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[tuple[str, ...]]) -> "Level":
        root = cls()
        for path in paths:
            level = root
            for name in path:
                level = level.below.setdefault(name, cls())
        return root

    def names(self) -> set[str]:
        return set(self.below).union(*(level.names() for level in self.below.values()))


class DuplicateKeys:
    """A cheap look first, which settles nearly every body: does a declared name stand in it twice at all?

    Only then the whole body is scanned, token by token.  Nothing is decoded but the keys beside declared ones.
    """

    def __init__(self, declared: Level) -> None:
        self._declared = declared
        names = declared.names()
        self._quoted = tuple(msgspec.json.encode(name) for name in sorted(names))
        self._hidden = _ASCII_ESCAPE if all(map(_UNESCAPED.fullmatch, names)) else _ANY_ESCAPE

    def find(self, body: bytes) -> str | None:
        """The path of a name that stands twice in `body`, which is JSON and an object."""
        for quoted in self._quoted:
            if body.count(quoted) > 1:
                return self._scan(body)
        if b"\\" in body and self._hidden.search(body):
            return self._scan(body)
        return None

    def _scan(self, body: bytes) -> str | None:
        open_levels: list[tuple[Level | None, str, set[str]]] = []
        entering: Level | None = self._declared  # what the next brace opens, if it is declared
        path = ""
        for token in _TOKEN.finditer(body):
            match token[0][:1]:
                case b"{":
                    open_levels.append((entering, path, set()))
                    entering = None
                case b"[":
                    open_levels.append((None, path, set()))
                    entering = None
                case b"}" | b"]":
                    open_levels.pop()
                case _ if (level := open_levels[-1][0]) is not None and token[0].endswith(b":"):
                    _, above, seen = open_levels[-1]
                    name = msgspec.json.decode(token[1], type=str)
                    entering = level.below.get(name)
                    path = f"{above}.{name}" if above else name
                    if entering is not None and name in seen:
                        return path
                    seen.add(name)
                case _:
                    pass
        return None


_TOKEN = re.compile(rb'("(?:[^"\\]++|\\.)*+")(?:[ \t\r\n]*+:)?|[{}\[\]]', re.DOTALL)
_UNESCAPED = re.compile(r"[A-Za-z0-9_.-]*")  # names that nothing but \u00XX can hide
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
_ANY_ESCAPE = re.compile(rb"\\")
