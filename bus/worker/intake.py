"""Reads one handler's streams, and mends what breaks while reading.

A read is never cancelled: what its reply holds is ours on the server already. After any error the
entries of a lost reply are pending for us unseen, so they are recovered before the next read.
"""

import asyncio
from typing import Any, Protocol

from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from bus.config import BLOCK_MS, READ_BYTES, READ_COUNT
from bus.errors import BusError, ServerUnreachable
from bus.streams.answers import RawEntry, Taken
from bus.streams.connection import ConnectionLost
from bus.streams.reader import Reads
from bus.streams.replies import TRANSIENT, ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.hand import Hand

_STOP_PATIENCE_S = 1.0  # beyond BLOCK, for a server that does not answer
# How often reads that do not block list the inboxes that were empty: seldom enough to cost nothing
# beside the reads themselves, also with a thousand of them, and as prompt as anybody can see.
_IDLE_INBOXES_S = 0.05


class Basket(Protocol):
    """Where what was read goes: the consumer."""

    def wanted(self) -> int:
        """How many entries to ask for now; 0 or less for none."""

    def deliver_new(self, hand: Hand, entries: list[RawEntry], sent_at: float) -> None:
        """Take entries read for the first time by a read sent at loop time `sent_at`."""

    def deliver(self, hand: Hand, taken: Taken, asked_at: float, *, recovered: bool) -> int:
        """Take entries moved here by a script sent at loop time `asked_at`."""


class Intake:
    """The read loop of one consumer."""

    def __init__(
        self,
        store: StreamStore,
        reader: Reads,
        group: str,
        consumer: str,
        hands: dict[str, Hand],
        basket: Basket,
        telemetry: Telemetry,
        *,
        block_ms: int,
    ) -> None:
        self._store = store
        self._reader = reader
        self._group = group
        self._consumer = consumer
        self._hands = hands
        self._basket = basket
        self._telemetry = telemetry
        self._block_ms = min(BLOCK_MS, block_ms)
        self._entry_bytes = 512.0  # running mean
        self._stopping = asyncio.Event()
        self.waits = False  # for room
        self._room: asyncio.Future[None] | None = None
        self._cursor = 0  # where the next look at a few streams begins
        self._listed: tuple[list[str], list[str]] | None = None  # streams, inboxes; None: look
        self._listed_of = 0  # hands when that was listed
        self._busy_inboxes: set[str] = set()  # those that had something when last looked at
        self._idle_listed_at = float("-inf")  # loop time at which the others were read, too
        self._found_nothing = 0  # streams that had nothing, since one had
        self.unseen = False  # the server may have delivered what we never saw
        self.broken: set[str] = set()  # streams whose key holds something else

    def look_again(self) -> None:
        """Ask the basket again how much is wanted."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def list_anew(self) -> None:
        """Read what is paused no more, from the next read on; a read that waits is ended."""
        self._listed = None
        self.look_again()
        await self._reader.unblock()

    async def stop(self, task: "asyncio.Task[Any]") -> None:
        """Stop reading; `task` runs `run`.

        CLIENT UNBLOCK ends a blocked read at once; it is repeated because the read may still
        have been on its way. Where the access list forbids it, the read ends by its BLOCK.
        """
        self.quit()
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + self._block_ms / 1000 + _STOP_PATIENCE_S
        while not task.done():
            self.look_again()
            unblocking = asyncio.ensure_future(self._reader.unblock())
            await asyncio.wait([task, unblocking], timeout=0.05)
            unblocking.cancel()
            await asyncio.wait([unblocking])
            if not unblocking.cancelled():
                unblocking.exception()  # a broken server ends the read as well
            await asyncio.wait([task], timeout=0.05)
            if loop.time() > patience_ends:
                # The server does not answer. What the read may still bring is left to our lease.
                await self._reader.close()
                task.cancel()
                await asyncio.wait([task])

    def quit(self) -> None:
        """Read no more, from the next turn on."""
        self._stopping.set()
        self.look_again()

    async def close(self) -> None:
        """Close the connection."""
        await self._reader.close()

    async def run(self) -> None:
        """Read until stopped. Errors: those that time does not heal (no permission, ...)."""
        while not self._stopping.is_set():
            try:
                await self._read()
            except BusError as error:
                await self._read_after(error)

    async def _read(self) -> None:
        if self.unseen:
            try:
                await self._recover()
            except BusError:
                self.unseen = True
                raise
        streams, inboxes = self._sound()
        count = self._basket.wanted()
        if self._stopping.is_set():
            return
        if count <= 0 or not (streams or inboxes):
            self._room = asyncio.get_running_loop().create_future()
            self.waits = True
            try:
                await self._room
            finally:
                self.waits, self._room = False, None
            return
        block_ms = self._block_ms
        # An inbox is nearly always empty: it is listed, but gets a share of the count only when it
        # had something the last time.
        likely = [*streams, *self._busy_inboxes] or inboxes
        if count < len(likely) and self._found_nothing < len(likely):
            likely, block_ms = self._next_few(likely, count), 0
        by_bytes = int(READ_BYTES / self._entry_bytes / len(likely)) or 1
        per_stream = min(-(-count // len(likely)), by_bytes, READ_COUNT)
        sent_at = asyncio.get_running_loop().time()
        idle: list[str] = []
        if block_ms or sent_at - self._idle_listed_at >= _IDLE_INBOXES_S:
            chosen = self._busy_inboxes.union(likely)
            idle = [s for s in inboxes if s not in chosen]
            self._idle_listed_at = sent_at
        replies = await self._reader.read(
            self._group, self._consumer, [*likely, *idle], per_stream, block_ms
        )
        self._found_nothing = 0 if replies else self._found_nothing + len(likely)
        self._busy_inboxes.difference_update(likely)
        self._busy_inboxes.update(s for s, _ in replies if self._hands[s].is_inbox)
        total = 0
        for stream, entries in replies:
            total += len(entries)
            # Dated by when the read was sent: a stopped process wakes up to replies long stale.
            self._basket.deliver_new(self._hands[stream], entries, sent_at)
            size = sum(map(len, entries[-1][1])) + 64
            self._entry_bytes += (size - self._entry_bytes) * 0.2
        if total:
            self._telemetry.emit("read.received", group=self._group, count=total)

    def _sound(self) -> tuple[list[str], list[str]]:
        """Return the streams and the inboxes to read; listed anew when some were added or broke."""
        if self._listed is None or self._listed_of != len(self._hands):
            hands = [h for s, h in self._hands.items() if s not in self.broken and not h.paused]
            self._listed = (
                [h.stream for h in hands if not h.is_inbox],
                [h.stream for h in hands if h.is_inbox],
            )
            self._listed_of = len(self._hands)
            self._busy_inboxes.intersection_update(self._listed[1])
        return self._listed

    def _next_few(self, streams: list[str], count: int) -> list[str]:
        """Return the next `count` streams in turn, to be looked at without blocking.

        COUNT holds per stream and is at least 1: with fewer slots than streams a read of all
        would bring more than can start. Only when all were empty is one blocked on all of them.
        """
        start = self._cursor % len(streams)
        self._cursor = start + count
        return (streams + streams)[start : start + count]

    async def _read_after(self, error: BusError) -> None:
        """Mend what broke and read again, with growing pauses, until it works or we stop."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_heals),
            wait=wait_random_exponential(multiplier=0.05, max=5.0),
            sleep=self._pause,
            reraise=True,
        ):
            if self._stopping.is_set():
                return
            with attempt:
                self._telemetry.emit(
                    "read.failed",
                    group=self._group,
                    error_type=type(error).__name__,
                    error=str(error),
                )
                try:
                    await self._mend(error)
                    await self._read()
                except BusError as again:
                    error = again
                    raise

    async def _mend(self, error: BusError) -> None:
        if not isinstance(error, ReplyError):
            self.unseen = True
        elif error.code == "WRONGTYPE":
            await self.find_broken()
        elif error.code in ("NOGROUP", "UNBLOCKED"):
            await self._create_groups()

    async def _create_groups(self) -> None:
        """Make all groups of the read again, at the beginning: at-least-once allows no gap."""
        streams = [s for s in self._hands if s not in self.broken]
        results = await self._store.create_groups([(s, self._group, "0") for s in streams])
        for stream, result in zip(streams, results, strict=True):
            if result is True and not self._hands[stream].is_inbox:
                self._telemetry.emit("group.recreated", stream=stream, group=self._group)
            elif isinstance(result, ReplyError):
                if result.code != "WRONGTYPE":
                    raise result
                await self.find_broken()

    async def find_broken(self) -> None:
        """Leave out streams whose key holds another type, take up those that are mended. TYPE."""
        for stream in list(self._hands):
            kind = await self._store.type_of(stream)
            if kind not in (b"stream", b"none"):
                if stream not in self.broken:
                    self.broken.add(stream)
                    self._listed = None
                    self._telemetry.emit(
                        "stream.broken",
                        stream=stream,
                        group=self._group,
                        error=f"the key holds a {kind.decode()}; rename or delete it",
                    )
            elif stream in self.broken:
                self.broken.discard(stream)
                self._listed = None
                self._telemetry.emit("stream.mended", stream=stream, group=self._group)
                self.look_again()

    async def _recover(self) -> None:
        """Take up what was delivered to us in replies that never arrived."""
        self.unseen = False  # what fails from here on sets it again
        for stream, hand in list(self._hands.items()):
            if stream in self.broken:
                continue
            more = True
            while more:
                asked_at = asyncio.get_running_loop().time()
                taken = await self._store.recover(
                    stream, self._group, self._consumer, READ_COUNT, hand.known
                )
                more = len(taken.entries) + len(taken.lost) >= READ_COUNT
                count = self._basket.deliver(hand, taken, asked_at, recovered=True)
                if count:
                    self._telemetry.emit(
                        "delivery.recovered", stream=stream, group=self._group, count=count
                    )

    async def _pause(self, delay_s: float) -> None:
        await pause(self._stopping, delay_s)


async def pause(until: asyncio.Event, delay_s: float) -> None:
    """Wait for `delay_s` seconds, less when `until` is set."""
    try:
        async with asyncio.timeout(delay_s):
            await until.wait()
    except TimeoutError:
        pass


def _heals(error: BaseException) -> bool:
    """Whether reading can go on by itself once the server has recovered."""
    if isinstance(error, ReplyError):
        return error.code in TRANSIENT or error.code in ("NOGROUP", "WRONGTYPE")
    return isinstance(error, ConnectionLost | ServerUnreachable)
