"""Dead workers are forgotten, but never with what they still own, and never strangers."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Event, Topic, Worker, event_handler
from bus.streams import keys
from bus.streams.connection import ConnectionLost
from bus.streams.stream import StreamStore
from bus.worker import janitor, supervisor
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend


@pytest.fixture(autouse=True)
def quick_chores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "JANITOR_S", 0.1)


async def test_only_a_dead_worker_with_nothing_pending_is_forgotten(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    @event_handler(Asked, group="g", visibility_s=3_600)
    async def read(event: Asked) -> None: ...

    await bus.publish(Asked(n=1))
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "stranger-with-entry", {STREAM: ">"})
    for name in ("dead", "alive", "stranger"):
        await backend.redis.xgroup_createconsumer(STREAM, "g", name)
    await backend.redis.sadd(f"{STREAM}:workers", "dead", "alive", "never-read")
    await backend.redis.set(f"{STREAM}:lease:alive", "g", ex=100)
    async with Worker(bus, [read], name="me"):
        await eventually(lambda: _workers(backend, {b"me", b"alive"}))
        assert await backend.consumers(STREAM, "g") >= {"alive", "stranger", "stranger-with-entry"}
        assert "dead" not in await backend.consumers(STREAM, "g")
        assert [t["consumer"] for t in witness.of("consumer.forgotten")] == ["dead"]
        (pending,) = await backend.pending(STREAM, "g")
        assert pending.owner == "stranger-with-entry"


async def _workers(backend: Backend, names: set[bytes]) -> bool:
    return bool(await backend.redis.smembers(f"{STREAM}:workers") == names)


async def test_an_error_of_the_janitor_is_told_and_does_not_end_the_worker(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        handled.append(event.n)

    async with Worker(bus, [read]) as worker:
        await backend.redis.delete(f"{STREAM}:workers")
        await backend.redis.set(f"{STREAM}:workers", "no set")
        await eventually(lambda: witness.of("janitor.failed"))
        await backend.redis.delete(f"{STREAM}:workers")
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert handled == [1]


async def test_a_topic_of_a_class_that_is_declared_later_is_read_from_then_on(
    bus: Bus, backend: Backend
) -> None:
    """A pattern's topics are those of the classes known now; a module imported late adds some."""
    handled: list[object] = []

    @event_handler("work.*", "*.late", group="g")
    async def read(event: Event) -> None:
        handled.append(event)

    async with Worker(bus, [read], lease_s=0.6):

        class Latecomer(Event, type="tardy.late"):
            n: int

        await bus.publish(Latecomer(n=1))
        await eventually(lambda: handled == [Latecomer(n=1)])


# --- retention


async def aged(backend: Backend, count: int, age_s: int, stream: str = STREAM) -> None:
    """Add entries as another program would have, `age_s` ago."""
    seconds, _ = await backend.redis.time()
    for n in range(count):
        entry_id = f"{(seconds - age_s) * 1000 + n}-0"
        data = f'{{"n":{n}}}'.encode()
        await backend.add(stream, {"id": f"e{n}", "type": "work.asked", "data": data}, entry_id)


async def test_what_is_older_than_the_retention_goes_once_every_group_is_done(
    valkey_url: str, backend: Backend
) -> None:
    day = Topic("work", retention=timedelta(days=1))
    handled: list[int] = []
    release = asyncio.Event()

    @event_handler(Asked, group="g", concurrency=1)
    async def read(event: Asked) -> None:
        if event.n == 250:
            await release.wait()
        handled.append(event.n)

    await aged(backend, 300, age_s=3 * 86_400)
    async with Bus.connect(valkey_url, topics=[day]) as bus, Worker(bus, [read]) as worker:
        await bus.publish(Asked(n=1_000))
        # Trimmed to the floor, below `keep`: age decides, and what is needed stays.
        await eventually(lambda: _length(backend, 51))
        assert len(handled) == 250
        release.set()
        await worker.drained()
        await eventually(lambda: _length(backend, 1))
    assert len(handled) == 301


async def _length(backend: Backend, length: int, stream: str = STREAM) -> bool:
    return bool(await backend.redis.xlen(stream) == length)


async def test_one_process_per_stream_trims_by_age(valkey_url: str, backend: Backend) -> None:
    day = Topic("work", retention=timedelta(days=1))

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async with Bus.connect(valkey_url, topics=[day]) as bus, Worker(bus, [read]):
        lease = f"{STREAM}:chore:retention"
        await eventually(lambda: backend.redis.exists(lease))
        await backend.redis.set(lease, "another", px=60_000)
        await aged(backend, 5, age_s=3 * 86_400, stream="bus:{other:0}")
        await aged(backend, 5, age_s=3 * 86_400)
        seen = await backend.redis.info("commandstats")
        await eventually(lambda: _more_calls(backend, seen))
        assert await backend.redis.get(lease) == b"another"
        assert await _length(backend, 5)
        await backend.redis.delete(lease)
        await eventually(lambda: _length(backend, 0))
        assert await _length(backend, 5, "bus:{other:0}")  # no retention was declared for it


async def _more_calls(backend: Backend, before: Any) -> bool:
    """Whether the janitor has asked for a turn at least three times since."""
    now = await backend.redis.info("commandstats")
    return bool(now["cmdstat_set"]["calls"] > before["cmdstat_set"]["calls"] + 3)


# --- groups that nobody serves

NARROW = Topic("work", maxlen=110, keep=10)


async def test_groups_without_a_worker_are_named_at_start_with_their_share(
    valkey_url: str, backend: Backend
) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async with Bus.connect(valkey_url, topics=[NARROW]) as bus:
        witness = Witness(bus)
        await backend.redis.xgroup_create(STREAM, "done", "0", mkstream=True)
        await backend.redis.xgroup_create(STREAM, "forgotten", "0")
        await bus.publish_many([Asked(n=n) for n in range(40)])
        await backend.redis.xreadgroup("done", "c", {STREAM: ">"}, noack=True)
        await backend.redis.xgroup_delconsumer(STREAM, "done", "c")
        async with Worker(bus, [read]):
            told = {t["group"]: t["share"] for t in witness.of("group.unserved")}
    assert told == {"done": 0, "forgotten": 0.3}


async def test_a_group_without_a_worker_that_pins_half_of_the_room_is_an_alert(
    valkey_url: str, backend: Backend
) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    @event_handler(Asked, group="forgotten")
    async def remember(event: Asked) -> None: ...

    async with Bus.connect(valkey_url, topics=[NARROW]) as bus:
        witness = Witness(bus)
        await backend.redis.xgroup_create(STREAM, "forgotten", "0", mkstream=True)
        async with Worker(bus, [read]) as worker:
            await bus.publish_many([Asked(n=n) for n in range(59)])
            await worker.drained()
            await backend.redis.sadd(f"{STREAM}:workers", "gone")  # a sign that it has been round
            await eventually(lambda: _is_unlisted(backend))
            assert witness.of("group.pinning") == []  # 49 %
            await bus.publish(Asked(n=59))
            await eventually(lambda: witness.of("group.pinning"))
            await backend.redis.sadd(f"{STREAM}:workers", "gone")
            await eventually(lambda: _is_unlisted(backend))
            (told,) = witness.of("group.pinning")  # once
            assert (told["stream"], told["group"], told["share"]) == (STREAM, "forgotten", 0.5)
            async with Worker(bus, [remember]) as other:
                await other.drained()
                await bus.publish_many([Asked(n=n) for n in range(50)])
                await other.drained()
            await worker.drained()
            assert len(witness.of("group.pinning")) == 1


async def test_a_group_that_a_consumer_without_a_lease_reads_is_served(
    valkey_url: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other languages need not keep one; a lane that parked entries wait in reads nothing."""

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async def told(bus: Bus) -> set[str]:
        witness = Witness(bus)
        async with Worker(bus, [read]):
            return {t["group"] for t in witness.of("group.unserved")}

    async with Bus.connect(valkey_url, topics=[NARROW]) as bus:
        for group in ("foreign", "parked", "crashed"):
            await backend.redis.xgroup_create(STREAM, group, "0", mkstream=True)
        await backend.redis.xgroup_createconsumer(STREAM, "parked", "parked:5")
        await backend.redis.xgroup_createconsumer(STREAM, "crashed", "ours")
        await backend.redis.sadd(f"{STREAM}:workers", "ours")
        await bus.publish(Asked(n=1))
        await backend.redis.xreadgroup("foreign", "stranger", {STREAM: ">"})
        assert await told(bus) == {"parked", "crashed"}
        monkeypatch.setattr(janitor, "HEARD_OF_MS", 50)
        await asyncio.sleep(0.1)
        assert await told(bus) == {"parked", "crashed", "foreign"}


async def _is_unlisted(backend: Backend) -> bool:
    return not await backend.redis.sismember(f"{STREAM}:workers", "gone")


# --- keys and names that others broke

BROKEN = Topic("work", partitions=2, maxlen=110, keep=10)
SECOND = "bus:{work:1}"


async def test_a_broken_key_does_not_keep_a_worker_from_starting(
    valkey_url: str, backend: Backend
) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        handled.append(event.n)

    await backend.redis.set(SECOND, "I am a string")
    await backend.redis.xgroup_create(STREAM, "forgotten", "0", mkstream=True)
    async with Bus.connect(valkey_url, topics=[BROKEN]) as bus:
        witness = Witness(bus)
        async with Worker(bus, [read]):
            (told,) = witness.of("janitor.failed")
            assert told["error_type"] == "WrongKeyType"
            await backend.add(STREAM, {"id": "e1", "type": "work.asked", "data": b'{"n":1}'})
            await eventually(lambda: handled == [1])


async def test_another_groups_broken_inbox_does_not_keep_a_worker_from_starting(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    await backend.redis.xgroup_create(STREAM, "forgotten", "0", mkstream=True)
    await backend.redis.set(f"{STREAM}:inbox:forgotten", "I am a string")
    async with Worker(bus, [read]) as worker:
        assert witness.of("janitor.failed")[0]["error_type"] == "WrongKeyType"
        await bus.publish(Asked(n=1))
        await worker.drained()


async def test_a_server_that_goes_away_during_a_start_fails_it(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async def lost(topic: str) -> Any:
        raise ConnectionLost("connection lost: by the test", sent=True)

    await backend.redis.xgroup_create(STREAM, "forgotten", "0", mkstream=True)
    monkeypatch.setattr(bus, "backlog", lost)
    with pytest.raises(ConnectionLost):
        await Worker(bus, [read]).start()


async def test_a_broken_partition_keeps_no_chore_from_the_others(
    valkey_url: str, backend: Backend
) -> None:
    old = Topic("work", partitions=2, retention=timedelta(days=1))

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    await backend.redis.set(STREAM, "I am a string")
    await backend.redis.set(f"{STREAM}:workers", "I am a string")
    await backend.redis.sadd(f"{SECOND}:workers", "gone")
    await aged(backend, 5, age_s=3 * 86_400, stream=SECOND)
    async with Bus.connect(valkey_url, topics=[old]) as bus:
        witness = Witness(bus)
        async with Worker(bus, [read]):
            await eventually(lambda: _length(backend, 0, SECOND))
            await eventually(lambda: _is_unlisted_in(backend, SECOND))
            assert witness.of("janitor.failed")
            assert witness.of("worker.failed") == []


async def _is_unlisted_in(backend: Backend, stream: str) -> bool:
    return not await backend.redis.sismember(f"{stream}:workers", "gone")


async def test_a_partition_that_is_added_during_a_chore_does_not_end_the_worker(
    valkey_url: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = StreamStore.lengths
    looked: list[int] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    async with Bus.connect(valkey_url, topics=[NARROW]) as bus:
        witness = Witness(bus)
        worker = Worker(bus, [read])

        async def growing(self: Any, streams: Any) -> Any:
            found = await inner(self, streams)
            looked.append(len(found))
            if len(looked) < 50:
                added = keys.stream("work", len(worker._records))
                worker._records[added] = worker._records[STREAM]
            return found

        async with worker:
            monkeypatch.setattr(worker._pressure, "relieve", asyncio.Event().wait)
            monkeypatch.setattr(StreamStore, "lengths", growing)
            await eventually(lambda: len(looked) > 3)
            assert witness.of("worker.failed") == []


async def test_a_group_whose_name_is_no_text_hurts_nobody(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    """Other programs may call their groups anything; dead workers leave those as well."""
    strange = b"\xff\xfe"

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None: ...

    inbox = STREAM.encode() + b":inbox:" + strange
    for key in (STREAM, inbox):
        await backend.redis.xgroup_create(key, strange, "0", mkstream=True)
        await backend.redis.xgroup_createconsumer(key, strange, "gone")
    await backend.redis.sadd(f"{STREAM}:workers", "gone")
    async with Worker(bus, [read]) as worker:
        await eventually(lambda: _is_unlisted(backend))
        for key in (STREAM, inbox):
            assert await backend.redis.xinfo_consumers(key, strange) == []
        told = witness.of("consumer.forgotten", consumer="gone")
        assert {t["stream"] for t in told} == {STREAM, f"{STREAM}:inbox:��"}
        assert {t["group"] for t in told} == {"��"}
        await bus.publish(Asked(n=1))
        await worker.drained()
    assert witness.of("worker.failed") == witness.of("janitor.failed") == []


async def test_a_group_that_pins_little_is_no_alert_however_full_the_stream_is(
    valkey_url: str, backend: Backend
) -> None:
    release = asyncio.Event()

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        if event.n == 0:
            await release.wait()

    async with Bus.connect(valkey_url, topics=[NARROW]) as bus:
        witness = Witness(bus)
        async with Worker(bus, [read]):
            await bus.publish_many([Asked(n=n) for n in range(80)])
            await backend.redis.xgroup_create(STREAM, "forgotten", "$")
            await bus.publish_many([Asked(n=n) for n in range(80, 100)])
            for _ in range(2):
                await backend.redis.sadd(f"{STREAM}:workers", "gone")  # a sign that it has been
                await eventually(lambda: _is_unlisted(backend))
            assert witness.of("group.pinning") == []  # 10 of 100; the other one is served
            release.set()
