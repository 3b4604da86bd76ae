"""What is `memory://`'s own: whose a place is, that reads wake at once, what it says it cannot do.

That it keeps what a server keeps, the suite of guarantees shows, and every test that is marked
`everywhere`.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    BusClosed,
    BusError,
    DeclarationError,
    Event,
    NotSupported,
    Worker,
    event_handler,
)
from bus.envelope import order
from bus.streams import archive, leases, stream, upkeep
from bus.streams.memory import place, publishing, store
from tests.eyes import eyes_of
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAM = "bus:{recall:0}"


class Recalled(Event, type="recall.recalled"):
    n: int


class Other(Event, type="other.happened"):
    n: int


@pytest.fixture
def name() -> Iterator[str]:
    yield "recall"
    place.forget("recall")


async def numbers(bus: Bus) -> list[int]:
    return [e.event.n async for e in bus.history("recall")]  # type: ignore[attr-defined]


# --- whose it is


async def test_a_name_is_shared_and_no_name_is_ones_own(name: str) -> None:
    async with (
        Bus.connect(f"memory://{name}") as one,
        Bus.connect(f"memory://{name}") as other,
        Bus.connect("memory://") as private,
        Bus.connect("memory://") as second,
    ):
        await one.publish(Recalled(n=1))
        await private.publish(Recalled(n=2))
        assert (await numbers(other), await numbers(private)) == ([1], [2])
        assert await numbers(second) == []


async def test_a_name_outlives_its_buses_until_it_is_forgotten(name: str) -> None:
    async with Bus.connect(f"memory://{name}") as bus:
        await bus.publish(Recalled(n=1))
    async with Bus.connect(f"memory://{name}") as bus:
        assert await numbers(bus) == [1]
    place.forget(name)
    async with Bus.connect(f"memory://{name}") as bus:
        assert await numbers(bus) == []


def test_a_name_is_checked() -> None:
    with pytest.raises(DeclarationError, match=r"name in memory:// 'a/b' is not valid"):
        Bus.connect("memory://a/b")


def test_what_one_loop_has_published_another_reads(name: str) -> None:
    async def publish() -> None:
        async with Bus.connect(f"memory://{name}") as bus:
            await bus.publish(Recalled(n=1))

    async def read() -> list[int]:
        async with Bus.connect(f"memory://{name}") as bus:
            return await numbers(bus)

    asyncio.run(publish())
    assert asyncio.run(read()) == [1]


async def test_all_that_is_published_is_in_order_whatever_the_topic() -> None:
    async with Bus.connect("memory://") as bus:
        ids = []
        for n in range(50):
            ids += [(await bus.publish(event)).entry_id for event in (Recalled(n=n), Other(n=n))]
        assert sorted(ids, key=order) == ids
        assert len(set(ids)) == 100


async def test_a_closed_bus_takes_nothing_more() -> None:
    bus = Bus.connect("memory://")
    await bus.publish(Recalled(n=1))
    await bus.close()
    with pytest.raises(BusClosed):
        await bus.publish(Recalled(n=2))
    with pytest.raises(BusClosed):
        await numbers(bus)


def test_a_forked_child_has_a_copy(name: str) -> None:
    async def publish(n: int) -> list[int]:
        async with Bus.connect(f"memory://{name}") as bus:
            await bus.publish(Recalled(n=n))
            return await numbers(bus)

    asyncio.run(publish(1))
    pid = os.fork()
    if not pid:
        os._exit(asyncio.run(publish(2)) != [1, 2])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert asyncio.run(publish(3)) == [1, 3]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from 3.12 on: there are threads
def test_a_forked_child_waits_for_no_thread_of_its_parent(name: str) -> None:
    """It is in the middle of a verb as the child is made, and another waits for news."""
    bus = Bus.connect(f"memory://{name}")
    shared = place.place_of(name)
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with shared.lock:
            held.set()
            forked.wait(20)

    async def fork() -> int:
        shared.wait_for([STREAM.encode()], place.Waiter())
        pid = os.fork()
        if not pid:
            signal.alarm(10)  # ends it
            os._exit(bool(shared._waiting) or asyncio.run(numbers_after(1)) != [1])
        return pid

    async def numbers_after(n: int) -> list[int]:
        await bus.publish(Recalled(n=n))
        return await numbers(bus)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(20)
    pid = asyncio.run(fork())
    status = os.waitpid(pid, 0)[1]
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


# --- a fault of its own


async def test_what_no_server_would_answer_reaches_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Bus.connect("memory://") as bus:
        await bus.publish(Recalled(n=1))
        monkeypatch.setattr(publishing, "append", lambda *_: 1 // 0)
        async with asyncio.timeout(5):
            with pytest.raises(BusError, match="failed, which is its own fault: Zero") as caught:
                await bus.publish(Recalled(n=2))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        monkeypatch.undo()
        await bus.publish(Recalled(n=3))
        assert await numbers(bus) == [1, 3]


# --- reads that wait


async def test_a_read_that_waits_is_given_what_comes_at_once() -> None:
    async with Bus.connect("memory://") as bus:
        await bus.store.create_groups([(STREAM, "g", "0")])
        reader = bus.store.readers(["g"])[0]
        reading = asyncio.create_task(reader.read("g", "me", [STREAM], 10, 60_000))
        await eventually(lambda: bus.store.place._waiting)  # type: ignore[attr-defined]
        began_s = time.monotonic()
        await bus.publish(Recalled(n=1))
        ((_, entries),) = await reading
        assert time.monotonic() - began_s < 1
        assert len(entries) == 1
        assert bus.store.place._waiting == {}  # type: ignore[attr-defined]


async def test_a_read_ends_by_its_time_or_when_it_is_told_and_takes_nothing() -> None:
    async with Bus.connect("memory://") as bus:
        await bus.store.create_groups([(STREAM, "g", "0")])
        reader = bus.store.readers(["g"])[0]
        assert await reader.read("g", "me", [STREAM], 10, 20) == []
        reading = asyncio.create_task(reader.read("g", "me", [STREAM], 10, 60_000))
        await eventually(lambda: bus.store.place._waiting)  # type: ignore[attr-defined]
        await reader.unblock()
        assert await asyncio.wait_for(reading, 1) == []
        await bus.publish(Recalled(n=1))
        assert (await bus.store.standing(STREAM, "g")) == (0, True)


def test_a_worker_of_another_thread_is_woken(name: str) -> None:
    """Each thread has its loop and its bus; what they share is the place."""
    handled, ready, done = list[int](), threading.Event(), threading.Event()

    async def work() -> None:
        @event_handler(Recalled, group="there")
        async def handle(event: Recalled) -> None:
            handled.append(event.n)
            if len(handled) == 100:
                done.set()

        async with Bus.connect(f"memory://{name}") as bus, Worker(bus, [handle]):
            ready.set()
            await asyncio.to_thread(done.wait, 20)

    async def publish() -> None:
        async with Bus.connect(f"memory://{name}") as bus:
            for n in range(100):
                await bus.publish(Recalled(n=n))

    worker = threading.Thread(target=asyncio.run, args=(work(),))
    worker.start()
    assert ready.wait(20)
    began_s = time.monotonic()
    asyncio.run(publish())
    assert done.wait(20)
    worker.join()
    assert sorted(handled) == list(range(100))
    assert time.monotonic() - began_s < 1.5, "woken, and not found when the read has run out"


async def test_other_tasks_come_between_a_verb_and_its_effect_and_its_answer() -> None:
    async with Bus.connect("memory://") as bus:
        story: list[Any] = []

        async def look() -> None:
            story.append(await bus.store.lengths([STREAM]))

        async def beside() -> None:
            for _ in range(3):
                story.append("turn")
                await asyncio.sleep(0)

        await asyncio.gather(look(), beside())
        assert story.index([0]) >= 2


# --- a place that one can look at


async def test_a_place_shows_what_is_where() -> None:
    @event_handler(Recalled, group="g", max_attempts=9)
    async def fail(event: Recalled) -> None:
        raise ValueError("no")

    async with Bus.connect("memory://") as bus:
        await bus.publish_many([Recalled(n=1), Recalled(n=2)])
        async with Worker(bus, [fail]) as worker:
            await eventually(lambda: "lane parked:" in str(bus.store))
            shown = str(bus.store)
        assert f"{STREAM}: 2 entries" in shown
        assert "g: delivered up to" in shown
        assert f"worker {worker.name}: " in shown
        assert "lease:" in shown
        assert "expires in" in shown
        assert repr(bus.store.place).startswith("<memory://: ")  # type: ignore[attr-defined]


async def test_what_expires_is_gone_and_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Bus.connect("memory://") as bus:
        async with bus.transaction() as change:
            change.set("brief", "x", ttl=timedelta(milliseconds=1))
            change.set("kept", "x", ttl=timedelta(hours=1))
        await eventually(lambda: not bus.store.place.exists(b"brief"))  # type: ignore[attr-defined]
        assert await eyes_of(bus).exists("kept")
        for n in range(3_000):
            bus.store.place.put(b"k%d" % n, b"x", 0)  # type: ignore[attr-defined]
        assert len(bus.store.place._values) < 2_000  # type: ignore[attr-defined]


# --- what it cannot do, and what must not be forgotten


async def test_what_only_a_server_has_is_refused_in_words() -> None:
    async with Bus.connect("memory://") as bus:
        with pytest.raises(NotSupported, match=r"no server, hence no bus\.redis"):
            _ = bus.redis
        with pytest.raises(NotSupported, match=r"bus\.embedded starts a private one"):
            await bus.admin.examine()
        with pytest.raises(NotSupported, match="hence no CLIENT"):
            await bus.store.commands.call("CLIENT", "LIST")
        with pytest.raises(NotSupported, match="hence no"):
            bus.store.commands.submit(b"PING")


@pytest.mark.parametrize("command", [["worker.py"], ["-m", "bus", "topics", "ls"]])
def test_a_program_of_its_own_refuses_it(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env={"BUS_URL": "memory://shop"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "lives within one process" in done.stderr


def test_nobody_loads_it_who_does_not_use_it() -> None:
    code = (
        "import bus, sys; bus.Bus.connect('redis://h'); print([m for m in sys.modules if M in m])"
    )
    code = code.replace("M in", "'streams.memory' in")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def runs_a_script(method: Any) -> bool:
    """Whether a method of a class for servers sends what no plain command is."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return bool(names & {"run", "packed", "submit", "submit_for"})


@pytest.mark.parametrize(
    ("for_servers", "twin"),
    [
        (stream.StreamStore, store.MemoryStore),
        (leases.Leases, store.MemoryLeases),
        (upkeep.Upkeep, store.MemoryUpkeep),
        (archive.Archive, store.MemoryArchive),
    ],
)
def test_each_verb_that_is_a_script_has_its_twin(for_servers: type, twin: type) -> None:
    scripts = {
        name
        for name, method in vars(for_servers).items()
        if inspect.isfunction(method) and name != "__init__" and runs_a_script(method)
    }
    assert scripts
    assert scripts <= vars(twin).keys()
