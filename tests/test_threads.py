"""publish_soon: from any thread, exactly once, in the order of each thread, and nothing hangs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future
from contextvars import Context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    BusClosed,
    Event,
    InvalidEvent,
    NotRunning,
    PublishTimeout,
    PublishUnknown,
    Receipt,
    Worker,
    event_handler,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from bus.embedded import EmbeddedServer

ROOT = Path(__file__).parent.parent
NOWHERE = "redis://localhost:1/0"
THREADS, EACH = 16, 400


class Struck(Event, type="thread.struck"):
    who: int
    n: int


class Followed(Event, type="thread.followed"):
    n: int


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url) as bus:
        yield bus


async def in_threads(count: int, work: Callable[[int], Any]) -> None:
    """Run `work(number)` in so many threads that begin at the same time; raise what they raise."""
    barrier = threading.Barrier(count)
    done: list[Future[Any]] = [Future() for _ in range(count)]

    def run(number: int) -> None:
        barrier.wait(20)
        try:
            done[number].set_result(work(number))
        except BaseException as error:
            done[number].set_exception(error)

    for number in range(count):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    await asyncio.gather(*map(asyncio.wrap_future, done))


async def entries(bus: Bus) -> list[tuple[str, dict[str, Any]]]:
    return [(e.entry_id, json.loads(e.data)) async for e in bus.history("thread")]


async def test_sixteen_threads_publish_each_event_once_and_in_their_own_order(bus: Bus) -> None:
    await hammer(bus)


async def test_so_they_do_in_memory() -> None:
    async with Bus.connect("memory://") as bus:
        await hammer(bus)


async def hammer(bus: Bus) -> None:
    receipts: dict[tuple[int, int], Receipt] = {}

    def strike(who: int) -> None:
        futures = [bus.publish_soon(Struck(who=who, n=n)) for n in range(EACH)]
        for n, future in enumerate(futures):
            receipts[who, n] = future.result(30)

    loop_went_round = 0
    hammering = asyncio.create_task(in_threads(THREADS, strike))
    while not hammering.done():
        await asyncio.sleep(0.001)
        loop_went_round += 1
    await hammering
    found = await entries(bus)
    assert len(found) == THREADS * EACH
    by_thread: dict[int, list[int]] = {who: [] for who in range(THREADS)}
    for entry_id, data in found:
        by_thread[data["who"]].append(data["n"])
        assert receipts[data["who"], data["n"]].entry_id == entry_id
    assert by_thread == {who: list(range(EACH)) for who in range(THREADS)}
    assert loop_went_round > 1


async def test_closing_the_bus_gives_everything_that_was_accepted_an_outcome(url: str) -> None:
    """Threads go on until they are refused; what has a receipt is there, and nothing else is."""
    accepted: dict[tuple[int, int], Future[Receipt]] = {}
    begun = threading.Event()

    def strike(who: int) -> None:
        n = 0
        while True:
            try:
                accepted[who, n] = bus.publish_soon(Struck(who=who, n=n))
            except BusClosed:
                return
            n += 1
            if n == 20:
                begun.set()
            if n % 20 == 0:
                accepted[who, n - 1].exception(30)

    async with Bus.connect(url) as bus:
        hammering = asyncio.create_task(in_threads(THREADS, strike))
        await asyncio.to_thread(begun.wait, 20)
    await hammering
    assert all(future.done() for future in accepted.values()), "nothing is left behind"
    async with Bus.connect(url) as other:
        found = [(data["who"], data["n"]) for _, data in await entries(other)]
    assert sorted(found) == sorted(who for who, f in accepted.items() if not f.exception())
    assert not any(f.exception() for f in accepted.values()), "close waits for them"


async def test_closing_the_bus_publishes_what_the_loop_has_not_looked_at_yet(url: str) -> None:
    async with Bus.connect(url) as bus:
        future = bus.publish_soon(Struck(who=0, n=1))
    assert future.result(0).entry_id
    with pytest.raises(BusClosed):
        bus.publish_soon(Struck(who=0, n=2))


async def test_it_publishes_before_the_bus_has_connected(url: str) -> None:
    bus = Bus.connect(url)
    receipt = await asyncio.to_thread(lambda: bus.publish_soon(Struck(who=0, n=1)).result(20))
    assert [entry_id for entry_id, _ in await entries(bus)] == [receipt.entry_id]
    await bus.close()


async def test_what_is_said_beside_the_event_goes_with_it(bus: Bus) -> None:
    receipt = await asyncio.wrap_future(
        bus.publish_soon(Struck(who=0, n=1), event_id="e-1", source="cron", correlation_id="c-1")
    )
    (found,) = [e async for e in bus.history("thread")]
    assert (found.event_id, found.source, found.correlation_id) == ("e-1", "cron", "c-1")
    assert receipt.event_id == "e-1"


async def test_an_error_of_publishing_is_in_the_future(bus: Bus) -> None:
    for bad in (5, Struck(who="nobody", n=1)):  # type: ignore[arg-type]
        with pytest.raises(InvalidEvent):
            await asyncio.wrap_future(bus.publish_soon(bad))  # type: ignore[arg-type]


async def test_what_a_handlers_thread_publishes_is_caused_by_its_delivery(valkey_url: str) -> None:
    @event_handler(Struck, group="follow")
    async def follow(event: Struck) -> None:
        # The loop takes both at once, and the first to wake it is not caused by anything.
        Context().run(bus.publish_soon, Followed(n=0))
        bus.publish_soon(Followed(n=1))
        await asyncio.to_thread(lambda: bus.publish_soon(Followed(n=2)).result(20))

    async with Bus.connect(valkey_url) as bus, Worker(bus, [follow]) as worker:
        struck = await bus.publish(Struck(who=0, n=1))
        await worker.drained()
        found = [e async for e in bus.history("thread", types=Followed)]
    causes = [e.causation_id for e in found]
    assert causes == [None, struck.event_id, struck.event_id]


async def test_a_future_that_was_cancelled_in_time_publishes_nothing(bus: Bus) -> None:
    futures = [bus.publish_soon(Struck(who=0, n=n)) for n in range(3)]
    assert futures[1].cancel()
    await asyncio.wrap_future(futures[2])
    with pytest.raises(CancelledError):
        futures[1].result(0)
    assert [data["n"] for _, data in await entries(bus)] == [0, 2]


# --- what is wrong with one of them


async def test_what_publish_does_not_take_is_refused_at_the_call(bus: Bus) -> None:
    with pytest.raises(TypeError, match=r"publish_soon takes causation_id, .*, not key, when"):
        bus.publish_soon(Struck(who=0, n=1), key="k", when=None)  # type: ignore[call-arg]
    assert await entries(bus) == []


async def test_a_call_that_raises_at_once_takes_no_other_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They stand in line together, and the loop takes them together."""
    async with Bus.connect("memory://") as bus:
        whole, way_in = bus._way_in.publish, bus._way_in

        def breaks(event: Event, *rest: Any) -> Any:
            if event == Struck(who=0, n=1):
                raise RuntimeError("no way in")
            return whole(event, *rest)

        monkeypatch.setattr(way_in, "publish", breaks)
        futures = [bus.publish_soon(Struck(who=0, n=n)) for n in range(3)]
    with pytest.raises(RuntimeError, match="no way in"):
        futures[1].result(0)
    assert futures[0].result(0).entry_id < futures[2].result(0).entry_id


# --- nobody to do it


def test_a_bus_that_no_loop_runs_refuses(valkey_url: str) -> None:
    bus = Bus.connect(valkey_url)
    with pytest.raises(NotRunning, match=r"Enter `async with bus`, or await bus\.ready\(\)"):
        bus.publish_soon(Struck(who=0, n=1))

    async def use() -> Receipt:
        async with bus:
            return await asyncio.to_thread(lambda: bus.publish_soon(Struck(who=0, n=1)).result(20))

    assert asyncio.run(use())
    with pytest.raises(BusClosed):
        bus.publish_soon(Struck(who=0, n=2))


async def test_a_loop_that_runs_no_more_refuses() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def use() -> Bus:
        loops.append(asyncio.get_running_loop())
        return Bus.connect(NOWHERE)

    bus = await asyncio.to_thread(lambda: asyncio.run(use()))
    assert loops[0].is_closed()
    with pytest.raises(NotRunning):
        bus.publish_soon(Struck(who=0, n=1))
    await bus.close()


def test_a_bus_made_outside_of_the_loop_publishes_in_the_one_that_asks_first() -> None:
    bus = Bus.connect("memory://")

    async def use() -> Receipt:
        return await asyncio.wrap_future(bus.publish_soon(Struck(who=0, n=1)))

    assert asyncio.run(use()).entry_id


@pytest.fixture
def stuck() -> Bus:
    """A bus that nobody closes, and that never comes to an end with what it publishes."""
    bus = Bus.connect("memory://")

    @bus.hook("hook.publish")
    async def never(event: Event) -> None:
        await asyncio.Event().wait()

    return bus


def test_what_the_loop_takes_after_it_has_cancelled_its_tasks_has_an_outcome(stuck: Bus) -> None:
    """It was asked for as the last thing the loop did; what takes it runs as the loop ends."""
    futures: list[Future[Receipt]] = []

    async def leave() -> None:
        await stuck.ready()
        this = asyncio.current_task()
        assert this is not None
        this.add_done_callback(lambda _: futures.append(stuck.publish_soon(Struck(who=0, n=1))))

    asyncio.run(leave())
    assert isinstance(futures[0].exception(0), PublishTimeout | PublishUnknown)


def test_a_thread_that_the_ending_loop_waits_for_is_refused_or_has_an_outcome(stuck: Bus) -> None:
    outcomes: list[BaseException | None] = []
    ends = threading.Event()

    def publish() -> None:
        ends.wait(20)
        try:
            future = stuck.publish_soon(Struck(who=0, n=1))
        except NotRunning as error:
            outcomes.append(error)
        else:
            outcomes.append(future.exception(20))

    async def until_the_end() -> AsyncIterator[None]:
        try:
            yield
        finally:
            ends.set()

    async def leave() -> None:
        await stuck.ready()
        asyncio.get_running_loop().run_in_executor(None, publish)
        async for _ in lasting:
            break

    lasting = until_the_end()
    asyncio.run(leave())
    assert isinstance(outcomes[0], NotRunning | PublishTimeout | PublishUnknown)


LEAVING = """
import asyncio, sys, warnings
from concurrent.futures import wait
from bus import Bus, Event

warnings.simplefilter("ignore", ResourceWarning)  # of the connection: nobody closes the bus
futures = []


class Struck(Event, type="thread.struck"):
    who: int
    n: int


async def leave(url, begun):
    bus = Bus.connect(url)
    await bus.ready()
    await asyncio.wrap_future(bus.publish_soon(Struck(who=0, n=0)))
    await bus.redis.execute_command("CLIENT PAUSE 60000 WRITE")
    futures.append(bus.publish_soon(Struck(who=0, n=1)))
    while begun and not futures[0].running():
        await asyncio.sleep(0)
    futures.append(bus.publish_soon(Struck(who=0, n=2)))


asyncio.run(leave(sys.argv[1], sys.argv[2] == "begun"))
wait(futures, timeout=10)
print(*(type(f.exception()).__name__ if f.done() else "hangs" for f in futures))
"""


@pytest.mark.parametrize(
    ("when", "outcomes"),
    [
        ("begun", {"PublishUnknown"}),
        ("in line", {"PublishUnknown", "PublishTimeout"}),
    ],
)
def test_when_the_loop_ends_without_a_close_all_futures_have_an_outcome(
    private_server: Callable[..., EmbeddedServer], tmp_path: Path, when: str, outcomes: set[str]
) -> None:
    """The server does not answer, and the loop ends under what was begun, or stands in line."""
    program = tmp_path / "leaving.py"
    program.write_text(LEAVING)
    done = subprocess.run(
        [sys.executable, program, private_server().url, when],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first in outcomes
    assert second in {"PublishUnknown", "PublishTimeout"}
    assert "never retrieved" not in done.stderr
