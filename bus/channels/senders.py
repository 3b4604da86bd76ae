"""The senders of the channels that this process writes to."""

import asyncio
import secrets

from bus.config import ANSWER_S
from bus.sender import Sender
from bus.streams.codec import Fields
from bus.streams.forms import unit_of
from bus.streams.stream import StreamStore
from bus.streams.topics import Record
from bus.telemetry import Telemetry
from bus.unit import Unit

_KEPT = 64  # senders; above that, those that are idle go when others come

Lane = tuple[str, int, int]  # the channel's key, ms until it expires, its cap


class Senders:
    """One sender per channel that is written to: its publishes share calls, in their order."""

    def __init__(self, store: StreamStore, telemetry: Telemetry, timeout_s: float) -> None:
        self._store = store
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._id = secrets.token_hex(8)
        self._senders: dict[Lane, Sender] = {}
        self._most = _KEPT

    async def send(self, lane: Lane, fields: Fields, size: int) -> tuple[str, int]:
        """Append an entry; return its id as (ms, sequence).

        Errors: BusClosed, PublishTimeout, PublishUnknown; a ReplyError ENDED; the ServerError
        family.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        return await self._sender(lane).add(Unit(1, size, unit_of(fields), deadline))

    def forget(self, lane: Lane) -> None:
        """Let go of the sender of a channel that was ended; if it is idle."""
        sender = self._senders.get(lane)
        if sender is not None and sender.idle:
            sender.close()
            del self._senders[lane]

    async def close(self) -> None:
        """Wait until everybody who waits for a publish has an outcome."""
        senders = list(self._senders.values())
        if awaited := [f for sender in senders for f in sender.awaited()]:
            await asyncio.wait(awaited, timeout=self._timeout_s + ANSWER_S)
        tasks = [sender.task for sender in senders if sender.task is not None]
        for sender in senders:
            sender.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _sender(self, lane: Lane) -> Sender:
        sender = self._senders.get(lane)
        if sender is None:
            if len(self._senders) >= self._most:
                for other in [lane for lane, s in self._senders.items() if s.idle]:
                    self.forget(other)
                self._most = max(_KEPT, 2 * len(self._senders))
            sender = self._senders[lane] = self._made(lane)
        return sender

    def _made(self, lane: Lane) -> Sender:
        key, ttl_ms, maxlen = lane
        record = Record(1, maxlen, on_full="drop_oldest")

        async def marks() -> Record:
            return record

        sender = Sender(
            key,
            self._id,
            self._store.channels.appends(ttl_ms),
            self._telemetry,
            self._timeout_s,
            marks,
            lambda: len(self._senders) == 1,
        )
        sender.keep_to(record, inside=False)
        return sender
