"""`sluicegate demo` from outside: what it shows, and that it leaves nothing behind."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from standardwebhooks import Webhook

from gateway import config as configuration
from sandbox.partners import Partners, Ports, partners
from sandbox.story import recorded

SLUICEGATE = str(Path(sys.executable).with_name("sluicegate"))
SECRET = "whsec_" + "c2VjcmV0LW9mLXRoZS1zYW5kYm94LTMyLWJ5dGVzLTAw"
ON_A_TERMINAL = "import os, sys; os.open(sys.argv[1], os.O_RDWR); os.execv(sys.argv[2], sys.argv[2:])"


# ── the whole of it ──────────────────────────────────────────────────────────────────────────────────


def test_each_fate_is_shown_live_and_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        for fate in ("accepted", "same", "unrouted", "refused", "delivered", "retry", "dead", "partner"):
            running.wait_for(rf"^ +\d+\.\d  {fate} ")
        assert_that_a_second_one_is_told_why_it_cannot(tmp_path)

        running.wait_for("register knows it now: a replay succeeds")
        replay = running.wait_for(r"^ +(sluicegate dead-letters replay --event \S+) \\\n +(--reason \".*\")$")
        subprocess.run(" ".join(replay.groups()), shell=True, cwd=tmp_path / "demo", env=PATHS, check=True)
        running.wait_for("to register at try 2 after")

        running.wait_for("The books balance:")
        running.wait_for("Ctrl-C stops all of it")
        posted = subprocess.run(
            [SLUICEGATE, "send", "monitoring", "-"],
            input=b'{"timestamp": "2026-11-23T10:00:00Z", "data": {"asset": "CT-9", "site": "S", "severity": "info"}}',
            cwd=tmp_path / "demo", check=True, capture_output=True,
        )  # fmt: skip
        assert b"202 accepted" in posted.stdout
        running.wait_for(r"delivered  equipment/CT-9 ")
        running.interrupt()
    assert running.status == 0
    assert running.ended_within < 5
    assert left_in(tmp_path) == []
    assert "Stopped." in running.told
    assert "\x1b" not in running.told
    assert [line for line in running.told.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    assert_that_no_secret_was_told(tmp_path, running.told)
    assert configuration.load(tmp_path / "demo/sluicegate.yaml", {}).warnings == ()


def test_the_second_start_delivers_again_though_odoo_posts_the_same_recording(tmp_path: Path) -> None:
    for _ in range(2):
        with demo(tmp_path) as running:
            running.wait_for("delivered  purchase.order/1 ")
            running.interrupt(signal.SIGTERM)
        assert running.status == 0
    assert left_in(tmp_path) == []


def test_ctrl_c_in_a_terminal_stops_it_in_order(tmp_path: Path) -> None:
    """There it reaches every process of the foreground at once."""
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, os.ttyname(end), SLUICEGATE, "demo", "--folder", str(tmp_path / "demo")],
        stdin=end, stdout=end, stderr=end, start_new_session=True,
    )  # fmt: skip
    os.close(end)
    told = b""
    while b"to ledger" not in told:
        told += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    assert process.wait(20) == 0
    assert b"\x1b[32mdelivered" in told
    assert b"Stopped." in os.read(terminal, 65536)
    os.close(terminal)
    assert left_in(tmp_path) == []


def test_a_program_that_dies_ends_the_demo_with_its_last_words(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        running.wait_for("delivered  purchase.order/1 ")
        for process, arguments in left_in(tmp_path):
            if " serve " in arguments:
                os.kill(process, signal.SIGKILL)
        running.wait_for("`sluicegate serve` ended by itself")
    assert running.status == 1
    assert '"event":"serve.ready"' in running.told


def test_a_demo_that_is_killed_takes_its_program_with_it(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        running.wait_for("delivered  purchase.order/1 ")
        running.interrupt(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while left_in(tmp_path):
        assert time.monotonic() < deadline, left_in(tmp_path)
        time.sleep(0.05)


def test_without_its_extra_it_says_how_to_install_it() -> None:
    without = "import sys; sys.modules['aiosmtpd'] = None; from gateway.cli import main; main(['demo'])"
    ended = subprocess.run([sys.executable, "-c", without], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install 'sluicegate[demo]'" in ended.stderr


# ── its parts ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def at_work() -> AsyncIterator[tuple[Partners, list[str]]]:
    told: list[str] = []
    secrets = dict.fromkeys(("ledger", "mail", "on-call", "register"), SECRET) | {"odoo-key": "a-key"}
    async with partners(Ports(), secrets, lambda about, text: told.append(f"{about}: {text}")) as found:
        yield found, told


async def test_partners_take_what_is_signed_and_refuse_the_rest(at_work: tuple[Partners, list[str]]) -> None:
    (found, told), now = at_work, datetime.now(UTC)
    body = json.dumps({"subject": "purchase.order/42", "data": {}}).encode()
    signed = Webhook(SECRET).sign("msg_1", now, body.decode())
    old = Webhook(SECRET).sign("msg_1", now - timedelta(minutes=6), body.decode())
    cases = [
        (now, signed, body, 204),
        (now, f"v1,bm90IG91cnM= {signed}", body, 204),
        (now, signed, body + b" ", 401),
        (now, signed.replace("v1,", "v1a,"), body, 401),
        (now, "", body, 401),
        (now - timedelta(minutes=6), old, body, 401),
    ]
    async with aiohttp.ClientSession() as session:
        for at, signature, sent, expected in cases:
            headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(at.timestamp()))}
            headers["webhook-signature"] = signature
            async with session.post(f"{found.receivers.url}/ledger", data=sent, headers=headers) as answer:
                assert answer.status == expected, signature
    assert told == ["ledger: refuses a post whose signature is wrong"] * 4


async def test_an_event_for_the_mail_partner_lands_in_the_mailbox_once(at_work: tuple[Partners, list[str]]) -> None:
    (found, told), now = at_work, datetime.now(UTC)
    event = {"type": "t", "time": "2026-11-23T10:00:00Z", "subject": "purchase.order/42", "data": {"amount": "7400.0"}}
    body = json.dumps(event)
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now.timestamp()))}
    headers["webhook-signature"] = Webhook(SECRET).sign("msg_1", now, body)
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(f"{found.receivers.url}/mail", data=body, headers=headers) as answer:
                assert answer.status == 204
    (mail,) = found.mailbox.mails
    assert mail["subject"] == "purchase.order/42 waits for approval"
    assert '"amount": "7400.0"' in mail.get_content()
    assert told == ["purchase.order/42: mail no. 1 is in the mailbox"]


def test_the_recording_is_moved_to_now_and_keeps_its_repetitions() -> None:
    changes = [(times, json.loads(body)) for times, body in recorded()]
    assert [times for times, _ in changes] == [6, 3, 1, 1, 1]
    assert [body["state"] for _, body in changes] == ["draft", "purchase", "purchase", "purchase", "purchase"]
    first = datetime.fromisoformat(changes[0][1]["write_date"]).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - first) < timedelta(minutes=1)


# ── the demo as a process ────────────────────────────────────────────────────────────────────────────

PATHS = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


class RunningDemo:
    """What it has told so far, and how it ended."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.told = ""
        self.status: int | None = None
        self.ended_within = 0.0
        self._asked = time.monotonic()

    def wait_for(self, pattern: str, within: float = 60) -> re.Match[str]:
        """Until it has told something that matches."""
        deadline = time.monotonic() + within
        while not (found := re.search(pattern, self.told, re.MULTILINE)):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern} is not in:\n{self.told}")
        return found

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        self._asked = time.monotonic()
        self._process.send_signal(number)

    def finish(self) -> None:
        while self._read(20):
            pass
        self.status = self._process.wait(20)
        self.ended_within = time.monotonic() - self._asked

    def _read(self, within: float) -> bool:
        """False at its end, or when it has said nothing for so long."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], max(0, within))
        found = os.read(self._process.stdout.fileno(), 65536) if readable else b""
        self.told += found.decode()
        return bool(found)


@contextmanager
def demo(tmp_path: Path) -> Iterator[RunningDemo]:
    process = subprocess.Popen(
        [SLUICEGATE, "demo", "--folder", str(tmp_path / "demo")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process:
        running = RunningDemo(process)
        try:
            yield running
            running.finish()
        finally:
            if process.poll() is None:
                process.kill()


def assert_that_a_second_one_is_told_why_it_cannot(tmp_path: Path) -> None:
    second = subprocess.run(
        [SLUICEGATE, "demo", "--folder", str(tmp_path / "demo")], check=False, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert re.search(r"A demo \(process \d+\) is at work in .* already. Stop that one with Ctrl-C", second.stderr)


def assert_that_no_secret_was_told(tmp_path: Path, told: str) -> None:
    files = list((tmp_path / "demo/secrets").iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    secrets = [path.read_text().strip() for path in files]
    assert len(secrets) == 9
    told += (tmp_path / "demo/serve.log").read_text()
    assert [secret for secret in secrets if secret in told] == []


def left_in(folder: Path) -> list[tuple[int, str]]:
    """Processes that work in the folder."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                arguments = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in arguments:
                found.append((int(place.name), arguments))
    return found
