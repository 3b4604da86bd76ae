"""taskiq with the stream broker of taskiq-redis and the receiver that its workers use."""

import asyncio
from typing import Any

from taskiq.acks import AcknowledgeType
from taskiq.formatters.json_formatter import JSONFormatter
from taskiq.receiver import Receiver
from taskiq_redis import RedisStreamBroker

from bench.work import LANES, Fields, Work

STREAM = "taskiq"
GROUP = "bench"


def _broker(url: str, handler: Any = None) -> tuple[Any, Any]:
    broker = RedisStreamBroker(
        url,
        queue_name=STREAM,
        consumer_group_name=GROUP,
        consumer_id="0",
        xread_count=100,
        xread_block=200,
        max_connection_pool_size=2 * LANES,
    ).with_formatter(JSONFormatter())

    @broker.task(task_name="created")
    async def created(event: Fields) -> None:
        await handler(event)

    return broker, created


class Publisher:
    """A task that is kicked."""

    def __init__(self, broker: Any, task: Any) -> None:
        self.publish = task.kiq
        self.close = broker.shutdown

    def event(self, fields: Fields) -> Fields:
        """Return an argument of the task."""
        return fields


async def publisher(url: str) -> Publisher:
    """Connect."""
    broker, task = _broker(url)
    await broker.startup()
    return Publisher(broker, task)


async def work(url: str, work: Work) -> None:
    """Run a hundred tasks at a time, acked when they have been executed."""
    broker, _ = _broker(url, work.handler)
    broker.is_worker_process = True
    await broker.startup()
    receiver = Receiver(
        broker,
        validate_params=False,
        max_async_tasks=LANES,
        max_prefetch=LANES,
        ack_type=AcknowledgeType.WHEN_EXECUTED,
    )
    await work.gate()
    finish = asyncio.Event()
    listening = asyncio.ensure_future(receiver.listen(finish))
    await work.stopped.wait()
    finish.set()
    listening.cancel()
