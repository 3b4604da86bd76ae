"""The rights that docs/wire.md lists are enough: each role does all it does as such a user."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from bus import (
    Backoff,
    Bus,
    Delivery,
    Event,
    RetryLater,
    Topic,
    UnknownGroup,
    UnknownTopic,
    Worker,
    event_handler,
)
from bus.worker import reclaimer, supervisor
from tests.servers import ask
from tests.test_effects import CASES
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus.embedded import EmbeddedServer

PAGE = (Path(__file__).parent.parent / "docs" / "wire.md").read_text()
TOPIC = Topic("right", maxlen=60, keep=6, retention=timedelta(days=1))


class Used(Event, type="right.used"):
    n: int


def commands(role: str) -> list[str]:
    """The commands of a row of the table."""
    (row,) = re.findall(rf"^\| {role} \| (.+) \|$", PAGE, re.MULTILINE)
    named = [f"+{word.lower()}" for word in re.findall(r"`([A-Z]+)`", row)]
    return [*commands("publisher"), *named] if "those, and" in row else named


def ids(server: EmbeddedServer) -> list[str]:
    """The ids of all entries."""
    return re.findall(r"\d{13}-\d+", ask(server, "XRANGE", "bus:{right:0}", "-", "+").decode())


@pytest.fixture
def url_of(server: EmbeddedServer, url: str) -> Iterator[object]:
    """Return the URL of a user who has the rights of one role and no others."""
    made: list[str] = []

    def of_role(role: str) -> str:
        rights = [*commands("every connection"), *commands(role)]
        ask(server, "ACL", "SETUSER", role, "on", ">pw", "~bus:*", *dict.fromkeys(rights))
        made.append(role)
        return url.replace("redis://", f"redis://{role}:pw@")

    yield of_role
    for role in made:
        ask(server, "ACL", "DELUSER", role)


async def test_a_publisher_needs_no_more_also_at_the_cap(url_of, server) -> None:
    async with Bus.connect(url_of("publisher"), topics=[TOPIC]) as bus:
        ask(server, "XGROUP", "CREATE", "bus:{right:0}", "g", "0", "MKSTREAM")
        await bus.publish_many([Used(n=n) for n in range(50)])
        ask(server, "XREADGROUP", "GROUP", "g", "c", "COUNT", "30", "STREAMS", "bus:{right:0}", ">")
        ask(server, "XGROUP", "SETID", "bus:{right:0}", "g", "$")
        ask(server, "XTRIM", "bus:{right:0}", "MAXLEN", "45")  # some pending ids have no entry now
        for n in range(10):
            await bus.publish(Used(n=n))
        ask(server, "XACK", "bus:{right:0}", "g", *ids(server))
        for n in range(100):
            ask(server, "XGROUP", "SETID", "bus:{right:0}", "g", "$")
            await bus.publish(Used(n=n))
    async with Bus.connect(url_of("publisher")) as bus:
        await bus.publish(Used(n=99))


async def test_a_worker_needs_no_more(url_of, monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "JANITOR_S", 0.1)
    monkeypatch.setattr(supervisor, "PRESSURE_S", 0.05)
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    tried: list[int] = []

    @event_handler(Used, group="g", backoff=Backoff(base_s=0.3), max_attempts=2, breaker=None)
    async def use(event: Used) -> None:
        tried.append(event.n)
        if event.n == 0:
            raise ValueError
        if event.n == 1 and tried.count(1) < 2:
            raise RetryLater(0.2)

    async with Bus.connect(url_of("worker"), topics=[TOPIC]) as bus:
        witness = Witness(bus)
        async with Worker(bus, [use], lease_s=0.5) as worker:
            for n in range(200):
                await bus.publish(Used(n=n))
            await worker.drained()
            await eventually(lambda: witness.of("delivery.dead_lettered"))
            assert "PermissionDenied" not in str(witness.seen)
            assert "NOPERM" not in str(witness.seen)
            assert {name for name, _ in witness.seen if name.endswith(".failed")} == set()
        async with Worker(
            bus, [use], lease_s=0.5
        ) as worker:  # leaves, comes and names the unserved
            await worker.drained()


def with_own_keys(server: EmbeddedServer, role: str, *more: str) -> None:
    """Give a user the rights of effects, too, and keys that are not the bus's."""
    rights = [*commands("effects"), *more]
    ask(server, "ACL", "SETUSER", role, *[f"~{key}" for key in "khszl"], *dict.fromkeys(rights))


async def test_transactions_need_no_more_and_no_keys_but_their_own(url_of, server, url) -> None:
    publisher = url_of("publisher")
    with_own_keys(server, "publisher")
    async with Bus.connect(publisher, topics=[TOPIC]) as bus, Redis.from_url(url) as admin:
        for before, collect, *_ in CASES.values():
            await admin.delete(*"khszl")
            for line in before:
                await admin.execute_command(*line.split())
            async with bus.transaction() as change:
                collect(change)
                change.publish(Used(n=1))


async def test_a_worker_with_effects_needs_no_more(url_of, server, url) -> None:
    @event_handler(Used, group="g", breaker=None)
    async def use(event: Used, delivery: Delivery[Used]) -> None:
        delivery.effects.hincrby("h", "f")
        delivery.effects.publish(Used(n=2), when=delivery.effects.set("k", 1, nx=True).present())
        if event.n == 1:
            delivery.effects.hincrby("h", "text")

    worker_url = url_of("worker")
    with_own_keys(server, "worker")
    ask(server, "HSET", "h", "text", "many")
    async with Bus.connect(worker_url, topics=[TOPIC]) as bus:
        witness = Witness(bus)
        async with Worker(bus, [use]) as worker:
            for n in range(100):
                await bus.publish(Used(n=n))
            await worker.drained()
            await eventually(lambda: witness.of("delivery.dead_lettered"))
        assert "NOPERM" not in str(witness.seen)
        assert ask(server, "HGET", "h", "f") == b"$3\r\n101\r\n"


@pytest.mark.parametrize("missing", ["-hincrby", "the key"])
async def test_what_effects_may_not_do_is_a_failed_attempt_of_their_delivery_alone(
    url_of, server, missing
) -> None:
    @event_handler(Used, group="g", max_attempts=1, breaker=None)
    async def use(event: Used, delivery: Delivery[Used]) -> None:
        delivery.effects.get("k")
        if event.n == 2:
            delivery.effects.hincrby("h" if missing == "-hincrby" else "not mine", "f")
        delivery.effects.incrby("k")

    worker_url = url_of("worker")
    with_own_keys(server, "worker", *([missing] if missing == "-hincrby" else []))
    async with Bus.connect(worker_url) as bus, Worker(bus, [use]) as worker:
        await bus.publish_many([Used(n=n) for n in range(5)])
        await worker.drained()
    assert ask(server, "GET", "k") == b"$1\r\n4\r\n"
    assert ask(server, "XLEN", "bus:{right:0}:dead:g") == b":1\r\n"
    letter = ask(server, "XRANGE", "bus:{right:0}:dead:g", "-", "+")
    assert (b"HINCRBY h" if missing == "-hincrby" else b"not mine") in letter


@pytest.mark.parametrize("role", ["history", "backlog"])
async def test_those_who_look_need_no_more(role: str, url_of, url) -> None:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.publish(Used(n=1))
        await bus.redis.xgroup_create("bus:{right:0}", "g", "0")
    async with Bus.connect(url_of(role)) as bus:
        if role == "history":
            for reverse in (False, True):
                past = bus.history("right", reverse=reverse)
                assert [e.event async for e in past] == [Used(n=1)]
            with pytest.raises(UnknownTopic):
                await anext(aiter(bus.history("rihgt")))
        else:
            assert (await bus.backlog("right")).of("g").undelivered == 1


async def test_those_who_inspect_need_no_more(url_of, server, url) -> None:
    stream = "bus:{right:0}"
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.publish_many([Used(n=n) for n in range(9)])
        await bus.redis.sadd(f"{stream}:workers", "w")
        await bus.redis.set(f"{stream}:lease:w", "g")
        await bus.redis.xadd("bus:{unrecorded:0}", {"n": 1})
        for key in (f"{stream}:inbox:g", f"{stream}:dead:g"):
            await bus.redis.xadd(key, {"n": 1})
        await bus.redis.xgroup_create(stream, "g", ids(server)[4])  # has no counter anywhere
        await bus.redis.xreadgroup("g", "w", {stream: ">"}, count=1)
    async with Bus.connect(url_of("inspect")) as bus:
        right, unrecorded = (await bus.inspect(["right", "unrecorded"])).topics
        assert (right.streams[0].error, unrecorded.length) == (None, 1)
        group = right.group("g")
        assert (group.undelivered, group.running, group.inbox, group.dead) == (3, 1, 1, 1)
        assert (group.served, group.newest_dead_age_s is None) == (True, False)


async def test_those_who_follow_need_no_more(url_of, url, server) -> None:
    async with Bus.connect(url, topics=[TOPIC]) as out, Bus.connect(url_of("tail")) as bus:
        await out.publish(Used(n=1))
        witness = Witness(bus)
        past, live = bus.tail("right", after="start"), bus.tail("right", types=[Used])
        await live.ready()
        ask(server, "XTRIM", "bus:{right:0}", "MAXLEN", "0")
        await out.publish_many([Used(n=2), Used(n=3)])
        assert [(await anext(t)).event.n for t in (past, live, live)] == [2, 2, 3]
        await eventually(lambda: live.gaps or witness.of("tail.gap"))
        await out.publish(Used(n=4))
        assert [(await anext(t)).event.n for t in (past, past, live)] == [3, 4, 4]
        with pytest.raises(UnknownTopic):
            await bus.tail("rihgt").ready()
        assert witness.of("tail.failed") == []


@pytest.mark.parametrize("to", ["group", "function", "bus"])
async def test_those_who_replay_need_no_more(to: str, url_of, url, server, tmp_path) -> None:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.publish(Used(n=1))
        await bus.redis.xgroup_create("bus:{right:0}", "g", "0")
    replayer = url_of("replay")
    if to == "bus":
        rights = [*commands("publisher"), *commands("effects")]
        ask(server, "ACL", "SETUSER", "replay", *rights)
    called: list[Event] = []
    async with Bus.connect(replayer) as bus:
        where = {"group": "g", "function": called.append, "bus": bus}[to]
        done = await bus.replay("right", to=where, checkpoint=tmp_path / "checkpoint")
        again = await bus.replay("right", to=where, checkpoint=tmp_path / "checkpoint")
    assert (done.replayed, again.replayed, len(called)) == (1, 1, to == "function")
    inbox = ask(server, "XLEN", "bus:{right:0}:inbox:g")
    assert inbox == (b":1\r\n" if to == "group" else b":0\r\n")
    if to == "group":
        assert b"$1\r\ng\r\n" in ask(server, "XINFO", "GROUPS", "bus:{right:0}:inbox:g")


async def test_those_who_see_to_dead_letters_need_no_more(url_of, url) -> None:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.topics.record("right")
        await bus.redis.xgroup_create("bus:{right:0}", "g", "0", mkstream=True)
        await bus.redis.sadd("bus:{right:0}:workers", "gone")
        for n in range(3):
            fields = {"id": f"e{n}", "type": "right.used", "data": f'{{"n":{n}}}'}
            await bus.redis.xadd("bus:{right:0}:dead:g", fields)
    async with Bus.connect(url_of("dead-letters")) as bus:
        letters = bus.dead_letters("g")
        first, *_ = [letter async for letter in letters]
        assert await letters.get(first.id) == first
        assert (await letters.redrive(limit=1, edit={"n": 5})).redriven == 1
        assert (await letters.redrive(limit=1)).redriven == 1
        assert (await letters.purge()).purged == await letters.count() + 1 == 1
        with pytest.raises(UnknownGroup):
            await bus.dead_letters("h").count()
        with pytest.raises(UnknownTopic):
            await bus.dead_letters("g", "rihgt").count()
