"""Finds a declared name that a JSON body gives twice: two readers of such a body may see two different facts.  Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class Level:
    """The declared names of one object, and the levels below those that are objects themselves."""

    below: dict[str, "Level"] = field(default_factory=dict)
    objects: dict[str, "Level"] = field(default_factory=dict)  # those of them that have declared names in turn

    @classmethod
    def of(cls, paths: Iterable[tuple[str, ...]]) -> "Level":
        root = cls()
        for path in paths:
            level = root
            for name in path[:-1]:
                level = level.objects.setdefault(name, level.below.setdefault(name, cls()))
            level.below.setdefault(path[-1], cls())
        return root

    def names(self) -> set[str]:
        return set(self.below).union(*(level.names() for level in self.below.values()))


Members = Mapping[str, msgspec.Raw]


def members_of(body: bytes | msgspec.Raw) -> Members:
    """The members of an object, as bytes; of those with one name the last, as every decoder of ours sees it."""
    return _MEMBERS.decode(body)


class DuplicateKeys:
    """Asks three questions, each dearer and surer than the one before, and the first settles nearly every body.

    Are there as many colons as members and their values account for?  If not, do the values beside a declared name hold
    the others of that name?  And only then: what does a scan of the whole body say, token by token?  Nothing is decoded
    but keys beside declared ones.
    """

    def __init__(self, declared: Level) -> None:
        self._declared = declared
        self._quoted = {name: msgspec.json.encode(name) for name in declared.names()}
        self._are_plain = all(map(_PLAIN.fullmatch, self._quoted))

    def find(self, body: bytes, members: Members) -> str | None:
        """The path of a name that stands twice in `body`, which is JSON and an object with these members."""
        if _are_all(members, body, self._declared):
            return None
        if b"\\" in body and (not self._are_plain or _ASCII_ESCAPE.search(body)):
            return self._scan(body)
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


def _are_all(members: Members, body: bytes, level: Level) -> bool:
    """Whether these are surely all members of an object, and so of each declared object in it.

    Each member has a colon of its own, beside those in its name and in its value.  If there are no more than one for
    each member that was decoded and those in its values, then no member is hidden behind a later one of its name.
    """
    if body.count(b":") != len(members) + b"".join(members.values()).count(b":"):
        return False
    for name, below in level.objects.items():
        value = bytes(members.get(name, b""))
        if value.startswith(b"{") and not _are_all(members_of(value), value, below):
            return False
    return True


def _are_explained(suspected: Mapping[str, bytes], body: bytes, level: Level) -> bool:
    """Whether wherever a suspected name stands in an object, it is its one key, or inside a value.

    Of a key that stands twice the decoder keeps the last value, so that the first is missing from the sum.
    """
    members = {name: bytes(value) for name, value in members_of(body).items()}
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
