"""The rights that docs/wire.md lists are enough: each role does all it does as such a user."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from bus import (
    Backoff,
    Bus,
    ChannelGap,
    Delivery,
    Event,
    PermissionDenied,
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
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from bus import Channel
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


@pytest.mark.parametrize("from_handlers", [10, 1], ids=["own connection", "doorbell"])
async def test_a_worker_needs_no_more(url_of, monkeypatch, from_handlers) -> None:
    monkeypatch.setattr("bus.streams.stream.SHARED_READERS_FROM", from_handlers)
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


async def test_a_worker_that_may_not_see_who_is_paused_does_not_start(url_of, server) -> None:
    """It might start what an operator has stopped. One that runs goes on as it was, and says so."""

    @event_handler(Used, group="g")
    async def use(event: Used) -> None: ...

    async with Bus.connect(url_of("worker"), topics=[TOPIC]) as bus:
        witness = Witness(bus)
        async with Worker(bus, [use]) as worker:
            await bus.publish(Used(n=1))
            ask(server, "ACL", "SETUSER", "worker", "-hgetall")
            await eventually(lambda: witness.of("pauses.failed"))
            (told, *_) = witness.of("pauses.failed")
            assert told["error_type"] == "PermissionDenied"
            await bus.publish(Used(n=2))
            await worker.drained()
        with pytest.raises(PermissionDenied, match="a right on bus:paused"):
            await Worker(bus, [use]).start()


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


async def test_who_uses_channels_needs_no_more(url_of) -> None:
    async with Bus.connect(url_of("channel")) as bus:
        witness = Witness(bus)
        channel = bus.channel("run", maxlen=100)
        first = await channel.publish(Used(n=0))
        tails = [channel.tail(), channel.tail(first.entry_id)]
        waiting = asyncio.create_task(anext(tails[1]))
        await eventually(lambda: bus._hub._followed)
        await channel.publish(Used(n=1))
        assert [(await waiting).event, (await anext(tails[0])).event] == [Used(n=1), Used(n=0)]
        for _ in range(8):
            await asyncio.gather(*(channel.publish(Used(n=2)) for _ in range(50)))
        await channel.end()
        with pytest.raises(ChannelGap):
            await anext(channel.tail(first.entry_id))
        assert {name for name, _ in witness.seen if name.endswith(".failed")} == set()


@pytest.mark.parametrize("missing", ["xadd", "xrevrange", "pexpire", "xinfo", "pttl", "xrange"])
async def test_what_a_channel_lacks_is_told_and_not_done(missing: str, url_of, server) -> None:
    async with Bus.connect(url_of("channel")) as bus:
        channel, other = bus.channel("run"), bus.channel("other")
        await channel.publish(Used(n=0))
        ask(server, "ACL", "SETUSER", "channel", f"-{missing}")
        writing = missing in ("xadd", "xrevrange", "pexpire")
        for attempt in (other.publish(Used(n=1)), other.end()) if writing else (_first(channel),):
            with pytest.raises(PermissionDenied, match="a right on bus:channel:"):
                await attempt
        assert ask(server, "EXISTS", other.key) == b":0\r\n"


async def _first(channel: Channel) -> Event:
    return (await anext(channel.tail())).event


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


# --- operators

S, SECOND, G = "bus:{right:0}", "bus:{right:1}", "g"
FAR = "parked:4000000000000"


async def desk(redis: Redis) -> None:
    """A topic with something for every verb: history, a group, a dead worker, what waits."""
    await redis.flushall()
    record = {"partitions": 2, "maxlen": 60, "keep": 6, "implicit": False}
    await redis.hset("bus:topics", "right", json.dumps(record))
    for stream in (S, SECOND):
        async with redis.pipeline(transaction=False) as pipe:
            for n in range(20):
                pipe.xadd(stream, {"id": f"e{n}", "type": "right.used", "data": f'{{"n":{n}}}'})
            await pipe.execute()
        inbox = f"{stream}:inbox:{G}"
        await redis.xgroup_create(stream, G, "0")
        await redis.xgroup_create(inbox, G, "0", mkstream=True)
        await redis.xadd(inbox, {"id": "i", "type": "right.used", "data": '{"n":1}'})
        await redis.xadd(f"{stream}:dead:{G}", {"n": 1})
        await redis.hset(f"{stream}:overrun", G, 3)
        await redis.sadd(f"{stream}:workers", "gone")
        for key in (stream, inbox):
            await redis.xreadgroup(G, "gone", {key: ">"}, count=9)
        ids = [i for i, _ in await redis.xrange(stream)]
        await redis.xack(stream, G, *ids[:5])
        await redis.xclaim(stream, G, FAR, 0, ids[5:7], justid=True)
        await redis.xdel(stream, ids[7])
    await redis.hset("bus:paused", f"right:{G}", "")


def verbs(bus: Bus) -> dict[str, Callable[[], Awaitable[object]]]:
    """Everything that an operator does, by name."""
    admin, pending = bus.admin, bus.admin.pending(G)

    async def listed() -> list[object]:
        return [entry async for entry in pending]

    return {
        "set_marks": partial(admin.set_marks, "right", keep=7),
        "trim": partial(admin.trim, "right", keep=16),
        "create_group": partial(admin.create_group, "new", "right", at=1),
        "seek_group": partial(admin.seek_group, G, "start"),
        "recount_group": partial(admin.recount_group, G),
        "pause_group": partial(admin.pause_group, G, why="so"),
        "resume_group": partial(admin.resume_group, G),
        "pending": listed,
        "retry": pending.retry,
        "dead_letter": partial(pending.dead_letter, "why"),
        "remove_consumer": partial(admin.remove_consumer, "gone", G),
        "remove_group": partial(admin.remove_group, G),
    }


def shape(result: object) -> str:
    """What is said, without times and what depends on them."""
    return re.sub(r"\d+\.\d+|\d{13}(-\d+)?|datetime\([^)]*\)", "#", repr(result))


def hidden(said: str) -> str:
    """What is said of a pause whose streams may not be looked at: it stands all the same."""
    return re.sub(r"streams=\(Held\(.*\)\)\)", "streams=())", said)


async def told(url: str, redis: Redis) -> dict[str, str]:
    """What each verb says to a user who may do everything."""
    said = {}
    async with Bus.connect(url) as bus:
        for name, verb in verbs(bus).items():
            await desk(redis)
            said[name] = shape(await verb())
    return said


async def test_those_who_administer_need_no_more(url_of, server, url) -> None:
    async with Redis.from_url(url, protocol=2) as redis:
        expected = await told(url, redis)
        async with Bus.connect(url_of("admin")) as bus:
            for name, verb in verbs(bus).items():
                await desk(redis)
                assert shape(await verb()) == expected[name], name


async def everything(redis: Redis) -> dict[bytes, bytes]:
    return {key: await redis.dump(key) for key in await redis.keys("*")}


async def ids_of(redis: Redis, keys: Iterable[str]) -> list[bytes]:
    rows = [r for k in keys for r in await redis.xpending_range(k, G, "-", "+", 100)]
    return [r["message_id"] for r in rows]


# Where a script meets what it may not do after it has done something: nothing is lost by it, and
# it may be run again.
HALF_DONE = {
    *(("retry", "xack"), ("remove_consumer", "xack")),  # what had an entry is hurried all the same
    *(("retry", "xgroup"), ("remove_consumer", "xgroup")),  # an empty consumer is left
    ("remove_consumer", "xclaim"),  # ghosts are acked
    *(("dead_letter", "xack"), ("dead_letter", "xdel")),  # the letter is there, and the entry, too
    ("dead_letter", "xclaim"),  # what had an entry is a letter; ghosts are left
}


@pytest.mark.parametrize("missing", sorted({word[1:] for word in commands("admin")}))
async def test_what_an_operator_may_not_do_is_told_and_not_done(
    missing: str, url_of, server, url
) -> None:
    """Each verb without each of the commands of the role: it works as ever, or says what it lacks.

    What it says names the key, and then it has done nothing.
    """
    async with Redis.from_url(url, protocol=2) as redis:
        expected = await told(url, redis)
        async with Bus.connect(url_of("admin")) as bus:
            await bus.ready()
            ask(server, "ACL", "SETUSER", "admin", f"-{missing}")
            denied = 0
            for name, verb in verbs(bus).items():
                await desk(redis)
                before = await everything(redis)
                keys = [k.decode() for k in before if b":inbox:" in k or k.endswith(b"}")]
                pending = await ids_of(redis, keys)
                error = None
                try:
                    said = shape(await verb())
                except PermissionDenied as refused:
                    error = str(refused)
                if error is None:
                    assert said in (expected[name], hidden(expected[name])), name
                    continue
                denied += 1
                assert re.search(r"a right on (bus:|TIME)", error), name
                if (name, missing) not in HALF_DONE:
                    assert await everything(redis) == before, name
                elif name != "dead_letter":
                    there = await ids_of(redis, keys)
                    assert len(pending) - len(there) in (0, 1, 2), "ghosts, at most"
            # TYPE is asked where nobody knows the topic.
            assert (denied == 0) == (missing == "type"), "the page lists no more than is needed"
