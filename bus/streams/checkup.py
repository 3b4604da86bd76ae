"""What a doctor asks a server, beside what a snapshot shows. Nothing is judged here, or changed.

What the user may not ask is missing among the answers: facts and settings without an entry, None
for what would be known. Errors of all of it: those of the connection, and of a server that answers
nobody now.
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.connection import Arg
from bus.streams.overview import COMMANDS_AT_ONCE, facts_of
from bus.streams.replies import TRANSIENT, Reply, ReplyError
from bus.streams.stream import StreamStore

# What is asked for of the configuration: hosted servers mostly keep all of it to themselves.
SETTINGS = ("appendfsync", "save", "min-replicas-to-write", "stop-writes-on-bgsave-error")
LETTERS_MOST = 50  # dead letters of a group that are looked at, of one stream...
LETTERS_BYTES = 256 * 1024  # ...and as many as are about so large
_QUESTIONS: tuple[tuple[Arg, ...], ...] = (
    ("PING",),
    ("INFO",),
    # Fails on every server, since there is no such key and "none" is no number; which of the two
    # it says tells whether it knows of ENTRIESREAD at all. One that takes no writes says why.
    ("XGROUP", "CREATE", keys.PROBE, "none", "$", "ENTRIESREAD", "none"),
    *(("CONFIG", "GET", name) for name in SETTINGS),
)


class ServerSeen(NamedTuple):
    """What a server says of itself.

    trouble: the code of what it answered to PING, "" if that was PONG. facts: INFO, by name.
    config: SETTINGS, by name. takes_counts: whether a group can be made with a count of the entries
    it has passed. refuses: the code of why it takes no writes now, "" if it does or nobody knows.
    """

    trouble: str
    facts: dict[str, str]
    config: dict[str, str]
    takes_counts: bool | None
    refuses: str


class ClockSeen(NamedTuple):
    """How far the server's clock is ahead of this machine's, give or take `within_s`."""

    ahead_s: float
    within_s: float


async def server_seen(store: StreamStore) -> ServerSeen:
    """Ask a server about itself: PING, INFO, CONFIG GET of four, one write.

    And XGROUP CREATE in a form that no server accepts.
    """
    ping, info, probe, *config = await store.archive.look(_QUESTIONS)
    refusal = probe if isinstance(probe, ReplyError) else ReplyError("", "")
    return ServerSeen(
        ping.code if isinstance(ping, ReplyError) else "",
        {} if isinstance(info, ReplyError) else facts_of(info),
        {n: v for n, r in zip(SETTINGS, config, strict=True) if (v := _setting(r)) is not None},
        "not an integer" in refusal.text if refusal.code == "ERR" else None,
        refusal.code if refusal.code in TRANSIENT else "",
    )


async def clock_seen(store: StreamStore) -> ClockSeen | None:
    """Compare the clocks; None if the user may not. TIME."""
    before_s = time.time()
    (reply,) = await store.archive.look([("TIME",)])
    after_s = time.time()
    if isinstance(reply, ReplyError):
        return None
    server_s = int(reply[0]) + int(reply[1]) / 1e6
    return ClockSeen(server_s - (before_s + after_s) / 2, max(0.0, after_s - before_s) / 2)


async def types_of(store: StreamStore, wanted: Iterable[str]) -> dict[str, str]:
    """Return the Redis types of those keys that exist, and may be looked at. TYPE each."""
    asked = list(dict.fromkeys(wanted))
    replies: list[Reply] = []
    for at in range(0, len(asked), COMMANDS_AT_ONCE):
        part = asked[at : at + COMMANDS_AT_ONCE]
        replies += await store.archive.look([("TYPE", keys.wire(k)) for k in part])
    return {
        key: reply.decode()
        for key, reply in zip(asked, replies, strict=True)
        if not isinstance(reply, ReplyError) and reply != b"none"
    }


async def youngest_letters(
    store: StreamStore, places: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[RawEntry]]:
    """Return, by stream and group, the youngest dead letters: LETTERS_MOST or LETTERS_BYTES.

    XREVRANGE of one, which tells how large they are, then of the rest; each is a write of its own.
    """
    found = {}
    for stream, group in places:
        dead = keys.wire(keys.dead(stream, group))
        rows = await _youngest(store, dead, 1)
        if rows:
            entry_bytes = 64 + sum(map(len, rows[0][1]))
            rows = await _youngest(store, dead, min(LETTERS_MOST, 1 + LETTERS_BYTES // entry_bytes))
        found[stream, group] = rows
    return found


async def _youngest(store: StreamStore, key: bytes, count: int) -> list[RawEntry]:
    (rows,) = await store.archive.look([("XREVRANGE", key, "+", "-", "COUNT", count)])
    return [] if isinstance(rows, ReplyError) else [(r[0], r[1]) for r in rows]


def _setting(reply: Reply) -> str | None:
    """Return what CONFIG GET says of one setting; None if it says nothing."""
    if isinstance(reply, ReplyError) or len(reply) != 2:  # noqa: PLR2004 - name and value
        return None
    return bytes(reply[1]).decode(errors="replace")
