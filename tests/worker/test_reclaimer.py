"""What is taken from whom (a pure decision), and that it gets its turn."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Bus, Delivery, Worker, event_handler
from bus.streams.answers import Consumer, Survey
from bus.streams.stream import StreamStore
from bus.worker import reclaimer
from bus.worker.reclaimer import Plan, plan
from tests.witness import Witness, eventually
from tests.worker.events import STREAM, Asked

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

NOW_MS = 1_000_000
ME = b"me"
PLACE = ("bus:{t:0}", "g")


def survey(
    *consumers: Consumer, listed: set[bytes] = frozenset(), alive: set[bytes] = frozenset()
) -> Survey:  # type: ignore[assignment]
    return Survey(NOW_MS, frozenset(listed), frozenset(alive), {PLACE: list(consumers)})


def planned(found: Survey, *, look_at_idle: bool = False) -> Plan:
    return plan(found, PLACE, ME, 30_000, look_at_idle=look_at_idle)


def lane(due_ms: int, pending: int = 3) -> Consumer:
    return Consumer(b"parked:%d" % due_ms, pending, 0)


def test_due_lanes_are_taken_oldest_first_and_others_left() -> None:
    """What was handed back, in lane 0, counts as a second old: it must not starve retries."""
    found = survey(lane(NOW_MS), lane(0), lane(NOW_MS + 1), lane(NOW_MS - 5_000), lane(9_999))
    lanes = (b"parked:9999", b"parked:995000", b"parked:0", b"parked:1000000")
    assert planned(found) == Plan(lanes, ())


def test_a_worker_that_may_not_judge_takes_no_orphans() -> None:
    found = survey(lane(5), Consumer(b"dead", 7, 0), listed={b"dead"})
    assert plan(found, PLACE, ME, 1_000, look_at_idle=True, judge_leases=False) == Plan(
        (b"parked:5",), ()
    )


def test_empty_due_lanes_are_visited_too_so_that_they_are_deleted() -> None:
    assert planned(survey(lane(5, pending=0))).lanes == (b"parked:5",)


def test_lanes_are_ordered_by_time_not_by_name() -> None:
    found = survey(lane(999_999), lane(8))
    assert planned(found).lanes == (b"parked:8", b"parked:999999")


def test_a_dead_worker_loses_everything_whatever_its_idle_time() -> None:
    found = survey(Consumer(b"dead", 7, 0), listed={b"dead", ME}, alive={ME})
    assert planned(found).owners == ((b"dead", 0),)


def test_a_live_worker_keeps_what_it_renews() -> None:
    found = survey(Consumer(b"busy", 7, 999_999), listed={b"busy"}, alive={b"busy"})
    assert planned(found).owners == ()
    assert planned(found, look_at_idle=True).owners == ((b"busy", 30_000),)


def test_a_worker_of_another_language_is_judged_by_idle_time_alone() -> None:
    found = survey(Consumer(b"stranger", 7, 999_999))
    assert planned(found).owners == ()
    assert planned(found, look_at_idle=True).owners == ((b"stranger", 30_000),)


def test_nothing_is_asked_of_who_has_nothing() -> None:
    found = survey(Consumer(b"dead", 0, 0), Consumer(b"stranger", 0, 0), listed={b"dead"})
    assert planned(found, look_at_idle=True) == Plan((), ())


def test_the_own_lease_run_out_makes_no_orphans_of_ones_own() -> None:
    """A worker that slept knows best what it holds; only what it does not renew is taken."""
    found = survey(Consumer(ME, 7, 0), listed={ME})
    assert planned(found).owners == ()
    assert planned(found, look_at_idle=True).owners == ((ME, 30_000),)


def test_a_group_that_is_gone_has_no_plan() -> None:
    found = Survey(NOW_MS, frozenset(), frozenset(), {})
    assert planned(found, look_at_idle=True) == Plan((), ())


def test_names_that_only_look_like_lanes_are_workers() -> None:
    found = survey(
        Consumer(b"parked:soon", 2, 0), Consumer(b"parked:", 2, 0), Consumer(b"\xff\xfe", 2, 0)
    )
    assert planned(found).lanes == ()
    assert len(planned(found, look_at_idle=True).owners) == 3


# --- on a server


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)


async def park_by_hand(backend: Backend, ids: list[str], due_ms: int, group: str = "g") -> None:
    """As a worker that has died since would have left them."""
    await backend.redis.xgroup_create(STREAM, group, "0", mkstream=True)
    await backend.redis.xreadgroup(group, "gone", {STREAM: ">"}, count=len(ids))
    lane = f"parked:{due_ms}"
    await backend.redis.xclaim(STREAM, group, lane, 0, ids, retrycount=2, justid=True)


async def test_what_a_dead_worker_parked_is_taken_when_due(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    handled: list[tuple[int, int]] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        handled.append((event.n, delivery.attempt))

    receipts = await bus.publish_many([Asked(n=n) for n in range(5)])
    await park_by_hand(backend, [r.entry_id for r in receipts], due_ms=1)
    async with Worker(bus, [read]) as worker:
        await worker.drained()
        assert sorted(handled) == [(n, 3) for n in range(5)]
        assert witness.total("delivery.taken") == 5
        assert await backend.consumers(STREAM, "g") == {worker.name, "gone"}


async def test_what_is_not_due_stays(bus: Bus, backend: Backend, witness: Witness) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        handled.append(event.n)

    receipts = await bus.publish_many([Asked(n=n) for n in range(3)])
    far_ms = 99_999_999_999_000
    await park_by_hand(backend, [r.entry_id for r in receipts], due_ms=far_ms)
    async with Worker(bus, [read]):
        await bus.publish(Asked(n=3))
        await eventually(lambda: handled == [3])
        swept = f"{STREAM}:sweep:"
        for _ in range(3):  # three turns of sweeping pass
            await eventually(lambda: _exists(backend, swept))
            await eventually(lambda: _gone(backend, swept))
        assert handled == [3]
        assert {p.owner for p in await backend.pending(STREAM, "g")} == {f"parked:{far_ms}"}


async def _exists(backend: Backend, prefix: str) -> bool:
    return bool([k async for k in backend.redis.scan_iter(match=f"{prefix}*")])


async def _gone(backend: Backend, prefix: str) -> bool:
    return not await _exists(backend, prefix)


async def test_the_server_decides_whether_a_lane_is_due(bus: Bus, backend: Backend) -> None:
    """Its clock named the lane; a list made too early, or by another clock, takes nothing."""
    receipts = await bus.publish_many([Asked(n=1), Asked(n=2)])
    far_ms = 99_999_999_999_000
    await park_by_hand(backend, [r.entry_id for r in receipts], due_ms=far_ms)
    lane = f"parked:{far_ms}".encode()
    taken = await bus.store.take_due(STREAM, "g", "me", 10, [lane])
    assert (taken.entries, taken.lost) == ([], [])
    assert {p.owner for p in await backend.pending(STREAM, "g")} == {lane.decode()}


async def test_an_entry_that_a_live_worker_forgot_is_taken_when_idle(
    bus: Bus, backend: Backend, witness: Witness
) -> None:
    """Pending for a worker that lives but does not hold it: only its idle time tells."""
    handled: list[tuple[int, int]] = []

    @event_handler(Asked, group="g", visibility_s=0.4)
    async def read(event: Asked, delivery: Delivery[Asked]) -> None:
        handled.append((event.n, delivery.attempt))

    await bus.publish(Asked(n=1))
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "alive", {STREAM: ">"})
    await backend.redis.sadd(f"{STREAM}:workers", "alive")
    await backend.redis.set(f"{STREAM}:lease:alive", "g", ex=100)
    async with Worker(bus, [read]) as worker:
        await worker.drained()
    assert handled == [(1, 2)]
    assert witness.of("delivery.reclaimed")[0]["owner"] == "alive"


async def orphan(bus: Bus, backend: Backend) -> str:
    """An entry that a worker without a lease has left behind."""
    receipt = await bus.publish(Asked(n=1))
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "dead", {STREAM: ">"})
    await backend.redis.sadd(f"{STREAM}:workers", "dead")
    return receipt.entry_id


async def test_an_owner_that_comes_back_before_the_reclaim_keeps_everything(
    bus: Bus, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease is looked at again where it counts: in the script that takes."""
    inner = StreamStore.reclaim
    tried: list[bool] = []

    async def late(*args: Any) -> Any:
        await backend.redis.set(f"{STREAM}:lease:dead", "g", ex=100)
        taken = await inner(*args)
        tried.append(bool(taken.entries))
        return taken

    monkeypatch.setattr(StreamStore, "reclaim", late)

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        raise AssertionError("not ours")

    entry_id = await orphan(bus, backend)
    async with Worker(bus, [read]):
        await eventually(lambda: tried)
        assert await backend.pending(STREAM, "g") == [(entry_id, "dead", 1)]
    assert tried[0] is False


async def test_what_another_took_between_the_reclaim_and_its_start_does_not_run(
    bus: Bus, backend: Backend, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = StreamStore.start
    entry_id = await orphan(bus, backend)
    handled: list[int] = []

    async def late(*args: Any) -> Any:
        await backend.redis.xclaim(STREAM, "g", "thief", 0, [entry_id], retrycount=7, justid=True)
        return await inner(*args)

    monkeypatch.setattr(StreamStore, "start", late)

    @event_handler(Asked, group="g")
    async def read(event: Asked) -> None:
        handled.append(event.n)

    async with Worker(bus, [read]):
        await eventually(lambda: witness.of("delivery.dropped"))
        assert await backend.pending(STREAM, "g") == [(entry_id, "thief", 7)]
    assert handled == []


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_due_entries_get_a_turn_although_all_slots_are_always_busy(
    bus: Bus, backend: Backend, witness: Witness, concurrency: int
) -> None:
    """New events come faster than they are handled, for as long as the test runs."""
    late: list[int] = []
    fresh: list[int] = []

    @event_handler(Asked, group="g", concurrency=concurrency)
    async def read(event: Asked) -> None:
        (late if event.n < 0 else fresh).append(event.n)
        await asyncio.sleep(0.002)

    receipts = await bus.publish_many([Asked(n=-n) for n in range(1, 21)])
    await park_by_hand(backend, [r.entry_id for r in receipts], due_ms=1)
    await bus.publish_many([Asked(n=n) for n in range(4_000)])
    async with Worker(bus, [read], grace_s=1):
        await eventually(lambda: len(late) == 20)
        assert len(fresh) < 4_000, "it did not have to wait for the backlog"
        before = len(fresh)
        await eventually(lambda: len(fresh) > before + 10, "the backlog goes on as well")


async def test_orphans_get_a_turn_beside_a_backlog(bus: Bus, backend: Backend) -> None:
    late: list[int] = []
    fresh: list[int] = []

    @event_handler(Asked, group="g", concurrency=2, visibility_s=0.3)
    async def read(event: Asked) -> None:
        (late if event.n < 0 else fresh).append(event.n)
        await asyncio.sleep(0.002)

    await bus.publish_many([Asked(n=-n) for n in range(1, 11)])
    await backend.redis.xgroup_create(STREAM, "g", "0")
    await backend.redis.xreadgroup("g", "dead", {STREAM: ">"}, count=10)
    await backend.redis.sadd(f"{STREAM}:workers", "dead")
    await bus.publish_many([Asked(n=n) for n in range(4_000)])
    async with Worker(bus, [read], grace_s=1):
        await eventually(lambda: sorted(late) == list(range(-10, 0)))
        assert len(fresh) < 4_000


async def test_two_processes_take_turns_and_nothing_twice(
    bus: Bus, backend: Backend, valkey_url: str
) -> None:
    handled: list[int] = []

    @event_handler(Asked, group="g", concurrency=4, backoff=Backoff(base_s=0.05, jitter=0))
    async def read(event: Asked) -> None:
        handled.append(event.n)

    receipts = await bus.publish_many([Asked(n=n) for n in range(100)])
    await park_by_hand(backend, [r.entry_id for r in receipts], due_ms=1)
    async with (
        Bus.connect(valkey_url) as other_bus,
        Worker(bus, [read]) as one,
        Worker(other_bus, [read]) as two,
    ):
        await one.drained()
        await two.drained()
    assert sorted(handled) == list(range(100))
