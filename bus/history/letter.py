"""A dead letter as one looks at it: the event it was, and why it died."""

import base64
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from bus.config import MAX_DECODE_BYTES
from bus.envelope import Envelope, entry_time
from bus.errors import Undecodable
from bus.event import Event
from bus.history.event_store import envelope_of
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.codec import ENTRY_ID, JSON, MSGPACK, locate, open_envelope
from bus.streams.letters import opened


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter of one group. What somebody else put there may lack anything but an id.

    Its repr shows whose it is and of what kind, and nothing that the application put there.

    id: `topic:partition/entry id`, the latter in the stream of the dead letters.
    group, stream: whose it is, and where the event was published.
    reason: `failed` (attempts used up), `rejected`, `undecodable`, `newer-version`, `crashed`,
        `effects-failed`; "" if it says none.
    error: class and text of the exception; error_type: the class alone. traceback: as Python
        prints it. attempts: those used up.
    died_at, published_at: UTC, by the server's clock.
    original_entry_id: what it had in its stream; that of the dead letter if it does not say.
    applied: of `effects-failed`, the commands that took place, name and key.
    envelope: the event's own, with `data`. fields: names and values of the entry it was, in turn;
        packed: they lie in one field, since they are many.
    """

    id: str
    group: str
    stream: str
    reason: str
    error: str = field(repr=False)
    error_type: str
    traceback: str = field(repr=False)
    attempts: int
    died_at: datetime
    published_at: datetime
    original_entry_id: str
    applied: tuple[str, ...] = field(repr=False)
    envelope: Envelope = field(compare=False)
    fields: tuple[bytes, ...] = field(repr=False)
    packed: bool = field(repr=False)

    @property
    def event(self) -> Event:
        """The decoded event. Errors: Undecodable, UnknownEventType."""
        return self.envelope.event

    @property
    def entry_id(self) -> str:
        """The id in the stream of the dead letters."""
        return self.id.rpartition("/")[2]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values for a JSON document.

        data: the event, if JSON can say all of it; else it is in `data_base64`. What the rest of
        the document does not tell of the entry is in `fields_base64`: names and values in turn.
        """
        envelope = self.envelope
        said = {
            "id": self.id,
            "group": self.group,
            "stream": self.stream,
            "reason": self.reason,
            "error": self.error,
            "error_type": self.error_type,
            "traceback": self.traceback,
            "attempts": self.attempts,
            "died_at": self.died_at.isoformat(),
            "published_at": self.published_at.isoformat(),
            "original_entry_id": self.original_entry_id,
            "applied": list(self.applied),
            "event_id": envelope.event_id,
            "type": envelope.type,
            "version": envelope.version,
            "key": envelope.key,
            "time": envelope.time.isoformat(),
            "source": envelope.source,
            "correlation_id": envelope.correlation_id,
            "causation_id": envelope.causation_id,
            "causation_depth": envelope.causation_depth,
            "traceparent": envelope.traceparent,
            "tracestate": envelope.tracestate,
            "content_type": _content_type(self.fields),
        }
        value = _json_value(decoded(envelope.data, packed=said["content_type"] == MSGPACK))
        if value is msgspec.UNSET:
            said["data_base64"] = _base64(envelope.data)
        else:
            said["data"] = value
        if not _all_said(self.fields):
            said["fields_base64"] = [_base64(part) for part in self.fields]
        return said


def letter_of(group: str, stream: str, entry: RawEntry) -> Letter:
    """Return what a dead letter of `group` says, whoever wrote it. stream: the partition's own."""
    entry_id, fields = entry
    own, packed, why = opened(fields)

    def text(name: bytes) -> str:
        return why.get(name, b"").decode(errors="replace")

    error, attempts = text(b"deaderror"), why.get(b"deadattempts", b"")
    kind, colon, _ = error.partition(": ")
    origin = why.get(b"deadentry", b"")
    if not ENTRY_ID.fullmatch(origin):
        origin = entry_id
    return Letter(
        id=f"{keys.tag_of(stream)}/{entry_id.decode()}",
        group=group,
        stream=stream,
        reason=text(b"deadreason"),
        error=error,
        error_type=kind if colon and not any(map(str.isspace, kind)) else "",
        traceback=text(b"deadtraceback"),
        attempts=int(attempts) if attempts.isdigit() and len(attempts) <= 9 else 0,  # noqa: PLR2004 - int, not a DoS
        died_at=entry_time(entry_id),
        published_at=entry_time(origin),
        original_entry_id=origin.decode(),
        applied=tuple(text(b"deadapplied").split("\n")) if why.get(b"deadapplied") else (),
        envelope=envelope_of(stream, (origin, own)),
        fields=tuple(own),
        packed=packed,
    )


def decoded(data: bytes, *, packed: bool) -> Any:
    """Return what encoded data says, UNSET if it is neither JSON nor, if `packed`, msgpack."""
    if len(data) > MAX_DECODE_BYTES:
        return msgspec.UNSET
    try:
        return (msgspec.msgpack if packed else msgspec.json).decode(data)
    except Exception:  # RecursionError and UnicodeDecodeError are no errors of msgspec's
        return msgspec.UNSET


def _json_value(value: Any) -> Any:
    """Return `value` if it is the same when it has been JSON, else UNSET.

    Bytes, times and NaN, which msgpack may hold, would come out of it as something else.
    """
    try:
        same = msgspec.json.decode(msgspec.json.encode(value)) == value
    except (msgspec.MsgspecError, TypeError, RecursionError):  # there are keys that it cannot say
        return msgspec.UNSET
    return value if same else msgspec.UNSET


def _content_type(fields: tuple[bytes, ...]) -> str:
    return (locate(list(fields)).content_type or JSON.encode()).decode(errors="replace")


_SAID = frozenset(
    b"id type data v partitionkey datacontenttype time source correlationid causationid"
    b" causationdepth traceparent tracestate".split()
)


def _all_said(fields: tuple[bytes, ...]) -> bool:
    """Whether an envelope tells all of an entry: no other fields, and none twice."""
    names = fields[::2]
    if len(set(names)) < len(names) or not _SAID.issuperset(names):
        return False
    try:
        open_envelope("", b"0-0", list(fields))
    except Undecodable:
        return False
    return True


def _base64(part: bytes) -> str:
    return base64.b64encode(part).decode()
