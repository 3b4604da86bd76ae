"""Marks changed by an operator: what is written, who notices, and what is left alone."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    DeclarationError,
    Event,
    StreamFull,
    Topic,
    UnknownTopic,
    WrongKeyType,
    publisher,
)
from bus.admin.marks import Marks
from bus.streams import topics
from tests.faults.proxy import Proxy
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.embedded import EmbeddedServer

TOPIC = Topic("mark", maxlen=100, keep=10)
DAY = timedelta(days=1)


class Marked(Event, type="mark.made"):
    n: int


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.topics.record("mark")
        yield bus


async def recorded(bus: Bus, topic: str = "mark") -> dict[str, Any]:
    return json.loads(await bus.redis.hget("bus:topics", topic))


async def test_what_is_given_is_changed_and_the_rest_stays(bus: Bus) -> None:
    before = Marks(100, 10, "block", None)
    witness = Witness(bus)
    done = await bus.admin.set_marks("mark", maxlen=200, retention=DAY)
    assert (done.topic, done.before, done.after) == (
        *("mark", before),
        Marks(200, 10, "block", 86_400.0),
    )
    (told,) = witness.of("topic.marked")
    assert told == {
        "topic": "mark",
        "differences": "maxlen 100 is now 200, retention_s None is now 86400.0",
    }
    assert await recorded(bus) == {
        "partitions": 1,
        "maxlen": 200,
        "keep": 10,
        "on_full": "block",
        "retention_s": 86_400.0,
        "implicit": False,
    }
    done = await bus.admin.set_marks("mark", keep=20, on_full="reject")
    assert done.after == Marks(200, 20, "reject", 86_400.0)
    done = await bus.admin.set_marks("mark", retention=None)
    assert done.after == Marks(200, 20, "reject", None)
    (topic,) = (await bus.inspect(["mark"])).topics
    assert (topic.maxlen, topic.keep, topic.on_full) == (200, 20, "reject")


async def test_a_dry_run_says_what_would_be_and_writes_nothing(bus: Bus) -> None:
    before = await bus.redis.dump("bus:topics")
    witness = Witness(bus)
    done = await bus.admin.set_marks("mark", maxlen=50, dry_run=True)
    assert done.after == Marks(50, 10, "block", None)
    assert await bus.redis.dump("bus:topics") == before
    assert witness.seen == []


async def test_no_change_writes_nothing(bus: Bus) -> None:
    before = await bus.redis.dump("bus:topics")
    witness = Witness(bus)
    for same in ({}, {"maxlen": 100, "keep": 10, "on_full": "block", "retention": None}):
        done = await bus.admin.set_marks("mark", **same)
        assert done.before == done.after
    assert await bus.redis.dump("bus:topics") == before
    assert witness.seen == []


async def test_what_later_releases_have_written_stays(bus: Bus) -> None:
    record = {**await recorded(bus), "colour": "green", "tiers": [1, {"a": None}]}
    await bus.redis.hset("bus:topics", "mark", json.dumps(record))
    await bus.admin.set_marks("mark", keep=20)
    assert await recorded(bus) == {**record, "keep": 20}


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"keep": 100}, "keep = 100 must be below maxlen = 100"),
        ({"maxlen": 10}, "keep = 10 must be below maxlen = 10"),
        ({"maxlen": 1}, "maxlen must be a whole number"),
        ({"maxlen": 0}, "maxlen must be a whole number"),
        ({"maxlen": 50.0}, "maxlen must be a whole number"),
        ({"keep": 0}, "keep must be a whole number"),
        ({"on_full": "drop"}, "on_full is 'block', 'reject' or 'drop_oldest', not 'drop'"),
        ({"retention": timedelta(0)}, "retention"),
        ({"retention": 60}, "retention"),
    ],
)
async def test_marks_that_cannot_be_are_refused_and_nothing_is_written(
    valkey_url: str, marks: dict[str, Any], message: str
) -> None:
    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        await bus.topics.record("mark")
        before = await bus.redis.dump("bus:topics")
        for dry_run in (True, False):
            with pytest.raises(DeclarationError, match=message):
                await bus.admin.set_marks("mark", dry_run=dry_run, **marks)
        assert await bus.redis.dump("bus:topics") == before


async def test_topics_that_nobody_knows_are_errors(bus: Bus) -> None:
    with pytest.raises(UnknownTopic, match=r"no topic makr: did you mean mark\?"):
        await bus.admin.set_marks("makr", keep=20)
    with pytest.raises(DeclarationError, match="topic name 'a b' is not valid"):
        await bus.admin.set_marks("a b", keep=20)
    await bus.redis.hset("bus:topics", "odd", "not a record")
    with pytest.raises(DeclarationError, match=r"bus:topics holds something else .* for odd"):
        await bus.admin.set_marks("odd", keep=20)
    assert await bus.redis.hget("bus:topics", "odd") == b"not a record"
    await bus.redis.set("bus:topics", "a string")
    with pytest.raises(WrongKeyType, match="bus:topics"):
        await bus.admin.set_marks("mark", keep=20)


async def test_a_topic_that_was_only_used_counts_as_declared_from_then_on(url: str) -> None:
    """No later declaration replaces what an operator has set."""
    async with Bus.connect(url) as user:
        await user.publish(Marked(n=1))
        assert (await recorded(user))["implicit"]
        await user.admin.set_marks("mark", maxlen=77, keep=7)
        assert await recorded(user) == {
            **await recorded(user),
            "maxlen": 77,
            "keep": 7,
            "implicit": False,
        }
        await user.redis.xtrim("bus:{mark:0}", 0)
    bus = Bus.connect(url, topics=[TOPIC])
    witness = Witness(bus)  # it is told as it connects
    async with bus:
        await bus.publish(Marked(n=2))
        told = witness.of("topic.differs")
        assert [t["differences"] for t in told] == [
            "maxlen 77 recorded, 100 declared, keep 7 recorded, 10 declared"
        ]
        assert (await recorded(bus))["maxlen"] == 77


async def test_a_declared_topic_that_is_not_recorded_yet_is_recorded_so(url: str) -> None:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.admin.set_marks("mark", keep=50)
        assert (await recorded(bus))["keep"] == 50
        assert (await recorded(bus))["maxlen"] == 100


async def test_of_two_operators_neither_undoes_what_the_other_did(bus: Bus) -> None:
    for n in range(20):
        await asyncio.gather(
            bus.admin.set_marks("mark", maxlen=1_000 + n),
            bus.admin.set_marks("mark", keep=20 + n),
            bus.admin.set_marks("mark", retention=timedelta(hours=1 + n)),
        )
        record = await recorded(bus)
        assert (record["maxlen"], record["keep"]) == (1_000 + n, 20 + n)
        assert record["retention_s"] == 3_600 * (1 + n)


@pytest.mark.parametrize("moment", range(3))
async def test_what_another_writes_between_two_steps_is_kept(
    bus: Bus, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, moments = bus.store, iter(range(9))
    ask, write = store.topic_record, store.record_topic

    async def meanwhile() -> None:
        if next(moments) == moment:
            record = {**await recorded(bus), "keep": 33}
            await bus.redis.hset("bus:topics", "mark", json.dumps(record))

    async def asked(topic: str) -> bytes:
        await meanwhile()
        answer = await ask(topic)
        await meanwhile()
        return answer

    async def written(topic: str, expected: bytes, new: bytes) -> bytes:
        await meanwhile()
        return await write(topic, expected, new)

    monkeypatch.setattr(store, "topic_record", asked)
    monkeypatch.setattr(store, "record_topic", written)
    done = await bus.admin.set_marks("mark", maxlen=500)
    assert next(moments) > moment
    assert await recorded(bus) == {**await recorded(bus), "maxlen": 500, "keep": 33}
    assert (done.before, done.after) == (
        Marks(100, 33, "block", None),
        Marks(500, 33, "block", None),
    )


async def test_a_record_that_goes_meanwhile_is_made_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bus.store.record_topic

    async def written(topic: str, expected: bytes, new: bytes) -> bytes:
        monkeypatch.undo()
        await bus.redis.delete("bus:topics")
        return await write(topic, expected, new)

    monkeypatch.setattr(bus.store, "record_topic", written)
    await bus.admin.set_marks("mark", maxlen=500)
    assert (await recorded(bus))["maxlen"] == 500


async def test_a_lost_answer_is_no_reason_to_say_that_nothing_changed(
    url: str, server: EmbeddedServer
) -> None:
    async with (
        Proxy(server.port) as proxy,
        Bus.connect(proxy.url, topics=[TOPIC]) as bus,
    ):
        await bus.topics.record("mark")
        witness = Witness(bus)
        proxy.lose(b"EVALSHA", 1)
        done = await bus.admin.set_marks("mark", maxlen=500)
        assert proxy.lost == 1
        assert (done.before.maxlen, done.after.maxlen) == (100, 500)
        assert len(witness.of("topic.marked")) == 1


async def test_publishers_that_run_notice(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that wait for room, and publish nothing else."""
    for module in (topics, publisher):
        monkeypatch.setattr(module, "RECORD_TTL_S", 0.1)
    stream = "bus:{mark:0}"
    async with Bus.connect(url, topics=[TOPIC]) as bus, Bus.connect(url) as operator:
        await bus.redis.xgroup_create(stream, "slow", "0", mkstream=True)
        await asyncio.gather(*(bus.publish(Marked(n=n)) for n in range(100)))
        waiting = asyncio.ensure_future(bus.publish(Marked(n=100)))

        async def is_refused() -> bool:
            try:
                async with asyncio.timeout(0.05):
                    await bus.publish(Marked(n=101))
            except StreamFull:
                return True
            except TimeoutError:
                pass
            return False

        await operator.admin.set_marks("mark", maxlen=101)
        await waiting
        await operator.admin.set_marks("mark", on_full="reject")
        await eventually(is_refused)
        assert await bus.redis.xlen(stream) == 101
