"""Replays that are killed, cut off and refused: nothing is twice in an inbox, nothing missing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import (
    Bus,
    CheckpointError,
    Delivery,
    Progress,
    ServerError,
    ServerRefused,
    ServerUnreachable,
    Topic,
    Worker,
    event_handler,
)
from bus.history import destinations, event_store, patience, replay
from bus.streams.connection import Connection
from bus.streams.script import Script
from tests.faults.proxy import Proxy as RequestProxy
from tests.faults.replay_program import Verse
from tests.proxy import Proxy
from tests.servers import DEFAULT, ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

ROOT = Path(__file__).resolve().parents[2]
TOPIC = Topic("saga", partitions=2, keep=200_000)
STREAMS = ["bus:{saga:0}", "bus:{saga:1}"]
GROUPS = ("index", "audit", "stats")


def handler(group: str, handled: Counter[int] | None = None) -> Any:
    @event_handler(Verse, group=group, concurrency=256)
    async def handle(event: Verse, delivery: Delivery[Verse]) -> None:
        if handled is not None:
            assert delivery.replayed
            handled[event.n] += 1

    return handle


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url) as client:
        yield client


async def filled(url: str, count: int) -> None:
    """Publish, with every group past all of it: only a replay brings it back."""
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        async with Worker(bus, [handler(g) for g in GROUPS]):
            pass
        for first in range(0, count, 1_000):
            verses = [Verse(skald=f"s{n % 97}", n=n) for n in range(first, first + 1_000)]
            await bus.publish_many(verses)
        for stream in STREAMS:
            for group in GROUPS:
                await bus.store.commands.call("XGROUP", "SETID", stream, group, "$")


async def in_inboxes(redis: Any, group: str) -> Counter[bytes]:
    """Original ids, with their streams, of everything in a group's inboxes."""
    found: Counter[bytes] = Counter()
    for stream in STREAMS:
        after = "-"
        while rows := await redis.xrange(f"{stream}:inbox:{group}", after, "+", 5_000):
            found.update(stream.encode() + b" " + fields[b"origentry"] for _, fields in rows)
            after = "(" + rows[-1][0].decode()
    return found


async def each_once(url: str, to: str, count: int) -> None:
    """Whatever happened: of `count` events each is in the inbox once, or published once more."""
    if to == "index":
        async with Redis.from_url(url) as redis:
            inbox = await in_inboxes(redis, "index")
            assert (len(inbox), set(inbox.values())) == (count, {1})
            assert set(inbox) == await in_streams(redis)
    else:
        async with Bus.connect(url) as bus:
            past = Counter([e.event.n async for e in bus.history("saga")])
        assert past == Counter(list(range(count)) * 2)


async def in_streams(redis: Any) -> set[bytes]:
    found: set[bytes] = set()
    for stream in STREAMS:
        after = "-"
        while rows := await redis.xrange(stream, after, "+", 5_000):
            found.update(stream.encode() + b" " + entry_id for entry_id, _ in rows)
            after = "(" + rows[-1][0].decode()
    return found


class Replaying:
    """A replaying process."""

    def __init__(self, url: str, checkpoint: Path, to: str = "index", rate: str = "") -> None:
        words = [sys.executable, "-m", "tests.faults.replay_program", url, "saga", to]
        self._process = subprocess.Popen(
            [*words, str(checkpoint), *([rate] if rate else [])], cwd=ROOT, stdout=subprocess.PIPE
        )

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        assert self._process.returncode == -signal.SIGKILL, "it ended before it was killed"

    def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    async def output(self) -> str:
        out, _ = await asyncio.to_thread(self._process.communicate)
        assert self._process.returncode == 0
        return out.decode()


async def test_many_killed_twice(url: str, redis: Any, tmp_path: Path, server_kind: str) -> None:
    """SIGKILL twice in the middle: the inbox gets each exactly once, other groups nothing.

    So many on one kind of server, 5,000 on the others.
    """
    count, path = 30_000 if server_kind == DEFAULT else 5_000, tmp_path / "checkpoint"
    await filled(url, count)

    async def length() -> int:
        return sum([await redis.xlen(f"{s}:inbox:index") for s in STREAMS])

    for enough in (count // 5, count // 2):
        script = Replaying(url, path, rate=str(count * 6 // 10))
        await eventually(lambda n=enough: _reaches(length, n), f"{enough} in the inbox")
        script.kill()
        assert enough <= await length() < count
    assert await Replaying(url, path).output() == f"{count}\n"
    inbox = await in_inboxes(redis, "index")
    assert set(inbox.values()) == {1}
    assert set(inbox) == await in_streams(redis)
    assert len(inbox) == count
    for group in ("audit", "stats"):
        assert await in_inboxes(redis, group) == Counter()
        for stream in STREAMS:
            (row,) = [r for r in await redis.xinfo_groups(stream) if r["name"] == group.encode()]
            assert row["pending"] == 0
            assert (
                row["last-delivered-id"] == (await redis.xinfo_stream(stream))["last-generated-id"]
            )
    handled: Counter[int] = Counter()
    both = [handler("index", handled), handler("audit", handled)]
    async with Bus.connect(url) as bus, Worker(bus, both) as worker:
        await worker.drained(60)
    assert handled == Counter(range(count))
    assert await length() == 0


async def _reaches(length: Any, enough: int) -> bool:
    return await length() >= enough


async def test_publishing_again_killed_twice(url: str, redis: Any, tmp_path: Path) -> None:
    count, path = 4_000, tmp_path / "checkpoint"
    await filled(url, count)

    async def length() -> int:
        return sum([await redis.xlen(s) for s in STREAMS])

    for enough in (count + 500, count + 2_000):
        script = Replaying(url, path, to="--publish", rate="3000")
        await eventually(lambda n=enough: _reaches(length, n), f"{enough} in the streams")
        script.kill()
    assert await Replaying(url, path, to="--publish").output() == f"{count}\n"
    async with Bus.connect(url) as bus:
        past = Counter([e.event.n async for e in bus.history("saga")])
    assert past == Counter(list(range(count)) * 2)


@pytest.mark.parametrize("to", ["index", "--publish"])
async def test_answers_are_lost_and_nothing_is_twice(
    url: str, redis: Any, server: Any, to: str
) -> None:
    """Connections break again and again while the server does what it was told."""
    count = 3_000
    await filled(url, count)
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url) as bus:
        witness = Witness(bus)
        losing = True

        async def lose() -> None:
            while losing:
                await proxy.lose_one()
                before = await _there(redis)
                await eventually(lambda n=before: _more(redis, n), "it goes on")

        loser = asyncio.create_task(lose())
        done = await bus.replay("saga", to=bus if to == "--publish" else to, rate=4_000)
        losing = False
        loser.cancel()
        assert proxy.lost > 3
        assert done.replayed == count
        assert witness.of("connection.lost")
    if to == "index":
        inbox = await in_inboxes(redis, "index")
        assert set(inbox.values()) == {1}
        assert len(inbox) == count
    else:
        async with Bus.connect(url) as bus:
            past = Counter([e.event.n async for e in bus.history("saga")])
        assert past == Counter(list(range(count)) * 2)


async def test_a_server_that_is_nearly_full_is_waited_for(
    private_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay never fills the server: publishers still can when it no longer goes on."""
    monkeypatch.setattr(destinations, "CROWDED_LOOK_S", 0.02)
    server = private_server()
    await filled(server.url, 20_000)
    async with Bus.connect(server.url) as bus, Redis.from_url(server.url) as redis:
        witness = Witness(bus)
        used = (await redis.info("memory"))["used_memory"]
        ask(server, "CONFIG", "SET", "maxmemory", str(int(used * 1.25)))
        replaying = asyncio.create_task(bus.replay("saga", to="index", rate=20_000))
        await eventually(lambda: witness.of("replay.waits"))
        memory = await redis.info("memory")
        assert memory["used_memory"] < 0.97 * memory["maxmemory"]
        assert len(await in_inboxes(redis, "index")) < 20_000
        await bus.publish(Verse(skald="late", n=1))
        assert witness.of("replay.retried") == []
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        assert (await replaying).replayed == 20_000
        assert set((await in_inboxes(redis, "index")).values()) == {1}


async def test_a_server_that_takes_no_writes_is_told_in_the_end(
    private_server: PrivateServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destinations, "REPLAY_PATIENCE_S", 0.5)
    server, path = private_server(), tmp_path / "checkpoint"
    await filled(server.url, 2_000)
    async with Bus.connect(server.url) as bus, Redis.from_url(server.url) as redis:
        witness = Witness(bus)
        ask(server, "REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(ServerRefused, match=r"READONLY.*check that the URL") as refused:
            await bus.replay("saga", to="index", checkpoint=path)
        assert refused.value.code == "READONLY"
        assert witness.of("replay.retried")
        assert len(witness.of("replay.failed")) == 1
        ask(server, "REPLICAOF", "NO", "ONE")
        done = await bus.replay("saga", to="index", checkpoint=path)
        assert (done.resumed, done.replayed) == (True, 2_000)
        assert set((await in_inboxes(redis, "index")).values()) == {1}


async def test_a_server_that_restarts_is_waited_for(
    private_server: PrivateServer, tmp_path: Path
) -> None:
    server = private_server(aof=True)
    await filled(server.url, 3_000)
    async with Bus.connect(server.url) as bus, Redis.from_url(server.url) as redis:
        witness = Witness(bus)
        replaying = asyncio.create_task(bus.replay("saga", to="index", rate=2_000))
        await eventually(lambda: _some(redis))
        await asyncio.to_thread(server.kill)
        await eventually(lambda: witness.of("replay.retried") or witness.of("connection.lost"))
        await asyncio.to_thread(server.restart)
        assert (await replaying).replayed == 3_000
    async with Redis.from_url(server.url) as redis:
        inbox = await in_inboxes(redis, "index")
        assert (len(inbox), set(inbox.values())) == (3_000, {1})


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("to", ["index", "--publish"])
async def test_a_server_that_goes_back_in_mid_run_is_followed(
    private_server: PrivateServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    checkpoint: bool,
) -> None:
    """It crashes back to a snapshot, and the program that replays is alive and knows better."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    count, server = 3_000, private_server(extra_args=("--dbfilename", "dump.rdb"))
    await filled(server.url, count)
    steps: list[int] = []

    async def hurt(progress: Progress) -> None:
        if not steps and progress.replayed >= 500:
            ask(server, "SAVE")
            steps.append(progress.replayed)
        elif len(steps) == 1 and progress.replayed >= 1_500:
            steps.append(progress.replayed)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)

    async with Bus.connect(server.url) as bus:
        witness = Witness(bus)
        done = await bus.replay(
            "saga",
            to=bus if to == "--publish" else to,
            rate=10_000,
            checkpoint=tmp_path / "checkpoint" if checkpoint else None,
            progress=hurt,
        )
        assert len(steps) == 2
        assert done.replayed == count
        assert len(witness.of("replay.rewound", run=done.run, topic="saga")) == 1
    await each_once(server.url, to, count)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("to", ["index", "--publish"])
async def test_a_server_that_forgets_in_mid_run_ends_it(
    valkey_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    checkpoint: bool,
) -> None:
    """Evicted, or another server behind the same name: what there is of the run nobody knows."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    await filled(valkey_url, 2_000)
    forgot = 0
    async with Bus.connect(valkey_url) as bus, Redis.from_url(valkey_url) as redis:

        async def forget(progress: Progress) -> None:
            nonlocal forgot
            if not forgot and progress.replayed >= 500:
                forgot = await redis.delete(*[k async for k in redis.scan_iter("*:replay:*")])

        with pytest.raises(CheckpointError, match=r"no longer remembers the run replay-"):
            await bus.replay(
                "saga",
                to=bus if to == "--publish" else to,
                rate=10_000,
                checkpoint=tmp_path / "checkpoint" if checkpoint else None,
                progress=forget,
            )
        assert forgot
        if to == "index":
            inbox = await in_inboxes(redis, "index")
            assert set(inbox.values()) == {1}
            assert len(inbox) < 2_000


@pytest.mark.parametrize("to", ["index", "--publish"])
async def test_two_processes_begin_at_once_with_one_new_file(
    valkey_url: str, tmp_path: Path, to: str
) -> None:
    await filled(valkey_url, 3_000)
    both = [Replaying(valkey_url, tmp_path / "checkpoint", to=to, rate="6000") for _ in range(2)]
    try:
        assert [await script.output() for script in both] == ["3000\n", "3000\n"]
    finally:
        for script in both:
            script.end()
    await each_once(valkey_url, to, 3_000)
    assert os.listdir(tmp_path) == ["checkpoint"]  # noqa: PTH208 - a folder of its own


async def test_a_function_killed_is_given_the_last_moment_again_and_no_more(
    valkey_url: str, tmp_path: Path
) -> None:
    """Nobody remembers for it but the file, which is written at the clock."""
    await filled(valkey_url, 2_000)
    path, called = tmp_path / "checkpoint", tmp_path / "called"

    def lines() -> list[int]:
        return [int(n) for n in called.read_text().split()] if called.exists() else []

    script = Replaying(valkey_url, path, to=f"--write={called}", rate="400")
    await eventually(lambda: len(lines()) >= 600)  # three times the file was written, at 0.5 s
    script.kill()
    before = lines()
    assert await Replaying(valkey_url, path, to=f"--write={called}").output() == "2000\n"
    after = lines()[len(before) :]
    assert sorted(set(before + after)) == list(range(2_000))
    again = set(before) & set(after)
    assert len(again) <= 400  # a second of them, were the machine as slow as that
    assert again == set(before[len(before) - len(again) :])


# --- outages


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are tried for 0.4 s, a replay for 3 s; a reply that takes 0.2 s is given up."""
    monkeypatch.setattr(patience.patiently, "__defaults__", (0.4, None))
    monkeypatch.setitem(event_store.merged.__kwdefaults__, "patience_s", 0.4)
    monkeypatch.setattr(replay, "REPLAY_PATIENCE_S", 3.0)
    monkeypatch.setattr(destinations, "REPLAY_PATIENCE_S", 3.0)
    monkeypatch.setattr(Connection.submit, "__defaults__", (1, 0.2))
    monkeypatch.setitem(Connection.call.__kwdefaults__, "timeout_s", 0.2)
    monkeypatch.setattr(Script.run, "__defaults__", (0.2,))


async def hang(server: EmbeddedServer, for_s: float) -> None:
    """Have the server answer nothing for so long; what was asked it answers afterwards."""
    server.pause()
    try:
        await asyncio.sleep(for_s)
    finally:
        server.resume()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("to", ["index", "function"])
async def test_a_replay_outlasts_what_a_look_does_not(
    private_server: PrivateServer, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """A failover of several seconds, made short: the replay's patience is the longer one."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    server = private_server()
    await filled(server.url, 4_000)
    called: list[int] = []
    hanging: list[asyncio.Task[None]] = []

    def hurt(progress: Progress) -> None:
        if not hanging and progress.replayed >= 1_000:
            server.pause()  # at once: what is asked from now on waits
            hanging.append(asyncio.create_task(hang(server, 1.5)))

    async with Bus.connect(server.url) as bus:
        witness = Witness(bus)
        done = await bus.replay(
            "saga",
            to=(lambda event: called.append(event.n)) if to == "function" else to,
            progress=hurt,
        )
        await hanging[0]
        assert done.replayed == 4_000
        assert witness.of("connection.lost")
    if to == "index":
        await each_once(server.url, to, 4_000)
    else:
        assert Counter(called) == Counter(range(4_000))


@pytest.mark.usefixtures("quick")
async def test_history_asks_again(private_server: PrivateServer) -> None:
    server = private_server()
    await filled(server.url, 4_000)
    seen: list[int] = []
    async with Bus.connect(server.url) as bus:
        async for envelope in bus.history("saga"):
            seen.append(envelope.event.n)
            if len(seen) == 10:
                server.pause()
                hanging = asyncio.create_task(hang(server, 0.3))
        await hanging
    assert Counter(seen) == Counter(range(4_000))


@pytest.mark.usefixtures("quick")
async def test_a_server_that_hangs_is_unreachable_in_the_end(
    private_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "REPLAY_PATIENCE_S", 0.5)
    monkeypatch.setattr(destinations, "REPLAY_PATIENCE_S", 0.5)
    server = private_server()
    await filled(server.url, 4_000)

    def stop(progress: Progress) -> None:
        if progress.read > 1_000:
            server.pause()

    async with Bus.connect(server.url) as bus:
        for to in ("index", lambda event: None):
            monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
            with pytest.raises(ServerUnreachable, match=r"no answer within 0\.2 s") as ended:
                await bus.replay("saga", to=to, progress=stop)
            assert isinstance(ended.value, ServerError)
            server.resume()
        async with aclosing(bus.history("saga")) as past:
            await anext(past)
            server.pause()
            with pytest.raises(ServerUnreachable, match=r"no answer within 0\.2 s"):
                async for _ in past:
                    pass
        with pytest.raises(ServerUnreachable):  # also before the first
            await anext(bus.history("saga"))
        server.resume()


# --- published again, and the outcome is not known


@pytest.mark.parametrize("arrives", [True, False])
async def test_what_was_perhaps_published_is_there_once(
    valkey_url: str,
    shared_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    arrives: bool,
) -> None:
    """PublishUnknown: the server did it and the answer is lost; or it was never asked."""
    monkeypatch.setattr(replay, "PROGRESS_S", 0.0)
    count = 1_000
    await filled(valkey_url, count)
    async with (
        RequestProxy(shared_server("valkey-9.1").port) as proxy,
        Bus.connect(proxy.url, publish_timeout_s=0.3) as bus,
    ):
        witness = Witness(bus)
        commit = bus.store.commit
        lost: list[bool] = []

        async def perhaps(*args: Any) -> Any:
            if not lost and await _published(valkey_url) > count + 200:
                if not arrives:
                    lost.append(True)
                    await asyncio.sleep(10)
                lost.append(True)
                await commit(*args)
                await asyncio.sleep(10)
            return await commit(*args)

        monkeypatch.setattr(bus.store, "commit", perhaps)
        done = await bus.replay("saga", to=bus)
        assert lost
        assert done.replayed == count
        assert witness.of("replay.retried", error_type="PublishUnknown")
        assert len(witness.of("replay.rewound")) == 1
    await each_once(valkey_url, "--publish", count)


async def _published(url: str) -> int:
    async with Redis.from_url(url) as redis:
        return sum([await redis.xlen(stream) for stream in STREAMS])


async def _there(redis: Any) -> int:
    return sum([await redis.xlen(f"{s}{more}") for s in STREAMS for more in ("", ":inbox:index")])


async def _more(redis: Any, than: int) -> bool:
    return await _there(redis) > than


async def _some(redis: Any) -> bool:
    return await redis.xlen(f"{STREAMS[0]}:inbox:index") > 0
