"""Typed commands: what is collected and what is refused, and what reaches each kind of server."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from datetime import timedelta
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest

from bus import (
    Bus,
    Delivery,
    EffectNotAllowed,
    Effects,
    EffectsClosed,
    EffectsFailed,
    Event,
    InvalidEffect,
    InvalidEvent,
    NoReplyYet,
    Receipt,
    Reject,
    Worker,
    event_handler,
)
from bus.committer import Scope
from bus.config import EFFECT_BYTES, EFFECT_VALUES, EFFECTS
from bus.effects import _NAMES
from tests.eyes import eyes_on
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from bus.reply import Condition, Reply

pytestmark = pytest.mark.everywhere

STREAM = "bus:{till:0}"
SECOND = timedelta(seconds=1)


class Rung(Event, type="till.rung"):
    n: int


class Packed(Event, type="till.packed", encoding="msgpack"):
    blob: bytes


@pytest.fixture
def effects() -> Effects:
    return Effects(Scope(None, "bus:{till:0}", clustered=False))  # type: ignore[arg-type] # nothing is published


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url) as bus:
        yield bus


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Any]:
    async with eyes_on(url) as redis:
        yield redis


# --- every command, on every server


class Case(NamedTuple):
    """before: commands run by hand. collect: the effect. reply: to it. look: what shows it."""

    before: Sequence[str]
    collect: Callable[[Any], Reply]
    reply: Any
    look: str
    after: Any


CASES: dict[str, Case] = {
    "set": Case([], lambda e: e.set("k", "v"), b"OK", "GET k", b"v"),
    "set over any type": Case(["SADD k a"], lambda e: e.set("k", 7), b"OK", "GET k", b"7"),
    "set ttl": Case([], lambda e: e.set("k", "v", ttl=100 * SECOND), b"OK", "TTL k", 100),
    "set nx": Case([], lambda e: e.set("k", "v", nx=True), b"OK", "GET k", b"v"),
    "set nx in vain": Case(["SET k a"], lambda e: e.set("k", "v", nx=True), None, "GET k", b"a"),
    "set xx": Case(["SET k a"], lambda e: e.set("k", "v", xx=True), b"OK", "GET k", b"v"),
    "set xx in vain": Case([], lambda e: e.set("k", "v", xx=True), None, "EXISTS k", 0),
    "set binary": Case([], lambda e: e.set("k", b"\xff\x00\xfe"), b"OK", "GET k", b"\xff\x00\xfe"),
    "set umlaut": Case([], lambda e: e.set("k", "ä"), b"OK", "GET k", "ä".encode()),
    "get": Case(["SET k v"], lambda e: e.get("k"), b"v", "GET k", b"v"),
    "get of nothing": Case([], lambda e: e.get("k"), None, "EXISTS k", 0),
    "incrby": Case(["SET k 40"], lambda e: e.incrby("k", 2), 42, "GET k", b"42"),
    "incrby down": Case([], lambda e: e.incrby("k", -3), -3, "GET k", b"-3"),
    "incrbyfloat": Case(["SET k 10"], lambda e: e.incrbyfloat("k", 0.5), b"10.5", "GET k", b"10.5"),
    "hset": Case(["HSET h a 1"], lambda e: e.hset("h", {"a": 2, "b": 3}), 1, "HGET h b", b"3"),
    "hset binary": Case([], lambda e: e.hset("h", {"a": b"\xff", "b": "c"}), 2, "HLEN h", 2),
    "hsetnx": Case([], lambda e: e.hsetnx("h", "f", "v"), 1, "HGET h f", b"v"),
    "hsetnx in vain": Case(["HSET h f a"], lambda e: e.hsetnx("h", "f", "v"), 0, "HGET h f", b"a"),
    "hget": Case(["HSET h f v"], lambda e: e.hget("h", "f"), b"v", "HLEN h", 1),
    "hincrby": Case(["HSET h f 5"], lambda e: e.hincrby("h", "f", -7), -2, "HGET h f", b"-2"),
    "hincrbyfloat": Case(
        [], lambda e: e.hincrbyfloat("h", "f", 2.25), b"2.25", "HGET h f", b"2.25"
    ),
    "hdel": Case(["HSET h a 1 b 2"], lambda e: e.hdel("h", "a", "c"), 1, "HLEN h", 1),
    "sadd": Case(["SADD s a"], lambda e: e.sadd("s", "a", "b", 3), 2, "SCARD s", 3),
    "srem": Case(["SADD s a b"], lambda e: e.srem("s", "a", "z"), 1, "SCARD s", 1),
    "sismember": Case(["SADD s a"], lambda e: e.sismember("s", "a"), 1, "SCARD s", 1),
    "scard": Case(["SADD s a b"], lambda e: e.scard("s"), 2, "SCARD s", 2),
    "zadd": Case([], lambda e: e.zadd("z", {"a": 1.5, "b": 2}), 2, "ZSCORE z a", 1.5),
    "zadd nx": Case(["ZADD z 1 a"], lambda e: e.zadd("z", {"a": 9}, nx=True), 0, "ZSCORE z a", 1),
    "zadd xx": Case(["ZADD z 1 a"], lambda e: e.zadd("z", {"b": 9}, xx=True), 0, "ZCARD z", 1),
    "zadd gt": Case(["ZADD z 5 a"], lambda e: e.zadd("z", {"a": 4}, gt=True), 0, "ZSCORE z a", 5),
    "zadd lt": Case(["ZADD z 5 a"], lambda e: e.zadd("z", {"a": 4}, lt=True), 0, "ZSCORE z a", 4),
    "zadd xx gt": Case(
        ["ZADD z 5 a"], lambda e: e.zadd("z", {"a": 6}, xx=True, gt=True), 0, "ZSCORE z a", 6
    ),
    "zincrby": Case(["ZADD z 1 a"], lambda e: e.zincrby("z", 0.5, "a"), b"1.5", "ZCARD z", 1),
    "zrem": Case(["ZADD z 1 a"], lambda e: e.zrem("z", "a", "b"), 1, "EXISTS z", 0),
    "zscore": Case(["ZADD z 2 a"], lambda e: e.zscore("z", "a"), b"2", "ZCARD z", 1),
    "zcard": Case(["ZADD z 2 a"], lambda e: e.zcard("z"), 1, "ZCARD z", 1),
    "exists": Case(["SADD l a"], lambda e: e.exists("l"), 1, "EXISTS l", 1),
    "delete": Case(["SADD l a"], lambda e: e.delete("l"), 1, "EXISTS l", 0),
    "delete nothing": Case([], lambda e: e.delete("l"), 0, "EXISTS l", 0),
    "expire": Case(["SADD s a"], lambda e: e.expire("s", 50 * SECOND), 1, "TTL s", 50),
    "expire nothing": Case([], lambda e: e.expire("s", SECOND), 0, "EXISTS s", 0),
    "persist": Case(["SET k v PX 9000"], lambda e: e.persist("k"), 1, "TTL k", -1),
    "counters end": Case(
        ["SET k 9223372036854775800"],
        lambda e: e.incrby("k", 7),
        2**63 - 1,
        "GET k",
        b"9223372036854775807",
    ),
    "counters other end": Case(
        ["HSET h f -9007199254740992"],
        lambda e: e.hincrby("h", "f", -1),
        -(2**53) - 1,
        "HGET h f",
        b"-9007199254740993",
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_each_command_does_what_it_says_and_has_its_reply(
    bus: Bus, redis: Any, name: str
) -> None:
    before, collect, answer, look, after = CASES[name]
    for line in before:
        await redis.execute_command(*line.split())
    async with bus.transaction() as change:
        reply = collect(change)
    assert (reply.value, reply.skipped) == (answer, False)
    assert type(reply.value) is type(answer)
    assert await redis.execute_command(*look.split()) == after


def test_no_command_is_left_out() -> None:
    assert {name.split()[0] for name in CASES} - {"counters"} == {*_NAMES} - {"publish"}


async def test_a_published_event_has_a_receipt(bus: Bus, redis: Any) -> None:
    async with bus.transaction() as change:
        change.set("k", "v")
        first = change.publish(Rung(n=1), source="/here", correlation_id="c")
        second = change.publish(Packed(blob=b"\xff\xfe"), event_id="mine")
    (entry_id, fields), (_, packed) = await redis.xrange(STREAM)
    assert first.value == Receipt(fields[b"id"].decode(), STREAM, entry_id.decode())
    assert change.receipts == [first.value, second.value]
    assert (fields[b"source"], fields[b"correlationid"]) == (b"/here", b"c")
    assert b"causationdepth" not in fields
    assert packed[b"id"] == b"mine"
    assert [e.event async for e in bus.history("till")] == [Rung(n=1), Packed(blob=b"\xff\xfe")]


async def test_commands_run_in_the_order_of_collection(bus: Bus) -> None:
    async with bus.transaction() as change:
        replies = [change.incrby("k") for _ in range(5)]
        replies += [change.delete("k"), change.sadd("k", "a"), change.scard("k")]
    assert [r.value for r in replies] == [1, 2, 3, 4, 5, 1, 1, 1]


async def test_as_many_as_are_allowed_go_through(bus: Bus, redis: Any) -> None:
    async with bus.transaction() as change:
        wide = change.sadd("s", *range(EFFECT_VALUES))
        for _ in range(EFFECTS - 1):
            last = change.incrby("k")
    assert (wide.value, last.value) == (EFFECT_VALUES, EFFECTS - 1)
    half = "x" * (EFFECT_BYTES // 2 - 100)
    async with bus.transaction() as change:
        change.set("a", half)
        change.set("b", half.encode())
    assert await redis.strlen("b") == len(half)


# --- refused when it is collected


class Place(str, Enum):  # noqa: UP042 - whose str() is not its value
    HERE = "here"


class Name(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


def collected(effects: Effects) -> list[tuple[list[Any], list[str]]]:
    """The tests and arguments of each command, as the script will see them."""
    return [msgspec.msgpack.decode(command) for command in effects.commands]


class Level(IntEnum):
    HIGH = 3


class Odd(float):
    def __repr__(self) -> str:
        return "odd"


def test_what_is_more_than_a_plain_value_is_written_plainly(effects: Effects) -> None:
    effects.hset(Place.HERE, {Place.HERE: Level.HIGH, "b": Odd(1.5)})
    effects.set(b"here too", b"plain")
    effects.set(Name("k"), Name("v"))
    assert [args for _, args in collected(effects)] == [
        ["HSET", "here", "here", "3", "b", "1.5"],
        ["SET", "here too", "plain"],
        ["SET", "k", "v"],
    ]
    assert {type(a) for _, args in collected(effects) for a in args} == {str}


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a score that is no double": (lambda e: e.zadd("z", {"m": 2**53 + 1}), "above 2\\^53"),
    "a bool": (lambda e: e.set("k", True), "whole number"),
    "a bool to count by": (lambda e: e.incrby("k", True), "whole number"),
    "None": (lambda e: e.set("k", None), "not NoneType: encode it first"),
    "a list": (lambda e: e.hset("k", {"f": [1]}), "not list"),
    "NaN": (lambda e: e.set("k", float("nan")), "NaN"),
    "Infinity": (lambda e: e.incrbyfloat("k", float("inf")), "Infinity"),
    "NaN as a score": (lambda e: e.zadd("k", {"m": float("nan")}), "NaN"),
    "a text to add": (lambda e: e.incrbyfloat("k", "many"), "whole number"),
    "a text to add to a field": (lambda e: e.hincrbyfloat("k", "f", "1"), "whole number"),
    "a huge number": (lambda e: e.set("k", 2**63), "above 64 bits"),
    "a huge step": (lambda e: e.hincrby("k", "f", -(2**63) - 1), "above 64 bits"),
    "a fraction to count by": (lambda e: e.incrby("k", 1.5), "whole number"),
    "an empty key": (lambda e: e.set("", "v"), "must not be empty"),
    "a key of the bus": (lambda e: e.delete("bus:topics"), "publish events with .publish"),
    "a key of the bus in bytes": (lambda e: e.delete(b"bus:{till:0}"), "bus's own"),
    "a key that is no text": (lambda e: e.delete(7), "not int"),
    "a key that is no UTF-8": (lambda e: e.delete(b"\xff"), "UTF-8"),
    "a lone surrogate": (lambda e: e.set("k", "\ud800"), "lone surrogate"),
    "a lone surrogate in a key": (lambda e: e.get("k\ud800"), "lone surrogate"),
    "nx and xx": (lambda e: e.set("k", "v", nx=True, xx=True), "exclude each other"),
    "zadd nx and gt": (lambda e: e.zadd("k", {"m": 1}, nx=True, gt=True), "exclude"),
    "zadd nx and xx": (lambda e: e.zadd("k", {"m": 1}, nx=True, xx=True), "exclude"),
    "zadd gt and lt": (lambda e: e.zadd("k", {"m": 1}, gt=True, lt=True), "exclude"),
    "no fields": (lambda e: e.hset("k", {}), "at least one"),
    "no members": (lambda e: e.sadd("k"), "at least one"),
    "no scores": (lambda e: e.zadd("k", {}), "at least one"),
    "too many values": (lambda e: e.sadd("k", *range(EFFECT_VALUES + 1)), "4,000 values"),
    "too many bytes": (lambda e: e.set("k", "x" * EFFECT_BYTES), "1024 KiB"),
    "too many binary bytes": (lambda e: e.set("k", b"\xff" * EFFECT_BYTES), "1024 KiB"),
    "a ttl in seconds": (lambda e: e.set("k", "v", ttl=5), "timedelta"),
    "no ttl": (lambda e: e.expire("k", timedelta()), "use delete"),
    "a ttl that is over": (lambda e: e.expire("k", -SECOND), "use delete"),
    "when a bool": (lambda e: e.set("k", "v", when=True), "not bool"),
    "when a reply": (lambda e: e.set("k", "v", when=e.get("k")), "not Reply"),
    "a bound above 2^53": (lambda e: e.get("k").between(0, 2**53), "2\\^53"),
    "a bound below -2^53": (lambda e: e.get("k").at_least(-(2**53)), "2\\^53"),
    "a bound that is no number": (lambda e: e.get("k").at_most("9"), "whole number"),
    "a bound that is NaN": (lambda e: e.get("k").at_most(float("nan")), "NaN"),
    "FLUSHALL": (lambda e: e.flushall(), "flushall is no effect; there are: set, get"),
    "LPUSH": (lambda e: e.lpush("k", "v"), "lpush is no effect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_an_effect_is_refused_when_it_is_collected(
    effects: Effects, name: str
) -> None:
    collect, words = REFUSED[name]
    with pytest.raises(InvalidEffect, match=words):
        collect(effects)
    assert [args[0] for _, args in collected(effects)] in ([], ["GET"]), "nothing of it is left"
    assert not effects.sent
    assert not effects.binaries


def test_a_number_is_never_missing(effects: Effects) -> None:
    with pytest.raises(InvalidEffect, match="INCRBY always has an answer"):
        effects.incrby("n").missing()


def test_the_values_of_all_commands_are_bounded(effects: Effects) -> None:
    """What a script does with them is what the server does nothing else for."""
    for n in range(5):
        effects.sadd("s", *range(n * 3_990, (n + 1) * 3_990))
    with pytest.raises(InvalidEffect, match="20,000 values"):
        effects.sadd("s", *range(100))
    assert len(effects) == 5


def test_an_unknown_command_is_no_attribute_either(effects: Effects) -> None:
    assert not hasattr(effects, "flushall")
    with pytest.raises(EffectNotAllowed):
        effects.eval("return 1")  # type: ignore[attr-defined]


def test_a_key_has_one_type(effects: Effects) -> None:
    effects.hset("k", {"f": "v"})
    for collect in (lambda: effects.get("k"), lambda: effects.zadd("k", {"m": 1})):
        with pytest.raises(InvalidEffect, match="k is a hash to an earlier effect"):
            collect()
    effects.delete("k", when=effects.exists("k").equals(1))
    with pytest.raises(InvalidEffect, match="is a hash"):
        effects.sadd("k", "a")  # it may be there still
    effects.delete("k")
    effects.sadd("k", "a")
    effects.set("k", "v")
    with pytest.raises(InvalidEffect, match="is a string"):
        effects.srem("k", "a")
    effects.incrby("k")
    assert effects.types == ("k", "hash"), "what it must be before the first of them"


def test_what_is_known_of_a_key_only_later_is_checked_all_the_same(effects: Effects) -> None:
    effects.exists("a")
    effects.incrby("a")
    effects.set("b", "v", nx=True)
    effects.get("b")
    effects.set("c", "v")
    effects.get("c")
    assert effects.types == ("a", "string", "b", "string"), "c is a string whatever it was"


def test_one_too_many_is_not_taken_and_smaller_ones_still_are(effects: Effects) -> None:
    for _ in range(EFFECTS - 1):
        effects.incrby("k")
    with pytest.raises(InvalidEffect, match="more than 1,000 effects"):
        effects.set("k", "x" * EFFECT_BYTES)
    effects.incrby("k")
    with pytest.raises(InvalidEffect, match="more than 1,000 effects"):
        effects.incrby("k")
    assert len(effects) == EFFECTS


def test_conditions_count_as_bytes_too(effects: Effects) -> None:
    there = effects.get("k").equals("x" * (EFFECT_BYTES // 2))
    effects.set("k", "v", when=there)
    with pytest.raises(InvalidEffect, match="1024 KiB"):
        effects.set("k", "v", when=there)


def test_a_condition_is_on_replies_of_the_same_effects(effects: Effects) -> None:
    other = Effects(Scope(None, "", clustered=False))
    elsewhere, here = other.get("k").present(), effects.get("k").present()
    with pytest.raises(InvalidEffect, match="same effects"):
        effects.set("k", "v", when=elsewhere)
    with pytest.raises(InvalidEffect, match="different effects"):
        effects.set("k", "v", when=here & elsewhere)
    with pytest.raises(TypeError):
        effects.set("k", "v", when=here & True)  # type: ignore[operator]


def test_a_refused_condition_leaves_no_trace_of_its_command(effects: Effects) -> None:
    with pytest.raises(InvalidEffect):
        effects.hset("k", {"f": "v"}, when=True)  # type: ignore[arg-type]
    effects.sadd("k", "a")
    assert effects.types == ("k", "set")


def test_a_key_beside_the_stream_has_its_hash_tag(effects: Effects) -> None:
    assert effects.key("total") == "{till:0}:total"


USES: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "bytes": bytes,
    "f-string": lambda r: f"{r}",
    "f-string with a width": lambda r: f"{r:>9}",
    "equal": lambda r: r == 1,
    "not equal": lambda r: r != 1,
    "less": lambda r: r < 1,
    "at least": lambda r: r >= 1,
    "in": lambda r: r in [1, 2],
    "contains": lambda r: 1 in r,
    "plus": lambda r: r + 1,
    "from": lambda r: 10 - r,
    "times": lambda r: 2 * r,
    "divided": lambda r: r / 2,
    "halved": lambda r: r // 2,
    "modulo": lambda r: r % 2,
    "of": lambda r: 1 / r,
    "minus": lambda r: -r,
    "abs": abs,
    "len": len,
    "item": lambda r: r[0],
    "iteration": list,
    "range": range,
    "value": lambda r: r.value,
    "skipped": lambda r: r.skipped,
    "a condition": lambda r: bool(r.present()),
    "not a condition": lambda r: not r.present(),
    "and": lambda r: r.present() and r.missing(),
}


@pytest.mark.parametrize("use", USES)
def test_a_reply_used_as_a_value_says_that_there_is_none_yet(effects: Effects, use: str) -> None:
    reply = effects.incrby("k")
    with pytest.raises(NoReplyYet):
        USES[use](reply)


ARGUMENTS: dict[str, Callable[[Any, Any], Any]] = {
    "a value": lambda e, r: e.set("k", r),
    "a step": lambda e, r: e.incrby("k", r),
    "a float step": lambda e, r: e.incrbyfloat("k", r),
    "a key": lambda e, r: e.get(r),
    "a field": lambda e, r: e.hset("h", {r: 1}),
    "a score": lambda e, r: e.zadd("z", {"m": r}),
    "a bound": lambda e, r: e.get("k").at_least(r),
    "a comparison": lambda e, r: e.get("k").equals(r),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_reply_as_an_argument_says_that_there_is_none_yet(
    effects: Effects, argument: str
) -> None:
    with pytest.raises(NoReplyYet):
        ARGUMENTS[argument](effects, effects.exists("other"))


def test_a_reply_may_be_printed_and_kept(effects: Effects) -> None:
    reply = effects.incrby("k")
    assert repr(reply) == "<Reply 1 of <Effects: 1 commands>>"
    assert {reply: 1}[reply] == 1


# --- conditions, decided by the server


class Query(NamedTuple):
    """Whether a condition on the reply to `ask` holds."""

    before: str
    ask: Callable[[Any], Reply]
    when: Callable[[Any], Condition]
    holds: bool


def get(key: str = "k") -> Callable[[Any], Reply]:
    return lambda e: e.get(key)


QUERIES: dict[str, Query] = {
    "between, at the low end": Query("SET k 5", get(), lambda r: r.between(5, 9), True),
    "between, at the high end": Query("SET k 9", get(), lambda r: r.between(5, 9), True),
    "below": Query("SET k 4", get(), lambda r: r.between(5, 9), False),
    "above": Query("SET k 10", get(), lambda r: r.between(5, 9), False),
    "as numbers, not as text": Query("SET k 10", get(), lambda r: r.at_least(9), True),
    "at least": Query("SET k -1", get(), lambda r: r.at_least(0), False),
    "at most": Query("SET k -1", get(), lambda r: r.at_most(0), True),
    "a fraction": Query("SET k 1.25", get(), lambda r: r.between(1.2, 1.3), True),
    "a fraction above": Query("SET k 1.35", get(), lambda r: r.between(1.2, 1.3), False),
    "up to Infinity": Query("SET k 5", get(), lambda r: r.between(0, float("inf")), True),
    "from -Infinity": Query("SET k 5", get(), lambda r: r.between(-float("inf"), 4), False),
    "no number": Query("SET k many", get(), lambda r: r.at_least(0), False),
    "no number to Redis": Query("SET k 0x10", get(), lambda r: r.at_least(0), False),
    "a number of nothing": Query("PING", get(), lambda r: r.at_most(0), False),
    "a status is no number": Query("PING", lambda e: e.set("k", 1), lambda r: r.at_least(0), False),
    "a count": Query("SADD s a b", lambda e: e.scard("s"), lambda r: r.between(2, 2), True),
    "a score": Query("ZADD z 2.5 a", lambda e: e.zscore("z", "a"), lambda r: r.at_least(2.5), True),
    "an infinite score": Query(
        "ZADD z inf a", lambda e: e.zscore("z", "a"), lambda r: r.at_least(1), True
    ),
    "equals a text": Query("SET k v", get(), lambda r: r.equals("v"), True),
    "equals bytes": Query("SET k v", get(), lambda r: r.equals(b"v"), True),
    "equals another": Query("SET k w", get(), lambda r: r.equals("v"), False),
    "equals a number as text": Query("SET k 1", get(), lambda r: r.equals(1), True),
    "equals a text as a number": Query(
        "SET k 1", lambda e: e.incrby("k"), lambda r: r.equals("2"), True
    ),
    "equals as text alone": Query("SET k 1.0", get(), lambda r: r.equals(1), False),
    "equals a status": Query("PING", lambda e: e.set("k", 1), lambda r: r.equals("OK"), True),
    "equals of nothing": Query("PING", get(), lambda r: r.equals(""), False),
    "differs": Query("SET k w", get(), lambda r: r.differs("v"), True),
    "differs not": Query("SET k v", get(), lambda r: r.differs("v"), False),
    "differs of nothing": Query("PING", get(), lambda r: r.differs("v"), False),
    "missing": Query("PING", get(), lambda r: r.missing(), True),
    "not missing": Query("SET k v", get(), lambda r: r.missing(), False),
    "an empty text is not missing": Query("SET k v", get(), lambda r: r.missing(), False),
    "present": Query("SET k v", get(), lambda r: r.present(), True),
    "not present": Query("PING", get(), lambda r: r.present(), False),
    "no key is not present": Query("PING", lambda e: e.exists("k"), lambda r: r.present(), False),
    "no key is missing": Query("PING", lambda e: e.exists("k"), lambda r: r.missing(), True),
    "a key is present": Query("SET k v", lambda e: e.exists("k"), lambda r: r.present(), True),
    "a key is not missing": Query("SET k v", lambda e: e.exists("k"), lambda r: r.missing(), False),
    "no member is missing": Query(
        "SADD s a", lambda e: e.sismember("s", "b"), lambda r: r.missing(), True
    ),
    "a member is present": Query(
        "SADD s a", lambda e: e.sismember("s", "a"), lambda r: r.present(), True
    ),
    "missing, for nx failed": Query(
        "SET k v", lambda e: e.set("k", 1, nx=True), lambda r: r.missing(), True
    ),
    "and": Query("SET k 5", get(), lambda r: r.at_least(5) & r.at_most(5) & r.present(), True),
    "and not": Query("SET k 5", get(), lambda r: r.at_least(5) & r.at_most(4), False),
    "and not, the other way": Query("SET k 5", get(), lambda r: r.at_most(4) & r.present(), False),
    "the last exact number": Query(
        f"SET k {2**53 - 1}", get(), lambda r: r.between(2**53 - 1, 2**53 - 1), True
    ),
    "one past it": Query(f"SET k {2**53}", get(), lambda r: r.at_most(2**53 - 1), False),
    "the last exact number below": Query(
        f"SET k {1 - 2**53}", get(), lambda r: r.between(1 - 2**53, 0), True
    ),
    "one below it": Query(f"SET k {-(2**53)}", get(), lambda r: r.at_least(1 - 2**53), False),
    "a counter beyond": Query(
        f"SET k {2**53}", lambda e: e.incrby("k"), lambda r: r.equals(2**53 + 1), True
    ),
    "a counter beyond is no other": Query(
        f"SET k {2**53}", lambda e: e.incrby("k"), lambda r: r.equals(2**53), False
    ),
    "a counter far beyond": Query(
        f"HSET h f {2**60}",
        lambda e: e.hincrby("h", "f", -1),
        lambda r: r.equals(2**60 - 1) & r.at_least(2**53 - 1),
        True,
    ),
    "binary": Query(
        "PING", lambda e: [e.set("k", b"\xff"), e.get("k")][1], lambda r: r.equals(b"\xff"), True
    ),
    "other binary": Query(
        "PING", lambda e: [e.set("k", b"\xff"), e.get("k")][1], lambda r: r.differs(b"\xfe"), True
    ),
    "nothing but UTF-8 differs": Query(
        "SET k ÿ", get(), lambda r: r.equals("ÿ".encode("latin-1")), False
    ),
}


@pytest.mark.parametrize("name", QUERIES)
async def test_the_server_decides_whether_a_condition_holds(
    bus: Bus, redis: Any, name: str
) -> None:
    before, question, when, holds = QUERIES[name]
    await redis.execute_command(*before.split())
    async with bus.transaction() as change:
        done = change.set("probe", "1", when=when(question(change)))
    assert await redis.exists("probe") == holds
    assert (done.skipped, done.value) == (not holds, b"OK" if holds else None)


async def test_what_depends_on_what_was_skipped_is_skipped(bus: Bus, redis: Any) -> None:
    async with bus.transaction() as change:
        first = change.incrby("a", when=change.get("no such key").present())
        second = change.incrby("b", when=first.at_least(0))
        third = change.incrby("c", when=second.present())
        told = change.publish(Rung(n=1), when=second.present())
        fourth = change.incrby("d")
    assert [r.skipped for r in (first, second, third, told, fourth)] == [True] * 4 + [False]
    assert (told.value, fourth.value, change.receipts) == (None, 1, [])
    assert await redis.exists("a", "b", "c", STREAM) == 0


async def test_a_quota_goes_down_and_tells_once_when_it_is_used_up(bus: Bus, redis: Any) -> None:
    """The example at the head of the module."""
    await redis.hset("quota", "tokens", 5)
    told = []
    for _ in range(4):
        async with bus.transaction() as change:
            left = change.hincrby("quota", "tokens", -2)
            told.append(change.publish(Rung(n=0), when=left.between(-2, -1)))
    assert [t.skipped for t in told] == [True, True, False, True]


async def committed(bus: Bus, collect: Callable[[Any], Any]) -> Any:
    async with bus.transaction() as change:
        collect(change)
    return change


async def test_types_are_checked_before_the_first_write(bus: Bus, redis: Any) -> None:
    await redis.hset("h", "f", "v")
    with pytest.raises(EffectsFailed, match="WRONGTYPE h is a hash, not a string") as raised:
        await committed(bus, lambda e: [e.set("k", "v"), e.incrby("h")])
    assert raised.value.applied == ()
    assert not await redis.exists("k")


async def test_what_was_applied_before_a_failure_stays_and_is_named(bus: Bus, redis: Any) -> None:
    await redis.set("text", "many")
    made: list[Any] = []

    def collect(change: Any) -> None:
        made.append(change)
        change.set("k", "v")
        change.get("k")
        change.publish(Rung(n=1))
        change.incrby("text")
        change.set("later", "v")

    with pytest.raises(EffectsFailed, match=r"INCRBY text: .*not an integer.*stays: SET k") as why:
        await committed(bus, collect)
    assert why.value.applied == ("SET k", f"XADD {STREAM}")
    assert (await redis.get("k"), await redis.exists("later")) == (b"v", 0)
    with pytest.raises(NoReplyYet):
        made[0].reply(1)


@pytest.mark.parametrize("event", ["text", None, Rung], ids=["a text", "None", "a class"])
async def test_only_events_are_published(bus: Bus, event: Any) -> None:
    with suppress(ZeroDivisionError):
        async with bus.transaction() as change:
            with pytest.raises(InvalidEvent, match="only events can be published"):
                change.publish(event)
            assert not change
            raise ZeroDivisionError


# --- in a handler


async def test_effects_end_with_the_handler(bus: Bus, redis: Any) -> None:
    """A task that it leaves behind is told so: nothing is collected and then silently dropped."""
    kept: list[Any] = []
    refused: list[InvalidEffect] = []
    ended = asyncio.Event()

    async def late(collect: Callable[[], Any]) -> None:
        await ended.wait()
        try:
            collect()
        except InvalidEffect as error:
            refused.append(error)

    @event_handler(Rung, group="late", max_attempts=1, breaker=None)
    async def handle(event: Rung, delivery: Delivery[Rung]) -> None:
        held = delivery.effects
        if event.n == 0:
            held.incrby("in time")
        kept.append(asyncio.create_task(late(lambda: held.incrby("late"))))
        kept.append(asyncio.create_task(late(lambda: delivery.effects.incrby("late"))))
        kept.append(asyncio.create_task(late(lambda: held.publish(Rung(n=9)))))
        if event.n == 2:
            raise Reject("no")

    @event_handler(Rung, group="asks-late")
    async def ask_late(event: Rung, delivery: Delivery[Rung]) -> None:
        kept.append(asyncio.create_task(late(lambda: delivery.effects.incrby("late"))))

    async with Worker(bus, [handle, ask_late]) as worker:
        for n in range(3):
            await bus.publish(Rung(n=n))
        await worker.drained()
        ended.set()
        await asyncio.gather(*kept)
    assert [type(error) for error in refused] == [EffectsClosed] * (3 * 3 + 3)
    assert re.search("the handler has returned", str(refused[0]))
    assert (await redis.get("in time"), await redis.exists("late")) == (b"1", 0)


async def test_on_dead_has_no_effects_and_is_told_what_has(bus: Bus, redis: Any) -> None:
    refused: list[InvalidEffect] = []

    async def on_dead(dead: Any, _: Any) -> None:
        for collect in (
            lambda: dead.delivery.effects.incrby("k"),
            lambda: dead.delivery.effects.key("k"),
            lambda: dead.delivery.effects.publish(Rung(n=1)),
        ):
            try:
                collect()
            except InvalidEffect as error:
                refused.append(error)

    @event_handler(Rung, group="dead", on_dead=on_dead)
    async def handle(event: Rung, delivery: Delivery[Rung]) -> None:
        delivery.effects.incrby("k")
        raise Reject("no")

    async with Worker(bus, [handle]) as worker:
        await bus.publish(Rung(n=0))
        await worker.drained()
        await eventually(lambda: refused)
    assert [type(e) for e in refused] == [EffectsClosed] * 3
    assert "use bus.transaction()" in str(refused[0])
    assert not await redis.exists("k")
