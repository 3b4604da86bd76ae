"""Dead letters from outside: found, shown, redriven, purged, exported, whoever wrote them.

Edits are in test_mend.py; what handlers make of letters is in tests/guarantees/test_redrive.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bus import (
    Bus,
    DeclarationError,
    InvalidEvent,
    Letter,
    LetterGone,
    PermissionDenied,
    Redriven,
    ServerRefused,
    Undecodable,
    UnknownGroup,
    UnknownTopic,
    WrongKeyType,
)
from bus.history import redrive
from bus.streams import keys
from bus.streams.answers import Returned
from bus.streams.replies import ReplyError
from bus.streams.script import Script
from tests.eyes import eyes_of
from tests.faults.proxy import Proxy, digest
from tests.history.letters import (
    DEAD,
    INBOX,
    OTHER,
    REASONS,
    STREAM,
    TIGHT,
    TOPIC,
    Posted,
    box_of,
    bury,
    dead,
    found,
    ns_of,
    own,
    prepare,
    put,
    shown,
    why,
)
from tests.servers import ask
from tests.test_docs import ROOT, blocks, run
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.everywhere


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    """A bus on the default server alone, for what the server has no part in."""
    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


# --- finding


async def test_they_come_oldest_first_over_partitions_and_topics(bus: Bus) -> None:
    await bus.topics.record("parcel")
    await put(bus, own(1) | why(), "9-0", OTHER)
    await put(bus, own(2) | why(), "10-1", STREAM)
    await put(bus, own(3) | why(), "10-2", "bus:{parcel:0}")
    await put(bus, own(4) | why(), "10-10", STREAM)
    await put(bus, own(5) | why(), "11-0", OTHER, group="another")
    ids = ["mail:1/9-0", "mail:0/10-1", "parcel:0/10-2", "mail:0/10-10"]
    assert [x.id for x in await found(bus.dead_letters("index"))] == ids
    assert [x.id for x in await found(bus.dead_letters("index", reverse=True))] == ids[::-1]
    assert [x.id for x in await found(bus.dead_letters("index", "parcel"))] == [ids[2]]
    letters = bus.dead_letters("index", "mail")
    assert [x.id for x in await found(letters)] == [ids[0], ids[1], ids[3]]
    assert await letters.count() == 3
    await eyes_of(bus).xdel(DEAD, "10-1")
    assert [x.id for x in await found(letters)] == [ids[0], ids[3]], "it is read anew each time"
    assert await letters.count() == 2


async def test_a_letter_says_what_it_was_and_why_it_died(bus: Bus) -> None:
    fields = own(1, source="/farm", correlationid="c", causationdepth="3")
    letter_id = await put(bus, fields | why("failed", "TimeoutError: too late: 3 s"))
    letter = await bus.dead_letters("index").get(letter_id)
    died_ms = int(letter_id.partition("/")[2].partition("-")[0])
    assert letter.id == letter_id
    assert (letter.group, letter.stream, letter.reason) == ("index", STREAM, "failed")
    assert (letter.error, letter.error_type) == ("TimeoutError: too late: 3 s", "TimeoutError")
    assert (letter.traceback, letter.attempts, letter.applied) == ("line 1\nline 2", 5, ())
    assert letter.died_at.timestamp() * 1000 == pytest.approx(died_ms)
    assert letter.published_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert letter.original_entry_id == "1700000000000-7"
    assert letter.event == Posted(box=box_of(0), n=1)
    envelope = letter.envelope
    assert (envelope.stream, envelope.entry_id) == (STREAM, "1700000000000-7")
    assert (envelope.event_id, envelope.type, envelope.key) == ("e1", "mail.posted", box_of(0))
    assert (envelope.source, envelope.correlation_id, envelope.causation_depth) == ("/farm", "c", 3)
    shown_of_it = repr(letter) + repr(Redriven(1, 0, 0, 0, (), sample=(letter,)))
    assert not [word for word in ("line 1", "too late", box_of(0)) if word in shown_of_it]
    assert letter_id in shown_of_it


async def test_effects_that_failed_name_what_was_applied(valkey: Bus) -> None:
    await put(
        valkey, own(1) | why("effects-failed", "EffectsFailed: x", deadapplied="INCRBY a\nSET b")
    )
    (letter,) = await found(valkey.dead_letters("index"))
    assert letter.applied == ("INCRBY a", "SET b")
    assert "INCRBY" not in repr(letter)
    assert letter.event == Posted(box=box_of(0), n=1)
    assert b"deadapplied" not in letter.fields


@pytest.fixture
async def varied(valkey: Bus) -> Bus:
    """Letters 1 to 6, one of each reason, a minute apart, of two types and different errors."""
    errors = (
        "TimeoutError: no answer",
        "Reject: ConnectionRefused",
        "Undecodable: mail.posted: bad",
        "UnknownEventType: what",
        "Crashed: [Errno 111] connection refused",
        "EffectsFailed: x",
    )
    for n, (reason, error) in enumerate(zip(REASONS, errors, strict=True), 1):
        fields = own(n, type="mail.posted" if n % 2 else "mail.sorted")
        await put(valkey, fields | why(reason, error), f"{n * 60_000}-0")
    return valkey


@pytest.mark.parametrize(
    ("filters", "ns"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"types": Posted}, [1, 3, 5]),
        ({"types": ["mail.sorted"]}, [2, 4, 6]),
        ({"types": "*.posted"}, [1, 3, 5]),
        ({"types": []}, []),
        ({"error": "TimeoutError"}, [1]),
        ({"error": "Timeout*"}, [1]),
        ({"error": "timeout*"}, []),
        ({"error": "*connection refused*"}, [5]),
        ({"error": "* connection refused"}, [5]),
        ({"error": "?imeoutError"}, [1]),
        ({"error": "[TR]*"}, []),
        ({"error": "*[Errno 111]*"}, [5]),
        ({"error": "*[Errno 999]*"}, []),
        ({"error": "*[!a-z]*"}, []),
        ({"error": "no answer"}, []),
        ({"reason": "failed"}, [1]),
        ({"reason": ["rejected", "effects-failed"]}, [2, 6]),
        ({"reason": []}, []),
        ({"since": 120_000}, [2, 3, 4, 5, 6]),
        ({"until": "120000-0"}, [1, 2]),
        ({"since": "1970-01-01T00:03:00", "until": timedelta}, [3, 4]),
        ({"since": "@-1h"}, []),
        ({"ids": ["mail:0/60000-0", "300000-0", "mail:1/120000-0", "7-7"]}, [1, 5]),
        ({"ids": "mail:0/60000-0"}, [1]),
        ({"ids": []}, []),
        ({"ids": ["60000-0", "120000-0", "60000-0"], "reverse": True}, [2, 1]),
        ({"ids": ["60000-0", "120000-0"], "reason": "failed"}, [1]),
        ({"where": lambda letter: letter.envelope.event_id in ("e2", "e5")}, [2, 5]),
        ({"where": lambda letter: letter.event.n > 1}, [3, 5]),
        ({"types": Posted, "reason": ["failed", "rejected"], "error": "T*"}, [1]),
    ],
    ids=shown,
)
async def test_filters_find_what_they_name(
    varied: Bus, filters: dict[str, Any], ns: list[int]
) -> None:
    if filters.get("until") is timedelta:
        filters = filters | {"until": datetime.fromtimestamp(240, UTC)}
    letters = varied.dead_letters("index", **filters)
    assert [int(x.envelope.event_id[1:]) for x in await found(letters)] == ns
    assert await letters.count() == len(ns)


async def waits(*_: Any) -> bool:
    return False


def yields(_: Any) -> Iterator[bool]:
    yield False


class Waiting:
    async def __call__(self, _: Any) -> bool:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": "a b"}, "group name 'a b' is not valid"),
        ({"topic": "a:b"}, "topic name 'a:b' is not valid"),
        ({"types": "a b"}, "type pattern 'a b' is not valid"),
        ({"error": ValueError}, "error is a pattern such as"),
        ({"reason": "faild"}, "'faild' is no reason: there are failed, rejected, undecodable, new"),
        ({"reason": ["failed", 3]}, "3 is no reason"),
        ({"since": "yesterday"}, "'yesterday' is no position"),
        ({"until": -1}, "-1 is no position"),
        ({"since": 2, "until": 1}, "ends before it begins"),
        (
            {"ids": "12"},
            "'12' is no id of a dead letter: they look like document:0/1763629200000-0",
        ),
        ({"ids": ["mail/1-0"]}, "is no id"),
        ({"ids": ["mail:0/1-0", 7]}, "7 is no id"),
        ({"ids": "mail:x/1-0"}, "is no id"),
        ({"ids": "mail:0/18446744073709551616-0"}, "is no id"),
        ({"ids": "a b:0/1-0"}, "topic name 'a b' is not valid"),
        ({"ids": "parcel:0/1-0", "topic": "mail"}, "is of the topic parcel, not of mail"),
        ({"ids": "1-0", "since": 1}, "leave since and until out"),
        ({"where": "n > 1"}, "where is a function of a letter"),
        ({"where": waits}, "where must be a plain function of a letter, neither async nor a gen"),
        ({"where": partial(waits, 1)}, "where must be a plain function of a letter"),
        ({"where": Waiting()}, "where must be a plain function of a letter"),
        ({"where": yields}, "where must be a plain function of a letter"),
    ],
    ids=shown,
)
async def test_bad_arguments_are_told_at_once(valkey: Bus, arguments: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(message)):
        valkey.dead_letters(**{"group": "index"} | arguments)
    with pytest.raises(TypeError):
        valkey.dead_letters("index", kind="x")  # type: ignore[call-arg]


@pytest.mark.parametrize("verb", ["count", "redrive", "purge"])
async def test_an_answer_that_is_to_be_awaited_takes_nothing(valkey: Bus, verb: str) -> None:
    """A coroutine is always true: it would take, and purge, every letter."""
    await bury(valkey, *range(5))
    letters = valkey.dead_letters("index", where=lambda letter: waits(letter, 1))  # type: ignore[arg-type,return-value]
    with pytest.raises(DeclarationError, match="where gave a coroutine, to be awaited"):
        await getattr(letters, verb)()
    assert await ns_of(valkey, DEAD) == list(range(5))


async def test_unknown_groups_and_topics_are_errors_and_no_letters_are_none(bus: Bus) -> None:
    for stream in (STREAM, OTHER):
        await eyes_of(bus).xgroup_destroy(stream, "index")
    with pytest.raises(UnknownGroup, match="no topic has a group index: there are: none"):
        await found(bus.dead_letters("index"))
    await eyes_of(bus).xgroup_create(OTHER, "indexes", "0", mkstream=True)
    for read in ("count", "redrive", "purge"):
        with pytest.raises(
            UnknownGroup, match=r"did you mean indexes\? there are: indexes\. A wor"
        ):
            await getattr(bus.dead_letters("index"), read)()
    with pytest.raises(UnknownGroup, match="topic mail has no group index"):
        await bus.dead_letters("index", "mail").get("1-0")
    with pytest.raises(UnknownGroup):
        await found(bus.dead_letters("index", ids="1-0"))
    with pytest.raises(UnknownTopic, match=r"no topic mial: did you mean mail\?"):
        await found(bus.dead_letters("indexes", "mial"))
    assert await found(bus.dead_letters("indexes")) == []
    assert await bus.dead_letters("indexes", "mail").count() == 0
    assert (await bus.dead_letters("indexes").redrive()).matched == 0
    await bury(bus, 1)
    await eyes_of(bus).xtrim(DEAD, 0)
    assert await found(bus.dead_letters("index")) == [], "it had some once"


async def test_one_is_got_by_its_id_or_is_gone(valkey: Bus) -> None:
    await bury(valkey, 1)
    await put(valkey, own(2) | why(), "5-5", OTHER)
    one = await put(valkey, own(3) | why(), "9999999999999-5", STREAM)
    letters = valkey.dead_letters("index", reason="crashed")
    assert (await letters.get(one)).envelope.event_id == "e3"
    assert (await letters.get("5-5")).id == "mail:1/5-5"
    for gone in ("mail:0/5-5", "mail:7/5-5", "6-6", "other:0/5-5"):
        with pytest.raises(LetterGone, match=f"no dead letter {gone}: it was redriven or purged"):
            await letters.get(gone)
    with pytest.raises(DeclarationError, match="is no id"):
        await letters.get("5")
    await put(valkey, own(4) | why(), "9999999999999-5", OTHER)
    with pytest.raises(
        DeclarationError, match="name mail:0/9999999999999-5, mail:1/9999999999999-5"
    ):
        await letters.get("9999999999999-5")


async def test_pages_join_without_a_seam_and_what_comes_later_is_not_found(valkey: Bus) -> None:
    pipe = eyes_of(valkey).pipeline()
    for n in range(1_300):
        pipe.xadd((DEAD, f"{OTHER}:dead:index")[n % 3 == 0], own(n) | why())
    await pipe.execute()
    seen = []
    async for letter in valkey.dead_letters("index"):
        if not seen:
            await bury(valkey, 5_000)
        seen.append(letter.event.n)
    assert sorted(seen) == list(range(1_300))
    assert await valkey.dead_letters("index").count() == 1_301


async def test_what_is_fixed_is_joined_by_nothing(valkey: Bus) -> None:
    await bury(valkey, 1, 2, 3)
    await bury(valkey, 4, stream=OTHER)
    everything = valkey.dead_letters("index")
    fixed = await everything.fixed()
    await bury(valkey, 5)
    await bury(valkey, 6, stream=OTHER)
    assert sorted([x.event.n async for x in fixed]) == [1, 2, 3, 4]
    assert (await fixed.count(), await everything.count()) == (4, 6)
    assert (await fixed.purge()).purged == 4
    assert sorted([x.event.n async for x in everything]) == [5, 6]
    assert (await fixed.purge()).matched == 0
    with pytest.raises(UnknownGroup):
        await valkey.dead_letters("indexx").fixed()


# --- what others wrote


async def test_entries_that_nobody_of_us_wrote_are_letters_too(bus: Bus) -> None:
    await put(bus, {"hello": "world"}, "1-0")
    await put(
        bus, {b"\xff": b"\xfe", b"id": b"\xff", b"type": b"mail.\xff", b"deaderror": b"\xff"}, "2-0"
    )
    await put(bus, own(3) | {"deadreason": "bored", "deadattempts": "-4", "deadentry": "x"}, "3-0")
    await put(bus, {"deadreason": "effects-failed", "deaderror": "E: e"}, "999999999999999-0")
    letters = await found(bus.dead_letters("index"))
    assert [x.reason for x in letters] == ["", "", "bored", "effects-failed"]
    assert [x.attempts for x in letters] == [0, 0, 0, 0]
    assert [x.original_entry_id for x in letters] == [x.entry_id for x in letters]
    assert [x.error_type for x in letters] == ["", "", "", "E"]
    assert letters[1].error == "\ufffd"
    assert letters[0].fields == (b"hello", b"world")
    assert letters[3].fields == ()
    assert letters[3].died_at.year == 9999
    for letter in (letters[0], letters[1], letters[3]):
        with pytest.raises(Undecodable):
            _ = letter.event
    assert letters[2].event == Posted(box=box_of(0), n=3)
    result = await bus.dead_letters("index").redrive()
    assert (result.matched, result.redriven) == (4, 4)
    inbox = [fields for _, fields in await eyes_of(bus).xrange(INBOX)]
    assert inbox[0] == {
        b"hello": b"world",
        b"origentry": b"1-0",
        b"attempts": b"0",
        b"due": b"0",
        b"run": result.run.encode(),
    }
    assert inbox[1][b"\xff"] == b"\xfe"
    assert b"deaderror" not in inbox[1]
    assert inbox[3].keys() == {b"origentry", b"attempts", b"due", b"run"}


async def test_only_what_was_appended_is_taken_off(bus: Bus, server: Any) -> None:
    """Fields of an event may have any name, twice, also those of dead letters and inboxes."""
    events = [
        [
            "id",
            "e1",
            "type",
            "mail.posted",
            "data",
            "{}",
            "deadreason",
            "mine",
            "deadapplied",
            "no",
        ],
        ["a", "1", "a", "2", "deadtime", "1", "deadentry", "2", "deadreason", "3", "run", "r"],
        ["deadfields", "no msgpack"],
        ["deadfields", msgspec.msgpack.encode([b"a"])],
        ["run", "x", "attempts", "7", "deadtime", "3"],
        [],
    ]
    appended = [str(w) for pair in why().items() for w in pair]
    for fields in events:
        ask(server, "XADD", DEAD, "*", *fields, *appended)
    letters = await found(bus.dead_letters("index"))
    wanted = [tuple(f if isinstance(f, bytes) else f.encode() for f in fields) for fields in events]
    assert [x.fields for x in letters] == wanted
    run = (await bus.dead_letters("index").redrive()).run
    more = ("origentry", "1700000000000-7", "attempts", "0", "due", "0", "run", run)
    entries = [entry for _, entry in await bus.store.archive.range(INBOX, "-", "+", 100)]
    assert [tuple(e) for e in entries] == [w + tuple(x.encode() for x in more) for w in wanted]


async def test_others_may_append_in_any_order_and_each_name_once(bus: Bus, server: Any) -> None:
    fields = ["id", "e1", "deaderror", "mine", "deaderror", "theirs", "deadtime", "1"]
    ask(server, "XADD", DEAD, "*", *fields, "deadreason", "rejected")
    (letter,) = await found(bus.dead_letters("index"))
    assert letter.fields == (b"id", b"e1", b"deaderror", b"mine")
    assert (letter.error, letter.reason) == ("theirs", "rejected")


@pytest.mark.servers_only("Lua packs them")
@pytest.mark.parametrize("by", ["python", "lua"])
async def test_many_fields_that_lie_packed_are_unpacked(bus: Bus, server: Any, by: str) -> None:
    many = ["id", "e1", "type", "mail.posted", "data", '{"box":"b"}']
    many += [w for n in range(1_500) for w in (f"f{n}", "x" * (n % 300))]
    plain = [w.encode() for w in many] + [b"odd", b"\xff\xfe", b"long", b"y" * 70_000]
    if by == "python":
        packed = msgspec.msgpack.encode(plain)
    else:
        ask(server, "RPUSH", "list", *plain)
        script = "return cmsgpack.pack(redis.call('LRANGE', KEYS[1], 0, -1))"
        packed = await eyes_of(bus).eval(script, 1, "list")
    await put(bus, {"deadfields": packed} | why())
    (letter,) = await found(bus.dead_letters("index"))
    assert letter.fields == tuple(plain)
    assert letter.event == Posted(box="b")
    assert (await bus.dead_letters("index").redrive()).redriven == 1
    ((_, entry),) = await bus.store.archive.range(INBOX, "-", "+", 10)
    assert entry[: len(plain)] == plain
    assert entry[len(plain) : len(plain) + 2] == [b"origentry", b"1700000000000-7"]
    assert await dead(bus) == []


async def test_what_has_too_many_fields_for_a_script_stays_and_is_named(
    bus: Bus, server: Any
) -> None:
    await bury(bus, 1)
    ask(server, "XADD", DEAD, "*", *["f", "v"] * 4_000, *[str(w) for p in why().items() for w in p])
    await bury(bus, 3)
    (_, second, _) = await found(bus.dead_letters("index"))
    result = await bus.dead_letters("index").redrive()
    assert (result.matched, result.redriven, result.stuck) == (3, 2, (second.id,))
    assert [x.id for x in await found(bus.dead_letters("index"))] == [second.id]
    assert await ns_of(bus, INBOX) == [1, 3]


async def test_a_key_of_another_type_is_told_and_nothing_is_moved(bus: Bus, server: Any) -> None:
    await bury(bus, 1)
    ask(server, "SET", INBOX, "precious")
    with pytest.raises(WrongKeyType, match="inbox:index"):
        await bus.dead_letters("index").redrive()
    assert await bus.dead_letters("index").count() == 1
    assert ask(server, "GET", INBOX) == b"$8\r\nprecious\r\n"


async def test_one_key_of_another_type_does_not_hide_the_letters_of_the_others(
    bus: Bus, server: Any
) -> None:
    await bus.topics.record("parcel")
    key = "bus:{parcel:0}:dead:index"
    ask(server, "SET", key, "precious")
    first, second = await bury(bus, 1, 2)
    witness = Witness(bus)
    letters = bus.dead_letters("index")
    assert [x.id for x in await found(letters)] == [first, second]
    assert await letters.count() == 2
    assert (await letters.get(first)).id == first
    assert (await letters.get(first.partition("/")[2])).id == first
    picked = bus.dead_letters("index", ids=[second, "7-7"])
    assert [x.id for x in await found(picked)] == [second]
    told = witness.of("dead_letters.unreadable", stream="bus:{parcel:0}", group="index")
    assert len(told) == len(witness.of("dead_letters.unreadable")) == 4
    assert key in told[0]["error"]
    # Who asks for that topic, or for a letter there, is told by an error.
    for asked in (
        bus.dead_letters("index", "parcel"),
        bus.dead_letters("index", "parcel", ids="7-7"),
        bus.dead_letters("index", ids=[second, "parcel:0/7-7"]),
    ):
        with pytest.raises(WrongKeyType, match=re.escape(key)):
            await found(asked)
    with pytest.raises(WrongKeyType, match=re.escape(key)):
        await letters.get("parcel:0/7-7")
    assert (await letters.redrive()).redriven == 2
    assert ask(server, "GET", key) == b"$8\r\nprecious\r\n"


async def test_a_key_of_another_type_in_a_topic_that_was_asked_for_is_an_error(
    valkey: Bus,
) -> None:
    (letter_id,) = await bury(valkey, 1)
    await eyes_of(valkey).set(f"{OTHER}:dead:index", "precious")
    some = {"ids": letter_id.partition("/")[2]}  # it may be in any partition
    for verb, filters in product(("count", "redrive", "purge"), ({}, some)):
        with pytest.raises(WrongKeyType, match=re.escape(f"{OTHER}:dead:index")):
            await getattr(valkey.dead_letters("index", "mail", **filters), verb)()
    assert await ns_of(valkey, DEAD) == [1]


# --- redrive


async def test_a_redriven_letter_is_in_the_inbox_and_nowhere_else(bus: Bus) -> None:
    witness = Witness(bus)
    first, *_ = await bury(bus, 1, 2)
    await bury(bus, 3, stream=OTHER)
    result = await bus.dead_letters("index").redrive()
    assert re.fullmatch(r"redrive-[0-9a-f]{16}", result.run)
    assert result == Redriven(3, 3, 0, 0, (), result.run, unserved=True)
    assert await dead(bus) == await dead(bus, f"{OTHER}:dead:index") == []
    entries = [fields for _, fields in await eyes_of(bus).xrange(INBOX)]
    assert [e[b"id"] for e in entries] == [b"e1", b"e2"]
    assert entries[0] == {k.encode(): v.encode() for k, v in own(1).items()} | {
        b"origentry": b"1700000000000-7",
        b"attempts": b"0",
        b"due": b"0",
        b"run": result.run.encode(),
    }
    assert await ns_of(bus, f"{OTHER}:inbox:index") == [3]
    (group,) = await eyes_of(bus).xinfo_groups(INBOX)
    assert (group["name"], group["last-delivered-id"]) == (b"index", b"0-0")
    told = witness.of("dead_letters.redriven", run=result.run, group="index")
    assert sorted((t["stream"], t["count"]) for t in told) == [(STREAM, 2), (OTHER, 1)]
    with pytest.raises(LetterGone):
        await bus.dead_letters("index").get(first)


async def test_an_existing_inbox_and_its_group_stay_as_they_are(bus: Bus) -> None:
    await eyes_of(bus).xadd(INBOX, own(9))
    await eyes_of(bus).xgroup_create(INBOX, "index", "0")
    await eyes_of(bus).xreadgroup("index", "c", {INBOX: ">"})
    await bury(bus, 1)
    await bus.dead_letters("index").redrive()
    (group,) = await eyes_of(bus).xinfo_groups(INBOX)
    assert group["pending"] == 1
    assert await ns_of(bus, INBOX) == [9, 1]


async def test_a_group_made_for_an_inbox_misses_nothing_that_is_there(bus: Bus) -> None:
    await eyes_of(bus).xadd(INBOX, own(9))
    await bury(bus, 1)
    await bus.dead_letters("index").redrive()
    (given,) = await eyes_of(bus).xreadgroup("index", "c", {INBOX: ">"})
    assert [fields[b"id"] for _, fields in given[1]] == [b"e9", b"e1"]


async def test_only_what_was_asked_for_goes_up_to_the_limit(valkey: Bus) -> None:
    await bury(valkey, *range(10))
    letters = valkey.dead_letters("index", where=lambda letter: letter.event.n % 2 == 0)
    result = await letters.redrive(limit=3)
    assert (result.matched, result.redriven) == (3, 3)
    assert await ns_of(valkey, INBOX) == [0, 2, 4]
    newest = valkey.dead_letters("index", reverse=True)
    assert (await newest.redrive(limit=2)).redriven == 2
    assert await ns_of(valkey, INBOX) == [0, 2, 4, 9, 8]
    assert await ns_of(valkey, DEAD) == [1, 3, 5, 6, 7]


async def test_a_dry_run_counts_and_shows_and_changes_nothing(valkey: Bus) -> None:
    await bury(valkey, *range(30))
    before = await eyes_of(valkey).xrange(DEAD)
    witness = Witness(valkey)
    result = await valkey.dead_letters("index").redrive(dry_run=True, edit={"n": 5}, limit=25)
    assert (result.matched, result.redriven, result.run) == (25, 0, "")
    assert [x.event.n for x in result.sample] == list(range(10))
    with pytest.raises(InvalidEvent, match="field n: Expected `int`"):
        await valkey.dead_letters("index").redrive(dry_run=True, edit={"n": "x"})
    purge = await valkey.dead_letters("index").purge(dry_run=True)
    assert (purge.matched, purge.purged, purge.gone) == (30, 0, 0)
    assert [x.event.n for x in purge.sample] == list(range(10))
    assert await eyes_of(valkey).xrange(DEAD) == before
    assert not await eyes_of(valkey).exists(INBOX)
    assert witness.seen == []


async def test_a_rate_is_kept(valkey: Bus) -> None:
    await bury(valkey, *range(12))
    loop = asyncio.get_running_loop()
    started = loop.time()
    result = await valkey.dead_letters("index").redrive(rate=20)
    took_s = loop.time() - started
    assert result.redriven == 12
    assert 0.4 < took_s < 1.5, "twelve at twenty a second, in steps of two"


async def test_a_call_takes_no_more_than_about_a_mebibyte(valkey: Bus) -> None:
    witness = Witness(valkey)
    for n in range(10):
        await put(valkey, own(n, junk="x" * 300_000) | why())
    assert (await valkey.dead_letters("index").redrive()).redriven == 10
    assert [t["count"] for t in witness.of("dead_letters.redriven")] == [3, 3, 3, 1]


async def test_progress_is_told_on_the_way_and_in_the_end(valkey: Bus, monkeypatch: Any) -> None:
    monkeypatch.setattr(redrive, "PROGRESS_S", 0)
    await bury(valkey, *range(250))
    told: list[Redriven] = []
    result = await valkey.dead_letters("index").redrive(progress=told.append)
    assert [t.matched for t in told] == sorted(t.matched for t in told)
    assert sorted({t.redriven for t in told}) == [0, 100, 200, 250]
    assert told[-1] == result
    await bury(valkey, 1)

    async def later(so_far: Redriven) -> None:
        await asyncio.sleep(0)
        told.append(so_far)

    await valkey.dead_letters("index").redrive(progress=later)
    assert told[-1].redriven == 1


@pytest.mark.parametrize("how", ["dry run", "left out", "stuck"])
async def test_progress_is_told_while_nothing_is_sent(
    valkey: Bus, monkeypatch: Any, how: str
) -> None:
    monkeypatch.setattr(redrive, "PROGRESS_S", 0)
    if how == "stuck":
        monkeypatch.setattr(redrive, "REDRIVEN_VALUES", 2)
    await bury(valkey, *range(30))
    told: list[int] = []
    await valkey.dead_letters("index").redrive(
        dry_run=how == "dry run",
        edit=(lambda _: None) if how == "left out" else None,
        progress=lambda so_far: told.append(so_far.matched),
    )
    assert told[:30] == list(range(1, 31))


async def test_progress_is_told_seldom(valkey: Bus, monkeypatch: Any) -> None:
    monkeypatch.setattr(redrive, "PROGRESS_S", 3_600)
    await bury(valkey, *range(250))
    told: list[Redriven] = []
    await valkey.dead_letters("index").redrive(progress=told.append)
    assert [t.redriven for t in told] == [0, 250], "as it begins, and in the end"


async def test_an_error_of_the_progress_says_how_far_it_was(valkey: Bus) -> None:
    await bury(valkey, 1, 2)

    def full(so_far: Redriven) -> None:
        if so_far.redriven:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        await valkey.dead_letters("index").redrive(progress=full)
    assert caught.value.__notes__ == ["2 dead letters were redriven before; run it again"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be a whole number"),
        ({"limit": 1.5}, "limit must be a whole number"),
        ({"rate": 0}, "rate must be a number"),
        ({"edit": "n=5"}, "edit is a mapping"),
        ({"edit": waits}, "edit must be a plain function of a letter, neither async nor"),
        ({"progress": 3}, "progress is a function"),
    ],
    ids=shown,
)
async def test_bad_orders_are_refused_before_anything_is_done(
    valkey: Bus, arguments: Any, message: str
) -> None:
    await bury(valkey, 1)
    with pytest.raises(DeclarationError, match=message):
        await valkey.dead_letters("index").redrive(**arguments)
    if "limit" in arguments:
        with pytest.raises(DeclarationError, match=message):
            await valkey.dead_letters("index").purge(**arguments)
    assert await valkey.dead_letters("index").count() == 1


async def test_what_dies_again_meanwhile_is_not_redriven_again(valkey: Bus) -> None:
    """Else a redrive of what fails at once would never end."""
    await bury(valkey, *range(150))

    async def die_again(so_far: Redriven) -> None:
        await bury(valkey, 1_000 + so_far.redriven)

    result = await valkey.dead_letters("index").redrive(progress=die_again)
    assert result.redriven == 150
    assert all(n >= 1_000 for n in await ns_of(valkey, DEAD))


async def test_of_two_redrives_at_once_each_letter_goes_with_one(bus: Bus) -> None:
    await bury(bus, *range(500))
    async with Bus.connect(bus.address) as other:
        both = await asyncio.gather(
            *(b.dead_letters("index").redrive() for b in (bus, other, bus, other))
        )
    assert sum(r.redriven for r in both) == 500
    assert all(r.matched == r.redriven + r.gone for r in both)
    assert sorted(await ns_of(bus, INBOX)) == list(range(500))
    assert await dead(bus) == []


async def test_a_full_inbox_is_waited_for_and_told_once(url: str) -> None:
    async with Bus.connect(url, topics=[TIGHT]) as bus:
        await prepare(bus)
        witness = Witness(bus)
        await bury(bus, *range(35))
        told: list[Redriven] = []
        task = asyncio.create_task(bus.dead_letters("index").redrive(progress=told.append))
        await eventually(lambda: witness.of("redrive.waits"))
        for left in (25, 15, 5):
            await eventually(lambda left=left: _length(bus, DEAD, left))
            assert await eyes_of(bus).xlen(INBOX) == 10
            if left == 25:
                await eventually(lambda: told[-1].waiting)
            for entry_id, _ in await eyes_of(bus).xrange(INBOX):
                await eyes_of(bus).xdel(INBOX, entry_id)
        result = await asyncio.wait_for(task, 10)
    assert (result.matched, result.redriven, result.waiting) == (35, 35, False)
    (waits,) = witness.of("redrive.waits")
    assert (waits["stream"], waits["group"], waits["count"]) == (STREAM, "index", 25)
    assert witness.total("dead_letters.redriven") == 35


async def _length(bus: Bus, key: str, length: int) -> bool:
    return bool(await eyes_of(bus).xlen(key) == length)


async def test_one_full_inbox_lets_nobody_overtake_and_a_cancelled_wait_does_no_harm(
    url: str,
) -> None:
    async with Bus.connect(url, topics=[TIGHT]) as bus:
        await prepare(bus)
        witness = Witness(bus)
        await bury(bus, *range(15))
        task = asyncio.create_task(bus.dead_letters("index").redrive())
        await eventually(lambda: witness.of("redrive.waits"))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await ns_of(bus, INBOX) == list(range(10))
        assert await ns_of(bus, DEAD) == list(range(10, 15))


async def test_a_raised_mark_makes_room_for_a_redrive_that_waits(valkey_url: str) -> None:
    async with Bus.connect(valkey_url, topics=[TIGHT]) as bus:
        await prepare(bus)
        witness = Witness(bus)
        await bury(bus, *range(35))
        task = asyncio.create_task(bus.dead_letters("index").redrive())
        await eventually(lambda: witness.of("redrive.waits"))
        record = json.loads(await eyes_of(bus).hget("bus:topics", "mail"))
        await eyes_of(bus).hset("bus:topics", "mail", json.dumps(record | {"maxlen": 400}))
        assert (await asyncio.wait_for(task, 10)).redriven == 35


# --- when the server is in trouble


@pytest.mark.servers_only("connections break")
async def test_after_lost_answers_the_counts_are_right_and_each_is_there_once(
    server: Any, url: str
) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=[TOPIC]) as bus:
        await prepare(bus)
        await bury(bus, *range(250))
        await bury(bus, *range(250, 300), stream=OTHER)
        witness = Witness(bus)
        proxy.lose(digest(Script("redrive")), 3)
        result = await bus.dead_letters("index").redrive()
        assert proxy.lost == 3
        assert (result.matched, result.redriven, result.gone) == (300, 300, 0)
        assert len(witness.of("redrive.retried")) == 3
        ns = await ns_of(bus, INBOX) + await ns_of(bus, f"{OTHER}:inbox:index")
        assert sorted(ns) == list(range(300))
        assert witness.total("dead_letters.redriven") == 300


@pytest.mark.servers_only("connections break")
async def test_a_lost_answer_of_a_purge_counts_what_is_gone_as_purged(
    server: Any, url: str
) -> None:
    async with Proxy(server.port) as proxy, Bus.connect(proxy.url, topics=[TOPIC]) as bus:
        await bury(bus, *range(20))
        proxy.lose(b"XDEL", 1)
        result = await bus.dead_letters("index").purge()
        assert proxy.lost == 1
    assert (result.matched, result.purged, result.gone) == (20, 20, 0)


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_server_that_refuses_is_asked_for_a_while_and_then_it_is_an_error(
    private_server: Any, monkeypatch: Any, server_kind: str
) -> None:
    monkeypatch.setattr(redrive, "REDRIVE_PATIENCE_S", 1)
    server = private_server(server_kind)
    async with Bus.connect(server.url, topics=[TOPIC]) as bus:
        await prepare(bus)
        await bury(bus, *range(3))
        witness = Witness(bus)
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(ServerRefused, match="OOM") as caught:
            await bus.dead_letters("index").redrive()
        assert caught.value.code == "OOM"
        assert len(witness.of("redrive.retried", stream=STREAM, group="index", count=3)) > 1
        assert await eyes_of(bus).xlen(INBOX) == 0
        assert await ns_of(bus, DEAD) == [0, 1, 2]
        monkeypatch.setattr(redrive, "REDRIVE_PATIENCE_S", 20)
        task = asyncio.create_task(bus.dead_letters("index").redrive())
        retried = len(witness.of("redrive.retried"))
        await eventually(lambda: len(witness.of("redrive.retried")) > retried)
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        assert (await task).redriven == 3


@pytest.mark.servers_only("it takes an access list")
@pytest.mark.parametrize("command", ["xadd", "xdel", "xgroup", "set", "get", "xlen"])
async def test_a_right_that_is_missing_moves_nothing(server: Any, url: str, command: str) -> None:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await prepare(bus)
        await bury(bus, 1, 2)
    ask(server, "ACL", "SETUSER", "half", "on", ">pw", "~*", "+@all")
    try:
        async with Bus.connect(url.replace("redis://", "redis://half:pw@"), topics=[TOPIC]) as half:
            ask(server, "ACL", "SETUSER", "half", f"-{command}")
            with pytest.raises(PermissionDenied):
                await half.dead_letters("index").redrive()
    finally:
        ask(server, "ACL", "DELUSER", "half")
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        assert await ns_of(bus, DEAD) == [1, 2]
        assert await eyes_of(bus).xlen(INBOX) == 0


# --- the script


def letters_of(ids: list[bytes]) -> list[tuple[bytes, str, int, list[Any]]]:
    return [(i, "5-5", 8, []) for i in ids]


async def test_a_repeated_call_is_answered_as_it_was_and_moves_nothing_more(bus: Bus) -> None:
    await bury(bus, 1, 2, 3)
    archive, ids = bus.store.archive, [i for i, _ in await eyes_of(bus).xrange(DEAD)]
    asked = letters_of([*ids[:2], b"7-7"])
    first = await archive.redrive(STREAM, "index", "redrive-1", 4, 1, asked)
    assert first == [Returned.YES, Returned.FULL, Returned.GONE]
    await eyes_of(bus).xtrim(INBOX, 0)  # it was handled meanwhile
    assert await archive.redrive(STREAM, "index", "redrive-1", 4, 1, asked) == first
    assert await eyes_of(bus).xlen(INBOX) == 0
    assert await ns_of(bus, DEAD) == [2, 3]
    assert 0 < await eyes_of(bus).ttl(keys.redrive(STREAM, "redrive-1")) <= 600
    # Another run, or the next call, is no repeat; one from before does nothing.
    other = await archive.redrive(STREAM, "index", "redrive-2", 4, 9, letters_of(ids[:2]))
    assert other == [Returned.GONE, Returned.YES]
    again = await archive.redrive(STREAM, "index", "redrive-1", 10, 9, letters_of(ids))
    assert again == [Returned.GONE, Returned.GONE, Returned.YES]
    with pytest.raises(ReplyError, match="STALE"):
        await archive.redrive(STREAM, "index", "redrive-1", 9, 9, letters_of(ids))


async def test_a_letter_twice_in_one_call_goes_once(bus: Bus) -> None:
    await bury(bus, 1)
    ((entry_id, _),) = await eyes_of(bus).xrange(DEAD)
    asked = letters_of([entry_id, entry_id])
    answer = await bus.store.archive.redrive(STREAM, "index", "redrive-1", 1, 9, asked)
    assert answer == [Returned.YES, Returned.GONE]
    assert await ns_of(bus, INBOX) == [1]


async def test_a_call_that_moves_nothing_makes_nothing(bus: Bus) -> None:
    await bury(bus, 1)
    archive = bus.store.archive
    assert await archive.redrive(STREAM, "index", "r", 1, 9, letters_of([b"1-1"])) == [
        Returned.GONE
    ]
    ids = [i for i, _ in await eyes_of(bus).xrange(DEAD)]
    assert await archive.redrive(STREAM, "index", "r", 1, 0, letters_of(ids)) == [Returned.FULL]
    assert await eyes_of(bus).exists(INBOX, keys.redrive(STREAM, "r")) == 0


# --- purge


async def test_purged_letters_are_gone_and_nothing_else(bus: Bus) -> None:
    witness = Witness(bus)
    await bury(bus, *range(6))
    for n in (6, 7):
        await put(bus, own(n) | why(), f"9999999999999-{n}", OTHER)
    letters = bus.dead_letters("index", where=lambda letter: letter.event.n % 2 == 0)
    result = await letters.purge(limit=2)
    assert (result.matched, result.purged, result.gone, result.sample) == (2, 2, 0, ())
    assert await ns_of(bus, DEAD) == [1, 3, 4, 5]
    assert (await letters.purge()).purged == 2
    assert await ns_of(bus, DEAD) == [1, 3, 5]
    assert await ns_of(bus, f"{OTHER}:dead:index") == [7]
    assert witness.total("dead_letters.purged", group="index") == 4
    assert await eyes_of(bus).exists(INBOX) == 0


async def test_an_error_of_a_purge_says_how_many_are_gone(valkey: Bus) -> None:
    await bury(valkey, *range(700))

    def picky(letter: Letter) -> bool:
        return 1 / (letter.event.n - 600) < 2  # type: ignore[attr-defined,no-any-return]

    with pytest.raises(ZeroDivisionError) as caught:
        await valkey.dead_letters("index", where=picky).purge()
    assert caught.value.__notes__ == ["500 dead letters were deleted before; run it again"]
    assert await ns_of(valkey, DEAD) == list(range(500, 700))
    with pytest.raises(ZeroDivisionError) as caught:
        await valkey.dead_letters("index", where=picky).purge()
    assert not hasattr(caught.value, "__notes__"), "none was"


async def test_what_somebody_else_purges_first_is_counted_as_gone(valkey: Bus) -> None:
    await bury(valkey, *range(1_200))
    async with Bus.connect(valkey.address) as other:
        both = await asyncio.gather(*(b.dead_letters("index").purge() for b in (valkey, other)))
    assert sum(r.purged for r in both) == 1_200
    assert all(r.matched == r.purged + r.gone for r in both)
    assert await valkey.dead_letters("index").count() == 0


@pytest.mark.servers_only("it runs in another process")
async def test_the_example_of_the_operations_document_goes_as_written(
    valkey: Bus, tmp_path: Path
) -> None:
    await eyes_of(valkey).xgroup_create(STREAM, "receipts", "0")
    await put(valkey, own(1) | why(error="TimeoutError: 3 s"), group="receipts")
    script = tmp_path / "letters.py"
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    script.write_text(blocks(text)["letters"], encoding="utf-8")
    (letter,) = [x async for x in valkey.dead_letters("receipts")]
    first, second = (await asyncio.to_thread(run, script, valkey.address)).splitlines()
    assert first == f"{letter.id} mail.posted failed TimeoutError: 3 s"
    assert second.startswith("Redriven(matched=1, redriven=1, gone=0")
