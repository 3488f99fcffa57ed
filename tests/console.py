"""Does what a page of the documentation tells its reader to do, in a shell, and compares what comes of it.

    ```yaml           a first line `# sluicegate.yaml` names the file that it is
    ```console        `$ command`, and below it what it says; a line `...` stands for any number of lines

Identities, times and durations are compared by their form.  What only looks is looked at again until it is so.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

END = "--- end of the command, status"
LOOKING = ("sluicegate events", "sluicegate dead-letters list", "sluicegate destinations list", "grep", "tail")
FORMS = [
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID"),
    (r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
    (r"\b[0-9a-f]{32}\b", "TRACE"),
    (r"\b\d+(\.\d+)? (ms|s)\b", "SPAN"),
    (r"\b(try|delivered|waiting) +\d+\b", r"\1 N"),  # how many tries it took is chance
    (r"\b(flowing|backing off)\b", "STATE"),  # and whether it is left alone for a moment
    (r"\buntil TIME$", "–"),
    (r"\bby [\w.-]+ \(command line\)", "by WHO"),
    (r"\bUnprocessable (Entity|Content)\b", "Unprocessable"),  # which word it is depends on the version of Python
    (r"[ \t]+", " "),
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that it is, if it is one."""
        named = re.match(r"# ([\w.-]+\.(yaml|py))\n", self.text)
        return named[1] if named else None

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Each command with the lines that it is said to answer."""
        for told in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, *answer = told.rstrip("\n").split("\n")
            while command.endswith("\\"):
                command += "\n" + answer.pop(0)
            yield command, answer


def blocks(page: str) -> list[Block]:
    return [
        Block(found[1], found[2], page[: found.start()].count("\n") + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]


class Console:
    """A shell in a folder, which a reader types into.  `ports` replaces those of the page."""

    def __init__(self, folder: Path, ports: dict[str, str]) -> None:
        self._folder = folder
        self._ports = ports
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=folder, env={"PATH": path, "HOME": str(folder), "LC_ALL": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever still runs in it ends, in order if it can."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._shell.pid, number)
            except ProcessLookupError:
                break
            self._await_end(5)
        with self._shell:
            pass

    def read(self, page: str) -> None:
        for block in blocks(page):
            if block.file is not None:
                self._write(block.file, block.text)
            elif block.language == "console":
                for command, expected in block.commands():
                    self._check(command, expected)

    def _write(self, name: str, text: str) -> None:
        where = Path(self.type("pwd").strip())
        (where / name).write_text(self._with_ports(text))

    def _check(self, command: str, expected: list[str]) -> None:
        deadline = time.monotonic() + 60
        looking = command.startswith(LOOKING)
        while True:
            answered = self.type(command)
            if matches(answered.splitlines(), [self._with_ports(line) for line in expected]):
                break
            told = f"$ {command}\n{answered}\n--- but the page says ---\n" + "\n".join(expected)
            if not looking or time.monotonic() > deadline:
                raise AssertionError(told)
            time.sleep(0.3)
        if command.startswith("sluicegate serve") and command.endswith("&"):
            self._await_ready()

    def type(self, command: str) -> str:
        """What it answers."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{self._with_ports(command)}\necho '{END}' $?\n")
        self._shell.stdin.flush()
        answer = []
        for line in self._shell.stdout:
            before, end, _ = line.partition(END)
            answer.append(before)
            if end:
                return "".join(answer)
        raise AssertionError(f"the shell ended: {''.join(answer)}")

    def _await_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urlopen(f"http://127.0.0.1:{self._ports['8470']}/ready", timeout=2):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        raise AssertionError("it is not ready after a minute")

    def _with_ports(self, text: str) -> str:
        return re.sub(r"\b(8470|9000)\b", lambda port: self._ports[port[0]], text)

    def _await_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._shell.poll()
            try:
                os.killpg(self._shell.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def matches(answered: list[str], expected: list[str]) -> bool:
    """Line by line, by their forms; `...` stands for any number of lines."""
    found, wanted = [form(line) for line in answered], [form(line) for line in expected]
    pattern = "".join(r"(.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in wanted)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in found)) is not None


def form(line: str) -> str:
    for pattern, word in FORMS:
        line = re.sub(pattern, word, line)
    return line.strip()
