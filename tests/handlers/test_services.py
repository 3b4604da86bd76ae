"""What a program calls: state and event in one step, whoever else is at it."""

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
    QuotaExceeded,
    QuotaGranted,
)
from handlers.services import App, Title
from handlers.state import Status
from tests.handlers.application import (
    APP,
    DATASET,
    Crash,
    Interrupted,
    kept,
    prepare,
    published,
    types_of,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bus import Bus


# --- apps and datasets


async def test_an_app_lives(bus: Bus, redis: Any) -> None:
    apps = services.AppService(bus)
    await apps.create("a", "first")
    await apps.update("a", "second")
    assert await redis.hgetall(state.app_key("a")) == {b"name": b"second"}
    await apps.delete("a")
    assert await kept(redis) == set()
    assert await published(bus) == [
        AppCreated(app_id="a", name="first"),
        AppUpdated(app_id="a", name="second"),
        AppDeleted(app_id="a"),
    ]


async def test_an_app_that_is_gone_is_not_updated(bus: Bus, redis: Any) -> None:
    with pytest.raises(LookupError, match="no app 'a'"):
        await services.AppService(bus).update("a", "name")
    assert await kept(redis) == set()
    assert await published(bus) == []


async def test_a_dataset_lives(bus: Bus, redis: Any) -> None:
    datasets = services.DatasetService(bus)
    await services.AppService(bus).create("a", "n")
    await datasets.create(DATASET, "a", "manuals")
    assert await redis.hgetall(state.dataset_key(DATASET)) == {b"app_id": b"a", b"name": b"manuals"}
    assert await redis.smembers(state.app_datasets_key("a")) == {DATASET.encode()}
    await datasets.delete(DATASET)
    assert await kept(redis) == {state.app_key("a")}
    assert (await published(bus))[1:] == [
        DatasetCreated(dataset_id=DATASET, app_id="a", name="manuals"),
        DatasetDeleted(dataset_id=DATASET, app_id="a"),
    ]


async def test_a_dataset_needs_an_app_and_stays_with_it(bus: Bus, redis: Any) -> None:
    datasets = services.DatasetService(bus)
    with pytest.raises(LookupError, match="no app 'nobody'"):
        await datasets.create("new", "nobody", "n")
    assert await kept(redis) == set()
    await prepare(bus)
    await services.AppService(bus).create("other", "n")
    with pytest.raises(ValueError, match="belongs to app 'app'"):
        await datasets.create(DATASET, "other", "n")
    await datasets.create(DATASET, APP, "renamed")
    assert await redis.hget(state.dataset_key(DATASET), "name") == b"renamed"


async def test_an_id_is_free_again_when_nothing_is_left_of_what_had_it(
    documents: services.DocumentService, bus: Bus, redis: Any
) -> None:
    """Else what cleans up behind the old one would take the new one's."""
    apps, datasets = services.AppService(bus), services.DatasetService(bus)
    await documents.create("d", DATASET, "t")
    await apps.delete(APP)
    with pytest.raises(ValueError, match="app 'app' is still being deleted"):
        await apps.create(APP, "again")
    await datasets.delete(DATASET)
    await apps.create(APP, "again")
    with pytest.raises(ValueError, match="dataset 'ds' is still being deleted"):
        await datasets.create(DATASET, APP, "again")
    assert not await redis.exists(state.dataset_key(DATASET))
    await documents.delete("d")
    await datasets.create(DATASET, APP, "again")
    assert await redis.hget(state.dataset_key(DATASET), "name") == b"again"


async def test_a_dataset_that_changes_hands_is_deleted_from_the_right_app(
    bus: Bus, redis: Any
) -> None:
    """Between the look for its app and the step it is deleted, and created in another app."""
    quick = services.DatasetService(bus)
    await prepare(bus)
    await services.AppService(bus).create("other", "n")

    async def before(trip: int) -> None:
        if trip == 2:
            await quick.delete(DATASET)
            await quick.create(DATASET, "other", "n")

    slow = services.DatasetService(Interrupted(bus, before))  # type: ignore[arg-type]
    await slow.delete(DATASET)
    assert await kept(redis) == {state.app_key(APP), state.app_key("other")}
    assert (await published(bus))[-1] == DatasetDeleted(dataset_id=DATASET, app_id="other")


async def test_what_an_app_and_a_dataset_hold_is_shown(
    documents: services.DocumentService, bus: Bus
) -> None:
    apps, datasets = services.AppService(bus), services.DatasetService(bus)
    await datasets.create("another", APP, "Another")
    await documents.create("d1", DATASET, "Zebras")
    await documents.create("d2", DATASET, "Apes")
    await documents.create("d3", DATASET, "Gone")
    await documents.delete("d3")
    both = (Title("another", "Another"), Title(DATASET, "A dataset"))
    assert await apps.get(APP) == App(APP, "An app", both)
    assert await apps.get("nobody") is None
    assert await datasets.documents(DATASET) == [Title("d2", "Apes"), Title("d1", "Zebras")]
    assert await datasets.documents("none") == []


# --- documents


async def test_a_document_is_stored_and_told(
    documents: services.DocumentService, bus: Bus, redis: Any
) -> None:
    receipts = await documents.create("d", DATASET, "a title", b"some words")
    assert len({receipt.stream for receipt in receipts}) == 1
    assert await published(bus) == [
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
    documents: services.DocumentService, bus: Bus, redis: Any
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
    updated = DocumentUpdated(document_id="d", dataset_id=DATASET, title="new")
    assert (await published(bus))[-1] == updated


async def test_a_deleted_document_is_marked_until_its_handler_has_cleaned_up(
    documents: services.DocumentService, bus: Bus
) -> None:
    await documents.create("d", DATASET, "t", b"text")
    await documents.delete("d")
    document = await documents.get("d")
    assert document is not None
    assert document.status is Status.DELETED
    deleted = DocumentDeleted(document_id="d", dataset_id=DATASET)
    assert (await published(bus))[-1] == deleted
    with pytest.raises(LookupError):
        await documents.update("d", title="too late")
    await documents.delete("d")  # the call before may have got no answer
    assert await documents.get("d") == document
    assert (await types_of(bus)).count("document.deleted") == 2


@pytest.mark.parametrize("call", ["update", "delete"])
async def test_a_document_that_is_not_there_is_neither_changed_nor_deleted(
    documents: services.DocumentService, bus: Bus, redis: Any, call: str
) -> None:
    before = await kept(redis)
    with pytest.raises(LookupError, match="no document 'd'"):
        await getattr(documents, call)("d")
    assert await kept(redis) == before
    assert await published(bus) == []


async def test_the_largest_document_is_stored_in_one_step(
    documents: services.DocumentService, redis: Any
) -> None:
    longest_id, title = "d" * 100, "€" * services.MAX_TITLE_CHARS
    await documents.create(longest_id, DATASET, title, bytes(services.MAX_TEXT_BYTES))
    text = await redis.hget(state.document_key(longest_id), "text")
    assert len(text) == services.MAX_TEXT_BYTES


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("d 1", DATASET, "t", b""), ValueError, "document id"),
        (("", DATASET, "t", b""), ValueError, "document id"),
        (("d", "a{b}", "t", b""), ValueError, "dataset id"),
        (("d", DATASET, "t" * 501, b""), ValueError, "title"),
        (("d", DATASET, "t", bytes(services.MAX_TEXT_BYTES + 1)), ValueError, "text"),
        (("d", "another", "t", b""), ValueError, "belongs to 'ds'"),
        (("d", "nowhere", "t", b""), LookupError, "no dataset 'nowhere'"),
    ],
    ids=["space", "empty", "braces", "long title", "long text", "other dataset", "no dataset"],
)
async def test_a_document_that_cannot_be_is_refused(
    bus: Bus, redis: Any, arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    await prepare(bus, DATASET, "another")
    documents = services.DocumentService(bus)
    await documents.create("d", DATASET, "t", b"")
    before = await kept(redis)
    with pytest.raises(error, match=says):
        await documents.create(*arguments)
    assert await kept(redis) == before
    assert len(await published(bus)) == 2


async def test_nothing_comes_into_a_deleted_dataset(
    documents: services.DocumentService, bus: Bus, redis: Any
) -> None:
    await documents.create("d", DATASET, "t")
    await services.DatasetService(bus).delete(DATASET)
    before = await dump(redis)
    for call in (
        documents.create("new", DATASET, "t"),
        documents.create("d", DATASET, "again"),
        documents.update("d", title="u"),
    ):
        with pytest.raises(LookupError, match="no dataset 'ds'"):
            await call
    assert await dump(redis) == before


@pytest.mark.parametrize("quick", ["title", "text"])
async def test_a_change_between_reading_and_writing_is_not_overwritten(
    documents: services.DocumentService, bus: Bus, redis: Any, quick: str
) -> None:
    """Two people edit: the title of one and the text of the other must both survive."""
    await documents.create("d", DATASET, "old", b"old")
    edits: dict[str, dict[str, Any]] = {"title": {"title": "new"}, "text": {"text": b"new"}}

    async def before(trip: int) -> None:
        if trip == 2:  # has read, is about to write
            await documents.update("d", **edits.pop(quick))

    slow = services.DocumentService(Interrupted(bus, before))  # type: ignore[arg-type]
    [(_, edit)] = [item for item in edits.items() if item[0] != quick]
    await slow.update("d", **edit)
    assert await redis.hmget(state.document_key("d"), "title", "text") == [b"new", b"new"]


async def test_a_document_deleted_between_reading_and_writing_stays_deleted(
    documents: services.DocumentService, bus: Bus
) -> None:
    await documents.create("d", DATASET, "old", b"old")

    async def before(trip: int) -> None:
        if trip == 2:
            await documents.delete("d")

    slow = services.DocumentService(Interrupted(bus, before))  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="no document 'd'"):
        await slow.update("d", text=b"new")
    document = await documents.get("d")
    assert document is not None
    assert document.status is Status.DELETED


# --- messages and quotas


async def test_a_message_is_stored_and_its_tokens_told(bus: Bus, redis: Any) -> None:
    messages = services.MessageService(bus)
    await messages.create("m", "u", "a", "eight ch")
    await messages.create("m", "u", "a", "eight ch")  # the call before may have got no answer
    assert await redis.hgetall(state.message_key("m")) == {
        b"user_id": b"u",
        b"app_id": b"a",
        b"text": b"eight ch",
    }
    told = MessageCreated(message_id="m", user_id="u", app_id="a", tokens=3)
    assert await published(bus) == [told, told]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("m 1", "u", "a", "x"), "message id"),
        (("m", "u:1", "a", "x"), "user id"),
        (("m", "u", "a", "x" * (services.MAX_MESSAGE_CHARS + 1)), "100,000 characters"),
        (("m", "another", "a", "hello"), "another message 'm'"),
        (("m", "u", "another", "hello"), "another message 'm'"),
        (("m", "u", "a", "another"), "another message 'm'"),
    ],
    ids=["id", "user", "long", "user of another", "app of another", "text of another"],
)
async def test_a_message_that_cannot_be_is_refused(
    bus: Bus, redis: Any, arguments: tuple[Any, ...], says: str
) -> None:
    messages = services.MessageService(bus)
    await messages.create("m", "u", "a", "hello")
    with pytest.raises(ValueError, match=says):
        await messages.create(*arguments)
    assert await kept(redis) == {state.message_key("m")}
    assert await redis.hget(state.message_key("m"), "text") == b"hello"
    assert len(await published(bus)) == 1


async def test_a_quota_is_granted_in_all_and_may_be_granted_twice(bus: Bus) -> None:
    quotas = services.QuotaService(bus)
    assert await quotas.balance("u") == 0
    for _ in range(2):
        await quotas.grant("u", 100)
        assert await quotas.balance("u") == 100
    await quotas.grant("u", 250)
    assert await quotas.balance("u") == 250
    granted = [QuotaGranted(user_id="u", tokens=n) for n in (100, 100, 250)]
    assert await published(bus) == granted


async def test_a_quota_lowered_below_what_was_used_is_exceeded(bus: Bus, redis: Any) -> None:
    quotas = services.QuotaService(bus)
    await quotas.grant("u", 100)
    await redis.hincrby(state.quota_key("u"), "balance", -60)
    await quotas.grant("u", 60)
    assert await quotas.balance("u") == 0
    assert await published(bus, QuotaExceeded) == []
    await quotas.grant("u", 50)
    await quotas.grant("u", 40)
    assert await quotas.balance("u") == -20
    assert await published(bus, QuotaExceeded) == [QuotaExceeded(user_id="u")]


async def test_two_grants_at_once_leave_the_balance_of_the_last_one(bus: Bus) -> None:
    quotas = services.QuotaService(bus)

    async def before(trip: int) -> None:
        if trip == 2:  # has read, is about to write
            await quotas.grant("u", 70)

    await services.QuotaService(Interrupted(bus, before)).grant("u", 100)  # type: ignore[arg-type]
    assert await quotas.balance("u") == 100


@pytest.mark.parametrize(("user_id", "tokens"), [("u v", 1), ("u", -1)])
async def test_a_quota_that_cannot_be_is_refused(
    bus: Bus, redis: Any, user_id: str, tokens: int
) -> None:
    with pytest.raises(ValueError, match=r"user id|not -1"):
        await services.QuotaService(bus).grant(user_id, tokens)
    assert await kept(redis) == set()


# --- one step


def calls(bus: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    apps, datasets = services.AppService(bus), services.DatasetService(bus)
    documents = services.DocumentService(bus)
    return {
        "app.created": lambda: apps.create("a", "n"),
        "app.updated": lambda: apps.update(APP, "n"),
        "app.deleted": lambda: apps.delete(APP),
        "dataset.created": lambda: datasets.create("new", APP, "n"),
        "dataset.deleted": lambda: datasets.delete(DATASET),
        "document.created": lambda: documents.create("new", DATASET, "t", b"x"),
        "document.updated": lambda: documents.update("d", title="u"),
        "document.deleted": lambda: documents.delete("d"),
        "message.created": lambda: services.MessageService(bus).create("m", "u", "a", "x"),
        "quota.granted": lambda: services.QuotaService(bus).grant("u", 5),
    }


@pytest.mark.parametrize("name", calls(None))
async def test_state_and_event_are_one_step_and_the_last(
    documents: services.DocumentService, bus: Bus, redis: Any, name: str
) -> None:
    """A caller that dies before the last round trip has done nothing, after it everything."""
    await documents.create("d", DATASET, "t", b"x")
    state_before, events_before = await dump(redis), len(await types_of(bus))
    trips = 0

    async def count(trip: int) -> None:
        nonlocal trips
        trips = trip
        assert await dump(redis) == state_before
        assert len(await types_of(bus)) == events_before

    await calls(Interrupted(bus, count))[name]()
    assert trips in (1, 2)
    assert await dump(redis) != state_before
    assert (await types_of(bus))[events_before] == name


async def test_a_call_that_fails_has_told_nothing(bus: Bus, redis: Any) -> None:
    async def before(_trip: int) -> None:
        raise Crash

    for name, call in calls(Interrupted(bus, before)).items():
        with pytest.raises(Crash):
            await call()
        assert await types_of(bus) == [], name
    assert await kept(redis) == set()


async def dump(redis: Any) -> dict[str, bytes]:
    """The application's state, as bytes."""
    return {key: await redis.dump(key) for key in sorted(await kept(redis))}
