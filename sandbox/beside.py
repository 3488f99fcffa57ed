"""Becomes `sluicegate serve`, as a program that ends with the one that started it, even if that one is killed.

    python -m sandbox.beside PARENT --config sluicegate.yaml

On Linux; elsewhere it ends when it is told to, and else stays.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def main() -> None:
    parent, *options = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("whoever started this has ended")
    os.execv(sys.executable, [sys.executable, "-m", "gateway.cli", "serve", *options])  # noqa: S606 — ourselves, by the full path


if __name__ == "__main__":
    main()
