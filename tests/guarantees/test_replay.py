"""Replays: history once more for one handler, one function, or everybody, and each event once."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Backoff,
    Bus,
    CheckpointError,
    DeclarationError,
    Delivery,
    Event,
    InvalidEffect,
    Progress,
    Topic,
    UnknownGroup,
    UnknownTopic,
    Worker,
    event_handler,
)
from bus.history import replay
from bus.streams import keys
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.guarantees.backend import Backend
    from tests.witness import Witness

TOPIC = Topic("lore", partitions=3)
STREAMS = [f"bus:{{lore:{p}}}" for p in range(3)]


class Told(Event, type="lore.told", key="teller"):
    teller: str
    n: int


class Sung(Event, type="lore.sung", key="teller"):
    teller: str
    n: int


def told(n: int) -> Told:
    return Told(teller=f"t{n % 7}", n=n)


def _numbered() -> Any:
    """Names of cases whose values, functions among them, have none that is the same everywhere."""
    numbers = itertools.count()
    return lambda _: str(next(numbers))


class Hall:
    """A bus with two groups that have handled everything; a third one where it matters."""

    def __init__(self, backend: Backend, bus: Bus, witness: Witness) -> None:
        self.backend, self.bus, self.witness = backend, bus, witness
        self.heard: list[tuple[str, int, Delivery[Any]]] = []

        @event_handler(Told, Sung, group="index", backoff=Backoff(base_s=0.1), breaker=None)
        async def index(event: Told | Sung, delivery: Delivery[Any]) -> None:
            self.heard.append(("index", event.n, delivery))

        @event_handler(Told, Sung, group="audit")
        async def audit(event: Told | Sung, delivery: Delivery[Any]) -> None:
            self.heard.append(("audit", event.n, delivery))

        self.handlers = [index, audit]

    async def publish(self, count: int, first: int = 0) -> None:
        """In lots, so that the partitions alternate in time."""
        for n in range(first, first + count, 50):
            await self.bus.publish_many([told(m) for m in range(n, min(n + 50, first + count))])

    async def work(self) -> list[tuple[str, int, Delivery[Any]]]:
        """Let workers handle everything there is; return what they heard."""
        self.heard.clear()
        async with Worker(self.bus, self.handlers) as worker:
            await worker.drained(60)
        return list(self.heard)

    async def inbox(self, group: str = "index") -> list[dict[str, bytes]]:
        found: list[dict[str, bytes]] = []
        for stream in STREAMS:
            found += (await self.backend.entries(f"{stream}:inbox:{group}")).values()
        return found

    async def in_inbox(self, group: str = "index") -> list[int]:
        return sorted(json.loads(f["data"])["n"] for f in await self.inbox(group))

    async def memories(self) -> list[bytes]:
        return [key async for key in self.backend.redis.scan_iter("*:replay:*")]


@pytest.fixture
async def hall(backend: Backend) -> AsyncIterator[Hall]:
    async with backend.bus(topics=[TOPIC]) as (bus, witness):
        hall = Hall(backend, bus, witness)
        await hall.work()  # makes the groups
        yield hall


# --- into one handler's inbox


async def test_one_handler_alone_gets_what_happened_and_each_event_once(hall: Hall) -> None:
    receipts = {}
    for n in range(50):
        receipts[n] = await hall.bus.publish(told(n))
    await hall.work()
    before = {s: await hall.backend.entries(s) for s in STREAMS}
    done = await hall.bus.replay("lore", to="index")
    assert (done.read, done.matched, done.replayed, done.unreadable, done.gone) == (
        50,
        50,
        50,
        0,
        0,
    )
    heard = await hall.work()
    assert Counter((group, n) for group, n, _ in heard) == Counter(("index", n) for n in range(50))
    for _, n, delivery in heard:
        assert (delivery.replayed, delivery.redriven, delivery.attempt) == (True, False, 1)
        envelope = delivery.envelope
        assert (envelope.event_id, envelope.entry_id) == (
            receipts[n].event_id,
            receipts[n].entry_id,
        )
        assert envelope.stream == receipts[n].stream
        assert envelope.time.timestamp() * 1000 == int(envelope.entry_id.partition("-")[0])
        assert envelope.run == done.run
    assert {s: await hall.backend.entries(s) for s in STREAMS} == before
    assert await hall.inbox() == []
    assert await hall.memories() == []


async def test_what_is_new_is_not_replayed(hall: Hall) -> None:
    await hall.publish(1)
    ((_, _, first), _) = await hall.work()
    assert (first.replayed, first.redriven, first.envelope.run) == (False, False, "")


async def test_a_replayed_event_fails_like_any_other(hall: Hall) -> None:
    receipt = await hall.bus.publish(told(1))
    await hall.work()
    attempts: list[int] = []

    @event_handler(Told, group="index", backoff=Backoff(base_s=0.05), max_attempts=3, breaker=None)
    async def fails(event: Told, delivery: Delivery[Told]) -> None:
        attempts.append(delivery.attempt)
        assert delivery.replayed
        raise ValueError("again")

    await hall.bus.replay("lore", to="index")
    async with Worker(hall.bus, [fails]) as worker:
        await worker.drained()
    assert attempts == [1, 2, 3]
    (letter,) = await hall.backend.dead(receipt.stream, "index")
    assert letter["deadentry"].decode() == receipt.entry_id
    assert not {"origentry", "attempts", "due", "run"} & letter.keys()


async def test_once_does_not_hold_a_replay_back(backend: Backend) -> None:
    handled: list[bool] = []

    @event_handler(Told, group="index", once=timedelta(hours=1))
    async def handle(event: Told, delivery: Delivery[Told]) -> None:
        handled.append(delivery.replayed)

    async with backend.bus(topics=[TOPIC]) as (bus, _), Worker(bus, [handle]) as worker:
        await bus.publish(told(1), event_id="same")
        await bus.publish(told(1), event_id="same")
        await worker.drained()
        for _ in range(2):
            await bus.replay("lore", to="index", limit=1)
            await worker.drained()
    assert handled == [False, True, True]


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ({}, range(40)),
        ({"types": [Sung]}, range(20, 40)),
        ({"types": "lore.t*"}, None),
        ({"types": ["lore.told", Sung]}, range(40)),
        ({"key": "t3"}, [3, 10, 17, 24, 31, 38]),
        ({"where": lambda envelope: envelope.event.n % 10 == 0}, [0, 10, 20, 30]),
        ({"key": "t3", "types": Told, "where": lambda e: e.event.n > 3}, [10, 17]),
        ({"limit": 15}, range(15)),
        ({"since": "end", "until": "end"}, []),
        ({"until": "2001-01-01"}, []),
        ({"types": "other.*"}, []),
    ],
    ids=_numbered(),
)
async def test_a_replay_takes_what_history_finds(
    hall: Hall, asked: dict[str, Any], numbers: Any
) -> None:
    for n in range(40):
        await hall.bus.publish((Told if n < 20 else Sung)(teller=f"t{n % 7}", n=n))
    await hall.work()
    if numbers is None:
        with pytest.raises(DeclarationError, match="type pattern"):
            await hall.bus.replay("lore", to="index", **asked)
        return
    past = sorted([e.event.n async for e in hall.bus.history("lore", **asked)])
    assert len(past) == len(numbers)
    assert past == list(numbers) or "limit" in asked  # entries of one time may come in any order
    done = await hall.bus.replay("lore", to="index", **asked)
    assert (done.replayed, await hall.in_inbox()) == (len(past), past)


async def test_since_and_until_are_times_and_both_included(hall: Hall) -> None:
    for n in range(10):
        for stream in STREAMS:
            fields = {
                "id": f"{stream}{n}",
                "type": "lore.told",
                "data": f'{{"teller":"t","n":{n}}}',
            }
            await hall.backend.add(stream, fields, f"{1_000_000 + n * 1000}-0")
    at = datetime.fromtimestamp(1_003, UTC)
    done = await hall.bus.replay("lore", to="index", since=at, until=1_005_000)
    assert (done.read, done.replayed) == (9, 9)
    assert await hall.in_inbox() == [3, 3, 3, 4, 4, 4, 5, 5, 5]


async def test_what_comes_after_it_began_is_left_alone(hall: Hall) -> None:
    """Else a replay that publishes, or a busy topic, would have no end."""
    await hall.publish(1_200)
    published = False

    async def publish_more(progress: Progress) -> None:
        nonlocal published
        if not published and 0 < progress.replayed < 1_200:
            published = True
            await hall.publish(10, first=5_000)

    done = await hall.bus.replay("lore", to="index", progress=publish_more)
    assert published
    assert done.replayed == 1_200
    assert await hall.in_inbox() == list(range(1_200))


async def test_it_goes_no_faster_than_asked(hall: Hall) -> None:
    await hall.publish(60)
    started = time.monotonic()
    done = await hall.bus.replay("lore", to="index", rate=100)
    assert done.replayed == 60
    assert time.monotonic() - started > 60 / 100 - 0.01


async def test_a_dry_run_counts_and_shows_and_touches_nothing(hall: Hall, tmp_path: Path) -> None:
    await hall.publish(30)
    before = await _everything(hall)
    done = await hall.bus.replay(
        "lore", to="index", dry_run=True, key="t1", checkpoint=tmp_path / "file"
    )
    assert (done.read < 30, done.matched, done.replayed, done.run) == (True, 5, 0, "")
    assert [e.event.n for e in done.sample] == [1, 8, 15, 22, 29]
    several = await hall.bus.replay("lore", to="index", dry_run=True, limit=12)
    assert (several.matched, len(several.sample)) == (12, 10)
    called: list[Event] = []
    assert (await hall.bus.replay("lore", to=called.append, dry_run=True)).matched == 30
    assert called == []
    assert await _everything(hall) == before
    assert not (tmp_path / "file").exists()


async def _everything(hall: Hall) -> dict[str, Any]:
    """All keys but those that live and die by themselves, with what they hold."""
    redis = hall.backend.redis
    found = [k async for k in redis.scan_iter("*") if await redis.ttl(k) < 0]
    return {k: await redis.dump(k) for k in sorted(found)}


async def test_progress_is_told(hall: Hall) -> None:
    await hall.publish(2_000)
    seen: list[Progress] = []
    done = await hall.bus.replay("lore", to="index", rate=5_000, progress=seen.append)
    assert len(seen) >= 2
    assert all(a.read <= b.read and a.share <= b.share for a, b in itertools.pairwise(seen))
    last = seen[-1]
    assert (last.read, last.replayed, last.share, last.waiting) == (2_000, 2_000, 1.0, False)
    assert last.at is not None
    assert abs(last.at - datetime.now(UTC)) < timedelta(minutes=1)
    assert done.replayed == 2_000


async def test_an_error_of_the_progress_function_ends_it(hall: Hall) -> None:
    await hall.publish(10)

    def stop(progress: Progress) -> None:
        raise KeyError(progress.read)

    with pytest.raises(KeyError):
        await hall.bus.replay("lore", to="index", progress=stop)


async def test_entries_of_foreign_writers_are_left_out_and_told(hall: Hall) -> None:
    await hall.publish(3)
    stream = STREAMS[0]
    await hall.backend.add(stream, {"hello": "world"})
    await hall.backend.add(stream, {"id": "x", "type": "lore.told"})
    await hall.backend.add(stream, {b"id": b"\xff", b"type": b"\xfe", b"data": b"\x00"})
    await hall.backend.add(
        stream, {f"f{n}": "v" for n in range(3_501)} | {"id": "1", "type": "t", "data": "{}"}
    )
    done = await hall.bus.replay("lore", to="index")
    assert (done.read, done.matched, done.replayed, done.unreadable) == (7, 4, 4, 3)
    told = hall.witness.of("replay.unreadable")
    assert ["has no field `id`" in told[0]["error"], "`data`" in told[1]["error"]] == [True, True]
    assert "too many" in told[2]["error"]
    assert len(await hall.inbox()) == 4  # what has an id, a type and data is the handler's to judge
    # A predicate that asks for the event takes none that has no event.
    done = await hall.bus.replay("lore", to="audit", where=lambda e: e.event.n < 2)
    assert (done.matched, done.unreadable) == (2, 4)


async def test_entries_trimmed_meanwhile_are_counted(hall: Hall, monkeypatch: Any) -> None:
    await hall.publish(30)
    put = hall.bus.store.archive.replay

    async def trim_first(stream: str, *args: Any) -> Any:
        await hall.backend.redis.xtrim(stream, maxlen=2, approximate=False)
        return await put(stream, *args)

    monkeypatch.setattr(hall.bus.store.archive, "replay", trim_first)
    done = await hall.bus.replay("lore", to="index")
    left = sum([await hall.backend.redis.xlen(stream) for stream in STREAMS])
    assert (done.matched, done.replayed, done.gone) == (30, left, 30 - left)


async def test_large_entries_go_in_small_batches(hall: Hall, monkeypatch: Any) -> None:
    """By bytes as by number: a script with 500 bodies of 250 KB would keep the server busy."""
    monkeypatch.setattr(replay, "CHECKPOINT_S", 3_600.0)
    fields = {"type": "lore.told", "data": json.dumps({"teller": "x" * 50_000, "n": 1})}
    for n in range(40):
        await hall.backend.add(STREAMS[0], {"id": f"large{n}", **fields})
    for n in range(200):
        await hall.backend.add(STREAMS[0], {"id": f"small{n}", **fields, "data": "{}"})
    put = hall.bus.store.archive.replay
    batches: list[int] = []

    async def watched(*args: Any) -> Any:
        batches.append(len(args[-1]))
        return await put(*args)

    monkeypatch.setattr(hall.bus.store.archive, "replay", watched)
    assert (await hall.bus.replay("lore", to="index")).replayed == 240
    # Half a MiB of large ones is 11, and the small ones go together as soon as they can.
    assert batches == [11, 11, 11, 207]


async def test_a_group_may_be_on_a_later_partition_only(hall: Hall) -> None:
    """A partition that was added has it when a worker comes; it is copied to all the same."""
    await hall.publish(50)
    for stream in STREAMS[:2]:
        await hall.backend.redis.xgroup_destroy(stream, "index")
        await hall.backend.redis.delete(f"{stream}:inbox:index")
    assert (await hall.bus.replay("lore", to="index")).replayed == 50
    assert await hall.in_inbox() == list(range(50))


async def test_ids_of_any_size_are_passed_on(hall: Hall) -> None:
    """An id may have 20 digits on either side; a program in another language may choose it."""
    ids = ["12345678901234567-0", f"{2**64 - 1}-{2**64 - 2}"]
    for entry_id in ids:
        fields = {"id": "i", "type": "lore.told", "data": '{"teller":"t","n":1}'}
        await hall.backend.add(STREAMS[0], fields, entry_id)
    await hall.work()
    assert (await hall.bus.replay("lore", to="index")).replayed == 2
    heard = [d for _, _, d in await hall.work()]
    assert sorted(d.envelope.entry_id for d in heard) == sorted(ids)
    assert {d.replayed for d in heard} == {True}


# --- backpressure


async def test_a_full_inbox_is_waited_for(backend: Backend) -> None:
    """An inbox takes half of what lies between keep and maxlen; its handler decides how fast."""
    longest = 0
    handled: list[int] = []
    open_gate = asyncio.Event()

    @event_handler(Told, group="index", concurrency=4)
    async def handle(event: Told) -> None:
        nonlocal longest
        longest = max(longest, await backend.redis.xlen("bus:{lore:0}:inbox:index"))
        await open_gate.wait()
        handled.append(event.n)

    @event_handler(Told, group="audit")
    async def other(event: Told) -> None: ...

    topic = Topic("lore", maxlen=120, keep=80)
    async with (
        backend.bus(topics=[topic]) as (bus, witness),
        Worker(bus, [handle, other]) as worker,
    ):
        open_gate.set()
        await bus.publish_many([told(n) for n in range(40)])
        await bus.publish_many([told(n) for n in range(40, 80)])
        await worker.drained()
        handled.clear()
        open_gate.clear()
        waits: list[Progress] = []
        replaying = asyncio.create_task(
            bus.replay(
                "lore", to="index", progress=lambda p: waits.append(p) if p.waiting else None
            )
        )
        await eventually(lambda: len(waits) >= 3)
        assert not replaying.done()
        assert waits[-1].replayed <= 20 + 4
        open_gate.set()
        done = await replaying
        await worker.drained()
    assert done.replayed == 80
    assert sorted(handled) == list(range(80))
    assert longest <= 20
    assert 1 <= len(witness.of("replay.waits")) < len(waits)


# --- again, after it was stopped


async def stopped_after(hall: Hall, count: int, path: Path, **asked: Any) -> None:
    """Replay with a checkpoint, and break off when so many are in the inbox."""

    class Enough(Exception): ...

    def look(progress: Progress) -> None:
        if progress.replayed >= count:
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "PROGRESS_S", 0.0)  # at every batch, however slow the machine is
        with pytest.raises(Enough):
            await hall.bus.replay("lore", to="index", checkpoint=path, progress=look, **asked)


async def test_it_goes_on_where_it_stopped(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(3_000)
    await stopped_after(hall, 1, path, rate=3_000)
    first = len(await hall.inbox())
    assert 0 < first < 3_000
    await hall.publish(50, first=9_000)  # not of this replay: it has begun
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert (done.resumed, done.replayed) == (True, 3_000)
    assert json.loads(path.read_text())["finished"]
    assert await hall.in_inbox() == list(range(3_000))
    again = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert again == done
    assert len(await hall.inbox()) == 3_000
    other = await hall.bus.replay("lore", to="index", limit=5)
    assert other.run != done.run
    assert len(await hall.inbox()) == 3_005


async def test_a_dry_run_says_what_is_left_of_one_that_was_stopped(
    hall: Hall, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(3_000)
    await stopped_after(hall, 1, path, rate=3_000)
    first = len(await hall.inbox())
    assert 0 < first < 3_000
    before, written = await _everything(hall), path.read_bytes()
    said = await hall.bus.replay("lore", to="index", checkpoint=path, dry_run=True)
    assert (said.resumed, said.matched, said.replayed) == (True, 3_000 - first, 0)
    assert (await _everything(hall), path.read_bytes()) == (before, written)
    with pytest.raises(CheckpointError, match="is of another replay"):
        await hall.bus.replay("lore", to="index", checkpoint=path, dry_run=True, limit=5)
    await hall.bus.replay("lore", to="index", checkpoint=path)
    said = await hall.bus.replay("lore", to="index", checkpoint=path, dry_run=True)
    assert (said.resumed, said.read, said.matched) == (True, 0, 0)


async def test_a_dry_run_of_a_limited_one_counts_what_went_before(
    hall: Hall, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(3_000)
    await stopped_after(hall, 1, path, rate=3_000, limit=2_000)
    first = len(await hall.inbox())
    asked: dict[str, Any] = {"to": "index", "checkpoint": path, "limit": 2_000}
    said = await hall.bus.replay("lore", dry_run=True, **asked)
    assert said.matched == 2_000 - first
    assert (await hall.bus.replay("lore", **asked)).replayed == 2_000


async def test_the_last_of_the_range_bounds_another(hall: Hall) -> None:
    await hall.publish(30)
    said = await hall.bus.replay("lore", to="index", dry_run=True)
    await hall.publish(5, first=100)
    done = await hall.bus.replay("lore", to="index", until=said.last)
    assert done.replayed == 30
    nothing = await hall.bus.replay("lore", to="index", dry_run=True, until=1)
    assert (nothing.read, nothing.last) == (0, "")


async def test_who_goes_back_and_is_stopped_misses_nothing_afterwards(
    hall: Hall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before it went back is not read: the file must not say so."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    path, redis = tmp_path / "checkpoint", hall.backend.redis
    for stream, ids in zip(STREAMS, (range(1, 51), range(1_000, 1_021)), strict=False):
        for n in ids:
            fields = {"id": "i", "type": "lore.told", "data": f'{{"teller":"t","n":{n}}}'}
            await hall.backend.add(stream, fields, f"{n}-0")
    state: dict[str, bytes] = {}

    class Enough(Exception): ...

    async def hurt(progress: Progress) -> None:
        if hall.witness.of("replay.rewound"):
            raise Enough
        if progress.replayed == 20:
            (memory,) = await hall.memories()
            for key in (memory.decode(), f"{STREAMS[0]}:inbox:index"):
                state[key] = await redis.dump(key)
        elif progress.replayed == 40:
            for key, value in state.items():
                await redis.restore(key, 600_000 * (":replay:" in key), value, replace=True)

    with pytest.raises(Enough):
        await hall.bus.replay("lore", to="index", rate=200, checkpoint=path, progress=hurt)
    assert await hall.in_inbox() == list(range(1, 41))
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert done.replayed == 71
    assert await hall.in_inbox() == [*range(1, 51), *range(1_000, 1_021)]


async def test_what_was_done_in_all_sessions_is_counted(
    hall: Hall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    path = tmp_path / "checkpoint"
    await hall.publish(3_000)
    await hall.backend.add(STREAMS[0], {"hello": "world"})
    for count in (300, 900, 1_500, 2_100):
        await stopped_after(hall, count, path, rate=8_000)
        saved = json.loads(path.read_text())
        assert saved["counts"]["replayed"] == len(await hall.inbox())
        assert not saved["finished"]
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert (done.read, done.matched, done.replayed) == (3_001, 3_000, 3_000)
    assert (done.unreadable, done.gone, done.gaps) == (1, 0, 0)
    assert hall.witness.of("history.gap") == []
    assert await hall.in_inbox() == list(range(3_000))


async def test_a_limit_holds_when_the_clock_asks_for_less_than_a_batch(hall: Hall) -> None:
    """The first look at the clock, after 64 entries, puts what is held: it counts."""
    await hall.publish(500)
    said = await hall.bus.replay("lore", to="index", dry_run=True, limit=100)
    assert (said.read, said.matched) == (100, 100)
    done = await hall.bus.replay("lore", to="index", limit=100)
    assert done.replayed == len(await hall.inbox()) == 100


async def test_a_limit_holds_over_all_sessions(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(2_000)
    await stopped_after(hall, 1, path, rate=2_000, limit=1_234)
    assert 0 < len(await hall.inbox()) < 1_234
    await hall.bus.replay("lore", to="index", checkpoint=path, limit=1_234)
    # Of one script that published them all, entries of all streams have one time: any may be left.
    assert len(set(await hall.in_inbox())) == len(await hall.inbox()) == 1_234


async def test_what_the_file_does_not_know_the_server_does(hall: Hall, tmp_path: Path) -> None:
    """A kill comes between the script and the file: the file is older than the inbox."""
    path = tmp_path / "checkpoint"
    await hall.publish(2_000)
    await stopped_after(hall, 1, path, rate=2_000)
    old = path.read_bytes()
    await stopped_after(hall, 600, path, rate=2_000)
    path.write_bytes(old)
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert done.replayed == 2_000
    assert await hall.in_inbox() == list(range(2_000))


async def test_what_the_server_lost_with_its_memory_comes_again(hall: Hall, tmp_path: Path) -> None:
    """A crash may cost it the last second: inbox and memory go back together, the file does not."""
    path = tmp_path / "checkpoint"
    await hall.publish(2_000)
    await stopped_after(hall, 200, path, rate=2_000)
    redis = hall.backend.redis
    names = [k async for k in redis.scan_iter("*:replay:*")] + [f"{s}:inbox:index" for s in STREAMS]
    state = {name: await redis.dump(name) for name in names if await redis.exists(name)}
    await stopped_after(hall, 1_000, path, rate=4_000)
    for name, value in state.items():
        await redis.restore(
            name, 600_000 if b":replay:" in str(name).encode() else 0, value, replace=True
        )
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert done.replayed == 2_000
    assert await hall.in_inbox() == list(range(2_000))


async def test_the_file_is_written_at_the_clock_also_when_nothing_is_wanted(
    hall: Hall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed has read what was not wanted in vain, but for the last half second."""
    monkeypatch.setattr(replay, "CHECKPOINT_S", 0.005)
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    path = tmp_path / "checkpoint"
    await hall.publish(1_000)
    read: list[tuple[int, int]] = []

    def look(progress: Progress) -> None:
        read.append((progress.read, json.loads(path.read_text())["counts"]["read"]))
        time.sleep(0.006)

    wanted = {"to": "index", "where": lambda envelope: False, "checkpoint": path}
    await hall.bus.replay("lore", progress=look, **wanted)
    assert len(read) >= 1_000 // 64
    assert all(now - written <= 64 for now, written in read)
    assert json.loads(path.read_text())["finished"]


async def test_an_error_at_the_end_does_not_hide_what_it_was(hall: Hall, tmp_path: Path) -> None:
    """The file cannot be written: a note beside the error that was there first."""
    await hall.publish(500)

    async def broken(progress: Progress) -> None:
        shutil.rmtree(tmp_path / "gone")
        raise KeyError("mine")

    (tmp_path / "gone").mkdir()
    with pytest.raises(KeyError, match="mine") as raised:
        await hall.bus.replay(
            "lore", to="index", checkpoint=tmp_path / "gone" / "file", progress=broken
        )
    assert "cannot be written" in raised.value.__notes__[0]
    (failed,) = hall.witness.of("replay.failed")
    assert failed["error_type"] == "KeyError"

    (tmp_path / "gone").mkdir()
    replaying = asyncio.create_task(
        hall.bus.replay("lore", to="index", checkpoint=tmp_path / "gone" / "file", rate=10)
    )
    await eventually((tmp_path / "gone" / "file").exists)
    shutil.rmtree(tmp_path / "gone")
    replaying.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await replaying
    assert replaying.cancelled()
    assert "cannot be written" in cancelled.value.__notes__[0]


async def test_a_server_that_remembers_nothing_is_told(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(2_000)
    await stopped_after(hall, 1, path, rate=2_000)
    await hall.backend.redis.delete(*await hall.memories())
    inbox = len(await hall.inbox())
    with pytest.raises(CheckpointError, match=r"no longer remembers the run replay-.*start over"):
        await hall.bus.replay("lore", to="index", checkpoint=path)
    assert len(await hall.inbox()) == inbox


@pytest.mark.servers_only("it takes two of them")
async def test_a_checkpoint_is_of_one_server(
    hall: Hall, tmp_path: Path, private_server: Any
) -> None:
    """Staging's, or production's: else the second gets nothing, and is told that it got all."""
    path = tmp_path / "checkpoint"
    await hall.publish(10)
    await hall.bus.replay("lore", to="index", checkpoint=path)
    async with Bus.connect(private_server().url, topics=[TOPIC]) as other:
        await other.publish(told(1))
        for stream in STREAMS:
            await other.redis.xgroup_create(stream, "index", "0", mkstream=True)
        with pytest.raises(CheckpointError, match="of another replay: server was 'redis://"):
            await other.replay("lore", to="index", checkpoint=path)
        with pytest.raises(CheckpointError, match="of another replay"):
            await hall.bus.replay("lore", to=other, checkpoint=path)


async def test_a_predicate_is_known_by_what_it_does(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(20)
    wanted = {"to": "index", "checkpoint": path}
    done = await hall.bus.replay("lore", where=lambda e: e.event.n < 5, **wanted)
    assert done.replayed == 5
    for other in (
        lambda e: e.event.n < 6,
        lambda e: e.event.n >= 5,
        lambda e: len(e.event.teller) < 5,
        lambda e: any(e.event.n < n for n in (5,)),
        int,
        None,
    ):
        with pytest.raises(CheckpointError, match="of another replay: where was"):
            await hall.bus.replay("lore", where=other, **wanted)

    # On another line it is the same.
    again = await hall.bus.replay("lore", where=lambda e: e.event.n < 5, **wanted)
    assert (again.run, again.replayed, again.resumed) == (done.run, 5, True)


async def test_two_at_once_with_one_checkpoint_put_nothing_twice(
    hall: Hall, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(3_000)
    await stopped_after(hall, 1, path, rate=3_000)
    await asyncio.gather(*(hall.bus.replay("lore", to="index", checkpoint=path) for _ in range(3)))
    assert await hall.in_inbox() == list(range(3_000))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"run": "replay-1", "asked": {}', b"[]", b"\xff\xfe", b'"x"', b"{}"],
    ids=repr,
)
async def test_a_damaged_checkpoint_is_refused(hall: Hall, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(text)
    await hall.publish(3)
    with pytest.raises(CheckpointError, match=r"checkpoint is not a whole checkpoint .*delete it"):
        await hall.bus.replay("lore", to="index", checkpoint=path)
    assert await hall.inbox() == []
    assert path.read_bytes() == text


async def test_a_checkpoint_cut_off_anywhere_is_refused(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(10)
    await hall.bus.replay("lore", to="index", checkpoint=path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            await hall.bus.replay("lore", to="index", checkpoint=path)
    assert len(await hall.inbox()) == 10


@pytest.mark.parametrize(
    "other",
    [
        {"to": "audit"},
        {"since": "@-1h"},
        {"until": "end"},
        {"types": [Told]},
        {"key": "t1"},
        {"limit": 7},
        {"where": lambda envelope: True},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_a_checkpoint_of_another_replay_is_refused(
    hall: Hall, tmp_path: Path, other: dict[str, Any]
) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(10)
    await hall.bus.replay("lore", to="index", checkpoint=path)
    with pytest.raises(
        CheckpointError, match=f"of another replay: {next(iter(other))} was .* and is"
    ):
        await hall.bus.replay("lore", **{"to": "index", "checkpoint": path, **other})
    assert len(await hall.inbox()) == 10


async def test_a_checkpoint_of_another_release_is_refused(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.bus.replay("lore", to="index", checkpoint=path)
    path.write_bytes(path.read_bytes().replace(b'"bus_replay": 1', b'"bus_replay": 2'))
    with pytest.raises(CheckpointError, match="another release"):
        await hall.bus.replay("lore", to="index", checkpoint=path)


async def test_a_checkpoint_that_cannot_be_written_or_read_is_told_first(
    hall: Hall, tmp_path: Path
) -> None:
    await hall.publish(10)
    with pytest.raises(CheckpointError, match="cannot be written"):
        await hall.bus.replay("lore", to="index", checkpoint=tmp_path / "no" / "folder")
    with pytest.raises(CheckpointError, match="cannot be read"):
        await hall.bus.replay("lore", to="index", checkpoint=tmp_path)
    assert await hall.inbox() == []
    assert await hall.memories() == []


# --- entries trimmed before they are read


async def test_what_was_trimmed_ahead_is_told_and_counted(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow replay, and publishers that go on: the oldest of history goes."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    await hall.bus.publish_many([Told(teller="one", n=n) for n in range(2_000)])
    stream = (await anext(hall.bus.history("lore"))).stream
    seen: list[Progress] = []

    async def trim(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 1:
            await hall.backend.redis.xtrim(stream, maxlen=200, approximate=False)

    done = await hall.bus.replay("lore", to="index", progress=trim)
    (gap,) = hall.witness.of("history.gap")
    assert gap["stream"] == stream
    assert gap["first"] == next(iter(await hall.backend.entries(stream)))
    assert (done.gaps, seen[-1].gaps, done.read < 2_000) == (1, 1, True)
    assert done.replayed + done.gone == done.matched == done.read
    assert set(range(1_800, 2_000)) <= set(await hall.in_inbox())


async def test_what_was_trimmed_between_two_sessions_is_told(hall: Hall, tmp_path: Path) -> None:
    """Be it what follows, or all of a stream that was not even begun."""
    path = tmp_path / "checkpoint"
    for n, stream in enumerate(STREAMS):
        for at in range(400):
            fields = {"id": "i", "type": "lore.told", "data": '{"teller":"t","n":1}'}
            await hall.backend.add(stream, fields, f"{(n + 1) * 10_000 + at}-0")
    await stopped_after(hall, 64, path, rate=1_000)
    await hall.backend.redis.xtrim(STREAMS[0], maxlen=50, approximate=False)
    await hall.backend.redis.xtrim(STREAMS[1], maxlen=300, approximate=False)
    await hall.backend.redis.delete(STREAMS[2])
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    gaps = {(g["stream"], g["first"]) for g in hall.witness.of("history.gap")}
    assert gaps == {(STREAMS[0], "10350-0"), (STREAMS[1], "20100-0"), (STREAMS[2], "")}
    assert done.gaps == 3


async def test_what_was_read_may_go(
    hall: Hall, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is read to the end of its range may be trimmed: nothing is missing."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    path = tmp_path / "checkpoint"
    for n, stream in enumerate(STREAMS):
        for at in range(300):
            fields = {"id": "i", "type": "lore.told", "data": '{"teller":"t","n":1}'}
            await hall.backend.add(stream, fields, f"{(n + 1) * 10_000 + at}-0")
    await stopped_after(hall, 301, path, rate=1_000)
    await hall.backend.redis.delete(STREAMS[0])
    done = await hall.bus.replay("lore", to="index", checkpoint=path)
    assert (done.gaps, done.replayed, done.read) == (0, 900, 900)
    assert hall.witness.of("history.gap") == []


# --- to a function


async def test_a_function_is_called_with_one_event_after_the_other(hall: Hall) -> None:
    await hall.publish(30)
    await hall.work()
    past = [e.event.n async for e in hall.bus.history("lore")]
    called: list[tuple[int, bool, str]] = []

    async def look(event: Told, delivery: Delivery[Told]) -> None:
        await asyncio.sleep(0)
        called.append((event.n, delivery.replayed, delivery.envelope.stream))

    done = await hall.bus.replay("lore", to=look, types=[Told])
    assert done.replayed == 30
    assert [n for n, _, _ in called] == past
    assert {replayed for _, replayed, _ in called} == {True}
    assert len({stream for _, _, stream in called}) > 1
    plain: list[Event] = []
    await hall.bus.replay("lore", to=plain.append, limit=3)
    assert plain == [told(n) for n in past[:3]]
    assert await hall.work() == []


async def test_a_handler_is_called_with_what_it_asks_for(hall: Hall) -> None:
    called: list[Event] = []

    @event_handler(Sung, group="index")
    async def index(event: Sung) -> None:
        called.append(event)

    await hall.publish(3)
    await hall.bus.publish(Sung(teller="t", n=9))
    done = await hall.bus.replay("lore", to=index)
    assert (done.matched, done.replayed, called) == (1, 1, [Sung(teller="t", n=9)])

    @event_handler(Sung, group="many", batch=10)
    async def many(deliveries: list[Delivery[Sung]]) -> None: ...

    with pytest.raises(DeclarationError, match=r"handler many takes batches: .*to='many'"):
        await hall.bus.replay("lore", to=many)


async def test_what_a_function_raises_ends_it_before_that_event(hall: Hall, tmp_path: Path) -> None:
    await hall.bus.publish_many([Told(teller="one", n=n) for n in range(10)])
    called: list[int] = []
    broken = True

    async def work(event: Told) -> None:
        called.append(event.n)
        if event.n == 6 and broken:
            raise ValueError(event.n)

    path = tmp_path / "checkpoint"
    with pytest.raises(ValueError, match="6"):
        await hall.bus.replay("lore", to=work, checkpoint=path)
    broken = False
    done = await hall.bus.replay("lore", to=work, checkpoint=path)
    assert called == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert done.replayed == 10


async def test_events_a_function_cannot_be_given_are_told(hall: Hall) -> None:
    await hall.publish(2)
    await hall.backend.add(STREAMS[0], {"id": "x", "type": "lore.told", "data": "no JSON"})
    await hall.backend.add(STREAMS[0], {"id": "y", "type": "lore.unheard", "data": "{}"})
    called: list[Event] = []
    done = await hall.bus.replay("lore", to=called.append)
    assert (done.replayed, done.unreadable, len(called)) == (2, 2, 2)
    types = {t["error_type"] for t in hall.witness.of("replay.unreadable")}
    assert types == {"Undecodable", "UnknownEventType"}


async def test_what_a_function_publishes_is_caused_by_the_event(hall: Hall, tmp_path: Path) -> None:
    """With ids of their own, which the same run makes again after it was killed."""
    receipt = await hall.bus.publish(told(1))
    path = tmp_path / "checkpoint"
    broken = True

    async def sing(event: Told) -> None:
        await hall.bus.publish(Sung(teller=event.teller, n=event.n))
        if broken:
            raise KeyError

    with pytest.raises(KeyError):
        await hall.bus.replay("lore", to=sing, types=Told, checkpoint=path)
    broken = False
    await hall.bus.replay("lore", to=sing, types=Told, checkpoint=path)
    await hall.bus.replay("lore", to=sing, types=Told)
    songs = [e async for e in hall.bus.history("lore", types=[Sung])]
    assert [e.causation_id for e in songs] == [receipt.event_id] * 3
    assert songs[0].event_id == songs[1].event_id
    assert songs[2].event_id not in {songs[0].event_id, receipt.event_id}


async def test_what_a_function_publishes_later_is_caused_by_nothing(hall: Hall) -> None:
    """A task that it leaves behind is not at work on the event any more."""
    await hall.bus.publish(told(1))
    over = asyncio.Event()
    left: list[asyncio.Task[Any]] = []

    async def later(event: Told) -> None:
        await over.wait()
        await hall.bus.publish(Sung(teller=event.teller, n=event.n))

    async def sing(event: Told) -> None:
        left.append(asyncio.create_task(later(event)))

    await hall.bus.replay("lore", to=sing, types=Told)
    over.set()
    await asyncio.gather(*left)
    (song,) = [e async for e in hall.bus.history("lore", types=[Sung])]
    assert (song.causation_id, song.correlation_id) == (None, None)


async def test_there_is_no_ack_for_effects_to_go_with(hall: Hall) -> None:
    await hall.publish(1)

    async def count(event: Told, delivery: Delivery[Told]) -> None:
        delivery.effects.incrby("count", 1)

    with pytest.raises(InvalidEffect, match=r"use bus\.transaction\(\)"):
        await hall.bus.replay("lore", to=count)


# --- as new events


async def test_everybody_gets_what_is_published_again(hall: Hall, tmp_path: Path) -> None:
    first = await hall.bus.publish(told(1), source="/hall", correlation_id="chain")
    second = await hall.bus.publish(told(2))
    await hall.work()
    path = tmp_path / "checkpoint"
    done = await hall.bus.replay("lore", to=hall.bus, checkpoint=path)
    assert (done.read, done.replayed) == (2, 2)
    heard = await hall.work()
    assert Counter((g, n, d.replayed) for g, n, d in heard) == Counter(
        [("index", 1, False), ("audit", 1, False), ("index", 2, False), ("audit", 2, False)]
    )
    past = [e async for e in hall.bus.history("lore")]
    assert len({e.event_id for e in past}) == 4
    (one,) = [e for e in past if e.causation_id == first.event_id]
    assert (one.source, one.correlation_id, one.stream) == ("/hall", "chain", first.stream)
    assert one.event == told(1)
    assert one.time.timestamp() * 1000 == int(first.entry_id.partition("-")[0])
    (two,) = [e for e in past if e.causation_id == second.event_id]
    assert two.correlation_id == second.event_id
    assert (await hall.bus.replay("lore", to=hall.bus, checkpoint=path)).replayed == 2
    assert len([e async for e in hall.bus.history("lore")]) == 4
    left_s = [await hall.backend.redis.ttl(key) for key in await hall.memories()]
    assert left_s
    assert all(86_000 < s <= 86_400 for s in left_s)


async def test_publishing_again_goes_on_where_it_stopped(hall: Hall, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await hall.publish(1_000)

    class Enough(Exception): ...

    def look(progress: Progress) -> None:
        if progress.replayed >= 300:
            raise Enough

    with pytest.raises(Enough):
        await hall.bus.replay("lore", to=hall.bus, checkpoint=path, rate=1_000, progress=look)
    old = path.read_bytes()
    with pytest.raises(Enough):
        await hall.bus.replay("lore", to=hall.bus, checkpoint=path, rate=1_000, progress=look)
    path.write_bytes(old)
    done = await hall.bus.replay("lore", to=hall.bus, checkpoint=path)
    assert done.replayed == 1_000
    past = Counter([e.event.n async for e in hall.bus.history("lore")])
    assert past == Counter(list(range(1_000)) * 2)


async def test_a_full_stream_is_waited_for(backend: Backend) -> None:
    topic = Topic("lore", maxlen=100, keep=20)
    gate = asyncio.Event()
    handled: list[int] = []

    @event_handler(Told, group="index")
    async def handle(event: Told) -> None:
        await gate.wait()
        handled.append(event.n)

    settings = {"topics": [topic], "publish_timeout_s": 0.2}
    async with backend.bus(**settings) as (bus, witness), Worker(bus, [handle]) as worker:
        await bus.publish_many([told(n) for n in range(70)])
        replaying = asyncio.create_task(bus.replay("lore", to=bus))
        await eventually(lambda: witness.of("replay.waits"))
        assert await backend.redis.xlen("bus:{lore:0}") <= 100
        gate.set()
        done = await replaying
        await worker.drained()
    assert done.replayed == 70
    assert Counter(handled) == Counter(list(range(70)) * 2)


# --- what cannot be


@pytest.mark.parametrize(
    ("topic", "asked", "error", "says"),
    [
        ("lore", {"to": "indx"}, UnknownGroup, "no group indx: did you mean index.*audit, index"),
        ("lore", {"to": "a b"}, DeclarationError, "group name 'a b' is not valid"),
        ("lore", {"to": 7}, DeclarationError, "to is the name of a group, a function"),
        ("lroe", {"to": "index"}, UnknownTopic, "no topic lroe: did you mean lore"),
        ("lore", {"since": "yesterday"}, DeclarationError, "'yesterday' is no position"),
        ("lore", {"until": "1-2-3"}, DeclarationError, "'1-2-3' is no position"),
        ("lore", {"since": "@-1h", "until": "@-2h"}, DeclarationError, "ends before it begins"),
        ("lore", {"since": "end", "until": "start"}, DeclarationError, "ends before it begins"),
        ("lore", {"since": "5-2", "until": "5-1"}, DeclarationError, "ends before it begins"),
        ("lore", {"types": ["a b"]}, DeclarationError, "type pattern 'a b'"),
        ("lore", {"rate": 0}, DeclarationError, "rate must be"),
        ("lore", {"limit": 0}, DeclarationError, "limit must be a whole number"),
        ("lore", {"limit": 1.5}, DeclarationError, "limit must be a whole number"),
        ("lore", {"where": "n > 1"}, DeclarationError, "where is a function"),
        ("lore", {"key": 5}, DeclarationError, "key is the partition key as text"),
        ("lore", {"checkpoint": 5}, DeclarationError, "checkpoint is the path of a file"),
        ("lore", {"progress": 5}, DeclarationError, "progress is a function"),
        ("lore", {"to": lambda: None}, DeclarationError, "takes .event. or .event, delivery."),
    ],
    ids=_numbered(),
)
async def test_mistakes_are_told_before_anything_happens(
    hall: Hall, topic: str, asked: dict[str, Any], error: type[Exception], says: str
) -> None:
    await hall.publish(3)
    before = await _everything(hall)
    with pytest.raises(error, match=says):
        await hall.bus.replay(topic, **{"to": "index", **asked})
    assert await _everything(hall) == before


async def test_a_range_of_one_millisecond_is_whole(hall: Hall) -> None:
    for sequence in range(3):
        fields = {"id": str(sequence), "type": "lore.told", "data": '{"teller":"t","n":1}'}
        await hall.backend.add(STREAMS[1], fields, f"5000-{sequence}")
    assert (await hall.bus.replay("lore", to="index", since=5000, until=5000)).replayed == 3
    done = await hall.bus.replay("lore", to="index", since="5000-1", until="5000")
    assert done.replayed == 2


def test_the_memory_of_a_run_lies_beside_its_stream() -> None:
    assert keys.replay(STREAMS[1], "replay-1") == "bus:{lore:1}:replay:replay-1"
