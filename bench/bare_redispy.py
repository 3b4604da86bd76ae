"""The floor on redis-py: XREADGROUP 500 -> decode -> await handler -> one XACK per batch."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import redis.asyncio

from bench.work import STREAM, DocumentCreated

decode = msgspec.json.Decoder(DocumentCreated).decode


async def consume(
    url: str, group: str, count: int, handler: Callable[[Any], Awaitable[None]]
) -> float:
    """Handle and ack `count` entries; return the seconds from the first read to the last ack."""
    client: Any = redis.asyncio.Redis.from_url(url, protocol=2, socket_timeout=None)
    await client.xgroup_create(STREAM, group, id="0")
    started = time.perf_counter()
    done = 0
    while done < count:
        reply = await client.xreadgroup(group, "c", {STREAM: ">"}, count=500, block=1000)
        ids = []
        for entry_id, fields in reply[0][1]:
            await handler(decode(fields[b"data"]))
            ids.append(entry_id)
        done += await client.xack(STREAM, group, *ids)
    seconds = time.perf_counter() - started
    await client.aclose()
    return seconds
