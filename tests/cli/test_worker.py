"""worker: anybody's package, run and stopped from the command line. More is in tests/worker."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cli.conftest import CommandLine, ended
from tests.cli.shop import OrderPaid
from tests.witness import eventually

if TYPE_CHECKING:
    from bus import Bus


async def served(cli: CommandLine, count: int) -> None:
    async def look() -> bool:
        found = await cli.json("consumers", "ls")
        return len({c["name"] for c in found if c["alive"]}) == count

    await eventually(look, f"{count} workers")


def command_lines() -> list[bytes]:
    """What anybody on this machine may read."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return found


async def test_a_package_is_run_until_it_is_told_to_stop(cli: CommandLine, bus: Bus) -> None:
    process = await cli.start("worker", "shop", "--only", "receipts", "--log", "json")
    await served(cli, 1)
    await bus.publish_many([OrderPaid(order_id=str(n), cents=n) for n in range(50)])

    async def handled() -> bool:
        (group,) = await cli.json("groups", "ls", "receipts")
        return group["undelivered"] + group["pending"] == 0

    await eventually(handled)
    assert [g["group"] for g in await cli.json("groups", "ls")] == ["receipts"]
    process.send_signal(signal.SIGTERM)
    ran = await ended(process)
    assert ran.code == 0
    assert [json.loads(line)["event"] for line in ran.err.splitlines()][-1] == "worker.stopped"


async def test_several_processes_run_as_one(cli: CommandLine) -> None:
    """With --url, whose password is in the command line that somebody typed, and in no other."""
    url = cli.environment["BUS_URL"].replace("redis://", "redis://default:sw0rdfish@")
    words = ("worker", "shop", "--processes", "2", "--concurrency", "3", "--grace-s", "1")
    process = await asyncio.create_subprocess_exec(  # with a command line of its own
        *(sys.executable, "-m", "bus", *words, "--url", url, "--json"),
        cwd=cli.folder,
        env=cli.environment | {"BUS_URL": "redis://127.0.0.1:1/0"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await served(cli, 2)
    ours = [c for c in command_lines() if b"--grace-s" in c]
    assert (len(ours), sum(b"sw0rdfish" in c for c in ours)) == (3, 1)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 0
    assert all(json.loads(line)["event"] for line in err.splitlines())


async def test_one_that_is_paused_starts_and_handles_nothing(cli: CommandLine, bus: Bus) -> None:
    await cli.json("groups", "create", "receipts", "--topic", "order")
    await cli.json("groups", "pause", "receipts")
    await bus.publish_many([OrderPaid(order_id=str(n), cents=n) for n in range(5)])
    process = await cli.start("worker", "shop", "--only", "receipts", "--log", "json")
    assert process.stderr is not None
    said = ""
    async with asyncio.timeout(20):
        while "worker.started" not in said:
            said += (await process.stderr.readline()).decode()
    assert "group.paused" in said
    (group,) = await cli.json("groups", "ls", "receipts")
    assert (group["undelivered"], group["pending"], group["served"]) == (5, 0, True)
    process.send_signal(signal.SIGTERM)
    assert (await ended(process)).code == 0
