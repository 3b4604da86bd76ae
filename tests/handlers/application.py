"""What the tests of the application share: a bus that keeps its events, and a look inside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bus import Receipt
from handlers import indexing, state

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from bus import Event

DATASET = "ds"


class KeepingBus:
    """Stands for a Bus: real state in Redis, events in a list."""

    def __init__(self, redis: Any) -> None:
        self.redis = redis
        self.published: list[Event] = []

    async def publish(self, event: Event) -> Receipt:
        self.published.append(event)
        number = len(self.published)
        return Receipt(event_id=f"e{number}", stream="s", entry_id=f"{number}-0")

    async def publish_many(self, events: Iterable[Event]) -> list[Receipt]:
        return [await self.publish(event) for event in events]

    def types(self) -> list[str]:
        """The names of the classes of what was published."""
        return [type(event).__name__ for event in self.published]


class Interrupted:
    """A client that calls `before(n)` ahead of its n-th round trip, which may wait or raise."""

    def __init__(self, redis: Any, before: Callable[[int], Awaitable[None]]) -> None:
        self._redis = redis
        self._before = before
        self.trips = 0

    async def _trip(self) -> None:
        self.trips += 1
        await self._before(self.trips)

    def pipeline(self, **options: Any) -> Any:
        pipeline = self._redis.pipeline(**options)
        execute = pipeline.execute

        async def execute_later() -> Any:
            await self._trip()
            return await execute()

        pipeline.execute = execute_later
        return pipeline

    def __getattr__(self, command: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._trip()
            return await getattr(self._redis, command)(*args, **kwargs)

        return call


async def handle(event: Any, bus: Any) -> None:
    """Run the handler that asked for the event, as a worker would."""
    delivery: Any = SimpleNamespace(bus=bus)
    for handler in (indexing.index_document, indexing.unindex_document):
        if handler.wants(type(event).__event_info__.type):
            await handler(event, delivery)


async def index_of(redis: Any, dataset_id: str = DATASET) -> dict[str, set[str]]:
    """The whole index of a dataset: the words under which each document can be found."""
    found: dict[str, set[str]] = {}
    prefix = state.postings_key(dataset_id, "")
    async for key in redis.scan_iter(match=prefix + "*", count=10_000):
        for document_id in await redis.zrange(key, 0, -1):
            found.setdefault(document_id.decode(), set()).add(key.decode().removeprefix(prefix))
    return found


async def recorded_words(redis: Any, document_id: str) -> set[str]:
    """The words under which postings of a document may lie, as its own set says."""
    words = await redis.smembers(state.document_words_key(document_id))
    return {word.decode() for word in words}


async def status_of(redis: Any, document_id: str = "d") -> tuple[str, str]:
    """The status of a document and the error that is told with it."""
    document = await state.read_document(redis, document_id)
    assert document is not None
    return document.status, document.error
