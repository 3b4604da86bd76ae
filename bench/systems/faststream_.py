"""FastStream on a stream: a handler of single messages, or one that its user wrote for lists."""

from contextlib import suppress
from typing import Any

from fast_depends.msgspec import MsgSpecSerializer
from faststream.redis import RedisBroker, StreamSub
from redis.exceptions import ResponseError

from bench.work import LANES, Fields, Work

STREAM = "faststream"
GROUP = "bench"


def _broker(url: str) -> RedisBroker:
    return RedisBroker(
        url,
        logger=None,
        apply_types=False,
        max_connections=2 * LANES,
        serializer=MsgSpecSerializer(use_fastdepends_errors=False),
    )


class Publisher:
    """A broker; several messages go through the pipeline that it takes."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self.close = broker.stop

    def event(self, fields: Fields) -> Fields:
        """Return a message."""
        return fields

    async def publish(self, event: Fields) -> Any:
        """Append one."""
        return await self._broker.publish(event, stream=STREAM)

    async def publish_many(self, events: list[Fields]) -> Any:
        """Append several in one pipeline."""
        pipeline = self._broker._connection.pipeline(transaction=False)  # noqa: SLF001 - no other
        for event in events:
            await self._broker.publish(event, stream=STREAM, pipeline=pipeline)
        return await pipeline.execute()


async def publisher(url: str) -> Publisher:
    """Connect."""
    broker = _broker(url)
    await broker.connect()
    with suppress(ResponseError):  # its own would begin at the end of the stream
        await broker._connection.xgroup_create(  # noqa: SLF001 - no other
            STREAM, GROUP, id="0", mkstream=True
        )
    return Publisher(broker)


async def work(url: str, work: Work) -> None:
    """Handle one message per call; as many calls at once as the handler may have."""
    broker = _broker(url)
    handle = work.handler

    @broker.subscriber(stream=_stream(work), max_workers=work.concurrency)
    async def take(message: Any) -> None:
        await handle(message)

    await _serve(broker, work)


async def work_in_batches(url: str, work: Work) -> None:
    """Handle a list per call, and its members in a loop, as a user has to write it."""
    broker = _broker(url)
    handle = work.handler

    @broker.subscriber(stream=_stream(work, batch=True))
    async def take(messages: list[Any]) -> None:
        for message in messages:
            await handle(message)

    await _serve(broker, work)


def _stream(work: Work, **more: Any) -> StreamSub:
    return StreamSub(
        STREAM,
        group=GROUP,
        consumer=f"c{work.row}",
        max_records=100,
        polling_interval=200,
        **more,
    )


async def _serve(broker: RedisBroker, work: Work) -> None:
    await work.gate()
    await broker.start()
    await work.stopped.wait()
    await broker.stop()
