from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from bus import Reject, Undecodable
from handlers import indexing, state
from handlers.events import DocumentCreated, DocumentDeleted, DocumentIndexed, DocumentIndexFailed
from handlers.indexing import TextMissing, count_words, search
from handlers.services import DocumentService
from handlers.state import Status
from tests.handlers.application import DATASET, handle, index_of, status_of

if TYPE_CHECKING:
    from bus import Event


@pytest.fixture
def documents(bus: Any) -> DocumentService:
    return DocumentService(bus)


def created(document_id: str = "d") -> DocumentCreated:
    return DocumentCreated(document_id=document_id, dataset_id=DATASET, title="t")


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
    await handle(bus.published[0], bus)
    assert await index_of(redis) == {"d": {"one", "two"}}
    assert await status_of(redis) == (Status.INDEXED, "")
    assert bus.published[-1] == DocumentIndexed(document_id="d", dataset_id=DATASET, words=2)


async def test_an_updated_document_is_not_found_by_its_old_words(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one two")
    await handle(bus.published[0], bus)
    await documents.update("d", text=b"two three")
    await handle(bus.published[-1], bus)
    assert await index_of(redis) == {"d": {"two", "three"}}


async def test_a_deleted_document_leaves_nothing(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one two")
    await handle(bus.published[0], bus)
    await documents.delete("d")
    await handle(bus.published[-1], bus)
    assert await redis.dbsize() == 0


async def test_an_old_event_after_a_new_one_changes_nothing(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"one")
    await documents.update("d", text=b"two")
    await documents.delete("d")
    await documents.create("d", DATASET, "t", b"three")
    happened = list(bus.published)
    for event in (happened[2], happened[4], happened[3], happened[0], happened[3]):
        await handle(event, bus)
    assert await index_of(redis) == {"d": {"three"}}
    assert await status_of(redis) == (Status.INDEXED, "")
    assert await redis.smembers(state.dataset_documents_key(DATASET)) == {b"d"}


async def test_an_event_of_a_document_that_is_gone_changes_nothing(bus: Any, redis: Any) -> None:
    await handle(created(), bus)
    await handle(DocumentDeleted(document_id="d", dataset_id=DATASET), bus)
    assert await redis.dbsize() == 0
    assert bus.published == []


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


async def test_a_dead_letter_tells_the_owner(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t")
    with pytest.raises(TextMissing):
        await handle(created(), bus)
    for _ in range(2):  # a crash may repeat it
        await indexing.mark_index_failed(dead(created()), bus)
    error = "TextMissing: has not come"
    assert await status_of(redis) == (Status.INDEX_FAILED, error)
    failed = DocumentIndexFailed(document_id="d", dataset_id=DATASET, error=error)
    assert bus.published[2:] == [failed, failed]
    await documents.update("d", text=b"at last")
    assert await status_of(redis) == (Status.NEW, "")


async def test_a_dead_letter_of_an_older_text_says_nothing_of_the_present_one(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"good")
    await handle(bus.published[0], bus)
    await indexing.mark_index_failed(dead(created()), bus)
    assert await status_of(redis) == (Status.INDEXED, "")
    await documents.update("d", text=b"better")
    await indexing.mark_index_failed(dead(created()), bus)
    assert await status_of(redis) == (Status.NEW, "")
    assert "DocumentIndexFailed" not in bus.types()


@pytest.mark.parametrize("event", [None, created("gone")], ids=["undecodable", "deleted"])
async def test_a_dead_letter_without_a_document_is_nobodys_failure(
    bus: Any, redis: Any, event: Event | None
) -> None:
    await indexing.mark_index_failed(dead(event), bus)
    assert await redis.dbsize() == 0
    assert bus.published == []


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


async def test_a_source_file_of_100_kilobytes_is_indexed_in_well_under_50_ms(
    documents: DocumentService, bus: Any, redis: Any
) -> None:
    """A file of that size has about 1,200 different words; the bound is twice what is allowed."""
    words = [f"{stem}{n}" for n in range(400) for stem in ("read", "write", "close")]
    text = " ".join(words * 13).encode()
    assert len(text) > 100_000
    await documents.create("d", DATASET, "t", text)
    took_ms = []
    for _ in range(5):
        began_s = time.perf_counter()
        await handle(created(), bus)
        took_ms.append((time.perf_counter() - began_s) * 1000)
    assert min(took_ms) < 100, took_ms
    assert len((await index_of(redis))["d"]) == 1200
