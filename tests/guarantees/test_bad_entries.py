"""Entries that no publisher of ours would write: each gets its end, and stops nothing else."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

from bus import Delivery, RetryLater, Worker, event_handler
from bus.config import UNKNOWN_TYPE_MAX_AGE_S, UNKNOWN_TYPE_PARK_S
from tests.guarantees.events import STREAM, Kept, Made, Packed, Renewed
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend, Pending

GOOD = {"id": "g", "type": "promise.made", "data": '{"n":1}'}

UNDECODABLE: dict[str, dict[Any, Any]] = {
    "no JSON": {**GOOD, "data": "what is this"},
    "cut off": {**GOOD, "data": '{"n":1'},
    "empty data": {**GOOD, "data": ""},
    "not an object": {**GOOD, "data": "[1]"},
    "wrong field type": {**GOOD, "data": '{"n":"one"}'},
    "missing field": {**GOOD, "data": '{"text":"n is missing"}'},
    "NaN": {**GOOD, "data": '{"n":NaN}'},
    "not UTF-8": {**GOOD, "data": b'{"n":1,"text":"\xff\xfe"}'},
    "deeply nested": {**GOOD, "data": '{"n":1,"more":' + "[" * 200_000 + "]" * 200_000 + "}"},
    "surrogate": {**GOOD, "data": '{"n":1,"text":"\\ud800"}'},
    "no data": {"id": "g", "type": "promise.made"},
    "no id": {"type": "promise.made", "data": '{"n":1}'},
    "no type": {"id": "g", "data": '{"n":1}'},
    "fields of another program": {"payload": "x", "user": "y"},
    "one empty field": {"": ""},
    "type not UTF-8": {**GOOD, "type": b"promise.\xff\xfe"},
    "version not a number": {**GOOD, "v": "two"},
    "empty version": {**GOOD, "v": ""},
    "version of endless digits": {**GOOD, "v": "9" * 5000},
    "older version without a way up": {**GOOD, "type": "promise.renewed", "v": "1"},
    "unknown content type": {**GOOD, "datacontenttype": "application/xml"},
    "msgpack that says JSON": {
        **GOOD,
        "type": "promise.packed",
        "datacontenttype": "application/json",
        "data": b"\x81\xa1n\x01",
    },
    "msgpack bomb": {
        **GOOD,
        "type": "promise.packed",
        "datacontenttype": "application/msgpack",
        "data": b"\xdd" + struct.pack(">I", 2**32 - 1),
    },
    "CRLF and NUL": {
        "id\r\n": "\0",
        "type": "promise.made",
        "data": "\r\n*1\r\n$8\r\nFLUSHALL\r\n",
    },
    "too large to decode": {**GOOD, "data": b'{"n":1,"text":"' + b"x" * (8 * 1024 * 1024) + b'"}'},
}


@pytest.mark.parametrize("kind", UNDECODABLE)
async def test_an_undecodable_entry_is_dead_lettered_raw_and_stops_nothing(
    backend: Backend, kind: str
) -> None:
    handled: list[int] = []

    @event_handler(Made, Renewed, Packed, group="reader", max_attempts=5)
    async def read(event: Made | Renewed | Packed) -> None:
        handled.append(event.n)

    async with backend.bus() as (bus, witness):
        await bus.publish(Made(n=10))
        bad_id = await backend.add(STREAM, UNDECODABLE[kind])
        await bus.publish(Made(n=11))
        async with Worker(bus, [read]) as worker:
            await worker.drained()
            await bus.publish(Packed(n=12))
            await worker.drained()
        assert sorted(handled) == [10, 11, 12]
        (letter,) = await backend.dead(STREAM, "reader")
        assert letter["deadreason"] == b"undecodable"
        assert letter["deadattempts"] == b"1"
        assert letter["deadentry"].decode() == bad_id
        raw = (await backend.entries(STREAM))[bad_id]
        assert {k: letter[k] for k in raw} == raw
        assert witness.counts()["verdict.failed"] == 0


async def test_an_entry_of_thousands_of_fields_stops_nothing(backend: Backend) -> None:
    """More than a script can hand on in one XADD: the letter holds what fits, the entry stays."""
    handled: list[int] = []

    @event_handler(Made, group="reader")
    async def read(event: Made) -> None:
        handled.append(event.n)

    async with backend.bus() as (bus, _):
        bad_id = await backend.add(STREAM, {f"field{n}": "x" for n in range(20_000)})
        other_id = await backend.add(STREAM, UNDECODABLE["no JSON"])
        async with Worker(bus, [read], grace_s=0.5) as worker:
            await bus.publish(Made(n=1))
            await worker.drained(timeout_s=5)
        assert handled == [1]
        letters = await backend.dead(STREAM, "reader")
        assert [x["deadentry"].decode() for x in letters] == [bad_id, other_id]
        assert {x["deadreason"] for x in letters} == {b"undecodable"}


async def test_a_worker_survives_a_stream_of_nothing_but_bad_entries(backend: Backend) -> None:
    handled: list[int] = []

    @event_handler(Made, group="reader")
    async def read(event: Made) -> None:
        handled.append(event.n)

    async with backend.bus() as (bus, _):
        pipe = backend.redis.pipeline(transaction=False)
        for n in range(300):
            pipe.xadd(STREAM, {**GOOD, "data": f"bad {n}"})
        await pipe.execute()
        async with Worker(bus, [read]) as worker:
            await bus.publish(Made(n=1))
            await worker.drained()
        assert handled == [1]
        letters = await backend.dead(STREAM, "reader")
        assert {x["data"] for x in letters} == {b"bad %d" % n for n in range(300)}


async def test_on_dead_is_told_of_undecodable_entries_too(backend: Backend) -> None:
    told: list[tuple[str, str]] = []

    async def note(dead: Any, bus: Any) -> None:
        told.append((dead.reason, dead.delivery.entry_id.decode()))

    @event_handler(Made, group="reader", on_dead=note)
    async def read(event: Made) -> None: ...

    async with backend.bus() as (bus, _), Worker(bus, [read]) as worker:
        bad_id = await backend.add(STREAM, UNDECODABLE["no JSON"])
        await worker.drained()
        assert told == [("undecodable", bad_id)]


async def test_other_groups_decide_for_themselves(backend: Backend) -> None:
    """What one handler cannot read, another that never asked for it only skips."""

    @event_handler(Made, group="reader")
    async def read(event: Made) -> None: ...

    @event_handler(Kept, group="other")
    async def other(event: Kept) -> None: ...

    async with backend.bus() as (bus, witness), Worker(bus, [read, other]) as worker:
        await backend.add(STREAM, UNDECODABLE["wrong field type"])
        await worker.drained()
        assert len(await backend.dead(STREAM, "reader")) == 1
        assert await backend.dead(STREAM, "other") == []
        assert witness.total("delivery.skipped", group="other") == 1


async def test_types_not_asked_for_are_skipped_and_never_decoded(backend: Backend) -> None:
    handled: list[Any] = []

    @event_handler(Kept, group="choosy")
    async def read(event: Kept) -> None:
        handled.append(event)

    async with backend.bus() as (bus, witness), Worker(bus, [read]) as worker:
        await bus.publish(Made(n=1))
        await backend.add(STREAM, {**GOOD, "data": "this is no JSON"})
        await backend.add(STREAM, {**GOOD, "type": "nobody.knows.this"})
        await bus.publish(Kept(n=2))
        await worker.drained()
        assert handled == [Kept(n=2)]
        assert witness.total("delivery.skipped") == 3
        assert await backend.dead(STREAM, "choosy") == []


# --- types that only a newer program knows


UNKNOWN = [
    pytest.param({**GOOD, "type": "promise.of_tomorrow"}, id="unknown type"),
    pytest.param({**GOOD, "v": "7"}, id="newer version"),
]


@pytest.mark.parametrize("fields", UNKNOWN)
async def test_a_type_of_tomorrow_waits_for_its_deployment(
    backend: Backend, fields: dict[str, str]
) -> None:
    handled: list[int] = []

    @event_handler("promise.*", group="old-release")
    async def read(event: Any) -> None:
        handled.append(event.n)

    async with backend.bus() as (bus, witness), Worker(bus, [read]):
        entry_id = await backend.add(STREAM, fields)
        await bus.publish(Made(n=5))
        await eventually(lambda: handled == [5])
        (told,) = await eventually(lambda: witness.of("delivery.postponed"))
        assert told["delay_s"] == UNKNOWN_TYPE_PARK_S
        assert fields["type"] in told["reason"]
        (pending,) = await eventually(lambda: _if_one_is_pending(backend))
        assert pending.entry_id == entry_id
        assert pending.owner.startswith("parked:")
        assert pending.deliveries == 0, "waiting uses up no attempt"
        assert await backend.dead(STREAM, "old-release") == []


async def _if_one_is_pending(backend: Backend) -> list[Pending]:
    pending = await backend.pending(STREAM, "old-release")
    return pending if len(pending) == 1 else []


@pytest.mark.parametrize("fields", UNKNOWN)
async def test_a_type_that_stays_unknown_for_a_day_is_dead_lettered(
    backend: Backend, fields: dict[str, str]
) -> None:
    @event_handler("promise.*", group="old-release")
    async def read(event: Any) -> None: ...

    yesterday_ms = int((time.time() - UNKNOWN_TYPE_MAX_AGE_S - 60) * 1000)
    today_ms = yesterday_ms + 3_600_000
    old_id = await backend.add(STREAM, fields, f"{yesterday_ms}-0")
    young_id = await backend.add(STREAM, fields, f"{today_ms}-0")
    async with backend.bus() as (bus, witness), Worker(bus, [read]):
        await eventually(lambda: witness.of("delivery.dead_lettered"))
        await eventually(lambda: witness.of("delivery.postponed"))
        (letter,) = await backend.dead(STREAM, "old-release")
        assert letter["deadreason"] == b"newer-version"
        assert letter["deadentry"].decode() == old_id
        (pending,) = await eventually(lambda: _if_one_is_pending(backend))
        assert pending.entry_id == young_id


async def test_what_waited_for_its_deployment_is_handled_after_it(
    backend: Backend, quick_sweeps: None
) -> None:
    """The next release knows the class and takes the entry from its lane, as attempt 1."""
    handled: list[tuple[int, int]] = []

    @event_handler("promise.*", group="release")
    async def old(event: Any) -> None:
        raise RetryLater(
            0.3
        )  # stands for "not known here": the same parking, without the 5 minutes

    @event_handler("promise.*", group="release")
    async def new(event: Any, delivery: Delivery[Any]) -> None:
        handled.append((event.n, delivery.attempt))

    async with backend.bus() as (bus, witness):
        async with Worker(bus, [old]):
            await bus.publish(Made(n=3))
            await eventually(lambda: witness.of("delivery.postponed"))
        async with Worker(bus, [new]) as worker:
            await worker.drained()
        assert handled == [(3, 1)]


def test_the_corpus_is_what_it_says() -> None:
    """A good entry that slipped in would be a hole in the suite."""
    assert all(fields != GOOD for fields in UNDECODABLE.values())
