"""A look at what a bus keeps, and a hand in it, from outside: a client that is not ours.

On a server that is redis-py's. `MemoryEyes` is its twin for `memory://`: the methods that the tests
use, with the same names, arguments and answers, straight on the state. It changes what a neighbour
in another language might change: by hand, past the verbs of the bus.
"""

from __future__ import annotations

import fnmatch
import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redis import Redis as SyncRedis
from redis.asyncio import Redis

from bus.streams.address import parse_url
from bus.streams.memory.connection import run
from bus.streams.memory.log import HIGHEST, Log, first_of, last_of, written
from bus.streams.memory.place import Place, forget, no_group, place_of, wire
from bus.streams.memory.store import MemoryStore
from bus.streams.stream import StreamStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from typing import Self

    from bus import Bus


def eyes_on(url: str) -> Any:
    """Return a client of the server at a URL, or its twin."""
    address = parse_url(url)
    if address.scheme == "memory":
        return MemoryEyes(place_of(address.path))
    return Redis.from_url(url, protocol=2)  # with 3 it does not see that it was cut off


async def raw(store: StreamStore, *words: Any) -> Any:
    """Send one command past the verbs; its reply is as it is on the wire."""
    if isinstance(store, MemoryStore):
        return await MemoryEyes(store.place).command(*words)
    return await store.commands.call(*words)


def verbs_of(url: str) -> type[StreamStore]:
    """Return the class whose verbs a bus uses there, for those who get in their way."""
    return MemoryStore if url.startswith("memory://") else StreamStore


def eyes_of(bus: Bus) -> Any:
    """Return the same for what a bus is on; it goes with the bus."""
    store = bus.store
    return MemoryEyes(store.place) if isinstance(store, MemoryStore) else bus.redis


@contextmanager
def length_of(url: str, stream: str) -> Iterator[Callable[[], int]]:
    """Give what tells, again and again and from a thread of its own, how long a stream is."""
    address = parse_url(url)
    if address.scheme == "memory":
        place = place_of(address.path)
        yield lambda: len(place.log(wire(stream)) or ())
    else:
        with SyncRedis.from_url(url) as redis:
            yield lambda: redis.xlen(stream)


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _row(flat: list[Any]) -> dict[str, Any]:
    return {name.decode(): value for name, value in _pairs(flat).items()}


class MemoryEyes:
    """redis-py's client, as far as the tests need one, on a place in this process."""

    def __init__(self, place: Place) -> None:
        self.place = place

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def execute_command(self, *words: Any) -> Any:
        """Run one command; numbers come as redis-py would have them."""
        reply = await self.command(*words)
        return float(reply) if words[0] in ("ZSCORE", "ZINCRBY", "INCRBYFLOAT") and reply else reply

    async def command(self, *words: Any) -> Any:  # noqa: C901, PLR0911 - one for each command
        """Run one command and return its reply as it is on the wire."""
        match words:
            case ["XADD", key, entry_id, *fields]:
                return self._add(key, [wire(f) for f in fields], entry_id)
            case ["XREADGROUP", "GROUP", group, consumer, "COUNT", count, "STREAMS", key, ">"]:
                return [
                    [key, [[i, [x for p in f.items() for x in p]] for i, f in rows]]
                    for key, rows in await self.xreadgroup(group, consumer, {key: ">"}, int(count))
                ]
            case ["XACK", key, group, *ids]:
                return await self.xack(key, group, *ids)
            case ["XTRIM", key, "MAXLEN", *_, maxlen]:
                return await self.xtrim(key, int(maxlen))
            case ["XGROUP", "DESTROY", key, group]:
                return await self.xgroup_destroy(key, group)
            case ["XGROUP", "SETID", key, group, entry_id]:
                return await self.xgroup_setid(key, group, entry_id)
            case ["PTTL" | "TTL" as name, key]:
                return await getattr(self, name.lower())(key)
            case ["HLEN" | "STRLEN", key]:
                return len(self.place.value(wire(key)) or ())
            case ["PING"]:
                return b"PONG"
            case ["FLUSHALL"]:
                await self.delete(*self.place.all_keys())
                return b"OK"
            case _:
                return run(self.place, *words)

    def __getattr__(self, name: str) -> Any:
        if name not in _PLAIN:
            raise AttributeError(f"the eyes on memory:// have no {name}: see tests/eyes.py")

        async def plain(*args: Any) -> Any:
            return run(self.place, name.upper(), *args)

        return plain

    # --- keys

    async def ping(self) -> bool:
        return True

    async def time(self) -> tuple[int, int]:
        seconds, ms = divmod(self.place.now_ms(), 1000)
        return seconds, ms * 1000

    async def type(self, key: Any) -> bytes:
        return self.place.kind(wire(key)).encode()

    async def exists(self, *keys: Any) -> int:
        return sum(self.place.exists(wire(k)) for k in keys)

    async def delete(self, *keys: Any) -> int:
        return sum(self.place.drop(wire(k)) for k in keys)

    async def rename(self, key: Any, new: Any) -> bool:
        value = self.place.value(wire(key))
        assert value is not None
        self.place.drop(wire(key))
        self.place.put(wire(new), value)
        return True

    async def keys(self, match: str = "*") -> list[bytes]:
        return [k for k in self.place.all_keys() if fnmatch.fnmatch(k.decode(), _glob(match))]

    async def strlen(self, key: Any) -> int:
        return await self.command("STRLEN", key)

    async def hkeys(self, key: Any) -> list[bytes]:
        return list(await self.hgetall(key))

    async def scan_iter(self, match: str = "*", count: int = 0) -> AsyncIterator[bytes]:
        for key in await self.keys(match):
            yield key

    async def pttl(self, key: Any) -> int:
        left_ms = self.place.left_ms(wire(key))
        return (-1 if left_ms is None else left_ms) if self.place.exists(wire(key)) else -2

    async def ttl(self, key: Any) -> int:
        left_ms = await self.pttl(key)
        return left_ms if left_ms < 0 else round(left_ms / 1000)

    async def dump(self, key: Any) -> bytes | None:
        value = self.place.value(wire(key))
        return None if value is None else pickle.dumps(value)

    async def restore(self, key: Any, ttl_ms: int, value: bytes, *, replace: bool = False) -> None:
        assert replace or not self.place.exists(wire(key))
        self.place.put(wire(key), pickle.loads(value), ttl_ms or None)  # noqa: S301 - our own

    async def set(self, key: Any, value: Any, *, px: int | None = None) -> bool:
        self.place.put(wire(key), wire(value), px)
        return True

    async def hset(
        self, key: Any, field: Any = None, value: Any = None, mapping: Mapping[Any, Any] = {}
    ) -> int:
        pairs = {**({} if field is None else {field: value}), **mapping}
        return run(self.place, "HSET", key, *(part for pair in pairs.items() for part in pair))

    async def hgetall(self, key: Any) -> dict[bytes, bytes]:
        return _pairs(run(self.place, "HGETALL", key))

    async def smembers(self, key: Any) -> set[bytes]:
        return set(run(self.place, "SMEMBERS", key))

    async def zscore(self, key: Any, member: Any) -> float | None:
        score = run(self.place, "ZSCORE", key, member)
        return None if score is None else float(score)

    # --- streams

    def _log(self, key: Any) -> Log:
        return self.place.log(wire(key)) or Log()

    def _add(self, key: Any, fields: list[bytes], entry_id: Any) -> bytes:
        wanted = None if entry_id in ("*", b"*") else first_of(entry_id)
        return written(self.place.append(wire(key), fields, wanted))

    async def xadd(self, key: Any, fields: Mapping[Any, Any], id: Any = "*") -> bytes:
        return self._add(key, [wire(part) for pair in fields.items() for part in pair], id)

    async def xrange(
        self, key: Any, min: Any = "-", max: Any = "+", count: int | None = None
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        log = self._log(key)
        rows = log.rows(log.between(first_of(wire(min)), last_of(wire(max)), count))
        return [(i, _pairs(fields)) for i, fields in rows]

    async def xrevrange(
        self, key: Any, max: Any = "+", min: Any = "-", count: int | None = None
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return (await self.xrange(key, min, max))[::-1][:count]

    async def xtrim(
        self, key: Any, maxlen: int | None = None, minid: Any = None, approximate: bool = True
    ) -> int:
        log = self._log(key)
        if maxlen is None:
            return log.trim(log.count_before(first_of(wire(minid))))
        return log.trim(max(0, len(log) - maxlen))

    async def xinfo_stream(self, key: Any) -> dict[str, Any]:
        return _row(run(self.place, "XINFO", "STREAM", key))

    async def xinfo_groups(self, key: Any) -> list[dict[str, Any]]:
        return [_row(r) for r in run(self.place, "XINFO", "GROUPS", key)]

    async def xinfo_consumers(self, key: Any, group: Any) -> list[dict[str, Any]]:
        return [_row(r) for r in run(self.place, "XINFO", "CONSUMERS", key, group)]

    async def xgroup_create(
        self, key: Any, group: Any, id: Any = "$", mkstream: bool = False
    ) -> bool:
        run(self.place, "XGROUP", "CREATE", key, group, id, *(["MKSTREAM"] if mkstream else []))
        return True

    async def xgroup_setid(self, key: Any, group: Any, id: Any) -> bool:
        log, state = self.place.group(wire(key), wire(group))
        state.delivered = log.last if id in ("$", b"$") else first_of(wire(id))
        return True

    async def xgroup_destroy(self, key: Any, group: Any) -> int:
        gone = self._log(key).groups.pop(wire(group), None)
        self.place.ring(wire(key))
        return int(gone is not None)

    async def xgroup_createconsumer(self, key: Any, group: Any, consumer: Any) -> int:
        _, state = self.place.group(wire(key), wire(group))
        state.consumer(wire(consumer), self.place.now_ms())
        return 1

    async def xgroup_delconsumer(self, key: Any, group: Any, consumer: Any) -> int:
        _, state = self.place.group(wire(key), wire(group))
        return state.drop_consumer(wire(consumer))

    async def xreadgroup(
        self,
        group: Any,
        consumer: Any,
        streams: Mapping[Any, Any],
        count: int | None = None,
    ) -> list[Any]:
        """`>` alone: what the group was not given yet."""
        found = []
        for key in streams:
            log, state = self.place.group(wire(key), wire(group))
            state.consumer(wire(consumer), self.place.now_ms())
            new = log.between((state.delivered[0], state.delivered[1] + 1), HIGHEST, count)
            for entry_id in new:
                state.deliver(entry_id, wire(consumer), self.place.now_ms())
                state.delivered = entry_id
            if new:
                found.append([wire(key), [(i, _pairs(f)) for i, f in log.rows(new)]])
        return found

    async def xack(self, key: Any, group: Any, *ids: Any) -> int:
        state = self._log(key).groups.get(wire(group))
        return 0 if state is None else sum(state.finish(first_of(wire(i))) for i in ids)

    async def xclaim(
        self,
        key: Any,
        group: Any,
        consumer: Any,
        min_idle_time: int,
        ids: list[Any],
        *,
        idle: int = 0,
        retrycount: int | None = None,
        justid: bool = False,
    ) -> list[Any]:
        log, state = self.place.group(wire(key), wire(group))
        claimed = []
        for entry_id in (first_of(wire(i)) for i in ids):
            row = state.rows.get(entry_id)
            if row is None or log.drop_ghost(state, entry_id):
                continue
            count = row.count + (not justid) if retrycount is None else retrycount
            state.hand_over(entry_id, wire(consumer), self.place.now_ms(), count, idle)
            claimed.append(written(entry_id) if justid else log.rows([entry_id])[0])
        return claimed

    async def xpending(self, key: Any, group: Any) -> dict[str, Any]:
        _, state = self.place.group(wire(key), wire(group))
        return {"pending": len(state.rows)}

    async def xpending_range(
        self, key: Any, group: Any, min: Any, max: Any, count: int, consumername: Any = None
    ) -> list[dict[str, Any]]:
        if wire(group) not in self._log(key).groups:
            raise no_group(wire(key), wire(group))
        owner = [] if consumername is None else [consumername]
        rows = run(self.place, "XPENDING", key, group, min, max, count, *owner)
        names = ("message_id", "consumer", "time_since_delivered", "times_delivered")
        return [dict(zip(names, row, strict=True)) for row in rows]

    # --- many at once

    def pipeline(self, *, transaction: bool = True) -> _Pipeline:
        return _Pipeline(self)


class _Pipeline:
    """What is asked is done when it is executed."""

    def __init__(self, eyes: MemoryEyes) -> None:
        self._eyes = eyes
        self._asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **named: self._asked.append((name, args, named))

    async def execute(self) -> list[Any]:
        return [await getattr(self._eyes, name)(*a, **k) for name, a, k in self._asked]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...


def _glob(match: str) -> str:
    return match.replace("[", "[[]")


_PLAIN = frozenset(
    [
        *("get", "incrby", "hget", "hincrby", "hdel", "sadd", "srem", "sismember", "scard"),
        *("zadd", "zcard", "persist", "pexpire", "expire", "xlen", "xdel"),
    ]
)


class MemoryServer:
    """What stands in the place of a server: `memory://tests`."""

    url = "memory://tests"

    def flush(self) -> None:
        forget("tests")

    def ask(self, *words: str | bytes) -> bytes:
        """Run one command and return its reply as it would stand on the wire."""
        asking = MemoryEyes(place_of("tests")).command(*(_as_text(w) for w in words))
        try:
            asking.send(None)  # nothing is waited for
        except StopIteration as done:
            return _encoded(done.value)
        raise AssertionError("it waits")


def _as_text(word: str | bytes) -> str | bytes:
    try:
        return word.decode() if isinstance(word, bytes) else word
    except UnicodeDecodeError:
        return word


def _encoded(reply: Any) -> bytes:
    match reply:
        case None:
            return b"$-1\r\n"
        case bool():
            return b"+OK\r\n"
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case _:
            return b"*%d\r\n" % len(reply) + b"".join(map(_encoded, reply))
