"""The commands that effects may run, and those of the bus's own keys, beside streams.

Each takes the place and its arguments as bytes, the key first, and answers as a server does.
Errors: ReplyError, in a server's words.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

from bus.streams.memory import numbers
from bus.streams.memory.place import Place, Scores
from bus.streams.replies import Reply, ReplyError

Command = Callable[..., Reply]
_NO_INTEGER = "value is not an integer or out of range"
_NO_FLOAT = "value is not a valid float"


def _error(text: str) -> ReplyError:
    return ReplyError("ERR", f"ERR {text}")


def _whole(value: bytes, said: str = _NO_INTEGER) -> int:
    """Return a whole number of 64 bits, written as a server writes one."""
    try:
        return numbers.whole(value)
    except ValueError:
        raise _error(said) from None


def _summed(before: bytes | None, by: bytes, said: str) -> int:
    step = _whole(by)
    total = (0 if before is None else _whole(before, said)) + step
    if not numbers.fits(total):
        raise _error("increment or decrement would overflow")
    return total


def _long_double(value: bytes, said: str) -> Fraction | None:
    try:
        return numbers.long_double(value)
    except ValueError:
        raise _error(said) from None


def _float_sum(before: bytes | None, by: Fraction | None, said: str) -> bytes:
    there = Fraction() if before is None else _long_double(before, said)
    if there is not None and by is not None:
        with suppress(ValueError):
            return numbers.long_double_text(numbers.nearest(there + by))
    raise _error("increment would produce NaN or Infinity")


def _score(value: bytes) -> float:
    try:
        return numbers.score(value)
    except ValueError:
        raise _error(_NO_FLOAT) from None


# --- strings


def _set(place: Place, key: bytes, value: bytes, *options: bytes) -> Reply:
    """SET, with PX and a time, NX or XX."""
    if (b"NX" in options and place.exists(key)) or (b"XX" in options and not place.exists(key)):
        return None
    ttl_ms = int(options[options.index(b"PX") + 1]) if b"PX" in options else None
    place.put(key, value, ttl_ms)
    return b"OK"


def _get(place: Place, key: bytes) -> Reply:
    return place.get(key, bytes)


def _kept(place: Place, key: bytes, value: bytes) -> None:
    """Change a string and leave its time."""
    left_ms = place.left_ms(key)
    place.put(key, value, left_ms)


def _incrby(place: Place, key: bytes, by: bytes) -> Reply:
    total = _summed(place.get(key, bytes), by, _NO_INTEGER)
    _kept(place, key, b"%d" % total)
    return total


def _incrbyfloat(place: Place, key: bytes, by: bytes) -> Reply:
    total = _float_sum(place.get(key, bytes), _long_double(by, _NO_FLOAT), _NO_FLOAT)
    _kept(place, key, total)
    return total


# --- hashes


def _hset(place: Place, key: bytes, *pairs: bytes) -> Reply:
    fields = place.made(key, dict)
    before = len(fields)
    fields.update(zip(pairs[::2], pairs[1::2], strict=True))
    return len(fields) - before


def _hsetnx(place: Place, key: bytes, field: bytes, value: bytes) -> Reply:
    fields = place.made(key, dict)
    if field in fields:
        return 0
    fields[field] = value
    return 1


def _hget(place: Place, key: bytes, field: bytes) -> Reply:
    fields = place.get(key, dict)
    return None if fields is None else fields.get(field)


def _hgetall(place: Place, key: bytes) -> Reply:
    fields = place.get(key, dict) or {}
    return [part for pair in fields.items() for part in pair]


def _hincrby(place: Place, key: bytes, field: bytes, by: bytes) -> Reply:
    fields = place.get(key, dict) or {}
    total = _summed(fields.get(field), by, "hash value is not an integer")
    place.made(key, dict)[field] = b"%d" % total
    return total


def _hincrbyfloat(place: Place, key: bytes, field: bytes, by: bytes) -> Reply:
    step = _long_double(by, _NO_FLOAT)
    if step is None:
        raise _error("value is NaN or Infinity")
    fields = place.get(key, dict) or {}
    total = _float_sum(fields.get(field), step, "hash value is not a float")
    place.made(key, dict)[field] = total
    return total


def _hdel(place: Place, key: bytes, *names: bytes) -> Reply:
    fields = place.get(key, dict) or {}
    gone = sum(fields.pop(n, None) is not None for n in names)
    place.tidy(key)
    return gone


# --- sets


def _sadd(place: Place, key: bytes, *members: bytes) -> Reply:
    there = place.made(key, set)
    before = len(there)
    there.update(members)
    return len(there) - before


def _srem(place: Place, key: bytes, *members: bytes) -> Reply:
    there = place.get(key, set) or set()
    before = len(there)
    there.difference_update(members)
    gone = before - len(there)
    place.tidy(key)
    return gone


def _sismember(place: Place, key: bytes, member: bytes) -> Reply:
    return int(member in (place.get(key, set) or ()))


def _smembers(place: Place, key: bytes) -> Reply:
    return list(place.get(key, set) or ())


def _scard(place: Place, key: bytes) -> Reply:
    return len(place.get(key, set) or ())


# --- sorted sets

_FLAGS = frozenset([b"NX", b"XX", b"GT", b"LT"])


def _zadd(place: Place, key: bytes, *args: bytes) -> Reply:
    at = next(n for n, arg in enumerate(args) if arg not in _FLAGS)
    flags, pairs = args[:at], args[at:]
    new = [(m, _score(s)) for s, m in zip(pairs[::2], pairs[1::2], strict=True)]
    scores, added = place.made(key, Scores), 0
    for member, score in new:
        before = scores.get(member)
        if before is None:
            if b"XX" not in flags:
                scores[member] = score
                added += 1
        elif not (
            b"NX" in flags
            or (b"GT" in flags and score <= before)
            or (b"LT" in flags and score >= before)
        ):
            scores[member] = score
    place.tidy(key)
    return added


def _zincrby(place: Place, key: bytes, by: bytes, member: bytes) -> Reply:
    scores = place.get(key, Scores) or Scores()
    step, before = _score(by), scores.get(member)
    total = step if before is None else before + step
    if math.isnan(total):
        raise _error("resulting score is not a number (NaN)")
    place.made(key, Scores)[member] = total
    return numbers.score_text(total)


def _zrem(place: Place, key: bytes, *members: bytes) -> Reply:
    scores = place.get(key, Scores) or Scores()
    gone = sum(scores.pop(m, None) is not None for m in members)
    place.tidy(key)
    return gone


def _zscore(place: Place, key: bytes, member: bytes) -> Reply:
    score = (place.get(key, Scores) or Scores()).get(member)
    return None if score is None else numbers.score_text(score + 0.0)  # never -0


def _zcard(place: Place, key: bytes) -> Reply:
    return len(place.get(key, Scores) or ())


# --- keys of any type


def _exists(place: Place, *keys: bytes) -> Reply:
    return sum(place.exists(k) for k in keys)


def _unlink(place: Place, *keys: bytes) -> Reply:
    return sum(place.value(k) is not None and place.drop(k) for k in keys)


def _pexpire(place: Place, key: bytes, ttl_ms: bytes) -> Reply:
    if not place.exists(key):
        return 0
    place.expire(key, int(ttl_ms))
    return 1


def _expire(place: Place, key: bytes, ttl_s: bytes) -> Reply:
    return _pexpire(place, key, b"%d" % (int(ttl_s) * 1000))


def _pttl(place: Place, key: bytes) -> Reply:
    if not place.exists(key):
        return -2
    left_ms = place.left_ms(key)
    return -1 if left_ms is None else max(0, left_ms)


def _persist(place: Place, key: bytes) -> Reply:
    return int(place.persist(key))


def _type(place: Place, key: bytes) -> Reply:
    return place.kind(key).encode()


VALUES: dict[str, Command] = {
    "SET": _set,
    "GET": _get,
    "INCRBY": _incrby,
    "INCRBYFLOAT": _incrbyfloat,
    "HSET": _hset,
    "HSETNX": _hsetnx,
    "HGET": _hget,
    "HGETALL": _hgetall,
    "HINCRBY": _hincrby,
    "HINCRBYFLOAT": _hincrbyfloat,
    "HDEL": _hdel,
    "SADD": _sadd,
    "SREM": _srem,
    "SISMEMBER": _sismember,
    "SMEMBERS": _smembers,
    "SCARD": _scard,
    "ZADD": _zadd,
    "ZINCRBY": _zincrby,
    "ZREM": _zrem,
    "ZSCORE": _zscore,
    "ZCARD": _zcard,
    "EXISTS": _exists,
    "DEL": _unlink,
    "UNLINK": _unlink,
    "PEXPIRE": _pexpire,
    "EXPIRE": _expire,
    "PERSIST": _persist,
    "PTTL": _pttl,
    "TYPE": _type,
}
