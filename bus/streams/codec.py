"""How an event becomes the fields of a stream entry, and back. The format is in docs/wire.md.

Flat fields with CloudEvents names. `id`, `type`, `data` come first and in this order, which
lets the reader find them without building a dict; entries written by others may have any order.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from bus.config import MAX_DECODE_BYTES
from bus.delivery import REDRIVE, Delivery
from bus.envelope import Envelope, entry_time
from bus.errors import EventTooLarge, InvalidEvent, Undecodable
from bus.event import Event, EventInfo, find
from bus.streams.forms import KEYED, PLAIN, Unit

MSGPACK = "application/msgpack"
JSON = "application/json"

Fields = list[bytes | str]
_NAMES_BYTES, _KEY_NAME_BYTES = len("idtypedata"), len("partitionkey")


class Headers(NamedTuple):
    """What may travel beside an event; None is left out."""

    source: str | None = None
    time: datetime | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


_NAMES = ("source", "time", "correlationid", "causationid", "traceparent", "tracestate")


def header_fields(headers: Headers) -> Fields:
    """Return headers as fields of an entry. Errors: InvalidEvent."""
    fields: Fields = []
    for name, value in zip(_NAMES, headers, strict=True):
        if value is not None:
            fields += (name, _text_of(value))
    return fields


def key_of(info: EventInfo, event: Event) -> str | None:
    """Return the partition key of `event`, None if its class has none."""
    if info.key is None:
        return None
    value = getattr(event, info.key)
    return value if value.__class__ is str else str(value)


def encode(
    info: EventInfo,
    event: Event,
    event_id: str,
    key: str | None,
    headers: Fields,
    max_bytes: int,
) -> tuple[Fields, int]:
    """Return the entry's fields and their size in bytes.

    headers: see `header_fields`. Errors: those of `_data_of`, EventTooLarge.
    """
    data = _data_of(info, event)
    fields: Fields = ["id", _wire(info, event_id), "type", info.type, "data", data]
    if info.version != 1:
        fields += ("v", str(info.version))
    if key is not None:
        fields += ("partitionkey", _wire(info, key))
    fields += headers
    if info.encoding == "msgpack":
        fields += ("datacontenttype", MSGPACK)
    size = sum(map(len, fields))
    if size > max_bytes:
        raise _too_large(info, size, max_bytes)
    return fields, size


def encode_plain(
    info: EventInfo, event: Event, event_id: str, key: str | None, max_bytes: int
) -> tuple[Unit, int]:
    """Do the same for an event of version 1, in JSON, without headers; return it as a unit."""
    data = _data_of(info, event)
    plain = event_id.__class__ is str and event_id.isascii()
    wire_id = event_id if plain else _wire(info, event_id)
    unit: Unit = ["=", info.type, wire_id, data]
    size = len(data) + len(wire_id) + len(info.type) + _NAMES_BYTES
    if key is not None:
        wire_key = key if key.isascii() else _wire(info, key)
        unit[0] = "+"
        unit.append(wire_key)
        size += len(wire_key) + _KEY_NAME_BYTES
    if size > max_bytes:
        raise _too_large(info, size, max_bytes)
    return unit, size


def _data_of(info: EventInfo, event: Event) -> bytes:
    """Encode an event, and decode it once (0.2-0.3 us): its own class must be able to read it.

    Errors: InvalidEvent (wrong field types, NaN, Infinity, what msgspec cannot encode).
    """
    try:
        data = info.encode(event)
        if info.may_hold_floats:
            _refuse_nan(event)
        info.decode(data)
    except InvalidEvent:
        raise
    except Exception as error:  # msgspec raises many kinds: see docs/guarantees.md, bad input
        raise _invalid(info, error) from None
    return data


def _wire(info: EventInfo, text: str) -> bytes | str:
    """Encode what users fill: a lone surrogate must fail at its caller, not later.

    ASCII, as nearly all of it is, cannot fail, and is encoded when it is sent.
    """
    try:
        return text if text.__class__ is str and text.isascii() else text.encode()
    except Exception as error:
        raise _invalid(info, error) from None


def _invalid(info: EventInfo, error: Exception) -> InvalidEvent:
    return InvalidEvent(
        f"{info.type} version {info.version} cannot be published:"
        f" {type(error).__name__}: {without_values(error)}"
    )


def _too_large(info: EventInfo, size: int, max_bytes: int) -> EventTooLarge:
    return EventTooLarge(
        f"{info.type} is {size:,} bytes, above max_event_bytes = {max_bytes:,}:"
        " publish a reference to the data instead"
    )


def plain_entry(fields: list[bytes]) -> tuple[bytes, bytes] | None:
    """Return (type, data) of an entry as this library writes most: version 1, JSON, no headers.

    The short way for the hot path; None means that `locate` must look.
    """
    if (
        (len(fields) == PLAIN or (len(fields) == KEYED and fields[6] == b"partitionkey"))
        and fields[4] == b"data"
        and fields[2] == b"type"
        and fields[0] == b"id"
        and len(fields[5]) <= MAX_DECODE_BYTES
    ):
        return fields[3], fields[5]
    return None


class Located(NamedTuple):
    """The parts of an entry that routing needs; None where a field is missing."""

    id: bytes | None
    type: bytes | None
    version: bytes | None
    content_type: bytes | None
    data: bytes | None


def locate(fields: list[bytes]) -> Located:
    """Find what routing needs in an entry's flat field list; the first of equal names counts."""
    if len(fields) >= 6 and fields[4] == b"data" and fields[2] == b"type" and fields[0] == b"id":  # noqa: PLR2004 - names and values of three fields
        if len(fields) == 6:  # noqa: PLR2004 - id, type, data and nothing else
            return Located(fields[1], fields[3], None, None, fields[5])
        rest = fields[6:]
    else:
        rest = fields
    found = dict(zip(rest[-2::-2], rest[-1::-2], strict=False))
    if rest is fields:
        return Located(*map(found.get, (b"id", b"type", b"v", b"datacontenttype", b"data")))
    return Located(fields[1], fields[3], found.get(b"v"), found.get(b"datacontenttype"), fields[5])


def info_for(type: bytes, version: bytes | None) -> EventInfo:
    """Return the class for the bytes of `type` and `v`. Errors: UnknownEventType, Undecodable."""
    try:
        return find(type.decode(), _version(version))
    except UnicodeDecodeError as error:
        raise Undecodable(f"the type is not UTF-8: {error.reason}") from None


def _version(version: bytes | None) -> int:
    if version is None:
        return 1
    try:
        return int(version)
    except ValueError:
        raise Undecodable("field v is not a whole number") from None


def decode(info: EventInfo, located: Located) -> Event:
    """Decode the event of an entry. Errors: Undecodable, whatever is wrong with the bytes."""
    data = located.data
    if data is None or located.id is None:
        raise Undecodable(f"the entry has no field `{'id' if located.id is None else 'data'}`")
    if len(data) > MAX_DECODE_BYTES:
        raise Undecodable(f"data is {len(data):,} bytes, above {MAX_DECODE_BYTES:,}")
    try:
        content_type = located.content_type or JSON.encode()
        if content_type == _content_type(info):
            return info.decode(data)
        return _other_decoder(info, content_type)(data)
    except Undecodable as error:
        raise Undecodable(f"{info.read_as}: {error}") from None
    except Exception as error:  # UnicodeDecodeError and RecursionError are not msgspec errors
        # From None: the traceback of a chained error would show its text all the same.
        raise Undecodable(
            f"{info.read_as}: {type(error).__name__}: {without_values(error)}"
        ) from None


def _content_type(info: EventInfo) -> bytes:
    return MSGPACK.encode() if info.encoding == "msgpack" else JSON.encode()


@lru_cache(maxsize=256)
def _other_decoder(info: EventInfo, content_type: bytes) -> Callable[[bytes], Event]:
    """Decoder for entries written before the class changed its encoding."""
    if content_type == MSGPACK.encode():
        return info.decoder("msgpack")
    if content_type == JSON.encode():
        return info.decoder("json")
    raise Undecodable("datacontenttype is neither JSON nor msgpack")


class Moved(NamedTuple):
    """What an inbox entry says of itself: a copy of an entry that one group is to handle.

    origin: id of the entry it was. attempts: those used up before. due_ms: server time before which
    it is not to run, 0 for at once.
    """

    origin: bytes
    attempts: int
    due_ms: int


_INBOX_FIELDS = frozenset([b"origentry", b"attempts", b"due", b"run"])
ENTRY_ID = re.compile(rb"\d{1,20}(-\d{1,20})?")


def moved(entry_id: bytes, fields: list[bytes]) -> Moved:
    """Read the fields that an entry of an inbox has besides its own; what is missing is nothing."""
    added = fields[_own_end(fields) :]
    found = dict(zip(added[::2], added[1::2], strict=True))

    def number(name: bytes) -> int:
        digits = found.get(name, b"0")
        return int(digits) if digits.isdigit() and len(digits) < 16 else 0  # noqa: PLR2004 - of ms

    origin = found.get(b"origentry", entry_id)
    if not ENTRY_ID.fullmatch(origin):
        origin = entry_id
    return Moved(origin, number(b"attempts"), number(b"due"))


def without_inbox_fields(fields: list[bytes]) -> list[bytes]:
    """Return the fields that the entry had before it was put into an inbox."""
    return fields[: _own_end(fields)]


def _own_end(fields: list[bytes]) -> int:
    """Return where an entry's own fields end, and those begin that were added for an inbox.

    Those are the last, and each is there once. We begin with `origentry`, and leave out none but
    `run`: what comes before is the entry's own, whatever its name. Others may leave out any.
    """
    end, met = len(fields), set[bytes]()
    while end and (name := fields[end - 2]) in _INBOX_FIELDS and name not in met:
        met.add(name)
        end -= 2
        if name == b"origentry" and b"attempts" in met and b"due" in met:
            break
    return end


def run_of(delivery: Delivery[Any]) -> str:
    """Return which replay or redrive put the entry into the inbox, "" if none did."""
    if delivery.origin.stream == delivery.origin.home:
        return ""
    fields = delivery.fields
    for at in range(_own_end(fields), len(fields), 2):
        if fields[at] == b"run":
            return fields[at + 1].decode(errors="replace")
    return ""


def is_redriven(delivery: Delivery[Any]) -> bool:
    """Return whether a delivery was a dead letter; as `Delivery.redriven`, of any entry."""
    return run_of(delivery).startswith(REDRIVE)


def original_id(delivery: Delivery[Any]) -> bytes:
    """Return the id that the entry has in its stream, or had before it was put into an inbox."""
    if delivery.origin.stream == delivery.origin.home:
        return delivery.entry_id
    return moved(delivery.entry_id, delivery.fields).origin


def open_envelope(stream: str, entry_id: bytes, fields: list[bytes], run: str = "") -> Envelope:
    """Make the envelope of an entry; the event itself is decoded when asked for.

    run: which replay or redrive brought it.
    Errors: Undecodable when id, type or data is missing or a header is not UTF-8.
    """
    if plain_entry(fields) is not None:
        with suppress(UnicodeDecodeError):  # the long way says which field it is
            return _plain_envelope(stream, entry_id, fields, run)
    located = locate(fields)
    for name in ("id", "type", "data"):
        if getattr(located, name) is None:
            raise Undecodable(f"entry {entry_id.decode()} of {stream} has no field `{name}`")
    found = dict(zip(fields[-2::-2], fields[-1::-2], strict=False))

    def text(name: bytes) -> str | None:
        value = found.get(name)
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError:
            raise Undecodable(
                f"field {name.decode()} of entry {entry_id.decode()} is not UTF-8"
            ) from None

    return Envelope(
        event_id=text(b"id") or "",
        type=text(b"type") or "",
        version=_version(located.version),
        stream=stream,
        entry_id=entry_id.decode(),
        time=_time(text(b"time"), entry_id),
        key=text(b"partitionkey"),
        source=text(b"source"),
        correlation_id=text(b"correlationid"),
        causation_id=text(b"causationid"),
        traceparent=text(b"traceparent"),
        tracestate=text(b"tracestate"),
        causation_depth=_depth(found.get(b"causationdepth", b"0")),
        run=run,
        data=located.data or b"",
        content_type=located.content_type,
        _decode=_decode_late,
    )


def _plain_envelope(stream: str, entry_id: bytes, fields: list[bytes], run: str) -> Envelope:
    """Make the envelope of an entry without headers, as most are, in a third of the time."""
    return Envelope(
        fields[1].decode(),
        fields[3].decode(),
        1,
        stream,
        entry_id.decode(),
        entry_time(entry_id),
        fields[7].decode() if len(fields) > 6 else None,  # noqa: PLR2004 - the partition key
        run=run,
        data=fields[5],
        _decode=_decode_late,
    )


def _decode_late(envelope: Envelope) -> Event:
    version = None if envelope.version == 1 else str(envelope.version).encode()
    located = Located(b"", None, version, envelope.content_type, envelope.data)
    return decode(info_for(envelope.type.encode(), version), located)


def envelope_of(delivery: Delivery[Any]) -> Envelope:
    """Make the envelope of a delivery. Errors: Undecodable."""
    home = delivery.origin.home
    return open_envelope(home, original_id(delivery), delivery.fields, run_of(delivery))


def _depth(digits: bytes) -> int:
    """Read how many causes an event has; what no bus wrote counts as none."""
    return int(digits) if digits.isdigit() and len(digits) <= 9 else 0  # noqa: PLR2004 - int, not a DoS


def _time(text: str | None, entry_id: bytes) -> datetime:
    if text is None:
        return entry_time(entry_id)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise Undecodable("field time is no ISO 8601 time") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _text_of(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise InvalidEvent("a header is not UTF-8: it holds a lone surrogate") from None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise InvalidEvent("time has no time zone: use datetime.now(UTC)")
        try:
            return value.astimezone(UTC).isoformat().encode()
        except OverflowError:
            raise InvalidEvent("time is not between the years 1 and 9999 in UTC") from None
    raise InvalidEvent(f"header values are strings, not {type(value).__name__}")


def _refuse_nan(value: Any) -> None:  # noqa: C901 - one branch per container
    """Look for NaN and Infinity, which JSON would silently turn into null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidEvent("NaN and Infinity cannot be published: JSON has no such numbers")
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            _refuse_nan(getattr(value, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_nan(key)
            _refuse_nan(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _refuse_nan(item)
    elif is_dataclass(value):
        for f in dataclass_fields(value):
            _refuse_nan(getattr(value, f.name))


def without_values(error: Exception) -> str:
    """Return the error's text unless it may quote a value of the event."""
    if isinstance(error, UnicodeError):
        return "a string or header is not UTF-8"
    text = str(error)
    if isinstance(error, msgspec.ValidationError) and not text.startswith(("Expected", "Object m")):
        return "a value is not valid"  # "Invalid enum value ...", or a class's own words
    return text
