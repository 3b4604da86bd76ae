"""The verbs that only look: how far the groups of streams are, many streams in one write.

They go over the connection of the history, so that bodies, which come along with every id, hold
up neither verdicts nor publishes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bus.config import FIRST_PAGE, READ_BYTES
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.connection import Arg
from bus.streams.replies import Reply, ReplyError, row_of
from bus.streams.stream import StreamStore

LOOKED_AHEAD = 100  # undelivered entries per group that are looked at, whatever a counter says
NEWEST = 100  # newest entries whose ids tell how fast a stream grows
RECENT_MS = 600_000  # a stream that got nothing for so long is not growing
GHOSTS = 10  # pending ids without entry that are passed over when looking for the oldest with one
PAGE = 1_000  # entries a counting XRANGE returns at most...
PAGE_BYTES = READ_BYTES  # ...and about so many bytes: bodies come along, and memory stays flat


class GroupSeen(NamedTuple):
    """How far one group is. Ids are as the server has them.

    row: of XINFO GROUPS. ahead: the ids of the first undelivered entries, oldest first, at most
    LOOKED_AHEAD + 1. oldest_pending: of those whose entry exists. inbox: entries of its inbox.
    """

    group: bytes
    row: dict[str, Any]
    ahead: list[bytes]
    oldest_pending: bytes | None
    inbox: int


class StreamSeen(NamedTuple):
    """What one stream holds at the server time `now_ms`.

    info: of XINFO STREAM, empty when there is no stream. newest: ids, the newest first, at most
    NEWEST + 1.
    """

    stream: str
    now_ms: int
    info: dict[str, Any]
    newest: list[bytes]
    groups: list[GroupSeen]


async def look(store: StreamStore, streams: Sequence[str]) -> list[StreamSeen]:
    """Look at `streams` and all their groups.

    Three round trips however many there are: XINFO GROUPS and STREAM each; TIME, XREVRANGE of 101
    per stream, XRANGE of 101, XPENDING of 10 and XLEN per group; XRANGE of one per pending id.
    Errors: WrongKeyType, PermissionDenied and the others of the verbs.
    """
    outlines = await _outlines(store, streams)
    commands: list[tuple[Arg, ...]] = [("TIME",)]
    for stream, info, rows in outlines:
        commands.append(("XREVRANGE", stream, "+", "-", "COUNT", NEWEST + 1))
        for row in rows:
            after = b"(" + row["last-delivered-id"]
            first = info["first-entry"][0] if info["first-entry"] else info["last-generated-id"]
            commands.append(("XRANGE", stream, after, "+", "COUNT", LOOKED_AHEAD + 1))
            # What was trimmed away is no longer pending for the purpose: begin at the first entry.
            commands.append(("XPENDING", stream, row["name"], first, "+", GHOSTS))
            commands.append(("XLEN", beside(stream, keys.inbox, row["name"])))
    replies = iter(await store.archive.look(commands))
    seconds, micros = _sound(next(replies), "TIME")
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    seen, pending = [], []
    for stream, info, rows in outlines:
        newest, groups = _ids(next(replies), stream), []
        for row in rows:
            ahead, waiting = _ids(next(replies), stream), _ids(next(replies), stream)
            inbox = int(_sound(next(replies), shown(beside(stream, keys.inbox, row["name"]))))
            groups.append(GroupSeen(row["name"], row, ahead, None, inbox))
            pending.append((stream, waiting))
        seen.append(StreamSeen(stream, now_ms, info, newest, groups))
    oldest = iter(await _oldest_with_entry(store, pending))
    return [
        s._replace(groups=[g._replace(oldest_pending=next(oldest)) for g in s.groups]) for s in seen
    ]


async def count(store: StreamStore, stream: str, first: str, last: str, most: int) -> int:
    """Count the entries from `first` to `last`, up to `most`. XRANGE, 1,000 entries a page."""
    counted, share = 0, FIRST_PAGE
    while counted < most:
        asked = min(share, most - counted)
        page = await store.archive.range(stream, first, last, asked)
        counted += len(page)
        if len(page) < asked:
            break
        first = "(" + page[-1][0].decode()
        share = next_share(page)
    return counted


def next_share(page: Sequence[RawEntry]) -> int:
    """Return how many entries to ask for next, when a page is only counted."""
    some = page[::8]
    entry_bytes = sum(sum(map(len, fields)) for _, fields in some) // len(some) + 64
    return max(1, min(PAGE, PAGE_BYTES // entry_bytes))


async def _outlines(
    store: StreamStore, streams: Sequence[str]
) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return (stream, its row of XINFO, those of its groups), empty where there is no stream.

    The groups first: then no group can have read more than the stream says was added.
    """
    commands: list[tuple[Arg, ...]] = []
    for stream in streams:
        commands += [("XINFO", "GROUPS", stream), ("XINFO", "STREAM", stream)]
    replies = await store.archive.look(commands)
    found = []
    for stream, groups, info in zip(streams, replies[::2], replies[1::2], strict=True):
        missing = any(isinstance(r, ReplyError) and r.code == "ERR" for r in (groups, info))
        rows = [] if missing else [row_of(r) for r in _sound(groups, stream)]
        found.append((stream, {} if missing else row_of(_sound(info, stream)), rows))
    return found


async def _oldest_with_entry(
    store: StreamStore, pending: Sequence[tuple[str, list[bytes]]]
) -> list[bytes | None]:
    """Return, per stream and pending ids, the first id whose entry exists, None if none does.

    If all of GHOSTS ids are without entry the last of them stands for what may follow it.
    """
    exist = iter(await store.archive.look([("XRANGE", s, i, i) for s, ids in pending for i in ids]))
    found: list[bytes | None] = []
    for stream, ids in pending:
        there = [bool(_sound(next(exist), stream)) for _ in ids]
        rest = ids[-1] if len(ids) == GHOSTS else None
        found.append(next((i for i, e in zip(ids, there, strict=True) if e), rest))
    return found


def _ids(reply: Reply, key: str) -> list[bytes]:
    """Return the ids of rows; none for a group that went meanwhile, or that has the last id."""
    if isinstance(reply, ReplyError) and reply.code in ("NOGROUP", "ERR"):
        return []
    return [r[0] for r in _sound(reply, key)]


def _sound(reply: Reply, key: str) -> Reply:
    if isinstance(reply, ReplyError):
        raise reply.explained(key)
    return reply


def beside(stream: str, make: Callable[[str, str], str], group: bytes) -> bytes:
    """Return a key that `make` builds for a group, which others may have named, in any bytes."""
    return keys.wire(make(stream, keys.text(group)))


def shown(key: Arg) -> str:
    """Return a key, or a name in it, fit for an error."""
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)
