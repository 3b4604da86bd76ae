"""Every way a handler can end an attempt, and what then stands on the server."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, DeadLettered, Delivery, Reject, RetryLater, Worker, event_handler
from tests.guarantees.events import STREAM, Kept, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

SOON = Backoff(base_s=0.02, factor=1.0, jitter=0.0)


async def test_every_published_event_is_handled_and_acked(backend: Backend) -> None:
    handled: list[int] = []

    @event_handler(Made, group="all")
    async def keep(event: Made) -> None:
        await asyncio.sleep(0)
        handled.append(event.n)

    async with backend.bus() as (bus, witness), Worker(bus, [keep]) as worker:
        await asyncio.gather(*(bus.publish(Made(n=n)) for n in range(300)))
        await worker.drained()
        assert sorted(handled) == list(range(300))
        assert await backend.pending(STREAM, "all") == []
        assert len(await backend.entries(STREAM)) == 300, "acked entries stay: they are the history"
        assert witness.total("delivery.acked") == 300


async def test_an_entry_is_pending_while_its_handler_runs(backend: Backend) -> None:
    """At-least-once is nothing else than this: the ack comes after the handler."""
    release = asyncio.Event()
    running = asyncio.Event()

    @event_handler(Made, group="slow")
    async def hold(event: Made) -> None:
        running.set()
        await release.wait()

    async with backend.bus() as (bus, _), Worker(bus, [hold]) as worker:
        receipt = await bus.publish(Made(n=1))
        await running.wait()
        (pending,) = await backend.pending(STREAM, "slow")
        assert pending == (receipt.entry_id, worker.name, 1)
        release.set()
        await worker.drained()
        assert await backend.pending(STREAM, "slow") == []


async def test_attempts_are_numbered_until_one_succeeds(backend: Backend) -> None:
    attempts: list[int] = []

    @event_handler(Made, group="flaky", backoff=SOON, max_attempts=5)
    async def third_time(event: Made, delivery: Delivery[Made]) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt < 3:
            raise ConnectionError("not yet")

    async with backend.bus() as (bus, witness), Worker(bus, [third_time]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        assert attempts == [1, 2, 3]
        told = witness.of("delivery.retried")
        assert [(t["attempt"], t["error_type"], t["delay_s"]) for t in told] == [
            (1, "ConnectionError", 0.02),
            (2, "ConnectionError", 0.02),
        ]
        assert await backend.dead(STREAM, "flaky") == []


async def test_a_failed_entry_waits_in_a_lane_with_its_count(backend: Backend) -> None:
    """Backoff lives in the pending list, where any tool can see it."""

    @event_handler(Made, group="later", backoff=Backoff(base_s=50, jitter=0), max_attempts=5)
    async def fail(event: Made) -> None:
        raise ValueError

    async with backend.bus() as (bus, witness), Worker(bus, [fail]):
        receipt = await bus.publish(Made(n=1))
        await eventually(lambda: witness.of("delivery.retried"))
        (pending,) = await backend.pending(STREAM, "later")
        seconds, micros = await backend.redis.time()
        lane, _, due_ms = pending.owner.partition(":")
        assert (pending.entry_id, lane, pending.deliveries) == (receipt.entry_id, "parked", 1)
        wait_s = int(due_ms) / 1000 - seconds - micros / 1e6
        assert 45 < wait_s <= 51
        assert int(due_ms) % 1000 == 0, "lanes are rounded up, so that there are few of them"


async def test_backoff_grows_between_attempts(backend: Backend) -> None:
    times: list[float] = []

    @event_handler(Made, group="patient", backoff=Backoff(base_s=0.1, factor=3.0, jitter=0.0))
    async def note(event: Made, delivery: Delivery[Made]) -> None:
        times.append(time.monotonic())
        if delivery.attempt < 3:
            raise ValueError

    async with backend.bus() as (bus, witness), Worker(bus, [note]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        first, second, third = times
        assert second - first >= 0.1
        assert third - second >= 0.3
        assert [t["delay_s"] for t in witness.of("delivery.retried")] == [
            pytest.approx(0.1),
            pytest.approx(0.3),
        ]


async def test_retries_are_prompt_not_rounded_to_the_lane(backend: Backend) -> None:
    """Ten waits of 20 ms: by the sweep and lanes of a second alone they would take over 5 s."""
    started = time.monotonic()

    @event_handler(Made, group="prompt", backoff=SOON, max_attempts=20)
    async def eleventh(event: Made, delivery: Delivery[Made]) -> None:
        if delivery.attempt < 11:
            raise ValueError

    async with backend.bus() as (bus, _), Worker(bus, [eleventh]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
    assert time.monotonic() - started < 4


async def test_lanes_leave_no_consumers_behind(backend: Backend) -> None:
    @event_handler(Made, group="tidy", backoff=SOON, breaker=None)
    async def once_more(event: Made, delivery: Delivery[Made]) -> None:
        if delivery.attempt < 2:
            raise ValueError

    async with backend.bus() as (bus, _):
        async with Worker(bus, [once_more]) as worker:
            for n in range(20):
                await bus.publish(Made(n=n))
            await worker.drained()
            assert await backend.consumers(STREAM, "tidy") == {worker.name}
        assert await backend.consumers(STREAM, "tidy") == set(), "a drained worker leaves nothing"


async def test_used_up_attempts_become_a_full_dead_letter(backend: Backend) -> None:
    @event_handler(Made, group="doomed", backoff=SOON, max_attempts=2, breaker=None)
    async def fail(event: Made) -> None:
        raise LookupError("no such shelf")

    async with backend.bus(source="/tests") as (bus, witness), Worker(bus, [fail]) as worker:
        receipt = await bus.publish(Made(n=7, text="kept"), correlation_id="c-1")
        await worker.drained()
        (letter,) = await backend.dead(STREAM, "doomed")
        (entry,) = (await backend.entries(STREAM)).values()
        assert {k: v for k, v in letter.items() if not k.startswith("dead")} == entry
        assert letter["deadreason"] == b"failed"
        assert letter["deaderror"] == b"LookupError: no such shelf"
        assert letter["deadattempts"] == b"2"
        assert letter["deadentry"].decode() == receipt.entry_id
        trace = letter["deadtraceback"].decode()
        assert 'raise LookupError("no such shelf")' in trace
        assert "bus/worker" not in trace, "a traceback shows the user's frames, not ours"
        seconds, micros = await backend.redis.time()
        now_ms = seconds * 1000 + micros // 1000
        assert now_ms - 20_000 < int(letter["deadtime"]) <= now_ms
        assert await backend.pending(STREAM, "doomed") == []
        (told,) = witness.of("delivery.dead_lettered")
        assert (told["reason"], told["attempt"], told["error_type"]) == ("failed", 2, "LookupError")


async def test_reject_dead_letters_at_the_first_attempt(backend: Backend) -> None:
    calls: list[int] = []

    @event_handler(Made, group="strict", backoff=SOON, max_attempts=5)
    async def refuse(event: Made) -> None:
        calls.append(event.n)
        raise Reject("too old to matter")

    async with backend.bus() as (bus, _), Worker(bus, [refuse]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        (letter,) = await backend.dead(STREAM, "strict")
        assert (letter["deadreason"], letter["deadattempts"]) == (b"rejected", b"1")
        assert letter["deaderror"] == b"Reject: too old to matter"
        assert calls == [1]


async def test_retry_later_uses_up_no_attempt(backend: Backend) -> None:
    attempts: list[int] = []

    @event_handler(Made, group="busy", max_attempts=2, backoff=SOON)
    async def fourth_time(event: Made, delivery: Delivery[Made]) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) < 5:
            raise RetryLater(0.02)

    async with backend.bus() as (bus, witness), Worker(bus, [fourth_time]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        assert attempts == [1] * 5
        assert await backend.dead(STREAM, "busy") == []
        assert witness.counts()["delivery.postponed"] == 4
        assert witness.counts()["delivery.retried"] == 0


async def test_a_failing_entry_holds_up_no_other(backend: Backend) -> None:
    handled: list[int] = []

    @event_handler(Made, group="mixed", concurrency=1, backoff=Backoff(base_s=30))
    async def odd_ones_fail(event: Made) -> None:
        if event.n % 2:
            raise ValueError
        handled.append(event.n)

    async with backend.bus() as (bus, _), Worker(bus, [odd_ones_fail]):
        await bus.publish_many([Made(n=n) for n in range(20)])
        await eventually(lambda: handled == list(range(0, 20, 2)))
        await eventually(lambda: _all_parked(backend, 10))


async def _all_parked(backend: Backend, count: int) -> bool:
    pending = await backend.pending(STREAM, "mixed")
    return len(pending) == count and all(p.owner.startswith("parked:") for p in pending)


# --- on_dead


async def test_on_dead_is_told_before_the_dead_letter_is_written(backend: Backend) -> None:
    told: list[tuple[str, str, Any, int]] = []
    dead_before: list[int] = []

    async def note(dead: DeadLettered, bus: Any) -> None:
        dead_before.append(len(await backend.dead(STREAM, "mourned")))
        told.append((dead.reason, dead.error.text, dead.event, dead.delivery.attempt))
        await bus.publish(Kept(n=dead.event.n))

    @event_handler(Made, group="mourned", backoff=SOON, max_attempts=2, on_dead=note, breaker=None)
    async def fail(event: Made) -> None:
        raise ValueError("why")

    async with backend.bus() as (bus, _), Worker(bus, [fail]) as worker:
        await bus.publish(Made(n=9))
        await worker.drained()
        assert told == [("failed", "why", Made(n=9), 2)]
        assert dead_before == [0]
        assert len(await backend.dead(STREAM, "mourned")) == 1
        made, kept = (await backend.entries(STREAM)).values()
        assert kept["type"] == b"promise.kept"
        assert kept["causationid"] == made["id"], "what on_dead publishes is caused by the delivery"


async def test_an_error_in_on_dead_is_told_and_the_dead_letter_goes_ahead(backend: Backend) -> None:
    async def break_down(dead: DeadLettered, bus: Any) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no tears")

    @event_handler(Made, group="cold", max_attempts=1, on_dead=break_down, breaker=None)
    async def fail(event: Made) -> None:
        raise ValueError("why")

    async with backend.bus() as (bus, witness), Worker(bus, [fail]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        (letter,) = await backend.dead(STREAM, "cold")
        assert letter["deaderror"] == b"ValueError: why"
        (told,) = witness.of("on_dead.failed")
        assert (told["error_type"], told["error"]) == ("RuntimeError", "no tears")


# --- time


async def test_a_handler_over_its_time_fails_that_attempt(backend: Backend) -> None:
    attempts: list[int] = []
    cleaned: list[int] = []

    @event_handler(Made, group="timed", timeout_s=0.1, max_attempts=2, backoff=SOON, breaker=None)
    async def never_return(event: Made, delivery: Delivery[Made]) -> None:
        attempts.append(delivery.attempt)
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(delivery.attempt)

    async with backend.bus() as (bus, _), Worker(bus, [never_return]) as worker:
        await bus.publish(Made(n=1))
        await worker.drained()
        assert attempts == cleaned == [1, 2]
        (letter,) = await backend.dead(STREAM, "timed")
        assert letter["deaderror"] == b"TimeoutError: ran longer than timeout_s = 0.1"
        assert letter["deadreason"] == b"failed"


async def test_timeouts_leave_the_other_slots_alone(backend: Backend) -> None:
    handled: list[int] = []
    stuck = asyncio.Event()

    @event_handler(Made, group="timed", timeout_s=0.3, concurrency=2, max_attempts=1, breaker=None)
    async def first_hangs(event: Made) -> None:
        if event.n == 0:
            stuck.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        handled.append(event.n)

    async with backend.bus() as (bus, _), Worker(bus, [first_hangs]) as worker:
        await bus.publish(Made(n=0))
        await stuck.wait()
        await bus.publish_many([Made(n=n) for n in range(1, 40)])
        await worker.drained()
        assert handled == list(range(1, 40))
        assert len(await backend.dead(STREAM, "timed")) == 1


async def test_a_handler_that_ignores_its_cancellation_is_named_and_may_still_finish(
    backend: Backend,
) -> None:
    release = asyncio.Event()

    @event_handler(Made, group="deaf", timeout_s=0.1, concurrency=1)
    async def ignore(event: Made) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:  # the fault under test
                continue

    async with backend.bus() as (bus, witness), Worker(bus, [ignore]) as worker:
        await bus.publish(Made(n=1))
        await eventually(lambda: witness.of("handler.stuck"))
        assert witness.of("handler.stuck")[0]["running_s"] >= 0.2
        release.set()
        await worker.drained()
        assert await backend.dead(STREAM, "deaf") == []
        # The slot works on: nothing of the old cancellations is left in it.
        await bus.publish(Made(n=2))
        await worker.drained()
        assert witness.total("delivery.acked") == 2
