"""What `bus.testing` gives: handlers run dry, and what was published."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Delivery, Event, RetryLater, event_handler
from bus.testing import HandlersFailed, drained, published

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.everywhere


class Planted(Event, type="tree.planted", key="kind"):
    kind: str
    n: int = 0


class Felled(Event, type="tree.felled", key="kind"):
    kind: str


class Sold(Event, type="wood.sold"):
    kind: str
    left: int = 0


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


@event_handler(Planted, group="fell")
async def fell(event: Planted, delivery: Delivery[Planted]) -> None:
    if event.kind == "iron":
        raise ValueError("the axe is blunt")
    if event.kind == "hard" and delivery.attempt < 4:
        raise ValueError("once more")
    await delivery.bus.publish(Felled(kind=event.kind))


@event_handler("tree.*", group="chain")
async def chain(event: Event, delivery: Delivery[Any]) -> None:
    """Three more events, each by another delivery."""
    if isinstance(event, Felled):
        delivery.effects.publish(Sold(kind=event.kind, left=3))


@event_handler(Sold, group="sell")
async def sell(event: Sold, delivery: Delivery[Sold]) -> None:
    if event.left:
        await asyncio.sleep(0.001)
        delivery.effects.publish(Sold(kind=event.kind, left=event.left - 1))


async def test_what_was_published_by_class_type_and_pattern_oldest_first(bus: Bus) -> None:
    assert await published(bus) == []
    for event in (Planted(kind="oak"), Sold(kind="elm"), Felled(kind="oak"), Planted(kind="ash")):
        await bus.publish(event)
    assert await published(bus, Planted) == [Planted(kind="oak"), Planted(kind="ash")]
    assert await published(bus, "tree.felled") == [Felled(kind="oak")]
    trees = [Planted(kind="oak"), Felled(kind="oak"), Planted(kind="ash")]
    assert await published(bus, "tree.*") == trees
    # Of one millisecond, those of two topics are in no order on a server.
    others = await published(bus, Sold, Felled)
    assert sorted(map(repr, others)) == ["Felled(kind='oak')", "Sold(kind='elm', left=0)"]
    assert len(await published(bus)) == 4


async def test_handlers_run_until_nothing_is_left_what_they_publish_included(bus: Bus) -> None:
    for n in range(20):
        await bus.publish(Planted(kind="oak", n=n))
    assert await drained(bus, sell, chain, fell) == []
    assert len(await published(bus, Felled)) == 20
    assert [e.left for e in await published(bus, Sold)].count(0) == 20
    assert await drained(bus, sell, chain, fell) == [], "nothing is left, and nothing is wrong"
    assert len(await published(bus, Sold)) == 80


async def test_retries_are_not_waited_for(bus: Bus) -> None:
    """With the handler's own backoff they would take 3.5 to 7 seconds."""
    await bus.publish(Planted(kind="hard"))
    await drained(bus, fell, timeout_s=3)
    assert await published(bus, Felled) == [Felled(kind="hard")]


async def test_dead_letters_are_an_error_with_their_tracebacks(bus: Bus) -> None:
    await bus.publish_many([Planted(kind="iron"), Planted(kind="oak")])
    with pytest.raises(HandlersFailed, match="the axe is blunt") as raised:
        await drained(bus, fell)
    (letter,) = raised.value.letters
    assert letter.event == Planted(kind="iron")
    assert "in fell" in str(raised.value)
    assert await published(bus, Felled) == [Felled(kind="oak")], "the other was handled"


async def test_dead_letters_that_may_be_are_returned_and_old_ones_are_not(bus: Bus) -> None:
    await bus.publish(Planted(kind="iron", n=1))
    (first,) = await drained(bus, fell, dead=True)
    assert (first.reason, first.attempts) == ("failed", 5)
    assert await drained(bus, fell) == []
    await bus.publish(Planted(kind="iron", n=2))
    (second,) = await drained(bus, fell, dead=True)
    assert second.event == Planted(kind="iron", n=2)


async def test_what_cannot_be_drained_in_time_is_told(bus: Bus) -> None:
    @event_handler(Planted, group="later")
    async def later(event: Planted) -> None:
        raise RetryLater(3600)

    await bus.publish(Planted(kind="oak"))
    with pytest.raises(TimeoutError, match=r"later has 1 pending in bus:\{tree:0\}"):
        await drained(bus, later, timeout_s=0.2)


async def test_a_lifespan_gives_the_state(bus: Bus) -> None:
    seen: list[str] = []

    @event_handler(Planted, group="stately")
    async def look(event: Planted, delivery: Delivery[Planted]) -> None:
        seen.append(delivery.state)

    @asynccontextmanager
    async def lifespan(bus: Any) -> AsyncIterator[str]:
        yield "the state"

    await bus.publish(Planted(kind="oak"))
    await drained(bus, look, lifespan=lifespan)
    assert seen == ["the state"]
