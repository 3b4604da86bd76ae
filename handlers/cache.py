"""Views that are costly to compute: kept until what they show has changed.

A *view* is the answer to a question about a *thing*, an app or a dataset: a search, a list of
titles. All views of one thing lie in one hash, so they go with one command. The handler here drops
them when an event says that the thing has changed.

How stale a reader may be: a view is served until the event of the change has been handled, usually
some milliseconds; when the group "cache" is behind or nobody serves it, for at most `LIFETIME`
after the thing's first view was kept, plus what it took to compute this one.

The race that must not be: a reader loads the old state, the change and its event come and the
views are dropped, and then the reader keeps what it has loaded, with nobody left to drop it. So
each thing has a *generation*. A reader looks at it before it loads; views are dropped together
with a change of the generation; a view is kept only in a step that finds the generation of before.
It is random rather than counted, and forgotten after an hour: no generation ever comes back.

Nor is a view kept of what is not there: after the last event of a deleted thing nothing of it is
left, whatever readers do.
"""

import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, NamedTuple

from bus import Bus, Delivery, Effects, Event, event_handler
from handlers.events import (
    AppCreated,
    AppDeleted,
    AppUpdated,
    DatasetCreated,
    DatasetDeleted,
    DocumentCreated,
    DocumentDeleted,
    DocumentIndexed,
    DocumentUpdated,
)
from handlers.state import app_key, dataset_key, new_revision

LIFETIME = timedelta(seconds=60)
# A reader that takes longer to load than this keeps nothing, if the thing changed just before.
GENERATION_KEPT = timedelta(hours=1)
MAX_VIEW_BYTES = 256 * 1024  # a larger one is computed each time: it would crowd out the state


class Thing(NamedTuple):
    """What views are about. key: of its hash; without one it is not there."""

    kind: str
    thing_id: str
    key: str

    @property
    def views_key(self) -> str:
        """The key of the hash of its views."""
        return f"kb:views:{self.kind}:{self.thing_id}"

    @property
    def generation_key(self) -> str:
        """The key of its generation."""
        return f"kb:generation:{self.kind}:{self.thing_id}"


def app(app_id: str) -> Thing:
    """Return an app as a thing to be viewed."""
    return Thing("app", app_id, app_key(app_id))


def dataset(dataset_id: str) -> Thing:
    """Return a dataset as a thing to be viewed."""
    return Thing("dataset", dataset_id, dataset_key(dataset_id))


class Cache:
    """Reads through: answers from a view that was kept, else computes it and keeps it.

    hits, misses: how often, in this process.
    """

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.hits = self.misses = 0

    async def read(self, thing: Thing, view: str, load: Callable[[], Awaitable[Any]]) -> Any:
        """Return the view of that name. `load` computes it, of what JSON can hold; None: nothing.

        One round trip if it was kept, two and those of `load` if not.
        """
        pipeline = self.bus.redis.pipeline(transaction=False)
        pipeline.hget(thing.views_key, view)
        pipeline.get(thing.generation_key)
        kept, generation = await pipeline.execute()
        if kept is not None:
            self.hits += 1
            return json.loads(kept)
        self.misses += 1
        loaded = await load()
        if loaded is not None:
            await self._keep(thing, view, json.dumps(loaded).encode(), generation)
        return loaded

    async def _keep(self, thing: Thing, view: str, text: bytes, generation: bytes | None) -> None:
        if len(text) > MAX_VIEW_BYTES:
            return
        async with self.bus.transaction() as change:
            seen = change.get(thing.generation_key)
            fresh = seen.missing() if generation is None else seen.equals(generation)
            fresh &= change.exists(thing.key).equals(1)
            first = change.exists(thing.views_key).equals(0)
            change.hset(thing.views_key, {view: text}, when=fresh)
            change.expire(thing.views_key, LIFETIME, when=fresh & first)


def drop_views(effects: Effects, thing: Thing) -> None:
    """Let no view of a thing be served, nor kept if it was loaded before now."""
    effects.delete(thing.views_key)
    effects.set(thing.generation_key, new_revision(), ttl=GENERATION_KEPT)


@event_handler(
    *(AppCreated, AppUpdated, AppDeleted),
    *(DatasetCreated, DatasetDeleted),
    *(DocumentCreated, DocumentUpdated, DocumentIndexed, DocumentDeleted),
    group="cache",
)
async def drop_stale_views(event: Event, delivery: Delivery[Event]) -> None:
    """Drop the views that show what an event has changed."""
    for thing in _shown(event):
        drop_views(delivery.effects, thing)


def _shown(event: Event) -> list[Thing]:
    match event:
        case AppCreated() | AppUpdated() | AppDeleted():
            return [app(event.app_id)]
        case DatasetCreated() | DatasetDeleted():  # the view of an app names its datasets
            return [dataset(event.dataset_id), *([app(event.app_id)] if event.app_id else [])]
        case DocumentCreated() | DocumentUpdated() | DocumentIndexed() | DocumentDeleted():
            return [dataset(event.dataset_id)]
    return []
