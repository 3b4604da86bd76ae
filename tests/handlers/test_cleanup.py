"""What was in a deleted app or dataset goes with it, told once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus.worker import reclaimer
from handlers import cleanup, indexing, state
from handlers.events import AppDeleted, DatasetDeleted, DocumentCreated, DocumentDeleted
from handlers.services import AppService, DatasetService, DocumentService
from tests.handlers.application import (
    APP,
    DATASET,
    Crash,
    Interrupted,
    connect,
    envelopes,
    handle,
    handle_all,
    index_of,
    kept,
    published,
    start_over,
    work,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bus import Bus

ROOT = Path(__file__).resolve().parents[2]
DELETED = DatasetDeleted(dataset_id=DATASET, app_id=APP)


async def fill(bus: Bus, count: int, dataset_id: str = DATASET) -> list[str]:
    """Create documents in a dataset and index them; return their ids."""
    documents = DocumentService(bus)
    ids = [f"{dataset_id}-{number}" for number in range(count)]
    for document_id in ids:
        await documents.create(document_id, dataset_id, "Title", b"common " + document_id.encode())
    await handle_all(bus)
    return ids


async def clean(bus: Any, event: DatasetDeleted | AppDeleted = DELETED) -> None:
    """Run the cleanup alone."""
    await handle(event, bus, [cleanup.clean_up])


async def told(bus: Bus) -> Counter[str]:
    """How often each document was told to be deleted."""
    deleted = await published(bus, DocumentDeleted)
    return Counter(e.document_id for e in deleted if isinstance(e, DocumentDeleted))


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few documents take several steps."""
    monkeypatch.setattr(cleanup, "PER_STEP", 2)


async def test_a_deleted_dataset_takes_all_that_is_in_it(
    documents: DocumentService, bus: Bus, redis: Any
) -> None:
    nothing = {state.app_key(APP)}
    datasets = DatasetService(bus)
    ids = await fill(bus, 5)
    await datasets.search(DATASET, "common")
    await datasets.documents(DATASET)
    assert any("views" in key for key in await kept(redis))
    await datasets.delete(DATASET)
    await handle_all(bus)
    assert await kept(redis) == nothing
    assert await told(bus) == Counter(ids)
    await datasets.search(DATASET, "common")  # nor does a reader leave anything
    await datasets.documents(DATASET)
    assert await kept(redis) == nothing


async def test_a_deleted_app_takes_its_datasets(
    documents: DocumentService, bus: Bus, redis: Any
) -> None:
    """`documents` has made one; other apps keep theirs."""
    datasets = DatasetService(bus)
    await AppService(bus).create("other", "Other")
    await datasets.create("stays", "other", "n")
    for number in range(4):
        await datasets.create(f"ds-{number}", APP, "n")
    ids = await fill(bus, 2) + await fill(bus, 3, "ds-1")
    await documents.create("kept", "stays", "t", b"text")
    await AppService(bus).delete(APP)
    await handle_all(bus)
    assert await told(bus) == Counter(ids)
    gone = [e.dataset_id for e in await published(bus, DatasetDeleted)]  # type: ignore[attr-defined]
    assert sorted(gone) == sorted([DATASET, *(f"ds-{number}" for number in range(4))])
    assert await kept(redis) == {
        state.app_key("other"),
        state.app_datasets_key("other"),
        state.dataset_key("stays"),
        state.dataset_documents_key("stays"),
        state.document_key("kept"),
        state.document_words_key("kept"),
        state.postings_key("stays", "text"),
    }


async def test_documents_that_were_never_indexed_go_too(
    documents: DocumentService, bus: Bus, redis: Any
) -> None:
    await documents.create("announced", DATASET, "t")
    await documents.create("not-utf8", DATASET, "t", b"caf\xe9")
    await DatasetService(bus).delete(DATASET)
    for event in await published(bus, DatasetDeleted):
        await handle(event, bus)
    for event in await published(bus, DocumentDeleted):
        await handle(event, bus)
    assert await kept(redis) == {state.app_key(APP)}
    assert await told(bus) == Counter(["announced", "not-utf8"])


async def test_one_that_its_user_has_deleted_is_not_told_again(
    documents: DocumentService, bus: Bus
) -> None:
    ids = await fill(bus, 3)
    await documents.delete(ids[0])
    await DatasetService(bus).delete(DATASET)
    await handle_all(bus)
    assert await told(bus) == Counter(ids)


async def test_an_event_of_a_dataset_that_is_there_deletes_nothing(
    documents: DocumentService, bus: Bus
) -> None:
    """It may come late, or from a replay: the dataset was created again."""
    await fill(bus, 3)
    await clean(bus)
    await clean(bus, AppDeleted(app_id=APP))
    assert await told(bus) == Counter()
    assert len(await index_of(documents.bus.redis)) == 3


async def test_what_somebody_removed_by_hand_is_not_looked_for_for_ever(
    documents: DocumentService, bus: Bus, redis: Any
) -> None:
    ids = await fill(bus, 3)
    await redis.delete(state.document_key(ids[1]), state.dataset_key(DATASET))
    await clean(bus)
    assert sorted(await told(bus)) == [ids[0], ids[2]]
    await redis.sadd(state.app_datasets_key(APP), "never-was")
    await redis.delete(state.app_key(APP))
    await clean(bus, AppDeleted(app_id=APP))
    assert not await redis.exists(state.app_datasets_key(APP))


# --- crashes and races, at every round trip


async def test_a_crash_anywhere_is_healed_by_the_redelivery(
    documents: DocumentService, bus: Bus, redis: Any
) -> None:
    crashed = True
    at = 0
    while crashed:
        at += 1
        await start_over(bus)
        ids = await fill(bus, 5)
        await DatasetService(bus).delete(DATASET)

        async def before(trip: int, at: int = at) -> None:
            if trip == at:
                raise Crash

        crashed = False
        try:
            await clean(Interrupted(bus, before))
        except Crash:
            crashed = True
        await clean(bus)
        await handle_all(bus)
        assert await told(bus) == Counter(ids)
        assert await kept(redis) == {state.app_key(APP)}
    assert at > 9  # three steps of three round trips, and the look that finds nothing


async def _create(bus: Bus) -> None:
    with pytest.raises(LookupError):
        await DocumentService(bus).create("new", DATASET, "t", b"text")


async def _update(bus: Bus) -> None:
    for number in range(4):
        with pytest.raises(LookupError):
            await DocumentService(bus).update(f"{DATASET}-{number}", title="u")


async def _delete(bus: Bus) -> None:
    documents = DocumentService(bus)
    for number in range(4):
        document = await documents.get(f"{DATASET}-{number}")
        if document is not None and document.status is not state.Status.DELETED:
            await documents.delete(document.document_id)


async def _clean(bus: Bus) -> None:
    await handle_all(bus)


async def _index(bus: Bus) -> None:
    for number in range(4):
        event = DocumentCreated(document_id=f"{DATASET}-{number}", dataset_id=DATASET, title="t")
        await handle(event, bus, [indexing.index_document])


@pytest.mark.parametrize("meanwhile", [_create, _update, _delete, _clean, _index])
async def test_what_happens_during_a_cleanup_does_no_harm(
    documents: DocumentService,
    bus: Bus,
    redis: Any,
    meanwhile: Callable[[Bus], Coroutine[Any, Any, None]],
) -> None:
    happened = True
    at = 0
    while happened:
        at += 1
        await start_over(bus)
        ids = await fill(bus, 4)
        await DatasetService(bus).delete(DATASET)
        happened = False

        async def before(trip: int, at: int = at) -> None:
            nonlocal happened
            if trip == at:
                happened = True
                await meanwhile(bus)

        await clean(Interrupted(bus, before))
        await handle_all(bus)
        assert await told(bus) == Counter(ids)
        assert await kept(redis) == {state.app_key(APP)}
    assert at > 2


@pytest.mark.parametrize("what", ["dataset", "app"])
async def test_one_that_is_created_anew_keeps_what_is_in_it(
    documents: DocumentService, bus: Bus, redis: Any, what: str
) -> None:
    """At each round trip of a slow cleanup the quick one finishes, and the id is used again."""
    happened = True
    at = 0
    while happened:
        at += 1
        await start_over(bus)
        ids = await fill(bus, 4)
        happened = False

        async def before(trip: int, at: int = at) -> None:
            nonlocal happened
            if trip == at:
                happened = True
                await handle_all(bus)
                await AppService(bus).create(APP, "again")
                await DatasetService(bus).create(DATASET, APP, "again")
                await documents.create("new", DATASET, "t", b"new")
                await documents.create(f"{DATASET}-0", DATASET, "t", b"again")
                await handle_all(bus)

        slow: Any = Interrupted(bus, before)
        if what == "app":
            await AppService(bus).delete(APP)
            await clean(slow, AppDeleted(app_id=APP))
        else:
            await DatasetService(bus).delete(DATASET)
            await clean(slow)
        await handle_all(bus)
        if happened:
            assert await told(bus) == Counter(ids)
            assert await index_of(redis) == {"new": {"new"}, f"{DATASET}-0": {"again"}}
    assert at > 2


async def test_one_that_is_being_indexed_when_its_dataset_goes_leaves_nothing(
    documents: DocumentService, bus: Bus, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "WORDS_PER_STEP", 1)
    happened = True
    at = 0
    while happened:
        at += 1
        await start_over(bus)
        await documents.create("d", DATASET, "t", b"one two")
        [created, _] = await published(bus)
        happened = False

        async def before(trip: int, at: int = at) -> None:
            nonlocal happened
            if trip == at:
                happened = True
                await DatasetService(bus).delete(DATASET)
                await handle_all(bus)

        await handle(created, Interrupted(bus, before), [indexing.index_document])
        if happened:
            assert await kept(redis) == {state.app_key(APP)}
    assert at > 5


async def test_an_update_that_began_before_the_deletion_is_refused(
    documents: DocumentService, bus: Bus, redis: Any
) -> None:
    await documents.create("d", DATASET, "t", b"text")

    async def before(trip: int) -> None:
        if trip == 2:  # has read, is about to write
            await DatasetService(bus).delete(DATASET)

    slow = DocumentService(Interrupted(bus, before))  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="no dataset 'ds'"):
        await slow.update("d", text=b"other")
    await handle_all(bus)
    assert await kept(redis) == {state.app_key(APP)}


# --- real workers


@pytest.mark.parametrize(
    ("moment", "nth"), [("before", 1), ("after", 1), ("before", 3), ("after", 3), ("after", 4)]
)
async def test_a_worker_killed_half_way_is_continued_by_another(
    url: str, monkeypatch: pytest.MonkeyPatch, moment: str, nth: int
) -> None:
    """`kill -9` of a process, before or after one of four steps; all else happens in this one."""
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)
    async with connect(url) as bus:
        redis: Any = bus.redis
        await start_over(bus)
        ids = await fill(bus, 35)
        receipt = await DatasetService(bus).delete(DATASET)
        wish = {"url": url, "per_step": 10, "moment": moment, "nth": nth}
        killed = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.handlers.cleaner", json.dumps(wish)),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(killed.communicate(), timeout=20)
        assert killed.returncode == -signal.SIGKILL, said.decode()
        left = 35 - min(35, 10 * (nth if moment == "after" else nth - 1))
        assert await redis.scard(state.dataset_documents_key(DATASET)) == left
        assert len(await told(bus)) == 35 - left
        await work(bus)
        assert await told(bus) == Counter(ids)
        assert await kept(redis) == {state.app_key(APP)}
        causes = {
            (e.causation_id, e.causation_depth) for e in await envelopes(bus, DocumentDeleted)
        }
        assert causes == {(receipt.event_id, 1)}


async def test_the_longest_chain_of_causes_is_three_events_long(url: str) -> None:
    """So no handlers trigger each other: beyond 32 the bus would refuse to go on (EventLoop)."""
    async with connect(url) as bus:
        await start_over(bus)
        await fill(bus, 3)
        begun = await AppService(bus).delete(APP)
        await work(bus)
        found = {e.event_id: e for e in await envelopes(bus)}
    chain = []
    for envelope in found.values():
        cause = found.get(envelope.causation_id or "")
        if cause is None:
            assert (envelope.causation_id, envelope.causation_depth) == (None, 0), envelope
            continue
        assert envelope.causation_depth == cause.causation_depth + 1
        assert envelope.correlation_id == (cause.correlation_id or cause.event_id)
        chain.append((envelope.causation_depth, cause.type, envelope.type, envelope.correlation_id))
    assert Counter(chain) == {
        (1, "app.deleted", "dataset.deleted", begun.event_id): 1,
        (2, "dataset.deleted", "document.deleted", begun.event_id): 3,
    }
