"""Reading a channel from any point on, to its end."""

import asyncio
import re
from types import TracebackType
from typing import Literal, Self

from bus.envelope import Envelope, order
from bus.errors import ChannelGap, DeclarationError
from bus.history.hub import Hub
from bus.history.patience import patiently
from bus.history.place import START, Gap, Place
from bus.history.pursuit import Pursuit
from bus.history.selection import Selection
from bus.streams.channels import END_TYPE, ChannelState

_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_EXPIRED_S = 0.05  # after its time a channel is looked for once more
_BEFORE_ALL = START.decode()
_ALL = Selection(None, None, None)

Reason = Literal["trimmed", "restarted", "gone"]


class ChannelTail:
    """Iterates over a channel until it ends; made by `Channel.tail`.

    `async for envelope in tail`, or `async with` around it, which lets go of it at once. One task
    at a time. A channel that nobody has begun is waited for. Each entry comes once, also when
    connections drop and servers restart; a cancelled wait loses nothing. All tails of a process
    share one connection, on which one XREAD reads for them all.

    What cannot come is told by a ChannelGap: entries were dropped at the cap ("trimmed"); the
    channel is another than `after` is from ("restarted"); it has expired without an end ("gone").
    Iterating again goes on, after "gone" it is over. It is told at its place; to a tail that waits,
    perhaps one read later. A 6.2 server does not know what was dropped before a tail from the
    beginning has begun, nor "restarted" from "trimmed" where the new ids are beyond the old.

    ended: whether the end marker was read. over: whether nothing more comes. position: id of the
    entry that came last, at first `after`; None at the beginning.
    Errors: ChannelGap; WrongKeyType, PermissionDenied, after which it goes on when it is asked
    again; ServerUnreachable, if it cannot begin within 15 s; BusClosed.
    """

    __slots__ = (
        "__weakref__",
        "_first",
        "_held",
        "_hub",
        "_key",
        "_look_at_s",
        "_name",
        "_pursuit",
        "_told",
        "_watched",
        "ended",
        "position",
    )

    def __init__(self, hub: Hub, name: str, key: str, after: str | None) -> None:
        at = None if after is None else checked_id(after)
        self.position = None if at == _BEFORE_ALL else at
        self.ended = False
        self._hub = hub
        self._name = name
        self._key = key
        self._pursuit = Pursuit(hub, _ALL)
        self._told: list[ChannelGap] = []  # what is to be raised next
        self._held: Envelope | None = None  # the first, until it is known what was before it
        self._first = b""  # id of the entry that comes first, if it is known
        self._watched = False  # whether it is known that the channel is there...
        self._look_at_s: float | None = None  # ...and loop time at which it will have expired

    @property
    def over(self) -> bool:
        """Whether nothing comes any more: it has ended, is gone, or was closed."""
        return self._pursuit.over and not self._told

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        while True:
            if self._told:
                raise self._told.pop(0)
            envelope = self._held or self._pursuit.step()
            if envelope is None:
                await self._refill()
            elif self._watched or await self._meet(envelope):
                return await self._passed(envelope)

    async def aclose(self) -> None:
        """End the tail: nothing is read for it any more."""
        await self._pursuit.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the tail."""
        await self.aclose()

    # --- where it begins

    async def _begin(self) -> None:
        """Look what there is of the channel, and stand before what is to come."""
        state = await self._look()
        place = Place()
        if self.position is not None:
            after, last = order(self.position.encode()), order(state.last) if state else (0, 0)
            if state is None:
                self._miss("gone", "")
                await self.aclose()
                return
            if after > last:
                self._miss("restarted", state.first.decode())
            elif after == last and state.ended:
                self.ended = True
                await self.aclose()
                return
            else:
                place = Place(self.position.encode(), met=True)
                self._watched = True
        elif state is not None and state.trimmed:
            self._miss("trimmed", state.first.decode())
        if state is not None:
            self._first = state.first
        self._pursuit.begin(self, {self._key: place}, {})

    async def _meet(self, envelope: Envelope) -> bool:
        """See whether the first entry is the first there was; if not, tell that before it."""
        self._held = envelope  # a wait that is cancelled must not lose it
        first = envelope.entry_id
        if self._first:
            trimmed = self._first != first.encode()
        else:  # it was not there when we began
            state = await self._look()
            trimmed = state is not None and state.trimmed
        self._watched = True
        if trimmed:
            self._miss("trimmed", first)
        return not trimmed

    async def _look(self) -> ChannelState | None:
        """Look at the channel, and note when it will have expired."""
        state = await patiently(lambda: self._hub.store.channels.look(self._key))
        now_s = asyncio.get_running_loop().time()
        if state is None:
            self._look_at_s = now_s
        elif state.expires_ms is None:
            self._look_at_s = None
        else:
            self._look_at_s = now_s + state.expires_ms / 1000 + _EXPIRED_S
        return state

    # --- how it goes on

    async def _passed(self, envelope: Envelope) -> Envelope:
        """Take what has come; at the end marker, end."""
        self._held = None
        self.position = envelope.entry_id
        if envelope.type == END_TYPE:
            self.ended = True
            await self.aclose()
            raise StopAsyncIteration
        return envelope

    async def _refill(self) -> None:
        """Get the next batch, or come nearer to it."""
        pursuit = self._pursuit
        if pursuit.over:
            raise StopAsyncIteration
        if not pursuit.begun:
            await self._begin()
            return
        there = await pursuit.advance()
        for gap in pursuit.missed:
            self._tell(gap)
        pursuit.missed.clear()
        if not there:
            await self._wait()

    async def _wait(self) -> None:
        """Wait for what comes; when the channel should have expired, look whether it has."""
        if self._look_at_s is None or not self._watched:
            await self._pursuit.wait()
        elif (left_s := self._look_at_s - asyncio.get_running_loop().time()) > 0:
            await self._pursuit.wait(left_s)
        elif await self._look() is None:
            self._miss("gone", "")
            await self.aclose()

    def _tell(self, gap: Gap) -> None:
        begun_anew = gap.another or order(gap.at) < order(gap.after)
        # Not where we stand: what was read at once was given before it was known to be one.
        after = gap.after.decode()
        self._miss("restarted" if begun_anew else "trimmed", gap.first.decode(), after)

    def _miss(self, reason: Reason, first: str, after: str | None = None) -> None:
        after = after or self.position
        self._told.append(
            ChannelGap(_TEXTS[reason].format(self._name, after), reason, after, first or None)
        )


_TEXTS: dict[Reason, str] = {
    "trimmed": "entries of channel {} after {} were dropped at its cap: the oldest go first",
    "restarted": "channel {} does not reach to {}: it has begun anew, or lost its end",
    "gone": "channel {} has expired, or was never begun: nothing comes after {}",
}


def checked_id(entry_id: object) -> str:
    """Return the id of an entry as the server writes it. Errors: DeclarationError."""
    if isinstance(entry_id, str) and _ID.fullmatch(entry_id):
        ms, _, at = entry_id.partition("-")
        if int(ms) < 2**64 and int(at) < 2**64:
            return f"{int(ms)}-{int(at)}"
    raise DeclarationError(
        f"after is the id of an entry, such as '1763629200000-0', not {entry_id!r:.80}"
    )
