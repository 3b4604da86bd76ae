"""The senders of the channels that this process writes to."""

import asyncio
import secrets
from typing import NamedTuple

from bus.config import ANSWER_S
from bus.sender import Sender
from bus.streams.channels import ChannelAppends
from bus.streams.codec import Fields
from bus.streams.forms import unit_of
from bus.streams.stream import StreamStore
from bus.streams.topics import Record
from bus.telemetry import Telemetry
from bus.unit import Unit

_KEPT = 64  # senders; above that, those that are idle go when others come


class Lane(NamedTuple):
    """Where to publish, and how: the channel's key, ms until it expires, its cap."""

    key: str
    ttl_ms: int
    maxlen: int


class _Line:
    """The sender of a channel; it keeps to what was said by whoever published last."""

    __slots__ = ("appends", "lane", "record", "sender")

    def __init__(self, sender: Sender, appends: ChannelAppends, lane: Lane) -> None:
        self.sender = sender
        self.appends = appends
        self.keep_to(lane)

    def keep_to(self, lane: Lane) -> None:
        self.lane = lane
        self.appends.ttl_ms = lane.ttl_ms
        self.record = Record(1, lane.maxlen, on_full="drop_oldest")
        self.sender.keep_to(self.record, inside=False)


class Senders:
    """One sender per channel that is written to: its publishes share calls, in their order.

    That is one for all that was said of the channel's expiry and cap: with one for each of them
    nothing would be in order, and an end would overtake what others publish.
    """

    def __init__(self, store: StreamStore, telemetry: Telemetry, timeout_s: float) -> None:
        self._store = store
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._id = secrets.token_hex(8)
        self._lines: dict[str, _Line] = {}
        self._most = _KEPT

    async def send(self, lane: Lane, fields: Fields, size: int) -> tuple[str, int]:
        """Append an entry; return its id as (ms, sequence).

        Errors: BusClosed, PublishTimeout, PublishUnknown; a ReplyError ENDED; the ServerError
        family.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        return await self._sender(lane).add(Unit(1, size, unit_of(fields), deadline))

    def forget(self, key: str) -> None:
        """Let go of the sender of a channel that was ended; if it is idle."""
        line = self._lines.get(key)
        if line is not None and line.sender.idle:
            line.sender.close()
            del self._lines[key]

    async def close(self) -> None:
        """Wait until everybody who waits for a publish has an outcome."""
        senders = [line.sender for line in self._lines.values()]
        if awaited := [f for sender in senders for f in sender.awaited()]:
            await asyncio.wait(awaited, timeout=self._timeout_s + ANSWER_S)
        tasks = [sender.task for sender in senders if sender.task is not None]
        for sender in senders:
            sender.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _sender(self, lane: Lane) -> Sender:
        line = self._lines.get(lane.key)
        if line is None:
            if len(self._lines) >= self._most:
                for other in [key for key, line in self._lines.items() if line.sender.idle]:
                    self.forget(other)
                self._most = max(_KEPT, 2 * len(self._lines))
            line = self._lines[lane.key] = self._made(lane)
        elif line.lane != lane:
            line.keep_to(lane)
        return line.sender

    def _made(self, lane: Lane) -> _Line:
        appends = self._store.channels.appends(lane.ttl_ms)

        async def marks() -> Record:
            return line.record

        sender = Sender(
            lane.key,
            self._id,
            appends,
            self._telemetry,
            self._timeout_s,
            marks,
            lambda: len(self._lines) == 1,
        )
        line = _Line(sender, appends, lane)
        return line
