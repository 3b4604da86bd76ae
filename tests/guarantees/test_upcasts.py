"""Entries that old programs have written, on a server: upcast by a worker, or waiting for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bus import Backoff, Delivery, Event, Topic, Undecodable, Worker, event_handler, upcast
from bus.config import UNKNOWN_TYPE_PARK_S
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.guarantees.backend import Backend

STREAMS = ("bus:{pressed:0}", "bus:{pressed:1}")
MSGPACK = "application/msgpack"


class Pressed(Event, type="pressed.made", version=3, key="label"):
    label: str
    title: str
    sides: int


class _Fault:
    """What the second step does wrong while a test wants it to."""

    raises: BaseException | None = None


@upcast(Pressed, from_version=1)
def band_becomes_label(data: dict[str, Any]) -> dict[str, Any]:
    data["label"] = data.pop("band")
    return data


@upcast(Pressed, from_version=2)
def sides_are_counted(data: dict[str, Any]) -> dict[str, Any]:
    if _Fault.raises is not None:
        raise _Fault.raises
    return {**data, "sides": len(data["tracks"])}


@pytest.fixture
def fault() -> Iterator[type[_Fault]]:
    yield _Fault
    _Fault.raises = None


def entry(data: dict[str, Any], version: int = 1, **more: str) -> dict[str, Any]:
    return {
        "id": f"e-{version}",
        "type": "pressed.made",
        "data": msgspec.json.encode(data),
        **({"v": str(version)} if version > 1 else {}),
        **more,
    }


V1 = {"band": "Can", "title": "Ege Bamyasi", "tracks": ["a", "b"]}
V2 = {"label": "Neu", "title": "Neu! 75", "tracks": ["a"]}
V3 = {"label": "Faust", "title": "IV", "sides": 4}
EVENTS = [
    Pressed(label="Can", title="Ege Bamyasi", sides=2),
    Pressed(label="Neu", title="Neu! 75", sides=1),
    Pressed(label="Faust", title="IV", sides=4),
]


def packed(data: dict[str, Any], version: int) -> dict[str, Any]:
    fields = entry(data, version, datacontenttype=MSGPACK)
    return {**fields, "data": msgspec.msgpack.encode(data)}


async def test_all_versions_are_one_class_live_after_a_retry_and_in_history(
    backend: Backend,
) -> None:
    """In either encoding. An entry stays where it is and what it is, also if its key is renamed."""
    seen: list[tuple[Event, int, int, str | None]] = []

    @event_handler(Pressed, group="ears", backoff=Backoff(base_s=0.01, jitter=0), breaker=None)
    async def listen(event: Pressed, delivery: Delivery[Pressed]) -> None:
        envelope = delivery.envelope
        seen.append((event, delivery.attempt, envelope.version, envelope.key))
        if delivery.attempt == 1:
            raise ConnectionError("once more")

    async with backend.bus(topics=[Topic("pressed", partitions=2)]) as (bus, _):
        async with Worker(bus, [listen]) as worker:
            raw = {}
            for at, fields in (
                (0, entry(V1, partitionkey="of-old")),
                (1, packed(V1, 1)),
                (0, packed(V2, 2)),
                (1, entry(V2, 2)),
                (0, entry(V3, 3)),
            ):
                raw[STREAMS[at], await backend.add(STREAMS[at], fields)] = fields
            await worker.drained()
        attempts = [(event, version) for event, attempt, version, _ in seen if attempt == 2]
        assert sorted(attempts, key=repr) == sorted(
            [(EVENTS[0], 1)] * 2 + [(EVENTS[1], 2)] * 2 + [(EVENTS[2], 3)], key=repr
        )
        assert {key for *_, key in seen} == {"of-old", None}
        assert len(seen) == 10
        past = {
            (e.stream, e.entry_id): e.event async for e in bus.history("pressed", types=[Pressed])
        }
        assert past == dict(zip(raw, [EVENTS[n] for n in (0, 0, 1, 1, 2)], strict=True))
        for (stream, entry_id), fields in raw.items():
            kept = (await backend.entries(stream))[entry_id]
            assert kept["data"] == fields["data"], "nothing is written back"


@pytest.mark.parametrize("error", [KeyError("secret"), SystemExit("secret")], ids=["error", "exit"])
async def test_what_an_upcast_cannot_take_is_a_dead_letter_until_it_can(
    backend: Backend, fault: type[_Fault], error: BaseException
) -> None:
    handled: list[Event] = []

    @event_handler(Pressed, group="ears", breaker=None)
    async def listen(event: Pressed) -> None:
        handled.append(event)

    fault.raises = error
    async with backend.bus() as (bus, witness):
        async with Worker(bus, [listen]) as worker:
            old_id = await backend.add(STREAMS[0], entry(V1))
            await bus.publish(EVENTS[2])
            await worker.drained()
        assert handled == [EVENTS[2]], "an old entry stops no new one"
        (letter,) = await backend.dead(STREAMS[0], "ears")
        assert letter["deadreason"] == b"undecodable"
        assert letter["deadentry"].decode() == old_id
        assert letter["data"] == entry(V1)["data"]
        assert "v" not in letter
        said = letter["deaderror"].decode()
        assert "the upcast from version 2 (sides_are_counted) raised" in said
        assert "secret" not in str(letter) + str(witness.seen)
        (dead,) = [dead async for dead in bus.dead_letters("ears")]
        with pytest.raises(Undecodable, match=f"raised {type(error).__name__} at test_upcasts.py"):
            _ = dead.event

        fault.raises = None  # the next release
        (dead,) = [dead async for dead in bus.dead_letters("ears")]
        assert dead.event == EVENTS[0]
        await bus.dead_letters("ears").redrive()
        async with Worker(bus, [listen]) as worker:
            await worker.drained()
        assert handled == [EVENTS[2], EVENTS[0]]
        assert await backend.dead(STREAMS[0], "ears") == []


async def test_a_newer_version_waits_beside_them(backend: Backend) -> None:
    handled: list[Event] = []

    @event_handler("pressed.*", group="ears", breaker=None)
    async def listen(event: Event) -> None:
        handled.append(event)

    async with backend.bus() as (bus, witness), Worker(bus, [listen]):
        newer_id = await backend.add(STREAMS[0], entry({"label": "x", "speed": 33}, 4))
        await backend.add(STREAMS[0], entry(V1))
        await eventually(lambda: handled == [EVENTS[0]])
        (told,) = await eventually(lambda: witness.of("delivery.postponed"))
        assert told["delay_s"] == UNKNOWN_TYPE_PARK_S
        assert "pressed.made version 4: known versions: [3]" in told["reason"]

        async def alone() -> bool:  # the other one's ack may be on its way
            return len(await backend.pending(STREAMS[0], "ears")) == 1

        await eventually(alone)
        (pending,) = await backend.pending(STREAMS[0], "ears")
        assert pending.entry_id == newer_id
        assert pending.owner.startswith("parked:")
        assert await backend.dead(STREAMS[0], "ears") == []
