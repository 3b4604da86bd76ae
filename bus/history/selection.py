"""Which events are asked for, when looking back: by type, key and predicate."""

import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

from bus.envelope import Envelope
from bus.errors import DeclarationError, Undecodable
from bus.event import Event, pattern_of, type_matches
from bus.streams.answers import RawEntry
from bus.streams.codec import locate

Types = Iterable[str | type[Event]] | str | type[Event] | None
Predicate = Callable[[Envelope], bool]
T = TypeVar("T")

_REMEMBERED = 10_000  # types; foreign writers may invent more


class Selection:
    """What a look back is to find. Made once, asked of every entry.

    types: event classes, names or patterns; None for all. key: the partition key, None for any.
    where: a predicate on the envelope, asked last. Errors: DeclarationError.
    """

    def __init__(self, types: Types, key: str | None, where: Predicate | None) -> None:
        if isinstance(types, str | type):
            types = (types,)
        self.patterns = None if types is None else sorted({pattern_of(t) for t in types})
        if key is not None and not isinstance(key, str):
            raise DeclarationError(f"key is the partition key as text, not {key!r}")
        self.key = key
        self.where = where
        if where is not None:
            checked_function(where, "where", "an envelope")
        try:
            self._key = None if key is None else key.encode()
        except UnicodeEncodeError:
            raise DeclarationError("key is no text: it holds a lone surrogate") from None
        self._known: dict[bytes | None, bool] = {}

    def names(self, entry: RawEntry) -> bool:
        """Return whether an entry has a type and a key that are asked for; decodes nothing."""
        fields = entry[1]
        if self.patterns is not None:
            named = locate(fields).type
            known = self._known.get(named)
            if known is None:
                known = self._matches(named)
                if len(self._known) < _REMEMBERED:
                    self._known[named] = known
            if not known:
                return False
        return self._key is None or self._key == _partition_key(fields)

    def admits(self, envelope: Envelope) -> bool:
        """Return whether the predicate takes it; what cannot be decoded for it is not taken."""
        if self.where is None:
            return True
        try:
            return bool(plain_answer(self.where(envelope), "where"))
        except Undecodable:
            return False

    def _matches(self, named: bytes | None) -> bool:
        name = (named or b"").decode(errors="replace")
        return any(type_matches(p, name) for p in self.patterns or ())


def checked_function(call: object, name: str, of: str) -> None:
    """Refuse what is no plain function; what an async one returns would always be true.

    Errors: DeclarationError.
    """
    if not callable(call):
        raise DeclarationError(f"{name} is a function of {of}, not {call!r}")
    waits = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    if any(w(f) for w in waits for f in (call, getattr(call, "__call__", None))):  # noqa: B004
        raise DeclarationError(
            f"{name} must be a plain function of {of}, neither async nor a generator: do what it"
            " would wait for before, or in a loop over what is found"
        )


def plain_answer(answer: T, name: str) -> T:
    """Return what a function answered, unless it is to be awaited: that would always be true.

    Errors: DeclarationError.
    """
    if answer is True or answer is False or not inspect.isawaitable(answer):
        return answer
    if inspect.iscoroutine(answer):
        answer.close()  # nobody will await it
    raise DeclarationError(
        f"{name} gave a {type(answer).__name__}, to be awaited: it must be a plain function"
    )


def _partition_key(fields: list[bytes]) -> bytes | None:
    """Return the partition key of an entry; the first of equal names counts, as for all fields."""
    for at in range(0, len(fields) - 1, 2):
        if fields[at] == b"partitionkey":
            return fields[at + 1]
    return None
