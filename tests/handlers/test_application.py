"""The application as it runs: real bus, real worker, real server."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Registry, Worker
from handlers import indexing
from handlers.events import DOCUMENTS, DocumentIndexed, DocumentIndexFailed
from handlers.services import (
    AppService,
    DatasetService,
    DocumentService,
    MessageService,
    QuotaService,
)
from handlers.state import Status, document_key
from tests.handlers.application import (
    APP,
    DATASET,
    DRAINED_S,
    connect,
    envelopes,
    index_of,
    kept,
    prepare,
    published,
    quickly,
    types_of,
    work,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    """On each kind of server; with a dataset, of which no event tells any more."""
    async with connect(url) as bus:
        await prepare(bus)
        yield bus


async def dead_letters(bus: Bus, stream: str) -> list[dict[bytes, bytes]]:
    redis: Any = bus.redis
    return [fields for _, fields in await redis.xrange(f"{stream}:dead:index")]


async def status_of(bus: Bus, document_id: str) -> tuple[Any, ...]:
    document = await DocumentService(bus).get(document_id)
    return (None,) if document is None else (document.status, document.error)


def test_the_package_holds_what_a_worker_needs() -> None:
    registry = Registry.collect("handlers")
    groups = sorted(handler.group for handler in registry.handlers)
    assert groups == ["cache", "cleanup", "index", "quota", "unindex"]
    assert registry.topics == (DOCUMENTS,)


async def test_documents_live_and_die(bus: Bus) -> None:
    documents = DocumentService(bus)
    await documents.create("kept", DATASET, "Kept", b"apples and pears")
    await documents.create("changed", DATASET, "Changed", b"apples")
    await documents.create("gone", DATASET, "Gone", b"apples")
    await work(bus)
    await documents.update("changed", text=b"plums")
    await documents.delete("gone")
    await work(bus)
    assert await index_of(bus.redis) == {"kept": {"apples", "and", "pears"}, "changed": {"plums"}}
    assert await status_of(bus, "kept") == (Status.INDEXED, "")
    assert await status_of(bus, "gone") == (None,)
    hits = await indexing.search(bus.redis, DATASET, "apples")
    assert [hit.title for hit in hits] == ["Kept"]
    indexed = await published(bus, DocumentIndexed)
    assert sorted((e.document_id, e.words) for e in indexed if isinstance(e, DocumentIndexed)) == [
        ("changed", 1),
        ("changed", 1),
        ("gone", 1),
        ("kept", 3),
    ]


async def test_changes_that_nobody_has_seen_yet_end_in_the_last_one(bus: Bus) -> None:
    """Everything is published before the first handler runs, 16 at a time and in any order."""
    documents = DocumentService(bus)
    for number in range(10):
        await documents.create(f"d{number}", DATASET, "t", b"first")
        await documents.update(f"d{number}", text=b"second")
        await documents.update(f"d{number}", text=b"third")
        if number % 2:
            await documents.delete(f"d{number}")
    await work(bus)
    assert await index_of(bus.redis) == {f"d{n}": {"third"} for n in range(0, 10, 2)}


async def test_a_text_that_never_comes_ends_in_a_failure_its_owner_can_see(bus: Bus) -> None:
    documents = DocumentService(bus)
    await documents.create("d", DATASET, "t")
    await work(bus)
    error = "TextMissing: the text of document d has not come yet"
    assert await status_of(bus, "d") == (Status.INDEX_FAILED, error)
    failed = DocumentIndexFailed(document_id="d", dataset_id=DATASET, error=error)
    assert await published(bus, DocumentIndexFailed) == [failed]
    await documents.update("d", text=b"at last")
    await work(bus)
    assert await status_of(bus, "d") == (Status.INDEXED, "")


async def test_a_text_that_comes_between_two_attempts_is_indexed(bus: Bus) -> None:
    """The event was published first, and a retry finds what the first attempt did not."""
    documents = DocumentService(bus)
    [created, _] = await documents.create("d", DATASET, "t")
    attempts: list[int] = []

    async def upload_after_two(event: Any, delivery: Any) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt == 3:
            redis: Any = bus.redis
            await redis.hset(document_key("d"), mapping={"has_text": 1, "text": b"late"})
        await indexing.index_document(event, delivery)

    handler = replace(quickly(indexing.index_document), call=upload_after_two)
    async with Worker(bus, handlers=[handler]) as worker:
        await worker.drained(DRAINED_S)
    assert attempts == [1, 2, 3]
    assert await index_of(bus.redis) == {"d": {"late"}}
    caused = [e async for e in bus.history("document", types=[DocumentIndexed])]
    assert [envelope.causation_id for envelope in caused] == [created.event_id]


async def test_a_text_that_is_not_utf8_is_a_dead_letter_at_once(bus: Bus) -> None:
    [created, _] = await DocumentService(bus).create("d", DATASET, "t", b"caf\xe9")
    await work(bus)
    [letter] = await dead_letters(bus, created.stream)
    assert (letter[b"deadreason"], letter[b"deadattempts"]) == (b"rejected", b"1")
    status, error = await status_of(bus, "d")
    assert status is Status.INDEX_FAILED
    assert error.startswith("Reject: the text is not UTF-8")


async def test_an_entry_that_is_no_event_is_a_dead_letter_and_nobodys_failure(bus: Bus) -> None:
    await DocumentService(bus).create("d", DATASET, "t", b"fine")
    raw = await bus.redis.xadd(
        "bus:{document:0}", {"id": "x", "type": "document.created", "data": "{"}
    )
    await work(bus)
    [letter] = await dead_letters(bus, "bus:{document:0}")
    assert (letter[b"deadreason"], letter[b"deadentry"]) == (b"undecodable", raw)
    assert await published(bus, DocumentIndexFailed) == []
    assert await status_of(bus, "d") == (Status.INDEXED, "")


async def test_whatever_concerns_a_document_lies_in_one_stream(bus: Bus) -> None:
    documents = DocumentService(bus)
    receipts = await documents.create("d", DATASET, "t", b"one")
    receipts += [await documents.update("d", title="u"), await documents.delete("d")]
    await work(bus)
    assert len({receipt.stream for receipt in receipts}) == 1
    streams = {envelope.stream async for envelope in bus.history("document")}
    assert streams == {receipts[0].stream}


async def test_apps_datasets_and_messages_are_published_to_their_topics(bus: Bus) -> None:
    receipts = [
        await AppService(bus).create("a", "n"),
        await DatasetService(bus).create("new", "a", "n"),
        await MessageService(bus).create("m", "u", "a", "hello"),
        await QuotaService(bus).grant("u", 1),
    ]
    streams = [receipt.stream for receipt in receipts]
    assert streams == ["bus:{app:0}", "bus:{dataset:0}", *["bus:{message:0}"] * 2]


async def test_the_whole_application_at_work(bus: Bus) -> None:
    """Five handlers side by side; what is deleted leaves what is not as it was."""
    datasets, documents, quotas = DatasetService(bus), DocumentService(bus), QuotaService(bus)
    await quotas.grant("ada", 10)
    await datasets.create("other", APP, "Other")
    for number in range(12):
        await documents.create(f"d{number}", DATASET if number % 2 else "other", "t", b"words")
        await MessageService(bus).create(f"m{number}", "ada", APP, "eight ch")
        await datasets.search(DATASET, "words")
    await work(bus)
    assert len(await datasets.search(DATASET, "words")) == 6
    assert await quotas.balance("ada") == 10 - 12 * 3
    await datasets.delete(DATASET)
    await work(bus)
    assert await datasets.search(DATASET, "words") == []
    assert len(await datasets.search("other", "words")) == 6
    assert not [key for key in await kept(bus.redis) if DATASET in key.split(":")]
    told = Counter(await types_of(bus))
    assert told["quota.exceeded"] == 1
    assert (told["document.indexed"], told["document.deleted"]) == (12, 6)
    # Far from the 32 causes at which the bus would call it a loop.
    assert max(e.causation_depth for e in await envelopes(bus)) == 1
