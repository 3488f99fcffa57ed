"""The documentation cannot lag: what it shows is done, what it names is there, and what is there it names."""

import base64
import importlib.metadata
import re
import shlex
import socket
import time
import tomllib
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from textwrap import indent

import click
import pytest
from console import Console, blocks
from standardwebhooks import Webhook
from tables import PAGES, ROOT, TABLE, tables, written

from gateway import config as configuration
from gateway.cli import main
from observability.names import LogEvent, MetricName

README = ROOT / "README.md"
TUTORIAL = ROOT / "docs/tutorial.md"
ALL = [README, *sorted(ROOT.glob("docs/**/*.md"))]
STARTS_A_CONFIGURATION = re.compile(
    r"^(serve|database|vault|sources|policies|routes|systems|destinations):", re.MULTILINE
)
SECRET = "whsec_" + "c2VjcmV0LW9mLXRoZS1kb2NzLW9mLTMyLWJ5dGVzLTA="


PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=\n-----END PUBLIC KEY-----\n"


def page_ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


every_page = pytest.mark.parametrize("page", ALL, ids=page_ids(ALL))


# ── what it tells to do ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", [README, TUTORIAL], ids=page_ids([README, TUTORIAL]))
def test_whoever_does_what_the_page_says_sees_what_it_shows(page: Path, tmp_path: Path) -> None:
    with Console(tmp_path, ports()) as console:
        console.read(page.read_text())
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "warm.json"]
    assert [path for path in stored if b"Maria Example" in path.read_bytes()] == []


def test_what_the_readme_shows_of_the_commands_is_shown_by_the_tutorial() -> None:
    shown = [block for block in blocks(README.read_text()) if block.language == "text" and block.text.startswith("$ ")]
    done = {command: answer for block in blocks(TUTORIAL.read_text()) for command, answer in block.commands()}
    commands = [each for block in shown for each in block.commands()]
    assert len(commands) == 3
    for command, answer in commands:
        assert done[command] == answer


def test_the_verification_in_the_documentation_verifies_what_the_library_signs() -> None:
    (code,) = [block.text for block in blocks((ROOT / "docs/security.md").read_text()) if block.language == "python"]
    names: dict[str, object] = {}
    exec(code, names)
    verified = names["verified"]
    now = time.time()
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now))}
    headers["webhook-signature"] = "v1,bm8= " + Webhook(SECRET).sign("msg_1", datetime.fromtimestamp(now, UTC), "{}")
    assert callable(verified)
    assert verified(headers, b"{}", SECRET, now)
    assert not verified(headers, b"{ }", SECRET, now)
    assert not verified(headers, b"{}", SECRET, now + 400)


# ── what it shows of the configuration ───────────────────────────────────────────────────────────────


@every_page
def test_every_whole_configuration_loads(page: Path, tmp_path: Path) -> None:
    for name in ("monitoring", "asset-desk", "on-call"):
        (tmp_path / "secrets").mkdir(exist_ok=True, mode=0o700)
        (tmp_path / "secrets" / name).write_text(SECRET)
        (tmp_path / "secrets" / name).chmod(0o600)
    for block in whole_configurations(page):
        path = tmp_path / "sluicegate.yaml"
        path.write_text(block)
        assert configuration.load(path, {}).warnings == ()


def test_every_part_of_a_configuration_is_right_in_its_place(tmp_path: Path) -> None:
    """The excerpts of docs/configuration.md, put together to one file."""
    page = ROOT / "docs/configuration.md"
    parts = [block.text for block in blocks(page.read_text()) if block.language == "yaml"]
    assert len(parts) > 5
    sections: dict[str, list[str]] = {}
    for part in parts:
        if STARTS_A_CONFIGURATION.search(part):
            for section, text in re.findall(r"^(\w+):(.*\n(?:[ #].*\n|\n)*)", part, re.MULTILINE):
                sections.setdefault(section, []).append(text.lstrip("\n"))
        else:
            sections.setdefault("sources", []).append(indent(part, "  "))
    sections |= {"facilities": FACILITIES, "policies": [*OTHER_POLICIES, *sections["policies"]]}
    del sections["database"]
    text = "".join(f"{name}:" + ("" if name == "key" else "\n") + "".join(found) for name, found in sections.items())
    (tmp_path / "secrets").mkdir(mode=0o700)
    for name in set(re.findall(r"file:secrets/([\w-]+)", text)):
        secret = base64.b64encode(name.ljust(32).encode()).decode()
        (tmp_path / "secrets" / name).write_text(
            "whsec_" + secret if name.startswith(("monitoring", "new-accounts")) else secret[:40].replace("/", "-")
        )
        (tmp_path / "secrets" / name).chmod(0o600)
    (tmp_path / "secrets" / "proxy").write_text("gateway:pass-word")
    (tmp_path / "secrets" / "edge-1.pem").write_text(PUBLIC_KEY)
    path = tmp_path / "sluicegate.yaml"
    path.write_text(text)
    loaded = configuration.load(path, {})
    assert {"monitoring", "supplier", "odoo"} <= loaded.sources.keys()
    assert {"approver", "order-note", "planned", "confirm"} <= loaded.destinations.keys()


FACILITIES = ["  north: {name: North Hospital}\n  south: {name: South Clinic}\n"]
OTHER_POLICIES = [
    f"  {name}: {{version: 1, purpose: a test, type: a.test, match: {{is: {name}}}, keep: {{id: {{from: id, type: int}}}}}}\n"
    for name in ("equipment-alert", "order-response")
]


def test_every_key_metric_and_answer_of_the_api_is_in_its_table() -> None:
    for page in PAGES:
        assert page.read_text() == written(page.read_text()), "run `python tests/tables.py`"
    there = [name for page in PAGES for _, name, _ in TABLE.findall(page.read_text())]
    assert sorted(there) == sorted(tables())


# ── what it names ────────────────────────────────────────────────────────────────────────────────────


@every_page
def test_every_command_is_one_that_can_be_typed(page: Path) -> None:
    for told in commands_in(page):
        assert_that_it_parses(told)


def test_every_command_of_the_program_is_somewhere_in_the_documentation() -> None:
    told = {" ".join(path_of(command)) for page in ALL for command in commands_in(page)}
    there = {" ".join(path) for path in leaves(main, ())}
    assert there - told == set()


def test_every_metric_is_listed_in_operations_and_no_other() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"`(sluicegate_\w+)`", text)) == {str(name) for name in MetricName}
    others = {name for page in ALL for name in re.findall(r"`(sluicegate_\w+)`", page.read_text())}
    assert others == {str(name) for name in MetricName}


def test_every_log_event_is_listed_in_operations_and_no_other() -> None:
    (table,) = re.findall(r"\| Event \| What happened \|\n((?:\|.*\n)+)", (ROOT / "docs/operations.md").read_text())
    named = [name for row in table.splitlines()[1:] for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(LogEvent)


def test_every_file_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`((?:gateway|outbox|connectors|dead_letter|observability|sandbox)/[\w./]*)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
    way = re.findall(r"^\| \d+ \| `([\w./]+)` \|", text, re.MULTILINE)
    assert len(way) <= 8


def test_every_table_of_the_database_is_in_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    made = re.findall(r"^CREATE TABLE (\w+)", (ROOT / "outbox/migrations/0001_outbox.sql").read_text(), re.MULTILINE)
    assert [name for name in made if f"`{name}`" not in text] == []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[<>=;]", one)[0].strip() for one in needed}
    page = (ROOT / "docs/decisions/dependencies.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == names


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs/index.md").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in ALL if page not in {README, ROOT / "docs/index.md"}]
    assert [page for page in pages if f"]({page})" not in text] == []


@every_page
def test_it_tells_nothing_of_the_place_where_it_was_written(page: Path) -> None:
    assert re.findall(r"/work\b|/tmp\b|/root\b|/home/|\bissue #?\d|\bTODO\b", page.read_text()) == []


def test_the_version_that_is_told_is_the_one_that_is_installed() -> None:
    assert f'version = "{importlib.metadata.version("sluicegate")}"' in (ROOT / "pyproject.toml").read_text()


# ── how it is looked at ──────────────────────────────────────────────────────────────────────────────


def ports() -> dict[str, str]:
    found = {}
    with socket.socket() as one, socket.socket() as other:
        for told, probe in (("8470", one), ("9000", other)):
            probe.bind(("127.0.0.1", 0))
            found[told] = str(probe.getsockname()[1])
    return found


def whole_configurations(page: Path) -> list[str]:
    yaml = [block.text for block in blocks(page.read_text()) if block.language == "yaml"]
    return [text for text in yaml if re.search(r"^sources:", text, re.MULTILINE) and "policies:" in text]


def commands_in(page: Path) -> list[list[str]]:
    """What follows `sluicegate` wherever the page has it in a block or in backticks; a bare name is no command."""
    text = page.read_text()
    shown = [block.text for block in blocks(text) if block.language in {"sh", "console", "text"}]
    inline = re.findall(r"`(sluicegate [^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    found = []
    for told in [*shown, *inline]:
        joined = told.replace("\\\n", " ")
        for line in joined.splitlines():
            for rest in re.findall(r"(?:^|[$(|] |\$\(|^ +)sluicegate ([a-z][^|;&)]*)", line):
                words = shlex.split(rest.split(" > ")[0].split("  #")[0])
                found.append(words)
    return found


def path_of(words: list[str]) -> list[str]:
    command: click.Command = main
    path = []
    for word in words:
        if not isinstance(command, click.Group) or word not in command.commands:
            break
        command = command.commands[word]
        path.append(word)
    return path


def assert_that_it_parses(words: list[str]) -> None:
    """The names of commands and options; a value such as $(latest) or ID is taken as given."""
    command: click.Command = main
    for word in path_of(words):
        assert isinstance(command, click.Group)
        command = command.commands[word]
    assert command is not main, words
    options = {name for parameter in command.params for name in parameter.opts}
    given = [word for word in takewhile("--".__ne__, words) if word.startswith("--")]
    assert [word for word in given if word.split("=")[0] not in options] == [], words
    if isinstance(command, click.Group):
        assert words[len(path_of(words)) :] == [], f"{words} names a group"


def leaves(command: click.Command, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    if isinstance(command, click.Group):
        return [leaf for name, below in command.commands.items() for leaf in leaves(below, (*path, name))]
    return [path]
