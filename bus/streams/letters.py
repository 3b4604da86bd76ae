"""What the entry of a dead letter holds: the fields of the entry it was, and why it died."""

from typing import NamedTuple

import msgspec

from bus.errors import Undecodable
from bus.streams.connection import Arg

_ALWAYS = frozenset(
    [b"deadreason", b"deaderror", b"deadtraceback", b"deadattempts", b"deadentry", b"deadtime"]
)
_APPENDED = _ALWAYS | {b"deadapplied"}
_PACKED = b"deadfields"


_MOST_VALUES = 2_000  # field names and values of one entry that stay what they are


def closed(
    fields: list[bytes], *, reason: str, error: str, traceback: str, attempts: int, origin: bytes
) -> list[Arg]:
    """Return the fields of a dead letter: those of the entry, then why it died.

    An entry of more fields than a script can pass on in one call (about 8,000 values) keeps them
    in one field, `deadfields`, as a msgpack array. The script adds when that was.
    origin: the entry id it had in its stream.
    """
    return [
        *packed(fields),
        "deadreason",
        reason,
        "deaderror",
        error.encode("utf-8", "replace"),
        "deadtraceback",
        traceback.encode("utf-8", "replace"),
        "deadattempts",
        str(attempts),
        "deadentry",
        origin,
    ]


def packed(fields: list[bytes]) -> list[bytes]:
    """Return fields as they stand in a dead letter: very many of them in one."""
    if len(fields) > _MOST_VALUES:
        return [_PACKED, msgspec.msgpack.encode(fields)]
    return fields


class Opened(NamedTuple):
    """A dead letter taken apart.

    fields: of the entry it was. packed: they lie in `deadfields`. why: what was appended to them.
    """

    fields: list[bytes]
    packed: bool
    why: dict[bytes, bytes]


def opened(fields: list[bytes]) -> Opened:
    """Take the fields of a dead letter apart; what others have put there may lack any of them.

    Those that were appended are the last, and each is there once: what comes before is its own.
    """
    end, why = len(fields), dict[bytes, bytes]()
    while end and (name := fields[end - 2]) in _APPENDED and name not in why:
        why[name] = fields[end - 1]
        end -= 2
        if name == b"deadreason" and why.keys() >= _ALWAYS:
            break  # it is the first that we append
    own = fields[:end]
    if len(own) == 2 and own[0] == _PACKED:  # noqa: PLR2004 - a name and its value
        try:
            return Opened(_unpacked(own[1]), packed=True, why=why)
        except Undecodable:
            pass  # somebody's field has that name
    return Opened(own, packed=False, why=why)


# How msgpack begins a text or bytes: the length follows, in so many bytes. Python writes bytes, Lua
# knows only texts.
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}


def _unpacked(packed: bytes) -> list[bytes]:
    """Return the values of a msgpack array of bytes, or of texts that need not be UTF-8."""
    try:
        values = msgspec.msgpack.decode(packed, type=list[msgspec.Raw])
    except msgspec.MsgspecError as error:
        raise Undecodable(str(error)) from None
    fields = []
    for value in map(bytes, values):
        if 0xA0 <= value[0] <= 0xBF:  # noqa: PLR2004 - a text of up to 31 bytes
            fields.append(value[1:])
        elif value[0] in _LENGTHS:
            fields.append(value[1 + _LENGTHS[value[0]] :])
        else:
            raise Undecodable("not an array of fields and values")
    if len(fields) % 2:
        raise Undecodable("a field without a value")
    return fields
