"""The server answers and refuses: out of memory, read-only, unable to save, still loading."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import (
    Backoff,
    Bus,
    Delivery,
    Event,
    PublishRefused,
    PublishTimeout,
    PublishUnknown,
    Reject,
    RetryLater,
    ServerRefused,
    ServerUnreachable,
    Topic,
    Worker,
    event_handler,
)
from bus.worker import hand
from tests.faults.crew import Site
from tests.faults.deeds import GROUP, LEASE_S, STREAM, Deed, deeds
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer
    from tests.faults.crew import Crew

SHORT_S = 0.4  # what the impatient give a publish
# What goes on trying pauses for 20 to 50 ms at first and a second or more later: some lines for
# each part. Sweeps fail, too, but as often as they are made: ten times a second here.
QUIET = 60
TROUBLES = ("read.failed", "verdict.failed", "publish.retried", "publish.failed", "lease.failed")
REMEDIES = {
    "OOM": "raise maxmemory",
    "READONLY": "check that the URL names the primary",
    "MISCONF": "look for space and rights",
    "LOADING": "still loading",
}


class Rare(Event, type="rare.seen"):
    """Of a topic that nobody has recorded yet."""

    n: int


# --- how a server is brought to refuse, and back


def lacks_memory(server: EmbeddedServer) -> None:
    ask(server, "CONFIG", "SET", "maxmemory", "1")


def has_memory(server: EmbeddedServer) -> None:
    ask(server, "CONFIG", "SET", "maxmemory", "0")


def is_replica(server: EmbeddedServer) -> None:
    # Nobody answers at port 1, so the data stays as it is: a live primary would replace it.
    assert ask(server, "REPLICAOF", "127.0.0.1", "1") == b"+OK\r\n"


def is_primary(server: EmbeddedServer) -> None:
    assert ask(server, "REPLICAOF", "NO", "ONE") == b"+OK\r\n"


def _saved(server: EmbeddedServer, status: bytes) -> None:
    """Save in the background until that has ended with `status`; a save may be under way."""
    end = time.monotonic() + 10
    while b"rdb_last_bgsave_status:" + status not in ask(server, "INFO", "persistence"):
        assert time.monotonic() < end, f"no background save ended {status.decode()}"
        ask(server, "BGSAVE")


def cannot_save(server: EmbeddedServer) -> None:
    # A directory that is not empty stands where the file should: this stops root, too.
    dump = Path(ask(server, "CONFIG", "GET", "dir").split(b"\r\n")[-2].decode(), "dump.rdb")
    (dump / "in the way").mkdir(parents=True)
    ask(server, "CONFIG", "SET", "save", "3600 1000000")
    _saved(server, b"err")


def can_save(server: EmbeddedServer) -> None:
    dump = Path(ask(server, "CONFIG", "GET", "dir").split(b"\r\n")[-2].decode(), "dump.rdb")
    (dump / "in the way").rmdir()
    dump.rmdir()
    _saved(server, b"ok")
    ask(server, "CONFIG", "SET", "save", "")  # it would save once more when it ends


REFUSALS = {
    "OOM": (lacks_memory, has_memory),
    "READONLY": (is_replica, is_primary),
    "MISCONF": (cannot_save, can_save),
}


@pytest.fixture(params=list(REFUSALS))
def code(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def refused(publish: Callable[[], Awaitable[Any]], code: str) -> None:
    """Publish, and see that the caller is told by PublishRefused when its time is up."""
    while True:
        started = time.monotonic()
        with pytest.raises((PublishRefused, PublishUnknown)) as raised:
            await publish()
        assert SHORT_S - 0.02 < time.monotonic() - started < SHORT_S + 2
        # Its time may be up just while an attempt is on its way: then doubt is the honest answer.
        if not isinstance(raised.value, PublishUnknown):
            break
    assert isinstance(raised.value, PublishTimeout), "who catches that catches both"
    assert isinstance(raised.value, PublishRefused)
    assert raised.value.code == code
    text = str(raised.value)
    assert f"({code}" in text
    assert "was not published" in text
    assert REMEDIES[code] in text


async def numbers(url: str, stream: str) -> list[int]:
    """The n of every event of a stream."""
    async with Redis.from_url(url) as redis:
        rows = await redis.xrange(stream)
    return [int(re.findall(rb'"n":(\d+)', fields[b"data"])[0]) for _, fields in rows]


# --- publishers


async def test_publishers_are_told_why_and_what_helps(
    private_server: PrivateServer, server_kind: str, code: str
) -> None:
    server = private_server(server_kind)
    refuse, relent = REFUSALS[code]
    async with (
        Bus.connect(server.url, publish_timeout_s=SHORT_S) as bus,
        Bus.connect(server.url, publish_timeout_s=15) as patient,
    ):
        witness = Witness(bus)
        for each in (bus, patient):
            await each.publish(Deed(n=0))
        refuse(server)
        waiting = asyncio.create_task(patient.publish(Deed(n=1)))
        first_of_topic = asyncio.create_task(patient.publish(Rare(n=1)))
        await asyncio.gather(
            refused(lambda: bus.publish(Deed(n=90)), code),
            refused(lambda: bus.publish_many([Deed(n=91), Deed(n=92)]), code),
            # Its topic cannot be recorded; the second waits behind the first.
            refused(lambda: bus.publish(Rare(n=90)), code),
            refused(lambda: bus.publish_many([Rare(n=91)]), code),
        )
        await refused(lambda: bus.publish_many([Deed(n=93), Rare(n=93)]), code)
        assert not waiting.done()
        assert not first_of_topic.done()
        assert await numbers(server.url, STREAM) == [0, 0]
        assert sum(witness.counts()[name] for name in TROUBLES) < QUIET, witness.counts()
        relent(server)
        receipts = await asyncio.gather(waiting, first_of_topic)
        await bus.publish(Deed(n=2))
        await bus.publish(Rare(n=2))
        assert await numbers(server.url, STREAM) == [0, 0, 1, 2]
        assert await numbers(server.url, receipts[1].stream) == [1, 2]


async def test_an_old_refusal_is_not_the_reason_of_a_later_silence(
    private_server: PrivateServer,
) -> None:
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=SHORT_S) as bus:
        lacks_memory(server)
        await refused(lambda: bus.publish(Rare(n=1)), "OOM")
        has_memory(server)
        server.pause()
        with pytest.raises(PublishTimeout, match="was not published") as raised:
            await bus.publish(Rare(n=2))
        server.resume()
        assert not isinstance(raised.value, PublishRefused)
        await bus.publish(Rare(n=3))


# --- workers


@asynccontextmanager
async def seen(server: EmbeddedServer) -> AsyncIterator[Site]:
    site = Site(server.url)
    try:
        yield site
    finally:
        await site.backend.close()


@asynccontextmanager
async def held_up(crew: Crew, bus: Bus, out: Bus, **settings: Any) -> AsyncIterator[Worker]:
    """A worker whose one slot is held by Deed 0, so that what is published next stays unread."""
    handler = deeds(crew.journal, concurrency=1, **settings)
    async with Worker(bus, [handler], lease_s=LEASE_S) as worker:
        await out.publish(Deed(n=0, kind="hold"))
        await eventually(lambda: crew.journal.times("start")[0])
        yield worker


async def test_without_memory_a_backlog_drains_and_dead_letters_wait(
    crew: Crew, private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind)
    kinds = {7: "doomed", 11: "flaky", 23: "flaky", 40: "doomed"}
    backlog = [Deed(n=n, kind=kinds.get(n, "quick")) for n in range(1, 60)]
    wanted = {d.n for d in backlog if d.kind != "doomed"} | {0}
    async with (
        seen(server) as site,
        Bus.connect(server.url) as bus,
        Bus.connect(server.url) as out,
        held_up(crew, bus, out) as worker,
    ):
        witness = Witness(bus)
        await out.publish_many(backlog)
        lacks_memory(server)
        late = asyncio.create_task(out.publish(Deed(n=100)))
        crew.journal.flag("go on").touch()
        await eventually(lambda: set(crew.journal.times("end")) == wanted)
        await eventually(lambda: crew.journal.times("start")[7] == 3, "parked and tried again")

        async def only_dead_letters_are_left() -> bool:
            return [p.deliveries for p in await site.pending()] == [3, 3]

        await eventually(only_dead_letters_are_left)
        assert await site.dead() == []
        assert not late.done()
        assert witness.of("verdict.failed", error_type="ReplyError")
        assert sum(witness.counts()[name] for name in TROUBLES) < QUIET, witness.counts()
        has_memory(server)
        await late
        await worker.drained()
        assert await site.dead_ns() == [7, 40]
        assert crew.journal.times("on_dead") == Counter([7, 40])
        assert crew.journal.times("end") == Counter(wanted | {100}), "nothing twice"


async def test_acks_are_not_held_up_by_dead_letters_that_wait_for_memory(
    crew: Crew,
    private_server: PrivateServer,
    server_kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def for_ever(self: hand.Cooldown, *, ok: bool) -> None:
        self.until = 0.0 if ok else float("inf")

    server = private_server(server_kind)
    async with (
        seen(server) as site,
        Bus.connect(server.url) as bus,
        Bus.connect(server.url) as out,
        held_up(crew, bus, out, max_attempts=1) as worker,
    ):
        witness = Witness(bus)
        await out.publish_many(
            [Deed(n=n, kind="quick" if n > 2 else "doomed") for n in range(1, 9)]
        )
        lacks_memory(server)
        # What waits behind the first dead letter that is refused would wait for ever.
        monkeypatch.setattr(hand.Cooldown, "after", for_ever)
        crew.journal.flag("go on").touch()

        async def only_dead_letters_are_left() -> bool:
            return len(await site.pending()) == 2 and witness.total("delivery.acked") == 7

        await eventually(only_dead_letters_are_left)
        assert witness.of("verdict.failed")
        monkeypatch.undo()
        has_memory(server)
        await worker.stop()  # hurries what waits
        assert await site.dead_ns() == [1, 2]
        assert await site.pending() == []


async def test_a_stream_without_memory_is_still_trimmed(
    private_server: PrivateServer, server_kind: str
) -> None:
    """What is trimmed makes room: the append that trims goes through by itself."""
    server = private_server(server_kind)
    ask(server, "CONFIG", "SET", "stream-node-max-entries", "5")
    topic = Topic("deed", maxlen=30, keep=10)  # trims at 12, 14, 16 ...
    async with (
        Bus.connect(server.url, topics=[topic], publish_timeout_s=5) as bus,
        Redis.from_url(server.url) as redis,
    ):
        await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        await bus.publish_many([Deed(n=n) for n in range(20)])
        assert await redis.xlen(STREAM) == 20, "the group needs them"
        await redis.xgroup_setid(STREAM, GROUP, id="$")
        lacks_memory(server)
        await bus.publish_many([Deed(n=20), Deed(n=21)])
    assert await numbers(server.url, STREAM) == list(range(10, 22))


async def test_what_a_group_has_drained_makes_room_for_publishers(
    crew: Crew, private_server: PrivateServer, server_kind: str
) -> None:
    """No append gets in that would trim, so the worker must: memory is back by itself."""
    server = private_server(server_kind)
    topic = Topic("deed", maxlen=2_000, keep=100)
    async with (
        Bus.connect(server.url, topics=[topic]) as bus,
        Bus.connect(server.url, topics=[topic]) as out,
        held_up(crew, bus, out),
    ):
        witness = Witness(out)
        for start in range(1, 1_000, 111):
            await out.publish_many([Deed(n=n, text="x" * 2_000) for n in range(start, start + 111)])
        used = re.findall(rb"used_memory:(\d+)", ask(server, "INFO", "memory"))
        ask(server, "CONFIG", "SET", "maxmemory", str(int(used[0]) - 1_000_000))
        late = asyncio.create_task(out.publish(Deed(n=1_000)))
        await eventually(lambda: witness.of("publish.retried"))
        assert len(await numbers(server.url, STREAM)) == 1_000, "pinned by the first"
        crew.journal.flag("go on").touch()
        await late
        assert len(await numbers(server.url, STREAM)) < 500


@pytest.mark.parametrize("code", ["READONLY", "MISCONF"])
async def test_workers_that_may_write_nothing_wait_quietly(
    private_server: PrivateServer, server_kind: str, code: str
) -> None:
    """Verdicts of each kind wait, two entries are unread, and reading is refused."""
    server = private_server(server_kind)
    refuse, relent = REFUSALS[code]
    kinds = {1: "flaky", 2: "doomed"}
    started: list[int] = []
    ended: list[int] = []
    go_on = asyncio.Event()

    @event_handler(
        Deed,
        group=GROUP,
        concurrency=4,
        visibility_s=LEASE_S,
        backoff=Backoff(base_s=0.05, factor=1.0, jitter=0.0),
    )
    async def do(deed: Deed, delivery: Delivery[Deed]) -> None:
        started.append(deed.n)
        await go_on.wait()
        if deed.kind == "doomed":
            raise Reject("doomed")
        if deed.kind == "flaky" and delivery.attempt == 1:
            raise ValueError("not yet")
        ended.append(deed.n)

    async with (
        seen(server) as site,
        Bus.connect(server.url) as bus,
        Bus.connect(server.url) as out,
        Worker(bus, [do], lease_s=LEASE_S) as worker,
    ):
        witness = Witness(bus)
        await out.publish_many([Deed(n=n, kind=kinds.get(n, "quick")) for n in range(4)])
        await eventually(lambda: sorted(started) == [0, 1, 2, 3])
        await out.publish_many([Deed(n=n) for n in (4, 5)])
        refuse(server)
        go_on.set()
        late = asyncio.create_task(out.publish(Deed(n=6)))
        loop = asyncio.get_running_loop()
        over = loop.time() + 2 * LEASE_S
        await eventually(lambda: loop.time() > over and len(witness.of("read.failed")) > 3)
        assert {f["error"].split()[0] for f in witness.of("read.failed")} <= {code, "UNBLOCKED"}
        assert len(witness.of("verdict.failed")) >= 2
        assert not witness.of("delivery.acked")
        assert sum(witness.counts()[name] for name in TROUBLES) < QUIET, witness.counts()
        assert not late.done()
        relent(server)
        await late
        await worker.drained()
        assert Counter(ended) == Counter([0, 1, 3, 4, 5, 6]), "nothing lost, nothing twice"
        assert await site.dead_ns() == [2]
        assert await numbers(server.url, STREAM) == list(range(7))
        assert not witness.of("worker.failed")


# --- loading


# The delay after a command is 1 us, which sleeping makes about 60, or with -2 that of every second.
# Every 1,000 commands it answers who asks. With `everysec` a crash after so much writing would
# lose what came last.
LOAD = ("--key-load-delay", "-2", "--appendfsync", "always")
BALLAST = 60_000


@asynccontextmanager
async def loading(server: EmbeddedServer) -> AsyncIterator[None]:
    """Crash and start the server; for the block it loads, at its end that goes on at full speed."""
    server.kill()
    restarted = asyncio.create_task(asyncio.to_thread(server.restart))

    def loads() -> bool:
        try:
            return ask(server, "PING").startswith(b"-LOADING")
        except OSError:
            return False  # not up yet

    await eventually(loads)
    try:
        yield
        assert loads(), "the test was slower than the loading"
    finally:
        ask(server, "CONFIG", "SET", "key-load-delay", "0")
        await restarted


async def slow_to_load(private_server: PrivateServer, server_kind: str) -> EmbeddedServer:
    """A server that takes about two seconds to load."""
    server = private_server(server_kind, aof=True, extra_args=LOAD)
    async with Redis.from_url(server.url) as redis:
        pipeline = redis.pipeline(transaction=False)
        for n in range(BALLAST):
            pipeline.set(f"ballast:{n}", "x")
        await pipeline.execute()
    return server


async def test_a_server_that_is_loading_is_waited_for(
    crew: Crew, private_server: PrivateServer, server_kind: str
) -> None:
    server = await slow_to_load(private_server, server_kind)
    async with (
        Bus.connect(server.url) as bus,
        Bus.connect(server.url) as out,
        Bus.connect(server.url, publish_timeout_s=SHORT_S) as impatient,
    ):
        witness = Witness(bus)

        def failures() -> list[dict[str, Any]]:
            """What the worker told of its own troubles."""
            return [fields for name, fields in witness.seen if name.endswith(".failed")]

        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await impatient.publish(Deed(n=0))
            await out.publish_many([Deed(n=n, kind="hold") for n in (1, 2)])
            await eventually(lambda: set(crew.journal.times("start")) == {0, 1, 2})
            async with loading(server):
                crew.journal.flag("go on").touch()
                late = asyncio.create_task(out.publish(Deed(n=3)))
                await asyncio.gather(
                    refused(lambda: impatient.publish(Deed(n=90)), "LOADING"),
                    refused(lambda: impatient.publish(Rare(n=90)), "LOADING"),
                )
                with pytest.raises(ServerUnreachable, match="still loading its data"):
                    async with Bus.connect(server.url):
                        pass
                await eventually(lambda: any("LOADING" in f["error"] for f in failures()))
                assert not late.done()
            await late
            await worker.drained()
            assert set(crew.journal.times("end")) == {0, 1, 2, 3}
            assert sum(witness.counts()[name] for name in TROUBLES) < QUIET, witness.counts()
            assert await numbers(server.url, STREAM) == [0, 1, 2, 3]
            assert not witness.of("group.recreated")


# --- starting


async def test_a_worker_is_not_started_on_a_server_that_refuses_and_says_why(
    crew: Crew, private_server: PrivateServer, server_kind: str, code: str
) -> None:
    """Its groups cannot be made. The bus itself starts: it can read, and publishers may wait."""
    server = private_server(server_kind)
    refuse, relent = REFUSALS[code]
    refuse(server)
    async with Bus.connect(server.url) as bus:
        worker = Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S)
        async with asyncio.timeout(5):
            with pytest.raises(ServerRefused, match=REMEDIES[code]) as raised:
                await worker.start()
            assert raised.value.code == code
        relent(server)
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await bus.publish(Deed(n=1))
            await worker.drained()
    assert crew.journal.times("end") == Counter([1])


async def test_a_worker_whose_groups_exist_starts_without_memory_and_drains(
    crew: Crew, private_server: PrivateServer, server_kind: str
) -> None:
    """A deployment while the server is full must not end the draining that it needs."""
    server = private_server(server_kind)
    async with Bus.connect(server.url) as bus:
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S):
            pass
        await bus.publish_many([Deed(n=n) for n in range(50)])
        lacks_memory(server)
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await worker.drained()
        has_memory(server)
    assert set(crew.journal.times("end")) == set(range(50))


async def test_a_dead_letter_that_waits_for_memory_holds_up_no_retry(
    private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind)
    attempts: list[int] = []

    @event_handler(Deed, group=GROUP, breaker=None)
    async def handle(event: Deed, delivery: Delivery[Deed]) -> None:
        if event.n == 0:
            raise Reject("dead")
        attempts.append(delivery.attempt)
        raise RetryLater(0.1)

    async with Bus.connect(server.url) as bus:
        witness = Witness(bus)
        async with Worker(bus, [handle], lease_s=LEASE_S):
            await bus.publish(Deed(n=1))
            await eventually(lambda: attempts)
            await bus.publish(Deed(n=0))
            lacks_memory(server)
            await eventually(lambda: witness.of("verdict.failed"))
            started_s, before = time.monotonic(), len(attempts)
            await eventually(lambda: len(attempts) >= before + 10)
            # Together with the dead letter each would have waited two seconds in the end.
            assert time.monotonic() - started_s < 6
            has_memory(server)


async def test_a_handler_that_cannot_publish_uses_no_attempt(
    private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind)
    attempts: list[int] = []
    is_full = asyncio.Event()

    @event_handler(Deed, group=GROUP, max_attempts=2, breaker=None)
    async def handle(event: Deed, delivery: Delivery[Deed]) -> None:
        attempts.append(delivery.attempt)
        if event.n == 2:
            await is_full.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(delivery.bus.publish(Rare(n=1)))

    async with Bus.connect(server.url, publish_timeout_s=SHORT_S) as bus:
        witness = Witness(bus)
        await bus.publish(Rare(n=0))
        async with Worker(bus, [handle], lease_s=LEASE_S) as worker:
            await bus.publish(Deed(n=1))
            await worker.drained()
            assert attempts == [1]
            attempts.clear()
            await bus.publish(Deed(n=2))
            lacks_memory(server)
            is_full.set()
            await eventually(lambda: len(witness.of("delivery.postponed")) >= 2)
            has_memory(server)
            await worker.drained()
        assert set(attempts) == {1}
        assert witness.of("delivery.dead_lettered") == []
