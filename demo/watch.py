"""Looking at the groups while they work: how far they are, what is left, who holds what."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bus import Handler
from bus.streams import keys
from demo import records
from demo.ledger import GROUPS, Place, streams_of

LOOK_AGAIN_S = 0.05


async def until(happened: Callable[[], Awaitable[object]]) -> None:
    """Return when `happened` answers something true. What we wait for is in other processes."""
    while not await happened():  # noqa: ASYNC110 - Redis is all we share with them
        await asyncio.sleep(LOOK_AGAIN_S)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far the groups have come: events handled, runs failed, dead letters, and the rest."""

    handled: dict[str, int]
    failed: int
    dead: int
    backlog: int


async def take_snapshot(redis: Any) -> Snapshot:
    """Return how far the groups have come, all of it at one moment."""
    pipeline = redis.pipeline(transaction=True)
    for handler in GROUPS:
        pipeline.hlen(records.handled(handler.group))
    for handler in GROUPS:
        pipeline.hvals(records.failed(handler.group))
    for handler in GROUPS:
        for stream in streams_of(handler):
            pipeline.xlen(keys.dead(stream, handler.group))
    replies = await pipeline.execute()
    count = len(GROUPS)
    return Snapshot(
        handled={h.group: n for h, n in zip(GROUPS, replies, strict=False)},
        failed=sum(int(n) for counts in replies[count : 2 * count] for n in counts),
        dead=sum(replies[2 * count :]),
        backlog=await backlog(redis),
    )


async def backlog(redis: Any) -> int:
    """Return the pending entries of all groups, plus 1 for each stream not read to its end."""
    reads = [(handler.group, stream) for handler in GROUPS for stream in streams_of(handler)]
    pipeline = redis.pipeline(transaction=False)
    for _, stream in reads:
        pipeline.exists(stream)
    known = await pipeline.execute()
    reads = [read for read, exists in zip(reads, known, strict=True) if exists]
    pipeline = redis.pipeline(transaction=True)
    for _, stream in reads:
        pipeline.xinfo_stream(stream)
        pipeline.xinfo_groups(stream)
    replies = await pipeline.execute()
    rest = 0
    for (group, _), info, groups in zip(reads, replies[::2], replies[1::2], strict=True):
        of_group = next((g for g in groups if _text(g["name"]) == group), None)
        if of_group is None:
            rest += 1
        else:
            rest += of_group["pending"]
            rest += _text(of_group["last-delivered-id"]) != _text(info["last-generated-id"])
    return rest


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


async def held_by(
    redis: Any, pid: int, handlers: Iterable[Handler[...]] = GROUPS
) -> list[tuple[str, Place]]:
    """Return what lies pending with the worker process `pid`: group and place of each entry."""
    held = []
    for handler in handlers:
        for stream in streams_of(handler):
            for consumer in await redis.xinfo_consumers(stream, handler.group):
                if f"-{pid}-" in _text(consumer["name"]) and consumer["pending"]:
                    pending = await redis.xpending_range(
                        stream, handler.group, "-", "+", 10_000, consumer["name"]
                    )
                    held += [(handler.group, (stream, _text(p["message_id"]))) for p in pending]
    return held


async def still_pending(redis: Any, held: Iterable[tuple[str, Place]]) -> int:
    """Return how many of these are pending with anybody: neither acked nor dead-lettered."""
    pipeline = redis.pipeline(transaction=False)
    for group, (stream, entry_id) in held:
        pipeline.xpending_range(stream, group, entry_id, entry_id, 1)
    return sum(len(pending) for pending in await pipeline.execute())
