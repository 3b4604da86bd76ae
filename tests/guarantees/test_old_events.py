"""Entries of two older versions are the newest class on every path by which an event is read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Delivery, Event, Reject, Worker, event_handler, upcast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.guarantees.backend import Backend
    from tests.witness import Witness

STREAM = "bus:{aged:0}"


class Bottled(Event, type="aged.bottled", version=3, key="cellar"):
    """Was `place` and `name` in version 1, and had no year before version 3."""

    cellar: str
    label: str
    year: int


@upcast(Bottled, from_version=1)
def place_becomes_cellar(data: dict[str, Any]) -> dict[str, Any]:
    return {"cellar": data["place"], "label": data["name"]}


@upcast(Bottled, from_version=2)
def the_label_tells_the_year(data: dict[str, Any]) -> dict[str, Any]:
    label, _, year = data["label"].rpartition(" ")
    return {**data, "label": label, "year": int(year)}


OLD = [
    {"id": "first", "type": "aged.bottled", "data": '{"place":"north","name":"Rioja 1964"}'},
    {
        "id": "second",
        "type": "aged.bottled",
        "data": '{"cellar":"south","label":"Port 1970"}',
        "v": "2",
    },
]
NEW = [
    Bottled(cellar="north", label="Rioja", year=1964),
    Bottled(cellar="south", label="Port", year=1970),
    Bottled(cellar="east", label="Tokaj", year=2020),
]


class Cellar:
    """A topic with entries of all three versions, and a group that can be made to refuse them."""

    def __init__(self, backend: Backend, bus: Bus, witness: Witness) -> None:
        self.backend, self.bus, self.witness = backend, bus, witness
        self.refuses = False
        self.drunk: list[Event] = []

        @event_handler(Bottled, group="drinkers", breaker=None)
        async def drink(event: Bottled) -> None:
            if self.refuses:
                raise Reject("not today")
            self.drunk.append(event)

        self.handler = drink

    async def work(self) -> list[Event]:
        self.drunk.clear()
        async with Worker(self.bus, [self.handler]) as worker:
            await worker.drained()
        return list(self.drunk)


@pytest.fixture
async def cellar(backend: Backend) -> AsyncIterator[Cellar]:
    async with backend.bus() as (bus, witness):
        cellar = Cellar(backend, bus, witness)
        await cellar.work()
        for fields in OLD:
            await backend.add(STREAM, fields)
        await bus.publish(NEW[2])
        yield cellar


async def live(cellar: Cellar) -> list[Event]:
    return await cellar.work()


async def history(cellar: Cellar) -> list[Event]:
    past = cellar.bus.history("aged", types=[Bottled], where=lambda e: e.event.year > 1900)
    found = [e async for e in past]
    assert [e.version for e in found] == [1, 2, 3]
    return [e.event for e in found]


async def backwards(cellar: Cellar) -> list[Event]:
    return [e.event async for e in cellar.bus.history("aged", reverse=True)][::-1]


async def tail(cellar: Cellar) -> list[Event]:
    found: list[Event] = []
    async with asyncio.timeout(10), cellar.bus.tail("aged", after="start") as tail:
        async for envelope in tail:
            found.append(envelope.event)
            if len(found) == len(NEW):
                return found
    raise AssertionError("the tail ended")


async def replay_into_its_group(cellar: Cellar) -> list[Event]:
    await cellar.work()
    await cellar.bus.replay("aged", to="drinkers", where=lambda e: e.event.year > 1900)
    return await cellar.work()


async def replay_to_a_function(cellar: Cellar) -> list[Event]:
    called: list[Event] = []
    await cellar.bus.replay("aged", to=called.append)
    return called


async def replay_to_a_handler(cellar: Cellar) -> list[Event]:
    await cellar.bus.replay("aged", to=cellar.handler)
    return cellar.drunk


async def published_again(cellar: Cellar) -> list[Event]:
    await cellar.work()
    await cellar.bus.replay("aged", to=cellar.bus)
    entries = list((await cellar.backend.entries(STREAM)).values())
    assert [e["v"] for e in entries[3:]] == [b"3"] * 3
    return await cellar.work()


async def dead_letters(cellar: Cellar) -> list[Event]:
    cellar.refuses = True
    await cellar.work()
    return [letter.event async for letter in cellar.bus.dead_letters("drinkers")]


async def redriven(cellar: Cellar) -> list[Event]:
    await dead_letters(cellar)
    cellar.refuses = False
    done = await cellar.bus.dead_letters("drinkers").redrive()
    assert done.redriven == 3
    return await cellar.work()


async def edited_and_redriven(cellar: Cellar) -> list[Event]:
    await dead_letters(cellar)
    cellar.refuses = False
    done = await cellar.bus.dead_letters("drinkers").redrive(edit={"label": "water"})
    assert done.redriven == 3
    events = await cellar.work()
    assert {e.label for e in events if isinstance(e, Bottled)} == {"water"}
    return [
        Bottled(cellar=e.cellar, label=n.label, year=e.year)
        for e, n in zip(events, NEW, strict=True)
        if isinstance(e, Bottled)
    ]


async def a_retry(cellar: Cellar) -> list[Event]:
    seen: list[Event] = []

    @event_handler(Bottled, group="drinkers", concurrency=1, max_attempts=2)
    async def drink(event: Bottled, delivery: Delivery[Bottled]) -> None:
        if delivery.attempt == 1:
            raise ValueError("again")
        seen.append(event)

    async with Worker(cellar.bus, [drink]) as worker:
        await worker.drained()
    return seen


PATHS = [
    live,
    a_retry,
    history,
    backwards,
    tail,
    replay_into_its_group,
    replay_to_a_function,
    replay_to_a_handler,
    published_again,
    dead_letters,
    redriven,
    edited_and_redriven,
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
async def test_old_events_are_read_by_the_new_class(
    cellar: Cellar, path: Callable[[Cellar], Awaitable[list[Event]]]
) -> None:
    found = await path(cellar)
    assert sorted(found, key=repr) == sorted(NEW, key=repr)
