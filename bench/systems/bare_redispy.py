"""The floor on redis-py: read 500, decode, await the handler, one XACK per batch. No guarantees."""

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
import redis.asyncio
from redis.exceptions import ResponseError

from bench.work import BATCH, LANES, Fields, Work

STREAM = "bus:{bench:0}"
TYPE = "bench.document_created"


class Document(msgspec.Struct):
    """What is published."""

    document_id: str
    dataset_id: str
    title: str
    tokens: int
    tags: list[str]


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Document).decode


class Publisher:
    """XADD of the same three fields that the bus writes."""

    def __init__(self, url: str) -> None:
        self._redis: Any = redis.asyncio.Redis.from_url(
            url, protocol=2, max_connections=LANES, socket_timeout=None
        )
        self._made = 0

    def event(self, fields: Fields) -> Document:
        """Return an event."""
        return Document(**fields)

    def _fields(self, event: Document) -> dict[str, Any]:
        self._made += 1
        return {"id": f"bare-{self._made:020}", "type": TYPE, "data": encode(event)}

    async def publish(self, event: Document) -> Any:
        """Append one event."""
        return await self._redis.xadd(STREAM, self._fields(event))

    async def publish_many(self, events: list[Document]) -> Any:
        """Append events in one pipeline."""
        pipeline = self._redis.pipeline(transaction=False)
        for event in events:
            pipeline.xadd(STREAM, self._fields(event))
        return await pipeline.execute()

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()


async def publisher(url: str) -> Publisher:
    """Connect."""
    return Publisher(url)


async def work(url: str, work: Work) -> None:
    """Read, handle, ack; a handler that sleeps runs in as many tasks as it may."""
    client: Any = redis.asyncio.Redis.from_url(url, protocol=2, socket_timeout=None)
    with suppress(ResponseError):  # another worker has made it
        await client.xgroup_create(STREAM, work.group, id="0", mkstream=True)
    await work.gate()
    handle = work.handler
    while not work.stopped.is_set():
        reply = await client.xreadgroup(
            work.group, f"c{work.row}", {STREAM: ">"}, count=BATCH, block=200
        )
        if not reply:
            continue
        entries = reply[0][1]
        if work.concurrency == 1:
            for _, fields in entries:
                await handle(decode(fields[b"data"]))
        else:
            waiting = iter(entries)

            async def lane() -> None:
                for _, fields in waiting:  # noqa: B023 - all lanes end before the next reply
                    await handle(decode(fields[b"data"]))

            await asyncio.gather(*(lane() for _ in range(work.concurrency)))
        await client.xack(STREAM, work.group, *[entry_id for entry_id, _ in entries])
    await client.aclose()
