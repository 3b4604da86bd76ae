"""This project: a Worker with all its parts, and a bus."""

from typing import Any

from bench.work import Fields, Work
from bus import Bus, Event, Topic, Worker, event_handler

TOPIC = Topic("bench", keep=3_000_000, maxlen=6_000_000)


class DocumentCreated(Event, type="bench.document_created"):
    """What is published."""

    document_id: str
    dataset_id: str
    title: str
    tokens: int
    tags: list[str]


class Publisher:
    """A bus."""

    def __init__(self, bus: Bus) -> None:
        self.publish = bus.publish
        self.publish_many = bus.publish_many
        self.close = bus.close

    def event(self, fields: Fields) -> DocumentCreated:
        """Return an event."""
        return DocumentCreated(**fields)


async def publisher(url: str) -> Publisher:
    """Connect."""
    return Publisher(Bus.connect(url, topics=[TOPIC]))


async def work(url: str, work: Work, batch: int | None = None) -> None:
    """Serve one handler; with `batch`, one that takes so many at a time."""
    settings: dict[str, Any] = {"group": work.group, "concurrency": work.concurrency}
    if batch is not None:
        settings |= {"batch": batch}
    handler = event_handler(DocumentCreated, **settings)(work.handler)
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await work.gate()
        async with Worker(bus, handlers=[handler]):
            await work.stopped.wait()
