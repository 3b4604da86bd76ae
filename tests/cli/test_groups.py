"""groups and consumers: listed, watched, made, moved, paused, removed on the command line."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

from bus import Worker
from tests.cli.conftest import CommandLine, ended
from tests.cli.shop import OrderPaid, send_receipt
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from bus import Bus


async def paid(bus: Bus, count: int) -> list[str]:
    receipts = await bus.publish_many([OrderPaid(order_id="k", cents=n) for n in range(count)])
    return [r.entry_id for r in receipts]


async def test_a_group_is_made_listed_and_removed(cli: CommandLine, bus: Bus) -> None:
    ids = await paid(bus, 10)
    (made,) = await cli.json("groups", "create", "receipts", "--topic", "order", "--at", ids[4])
    assert made["streams"] == ["bus:{order:0}", "bus:{order:1}"]
    ran = await cli("groups", "create", "receipts", "--topic", "order")
    assert (ran.code, "was there on bus:{order:0}" in ran.err) == (0, True)
    (group,) = await cli.json("groups", "ls")
    assert (group["topic"], group["group"], group["undelivered"]) == ("order", "receipts", 6)
    (group,) = await cli.json("groups", "info", "receipts")
    assert (group["served"], group["consumers"], group["paused"]) == (False, [], None)
    ran = await cli("groups", "info", "receipts")
    assert "not served" in ran.out
    ran = await cli("groups", "rm", "receipts")
    assert (ran.code, "6 undelivered" in ran.err) == (2, True)
    dry = await cli.json("groups", "rm", "receipts", "--dry-run")
    assert (sum(r["undelivered"] for r in dry), dry[0]["dry_run"]) == (6, True)
    removed = await cli.json("groups", "rm", "receipts", "--yes")
    assert [r["stream"] for r in removed] == ["bus:{order:0}", "bus:{order:1}"]
    assert await cli.json("groups", "ls") == []


async def test_a_group_at_work_is_not_removed(cli: CommandLine, bus: Bus) -> None:
    async with Worker(bus, [send_receipt]):
        ran = await cli("groups", "rm", "receipts", "--yes")
    assert (ran.code, "Stop them first" in ran.err) == (1, True)


async def test_a_group_is_moved_forwards_and_back(cli: CommandLine, bus: Bus) -> None:
    ids = await paid(bus, 10)
    await bus.admin.create_group("receipts", "order")
    ran = await cli("groups", "seek", "receipts", "--to", "end")
    assert (ran.code, "skips 10 entries that it was not given" in ran.err) == (2, True)
    dry = await cli.json("groups", "seek", "receipts", "--to", "end", "--dry-run")
    assert sum(s["skipped"] for s in dry) == 10
    await cli.json("groups", "seek", "receipts", "--to", "end", "--yes")
    back = await cli.json("groups", "seek", "receipts", "--to", ids[7], "--topic", "order", "--yes")
    assert sum(s["again"] for s in back) == 3
    (group,) = await cli.json("groups", "ls", "receipts")
    assert group["undelivered"] == 3
    told = await cli.json("groups", "seek", "receipts", "--recount")
    assert all(s["counted"] for s in told)


async def test_lag_is_shown_once_and_watched(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    await paid(bus, 10)
    (lag,) = await cli.json("groups", "lag")
    assert (lag["group"], lag["undelivered"], lag["total"]) == ("receipts", 10, 10)
    process = await cli.start("groups", "lag", "receipts", "--watch", "200ms", "--json")
    assert process.stdout is not None

    async def look() -> dict[str, Any]:
        assert process.stdout is not None
        return json.loads(await process.stdout.readline())

    async with asyncio.timeout(20):
        assert (await look())["handled_per_s"] is None
        async with Worker(bus, [send_receipt]) as worker:
            await worker.drained()
            seen = await look()
            while seen["total"]:
                seen = await look()
            assert seen["handled_per_s"] >= 0
    process.send_signal(signal.SIGINT)
    assert (await ended(process)).code == 130


async def test_a_watch_without_a_terminal_is_tables(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    process = await cli.start("groups", "lag", "-w", "0.2")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        seen = [await process.stdout.readline() for _ in range(4)]
    assert [line.split()[0] for line in seen] == [b"topic", b"order", b"topic", b"order"]


async def test_a_group_is_paused_and_resumed(cli: CommandLine, bus: Bus) -> None:
    witness = Witness(bus)
    async with Worker(bus, [send_receipt]) as worker:
        (paused,) = await cli.json(
            "groups", "pause", "receipts", "--until", "30m", "--why", "try it"
        )
        assert (paused["topic"], paused["paused"]["why"]) == ("order", "try it")
        assert paused["paused"]["until"] is not None
        await eventually(lambda: witness.of("group.paused"))
        await paid(bus, 5)
        (group,) = await cli.json("groups", "ls", "receipts")
        assert (group["undelivered"], group["served"]) == (5, True)
        ran = await cli("groups", "ls")
        assert ("paused until" in ran.out, "(try it)" in ran.out) == (True, True)
        ran = await cli("groups", "pause", "receipts")
        assert "publishers will feel it in about" in ran.err
        (resumed,) = await cli.json("groups", "resume", "receipts")
        assert resumed == {"group": "receipts", "topics": ["order"]}
        await worker.drained()
    ran = await cli("groups", "resume", "receipts")
    assert (ran.code, "was not paused" in ran.err) == (0, True)
    ran = await cli("groups", "pause", "receipts", "--until", "2020-01-01")
    assert ran.code == 2
    ran = await cli("groups", "pause", "receipts", "--until", "2999-01-01")
    assert ran.code == 2


async def test_a_consumer_that_is_gone_is_removed(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    await paid(bus, 3)
    for stream in ("bus:{order:0}", "bus:{order:1}"):
        await bus.redis.sadd(f"{stream}:workers", "gone")
        await bus.redis.xreadgroup("receipts", "gone", {stream: ">"})
    (consumer,) = await cli.json("consumers", "ls", "receipts")
    assert (consumer["name"], consumer["alive"], consumer["pending"]) == ("gone", False, 3)
    asked = ("consumers", "rm", "gone", "--group", "receipts")
    ran = await cli(*asked)
    assert (ran.code, "hand 3 entries back" in ran.err) == (2, True)
    await cli.json(*asked, "--dry-run")
    done = await cli.json(*asked, "--yes")
    assert sum(d["handed_back"] for d in done) == 3
    assert await cli.json("consumers", "ls") == []
    ran = await cli(*asked, "--yes")
    assert (ran.code, "has no consumer gone" in ran.err) == (1, True)
    async with Worker(bus, [send_receipt], name="alive") as worker:
        await worker.drained()
        ran = await cli("consumers", "rm", "alive", "--group", "receipts", "--yes")
    assert (ran.code, "stop that worker first" in ran.err) == (1, True)
