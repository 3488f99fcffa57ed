"""sluicegate.yaml as text: YAML 1.2 with the line of every value, and what `env:` and `file:` lead to."""

import hashlib
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import MappingStartEvent, ScalarEvent, SequenceStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from connectors.settings import Reference

KeyPath = tuple[str | int | bool, ...]
"""The way to a value: keys of mappings, and places in lists."""


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """What is wrong with a configuration, where, and what to do about it."""

    file: str
    line: int  # 0: it is about the file as a whole
    key: str  # dotted, "" if it is about no key
    problem: str  # the rest of a sentence that begins with the key, and the mend

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key} {self.problem}" if self.key else f"{place}: {self.problem}"


class ConfigurationError(Exception):
    """All that is wrong with a configuration, in the order of its lines."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(sorted(set(mistakes)))
        super().__init__("\n".join(map(str, self.mistakes)))


class Document:
    """One YAML file.  `values` is what it says, with a Reference wherever it says `env:` or `file:`.

    What is wrong with it as YAML is in `mistakes`; the rest of it can still be read.
    """

    def __init__(
        self,
        path: Path,
        environ: Mapping[str, str],
        *,
        content: bytes | None = None,
        known: Mapping[str, Reference] | None = None,
    ) -> None:
        """`content` is what the file says, if it is not to be read; `known` is what need not be looked up any more."""
        self.file = str(path)
        self.content = content = _content(path) if content is None else content
        self.digest = hashlib.sha256(content).hexdigest()
        self.mistakes: list[Mistake] = []
        self.references: dict[str, Reference] = {}
        self.vaulted: list[str] = []  # what only a vault could tell
        self._known = known or {}
        self.folder = path.absolute().parent
        self._environ = environ
        self._read = 0
        text = _text(self.file, content)
        self._root = _compose(self.file, text)
        self._tags = _tags(text)
        self.values: Any = None if self._root is None else self._value(self._root, (), ())

    def line(self, path: KeyPath) -> int:
        """Where the value at `path` stands, or its key if it has parts; of what is missing, where it should stand."""
        node, line = self._root, 1
        for key in path:
            found = None if node is None else self._below(node, key)
            if found is None:
                return line
            line, node = found
        return line

    def mistake(self, path: KeyPath, problem: str, *, key: KeyPath | None = None) -> Mistake:
        """`key` is the key to name, if it is not all of `path`."""
        return Mistake(self.file, self.line(path), dotted(path if key is None else key), problem)

    def _below(self, node: Node, wanted: str | int | bool) -> tuple[int, Node] | None:  # noqa: FBT001 — a key can be true
        match node:
            case MappingNode():
                for key, value in node.value:
                    if isinstance(key, ScalarNode) and _same(_plain(key), wanted):
                        inside = isinstance(value, ScalarNode) and value.value
                        return (value if inside else key).start_mark.line + 1, value
            case SequenceNode() if isinstance(wanted, int) and wanted < len(node.value):
                item = node.value[wanted]
                return item.start_mark.line + 1, item
            case _:
                pass
        return None

    def _value(self, node: Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        self._read += 1
        if id(node) in above or self._read > _MOST_VALUES:
            raise ConfigurationError(
                [self.mistake(path, "repeats itself without an end; write it out, without an alias")]
            )
        above = (*above, id(node))
        if not isinstance(node, ScalarNode) and self._tag(node) not in {
            None,
            "map" if isinstance(node, MappingNode) else "seq",
        }:
            self._add(node.start_mark.line + 1, path, "has a tag of YAML (!) that does not belong there; leave it out")
        match node:
            case ScalarNode():
                return self._scalar(node, path)
            case SequenceNode():
                return [self._value(item, (*path, index), above) for index, item in enumerate(node.value)]
            case MappingNode():
                return {key: self._value(value, (*path, key), above) for key, value in self._entries(node, path)}
            case _:
                raise TypeError(node)

    def _entries(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[str | int | bool, Node]]:
        first: dict[str | int | bool, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode) or not isinstance(key := _plain(key_node), str | int | bool):
                self._add(line, path, "has a key that is no word; write a text, a whole number, true or false")
            elif key == "<<" and not key_node.style:
                self._add(line, path, 'merges with "<<", which YAML 1.2 does not have; repeat the keys')
            elif isinstance(key, str) and _UNFIT.search(key):
                self._add(line, path, "has a key with a control character, or half of one; delete it")
            elif key in first:
                self._add(line, (*path, key), f"stands twice, first in line {first[key]}; leave one out")
            else:
                if self._tag(key_node) is not None:
                    self._add(line, (*path, key), "has a tag of YAML (!) before its name; leave it out")
                first[key] = line
                yield key, value

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        value = _plain(node)
        if tag := self._tag(node):
            if tag not in _OF_TAG:
                problem = 'begins with "!", a tag of YAML that is not known here; quote it'
                self._add(node.start_mark.line + 1, path, problem)
            elif not isinstance(value := _tagged(node, tag), _OF_TAG[tag]):
                self._add(node.start_mark.line + 1, path, f"has the tag !!{tag}, but is no {tag}; leave the tag out")
        if not isinstance(value, str):
            return value
        if _UNFIT.search(value):
            self._add(node.start_mark.line + 1, path, "has a control character, or half of one; delete it")
            return _UNFIT.sub("", value)
        if re.search(r"\$\{[A-Z_][A-Z0-9_]*[^}]*\}", value):
            problem = "has ${…}, which is not replaced here; write env:NAME as the whole value"
            self._add(node.start_mark.line + 1, path, problem)
        if value.startswith(("env:", "file:")) or re.fullmatch(r"vault:\S*", value):
            if value not in self.references:
                self.references[value] = self._known.get(value) or self._refer(value)
            return self.references[value]
        return value

    def _tag(self, node: Node) -> str | None:
        """The tag that is written before a value, short where it is YAML's own."""
        kind = "scalar" if isinstance(node, ScalarNode) else "mapping" if isinstance(node, MappingNode) else "sequence"
        tag = self._tags.get((kind, node.start_mark.line, node.start_mark.column))
        return tag and tag.removeprefix("tag:yaml.org,2002:")

    def _refer(self, origin: str) -> Reference:
        kind, _, name = origin.partition(":")
        if kind == "vault":
            return self._in_the_vault(origin)
        if kind == "file":
            return read_file(origin, self.folder)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return Reference(
                origin="env:…", text=None, problem="has no name of a variable after env:; write it as env:NAME"
            )
        if text := self._environ.get(name):
            return Reference(origin=origin, text=text)
        state = "is empty" if name in self._environ else "is not set"
        problem = f"needs the variable {name}, which {state}; set it where Sluicegate is started"
        return Reference(origin=origin, text=None, problem=problem, absent=True)

    def _in_the_vault(self, origin: str) -> Reference:
        if not VAULTED.fullmatch(origin):
            problem = "has no place behind vault:; write it as vault:secret/path#field"
            return Reference(origin="vault:…", text=None, problem=problem)
        self.vaulted.append(origin)
        problem = f"needs {origin}, but no vault is named; add vault: at the top, with url: and token:"
        return Reference(origin=origin, text=None, problem=problem)

    def _add(self, line: int, path: KeyPath, problem: str) -> None:
        self.mistakes.append(Mistake(self.file, line, dotted(path), problem))


def dotted(path: KeyPath) -> str:
    """As messages name a key: `routes.purchases.to`, `sources.odoo.secrets[1]`, `keep.status.of."to approve"`."""
    text = ""
    for key in path:
        if isinstance(key, int) and not isinstance(key, bool):
            text += f"[{key}]"
        else:
            word = str(key).lower() if isinstance(key, bool) else str(key)[:80]
            text += ("." if text else "") + (word if re.fullmatch(r"[\w-]+", word) else f'"{word}"')
    return text


def is_open_to_others(path: Path) -> bool:
    """Whether everyone on this machine may read it, or more than its owner may change it."""
    try:
        return bool(path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP))
    except OSError:
        return False


VAULTED: Final = re.compile(
    r"vault:(?P<mount>[\w-]+)/(?P<path>[\w-][\w.-]*(?:/[\w-][\w.-]*)*)#(?P<field>[\w.-]+)", re.ASCII
)
"""`vault:MOUNT/PATH#FIELD`."""
_LARGEST_FILE: Final = 2**20
_LARGEST_VALUE: Final = 2**16
_MOST_VALUES: Final = 50_000
_UNFIT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; name the configuration with --config"
        raise ConfigurationError([Mistake(str(path), 0, "", problem)]) from None
    if len(content) > _LARGEST_FILE:
        raise ConfigurationError([Mistake(str(path), 0, "", "is larger than 1 MiB; is it the right file?")])
    return content


def _text(file: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError([Mistake(file, line, "", "is not UTF-8; save it as UTF-8")]) from None


def _compose(file: str, text: str) -> Node | None:
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        marks = (error.problem_mark, error.context_mark)
        mark = next(filter(None, reversed(marks) if "unexpected end" in str(error.problem) else marks), None)
        line = mark.line + 1 if mark else 0
        raise ConfigurationError([Mistake(file, line, "", _yaml_problem(str(error.problem), text, line))]) from None
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigurationError([Mistake(file, line, "", "has a control character; delete it")]) from None
    except (YAMLError, RecursionError, ValueError):
        raise ConfigurationError([Mistake(file, 0, "", "is no YAML; check it with a YAML editor")]) from None
    return node


def _tags(text: str) -> dict[tuple[str, int, int], str]:
    """Every tag that is written out, by what it stands before.  A node does not tell whether its tag was."""
    if "!" not in text:
        return {}
    kinds = {ScalarEvent: "scalar", SequenceStartEvent: "sequence", MappingStartEvent: "mapping"}
    return {
        (kinds[type(event)], event.start_mark.line, event.start_mark.column): str(event.tag)
        for event in YAML(typ="safe", pure=True).parse(text)
        if type(event) in kinds and event.tag is not None
    }


def _yaml_problem(problem: str, text: str, line: int) -> str:
    """In our words, and with nothing of the text in it, which may be a secret."""
    lines = text.split("\n")
    if "\\t" in problem or re.match(r" *\t", lines[line - 1] if 0 < line <= len(lines) else ""):
        return "has a tab where YAML wants spaces; replace it"
    for sign, words in {
        "undefined alias": "has an alias (*) of what has no anchor (&) before it; write the value, or quote it",
        "another document": 'has a second document after "---"; leave one',
        "mapping values": 'has a second ": " in one line; quote the value',
        "that cannot start": "has a value that begins with a sign that YAML keeps for itself; quote it",
        "unexpected end": "has a quotation mark that is never closed; close it",
        "expected ',' or": "has a bracket that is never closed, or lacks a comma; close it",
        "expected ':'": 'has a key without ": " behind it; add it',
        "could not find expected": 'has a key without ": " behind it; add it',
        "escape": "has an escape in double quotes that YAML does not know; use single quotes",
        "duplicate anchor": "has one anchor (&) twice; rename one",
    }.items():
        if sign in problem:
            return words
    return "is no YAML from here on; check the indentation, the brackets and the quotes"


_OF_TAG: Final[Mapping[str, tuple[type, ...]]] = {
    "str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "null": (type(None),),
}  # fmt: skip
"""The scalars of YAML's core schema."""


def _tagged(node: ScalarNode, tag: str) -> Any:
    """The value of a scalar whose type is written before it; 1 and true differ."""
    value = _quoted(node.value) if tag == "str" else _unquoted(node.value)
    return repr(value) if isinstance(value, bool) and tag != "bool" else value


def _plain(node: ScalarNode) -> Any:
    """The value of a scalar by the core schema of YAML 1.2; `yes`, `12:30` and dates are texts there."""
    return _quoted(node.value) if node.style else _unquoted(node.value)


def _quoted(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # JSON writes \ud83d\ude00


def _unquoted(text: str) -> Any:
    if text in {"", "~", "null", "Null", "NULL"}:
        return None
    if text in {"true", "True", "TRUE", "false", "False", "FALSE"}:
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,300}", text):
        return int(text)
    if re.fullmatch(r"0x[0-9a-fA-F]{1,64}", text):
        return int(text, 16)
    if re.fullmatch(r"0o[0-7]{1,64}", text):
        return int(text, 8)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


def _same(key: object, wanted: object) -> bool:
    return key == wanted and isinstance(key, bool) == isinstance(wanted, bool)


def read_file(origin: str, folder: Path) -> Reference:
    """What `file:PATH` leads to now; a path is relative to `folder`."""
    path = folder / origin.removeprefix("file:").strip()
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_VALUE + 1)
        text = content.decode().rstrip("\r\n")
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; create it, or correct the path"
    except UnicodeDecodeError:
        reason = "is not UTF-8; write text into it"
    else:
        if text and len(content) <= _LARGEST_VALUE:
            return Reference(origin=origin, text=text)
        reason = "is larger than 64 KiB; is it the right one?" if text else "is empty; write the value into it"
    return Reference(origin=origin, text=None, problem=f"needs the file {origin.removeprefix('file:')}, which {reason}")
