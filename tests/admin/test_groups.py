"""Groups made, moved and removed by hand, and what the server then counts of them."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from bus import (
    Backoff,
    Bus,
    DeclarationError,
    Delivery,
    Event,
    InUse,
    Topic,
    UnknownGroup,
    UnknownTopic,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.admin import groups
from bus.history import inspector
from bus.streams import inspection, keys
from bus.worker.pace import Pace
from tests.faults.proxy import Proxy
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

TOPIC = Topic("lane", maxlen=100_000, keep=10_000)
S, OTHER, G = "bus:{lane:0}", "bus:{road:0}", "index"
LAST = 2**64 - 1


class Laid(Event, type="lane.laid"):
    n: int


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.topics.record("lane")
        yield bus


@pytest.fixture
def counts(server_kind: str) -> bool:
    """Whether this kind of server counts what groups have read."""
    return server_kind != "redis-6.2"


async def add(bus: Bus, ids: Iterable[int], stream: str = S) -> None:
    async with bus.redis.pipeline(transaction=False) as pipe:
        for entry_id in ids:
            pipe.xadd(stream, {"n": "1"}, id=f"{entry_id}-0")
        await pipe.execute()


async def row(bus: Bus, name: str = G, stream: str = S) -> dict[str, Any]:
    return (await bus.store.groups_of(stream))[name]


async def place(bus: Bus, name: str = G, stream: str = S) -> str:
    return (await row(bus, name, stream))["last-delivered-id"].decode()


async def is_counted_right(bus: Bus, name: str = G, stream: str = S) -> bool:
    """Whether the server knows how many entries lie before a group."""
    found = await row(bus, name, stream)
    ahead = await bus.redis.xrange(stream, b"(" + found["last-delivered-id"])
    return found.get("lag") == len(ahead)


async def everything(bus: Bus) -> dict[bytes, Any]:
    return {key: await bus.redis.dump(key) for key in await bus.redis.keys("*")}


async def take(bus: Bus, count: int, name: str = G, stream: str = S) -> list[int]:
    reply = await bus.redis.xreadgroup(name, "me", {stream: ">"}, count=count)
    return [int(i.partition(b"-")[0]) for i, _ in reply[0][1]] if reply else []


# --- made


@pytest.mark.parametrize(
    ("at", "first"),
    [
        ("start", 101),
        (None, 101),
        (0, 101),
        (101, 101),
        ("102-0", 102),
        ("102-1", 103),
        (150, 150),
        (datetime.fromtimestamp(0.150, UTC), 150),
        (300, 300),
        (301, None),
        ("end", None),
        ("2999-01-01", None),
        (2**64 - 1, None),
    ],
)
async def test_a_group_is_given_first_what_was_said(
    bus: Bus, counts: bool, at: Any, first: int | None
) -> None:
    """And what comes later, whatever was said."""
    await add(bus, range(1, 301))
    await bus.redis.xtrim(S, maxlen=200, approximate=False)
    witness = Witness(bus)
    made = await bus.admin.create_group(G, "lane", at=at)
    assert (made.group, made.topic, made.streams, made.existed) == (G, "lane", (S,), ())
    assert witness.of("group.created") == [{"stream": S, "group": G}]
    assert await is_counted_right(bus) == counts
    await add(bus, [400])
    assert await is_counted_right(bus) == counts
    assert await take(bus, 1) == [first or 400]
    assert await is_counted_right(bus) == counts
    assert await take(bus, 500) == [*range((first or 400) + 1, 301), *([400] if first else [])]
    assert await is_counted_right(bus) == counts


async def test_it_is_made_on_every_stream_with_its_inbox(url: str, counts: bool) -> None:
    async with Bus.connect(url, topics=[Topic("lane", partitions=3)]) as bus:
        await bus.topics.record("lane")
        await add(bus, range(1, 11))
        streams = [f"bus:{{lane:{n}}}" for n in range(3)]
        await bus.redis.xgroup_create(streams[1], G, "7-0", mkstream=True)
        made = await bus.admin.create_group(G, "lane", at=4)
        assert made.streams == (streams[0], streams[2])
        assert made.existed == (streams[1],)
        assert await place(bus, stream=streams[1]) == "7-0", "it stays as it was"
        for stream in streams:
            assert await place(bus, stream=keys.inbox(stream, G)) == "0-0"
        await add(bus, range(1, 11), streams[2])
        assert await take(bus, 99) == list(range(4, 11))
        assert await take(bus, 99, stream=streams[2]) == list(range(1, 11))
        assert await is_counted_right(bus, stream=streams[2]) == counts


async def test_in_an_empty_stream_every_place_is_its_end(bus: Bus, counts: bool) -> None:
    """Nobody must miss what is published before a time that somebody has mistyped."""
    await bus.admin.create_group("missing", "lane", at="2999-01-01")
    await add(bus, range(1, 11))
    assert await take(bus, 99, "missing") == list(range(1, 11))
    await bus.redis.xtrim(S, 0)
    for name, at in (("start", "start"), ("past", 3), ("end", "end"), ("future", 10**14)):
        await bus.admin.create_group(name, "lane", at=at)
        await add(bus, [100 + await bus.redis.xlen(S)])
        assert await is_counted_right(bus, name) == counts
    assert await take(bus, 99, "start") == [100, 101, 102, 103]
    assert await take(bus, 99, "future") == [103]


async def test_a_worker_goes_on_where_the_group_was_made(bus: Bus) -> None:
    """Its own `start` is of groups that it makes itself."""
    handled: list[int] = []

    @event_handler(Laid, group=G)
    async def handle(event: Laid) -> None:
        handled.append(event.n)

    receipts = [await bus.publish(Laid(n=n)) for n in range(10)]
    await bus.admin.create_group(G, "lane", at=receipts[6].entry_id)
    async with Worker(bus, [handle]) as worker:
        await worker.drained()
    assert handled == [6, 7, 8, 9]


async def test_names_and_topics_that_cannot_be_are_refused(bus: Bus) -> None:
    with pytest.raises(DeclarationError, match="group name 'a b' is not valid"):
        await bus.admin.create_group("a b", "lane")
    with pytest.raises(UnknownTopic, match=r"no topic lame: did you mean lane\?"):
        await bus.admin.create_group(G, "lame")
    with pytest.raises(DeclarationError, match="'soon' is no position"):
        await bus.admin.create_group(G, "lane", at="soon")
    assert await bus.redis.keys("bus:{*") == []


async def test_a_group_whose_making_was_not_answered_counts_as_made(
    url: str, server: EmbeddedServer
) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=[TOPIC]) as bus:
        await bus.topics.record("lane")
        await add(bus, range(1, 11))
        proxy.lose(b"CREATE", 1)
        made = await bus.admin.create_group(G, "lane", at=5)
        assert proxy.lost == 1
        assert (made.streams, made.existed) == ((S,), ())
        assert await take(bus, 1) == [5]


# --- moved


MOVES = [
    ("start", 101),
    ("101-0", 101),
    (160, 160),
    ("160-1", 161),
    (199, 199),
    (200, 200),
    (201, 201),
    (201 + 10, 211),
    (300, 300),
    (301, None),
    ("end", None),
    (10**14, None),
]


@pytest.mark.parametrize(("to", "first"), MOVES)
async def test_a_group_is_given_next_what_was_said(
    bus: Bus, counts: bool, to: Any, first: int | None
) -> None:
    """It has read up to 200, of which two are pending."""
    await add(bus, range(1, 301))
    await bus.redis.xtrim(S, maxlen=200, approximate=False)
    await bus.redis.xgroup_create(S, G, "100-0")
    ids = [f"{n}-0" for n in await take(bus, 100)]
    await bus.redis.xack(S, G, *ids[2:])
    before = await everything(bus)
    said = await bus.admin.seek_group(G, to, dry_run=True)
    assert await everything(bus) == before
    witness = Witness(bus)
    done = await bus.admin.seek_group(G, to)
    assert done == said
    (sought,) = done
    start = first or 301
    assert (sought.stream, sought.group, sought.before) == (S, G, "200-0")
    assert (sought.skipped, sought.again) == (max(0, start - 201), max(0, 201 - start))
    assert (sought.at_least, sought.counted) == (False, counts)
    assert witness.of("group.moved") == [
        {"stream": S, "group": G, "before": "200-0", "after": sought.after}
    ]
    assert (await bus.redis.xpending(S, G))["pending"] == 2, "what is pending stays so"
    assert await is_counted_right(bus) == counts
    await add(bus, [400])
    assert await is_counted_right(bus) == counts
    assert await take(bus, 1) == [first or 400]
    assert await is_counted_right(bus) == counts


async def test_a_group_is_moved_on_every_stream_that_has_it_or_on_those_of_a_topic(
    url: str,
) -> None:
    async with Bus.connect(url, topics=[Topic("lane", partitions=2), Topic("road")]) as bus:
        for topic in ("lane", "road"):
            await bus.topics.record(topic)
        streams = ["bus:{lane:0}", "bus:{lane:1}", OTHER]
        for stream in streams:
            await add(bus, range(1, 11), stream)
        await bus.redis.xgroup_create(streams[1], G, "0")
        await bus.redis.xgroup_create(OTHER, G, "0")
        await bus.redis.xgroup_create(OTHER, "else", "0")
        done = await bus.admin.seek_group(G, 5)
        assert [(s.stream, s.after) for s in done] == [
            (streams[1], f"4-{LAST}"),
            (OTHER, f"4-{LAST}"),
        ]
        assert await place(bus, "else", OTHER) == "0-0"
        (only,) = await bus.admin.seek_group(G, "end", "road")
        assert (only.stream, only.skipped) == (OTHER, 6)
        assert await place(bus, stream=streams[1]) == f"4-{LAST}"
        with pytest.raises(UnknownGroup, match=r"no topic has a group inde: did you mean index\?"):
            await bus.admin.seek_group("inde", "end")
        with pytest.raises(UnknownGroup, match="topic lane has no group else"):
            await bus.admin.seek_group("else", "end", "lane")
        with pytest.raises(UnknownTopic):
            await bus.admin.seek_group(G, "end", "lame")
        with pytest.raises(DeclarationError, match="no position"):
            await bus.admin.seek_group(G, "then")


async def test_more_than_is_counted_is_said_to_be_more(
    bus: Bus, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "COUNTED_MOST", 2_000)
    await add(bus, range(1, 6_001))
    await bus.redis.xgroup_create(S, G, "0")
    (sought,) = await bus.admin.seek_group(G, 3_001)
    assert (sought.skipped, sought.at_least, sought.counted) == (2_000, True, False)
    assert (await row(bus)).get("lag") is None
    for to, skipped in ((5_001, 2_000), (5_501, 500)):
        (sought,) = await bus.admin.seek_group(G, to)
        assert (sought.skipped, sought.at_least, sought.counted) == (skipped, False, counts)
        assert await is_counted_right(bus) == counts
    (sought,) = await bus.admin.seek_group(G, 501)  # counted from the other end
    assert (sought.again, sought.at_least, sought.counted) == (2_000, True, counts)
    assert await is_counted_right(bus) == counts


async def test_where_entries_were_deleted_ahead_the_server_is_told_nothing_wrong(
    bus: Bus, counts: bool
) -> None:
    """It would not believe it. Behind them it is told, and once read to the end it knows anyway."""
    await add(bus, range(1, 301))
    await bus.redis.xdel(S, *(f"{n}-0" for n in range(140, 150)))
    await bus.redis.xgroup_create(S, G, "0")
    (sought,) = await bus.admin.seek_group(G, 100)
    assert (sought.skipped, sought.counted) == (99, False)
    assert (await row(bus)).get("lag") is None
    await take(bus, 500)
    assert await is_counted_right(bus) == counts
    (sought,) = await bus.admin.seek_group(G, 200)
    assert (sought.again, sought.counted) == (101, counts)
    assert await is_counted_right(bus) == counts


# --- as it was said before


@pytest.mark.parametrize("meanwhile", [0, 20, 60])
async def test_forwards_it_goes_as_far_as_was_said_and_never_back(bus: Bus, meanwhile: int) -> None:
    await add(bus, range(1, 101))
    await bus.redis.xgroup_create(S, G, "0")
    await take(bus, 10)
    said = await bus.admin.seek_group(G, 50, dry_run=True)
    assert said[0].skipped == 39
    read = await take(bus, meanwhile) if meanwhile else []
    witness = Witness(bus)
    (done,) = await bus.admin.seek_group(G, said)
    passed = meanwhile == 60
    assert await take(bus, 1) == [71 if passed else 50]
    assert (done.before, done.after) == (f"{10 + len(read)}-0", "70-0" if passed else said[0].after)
    assert (done.skipped, len(witness.of("group.moved"))) == (
        (0, 0) if passed else (39 - meanwhile, 1)
    )


async def test_to_the_end_means_the_end_that_was_said(bus: Bus) -> None:
    await add(bus, range(1, 101))
    await bus.redis.xgroup_create(S, G, "0")
    said = await bus.admin.seek_group(G, "end", dry_run=True)
    await add(bus, range(101, 111))
    await bus.admin.seek_group(G, said)
    assert await take(bus, 1) == [101]


async def test_backwards_it_goes_back_wherever_it_is_then(bus: Bus, counts: bool) -> None:
    await add(bus, range(1, 101))
    await bus.redis.xgroup_create(S, G, "0")
    await take(bus, 50)
    said = await bus.admin.seek_group(G, 21, dry_run=True)
    await take(bus, 30)
    (done,) = await bus.admin.seek_group(G, said)
    assert (done.before, done.counted) == ("80-0", counts)
    assert await take(bus, 1) == [21]
    await bus.redis.xgroup_setid(S, G, "5-0")
    await bus.admin.seek_group(G, said)
    assert await take(bus, 1) == [6], "somebody was there before"


async def test_what_would_stay_is_left_as_it_is(bus: Bus) -> None:
    await add(bus, range(1, 11))
    await bus.redis.xgroup_create(S, G, "5-0")
    said = await bus.admin.seek_group(G, "5-1", dry_run=True)
    await take(bus, 2)
    assert await bus.admin.seek_group(G, said) == ()
    assert await take(bus, 1) == [8]


async def test_a_dry_recount_tells_the_server_nothing(bus: Bus, counts: bool) -> None:
    await add(bus, range(1, 11))
    await bus.redis.xgroup_create(S, G, "5-0")
    before = await everything(bus)
    (said,) = await bus.admin.recount_group(G, dry_run=True)
    assert said.counted == counts
    assert await everything(bus) == before
    assert await bus.admin.recount_group(G) == (said,)


# --- while others are at it


def between(bus: Bus, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Have `act` done once, when the entries on one side of a place were counted."""
    look = bus.store.archive.range

    async def looked(*args: Any, **others: Any) -> Any:
        page = await look(*args, **others)
        monkeypatch.setattr(bus.store.archive, "range", look)
        await act()
        return page

    monkeypatch.setattr(bus.store.archive, "range", looked)


@pytest.mark.parametrize("verb", ["create", "seek", "recount"])
@pytest.mark.parametrize("trimmed", [40, 150, 260, 300])
async def test_the_count_is_right_though_it_is_trimmed_meanwhile(
    bus: Bus, counts: bool, verb: str, trimmed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who heeds no group, so that the place itself may be gone by then."""
    if not counts:
        pytest.skip("it keeps no count")
    monkeypatch.setattr(inspection, "PAGE", 50)
    await add(bus, range(1, 301))
    if verb != "create":
        await bus.redis.xgroup_create(S, G, "150-0" if verb == "recount" else "280-0")
    between(bus, monkeypatch, lambda: bus.redis.xtrim(S, minid=trimmed + 1, approximate=False))
    if verb == "create":
        await bus.admin.create_group(G, "lane", at="150-1")
    elif verb == "seek":
        await bus.admin.seek_group(G, "150-1")
    else:
        await bus.admin.recount_group(G)
    assert await bus.redis.xlen(S) == 300 - trimmed
    assert await is_counted_right(bus) == counts
    await add(bus, [400])
    assert await is_counted_right(bus) == counts
    assert await take(bus, 1) == [(*range(max(151, trimmed + 1), 301), 400)[0]]
    assert await is_counted_right(bus) == counts


async def test_a_place_that_is_trimmed_just_before_the_move_is_counted_anew(
    bus: Bus, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not counts:
        pytest.skip("it keeps no count")
    await add(bus, range(1, 301))
    await bus.redis.xgroup_create(S, G, "280-0")
    move = bus.store.upkeep.seek

    async def moved(*args: Any, **others: Any) -> Any:
        monkeypatch.undo()
        await bus.redis.xtrim(S, minid=200, approximate=False)
        return await move(*args, **others)

    monkeypatch.setattr(bus.store.upkeep, "seek", moved)
    (sought,) = await bus.admin.seek_group(G, 150)
    assert (sought.again, sought.counted) == (280 - 199, counts)
    assert await is_counted_right(bus) == counts
    assert await take(bus, 1) == [200]


@pytest.mark.parametrize("verb", ["seek_group", "recount_group"])
@pytest.mark.parametrize("act", ["delete", "destroy"])
async def test_a_group_that_goes_meanwhile_is_unknown(
    bus: Bus, counts: bool, verb: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(bus, range(1, 301))
    await bus.redis.xgroup_create(S, G, "280-0")
    move = bus.store.upkeep.seek

    async def moved(*args: Any, **others: Any) -> Any:
        if act == "delete":
            await bus.redis.delete(S)
        else:
            await bus.redis.xgroup_destroy(S, G)
        return await move(*args, **others)

    monkeypatch.setattr(bus.store.upkeep, "seek", moved)
    if verb == "recount_group" and not counts:
        return  # nothing is to be told
    with pytest.raises(UnknownGroup, match="topic lane has no group index"):
        await getattr(bus.admin, verb)(*((G, 150) if verb == "seek_group" else (G,)))


async def test_a_stream_that_is_emptied_as_it_is_counted_is_no_trouble(
    bus: Bus, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(bus, range(1, 301))
    await bus.redis.xgroup_create(S, G, "280-0")
    if not counts:
        pytest.skip("it keeps no count")
    between(bus, monkeypatch, lambda: bus.redis.xtrim(S, 0))
    await bus.admin.create_group("new", "lane", at=150)
    await add(bus, [400])
    assert await take(bus, 9, "new") == [400]


async def test_counts_are_right_while_workers_read_and_publishers_publish_and_trim(
    url: str, counts: bool
) -> None:
    """A hundred moves of a group that is at work; each time the server counts right at once.

    It is asked for in one step with what lies ahead, since all of it moves.
    """
    script = """
        for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
            local row = {}
            for i = 1, #flat, 2 do row[flat[i]] = flat[i + 1] end
            if row['name'] == ARGV[1] then
                local ahead = redis.call('XRANGE', KEYS[1], '(' .. row['last-delivered-id'], '+')
                return {row['lag'] or -1, #ahead}
            end
        end
    """
    stop = asyncio.Event()

    @event_handler(Laid, group=G, concurrency=4, breaker=None)
    async def handle(event: Laid) -> None:
        await asyncio.sleep(0)

    async def publish() -> None:
        n = 0
        while not stop.is_set():
            await bus.publish_many([Laid(n=n + k) for k in range(7)])
            n += 7

    async with (
        Bus.connect(url, topics=[Topic("lane", maxlen=2_000, keep=300)]) as bus,
        Bus.connect(url) as operator,
        Worker(bus, [handle], lease_s=0.6) as worker,
    ):
        publishing = asyncio.create_task(publish())
        await eventually(lambda: bus.redis.xlen(S))
        known = 0
        for n in range(100):
            first = (await bus.redis.xrange(S, count=1))[0][0]
            near = f"{int(first.partition(b'-')[0]) + n % 5}-{n % 3}"
            to = ["start", near, near, "end", "@-1s"][n % 5]
            if n % 7:
                (sought,) = await operator.admin.seek_group(G, to)
            else:
                (sought,) = await operator.admin.recount_group(G)
            if sought.counted:
                lag, ahead = await bus.redis.eval(script, 1, S, G)
                assert lag == ahead, f"{n}: to {to}"
                known += 1
        stop.set()
        await publishing
        await worker.drained()
        assert (known > 60) == counts
        assert await is_counted_right(bus) == counts


# --- counted again


async def test_a_lost_count_is_found_again(bus: Bus, counts: bool) -> None:
    await add(bus, range(1, 301))
    await bus.redis.xgroup_create(S, G, "120-0")  # nobody has told it how many that is
    assert not await is_counted_right(bus)
    before = await bus.redis.xinfo_groups(S)
    (done,) = await bus.admin.recount_group(G, "lane")
    assert (done.before, done.after, done.skipped, done.again) == ("120-0", "120-0", 0, 0)
    assert done.counted == counts
    assert await is_counted_right(bus) == counts
    assert await place(bus) == "120-0"
    if not counts:
        assert await bus.redis.xinfo_groups(S) == before
    assert await take(bus, 1) == [121]


async def test_a_group_that_has_read_on_is_counted_where_it_is(
    bus: Bus, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never rests is left as it was, and never moved back."""
    await add(bus, range(1, 301))
    await bus.redis.xgroup_create(S, G, "120-0")
    tell, tries, busy = bus.store.upkeep.seek, 0, 3

    async def told(*args: Any, **others: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries <= busy:
            await take(bus, 2)
        return await tell(*args, **others)

    monkeypatch.setattr(bus.store.upkeep, "seek", told)
    (done,) = await bus.admin.recount_group(G)
    assert (done.counted, tries) == ((True, 4) if counts else (False, 0))
    if counts:
        assert (done.before, await place(bus)) == ("126-0", "126-0")
        assert await is_counted_right(bus)
        await bus.redis.xgroup_setid(S, G, "126-0")
        tries, busy = 0, 99
        (done,) = await bus.admin.recount_group(G)
        assert not done.counted
        assert tries < 20
        assert await place(bus) == f"{126 + 2 * tries}-0"


# --- moved while a worker is at work


async def test_going_back_hands_out_again_what_was_finished_and_what_waits(bus: Bus) -> None:
    """What waits in a lane is handled now, by its new delivery, and not again when it is due."""
    handled: list[tuple[int, int]] = []
    fails = True

    @event_handler(Laid, group=G, backoff=Backoff(base_s=1.0, jitter=0), breaker=None)
    async def handle(event: Laid, delivery: Delivery[Laid]) -> None:
        if event.n == 3 and fails:
            raise ValueError
        handled.append((event.n, delivery.attempt))

    witness = Witness(bus)
    async with Worker(bus, [handle], lease_s=0.6) as worker:
        await bus.publish_many([Laid(n=n) for n in range(6)])
        await eventually(lambda: witness.of("delivery.retried") and len(handled) == 5)
        fails = False
        (sought,) = await bus.admin.seek_group(G, "start")
        assert (sought.again, sought.skipped) == (6, 0)
        await worker.drained()
        twice = [(n, 1) for n in (0, 1, 2, 4, 5)] * 2
        assert sorted(handled) == sorted([*twice, (3, 1)])
        # The moment at which it was to be tried again has passed before this one comes.
        later = asyncio.get_running_loop().time() + 1.2
        await eventually(lambda: asyncio.get_running_loop().time() > later)
        assert [n for n, _ in handled].count(3) == 1
        assert witness.of("delivery.lost") == []


async def test_what_runs_while_its_group_goes_back_runs_once(bus: Bus) -> None:
    """Its delivery comes to the worker that has it; one that does not is another matter."""
    hold, started = asyncio.Event(), list[int]()

    @event_handler(Laid, group=G, breaker=None)
    async def handle(event: Laid) -> None:
        started.append(event.n)
        await hold.wait()

    async with Worker(bus, [handle], lease_s=0.6) as worker:
        await bus.publish(Laid(n=1))
        await eventually(lambda: started == [1])
        await bus.admin.seek_group(G, "start")
        await bus.publish(Laid(n=2))
        await eventually(lambda: 2 in started)
        hold.set()
        await worker.drained()
    assert started == [1, 2]


async def test_what_comes_again_before_its_first_end_was_answered_is_handled_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And holds nothing up, however long it waits for its turn."""
    hold, started = asyncio.Event(), list[int]()

    @event_handler(Laid, group=G, concurrency=1, breaker=None)
    async def handle(event: Laid) -> None:
        started.append(event.n)
        if event.n == 2:
            await hold.wait()

    monkeypatch.setattr(Pace, "ahead", 2)  # it reads ahead, however slow the machine is
    worker = Worker(bus, [handle], lease_s=0.6)
    (consumer,) = worker._consumers
    ack = bus.store.ack

    async def acked(*args: Any) -> Any:
        answer = await ack(*args)
        monkeypatch.setattr(bus.store, "ack", ack)
        await eventually(lambda: 2 in started)  # a group that moves on its own is left alone
        await bus.admin.seek_group(G, "start")
        consumer.look_again()  # as when this answer has come
        await eventually(lambda: consumer.holding.buffer)
        return answer

    monkeypatch.setattr(bus.store, "ack", acked)
    async with worker:
        await bus.publish_many([Laid(n=1), Laid(n=2)])
        await eventually(lambda: consumer.holding.buffer and consumer.holding.held)
        later = asyncio.get_running_loop().time() + 0.5  # what waits for so long is checked first
        await eventually(lambda: asyncio.get_running_loop().time() > later)
        hold.set()
        await worker.drained(timeout_s=5)
    assert started == [1, 2, 1]


async def test_going_forward_skips_and_leaves_what_is_in_hand(bus: Bus) -> None:
    hold, started = asyncio.Event(), list[int]()

    @event_handler(Laid, group=G, concurrency=1, breaker=None)
    async def handle(event: Laid) -> None:
        started.append(event.n)
        await hold.wait()

    await bus.publish_many([Laid(n=n) for n in range(5_000)])
    witness = Witness(bus)
    async with Worker(bus, [handle], lease_s=0.6) as worker:
        await eventually(lambda: started)
        (sought,) = await bus.admin.seek_group(G, "end")
        assert sought.skipped > 0
        hold.set()
        await worker.drained()
        await bus.publish(Laid(n=5_000))
        await eventually(lambda: started[-1] == 5_000)
        await worker.drained()
    assert started[0] == 0
    assert len(started) == 5_000 - sought.skipped + 1
    assert witness.of("delivery.lost") == []


async def test_after_a_lost_answer_it_is_where_it_was_to_be(
    url: str, server: EmbeddedServer
) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=[TOPIC]) as bus:
        await bus.topics.record("lane")
        await add(bus, range(1, 301))
        await bus.redis.xgroup_create(S, G, "200-0")
        witness = Witness(bus)
        proxy.lose(b"EVALSHA", 1)
        (sought,) = await bus.admin.seek_group(G, 50)
        assert proxy.lost == 1
        assert (sought.before, sought.again, sought.skipped) == ("200-0", 151, 0)
        assert witness.of("group.moved")[0]["before"] == "200-0"
        assert await take(bus, 1) == [50]


# --- removed


async def fill(bus: Bus, name: str, stream: str = S) -> None:
    """Give a group something of everything that can be its own."""
    await bus.redis.xgroup_create(stream, name, "0", mkstream=True)
    await bus.redis.xreadgroup(name, "me", {stream: ">"}, count=2)
    for key in (keys.inbox(stream, name), keys.dead(stream, name)):
        await bus.redis.xadd(key, {"n": "1"})
        await bus.redis.xadd(key, {"n": "2"})
    await bus.redis.xgroup_create(keys.inbox(stream, name), name, "0")
    await bus.redis.hset(keys.overrun(stream), name, 7)
    await bus.redis.hset("bus:paused", f"{keys.topic_of(stream)}:{name}", "")


async def test_a_group_goes_with_all_that_is_its_own_and_nothing_else(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspector, "HEARD_OF_MS", -1)  # `me` was heard of just now
    await add(bus, range(1, 11))
    await fill(bus, "audit")
    others = await everything(bus)
    await fill(bus, G)
    before = await everything(bus)
    said = await bus.admin.remove_group(G, dry_run=True)
    assert await everything(bus) == before
    witness = Witness(bus)
    done = await bus.admin.remove_group(G)
    assert done == said
    (left,) = done
    assert (left.stream, left.group, left.undelivered, left.at_least) == (S, G, 8, False)
    assert (left.pending, left.inbox, left.dead) == (2, 2, 2)
    assert witness.of("group.removed") == [{"stream": S, "group": G}]
    after = await everything(bus)
    assert {k: v for k, v in after.items() if k != S.encode()} == {
        k: v for k, v in others.items() if k != S.encode()
    }
    assert [g["name"] for g in await bus.redis.xinfo_groups(S)] == [b"audit"]
    assert await bus.redis.xlen(S) == 10
    with pytest.raises(UnknownGroup, match="no topic has a group index: there are: audit"):
        await bus.admin.remove_group(G)


async def test_it_goes_from_the_topic_that_is_named_or_from_all(url: str) -> None:
    async with Bus.connect(url, topics=[TOPIC, Topic("road")]) as bus:
        for topic, stream in (("lane", S), ("road", OTHER)):
            await bus.topics.record(topic)
            await bus.redis.xgroup_create(stream, G, "0", mkstream=True)
            await bus.redis.hset("bus:paused", f"{topic}:{G}", "")
        assert [r.stream for r in await bus.admin.remove_group(G, "road")] == [OTHER]
        assert await bus.redis.hkeys("bus:paused") == [b"lane:index"]
        await bus.redis.xgroup_create(OTHER, G, "0")
        assert [r.stream for r in await bus.admin.remove_group(G)] == [S, OTHER]
        assert await bus.redis.exists("bus:paused") == 0
        assert await bus.redis.xinfo_groups(S) == await bus.redis.xinfo_groups(OTHER) == []


async def test_a_group_that_is_served_is_not_removed(bus: Bus) -> None:
    """Also when its worker has not read anything yet, and when nothing is left of it to do."""

    @event_handler(Laid, group=G)
    async def handle(event: Laid) -> None: ...

    await bus.redis.xgroup_create(S, "audit", "0", mkstream=True)
    async with Worker(bus, [handle]) as worker:
        for n in range(2):
            with pytest.raises(InUse, match=rf"group {G} is served on bus:\{{lane:0\}}: its work"):
                await bus.admin.remove_group(G)
            assert [r.stream for r in await bus.admin.remove_group(G, dry_run=True)] == [S]
            await bus.publish(Laid(n=n))
            await worker.drained()
        assert [r.group for r in await bus.admin.remove_group("audit")] == ["audit"]
    assert [r.pending for r in await bus.admin.remove_group(G)] == [0]
    assert await bus.redis.xinfo_groups(S) == []


async def test_one_that_a_program_of_another_language_reads_is_served(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(bus, range(1, 11))
    await bus.redis.xgroup_create(S, G, "0")
    await take(bus, 1)
    with pytest.raises(InUse):
        await bus.admin.remove_group(G)
    monkeypatch.setattr(inspector, "HEARD_OF_MS", -1)
    assert [r.pending for r in await bus.admin.remove_group(G)] == [1]


async def test_one_that_is_served_on_one_topic_stays_on_all(url: str) -> None:
    async with Bus.connect(url, topics=[TOPIC, Topic("road")]) as bus:
        for topic, stream in (("lane", S), ("road", OTHER)):
            await bus.topics.record(topic)
            await bus.redis.xgroup_create(stream, G, "0", mkstream=True)
        await bus.redis.sadd(keys.workers(OTHER), "w")
        await bus.redis.set(keys.lease(OTHER, "w"), f"audit,{G}")
        with pytest.raises(InUse, match=r"is served on bus:\{road:0\}:"):
            await bus.admin.remove_group(G)
        assert await place(bus) == await place(bus, stream=OTHER) == "0-0"


async def test_a_group_whose_name_is_no_text_can_be_removed(bus: Bus) -> None:
    await bus.redis.xgroup_create(S, b"\xff", "0", mkstream=True)
    await bus.redis.xadd(S.encode() + b":dead:\xff", {"n": "1"})
    (left,) = await bus.admin.remove_group("\udcff")
    assert (left.group, left.dead) == ("\\xff", 1)
    assert await bus.redis.keys("bus:{*") == [S.encode()]


@pytest.mark.parametrize("key", [keys.dead(S, G), keys.inbox(S, G), keys.workers(S)])
async def test_what_is_not_the_bus_s_is_not_deleted_with_a_group(bus: Bus, key: str) -> None:
    await bus.redis.xgroup_create(S, G, "0", mkstream=True)
    await bus.redis.set(key, "somebody's")
    before = await everything(bus)
    for dry_run in (True, False):
        with pytest.raises(WrongKeyType, match=re.escape(key)):
            await bus.admin.remove_group(G, dry_run=dry_run)
    assert await everything(bus) == before


async def test_a_server_without_memory_can_be_relieved_of_a_group(
    private_server: PrivateServer, server_kind: str
) -> None:
    async with Bus.connect(private_server(server_kind).url, topics=[TOPIC]) as bus:
        await bus.topics.record("lane")
        await bus.redis.xgroup_create(S, G, "0", mkstream=True)
        await bus.redis.xadd(keys.dead(S, G), {"n": "1"})
        await bus.redis.config_set("maxmemory", 1)
        assert [r.dead for r in await bus.admin.remove_group(G)] == [1]
        assert await bus.redis.exists(keys.dead(S, G)) == 0
        assert await bus.redis.xinfo_groups(S) == []


async def test_after_a_lost_answer_it_is_removed(url: str, server: EmbeddedServer) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=[TOPIC]) as bus:
        await bus.topics.record("lane")
        await bus.redis.xgroup_create(S, G, "0", mkstream=True)
        await bus.redis.hset("bus:paused", f"lane:{G}", "")
        for words in (b"EVALSHA", b"HDEL"):
            proxy.lose(words, 1)
            assert [r.group for r in await bus.admin.remove_group(G)] == [G]
            assert await bus.redis.xinfo_groups(S) == []
            assert await bus.redis.exists("bus:paused") == 0
            await bus.redis.xgroup_create(S, G, "0", mkstream=True)
        assert proxy.lost == 2
