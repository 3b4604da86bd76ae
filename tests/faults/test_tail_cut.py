"""Tails whose connections drop and whose servers die: nothing is missing, nothing comes twice."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import pytest

from bus import Bus, Event, Receipt, Tail, Topic
from bus.history import hub
from bus.streams import follower
from tests.faults.test_lost_replies import port_of
from tests.proxy import listening
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from bus.envelope import Envelope

TOPIC = Topic("cuttail", partitions=3)
OTHER = Topic("cuttailother")


class Sent(Event, type="cuttail.sent", key="key"):
    n: int
    key: str = ""
    text: str = ""


class Heard(Event, type="cuttail.heard", key="key"):
    n: int
    key: str = ""
    text: str = ""


class Aside(Event, type="cuttailother.aside"):
    n: int
    text: str = ""


class Cutter:
    """Passes bytes on, and ends each connection in the middle of them, sooner or later."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._chance = random.Random(seed)
        self._listening = listening(self._serve)
        self.url = ""
        self.cutting = False
        self.cut = 0

    async def __aenter__(self) -> Self:
        self.url = await self._listening.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._listening.__aexit__(kind, error, trace)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(client, to_server, 3_000))
                both.create_task(self._pass(server, to_client, 30_000))
        except* (EOFError, OSError):
            pass
        finally:
            to_server.close()
            with suppress(OSError):
                await to_server.wait_closed()

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, most: int
    ) -> None:
        left = self._chance.randrange(most)
        while data := await source.read(4096):
            if self.cutting and len(data) > left:
                target.write(data[:left])
                await target.drain()
                self.cut += 1
                raise EOFError
            left -= len(data)
            target.write(data)
            await target.drain()
        raise EOFError


def order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


class Follower:
    """One tail, what it has seen, and what it should have seen."""

    def __init__(self, tail: Tail, wanted: Callable[[Event], bool], pause_s: float = 0.0) -> None:
        self.tail = tail
        self.wanted = wanted
        self.pause_s = pause_s
        self.start: dict[str, str] = {}
        self.seen: list[tuple[str, str, int]] = []

    async def follow(self) -> None:
        await self.tail.ready()
        self.start = self.tail.position
        async for envelope in self.tail:
            self.seen.append((envelope.stream, envelope.entry_id, envelope.event.n))  # type: ignore[attr-defined]
            if self.pause_s and len(self.seen) % 20 == 0:
                await asyncio.sleep(self.pause_s)

    def missing(self, published: list[tuple[Event, Receipt]]) -> int:
        return len(self.due(published)) - len(self.seen)

    def due(self, published: list[tuple[Event, Receipt]]) -> list[tuple[str, str, int]]:
        return [
            (r.stream, r.entry_id, e.n)  # type: ignore[attr-defined]
            for e, r in published
            if self.wanted(e)
            and r.stream in self.start
            and order(r.entry_id) > order(self.start[r.stream])
        ]

    def check(self, published: list[tuple[Event, Receipt]]) -> None:
        due = self.due(published)
        for stream in self.start:
            seen = [s for s in self.seen if s[0] == stream]
            assert seen == sorted((d for d in due if d[0] == stream), key=lambda d: order(d[1]))


async def publish(bus: Bus, seed: int, count: int, published: list[tuple[Event, Receipt]]) -> None:
    """Publish numbered events, in bursts and one by one; the same for the same seed."""
    chance = random.Random(seed)
    n = 0
    while n < count:
        burst: list[Event] = []
        for _ in range(chance.choice((1, 1, 1, 3, 30, 90))):
            kind = chance.choice((Sent, Sent, Heard))
            text = "x" * chance.choice((0, 0, 100, 3_000))
            if chance.random() < 0.2:
                burst.append(Aside(n=n, text=text))
            else:
                burst.append(kind(n=n, key=f"k{chance.randrange(9)}", text=text))
            n += 1
        receipts = await bus.publish_many(burst)
        published += zip(burst, receipts, strict=True)
        await asyncio.sleep(chance.random() * 0.02)


def cast(bus: Bus) -> list[Follower]:
    """Twelve that begin at once: quick and slow, choosy and not."""
    main = lambda e: not isinstance(e, Aside)  # noqa: E731 - said three times
    return [
        Follower(bus.tail("cuttail"), main),
        Follower(bus.tail("cuttail"), main, 0.03),
        Follower(bus.tail("cuttail", after="start"), main),
        Follower(bus.tail("cuttail", types=[Heard]), lambda e: isinstance(e, Heard)),
        Follower(bus.tail("cuttail", key="k1"), lambda e: getattr(e, "key", "") == "k1"),
        Follower(bus.tail("cuttail", key="k2"), lambda e: getattr(e, "key", "") == "k2", 0.05),
        Follower(
            bus.tail("cuttail", where=lambda e: e.event.n % 7 == 0),  # type: ignore[attr-defined]
            lambda e: main(e) and e.n % 7 == 0,  # type: ignore[attr-defined]
        ),
        Follower(bus.tail("cuttailother"), lambda e: isinstance(e, Aside)),
        Follower(bus.tail("cuttailother"), lambda e: isinstance(e, Aside), 0.1),
        Follower(bus.tail(["cuttail", "cuttailother"]), lambda _: True),
        Follower(bus.tail(["cuttail", "cuttailother"], "start"), lambda _: True, 0.04),
        Follower(bus.tail(["cuttailother", "cuttail"], types="*.aside"), lambda e: not main(e)),
    ]


@pytest.mark.parametrize("seed", [1])
async def test_connections_that_are_cut_anywhere_lose_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("bus.history.seat.TAIL_ENTRIES", 60)  # slow ones lose their seats
    published: list[tuple[Event, Receipt]] = []
    async with (
        Cutter(port_of(url), seed) as cutter,
        Bus.connect(url, topics=[TOPIC, OTHER]) as out,
        Bus.connect(cutter.url, topics=[TOPIC, OTHER]) as bus,
    ):
        witness, cutter.cutting = Witness(bus), True
        followers = cast(bus)
        following = [asyncio.create_task(f.follow()) for f in followers]
        await eventually(lambda: all(f.start for f in followers))
        publishing = asyncio.create_task(publish(out, seed, 1600, published))
        for part in range(1, 9):  # eight that come later: from then on, and from where others are
            await eventually(lambda p=part: len(published) > p * 150 or publishing.done())
            old = followers[part]
            after: Any = None if part % 2 else json_of(old.tail)
            late = Follower(bus.tail(old.tail._names, after, **choice(old.tail)), old.wanted)
            followers.append(late)
            following.append(asyncio.create_task(late.follow()))
        await publishing
        assert cutter.cut > 20
        cutter.cutting = False
        await eventually(lambda: all(f.start and f.missing(published) <= 0 for f in followers))
        last = [
            Sent(n=10_000, key="k1"),
            Sent(n=10_001, key="k2"),
            Aside(n=10_003),
            Heard(n=10_010),
        ]
        published += zip(last, await out.publish_many(last), strict=True)
        await eventually(lambda: all(f.missing(published) <= 0 for f in followers))
        assert not [t for t in following if t.done()]
        for f in followers:
            f.check(published)
            assert f.tail.gaps == 0
        assert len(followers) == 20
        assert witness.of("tail.failed")
        assert witness.of("connection.lost", role="tails")
        assert witness.of("connection.restored", role="tails")
        await end(following)


def choice(tail: Tail) -> dict[str, Any]:
    """What the tail was told to look for."""
    selection = tail._selection
    return {"types": selection.patterns, "key": selection.key, "where": selection.where}


def json_of(tail: Tail) -> dict[str, str]:
    return dict(tail.position)


async def end(following: list[asyncio.Task[None]]) -> None:
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)


async def test_a_server_that_is_killed_and_restarted_loses_nothing(
    server_kind: str, private_server
) -> None:
    server = private_server(server_kind, aof=True)
    published: list[tuple[Event, Receipt]] = []
    async with Bus.connect(server.url, topics=[TOPIC, OTHER]) as bus:
        followers = cast(bus)
        following = [asyncio.create_task(f.follow()) for f in followers]
        await eventually(lambda: all(f.start for f in followers))
        for round_ in range(3):
            publishing = asyncio.create_task(publish(bus, round_, 300, published))
            await eventually(lambda r=round_: len(published) > 300 * r + 150)
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(0.1 * round_)
            await asyncio.to_thread(server.restart)
            await publishing
        await eventually(lambda: all(f.missing(published) <= 0 for f in followers))
        kept = [e async for e in bus.history("cuttail")]
        kept += [e async for e in bus.history("cuttailother")]
        assert len(kept) == len(published)
        for f in followers:
            f.check(published)
            assert f.tail.gaps == 0
        assert not [t for t in following if t.done()]
        await end(following)


async def test_a_server_that_is_demoted_for_a_while_is_waited_for(
    server_kind: str, private_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends blocked reads with UNBLOCKED and answers MASTERDOWN, then it leads again."""
    server = private_server(server_kind, extra_args=("--replica-serve-stale-data", "no"))
    published: list[tuple[Event, Receipt]] = []
    async with Bus.connect(server.url, topics=[TOPIC, OTHER]) as bus:
        witness = Witness(bus)
        followers = cast(bus)
        following = [asyncio.create_task(f.follow()) for f in followers]
        await eventually(lambda: all(f.start for f in followers))
        await publish(bus, 1, 200, published)
        ask(server, "REPLICAOF", "127.0.0.1", "1")
        await eventually(lambda: witness.of("tail.failed", error_type="ReplyError"))
        ask(server, "REPLICAOF", "NO", "ONE")
        await publish(bus, 2, 200, published)
        await eventually(lambda: all(f.missing(published) <= 0 for f in followers))
        for f in followers:
            f.check(published)
        assert not [t for t in following if t.done()]
        await end(following)


async def test_a_server_that_hangs_is_given_up_and_found_again(
    private_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BLOCK_MS", 100)
    monkeypatch.setattr(follower, "REPLY_TIMEOUT_S", 0.2)
    server = private_server()
    async with Bus.connect(server.url, topics=[OTHER]) as bus:
        witness = Witness(bus)
        async with bus.tail("cuttailother") as tail:
            await bus.publish(Aside(n=1))
            assert (await anext(tail)).event == Aside(n=1)
            waiting: asyncio.Future[Envelope] = asyncio.ensure_future(anext(tail))
            server.pause()
            await eventually(lambda: witness.of("connection.lost", role="tails"))
            server.resume()
            await bus.publish(Aside(n=2))
            assert (await waiting).event == Aside(n=2)
            assert tail.gaps == 0


async def test_a_server_that_is_away_is_asked_again_with_growing_pauses(private_server) -> None:
    server = private_server(aof=True)
    async with Bus.connect(server.url, topics=[OTHER]) as bus:
        witness = Witness(bus)
        async with bus.tail("cuttailother") as live:
            past = bus.tail("cuttailother", after="start")
            await bus.publish_many(Aside(n=n) for n in range(600))
            seen = [(await anext(past)).event for _ in range(100)]
            waiting = asyncio.ensure_future(anext(live))
            assert (await waiting).event == Aside(n=0)
            await asyncio.to_thread(server.kill)
            reading = asyncio.create_task(take(past, 500))
            await eventually(lambda: len(witness.of("tail.failed")) > 4)
            failed = len(witness.of("tail.failed"))
            await asyncio.sleep(2.0)
            assert 1 < len(witness.of("tail.failed")) - failed < 40
            await asyncio.to_thread(server.restart)
            seen += await reading
            assert seen == [Aside(n=n) for n in range(600)]
            assert await take(live, 599) == seen[1:]


async def take(tail: Tail, count: int) -> list[Event]:
    return [(await anext(tail)).event for _ in range(count)]


async def test_a_tail_that_begins_while_the_server_is_away_waits_and_then_says_so(
    private_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = private_server(aof=True)
    async with Bus.connect(server.url, topics=[OTHER]) as bus:
        receipt = await bus.publish(Aside(n=1))
        await asyncio.to_thread(server.kill)
        begun = asyncio.ensure_future(anext(bus.tail("cuttailother", after="start")))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.restart)
        assert (await begun).entry_id == receipt.entry_id
