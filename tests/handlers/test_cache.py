"""Views that are kept: how long, and that none outlives what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from handlers import cache, indexing
from handlers.events import (
    AppCreated,
    AppDeleted,
    AppUpdated,
    DatasetCreated,
    DatasetDeleted,
    DatasetDocumentAdded,
    DocumentCreated,
    DocumentDeleted,
    DocumentIndexed,
    DocumentIndexFailed,
    DocumentUpdated,
)
from handlers.services import App, AppService, DatasetService, DocumentService, Title
from tests.handlers.application import (
    APP,
    DATASET,
    Interrupted,
    forget_events,
    handle,
    handle_all,
    kept,
    prepare,
    start_over,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bus import Bus, Event

THING = cache.dataset(DATASET)


class Source:
    """What a view shows: a number, and how often it was looked at."""

    def __init__(self) -> None:
        self.number = 1
        self.loads = 0

    async def load(self) -> int:
        self.loads += 1
        return self.number


async def drop(bus: Bus, thing: cache.Thing = THING) -> None:
    async with bus.transaction() as change:
        cache.drop_views(change, thing)


async def test_a_view_is_computed_once_until_it_is_dropped(bus: Bus) -> None:
    await prepare(bus)
    source, here, elsewhere = Source(), cache.Cache(bus), cache.Cache(bus)
    for reader in (here, here, elsewhere):
        assert await reader.read(THING, "v", source.load) == 1
    assert (source.loads, here.hits, here.misses, elsewhere.hits) == (1, 1, 1, 1)
    source.number = 2
    assert await here.read(THING, "v", source.load) == 1
    await drop(bus)
    assert await here.read(THING, "v", source.load) == 2
    assert await here.read(THING, "v", source.load) == 2
    assert source.loads == 2


async def test_views_of_one_thing_go_together_and_those_of_others_stay(bus: Bus) -> None:
    await prepare(bus, DATASET, "other")
    source, reader = Source(), cache.Cache(bus)
    places = [(THING, "v"), (THING, "w"), (cache.dataset("other"), "v"), (cache.app(APP), "v")]
    for thing, view in places:
        await reader.read(thing, view, source.load)
    source.number = 2
    await drop(bus)
    assert [await reader.read(t, v, source.load) for t, v in places] == [2, 2, 1, 1]


async def test_views_expire_also_when_new_ones_come_to_them(bus: Bus, redis: Any) -> None:
    await prepare(bus)
    source, reader = Source(), cache.Cache(bus)
    limit_ms = cache.LIFETIME.total_seconds() * 1000
    await reader.read(THING, "v", source.load)
    assert 0 < await redis.pttl(THING.views_key) <= limit_ms
    await redis.pexpire(THING.views_key, 5_000)
    await reader.read(THING, "w", source.load)
    assert 0 < await redis.pttl(THING.views_key) <= 5_000
    await redis.delete(THING.views_key)  # as if it had expired
    source.number = 2
    assert await reader.read(THING, "v", source.load) == 2


async def test_a_generation_is_forgotten_in_the_end(bus: Bus, redis: Any) -> None:
    await drop(bus)
    left_ms = await redis.pttl(THING.generation_key)
    assert 0 < left_ms <= cache.GENERATION_KEPT.total_seconds() * 1000
    assert cache.GENERATION_KEPT > cache.LIFETIME


async def test_of_what_is_not_there_no_view_is_kept(bus: Bus, redis: Any) -> None:
    source = Source()
    assert await cache.Cache(bus).read(THING, "v", source.load) == 1
    assert await kept(redis) == set()


async def test_nothing_is_no_view(bus: Bus, redis: Any) -> None:
    await prepare(bus)
    before = await kept(redis)

    async def load() -> None:
        return None

    assert await cache.Cache(bus).read(THING, "v", load) is None
    assert await kept(redis) == before


async def test_a_view_that_is_too_large_is_computed_each_time(bus: Bus, redis: Any) -> None:
    await prepare(bus)
    before = await kept(redis)

    async def load() -> str:
        return "x" * cache.MAX_VIEW_BYTES

    assert await cache.Cache(bus).read(THING, "v", load) == "x" * cache.MAX_VIEW_BYTES
    assert await kept(redis) == before


# --- the race


@pytest.mark.parametrize("dropped_before", [False, True], ids=["never dropped", "dropped before"])
async def test_what_was_loaded_before_a_change_is_not_kept_after_it(
    bus: Bus, dropped_before: bool
) -> None:
    """The change and its event happen at each round trip of a reader in turn."""
    happened = True
    at = 0
    while happened:
        at += 1
        await start_over(bus)
        if dropped_before:
            await drop(bus)
        source = Source()
        happened = False

        async def before(trip: int, at: int = at, source: Source = source) -> None:
            nonlocal happened
            if trip == at:
                happened = True
                source.number = 2
                await drop(bus)

        slow = Interrupted(bus, before)

        async def load(source: Source = source, slow: Interrupted = slow) -> int:
            seen = await source.load()
            await slow.trip()  # a load takes time, too
            return seen

        await cache.Cache(slow).read(THING, "v", load)  # type: ignore[arg-type]
        if happened:
            assert await cache.Cache(bus).read(THING, "v", source.load) == 2, at
    assert at == 4  # look, load, keep


async def test_a_search_that_began_before_a_change_leaves_no_old_hits(
    documents: DocumentService, bus: Bus
) -> None:
    """The same with the services and handlers of the application, at every round trip."""
    happened = True
    at = 0
    while happened:
        at += 1
        await start_over(bus)
        await documents.create("d", DATASET, "Old", b"word")
        await handle_all(bus)
        happened = False

        async def before(trip: int, at: int = at) -> None:
            nonlocal happened
            if trip == at:
                happened = True
                await documents.update("d", title="New")
                await handle_all(bus)

        slow = DatasetService(Interrupted(bus, before))  # type: ignore[arg-type]
        await slow.search(DATASET, "word")
        titles = [hit.title for hit in await DatasetService(bus).search(DATASET, "word")]
        assert titles == (["New"] if happened else ["Old"])
    assert at > 4


# --- the views of the application


async def changes(bus: Bus) -> dict[str, Callable[[], Awaitable[Any]]]:
    apps, datasets, documents = AppService(bus), DatasetService(bus), DocumentService(bus)
    return {
        "app renamed": lambda: apps.update(APP, "Renamed"),
        "app created again": lambda: apps.create(APP, "Renamed"),
        "app deleted": lambda: apps.delete(APP),
        "dataset created": lambda: datasets.create("new", APP, "New"),
        "dataset renamed": lambda: datasets.create(DATASET, APP, "Renamed"),
        "dataset deleted": lambda: datasets.delete(DATASET),
        "document created": lambda: documents.create("new", DATASET, "New", b"word"),
        "document renamed": lambda: documents.update("d", title="Renamed"),
        "document rewritten": lambda: documents.update("d", text=b"other"),
        "document deleted": lambda: documents.delete("d"),
    }


async def shown(bus: Bus) -> tuple[object, ...]:
    """Everything that is kept as a view."""
    datasets = DatasetService(bus)
    return (
        await AppService(bus).get(APP),
        await datasets.documents(DATASET),
        await datasets.search(DATASET, "word"),
    )


async def without_cache(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    async def read(self: Any, thing: Any, view: str, load: Any) -> Any:
        return await load()

    with monkeypatch.context() as patched:
        patched.setattr(cache.Cache, "read", read)
        return await shown(bus)


@pytest.mark.parametrize(
    "change",
    [
        *("app renamed", "app created again", "app deleted"),
        *("dataset created", "dataset renamed", "dataset deleted"),
        *("document created", "document renamed", "document rewritten", "document deleted"),
    ],
)
async def test_every_change_is_seen_once_its_event_has_been_handled(
    documents: DocumentService, bus: Bus, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    await documents.create("d", DATASET, "Title", b"word")
    await documents.create("e", DATASET, "Another", b"word")
    await handle_all(bus)
    await forget_events(bus)
    before = await shown(bus)
    assert before == await without_cache(bus, monkeypatch)
    await (await changes(bus))[change]()
    assert await shown(bus) == before  # stale, until the event has been handled
    await handle_all(bus)
    assert await shown(bus) == await without_cache(bus, monkeypatch) != before


async def test_the_views_are_the_same_from_the_cache(documents: DocumentService, bus: Bus) -> None:
    await documents.create("d", DATASET, "Title", b"word")
    await handle_all(bus)
    for _ in range(2):
        hit = indexing.Hit("d", "Title", pytest.approx(0.693, abs=0.001))
        expected = App(APP, "An app", (Title(DATASET, "A dataset"),)), [Title("d", "Title")], [hit]
        assert await shown(bus) == expected


async def test_searches_for_the_same_words_are_one_view(bus: Bus, redis: Any) -> None:
    await prepare(bus)
    datasets = DatasetService(bus)
    for words in ("Event loop", "loop, EVENT!", "loop event loop"):
        await datasets.search(DATASET, words)
    assert (datasets.cache.hits, datasets.cache.misses) == (2, 1)
    await datasets.search(DATASET, "event loop", limit=1)
    assert await redis.hlen(THING.views_key) == 2
    with pytest.raises(ValueError, match="at least 1 hit"):
        await datasets.search(DATASET, "event", limit=0)


@pytest.mark.parametrize(
    ("event", "things"),
    [
        (AppCreated(app_id="a", name="n"), ["app:a"]),
        (AppUpdated(app_id="a", name="n"), ["app:a"]),
        (AppDeleted(app_id="a"), ["app:a"]),
        (DatasetCreated(dataset_id="s", app_id="a", name="n"), ["app:a", "dataset:s"]),
        (DatasetDeleted(dataset_id="s", app_id="a"), ["app:a", "dataset:s"]),
        (DatasetDeleted(dataset_id="s"), ["dataset:s"]),  # as older entries have it
        (DocumentCreated(document_id="d", dataset_id="s", title="t"), ["dataset:s"]),
        (DocumentUpdated(document_id="d", dataset_id="s", title="t"), ["dataset:s"]),
        (DocumentIndexed(document_id="d", dataset_id="s", words=1), ["dataset:s"]),
        (DocumentDeleted(document_id="d", dataset_id="s"), ["dataset:s"]),
        (DocumentIndexFailed(document_id="d", dataset_id="s", error="e"), []),  # no view shows it
        (DatasetDocumentAdded(document_id="d", dataset_id="s"), []),  # told by document.created
    ],
    ids=lambda value: repr(value) if not isinstance(value, list) else "",
)
async def test_each_event_drops_the_views_that_show_what_it_tells(
    bus: Bus, redis: Any, event: Event, things: list[str]
) -> None:
    await handle(event, bus, [cache.drop_stale_views])
    dropped = [key.decode() async for key in redis.scan_iter(match="kb:generation:*")]
    assert sorted(dropped) == [f"kb:generation:{thing}" for thing in things]
