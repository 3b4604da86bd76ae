"""How effects are written down: every key declared, each slot respected, nothing half written."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from redis.asyncio import Redis

from bus import (
    Bus,
    Delivery,
    Event,
    InvalidEffect,
    InvalidEvent,
    Topic,
    Worker,
    event_handler,
)
from bus.committer import Scope, Sheet
from bus.effects import Effects
from bus.streams.stream import StreamStore
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

STREAM = "bus:{desk:0}"


class Filed(Event, type="desk.filed", key="key"):
    key: str
    n: int = 0


class Shelved(Event, type="shelf.shelved"):
    n: int


# --- every key that is touched is declared


class Declared:
    """What the script was told of keys, beside what it did touch, as MONITOR shows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: set[str] = set()
        inner = StreamStore.commit

        async def noted(store: Any, target: Any, group: Any, owner: Any, touched: Any, sheet: Any):
            self.keys |= {*target, *touched}
            return await inner(store, target, group, owner, touched, sheet)

        monkeypatch.setattr(StreamStore, "commit", noted)


# A command inside a script, and where its key is.
_WITHOUT_KEY = {"TIME"}
_SECOND = {"XINFO", "XGROUP"}


async def touched_by_scripts(redis: Any, doing: Callable[[], Any]) -> set[str]:
    """Every key that a command inside any script was about, while `doing` ran."""
    found: set[str] = set()
    async with redis.monitor() as monitor:
        await doing()
        await redis.ping()
        while (seen := await monitor.next_command())["command"] != "PING":
            name, *args = re.findall(r"\S+", seen["command"])
            if seen["client_type"] == "lua" and name.upper() not in _WITHOUT_KEY:
                found.add(args[1] if name.upper() in _SECOND else args[0])
    return found


async def test_every_key_that_is_touched_is_declared(url, monkeypatch):
    """At the cap, where the script trims and drops as well. A Cluster moves slots by their keys."""
    topics = [Topic("desk", maxlen=20, keep=2, on_full="drop_oldest", partitions=2)]
    async with (
        Redis.from_url(url, protocol=2, decode_responses=True) as redis,
        Bus.connect(url, topics=topics) as bus,
    ):
        await bus.publish_many([Filed(key=f"k{n}") for n in range(30)])
        for partition in range(2):
            await redis.xgroup_create(f"bus:{{desk:{partition}}}", "g", "0")
            await redis.xreadgroup("g", "c", {f"bus:{{desk:{partition}}}": ">"}, count=3)
        declared = Declared(monkeypatch)

        async def doing() -> None:
            for n in range(10):
                async with bus.transaction() as change:
                    there = change.exists("ex").equals(0)
                    change.set("str", b"\xff", when=there)
                    change.hset("hash", {"f": n})
                    change.zadd("zset", {"m": n})
                    change.delete("gone")
                    change.publish(Filed(key=f"k{n}"), when=there)
                    change.publish(Filed(key=f"other{n}"))
                    change.hincrby("big", "f", 2**60 if n < 2 else 0)

        touched = await touched_by_scripts(redis, doing)
    assert touched <= declared.keys
    assert touched >= {"ex", "str", "hash", "zset", "gone", "big", "bus:{desk:0}:overrun"}


async def test_every_key_of_a_delivery_is_declared_too(url, monkeypatch):
    @event_handler(Filed, group="clerk", concurrency=1, max_attempts=1, breaker=None)
    async def handle(event: Filed, delivery: Delivery[Filed]) -> None:
        delivery.effects.incrby("total")
        delivery.effects.publish(Shelved(n=event.n))
        if event.n == 1:
            delivery.effects.sadd("text", "a")

    async with (
        Redis.from_url(url, protocol=2, decode_responses=True) as redis,
        Bus.connect(url) as bus,
    ):
        await redis.set("text", "v")
        declared = Declared(monkeypatch)
        async with Worker(bus, [handle]) as worker:
            await bus.publish(Filed(key="k", n=0))
            await worker.drained()

            async def doing() -> None:
                await bus.publish(Filed(key="k", n=1))
                await worker.drained()

            touched = await touched_by_scripts(redis, doing)
        assert await redis.xlen(f"{STREAM}:dead:clerk") == 1
    ours = {k for k in touched if not re.search(":(pub|lease|workers|sweep|chore)", k)}
    assert ours <= declared.keys
    assert ours >= {STREAM, f"{STREAM}:dead:clerk", "text", "bus:{shelf:0}"}


async def test_a_sheet_has_the_keys_and_the_room_of_all_it_tells(valkey_url):
    async with Bus.connect(valkey_url, topics=[Topic("desk", maxlen=50, keep=5)]) as bus:
        sheet = Sheet()
        for n in range(3):
            effects = Effects(Scope(bus._publisher, "", clustered=False))
            effects.incrby(f"k{n}")
            effects.set("blob", b"\xff", when=effects.get("was").equals(b"\xfe"))
            effects.publish(Filed(key="k"))
            await bus.committer.find_streams({Filed}, asyncio.get_running_loop().time() + 5)
            bus.committer.write(sheet, effects, (f"{n}-0", 1, ""), inside=False)
        sheet.arguments()
    assert set(sheet.keys) == {"k0", "k1", "k2", "blob", "was", STREAM, f"{STREAM}:overrun"}
    (wanted,) = sheet.streams.items()
    assert (wanted[0], wanted[1].certain, wanted[1].events, wanted[1].waits) == (STREAM, 3, 3, True)
    assert sheet.binaries == [b"\xff", b"\xfe"] * 3
    heads = [msgspec.msgpack.decode(unit)[0] for unit in sheet.units]
    assert [head[5] for head in heads] == [
        [3, 3, 1, 3, -3, 2],
        [3, 3, 3, 3, -3, 4],
        [3, 3, 5, 3, -3, 6],
    ]
    assert [head[4] for head in heads] == [[4, STREAM]] * 3


async def test_what_can_never_fit_leaves_nothing_on_the_sheet(valkey_url):
    async with Bus.connect(valkey_url, topics=[Topic("desk", maxlen=6, keep=2)]) as bus:
        sheet = Sheet()
        effects = Effects(Scope(bus._publisher, "", clustered=False))
        effects.incrby("k")
        for _ in range(5):
            effects.publish(Filed(key="k"))
        await bus.committer.find_streams({Filed}, asyncio.get_running_loop().time() + 5)
        with pytest.raises(InvalidEvent, match="room for 4"):
            bus.committer.write(sheet, effects, ("", 0, ""), inside=False)
    assert (sheet.units, sheet.keys, sheet.streams) == ([], {}, {})


# --- on a Cluster


def cluster(private_server: PrivateServer) -> EmbeddedServer:
    """One node that has all slots."""
    server = private_server("redis-7.0", extra_args=("--cluster-enabled", "yes"))
    assert ask(server, "CLUSTER", "ADDSLOTSRANGE", "0", "16383") == b"+OK\r\n"
    return server


@pytest.fixture
async def node(private_server: PrivateServer) -> AsyncIterator[EmbeddedServer]:
    server = cluster(private_server)
    await eventually(lambda: b"cluster_state:ok" in ask(server, "CLUSTER", "INFO"))
    return server


async def test_on_a_cluster_effects_lie_beside_the_stream(node):
    refused: list[InvalidEffect] = []

    @event_handler(Filed, group="clerk", max_attempts=1, breaker=None)
    async def handle(event: Filed, delivery: Delivery[Filed]) -> None:
        effects = delivery.effects
        total = effects.incrby(effects.key("total"))
        effects.publish(Filed(key="again", n=2), when=total.equals(1))
        effects.sadd("{desk:0}:seen", event.n)
        try:
            effects.incrby("elsewhere")
        except InvalidEffect as error:
            refused.append(error)

    async with Bus.connect(node.url) as bus, Worker(bus, [handle]) as worker:
        await bus.publish(Filed(key="k", n=1))
        await worker.drained()
        assert await bus.redis.get("{desk:0}:total") == b"2"
        assert await bus.redis.smembers("{desk:0}:seen") == {b"1", b"2"}
    assert len(refused) == 2
    assert "elsewhere lies in another slot" in str(refused[0])
    assert "effects.key(name)" in str(refused[0])


async def test_on_a_cluster_an_event_of_another_slot_makes_a_dead_letter(node):
    dead: list[str] = []

    async def on_dead(told: Any, _: Any) -> None:
        dead.append(told.reason)

    @event_handler(Filed, group="clerk", on_dead=on_dead, breaker=None, max_attempts=1)
    async def handle(event: Filed, delivery: Delivery[Filed]) -> None:
        delivery.effects.incrby(delivery.effects.key("total"), event.n)
        if event.n == 1:
            delivery.effects.publish(Shelved(n=1))

    async with Bus.connect(node.url) as bus:
        witness = Witness(bus)
        async with Worker(bus, [handle]) as worker:
            await bus.publish_many([Filed(key="k", n=n) for n in (10, 1, 100)])
            await worker.drained()
        assert await bus.redis.get("{desk:0}:total") == b"110"
        ((_, letter),) = await bus.redis.xrange(f"{STREAM}:dead:clerk")
        assert letter[b"deadreason"] == b"failed"
        assert b"bus:{shelf:0} lies in another slot" in letter[b"deaderror"]
        assert letter[b"deadattempts"] == b"1"
        assert dead == ["failed"]
        assert len(witness.of("delivery.dead_lettered")) == 1
        assert not await bus.redis.exists("bus:{shelf:0}")


async def test_on_a_cluster_a_transaction_lies_in_one_slot(node):
    async with Bus.connect(node.url) as bus:
        async with bus.transaction() as change:
            change.incrby("{a}:x")
            change.incrby("{a}:y")
        async with bus.transaction() as change:
            change.incrby("plain")
        async with bus.transaction() as change:
            change.publish(Filed(key="k"))
            change.incrby("{desk:0}:filed")
        async with bus.transaction() as change:
            change.incrby("{desk:0}:filed")
            change.publish(Filed(key="k"))
        assert await bus.redis.get("{desk:0}:filed") == b"2"
        assert await bus.redis.xlen(STREAM) == 2
        memories = {k.decode().rpartition(":tx:")[0] for k in await bus.redis.keys("bus:*:tx:*")}
        assert memories == {"bus:{a}", "bus:{plain}", "bus:{desk:0}"}


REFUSED: dict[str, tuple[list[str], str]] = {
    "two tags": (["{a}:x", "{b}:x"], "give them one hash tag"),
    "none": (["x", "y"], "give them one hash tag"),
    "a brace of no tag": (["a}b"], "a part in braces"),
    "an empty tag": (["a{}b"], "a part in braces"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_on_a_cluster_keys_of_two_slots_are_refused_when_collected(node, name):
    found, words = REFUSED[name]
    async with Bus.connect(node.url) as bus, bus.transaction() as change:
        for key in found[:-1]:
            change.incrby(key)
        with pytest.raises(InvalidEffect, match=words):
            change.incrby(found[-1])


async def test_on_a_cluster_an_event_of_another_slot_undoes_a_transaction(node):
    async def both(bus: Bus) -> None:
        async with bus.transaction() as change:
            change.incrby("{a}:x")
            change.publish(Shelved(n=1))

    async with Bus.connect(node.url) as bus:
        with pytest.raises(InvalidEffect, match=r"bus:\{shelf:0\} lies in another slot"):
            await both(bus)
        assert await bus.redis.exists("{a}:x") == 0


async def test_elsewhere_keys_may_lie_anywhere(url):
    async with Bus.connect(url) as bus:
        async with bus.transaction() as change:
            change.incrby("{a}:x")
            change.incrby("a}b")
            change.publish(Shelved(n=1))
        assert len(change.receipts) == 1
