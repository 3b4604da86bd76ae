"""Removing consumers: what they had is anybody's, and nobody who is at work is removed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    DeclarationError,
    Delivery,
    Event,
    InUse,
    Topic,
    UnknownGroup,
    UnknownTopic,
    Worker,
    event_handler,
)
from bus.admin import consumers
from bus.admin.consumers import RemovedConsumer
from bus.streams import keys
from tests.faults.proxy import Proxy
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.embedded import EmbeddedServer

TOPICS = [Topic("crew"), Topic("deck")]
S, DECK, G, GONE = "bus:{crew:0}", "bus:{deck:0}", "index", "gone"
INBOX = keys.inbox(S, G)


class Hired(Event, type="crew.hired"):
    n: int


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=TOPICS) as bus:
        await prepare(bus)
        yield bus


async def prepare(bus: Bus) -> None:
    for topic in TOPICS:
        await bus.topics.record(topic.name)
    for stream in (S, INBOX, DECK):
        await bus.redis.xgroup_create(stream, G, "0", mkstream=True)


async def give(bus: Bus, count: int, *, stream: str = S, consumer: str = GONE) -> list[str]:
    """Have a consumer be given new entries, twice each."""
    data = {"id": "e", "type": "crew.hired", "data": '{"n":1}'}
    async with bus.redis.pipeline(transaction=False) as pipe:
        for _ in range(count):
            pipe.xadd(stream, data)
        await pipe.execute()
    ((_, rows),) = await bus.redis.xreadgroup(G, consumer, {stream: ">"}, count=count)
    ids = [i for i, _ in rows]
    await bus.redis.xclaim(stream, G, consumer, 0, ids, retrycount=2, justid=True)
    return [i.decode() for i in ids]


async def names(bus: Bus, stream: str = S) -> set[str]:
    return {c["name"].decode() for c in await bus.redis.xinfo_consumers(stream, G)}


async def owners(bus: Bus, stream: str = S) -> dict[str, tuple[str, int]]:
    rows = await bus.redis.xpending_range(stream, G, "-", "+", 10_000)
    return {r["message_id"].decode(): (r["consumer"].decode(), r["times_delivered"]) for r in rows}


async def listed(bus: Bus, *streams: str, name: str = GONE) -> None:
    """Say that it kept leases, which have run out."""
    for stream in streams or (S, DECK):
        await bus.redis.sadd(keys.workers(stream), name)


async def everything(bus: Bus) -> dict[bytes, Any]:
    return {key: await bus.redis.dump(key) for key in await bus.redis.keys("*")}


async def test_a_dead_worker_goes_and_what_it_had_is_due_at_once(bus: Bus) -> None:
    ids, boxed = await give(bus, 3), await give(bus, 2, stream=INBOX)
    await give(bus, 1, consumer="other")
    await listed(bus)
    before = await everything(bus)
    said = await bus.admin.remove_consumer(GONE, G, dry_run=True)
    assert await everything(bus) == before
    witness, now_ms = Witness(bus), (await bus.redis.time())[0] * 1000
    done = await bus.admin.remove_consumer(GONE, G)
    assert (
        done
        == said
        == (
            RemovedConsumer(GONE, S, G, handed_back=3, lost=0),
            RemovedConsumer(GONE, INBOX, G, handed_back=2, lost=0),
        )
    )
    for stream, those in ((S, ids), (INBOX, boxed)):
        found = await owners(bus, stream)
        for entry_id in those:
            lane, count = found[entry_id]
            assert lane.startswith("parked:")
            assert now_ms <= int(lane[7:]) < now_ms + 10_000
            assert count == 2, "it has lost no attempt by that"
        assert GONE not in await names(bus, stream)
    assert "other" in await names(bus)
    forgotten = [(f["stream"], f["consumer"]) for f in witness.of("consumer.forgotten")]
    assert forgotten == [(S, GONE), (INBOX, GONE)]
    assert await bus.admin.remove_consumer(GONE, G) == ()


async def test_the_next_worker_takes_it_at_once(bus: Bus) -> None:
    """Although it could not judge yet who is dead, so soon after its start."""
    handled: list[tuple[str, int]] = []

    @event_handler(Hired, group=G)
    async def handle(event: Hired, delivery: Delivery[Hired]) -> None:
        handled.append((delivery.envelope.entry_id, delivery.attempt))

    ids = [*await give(bus, 3), *await give(bus, 2, stream=INBOX)]
    await listed(bus)
    await bus.admin.remove_consumer(GONE, G)
    async with Worker(bus, [handle]) as worker:
        await worker.drained()
    assert sorted(handled) == sorted((i, 3) for i in ids)


async def test_one_that_is_alive_is_not_removed(bus: Bus) -> None:
    hold = asyncio.Event()

    @event_handler(Hired, group=G)
    async def handle(event: Hired) -> None:
        await hold.wait()

    async with Worker(bus, [handle], name="w") as worker:
        await bus.publish(Hired(n=1))
        await eventually(lambda: worker._consumers[0].holding.held)
        before = await owners(bus)
        for dry_run in (True, False):
            with pytest.raises(InUse, match=r"w is at work on bus:\{crew:0\}: stop that worker"):
                await bus.admin.remove_consumer("w", G, dry_run=dry_run)
        assert await owners(bus) == before
        assert "w" in await names(bus)
        hold.set()


async def test_one_that_is_alive_on_one_stream_stays_on_all(bus: Bus) -> None:
    ids = await give(bus, 1)
    await give(bus, 1, stream=DECK)
    await listed(bus)
    await bus.redis.set(keys.lease(DECK, GONE), G)
    with pytest.raises(InUse, match=r"gone is at work on bus:\{deck:0\}"):
        await bus.admin.remove_consumer(GONE, G)
    assert await owners(bus) == {ids[0]: (GONE, 2)}
    assert [r.stream for r in await bus.admin.remove_consumer(GONE, G, "crew")] == [S]


async def test_one_of_another_language_is_judged_by_when_it_was_heard_of(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await give(bus, 2)
    with pytest.raises(InUse):
        await bus.admin.remove_consumer(GONE, G)
    monkeypatch.setattr(consumers, "HEARD_OF_MS", 0)
    assert [r.handed_back for r in await bus.admin.remove_consumer(GONE, G)] == [2]
    assert GONE not in await names(bus)


async def test_one_that_has_nothing_goes_and_one_that_is_not_there_is_no_error(bus: Bus) -> None:
    await bus.redis.xgroup_createconsumer(S, G, "idle")
    await listed(bus, name="idle")
    (done,) = await bus.admin.remove_consumer("idle", G)
    assert (done.stream, done.handed_back) == (S, 0)
    assert await bus.admin.remove_consumer("idle", G) == ()
    with pytest.raises(DeclarationError, match="parked:5 is a lane: it goes by itself"):
        await bus.admin.remove_consumer("parked:5", G)
    with pytest.raises(UnknownGroup, match=r"did you mean index\?"):
        await bus.admin.remove_consumer(GONE, "indexx")
    with pytest.raises(UnknownTopic):
        await bus.admin.remove_consumer(GONE, G, "crow")


async def test_a_name_of_any_bytes(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "HEARD_OF_MS", 0)
    await bus.redis.xadd(S, {"n": "1"})
    await bus.redis.xreadgroup(G, b"\xff x", {S: ">"})
    assert [r.handed_back for r in await bus.admin.remove_consumer("\udcff x", G)] == [1]
    assert [c["pending"] for c in await bus.redis.xinfo_consumers(S, G)] == [1]


async def test_many_go_in_several_calls(bus: Bus) -> None:
    ids = await give(bus, 1_234)
    await listed(bus)
    assert [r.handed_back for r in await bus.admin.remove_consumer(GONE, G)] == [1_234]
    found = await owners(bus)
    assert set(found) == set(ids)
    assert all(owner.startswith("parked:") for owner, _ in found.values())


async def test_what_was_deleted_by_hand_is_acked_and_told(bus: Bus) -> None:
    ids = await give(bus, 4)
    await listed(bus)
    await bus.redis.xdel(S, *ids[:3])
    witness = Witness(bus)
    (done,) = await bus.admin.remove_consumer(GONE, G)
    assert (done.handed_back, done.lost) == (1, 3)
    (told,) = witness.of("delivery.lost")
    assert (told["stream"], told["group"], told["entry_ids"]) == (S, G, ids[:3])
    assert list(await owners(bus)) == ids[3:]


# --- while others are at it


async def test_what_another_worker_takes_meanwhile_is_no_sign_of_life(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await give(bus, 3)
    await listed(bus)
    release = bus.store.upkeep.release

    async def releasing(*args: Any) -> Any:
        await bus.redis.xclaim(S, G, "other", 0, ids, justid=True)
        return await release(*args)

    monkeypatch.setattr(bus.store.upkeep, "release", releasing)
    (done,) = await bus.admin.remove_consumer(GONE, G)
    assert done.handed_back == 0
    assert await names(bus) == {"other"}
    assert {owner for owner, _ in (await owners(bus)).values()} == {"other"}


@pytest.mark.parametrize("verb", ["release", "forget_consumer"])
async def test_one_that_comes_back_to_life_keeps_what_it_has_and_stays(
    bus: Bus, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped goes on, between two of the steps."""
    await give(bus, 3)
    await listed(bus)
    place = bus.store.upkeep if verb == "release" else bus.store.leases
    do = getattr(place, verb)

    async def doing(*args: Any) -> Any:
        await bus.redis.set(keys.lease(S, GONE), G)
        return await do(*args)

    monkeypatch.setattr(place, verb, doing)
    with pytest.raises(InUse, match="gone is at work on"):
        await bus.admin.remove_consumer(GONE, G)
    assert GONE in await names(bus)
    left = {owner for owner, _ in (await owners(bus)).values()}
    assert (left == {GONE}) == (verb == "release")


async def test_two_operators_remove_it_once(bus: Bus) -> None:
    await give(bus, 1_000)
    await listed(bus)
    done = await asyncio.gather(*(bus.admin.remove_consumer(GONE, G) for _ in range(3)))
    assert sum(r.handed_back for each in done for r in each) == 1_000
    assert GONE not in await names(bus)
    assert len(await owners(bus)) == 1_000


async def test_lost_answers_leave_nothing_half_done(url: str, server: EmbeddedServer) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=TOPICS) as bus:
        await prepare(bus)
        await give(bus, 3)
        await listed(bus)
        proxy.lose(b"EVALSHA", 2)
        (done,) = await bus.admin.remove_consumer(GONE, G)
        assert (proxy.lost, done.handed_back) == (2, 3)
        assert GONE not in await names(bus)
        await give(bus, 3)
        proxy.lose(b"SMEMBERS", 1)
        (done,) = await bus.admin.remove_consumer(GONE, G)
        assert (proxy.lost, done.handed_back) == (3, 3)
