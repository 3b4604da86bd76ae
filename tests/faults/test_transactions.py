"""Transactions while the server, the wire or the process is in trouble: once, or said not to be."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import (
    Bus,
    Event,
    PublishError,
    PublishRefused,
    PublishTimeout,
    PublishUnknown,
)
from bus.streams import stream as verbs
from tests.faults.proxy import Proxy, digest
from tests.servers import ask
from tests.witness import eventually

if TYPE_CHECKING:
    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

STREAM = "bus:{purchase:0}"
SHORT_S = 0.4


class Bought(Event, type="purchase.bought"):
    n: int


async def buy(bus: Bus, n: int) -> Any:
    """Count, note who it was, and publish the number; return the transaction."""
    async with bus.transaction() as change:
        total = change.incrby("total")
        new = change.hsetnx("by", str(n), "1")
        change.hincrby("times", str(n), 1)
        change.set("last", b"\xff\x00", when=new.equals(1))
        change.get("never")
        change.publish(Bought(n=n), when=total.at_least(1))
    return change


async def bought(redis: Any) -> list[int]:
    """The n of every event, which are as many as were counted."""
    rows = await redis.xrange(STREAM)
    assert int(await redis.get("total") or 0) == len(rows)
    found = [json.loads(fields[b"data"])["n"] for _, fields in rows]
    times = {int(n): int(c) for n, c in (await redis.hgetall("times")).items()}
    assert times == {n: found.count(n) for n in found}, "torn apart"
    return found


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


# --- the answer is lost


async def test_a_lost_answer_is_given_again_word_for_word(url):
    async with (
        Redis.from_url(url, protocol=2) as redis,
        Proxy(port_of(url)) as proxy,
        Bus.connect(proxy.url) as bus,
    ):
        await redis.script_load(verbs._commit._text)
        await bus.publish(Bought(n=0))
        await redis.delete(STREAM)
        proxy.lose(digest(verbs._commit), 2)
        change = await buy(bus, 1)
        assert proxy.lost == 2
        assert await bought(redis) == [1]
        ((entry_id, fields),) = await redis.xrange(STREAM)
        (receipt,) = change.receipts
        assert (receipt.entry_id, receipt.event_id) == (entry_id.decode(), fields[b"id"].decode())
        assert [change.reply(n) for n in range(1, 7)] == [
            (True, 1),
            (True, 1),
            (True, 1),
            (True, b"OK"),
            (True, None),
            (True, receipt),
        ]


async def test_lost_answers_among_fifty_at_a_time_apply_nothing_twice(url):
    async with (
        Redis.from_url(url, protocol=2) as redis,
        Proxy(port_of(url)) as proxy,
        Bus.connect(proxy.url) as bus,
    ):
        await redis.script_load(verbs._commit._text)
        for round_ in range(5):
            proxy.lose(digest(verbs._commit), 2)
            changes = await asyncio.gather(*(buy(bus, round_ * 50 + n) for n in range(50)))
            receipts = {c.receipts[0].entry_id for c in changes}
            assert len(receipts) == 50
        assert proxy.lost == 10
        assert sorted(await bought(redis)) == list(range(250))
        assert len(await redis.keys("bus:tx:*")) == 50


async def test_a_failure_whose_answer_is_lost_is_told_all_the_same(url):
    async with (
        Redis.from_url(url, protocol=2) as redis,
        Proxy(port_of(url)) as proxy,
        Bus.connect(proxy.url) as bus,
    ):
        await redis.script_load(verbs._commit._text)
        await redis.hset("by", "5", "many")
        await redis.hset("times", "5", "many")
        proxy.lose(digest(verbs._commit), 1)
        with pytest.raises(Exception, match=r"HINCRBY times: .*stays: INCRBY total, HSETNX by"):
            await buy(bus, 5)
        assert await redis.get("total") == b"1", "not tried again"


# --- the server does not answer, or is not there


async def test_a_server_that_hangs_leaves_it_unknown_and_it_never_comes_late(
    private_server: PrivateServer, server_kind: str
) -> None:
    """It comes at once when the server wakes up, or not at all: not after what came later."""
    server = private_server(server_kind)
    async with (
        Redis.from_url(server.url, protocol=2) as redis,
        Bus.connect(server.url, publish_timeout_s=SHORT_S) as bus,
    ):
        await buy(bus, 0)
        server.pause()
        with pytest.raises(PublishUnknown, match="look at the state before"):
            await buy(bus, 1)
        server.resume()
        await buy(bus, 2)
        found = await bought(redis)
        assert found in ([0, 2], [0, 1, 2])
        for n in range(3, 10):
            await buy(bus, n)
        assert await bought(redis) == [*found, *range(3, 10)]


async def test_a_server_that_is_down_the_whole_time_means_nothing_was_done(
    private_server: PrivateServer,
) -> None:
    server = private_server(aof=True)
    async with Bus.connect(server.url, publish_timeout_s=SHORT_S) as bus:
        await buy(bus, 0)
        server.kill()
        with pytest.raises(PublishError):  # it may be in flight still
            await buy(bus, 1)
        with pytest.raises(PublishTimeout, match="nothing of it was done") as raised:
            await buy(bus, 2)
        assert not isinstance(raised.value, PublishRefused)
        server.restart()
        async with Redis.from_url(server.url) as redis:
            assert 2 not in await bought(redis)
        await buy(bus, 3)


async def test_a_server_that_is_killed_and_comes_back_has_each_once(
    private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind, aof=True)
    done: list[int] = []
    stop = asyncio.Event()

    async def shopper(bus: Bus, base: int) -> None:
        n = base
        while not stop.is_set():
            await buy(bus, n)
            done.append(n)
            n += 1

    async with Bus.connect(server.url, publish_timeout_s=30) as bus:
        shoppers = [asyncio.create_task(shopper(bus, 100_000 * i)) for i in range(20)]
        for round_ in range(1, 4):
            await eventually(lambda r=round_: len(done) > r * 200)
            server.kill()
            await asyncio.to_thread(server.restart)
        before = len(done)
        await eventually(lambda: len(done) > before + 100)
        stop.set()
        await asyncio.gather(*shoppers)
        async with Redis.from_url(server.url, protocol=2) as redis:
            assert sorted(await bought(redis)) == sorted(done), "all that were told, each once"


async def test_a_server_that_restarted_empty_begins_anew(
    private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind)
    async with Bus.connect(server.url) as bus:
        for n in range(3):
            await buy(bus, n)
        server.kill()
        server.restart()
        await buy(bus, 3)
        async with Redis.from_url(server.url, protocol=2) as redis:
            assert await bought(redis) == [3]


# --- the server refuses


async def refused(bus: Bus, n: int) -> PublishRefused:
    """Buy in vain. Its time may be up just while an attempt is on its way: then it is unknown."""
    while True:
        with pytest.raises((PublishRefused, PublishUnknown)) as raised:
            await buy(bus, n)
        if isinstance(raised.value, PublishRefused):
            return raised.value


def lacks_memory(server: EmbeddedServer) -> None:
    ask(server, "CONFIG", "SET", "maxmemory", "1")


def has_memory(server: EmbeddedServer) -> None:
    ask(server, "CONFIG", "SET", "maxmemory", "0")


def is_replica(server: EmbeddedServer) -> None:
    ask(server, "REPLICAOF", "127.0.0.1", "1")


def is_primary(server: EmbeddedServer) -> None:
    ask(server, "REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize(
    ("code", "trouble", "relief", "remedy"),
    [
        ("OOM", lacks_memory, has_memory, "raise maxmemory"),
        ("READONLY", is_replica, is_primary, "names the primary"),
    ],
    ids=["OOM", "READONLY"],
)
async def test_a_server_that_takes_no_writes_is_named_and_waited_for(
    private_server: PrivateServer,
    server_kind: str,
    code: str,
    trouble: Any,
    relief: Any,
    remedy: str,
) -> None:
    server = private_server(server_kind)
    async with (
        Redis.from_url(server.url, protocol=2) as redis,
        Bus.connect(server.url, publish_timeout_s=SHORT_S) as bus,
        Bus.connect(server.url, publish_timeout_s=20) as patient,
    ):
        await asyncio.gather(buy(bus, 0), buy(patient, 1))
        trouble(server)
        waiting = asyncio.create_task(buy(patient, 2))
        error = await refused(bus, 3)
        assert isinstance(error, PublishTimeout)
        assert error.code == code
        assert remedy in str(error)
        assert "nothing of it was done" in str(error)
        assert not waiting.done()
        relief(server)
        await waiting
        assert sorted(await bought(redis)) == [0, 1, 2]


# --- the process forks


PROGRAM = """
import asyncio, os, sys

from bus import Bus, Event


class Bought(Event, type="purchase.bought"):
    n: int


async def buy(bus, numbers):
    for n in numbers:
        async with bus.transaction() as change:
            change.incrby("total")
            change.hincrby("times", str(n), 1)
            change.publish(Bought(n=n))


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


async def main(url):
    bus = Bus.connect(url)
    await buy(bus, range(5))
    in_flight = asyncio.create_task(buy(bus, range(5, 10)))
    await asyncio.sleep(0)
    pids = [
        in_child(lambda: asyncio.run(buy(bus, range(100 * i, 100 * i + 10)))) for i in (1, 2)
    ]
    await in_flight
    for pid in pids:
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status == 0, status
    await buy(bus, range(10, 15))
    await bus.close()


asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
async def test_a_forked_child_has_tickets_of_its_own(valkey_url, tmp_path):
    """With its parent's, its transactions would be taken for repeats, or for late ones."""
    program = tmp_path / "forking.py"
    program.write_text(PROGRAM)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(program), valkey_url],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    async with Redis.from_url(valkey_url, protocol=2) as redis:
        expected = [*range(15), *range(100, 110), *range(200, 210)]
        assert sorted(await bought(redis)) == expected
        assert len({k.rpartition(b":")[0] for k in await redis.keys("bus:tx:*")}) == 3
