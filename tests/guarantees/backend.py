"""What the cases see of a server, or of memory: a bus on it, and its streams from outside."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from bus import Bus
from tests.eyes import eyes_on, verbs_of
from tests.witness import Witness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from bus.streams.stream import StreamStore

Fields = dict[str, bytes]


class Pending(NamedTuple):
    """One row of a group's pending list."""

    entry_id: str
    owner: str
    deliveries: int


class Backend:
    """A server, or a place in memory, looked at with a client that is not ours."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis: Any = eyes_on(url)

    @property
    def verbs(self) -> type[StreamStore]:
        """The class whose verbs the buses use, for those who get in their way."""
        return verbs_of(self.url)

    async def close(self) -> None:
        await self.redis.aclose()

    @asynccontextmanager
    async def bus(self, **settings: Any) -> AsyncIterator[tuple[Bus, Witness]]:
        """A bus, and a witness of what it emits."""
        bus = Bus.connect(self.url, **settings)
        witness = Witness(bus)
        async with bus:
            yield bus, witness

    async def add(self, stream: str, fields: Mapping[Any, Any], entry_id: str = "*") -> str:
        """Append an entry by hand, as a program in another language might."""
        return (await self.redis.xadd(stream, dict(fields), id=entry_id)).decode()

    async def entries(self, stream: str) -> dict[str, Fields]:
        """Every entry of a stream, id to fields."""
        rows = await self.redis.xrange(stream)
        return {i.decode(): {k.decode(): v for k, v in f.items()} for i, f in rows}

    async def dead(self, stream: str, group: str) -> list[Fields]:
        """The dead letters of a group, oldest first."""
        return list((await self.entries(f"{stream}:dead:{group}")).values())

    async def pending(self, stream: str, group: str) -> list[Pending]:
        """What is pending in a group, oldest first."""
        rows = await self.redis.xpending_range(stream, group, "-", "+", 10_000)
        return [
            Pending(r["message_id"].decode(), r["consumer"].decode(), r["times_delivered"])
            for r in rows
        ]

    async def consumers(self, stream: str, group: str) -> set[str]:
        """The consumers of a group, lanes among them."""
        return {row["name"].decode() for row in await self.redis.xinfo_consumers(stream, group)}
