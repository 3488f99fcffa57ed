"""Finds a declared name that a JSON body gives twice: two readers of such a body may see two different facts.  Pure."""

import re
from collections.abc import Iterable, Mapping
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
    """Asks three questions, each dearer and surer than the one before, and the first settles nearly every body.

    Does a declared name stand in it twice at all?  If so, do the values beside it hold the others?  And only then: what
    does a scan of the whole body say, token by token?  Nothing is decoded but keys beside declared ones.
    """

    def __init__(self, declared: Level) -> None:
        self._declared = declared
        self._quoted = {name: msgspec.json.encode(name) for name in declared.names()}
        self._are_plain = all(map(_PLAIN.fullmatch, self._quoted))
        self._standing = re.compile(b"|".join(map(re.escape, self._quoted.values()))).findall

    def find(self, body: bytes) -> str | None:
        """The path of a name that stands twice in `body`, which is JSON and an object."""
        if b"\\" in body and (not self._are_plain or _ASCII_ESCAPE.search(body)):
            return self._scan(body)
        standing = self._standing(body)
        if self._are_plain and len(standing) == len(set(standing)):
            return None
        suspected = {name: quoted for name, quoted in self._quoted.items() if body.count(quoted) > 1}
        return None if _are_explained(suspected, body, self._declared) else self._scan(body)

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


def _are_explained(suspected: Mapping[str, bytes], body: bytes, level: Level) -> bool:
    """Whether wherever a suspected name stands in an object, it is its one key, or inside a value.

    Of a key that stands twice the decoder keeps the last value, so that the first is missing from the sum.
    """
    members = {name: bytes(value) for name, value in _MEMBERS.decode(body).items()}
    for name, below in level.below.items():
        if quoted := suspected.get(name):
            inside = sum([value.count(quoted) for value in members.values()])
            if body.count(quoted) != inside + (name in members):
                return False
        value = members.get(name, b"")
        if below.below and value.startswith(b"{") and not _are_explained(suspected, value, below):
            return False
    return True


_TOKEN = re.compile(rb'("(?:[^"\\]++|\\.)*+")(?:[ \t\r\n]*+:)?|[{}\[\]]', re.DOTALL)
_PLAIN = re.compile(
    r"[A-Za-z0-9_.-]*"
)  # names that nothing but \u00XX can hide, and that no text around quotes looks like
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
