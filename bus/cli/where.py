"""Choosing events by an expression: `--where 'data.cents > 1000 and key == "o-1"'`.

It is Python, as far as simpleeval allows it: comparisons, and / or / not, arithmetic, `in`, methods
of texts, and the functions len, int, float, str and like("Inv*", data.name). `data` is the event;
its fields may also stand alone, where the envelope has no such name. A field that is not there is
None. What cannot be compared is not chosen.
"""

import ast
from collections.abc import Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from simpleeval import (  # type: ignore[import-untyped] # it has no types
    EvalWithCompoundTypes,
    FeatureNotAvailable,
    FunctionNotDefined,
    OperatorNotDefined,
)

from bus.envelope import Envelope
from bus.errors import DeclarationError
from bus.history.document import decoded
from bus.history.letter import Letter
from bus.streams.codec import MSGPACK

_OF_ENVELOPE = (
    "type",
    "version",
    "key",
    "time",
    "source",
    "stream",
    "entry_id",
    "event_id",
    "correlation_id",
    "causation_id",
    "causation_depth",
    "traceparent",
)
_OF_LETTER = ("reason", "error", "error_type", "attempts", "died_at", "group")
_FUNCTIONS = {
    "len": len,
    "int": int,
    "float": float,
    "str": str,
    "like": lambda pattern, text: isinstance(text, str) and fnmatchcase(text, pattern),
}

# What is wrong with an expression whatever the event is.
_NEVER = (FunctionNotDefined, FeatureNotAvailable, OperatorNotDefined)
_NOTHING = Envelope("", "", 1, "", "0-0", datetime.fromtimestamp(0, UTC), data=b"{}")


class Where:
    """A predicate on envelopes, or on dead letters.

    failed: how often it could not be evaluated, and why the last time. Errors: DeclarationError for
    what is no expression.
    """

    def __init__(self, expression: str) -> None:
        self._evaluator = EvalWithCompoundTypes(functions=_FUNCTIONS)
        self._parsed = _parsed(expression)
        self._evaluator.names = _Names(_NOTHING)
        try:
            self._evaluator.eval("", self._parsed)
        except _NEVER as error:
            raise _no_expression(expression, _first_line(error)) from None
        except Exception:  # noqa: S110 - of an event that has nothing, much cannot be said
            pass
        self.failed = 0
        self.why = ""
        # By this a checkpoint knows that a replay goes on with the same choice.
        self.__qualname__ = f"where {expression}"

    def __call__(self, found: Envelope | Letter) -> bool:
        """Return whether it is chosen."""
        self._evaluator.names = _Names(found)
        try:
            return bool(self._evaluator.eval("", self._parsed))
        except Exception as error:  # of any kind: what is in the event is anybody's
            self.failed += 1
            self.why = _first_line(error)
            return False


def _parsed(expression: str) -> ast.expr:
    """Return one expression as a tree. An assignment would be evaluated for what is assigned."""
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _no_expression(expression, said) from None


def _no_expression(expression: str, why: str) -> DeclarationError:
    return DeclarationError(
        f"--where {expression!r} is no expression: {why}; say for example"
        " 'data.cents > 1000 and key == \"o-1\"' (== compares, = does not)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].removesuffix(
        ", for expression ''."
    )


class _Names(dict[str, Any]):
    """What an expression may name."""

    def __init__(self, found: Envelope | Letter) -> None:
        super().__init__(true=True, false=False, null=None)
        self._found = found

    def __missing__(self, name: str) -> Any:
        found = self._found
        envelope = found.envelope if isinstance(found, Letter) else found
        if name == "data":
            return _seen(_decoded(envelope))
        if isinstance(found, Letter) and name in _OF_LETTER:
            return _comparable(getattr(found, name))
        if name in _OF_ENVELOPE:
            return _comparable(getattr(envelope, name))
        if name in _FUNCTIONS:
            raise KeyError(name)
        return getattr(_seen(_decoded(envelope)), name, None)


def _comparable(value: Any) -> Any:
    """Return a time as text: ISO 8601 in UTC is in order."""
    return value.isoformat() if hasattr(value, "isoformat") else value


def _decoded(envelope: Envelope) -> Any:
    packed = envelope.content_type == MSGPACK.encode()
    value = decoded(envelope.data, packed=packed)
    return None if value is msgspec.UNSET else value


class _Fields:
    """An object of JSON whose members can be named with a dot; one that is not there is None."""

    __slots__ = ("_members",)

    def __init__(self, members: dict[Any, Any]) -> None:
        self._members = members

    def __getattr__(self, name: str) -> Any:
        return _seen(self._members.get(name))

    def __getitem__(self, name: object) -> Any:
        return _seen(self._members.get(name))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members)

    def __eq__(self, other: object) -> bool:
        return self._members == (other._members if isinstance(other, _Fields) else other)

    __hash__ = None  # type: ignore[assignment] # as a dict has none


def _seen(value: Any) -> Any:
    if isinstance(value, dict):
        return _Fields(value)
    if isinstance(value, list):
        return [_seen(v) for v in value]
    return value
