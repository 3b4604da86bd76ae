"""Trimming by hand: what goes, what stays for whom, and what a dry run says of it."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Backoff,
    Bus,
    DeclarationError,
    Event,
    Topic,
    UnknownTopic,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.admin import trim
from tests.faults.proxy import Proxy
from tests.streams.test_trim import Follower, Walk, as_id, nodes_of, text
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from bus.admin.trim import TrimmedStream
    from bus.embedded import EmbeddedServer
    from tests.streams.test_trim import Id

TOPIC = Topic("cut", maxlen=1_000_000, keep=100_000)
S, G = "bus:{cut:0}", "index"


class Made(Event, type="cut.made"):
    n: int


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.topics.record("cut")
        yield bus


async def add(bus: Bus, ids: Iterable[int | str], stream: str = S) -> None:
    async with bus.redis.pipeline(transaction=False) as pipe:
        for entry_id in ids:
            pipe.xadd(stream, {"n": "1"}, id=f"{entry_id}-0" if entry_id is not str else entry_id)
        await pipe.execute()


async def group(bus: Bus, *, read: int, acked: Iterable[int] | None = None, name: str = G) -> None:
    """Make a group that was given `read` entries and has finished those, or all of them."""
    await bus.redis.xgroup_create(S, name, "0")
    if read:
        await bus.redis.xreadgroup(name, "me", {S: ">"}, count=read)
        ids = [f"{n}-0" for n in (range(1, read + 1) if acked is None else acked)]
        if ids:
            await bus.redis.xack(S, name, *ids)


async def left(bus: Bus, stream: str = S) -> list[int]:
    return [int(i.partition(b"-")[0]) for i, _ in await bus.redis.xrange(stream)]


async def everything(bus: Bus) -> dict[bytes, Any]:
    """All that the server holds, with what a dump leaves out."""
    found: dict[bytes, Any] = {}
    for key in await bus.redis.keys("*"):
        found[key] = [await bus.redis.dump(key), await bus.redis.pttl(key)]
        if await bus.redis.type(key) == b"stream":
            found[key].append(await bus.redis.xinfo_stream(key, full=True))
    return found


async def both(bus: Bus, **asked: Any) -> TrimmedStream:
    """Trim; a dry run before it said the same and changed nothing."""
    before = await everything(bus)
    (said,) = (await bus.admin.trim("cut", **asked, dry_run=True)).streams
    assert await everything(bus) == before
    (done,) = (await bus.admin.trim("cut", **asked)).streams
    assert done == said
    return done


@pytest.mark.parametrize(
    ("asked", "gone", "held_by"),
    [
        ({"before": "201"}, 200, None),
        ({"before": "201-0"}, 200, None),
        ({"before": "000201-000"}, 200, None),
        ({"before": "200-1"}, 200, None),
        ({"before": 201}, 200, None),
        ({"before": datetime.fromtimestamp(0.201, UTC)}, 200, None),
        ({"before": "1970-01-01T00:00:00.201Z"}, 200, None),
        ({"before": "1"}, 0, None),
        ({"before": "0-1"}, 0, None),
        ({"before": "251"}, 250, None),
        ({"before": "252"}, 250, G),
        ({"before": "end"}, 250, G),
        ({"before": "@-1s"}, 250, G),
        ({"before": 2**64 - 1}, 250, G),
        ({"keep": 300}, 0, None),
        ({"keep": 301}, 0, None),
        ({"keep": 299}, 1, None),
        ({"keep": 200}, 100, None),
        ({"keep": 187}, 113, None),
        ({"keep": 50}, 250, None),
        ({"keep": 49}, 250, G),
        ({"keep": 0}, 250, G),
        ({"before": "201", "keep": 200}, 100, None),
        ({"before": "101", "keep": 10}, 100, None),
        ({"before": "end", "keep": 10}, 250, G),
    ],
)
async def test_what_lies_before_goes_and_what_is_to_stay_stays(
    bus: Bus, asked: dict[str, Any], gone: int, held_by: str | None
) -> None:
    """300 entries in nodes of a hundred; the group is given the 251st next."""
    await add(bus, range(1, 301))
    await group(bus, read=250)
    witness = Witness(bus)
    done = await both(bus, **asked)
    assert (done.stream, done.length, done.removed, done.held_by, done.at_least) == (
        *(S, 300, gone, held_by),
        False,
    )
    assert await left(bus) == list(range(gone + 1, 301))
    told = [{"stream": S, "count": gone}] if gone else []
    assert witness.of("topic.trimmed") == told
    (again,) = (await bus.admin.trim("cut", **asked)).streams
    assert (again.removed, again.length, again.held_by) == (0, 300 - gone, held_by)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say what goes: before= a position, or keep= so many entries"),
        ({"before": "start"}, "nothing lies before the start"),
        ({"before": "-"}, "nothing lies before the start"),
        ({"before": 0}, "nothing lies before the start"),
        ({"before": "0-0"}, "nothing lies before the start"),
        ({"before": "1970-01-01"}, "nothing lies before the start"),
        ({"before": "yesterday"}, "'yesterday' is no position"),
        ({"before": -1}, "-1 is no position"),
        ({"keep": -1}, "keep must be a whole number"),
        ({"keep": 1.0}, "keep must be a whole number"),
        ({"keep": True}, "keep must be a whole number"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    valkey_url: str, asked: dict[str, Any], message: str
) -> None:
    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        await add(bus, range(1, 10))
        for dry_run in (True, False):
            with pytest.raises(DeclarationError, match=message):
                await bus.admin.trim("cut", **asked, dry_run=dry_run)
        assert len(await left(bus)) == 9


async def test_what_is_not_there_is_an_error_or_nothing(bus: Bus) -> None:
    with pytest.raises(UnknownTopic, match=r"no topic cutt: did you mean cut\?"):
        await bus.admin.trim("cutt", keep=0)
    done = await both(bus, keep=0)
    assert (done.length, done.removed, done.held_by) == (0, 0, None)
    assert await bus.redis.exists(S) == 0
    await bus.redis.xgroup_create(S, G, "0", mkstream=True)
    assert (await both(bus, before="end")).removed == 0
    await bus.redis.set(S, "a string")
    for dry_run in (True, False):
        with pytest.raises(WrongKeyType, match=r"bus:\{cut:0\}"):
            await bus.admin.trim("cut", keep=0, dry_run=dry_run)


async def test_without_groups_nobody_needs_anything(bus: Bus) -> None:
    await add(bus, range(1, 301))
    assert (await both(bus, before="150", keep=10)).removed == 149
    assert (await both(bus, keep=10)).removed == 141
    assert (await both(bus, keep=0)).removed == 10
    assert await bus.redis.xlen(S) == 0


async def test_all_streams_of_a_topic_are_trimmed_each_as_far_as_it_goes(bus: Bus) -> None:
    await bus.admin.set_marks("cut", retention=None)
    record = await bus.redis.hget("bus:topics", "cut")
    wide = record.replace(b'"partitions":1', b'"partitions":70')
    await bus.redis.hset("bus:topics", "cut", wide)
    for partition, entries in ((0, 10), (1, 20), (69, 30)):
        await add(bus, range(1, entries + 1), f"bus:{{cut:{partition}}}")
    await bus.redis.xgroup_create("bus:{cut:1}", G, "5-0")
    said = await bus.admin.trim("cut", keep=3, dry_run=True)
    done = await bus.admin.trim("cut", keep=3)
    assert done == said
    assert (done.topic, done.removed, len(done.streams)) == ("cut", 7 + 5 + 27, 70)
    some = {s.stream: (s.removed, s.held_by) for s in done.streams if s.length}
    assert some == {S: (7, None), "bus:{cut:1}": (5, G), "bus:{cut:69}": (27, None)}


# --- for whom it stays


@pytest.mark.parametrize("pending", ["running", "parked", "orphaned"])
async def test_what_is_pending_stays_wherever_it_is(bus: Bus, pending: str) -> None:
    await add(bus, range(1, 301))
    await group(bus, read=300, acked=[n for n in range(1, 301) if n != 137])
    if pending == "parked":
        await bus.redis.xclaim(S, G, "parked:4000000000000", 0, ["137-0"], justid=True)
    if pending == "orphaned":
        await bus.redis.sadd(f"{S}:workers", "me")
    done = await both(bus, before="end")
    assert (done.removed, done.held_by) == (136, G)
    assert (await left(bus))[0] == 137
    await bus.redis.xack(S, G, "137-0")
    assert (await both(bus, before="end")).removed == 164


async def test_the_group_that_needs_the_oldest_decides_and_is_named(bus: Bus) -> None:
    await add(bus, range(1, 301))
    await group(bus, read=300, name="fast")
    await group(bus, read=200, name="middle")
    await group(bus, read=120, name="slow")
    assert (await both(bus, before="110")).held_by is None
    done = await both(bus, before="250")
    assert (done.removed, done.held_by) == (120 - 109, "slow")
    await bus.redis.xgroup_destroy(S, "slow")
    done = await both(bus, before="250")
    assert (done.removed, done.held_by) == (80, "middle")
    await bus.redis.xgroup_destroy(S, "middle")
    done = await both(bus, before="250")
    assert (done.removed, done.held_by) == (49, None)


async def test_a_group_of_any_name_is_named_so_that_it_can_be_printed(bus: Bus) -> None:
    await add(bus, range(1, 10))
    await bus.redis.xgroup_create(S, b"\xff\n", "0")
    assert (await both(bus, keep=0)).held_by == "\\xff\n"


# --- many


@pytest.mark.parametrize("entries", [5_000, 5_001, 12_345])
@pytest.mark.parametrize("with_group", [True, False])
async def test_many_go_in_several_calls(bus: Bus, entries: int, with_group: bool) -> None:
    await add(bus, range(1, entries + 1))
    if with_group:
        await bus.redis.xgroup_create(S, G, f"{entries}-0")
    calls, ask = count(), bus.store.upkeep.trim

    async def trimmed(*args: Any) -> Any:
        next(calls)
        return await ask(*args)

    bus.store.upkeep.trim = trimmed  # type: ignore[method-assign]
    witness = Witness(bus)
    done = await both(bus, keep=7)
    assert done.removed == witness.total("topic.trimmed") == entries - 7
    assert await bus.redis.xlen(S) == 7
    assert next(calls) >= entries // 5_000, "the server is not held up for long"


async def test_a_dry_run_that_has_counted_enough_says_so(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim, "COUNTED_MOST", 100)
    await add(bus, range(1, 301))
    await bus.redis.xgroup_create(S, G, "250-0")
    for entries, expected in ((100, (100, False)), (101, (100, True)), (250, (100, True))):
        asked = {"before": f"{entries + 1}-0"}
        (said,) = (await bus.admin.trim("cut", **asked, dry_run=True)).streams
        assert (said.removed, said.at_least) == expected
    (said,) = (await bus.admin.trim("cut", keep=250, dry_run=True)).streams
    assert (said.removed, said.at_least) == (50, False)


async def test_what_comes_meanwhile_is_not_meant(bus: Bus) -> None:
    """A busy stream without groups would be trimmed for ever."""
    await add(bus, range(1, 301))
    ask, calls = bus.store.upkeep.trim, 0

    async def trimmed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        assert calls < 50
        await bus.redis.xadd(S, {"n": "1"})
        return await ask(*args)

    bus.store.upkeep.trim = trimmed  # type: ignore[method-assign]
    (done,) = (await bus.admin.trim("cut", keep=0)).streams
    assert 300 <= done.removed <= 350


# --- ghosts


async def test_ghosts_hold_nothing_up_and_are_told(bus: Bus) -> None:
    """More of them than one call sees to; a dry run leaves them where they are."""
    await add(bus, range(1, 301))
    await group(bus, read=300, acked=[n for n in range(1, 301) if n in (1, 290)])
    await bus.redis.xdel(S, *(f"{n}-0" for n in range(2, 260)))
    witness = Witness(bus)
    before = await everything(bus)
    await bus.admin.trim("cut", keep=0, dry_run=True)
    assert await everything(bus) == before
    (done,) = (await bus.admin.trim("cut", keep=0)).streams
    assert (done.removed, done.held_by) == (1, G)
    assert await left(bus) == list(range(260, 301))
    assert witness.total("delivery.lost", stream=S, group=G) == 258
    lost = witness.of("delivery.lost")[0]["entry_ids"]
    assert lost == [f"{n}-0" for n in range(2, 22)]
    assert (await bus.redis.xpending(S, G))["pending"] == 40


async def test_behind_many_ghosts_there_may_be_something_to_trim(bus: Bus) -> None:
    await add(bus, range(1, 301))
    await group(bus, read=300, acked=[*range(1, 3), *range(260, 301)])
    await bus.redis.xdel(S, *(f"{n}-0" for n in (1, 2, *range(3, 260))))
    (done,) = (await bus.admin.trim("cut", keep=0)).streams
    assert (done.removed, done.held_by) == (41, None)


# --- answers that are lost


async def test_after_a_lost_answer_it_is_trimmed_all_the_same_and_the_count_is_at_least(
    url: str, server: EmbeddedServer
) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=[TOPIC]) as bus:
        await bus.topics.record("cut")
        await add(bus, range(1, 301))
        await group(bus, read=250)
        await bus.admin.trim("cut", before="11")
        proxy.lose(b"EVALSHA", 1)
        (done,) = (await bus.admin.trim("cut", before="end")).streams
        assert proxy.lost == 1
        assert await left(bus) == list(range(251, 301))
        assert (done.at_least, done.held_by) == (True, G)
        assert 0 <= done.removed < 240


# --- whatever happens


class Moved(Follower):
    """A group that stands between two entries, perhaps at the very last id of a millisecond."""

    @property
    def floor(self) -> Id:
        ms, sequence = self.last
        return min([*self.pending, (ms, min(sequence + 1, 2**64 - 1))])


class OperatorsWalk(Walk):
    """Random steps of an operator between those of publishers and groups, with the same model."""

    def __init__(self, bus: Bus, rnd: random.Random) -> None:
        super().__init__(bus.store, rnd)
        self.bus = bus
        self.by_hand = self.moved = 0

    async def step(self) -> None:
        steps = {
            self.append: 10,
            self.read: 8,
            self.ack: 10,
            self.park: 1,
            self.take_due: 2,
            self.die: 1,
            self.come: 1 if len(self.groups) < 3 else 0,
            self.create: 2 if len(self.groups) < 4 else 0,
            self.go: 0.7,
            self.seek: 5,
            self.recount: 1,
            self.trim: 6,
        }
        chosen = self.rnd.choices(list(steps), list(steps.values()))[0]
        await chosen()
        if chosen != self.append:
            await self.check(chosen.__name__)
        await self.check_lags(chosen.__name__)

    async def check_lags(self, step: str) -> None:
        """What the server counts is right, or it says that it does not know."""
        for name, row in (await self.store.groups_of("bus:{trim:0}")).items():
            lag = row.get("lag")
            assert lag in (None, len(self.groups[name].undelivered)), f"{step}: lag of {name}"

    async def check_counted(self, name: str) -> None:
        row = (await self.store.groups_of("bus:{trim:0}"))[name]
        if "lag" in row:
            assert row["lag"] == len(self.groups[name].undelivered)

    def position(self) -> str:
        """A place to go to: an end, an entry, one beside it, one that is gone or never was."""
        near = self.rnd.choice(self.present) if self.present else (1, 0)
        return self.rnd.choice(
            [
                *("start", "end", text(near), text(near), text((near[0], near[1] + 1))),
                *(
                    str(near[0]),
                    text((max(1, near[0] - self.rnd.randint(1, 50)), 3)),
                    f"{10**15}-0",
                ),
            ]
        )

    def split(self, place: str) -> tuple[list[Any], list[Any]]:
        """The entries before a place, and those from it on."""
        if place in ("start", "end"):
            return ([], self.present) if place == "start" else (self.present, [])
        at = as_id(place if "-" in place else f"{place}-0")
        return [i for i in self.present if i < at], [i for i in self.present if i >= at]

    async def create(self) -> None:
        name, place = f"h{self.rnd.randrange(1_000_000)}", self.position()
        before, ahead = self.split(place)
        await self.bus.admin.create_group(name, "trim", at=place)
        row = (await self.store.groups_of("bus:{trim:0}"))[name]
        self.groups[name] = Moved(as_id(row["last-delivered-id"]), ahead)
        assert not before or self.groups[name].last >= before[-1]
        await self.check_counted(name)

    async def seek(self) -> None:
        name, group = self._any()
        if name is None or group is None:
            return
        place = self.position()
        _, ahead = self.split(place)
        was = set(group.undelivered)
        dry = self.rnd.random() < 0.2
        (sought,) = await self.bus.admin.seek_group(name, place, "trim", dry_run=dry)
        assert sought.before == text(group.last)
        assert (sought.skipped, sought.again) == (len(was - set(ahead)), len(set(ahead) - was))
        assert not sought.at_least
        if dry:
            return
        row = (await self.store.groups_of("bus:{trim:0}"))[name]
        assert row["last-delivered-id"].decode() == sought.after
        self.groups[name] = Moved(as_id(sought.after), ahead)
        self.groups[name].pending = group.pending
        assert sought.counted == ("lag" in row)
        await self.check_counted(name)
        self.moved += 1

    async def recount(self) -> None:
        name, group = self._any()
        if name is None or group is None:
            return
        await self.store.commands.call(
            *("XGROUP", "SETID", "bus:{trim:0}", name, text(group.last))
        )  # as the server forgets it after a restart
        (sought,) = await self.bus.admin.recount_group(name, "trim")
        assert (sought.before, sought.after) == (text(group.last), text(group.last))
        await self.check_counted(name)

    async def trim(self) -> None:
        place = self.rnd.choice([None, self.position()])
        keep = self.rnd.choice([None, self.rnd.randint(0, self.most)])
        if place == "start" or (place is None and keep is None):
            return
        asked = self.split(place)[0] if place is not None else self.present
        most = max(0, len(self.present) - (keep or 0))
        floor = min((g.floor for g in self.groups.values()), default=None)
        spare = [i for i in asked if floor is None or i < floor]
        gone = min(len(spare), most)
        (said,) = (await self.bus.admin.trim("trim", before=place, keep=keep, dry_run=True)).streams
        (done,) = (await self.bus.admin.trim("trim", before=place, keep=keep)).streams
        assert said.removed == done.removed == gone
        assert said.length == done.length == len(self.present)
        if gone < len(asked) and gone < most:
            first = asked[gone]
            need = {
                n for n, g in self.groups.items() if first in g.pending or first in g.undelivered
            }
            assert said.held_by in need
            assert done.held_by in need
        else:
            assert said.held_by is done.held_by is None
        self.present = self.present[gone:]
        self.added = len(self.present)
        self.by_hand += bool(gone)


@pytest.mark.parametrize("seed", [1, None])
async def test_whatever_an_operator_does_what_a_group_needs_stays(
    url: str, server: EmbeddedServer, seed: int | None
) -> None:
    seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    print(f"seed {seed}")  # noqa: T201 - shown when it fails, so that it can be repeated
    rnd = random.Random(seed)
    by_hand = moved = 0
    async with Bus.connect(url, topics=[Topic("trim", maxlen=1_000)]) as bus:
        while by_hand < 40:
            await bus.redis.flushall()
            walk = OperatorsWalk(bus, rnd)
            entries, size = rnd.choice([(100, 4096), (1, 4096), (2, 4096), (3, 300), (100, 200)])
            async with nodes_of(server, entries, size):
                for _ in range(150):
                    await walk.step()
            by_hand += walk.by_hand
            moved += walk.moved
    assert moved > 20


async def test_nothing_is_lost_while_everything_moves(url: str) -> None:  # noqa: C901 - four jobs
    """Publishers, a worker whose handler fails now and then, a group that is moved, and trims."""
    handled: set[int] = set()
    rnd, stop, published, ended = random.Random(5), asyncio.Event(), 0, list[int]()

    @event_handler(Made, group=G, backoff=Backoff(base_s=0.02), max_attempts=99, breaker=None)
    async def handle(event: Made) -> None:
        if rnd.random() < 0.1:
            raise ValueError
        handled.add(event.n)

    async def publish() -> None:
        nonlocal published
        while not stop.is_set():
            first, published = published, published + 5
            await bus.publish_many([Made(n=first + n) for n in range(5)])
        ended.append(1)

    async def follow() -> None:
        while len(ended) < 2:
            for _, entries in await redis.xreadgroup("moved", "me", {S: ">"}, count=50) or ():
                done = [i for i, _ in entries if rnd.random() < 0.9]
                await redis.xack(S, "moved", "1-1", *done)
            rows = await redis.xpending_range(S, "moved", "-", "+", 100)
            for row in rows:
                assert await redis.xrange(S, row["message_id"], row["message_id"]), "it was needed"
            await redis.xack(S, "moved", "1-1", *(r["message_id"] for r in rows[:20]))

    async def operate() -> None:
        for n in range(60):
            await operator.admin.trim("cut", keep=rnd.choice([0, 20, 100]))
            if n % 3 == 0:
                to = rnd.choice(["end", "start", "@-1s", timedelta(seconds=0.05)])
                if isinstance(to, timedelta):
                    to = datetime.now(UTC) - to
                await operator.admin.seek_group("moved", to, "cut")
        stop.set()

    async with (
        Bus.connect(url, topics=[Topic("cut", maxlen=2_000, keep=150)]) as bus,
        Bus.connect(url) as operator,
    ):
        redis, witness = bus.redis, Witness(bus)
        await operator.admin.create_group("moved", "cut")
        async with Worker(bus, [handle]) as worker:
            async with asyncio.TaskGroup() as tasks:
                for job in (publish, publish, follow, operate):
                    tasks.create_task(job())
            await worker.drained()
        assert handled == set(range(published))
        assert witness.of("delivery.lost") == []
        (row,) = [r for r in await redis.xinfo_groups(S) if r["name"] == b"moved"]
        ahead = await redis.xrange(S, b"(" + row["last-delivered-id"])
        assert row.get("lag") in (None, len(ahead))
        await eventually(lambda: len(handled) == published)
