"""Handlers with `once=` while no server says what was handled: they stay where they are."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Bus, Event, PermissionDenied, Worker, event_handler
from bus.instrument import logging as bus_logging
from bus.streams.connection import ConnectionLost
from bus.streams.stream import StreamStore
from tests.faults.test_server_refuses import has_memory, lacks_memory
from tests.guarantees.backend import Backend
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Handler
    from tests.conftest import PrivateServer

STREAM = "bus:{mail:0}"
GROUP = "post"
HOUR = timedelta(hours=1)


class Letter(Event, type="mail.sent"):
    n: int


@pytest.fixture(params=[None, 20], ids=["single", "batch"])
def batch(request: pytest.FixtureRequest) -> int | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def backend(valkey_url: str) -> AsyncIterator[Backend]:
    backend = Backend(valkey_url)
    yield backend
    await backend.close()


def posting(ran: Counter[int], batch: int | None, **settings: Any) -> Handler[...]:
    """A handler that notes what it is called for, of one kind or the other."""
    settings = {"group": GROUP, "once": HOUR, "concurrency": 2, **settings}
    if batch is None:

        @event_handler(Letter, **settings)
        async def post(letter: Letter) -> None:
            ran[letter.n] += 1

        return post

    @event_handler(Letter, batch=batch, batch_wait_ms=10, **settings)
    async def post_many(deliveries: list[Any]) -> None:
        ran.update(d.event.n for d in deliveries)

    return post_many


class Claims:
    """What becomes of the claims, one after the other; those beyond `ends` go through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: str) -> None:
        self.ends = list(ends)
        self.asked: list[bytes] = []
        self.under_way = 0
        self.go_on = asyncio.Event()
        inner = StreamStore.claim

        async def claim(store: StreamStore, *args: Any) -> Any:
            self.asked.append(args[4])
            end = self.ends.pop(0) if self.ends else ""
            if end == "waits":
                self.under_way += 1
                await self.go_on.wait()
            if end:
                raise ConnectionLost("connection lost: by the test", sent=True)
            return await inner(store, *args)

        monkeypatch.setattr(StreamStore, "claim", claim)


async def test_a_backlog_stays_where_it_is_while_the_server_is_out_of_memory(
    private_server: PrivateServer,
    server_kind: str,
    batch: int | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = private_server(server_kind)
    ran: Counter[int] = Counter()
    handler = posting(ran, batch)
    events = 6_000
    claims = Claims(monkeypatch)
    failed_at: list[float] = []
    async with Bus.connect(server.url) as bus, Bus.connect(server.url) as out:
        bus_logging._said.clear()
        bus_logging.attach(bus.telemetry)
        bus.telemetry.attach("once.failed", lambda *_: failed_at.append(time.monotonic()))
        witness, backend = Witness(bus), Backend(server.url)
        async with Worker(bus, [handler]):
            pass  # its group is there
        await out.publish_many([Letter(n=n) for n in range(events // 2)])
        await out.publish_many([Letter(n=n) for n in range(events // 2, events)])
        lacks_memory(server)
        async with Worker(bus, [handler], name="postman") as worker:
            await eventually(lambda: len(failed_at) >= 6)
            assert failed_at[5] - failed_at[0] > 2.4, "0.1, 0.2, 0.4, 0.8, 1 s"
            assert len(claims.asked) <= len(failed_at) * 2 * (batch or 1), "one round a pause"
            standing = await backend.pending(STREAM, GROUP)
            assert {p.owner for p in standing} == {"postman"}, "nothing is parked"
            assert len(standing) <= 1_000, "the reader has stopped"
            assert {p.deliveries for p in standing} == {1}
            assert ran == {}
            counts = witness.counts()
            assert counts["delivery.postponed"] + counts["delivery.handed_back"] == 0
            assert [r.message for r in caplog.records].count("once.failed") == 1
            has_memory(server)
            await worker.drained(10)
            once = worker._consumers[0]._once
            assert once is not None
            assert not once.is_held_up
        assert ran == Counter(range(events))
        await backend.close()


async def test_what_waits_for_the_server_is_handed_back_at_a_stop(
    private_server: PrivateServer, server_kind: str, batch: int | None
) -> None:
    server = private_server(server_kind)
    ran: Counter[int] = Counter()
    handler = posting(ran, batch)
    async with Bus.connect(server.url) as bus:
        witness, backend = Witness(bus), Backend(server.url)
        async with Worker(bus, [handler]):
            pass
        await bus.publish_many([Letter(n=n) for n in range(100)])
        lacks_memory(server)
        async with Worker(bus, [handler]):
            await eventually(lambda: len(witness.of("once.failed")) >= 3)
        standing = await backend.pending(STREAM, GROUP)
        assert {(p.owner, p.deliveries) for p in standing} == {("parked:0", 0)}
        assert ran == {}
        await backend.close()


async def test_a_claim_that_is_under_way_as_the_worker_stops_is_handed_back(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, batch: int | None
) -> None:
    claims = Claims(monkeypatch, *["waits"] * 30)
    ran: Counter[int] = Counter()
    async with backend.bus() as (bus, _):
        await bus.publish_many([Letter(n=n) for n in range(30)])
        async with Worker(bus, [posting(ran, batch)]) as worker:
            await eventually(lambda: claims.under_way)
            stopping = asyncio.create_task(worker.stop())
            await eventually(lambda: worker._consumers[0]._stopping)
            claims.go_on.set()
            await stopping
    standing = await backend.pending(STREAM, GROUP)
    assert {(p.owner, p.deliveries) for p in standing} == {("parked:0", 0)}
    assert ran == {}


async def test_a_stop_gives_it_back_while_others_run_to_their_end(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(monkeypatch, "", "waits")
    running, go_on = asyncio.Event(), asyncio.Event()
    ran: list[int] = []

    @event_handler(Letter, group=GROUP, once=HOUR, concurrency=2)
    async def post(letter: Letter) -> None:
        ran.append(letter.n)
        running.set()
        await go_on.wait()

    async with backend.bus() as (bus, _), Worker(bus, [post]) as worker:
        await bus.publish(Letter(n=0))
        await running.wait()
        await bus.publish(Letter(n=1))
        await eventually(lambda: claims.under_way)
        stopping = asyncio.create_task(worker.stop())
        await eventually(lambda: worker._consumers[0]._stopping)
        claims.go_on.set()

        async def is_back() -> bool:
            return [p.owner for p in await backend.pending(STREAM, GROUP)][-1] == "parked:0"

        await eventually(is_back)
        go_on.set()
        await stopping
    assert ran == [0]


async def test_what_waits_for_the_server_is_not_handed_back_as_if_handlers_were_slow(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, batch: int | None
) -> None:
    """Nobody else could handle it, and it would come back by the lanes."""
    monkeypatch.setattr("bus.worker.consumer.WAITED_S", 0.0)
    claims = Claims(monkeypatch, *["fails"] * (batch or 1), *["waits"] * 100)
    ran: Counter[int] = Counter()
    async with backend.bus() as (bus, witness), Worker(bus, [posting(ran, batch)]) as worker:
        (consumer,) = worker._consumers
        consumer._pace._rate = 5_000.0  # it was quick so far, and reads ahead
        await bus.publish_many([Letter(n=n) for n in range(100)])
        await eventually(lambda: consumer._demand.all_busy and consumer.holding.buffer)
        consumer.look_after(asyncio.get_running_loop().time() + 100)
        assert not consumer._settler.has_work
        consumer._patience_s = 100.0  # if anybody is slow from now on, it is the machine
        claims.ends.clear()
        claims.go_on.set()
        await worker.drained()
        assert witness.of("delivery.handed_back") == []
    assert ran == Counter(range(100))


async def test_a_stray_cancellation_as_it_is_asked_ends_no_slot(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, batch: int | None
) -> None:
    """A handler's own timer, say, that comes too late."""
    inner = StreamStore.claim
    strays = 0

    async def claim(store: StreamStore, *args: Any) -> Any:
        nonlocal strays
        slot = worker._consumers[0]._slots._all[0]
        assert slot.task is not None
        if strays < 3:
            strays += 1
            slot.task.cancel()
            await asyncio.sleep(0)
        return await inner(store, *args)

    monkeypatch.setattr(StreamStore, "claim", claim)
    ran: Counter[int] = Counter()
    handler = posting(ran, batch, concurrency=1)
    async with backend.bus() as (bus, witness), Worker(bus, [handler]) as worker:
        await bus.publish_many([Letter(n=n) for n in range(30)])
        await worker.drained()
        assert witness.of("worker.failed") == []
        assert witness.of("delivery.postponed") == []
    assert (strays, ran) == (3, Counter(range(30)))


async def test_of_a_batch_those_are_handled_of_which_the_server_has_said_so(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    Claims(monkeypatch, "", "fails", "", "fails", "")
    sizes: list[list[int]] = []

    @event_handler(Letter, group=GROUP, once=HOUR, batch=5, batch_wait_ms=10, concurrency=1)
    async def post(deliveries: list[Any]) -> None:
        sizes.append([d.event.n for d in deliveries])

    async with backend.bus() as (bus, witness):
        await bus.publish_many([Letter(n=n) for n in range(5)])
        async with Worker(bus, [post]) as worker:
            await worker.drained()
        assert witness.of("delivery.postponed") == []
    assert sizes == [[0, 2, 4], [1, 3]]


async def test_a_suspect_whose_claim_failed_is_a_suspect_still(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, and however often it is put back, it has been started once more."""
    monkeypatch.setattr("bus.worker.reclaimer.SWEEP_S", 0.1)
    Claims(monkeypatch, *["fails"] * 4)
    running = most = 0
    attempts: list[int] = []

    @event_handler(Letter, group=GROUP, once=HOUR, concurrency=4, visibility_s=0.3)
    async def post(letter: Letter, delivery: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        attempts.append(delivery.attempt)
        await asyncio.sleep(0.02)
        running -= 1

    async with backend.bus() as (bus, _):
        receipts = await bus.publish_many([Letter(n=n) for n in range(4)])
        await backend.redis.xgroup_create(STREAM, GROUP, id="0")
        await backend.redis.xreadgroup(GROUP, "dead", {STREAM: ">"})
        ids = [r.entry_id for r in receipts]
        await backend.redis.xclaim(STREAM, GROUP, "dead", 0, ids, retrycount=2)
        async with Worker(bus, [post]) as worker:
            await worker.drained()
    assert (most, attempts) == (1, [3] * 4)


async def test_a_worker_that_may_not_put_marks_says_so_and_ends(
    private_server: PrivateServer, server_kind: str
) -> None:
    """No time heals that."""
    server = private_server(server_kind)
    ask(server, "ACL", "SETUSER", "clerk", "on", ">secret", "~*", "&*", "+@all", "-set")
    ran: Counter[int] = Counter()
    url = server.url.replace("redis://", "redis://clerk:secret@")
    async with Redis.from_url(server.url) as redis, Bus.connect(server.url) as out:
        async with Bus.connect(url) as bus:
            worker = Worker(bus, [posting(ran, None)])
            # Leases are kept by SET as well; the right goes once it runs.
            ask(server, "ACL", "SETUSER", "clerk", "+set")
            await worker.start()
            ask(server, "ACL", "SETUSER", "clerk", "-set")
            await out.publish(Letter(n=1))
            with pytest.raises(PermissionDenied):
                await asyncio.wait_for(worker.wait(), 10)
            await worker.stop()
        assert ran == {}
        assert (await redis.xpending(STREAM, GROUP))["pending"] == 1
