"""What the tests of the application share: a bus that can be interrupted, and a look inside."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bus import Backoff, Breaker, Bus, Worker
from handlers import cache, cleanup, indexing, quota, state
from handlers.events import DOCUMENTS
from handlers.services import AppService, DatasetService

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from types import TracebackType

    from bus import Envelope, Event, Handler, Transaction

APP = "app"
DATASET = "ds"
DRAINED_S = 20.0
TOPICS = ("app", "dataset", "document", "message")
HANDLERS: tuple[Handler[...], ...] = (
    indexing.index_document,
    indexing.unindex_document,
    quota.charge_message,
    cache.drop_stale_views,
    cleanup.clean_up,
)


class Crash(Exception):
    """Stands for the end of a worker."""


class Interrupted:
    """A bus that calls `before(n)` ahead of its n-th round trip, which may wait or raise.

    Round trips are the commands of `redis`, its pipelines, and the ends of transactions.
    """

    def __init__(self, bus: Any, before: Callable[[int], Awaitable[None]]) -> None:
        self._bus = bus
        self._before = before
        self.redis = _Client(bus.redis, self.trip)
        self.trips = 0

    async def trip(self) -> None:
        self.trips += 1
        await self._before(self.trips)

    def transaction(self) -> Any:
        return _Block(self._bus.transaction(), self.trip)


class _Block:
    def __init__(self, inner: Transaction, trip: Callable[[], Awaitable[None]]) -> None:
        self._inner = inner
        self._trip = trip

    async def __aenter__(self) -> Transaction:
        return await self._inner.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and self._inner:
            await self._trip()
        await self._inner.__aexit__(kind, error, trace)


class _Client:
    def __init__(self, redis: Any, trip: Callable[[], Awaitable[None]]) -> None:
        self._redis = redis
        self._trip = trip

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


async def handle(event: Any, bus: Any, handlers: Iterable[Handler[...]] = HANDLERS) -> None:
    """Run the handlers that asked for the event, as a worker would; their effects take place."""
    for handler in handlers:
        if handler.wants(type(event).__event_info__.type):
            async with bus.transaction() as effects:
                delivery: Any = SimpleNamespace(bus=bus, effects=effects)
                await handler(event, delivery)


async def handle_all(bus: Any) -> None:
    """Handle what was published, and what that leads to, in order, until nothing new comes."""
    done: set[str] = set()
    while new := [e for e in await envelopes(bus) if e.event_id not in done]:
        for envelope in new:
            await handle(envelope.event, bus)
            done.add(envelope.event_id)


async def prepare(bus: Any, *datasets: str) -> None:
    """Make an app with datasets, and forget the events that tell of them."""
    await AppService(bus).create(APP, "An app")
    for dataset_id in datasets or (DATASET,):
        await DatasetService(bus).create(dataset_id, APP, "A dataset")
    await forget_events(bus)


async def start_over(bus: Any, *datasets: str) -> None:
    """Prepare an empty database."""
    await bus.redis.flushdb()
    await prepare(bus, *datasets)


async def forget_events(bus: Any) -> None:
    """Start with empty streams."""
    keys = [key async for key in bus.redis.scan_iter(match="bus:{*", count=10_000)]
    if keys:
        await bus.redis.delete(*keys)


async def envelopes(bus: Any, *types: type[Event]) -> list[Envelope]:
    """What was published, in order."""
    found: list[Envelope] = []
    for topic in TOPICS:
        found += [e async for e in bus.history(topic, types=types or None)]
    return sorted(found, key=lambda e: tuple(map(int, e.entry_id.split("-"))))


async def published(bus: Any, *types: type[Event]) -> list[Event]:
    """The events that were published, in order."""
    return [envelope.event for envelope in await envelopes(bus, *types)]


async def types_of(bus: Any) -> list[str]:
    """The types of what was published, in order."""
    return [envelope.type for envelope in await envelopes(bus)]


async def kept(redis: Any) -> set[str]:
    """The application's keys, without what only says that views went."""
    keys = {key.decode() async for key in redis.scan_iter(match="kb:*", count=10_000)}
    return {key for key in keys if not key.startswith("kb:generation:")}


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


def quickly(handler: Handler[...]) -> Handler[...]:
    """The handler with short waits."""
    return replace(handler, backoff=Backoff(base_s=0.01, factor=1.0), breaker=Breaker(window_s=0.2))


async def work(bus: Bus, *handlers: Handler[...]) -> None:
    """Run handlers of the application, by default all, until nothing is left to do."""
    async with Worker(bus, handlers=map(quickly, handlers or HANDLERS)) as worker:
        await worker.drained(DRAINED_S)


def connect(url: str) -> Bus:
    """A bus as the application's programs have it."""
    return Bus.connect(url, topics=[DOCUMENTS])
