"""Events whose class this process does not know: they travel as they are, and as any other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    DeclarationError,
    Delivery,
    Event,
    EventTooLarge,
    InvalidEvent,
    Topic,
    UnknownEventType,
    Worker,
    event_handler,
    raw_event,
)
from bus.event import known_events
from bus.streams import keys
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

S = "bus:{raw:0}"


class Known(Event, type="raw.known", version=2, key="who"):
    who: str
    n: int = 0


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


async def entries(bus: Bus, stream: str = S) -> list[dict[str, str]]:
    rows = await bus.redis.xrange(stream)
    return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in rows]


async def test_the_data_goes_as_it_is(url: str) -> None:
    """To the byte: order, spaces, what stands there twice and what no float can hold."""
    data = '{"b": 1,  "a":[1.0, 1e400e0],\n"b":"é \\u0000"}'.replace(
        "1e400e0", "12345678901234567890"
    )
    async with Bus.connect(url) as bus:
        receipt = await bus.publish(raw_event("raw.strange", data))
        again = await bus.publish(raw_event("raw.strange", data.encode()))
        assert receipt.stream == again.stream == S
        assert [set(e) for e in await entries(bus)] == [{"id", "type", "data"}] * 2
        assert [e["data"] for e in await entries(bus)] == [data] * 2
        assert [e["type"] for e in await entries(bus)] == ["raw.strange"] * 2
        (one, two) = [e["id"] for e in await entries(bus)]
        assert one == receipt.event_id != two


async def test_its_version_key_and_topic_are_those_that_were_said(bus: Bus) -> None:
    await bus.topics.record("raw")
    async with Bus.connect(bus.address, topics=[Topic("elsewhere", partitions=8)]) as other:
        receipts = [
            await other.publish(
                raw_event("raw.thing", "{}", key=f"k{n}", version=3, topic="elsewhere")
            )
            for n in range(20)
        ]
        for n, receipt in enumerate(receipts):
            partition = keys.partition_of(f"k{n}", 8)
            assert receipt.stream == f"bus:{{elsewhere:{partition}}}"
        (entry, *_) = await entries(other, receipts[0].stream)
        assert (entry["v"], entry["partitionkey"], entry["data"]) == ("3", "k0", "{}")


async def test_a_handler_of_its_class_handles_it_as_any_other(bus: Bus) -> None:
    handled: list[tuple[Known, str | None]] = []

    @event_handler(Known, group="g")
    async def handle(event: Known, delivery: Delivery[Known]) -> None:
        handled.append((event, delivery.envelope.key))

    async with Worker(bus, [handle]) as worker:
        await bus.publish(raw_event("raw.known", '{"who":"a","n":7}', version=2, key="a"))
        await bus.publish(Known(who="b"))
        await worker.drained()
    assert handled == [(Known(who="a", n=7), "a"), (Known(who="b"), "b")]


async def test_what_its_class_cannot_read_is_a_dead_letter_of_the_handler(bus: Bus) -> None:
    witness = Witness(bus)

    @event_handler(Known, group="g")
    async def handle(event: Known) -> None: ...

    async with Worker(bus, [handle]) as worker:
        await bus.publish(raw_event("raw.known", '{"n":"many"}', version=2))
        await worker.drained()
        await eventually(lambda: witness.of("delivery.dead_lettered", reason="undecodable"))


async def test_it_is_published_in_every_way_that_there_is(bus: Bus) -> None:
    @event_handler(Known, group="g")
    async def handle(event: Known, delivery: Delivery[Known]) -> None:
        delivery.effects.publish(raw_event("raw.effect", '{"n":4}'))
        await bus.publish(raw_event("raw.inside", '{"n":5}'))

    await bus.publish_many([raw_event("raw.many", f'{{"n":{n}}}') for n in range(2)])
    async with bus.transaction() as change:
        change.publish(raw_event("raw.transaction", '{"n":2}'))
    async with Worker(bus, [handle]) as worker:
        await bus.publish(Known(who="x", n=3))
        await worker.drained()
    found = {e["type"]: e for e in await entries(bus)}
    assert [json.loads(e["data"])["n"] for e in await entries(bus)] == [0, 1, 2, 3, 5, 4]
    cause = found["raw.known"]["id"]
    for kind in ("raw.effect", "raw.inside"):
        assert found[kind]["causationid"] == cause
        assert found[kind]["correlationid"] == cause


async def test_history_shows_it_though_nobody_knows_its_class(bus: Bus) -> None:
    await bus.publish(raw_event("raw.mystery", '{"n":1}', key="k"))
    (envelope,) = [e async for e in bus.history("raw")]
    assert (envelope.type, envelope.data, envelope.key) == ("raw.mystery", b'{"n":1}', "k")
    with pytest.raises(UnknownEventType):
        envelope.event  # noqa: B018 - it is asked for


def test_no_class_becomes_known_by_it() -> None:
    before = known_events()
    raw_event("raw.later", "{}", version=2)
    raw_event("raw.known", "{}")
    assert known_events() == before

    class Later(Event, type="raw.later", version=2):
        n: int

    assert Later(n=1) != raw_event("raw.later", '{"n":1}', version=2)


def test_equal_ones_are_equal_and_others_are_not() -> None:
    one = raw_event("raw.one", '{"n":1}', key="k")
    assert one == raw_event("raw.one", b'{"n":1}', key="k")
    for other in (
        raw_event("raw.one", '{"n":2}', key="k"),
        raw_event("raw.one", '{"n":1}', key="l"),
        raw_event("raw.one", '{"n":1}'),
        raw_event("raw.two", '{"n":1}', key="k"),
        raw_event("raw.one", '{"n":1}', key="k", version=2),
        raw_event("raw.one", '{"n":1}', key="k", topic="else"),
    ):
        assert one != other


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "raw.x: the data is not JSON"),
        ("{", "raw.x: the data is not JSON"),
        ("{'n': 1}", "raw.x: the data is not JSON"),
        ('{"n": NaN}', "raw.x: the data is not JSON"),
        (b'{"n": "\xff"}', "raw.x: the data is not JSON"),
        ('{"n": "\ud800"}', "raw.x: the data is not JSON"),
        (b'{"n": 1}{}', "raw.x: the data is not JSON"),
        ("[" * 100_000, "raw.x: the data is not JSON"),
        ("[]", "raw.x: the data is an array, not an object"),
        ('"text"', "raw.x: the data is a text, not an object"),
        ("1.5", "raw.x: the data is a number, not an object"),
        ("true", "raw.x: the data is a truth value, not an object"),
        ("null", "raw.x: the data is null, not an object"),
    ],
    ids=range(13),
)
def test_data_that_is_no_object_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InvalidEvent, match=message):
        raw_event("raw.x", data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": ""},
        {"type": "a b"},
        {"type": "raw.*"},
        {"version": 0},
        {"version": 1.5},
        {"version": "2"},
        {"version": 1_000_001},
        {"topic": "a:b"},
        {"type": "Ω.x"},
    ],
)
def test_names_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError):
        raw_event(**{"type": "raw.x", "data": "{}"} | wrong)


async def test_the_limit_of_size_holds_for_it_too(valkey_url: str) -> None:
    async with Bus.connect(valkey_url, max_event_bytes=1_000) as bus:
        with pytest.raises(EventTooLarge):
            await bus.publish(raw_event("raw.big", json.dumps({"text": "x" * 1_000})))
        assert await bus.redis.exists(S) == 0
