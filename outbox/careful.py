"""Careful mode: what may have killed a process is tried in such a way that another kill tells which one it was."""

from collections.abc import Collection
from uuid import UUID

from outbox.store import Taken


class Trials:
    """The suspects that a process is trying, over all lanes that it took over from owners that vanished.

    One that was never being tried when a process died goes beside those of other lanes, so that what was in flight at a
    crash does not wait for a partner that hangs.  One that was is alone: if the process dies again, that was the one.
    """

    def __init__(self) -> None:
        self._under_way: dict[tuple[int, UUID], bool] = {}  # and whether it is alone

    def may_begin(self, taken: Taken, marked: Collection[UUID]) -> bool:
        """`marked`: those of its lane that were being tried, with care, when a process died."""
        if any(self._under_way.values()):
            return False
        return not self._under_way or taken.event_id not in marked

    def begin(self, taken: Taken, marked: Collection[UUID]) -> None:
        self._under_way[taken.lane, taken.event_id] = taken.event_id in marked

    def __contains__(self, taken: Taken) -> bool:
        return bool(self._under_way) and (taken.lane, taken.event_id) in self._under_way

    def end(self, taken: Taken) -> None:
        self._under_way.pop((taken.lane, taken.event_id), None)
