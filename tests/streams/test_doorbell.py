"""Many idle handlers wait at one connection: nobody sleeps through a ring, none is in vain."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Worker, event_handler
from bus.streams import doorbell
from bus.streams.address import parse_url
from bus.streams.answers import Limits
from bus.streams.replies import ReplyError
from bus.streams.server import Standalone
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.proxy import Proxy
from tests.servers import ask, follow_another, in_step
from tests.streams.test_stream import unit, until_blocked
from tests.witness import eventually
from tests.worker.events import Asked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.streams.reader import Reads
    from tests.conftest import PrivateServer

A, B = "bus:{bell:0}", "bus:{bell:1}"
WIDE = Limits(keep=100_000, slack=1_000, most=1_000_000)
FOR_EVER_MS = 60_000  # a reader that sleeps through a ring is found out by the test's own timeout


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[StreamStore]:
    store = StreamStore(Standalone(parse_url(valkey_url)), Telemetry())
    yield store
    await store.close()


class Desk:
    """Readers of groups g0, g1, ... at one doorbell."""

    def __init__(self, store: StreamStore, count: int) -> None:
        self.groups = [f"g{n}" for n in range(count)]
        self.readers: list[Reads] = store.readers(self.groups)
        self._store = store
        self._sequence = 0

    async def make_groups(self, *streams: str) -> None:
        await self._store.create_groups([(s, g, "0") for s in streams for g in self.groups])

    def read(self, n: int, *streams: str) -> asyncio.Task[Any]:
        reading = self.readers[n].read(self.groups[n], "me", streams, 100, FOR_EVER_MS)
        return asyncio.create_task(reading)

    async def append(self, stream: str, *values: str) -> None:
        self._sequence += 1
        await self._store.append(stream, "p", self._sequence, [unit(*values)], len(values), WIDE, 5)


@pytest.fixture
async def desk(store: StreamStore) -> AsyncIterator[Desk]:
    desk = Desk(store, 20)
    yield desk
    for reader in desk.readers:
        await reader.close()


async def calls(url: str, command: str) -> int:
    """How often the server has run a command."""
    import redis.asyncio  # noqa: PLC0415

    async with redis.asyncio.Redis.from_url(url) as client:
        stats = await client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def values(found: list[tuple[str, list[Any]]]) -> list[bytes]:
    return [fields[1] for _, entries in found for _, fields in entries]


async def test_one_event_wakes_every_group_of_its_stream_and_no_other(desk, shared_server) -> None:
    server = shared_server("valkey-9.1")
    await desk.make_groups(A, B)
    here = [desk.read(n, A) for n in range(10)]
    there = [desk.read(n, B) for n in range(10, 20)]
    await until_blocked(server)
    await desk.append(A, "x")
    assert [values(f) for f in await asyncio.gather(*here)] == [[b"x"]] * 10
    assert not any(task.done() for task in there)
    await desk.append(B, "y")
    assert [values(f) for f in await asyncio.gather(*there)] == [[b"y"]] * 10


async def test_twenty_readers_are_two_connections(desk, valkey_url, shared_server) -> None:
    await desk.make_groups(A)
    reads = [desk.read(n, A) for n in range(20)]
    await until_blocked(shared_server("valkey-9.1"))
    clients = ask(shared_server("valkey-9.1"), "CLIENT", "LIST").decode()
    assert sum("cmd=xread" in line for line in clients.splitlines()) == 2, clients
    await desk.append(A, "x")
    await asyncio.gather(*reads)


@pytest.mark.parametrize("seed", range(3))
async def test_nobody_sleeps_through_an_event(desk, store, seed) -> None:
    """Events come at every moment of reading, waiting, learning and arming."""
    chance = random.Random(seed)
    await desk.make_groups(A, B)
    count = 150
    got: list[list[bytes]] = [[] for _ in desk.groups]

    async def follow(n: int) -> None:
        streams = [[A], [B], [A, B]][n % 3]
        while len(got[n]) < count * len(streams):
            got[n] += values(await desk.read(n, *streams))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)

    readers = [asyncio.create_task(follow(n)) for n in range(len(desk.groups))]
    for n in range(count):
        for stream in (A, B) if chance.random() < 0.5 else (B, A):
            await desk.append(stream, str(n))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*readers), 30)
    expected = sorted(str(n).encode() for n in range(count))
    for n, mine in enumerate(got):
        assert sorted(mine) == (expected if n % 3 < 2 else sorted(expected * 2))


async def test_a_stream_that_is_added_while_others_wait_rings_too(desk, shared_server) -> None:
    await desk.make_groups(A, B)
    first = desk.read(0, A)
    await until_blocked(shared_server("valkey-9.1"))
    second = desk.read(1, B)
    await eventually(lambda: B in desk.readers[0]._bell._armed)
    await desk.append(B, "y")
    assert values(await asyncio.wait_for(second, 5)) == [b"y"]
    await desk.append(A, "x")
    assert values(await asyncio.wait_for(first, 5)) == [b"x"]


async def test_what_others_read_while_nothing_watched_it_rings(desk, shared_server) -> None:
    await desk.make_groups(A, B)
    bell = desk.readers[0]._bell
    await desk.append(B, "x")
    assert values(await desk.read(1, B)) == [b"x"]
    first = desk.read(0, A)
    await until_blocked(shared_server("valkey-9.1"))
    slow = bell._commands = Slow(bell._commands, asks=False)
    waiting = desk.read(1, B)
    await eventually(lambda: B in bell._watched)
    await desk.append(B, "y")
    assert values(await desk.read(2, B)) == [b"x", b"y"]
    assert bell._armed == {A}
    await desk.append(A, "z")
    assert values(await first) == [b"z"]
    assert values(await asyncio.wait_for(waiting, 5)) == [b"y"]
    slow.goes_on.set()


async def test_what_is_let_be_while_another_is_added_rings_again(
    desk, shared_server, monkeypatch
) -> None:
    """The watch that was to be ended has ended, a later one misses the stream: it is ended, too."""
    monkeypatch.setattr(doorbell, "BLOCK_MS", FOR_EVER_MS)
    await desk.make_groups(A, B)
    bell = desk.readers[0]._bell
    first = desk.read(0, A)
    await until_blocked(shared_server("valkey-9.1"))
    slow = bell._commands = Slow(bell._commands, asks=True)
    second = desk.read(1, B)
    await eventually(lambda: bell._armed == {A, B})
    await desk.append(A, "x")
    assert values(await first) == [b"x"]
    await desk.append(A, "y")  # for which nobody waits
    await eventually(lambda: bell._armed == {B})
    assert values(await desk.read(2, A)) == [b"x", b"y"]
    third = desk.read(2, A)
    await eventually(lambda: A in bell._watched)
    slow.goes_on.set()
    await desk.append(A, "z")
    assert values(await asyncio.wait_for(third, 5)) == [b"z"]
    await desk.append(B, "z")
    await second


class Slow:
    """A connection that hangs: before it asks, or with the answer."""

    def __init__(self, connection: Any, *, asks: bool) -> None:
        self._connection = connection
        self._asks = asks
        self.goes_on = asyncio.Event()

    async def submit(self, packed: bytes, replies: int) -> Any:
        if not self._asks:
            await self.goes_on.wait()
        answer = await self._connection.submit(packed, replies)
        await self.goes_on.wait()
        return answer


async def test_a_read_that_is_on_its_way_is_ended_too(desk, shared_server) -> None:
    await desk.make_groups(A)
    await desk.append(A, *map(str, range(100)))
    assert len(values(await desk.read(0, A))) == 100  # as many as it may: it asks for more at once
    reading = desk.read(0, A)
    await asyncio.sleep(0)  # it has asked, and has no answer
    assert desk.readers[0]._waits is None
    await desk.readers[0].unblock()
    assert await asyncio.wait_for(reading, 5) == []
    waiting = desk.read(0, A)
    await until_blocked(shared_server("valkey-9.1"))
    await desk.readers[0].unblock()
    assert await asyncio.wait_for(waiting, 5) == []
    again = desk.read(0, A)
    await desk.append(A, "x")
    assert values(await asyncio.wait_for(again, 5)) == [b"x"]


async def test_a_group_that_is_missing_makes_nobody_else_look(
    desk, valkey_url, shared_server
) -> None:
    """It is asked for again and again, as long as nobody makes it."""
    await desk.make_groups(A, B)
    waiting = [desk.read(n, A) for n in range(10)]
    await until_blocked(shared_server("valkey-9.1"))
    before = await calls(valkey_url, "xreadgroup")
    with pytest.raises(ReplyError, match="NOGROUP"):
        await desk.read(10, "bus:{nobody:0}")
    late = desk.read(11, B)  # for this the watch is made anew
    await eventually(lambda: desk.readers[0]._bell._armed == {A, B})
    assert await calls(valkey_url, "xreadgroup") - before <= 4
    await desk.append(A, "x")
    assert [values(f) for f in await asyncio.gather(*waiting)] == [[b"x"]] * 10
    await desk.append(B, "y")
    assert values(await late) == [b"y"]


class Unnamed:
    """A connection that is told what it is called when `named` is set, and not before."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.client_id: int | None = None
        self.named = asyncio.Event()
        self.asked = asyncio.Event()

    def submit(self, packed: bytes, *rest: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._submit(packed, *rest))

    async def _submit(self, packed: bytes, *rest: Any) -> Any:
        answer = await self._connection.submit(packed, *rest)
        if b"CLIENT" in packed:
            self.asked.set()
            await self.named.wait()
        return answer

    async def close(self) -> None:
        await self._connection.close()


async def test_what_is_added_or_forgotten_while_the_bell_learns_its_name_rings(desk) -> None:
    await desk.make_groups(A, B)
    bell = desk.readers[0]._bell
    unnamed = bell._waiting = Unnamed(bell._waiting)
    first = desk.read(0, A)
    await asyncio.wait_for(unnamed.asked.wait(), 5)
    second = desk.read(1, B)
    await eventually(lambda: B in bell._watched)
    with pytest.raises(ReplyError, match="NOGROUP"):
        await desk.read(2, "bus:{nobody:0}")
    unnamed.named.set()
    await eventually(lambda: bell._armed == {A, B})
    await desk.append(A, "x")
    await desk.append(B, "y")
    found = await asyncio.wait_for(asyncio.gather(first, second), 5)
    assert [values(f) for f in found] == [[b"x"], [b"y"]]


async def test_a_busy_stream_rings_for_nobody(desk, valkey_url, shared_server) -> None:
    """The bell is not rung for each event of a stream whose groups are all at work."""
    await desk.make_groups(A, B)
    idle = desk.read(0, A)
    busy = desk.read(1, B)
    await until_blocked(shared_server("valkey-9.1"))
    await desk.append(B, "first")
    await busy
    before = await calls(valkey_url, "xread")
    for n in range(50):
        await desk.append(B, str(n))
    assert await calls(valkey_url, "xread") - before <= 2
    assert len(values(await desk.read(1, B))) == 50
    late = desk.read(1, B)
    await eventually(lambda: B in desk.readers[0]._bell._armed)
    await desk.append(B, "last")
    assert values(await late) == [b"last"]
    await desk.append(A, "x")
    assert values(await idle) == [b"x"]


async def test_where_ids_may_not_be_asked_streams_are_added_soon(
    desk, valkey_url, shared_server, monkeypatch
) -> None:
    """Without CLIENT ID nothing can end the wait, so it ends by itself, often; and asks no more."""
    monkeypatch.setattr(doorbell, "_BLOCK_MS_UNNAMED", 30)
    await desk.make_groups(A, B)
    desk.readers[0]._bell._waiting.client_id = 0
    first, second = desk.read(0, A), None
    await until_blocked(shared_server("valkey-9.1"))
    desk.readers[0]._bell._waiting.client_id = 0
    asked, watches = await calls(valkey_url, "client|id"), await calls(valkey_url, "xread")

    async def again() -> bool:
        return await calls(valkey_url, "xread") > watches + 2

    await eventually(again)
    assert await calls(valkey_url, "client|id") == asked
    second = desk.read(1, B)
    await desk.append(B, "y")
    assert values(await asyncio.wait_for(second, 5)) == [b"y"]
    await desk.append(A, "x")
    assert values(await asyncio.wait_for(first, 5)) == [b"x"]


async def test_a_bell_leaves_a_primary_that_was_demoted_and_cuts_nobody_off(
    private_server: PrivateServer, monkeypatch
) -> None:
    """It had no watch at the time, which the server would have ended."""
    old, new = (private_server(extra_args=("--repl-diskless-sync-delay", "0")) for _ in range(2))
    monkeypatch.setattr(doorbell, "BLOCK_MS", 50)
    async with Proxy(old.port) as name:
        store = StreamStore(Standalone(parse_url(name.url)), Telemetry())
        desk = Desk(store, 20)
        await desk.make_groups(A)
        bell = desk.readers[0]._bell
        reading = desk.read(0, A)
        await eventually(lambda: bell._watch)
        follow_another(new, "127.0.0.1", str(old.port))
        await eventually(lambda: in_step(new, old))
        await desk.readers[0].unblock()
        await reading
        await eventually(lambda: bell._ringing is None)
        follow_another(new, "NO", "ONE")
        follow_another(old, "127.0.0.1", "1")  # whom it does not reach
        name.target = new.port
        heard: list[bytes] = []

        async def follow() -> None:
            while not heard:
                with suppress(ReplyError):
                    heard.extend(values(await desk.read(0, A)))

        following = asyncio.create_task(follow())
        await eventually(lambda: bell._reading._link and bell._armed == {A} and bell._watch)
        other = StreamStore(Standalone(parse_url(new.url)), Telemetry())
        desk._store = other
        await desk.append(A, "x")
        await asyncio.wait_for(following, 5)
        assert heard == [b"x"]
        for reader in desk.readers:
            await reader.close()
        for each in (store, other):
            await each.close()


async def test_a_key_of_another_type_is_told_to_all_who_wait(desk, shared_server) -> None:
    await desk.make_groups(A)
    reads = [desk.read(n, A) for n in range(3)]
    await until_blocked(shared_server("valkey-9.1"))
    ask(shared_server("valkey-9.1"), "DEL", A)
    ask(shared_server("valkey-9.1"), "SET", A, "text")
    bell = desk.readers[0]._bell
    bell._watched.add(B)
    reads.append(desk.read(3, A))  # ... and another asks
    errors = await asyncio.wait_for(asyncio.gather(reads[3], return_exceptions=True), 5)
    assert [e.code for e in errors if isinstance(e, ReplyError)] == ["WRONGTYPE"]
    for task in reads[:3]:
        task.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    ask(shared_server("valkey-9.1"), "DEL", A)
    await desk.make_groups(A)
    again = desk.read(4, A)
    await desk.append(A, "x")
    assert values(await asyncio.wait_for(again, 5)) == [b"x"]


# --- a worker with many handlers


def many(seen: list[tuple[str, int]], count: int = 12) -> list[Any]:
    def handler(group: str) -> Any:
        async def see(event: Asked) -> None:
            seen.append((group, event.n))

        return event_handler(Asked, group=group)(see)

    return [handler(f"many{n}") for n in range(count)]


async def test_a_worker_with_many_handlers_survives_its_server(
    private_server: PrivateServer,
) -> None:
    """What was read and never answered is recovered; what waits at the bell wakes again."""
    server = private_server(aof=True)
    seen: list[tuple[str, int]] = []
    async with Bus.connect(server.url) as bus, Worker(bus, many(seen)) as worker:
        await bus.publish(Asked(n=0))
        await worker.drained()
        for n in (1, 2):
            server.kill()
            server.restart()
            await bus.publish(Asked(n=n))
            await worker.drained()
        assert sorted(set(seen)) == sorted((f"many{g}", n) for g in range(12) for n in range(3))


async def test_a_worker_with_many_handlers_mends_groups_that_were_deleted(valkey_url) -> None:
    seen: list[tuple[str, int]] = []
    async with Bus.connect(valkey_url) as bus, Worker(bus, many(seen)) as worker:
        await bus.publish(Asked(n=0))
        await worker.drained()
        await bus.redis.flushall()
        await bus.publish(Asked(n=1))
        await eventually(lambda: len(set(seen)) == 24, timeout_s=15)
