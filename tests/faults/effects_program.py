"""A worker, or a publisher, of the purses, with a fault in it: see `program.py` for the faults.

What it is told besides: `role`, "worker" or "publisher"; `mutant`, of `mutants.py`, "" for the
product as it is; `batch`, see `purse.handlers`; `spends` and `changes`, what a publisher publishes,
and its `publish_timeout_s`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop

from bus import Bus, Worker
from bus.instrument.logging import attach, configure
from bus.worker import reclaimer
from tests.faults import mutants, program, purse
from tests.faults.deeds import Journal


async def work(bus: Bus, journal: Journal, wish: dict[str, Any]) -> None:
    """Work until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    handlers = purse.handlers(journal, stops=True, batch=wish.get("batch", 0))
    async with Worker(bus, handlers, lease_s=purse.LEASE_S, name=wish.get("name")):
        await stop.wait()


async def main(wish: dict[str, Any]) -> None:
    journal = Journal(Path(wish["folder"]))
    bus = Bus.connect(wish["url"], publish_timeout_s=wish.get("publish_timeout_s", 10.0))
    attach(bus.telemetry)
    async with bus:
        if wish.get("role", "worker") == "worker":
            await work(bus, journal, wish)
        else:
            spends = [purse.Spent(**fields) for fields in wish.get("spends", ())]
            await purse.publish(bus, journal, spends, wish.get("changes", ()))


if __name__ == "__main__":
    wish = json.loads(sys.argv[1])
    configure("json")
    reclaimer.SWEEP_S, reclaimer.SWEEP_LEASE_MS = 0.1, 400
    if wish.get("mutant"):
        mutants.MUTANTS[wish["mutant"]]()
    if wish.get("point"):
        where = wish["point"], wish["moment"], wish.get("nth", 1), wish.get("signal", "SIGKILL")
        program.install(*where)
    if wish.get("lose_reads"):
        program.lose_reads(wish["lose_reads"])
    uvloop.run(main(wish))
