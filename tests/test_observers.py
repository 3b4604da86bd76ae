"""Observers are told of everything they asked for, in order, and can delay or harm nobody."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    BusClosed,
    DeclarationError,
    Delivery,
    Event,
    HookRejected,
    InvalidEvent,
    NotRunning,
    Receipt,
    Worker,
    event_handler,
)
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NOWHERE = "redis://localhost:1/0"  # nobody answers there, and nobody is asked


class Seen(Event, type="observe.seen"):
    n: int


class Other(Event, type="observe.other.kind"):
    n: int


class Elsewhere(Event, type="elsewhere.seen"):
    n: int


class Followed(Event, type="observe.followed"):
    n: int


@pytest.fixture
async def alone() -> AsyncIterator[Bus]:
    """A bus without a server."""
    bus = Bus.connect(NOWHERE)
    yield bus
    await bus.close()


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


# --- who is told of what


async def test_emit_tells_observers_and_needs_no_server(alone: Bus) -> None:
    told: list[int] = []
    alone.observe("observe.seen", lambda event: told.append(event.n))
    for n in range(3):
        alone.emit(Seen(n=n))
    assert told == [], "emit waits for nobody"
    await eventually(lambda: told == [0, 1, 2])


async def test_patterns_route_as_everywhere(alone: Bus) -> None:
    told: list[tuple[str, int]] = []
    for pattern in ("observe.*", "*.seen", "*", "observe.other.kind", Seen):
        name = pattern if isinstance(pattern, str) else pattern.__name__
        alone.observe(pattern, lambda event, name=name: told.append((name, event.n)))
    for n, cls in enumerate((Seen, Other, Elsewhere)):
        alone.emit(cls(n=n))
    await eventually(lambda: len(told) == 9)
    by_event = [{name for name, n in told if n == number} for number in range(3)]
    assert by_event == [
        {"observe.*", "*.seen", "*", "Seen"},
        {"observe.*", "*", "observe.other.kind"},
        {"*.seen", "*"},
    ]


async def test_they_are_told_once_the_publish_has_succeeded_with_its_receipt(bus: Bus) -> None:
    told: list[tuple[int, Receipt]] = []
    bus.observe("observe.*", lambda event, receipt: told.append((event.n, receipt)))
    receipt = await bus.publish(Seen(n=0))
    more = await bus.publish_many([Seen(n=1), Elsewhere(n=2), Other(n=3)])
    await eventually(lambda: len(told) == 3)
    assert told == [(0, receipt), (1, more[0]), (3, more[2])]


async def test_nobody_is_told_of_what_was_not_published(alone: Bus) -> None:
    told: list[Event] = []
    alone.observe("*", told.append)

    @alone.hook("hook.publish")
    def refuse(event: Event) -> bool:
        return False

    with pytest.raises(HookRejected):
        await alone.publish(Seen(n=1))
    refuse.close()
    with pytest.raises(InvalidEvent):
        await alone.publish(5)  # type: ignore[arg-type]
    alone.emit(Seen(n=2))
    await eventually(lambda: told == [Seen(n=2)])


async def test_they_are_told_of_transactions_by_what_came_of_them(bus: Bus) -> None:
    told: list[tuple[Event, Receipt]] = []
    bus.observe("observe.*", lambda event, receipt: told.append((event, receipt)))
    async with bus.transaction() as change:
        there = change.exists("no-such-key").equals(1)
        change.publish(Seen(n=1), when=there)
        change.publish(Seen(n=2))
    with contextlib.suppress(ZeroDivisionError):
        async with bus.transaction() as failing:
            failing.publish(Seen(n=3))
            raise ZeroDivisionError
    await bus.publish(Seen(n=4))
    await eventually(lambda: len(told) == 2)
    assert [event for event, _ in told] == [Seen(n=2), Seen(n=4)]
    assert told[0][1] == change.receipts[0]


async def test_they_are_told_of_what_handlers_publish_and_of_their_effects(bus: Bus) -> None:
    told: list[tuple[int, Receipt | None]] = []
    bus.observe("observe.followed", lambda event, receipt: told.append((event.n, receipt)))

    @event_handler(Seen, group="follow", max_attempts=2)
    async def follow(event: Seen, delivery: Delivery[Seen]) -> None:
        await bus.publish(Followed(n=event.n))
        left = delivery.effects.incrby("count", 1)
        delivery.effects.publish(Followed(n=10 + event.n))
        delivery.effects.publish(Followed(n=20 + event.n), when=left.equals(99))

    async with Worker(bus, [follow]) as worker:
        receipt = await bus.publish(Seen(n=1))
        await worker.drained()
        await eventually(lambda: len(told) == 2)
    assert receipt.entry_id
    assert told[0][0] == 1
    assert told[0][1] is not None
    assert told[1] == (11, None)


async def test_effects_that_never_took_place_are_told_to_nobody(bus: Bus) -> None:
    told: list[Event] = []
    bus.observe("observe.followed", told.append)

    @event_handler(Seen, group="fails", max_attempts=1, breaker=None)
    async def fails(event: Seen, delivery: Delivery[Seen]) -> None:
        delivery.effects.publish(Followed(n=event.n))
        raise ZeroDivisionError

    async with Worker(bus, [fails]) as worker:
        await bus.publish(Seen(n=1))
        await worker.drained()
    bus.emit(Followed(n=2))
    await eventually(lambda: told == [Followed(n=2)])


async def test_they_are_told_of_each_delivery_by_what_became_of_its_own_effects(bus: Bus) -> None:
    """Those of several deliveries are committed together, and one of them fails."""
    told: list[int] = []
    bus.observe("observe.followed", lambda event: told.append(event.n))
    await bus.redis.hset("key-0", "field", "value")

    @event_handler(Seen, group="count", max_attempts=1, breaker=None)
    async def count(event: Seen, delivery: Delivery[Seen]) -> None:
        delivery.effects.incrby(f"key-{event.n}")
        delivery.effects.publish(Followed(n=event.n))

    await bus.publish_many([Seen(n=n) for n in range(10)])
    async with Worker(bus, [count]) as worker:
        await worker.drained()
        await eventually(lambda: len(told) >= 9)
    assert sorted(told) == list(range(1, 10))
    assert [letter.reason async for letter in bus.dead_letters("count")] == ["failed"]


# --- whose trouble it is


async def test_a_stuck_observer_delays_neither_the_publisher_nor_the_others(bus: Bus) -> None:
    """Its events are the oldest that it loses; both losses and the last state are counted."""
    witness = Witness(bus)
    stuck_in, released = asyncio.Event(), asyncio.Event()
    late: list[int] = []
    prompt: list[int] = []

    async def stuck(event: Seen) -> None:
        stuck_in.set()
        await released.wait()
        late.append(event.n)

    slow = bus.observe("observe.*", stuck, maxlen=10)
    quick = bus.observe("observe.*", lambda event: prompt.append(event.n))
    await bus.publish(Seen(n=0))
    await stuck_in.wait()
    started = time.monotonic()
    for n in range(1, 101):
        await bus.publish(Seen(n=n))
    took_s = time.monotonic() - started
    await eventually(lambda: prompt == list(range(101)))
    assert took_s < 10, "a hundred publishes, and the observer is stuck for ever"
    assert late == []
    assert (slow.dropped, quick.dropped) == (90, 0)
    released.set()
    await eventually(lambda: late == [0, *range(91, 101)])
    await eventually(lambda: witness.total("observer.dropped") == 90)
    said = witness.of("observer.dropped")
    assert len(said) < 10, "not one line for each event"
    assert {fields["pattern"] for fields in said} == {"observe.*"}
    assert "stuck" in said[0]["observer"]


async def test_what_an_observer_raises_is_told_and_touches_nobody_else(alone: Bus) -> None:
    witness = Witness(alone)
    told: list[int] = []

    def raises(event: Seen) -> None:
        if event.n != 2:
            raise ZeroDivisionError(f"at {event.n}")

    async def cancels_itself(_: Seen) -> None:
        raise asyncio.CancelledError

    broken = alone.observe("observe.*", raises)
    cancelled = alone.observe("observe.*", cancels_itself)
    whole = alone.observe("observe.*", lambda event: told.append(event.n))
    for n in range(1, 4):
        alone.emit(Seen(n=n))
    await eventually(lambda: told == [1, 2, 3] and cancelled.failed == 3)
    assert (broken.failed, whole.failed) == (2, 0)
    said = witness.of("observer.failed", error_type="ZeroDivisionError")
    assert [fields["error"] for fields in said] == ["at 1", "at 3"]
    assert __file__ in said[0]["where"]
    assert "raises" in said[0]["where"]


async def test_what_is_no_common_exception_ends_no_observer(alone: Bus) -> None:
    """A test that fails within an observer; an exception that does not tell its text."""
    witness = Witness(alone)

    class Mute(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    def raises(event: Seen) -> None:
        if event.n == 1:
            pytest.fail("not so")
        if event.n == 2:
            raise Mute
        told.append(event.n)

    told: list[int] = []
    observer = alone.observe("observe.*", raises)
    for n in range(1, 4):
        alone.emit(Seen(n=n))
    await eventually(lambda: told == [3])
    assert observer.failed == 2
    said = [(f["error_type"], f["error"]) for f in witness.of("observer.failed")]
    mute = "(its text cannot be had: ZeroDivisionError)"
    assert said == [("Failed", "not so"), ("Mute", mute)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_observer_left_behind_in_a_closed_loop_goes_on_in_the_next() -> None:
    """Loops that are run by hand and cancel nothing; one observer waits, the other is at work."""
    bus = Bus.connect("memory://")
    told: list[int] = []
    begun: list[int] = []

    async def stuck_at_first(event: Seen) -> None:
        begun.append(event.n)
        await (asyncio.Event().wait() if event.n == 1 else asyncio.sleep(0))

    async def publish(n: int) -> None:
        assert (await bus.publish(Seen(n=n))).entry_id
        await eventually(lambda: told[-1:] == begun[-1:] == [n])

    async def iterate() -> None:
        async with bus.observed(Seen) as seen:
            async for _ in seen:
                pass

    async def first() -> None:
        tasks.append(asyncio.create_task(iterate()))
        await publish(1)

    async def second() -> None:
        await publish(2)
        tasks.clear()  # what was left behind is collected only now
        gc.collect()
        await publish(3)
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert [names.count(o.name) for o in observers] == [1, 1], "one event at a time, still"

    tasks: list[asyncio.Task[None]] = []
    observers = [bus.observe(Seen, lambda event: told.append(event.n))]
    observers.append(bus.observe(Seen, stuck_at_first))
    for step in (first, second, bus.close):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(step())
        tasks += asyncio.all_tasks(loop)
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined] # as intended
        loop.close()
    assert (told, begun) == ([1, 2, 3], [1, 2, 3])
    assert [o.failed + o.dropped for o in observers] == [0, 0]


async def test_an_observer_sees_one_event_at_a_time_in_the_order_of_publishing(bus: Bus) -> None:
    told: list[int] = []
    running = 0

    async def look(event: Seen) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        told.append(event.n)

    observer = bus.observe("observe.seen", look)
    receipts = await asyncio.gather(*(bus.publish(Seen(n=n)) for n in range(300)))
    await eventually(lambda: len(told) == 300)
    assert observer.failed == 0
    in_stream = sorted(range(300), key=lambda n: tuple(map(int, receipts[n].entry_id.split("-"))))
    assert told == in_stream


async def test_quick_observers_with_much_to_see_let_the_loop_go_round(alone: Bus) -> None:
    longest_s = 0.0
    ended = False

    async def heart() -> None:
        nonlocal longest_s
        while not ended:
            before = time.monotonic()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.monotonic() - before)

    def work(_: Seen) -> None:
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass

    told: list[Event] = []
    alone.observe(Seen, work)
    alone.observe(Seen, told.append)
    beating = asyncio.create_task(heart())
    for n in range(500):
        alone.emit(Seen(n=n))
    await eventually(lambda: len(told) == 500)
    ended = True
    await beating
    assert longest_s < 0.4, "500 ms of work, in turns of 5 ms"


async def test_an_observer_runs_in_the_context_it_was_made_in_and_causes_nothing(bus: Bus) -> None:
    """What the first event to be told of was caused by is not what the observer does."""
    who: ContextVar[str] = ContextVar("who")
    causes: list[tuple[str, str | None]] = []

    async def follow(event: Seen) -> None:
        receipt = await bus.publish(Followed(n=event.n))
        (published,) = [e async for e in bus.history("observe", types=Followed)]
        assert published.event_id == receipt.event_id
        causes.append((who.get(), published.causation_id))

    who.set("registered")
    bus.observe("observe.seen", follow)
    who.set("later")

    @event_handler(Elsewhere, group="start")
    async def start(event: Elsewhere) -> None:
        who.set("handler")
        bus.emit(Seen(n=event.n))

    async with Worker(bus, [start]) as worker:
        await bus.publish(Elsewhere(n=1))
        await worker.drained()
        await eventually(lambda: causes == [("registered", None)])


# --- coming and going


async def test_as_a_decorator_it_is_the_observer_and_the_function_still(alone: Bus) -> None:
    told: list[int] = []

    @alone.observe("observe.*", maxlen=5)
    def note(event: Seen) -> str:
        told.append(event.n)
        return "noted"

    assert note(Seen(n=1)) == "noted"
    assert (note.maxlen, note.dropped, note.failed, note.pattern) == (5, 0, 0, "observe.*")
    assert "note of observe.*" in repr(note)
    alone.emit(Seen(n=2))
    await eventually(lambda: told == [1, 2])
    note.close()
    note.close()
    alone.emit(Seen(n=3))
    other: list[Event] = []
    alone.observe(Seen, other.append)
    alone.emit(Seen(n=4))
    await eventually(lambda: other == [Seen(n=4)])
    assert told == [1, 2]


async def test_closing_one_that_is_stuck_ends_its_call(alone: Bus) -> None:
    stuck_in, ended = asyncio.Event(), asyncio.Event()

    async def stuck(_: Seen) -> None:
        stuck_in.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    observer = alone.observe(Seen, stuck)
    alone.emit(Seen(n=1))
    await stuck_in.wait()
    observer.close()
    await asyncio.wait_for(ended.wait(), 5)


async def test_an_observer_may_close_itself(alone: Bus) -> None:
    told: list[int] = []

    @alone.observe(Seen)
    async def once(event: Seen) -> None:
        once.close()
        await asyncio.sleep(0)
        told.append(event.n)

    alone.emit(Seen(n=1))
    alone.emit(Seen(n=2))
    await eventually(lambda: told == [1])
    assert once.failed == 0


async def test_closing_the_bus_lets_observers_see_what_they_were_told_of(valkey_url: str) -> None:
    told: list[int] = []

    async def look(event: Seen) -> None:
        await asyncio.sleep(0)
        told.append(event.n)

    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Seen(n=-1))
        bus.observe(Seen, look)
        waiting = [asyncio.create_task(bus.publish(Seen(n=n))) for n in range(50)]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert sorted(told) == list(range(50))
    with pytest.raises(BusClosed):
        bus.emit(Seen(n=1))
    with pytest.raises(BusClosed):
        bus.observe(Seen, look)


async def test_closing_the_bus_waits_a_second_for_one_that_is_stuck() -> None:
    bus = Bus.connect(NOWHERE)
    witness = Witness(bus)
    observer = bus.observe(Seen, lambda _: asyncio.Event().wait())
    for n in range(5):
        bus.emit(Seen(n=n))
    started = time.monotonic()
    await bus.close()
    assert 0.9 < time.monotonic() - started < 10
    assert observer.dropped == 4 == witness.total("observer.dropped")


async def test_an_observer_may_close_its_bus() -> None:
    bus = Bus.connect(NOWHERE)
    seen: list[int] = []

    @bus.observe(Seen)
    async def close(event: Seen) -> None:
        await bus.close()
        seen.append(event.n)

    bus.emit(Seen(n=1))
    bus.emit(Seen(n=2))
    await eventually(lambda: seen == [1])
    assert (close.dropped, close.failed) == (1, 0), "what it never looked at is counted"


FORKING = """
import asyncio, os
from bus import Bus, Event


class Seen(Event, type="observe.seen"):
    who: str


bus = Bus.connect("redis://localhost:1")
told = []
bus.observe("observe.*", lambda event: told.append(event.who))


async def emit(who):
    bus.emit(Seen(who=who))
    async with asyncio.timeout(20):
        while who not in told:
            await asyncio.sleep(0)


async def parent():
    await emit("parent")
    bus.emit(Seen(who="not yet seen"))
    pid = os.fork()
    if not pid:
        try:
            told.clear()
            asyncio.run(emit("child"))
            assert told == ["child"], told
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert (await asyncio.to_thread(os.waitpid, pid, 0))[1] == 0
    await emit("parent again")
    await bus.close()


asyncio.run(parent())
print(*told, sep=", ")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
async def test_a_forked_child_tells_its_own_and_nothing_of_its_parents(tmp_path: Path) -> None:
    program = tmp_path / "forking.py"
    program.write_text(FORKING)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "parent, not yet seen, parent again\n"


def test_a_bus_may_be_observed_in_one_event_loop_after_the_other() -> None:
    bus = Bus.connect(NOWHERE)
    told: list[int] = []

    @bus.observe(Seen)
    async def look(event: Seen) -> None:
        await asyncio.sleep(0)
        told.append(event.n)

    async def emit(n: int) -> None:
        bus.emit(Seen(n=n))
        await eventually(lambda: told and told[-1] == n)

    for n in range(3):
        asyncio.run(emit(n))
    assert told == [0, 1, 2]


async def test_emit_belongs_in_the_loop(alone: Bus) -> None:
    told: list[Event] = []
    alone.observe(Seen, told.append)
    alone.emit(Seen(n=1))
    with pytest.raises(NotRunning, match=r"loop\.call_soon_threadsafe\(bus\.emit, event\)"):
        await asyncio.to_thread(alone.emit, Seen(n=2))

    async def emit() -> None:
        alone.emit(Seen(n=3))

    errors: list[BaseException] = []

    def other_loop() -> None:
        try:
            asyncio.run(emit())
        except NotRunning as error:
            errors.append(error)

    thread = threading.Thread(target=other_loop)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert len(errors) == 1
    await asyncio.to_thread(asyncio.get_running_loop().call_soon_threadsafe, alone.emit, Seen(n=4))
    await eventually(lambda: told == [Seen(n=1), Seen(n=4)])


# --- as an iterator


async def test_as_an_iterator(alone: Bus) -> None:
    async with alone.observed("observe.*") as events:
        alone.emit(Seen(n=1))
        alone.emit(Elsewhere(n=2))
        assert await anext(events) == Seen(n=1)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one task iterates"):
            await anext(events)
        alone.emit(Other(n=3))
        assert await waiting == Other(n=3)
        assert events.dropped == 0
    alone.emit(Seen(n=4))
    assert [event async for event in events] == [], "the block has ended"


async def test_an_iterator_that_is_behind_loses_the_oldest(alone: Bus) -> None:
    witness = Witness(alone)
    async with alone.observed(Seen, maxlen=3) as events:
        for n in range(10):
            alone.emit(Seen(n=n))
        assert events.dropped == 7
        assert [(await anext(events)).n for _ in range(3)] == [7, 8, 9]  # type: ignore[attr-defined]
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        waiting.cancel()
    assert witness.total("observer.dropped") == 7


async def test_an_iterator_ends_with_the_bus() -> None:
    bus = Bus.connect(NOWHERE)
    seen: list[Event] = []

    async def iterate() -> None:
        async with bus.observed(Seen) as events:
            seen.extend([event async for event in events])

    iterating = asyncio.create_task(iterate())
    await asyncio.sleep(0)
    bus.emit(Seen(n=1))
    await bus.close()
    await asyncio.wait_for(iterating, 5)
    assert seen == [Seen(n=1)]
    with pytest.raises(BusClosed):
        await bus.observed(Seen).__aenter__()


async def test_an_iterator_is_iterated_in_its_block_and_used_once(alone: Bus) -> None:
    events = alone.observed(Seen)
    with pytest.raises(DeclarationError, match="iterate in its block"):
        async for _ in events:
            pass
    async with events:
        pass
    with pytest.raises(DeclarationError, match="used once"):
        async with events:
            pass


# --- what is refused


@pytest.mark.parametrize(
    ("pattern", "callback", "maxlen", "match"),
    [
        ("obs rve", print, 1, "type pattern"),
        ("", print, 1, "type pattern"),
        ("hook.before", print, 1, "use bus.hook"),
        (Event, print, 1, "has no type"),
        ("a.b", 5, 1, "a function of an event, not 5"),
        ("a.b", print, 0, "maxlen must be"),
        ("a.b", print, 2.5, "maxlen must be"),
        ("a.b", lambda: None, 1, r"takes \(event\) or \(event, receipt\), not \(\)"),
        ("a.b", lambda a, b, c: (a, b, c), 1, r"takes \(event\) or \(event, receipt\), not \(a"),
    ],
)
async def test_what_cannot_be_observed_is_refused(
    alone: Bus, pattern: Any, callback: Any, maxlen: Any, match: str
) -> None:
    with pytest.raises(DeclarationError, match=match):
        alone.observe(pattern, callback, maxlen=maxlen)


class Question(Event, type="hook.observe_question"):
    n: int


class NoType(Event):
    n: int


@pytest.mark.parametrize(
    ("event", "error", "match"),
    [
        (5, InvalidEvent, "told of events, not of int"),
        (NoType(n=1), DeclarationError, "has no type"),
        (Question(n=1), InvalidEvent, "ask it with bus.intervene"),
    ],
)
async def test_what_is_no_event_is_not_emitted(
    alone: Bus, event: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        alone.emit(event)
