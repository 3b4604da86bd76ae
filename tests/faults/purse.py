"""What the effects tests work on: purses that tokens are spent from, and the state that this makes.

`Spent` is handled by `ledger`, all by effects: the balance, a count and a mark for each attempt, a
slip (`Slip`) that the second handler counts, by an effect too, and `Crossed` when a purse falls
below zero. `Changed` is the event of a transaction.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any

from bus import Backoff, Delivery, Event, PublishError, PublishUnknown, Reject, event_handler
from tests.faults import history
from tests.faults.deeds import CANARY, Journal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from bus import Bus, Handler

LEASE_S = 0.4
MAX_ATTEMPTS = 25  # more than there are faults, so that none of them kills an event by itself
OPENING = {"a": 60, "b": 10_000, "c": 0}
GROUPS = {"bus:{purse:0}": "ledger", "bus:{slip:0}": "clerk", "bus:{change:0}": "clerk"}


class Spent(Event, type="purse.spent", key="purse"):
    """kind: what becomes of it; see `ledger`."""

    n: int
    purse: str
    amount: int
    kind: str = "plain"
    text: str = CANARY


class Slip(Event, type="slip.written"):
    n: int


class Crossed(Event, type="slip.crossed"):
    n: int
    purse: str


class Changed(Event, type="change.made"):
    n: int


def handlers(
    journal: Journal, *, stops: bool = False, batch: int = 0, **settings: Any
) -> list[Handler[...]]:
    """Return the two handlers.

    stops: whether events of that kind may stop this process. batch: how many events the first one
    takes at a time; 0 if it is no batch handler.
    """
    settings = {
        "concurrency": 8,
        "visibility_s": LEASE_S,
        "max_attempts": MAX_ATTEMPTS,
        "backoff": Backoff(base_s=0.01, factor=1.0, jitter=0.0),
        "breaker": None,
        **settings,
    }

    async def spend(event: Spent, delivery: Delivery[Spent]) -> None:
        journal.write("start", event.n, delivery.attempt)
        _collect(event, delivery)
        if event.kind == "stop" and stops and delivery.attempt == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        await _act(event, delivery)
        journal.write("end", event.n, delivery.attempt)

    async def spend_all(deliveries: list[Delivery[Spent]]) -> None:
        for delivery in deliveries:
            try:
                await spend(delivery.event, delivery)
            except ValueError as error:
                delivery.fail(error)
            except Reject as error:
                delivery.reject(error.reason)

    if batch:
        ledger: Handler[...] = event_handler(
            Spent, group="ledger", batch=batch, batch_wait_ms=5, **settings
        )(spend_all)
    else:
        ledger = event_handler(Spent, group="ledger", **settings)(spend)

    @event_handler(Slip, Changed, group="clerk", **settings)
    async def clerk(event: Slip | Changed, delivery: Delivery[Slip | Changed]) -> None:
        which = "slips applied" if isinstance(event, Slip) else "changes applied"
        delivery.effects.hincrby(which, str(event.n))

    return [ledger, clerk]


def _collect(event: Spent, delivery: Delivery[Spent]) -> None:
    effects = delivery.effects
    effects.hincrby("applied", str(event.n))
    effects.sadd("marks", f"{event.n}:{os.getpid()}:{delivery.attempt}")
    if event.kind == "broken":
        effects.hincrby("broken", "text")
    left = effects.hincrby(f"purse {event.purse}", "tokens", -event.amount)
    effects.publish(Crossed(n=event.n, purse=event.purse), when=left.between(-event.amount, -1))
    effects.publish(Slip(n=event.n))


async def _act(event: Spent, delivery: Delivery[Spent]) -> None:
    match event.kind:
        case "slow":
            for _ in range(event.n % 7):
                await asyncio.sleep(0.001)
        case "flaky" if delivery.attempt == 1:
            raise ValueError(f"not yet: {event.text}")
        case "doomed":
            raise ValueError(f"never: {event.text}")
        case "rejected":
            raise Reject("by its kind")


# --- the way in


async def publish(
    bus: Bus, journal: Journal, spends: Iterable[Spent], changes: Iterable[int] = ()
) -> None:
    """Publish and change in waves of some that run at once, and write down what comes of each."""

    async def attempt(name: str, n: int, doing: Awaitable[Any]) -> None:
        journal.write(name, n)
        try:
            await doing
        except PublishUnknown:
            journal.write(f"{name}.unknown", n)
        except PublishError:
            journal.write(f"{name}.refused", n)
        else:
            journal.write(f"{name}.ok", n)

    async def change(n: int) -> None:
        async with bus.transaction() as state:
            state.incrby("changed")
            state.sadd("change marks", n)
            state.publish(Changed(n=n))

    waiting = [("spend", s.n, bus.publish(s)) for s in spends]
    for at, n in enumerate(changes):
        waiting.insert(3 * at, ("change", n, change(n)))
    while waiting:
        wave, waiting = waiting[:8], waiting[8:]
        await asyncio.gather(*(attempt(*one) for one in wave))


# --- the state


async def open_purses(redis: Any) -> None:
    """Put tokens into the purses, and text where a number should be."""
    for purse, tokens in OPENING.items():
        await redis.hset(f"purse {purse}", "tokens", tokens)
    await redis.hset("broken", "text", "words")


async def left(redis: Any) -> dict[str, int]:
    """Return stream -> what is pending there, and 1 more if something was never delivered."""
    found = {}
    for stream, group in GROUPS.items():
        if not await redis.exists(stream):
            continue
        end = (await redis.xinfo_stream(stream))["last-generated-id"]
        rows = {r["name"].decode(): r for r in await redis.xinfo_groups(stream)}
        row = rows.get(group, {"pending": 0, "last-delivered-id": b"0-0"})
        found[stream] = row["pending"] + (row["last-delivered-id"] != end)
    return found


async def held_by(redis: Any, consumer: str) -> int:
    """Return how many entries are pending for a worker."""
    count = 0
    for stream, group in GROUPS.items():
        if await redis.exists(stream) and await redis.xinfo_groups(stream):
            count += len(await redis.xpending_range(stream, group, "-", "+", 100, consumer))
    return count


async def look(redis: Any) -> history.Server:
    """Return what the server says."""
    slips = [(_told(fields), fields[b"type"]) for fields in await _entries(redis, "bus:{slip:0}")]
    tokens = {p: await redis.hget(f"purse {p}", "tokens") for p in OPENING}
    marks = [m.decode().split(":") for m in await redis.smembers("marks")]
    return history.Server(
        opening=OPENING,
        balances={purse: int(found) for purse, found in tokens.items()},
        spent=tuple(_spent(fields) for fields in await _entries(redis, "bus:{purse:0}")),
        slips=tuple(t for t, type_ in slips if type_ == b"slip.written"),
        crossings=tuple(t for t, type_ in slips if type_ == b"slip.crossed"),
        changes=tuple(_told(fields) for fields in await _entries(redis, "bus:{change:0}")),
        dead=tuple(_dead(fields) for fields in await _entries(redis, "bus:{purse:0}:dead:ledger")),
        applied=await _counts(redis, "applied"),
        marks=frozenset((int(n), int(pid), int(attempt)) for n, pid, attempt in marks),
        slips_applied=await _counts(redis, "slips applied"),
        changes_applied=await _counts(redis, "changes applied"),
        changed=int(await redis.get("changed") or 0),
        change_marks=frozenset(map(int, await redis.smembers("change marks"))),
        left=await left(redis),
    )


async def _entries(redis: Any, stream: str) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await redis.xrange(stream)]


async def _counts(redis: Any, key: str) -> dict[int, int]:
    return {int(n): int(times) for n, times in (await redis.hgetall(key)).items()}


def _spent(fields: dict[bytes, bytes]) -> history.Spent:
    data = json.loads(fields[b"data"])
    kind = data.get("kind", "plain")
    return history.Spent(fields[b"id"].decode(), data["n"], data["purse"], data["amount"], kind)


def _told(fields: dict[bytes, bytes]) -> history.Told:
    data = json.loads(fields[b"data"])
    cause = fields.get(b"causationid", b"").decode()
    return history.Told(fields[b"id"].decode(), data["n"], cause, data.get("purse", ""))


def _dead(fields: dict[bytes, bytes]) -> history.Dead:
    n = json.loads(fields[b"data"])["n"]
    return history.Dead(n, fields[b"deadreason"].decode(), fields.get(b"deadapplied", b"").decode())
