"""What may go from a stream and what may not: marks, the floor, ghosts, by the verbs themselves."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import pytest

from bus.streams import keys
from bus.streams.address import parse_url
from bus.streams.answers import Limits
from bus.streams.backend import backend_at
from bus.streams.memory.store import MemoryStore
from bus.streams.script import _included
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.eyes import MemoryServer, raw
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from bus.embedded import EmbeddedServer
    from bus.streams.answers import Appended

pytestmark = pytest.mark.everywhere

S0, G = "bus:{trim:0}", "g"
HOUR_MS = 3_600_000

Id = tuple[int, int]


@pytest.fixture
async def store(url) -> AsyncIterator[StreamStore]:
    store = backend_at(parse_url(url)).store(Telemetry())
    yield store
    await store.close()


def unit(size: int, value: str = "x") -> list[Any]:
    """A unit of `size` events with one field each."""
    return [size, *((2, "n", value) * size)]


def as_id(entry_id: bytes | str) -> Id:
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    ms, _, low = text.partition("-")
    return int(ms), int(low)


def text(entry_id: Id) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"


def ids_of(where: Appended) -> list[Id]:
    return [(int(where.ms), where.sequence + n) for n in range(where.events)] if where.ms else []


_IDS = """
    local ids = {}
    for i, e in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do ids[i] = e[1] end
    return table.concat(ids, ' ')
"""


async def ids(store: StreamStore) -> list[Id]:
    """Every id of the stream, without the weight of the entries."""
    if isinstance(store, MemoryStore):
        return [as_id(i) for i, _ in await raw(store, "XRANGE", S0, "-", "+")]
    return list(map(as_id, (await raw(store, "EVAL", _IDS, 1, S0)).split()))


async def length(store: StreamStore) -> int:
    return int(await raw(store, "XLEN", S0))


async def read(store: StreamStore, group: str, consumer: str, count: int) -> list[Id]:
    reply = await raw(
        store, "XREADGROUP", "GROUP", group, consumer, "COUNT", count, "STREAMS", S0, ">"
    )
    return [as_id(row[0]) for row in reply[0][1]] if reply else []


async def ack(store: StreamStore, group: str, entries: Iterable[Id]) -> None:
    await raw(store, "XACK", S0, group, *map(text, entries))


async def pending(store: StreamStore, group: str = G) -> list[Id]:
    return [as_id(r[0]) for r in await raw(store, "XPENDING", S0, group, "-", "+", 10_000)]


@asynccontextmanager
async def nodes_of(server: EmbeddedServer, entries: int, size: int) -> AsyncIterator[None]:
    """Let the server pack its stream nodes otherwise: `~` trims whole nodes only."""
    if isinstance(server, MemoryServer):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bus.streams.memory.room.NODE", entries or 100)
            yield
        return
    wanted = {"stream-node-max-entries": entries, "stream-node-max-bytes": size}
    before = {n: ask(server, "CONFIG", "GET", n).split(b"\r\n")[4] for n in wanted}
    try:
        for name, value in wanted.items():
            ask(server, "CONFIG", "SET", name, str(value))
        yield
    finally:
        for name, value in before.items():
            ask(server, "CONFIG", "SET", name, value)


class Tank:
    """A stream filled by one publisher, within marks."""

    def __init__(self, store: StreamStore, keep: int, most: int, slack: int = 1) -> None:
        self.store = store
        self.limits = Limits(keep, slack, most)
        self._sequence = 0

    async def add(self, *sizes: int, drop_oldest: bool = False, again: bool = False) -> Appended:
        """Append units of these sizes; `again`: as the batch before, whose reply was lost."""
        self._sequence += not again
        marks = self.limits
        limits = Limits(marks.keep, marks.slack, marks.most, drop_oldest)
        return await self.store.append(
            S0, "p", self._sequence, [unit(s) for s in sizes], sum(sizes), limits, 5
        )

    async def fill(self) -> list[Id]:
        """Append single events until there is no room; return what is in the stream."""
        left = self.limits.most - await length(self.store)
        assert (await self.add(*[1] * left)).units == left
        return await ids(self.store)


async def pinned_tank(store: StreamStore, keep: int, most: int, held: int) -> tuple[Tank, list[Id]]:
    """A full stream whose group has `held` entries pending and the rest undelivered.

    With as much slack, only what an append needs is trimmed.
    """
    tank = Tank(store, keep, most, slack=3 * most)
    await store.create_groups([(S0, G, "0")])
    entries = await tank.fill()
    assert await read(store, G, "me", held) == entries[:held]
    return tank, entries


# --- the random walk


class Follower:
    """What a group must still be given, and what it was given and has not finished."""

    def __init__(self, last: Id, undelivered: Sequence[Id]) -> None:
        self.last = last
        self.undelivered = list(undelivered)
        self.pending: dict[Id, str] = {}

    @property
    def floor(self) -> Id:
        """The smallest id that it needs, by what is documented."""
        return min([*self.pending, (self.last[0], self.last[1] + 1)])

    def owned(self, rnd: random.Random, *, parked: bool) -> tuple[str, list[Id]]:
        """Some of the pending entries of one owner, a lane or a worker."""
        owners = sorted({o for o in self.pending.values() if o.startswith("parked:") == parked})
        if not owners:
            return "", []
        owner = rnd.choice(owners)
        own = sorted(i for i, o in self.pending.items() if o == owner)
        most = len(own) if rnd.random() < 0.7 else rnd.randint(1, len(own))
        return owner, rnd.sample(own, most)


class Walk:
    """Random steps of publishers and groups, and a model of what must come of each."""

    def __init__(self, store: StreamStore, rnd: random.Random) -> None:
        self.store, self.rnd = store, rnd
        self.keep = rnd.randint(1, 12)
        self.most = self.keep + rnd.randint(2, 25)
        self.reserve = rnd.randint(1, 10)
        self.slack = rnd.choice([1, 1, 2, 8])
        self.present: list[Id] = []
        self.added = 0
        self.groups: dict[str, Follower] = {}
        self.sequence = 0
        self.trims = self.full = 0

    async def step(self) -> None:
        steps = {
            self.append: 10,
            self.ask: 2,
            self.read: 9,
            self.ack: 12,
            self.park: 1,
            self.take_due: 3,
            self.die: 1,
            self.come: 2 if len(self.groups) < 3 else 0,
            self.go: 0.5,
        }
        chosen = self.rnd.choices(list(steps), list(steps.values()))[0]
        before = len(self.present)
        await chosen()
        if chosen not in (self.append, self.ask):  # these look for themselves
            await self.check(chosen.__name__)
        assert len(self.present) <= max(before, self.most + self.reserve)

    async def check(self, step: str) -> None:
        """Nobody has lost anything, and only the oldest entries are gone."""
        found = await ids(self.store)
        gone = self.present[: len(self.present) - len(found)]
        assert found == self.present[len(gone) :], f"{step}: only the oldest may go"
        for name, group in self.groups.items():
            needed = {*group.pending, *group.undelivered}
            assert not needed & set(gone), f"{step}: group {name} needs {needed & set(gone)}"
        assert len(found) >= min(self.keep, self.added), f"{step}: below keep"
        self.trims += bool(gone)
        self.present = found

    def _any(self) -> tuple[str, Follower] | tuple[None, None]:
        if not self.groups:
            return None, None
        name = self.rnd.choice(sorted(self.groups))
        return name, self.groups[name]

    # --- publishers

    async def append(self) -> None:
        inside = self.rnd.random() < 0.2
        most = self.most + (self.reserve if inside else 0)
        limits = Limits(self.keep, self.slack, most)
        largest = self.rnd.choice([1, 3, self.most - self.keep])
        sizes = [self.rnd.randint(1, largest) for _ in range(self.rnd.randint(1, 6))]
        value = "x" * self.rnd.choice([1, 1, 50, 500])
        units = [unit(s, value) for s in sizes]
        self.sequence += 1
        where = await self.store.append(
            S0, "p", self.sequence, units, sum(u[0] for u in units), limits, 5
        )
        old, new = self.present, ids_of(where)
        assert len(new) == where.events == sum(sizes[: where.units])
        assert not where.repeated
        self.added += len(new)
        self.present = [*old, *new]
        for group in self.groups.values():
            group.undelivered += new
        if self.rnd.random() < 0.2:
            again = await self.store.append(
                S0, "p", self.sequence, units, sum(u[0] for u in units), limits, 5
            )
            assert again.repeated == bool(where.units)
            assert (again.ms, again.events, again.units) == (where.ms, where.events, where.units)
        await self.check("append")
        assert len(self.present) <= max(len(old), most)
        assert where.room.entries == most - len(self.present)
        if where.units < len(sizes):
            assert where.room.entries < sizes[where.units], "it would have fitted"
            self._was_full(where, [i for i in self.present if i not in set(new)])

    def _was_full(self, where: Appended, old: list[Id]) -> None:
        """A batch is left out only when nothing more could go, and who is why is told."""
        self.full += 1
        floor = min((g.floor for g in self.groups.values()), default=None)
        spare = [i for i in old if floor is None or i < floor]
        assert not spare or len(old) <= self.keep, "there was something to trim"
        pinned = where.room.pinned
        if old and floor is not None:
            assert pinned is not None
            assert as_id(pinned.floor) == floor == self.groups[pinned.group].floor
            assert pinned.pending == len(self.groups[pinned.group].pending)

    async def ask(self) -> None:
        wanted = self.rnd.randint(0, self.most - self.keep)
        room = await self.store.room(S0, Limits(self.keep, self.slack, self.most), wanted)
        await self.check("room")
        assert room.entries == self.most - len(self.present)

    # --- groups

    async def come(self) -> None:
        name = f"g{self.rnd.randrange(1_000_000)}"
        last = self.present[-1] if self.present else (0, 0)
        if self.present and self.rnd.random() < 0.2:
            await self.store.create_groups([(S0, name, "$")])
            self.groups[name] = Follower(last, [])
        else:
            await self.store.create_groups([(S0, name, "0")])
            self.groups[name] = Follower((0, 0), self.present)

    async def go(self) -> None:
        name, _ = self._any()
        if name is not None:
            await raw(self.store, "XGROUP", "DESTROY", S0, name)
            del self.groups[name]

    async def read(self) -> None:
        name, group = self._any()
        if name is None or group is None:
            return
        count, consumer = self.rnd.randint(1, 60), self.rnd.choice("ab")
        got = await read(self.store, name, consumer, count)
        assert got == group.undelivered[:count], "every entry is delivered, in order"
        del group.undelivered[:count]
        group.pending |= dict.fromkeys(got, consumer)
        group.last = got[-1] if got else group.last

    async def ack(self) -> None:
        name, group = self._any()
        if name is None or group is None:
            return
        owner, some = group.owned(self.rnd, parked=False)
        if some:
            refused = await self.store.ack(S0, name, owner, [text(i).encode() for i in some])
            assert refused == []
            for entry_id in some:
                del group.pending[entry_id]

    async def park(self) -> None:
        name, group = self._any()
        if name is None or group is None:
            return
        owner, some = group.owned(self.rnd, parked=False)
        if some:
            entries = [(text(i).encode(), 0, 1) for i in some]
            assert set(await self.store.park(S0, name, owner, entries)) == {b"parked:0"}
            group.pending |= dict.fromkeys(some, "parked:0")

    async def take_due(self) -> None:
        name, group = self._any()
        if name is None or group is None:
            return
        taken = await self.store.take_due(S0, name, "a", self.rnd.randint(1, 60), [b"parked:0"])
        assert taken.lost == [], "a parked entry vanished"
        group.pending |= {as_id(e[0]): "a" for e in taken.entries}

    async def die(self) -> None:
        """A worker without a lease: another takes what it held."""
        name, group = self._any()
        if name is None or group is None:
            return
        owner, _ = group.owned(self.rnd, parked=False)
        if owner:
            taken = await self.store.reclaim(S0, name, "heir", owner.encode(), 100, 0)
            assert taken.lost == [], "what a dead worker held vanished"
            group.pending |= {as_id(e[0]): "heir" for e in taken.entries}


TRIMS = 260  # times four walks: above a thousand for each server


@pytest.mark.parametrize("seed", [1, 2, 3, None])
async def test_whatever_happens_what_a_group_needs_stays(store, server, seed):
    seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    print(f"seed {seed}")  # noqa: T201 - shown when it fails, so that it can be repeated
    rnd = random.Random(seed)
    trims = full = 0
    while trims < TRIMS:
        ask(server, "FLUSHALL")
        walk = Walk(store, rnd)
        entries, size = rnd.choice([(100, 4096), (1, 4096), (2, 4096), (3, 300), (100, 200)])
        async with nodes_of(server, entries, size):
            for _ in range(200):
                await walk.step()
        trims += walk.trims
        full += walk.full
    assert full > 10, "and publishers felt the mark now and then"


# --- ids

MANY_IDS = [
    f"{ms}-{low}"
    for ms, low in product(
        (0, 1, 9, 10, 99, 100, 1_784_000_000_000, 2**53, 2**53 + 1, 2**63, 2**64 - 1),
        (0, 1, 9, 10, 2**31, 2**53 - 2, 2**53 - 1, 2**53, 2**53 + 1, 2**63, 2**64 - 1),
    )
]


@pytest.mark.servers_only("they are Lua's")
async def test_ids_of_any_length_are_compared_by_their_numbers(store):
    script = """
        local lines = {}
        for i, a in ipairs(ARGV) do
            local line = {}
            for j, b in ipairs(ARGV) do line[j] = before(a, b) and '<' or '.' end
            lines[i] = table.concat(line)
        end
        return lines
    """
    lines = await raw(store, "EVAL", _included("_trim") + script, 0, *MANY_IDS)
    numbers = [as_id(i) for i in MANY_IDS]
    for a, line in zip(numbers, lines, strict=True):
        assert line.decode() == "".join("<" if a < b else "." for b in numbers), a


@pytest.mark.servers_only("they are Lua's")
async def test_the_id_after_another_leaves_nothing_out(store):
    script = """
        local after_each = {}
        for i, a in ipairs(ARGV) do after_each[i] = after(a) end
        return after_each
    """
    followers = await raw(store, "EVAL", _included("_trim") + script, 0, *MANY_IDS)
    for (ms, low), follower in zip(map(as_id, MANY_IDS), map(as_id, followers), strict=True):
        # Where a number of the script cannot count on, the id itself: one entry more is kept.
        assert follower == ((ms, low + 1) if low < 2**53 else (ms, low))


@pytest.mark.parametrize("low", [2**53 - 3, 2**63 - 3, 2**64 - 10])
async def test_sequences_beyond_what_lua_counts_are_trimmed_right(store, low):
    """Entries that another program added with ids of its own."""
    await store.create_groups([(S0, G, "0")])
    for n in range(8):
        await raw(store, "XADD", S0, f"5-{low + n}", "n", "x")
    got = await read(store, G, "me", 6)
    await ack(store, G, (i for i in got if i != (5, low + 3)))
    limits = Limits(1, 1, 8)
    room = await store.room(S0, limits, 8)
    assert await ids(store) == [(5, low + n) for n in range(3, 8)]
    assert room.pinned is not None
    assert (room.entries, room.pinned.floor) == (3, f"5-{low + 3}")
    await ack(store, G, [(5, low + 3)])
    await store.room(S0, limits, 8)
    left = await ids(store)
    assert left[-2:] == [(5, low + 6), (5, low + 7)], "not delivered yet"
    assert len(left) <= 3  # the delivered one before them stays where one cannot count on


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS])
async def test_a_clock_that_jumps_changes_nothing(store, jump_ms):
    """An id of the future is where the server goes on from; ids of the past are simply older."""
    seconds, _ = await raw(store, "TIME")
    strange = (int(seconds) * 1000 + jump_ms, 3)
    await store.create_groups([(S0, G, "0")])
    await raw(store, "XADD", S0, text(strange), "n", "x")
    tank = Tank(store, keep=2, most=10)
    entries = await tank.fill()
    assert entries[0] == strange
    if jump_ms > 0:
        assert entries[1:] == [(strange[0], 3 + n) for n in range(1, 10)]
    assert (await tank.add(1)).units == 0
    assert await read(store, G, "me", 6) == entries[:6]
    await ack(store, G, [*entries[:3], *entries[4:6]])
    full = await tank.add(3, 1)
    assert full.units == 1
    assert full.room.pinned is not None
    assert full.room.pinned.floor == text(entries[3])
    assert (await ids(store))[:7] == entries[3:]
    await ack(store, G, [entries[3]])
    assert (await tank.add(2)).units == 1
    assert await read(store, G, "me", 20) == [*entries[6:], *(await ids(store))[-5:]]


# --- keep, and how much goes


async def test_without_groups_a_stream_stands_at_keep(store, server):
    async with nodes_of(server, 5, 4096):
        tank = Tank(store, keep=20, most=100, slack=5)
        for _ in range(100):
            await tank.add(3)
            assert await length(store) >= min(20, 3)
        assert 20 <= await length(store) <= 20 + 5 + 3 + 5  # slack, batch, node


async def test_at_the_mark_single_entries_go_and_no_more_than_needed(store):
    """All lies in one node of the server, which it would not remove as a whole."""
    tank, entries = await pinned_tank(store, keep=2, most=20, held=10)
    await ack(store, G, entries[:9])
    assert (await tank.add(4)).units == 1
    assert await ids(store) == [*entries[4:], *(await ids(store))[-4:]]
    assert (await tank.add(6)).units == 0, "five are handled, the sixth is not"
    assert (await tank.add(5)).units == 1
    assert (await ids(store))[0] == entries[9]


async def test_a_small_stream_stands_at_keep_too(store):
    """The server would remove whole nodes of 100 only: within the slack, single entries go."""
    tank = Tank(store, keep=10, most=40, slack=3)
    await store.create_groups([(S0, G, "0")])
    lengths = []
    for _ in range(100):
        await tank.add(1)
        await ack(store, G, await read(store, G, "me", 1))
        lengths.append(await length(store))
    assert max(lengths) <= 10 + 3 + 1
    assert min(lengths[20:]) >= 10


async def test_history_is_kept_although_nobody_needs_it(store):
    tank = Tank(store, keep=7, most=10)
    entries = await tank.fill()
    assert (await tank.add(4)).units == 0, "three at most can go"
    assert await ids(store) == entries[3:], "and they went, for others that are smaller"
    assert (await tank.add(3)).units == 1
    assert await length(store) == 10


async def test_one_call_trims_about_five_thousand_at_most(store):
    """A stream whose slow group has caught up must not stop the server while it is cut back."""
    big = Tank(store, keep=100_000, most=1_000_000, slack=1_000)
    for _ in range(3):
        await big.add(*[500] * 8)
    small = Tank(store, keep=10, most=100_000, slack=1_000)
    lengths = [12_000]
    while lengths[-1] > 200:
        await store.room(S0, small.limits, 0)
        lengths.append(await length(store))
    steps = [a - b for a, b in pairwise(lengths)]
    assert max(steps) <= 5_000
    assert len(steps) == 3
    assert lengths[-1] >= 10


async def test_room_without_a_stream_is_all_there_is(store):
    room = await store.room(S0, Limits(2, 1, 10), 3)
    assert (room.entries, room.pinned, room.lost) == (10, None, {})
    await store.create_groups([(S0, G, "0")])
    assert (await store.room(S0, Limits(2, 1, 10), 3)).entries == 10
    assert await length(store) == 0


async def test_one_append_trims_in_bounds_however_far_the_floor_has_moved(store):
    """A group that is destroyed, or done at last, may free a million entries at once."""
    wide = Tank(store, keep=10, most=100_000, slack=2)
    await store.create_groups([(S0, "dead", "0")])
    for _ in range(4):
        await wide.add(*[500] * 8)
    await raw(store, "XGROUP", "DESTROY", S0, "dead")
    lengths = [await length(store)]
    for _ in range(10):
        await wide.add(1)
        lengths.append(await length(store))
    steps = [a - b for a, b in pairwise(lengths)]
    assert lengths[0] == 16_000
    assert max(steps) <= 5_000 + 100  # whole nodes, and what of the next one may go singly
    assert lengths[-1] <= 10 + 100 + 3


async def test_dropping_is_bounded_too(store):
    wide = Tank(store, keep=10, most=100_000)
    await store.create_groups([(S0, G, "0")])
    for _ in range(4):
        await wide.add(*[500] * 8)
    narrow = Tank(store, keep=10, most=20)
    narrow._sequence = 10
    first = await narrow.add(1, drop_oldest=True)
    assert (first.units, sum(first.dropped.values())) == (0, 5_000)
    for _ in range(3):
        last = await narrow.add(1, drop_oldest=True)
    assert (last.units, await length(store)) == (1, 20)


async def test_asking_for_room_makes_no_more_than_asked_for(store):
    tank, entries = await pinned_tank(store, keep=2, most=20, held=10)
    await ack(store, G, entries[:10])
    assert (await store.room(S0, tank.limits, 0)).entries == 0, "whole nodes only"
    assert (await store.room(S0, tank.limits, 3)).entries == 3
    assert await ids(store) == entries[3:]
    assert (await store.room(S0, tank.limits, 18)).entries == 10
    assert await ids(store) == entries[10:]


async def test_the_floor_is_that_of_the_slowest_group(store):
    tank = Tank(store, keep=1, most=12, slack=36)
    await store.create_groups([(S0, name, "0") for name in ("fast", "middle", "slow")])
    entries = await tank.fill()
    for name, count in (("fast", 12), ("middle", 8), ("slow", 5)):
        await ack(store, name, await read(store, name, "me", count))
    full = await tank.add(6)
    assert (full.units, await ids(store)) == (0, entries[5:])
    assert full.room.pinned is not None
    assert (full.room.pinned.group, full.room.pinned.pending) == ("slow", 0)
    assert full.room.pinned.undelivered in (7, None)
    await raw(store, "XGROUP", "DESTROY", S0, "slow")
    assert (await tank.add(6)).units == 1
    # What it could not use of the room for five, it did not take from the middle one.
    assert (await ids(store))[:6] == entries[6:]


async def test_what_is_parked_is_needed(store):
    tank, entries = await pinned_tank(store, keep=1, most=10, held=10)
    await store.park(S0, G, "me", [(text(entries[2]).encode(), HOUR_MS, 1)])
    await ack(store, G, [i for i in entries if i != entries[2]])
    assert (await tank.add(3)).units == 0
    assert (await tank.add(2)).units == 1
    assert (await ids(store))[:8] == entries[2:]


# --- ghosts


async def test_a_ghost_pins_nothing_and_is_told(store):
    tank, entries = await pinned_tank(store, keep=1, most=10, held=10)
    await ack(store, G, entries[1:5])
    await raw(store, "XDEL", S0, text(entries[0]))
    taken = await tank.add(1, 4)
    assert (taken.units, taken.room.lost) == (2, {G: [text(entries[0])]})
    assert (await ids(store))[:5] == entries[5:], "what is still needed stays"
    assert (await tank.add(1)).room.lost == {}, "told once"
    assert await pending(store) == entries[5:]


async def test_many_ghosts_are_met_a_hundred_at_a_time(store):
    """Bounded work for one call; until all are found, they go on pinning."""
    tank, entries = await pinned_tank(store, keep=1, most=260, held=260)
    await raw(store, "XTRIM", S0, "MAXLEN", 10)
    found = []
    for expected in (100, 100, 50, 0):
        room = await store.room(S0, tank.limits, 260)
        found += room.lost.get(G, [])
        assert len(room.lost.get(G, [])) == expected
        assert await ids(store) == entries[250:]
    assert found == list(map(text, entries[:250]))
    assert await pending(store) == entries[250:]


async def test_ghosts_of_one_group_uncover_the_floor_of_another(store):
    tank, entries = await pinned_tank(store, keep=1, most=10, held=10)
    await store.create_groups([(S0, "other", "0")])
    await read(store, "other", "me", 4)
    await ack(store, "other", entries[:3])
    await raw(store, "XDEL", S0, text(entries[0]), text(entries[1]))
    await ack(store, G, entries[2:])
    full = await tank.add(4)
    assert (full.units, full.room.lost) == (0, {G: [text(entries[0]), text(entries[1])]})
    assert full.room.pinned is not None
    assert (full.room.pinned.group, full.room.pinned.floor) == ("other", text(entries[3]))
    assert await ids(store) == entries[3:]


# --- a batch of which a part fitted


async def test_units_are_taken_in_order_until_one_does_not_fit(store):
    tank, entries = await pinned_tank(store, keep=1, most=20, held=10)
    await ack(store, G, entries[:5])
    where = await tank.add(2, 1, 4, 1)
    assert (where.units, where.events, where.room.entries) == (2, 3, 2)
    assert await ids(store) == [*entries[5:], *ids_of(where)]


async def test_a_repeat_of_a_batch_that_fitted_in_part_adds_nothing(store):
    """Even when there is room by then: what was told of it must stay true."""
    tank, entries = await pinned_tank(store, keep=1, most=20, held=10)
    await ack(store, G, entries[:3])
    once = await tank.add(2, 1, 4, 1)
    await ack(store, G, entries[3:10])
    before = await ids(store)
    again = await tank.add(2, 1, 4, 1, again=True)
    assert (again.repeated, again[:4]) == (True, once[:4])
    assert await ids(store) == before
    assert (await tank.add(4, 1)).units == 2, "the rest, as a batch of its own"


async def test_a_batch_that_took_nothing_is_not_remembered(store):
    tank, entries = await pinned_tank(store, keep=1, most=20, held=10)
    await tank.add(1)
    memory = keys.producer(S0, "p")
    before = await raw(store, "GET", memory)
    full = await tank.add(3, 1)
    assert (full.ms, full.events, full.units) == ("", 0, 0)
    assert await raw(store, "GET", memory) == before
    await ack(store, G, entries[:10])
    again = await tank.add(3, 1, again=True)
    assert (again.repeated, again.units) == (False, 2)


async def test_a_batch_older_than_one_that_took_nothing_is_still_recognised(store):
    tank = Tank(store, keep=1, most=5)
    await store.create_groups([(S0, G, "0")])
    first = await tank.add(3, 2)
    assert (await store.append(S0, "p", 2, [unit(1)], 1, tank.limits, 5)).units == 0
    again = await tank.add(3, 2, again=True)
    assert (again.repeated, again[:4]) == (True, first[:4])


# --- the oldest are dropped


async def test_dropping_acks_what_was_pending_and_counts_by_group(store):
    tank, entries = await pinned_tank(store, keep=4, most=20, held=10)
    await ack(store, G, entries[1:3])
    await store.create_groups([(S0, "idle", "0"), (S0, "done", "0"), (S0, "new", "$")])
    await ack(store, "done", await read(store, "done", "me", 20))
    where = await tank.add(6, drop_oldest=True)
    assert (where.units, where.dropped) == (1, {G: 4, "idle": 6})
    assert await ids(store) == [*entries[6:], *ids_of(where)]
    assert await pending(store) == entries[6:10]
    assert await read(store, "idle", "me", 2) == entries[6:8]


async def test_who_pins_a_stream_is_told_as_it_was_before_the_oldest_went(store):
    tank, entries = await pinned_tank(store, keep=5, most=10, held=3)
    full = await tank.add(9, drop_oldest=True)
    assert (full.units, full.dropped) == (0, {G: 5})
    assert full.room.pinned is not None
    assert (full.room.pinned.floor, full.room.pinned.pending) == (text(entries[0]), 3)
    assert full.room.pinned.undelivered in (7, None)


async def test_dropping_leaves_keep_and_takes_what_then_fits(store):
    tank, entries = await pinned_tank(store, keep=15, most=20, held=10)
    where = await tank.add(3, 3, drop_oldest=True)
    assert (where.units, where.dropped) == (1, {G: 5})
    assert await ids(store) == [*entries[5:], *ids_of(where)]


async def test_what_nobody_needs_is_no_loss(store):
    tank, entries = await pinned_tank(store, keep=1, most=20, held=10)
    await ack(store, G, entries[:8])
    assert (await tank.add(8, drop_oldest=True)).dropped == {}
    assert (await tank.add(3, drop_oldest=True)).dropped == {G: 3}


async def test_many_pending_entries_are_dropped_at_once(store):
    """More than one look at the pending list brings."""
    tank, entries = await pinned_tank(store, keep=1, most=1_300, held=1_300)
    where = await tank.add(1_200, drop_oldest=True)
    assert (where.units, where.dropped) == (1, {G: 1_200})
    assert await pending(store) == entries[1_200:]
