"""What is published at once, what appends it, and what its caller is told when time is up."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from bus.errors import BusError, PublishRefused, PublishTimeout, PublishUnknown
from bus.streams.answers import Appended, Limits, Room
from bus.streams.connection import Answer, Arg
from bus.streams.replies import REMEDIES, ReplyError


class Unit:
    """What is appended whole: its wire arguments and who waits for it."""

    __slots__ = ("args", "bytes", "deadline", "events", "future")

    def __init__(self, events: int, size: int, args: list[Arg], deadline: float) -> None:
        self.events = events
        self.bytes = size
        self.args = args
        self.deadline = deadline
        self.future: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()


class Appends(Protocol):
    """The verbs by which a sender appends, to the streams of topics or to channels.

    calls_at_once: how many may be on their way together.
    """

    calls_at_once: int

    def append_soon(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,
        *,
        answer: Answer,
        follows: bool,
        at_once: bool,
    ) -> None:
        """Append units, at most once, and tell `answer`. See `StreamStore.append_soon`."""

    async def append(
        self,
        stream: str,
        publisher: str,
        sequence: int,
        units: Sequence[list[Arg]],
        events: int,
        limits: Limits,
        timeout_s: float,
        *,
        again_ms: int,
    ) -> Appended:
        """Do the same, and wait for the answer.

        again_ms: since when the batch may be in already, 0 if it was never sent.
        """

    async def room(self, stream: str, limits: Limits, entries: int) -> Room:
        """Say how much fits."""


def too_late(
    stream: str,
    unknown: bool,  # noqa: FBT001 - the question that matters
    cause: Exception | None = None,
) -> BusError:
    """Return what a caller is told whose time is up; unknown: whether the event may be in."""
    why = f" ({cause})" if cause is not None else ""
    if unknown:
        return PublishUnknown(
            f"no answer from {stream} in time{why}: the event may have been published;"
            " publish it again only if handlers tolerate it twice"
        )
    text = f"the server did not take it into {stream} in time{why}"
    if isinstance(cause, ReplyError):
        remedy = REMEDIES.get(cause.code, "")
        return PublishRefused(f"{text}: the event was not published{remedy}", cause.code)
    return PublishTimeout(f"{text}: the event was not published")
