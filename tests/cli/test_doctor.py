"""doctor and check: faults that were planted are found; limits in the words of monitors."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from bus import Bus, Worker
from tests.cli.conftest import CommandLine
from tests.cli.shop import ORDERS, OrderPaid, send_receipt
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from bus.embedded import EmbeddedServer
    from tests.cli.zygote import Zygote
    from tests.conftest import PrivateServer


@pytest.fixture
def server(private_server: PrivateServer) -> EmbeddedServer:
    """A server that keeps what it has, as one that events are trusted to."""
    return private_server(aof=True)


@pytest.fixture
async def ours(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.connect(server.url, topics=[ORDERS]) as bus:
        await bus.topics.record("order")
        yield bus


@pytest.fixture
async def at_ours(shop: Path, zygote: Zygote, server: EmbeddedServer) -> AsyncIterator[CommandLine]:
    made = CommandLine(shop, server.url, zygote)
    yield made
    await made.close()


async def test_a_bus_at_work_has_nothing_but_notes(at_ours: CommandLine, ours: Bus) -> None:
    async with Worker(ours, [send_receipt]) as worker:
        await ours.publish_many([OrderPaid(order_id=str(n), cents=n) for n in range(500)])
        await worker.drained()
        ran = await at_ours("doctor", "--json")
        (found,) = ran.lines
        assert [f for f in found["findings"] if f["severity"] != "note"] == []
        assert (ran.code, found["ok"]) == (0, True)
        ran = await at_ours("doctor")
        assert (ran.code, ran.out.splitlines()[0].startswith(f"{ours.address}, valkey")) == (
            0,
            True,
        )


async def test_each_of_ten_planted_faults_is_found_with_what_mends_it(
    at_ours: CommandLine, ours: Bus, server: EmbeddedServer
) -> None:
    redis, now_ms = ours.redis, int(time.time() * 1000)
    await ours.admin.set_marks("order", maxlen=1_100, keep=1_000)
    await ours.publish_many([OrderPaid(order_id="k", cents=n) for n in range(80)])
    stream, other = "bus:{order:0}", "bus:{order:1}"
    if not await redis.xlen(stream):
        stream, other = other, stream
    # 1 nobody serves it; 2 it is paused; 3 a dead worker has entries of it
    await ours.admin.create_group("receipts", "order")
    await ours.admin.pause_group("receipts", why="moving house")
    await redis.sadd(f"{stream}:workers", "dead-worker")
    await redis.xreadgroup("receipts", "dead-worker", {stream: ">"}, count=5)
    # 4 the server cannot count what a group was not given
    await redis.xgroup_create(stream, "by-hand", (await redis.xrange(stream))[40][0])
    # 5 dead letters
    letter = {"id": "1", "type": "order.paid", "data": "{}", "deadreason": "failed"}
    await redis.xadd(f"{stream}:dead:receipts", letter | {"deaderror": "KeyError: 'x'"})
    # 6 an id of the future; 7 a key of another type; 8 a record that cannot be read
    await redis.xadd(other, {"id": "1", "type": "order.paid", "data": "{}"}, id=f"{now_ms * 2}-0")
    await redis.hset("bus:topics", "invoice", '{"partitions":1}')
    await redis.set("bus:{invoice:0}", "no stream")
    await redis.hset("bus:topics", "broken", "{")
    # 9 a memory policy that deletes streams; 10 nothing on disk
    ask(server, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    ask(server, "CONFIG", "SET", "appendonly", "no")

    ran = await at_ours("doctor", "--json")
    (found,) = ran.lines
    assert (ran.code, found["ok"]) == (1, False)
    findings = found["findings"]
    assert all(f["mend"] for f in findings if f["severity"] != "note")

    def told(*words: str) -> list[str]:
        return [f["mend"] for f in findings if all(w in f["text"] for w in words)]

    assert told("nobody serves", "receipts")
    assert "bus groups resume receipts --topic order" in told("paused", "moving house")
    assert any("bus consumers rm dead-worker" in m for m in told("dead-worker"))
    assert any(
        "bus groups seek by-hand" in m and "--recount" in m for m in told("by-hand", "count")
    )
    assert any("bus dead ls receipts" in m for m in told("dead letter", "KeyError"))
    assert told("future") or told("ahead", other)
    assert told("bus:{invoice:0}")
    assert told("broken")
    assert any("noeviction" in m for m in told("allkeys-lru"))
    assert any("appendonly yes" in m for m in told("append-only"))
    ran = await at_ours("doctor")
    assert all(f["mend"] in ran.out for f in findings if f["mend"])


async def test_limits_are_told_in_the_words_of_monitors(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    await bus.publish_many([OrderPaid(order_id="k", cents=n) for n in range(20)])
    for limits, code, status in (
        (["--warn", "100"], 0, "OK"),
        (["--warn", "10", "--crit", "100"], 1, "WARNING"),
        (["--crit", "20"], 2, "CRITICAL"),
        (["--group", "nobody"], 3, "UNKNOWN"),
        (["--topic", "nothing"], 3, "UNKNOWN"),
        (["--warn", "lots"], 3, None),
        (["--wran", "1"], 3, None),
    ):
        ran = await cli("check", "lag", *limits)
        assert ran.code == code, limits
        if status:
            assert ran.out.startswith(f"BUS LAG {status} - "), limits
    (said,) = (await cli("check", "workers", "--json")).lines
    assert (said["status"], said["readings"][0]["value"]) == (2, 0)
    ran = await cli("check", "lag", "--format", "json", "--crit", "1h")
    assert (ran.code, ran.lines[0]["readings"][0]["value"]) == (0, 20)
    ran = await cli("check", "lag", "--format", "prometheus", "--warn", "1")
    assert 'bus_group_undelivered_events{topic="order",group="receipts"} 20' in ran.out
    assert ran.code == 1
    for name in ("pending", "dead"):
        ran = await cli("check", name)
        assert (ran.code, f"BUS {name.upper()} OK" in ran.out) == (0, True)


async def test_a_server_that_is_away_is_unknown(shop: Path, zygote: Zygote) -> None:
    away = CommandLine(shop, "redis://127.0.0.1:1/0", zygote)
    ran = await away("check", "lag")
    assert (ran.code, "nobody answers at redis://127.0.0.1:1/0" in ran.out) == (3, True)
    ran = await away("doctor", "--json")
    assert (ran.code, ran.lines[0]["findings"][0]["check"]) == (69, "connection")
