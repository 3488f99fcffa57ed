"""Whether the pattern of a `code` is safe: it matches no free text, and cannot be made to run for long.

Works on what Python's own parser makes of the pattern, and accepts only what it understands: sets of characters that are
named one by one, groups, alternatives and repeats.  Everything else is refused, with the reason.

Python's matcher tries alternatives one after the other, so a pattern is slow where the same text can be read in many
ways.  Wherever one character does not tell which way to go on, there is a *choice*:

    inside of a repeat      refused: each round would multiply the ways
    outside                 counted: all choices together may make at most 10,000 ways through the longest code
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from re import _constants as op  # type: ignore[attr-defined] # has no stubs, as `re._parser`
from re import _parser  # type: ignore[attr-defined] # the parser of `re` itself, so that both read a pattern alike
from typing import Any, Final

LONGEST_CODE: Final = 256
MOST_WAYS: Final = 10_000


def why_unsafe(pattern: str) -> str | None:
    """The rest of a sentence that begins with the pattern, with the mend; None if it is safe."""
    try:
        parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"which is no regular expression: {error if isinstance(error, re.error) else 'too deep'}; correct it"
    if parsed.state.flags & ~re.UNICODE.value:
        return "which has flags such as (?i), that are not understood here; write [A-Za-z]"
    try:
        _ways(list(parsed), _Follow(), looping=False)
    except _Unsafe as unsafe:
        return str(unsafe)
    return None


def ways_of(pattern: str) -> int:
    """In how many ways a safe pattern can read one text at most: so often may it begin anew with a bad one."""
    return _ways(list(_parser.parse(pattern)), _Follow(), looping=False)


def characters_of(pattern: str) -> frozenset[str] | None:
    """Every character that a safe pattern can match; None if they are more than a few hundred."""
    ranges = _every_set(list(_parser.parse(pattern)))
    if sum(high - low + 1 for low, high in ranges) > 500:
        return None
    return frozenset(chr(code) for low, high in ranges for code in range(low, high + 1))


class _Unsafe(Exception):  # noqa: N818 — a verdict, not a failure
    pass


Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Follow:
    """What may come next: these characters, or the end."""

    characters: Ranges = ()


def _ways(sequence: Sequence[tuple[Any, Any]], follow: _Follow, *, looping: bool) -> int:
    """In how many ways a text can be read by `sequence` at most; refuses what makes more than MOST_WAYS.

    `looping` is true inside of a repeat, where every choice is refused.
    """
    ways = 1
    for index, (kind, argument) in enumerate(sequence):
        rest = list(sequence[index + 1 :])
        after = _Follow(_first(rest) + (follow.characters if _nullable(rest) else ()))
        ways *= _ways_of_one(kind, argument, after, looping=looping)
        if ways > MOST_WAYS:
            raise _Unsafe(
                "which can read one text in too many ways, so a bad one keeps the door busy; "
                "put a separator between parts that take the same characters"
            )
    return ways


def _ways_of_one(kind: Any, argument: Any, follow: _Follow, *, looping: bool) -> int:
    match kind:
        case op.LITERAL | op.IN | op.NOT_LITERAL | op.ANY | op.CATEGORY:
            _characters(kind, argument)
            return 1
        case op.SUBPATTERN:
            _, add, remove, body = argument
            if add or remove:
                raise _Unsafe("which has flags such as (?i), that are not understood here; write [A-Za-z]")
            return _ways(list(body), follow, looping=looping)
        case op.BRANCH:
            return _ways_of_branch([list(branch) for branch in argument[1]], follow, looping=looping)
        case op.MAX_REPEAT | op.MIN_REPEAT:
            least, most, body = argument
            return _ways_of_repeat(int(least), int(most), list(body), follow, looping=looping)
        case op.AT:
            raise _Unsafe("which has ^, $ or \\b; leave them out, the whole value is matched anyway")
        case op.GROUPREF | op.GROUPREF_EXISTS | op.ASSERT | op.ASSERT_NOT:
            raise _Unsafe("which looks around or back (as \\1 or (?=…)), so that it cannot be judged; write it without")
        case _:
            raise _Unsafe("which has a part that cannot be judged; use characters, [sets], (groups), | and repeats")


def _ways_of_branch(branches: Sequence[Sequence[tuple[Any, Any]]], follow: _Follow, *, looping: bool) -> int:
    ways = [_ways(branch, follow, looping=looping) for branch in branches]
    firsts = [_first(branch) + (follow.characters if _nullable(branch) else ()) for branch in branches]
    clear = not any(_overlap(first, other) for index, first in enumerate(firsts) for other in firsts[:index])
    if clear and sum(map(_nullable, branches)) <= 1:
        return max(ways)
    if looping:
        raise _Unsafe("which repeats alternatives that begin alike; let each begin with another character")
    return sum(ways)


def _ways_of_repeat(least: int, most: int, body: Sequence[tuple[Any, Any]], follow: _Follow, *, looping: bool) -> int:
    if most == 0:
        return 1
    if most > 1 and _nullable(body):
        raise _Unsafe("which repeats what may be empty; let one round take at least one character")
    first = _first(body)
    again = _Follow(first + follow.characters) if most > 1 else follow
    ways = _ways(body, again, looping=looping or most > 1)
    if least == most or not (_nullable(body) or _overlap(first, follow.characters)):
        return ways
    if looping:
        raise _Unsafe(
            "which repeats a part that repeats or may be left out, where the next character does not tell which; "
            "write it as [0-9]+(-[0-9]+)*, with a separator first"
        )
    return ways * (min(most, LONGEST_CODE) - min(least, LONGEST_CODE) + 1)


def _nullable(sequence: Sequence[tuple[Any, Any]]) -> bool:
    return all(_nullable_one(kind, argument) for kind, argument in sequence)


def _nullable_one(kind: Any, argument: Any) -> bool:
    match kind:
        case op.SUBPATTERN:
            return _nullable(list(argument[3]))
        case op.BRANCH:
            return any(_nullable(list(branch)) for branch in argument[1])
        case op.MAX_REPEAT | op.MIN_REPEAT:
            return int(argument[0]) == 0 or _nullable(list(argument[2]))
        case _:
            return False


def _first(sequence: Iterable[tuple[Any, Any]]) -> Ranges:
    """The characters that a text may begin with."""
    characters: Ranges = ()
    for kind, argument in sequence:
        characters += _first_of_one(kind, argument)
        if not _nullable_one(kind, argument):
            break
    return characters


def _first_of_one(kind: Any, argument: Any) -> Ranges:
    match kind:
        case op.SUBPATTERN:
            return _first(list(argument[3]))
        case op.BRANCH:
            return tuple(part for branch in argument[1] for part in _first(list(branch)))
        case op.MAX_REPEAT | op.MIN_REPEAT:
            return _first(list(argument[2])) if int(argument[1]) else ()
        case op.LITERAL | op.IN:
            return _characters(kind, argument)
        case _:
            return ()  # is refused where it is met itself


def _every_set(sequence: Iterable[tuple[Any, Any]]) -> Ranges:
    ranges: Ranges = ()
    for kind, argument in sequence:
        match kind:
            case op.SUBPATTERN:
                ranges += _every_set(list(argument[3]))
            case op.BRANCH:
                ranges += tuple(part for branch in argument[1] for part in _every_set(list(branch)))
            case op.MAX_REPEAT | op.MIN_REPEAT:
                ranges += _every_set(list(argument[2]))
            case _:
                ranges += _characters(kind, argument)
    return ranges


def _characters(kind: Any, argument: Any) -> Ranges:
    """A set of characters; refuses one with a space, an @, or anything that is not seen."""
    match kind:
        case op.LITERAL:
            return _named(argument, argument)
        case op.IN:
            return tuple(part for member in argument for part in _member(*member))
        case op.ANY:
            raise _Unsafe('which has ".", that matches a space and an @; name the characters, as [A-Z0-9]')
        case _:
            raise _Unsafe("which says what a character is not, so it may be a space or an @; say what it may be")


def _member(kind: Any, argument: Any) -> Ranges:
    match kind:
        case op.LITERAL:
            return _named(argument, argument)
        case op.RANGE:
            return _named(*argument)
        case op.CATEGORY if argument == op.CATEGORY_DIGIT:
            return _digits()
        case op.CATEGORY if argument == op.CATEGORY_WORD:
            return _word_characters()
        case _:
            raise _Unsafe("which says what a character is not, so it may be a space or an @; say what it may be")


def _named(low: int, high: int) -> Ranges:
    for code in (0x20, 0x40, *range(low, high + 1)):
        if low <= code <= high and _is_free_text(chr(code)):
            name = {0x20: "a space", 0x40: "an @"}.get(code, f"U+{code:04X}")
            raise _Unsafe(f"which can match {name}, so it may be free text; name the characters, as [A-Z0-9-]")
    return ((low, high),)


def _is_free_text(character: str) -> bool:
    """Spaces of every kind, at-signs, controls, and what is not seen or not known: no code has them."""
    return (
        character in _LOOKS_SO
        or any(low <= ord(character) <= high for low, high in _UNSEEN)
        or unicodedata.category(character) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
    )


_LOOKS_SO: Final = (
    "@﹫＠" + "\u115f\u1160\u2800\u3164\uffa0"
)  # at-signs; letters and a symbol that are drawn as a space
_UNSEEN: Final = ((0x34F, 0x34F), (0x17B4, 0x17B5), (0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))


def _overlap(one: Ranges, other: Ranges) -> bool:
    return any(low <= other_high and other_low <= high for low, high in one for other_low, other_high in other)


@cache
def _digits() -> Ranges:
    return _ranges(code for code in range(0x110000) if chr(code).isdecimal())


@cache
def _word_characters() -> Ranges:
    r"""As `\w` matches in a str: of every script."""
    return _ranges(code for code in range(0x110000) if chr(code).isalnum() or chr(code) == "_")


def _ranges(codes: Iterable[int]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return tuple(ranges)
