"""hook.handle: asked in a worker before a handler runs; no is a dead letter, with the reason."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Bus, DeadLettered, Delivery, Event, HookRejected, Worker, event_handler
from tests.worker.events import Asked

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from bus import Handler

# Without a breaker: it would hold dead letters for a while.
SETTINGS: dict[str, Any] = {
    "backoff": Backoff(base_s=0.05, jitter=0),
    "max_attempts": 2,
    "breaker": None,
}


def of_event(handled: list[int]) -> Handler[...]:
    @event_handler(Asked, group="asks", **SETTINGS)
    async def handle(event: Asked) -> None:
        handled.append(event.n)

    return handle


def of_delivery(handled: list[int]) -> Handler[...]:
    @event_handler(Asked, group="asks", **SETTINGS)
    async def handle(event: Asked, delivery: Delivery[Asked]) -> None:
        await asyncio.sleep(0)
        assert delivery.event is event
        handled.append(event.n)

    return handle


def of_batch(handled: list[int]) -> Handler[...]:
    @event_handler(Asked, group="asks", **SETTINGS, batch=10, batch_wait_ms=0)
    async def handle(deliveries: list[Delivery[Asked]]) -> None:
        handled.extend(delivery.event.n for delivery in deliveries)

    return handle


kinds = pytest.mark.parametrize("make", [of_event, of_delivery, of_batch])


async def run(bus: Bus, handler: Handler[...], numbers: list[int]) -> list[tuple[int, str, str]]:
    """Have a worker handle these; return what became dead letters: number, reason, error."""
    async with Worker(bus, [handler]) as worker:
        await bus.publish_many([Asked(n=n) for n in numbers])
        await worker.drained()
    return [
        (letter.event.n, letter.reason, letter.error)
        async for letter in bus.dead_letters("asks", "work")
    ]


@kinds
@pytest.mark.parametrize("waits", [False, True])
async def test_a_hook_may_replace_what_the_handler_sees(bus: Bus, make: Any, waits: bool) -> None:
    @bus.hook("hook.handle", types=Asked)
    async def add(event: Asked) -> Asked | None:
        if waits:
            await asyncio.sleep(0)
        return Asked(n=event.n + 100) if event.n % 2 else None

    handled: list[int] = []
    assert await run(bus, make(handled), [1, 2, 3]) == []
    assert sorted(handled) == [2, 101, 103]
    assert [e.event.n async for e in bus.history("work")] == [1, 2, 3], "what is stored stays"  # type: ignore[attr-defined]


@kinds
async def test_a_no_is_a_dead_letter_with_the_reason_and_at_once(bus: Bus, make: Any) -> None:
    asked: list[int] = []

    @bus.hook("hook.handle")
    def check(event: Asked) -> bool:
        asked.append(event.n)
        if event.n == 3:
            raise HookRejected("three is too many")
        return event.n != 2

    handled: list[int] = []
    dead = sorted(await run(bus, make(handled), [1, 2, 3, 4]))
    assert sorted(handled) == [1, 4]
    assert sorted(asked) == [1, 2, 3, 4], "not asked again: it was no failed attempt"
    assert [(n, reason) for n, reason, _ in dead] == [(2, "rejected"), (3, "rejected")]
    assert "it returned False" in dead[0][2]
    assert "three is too many" in dead[1][2]
    assert "check" in dead[1][2]


@kinds
async def test_what_else_a_hook_raises_is_a_failed_attempt_of_that_event(
    bus: Bus, make: Any
) -> None:
    asked: list[int] = []

    @bus.hook("hook.handle")
    def fails(event: Asked) -> None:
        asked.append(event.n)
        if event.n == 2 or asked.count(1) == 1 == event.n:
            raise ZeroDivisionError("of the hook")

    handled: list[int] = []
    dead = await run(bus, make(handled), [1, 2, 3])
    assert sorted(handled) == [1, 3], "the first was tried again, and went well"
    assert sorted(asked) == [1, 1, 2, 2, 3]
    assert [(n, reason) for n, reason, _ in dead] == [(2, "failed")]
    assert "of the hook" in dead[0][2]


async def test_hooks_come_and_go_while_a_worker_runs(bus: Bus) -> None:
    handled: list[int] = []
    handler = of_event(handled)
    async with Worker(bus, [handler]) as worker:
        for n, hooked in enumerate((False, True, False)):
            hook = bus.hook("hook.handle", lambda e: Asked(n=e.n + 100)) if hooked else None
            await bus.publish(Asked(n=n))
            await worker.drained()
            if hook is not None:
                hook.close()
    assert handled == [0, 101, 2]
    before = list(bus.hooks.changed)
    async with Worker(bus, [of_event(handled)]):
        assert len(bus.hooks.changed) == len(before) + 1
    assert bus.hooks.changed == before, "a worker that has stopped is not told any more"


async def test_a_hook_counts_towards_the_timeout(bus: Bus) -> None:
    @event_handler(Asked, group="asks", timeout_s=0.1, max_attempts=1, breaker=None)
    async def handle(event: Asked) -> None: ...

    @bus.hook("hook.handle")
    async def stuck(_: Event) -> None:
        await asyncio.Event().wait()

    dead = await run(bus, handle, [1])
    assert [(n, reason) for n, reason, _ in dead] == [(1, "failed")]
    assert "timeout_s" in dead[0][2]


async def test_a_no_of_hook_publish_in_a_handler_is_its_error(bus: Bus) -> None:
    """It may be caught, and if not, it is a failed attempt: only hook.handle rejects."""

    class Told(Event, type="work.told"):
        n: int

    bus.hook("hook.publish", lambda _: False, types=Told)
    caught: list[Awaitable[None] | int] = []

    @event_handler(Asked, group="asks", max_attempts=1, breaker=None)
    async def tell(event: Asked) -> None:
        try:
            await bus.publish(Told(n=event.n))
        except HookRejected:
            caught.append(event.n)
            if event.n == 2:
                raise

    dead = await run(bus, tell, [1, 2])
    assert sorted(caught) == [1, 2]  # type: ignore[type-var]
    assert [(n, reason) for n, reason, _ in dead] == [(2, "failed")]


@pytest.mark.parametrize("batch", [None, 10])
async def test_on_dead_is_told_of_what_was_published(bus: Bus, batch: int | None) -> None:
    told: list[tuple[int, int]] = []
    seen: list[int] = []

    async def on_dead(dead: DeadLettered, _: Any) -> None:
        told.append((dead.event.n, dead.delivery.event.n))  # type: ignore[attr-defined]

    async def fails(what: Any) -> None:
        seen.extend(d.event.n for d in what) if batch else seen.append(what.n)
        raise ZeroDivisionError

    settings = {**SETTINGS, "on_dead": on_dead, "batch": batch}
    handler = event_handler(Asked, group="asks", **settings)(fails)
    bus.hook("hook.handle", lambda event: Asked(n=event.n + 100), types=Asked)
    assert [n for n, _, _ in await run(bus, handler, [1, 2])] == [1, 2]
    assert sorted(told) == [(1, 1), (2, 2)]
    assert {*seen} == {101, 102}, "asked about once in each attempt"
