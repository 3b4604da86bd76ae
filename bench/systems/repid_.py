"""repid: an actor of a channel, which is a stream."""

import asyncio
from typing import Any

import msgspec
from repid import Repid, Router
from repid.connections.redis import RedisServer

from bench.work import LANES, Fields, Work

CHANNEL = "bench"
encode = msgspec.json.Encoder().encode


def _app(url: str) -> Repid:
    app = Repid(title="bench", version="1")
    server = RedisServer(url, batch_size=LANES, block_ms=200)
    app.servers.register_server("default", server, is_default=True)
    return app


class Publisher:
    """An app with an open connection."""

    def __init__(self, app: Repid, connection: Any) -> None:
        self._app = app
        self._connection = connection

    def event(self, fields: Fields) -> Fields:
        """Return the arguments of the actor."""
        return fields

    async def publish(self, event: Fields) -> Any:
        """Append one message."""
        return await self._app.send_message(
            channel=CHANNEL,
            payload=encode(event),
            headers={"topic": "created"},
            content_type="application/json",
        )

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.__aexit__(None, None, None)


async def publisher(url: str) -> Publisher:
    """Connect."""
    app = _app(url)
    connection = app.servers.default.connection()
    await connection.__aenter__()
    return Publisher(app, connection)


async def work(url: str, work: Work) -> None:
    """Run a hundred messages at a time."""
    app = _app(url)
    router = Router()
    handle = work.handler

    @router.actor(name="created", channel=CHANNEL)
    async def created(
        document_id: str, dataset_id: str, title: str, tokens: int, tags: list[str]
    ) -> None:
        await handle(
            {
                "document_id": document_id,
                "dataset_id": dataset_id,
                "title": title,
                "tokens": tokens,
                "tags": tags,
            }
        )

    app.include_router(router)
    await work.gate()
    async with app.servers.default.connection():
        running = asyncio.ensure_future(app.run_worker(tasks_limit=LANES))
        await work.stopped.wait()
        running.cancel()
