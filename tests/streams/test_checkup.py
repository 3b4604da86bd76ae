"""What a doctor asks, and how the answers are taken; what becomes of them is in tests/admin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus.errors import WrongKeyType
from bus.streams import checkup, keys
from bus.streams.address import parse_url
from bus.streams.replies import ReplyError
from bus.streams.server import Standalone
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.servers import ask
from tests.streams.wire import with_user

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

S, G = "bus:{look:0}", "index"


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url, protocol=2) as redis:
        yield redis


@pytest.fixture
async def store(url: str) -> AsyncIterator[StreamStore]:
    store = StreamStore(Standalone(parse_url(url)), Telemetry())
    yield store
    await store.close()


# --- the server


async def test_what_a_server_says_of_itself(store, server_kind):
    seen = await checkup.server_seen(store)
    assert (seen.trouble, seen.refuses) == ("", "")
    assert seen.takes_counts == (server_kind != "redis-6.2")
    assert seen.facts["role"] == "master"
    assert seen.facts["aof_enabled"] == "0"
    assert set(seen.config) == set(checkup.SETTINGS)
    assert seen.config["save"] == ""
    assert seen.config["appendfsync"] == "everysec"


async def test_why_a_server_takes_nothing(private_server, server_kind):
    server = private_server(server_kind)
    store = StreamStore(Standalone(parse_url(server.url)), Telemetry())
    for settings, code in (
        (("CONFIG", "SET", "maxmemory", "1"), "OOM"),
        (("CONFIG", "SET", "maxmemory", "0"), ""),
        (("CONFIG", "SET", "min-replicas-to-write", "1"), "NOREPLICAS"),
        (("REPLICAOF", "127.0.0.1", "1"), "READONLY"),
    ):
        ask(server, *settings)
        seen = await checkup.server_seen(store)
        assert (seen.trouble, seen.refuses) == ("", code)
        assert (seen.takes_counts is None) == bool(code)
    await store.close()


async def test_who_may_ask_nothing_is_told_nothing(server, url):
    ask(server, "ACL", "SETUSER", "mute", "on", ">pw", "~*", "+auth")
    store = StreamStore(Standalone(parse_url(with_user(url, "mute:pw"))), Telemetry())
    seen = await checkup.server_seen(store)
    assert seen == checkup.ServerSeen("NOPERM", {}, {}, None, "")
    assert await checkup.clock_seen(store) is None
    assert await checkup.types_of(store, ["a"]) == {}
    assert await checkup.youngest_letters(store, [(S, G)]) == {(S, G): []}
    await store.close()
    ask(server, "ACL", "DELUSER", "mute")


async def test_clocks_are_compared_as_closely_as_the_answer_took(store, redis, monkeypatch):
    seen = await checkup.clock_seen(store)
    assert abs(seen.ahead_s) < 1
    assert 0 <= seen.within_s < 1
    seconds, _ = await redis.time()
    times = iter([seconds - 104.0, seconds - 96.0])

    class Slow:
        @staticmethod
        def time() -> float:
            return next(times)

    monkeypatch.setattr(checkup, "time", Slow)
    seen = await checkup.clock_seen(store)
    assert seen.within_s == 4.0
    assert seen.ahead_s == pytest.approx(100, abs=2)


# --- keys and letters


async def test_the_types_of_keys_that_exist(store, redis, monkeypatch):
    monkeypatch.setattr(checkup, "COMMANDS_AT_ONCE", 2)
    await redis.set("a", 1)
    await redis.sadd("b", 1)
    await redis.xadd("c", {"n": 1})
    found = await checkup.types_of(store, ["a", "x", "b", "a", "c"])
    assert found == {"a": "string", "b": "set", "c": "stream"}


async def test_the_youngest_letters_as_many_as_are_so_large(store, redis):
    dead = keys.dead(S, G)
    for n in range(1, 61):
        await redis.xadd(dead, {"n": "1"}, id=f"{n}-0")
    large = keys.dead(S, "large")
    for n in range(1, 11):
        await redis.xadd(large, {"n": "x" * 100_000}, id=f"{n}-0")
    places = [(S, G), (S, "large"), (S, "none")]
    found = await checkup.youngest_letters(store, places)
    ids = {place[1]: [i for i, _ in rows] for place, rows in found.items()}
    assert ids[G] == [b"%d-0" % n for n in range(60, 10, -1)]
    assert ids["large"] == [b"10-0", b"9-0", b"8-0"]  # 256 KiB
    assert ids["none"] == []


# --- lags


async def lags(store: StreamStore, most: int, *groups: str) -> dict[str, Any]:
    return await store.archive.lags(S, groups, most)


async def test_lags_and_what_is_there(store, redis, server_kind):
    for n in range(1, 201):
        await redis.xadd(S, {"n": "1"}, id=f"{n}-0")
    for name, read in (("none", 0), ("some", 120), ("most", 190), ("all", 200)):
        await redis.xgroup_create(S, name, "0")
        if read:
            await redis.xreadgroup(name, "w", {S: ">"}, count=read)
    await redis.xgroup_create(S, "middle", "50-0")  # has no count
    found = await lags(store, 50, "none", "some", "most", "all", "middle", "gone")
    if server_kind == "redis-6.2":
        assert found == {}
        return
    assert found == {
        "none": (200, 200),
        "some": (80, 199),  # there are more than 50, and the first was delivered
        "most": (10, 10),
        "all": (0, 0),
    }
    assert (await lags(store, 80, "some"))["some"] == (80, 80)


async def test_lags_of_what_is_no_stream(store, redis):
    with pytest.raises(ReplyError):
        await lags(store, 10, G)
    await redis.set(S, "precious")
    with pytest.raises(WrongKeyType):
        await lags(store, 10, G)
