"""What a published event inherits from its cause, and the end of a chain that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Delivery, Event, EventLoop, RetryLater, Topic, Worker, event_handler
from bus.causes import inherit
from bus.config import CAUSATION_DEPTH
from bus.delivery import BatchCause, Origin
from bus.streams.codec import Headers, envelope_of
from bus.worker import supervisor
from tests.guarantees.backend import Backend
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STREAM, GROUP = "bus:{echo:0}", "echoes"
SOON = Backoff(base_s=0.01, factor=1.0, jitter=0.0)


class Called(Event, type="echo.called"):
    n: int = 0


class Answered(Event, type="answer.answered"):
    n: int = 0


@pytest.fixture
async def backend(url: str) -> AsyncIterator[Backend]:
    backend = Backend(url)
    yield backend
    await backend.close()


def delivery(**fields: str) -> Delivery[Any]:
    """An entry of these fields besides its own."""
    flat = [b"id", b"e-1", b"type", b"echo.called", b"data", b"{}"]
    flat += [part.encode() for pair in fields.items() for part in pair]
    origin = Origin(GROUP, STREAM, STREAM, None, envelope_of)  # type: ignore[arg-type]
    return Delivery(origin, b"5-0", flat, 1, 0.0)


def said(cause: Any, given: Headers | None = None) -> dict[str, str]:
    """The header fields of an event that it causes."""
    _, flat = inherit(cause, "echo.called", "k", given)
    values = (v.decode() if isinstance(v, bytes) else v for v in flat[1::2])
    return dict(zip(flat[::2], values, strict=True))  # type: ignore[arg-type]


# --- what is inherited


def test_the_first_event_of_a_chain_gives_its_name_to_all():
    assert said(delivery()) == {
        "causationdepth": "1",
        "correlationid": "e-1",
        "causationid": "e-1",
    }
    assert said(delivery(correlationid="chäin", causationid="before", causationdepth="7")) == {
        "causationdepth": "8",
        "correlationid": "chäin",
        "causationid": "e-1",
    }


def test_a_caller_may_name_another_cause_but_no_other_depth():
    given = Headers(correlation_id="mine", causation_id="other")
    assert said(delivery(causationdepth="7"), given) == {"causationdepth": "8"}


def test_an_entry_that_cannot_be_read_is_its_own_name():
    broken = delivery()
    broken.fields = [b"data", b"{}"]
    assert said(broken)["correlationid"] == "5-0"
    not_text = delivery()
    not_text.fields = [b"id", b"\xff", *not_text.fields[2:]]
    assert said(not_text)["causationid"] == "5-0"


@pytest.mark.parametrize("depth", ["many", "-1", "", "9" * 400, "3.5"])
def test_a_depth_that_no_bus_wrote_is_none(depth):
    assert said(delivery(causationdepth=depth))["causationdepth"] == "1"


def test_the_depth_ends_at_32():
    assert said(delivery(causationdepth="31"))["causationdepth"] == "32"
    for depth in ("32", "33", "999999999"):
        with pytest.raises(EventLoop, match=r"echo.called would be .*chain began with first\."):
            said(delivery(causationdepth=depth, correlationid="first"))


def test_a_batch_is_as_deep_as_its_deepest_event():
    deep = [delivery(causationdepth=str(n)) for n in (3, 31, 7)]
    assert said(BatchCause(deep)) == {"causationdepth": "32"}
    with pytest.raises(EventLoop):
        said(BatchCause([*deep, delivery(causationdepth="32")]))


def test_ids_differ_by_all_that_makes_them():
    def ids(cause: Delivery[Any]) -> list[str | None]:
        return [inherit(cause, *rest, None)[0] for rest in (("ab", "c"), ("a", "bc"), ("a", None))]

    first = delivery()
    made = ids(first) + ids(first)
    other = delivery()
    other.fields[1] = b"e-2"
    assert len({*made, *ids(other)}) == 9
    again = delivery()
    assert ids(again) + ids(again) == made


# --- loops


async def loop_of(backend: Backend, publish: Any, **settings: Any) -> dict[str, bytes]:
    """Let a handler answer each event with another; return the dead letter that ends it."""
    attempts: list[int] = []

    @event_handler(Called, group=GROUP, max_attempts=2, backoff=SOON, breaker=None, **settings)
    async def handle(event: Called, delivery: Delivery[Called]) -> None:
        attempts.append(delivery.attempt)
        assert delivery.envelope.causation_depth == event.n
        await publish(delivery, Called(n=event.n + 1))

    async with backend.bus() as (bus, witness), Worker(bus, [handle]) as worker:
        receipt = await bus.publish(Called(), correlation_id="chain")
        await worker.drained()
        assert len(witness.of("delivery.dead_lettered")) == 1
    rows = list((await backend.entries(STREAM)).values())
    assert len(rows) == CAUSATION_DEPTH + 1
    assert [row.get("causationdepth") for row in rows[1:]] == [b"%d" % n for n in range(1, 33)]
    assert {row["correlationid"] for row in rows} == {b"chain"}
    causes = [receipt.event_id.encode(), *(row["id"] for row in rows[1:])]
    assert [row["causationid"] for row in rows[1:]] == causes[:-1]
    (letter,) = await backend.dead(STREAM, GROUP)
    assert letter["causationdepth"] == b"32"
    return letter


async def in_body(delivery: Any, event: Event) -> None:
    await delivery.bus.publish(event)


async def in_body_as_list(delivery: Any, event: Event) -> None:
    await delivery.bus.publish_many([event])


async def as_effect(delivery: Any, event: Event) -> None:
    delivery.effects.publish(event)


async def in_transaction(delivery: Any, event: Event) -> None:
    async with delivery.bus.transaction() as change:
        change.publish(event)


@pytest.mark.parametrize("publish", [in_body, in_body_as_list, as_effect, in_transaction])
async def test_events_that_cause_each_other_for_ever_end_in_a_dead_letter(backend, publish):
    letter = await loop_of(backend, publish)
    assert letter["deadreason"] == b"failed"
    assert letter["deaderror"].startswith(b"EventLoop: echo.called would be event number 33")
    assert b"chain" in letter["deaderror"]


async def test_retries_of_the_links_change_neither_depth_nor_ids(backend):
    """Each fails once; one is put off before that, and another after it."""
    tried: dict[int, list[str]] = {}

    async def flaky(delivery: Any, event: Event) -> None:
        delivery.effects.publish(event)
        (sent,) = delivery.effects.sent
        times = tried.setdefault(delivery.event.n, [])
        times.append(sent.event_id)
        if (delivery.event.n, len(times)) in ((3, 1), (7, 2)):
            raise RetryLater(0.1)
        if delivery.attempt == 1:
            raise ValueError("not yet")

    await loop_of(backend, flaky)
    rows = list((await backend.entries(STREAM)).values())
    assert [len(tried[n]) for n in (2, 3, 7)] == [2, 3, 3]
    assert [set(tried[n]) for n in range(32)] == [{row["id"].decode()} for row in rows[1:]]


async def test_a_moved_entry_keeps_its_depth(backend, monkeypatch):
    """Parked, moved aside into the inbox, and parked there: it is as deep as before."""
    monkeypatch.setattr(supervisor, "PRESSURE_S", 0.05)
    depths: list[int] = []

    @event_handler(Called, group=GROUP, backoff=Backoff(base_s=1, jitter=0), breaker=None)
    async def handle(event: Called, delivery: Delivery[Called]) -> None:
        if event.n < 0:
            if delivery.attempt == 1:
                raise ValueError
            depths.append(delivery.envelope.causation_depth)
            delivery.effects.publish(Answered())

    small = Topic("echo", maxlen=100, keep=10)
    async with backend.bus(topics=[small]) as (bus, witness), Worker(bus, [handle]) as worker:
        fields = {"id": "e-9", "type": "echo.called", "data": '{"n":-1}', "causationdepth": "30"}
        await backend.add(STREAM, fields)
        await eventually(lambda: witness.of("delivery.retried"))
        await bus.publish_many([Called(n=n) for n in range(1, 90)])
        await eventually(lambda: witness.of("delivery.moved"))
        await worker.drained()
    assert depths == [30]
    ((_, answer),) = (await backend.entries("bus:{answer:0}")).items()
    assert (answer["causationdepth"], answer["causationid"]) == (b"31", b"e-9")


async def test_what_nobody_caused_has_no_depth(backend):
    async with backend.bus() as (bus, _):
        await bus.publish(Called())
        async with bus.transaction() as change:
            change.publish(Called())
        for fields in (await backend.entries(STREAM)).values():
            assert not fields.keys() & {"causationdepth", "causationid", "correlationid"}


async def test_what_a_handler_leaves_behind_begins_a_chain_of_its_own(backend):
    kept: list[Any] = []

    @event_handler(Called, group=GROUP)
    async def handle(event: Called, delivery: Delivery[Called]) -> None:
        kept.append(delivery.bus.transaction())

    async with backend.bus() as (bus, _), Worker(bus, [handle]) as worker:
        await bus.publish(Called())
        await worker.drained()
        async with kept[0] as change:
            change.publish(Answered())
    (fields,) = (await backend.entries("bus:{answer:0}")).values()
    assert "causationdepth" not in fields
