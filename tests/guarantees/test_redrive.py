"""Redriven letters: the handler that failed gets them again, with all its attempts, nobody else."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import Backoff, Breaker, Delivery, Event, Reject, Topic, Worker, event_handler
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

STREAM = "bus:{redrive:0}"
INBOX, DEAD = f"{STREAM}:inbox:index", f"{STREAM}:dead:index"
QUICK = {"backoff": Backoff(0.01), "max_attempts": 2, "breaker": None}


class Filed(Event, type="redrive.filed"):
    n: int
    text: str = ""


class Shelved(Event, type="redrive.shelved"):
    n: int


Seen = list[tuple[int, str, int, str, str, bool]]


def what(event: Filed, delivery: Delivery[Filed]) -> tuple[int, str, int, str, str, bool]:
    envelope = delivery.envelope
    names = (envelope.entry_id, envelope.event_id)
    return (event.n, event.text, delivery.attempt, *names, delivery.redriven)


async def test_an_edited_letter_is_handled_by_its_own_handler_alone(backend: Backend) -> None:
    seen: dict[str, Seen] = {"index": [], "audit": [], "stats": []}

    @event_handler(Filed, group="index", **QUICK)
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        if event.text == "bad":
            raise ValueError(event.text)
        seen["index"].append(what(event, delivery))

    @event_handler(Filed, group="audit")
    async def audit(event: Filed, delivery: Delivery[Filed]) -> None:
        seen["audit"].append(what(event, delivery))

    @event_handler("redrive.*", group="stats", batch=10, batch_wait_ms=5)
    async def stats(deliveries: list[Delivery[Filed]]) -> None:
        seen["stats"] += [what(d.event, d) for d in deliveries]

    async with backend.bus() as (bus, _), Worker(bus, [index, audit, stats]) as worker:
        first = await bus.publish(Filed(n=1, text="bad"), source="/desk", correlation_id="c")
        await bus.publish(Filed(n=2, text="good"))
        await worker.drained()
        (letter,) = [letter async for letter in bus.dead_letters("index")]
        assert (letter.reason, letter.error, letter.attempts) == ("failed", "ValueError: bad", 2)
        assert "in index" in letter.traceback
        assert letter.event == Filed(n=1, text="bad")
        assert (letter.original_entry_id, letter.stream) == (first.entry_id, STREAM)
        before = {group: len(seen[group]) for group in seen}
        result = await bus.dead_letters("index").redrive(edit={"text": "mended"})
        await worker.drained()
        assert (result.redriven, result.unserved) == (1, False)
    assert before == {"index": 1, "audit": 2, "stats": 2}
    assert seen["index"][1:] == [(1, "mended", 1, first.entry_id, first.event_id, True)]
    assert len(seen["audit"]) == len(seen["stats"]) == 2
    assert await backend.entries(INBOX) == {}
    assert await backend.entries(DEAD) == {}
    assert len(await backend.entries(STREAM)) == 2, "nothing was published"


async def test_one_that_fails_again_has_all_its_attempts_and_is_the_same_letter(
    backend: Backend,
) -> None:
    attempts: list[int] = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(_: Filed, delivery: Delivery[Filed]) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("never")

    async with backend.bus() as (bus, _), Worker(bus, [index]) as worker:
        receipt = await bus.publish(Filed(n=1), source="/desk")
        await worker.drained()
        (first,) = await backend.dead(STREAM, "index")
        for _again in range(2):
            assert (await bus.dead_letters("index").redrive()).redriven == 1
            await worker.drained()
        (last,) = await backend.dead(STREAM, "index")
    assert attempts == [1, 2] * 3
    assert last["deadentry"].decode() == receipt.entry_id
    assert last.keys() == first.keys()
    told = ("deadtime", "deadtraceback")  # it came by another way
    assert [v for k, v in last.items() if k not in told] == [
        v for k, v in first.items() if k not in told
    ]
    assert await backend.entries(INBOX) == {}


async def test_what_happens_once_happens_again_on_purpose(backend: Backend) -> None:
    """A mark of `once=` is of one run, and a redrive is another."""
    runs: list[bool] = []

    @event_handler(Filed, group="index", once=timedelta(hours=1), **QUICK)
    async def index(_: Filed, delivery: Delivery[Filed]) -> None:
        runs.append(delivery.redriven)
        if len(runs) < 3:
            raise Reject("not yet")

    async with backend.bus() as (bus, witness), Worker(bus, [index]) as worker:
        await bus.publish(Filed(n=1), event_id="e")
        await worker.drained()
        for _ in range(2):
            await bus.dead_letters("index").redrive()
            await worker.drained()
        await bus.publish(Filed(n=1), event_id="e")
        await worker.drained()
        assert witness.of("delivery.duplicate") == []
        assert await bus.dead_letters("index").count() == 0
    assert runs == [False, True, True, False], "what was redriven marks its own run alone"


async def test_a_letter_whose_handler_nobody_serves_waits_in_its_inbox(backend: Backend) -> None:
    seen: Seen = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        if not delivery.redriven:
            raise Reject("first")
        seen.append(what(event, delivery))

    async with backend.bus() as (bus, witness):
        async with Worker(bus, [index]) as worker:
            receipt = await bus.publish(Filed(n=1))
            await worker.drained()
        await backend.redis.delete(INBOX)  # as after a loss: the redrive makes it anew
        result = await bus.dead_letters("index").redrive()
        assert (result.redriven, result.unserved) == (1, True)
        assert len(witness.of("redrive.unserved", group="index", run=result.run)) == 1
        assert len(await backend.entries(INBOX)) == 1
        async with Worker(bus, [index]) as worker:
            await worker.drained()
    assert seen == [(1, "", 1, receipt.entry_id, receipt.event_id, True)]
    assert await backend.entries(INBOX) == {}


async def test_a_worker_of_another_group_leaves_it_alone(backend: Backend) -> None:
    others: list[int] = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(_: Filed) -> None:
        raise Reject("no")

    @event_handler(Filed, group="other")
    async def other(event: Filed) -> None:
        others.append(event.n)

    async with backend.bus() as (bus, _):
        async with Worker(bus, [index, other]) as worker:
            await bus.publish(Filed(n=1))
            await worker.drained()
        await bus.dead_letters("index").redrive()
        async with Worker(bus, [other]) as worker:
            await bus.publish(Filed(n=2))
            await worker.drained()
        assert others == [1, 2]
        assert len(await backend.entries(INBOX)) == 1


async def test_what_its_handler_no_longer_asks_for_is_a_dead_letter_still(
    backend: Backend,
) -> None:
    """An inbox deletes what is acked as of another type: the event would be nowhere."""
    seen: Seen = []

    @event_handler("redrive.*", group="index", **QUICK)
    async def before(_: Event) -> None:
        raise ValueError("down")

    @event_handler(Filed, group="index", **QUICK)
    async def after(event: Filed, delivery: Delivery[Filed]) -> None:
        seen.append(what(event, delivery))

    async with backend.bus() as (bus, witness):
        async with Worker(bus, [before]) as worker:
            receipt = await bus.publish(Shelved(n=1))
            await bus.publish(Filed(n=2))
            await worker.drained()
        (first,) = [d for d in await backend.dead(STREAM, "index") if b"shelved" in d["type"]]
        async with Worker(bus, [after]) as worker:
            assert (await bus.dead_letters("index").redrive()).redriven == 2
            await worker.drained()
        assert witness.of("delivery.skipped") == []
        (letter,) = [letter async for letter in bus.dead_letters("index")]
        assert (letter.reason, letter.error_type) == ("rejected", "NotAskedFor")
        assert "does not ask for redrive.shelved any more" in letter.error
        assert letter.original_entry_id == receipt.entry_id
        (last,) = await backend.dead(STREAM, "index")
        own = [name for name in first if not name.startswith("dead")]
        assert {name: last[name] for name in own} == {name: first[name] for name in own}
    assert [n for n, *_ in seen] == [2]
    assert await backend.entries(INBOX) == {}


async def test_letters_that_die_again_do_not_stop_the_live_traffic(backend: Backend) -> None:
    """They are no outage: the breaker stays closed, and none is held for its window."""
    live: list[int] = []
    tried: list[int] = []
    breaker = Breaker(min_calls=5, window_s=3_000.0, probe_s=3_000.0)

    @event_handler(Filed, group="index", **{**QUICK, "breaker": breaker})
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        if delivery.redriven:
            tried.append(event.n)
            raise ValueError("still bad")
        live.append(event.n)

    why = {"deadreason": "failed", "deaderror": "E: e", "deadtraceback": "", "deadattempts": "2"}
    async with backend.bus() as (bus, witness), Worker(bus, [index]) as worker:
        await bus.topics.record("redrive")
        for n in range(200):
            fields = {"id": f"e{n}", "type": "redrive.filed", "data": f'{{"n":{n}}}', **why}
            await backend.add(DEAD, {**fields, "deadentry": "5-0", "deadtime": "1"})
        assert (await bus.dead_letters("index").redrive()).redriven == 200
        await bus.publish_many([Filed(n=n) for n in range(100)])
        await eventually(lambda: len(live) == 100)
        await worker.drained()
        assert witness.of("breaker.opened") == []
    assert sorted(tried) == sorted([*range(200)] * 2), "all its attempts, each"
    assert len(await backend.dead(STREAM, "index")) == 200


@pytest.mark.parametrize("effects", [False, True])
@pytest.mark.parametrize("name", ["run", "due", "attempts", "origentry"])
async def test_an_own_field_of_a_foreign_entry_is_kept_on_every_way(
    backend: Backend, effects: bool, name: str
) -> None:
    """Whichever of the two writers of dead letters takes the inbox's fields off again."""
    seen: list[bool] = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(_: Filed, delivery: Delivery[Filed]) -> None:
        seen.append(delivery.redriven)
        if not effects:
            raise Reject("no")
        delivery.effects.incrby("redrive:first")
        delivery.effects.incrby("redrive:text")

    fields = {"id": "e", "type": "redrive.filed", "data": '{"n":1}', name: "redrive-7"}
    await backend.redis.set("redrive:text", "many")
    async with backend.bus() as (bus, _), Worker(bus, [index]) as worker:
        await bus.topics.record("redrive")
        await backend.add(STREAM, fields)
        for _again in range(2):
            await eventually(lambda: _letters(backend, 1))
            (letter,) = [letter async for letter in bus.dead_letters("index")]
            assert dict(zip(letter.fields[::2], letter.fields[1::2], strict=True)) == {
                k.encode(): v.encode() for k, v in fields.items()
            }
            await bus.dead_letters("index").redrive()
            await worker.drained()
    assert seen == [False, True, True]


@pytest.mark.parametrize("effects", [False, True])
async def test_a_field_run_of_an_entry_that_was_moved_aside_is_its_own(
    backend: Backend, effects: bool
) -> None:
    """It is the last before those of the inbox, which has put none of that name there."""
    seen: list[bool] = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(_: Filed, delivery: Delivery[Filed]) -> None:
        seen.append(delivery.redriven)
        if not effects:
            raise Reject("no")
        delivery.effects.incrby("redrive:first")
        delivery.effects.incrby("redrive:text")

    fields = {"id": "e", "type": "redrive.filed", "data": '{"n":1}', "run": "redrive-nightly"}
    await backend.redis.set("redrive:text", "many")
    async with backend.bus() as (bus, _), Worker(bus, [index]) as worker:
        await bus.topics.record("redrive")
        moved = {"origentry": "5-0", "attempts": "1", "due": "0"}
        await backend.add(INBOX, {**fields, **moved})
        await eventually(lambda: _letters(backend, 1))
        await worker.drained()
    (letter,) = await backend.dead(STREAM, "index")
    assert letter["run"] == b"redrive-nightly"
    assert not moved.keys() & letter.keys()
    assert seen == [False]


async def test_effects_that_failed_half_way_run_whole_when_the_state_is_mended(
    backend: Backend,
) -> None:
    @event_handler(Filed, group="index", **QUICK)
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        delivery.effects.incrby("redrive:first")
        delivery.effects.hincrby("redrive:hash", "n", event.n)

    await backend.redis.hset("redrive:hash", "n", "many")
    async with backend.bus() as (bus, _), Worker(bus, [index]) as worker:
        await bus.publish(Filed(n=5))
        await worker.drained()
        (letter,) = [letter async for letter in bus.dead_letters("index", reason="effects-failed")]
        assert letter.applied == ("INCRBY redrive:first",)
        assert letter.error_type == "EffectsFailed"
        await backend.redis.hset("redrive:hash", "n", "0")
        await bus.dead_letters("index").redrive()
        await worker.drained()
        assert await bus.dead_letters("index").count() == 0
    assert await backend.redis.hget("redrive:hash", "n") == b"5"
    assert await backend.redis.get("redrive:first") == b"2", "what was applied is applied again"


@pytest.mark.parametrize("effects", [False, True])
async def test_an_entry_of_very_many_fields_comes_back_whole(
    backend: Backend, effects: bool
) -> None:
    """Both writers of dead letters pack it, each in its own way."""
    seen: list[int] = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        if delivery.redriven:
            seen.append(len(delivery.fields))
        elif effects:
            delivery.effects.incrby("redrive:first")
            delivery.effects.incrby("redrive:text")
        else:
            raise Reject("no")

    fields: dict[Any, Any] = {"id": "e", "type": "redrive.filed", "data": '{"n":1}'}
    fields |= {f"f{n}": b"\xff" * n for n in range(1_200)}
    await backend.redis.set("redrive:text", "many")
    async with backend.bus() as (bus, _), Worker(bus, [index]) as worker:
        await bus.topics.record("redrive")
        await backend.add(STREAM, fields)
        await eventually(lambda: _letters(backend, 1))
        (letter,) = [letter async for letter in bus.dead_letters("index")]
        assert letter.packed
        assert len(letter.fields) == 2 * len(fields)
        await bus.dead_letters("index").redrive()
        await worker.drained()
    assert seen == [2 * (len(fields) + 4)]
    assert await backend.dead(STREAM, "index") == []


async def _letters(backend: Backend, count: int) -> bool:
    return len(await backend.dead(STREAM, "index")) == count


async def test_an_entry_that_could_not_be_read_is_mended_and_handled(backend: Backend) -> None:
    seen: Seen = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        seen.append(what(event, delivery))

    data = '{"n":"one","text":"kept"}'
    async with backend.bus() as (bus, _), Worker(bus, [index]) as worker:
        await bus.topics.record("redrive")
        entry_id = await backend.add(STREAM, {"id": "e", "type": "redrive.filed", "data": data})
        await eventually(lambda: _letters(backend, 1))
        letters = bus.dead_letters("index", reason="undecodable", error="Undecodable")
        assert (await letters.redrive(edit={"n": 1})).redriven == 1
        await worker.drained()
    assert seen == [(1, "kept", 1, entry_id, "e", True)]


async def test_many_go_through_a_small_inbox_each_once(backend: Backend) -> None:
    """An inbox of ten for redrives, four partitions, and workers that take from it meanwhile."""
    topic = Topic("redrive", partitions=4, maxlen=1_020, keep=1_000)
    seen: list[tuple[int, int]] = []

    @event_handler(Filed, group="index", **QUICK)
    async def index(event: Filed, delivery: Delivery[Filed]) -> None:
        if not delivery.redriven:
            raise Reject("first")
        seen.append((event.n, delivery.attempt))

    async with backend.bus(topics=[topic]) as (bus, witness), Worker(bus, [index]) as worker:
        await asyncio.gather(*(bus.publish(Filed(n=n)) for n in range(800)))
        await worker.drained()
        assert await bus.dead_letters("index").count() == 800
        result = await bus.dead_letters("index").redrive()
        await worker.drained()
        assert witness.of("redrive.waits")
    assert (result.redriven, result.gone) == (800, 0)
    assert sorted(seen) == [(n, 1) for n in range(800)]
