"""`bus.transaction()`: state and events in one atomic step, without a delivery.

    async with bus.transaction() as change:
        there = change.exists(key).equals(1)
        change.hset(key, {"name": name}, when=there)
        told = change.publish(AppUpdated(...), when=there)
    if told.skipped: ...

The commands and the script are those of `delivery.effects`. Nothing is sent if the block raises.
A transaction whose outcome is unknown is sent again, and applied once all the same: the server
remembers the last one of each *ticket*, and a ticket is held by one transaction at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self

from tenacity import AsyncRetrying, retry_if_exception, stop_never, wait_random_exponential

from bus.committer import Committer, Scope, Sheet
from bus.config import ROOM_WAIT_S
from bus.delivery import BatchCause, Delivery, current_delivery
from bus.effects import Effects
from bus.errors import (
    BusError,
    EffectsFailed,
    InvalidEffect,
    PermissionDenied,
    PublishRefused,
    PublishTimeout,
    PublishUnknown,
)
from bus.publisher import Publisher, Receipt
from bus.shortage import Shortage, tell_lost
from bus.streams import keys
from bus.streams.answers import Committed, Fate, Limits, Room
from bus.streams.connection import ConnectionLost, is_transient
from bus.streams.replies import REMEDIES, ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.way_in import WayIn

_MOST_TAGS = 10_000  # on a Cluster every tag has tickets of its own; beyond it new ones are made


_NOT_BEGUN = "collect effects inside `async with bus.transaction() as ...`"


class Transaction(Effects):
    """Collects effects in its `async with` block and applies them, all in one step, at its end.

    Afterwards `reply.value` has what the server answered, `receipts` where the events went.
    Errors at the end of the block: EffectsFailed (a command failed, see `.applied`);
    PublishTimeout, PublishRefused and StreamFull (nothing was done); PublishUnknown (perhaps).
    """

    __slots__ = ("_apply", "receipts", "scope")

    def __init__(
        self,
        scope: Scope,
        cause: Delivery[Any] | BatchCause | None,
        apply: "Callable[[Transaction], Any]",
    ) -> None:
        super().__init__(scope, cause)
        self.scope = scope
        self.receipts: list[Receipt] = []
        self._apply = apply
        self._closed = _NOT_BEGUN

    def key(self, name: str) -> str:
        """Not to be had: a transaction has no stream. Give its keys one hash tag on a Cluster."""
        raise InvalidEffect(
            f"a transaction has no stream whose slot {name!r} could share: name the key yourself;"
            " on a Cluster, with the same part in braces in all of them"
        )

    async def __aenter__(self) -> Self:
        """Begin to collect."""
        if self._closed is not _NOT_BEGUN:
            raise InvalidEffect("a transaction is used once: ask the bus for another")
        self._closed = ""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Apply everything, unless the block raised."""
        self.close("the transaction is over: ask the bus for another")
        if error is None:
            await self._apply(self)


class Transactions:
    """Makes and applies transactions; one per bus and process."""

    def __init__(
        self,
        store: StreamStore,
        publisher: Publisher,
        way_in: WayIn,
        committer: Committer,
        telemetry: Telemetry,
        *,
        publish_timeout_s: float,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._way_in = way_in
        self._committer = committer
        self._telemetry = telemetry
        self._timeout_s = publish_timeout_s
        self._sequences = count(1)
        self._tickets = count()
        self._free: dict[str | None, list[int]] = {}  # tickets in no use, by the tag of their key
        self._lines: dict[str, _Line] = {}  # streams without room
        self._running: set[asyncio.Future[None]] = set()

    async def close(self) -> None:
        """Wait for the transactions whose blocks have ended."""
        if self._running:
            await asyncio.wait(self._running, timeout=self._timeout_s)

    def begin(self) -> Transaction:
        """Return a transaction that nothing was collected in."""
        cause = current_delivery.get()
        if cause is not None and cause.settled:
            cause = None
        scope = Scope(self._way_in, "", clustered=self._store.clustered)
        return Transaction(scope, cause, self._apply)

    async def _apply(self, wanted: Transaction) -> None:
        running = asyncio.get_running_loop().create_future()
        self._running.add(running)
        try:
            if wanted:
                await self._commit(wanted)
            else:
                wanted.answered([])
        finally:
            self._running.discard(running)
            running.set_result(None)

    async def _commit(self, wanted: Transaction) -> None:
        started = asyncio.get_running_loop().time()
        deadline = started + self._timeout_s
        cause = current_delivery.get()
        inside = cause is not None and not cause.settled
        sheet = Sheet()
        await self._committer.find_streams({s.cls for s in wanted.sent}, deadline)
        streams = self._committer.write(sheet, wanted, ("", 0, ""), inside=inside)
        tag = wanted.scope.slot_tag
        # Those outside handlers stand behind those who wait already.
        full = next((s for s, w in sheet.streams.items() if w.waits and s in self._lines), "")
        fate = None if full else await self._send(sheet, tag, deadline)
        while fate is None or fate.fate is Fate.FULL:
            if fate is not None:
                full = fate.stream
                self._committer.shortage(full).tell(Room(0, fate.pinned, {}))
            fate = await self._in_line(full, sheet, tag, deadline)
        for stream in sheet.streams:
            if stream not in self._lines:
                self._committer.shortage(stream).over()
        if fate.fate is Fate.FAILED:
            stays = f"; what was applied before it stays: {', '.join(fate.applied)}"
            raise EffectsFailed(fate.error + (stays if fate.applied else ""), fate.applied)
        replies = list(fate.replies)
        for sent, stream in zip(wanted.sent, streams, strict=True):
            ran, reply = replies[sent.command]
            if ran:
                receipt = Receipt(sent.event_id, stream, reply.decode())
                replies[sent.command] = True, receipt
                wanted.receipts.append(receipt)
                self._way_in.tell(sent.event, receipt)
        wanted.answered(replies)
        self._telemetry.emit(
            "transaction.committed",
            commands=len(wanted),
            duration_s=asyncio.get_running_loop().time() - started,
        )

    # --- no room

    async def _in_line(
        self, stream: str, sheet: Sheet, tag: str | None, deadline: float
    ) -> Committed:
        """Wait for room in a stream, behind those who wait already; then send again.

        One at a time asks, without the events, and gives its place up when its own are in: who
        comes later must not take the room. Errors: StreamFull; PublishTimeout, PublishRefused when
        the server went away meanwhile.
        """
        # Also those with a condition need room, before it is known whether they come.
        _, events, limits, waits = sheet.streams[stream]
        shortage = self._committer.shortage(stream)
        if not waits:
            raise shortage.error(limits.most)
        line = self._lines.setdefault(stream, _Line())
        line.length += 1
        try:
            async with _until(deadline, line, shortage, limits):
                await line.first.acquire()
            try:
                while True:
                    async with _until(deadline, line, shortage, limits):
                        await self._room(line, stream, limits, events)
                    fate = await self._send(sheet, tag, deadline)
                    if fate.fate is not Fate.FULL or fate.stream != stream:
                        return fate
            finally:
                line.first.release()
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[stream]

    async def _room(self, line: "_Line", stream: str, limits: Limits, events: int) -> None:
        """Ask until there is room; what is wrong with the stream, the next attempt says."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda e: isinstance(e, _NoRoom) or is_transient(e)),
            stop=stop_never,
            wait=wait_random_exponential(multiplier=ROOM_WAIT_S / 4, max=ROOM_WAIT_S),
            reraise=True,
        ):
            with attempt:
                try:
                    room = await self._store.room(stream, limits, events)
                except BusError as error:
                    line.trouble = error
                    if is_transient(error):
                        raise
                    return
                line.trouble = None
                tell_lost(self._telemetry, stream, room.lost)
                if room.entries < events:
                    self._committer.shortage(stream).tell(room)
                    raise _NoRoom

    # --- sending

    async def _send(self, sheet: Sheet, tag: str | None, deadline: float) -> Committed:
        """Send a transaction with a ticket, until its outcome is known or its time is up."""
        free = self._free.setdefault(tag, [])
        ticket = free.pop() if free else next(self._tickets)
        sequence = next(self._sequences)
        memory = keys.transaction(self._publisher.id, ticket, tag)
        try:
            return await self._insist(memory, str(sequence), sheet, deadline)
        finally:
            # Free at once, be the outcome known or not: what is still under way has a lower
            # sequence than whatever comes next with this ticket, and is refused then.
            free.append(ticket)
            if len(self._free) > _MOST_TAGS:
                self._free.clear()

    async def _insist(self, memory: str, sequence: str, sheet: Sheet, deadline: float) -> Committed:
        """Send it again, unchanged, while its outcome is unknown or time may heal what it is."""
        trouble: BusError | None = None
        maybe_sent = attempting = False
        args = sheet.arguments()
        try:
            async with asyncio.timeout_at(deadline):
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception(is_transient),
                    stop=stop_never,
                    wait=wait_random_exponential(multiplier=0.02, max=1.0),
                    reraise=True,
                ):
                    with attempt:
                        attempting = True
                        try:
                            (fate,), looks, appended = await self._store.commit(
                                (memory,), "", sequence, sheet.keys, args
                            )
                        except BusError as error:
                            attempting, trouble = False, error
                            maybe_sent |= isinstance(error, ConnectionLost) and error.sent
                            raise
                        self._committer.tell(looks, appended)
                        return fate
        except TimeoutError:
            raise _too_late(trouble, unknown=maybe_sent or attempting) from None
        except BusError as error:
            if maybe_sent:
                raise _too_late(error, unknown=True) from None
            if isinstance(error, ReplyError):
                raise _explained(error, memory) from None
            raise
        raise AssertionError("tenacity ends by returning or raising")


class _Line:
    """Those who wait for room in one stream; the first asks for it.

    trouble: why it could not be asked for the last time.
    """

    def __init__(self) -> None:
        self.first = asyncio.Lock()
        self.length = 0
        self.trouble: BusError | None = None


@asynccontextmanager
async def _until(
    deadline: float, line: _Line, shortage: Shortage, limits: Limits
) -> AsyncIterator[None]:
    """Wait in a line no longer than that. Errors: why there was no room."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        if line.trouble is not None:
            raise _too_late(line.trouble, unknown=False) from None
        raise shortage.error(limits.most) from None


class _NoRoom(Exception):
    """There is none yet."""


def _explained(error: ReplyError, memory: str) -> BusError:
    if error.code == "NOPERM":
        return PermissionDenied(
            "the user may not run a command of the transaction, or lacks a right on one of its keys"
            " or on bus:*: docs/wire.md lists what is needed"
        )
    return error.explained(memory)


def _too_late(cause: BusError | None, *, unknown: bool) -> BusError:
    why = f" ({cause})" if cause is not None else ""
    if unknown:
        return PublishUnknown(
            f"no answer to the transaction in time{why}: it may have been committed, whole or not"
            " at all; look at the state before you repeat it"
        )
    text = f"the server did not take the transaction in time{why}: nothing of it was done"
    if isinstance(cause, ReplyError):
        return PublishRefused(text + REMEDIES.get(cause.code, ""), cause.code)
    return PublishTimeout(text)
