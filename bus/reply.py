"""What an effect will be answered, and what may be asked of it before: tests made by the server.

Also how values become arguments of a command. Pure, like `effects.py`, whose other half this is.
"""

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn, Protocol, TypeAlias

import msgspec

from bus.errors import InvalidEffect, NoReplyYet

Value: TypeAlias = str | bytes | int | float
Arg: TypeAlias = str | bytes  # bytes only if they are no UTF-8

# A script compares as doubles: up to here every whole number is one, and no other looks like it.
_EXACT = 2**53 - 1
_INT64 = 2**63


class Answers(Protocol):
    """Whoever collects effects, and is told the replies."""

    def reply(self, number: int) -> tuple[bool, Any]:
        """Return whether command `number`, from 1, ran, and its reply. Errors: NoReplyYet."""


class Condition(msgspec.Struct, eq=False, gc=False):
    """A test of a reply, made by the server; `a & b` holds when both do.

    tests: command, from 1; name of the test; its low and high value; and so on.
    """

    tests: list[int | str | bytes]
    effects: Answers

    def __and__(self, other: "Condition") -> "Condition":
        if not isinstance(other, Condition):
            return NotImplemented
        if other.effects is not self.effects:
            raise InvalidEffect("conditions on replies of different effects cannot be joined")
        return Condition(self.tests + other.tests, self.effects)

    def __bool__(self) -> bool:
        raise NoReplyYet("a condition is tested by the server: pass it as when=, join two with &")


def _not_yet() -> NoReturn:
    raise NoReplyYet(
        "the server has not answered yet, and nothing is awaited here: decide with"
        " when=reply.between(...), .equals(...), .present() or .missing(); after a transaction use"
        " reply.value"
    )


_FLAGS = frozenset(["EXISTS", "SISMEMBER"])  # they answer 1 or 0
_MAY_BE_NOTHING = frozenset(["GET", "HGET", "SET", "ZSCORE"])


class Reply(msgspec.Struct, eq=False, gc=False):
    """What the server will answer to one effect.

    Until then it can only be tested by the server, with `when=`; a test of a command that was
    itself skipped does not hold. After a transaction, `value` has it.
    """

    _effects: Answers
    _index: int
    _command: str

    def between(self, low: float, high: float) -> Condition:
        """Whether it is a number from `low` to `high`, both included."""
        return self._test("between", _bound(low), _bound(high))

    def at_least(self, low: float) -> Condition:
        """Whether it is a number not below `low`."""
        return self._test("between", _bound(low), "1e999")

    def at_most(self, high: float) -> Condition:
        """Whether it is a number not above `high`."""
        return self._test("between", "-1e999", _bound(high))

    def equals(self, value: Value) -> Condition:
        """Whether it is `value`, as text: 1 and "1" are equal, 1 and 1.0 are not."""
        return self._test("equals", value_of(value))

    def differs(self, value: Value) -> Condition:
        """Whether it is there and not `value`."""
        return self._test("differs", value_of(value))

    def missing(self) -> Condition:
        """Whether there was nothing: no such key, field or member; SET whose nx or xx failed.

        Errors: InvalidEffect for a command that always answers a number.
        """
        return self._is_there(present=False)

    def present(self) -> Condition:
        """Whether there was something; of other commands, whether they ran at all."""
        return self._is_there(present=True)

    def _is_there(self, *, present: bool) -> Condition:
        if self._command in _FLAGS:
            return self._test("equals", "1" if present else "0")
        if present or self._command in _MAY_BE_NOTHING:
            return self._test("present" if present else "missing")
        raise InvalidEffect(
            f"{self._command} always has an answer: test it with .equals, .between or .at_least"
        )

    def _test(self, name: str, low: Arg = "", high: Arg = "") -> Condition:
        return Condition([self._index, name, low, high], self._effects)

    @property
    def skipped(self) -> bool:
        """Whether its condition did not hold. Errors: NoReplyYet."""
        return not self._effects.reply(self._index)[0]

    @property
    def value(self) -> Any:
        """What the server answered: bytes, int, None; a Receipt for `publish`; None if skipped.

        Errors: NoReplyYet, before the transaction is over, and always in a handler.
        """
        return self._effects.reply(self._index)[1]

    def __repr__(self) -> str:
        return f"<Reply {self._index} of {self._effects!r}>"

    def _refuse(self, *_: object) -> Any:
        _not_yet()

    __bool__ = __int__ = __float__ = __index__ = __str__ = __bytes__ = __format__ = _refuse
    __iter__ = __len__ = __getitem__ = __await__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __hash__ = object.__hash__


def key_of(key: object) -> str:
    """Return a key as text. Errors: InvalidEffect, NoReplyYet."""
    if isinstance(key, Reply):
        _not_yet()
    if isinstance(key, bytes):
        key = text_of(key)
    if not isinstance(key, str):
        raise InvalidEffect(f"a key is str or UTF-8 bytes, not {type(key).__name__}")
    return checked_text(key)


def text_of(value: bytes) -> Arg:
    """Return bytes as text if they are UTF-8, else as they are."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def checked_text(text: str) -> str:
    """Return `text`, without its class, if it can be encoded. Errors: InvalidEffect."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidEffect("a text is not UTF-8: it holds a lone surrogate") from None
    return str.__str__(text)  # that of an enum, or any class of a user's, may be anything


def value_of(value: object) -> Arg:
    """Return a value as an argument. Errors: InvalidEffect, NoReplyYet."""
    if value.__class__ is str and value.isascii():
        return value
    if isinstance(value, str):
        return checked_text(value)
    if isinstance(value, bytes):
        return text_of(value)
    if isinstance(value, int | float):
        return number_of(value)
    if isinstance(value, Reply):
        _not_yet()
    raise InvalidEffect(
        f"a value is str, bytes, int or float, not {type(value).__name__}: encode it first"
    )


def whole_of(value: object) -> str:
    """Return a whole number of 64 bits. Errors: InvalidEffect, NoReplyYet."""
    if value.__class__ is int and -_INT64 <= value < _INT64:
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, Reply):
            _not_yet()
        raise InvalidEffect(f"a whole number is needed, not {type(value).__name__}")
    if not -_INT64 <= value < _INT64:
        raise InvalidEffect("a whole number above 64 bits: Redis counts no further")
    return str(int(value))


def number_of(value: object) -> str:
    """Return a number as an argument. Errors: InvalidEffect, NoReplyYet."""
    if not isinstance(value, float):
        return whole_of(value)
    if not math.isfinite(value):
        raise InvalidEffect("NaN and Infinity are no numbers to Redis's counters")
    return repr(float(value))


def score_of(value: object) -> str:
    """Return a score of a sorted set, a double, as an argument. Errors: InvalidEffect."""
    if isinstance(value, int) and abs(value) > _EXACT:
        raise InvalidEffect(f"{value} is above 2^53: scores are doubles, and would change it")
    return number_of(value)


def _bound(value: object) -> str:
    if value.__class__ is int and -_EXACT <= value <= _EXACT:
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    if isinstance(value, int) and abs(value) > _EXACT:
        raise InvalidEffect(
            f"{value} is not between -2^53 and 2^53: scripts compare larger numbers inexactly"
        )
    return number_of(value)


def milliseconds_of(ttl: object) -> str:
    """Return a time to live in whole milliseconds. Errors: InvalidEffect."""
    if not isinstance(ttl, timedelta):
        raise InvalidEffect(f"a ttl is a timedelta, not {type(ttl).__name__}")
    milliseconds = ttl // timedelta(milliseconds=1)
    if milliseconds < 1:
        raise InvalidEffect("a ttl below a millisecond would delete at once: use delete")
    return str(milliseconds)


def several(name: str, values: Iterable[object]) -> list[Arg]:
    """Return values as arguments of command `name`. Errors: InvalidEffect, also for none."""
    flat = [value_of(v) for v in values]
    if not flat:
        raise InvalidEffect(f"{name}: give at least one value")
    return flat


def pairs(name: str, values: Iterable[tuple[object, object]]) -> list[Arg]:
    """Return pairs as arguments of command `name`. Errors: InvalidEffect, also for none."""
    return several(name, (part for pair in values for part in pair))
