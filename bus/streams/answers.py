"""What the verbs take and answer: plain values, no I/O."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

RawEntry = tuple[bytes, list[bytes]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a stream may grow by one appender. keep, slack, most: entries. See `Record`."""

    keep: int
    slack: int
    most: int
    drop_oldest: bool = False


class Pinned(NamedTuple):
    """The group that needs the oldest entry, the id it needs from, and its backlog there.

    undelivered is the server's count; None where it keeps none.
    """

    group: str
    floor: str
    pending: int
    undelivered: int | None


class Room(NamedTuple):
    """How many entries still fit, who pins the stream, and ghosts met on the way by group."""

    entries: int
    pinned: Pinned | None
    lost: dict[str, list[str]]


class Appended(NamedTuple):
    """Where the units that were taken went: entry n has the id `ms-(sequence + n)`.

    room: as the script left it. dropped: entries deleted unhandled, by group. out_of_turn: nothing
    was taken, because the batch that it was to follow is not in, or not whole.
    """

    ms: str
    sequence: int
    events: int
    units: int
    repeated: bool
    room: Room
    dropped: dict[str, int]
    out_of_turn: bool = False


class Taken(NamedTuple):
    """Entries moved to this worker as (id, delivery count, fields), and ids found without entry."""

    entries: list[tuple[bytes, int, list[bytes]]]
    lost: list[bytes]


class Buried(IntEnum):
    """What became of a dead letter: refused is another worker's, full found no room and stays."""

    REFUSED = 0
    YES = 1
    FULL = 2


class Copied(NamedTuple):
    """What a replay did: entries copied now, those that were gone, whether the inbox is full.

    total: copied by the run in all. last: the id up to which the server has dealt with the stream.
    """

    copied: int
    gone: int
    full: bool
    total: int
    last: bytes


class Returned(IntEnum):
    """What became of a dead letter that was to go back: unfit has too many fields for a script."""

    GONE = 0
    YES = 1
    FULL = 2
    UNFIT = 3


class Fate(IntEnum):
    """What became of effects.

    refused: another worker's, or applied before. full: no room in a stream, nothing was done.
    failed: a command was refused, and the delivery is a dead letter. undone: refused before
    anything was done.
    """

    REFUSED = 0
    DONE = 1
    FULL = 2
    FAILED = 3
    UNDONE = 4


class Committed(NamedTuple):
    """The fate of one delivery's effects, or of a transaction.

    stream, pinned: of FULL. error, applied: of FAILED and UNDONE. replies: of a transaction that
    is DONE, per command whether it ran, and its reply.
    """

    fate: Fate
    stream: str = ""
    pinned: Pinned | None = None
    error: str = ""
    applied: tuple[str, ...] = ()
    replies: tuple[tuple[bool, Any], ...] = ()


class Looked(NamedTuple):
    """A look for room in a stream, made on the way: who pins it, ghosts and dropped by group."""

    stream: str
    pinned: Pinned | None
    lost: dict[str, list[str]]
    dropped: dict[str, int]


class Claim(IntEnum):
    """Whether a delivery may handle its event: busy is when another one of it is pending."""

    DONE = 0
    YES = 1
    BUSY = 2


class Started(IntEnum):
    """Whether a reclaimed delivery may run: refused is another worker's, lost has no entry."""

    REFUSED = 0
    YES = 1
    LOST = 2


class Renewed(NamedTuple):
    """Ids that another worker owns now, and ids whose entry is gone."""

    refused: list[bytes]
    lost: list[bytes]


class Consumer(NamedTuple):
    """A consumer of a group: a worker or a lane."""

    name: bytes
    pending: int
    idle_ms: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What the groups of one partition look like at the server time `now_ms`.

    listed: consumers that keep a lease when alive. alive: those whose lease exists.
    consumers: of each (stream or inbox, group) asked for; what is not there is left out.
    """

    now_ms: int
    listed: frozenset[bytes]
    alive: frozenset[bytes]
    consumers: dict[tuple[str, str], list[Consumer]]


class Standing(NamedTuple):
    """How far a group is: pending entries, and whether any is not yet delivered."""

    pending: int
    undelivered: bool
