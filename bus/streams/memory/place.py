"""The state of `memory://`: keys and what they hold, when they expire, and who waits for news.

`print(bus.store)` shows a place. It belongs to its process: a forked child has a copy of it.
"""

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from bus.streams.connection import Arg
from bus.streams.fork import call_after_fork
from bus.streams.memory.log import Group, Id, Log, following, is_lane, written
from bus.streams.replies import ReplyError


class Scores(dict[bytes, float]):
    """A sorted set: member -> score."""


class Sealed:
    """What only one verb reads again, see `effects.py`."""


Value = bytes | dict[bytes, bytes] | set[bytes] | Scores | Log | Sealed
_T = TypeVar("_T", bytes, "dict[bytes, bytes]", "set[bytes]", Scores, Log)
_KINDS: dict[type, str] = {dict: "hash", set: "set", Scores: "zset", Log: "stream"}
_LOOK_AROUND = 1_000  # keys that expire are looked at, all of them, once in so many new ones


def wire(value: Arg) -> bytes:
    """Return a name or a value in the bytes that a server would have."""
    if isinstance(value, bytes):
        return value
    return str(value).encode("utf-8", "surrogateescape")


def wrong_type() -> ReplyError:
    """Return what is said where a key holds something else."""
    return ReplyError(
        "WRONGTYPE", "WRONGTYPE Operation against a key holding the wrong kind of value"
    )


def no_group(key: bytes, group: bytes) -> ReplyError:
    """Return what is said where there is no such group."""
    names = (n.decode(errors="replace") for n in (key, group))
    return ReplyError("NOGROUP", "NOGROUP No such key '{}' or consumer group '{}'".format(*names))


class Waiter:
    """A read that waits; woken once, from whatever thread.

    woken: True when something came, False when it is to wait no more.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.woken: asyncio.Future[bool] = self._loop.create_future()

    def wake(self, error: Exception | None = None, *, came: bool = True) -> None:
        """End the waiting, with an error if there is one."""
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._end(error, came)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, error, came)

    def _end(self, error: Exception | None, came: bool) -> None:  # noqa: FBT001 - see `wake`
        if self.woken.done():
            return
        if error is None:
            self.woken.set_result(came)
        else:
            self.woken.set_exception(error)


class Place:
    """Everything that buses on one `memory://` URL share. Verbs hold `lock` while they work."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self._values: dict[bytes, Value] = {}
        self._expires_ms: dict[bytes, int] = {}
        self._waiting: dict[bytes, set[Waiter]] = {}
        self._newest: Id = (0, 0)  # the highest id given here
        self._until_look = _LOOK_AROUND
        call_after_fork(self._after_fork)

    def _after_fork(self) -> None:
        """Leave to the parent who holds the lock and who waits: in the child nobody lets go."""
        self.lock = threading.RLock()
        self._waiting.clear()

    # --- time

    def now_ms(self) -> int:
        """Return the time by which ids are made and things expire, in ms."""
        return time.time_ns() // 1_000_000

    # --- keys

    def value(self, key: bytes) -> Value | None:
        """Return what a key holds, None if there is none or it has expired."""
        due = self._expires_ms.get(key)
        if due is not None and due <= self.now_ms():
            self.drop(key)
        return self._values.get(key)

    def get(self, key: bytes, kind: type[_T]) -> _T | None:
        """Return what a key holds if it is of that kind. Errors: ReplyError WRONGTYPE."""
        value = self.value(key)
        if value is None or type(value) is kind:
            return value
        raise wrong_type()

    def made(self, key: bytes, kind: type[_T]) -> _T:
        """Return the same, an empty one made if there is none."""
        found = self.get(key, kind)
        if found is None:
            found = self._values[key] = kind()
        return found

    def put(self, key: bytes, value: Value, ttl_ms: int | None = None) -> None:
        """Have a key hold `value`, whatever it held before."""
        self._values[key] = value
        self._expires_ms.pop(key, None)
        if ttl_ms is not None:
            self.expire(key, ttl_ms)

    def drop(self, key: bytes) -> bool:
        """Delete a key; whether it was there. Who waits for a stream is told."""
        self._expires_ms.pop(key, None)
        value = self._values.pop(key, None)
        if type(value) is Log:
            self.ring(key)
        return value is not None

    def tidy(self, key: bytes) -> None:
        """Delete a key that holds nothing any more; a stream may be empty."""
        if key in self._values and not self._values[key]:
            self.drop(key)

    def kind(self, key: bytes) -> str:
        """Return what kind of value a key holds, in Redis's words; "none" if there is none."""
        value = self.value(key)
        return "none" if value is None else _KINDS.get(type(value), "string")

    def all_keys(self) -> list[bytes]:
        """Return all keys, in order."""
        return sorted(k for k in list(self._values) if self.value(k) is not None)

    # --- expiry

    def expire(self, key: bytes, ttl_ms: int) -> None:
        """Have a key expire in so many ms."""
        self._expires_ms[key] = self.now_ms() + ttl_ms
        self._until_look -= 1
        if self._until_look <= 0:
            self._until_look = max(_LOOK_AROUND, len(self._expires_ms))
            for other in list(self._expires_ms):
                self.value(other)

    def persist(self, key: bytes) -> bool:
        """Have a key stay; whether it would have expired."""
        return self.value(key) is not None and self._expires_ms.pop(key, None) is not None

    def left_ms(self, key: bytes) -> int | None:
        """Return in how many ms a key expires, None if it does not."""
        due = self._expires_ms.get(key)
        return None if due is None else due - self.now_ms()

    # --- streams

    def log(self, key: bytes) -> Log | None:
        """Return a stream, None if there is none. Errors: ReplyError WRONGTYPE."""
        return self.get(key, Log)

    def append(self, key: bytes, fields: list[bytes], entry_id: Id | None = None) -> Id:
        """Append an entry to a stream, made if there is none; wake who waits for it.

        Without an id it gets the next one of the whole place: so all entries are in order, in
        whatever stream they are. Errors: ReplyError WRONGTYPE, or for an id that is too low.
        """
        log = self.made(key, Log)
        if entry_id is None:
            entry_id = max((self.now_ms(), 0), following(self._newest), following(log.last))
        log.add(fields, entry_id)
        self._newest = max(self._newest, entry_id)
        self.ring(key)
        return entry_id

    def group(self, key: bytes, name: bytes) -> tuple[Log, Group]:
        """Return a stream and a group of it. Errors: ReplyError NOGROUP, WRONGTYPE."""
        log = self.log(key)
        group = None if log is None else log.groups.get(name)
        if log is None or group is None:
            raise no_group(key, name)
        return log, group

    def exists(self, key: bytes) -> bool:
        """Return whether there is such a key."""
        return self.value(key) is not None

    # --- waiting

    def wait_for(self, keys: Iterable[bytes], waiter: Waiter) -> None:
        """Wake `waiter` when something is appended to one of `keys`, or one goes."""
        for key in keys:
            self._waiting.setdefault(key, set()).add(waiter)

    def wait_no_more(self, keys: Iterable[bytes], waiter: Waiter) -> None:
        """Undo `wait_for`."""
        for key in keys:
            waiting = self._waiting.get(key)
            if waiting is not None:
                waiting.discard(waiter)
                if not waiting:
                    del self._waiting[key]

    def ring(self, key: bytes) -> None:
        """Wake who waits for a stream."""
        for waiter in self._waiting.pop(key, ()):
            waiter.wake()

    # --- looking

    def __repr__(self) -> str:
        logs = [v for v in self._values.values() if type(v) is Log]
        pending = sum(len(g.rows) for log in logs for g in log.groups.values())
        entries = sum(map(len, logs))
        return (
            f"<memory://{self.name}: {len(self._values)} keys, {len(logs)} streams,"
            f" {entries} entries, {pending} pending>"
        )

    def __str__(self) -> str:
        """Show every key; of streams the groups, and who has how much of them pending."""
        with self.lock:
            return "\n".join(
                [repr(self), *(line for k in self.all_keys() for line in self._shown(k))]
            )

    def _shown(self, key: bytes) -> Iterator[str]:
        value, name = self._values[key], key.decode(errors="replace")
        left_ms = self.left_ms(key)
        expires = "" if left_ms is None else f", expires in {left_ms / 1000:.1f} s"
        if not isinstance(value, Log):
            size = "" if isinstance(value, Sealed) else f" of {len(value)}"
            yield f"  {name}: {self.kind(key)}{size}{expires}"
            return
        yield f"  {name}: {len(value)} entries, the last {written(value.last).decode()}{expires}"
        for group, state in sorted(value.groups.items()):
            yield (
                f"    {group.decode(errors='replace')}: delivered up to"
                f" {written(state.delivered).decode()}, {value.ahead_of(state)} ahead,"
                f" {len(state.rows)} pending"
            )
            for consumer, has in sorted(state.consumers.items()):
                what = "lane" if is_lane(consumer) else "worker"
                yield f"      {what} {consumer.decode(errors='replace')}: {len(has.rows)}"


_places: dict[str, Place] = {}


def place_of(name: str) -> Place:
    """Return the place of a name, for as long as the process lives; "" is a new one each time."""
    return _places.setdefault(name, Place(name)) if name else Place("")


def forget(name: str) -> None:
    """Forget a place: who asks for its name next finds an empty one."""
    _places.pop(name, None)
