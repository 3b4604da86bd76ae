"""Servers of our own on the wire: small fakes, and a proxy that can lose replies."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import TracebackType


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Serve each connection with `serve`; yield the URL. No connection outlives the block."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Proxy:
    """Passes everything on, until told otherwise.

    target: the port to which connections made from now on lead.
    lose_replies: how many replies, from now on, end their connection instead of arriving.
    lost: how many have been lost so far. requests: what clients have sent so far.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self._listening = listening(self._serve)
        self._lost_one = asyncio.Event()
        self.url = ""
        self.lose_replies = 0
        self.lost = 0
        self.requests = bytearray()

    async def lose_one(self) -> None:
        """Wait until one reply has been lost."""
        self._lost_one.clear()
        self.lose_replies = 1
        await self._lost_one.wait()

    async def __aenter__(self) -> Self:
        self.url = await self._listening.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._listening.__aexit__(kind, error, traceback)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._requests(client, to_server))
                both.create_task(self._replies(server, to_client))
        except* (EOFError, OSError):
            pass
        finally:
            to_server.close()
            with suppress(OSError):
                await to_server.wait_closed()

    async def _requests(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(65_536):
            self.requests += data
            server.write(data)
            await server.drain()
        raise EOFError

    async def _replies(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await server.read(65_536):
            if self.lose_replies:
                self.lose_replies -= 1
                self.lost += 1
                self._lost_one.set()
                break
            client.write(data)
            await client.drain()
        raise EOFError
