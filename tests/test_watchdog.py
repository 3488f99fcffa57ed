"""A process whose event loop hangs is worse than a dead one; one that slept with its machine is neither."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
    import asyncio, sys, time
    from datetime import timedelta
    from gateway import watchdog as watching
    from gateway.watchdog import Watchdog

    watching.TICK = timedelta(seconds=0.5)

    async def main():
        watchdog = Watchdog(lambda lag: None, hangs=2)
        watchdog.start()
        await asyncio.sleep(0.7)
        print("at work", flush=True)
        if sys.argv[1] == "hangs":
            time.sleep(30)
        for _ in range(3):
            await asyncio.sleep(0.5)
            time.sleep(0.4)
        await watchdog.stop()

    asyncio.run(main())
"""


def started(how: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "at work\n"
    return process


def test_a_process_whose_loop_hangs_is_ended() -> None:
    with started("hangs") as process:
        began = time.monotonic()
        assert process.wait(10) == 70
        assert 0.7 < time.monotonic() - began < 6


def test_a_process_that_is_busy_or_was_stopped_for_a_while_goes_on() -> None:
    with started("works") as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(15) == 0
