"""Effects: commands on Redis state that take place in one script, with the ack or not at all.

A handler (or a transaction) collects them here; nothing is sent until it has returned. So an
effect has no reply yet when it is collected. A decision about state is made where the state is:

    left = delivery.effects.hincrby(quota, "tokens", -used)
    delivery.effects.publish(QuotaExceeded(...), when=left.between(-used, -1))

Only the methods below are there: the server would let anything pass inside a script, FLUSHALL too.

How they are applied (`streams/scripts/commit.lua`): the types of the keys are checked before the
first write, then the commands run in the order of collection. Redis has no rollback: if a command
fails all the same (no integer, overflow), what was written before it stays.

This file is pure: it checks, and writes the commands down in the form the script takes.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import msgspec

from bus.config import EFFECT_BYTES, EFFECT_VALUES, EFFECTS, EFFECTS_VALUES
from bus.errors import EffectNotAllowed, EffectsClosed, InvalidEffect, NoReplyYet
from bus.event import Event
from bus.reply import (
    Arg,
    Condition,
    Reply,
    Value,
    key_of,
    milliseconds_of,
    number_of,
    pairs,
    score_of,
    several,
    value_of,
    whole_of,
)
from bus.scope import Scope, Sent

Key: TypeAlias = str | bytes


_pack = msgspec.msgpack.Encoder().encode


class Effects:
    """Collects commands; every method returns the `Reply` that the server will give.

    when: a `Condition` on earlier replies of the same effects; where it does not hold, the command
    is skipped. Keys and values: str (UTF-8), bytes, numbers; keys only UTF-8. On a Cluster all keys
    must lie in one slot: `key(name)` makes such a key.
    Errors of all methods: InvalidEffect (EffectsClosed once the handler or block is over).
    """

    __slots__ = (
        "_cause",
        "_closed",
        "_replies",
        "_scope",
        "binaries",
        "bytes",
        "commands",
        "keys",
        "last",
        "last_key",
        "sent",
        "types",
        "values",
    )

    def __init__(self, scope: Scope, cause: Any = None) -> None:
        self._scope = scope
        self._cause = cause
        self._closed = ""
        self._replies: list[tuple[bool, Any]] | None = None
        # Each packed at once, {tests, {name, key, ...}}: lists by the thousand, kept until they are
        # sent, would have the garbage collector look at everything there is again and again.
        self.commands: list[bytes] = []
        self.keys: dict[str, str] = {}  # key -> its type after the commands so far, "" if unknown
        self.types: tuple[str, ...] = ()  # key, the type it must have before if it exists, ...
        self.sent: tuple[Sent, ...] = ()
        self.binaries: tuple[tuple[int, int, bytes], ...] = ()  # command, place in it, value
        self.bytes = 0  # about
        self.values = 0  # arguments of all commands
        self.last = b""  # the bus's own command, when all others have been applied
        self.last_key = ""

    @classmethod
    def none(cls, why: str) -> "Effects":
        """Return one that takes nothing; `why` is what a caller is told."""
        effects = cls.__new__(cls)
        effects.commands, effects.last = [], b""
        effects.close(why)
        return effects

    def __len__(self) -> int:
        return len(self.commands)

    def __bool__(self) -> bool:
        return bool(self.commands or self.last)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.commands)} commands>"

    def finally_set(self, key: str, value: str, ttl_ms: int, when: Condition | None = None) -> None:
        """Have the bus's own key set when all other effects have been applied."""
        tests = () if when is None else self._tests(when)
        self.last_key, self.last = key, _pack((tests, ("SET", key, value, "PX", str(ttl_ms))))

    def own(self, key: str) -> Reply:
        """Read the bus's own key, so that others can depend on it. GET."""
        self._scope.join(key)
        self.keys[key] = "string"
        self.types += (key, "string")
        return self._append((), ["GET", key])

    def join(self, stream: str) -> None:
        """Accept the stream of a published event. Errors: InvalidEffect, of another slot."""
        self._scope.join(stream)

    def key(self, name: str) -> str:
        """Return a key in the slot of this delivery's stream: `{document:0}:<name>`.

        The partition follows from the event's key, so events of one key find the same state.
        """
        if self._closed:
            raise EffectsClosed(self._closed)
        return f"{{{self._scope.tag}}}:{name}"

    # --- strings and counters

    def set(
        self,
        key: Key,
        value: Value,
        *,
        ttl: timedelta | None = None,
        nx: bool = False,
        xx: bool = False,
        when: Condition | None = None,
    ) -> Reply:
        """SET. ttl: expires after it. nx, xx: only if there is no such key, only if there is."""
        values: list[Arg] = [value_of(value)]
        if ttl is not None:
            values += ("PX", milliseconds_of(ttl))
        if nx and xx:
            raise InvalidEffect("set: nx and xx exclude each other")
        if nx or xx:
            values.append("NX" if nx else "XX")
        return self._add("SET", "", key, values, when, leaves="" if nx or xx else "string")

    def get(self, key: Key, *, when: Condition | None = None) -> Reply:
        """GET, to be tested: `effects.get(k).equals(...)`."""
        return self._add("GET", "string", key, (), when)

    def incrby(self, key: Key, by: int = 1, *, when: Condition | None = None) -> Reply:
        """INCRBY; `by` may be negative."""
        return self._add("INCRBY", "string", key, (whole_of(by),), when)

    def incrbyfloat(self, key: Key, by: float, *, when: Condition | None = None) -> Reply:
        """INCRBYFLOAT."""
        return self._add("INCRBYFLOAT", "string", key, (number_of(by),), when)

    # --- hashes

    def hset(
        self, key: Key, mapping: Mapping[str, Value], *, when: Condition | None = None
    ) -> Reply:
        """HSET of one or more fields; the reply is the number of new ones."""
        return self._add("HSET", "hash", key, pairs("hset", mapping.items()), when)

    def hsetnx(self, key: Key, field: Key, value: Value, *, when: Condition | None = None) -> Reply:
        """HSETNX; the reply is 1 if the field was set, 0 if it was there."""
        return self._add("HSETNX", "hash", key, (value_of(field), value_of(value)), when)

    def hget(self, key: Key, field: Key, *, when: Condition | None = None) -> Reply:
        """HGET, to be tested."""
        return self._add("HGET", "hash", key, (value_of(field),), when)

    def hincrby(self, key: Key, field: Key, by: int = 1, *, when: Condition | None = None) -> Reply:
        """HINCRBY; `by` may be negative."""
        return self._add("HINCRBY", "hash", key, (value_of(field), whole_of(by)), when)

    def hincrbyfloat(
        self, key: Key, field: Key, by: float, *, when: Condition | None = None
    ) -> Reply:
        """HINCRBYFLOAT."""
        return self._add("HINCRBYFLOAT", "hash", key, (value_of(field), number_of(by)), when)

    def hdel(self, key: Key, *fields: Key, when: Condition | None = None) -> Reply:
        """HDEL; the reply is how many fields there were."""
        return self._add("HDEL", "hash", key, several("hdel", fields), when)

    # --- sets

    def sadd(self, key: Key, *members: Value, when: Condition | None = None) -> Reply:
        """SADD; the reply is how many were new."""
        return self._add("SADD", "set", key, several("sadd", members), when)

    def srem(self, key: Key, *members: Value, when: Condition | None = None) -> Reply:
        """SREM; the reply is how many there were."""
        return self._add("SREM", "set", key, several("srem", members), when)

    def sismember(self, key: Key, member: Value, *, when: Condition | None = None) -> Reply:
        """SISMEMBER, to be tested: 1 or 0."""
        return self._add("SISMEMBER", "set", key, (value_of(member),), when)

    def scard(self, key: Key, *, when: Condition | None = None) -> Reply:
        """SCARD, to be tested."""
        return self._add("SCARD", "set", key, (), when)

    # --- sorted sets

    def zadd(
        self,
        key: Key,
        scores: Mapping[str, float],
        *,
        nx: bool = False,
        xx: bool = False,
        gt: bool = False,
        lt: bool = False,
        when: Condition | None = None,
    ) -> Reply:
        """ZADD of member -> score; the reply is how many were new.

        nx, xx: only new ones, only those there are. gt, lt: only if the score rises, falls.
        """
        if nx + gt + lt > 1 or (nx and xx):
            raise InvalidEffect("zadd: nx, gt and lt exclude each other, and nx excludes xx")
        flags = [f for f, on in (("NX", nx), ("XX", xx), ("GT", gt), ("LT", lt)) if on]
        flat = pairs("zadd", ((score_of(s), m) for m, s in scores.items()))
        return self._add("ZADD", "zset", key, [*flags, *flat], when)

    def zincrby(
        self, key: Key, by: float, member: Value, *, when: Condition | None = None
    ) -> Reply:
        """ZINCRBY; the reply is the new score."""
        return self._add("ZINCRBY", "zset", key, (score_of(by), value_of(member)), when)

    def zrem(self, key: Key, *members: Value, when: Condition | None = None) -> Reply:
        """ZREM; the reply is how many there were."""
        return self._add("ZREM", "zset", key, several("zrem", members), when)

    def zscore(self, key: Key, member: Value, *, when: Condition | None = None) -> Reply:
        """ZSCORE, to be tested."""
        return self._add("ZSCORE", "zset", key, (value_of(member),), when)

    def zcard(self, key: Key, *, when: Condition | None = None) -> Reply:
        """ZCARD, to be tested."""
        return self._add("ZCARD", "zset", key, (), when)

    # --- keys of any type

    def exists(self, key: Key, *, when: Condition | None = None) -> Reply:
        """EXISTS, to be tested: 1 or 0."""
        return self._add("EXISTS", "", key, (), when)

    def delete(self, key: Key, *, when: Condition | None = None) -> Reply:
        """UNLINK of one key; the reply is 1 or 0."""
        return self._add("UNLINK", "", key, (), when, leaves="none")

    def expire(self, key: Key, ttl: timedelta, *, when: Condition | None = None) -> Reply:
        """PEXPIRE; the reply is 0 if there is no such key."""
        return self._add("PEXPIRE", "", key, (milliseconds_of(ttl),), when)

    def persist(self, key: Key, *, when: Condition | None = None) -> Reply:
        """PERSIST; the reply is 1 if the key would have expired."""
        return self._add("PERSIST", "", key, (), when)

    # --- events

    def publish(
        self,
        event: Event,
        *,
        event_id: str | None = None,
        when: Condition | None = None,
        time: datetime | None = None,
        source: str | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Reply:
        """Append an event to its topic, in the same step; the reply of a transaction is a Receipt.

        As `Bus.publish`; one XADD. An event above a MiB is too large for an effect.
        Errors: InvalidEvent, EventTooLarge, EventLoop.
        """
        if self._closed:
            raise EffectsClosed(self._closed)
        tests = () if when is None else self._tests(when)
        given = (source, time, correlation_id, causation_id, traceparent, tracestate)
        sent = self._scope.outgoing(event, event_id, given, self._cause)
        # The stream is found when it is sent: how many partitions a topic has, the server says.
        reply = self._append(tests, ["XADD", "", "*", *sent.fields])
        place = len(self.commands) - 1
        self.sent += (Sent(place, when is None, sent.event, sent.event_id, sent.routed_by),)
        return reply

    # --- collecting

    def _add(
        self,
        name: str,
        kind: str,
        key: Key,
        values: "list[Arg] | tuple[Arg, ...]",
        when: Condition | None,
        *,
        leaves: str | None = None,
    ) -> Reply:
        """Write a command down.

        kind: the type its key must have, "" for any. leaves: the type it has afterwards.
        """
        if self._closed:
            raise EffectsClosed(self._closed)
        if len(values) > EFFECT_VALUES:
            raise InvalidEffect(
                f"{name.lower()} takes {EFFECT_VALUES:,} values at a time, not {len(values):,}:"
                " split them over several commands"
            )
        if key.__class__ is not str or not key.isascii():
            key = key_of(key)
        tests = () if when is None else self._tests(when)
        known = self.keys.get(key)
        if known is None:
            if not key:
                raise InvalidEffect("a key must not be empty")
            self._scope.admit(key)
            self.keys[key] = kind
            if kind:
                self.types += (key, kind)
        elif kind and kind != known:
            self._change_kind(name, key, known, kind)
        if leaves and when is None:
            self.keys[key] = leaves
        return self._append(tests, [name, key, *values])

    def _append(self, tests: Sequence[int | str | bytes], args: list[Arg]) -> Reply:
        aside: tuple[tuple[int, int, bytes], ...] = ()
        try:
            # The quickest way to see whether all of it is text, as most is: bytes raise here.
            "".join(args)  # type: ignore[arg-type] # that they may is the question
            if tests:
                "".join(tests[2::4])  # type: ignore[arg-type] # only these can be anything else
        except TypeError:
            aside = _binaries(args, len(self.commands), 1)
            aside += _binaries(tests, len(self.commands), -1)
            args = [a if isinstance(a, str) else "" for a in args]
            tests = ["" if isinstance(t, bytes) else t for t in tests]
        packed = _pack((tests, args))
        size, count = self.bytes + len(packed), self.values + len(args)
        if aside:
            size += sum(len(value) for _, _, value in aside)
        if len(self.commands) >= EFFECTS or size > EFFECT_BYTES or count > EFFECTS_VALUES:
            raise InvalidEffect(
                f"more than {EFFECTS:,} effects, {EFFECTS_VALUES:,} values or"
                f" {EFFECT_BYTES // 1024} KiB: they run in one script, during which the server does"
                " nothing else; do it in several steps"
            )
        self.bytes, self.values = size, count
        self.binaries += aside
        self.commands.append(packed)
        return Reply(self, len(self.commands), str(args[0]))

    def _change_kind(self, name: str, key: str, known: str, kind: str) -> None:
        if known == "":
            self.types += (key, kind)
        elif known != "none":
            raise InvalidEffect(
                f"{name}: {key} is a {known} to an earlier effect, and cannot be a {kind} to this"
            )
        self.keys[key] = kind

    def _tests(self, when: Condition) -> Sequence[int | str | bytes]:
        if not isinstance(when, Condition):
            raise InvalidEffect(
                f"when= takes a condition such as reply.between(0, 9), not {type(when).__name__}"
            )
        if when.effects is not self:
            raise InvalidEffect("when= takes a reply of the same effects: one script, one decision")
        return when.tests

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in Effects.__slots__:
            raise AttributeError(name)
        raise EffectNotAllowed(f"{name} is no effect; there are: {', '.join(_NAMES)}")

    # --- when it is over

    def close(self, why: str) -> None:
        """Take no more; `why` is what a later caller is told."""
        self._closed = why
        self._cause = None  # they know each other, and must not wait for a garbage collection

    def answered(self, replies: list[tuple[bool, Any]]) -> None:
        """Note whether each command ran, and its reply."""
        self._replies = replies

    def reply(self, number: int) -> tuple[bool, Any]:
        """Return whether command `number`, from 1, ran, and its reply. Errors: NoReplyYet."""
        if self._replies is None:
            raise NoReplyYet(
                "the server has not answered yet: a handler's effects take place after it has"
                " returned, a transaction's when its block ends"
            )
        return self._replies[number - 1]


def _binaries(
    values: Sequence[int | str | bytes], command: int, sign: int
) -> tuple[tuple[int, int, bytes], ...]:
    """Return what is no UTF-8 and goes beside the packed command: command, place, value.

    sign: -1 for the values of tests, whose places are counted below zero.
    """
    places = enumerate(values, 1)
    return tuple((command, sign * at, value) for at, value in places if isinstance(value, bytes))


_OTHERS = ("join", "finally_set", "own", "key", "close", "answered", "reply")
_NAMES = [n for n, v in vars(Effects).items() if callable(v) and n[0] != "_" and n not in _OTHERS]
