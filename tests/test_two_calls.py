"""Two calls of one sender on their way: in order and once, whatever becomes of either."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import hiredis
import pytest
from redis.asyncio import Redis

from bus import Bus, Event, PublishRefused, PublishTimeout, PublishUnknown, StreamFull, Topic
from bus.config import FOLLOW_EVENTS
from tests.eyes import eyes_on
from tests.proxy import listening
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

STREAM = "bus:{two:0}"
HELD_S = 0.2
MANY = 100  # callers, of whom each call takes a half


class Done(Event, type="two.done"):
    n: int


class Elsewhere(Event, type="elsewhere.done"):
    n: int


class Toll:
    """A proxy that may do something at each append, the calls in their order.

    plan: what to do at the next ones, then nothing: "pass"; "hold": the answer, until another call
    was dealt with, and if none comes the connection breaks; "lose": it is done, and the connection
    breaks; "refuse": the connection breaks first; "keep": it is on its way; "late": the same, and
    the connection breaks; "deliver": it is done, then what is on its way arrives; or what does
    something first and may say which.
    calls: (sequence, whether it follows) of each, as the server has seen them.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = listening(self._serve)
        self.url = ""
        self.plan: list[str | Callable[[], Any]] = []
        self.elsewhere: list[str | Callable[[], Any]] = []  # the same, of the other stream
        self.calls: list[tuple[int, bool]] = []
        self._late: list[bytes] = []

    async def deliver(self) -> list[bytes]:
        """Let what is on its way arrive, from a client that is gone; return the replies."""
        server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        replies = []
        for command in self._late:
            to_server.write(command)
            replies.append(await _one_reply(server))
        self._late.clear()
        to_server.close()
        return replies

    async def __aenter__(self) -> Self:
        self.url = await self._listening.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._listening.__aexit__(kind, error, traceback)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        commands, held = hiredis.Reader(), b""
        try:
            while data := await asyncio.wait_for(client.read(65_536), HELD_S if held else None):
                commands.feed(data)
                while command := commands.gets():
                    packed = hiredis.pack_command(tuple(command))
                    then = await self._next(command)
                    if then in ("keep", "late"):
                        self._late.append(packed)
                    if then in ("refuse", "late"):
                        return
                    if then == "keep":
                        continue
                    to_server.write(packed)
                    held += await _one_reply(server)
                    if then == "lose":
                        return
                    if then == "deliver":
                        await self.deliver()
                    if then != "hold":
                        to_client.write(held)
                        held = b""
        except TimeoutError:
            pass  # what is held is lost
        finally:
            to_server.close()

    async def _next(self, command: list[bytes]) -> str:
        """Return what to do with a command; do what comes before it."""
        if len(command) < 5 or b":pub:" not in command[4]:
            return "pass"
        plan = self.plan if command[3] == STREAM.encode() else self.elsewhere
        if plan is self.plan:
            self.calls.append((int(command[6]), command[14] == b"1"))
        then = plan.pop(0) if plan else "pass"
        if isinstance(then, str):
            return then
        said = await asyncio.to_thread(then)
        return said if isinstance(said, str) else "pass"


async def _one_reply(server: asyncio.StreamReader) -> bytes:
    """Return the bytes of one reply: the reader says when they are whole."""
    reader, raw = hiredis.Reader(), b""
    while True:
        data = await server.read(65_536)
        if not data:
            raise EOFError
        raw += data
        reader.feed(data)
        if reader.gets() is not False:
            return raw


async def numbers(url: str) -> list[int]:
    async with eyes_on(url) as redis:
        return [json.loads(fields[b"data"])["n"] for _, fields in await redis.xrange(STREAM)]


async def published(bus: Bus, some: Iterable[int] = range(1, MANY + 1)) -> list[Any]:
    """Publish, each by a caller of its own, all at once; return receipts and errors."""
    return await asyncio.gather(*(bus.publish(Done(n=n)) for n in some), return_exceptions=True)


async def begun(bus: Bus, toll: Toll) -> None:
    """Publish the first, so that the server knows the script."""
    await bus.publish(Done(n=0))
    toll.calls.clear()


async def all_are_in(url: str, receipts: list[Any], first: int = 1) -> None:
    """Check that each is in once, in order, and where its receipt says."""
    async with eyes_on(url) as redis:
        rows = await redis.xrange(STREAM)
    found = [(entry_id.decode(), json.loads(fields[b"data"])["n"]) for entry_id, fields in rows]
    assert [n for _, n in found] == list(range(len(found)))
    assert [r.entry_id for r in receipts] == [e for e, _ in found[first : first + len(receipts)]]
    assert len(found) == first + len(receipts)


def break_nothing() -> None:
    pass


# What happens to the first call, and to the second.
FATES: dict[str, list[Any]] = {
    "both answers are lost": ["hold", "lose"],
    "the first never arrives": ["refuse"],
    "the second never arrives": ["pass", "refuse"],
    "the answer to the second is lost": ["pass", "lose"],
    "one answer is lost and the other never arrives": ["hold", "refuse"],
    "both answers are lost, twice": ["hold", "lose", "lose", "lose"],
    "they come together": ["hold", "pass"],
    "nothing": [],
}


@pytest.mark.parametrize("fate", FATES)
async def test_every_event_is_in_once_and_in_order(url, server, fate):
    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await begun(bus, toll)
        toll.plan = list(FATES[fate])
        receipts = await published(bus)
        assert toll.plan == []
    await all_are_in(url, receipts)


async def test_many_callers_have_two_calls_on_their_way_and_few_have_one(url, server):
    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await begun(bus, toll)
        await published(bus)
        assert toll.calls == [(2, False), (3, True)]
        await published(bus, range(MANY + 1, MANY + 2 * FOLLOW_EVENTS))
        assert toll.calls[2:] == [(4, False)]


async def test_a_script_that_was_forgotten_is_sent_again_in_order(url, server):
    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await bus.publish(Done(n=0))
        ask(server, "SCRIPT", "FLUSH")
        receipts = await published(bus)
    await all_are_in(url, receipts)


@pytest.mark.parametrize("then", ["pass", "lose"])
async def test_nothing_overtakes_what_was_refused(url, server, then):
    """The first finds no script; another process loads it before the second is there."""
    async with (
        Redis.from_url(url) as redis,
        Toll(server.port) as toll,
        Bus.connect(toll.url) as bus,
    ):
        await bus.publish(Done(n=0))
        from bus.streams.stream import _append  # noqa: PLC0415 - the text of the script

        await redis.script_flush()
        toll.plan = [break_nothing, lambda: ask(server, "SCRIPT", "LOAD", _append._text), then]
        receipts = await published(bus)
    await all_are_in(url, receipts)


async def test_nothing_overtakes_what_found_no_memory(private_server, server_kind):
    server = private_server(server_kind)
    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await begun(bus, toll)
        toll.plan = [
            lambda: ask(server, "CONFIG", "SET", "maxmemory", "1"),
            lambda: ask(server, "CONFIG", "SET", "maxmemory", "0"),
        ]
        receipts = await published(bus)
        assert toll.calls[:2] == [(2, False), (3, True)]
    await all_are_in(server.url, receipts)


async def test_a_server_that_has_forgotten_the_first_is_given_the_second_anew(url, server):
    async with (
        Redis.from_url(url) as redis,
        Toll(server.port) as toll,
        Bus.connect(toll.url) as bus,
    ):
        await bus.publish(Done(n=0))
        toll.calls.clear()
        (memory,) = [key async for key in redis.scan_iter(match="bus:{two:0}:pub:*")]
        toll.plan = ["pass", lambda: ask(server, "DEL", memory)]
        receipts = await published(bus)
        assert toll.calls[:3] == [(2, False), (3, True), (4, False)]
    await all_are_in(url, receipts)


async def test_a_server_that_restarts_between_them_keeps_what_it_had(private_server, server_kind):
    server = private_server(server_kind, aof=True)
    async with Bus.connect(server.url) as bus:
        await bus.publish(Done(n=0))
        server.pause()
        publishing = asyncio.create_task(published(bus))
        await eventually(lambda: len(bus._publisher._senders[STREAM]._flight) == 2)
        await asyncio.to_thread(server.restart)
        receipts = await publishing
    await all_are_in(server.url, receipts)


async def test_what_was_not_even_sent_yet_is_in_order_too(private_server, server_kind):
    """Other streams' calls were in the way of the second when the connection broke."""
    server = private_server(server_kind, aof=True)
    async with Bus.connect(server.url) as bus:
        await asyncio.gather(bus.publish(Done(n=0)), bus.publish(Elsewhere(n=0)))
        connection = bus._publisher._store._publishing
        server.pause()
        tasks = [asyncio.create_task(bus.publish(Done(n=1)))]
        await eventually(lambda: connection._writes == 1)
        tasks.append(asyncio.create_task(bus.publish(Elsewhere(n=1))))
        await eventually(lambda: connection._writes == 2)
        second = range(2, 2 + FOLLOW_EVENTS)
        tasks += [asyncio.create_task(bus.publish(Done(n=n))) for n in second]
        await eventually(lambda: connection._queue)
        await asyncio.to_thread(server.restart)
        first, _, *others = await asyncio.gather(*tasks)
    await all_are_in(server.url, [first, *others])


async def test_one_that_came_before_its_turn_is_not_in_when_its_callers_were_told_so(url, server):
    """It was not sent yet when the first was lost, and left first on the next connection."""
    queued, told = threading.Event(), threading.Event()
    async with Toll(server.port) as toll, Bus.connect(toll.url, publish_timeout_s=0.6) as bus:
        await asyncio.gather(bus.publish(Done(n=0)), bus.publish(Elsewhere(n=0)))
        connection, sender = bus._publisher._store._publishing, bus._publisher._senders[STREAM]
        toll.plan = ["keep", "pass", lambda: "refuse" if told.wait(10) else "pass"]
        toll.elsewhere = [lambda: "late" if queued.wait(10) else "pass"]
        tasks = [asyncio.create_task(bus.publish(Done(n=1)))]
        await eventually(lambda: connection._writes == 1)
        tasks.append(asyncio.create_task(bus.publish(Elsewhere(n=1))))
        await eventually(lambda: connection._writes == 2)
        second = range(2, 2 + FOLLOW_EVENTS)
        tasks += [asyncio.create_task(bus.publish(Done(n=n))) for n in second]
        await eventually(lambda: connection._queue)
        queued.set()
        first, _, *others = await asyncio.gather(*tasks, return_exceptions=True)
        told.set()
        await eventually(lambda: sender.idle)
        assert toll.plan == []
    assert isinstance(first, PublishUnknown)
    assert {type(o) for o in others} == {PublishTimeout}
    assert await numbers(url) == [0]


async def test_nobody_is_left_in_doubt_where_the_server_refuses_all(private_server, server_kind):
    server = private_server(server_kind)
    async with Bus.connect(server.url, publish_timeout_s=0.3) as bus:
        await bus.publish(Done(n=0))
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        outcomes = await published(bus)
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        assert {type(o) for o in outcomes} <= {PublishRefused, PublishTimeout}
        await bus.publish(Done(n=1))
    assert await numbers(server.url) == [0, 1]


async def test_both_are_unknown_when_a_server_hangs_and_nothing_comes_later(private_server):
    server = private_server()
    async with Bus.connect(server.url, publish_timeout_s=0.4) as bus:
        await bus.publish(Done(n=0))
        server.pause()
        outcomes = await published(bus)
        assert {type(o) for o in outcomes} == {PublishUnknown}
        server.resume()
        await bus.publish(Done(n=MANY + 1))
        found = await numbers(server.url)
    half = MANY // 2
    whole = [[*list(range(n + 1)), MANY + 1] for n in (0, half, MANY)]
    assert found in whole
    assert await numbers(server.url) == found


async def test_leaving_the_block_waits_for_both(url, server):
    async with Toll(server.port) as toll:
        async with Bus.connect(toll.url) as bus:
            await bus.publish(Done(n=0))
            toll.plan = ["hold", "lose"]
            publishing = asyncio.create_task(published(bus))
            await asyncio.sleep(0)
        receipts = await publishing
    await all_are_in(url, receipts)


async def test_callers_who_give_up_on_the_way_leave_the_others_in_order(url, server):
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[Any]] = []

    def give_up_and_lose() -> str:
        for task in tasks[::3]:
            loop.call_soon_threadsafe(task.cancel)
        return "lose"

    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await begun(bus, toll)
        toll.plan = ["hold", give_up_and_lose]
        tasks += [asyncio.create_task(bus.publish(Done(n=n))) for n in range(1, MANY + 1)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    async with eyes_on(url) as redis:
        found = {entry_id.decode(): fields for entry_id, fields in await redis.xrange(STREAM)}
    assert [json.loads(f[b"data"])["n"] for f in found.values()] == list(range(MANY + 1))
    gave_up = [isinstance(o, asyncio.CancelledError) for o in outcomes]
    assert gave_up == [n % 3 == 0 for n in range(MANY)]
    for n, outcome in enumerate(outcomes, 1):
        if (n - 1) % 3:
            assert json.loads(found[outcome.entry_id][b"data"])["n"] == n


# --- what was sent over a connection that broke arrives later


@pytest.mark.parametrize("trouble", ["no memory", "no script"])
async def test_a_second_that_comes_late_is_not_taken_behind_a_first_that_was_refused(
    private_server, server_kind, trouble
):
    server = private_server(server_kind)
    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await begun(bus, toll)

        def ends() -> str:
            ask(server, "CONFIG", "SET", "maxmemory", "0")
            return "late"

        toll.plan = [lambda: ask(server, "CONFIG", "SET", "maxmemory", "1"), ends, "deliver"]
        if trouble == "no script":  # which the first finds twice, by its digest, before its text
            toll.plan = [lambda: ask(server, "SCRIPT", "FLUSH"), "late", "pass", "deliver"]
        receipts = await published(bus)
        assert toll.plan == []
    await all_are_in(server.url, receipts)


@pytest.mark.parametrize("on_full", ["reject", "block"])
async def test_what_found_no_room_is_not_taken_when_it_comes_late(url, server, on_full):
    """Nobody was told that it is in; those who wait for room publish it under another number."""
    topic = Topic("two", maxlen=40, keep=2, on_full=on_full)
    async with (
        Redis.from_url(url) as redis,
        Toll(server.port) as toll,
        Bus.connect(toll.url, topics=[topic]) as bus,
    ):
        await redis.xgroup_create(STREAM, "slow", "0", mkstream=True)
        await asyncio.gather(*(bus.publish(Done(n=n)) for n in range(40)))
        witness = Witness(bus)
        toll.plan = ["keep", "late"]
        publishing = asyncio.create_task(published(bus, range(40, 78)))
        await eventually(lambda: witness.of("publish.full") or publishing.done())
        (_, rows), *_ = await redis.xreadgroup("slow", "me", {STREAM: ">"}, count=1_000)
        if on_full == "reject":
            assert {type(o) for o in await publishing} == {StreamFull}
            await redis.xack(STREAM, "slow", *[entry_id for entry_id, _ in rows])
            await toll.deliver()
        else:
            toll.plan = ["deliver"] * 2
            await redis.xack(STREAM, "slow", *[entry_id for entry_id, _ in rows])
            assert not any(isinstance(o, Exception) for o in await publishing)
        more = await redis.xreadgroup("slow", "me", {STREAM: ">"}, count=1_000)
    found = [json.loads(fields[b"data"])["n"] for _, rows in more for _, fields in rows]
    assert found == ([] if on_full == "reject" else list(range(40, 78)))


async def test_who_is_told_that_nothing_was_published_is_not_in_later(private_server, server_kind):
    """The loop was held up: what it hears next is that a script is missing, and that time is up."""
    server = private_server(server_kind)
    async with Bus.connect(server.url, publish_timeout_s=0.2) as bus:
        await bus.publish(Done(n=0))
        ask(server, "SCRIPT", "FLUSH")
        publishing = asyncio.create_task(published(bus, [1]))
        while not bus._publisher._store._publishing._writes:  # noqa: ASYNC110 - and no longer
            await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251 - as a handler does that computes
        (outcome,) = await publishing
        await eventually(lambda: bus._publisher._senders[STREAM].idle)
    assert isinstance(outcome, PublishTimeout), outcome
    assert await numbers(server.url) == [0]


async def test_closing_leaves_nobody_waiting_while_a_server_says_nothing(private_server):
    """It was refused, and the next connection is taken but never answered, until the very end."""
    server = private_server()
    bus = Bus.connect(server.url, publish_timeout_s=0.5)
    await bus.ready()
    await bus.publish(Done(n=0))
    await asyncio.to_thread(server.kill)
    mute: list[asyncio.StreamWriter] = []
    publishing = asyncio.create_task(published(bus))
    await asyncio.sleep(0)
    closing = asyncio.create_task(bus.close())
    listener = await asyncio.start_server(lambda _, w: mute.append(w), "127.0.0.1", server.port)
    outcomes = await asyncio.wait_for(publishing, 10)
    await closing
    listener.close()
    for writer in mute:
        writer.close()
    assert {type(o) for o in outcomes} <= {PublishUnknown, PublishTimeout}


# --- a stream with a cap


async def test_what_the_first_left_comes_before_the_second(url, server):
    """The first call fits in part; the second is taken back, and all wait in their order."""
    topic = Topic("two", maxlen=40, keep=2)
    async with Redis.from_url(url) as redis, Bus.connect(url, topics=[topic]) as bus:
        await redis.xgroup_create(STREAM, "slow", "0", mkstream=True)
        witness = Witness(bus)
        publishing = asyncio.create_task(published(bus, range(MANY)))
        await eventually(lambda: witness.of("publish.full"))
        seen: list[int] = []
        while len(seen) < MANY:
            for _, rows in await redis.xreadgroup("slow", "me", {STREAM: ">"}, count=9, block=50):
                seen += [json.loads(fields[b"data"])["n"] for _, fields in rows]
                await redis.xack(STREAM, "slow", *[entry_id for entry_id, _ in rows])
        receipts = await publishing
    assert seen == list(range(MANY))
    ids = [tuple(map(int, r.entry_id.split("-"))) for r in receipts]
    assert ids == sorted(ids)


async def test_without_waiting_the_first_go_in_and_the_rest_are_refused(url, server):
    topic = Topic("two", maxlen=40, keep=2, on_full="reject")
    async with Redis.from_url(url) as redis, Bus.connect(url, topics=[topic]) as bus:
        await redis.xgroup_create(STREAM, "slow", "0", mkstream=True)
        outcomes = await published(bus, range(MANY))
    refused = [isinstance(o, StreamFull) for o in outcomes]
    assert refused == [False] * 40 + [True] * 60
    assert await numbers(url) == list(range(40))


async def test_where_the_oldest_go_the_last_are_kept_in_order(url, server):
    topic = Topic("two", maxlen=40, keep=2, on_full="drop_oldest")
    async with Redis.from_url(url) as redis, Bus.connect(url, topics=[topic]) as bus:
        await redis.xgroup_create(STREAM, "slow", "0", mkstream=True)
        outcomes = await published(bus, range(MANY))
    ids = [tuple(map(int, r.entry_id.split("-"))) for r in outcomes]
    assert ids == sorted(set(ids))
    found = await numbers(url)
    assert found == list(range(MANY))[-len(found) :]


# --- anything at any time


@pytest.mark.parametrize("seed", range(4))
async def test_in_a_storm_of_lost_answers_each_caller_keeps_its_order(url, server, seed):
    chance = random.Random(seed)
    fates = ["pass", "pass", "hold", "lose", "refuse", lambda: ask(server, "SCRIPT", "FLUSH")]
    async with Toll(server.port) as toll, Bus.connect(toll.url) as bus:
        await bus.publish(Done(n=0))

        async def caller(base: int) -> list[tuple[int, str]]:
            return [(base + n, (await bus.publish(Done(n=base + n))).entry_id) for n in range(12)]

        toll.plan = [chance.choice(fates) for _ in range(24)] + ["lose"]
        said = await asyncio.gather(*(caller(base) for base in range(1_000, 61_000, 1_000)))
        follows = [follows for _, follows in toll.calls]
        toll.calls.clear()
        await published(bus, range(100_000, 100_000 + MANY))
        assert [follows for _, follows in toll.calls] == [False, True], "all is well again"
    async with eyes_on(url) as redis:
        rows = await redis.xrange(STREAM)
    found = [(json.loads(fields[b"data"])["n"], entry_id.decode()) for entry_id, fields in rows]
    del found[-MANY:]
    assert sorted(pair for caller in said for pair in caller) == sorted(found[1:])
    places = {n: place for place, (n, _) in enumerate(found)}
    for caller in said:
        assert [n for n, _ in caller] == sorted([n for n, _ in caller], key=places.__getitem__)
    assert any(follows)
