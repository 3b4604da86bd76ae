"""Crashes and races of the indexing handlers, at every round trip to Redis that they make."""

from __future__ import annotations

from typing import Any

import pytest

from handlers import state
from handlers.events import DocumentCreated, DocumentDeleted
from handlers.services import DocumentService
from handlers.state import Status
from tests.handlers.application import (
    DATASET,
    Interrupted,
    KeepingBus,
    handle,
    index_of,
    recorded_words,
    status_of,
)


@pytest.fixture
def documents(bus: Any) -> DocumentService:
    return DocumentService(bus)


def created() -> DocumentCreated:
    return DocumentCreated(document_id="d", dataset_id=DATASET, title="t")


class Crash(Exception):
    pass


OLD, NEW = b"one two three", b"three four"
LATER = {
    "updated": {"three", "four"},
    "deleted": None,
    "written anew": {"three", "four"},
}


async def _go_on(documents: DocumentService, later: str) -> list[Any]:
    """Change the document; return the events that tell of it."""
    bus: Any = documents.bus
    before = len(bus.published)
    if later == "updated":
        await documents.update("d", text=NEW)
    else:
        await documents.delete("d")
    if later == "written anew":
        await documents.create("d", DATASET, "t", NEW)
    return bus.published[before:]  # type: ignore[no-any-return]


async def _assert_index_is(redis: Any, words: set[str] | None) -> None:
    assert await index_of(redis) == ({} if words is None else {"d": words})
    assert await recorded_words(redis, "d") == (words or set())
    documents = await redis.smembers(state.dataset_documents_key(DATASET))
    assert documents == (set() if words is None else {b"d"})
    if words is None:
        assert await redis.dbsize() == 0
    else:
        assert await status_of(redis) == (Status.INDEXED, "")


@pytest.mark.parametrize("later", LATER)
async def test_a_crash_anywhere_is_healed_by_the_redelivery(
    documents: DocumentService, bus: Any, redis: Any, later: str
) -> None:
    crashed = True
    at = 0
    while crashed:
        at += 1
        await redis.flushdb()
        await documents.create("d", DATASET, "t", OLD)
        await handle(created(), bus)
        happened = await _go_on(documents, later)

        async def before(trip: int, at: int = at) -> None:
            if trip == at:
                raise Crash

        crashed = False
        for event in happened:
            try:
                await handle(event, KeepingBus(Interrupted(redis, before)))
            except Crash:
                crashed = True
        for event in happened:
            await handle(event, bus)
        await _assert_index_is(redis, LATER[later])
    assert at > 5  # the loop has met every round trip


@pytest.mark.parametrize("ends", ["finishes", "crashes"])
@pytest.mark.parametrize("later", LATER)
async def test_a_slow_worker_cannot_bring_an_old_text_back(
    documents: DocumentService, bus: Any, redis: Any, later: str, ends: str
) -> None:
    """One worker stops at each round trip in turn; all the rest happens; then it goes on."""
    stopped = True
    at = 0
    while stopped:
        at += 1
        await redis.flushdb()
        await documents.create("d", DATASET, "t", OLD)
        stopped = False

        async def before(trip: int, at: int = at) -> None:
            nonlocal stopped
            if trip == at:
                stopped = True
                for event in await _go_on(documents, later):
                    await handle(event, bus)
            elif stopped and ends == "crashes" and trip == at + 2:
                raise Crash

        slow = Interrupted(redis, before)
        try:
            await handle(created(), KeepingBus(slow))
        except Crash:
            await handle(created(), bus)  # another worker takes it over
        if stopped:
            await _assert_index_is(redis, LATER[later])
    assert at > 5


@pytest.mark.parametrize("ends", ["finishes", "crashes"])
@pytest.mark.parametrize("gone", ["marked", "forgotten"])
async def test_a_slow_removal_cannot_take_a_document_written_anew(
    documents: DocumentService, bus: Any, redis: Any, gone: str, ends: str
) -> None:
    """The same with the handler of the deletion, also when it runs for a second time."""
    removal = DocumentDeleted(document_id="d", dataset_id=DATASET)
    stopped = True
    at = 0
    while stopped:
        at += 1
        await redis.flushdb()
        await documents.create("d", DATASET, "t", OLD)
        await handle(created(), bus)
        await documents.delete("d")
        if gone == "forgotten":
            await handle(removal, bus)
        stopped = False

        async def before(trip: int, at: int = at) -> None:
            nonlocal stopped
            if trip == at:
                stopped = True
                await documents.create("d", DATASET, "t", NEW)
                await handle(created(), bus)
            elif stopped and ends == "crashes" and trip == at + 2:
                raise Crash

        try:
            await handle(removal, KeepingBus(Interrupted(redis, before)))
        except Crash:
            await handle(removal, bus)
        if stopped:
            await _assert_index_is(redis, {"three", "four"})
    assert at > 3


async def test_a_document_that_never_holds_still_is_left_to_the_retry(
    documents: DocumentService, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"text")

    async def before(trip: int) -> None:
        await documents.update("d", text=b"text %d" % trip)

    with pytest.raises(RuntimeError, match="changed 20 times"):
        await handle(created(), KeepingBus(Interrupted(redis, before)))
