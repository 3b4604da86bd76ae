"""That a stream has no room: what is known of it, and what callers and listeners are told."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from bus.config import OVERRUN_TOLD_S
from bus.errors import StreamFull
from bus.streams.answers import Room
from bus.telemetry import Telemetry


class Shortage:
    """The last look for room in one stream that did not find enough; `room` is None after it."""

    __slots__ = ("_dropped", "_since", "_stream", "_telemetry", "_telling", "_told", "room")

    def __init__(self, stream: str, telemetry: Telemetry) -> None:
        self.room: Room | None = None
        self._stream = stream
        self._telemetry = telemetry
        self._told = False
        self._since = 0.0
        self._dropped: Counter[str] = Counter()
        self._telling: asyncio.TimerHandle | None = None

    def tell(self, room: Room) -> None:
        """Note that it is full, and say so, once until it is over."""
        self.room = room
        if self._told:
            return
        self._told = True
        self._since = time.perf_counter()
        pinned = room.pinned
        self._telemetry.emit(
            "publish.full",
            stream=self._stream,
            pinned_by=pinned.group if pinned else "",
            pending=pinned.pending if pinned else 0,
            undelivered=pinned.undelivered if pinned else None,
        )

    def over(self) -> None:
        """Note that everything fits again."""
        self.room = None
        if self._told:
            self._told = False
            full_s = time.perf_counter() - self._since
            self._telemetry.emit("publish.resumed", stream=self._stream, full_s=full_s)

    def overrun(self, dropped: Mapping[str, int]) -> None:
        """Tell by group how many entries were dropped unhandled, at most once a second.

        At its cap such a stream drops with every append; the whole count is on the server.
        """
        self._dropped.update(dropped)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(OVERRUN_TOLD_S, self.tell_overrun)
            self._tell_dropped()

    def tell_overrun(self) -> None:
        """Tell what was not told yet, and again at once when more is dropped."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._tell_dropped()

    def _tell_dropped(self) -> None:
        for group, count in self._dropped.items():
            self._telemetry.emit("delivery.overrun", stream=self._stream, group=group, count=count)
        self._dropped.clear()

    def error(self, most: int) -> StreamFull:
        """Return what a caller is told; each its own, since callers may add notes to it."""
        what = f"{self._stream} is full ({most:,} entries): the event was not published"
        pinned = self.room.pinned if self.room is not None else None
        if pinned is None:
            return StreamFull(what, self._stream)
        backlog = f"{pinned.pending:,} pending"
        if pinned.undelivered is not None:
            backlog += f", {pinned.undelivered:,} not delivered yet"
        return StreamFull(
            f"{what}. Group {pinned.group} still needs what begins at {pinned.floor} ({backlog}):"
            " is a worker serving it? Start more of them, delete the group if it is no longer"
            " used, or raise maxlen",
            self._stream,
            pinned.group,
            pinned.pending,
            pinned.undelivered,
        )


def tell_lost(telemetry: Telemetry, stream: str, lost: Mapping[str, Sequence[str]]) -> None:
    """Tell, by group, of pending ids whose entry is gone: trimmed or deleted by hand."""
    for group, ids in lost.items():
        telemetry.emit(
            "delivery.lost",
            stream=stream,
            group=group,
            count=len(ids),
            entry_ids=list(ids[:20]),
        )
