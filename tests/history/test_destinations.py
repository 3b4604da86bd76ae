"""Where a replay goes: what the server remembers of it, and what becomes of a batch."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Bus, CheckpointError, Event, PermissionDenied, Progress, Topic
from bus.config import REPLAY_MEMORY_S
from tests.eyes import eyes_of
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from bus.embedded import EmbeddedServer
    from bus.streams.answers import Copied

pytestmark = pytest.mark.everywhere

TOPIC = Topic("ward", partitions=2)
STREAMS = ["bus:{ward:0}", "bus:{ward:1}"]
STREAM, INBOX = STREAMS[0], f"{STREAMS[0]}:inbox:index"
MEMORY = f"{STREAM}:replay:replay-1"


class Warded(Event, type="ward.warded", key="house"):
    house: str
    n: int


class Enough(Exception): ...


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.publish(Warded(house="h", n=-1))  # the topic is known from now on
        await eyes_of(bus).delete(*STREAMS)
        yield bus


async def put(redis: Any, ids: list[str], stream: str = STREAM, **fields: Any) -> list[bytes]:
    """Write entries by hand."""
    for n, entry_id in enumerate(ids):
        data = f'{{"house":"h","n":{n}}}'
        own = {"id": f"e{n}", "type": "ward.warded", "data": data, **fields}
        await redis.xadd(stream, own, id=entry_id)
    return [entry_id.encode() for entry_id in ids]


# --- the script


async def copy(bus: Bus, ids: list[bytes], known: bytes = b"", most: int = 100) -> Copied | None:
    archive = bus.store.archive
    return await archive.replay(STREAM, "index", "replay-1", known, most, REPLAY_MEMORY_S, ids)


async def origins(bus: Bus) -> list[bytes]:
    return [fields[b"origentry"] for _, fields in await eyes_of(bus).xrange(INBOX)]


async def test_what_was_copied_is_remembered_for_a_month(bus: Bus) -> None:
    ids = await put(eyes_of(bus), ["1-0", "2-0", "3-0"])
    assert await copy(bus, ids[:2]) == (2, 0, False, 2, b"2-0")
    assert await eyes_of(bus).get(MEMORY) == b"2-0 2"
    assert REPLAY_MEMORY_S - 5 <= await eyes_of(bus).ttl(MEMORY) <= REPLAY_MEMORY_S == 30 * 86_400
    await eyes_of(bus).expire(MEMORY, 100)
    assert await copy(bus, ids, b"2-0") == (1, 0, False, 3, b"3-0")  # what was copied is passed
    assert await eyes_of(bus).ttl(MEMORY) > 100
    assert await origins(bus) == ids


async def test_what_is_gone_is_remembered_as_dealt_with(bus: Bus) -> None:
    """Else the place would stay behind it, and a lost answer could not be told from a new call."""
    ids = await put(eyes_of(bus), [f"{n}-0" for n in range(1, 7)])
    await eyes_of(bus).xdel(STREAM, *ids[2:4])
    assert await copy(bus, ids[:4]) == (2, 2, False, 2, b"4-0")
    assert await eyes_of(bus).get(MEMORY) == b"4-0 2"
    assert await copy(bus, ids[:4], b"4-0") == (0, 0, False, 2, b"4-0")
    await eyes_of(bus).xdel(STREAM, *ids)
    assert await copy(bus, ids[4:], b"4-0") == (0, 2, False, 2, b"6-0")
    assert await eyes_of(bus).get(MEMORY) == b"6-0 2"


async def test_a_run_of_which_all_is_gone_is_known(bus: Bus) -> None:
    ids = await put(eyes_of(bus), ["1-0", "2-0"])
    await eyes_of(bus).delete(STREAM)
    assert await copy(bus, ids) == (0, 2, False, 0, b"2-0")
    assert await eyes_of(bus).get(MEMORY) == b"2-0 0"
    assert await eyes_of(bus).ttl(MEMORY) > 100


async def test_what_the_caller_knows_better_than_the_server_stops_it(bus: Bus) -> None:
    ids = await put(eyes_of(bus), ["1-0", "9-0", "10-0", "11-0"])
    assert await copy(bus, ids[2:], b"9-0") is None  # there is no memory
    assert await eyes_of(bus).exists(MEMORY, INBOX) == 0
    await copy(bus, ids[:2])
    assert await copy(bus, ids[3:], b"10-0") is None  # it is older
    assert (await eyes_of(bus).get(MEMORY), await origins(bus)) == (b"9-0 2", ids[:2])
    assert await copy(bus, ids[2:], b"1-0") == (2, 0, False, 4, b"11-0")  # a newer one is right
    assert await origins(bus) == ids


async def test_no_more_than_there_is_room_for(bus: Bus) -> None:
    ids = await put(eyes_of(bus), [f"{n}-0" for n in range(1, 6)])
    await eyes_of(bus).xadd(INBOX, {"origentry": "0-1"})
    assert await copy(bus, ids, most=4) == (3, 0, True, 3, b"3-0")
    assert await copy(bus, ids, b"3-0", most=4) == (0, 0, True, 3, b"3-0")
    assert await eyes_of(bus).get(MEMORY) == b"3-0 3"
    assert await eyes_of(bus).xlen(INBOX) == 4


async def test_a_full_inbox_from_the_beginning_leaves_nothing_behind(bus: Bus) -> None:
    ids = await put(eyes_of(bus), ["1-0"])
    assert await copy(bus, ids, most=0) == (0, 0, True, 0, b"")
    assert await eyes_of(bus).exists(MEMORY, INBOX) == 0


async def test_what_is_in_an_inbox_without_a_group_is_not_passed_over(bus: Bus) -> None:
    """A program in another language may have put it there before any worker came."""
    await eyes_of(bus).xadd(INBOX, {"id": "before", "type": "ward.warded", "data": "{}"})
    await copy(bus, await put(eyes_of(bus), ["1-0"]))
    (group,) = await eyes_of(bus).xinfo_groups(INBOX)
    assert (group["name"], group["last-delivered-id"]) == (b"index", b"0-0")


async def test_an_inbox_gets_its_group_with_its_first_entry(bus: Bus) -> None:
    """Whoever reads it makes the group, too; but it must not begin behind what is there."""
    ids = await put(eyes_of(bus), ["1-0", "2-0"])
    await copy(bus, ids)
    (group,) = await eyes_of(bus).xinfo_groups(INBOX)
    assert (group["name"], group["last-delivered-id"]) == (b"index", b"0-0")
    rows = await eyes_of(bus).xreadgroup("index", "c", {INBOX: ">"})
    assert [fields[b"origentry"] for _, fields in rows[0][1]] == ids
    more = await put(eyes_of(bus), ["3-0"])
    await copy(bus, more, b"2-0")  # it is there, and stays where it is
    (group,) = await eyes_of(bus).xinfo_groups(INBOX)
    assert (group["pending"], group["last-delivered-id"]) == (2, rows[0][1][-1][0])


@pytest.mark.servers_only("it takes an access list")
@pytest.mark.parametrize("command", ["set", "xgroup", "get", "xrange"])
async def test_a_user_without_a_right_copies_nothing(
    bus: Bus, url: str, server: EmbeddedServer, command: str
) -> None:
    """Least of all what would not be remembered."""
    ids = await put(eyes_of(bus), ["1-0", "2-0"])
    ask(server, "ACL", "SETUSER", "ops", "on", ">pw", "~*", "+@all", f"-{command}")
    try:
        async with Bus.connect(url.replace("//", "//ops:pw@")) as other:
            for _ in range(2):
                with pytest.raises(PermissionDenied, match=r"lacks a right on bus:.*:inbox"):
                    await copy(other, ids)
        assert await eyes_of(bus).xlen(INBOX) == 0
        assert await eyes_of(bus).get(MEMORY) in (None, b"0-0 0")
        assert await copy(bus, ids) == (2, 0, False, 2, b"2-0")
    finally:
        ask(server, "ACL", "DELUSER", "ops")


async def test_a_memory_lost_before_the_first_batch_is_whole_is_missed_too(valkey_url: str) -> None:
    """The inbox is full, the replay waits; what it has put by then must not come again."""
    topic = Topic("ward", maxlen=60, keep=20)
    async with Bus.connect(valkey_url, topics=[topic]) as bus:
        witness = Witness(bus)
        for n in range(50):
            await bus.publish(Warded(house="h", n=n))
        stream = (await anext(bus.history("ward"))).stream
        await eyes_of(bus).xgroup_create(stream, "index", "0")
        replaying = asyncio.create_task(bus.replay("ward", to="index"))
        await eventually(lambda: witness.of("replay.waits"))
        put = await eyes_of(bus).xlen(f"{stream}:inbox:index")
        assert 0 < put < 50
        (memory,) = [k async for k in eyes_of(bus).scan_iter("*:replay:*")]
        await eyes_of(bus).delete(memory)
        with pytest.raises(CheckpointError, match="no longer remembers"):
            await asyncio.wait_for(replaying, 20)
        assert await eyes_of(bus).xlen(f"{stream}:inbox:index") == put


# --- published again


async def again(bus: Bus, path: Path, most: int = 10**9, **asked: Any) -> Any:
    """Publish again with a checkpoint, as far as so many were read."""

    def look(progress: Progress) -> None:
        if progress.read >= most:
            raise Enough

    return await bus.replay("ward", checkpoint=path, progress=look, **{"to": bus, **asked})


@pytest.fixture
def told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.history.replay.PROGRESS_S", 0.0)


async def numbers(bus: Bus) -> Counter[int]:
    known = [e async for e in bus.history("ward", types=[Warded])]
    return Counter(e.event.n for e in known)


@pytest.mark.usefixtures("told_at_once")
async def test_a_batch_of_which_nothing_can_be_published_is_remembered_too(
    bus: Bus, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    for n in range(150):
        unheard = {"id": f"u{n}", "type": "ward.unheard", "data": "{}"}
        await eyes_of(bus).xadd(STREAM, unheard, id=f"{n + 1}-0")
    await put(eyes_of(bus), [f"{n + 1_000}-0" for n in range(100)])
    with pytest.raises(Enough):
        await again(bus, path, most=100, rate=1_000)
    done = json.loads(path.read_text())["places"][STREAM]["done"]
    assert done.endswith("-0")
    (memory,) = [k async for k in eyes_of(bus).scan_iter("*:replay:*")]
    assert await eyes_of(bus).get(memory) == f"{done} 0".encode()
    assert REPLAY_MEMORY_S - 60 <= await eyes_of(bus).ttl(memory) <= REPLAY_MEMORY_S
    done = await again(bus, path)
    assert (done.resumed, done.replayed, done.unreadable, done.read) == (True, 100, 150, 250)
    assert await numbers(bus) == Counter(list(range(100)) * 2)
    assert (await eyes_of(bus).get(memory)).split() == [
        b"1099-0",
        b"100",
    ]  # those published, no more


async def test_new_ids_are_of_the_run_the_stream_and_the_entry(bus: Bus) -> None:
    for stream in STREAMS:
        await put(eyes_of(bus), ["5-0", "6-0"], stream)
    runs = [(await bus.replay("ward", to=bus, until="9-0")).run for _ in range(2)]
    assert len(set(runs)) == 2
    past = [e async for e in bus.history("ward", since="10-0")]
    assert len(past) == 8
    assert len({e.event_id for e in past}) == 8
    assert {e.causation_id for e in past} == {"e0", "e1"}


@pytest.mark.usefixtures("told_at_once")
async def test_a_repeat_after_a_kill_makes_the_same_ids(bus: Bus, tmp_path: Path) -> None:
    """The step was lost with the server's last second: who had seen the events sees them again."""
    path = tmp_path / "checkpoint"
    await put(eyes_of(bus), [f"{n + 1}-0" for n in range(200)])
    with pytest.raises(Enough):
        await again(bus, path, most=100, rate=1_000)
    first = {e.causation_id: e.event_id async for e in bus.history("ward", since="1000-0")}
    assert 0 < len(first) < 200
    # As if it had crashed back to the beginning of the run.
    content = json.loads(path.read_text())
    for place in content["places"].values():
        place["read"] = place["done"] = ""
    path.write_text(json.dumps(content))
    await eyes_of(bus).delete(*[k async for k in eyes_of(bus).scan_iter("*:replay:*")])
    for stream in STREAMS:
        late = await eyes_of(bus).xrange(stream, "1000-0", "+")
        if late:
            await eyes_of(bus).xdel(stream, *(i for i, _ in late))
    await again(bus, path)
    second = {e.causation_id: e.event_id async for e in bus.history("ward", since="1000-0")}
    assert len(second) == 200
    assert {k: second[k] for k in first} == first


async def test_a_destination_with_less_room_than_a_batch_is_filled_slowly(
    bus: Bus, valkey_url: str, private_server: Any
) -> None:
    await put(eyes_of(bus), [f"{n + 1}-0" for n in range(150)])
    there = private_server()
    small = Topic("ward", maxlen=30, keep=10)
    settings = {"topics": [small], "publish_timeout_s": 0.3}
    async with Bus.connect(there.url, **settings) as other, Redis.from_url(there.url) as redis:
        longest = 0
        published: Counter[int] = Counter()
        reading = asyncio.Event()
        await redis.xgroup_create(STREAM, "reads", "0", mkstream=True)  # else unread ones may go

        async def read() -> None:
            nonlocal longest
            while not reading.is_set():
                longest = max(longest, await redis.xlen(STREAM))
                new = {STREAM: ">"}
                rows = await redis.xreadgroup("reads", "me", new, block=10, noack=True) or []
                for _, entries in rows:
                    published.update(json.loads(f[b"data"])["n"] for _, f in entries)

        reader = asyncio.create_task(read())
        async with asyncio.timeout(20):
            done = await bus.replay("ward", to=other, rate=500)
        await asyncio.sleep(0.05)
        reading.set()
        await reader
    assert done.replayed == 150
    assert published == Counter(range(150))
    assert longest <= 30


async def test_large_events_are_published_in_several_steps(bus: Bus) -> None:
    """Together they are more than a transaction takes."""
    text = "x" * 90_000
    for n in range(12):
        data = json.dumps({"house": text, "n": n})
        await eyes_of(bus).xadd(STREAM, {"id": f"e{n}", "type": "ward.warded", "data": data})
    last = (await eyes_of(bus).xrevrange(STREAM, count=1))[0][0].decode()
    done = await bus.replay("ward", to=bus, until=last)
    assert (done.replayed, done.unreadable) == (12, 0)
    assert await numbers(bus) == Counter(list(range(12)) * 2)


async def test_what_no_bus_could_publish_is_left_out_and_told(bus: Bus) -> None:
    """An hour that lies before all time, once it is UTC."""
    witness = Witness(bus)
    ids = await put(eyes_of(bus), ["1-0", "3-0"])
    await put(eyes_of(bus), ["2-0"], STREAMS[1], time="0001-01-01T00:00:00+14:00")
    done = await bus.replay("ward", to=bus, until=ids[-1].decode())
    assert (done.replayed, done.unreadable) == (2, 1)
    (told,) = witness.of("replay.unreadable")
    assert (told["entry_id"], told["error_type"]) == ("2-0", "InvalidEvent")


# --- two at once


@pytest.mark.usefixtures("told_at_once")
@pytest.mark.parametrize("new", [True, False])
async def test_two_that_publish_with_one_checkpoint_publish_each_once(
    bus: Bus,
    url: str,
    tmp_path: Path,
    new: bool,
) -> None:
    path = tmp_path / "checkpoint"
    await bus.publish_many(Warded(house=f"h{n % 7}", n=n) for n in range(1_000))
    if not new:
        with pytest.raises(Enough):
            await again(bus, path, most=200, rate=2_000)
    async with Bus.connect(url) as other:
        both = await asyncio.gather(again(bus, path), again(other, path, to=other))
    assert [done.replayed for done in both] == [1_000, 1_000]
    assert len({done.run for done in both}) == 1
    assert await numbers(bus) == Counter(list(range(1_000)) * 2)


@pytest.mark.parametrize("to", ["index", "bus"])
async def test_two_that_begin_at_once_with_one_new_file_have_one_run(
    bus: Bus, tmp_path: Path, to: str
) -> None:
    await bus.publish_many(Warded(house=f"h{n % 7}", n=n) for n in range(1_000))
    for stream in STREAMS:
        await eyes_of(bus).xgroup_create(stream, "index", "$")
    place = {"to": bus if to == "bus" else to, "checkpoint": tmp_path / "checkpoint"}
    both = await asyncio.gather(*(bus.replay("ward", **place) for _ in range(3)))
    assert len({done.run for done in both}) == 1
    if to == "bus":
        assert await numbers(bus) == Counter(list(range(1_000)) * 2)
    else:
        rows = [r for s in STREAMS for r in await eyes_of(bus).xrange(f"{s}:inbox:index")]
        assert len(rows) == len({f[b"id"] for _, f in rows}) == 1_000
