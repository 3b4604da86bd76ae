"""A dead letter as one looks at it: the event it was, and why it died."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bus.envelope import Envelope, entry_time
from bus.errors import Undecodable
from bus.event import Event
from bus.history.document import document_of, in_base64
from bus.history.event_store import envelope_of
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.codec import ENTRY_ID, open_envelope
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
            **document_of(self.envelope),
        }
        if not _all_said(self.fields):
            said["fields_base64"] = [in_base64(part) for part in self.fields]
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
