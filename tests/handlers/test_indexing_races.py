"""Crashes and races of the indexing handlers, at every round trip to Redis that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from handlers import indexing, state
from handlers.events import DocumentCreated, DocumentDeleted
from handlers.state import Status
from tests.handlers.application import (
    DATASET,
    Crash,
    Interrupted,
    envelopes,
    index_of,
    recorded_words,
    start_over,
    status_of,
)
from tests.handlers.application import handle as handle_with

if TYPE_CHECKING:
    from handlers.services import DocumentService


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three words take two steps."""
    monkeypatch.setattr(indexing, "WORDS_PER_STEP", 2)


def created() -> DocumentCreated:
    return DocumentCreated(document_id="d", dataset_id=DATASET, title="t")


async def handle(event: Any, bus: Any) -> None:
    """Run the handler under test alone, so that every round trip is one of its own."""
    await handle_with(event, bus, (indexing.index_document, indexing.unindex_document))


OLD, NEW = b"one two three", b"three four"
LATER = {
    "updated": {"three", "four"},
    "deleted": None,
    "written anew": {"three", "four"},
}


async def _go_on(documents: DocumentService, later: str) -> list[Any]:
    """Change the document; return the events that tell of it."""
    before = len(await envelopes(documents.bus))
    if later == "updated":
        await documents.update("d", text=NEW)
    else:
        await documents.delete("d")
    if later == "written anew":
        await documents.create("d", DATASET, "t", NEW)
    return [envelope.event for envelope in (await envelopes(documents.bus))[before:]]


async def _assert_index_is(redis: Any, words: set[str] | None) -> None:
    assert await index_of(redis) == ({} if words is None else {"d": words})
    assert await recorded_words(redis, "d") == (words or set())
    documents = await redis.smembers(state.dataset_documents_key(DATASET))
    assert documents == (set() if words is None else {b"d"})
    if words is None:
        assert not await redis.exists(state.document_key("d"), state.document_words_key("d"))
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
        await start_over(bus)
        await documents.create("d", DATASET, "t", OLD)
        await handle(created(), bus)
        happened = await _go_on(documents, later)

        async def before(trip: int, at: int = at) -> None:
            if trip == at:
                raise Crash

        crashed = False
        for event in happened:
            try:
                await handle(event, Interrupted(bus, before))
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
        await start_over(bus)
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

        slow = Interrupted(bus, before)
        try:
            await handle(created(), slow)
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
        await start_over(bus)
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
            await handle(removal, Interrupted(bus, before))
        except Crash:
            await handle(removal, bus)
        if stopped:
            await _assert_index_is(redis, {"three", "four"})
    assert at > (1 if gone == "forgotten" else 3)


async def test_a_change_after_the_last_look_is_left_to_its_own_event(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    """The effects come last: what was indexed by then is not the document any more."""
    trips = 0

    async def count(_trip: int) -> None:
        nonlocal trips
        trips += 1

    await documents.create("d", DATASET, "t", OLD)
    await handle(created(), Interrupted(bus, count))
    await start_over(bus)
    await documents.create("d", DATASET, "t", OLD)

    async def before(trip: int) -> None:
        if trip == trips:
            await documents.update("d", text=NEW)

    await handle(created(), Interrupted(bus, before))
    assert await status_of(redis) == (Status.NEW, "")
    told = [envelope.type for envelope in await envelopes(bus)]
    assert told == ["document.created", "dataset.document_added", "document.updated"]
