"""streaQ: a key for each task, and a stream of their ids; results off."""

from typing import Any

import anyio
import msgspec
from streaq import Worker

from bench.work import LANES, Fields, Work

QUEUE = "bench"
STREAM = f"streaq:{QUEUE}:queues:normal"


def _worker(url: str, handler: Any = None) -> tuple[Any, Any]:
    worker: Any = Worker(
        redis_url=url,
        concurrency=LANES,
        prefetch=LANES,
        queue_name=QUEUE,
        handle_signals=False,
        serializer=msgspec.json.Encoder().encode,
        deserializer=msgspec.json.Decoder().decode,
    )

    @worker.task(silent=True, ttl=0, timeout=None, max_tries=None)
    async def created(event: Fields) -> None:
        await handler(event)

    return worker, created


class Publisher:
    """A task that is enqueued, singly or many at once."""

    def __init__(self, worker: Any, task: Any) -> None:
        self._worker = worker
        self._task = task

    def event(self, fields: Fields) -> Fields:
        """Return the argument of the task."""
        return fields

    async def publish(self, event: Fields) -> Any:
        """Enqueue one."""
        return await self._task.enqueue(event)

    async def publish_many(self, events: list[Fields]) -> Any:
        """Enqueue many in one pipeline."""
        return await self._worker.enqueue_many([self._task.enqueue(event) for event in events])

    async def close(self) -> None:
        """Disconnect."""
        await self._worker.__aexit__(None, None, None)


async def publisher(url: str) -> Publisher:
    """Connect."""
    worker, task = _worker(url)
    await worker.__aenter__()
    return Publisher(worker, task)


async def work(url: str, work: Work) -> None:
    """Run a hundred tasks at a time."""
    worker, _ = _worker(url, work.handler)
    await work.gate()
    async with anyio.create_task_group() as group:
        await group.start(worker.run_async)
        await work.stopped.wait()
        group.cancel_scope.cancel()
