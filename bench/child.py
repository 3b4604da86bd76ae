"""One system in a process of its own: takes orders on stdin, answers each in a line of JSON.

`python -m bench.child MODULE`. An order is a JSON object, and `do` says what: "fill", "publish",
"pace", or "work", which ends the process, since not every system can be stopped and used again.
"""

import asyncio
import gc
import importlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from bench.work import BATCH, LANES, Board, Work, make_fields

Order = dict[str, Any]


async def fill(system: Any, order: Order) -> Order:
    """Publish a backlog as fast as the system can."""
    publisher = await system.publisher(order["url"])
    events = [publisher.event(f) for f in make_fields(min(order["count"], 4 * BATCH))]
    for start in range(0, order["count"], len(events)):
        part = events[: order["count"] - start]
        if hasattr(publisher, "publish_many"):
            for first in range(0, len(part), BATCH):
                await publisher.publish_many(part[first : first + BATCH])
        else:
            await _by_lanes(publisher, part)
    await publisher.close()
    return {"published": order["count"]}


async def publish(system: Any, order: Order) -> Order:
    """Publish, timed: "sequential", "concurrent" or "many"; ends early when the time is up."""
    publisher = await system.publisher(order["url"])
    events = [publisher.event(f) for f in make_fields(order["count"] + BATCH)]
    warm, events = events[:BATCH], events[BATCH:]
    way = order["way"]
    await _by_lanes(publisher, warm, lanes=1 if way == "sequential" else LANES)
    gc.collect()
    gc.freeze()
    cpu, started = time.process_time(), time.perf_counter()
    ends = started + order["most_s"]
    done = 0
    if way == "many":
        for start in range(0, len(events), BATCH):
            part = events[start : start + BATCH]
            await publisher.publish_many(part)
            done += len(part)
            if time.perf_counter() > ends:
                break
    else:
        done = await _by_lanes(publisher, events, 1 if way == "sequential" else LANES, ends)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    gc.unfreeze()
    await publisher.close()
    return {
        "published": len(warm) + done,
        "rate": done / seconds,
        "cpu_us": cpu / done * 1e6,
    }


async def _by_lanes(
    publisher: Any, events: list[Any], lanes: int = LANES, ends: float = float("inf")
) -> int:
    """Have `lanes` callers await each publish before the next; return how many were published."""
    waiting = iter(events)
    done = 0

    async def lane() -> None:
        nonlocal done
        for event in waiting:
            await publisher.publish(event)
            done += 1
            if not done & 63 and time.perf_counter() > ends:
                return

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return done


async def pace(system: Any, order: Order) -> Order:
    """Publish at a rate, each event with the time at which it was made."""
    publisher = await system.publisher(order["url"])
    clock, step_ns = time.perf_counter_ns, int(1e9 / order["rate"])
    fields = [dict(f) for f in make_fields(order["count"])]
    due = clock()
    for one in fields:
        due += step_ns
        while (left := due - clock()) > 0:  # noqa: ASYNC110 - it is a clock
            await asyncio.sleep(left / 1e9)
        one["tokens"] = clock()
        await publisher.publish(publisher.event(one))
    await publisher.close()
    return {"published": len(fields)}


async def work(system: Any, order: Order) -> Order:
    """Work until the board says stop."""
    board = Board(Path(order["board"]))
    work = Work(board, order["row"], order["kind"], order["group"], order["concurrency"])
    how = getattr(system, order.get("how", "work"))
    if "batch" in order:
        how = partial(how, batch=order["batch"])
    try:
        await how(order["url"], work)
    except Exception as error:  # an untidy end must not lose what was measured
        if not board.row(0)[1]:
            raise
        print(f"at its end: {error!r}", file=sys.stderr)
    return dict(work.figures())


def main() -> None:
    """Do what is asked for until stdin ends."""
    system = importlib.import_module(f"bench.systems.{sys.argv[1]}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a system prints is no answer
    for line in sys.stdin:
        order = json.loads(line)
        answer = uvloop.run(
            {"fill": fill, "publish": publish, "pace": pace, "work": work}[order["do"]](
                system, order
            )
        )
        print(json.dumps(answer), file=answers, flush=True)
        if order["do"] == "work":
            os._exit(0)


if __name__ == "__main__":
    main()
