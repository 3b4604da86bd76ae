"""A worker whose delivery was taken over can do no harm, whatever its handler does next."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Delivery, Reject, RetryLater, Worker, event_handler
from tests.guarantees.backend import Pending
from tests.guarantees.events import STREAM, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

GROUP = "g"


def returns(delivery: Delivery[Any]) -> None: ...


def has_effects(delivery: Delivery[Any]) -> None:
    delivery.effects.incrby("runs")


def fails(delivery: Delivery[Any]) -> None:
    raise ValueError("no")


def rejects(delivery: Delivery[Any]) -> None:
    raise Reject("no")


def waits(delivery: Delivery[Any]) -> None:
    raise RetryLater(5)


@pytest.mark.parametrize("ends", [returns, has_effects, fails, rejects, waits])
async def test_the_verdict_of_one_that_was_taken_over_is_void(backend: Backend, ends: Any) -> None:
    """Another has it now, and has begun with an attempt of its own."""
    running, go_on = asyncio.Event(), asyncio.Event()

    @event_handler(Made, group=GROUP, breaker=None)
    async def handle(event: Made, delivery: Delivery[Made]) -> None:
        running.set()
        await go_on.wait()
        ends(delivery)

    async with backend.bus() as (bus, witness):
        async with Worker(bus, [handle]):
            receipt = await bus.publish(Made(n=1))
            await running.wait()
            await backend.redis.xclaim(
                STREAM, GROUP, "thief", 0, [receipt.entry_id], retrycount=7, justid=True
            )
            go_on.set()
            await eventually(lambda: witness.of("delivery.refused", group=GROUP))
        assert await backend.pending(STREAM, GROUP) == [Pending(receipt.entry_id, "thief", 7)]
    assert await backend.dead(STREAM, GROUP) == []
    assert await backend.redis.get("runs") is None


async def test_a_renewal_steals_nothing_back(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewals come every third of the time after which anybody may take it."""
    running, go_on = asyncio.Event(), asyncio.Event()
    refused: list[bytes] = []
    inner = backend.verbs.renew

    async def noted(*args: Any) -> Any:
        renewed = await inner(*args)
        refused.extend(renewed.refused)
        return renewed

    monkeypatch.setattr(backend.verbs, "renew", noted)

    @event_handler(Made, group=GROUP, visibility_s=0.3)
    async def handle(event: Made) -> None:
        running.set()
        await go_on.wait()

    async with backend.bus() as (bus, _), Worker(bus, [handle]):
        receipt = await bus.publish(Made(n=1))
        await running.wait()
        await backend.redis.xclaim(STREAM, GROUP, "thief", 0, [receipt.entry_id], justid=True)
        await eventually(lambda: refused)
        assert [p.owner for p in await backend.pending(STREAM, GROUP)] == ["thief"]
        go_on.set()
