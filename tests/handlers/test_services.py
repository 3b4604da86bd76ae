from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from handlers import services, state
from handlers.events import (
    AppCreated,
    AppDeleted,
    AppUpdated,
    DatasetCreated,
    DatasetDeleted,
    DatasetDocumentAdded,
    DocumentCreated,
    DocumentDeleted,
    DocumentUpdated,
    MessageCreated,
)
from handlers.state import Status
from tests.handlers.application import DATASET, Interrupted, KeepingBus

if TYPE_CHECKING:
    from bus import Event


@pytest.fixture
def documents(bus: Any) -> services.DocumentService:
    return services.DocumentService(bus)


async def test_an_app_lives(bus: Any, redis: Any) -> None:
    apps = services.AppService(bus)
    await apps.create("a", "first")
    await apps.update("a", "second")
    assert await redis.hgetall(state.app_key("a")) == {b"name": b"second"}
    await apps.delete("a")
    assert not await redis.exists(state.app_key("a"))
    assert bus.published == [
        AppCreated(app_id="a", name="first"),
        AppUpdated(app_id="a", name="second"),
        AppDeleted(app_id="a"),
    ]


async def test_an_app_that_is_gone_is_not_updated(bus: Any, redis: Any) -> None:
    with pytest.raises(LookupError, match="no app 'a'"):
        await services.AppService(bus).update("a", "name")
    assert not await redis.exists(state.app_key("a"))
    assert bus.published == []


async def test_a_dataset_lives(bus: Any, redis: Any) -> None:
    datasets = services.DatasetService(bus)
    await datasets.create(DATASET, "a", "manuals")
    assert await redis.hgetall(state.dataset_key(DATASET)) == {b"app_id": b"a", b"name": b"manuals"}
    await datasets.delete(DATASET)
    assert not await redis.exists(state.dataset_key(DATASET))
    assert bus.published == [
        DatasetCreated(dataset_id=DATASET, app_id="a", name="manuals"),
        DatasetDeleted(dataset_id=DATASET),
    ]


async def test_a_message_is_stored_and_its_tokens_told(bus: Any, redis: Any) -> None:
    await services.MessageService(bus).create("m", "u", "a", "eight ch")
    assert await redis.hget(state.message_key("m"), "text") == b"eight ch"
    assert bus.published == [MessageCreated(message_id="m", user_id="u", app_id="a", tokens=3)]


async def test_a_document_is_stored_and_told(
    documents: services.DocumentService, bus: Any, redis: Any
) -> None:
    receipts = await documents.create("d", DATASET, "a title", b"some words")
    assert [receipt.event_id for receipt in receipts] == ["e1", "e2"]
    assert bus.published == [
        DocumentCreated(document_id="d", dataset_id=DATASET, title="a title"),
        DatasetDocumentAdded(dataset_id=DATASET, document_id="d"),
    ]
    document = await documents.get("d")
    assert document is not None
    assert (document.status, document.has_text) == (Status.NEW, True)
    assert await redis.hget(state.document_key("d"), "text") == b"some words"


async def test_an_announced_document_has_no_text_until_it_comes(
    documents: services.DocumentService,
) -> None:
    await documents.create("d", DATASET, "t")
    announced = await documents.get("d")
    await documents.update("d", text=b"")
    complete = await documents.get("d")
    assert announced is not None
    assert complete is not None
    assert (announced.has_text, complete.has_text) == (False, True)


async def test_an_update_changes_what_was_given_and_the_revision(
    documents: services.DocumentService, bus: Any, redis: Any
) -> None:
    await documents.create("d", DATASET, "old", b"text")
    before = await documents.get("d")
    await documents.update("d", title="new")
    after = await documents.get("d")
    assert before is not None
    assert after is not None
    assert after.title == "new"
    assert after.revision != before.revision
    assert await redis.hget(state.document_key("d"), "text") == b"text"
    assert bus.published[-1] == DocumentUpdated(document_id="d", dataset_id=DATASET, title="new")


async def test_a_deleted_document_is_marked_until_its_handler_has_cleaned_up(
    documents: services.DocumentService, bus: Any
) -> None:
    await documents.create("d", DATASET, "t", b"text")
    await documents.delete("d")
    document = await documents.get("d")
    assert document is not None
    assert document.status is Status.DELETED
    assert bus.published[-1] == DocumentDeleted(document_id="d", dataset_id=DATASET)
    with pytest.raises(LookupError):
        await documents.update("d", title="too late")
    await documents.delete("d")  # the call before may have been cut off before it published
    assert bus.types().count("DocumentDeleted") == 2


@pytest.mark.parametrize("call", ["update", "delete"])
async def test_a_document_that_is_not_there_is_neither_changed_nor_deleted(
    documents: services.DocumentService, bus: Any, redis: Any, call: str
) -> None:
    with pytest.raises(LookupError, match="no document 'd'"):
        await getattr(documents, call)("d")
    assert await redis.dbsize() == 0
    assert bus.published == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("d 1", DATASET, "t", b""), "document id"),
        (("", DATASET, "t", b""), "document id"),
        (("d", "a{b}", "t", b""), "dataset id"),
        (("d", DATASET, "t" * 501, b""), "title"),
        (("d", DATASET, "t", bytes(services.MAX_TEXT_BYTES + 1)), "text"),
        (("d", "another", "t", b""), "belongs to"),
    ],
    ids=["space", "empty", "braces", "long title", "long text", "other dataset"],
)
async def test_a_document_that_cannot_be_is_refused(
    documents: services.DocumentService, bus: Any, arguments: tuple[Any, ...], says: str
) -> None:
    if says == "belongs to":
        await documents.create("d", DATASET, "t", b"")
        bus.published.clear()
    with pytest.raises(ValueError, match=says):
        await documents.create(*arguments)
    assert bus.published == []


async def test_a_change_between_reading_and_writing_is_not_overwritten(redis: Any) -> None:
    """Two people edit: the title of one and the text of the other must both survive."""
    quick = services.DocumentService(KeepingBus(redis))  # type: ignore[arg-type]
    await quick.create("d", DATASET, "old", b"old")

    async def before(trip: int) -> None:
        if trip == 2:  # has read, is about to write
            await quick.update("d", text=b"new")

    slow = services.DocumentService(KeepingBus(Interrupted(redis, before)))  # type: ignore[arg-type]
    await slow.update("d", title="new")
    assert await redis.hmget(state.document_key("d"), "title", "text") == [b"new", b"new"]


async def test_the_state_is_there_when_the_event_is_published(redis: Any) -> None:
    """A handler may run before `publish` returns."""

    class LookingBus(KeepingBus):
        async def publish(self, event: Event) -> Any:
            keys.append({key.decode() async for key in self.redis.scan_iter()})
            return await super().publish(event)

    keys: list[set[str]] = []
    bus: Any = LookingBus(redis)
    await services.AppService(bus).create("a", "n")
    await services.DatasetService(bus).create(DATASET, "a", "n")
    await services.DocumentService(bus).create("d", DATASET, "t", b"x")
    await services.MessageService(bus).create("m", "u", "a", "x")
    expected = [
        state.app_key("a"),
        state.dataset_key(DATASET),
        state.document_key("d"),
        state.document_key("d"),
        state.message_key("m"),
    ]
    assert all(key in there for key, there in zip(expected, keys, strict=True))
