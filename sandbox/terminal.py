"""What the demo says: one line for one thing that happened, aligned, on 80 columns.

    12.4  delivered  purchase.order/44  to ledger after 14 ms

Colours go to a terminal alone; a pipe or a file gets the words.
"""

import textwrap
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import TextIO

import click

WIDTH = 80
ABOUT = 18
INDENT = 5 + 2 + 9 + 2 + ABOUT + 2


class Fate(StrEnum):
    """What happened, in one word."""

    ACCEPTED = "accepted"
    SAME = "same"
    UNROUTED = "unrouted"
    REFUSED = "refused"
    DELIVERED = "delivered"
    RETRY = "retry"
    HELD = "held"
    DEAD = "dead"
    DISCARDED = "discarded"
    PARTNER = "partner"


COLOURS: Mapping[Fate, str] = {
    Fate.DELIVERED: "green",
    Fate.REFUSED: "yellow",
    Fate.RETRY: "yellow",
    Fate.HELD: "yellow",
    Fate.DEAD: "red",
    Fate.PARTNER: "cyan",
}


class Terminal:
    """Where the demo is watched; its clock starts when it is made."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began = time.monotonic()

    def happened(self, fate: Fate, about: str, text: str, *commands: str) -> None:
        """Tells one thing; `commands` stand below it, whole, so that they can be copied."""
        first, *more = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False) or [""]
        at = f"{time.monotonic() - self._began:5.1f}"
        word = click.style(f"{fate:<9}", fg=COLOURS.get(fate))
        self.say(f"{click.style(at, dim=True)}  {word}  {about:<{ABOUT}}  {first}".rstrip())
        for line in more:
            self.say(" " * INDENT + line)
        for command in commands:
            self.say(f"  {click.style(command, bold=True)}")

    def say(self, text: str = "") -> None:
        click.echo(text, file=self._out)
