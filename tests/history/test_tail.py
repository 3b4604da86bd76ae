"""Following topics: each entry once and in order, from any point on, for any number of tails."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import tracemalloc
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Bus,
    BusClosed,
    DeclarationError,
    Event,
    PermissionDenied,
    Tail,
    Topic,
    Undecodable,
    UnknownTopic,
    WrongKeyType,
)
from bus.config import TAIL_ENTRIES
from bus.history import hub, past
from bus.history import tail as tail_module
from tests.eyes import eyes_of, eyes_on
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from bus import Envelope
    from bus.embedded import EmbeddedServer

pytestmark = pytest.mark.everywhere

TOPIC = Topic("tailed", partitions=4)
ONE = Topic("tailedone")
FIRST = "bus:{tailedone:0}"


class Ran(Event, type="tailed.ran", key="key"):
    n: int
    key: str = ""


class Sat(Event, type="tailed.sat", key="key"):
    n: int
    key: str = ""


class Said(Event, type="tailedone.said"):
    n: int
    text: str = ""


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC, ONE]) as bus:
        yield bus


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url, topics=[TOPIC, ONE]) as bus:
        yield bus


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and look around often, so that a test need not wait for it."""
    monkeypatch.setattr(hub, "BLOCK_MS", 50)
    monkeypatch.setattr(hub, "_LOOK_EVERY_S", 0.05)


@pytest.fixture
def user(server: EmbeddedServer, url: str) -> Iterator[Callable[..., str]]:
    """Return the URL of a user who may do everything but what is said; its name is `limited`."""

    def limited(*rights: str) -> str:
        ask(server, "ACL", "SETUSER", "limited", "on", ">pw", "~bus:*", "&*", "+@all", *rights)
        return url.replace("://", "://limited:pw@")

    yield limited
    ask(server, "ACL", "DELUSER", "limited")


async def some(tail: Tail, count: int, within_s: float = 10.0) -> list[Envelope]:
    """The next `count` envelopes."""
    async with asyncio.timeout(within_s):
        return [await anext(tail) for _ in range(count)]


async def numbers(tail: Tail, count: int, within_s: float = 10.0) -> list[int]:
    return [envelope.event.n for envelope in await some(tail, count, within_s)]  # type: ignore[attr-defined]


async def nothing_comes(tail: Tail, for_s: float = 0.2) -> bool:
    try:
        async with asyncio.timeout(for_s):
            await anext(tail)
    except TimeoutError:
        return True
    return False


async def a_moment() -> None:
    """Wait for the next millisecond."""
    before = time.time()
    await eventually(lambda: time.time() > before + 0.002)


def order(envelope: Envelope) -> tuple[int, ...]:
    return tuple(map(int, envelope.entry_id.split("-")))


def rans(numbers: Iterable[int]) -> list[Ran]:
    return [Ran(n=n, key=f"k{n}") for n in numbers]


def says(numbers: Iterable[int], text: str = "") -> list[Said]:
    return [Said(n=n, text=text) for n in numbers]


def readers(server: EmbeddedServer) -> int:
    """How many connections wait for what is appended to streams."""
    return ask(server, "CLIENT", "LIST").count(b"cmd=xread ")


def blocked(server: EmbeddedServer) -> bool:
    """Whether a read waits by now for what is appended."""
    rows = ask(server, "CLIENT", "LIST").splitlines()
    return any(b"cmd=xread " in row and b" flags=b" in row for row in rows)


def calls(server: EmbeddedServer, command: str) -> int:
    for line in ask(server, "INFO", "commandstats").decode().splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            return int(line.partition("calls=")[2].partition(",")[0])
    return 0


async def with_ids(url: str, stream: str, *ids: str) -> None:
    """Append entries with these ids by hand; their numbers count from 0."""
    async with eyes_on(url) as redis:
        for n, entry_id in enumerate(ids):
            fields: dict[Any, Any] = {"id": f"i{n}", "type": "tailed.ran", "data": f'{{"n":{n}}}'}
            await redis.xadd(stream, fields, id=entry_id)


# --- where it begins


async def test_from_now_on_means_from_when_it_is_ready(bus: Bus) -> None:
    await bus.publish_many(rans(range(20)))
    async with bus.tail("tailed") as tail:
        await bus.publish_many(rans(range(20, 40)))
        assert sorted(await numbers(tail, 20)) == list(range(20, 40))
        assert await nothing_comes(tail)


async def test_ready_may_be_asked_again_and_does_not_begin_again(bus: Bus) -> None:
    tail = bus.tail("tailedone")
    await tail.ready()
    await bus.publish(Said(n=1))
    await tail.ready()
    assert await numbers(tail, 1) == [1]


async def test_a_first_wait_makes_it_ready_too(bus: Bus) -> None:
    await bus.publish(Said(n=0))
    tail = bus.tail("tailedone")
    waiting = asyncio.create_task(numbers(tail, 1))
    await eventually(lambda: tail.position)
    await bus.publish(Said(n=1))
    assert await waiting == [1]


async def test_one_task_may_ask_whether_it_is_ready_while_another_waits(bus: Bus) -> None:
    tail = bus.tail("tailedone")
    waiting = asyncio.create_task(numbers(tail, 1))
    for _ in range(2):
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await tail.ready()
    await bus.publish(Said(n=1))
    assert await waiting == [1]


@pytest.mark.parametrize(
    ("after", "ids"),
    [
        ("start", ["1000-0", "2000-0", "2000-1", "3000-0"]),
        ("-", ["1000-0", "2000-0", "2000-1", "3000-0"]),
        (0, ["1000-0", "2000-0", "2000-1", "3000-0"]),
        ("0-0", ["1000-0", "2000-0", "2000-1", "3000-0"]),
        ("1000-0", ["2000-0", "2000-1", "3000-0"]),
        ("2000-0", ["2000-1", "3000-0"]),
        ("02000-00", ["2000-1", "3000-0"]),
        ("1500-7", ["2000-0", "2000-1", "3000-0"]),
        ("2000", ["2000-0", "2000-1", "3000-0"]),
        (2000, ["2000-0", "2000-1", "3000-0"]),
        (2001, ["3000-0"]),
        (datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC), ["2000-0", "2000-1", "3000-0"]),
        ("1970-01-01T00:00:03Z", ["3000-0"]),
        ({FIRST: "2000-0"}, ["2000-1", "3000-0"]),
        ({FIRST: 2000}, ["2000-0", "2000-1", "3000-0"]),
        ("3000-0", []),
        ("@-2h", []),
        (None, []),
        ("end", []),
        ({FIRST: "end"}, []),
    ],
)
async def test_an_id_is_left_out_and_a_time_is_included(bus, url, after, ids) -> None:
    await with_ids(url, FIRST, "1000-0", "2000-0", "2000-1", "3000-0")
    tail = bus.tail("tailedone", after=after)
    await tail.ready()
    last = (await bus.publish(Said(n=9))).entry_id
    assert [e.entry_id for e in await some(tail, len(ids) + 1)] == [*ids, last]
    assert tail.gaps == 0


async def test_a_tail_that_did_not_begin_keeps_the_place_it_was_given(bus: Bus, url: str) -> None:
    """Stopped before its first entry, it must not lose what its predecessor had reached."""
    await with_ids(url, FIRST, "1000-0", "2000-0", "3000-0")
    before = bus.tail("tailedone", after={FIRST: "1000-0"})
    assert before.position == {FIRST: "1000-0"}
    resumed = bus.tail("tailedone", after=before.position)
    assert [e.entry_id for e in await some(resumed, 2)] == ["2000-0", "3000-0"]
    with pytest.raises(DeclarationError, match="empty position, of a tail that had not begun"):
        bus.tail("tailedone", after=bus.tail("tailedone").position)


async def test_every_loss_is_told_not_only_the_first(bus: Bus, watchful: None) -> None:
    async def batch(first: int, last: int, keep: int | None = None) -> None:
        async with eyes_of(bus).pipeline(transaction=True) as pipe:
            for n in range(first, last):
                fields = {"id": f"i{n}", "type": "tailedone.said", "data": f'{{"n":{n}}}'}
                pipe.xadd(FIRST, fields)  # type: ignore[arg-type]
            if keep:
                pipe.xtrim(FIRST, maxlen=keep, approximate=False)
            await pipe.execute()

    tail = bus.tail("tailedone")
    await tail.ready()
    await batch(0, 1)
    assert await numbers(tail, 1) == [0]
    await batch(1, 1_001, keep=5)
    assert await numbers(tail, 5) == list(range(996, 1_001))
    waiting = asyncio.create_task(anext(tail))
    await eventually(lambda: tail.gaps == 1)
    waiting.cancel()
    for first in range(1_001, 6_001, 1_000):
        await batch(first, first + 1_000)
    await eventually(lambda: not tail._pursuit._seat.streams)
    await eyes_of(bus).xtrim(FIRST, maxlen=10, approximate=False)
    # What lies before it is given first, if it was read: what comes last was never there to read.
    seen: list[int] = []
    while not seen or seen[-1] != 6_000:
        seen += await numbers(tail, 1)
    assert seen[-10:] == list(range(5_991, 6_001))
    assert tail.gaps == 2


async def test_an_error_in_between_leaves_nothing_out(bus: Bus, monkeypatch: Any) -> None:
    """What lies between the tail and those who read on is read again, before what comes."""
    other = bus.tail("tailedone")
    await other.ready()
    eating = asyncio.create_task(some(other, 25))
    await bus.publish_many(says(range(10)))
    look, read = past.sound_extents, past.pages
    late = refused = False

    async def look_late(archive: Any, streams: Any) -> Any:
        """More comes between the look at the end and the joining."""
        nonlocal late
        found = await look(archive, streams)
        if not late:
            late = True
            *_, last = await bus.publish_many(says(range(10, 20)))
            await eventually(lambda: other.position == {FIRST: last.entry_id})
        return found

    async def read_refused(archive: Any, wanted: Any) -> Any:
        nonlocal refused
        if late and not refused:
            refused = True
            raise PermissionDenied("for a moment")
        return await read(archive, wanted)

    monkeypatch.setattr(past, "sound_extents", look_late)
    monkeypatch.setattr(past, "pages", read_refused)
    tail = bus.tail("tailedone", after="start")
    seen: list[int] = []

    async def all_that_comes() -> None:
        while True:
            seen.extend(await numbers(tail, 1))

    with pytest.raises(PermissionDenied):
        await all_that_comes()
    await bus.publish_many(says(range(20, 25)))
    seen += await numbers(tail, 25 - len(seen))
    assert seen == list(range(25))
    assert tail.gaps == 0
    await eating


async def test_leaving_what_is_yet_to_be_listed_ends_the_hurry(valkey: Bus) -> None:
    idle = valkey.tail("tailedone", after="start")
    first, second = valkey.tail("tailedone"), valkey.tail("tailed")
    for tail in (idle, first):
        await tail.ready()
    await second.ready()
    await asyncio.gather(second.aclose(), first.aclose())
    await eventually(lambda: valkey._hub._hurrying is None or valkey._hub._hurrying.done())
    await idle.aclose()


async def test_a_time_to_come_is_waited_for(bus: Bus, url: str) -> None:
    tail = bus.tail("tailedone", after="2000-01-01")
    await with_ids(url, FIRST, "1000-0", "2000-0")
    waiting = asyncio.create_task(some(tail, 1))
    await eventually(lambda: tail._pursuit._seat.streams)
    await with_ids(url, FIRST, "3000-0", "946684799999-5", "946684800000-0", "946684800000-1")
    assert [e.entry_id for e in await waiting] == ["946684800000-0"]
    assert (await some(tail, 1))[0].entry_id == "946684800000-1"
    assert tail.gaps == 0


async def test_another_tail_goes_on_exactly_where_one_stood(bus: Bus) -> None:
    await bus.publish_many(rans(range(40)))
    whole = [e.event_id for e in await some(bus.tail("tailed", after="start"), 40)]
    for read in (0, 1, 7, 39, 40):
        tail = bus.tail("tailed", after="start")
        await tail.ready()
        seen = [e.event_id for e in await some(tail, read)]
        kept = json.dumps(tail.position)
        again = bus.tail("tailed", after=json.loads(kept))
        seen += [e.event_id for e in await some(again, 40 - read)]
        assert seen == whole
        assert json.loads(kept).keys() == {f"bus:{{tailed:{p}}}" for p in range(4)}


async def test_a_position_taken_before_anything_came_misses_nothing(bus: Bus) -> None:
    await bus.publish_many(rans(range(10)))
    tail = bus.tail("tailed")
    await tail.ready()
    position = tail.position
    await bus.publish_many(rans(range(10, 20)))
    again = bus.tail("tailed", after=position)
    assert sorted(await numbers(again, 10)) == list(range(10, 20))
    assert await nothing_comes(again)


async def test_what_was_passed_over_is_not_looked_at_again(bus: Bus) -> None:
    receipts = await bus.publish_many(says(range(5)))
    tail = bus.tail("tailedone", after="start", types="tailed.*")
    assert await nothing_comes(tail)
    assert tail.position == {FIRST: receipts[-1].entry_id}


async def test_one_id_for_several_streams_is_after_it_in_each(bus: Bus, url: str) -> None:
    await with_ids(url, "bus:{tailed:0}", "1000-0", "4000-0")
    await with_ids(url, "bus:{tailed:2}", "2000-0", "3000-0")
    await with_ids(url, FIRST, "5000-0")
    ids = [e.entry_id for e in await some(bus.tail(["tailed", "tailedone"], "2000-0"), 3)]
    assert ids == ["3000-0", "4000-0", "5000-0"]


async def test_a_mapping_reads_what_it_does_not_name_as_new(bus: Bus, url: str) -> None:
    """A partition was added since it was taken, a topic is followed for the first time."""
    await with_ids(url, "bus:{tailed:0}", "1000-0", "2000-0")
    await with_ids(url, "bus:{tailed:3}", "1500-0")
    await with_ids(url, FIRST, "1000-0")
    tail = bus.tail(["tailed", "tailedone"], {"bus:{tailed:0}": "1000-0"})
    assert [e.entry_id for e in await some(tail, 2)] == ["1500-0", "2000-0"]
    last = await bus.publish(Said(n=1))
    assert [e.entry_id for e in await some(tail, 1)] == [last.entry_id]


@pytest.mark.parametrize(
    "bad",
    [
        {"after": "yesterday"},
        {"after": -1},
        {"after": True},
        {"after": {"bus:{other:0}": "1-0"}},
        {"after": {"tailed": "1-0"}},
        {"after": {"bus:{tailed:x}": "1-0"}},
        {"after": {"bus:{tailed:00}": "1-0"}},
        {"after": {"bus:{tailed:0}:dead:g": "1-0"}},
        {"after": {7: "1-0"}},
        {"after": {"bus:{tailed:0}": "soon"}},
        {"types": ["a b"]},
        {"key": 7},
        {"where": "n > 3"},
        {"topics": "a b"},
        {"topics": []},
        {"topics": ["tailed", ""]},
        {"topics": [TOPIC]},
        {"topics": TOPIC},
        {"topics": [["tailed"]]},
        {"topics": None},
    ],
    ids=str,
)
async def test_what_is_wrong_is_refused_at_the_call(valkey: Bus, bad: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError):
        valkey.tail(**{"topics": "tailed", **bad})


async def test_a_position_of_more_partitions_is_refused_when_that_is_known(valkey: Bus) -> None:
    tail = valkey.tail("tailed", after={"bus:{tailed:7}": "1-0"})
    with pytest.raises(DeclarationError, match=r"names bus:\{tailed:7\}.* has 4 partitions"):
        await anext(tail)


async def test_a_topic_that_never_was_is_an_error(bus: Bus) -> None:
    with pytest.raises(UnknownTopic, match="did you mean tailed"):
        await anext(bus.tail("taild"))
    with pytest.raises(UnknownTopic):
        await bus.tail(["tailed", "taild"], after="start").ready()


async def test_partitions_come_with_the_first_declaration(url, monkeypatch) -> None:
    monkeypatch.setattr(tail_module, "TOPICS_S", 0.1)
    async with Bus.connect(url) as early, Bus.connect(url, topics=[TOPIC]) as late:
        live, keyed = early.tail("tailed"), early.tail("tailed", key="k3")
        await live.ready()
        await keyed.ready()
        assert len(live.position) == 1
        waiting = asyncio.create_task(numbers(live, 40))
        waiting_too = asyncio.create_task(numbers(keyed, 1))
        await late.publish_many(rans(range(40)))
        assert sorted(await waiting) == list(range(40))
        assert await waiting_too == [3]
        await eventually(lambda: len(live.position) == 4)


# --- what comes


async def test_what_was_and_what_comes_join_without_a_seam(bus: Bus) -> None:
    """1,300 entries are three pages; of each number exactly one comes, in order."""
    await bus.publish_many(says(range(1300)))
    tail = bus.tail("tailedone", after="start")
    seen = await numbers(tail, 1)
    for n in range(1300, 2600):
        await bus.publish(Said(n=n))
        seen += await numbers(tail, 1 if n % 2 else 0)
    seen += await numbers(tail, 2600 - len(seen))
    assert seen == list(range(2600))


async def test_the_past_is_in_the_order_of_ids_over_all_partitions(bus: Bus) -> None:
    for start in range(0, 3000, 100):
        await bus.publish_many(rans(range(start, start + 100)))
    past = await some(bus.tail("tailed", after="start"), 3000)
    assert [order(e) for e in past] == sorted(order(e) for e in past)
    assert {e.event.n for e in past} == set(range(3000))  # type: ignore[attr-defined]


async def test_uneven_partitions_are_in_the_order_of_ids_too(bus: Bus, url: str) -> None:
    """One page of the first partition reaches far beyond many pages of the second."""
    async with eyes_on(url) as redis, redis.pipeline(transaction=False) as pipe:
        fields: dict[Any, Any] = {"id": "i", "type": "tailed.ran", "data": '{"n":1}'}
        for n in range(1, 2001):
            pipe.xadd("bus:{tailed:1}", fields, id=f"{n}-1")
            if n % 500 == 0:
                pipe.xadd("bus:{tailed:0}", fields, id=f"{n}-0")
        await pipe.execute()
    past = await some(bus.tail("tailed", after="start"), 2004)
    assert [order(e) for e in past] == sorted(order(e) for e in past)
    assert len({(e.stream, e.entry_id) for e in past}) == 2004


async def test_what_is_read_together_is_in_the_order_of_ids(bus: Bus) -> None:
    async with bus.tail("tailed") as tail:
        async with eyes_of(bus).pipeline(transaction=True) as pipe:  # read by one XREAD, or by two
            for n in range(1, 41):
                fields: dict[Any, Any] = {"id": "i", "type": "tailed.ran", "data": '{"n":1}'}
                pipe.xadd(f"bus:{{tailed:{n * 7 % 4}}}", fields, id=f"{n}-0")
            await pipe.execute()
        seen = await some(tail, 40)
    for stream in {e.stream for e in seen}:
        mine = [order(e) for e in seen if e.stream == stream]
        assert mine == sorted(mine)
    assert sorted(order(e) for e in seen) == [(n, 0) for n in range(1, 41)]


async def test_types_keys_and_predicates_choose(bus: Bus) -> None:
    chosen = {
        "types": bus.tail("tailed", types=[Sat]),
        "pattern": bus.tail(["tailed", "tailedone"], types=["*.sat", "*.said"]),
        "key": bus.tail("tailed", key="k2"),
        "where": bus.tail("tailed", where=lambda e: e.event.n % 5 == 0),
        "all": bus.tail("tailed", types=Ran, key="k1", where=lambda e: e.event.n > 4),
    }
    for tail in chosen.values():
        await tail.ready()
    for n in range(12):
        await bus.publish((Sat if n % 3 == 0 else Ran)(n=n, key=f"k{n % 4}"))
    await bus.publish(Said(n=99))
    assert sorted(await numbers(chosen["types"], 4)) == [0, 3, 6, 9]
    assert sorted(await numbers(chosen["pattern"], 5)) == [0, 3, 6, 9, 99]
    assert await numbers(chosen["key"], 3) == [2, 6, 10]
    assert sorted(await numbers(chosen["where"], 3)) == [0, 5, 10]
    assert await numbers(chosen["all"], 1) == [5]
    for tail in chosen.values():
        assert await nothing_comes(tail, 0.05)
    assert list(chosen["key"].position) == [chosen["key"]._pursuit._seat.streams[0]]


async def test_what_cannot_be_decoded_comes_too_and_ends_nothing(bus, server) -> None:
    tail = bus.tail("tailedone", after="start")
    await bus.publish(Said(n=1))
    bad = [("hello", "world"), ("id", "i", "type", "tailedone.said", "data", "not JSON")]
    for fields in bad:
        ask(server, "XADD", FIRST, "*", *fields)
    seen = await some(tail, 3)
    for fields in bad:
        ask(server, "XADD", FIRST, "*", *fields)
    await bus.publish(Said(n=2))
    seen += await some(tail, 3)
    assert (seen[0].event.n, seen[5].event.n) == (1, 2)
    for envelope in seen[1:5]:
        with pytest.raises(Undecodable):
            _ = envelope.event


async def test_a_predicate_that_raises_is_heard_and_the_tail_goes_on(valkey: Bus) -> None:
    def choose(envelope: Envelope) -> bool:
        if envelope.event.n == 1:  # type: ignore[attr-defined]
            raise KeyError("oh")
        return True

    tail = valkey.tail("tailedone", after="start", where=choose)
    await valkey.publish_many(says(range(3)))
    assert await numbers(tail, 1) == [0]
    with pytest.raises(KeyError):
        await anext(tail)
    assert await numbers(tail, 1) == [2]


async def test_tails_of_one_stream_see_the_same_envelopes(valkey: Bus) -> None:
    async with valkey.tail("tailedone") as one, valkey.tail("tailedone") as other:
        await valkey.publish(Said(n=1))
        assert (await some(one, 1))[0] is (await some(other, 1))[0]


async def test_events_of_several_topics_are_followed_as_one(bus: Bus) -> None:
    async with bus.tail(("tailed", "tailedone", "tailed")) as tail:
        await bus.publish(Said(n=1))
        await bus.publish(Ran(n=2))
        assert sorted(await numbers(tail, 2)) == [1, 2]
        assert len(tail.position) == 5


# --- one connection


@pytest.mark.servers_only("it counts connections")
async def test_there_is_one_connection_and_only_while_there_are_tails(bus, server) -> None:
    assert readers(server) == 0
    tails = [bus.tail("tailed" if n % 2 else "tailedone") for n in range(10)]
    for t in tails:
        await t.ready()
    await eventually(lambda: readers(server) == 1)
    for t in tails[1:]:
        await t.aclose()
    assert readers(server) == 1
    await tails[0].aclose()
    await eventually(lambda: readers(server) == 0)
    assert bus._hub._followed == {}
    async with bus.tail("tailedone") as again:
        await bus.publish(Said(n=1))
        assert await numbers(again, 1) == [1]


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_thousand_tails_of_a_stream_cost_one_read_a_batch(valkey, shared_server) -> None:
    server = shared_server("valkey-9.1")
    tails = [valkey.tail("tailedone") for _ in range(1000)]
    await asyncio.gather(*(t.ready() for t in tails))
    ask(server, "CONFIG", "RESETSTAT")
    for start in (0, 50):
        waiting = [asyncio.create_task(numbers(t, 50)) for t in tails]
        await valkey.publish_many(says(range(start, start + 50)))
        for seen in await asyncio.gather(*waiting):
            assert seen == list(range(start, start + 50))
    assert calls(server, "xread") <= 6
    assert calls(server, "xrange") <= 1  # what the append script may look at


@pytest.mark.servers_only("it counts what a server was asked")
async def test_a_thousand_streams_are_read_by_one_read(valkey, shared_server) -> None:
    server = shared_server("valkey-9.1")
    names = [f"tailedmany{n}" for n in range(1000)]
    async with eyes_of(valkey).pipeline(transaction=False) as pipe:
        fields: dict[Any, Any] = {"id": "i", "type": "tailed.ran", "data": '{"n":0}'}
        for name in names:
            pipe.xadd(f"bus:{{{name}:0}}", fields)
        await pipe.execute()
    tails = [valkey.tail(name) for name in names]
    await asyncio.gather(*(t.ready() for t in tails))
    await eventually(lambda: readers(server) == 1)
    waiting = [asyncio.create_task(numbers(t, 20, 60)) for t in tails]
    async with eyes_of(valkey).pipeline(transaction=False) as pipe:
        for n in range(20):
            fields["data"] = f'{{"n":{n}}}'
            for name in names:
                pipe.xadd(f"bus:{{{name}:0}}", fields)
        await pipe.execute()
    assert all(seen == list(range(20)) for seen in await asyncio.gather(*waiting))
    assert readers(server) == 1
    for t in tails:
        await t.aclose()
    assert valkey._hub._followed == {}


@pytest.mark.usefixtures("valkey_url")
async def test_a_stream_gets_its_share_of_a_read_and_more_while_others_are_still(valkey) -> None:
    streams = {f"s{n}": hub._Followed(hub.Place()) for n in range(100)}
    meeting = valkey._hub
    meeting._followed = streams
    entry = (b"1-0", [b"id", b"1", b"data", b"x" * 10])
    counts = []
    for _ in range(9):
        counts.append(meeting._count())
        meeting._pace({"s1": [entry] * counts[-1]}, counts[-1])
    assert counts == [5, 10, 20, 40, 80, 160, 320, 500, 500]
    meeting._pace({s: [entry] * 11 for s in streams}, 11)
    assert meeting._count() == 5
    meeting._pace({"s1": [entry] * 5}, 5)
    assert meeting._count() == 10
    meeting._pace({"s1": [entry] * 9}, 10)
    assert meeting._count() == 5
    for _ in range(30):
        meeting._pace({s: [(b"1-0", [b"x" * 100_000])] for s in streams}, 5)
    assert meeting._count() == 1
    meeting._followed = {}


async def test_what_was_read_for_others_is_not_taken_for_new(valkey) -> None:
    """A stream may be left and followed again while it is read."""
    meeting = valkey._hub
    meeting._followed = {"s": hub._Followed(hub.Place(b"5-0"))}
    read = [(f"{n}-0".encode(), [b"id", b"i"]) for n in (4, 5, 6, 10)]
    assert meeting._sift({"s": b"3-0"}, [("s", read)]) == {"s": read[2:]}
    assert meeting._sift({"s": b"5-0"}, [("s", read[2:])]) == {"s": read[2:]}
    assert meeting._sift({"s": b"7-0"}, [("s", read[3:])]) == {}
    assert meeting._sift({"t": b"3-0"}, [("t", read)]) == {}
    meeting._followed = {}


@pytest.mark.servers_only("it looks at what blocks on a server")
async def test_a_new_stream_does_not_wait_for_the_read_that_blocks(
    bus, server, monkeypatch
) -> None:
    monkeypatch.setattr(hub, "BLOCK_MS", 30_000)
    async with bus.tail("tailedone"), asyncio.timeout(5):
        await eventually(lambda: blocked(server))
        for n in range(5):
            async with bus.tail("tailed") as tail:
                await bus.publish(Ran(n=n))
                assert await numbers(tail, 1) == [n]


@pytest.mark.servers_only("it takes an access list")
async def test_where_unblocking_is_forbidden_a_new_stream_waits_for_the_block(
    bus, server, user, monkeypatch
) -> None:
    monkeypatch.setattr(hub, "BLOCK_MS", 300)
    async with Bus.connect(user("-client"), topics=[TOPIC, ONE]) as own, own.tail("tailedone"):
        await eventually(lambda: blocked(server))
        async with own.tail("tailed") as tail:
            await bus.publish(Ran(n=1))
            assert await numbers(tail, 1) == [1]


# --- coming and going


@pytest.mark.servers_only("it counts connections")
async def test_leaving_the_loop_unsubscribes(bus: Bus, server) -> None:
    await bus.publish(Said(n=1))
    async for envelope in bus.tail("tailedone", after="start"):
        assert envelope.event.n == 1  # type: ignore[attr-defined]
        break
    await eventually(lambda: not bus._hub._seats)
    waiting = asyncio.create_task(numbers(bus.tail("tailedone"), 2))
    await eventually(lambda: readers(server) == 1)
    waiting.cancel()
    await asyncio.wait([waiting])
    del waiting
    gc.collect()
    await eventually(lambda: readers(server) == 0)
    assert bus._hub._followed == {}


async def test_a_tail_that_is_dropped_while_it_reads_the_past_leaves_nothing(bus: Bus) -> None:
    await bus.publish_many(says(range(2000)))
    tail = bus.tail("tailedone", after="start")
    await numbers(tail, 700)
    reading = asyncio.create_task(numbers(tail, 1300))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    seat = tail._pursuit._seat
    del tail, reading
    gc.collect()
    await eventually(lambda: not bus._hub._seats)
    assert seat.work is None or seat.work.done() or seat.work.cancelling()


async def test_a_tail_may_be_dropped_in_another_thread(bus: Bus) -> None:
    held = [bus.tail("tailedone")]
    await held[0].ready()
    thread = threading.Thread(target=held.clear)
    thread.start()
    await asyncio.to_thread(thread.join)
    await eventually(lambda: not bus._hub._seats)


async def test_who_waits_gets_the_end_when_a_tail_is_closed(bus: Bus) -> None:
    tail = bus.tail("tailedone")

    async def follow() -> list[int]:
        return [e.event.n async for e in tail]  # type: ignore[attr-defined]

    following = asyncio.create_task(follow())
    await eventually(lambda: tail._pursuit._seat.streams)
    await bus.publish(Said(n=1))
    await eventually(lambda: tail.position[FIRST] != "0-0")
    await tail.aclose()
    assert await following == [1]
    await tail.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(tail)
    with pytest.raises(BusClosed, match="the tail is closed"):
        await tail.ready()


async def test_a_tail_may_be_closed_at_any_point(valkey: Bus) -> None:
    await valkey.publish_many(says(range(40)))
    for turns in range(0, 240, 2):
        tail = valkey.tail("tailedone", after="start")
        following = asyncio.create_task(numbers(tail, 100))
        for _ in range(turns):
            await asyncio.sleep(0)
        await tail.aclose()
        with pytest.raises((StopAsyncIteration, RuntimeError)):  # of a comprehension: the latter
            await following
        assert not valkey._hub._seats
        assert not valkey._hub._followed


async def test_a_tail_that_is_closed_as_it_has_caught_up_does_not_join(valkey: Bus) -> None:
    await valkey.publish_many(says(range(40)))
    tail = valkey.tail("tailedone", after="start")
    await numbers(tail, 40)
    following = asyncio.create_task(numbers(tail, 1))
    while tail._pursuit._seat.work is None or not tail._pursuit._seat.work.done():  # noqa: ASYNC110 - in that very turn
        await asyncio.sleep(0)
    await tail.aclose()
    with pytest.raises((StopAsyncIteration, RuntimeError)):
        await following
    assert not valkey._hub._followed


async def test_a_bus_that_closes_wakes_those_who_wait(url: str) -> None:
    async with Bus.connect(url, topics=[TOPIC, ONE]) as bus:
        await bus.publish_many(says(range(3)))
        live, past, unused = bus.tail("tailed"), bus.tail("tailedone", "start"), bus.tail("tailed")
        waiting = [asyncio.create_task(numbers(live, 1)), asyncio.create_task(numbers(past, 4))]
        await eventually(lambda: live._pursuit._seat.streams and past._pursuit._seat.streams)
    async with asyncio.timeout(1):
        for told in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(told, BusClosed)
        for t in (live, past, unused):
            with pytest.raises(BusClosed):
                await anext(t)
    with pytest.raises(BusClosed):
        await bus.tail("tailed").ready()


async def test_a_cancelled_wait_loses_nothing(bus: Bus) -> None:
    """Waits that end at any point, in the past and in the present."""
    await bus.publish_many(says(range(1500)))
    tail = bus.tail("tailedone", after="start")
    seen: list[int] = []
    ended = 0

    async def publish() -> None:
        for n in range(1500, 2000):
            await bus.publish(Said(n=n))

    publishing = asyncio.create_task(publish())
    while len(seen) < 2000:
        waiting = asyncio.ensure_future(anext(tail))
        for _ in range(ended % 7):
            await asyncio.sleep(0)
        if waiting.done() or not waiting.cancel():
            seen.append((await waiting).event.n)  # type: ignore[attr-defined]
            continue
        ended += 1
        try:
            seen.append((await waiting).event.n)  # type: ignore[attr-defined]
        except asyncio.CancelledError:
            await asyncio.sleep(0.001)
    await publishing
    assert seen == list(range(2000))
    assert ended > 5


async def test_tasks_that_share_a_tail_take_turns(bus: Bus) -> None:
    tail = bus.tail("tailedone", after="start")
    await bus.publish_many(says(range(700)))
    seen: list[int] = []

    async def follow() -> None:
        async for envelope in tail:
            seen.append(envelope.event.n)  # type: ignore[attr-defined]
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(follow()) for _ in range(5)]
    for n in range(700, 800):
        await bus.publish(Said(n=n))
    await eventually(lambda: len(seen) >= 800)
    await tail.aclose()
    await asyncio.gather(*tasks)
    assert sorted(seen) == list(range(800))


# --- slow ones


async def test_a_slow_tail_holds_up_nobody_and_misses_nothing(bus: Bus) -> None:
    async with bus.tail("tailedone") as slow, bus.tail("tailedone") as quick:
        await bus.publish(Said(n=0))
        assert await numbers(slow, 1) == [0]
        assert await numbers(quick, 1) == [0]
        most = 0
        for start in range(1, 6001, 500):
            await bus.publish_many(says(range(start, start + 500)))
            assert await numbers(quick, 500) == list(range(start, start + 500))
            most = max(most, sum(len(b.entries) for b in slow._pursuit._seat.queue))
        assert most <= TAIL_ENTRIES
        assert slow._pursuit._seat.streams == ()
        assert not slow._pursuit._seat.queue
        assert await numbers(slow, 6000) == list(range(1, 6001))
        waiting = asyncio.create_task(numbers(slow, 1))
        await eventually(lambda: slow._pursuit._seat.streams)
        await bus.publish(Said(n=7000))
        assert await waiting == [7000]
        assert (slow.gaps, quick.gaps) == (0, 0)


async def test_a_tail_that_never_keeps_up_still_gets_everything_in_order(valkey, monkeypatch):
    """It loses its seat again and again, in the middle of batches and while it catches up."""
    monkeypatch.setattr("bus.history.seat.TAIL_ENTRIES", 20)
    async with valkey.tail("tailed") as slow:
        seen: dict[str, list[int]] = {}
        parted = 0

        async def publish() -> None:
            for start in range(0, 3000, 30):
                await valkey.publish_many(
                    Ran(n=n, key=f"k{n % 8}") for n in range(start, start + 30)
                )
                await asyncio.sleep(0.002)

        publishing = asyncio.create_task(publish())
        for n in range(3000):
            envelope = (await some(slow, 1))[0]
            seen.setdefault(envelope.key or "", []).append(envelope.event.n)
            if n % 10 == 0:
                await asyncio.sleep(0.004)
            parted += not slow._pursuit._seat.streams
        await publishing
    assert seen == {f"k{k}": list(range(k, 3000, 8)) for k in range(8)}
    assert parted > 100
    assert slow.gaps == 0


async def test_large_events_are_bounded_by_their_size(valkey: Bus) -> None:
    async with valkey.tail("tailedone") as slow, valkey.tail("tailedone") as quick:
        for n in range(40):
            await valkey.publish(Said(n=n, text="x" * 200_000))
            assert await numbers(quick, 1) == [n]
            assert sum(b.size_bytes for b in slow._pursuit._seat.queue) <= 2_500_000
        assert await numbers(slow, 40) == list(range(40))


async def test_memory_stays_flat_over_a_long_past(valkey: Bus) -> None:
    for start in range(0, 20_000, 1000):
        await valkey.publish_many(says(range(start, start + 1000), "x" * 1000))
    tail = valkey.tail("tailedone", after="start")
    await numbers(tail, 2000)
    tracemalloc.start()
    try:
        for _ in range(18_000):
            await anext(tail)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


async def test_a_tail_with_much_to_give_lets_others_live(valkey: Bus) -> None:
    for start in range(0, 10_000, 1000):
        await valkey.publish_many(says(range(start, start + 1000)))
    turns = 0

    async def live() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    living = asyncio.create_task(live())
    await numbers(valkey.tail("tailedone", after="start"), 10_000)
    assert turns >= 20
    async with valkey.tail("tailedone") as full:
        for start in range(0, 2000, 500):
            await valkey.publish_many(says(range(start, start + 500)))
        await eventually(lambda: sum(len(b.entries) for b in full._pursuit._seat.queue) == 2000)
        turns = 0
        await numbers(full, 2000)
        assert turns >= 4
    living.cancel()


# --- what cannot be read


async def test_a_key_of_another_type_ends_its_own_tails_only(bus, server, watchful) -> None:
    async with bus.tail("tailed") as broken, bus.tail("tailedone") as sound:
        await bus.publish(Ran(n=1, key="a"))
        assert await numbers(broken, 1) == [1]
        waiting = asyncio.create_task(some(broken, 1))
        await eventually(lambda: broken._pursuit._seat.streams)
        for stream in broken.position:
            ask(server, "SET", stream, "precious")
        with pytest.raises(WrongKeyType, match=r"bus:\{tailed:"):
            await waiting
        with pytest.raises(WrongKeyType):  # and so for as long as it is
            await some(broken, 1)
        await bus.publish(Said(n=1))
        assert await numbers(sound, 1) == [1]
        for stream in broken.position:
            ask(server, "DEL", stream)
        waiting = asyncio.create_task(numbers(broken, 1))
        await eventually(lambda: broken._pursuit._seat.streams)
        await bus.publish(Ran(n=2, key="a"))
        assert await waiting == [2]


@pytest.mark.servers_only("it takes an access list")
async def test_a_stream_that_is_forbidden_ends_its_own_tails_only(bus, server, user, watchful):
    async with (
        Bus.connect(user(), topics=[TOPIC, ONE]) as own,
        own.tail("tailed") as forbidden,
        own.tail("tailedone") as sound,
    ):
        waiting = asyncio.create_task(some(forbidden, 1))
        await eventually(lambda: blocked(server))
        ask(server, "ACL", "SETUSER", "limited", "resetkeys", "~bus:topics", f"~{FIRST}")
        with pytest.raises(PermissionDenied, match=r"bus:\{tailed:"):
            await waiting
        await bus.publish(Said(n=1))
        assert await numbers(sound, 1) == [1]
        ask(server, "ACL", "SETUSER", "limited", "~bus:*")
        await bus.publish(Ran(n=5))
        assert await numbers(forbidden, 1) == [5]


@pytest.mark.servers_only("it takes an access list")
async def test_reading_that_is_forbidden_altogether_is_told(bus, server, user) -> None:
    async with Bus.connect(user("-xread"), topics=[ONE]) as own:
        await bus.publish(Said(n=1))
        tail = own.tail("tailedone", after="start")
        assert await numbers(tail, 1) == [1]
        for _ in range(2):
            with pytest.raises(PermissionDenied):
                await some(tail, 1)
        ask(server, "ACL", "SETUSER", "limited", "+xread")
        await bus.publish(Said(n=2))
        assert await numbers(tail, 1) == [2]


async def test_a_mistake_of_ours_is_told_to_the_tails_and_not_hidden(valkey, monkeypatch) -> None:
    async with valkey.tail("tailedone") as tail:
        waiting = asyncio.create_task(some(tail, 1))
        await eventually(lambda: tail._pursuit._seat._waiting is not None)
        monkeypatch.setattr(valkey._hub, "_pace", lambda *_: 1 / 0)
        await valkey.publish(Said(n=1))
        with pytest.raises(ZeroDivisionError):
            await waiting
        monkeypatch.undo()
        assert await numbers(tail, 1) == [1]


# --- gaps


async def test_what_was_trimmed_while_a_tail_was_away_is_told(bus, server) -> None:
    receipts = await bus.publish_many(says(range(10)))
    witness = Witness(bus)
    tail = bus.tail("tailedone", after=receipts[2].entry_id)
    ask(server, "XTRIM", FIRST, "MAXLEN", "4")
    assert await numbers(tail, 4) == [6, 7, 8, 9]
    assert tail.gaps == 1
    ids = {"after": receipts[2].entry_id, "first": receipts[6].entry_id}
    assert witness.of("tail.gap") == [{"stream": FIRST, **ids}]


async def test_what_is_trimmed_while_a_tail_catches_up_is_told(bus, server) -> None:
    await bus.publish_many(says(range(3000)))
    tail = bus.tail("tailedone", after="start")
    seen = await numbers(tail, 100)
    ask(server, "XTRIM", FIRST, "MAXLEN", "500")
    seen += await numbers(tail, 1)
    while seen[-1] < 2999:
        seen += await numbers(tail, 1)
    assert tail.gaps == 1
    assert seen[-500:] == list(range(2500, 3000))
    assert seen == sorted(set(seen))


async def test_what_is_trimmed_before_a_slow_tail_catches_up_is_told(bus, server) -> None:
    async with bus.tail("tailedone") as slow:
        await bus.publish(Said(n=0))
        assert await numbers(slow, 1) == [0]
        for start in range(1, 5001, 1000):
            await bus.publish_many(says(range(start, start + 1000)))
        await eventually(lambda: slow._pursuit._seat.streams == ())
        ask(server, "XTRIM", FIRST, "MAXLEN", "10")
        assert await numbers(slow, 10) == list(range(4991, 5001))
        assert slow.gaps == 1


@pytest.mark.parametrize("kept", [5, 700])
async def test_what_is_trimmed_in_the_very_step_that_appends_it_is_told(
    bus, kept, monkeypatch
) -> None:
    """The read that waits gets only what is left, and nothing says that there was more."""
    monkeypatch.setattr(hub, "BLOCK_MS", 30_000)  # it is told without waiting for more
    witness = Witness(bus)
    async with bus.tail("tailedone") as tail, bus.tail("tailedone") as other:
        await bus.publish(Said(n=0))
        assert await numbers(tail, 1) == [0]
        async with eyes_of(bus).pipeline(transaction=True) as pipe:
            for n in range(1, 1001):
                fields: dict[Any, Any] = {
                    "id": "i",
                    "type": "tailedone.said",
                    "data": f'{{"n":{n}}}',
                }
                pipe.xadd(FIRST, fields)
            pipe.xtrim(FIRST, maxlen=kept, approximate=False)
            await pipe.execute()
        assert await numbers(tail, kept) == list(range(1001 - kept, 1001))
        waiting = asyncio.create_task(some(tail, 1))
        await eventually(lambda: tail.gaps == 1)
        await bus.publish(Said(n=2000))
        await waiting
        assert await numbers(other, kept + 2) == [0, *range(1001 - kept, 1001), 2000]
        assert other.gaps == 1
    assert len(witness.of("tail.gap")) == 1


async def test_trimming_that_takes_only_what_was_read_is_no_gap(bus, server, watchful) -> None:
    async with bus.tail("tailedone") as tail:
        for n in range(30):
            await bus.publish(Said(n=n))
            assert await numbers(tail, 1) == [n]
            if n % 3 == 0:
                ask(server, "XTRIM", FIRST, "MAXLEN", "2")
        # What lies idle may be trimmed altogether, as by retention.
        waiting = asyncio.create_task(numbers(tail, 1))
        await eventually(lambda: not bus._hub._proofs.streams)
        ask(server, "XTRIM", FIRST, "MAXLEN", "0")
        await eventually(lambda: not bus._hub._followed[FIRST].place.met)
        await bus.publish(Said(n=30))
        assert await waiting == [30]
        assert await nothing_comes(tail)
        assert tail.gaps == 0


@pytest.mark.servers_only("it looks at what blocks on a server")
async def test_a_stream_that_is_emptied_as_soon_as_it_was_read_goes_on(bus, server) -> None:
    async with bus.tail("tailedone") as tail:
        await bus.publish(Said(n=0))
        assert await numbers(tail, 1) == [0]
        fields: dict[Any, Any] = {"id": "i", "type": "tailedone.said"}
        for n in range(1, 20):
            await eventually(lambda: blocked(server))
            async with eyes_of(bus).pipeline(transaction=False) as pipe:
                pipe.xadd(FIRST, {**fields, "data": f'{{"n":{n}}}'})
                pipe.xtrim(FIRST, maxlen=0)
                await pipe.execute()
            assert await numbers(tail, 1) == [n]


@pytest.mark.servers_only("it asks a server about itself")
async def test_one_id_for_several_streams_is_no_gap_in_those_it_is_not_of(bus, server) -> None:
    receipts = [await bus.publish(Ran(n=n, key="a")) for n in range(3)]
    await a_moment()  # entries of one ms in other streams may have lower ids
    await bus.publish_many(rans(range(100, 140)))
    tail = bus.tail("tailed", after=receipts[1].entry_id)
    assert set(await numbers(tail, 41)) == {2, *range(100, 140)}
    # 6.2 does not say whether anything was ever trimmed: there the others may have had older ones.
    assert tail.gaps <= (3 if b"redis_version:6.2" in ask(server, "INFO", "server") else 0)


async def test_single_entries_that_are_deleted_are_no_gap(bus, server) -> None:
    receipts = await bus.publish_many(says(range(10)))
    ask(server, "XDEL", FIRST, receipts[4].entry_id, receipts[5].entry_id)
    tail = bus.tail("tailedone", after=receipts[4].entry_id)
    assert await numbers(tail, 4) == [6, 7, 8, 9]
    assert tail.gaps == 0


async def test_a_stream_that_is_deleted_goes_on_with_what_comes(bus, server) -> None:
    async with bus.tail("tailedone") as tail:
        await bus.publish_many(says(range(3)))
        assert await numbers(tail, 3) == [0, 1, 2]
        ask(server, "FLUSHALL")
        await a_moment()  # ids are times: so that later ones are higher
        await bus.publish_many(says(range(10, 13)))
        assert await numbers(tail, 3) == [10, 11, 12]


async def test_a_stream_that_was_gone_and_has_lower_ids_is_read_from_its_beginning(
    bus, server, url, watchful
) -> None:
    witness = Witness(bus)
    async with bus.tail("tailedone") as tail, bus.tail("tailedone") as late:
        await bus.publish_many(says(range(3)))
        assert await numbers(tail, 3) == [0, 1, 2]
        ask(server, "DEL", FIRST)
        await eventually(lambda: bus._hub._followed[FIRST].place.gone)
        await with_ids(url, FIRST, "5-0", "6-0")
        assert [e.entry_id for e in await some(tail, 2)] == ["5-0", "6-0"]
        await with_ids(url, FIRST, "7-0")
        assert [e.entry_id for e in await some(tail, 1)] == ["7-0"]
        assert tail.position == {FIRST: "7-0"}
        seen = [e.entry_id for e in await some(late, 6)]
        assert seen[3:] == ["5-0", "6-0", "7-0"]
        assert (tail.gaps, late.gaps) == (1, 1)
    assert len(witness.of("tail.gap")) == 1


async def test_a_tail_that_resumes_where_there_is_nothing_takes_what_comes(
    bus, server, url, watchful
) -> None:
    async with bus.tail("tailedone") as tail:
        await bus.publish_many(says(range(3)))
        await numbers(tail, 3)
        position = tail.position
    ask(server, "DEL", FIRST)
    tail, other = bus.tail("tailedone", after=position), bus.tail("tailedone")
    waiting = [asyncio.create_task(some(t, 2)) for t in (tail, other)]
    await eventually(lambda: tail._pursuit._seat.streams and other._pursuit._seat.streams)
    assert tail.position == position
    await with_ids(url, FIRST, "5-0", "6-0")
    for seen in await asyncio.gather(*waiting):
        assert [e.entry_id for e in seen] == ["5-0", "6-0"]
    assert (tail.gaps, other.gaps) == (1, 0)


async def test_a_stream_that_lost_its_end_brings_nothing_twice(bus, server, watchful) -> None:
    """As after a restart with older data."""
    async with bus.tail("tailedone") as tail:
        await bus.publish_many(says(range(3)))
        older = await eyes_of(bus).dump(FIRST)
        assert await numbers(tail, 3) == [0, 1, 2]
        last = (await bus.publish(Said(n=3))).entry_id
        assert await numbers(tail, 1) == [3]
        assert older is not None
        await eyes_of(bus).restore(FIRST, 0, older, replace=True)
        waiting = asyncio.create_task(some(tail, 1))
        await eventually(lambda: tail.gaps == 1)
        ask(server, "XADD", FIRST, last, "id", "i", "type", "tailedone.said", "data", '{"n":4}')
        assert [e.event.n for e in await waiting] == [4]  # type: ignore[attr-defined]
        away = bus.tail("tailedone", after=f"{2**50}-0")
        waiting = asyncio.create_task(some(away, 1))
        await eventually(lambda: away.gaps == 1)
        await bus.publish(Said(n=5))
        assert [e.event.n for e in await waiting] == [5]  # type: ignore[attr-defined]
