"""What a group was given and has not finished: listed, hurried, given up, each once."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import astuple, replace
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bus import (
    Backoff,
    Bus,
    DeclarationError,
    Delivery,
    Event,
    NotPending,
    Topic,
    UnknownGroup,
    UnknownTopic,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.admin import pending
from bus.admin.pending import GivenUp, PendingEntry, Retried
from bus.config import HEARD_OF_MS
from bus.streams import keys
from tests.faults.proxy import Proxy
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.embedded import EmbeddedServer

TOPICS = [Topic("task", partitions=2), Topic("note")]
S, SECOND, NOTE, G = "bus:{task:0}", "bus:{task:1}", "bus:{note:0}", "index"
INBOX, DEAD = keys.inbox(S, G), keys.dead(S, G)
FAR = "parked:4000000000000"  # in the year 2096
TIMES = count(1_700_000_000_000)


class Set(Event, type="task.set", key="who"):
    who: str
    n: int = 0


class Noted(Event, type="note.noted"):
    n: int


def who_of(partition: int) -> str:
    """A key that belongs to a partition of the topic."""
    return next(f"w{n}" for n in range(99) if keys.partition_of(f"w{n}", 2) == partition)


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=TOPICS) as bus:
        await prepare(bus)
        yield bus


async def prepare(bus: Bus) -> None:
    """The group on all streams; `alive` keeps a lease, that of `dead` has run out."""
    for topic in TOPICS:
        await bus.topics.record(topic.name)
    for stream in (S, SECOND, NOTE):
        for key in (stream, keys.inbox(stream, G)):
            await bus.redis.xgroup_create(key, G, "0", mkstream=True)
        await bus.redis.sadd(keys.workers(stream), "alive", "dead")
        await bus.redis.set(keys.lease(stream, "alive"), G)


def fields(n: int, **others: Any) -> dict[Any, Any]:
    who = who_of(0)
    data = json.dumps({"who": who, "n": n})
    return {"id": f"e{n}", "type": "task.set", "data": data, "partitionkey": who, **others}


async def give(
    bus: Bus,
    owner: str,
    n: int = 0,
    *,
    stream: str = S,
    count: int = 1,
    idle_s: float = 0,
    **others: Any,
) -> str:
    """Add an event and leave it pending for an owner; return its entry id, which no other has."""
    entry_id = f"{next(TIMES)}-0"
    await bus.redis.xadd(stream, fields(n, **others), id=entry_id)
    reader = "alive" if owner.startswith("parked:") else owner
    await bus.redis.xreadgroup(G, reader, {stream: ">"})
    args = {"idle": int(idle_s * 1000), "retrycount": count, "justid": True}
    await bus.redis.xclaim(stream, G, owner, 0, [entry_id], **args)
    return entry_id


def in_inbox(origin: str, attempts: int, due: int = 0) -> dict[str, Any]:
    return {"origentry": origin, "attempts": attempts, "due": due}


async def listed(entries: Any) -> list[PendingEntry]:
    return [e async for e in entries]


async def ids(entries: Any) -> list[str]:
    return [e.id async for e in entries]


async def rows(bus: Bus, stream: str = S) -> dict[str, tuple[str, int]]:
    found = await bus.redis.xpending_range(stream, G, "-", "+", 10_000)
    return {r["message_id"].decode(): (r["consumer"].decode(), r["times_delivered"]) for r in found}


async def everything(bus: Bus) -> dict[bytes, Any]:
    return {key: await bus.redis.dump(key) for key in await bus.redis.keys("*")}


async def letters(bus: Bus, stream: str = S) -> list[str]:
    """The event ids of the dead letters."""
    return [f[b"id"].decode() for _, f in await bus.redis.xrange(keys.dead(stream, G))]


# --- listed


async def test_each_is_shown_where_it_is_with_all_that_is_known(bus: Bus) -> None:
    due = datetime(2096, 10, 2, 7, 6, 40, tzinfo=UTC)
    running = await give(bus, "alive", 1)
    parked = await give(bus, FAR, 2, count=3, idle_s=90)
    orphan = await give(bus, "dead", 3, count=2, idle_s=7_200)
    foreign = await give(bus, "stranger", 4)
    boxed = await give(bus, "dead", 5, stream=INBOX, **in_inbox("77-5", 4))
    waits = await give(bus, FAR, 6, stream=INBOX, count=4, **in_inbox("77-6", 4, 10**12))
    other = await give(bus, "alive", 7, stream=SECOND)
    found = await listed(bus.admin.pending(G))
    assert [e.id for e in found] == [
        f"task:0/{running}",
        f"task:0/{parked}",
        f"task:0/{orphan}",
        f"task:0/{foreign}",
        f"task:0:inbox/{boxed}",
        f"task:0:inbox/{waits}",
        f"task:1/{other}",
    ]
    assert [(e.state, e.owner, e.attempts) for e in found] == [
        ("running", "alive", 1),
        ("parked", FAR, 3),
        ("orphaned", "dead", 2),
        ("running", "stranger", 1),
        ("orphaned", "dead", 5),
        ("parked", FAR, 4),
        ("running", "alive", 1),
    ]
    assert [e.due_at for e in found] == [None, due, None, None, None, due, None]
    assert [e.group for e in found] == [G] * 7
    assert [e.stream for e in found] == [S] * 6 + [SECOND]
    assert [e.entry_id for e in found[3:5]] == [foreign, boxed]
    assert [e.place for e in found[3:5]] == [S, INBOX]
    assert found[1].idle_s == pytest.approx(90, abs=5)
    assert found[2].idle_s == pytest.approx(7_200, abs=5)
    one, inboxed = found[0].envelope, found[4].envelope
    assert one is not None
    assert (one.event_id, one.entry_id, one.event) == ("e1", running, Set(who=who_of(0), n=1))
    assert inboxed is not None
    assert (inboxed.event_id, inboxed.entry_id, inboxed.stream) == ("e5", "77-5", S)
    assert inboxed.event == Set(who=who_of(0), n=5)
    assert '"who"' not in repr(found[0]), "payloads are not for logs"


async def test_nothing_is_read_before_it_is_asked_for_and_each_time_anew(bus: Bus) -> None:
    entries = bus.admin.pending(G, "task")
    assert await ids(entries) == []
    one = await give(bus, "alive")
    assert await ids(entries) == [f"task:0/{one}"]
    await bus.redis.xack(S, G, one)
    assert await ids(entries) == []


async def test_pages_join_without_a_seam(bus: Bus) -> None:
    async with bus.redis.pipeline(transaction=False) as pipe:
        for n in range(357):
            pipe.xadd(S, fields(n))
        await pipe.execute()
    ((_, read),) = await bus.redis.xreadgroup(G, "dead", {S: ">"})
    assert await ids(bus.admin.pending(G)) == [f"task:0/{i.decode()}" for i, _ in read]


@pytest.fixture
async def varied(valkey_url: str) -> AsyncIterator[tuple[Bus, dict[str, str]]]:
    """Six entries named 1 to 6; id -> name."""
    async with Bus.connect(valkey_url, topics=TOPICS) as bus:
        await prepare(bus)
        made = {
            f"task:0/{await give(bus, 'alive', 1)}": "1",
            f"task:0/{await give(bus, FAR, 2, count=3, idle_s=90)}": "2",
            f"task:0/{await give(bus, 'dead', 3, count=2, idle_s=9_000)}": "3",
            f"task:0:inbox/{await give(bus, FAR, 4, stream=INBOX, count=6)}": "4",
            f"task:1/{await give(bus, 'dead', 5, stream=SECOND, type='task.done')}": "5",
            f"note:0/{await give(bus, 'alive', 6, stream=NOTE, type='note.noted')}": "6",
        }
        yield bus, made


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({}, "123456"),
        ({"topic": "task"}, "12345"),
        ({"topic": "note"}, "6"),
        ({"state": "running"}, "16"),
        ({"state": "parked"}, "24"),
        ({"state": "orphaned"}, "35"),
        ({"owner": "dead"}, "35"),
        ({"owner": FAR}, "24"),
        ({"owner": "nobody"}, ""),
        ({"min_idle_s": 60}, "23"),
        ({"min_idle_s": 100.5}, "3"),
        ({"min_attempts": 2}, "234"),
        ({"min_attempts": 3}, "24"),
        ({"min_attempts": 0}, "123456"),
        ({"types": Set}, "1234"),
        ({"types": "task.*"}, "12345"),
        ({"types": ["task.done", Noted]}, "56"),
        ({"types": []}, ""),
        ({"types": "task.set", "state": "parked", "min_attempts": 4}, "4"),
        ({"state": "orphaned", "owner": "alive"}, ""),
    ],
)
async def test_filters_find_what_they_name(
    varied: tuple[Bus, dict[str, str]], filters: dict[str, Any], names: str
) -> None:
    bus, made = varied
    found = [made[i] for i in await ids(bus.admin.pending(G, **filters))]
    assert sorted(found) == list(names)
    done = await bus.admin.pending(G, **filters).retry(dry_run=True)
    assert done.matched == len(names)


async def test_ids_find_what_they_name_wherever_it_is(
    varied: tuple[Bus, dict[str, str]],
) -> None:
    bus, made = varied
    full = {name: i for i, name in made.items()}
    bare = {name: i.rpartition("/")[2] for name, i in full.items()}
    for asked, names in (
        ([full["2"], full["4"], full["6"]], "246"),
        ([bare["2"], bare["4"], bare["5"]], "245"),
        (full["3"], "3"),
        (bare["4"], "4"),
        ([full["3"], bare["3"], full["3"], "0" + bare["3"]], "3"),
        ([f"task:0/{bare['4']}", f"task:0:inbox/{bare['1']}", "7-7", "other:0/1-1"], ""),
        ([], ""),
    ):
        found = [made[i] for i in await ids(bus.admin.pending(G, ids=asked))]
        assert sorted(found) == list(names)
    both = bus.admin.pending(G, ids=[full["2"], full["3"]], state="parked")
    assert [made[i] for i in await ids(both)] == ["2"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"state": "waiting"}, "'waiting' is no state: there are running, parked, orphaned"),
        ({"min_idle_s": -1}, "min_idle_s must be a number"),
        ({"min_attempts": 1.5}, "min_attempts must be a whole number"),
        ({"types": "a b"}, "type pattern 'a b' is not valid"),
        ({"ids": "12"}, "'12' is no id of a pending entry: they look like document:0/17636"),
        ({"ids": ["task/1-0"]}, "is no id"),
        ({"ids": [7]}, "7 is no id"),
        ({"ids": "task:0/18446744073709551616-0"}, "is no id"),
        ({"ids": "task:0:outbox/1-0"}, "is no id"),
        ({"ids": "note:0/1-0", "topic": "task"}, "note:0/1-0 is not of the topic task"),
    ],
)
async def test_bad_arguments_are_told_at_once(
    valkey_url: str, filters: dict[str, Any], message: str
) -> None:
    async with Bus.connect(valkey_url) as bus:
        with pytest.raises(DeclarationError, match=re.escape(message)):
            bus.admin.pending(G, **filters)


async def test_unknown_groups_and_topics_are_errors_when_it_reads(bus: Bus) -> None:
    for verb in ("retry", "dead_letter"):
        words = () if verb == "retry" else ("why",)
        with pytest.raises(UnknownGroup, match=r"did you mean index\?"):
            await getattr(bus.admin.pending("indexx"), verb)(*words)
        with pytest.raises(UnknownTopic, match=r"did you mean task\?"):
            await getattr(bus.admin.pending(G, "tusk"), verb)(*words)
    with pytest.raises(UnknownGroup):
        await ids(bus.admin.pending("indexx"))


async def test_one_is_got_by_its_id_or_is_not_pending(bus: Bus) -> None:
    one = await give(bus, "alive", 1)
    box = await give(bus, FAR, 2, stream=INBOX)
    entries = bus.admin.pending(G, state="orphaned")
    assert (await entries.get(f"task:0/{one}")).entry_id == one
    assert (await entries.get(box)).id == f"task:0:inbox/{box}"
    for gone in ("7-7", f"task:1/{one}", f"task:0/{box}", "note:0/1-1"):
        with pytest.raises(NotPending, match=f"{gone} is not pending for group index: it was"):
            await entries.get(gone)
    with pytest.raises(DeclarationError, match="is no id"):
        await entries.get("7")
    with pytest.raises(UnknownGroup):
        await bus.admin.pending("indexx").get(one)
    await bus.redis.xadd(SECOND, fields(3), id=one)
    await bus.redis.xreadgroup(G, "alive", {SECOND: ">"})
    with pytest.raises(DeclarationError, match=f"name task:0/{one}, task:1/{one}"):
        await entries.get(one)


async def test_what_nobody_can_decode_is_listed_too(bus: Bus) -> None:
    raw = {b"\xff": b"\xfe", b"type": b"task.\xff", b"data": b"{"}
    entry_id = (await bus.redis.xadd(S, raw)).decode()
    await bus.redis.xreadgroup(G, "dead", {S: ">"})
    (entry,) = await listed(bus.admin.pending(G))
    assert (entry.entry_id, entry.state) == (entry_id, "orphaned")
    assert entry.envelope is not None
    assert set(entry.fields) == {x for pair in raw.items() for x in pair}
    done = await bus.admin.pending(G).dead_letter("what is this?")
    assert done.dead_lettered == 1
    ((_, letter),) = await bus.redis.xrange(DEAD)
    assert letter[b"\xff"] == b"\xfe"


async def test_a_stream_of_another_type_is_an_error_that_names_it(bus: Bus) -> None:
    await give(bus, "dead", stream=NOTE)
    await bus.redis.delete(INBOX)
    await bus.redis.set(INBOX, "a string")
    with pytest.raises(WrongKeyType, match=re.escape(INBOX)):
        await ids(bus.admin.pending(G))


# --- hurried


async def test_what_waits_or_is_orphaned_is_due_at_once_and_what_runs_is_left(bus: Bus) -> None:
    running = await give(bus, "alive", 1)
    parked = await give(bus, FAR, 2, count=3)
    orphan = await give(bus, "dead", 3, count=2)
    boxed = await give(bus, FAR, 4, stream=INBOX, count=5)
    before = await everything(bus)
    said = await bus.admin.pending(G).retry(dry_run=True)
    assert await everything(bus) == before
    witness = Witness(bus)
    now_ms = (await bus.redis.time())[0] * 1000
    done = await bus.admin.pending(G).retry()
    assert done == said == Retried(matched=4, released=3, running=1, half_done=0, gone=0, lost=0)
    assert witness.of("pending.released") == [{"group": G, "count": 3}]
    found = {**await rows(bus), **await rows(bus, INBOX)}
    assert found[running] == ("alive", 1)
    for entry_id, attempts in ((parked, 3), (orphan, 2), (boxed, 5)):
        lane, deliveries = found[entry_id]
        assert now_ms <= int(lane.removeprefix("parked:")) < now_ms + 10_000
        assert deliveries == attempts
    for stream in (S, INBOX):
        names = {c["name"].decode() for c in await bus.redis.xinfo_consumers(stream, G)}
        assert FAR not in names, "a lane is there only while something waits in it"


async def test_only_those_that_were_asked_for_are_hurried(bus: Bus) -> None:
    one, two = await give(bus, FAR, 1), await give(bus, FAR, 2)
    done = await bus.admin.pending(G, ids=two).retry()
    assert (done.matched, done.released) == (1, 1)
    assert (await rows(bus))[one][0] == FAR
    assert (await rows(bus))[two][0] != FAR


async def test_the_next_attempt_follows_at_once_and_only_once(bus: Bus) -> None:
    """A worker at work; the timer that it has set itself finds nothing any more."""
    handled: list[tuple[int, int]] = []
    fails = True

    @event_handler(Set, group=G, backoff=Backoff(base_s=1.5, jitter=0), breaker=None)
    async def handle(event: Set, delivery: Delivery[Set]) -> None:
        handled.append((event.n, delivery.attempt))
        if fails:
            raise ValueError

    witness, loop = Witness(bus), asyncio.get_running_loop()
    async with Worker(bus, [handle]) as worker:
        parked_at = loop.time()
        await bus.publish_many([Set(who=who_of(n % 2), n=n) for n in range(4)])
        await eventually(lambda: len(witness.of("delivery.retried")) == 4)
        fails = False
        done = await bus.admin.pending(G, min_attempts=1).retry()
        assert (done.matched, done.released) == (4, 4)
        await worker.drained()
        assert loop.time() < parked_at + 1.4, "long before its time"
        assert sorted(handled) == sorted([(n, a) for n in range(4) for a in (1, 2)])
        await eventually(lambda: loop.time() > parked_at + 1.8)
        assert len(handled) == 8
        assert witness.of("delivery.refused") == []


async def test_another_worker_goes_on_with_what_a_dead_one_had(bus: Bus) -> None:
    handled: list[tuple[int, int]] = []

    @event_handler(Set, group=G, max_attempts=9)
    async def handle(event: Set, delivery: Delivery[Set]) -> None:
        handled.append((event.n, delivery.attempt))

    await give(bus, "dead", 1, count=2)
    await give(bus, "dead", 2, stream=INBOX, **in_inbox("77-5", 6, 4 * 10**12))
    await give(bus, FAR, 3, stream=INBOX, count=4, **in_inbox("77-6", 4, 4 * 10**12))
    assert (await bus.admin.pending(G).retry()).released == 3
    async with Worker(bus, [handle]) as worker:
        await worker.drained()
    assert sorted(handled) == [(1, 3), (2, 7), (3, 5)]


async def test_one_of_another_language_is_running_until_it_was_not_heard_of_for_long(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await give(bus, "stranger")
    done = await bus.admin.pending(G).retry()
    assert (done.running, done.released) == (1, 0)
    survey_of = pending.survey_of

    async def later(*args: Any) -> Any:
        found = await survey_of(*args)
        aged = {
            place: [c._replace(idle_ms=HEARD_OF_MS) for c in those]
            for place, those in found.consumers.items()
        }
        return replace(found, consumers=aged)

    monkeypatch.setattr(pending, "survey_of", later)
    assert (await bus.admin.pending(G).retry()).released == 1


# --- given up


async def test_what_is_given_up_is_a_dead_letter_like_any_other(bus: Bus) -> None:
    """Shown whole, and redriven to its handler, which knows it again."""
    handled: list[tuple[int, int, str]] = []
    told: list[Any] = []

    async def on_dead(dead: Any, bus: Any) -> None:
        told.append(dead)

    @event_handler(Set, group=G, on_dead=on_dead)
    async def handle(event: Set, delivery: Delivery[Set]) -> None:
        handled.append((event.n, delivery.attempt, delivery.envelope.entry_id))

    parked = await give(bus, FAR, 1, count=3, source="/farm")
    await give(bus, "dead", 2, stream=INBOX, **in_inbox("77-5", 4), run="replay-x")
    running = await give(bus, "alive", 3)
    before = await everything(bus)
    said = await bus.admin.pending(G).dead_letter("an old bug", dry_run=True)
    assert await everything(bus) == before
    witness = Witness(bus)
    done = await bus.admin.pending(G).dead_letter("an old bug")
    assert done == said == GivenUp(matched=3, dead_lettered=2, running=1, gone=0, lost=0)
    assert witness.of("pending.given_up") == [{"group": G, "count": 2}]
    assert await rows(bus) == {running: ("alive", 1)}
    assert await rows(bus, INBOX) == {}
    assert await bus.redis.xlen(INBOX) == 0, "nobody else reads it there"
    assert await bus.redis.xlen(S) == 2
    first, second = [letter async for letter in bus.dead_letters(G)]
    for letter, attempts, origin in ((first, 3, parked), (second, 5, "77-5")):
        assert (letter.reason, letter.error) == ("rejected", "GivenUp: an old bug")
        assert (letter.error_type, letter.traceback) == ("GivenUp", "")
        assert (letter.attempts, letter.original_entry_id) == (attempts, origin)
        assert letter.stream == S
    assert first.event == Set(who=who_of(0), n=1)
    assert (first.envelope.source, first.envelope.key) == ("/farm", who_of(0))
    assert not {b"origentry", b"attempts", b"due", b"run"} & set(second.fields[::2])
    await bus.redis.xack(S, G, running)
    async with Worker(bus, [handle]) as worker:
        assert (await bus.dead_letters(G).redrive()).redriven == 2
        await worker.drained()
    assert handled == [(1, 1, parked), (2, 1, "77-5")]
    assert told == []


async def test_an_entry_of_very_many_fields_can_be_given_up(bus: Bus) -> None:
    wide = {f"f{n}": "v" for n in range(3_000)}
    await give(bus, FAR, 1, **wide)
    assert (await bus.admin.pending(G).dead_letter("wide")).dead_lettered == 1
    (letter,) = [x async for x in bus.dead_letters(G)]
    assert letter.event == Set(who=who_of(0), n=1)
    ((_, stored),) = await bus.redis.xrange(DEAD)
    assert len(msgspec.msgpack.decode(stored[b"deadfields"])) == 2 * (4 + 3_000)


async def test_an_id_that_is_named_twice_is_one_letter(bus: Bus) -> None:
    one = await give(bus, FAR, 1)
    asked = [one, f"task:0/{one}", one]
    done = await bus.admin.pending(G, ids=asked).dead_letter("once")
    assert (done.matched, done.dead_lettered, done.gone) == (1, 1, 0)
    assert await letters(bus) == ["e1"]


async def test_words_that_are_no_text_are_written_as_far_as_they_are(bus: Bus) -> None:
    await give(bus, FAR, 1)
    assert (await bus.admin.pending(G).dead_letter("caf\udce9")).dead_lettered == 1
    (letter,) = [x async for x in bus.dead_letters(G)]
    assert letter.error == "GivenUp: caf?"


async def test_a_group_of_any_name_has_its_pending_entries_too(bus: Bus) -> None:
    for key in (S, S.encode() + b":inbox:\xff"):
        await bus.redis.xgroup_create(key, b"\xff", "0", mkstream=True)
        await bus.redis.xadd(key, fields(1))
        await bus.redis.xreadgroup(b"\xff", "dead", {key: ">"})
    entries = bus.admin.pending("\udcff")
    assert [e.state for e in await listed(entries)] == ["orphaned"] * 2
    assert (await entries.retry()).released == 2
    with pytest.raises(DeclarationError, match="is not valid"):  # nobody could open its letters
        await entries.dead_letter("why")
    assert await bus.redis.exists(S.encode() + b":dead:\xff") == 0


# --- ghosts


@pytest.mark.parametrize("verb", ["retry", "dead_letter"])
@pytest.mark.parametrize("owner", [FAR, "dead"])
async def test_what_was_deleted_by_hand_is_shown_acked_and_told(
    bus: Bus, verb: str, owner: str
) -> None:
    ghosts = [await give(bus, owner, n) for n in range(3)]
    there = await give(bus, owner, 3)
    await bus.redis.xdel(S, *ghosts)
    found = await listed(bus.admin.pending(G))
    assert [(e.entry_id, e.envelope is None, e.fields == ()) for e in found] == [
        *((i, True, True) for i in ghosts),
        (there, False, False),
    ]
    words = () if verb == "retry" else ("why",)
    ask = getattr(bus.admin.pending(G), verb)
    before = await everything(bus)
    said = await ask(*words, dry_run=True)
    assert await everything(bus) == before
    witness = Witness(bus)
    done = await ask(*words)
    assert done == said
    assert (done.matched, done.lost, done.gone, done.running) == (4, 3, 0, 0)
    (told,) = witness.of("delivery.lost")
    assert (told["stream"], told["group"], told["entry_ids"]) == (S, G, ghosts)
    assert set(await rows(bus)) == ({there} if verb == "retry" else set())


async def test_of_a_ghost_that_a_worker_has_nothing_is_done(bus: Bus) -> None:
    ghost = await give(bus, "alive", 1)
    await bus.redis.xdel(S, ghost)
    done = await bus.admin.pending(G).dead_letter("why")
    assert (done.running, done.lost) == (1, 0)
    assert ghost in await rows(bus)


# --- while others are at it


async def many(bus: Bus, entries: int) -> None:
    """Leave many parked, in several lanes, and orphaned, in the stream and the inbox."""
    for stream in (S, INBOX):
        async with bus.redis.pipeline(transaction=False) as pipe:
            for n in range(entries):
                pipe.xadd(stream, fields(n + 10_000 * (stream == INBOX)))
            await pipe.execute()
        ((_, read),) = await bus.redis.xreadgroup(G, "dead", {stream: ">"})
        for lane in range(3):
            part = [i for i, _ in read[lane::4]]
            name = f"parked:{4 * 10**12 + lane}"
            await bus.redis.xclaim(stream, G, name, 0, part, justid=True)


@pytest.mark.parametrize("verb", ["retry", "dead_letter"])
async def test_two_operators_do_it_once(bus: Bus, verb: str) -> None:
    await many(bus, 450)
    words = () if verb == "retry" else ("why",)
    done = await asyncio.gather(
        *(getattr(bus.admin.pending(G, min_idle_s=0), verb)(*words) for _ in range(3))
    )
    if verb == "retry":
        assert sum(d.released for d in done) >= 900, "what was hurried may be hurried again"
        owners = [owner for s in (S, INBOX) for owner, _ in (await rows(bus, s)).values()]
        assert len(owners) == 900
        assert not any(o == "dead" or o >= "parked:4" for o in owners)
    else:
        assert sum(d.dead_lettered for d in done) == 900
        assert sorted(await letters(bus)) == sorted(
            f"e{n + box}" for n in range(450) for box in (0, 10_000)
        )
        assert await rows(bus) == await rows(bus, INBOX) == {}
    for each in done:
        matched, *parts = astuple(each)
        assert matched == sum(parts), "everything that was asked for is accounted for"


@pytest.mark.parametrize("verb", ["retry", "dead_letter"])
async def test_an_operator_and_a_worker_handle_each_once(bus: Bus, verb: str) -> None:
    """Whoever comes first has it; the other is told."""
    handled: list[str] = []

    @event_handler(Set, group=G, max_attempts=9)
    async def handle(event: Set, delivery: Delivery[Set]) -> None:
        handled.append(delivery.envelope.event_id)

    for n in range(300):
        await give(bus, "parked:1000" if n % 2 else "dead", n)
    async with Worker(bus, [handle]) as worker:
        entries = bus.admin.pending(G)
        done: Any = await (entries.retry() if verb == "retry" else entries.dead_letter("why"))
        await worker.drained()
    dead = await letters(bus)
    assert sorted([*handled, *dead]) == sorted(f"e{n}" for n in range(300))
    if verb == "dead_letter":
        assert len(dead) == done.dead_lettered
        assert done.matched == done.dead_lettered + done.gone + done.running


@pytest.mark.parametrize("verb", ["retry", "dead_letter"])
async def test_what_a_worker_has_begun_since_it_was_looked_at_is_left_to_it(
    bus: Bus, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has come after the look at who lives, so nobody knew of it."""
    survey_of = pending.survey_of

    async def just_before(*args: Any) -> Any:
        found = await survey_of(*args)
        monkeypatch.undo()
        await bus.redis.sadd(keys.workers(S), "new")
        await bus.redis.set(keys.lease(S, "new"), G)
        await give(bus, "new", 1)
        return found

    monkeypatch.setattr(pending, "survey_of", just_before)
    words = () if verb == "retry" else ("why",)
    done = await getattr(bus.admin.pending(G, "task"), verb)(*words)
    assert (done.matched, done.running) == (1, 1)
    assert [owner for owner, _ in (await rows(bus)).values()] == ["new"]
    assert await letters(bus) == []


@pytest.mark.parametrize("verb", ["retry", "dead_letter"])
async def test_one_that_comes_back_to_life_keeps_what_it_has(
    bus: Bus, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped goes on with what it was at."""
    one, other = await give(bus, "dead", 1), await give(bus, FAR, 2)
    place = bus.store.upkeep if verb == "retry" else bus.store
    do = getattr(place, "release" if verb == "retry" else verb)

    async def doing(*args: Any, **others: Any) -> Any:
        await bus.redis.set(keys.lease(S, "dead"), G)
        return await do(*args, **others)

    monkeypatch.setattr(place, "release" if verb == "retry" else verb, doing)
    words = () if verb == "retry" else ("why",)
    done = await getattr(bus.admin.pending(G), verb)(*words)
    assert (done.matched, done.gone) == (2, 1)
    assert (await rows(bus))[one] == ("dead", 1)
    assert await letters(bus) == ([] if verb == "retry" else ["e2"])
    assert (await rows(bus)).get(other, ("", 0))[0] != FAR


# --- lost answers


@pytest.mark.parametrize("verb", ["retry", "dead_letter"])
async def test_what_was_done_before_an_answer_was_lost_is_counted_and_done_once(
    url: str, server: EmbeddedServer, verb: str
) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=TOPICS) as bus:
        await prepare(bus)
        for n in range(3):
            await give(bus, FAR, n)
        words = () if verb == "retry" else ("why",)
        ask = getattr(bus.admin.pending(G), verb)
        for asked in (b"XPENDING", b"SMEMBERS", b"XINFO"):
            proxy.lose(asked, 1)
            await ask(*words, dry_run=True)
        proxy.lose(b"EVALSHA", 1)
        done = await ask(*words)
        assert proxy.lost == 4
        assert (done.matched, done.gone, done.lost) == (3, 0, 0)
        if verb == "retry":
            assert done.released == 3
            assert all(owner != FAR for owner, _ in (await rows(bus)).values())
        else:
            assert done.dead_lettered == 3
            assert sorted(await letters(bus)) == ["e0", "e1", "e2"]


async def test_the_server_that_is_asked_in_between_has_time_for_others(bus: Bus) -> None:
    """No call takes more than a hundred entries."""
    await many(bus, 450)
    calls, release = list[int](), bus.store.upkeep.release

    async def releasing(place: str, group: str, owner: bytes, ids: Any) -> Any:
        calls.append(len(ids))
        return await release(place, group, owner, ids)

    bus.store.upkeep.release = releasing  # type: ignore[method-assign]
    done = await bus.admin.pending(G).retry()
    assert done.released == sum(calls) == 900
    assert max(calls) <= 100


# --- what is half done


async def test_what_is_half_done_never_runs_again_by_a_general_word(bus: Bus) -> None:
    half = await give(bus, keys.HALF_DONE.decode(), 1, count=2)
    parked = await give(bus, FAR, 2)
    found = {e.entry_id: e for e in await listed(bus.admin.pending(G))}
    assert (found[half].state, found[half].due_at) == ("half-done", None)
    assert await ids(bus.admin.pending(G, state="half-done")) == [f"task:0/{half}"]
    assert await ids(bus.admin.pending(G, state="parked")) == [f"task:0/{parked}"]
    said = await bus.admin.pending(G).retry(dry_run=True)
    done = await bus.admin.pending(G).retry()
    assert done == said == Retried(2, released=1, running=0, half_done=1, gone=0, lost=0)
    assert (await rows(bus))[half] == (keys.HALF_DONE.decode(), 2)
    done = await bus.admin.pending(G, ids=half).retry()
    assert (done.released, done.half_done) == (1, 0), "who names it means it"


async def test_what_is_half_done_dies_of_what_it_is(bus: Bus) -> None:
    await give(bus, keys.HALF_DONE.decode(), 1)
    await give(bus, FAR, 2)
    done = await bus.admin.pending(G).dead_letter("looked at")
    assert done.dead_lettered == 2
    found = [(x.reason, x.error) async for x in bus.dead_letters(G)]
    assert sorted(found) == [
        ("effects-failed", "GivenUp: looked at"),
        ("rejected", "GivenUp: looked at"),
    ]


# --- what was agreed to


async def test_what_is_fixed_is_joined_by_nothing(bus: Bus) -> None:
    running = await give(bus, "alive", 1)
    parked = await give(bus, FAR, 2)
    orphan = await give(bus, "dead", 3)
    fixed = await bus.admin.pending(G).fixed()
    late = await give(bus, FAR, 4)
    await bus.redis.xclaim(S, G, FAR, 0, [running])  # it has failed
    await bus.redis.xack(S, G, orphan)
    assert await ids(fixed) == [f"task:0/{running}", f"task:0/{parked}"]
    done = await fixed.dead_letter("why")
    assert done == GivenUp(matched=2, dead_lettered=1, running=1, gone=0, lost=0)
    assert set(await rows(bus)) == {running, late}
    assert (await bus.admin.pending(G).retry(dry_run=True)).released == 2
