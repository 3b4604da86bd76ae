"""The floor on hiredis: an asyncio protocol, one write per turn of the loop, nothing else."""

import asyncio
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import hiredis
import msgspec

from bench.work import STREAM, DocumentCreated

TYPE = "bench.document_created"
encode = msgspec.json.Encoder().encode


class Pipe(asyncio.Protocol):
    """Commands in, futures of replies out, in order."""

    transport: asyncio.WriteTransport

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.reader = hiredis.Reader(notEnoughData=self)
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.out: list[bytes] = []

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

    def _flush(self) -> None:
        self.transport.write(b"".join(self.out))
        self.out.clear()


class Publisher:
    """XADD of the same three fields that the bus writes."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._made = 0

    @classmethod
    async def open(cls, url: str) -> "Publisher":
        """Connect."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, pipe = await loop.create_connection(
            Pipe, parts.hostname or "127.0.0.1", parts.port or 6379
        )
        return cls(pipe)

    async def publish(self, event: DocumentCreated) -> bytes:
        """Append one event and return its entry id."""
        self._made += 1
        fields = ("id", f"bare-{self._made:020}", "type", TYPE, "data", encode(event))
        command: Any = ("XADD", STREAM, "*", *fields)
        packed = hiredis.pack_command(command)
        entry_id: bytes = await self._pipe.send(packed)
        return entry_id

    async def close(self) -> None:
        """Close the connection."""
        self._pipe.transport.close()
