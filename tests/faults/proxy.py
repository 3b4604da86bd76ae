"""A TCP proxy that lets a request through and cuts the connection instead of its reply."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from bus.streams.script import Script

CHUNK = 1 << 20


class Proxy:
    """Stands before the server on `port`; `url` leads through it.

    lose(words, count): the replies to the next `count` requests that hold `words` never arrive; a
        reply that brings nothing (a read that ran out) is let through and does not count.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._words = b""
        self._left = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost = 0

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def lose(self, words: bytes, count: int) -> None:
        self._words, self._left = words, count

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        to_server: asyncio.StreamWriter | None = None
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
            await self._relay(client, to_client, server, to_server)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for writer in (to_client, to_server):
                if writer is not None:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()

    async def _relay(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        asked = b""  # judged when the answer comes: a blocked read was sent long before

        async def requests() -> None:
            nonlocal asked
            while chunk := await client.read(CHUNK):
                asked = chunk
                to_server.write(chunk)
                await to_server.drain()
            to_server.close()

        forward = asyncio.create_task(requests())
        try:
            while chunk := await server.read(CHUNK):
                wanted = bool(self._words) and self._words in asked
                if wanted and self._left and not chunk.endswith(b"*-1\r\n"):
                    self._left -= 1
                    self.lost += 1
                    return
                to_client.write(chunk)
                await to_client.drain()
        finally:
            forward.cancel()
            await asyncio.gather(forward, return_exceptions=True)


def digest(script: Script) -> bytes:
    """What a call of the script by its digest is known by on the wire."""
    return script._by_digest.encode()
