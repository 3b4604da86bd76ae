from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from bus import Reject, Undecodable
from handlers import indexing, state
from handlers.events import (
    DocumentCreated,
    DocumentDeleted,
    DocumentIndexed,
    DocumentIndexFailed,
    DocumentUpdated,
)
from handlers.indexing import TextMissing, count_words, search
from handlers.services import DocumentService
from handlers.state import Status
from tests.handlers.application import (
    DATASET,
    Interrupted,
    handle,
    index_of,
    kept,
    published,
    status_of,
    types_of,
)

if TYPE_CHECKING:
    from bus import Event


def created(document_id: str = "d") -> DocumentCreated:
    return DocumentCreated(document_id=document_id, dataset_id=DATASET, title="t")


def updated() -> DocumentUpdated:
    return DocumentUpdated(document_id="d", dataset_id=DATASET, title="t")


def deleted() -> DocumentDeleted:
    return DocumentDeleted(document_id="d", dataset_id=DATASET)


# --- words


def test_words_are_letters_and_digits_in_lower_case() -> None:
    counts = count_words("Read_text(x) reads UTF8 Straße, naïve_text; 42 4x")
    assert counts == {
        "read": 1,
        "text": 2,
        "reads": 1,
        "utf8": 1,
        "straße": 1,
        "naïve": 1,
        "4x": 1,
    }


def test_what_nobody_types_is_no_word() -> None:
    assert count_words("a 2026 " + "f" * 41) == {}


def test_a_text_of_too_many_words_keeps_the_most_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "MAX_WORDS", 2)
    assert count_words("aa bb bb cc cc cc") == {"cc": 3, "bb": 2}


# --- the life of a document


async def test_a_created_document_is_found_by_its_words(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one two two")
    await handle(created(), bus)
    assert await index_of(redis) == {"d": {"one", "two"}}
    assert await status_of(redis) == (Status.INDEXED, "")
    indexed = DocumentIndexed(document_id="d", dataset_id=DATASET, words=2)
    assert (await published(bus))[2:] == [indexed]


async def test_an_updated_document_is_not_found_by_its_old_words(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one two")
    await handle(created(), bus)
    await documents.update("d", text=b"two three")
    await handle(updated(), bus)
    assert await index_of(redis) == {"d": {"two", "three"}}


async def test_a_revision_is_told_to_be_indexed_once_however_many_events_there_are(
    documents: DocumentService, bus: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one")
    await documents.update("d", text=b"two")
    for event in (created(), updated(), created()):
        await handle(event, bus)
    assert (await types_of(bus)).count("document.indexed") == 1


async def test_an_index_that_was_lost_is_made_again_by_handling_the_events_again(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one two")
    await handle(created(), bus)
    await redis.delete(state.postings_key(DATASET, "one"))
    await handle(created(), bus)
    assert await index_of(redis) == {"d": {"one", "two"}}
    assert await status_of(redis) == (Status.INDEXED, "")


async def test_a_text_of_many_words_is_written_and_removed_in_several_steps(
    documents: DocumentService, bus: Any, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "WORDS_PER_STEP", 3)
    words = {f"word{n}" for n in range(10)}
    await documents.create("d", DATASET, "t", " ".join(words).encode())
    await handle(created(), bus)
    assert await index_of(redis) == {"d": words}
    await documents.update("d", text=b"word0 other")
    await handle(updated(), bus)
    assert await index_of(redis) == {"d": {"word0", "other"}}


async def test_a_deleted_document_leaves_nothing(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    before = await kept(redis)
    await documents.create("d", DATASET, "t", b"one two")
    await handle(created(), bus)
    await documents.delete("d")
    await handle(deleted(), bus)
    assert await kept(redis) == before


async def test_an_old_event_after_a_new_one_changes_nothing(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one")
    await documents.update("d", text=b"two")
    await documents.delete("d")
    await documents.create("d", DATASET, "t", b"three")
    for event in (updated(), created(), deleted(), created(), deleted()):
        await handle(event, bus)
    assert await index_of(redis) == {"d": {"three"}}
    assert await status_of(redis) == (Status.INDEXED, "")
    assert await redis.smembers(state.dataset_documents_key(DATASET)) == {b"d"}


async def test_an_event_of_a_document_that_is_gone_changes_nothing(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    before = await kept(documents.bus.redis)
    await handle(created(), bus)
    await handle(deleted(), bus)
    assert await kept(redis) == before
    assert await published(bus) == []


async def test_a_text_that_has_not_come_yet_fails_until_it_comes(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t")
    with pytest.raises(TextMissing, match="of document d has not come"):
        await handle(created(), bus)
    assert await status_of(redis) == (Status.INDEXING, "")
    await documents.update("d", text=b"late")
    await handle(created(), bus)
    assert await index_of(redis) == {"d": {"late"}}


async def test_a_text_that_is_not_utf8_is_rejected(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"caf\xe9")
    with pytest.raises(Reject, match="not UTF-8: unexpected end of data at byte 3"):
        await handle(created(), bus)
    assert await index_of(redis) == {}


# --- giving up


def dead(event: Event | None, text: str = "has not come") -> Any:
    class Dead:
        error = SimpleNamespace(type="TextMissing", text=text)

        @property
        def event(self) -> Event:
            if event is None:
                raise Undecodable("broken")
            return event

    return Dead()


FAILED = DocumentIndexFailed(document_id="d", dataset_id=DATASET, error="TextMissing: has not come")


async def test_a_dead_letter_tells_the_owner_once(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t")
    with pytest.raises(TextMissing):
        await handle(created(), bus)
    for _ in range(2):  # a crash may repeat it...
        await indexing.mark_index_failed(dead(created()), bus)
    assert await status_of(redis) == (Status.INDEX_FAILED, FAILED.error)
    with pytest.raises(TextMissing):  # ...and the last attempt, too
        await handle(created(), bus)
    assert await status_of(redis) == (Status.INDEX_FAILED, FAILED.error)
    await indexing.mark_index_failed(dead(created()), bus)
    assert await published(bus, DocumentIndexFailed) == [FAILED]
    await documents.update("d", text=b"at last")
    assert await status_of(redis) == (Status.NEW, "")


async def test_one_that_succeeds_beside_one_that_gave_up_has_the_last_word(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    """Of two events of one document, one is a dead letter while the other is being handled."""
    await documents.create("d", DATASET, "t", b"text")
    gave_up = False

    async def before(trip: int) -> None:
        nonlocal gave_up
        if trip == 4 and not gave_up:  # has begun, is about to write postings
            gave_up = True
            await indexing.mark_index_failed(dead(created()), bus)
            assert await status_of(redis) == (Status.INDEX_FAILED, FAILED.error)

    await handle(created(), Interrupted(bus, before))
    assert gave_up
    assert await status_of(redis) == (Status.INDEXED, "")
    assert (await types_of(bus))[2:] == ["document.index_failed", "document.indexed"]


async def test_a_dead_letter_of_an_older_text_says_nothing_of_the_present_one(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"good")
    await handle(created(), bus)
    await indexing.mark_index_failed(dead(created()), bus)
    assert await status_of(redis) == (Status.INDEXED, "")
    await documents.update("d", text=b"better")
    await indexing.mark_index_failed(dead(created()), bus)
    assert await status_of(redis) == (Status.NEW, "")
    assert await published(bus, DocumentIndexFailed) == []


async def test_a_text_that_comes_while_its_failure_is_told_is_not_called_a_failure(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t")
    with pytest.raises(TextMissing):
        await handle(created(), bus)

    async def before(trip: int) -> None:
        if trip == 2:  # has read, is about to write
            await documents.update("d", text=b"late")

    await indexing.mark_index_failed(dead(created()), Interrupted(bus, before))  # type: ignore[arg-type]
    assert await status_of(redis) == (Status.NEW, "")
    assert await published(bus, DocumentIndexFailed) == []


@pytest.mark.parametrize("event", [None, created("gone")], ids=["undecodable", "deleted"])
async def test_a_dead_letter_without_a_document_is_nobodys_failure(
    bus: Any, redis: Any, event: Event | None
) -> None:
    await indexing.mark_index_failed(dead(event), bus)
    assert await kept(redis) == set()
    assert await published(bus) == []


# --- searching


async def _filled(documents: DocumentService, texts: dict[str, bytes]) -> None:
    for document_id, text in texts.items():
        await documents.create(document_id, DATASET, document_id.upper(), text)
        await handle(created(document_id), documents.bus)


async def test_rare_words_count_for_more_and_so_do_repeated_ones(
    documents: DocumentService, redis: Any
) -> None:
    await _filled(
        documents,
        {
            "a": b"import socket",
            "b": b"import import import",
            "c": b"import socket socket",
            "d": b"nothing",
        },
    )
    hits = await search(redis, DATASET, "Import SOCKET")
    assert [hit.title for hit in hits] == ["C", "A", "B"]
    assert hits[0].score > hits[1].score > hits[2].score
    assert [hit.document_id for hit in await search(redis, DATASET, "import socket", 1)] == ["c"]


async def test_a_search_without_known_words_finds_nothing(
    documents: DocumentService, redis: Any
) -> None:
    await _filled(documents, {"a": b"one"})
    assert await search(redis, DATASET, "two, three") == []
    assert await search(redis, DATASET, "??") == []
    assert await search(redis, "other", "one") == []


async def test_a_deleted_document_is_not_found_even_before_its_postings_are_gone(
    documents: DocumentService, redis: Any
) -> None:
    await _filled(documents, {"a": b"one", "b": b"one"})
    await documents.delete("a")
    assert [hit.document_id for hit in await search(redis, DATASET, "one")] == ["b"]


# --- size


async def test_deleted_documents_before_it_do_not_shorten_a_list_of_hits(
    documents: DocumentService, redis: Any
) -> None:
    await _filled(documents, {f"d{n}": b"one" for n in range(6)})
    for n in range(4):
        await documents.delete(f"d{n}")
    assert [hit.document_id for hit in await search(redis, DATASET, "one", 2)] == ["d4", "d5"]


async def test_a_source_file_of_100_kilobytes_is_indexed_in_well_under_50_ms(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    """A file of that size has about 1,200 different words. Counted is what it holds others up."""
    words = [f"{stem}{n}" for n in range(400) for stem in ("read", "write", "close")]
    text = " ".join(words * 13).encode()
    assert len(text) > 100_000
    await documents.create("d", DATASET, "t", text)
    took_ms = []
    for _ in range(5):
        began_s = time.process_time()
        await handle(created(), bus)
        took_ms.append((time.process_time() - began_s) * 1000)
    assert min(took_ms) < 50, took_ms
    assert len((await index_of(redis))["d"]) == 1200
