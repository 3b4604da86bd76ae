"""Mending a dead letter: what it is to be instead, checked before anything is sent."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import msgspec

from bus.errors import (
    DeclarationError,
    InvalidEvent,
    Undecodable,
    UnknownEventType,
)
from bus.event import Event, EventInfo, find, info_of, newest_version, step_from
from bus.history.document import decoded
from bus.history.letter import Letter
from bus.history.selection import checked_function, plain_answer
from bus.streams import keys
from bus.streams.codec import (
    MSGPACK,
    Fields,
    Located,
    decode,
    encode,
    info_for,
    key_of,
    locate,
    without_values,
)

Changes = Mapping[str, Any]
Edit = Changes | Callable[[Letter], "Event | Changes | None"]

_OWN = frozenset([b"id", b"type", b"data", b"v", b"datacontenttype"])


def checked_edit(edit: Edit | None) -> Edit | None:
    """Return `edit` if it is one, else raise DeclarationError."""
    if edit is None or isinstance(edit, Mapping):
        return edit
    if not callable(edit):
        raise DeclarationError(
            f"edit is a mapping of fields to values, or a function of a letter, not {edit!r}"
        )
    checked_function(edit, "edit", "a letter")
    return edit


def whole(kind: str, data: bytes) -> Event:
    """Return the event of a type that JSON says, of the newest class; nothing of a letter stays.

    Errors: UnknownEventType; InvalidEvent, also for a member that the class does not know.
    """
    newest = newest_version(kind)
    if not newest:
        raise _unchecked(f"no class for the type {kind!r} is known")
    info = find(kind, newest)
    try:
        _by_name(info, msgspec.json.decode(data, type=dict[str, Any]))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent(f"it is no JSON object: {error}") from None
    try:
        return decode(info, Located(b"", None, None, None, data))
    except Undecodable as error:
        raise InvalidEvent(f"it is no {kind}: {error}") from None


def mended(letter: Letter, edit: Edit, partitions: int, max_bytes: int) -> Fields | None:
    """Return the fields that `letter` is to have instead of its own; None to leave it out.

    partitions: of its topic. max_bytes: see `max_event_bytes`.
    Errors: InvalidEvent, EventTooLarge, UnknownEventType, which name the letter and quote nothing
    of it; whatever `edit` or the event's class raises, with a note that names it.
    """
    try:
        outcome = plain_answer(edit(letter), "edit") if callable(edit) else edit
    except Exception as error:
        error.add_note(f"dead letter {letter.id}")
        raise
    if outcome is None:
        return None
    try:
        event = _event_of(letter, outcome)
        info = info_of(type(event))
        key = key_of(info, event)
        fields = _fields(letter, event, info, key, max_bytes)
        _check_place(letter, info, key, partitions)
    except (InvalidEvent, UnknownEventType) as error:
        raise type(error)(f"dead letter {letter.id}: {error}") from None
    except Exception as error:  # of a `__post_init__`
        error.add_note(f"dead letter {letter.id}")
        raise
    return fields


def _event_of(letter: Letter, outcome: Any) -> Event:
    if isinstance(outcome, Mapping):
        return _changed(letter, outcome)
    if not isinstance(outcome, Event):
        raise InvalidEvent(
            "an edit gives an event, a mapping of fields to values, or None to leave it out, not"
            f" {type(outcome).__name__}"
        )
    info = info_of(type(outcome))
    if info.type != letter.envelope.type:
        raise InvalidEvent(
            f"it is a {letter.envelope.type} and cannot become a {info.type}: publish that as a"
            " new event, and purge this letter"
        )
    newest = newest_version(info.type)
    if info.version < newest:
        raise InvalidEvent(
            f"the edit gives version {info.version} of {info.type}: give the newest,"
            f" {find(info.type, newest).cls.__name__} (version {newest})"
        )
    return outcome


def _changed(letter: Letter, changes: Changes) -> Event:
    """Return its event with some fields changed, as the newest class that it can be read as.

    Members that the class does not know are not part of it.
    """
    try:
        event = letter.event
    except UnknownEventType as error:
        raise _unchecked(str(error)) from None
    except Undecodable:
        return _completed(letter, changes)
    fields = {f.name: f for f in msgspec.structs.fields(type(event))}
    values = {}
    for name, value in _by_name(info_of(type(event)), changes).items():
        try:
            values[name] = msgspec.convert(value, fields[name].type)
        except msgspec.ValidationError as error:
            raise InvalidEvent(f"field {name}: {_why(error)}") from None
    try:
        return msgspec.structs.replace(event, **values)
    except (TypeError, ValueError) as error:  # how a `__post_init__` says that it is not valid
        raise InvalidEvent(f"its class does not take it: {_why(error)}") from None


def _completed(letter: Letter, changes: Changes) -> Event:
    """Return the event of one that cannot be read as it is: what can be read of it, and changes."""
    located, kind = locate(list(letter.fields)), letter.envelope.type
    newest = newest_version(kind)
    if not newest:
        raise _unchecked(f"no class for the type {kind!r} is known")
    members = None
    try:
        info = info_for(located.type or b"", located.version)
        members = _members(located, info)
    except UnknownEventType as error:
        raise _unchecked(str(error)) from None
    except Undecodable:  # nobody knows what its members mean
        info = find(kind, newest)
    given = _by_name(info, changes)
    names = {f.name: f.encode_name for f in msgspec.structs.fields(info.cls)}
    if members is None and (missing := [name for name in names if name not in given]):
        raise InvalidEvent(
            "it cannot be read, and what is not given would be lost: give the whole event"
            f" by a function, or all fields; missing: {', '.join(missing)}"
        )
    try:
        return msgspec.convert((members or {}) | {names[n]: v for n, v in given.items()}, info.cls)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise InvalidEvent(f"it is still no {info.type}: {_why(error)}") from None


def _members(located: Located, info: EventInfo) -> dict[str, Any] | None:
    """Return the members of an entry's data, as the class of `info` has them; None if it has none.

    Errors: Undecodable, an upcast cannot take it.
    """
    value = decoded(located.data or b"", packed=located.content_type == MSGPACK.encode())
    if not isinstance(value, dict):
        return None
    newest = newest_version(info.type)
    if info.cls is find(info.type, newest).cls:  # upcasts lead there
        for at in range(info.version, newest):
            step = step_from(info.type, at)
            assert callable(step)
            value = step(value)
    return value


def _why(error: Exception) -> str:
    """Return what is wrong with an event, without what may quote it: its class's own words."""
    if isinstance(error, msgspec.ValidationError):
        return without_values(error)
    return type(error).__name__


def _by_name(info: EventInfo, changes: Changes) -> Changes:
    """Return changes by the names of the class's fields, which may be called otherwise in JSON."""
    fields = msgspec.structs.fields(info.cls)
    known = {f.encode_name: f.name for f in fields} | {f.name: f.name for f in fields}
    for name in changes:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            there = ", ".join(f.name for f in fields)
            raise InvalidEvent(f"{info.type} has no field {name!r}: {hint}it has {there}")
    return {known[name]: value for name, value in changes.items()}


def _unchecked(why: str) -> UnknownEventType:
    return UnknownEventType(
        f"the edit cannot be checked: {why}. Import the module of its event class, or redrive the"
        " letter as it is, without an edit"
    )


def _check_place(letter: Letter, info: EventInfo, key: str | None, partitions: int) -> None:
    """Refuse a key that belongs elsewhere: others of that key could overtake it."""
    if key is None or key == letter.envelope.key:
        return
    there = keys.partition_of(key, partitions)
    if keys.stream(keys.topic_of(letter.stream), there) != letter.stream:
        raise InvalidEvent(
            f"with the {info.key} it would have, it belongs to partition {there}, not here:"
            " publish it as a new event instead, and purge this letter"
        )


def _fields(
    letter: Letter, event: Event, info: EventInfo, key: str | None, max_bytes: int
) -> Fields:
    """Encode the event; everything else that travels with it stays as it was."""
    own = _OWN if key is None else _OWN | {b"partitionkey"}
    kept: Fields = []
    event_id = b""
    for name, value in reversed([*zip(letter.fields[::2], letter.fields[1::2], strict=True)]):
        if name == b"id":
            event_id = value  # the first of equal names counts
        elif name not in own:
            kept[:0] = (name, value)
    if not event_id:
        raise InvalidEvent("it has no event id: publish it as a new event instead, and purge this")
    fields, _ = encode(info, event, event_id.decode(errors="replace"), key, kept, max_bytes)
    fields[1] = event_id  # as it is: others may have written one that is no text
    return fields
