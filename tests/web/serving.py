"""Web applications on a port of their own, and clients that read Server-Sent Events."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import uvicorn

from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx


class Seen(NamedTuple):
    """One event as a browser would dispatch it."""

    event: str
    data: str
    id: str


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """Serve an application in this loop, in the way of `uvicorn app`; yield its URL."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="on")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listening]))  # leaves signals to the tests
    try:
        await eventually(lambda: server.started or serving.done())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def events(response: httpx.Response) -> AsyncIterator[Seen]:
    """Read a response as the HTML standard says, comments and `retry` left out."""
    last_id = event = ""
    data: list[str] = []
    async for line in response.aiter_lines():
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                yield Seen(event or "message", "\n".join(data), last_id)
            event, data = "", []
        elif name == "id":
            last_id = value
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)
