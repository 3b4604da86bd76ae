"""The floor on hiredis: an asyncio protocol, one write per turn of the loop. No guarantees."""

import asyncio
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import hiredis

from bench.systems.bare_redispy import STREAM, TYPE, Document, decode, encode
from bench.work import BATCH, Fields, Work


class Pipe(asyncio.Protocol):
    """Commands in, futures of replies out, in order."""

    transport: asyncio.WriteTransport

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.reader = hiredis.Reader(notEnoughData=self)
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.out: list[bytes] = []

    @classmethod
    async def open(cls, url: str) -> "Pipe":
        """Connect."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        where = parts.hostname or "127.0.0.1", parts.port or 6379
        _, pipe = await loop.create_connection(cls, *where)
        return pipe

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = transport  # type: ignore[assignment] # a stream transport it is

    def data_received(self, data: bytes) -> None:
        """Resolve the futures of the replies in `data`."""
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not self:
            self.waiting.popleft().set_result(reply)

    def send(self, packed: bytes) -> "asyncio.Future[Any]":
        """Queue a command; what one turn of the loop queues leaves in one write."""
        future: asyncio.Future[Any] = self.loop.create_future()
        self.waiting.append(future)
        if not self.out:
            self.loop.call_soon(self._flush)
        self.out.append(packed)
        return future

    def call(self, *args: Any) -> "asyncio.Future[Any]":
        """Queue a command of these arguments."""
        return self.send(hiredis.pack_command(args))

    def _flush(self) -> None:
        self.transport.write(b"".join(self.out))
        self.out.clear()


class Publisher:
    """XADD of the same three fields that the bus writes."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._made = 0

    def event(self, fields: Fields) -> Document:
        """Return an event."""
        return Document(**fields)

    def _send(self, event: Document) -> "asyncio.Future[Any]":
        self._made += 1
        made = f"bare-{self._made:020}"
        return self._pipe.call("XADD", STREAM, "*", "id", made, "type", TYPE, "data", encode(event))

    async def publish(self, event: Document) -> Any:
        """Append one event."""
        return await self._send(event)

    async def publish_many(self, events: list[Document]) -> Any:
        """Append events in one write, and wait for the last answer."""
        return await [self._send(event) for event in events][-1]

    async def close(self) -> None:
        """Disconnect."""
        self._pipe.transport.close()


async def publisher(url: str) -> Publisher:
    """Connect."""
    return Publisher(await Pipe.open(url))


async def work(url: str, work: Work) -> None:
    """Read, handle, ack; the ack and the next read go in one write."""
    pipe = await Pipe.open(url)
    await pipe.call("XGROUP", "CREATE", STREAM, work.group, "0", "MKSTREAM")  # or there is one
    await work.gate()
    handle = work.handler
    read: tuple[Any, ...] = (
        "XREADGROUP",
        "GROUP",
        work.group,
        f"c{work.row}",
        "COUNT",
        BATCH,
        "BLOCK",
        200,
    )
    read += ("STREAMS", STREAM, ">")
    reply = await pipe.call(*read)
    while not work.stopped.is_set():
        if not reply:
            reply = await pipe.call(*read)
            continue
        entries = reply[0][1]
        if work.concurrency == 1:
            for _, fields in entries:
                await handle(decode(fields[5]))
        else:
            waiting = iter(entries)

            async def lane() -> None:
                for _, fields in waiting:  # noqa: B023 - all lanes end before the next reply
                    await handle(decode(fields[5]))

            await asyncio.gather(*(lane() for _ in range(work.concurrency)))
        pipe.call("XACK", STREAM, work.group, *[entry_id for entry_id, _ in entries])
        reply = await pipe.call(*read)
    pipe.transport.close()
