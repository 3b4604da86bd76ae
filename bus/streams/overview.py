"""Everything about many streams and their groups, as cheap as it can be had: for snapshots.

Three rounds of questions; each is asked once, however many want its answer, and a round without
questions is left out:

1  per stream XINFO GROUPS and STREAM, and SMEMBERS of its workers
2  GET per lease; XLEN of inbox and dead letters per group, XINFO CONSUMERS of those that have
   any, XPENDING of one where something is pending, XRANGE of one where something is undelivered;
   XREVRANGE of the newest entries where the server has no counter
3  XINFO CONSUMERS of inboxes, XRANGE and XREVRANGE of one of dead letters, where there are any

Bodies come along with every id of an entry. So one entry is asked for at most (XINFO STREAM brings
two), and where entries must be counted it is the newest ones, once for all groups of a stream, at
most 1,000 of a stream and about 4 MiB in all: exact for whoever is no further behind.

Nothing that is wrong with one key hides the rest: it is told as the trouble of its stream.
"""

from bisect import bisect_right
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

from bus.envelope import order
from bus.errors import BusError
from bus.streams import keys
from bus.streams.answers import Consumer
from bus.streams.connection import Arg
from bus.streams.inspection import NEWEST, RECENT_MS, beside, shown
from bus.streams.lag import Id, undelivered_of
from bus.streams.pauses import Pause, Place, pauses_of
from bus.streams.replies import TRANSIENT, Reply, ReplyError, row_of
from bus.streams.stream import StreamStore

COMMANDS_AT_ONCE = 1_000  # in one write: their replies are read in a few ms, during which all waits
COUNTED_MOST = 1_000  # entries per stream that are counted where the server keeps no counter...
COUNTED_BYTES = 4 * 1024 * 1024  # ...and as many as are about so large, of all streams together
NEWEST_BYTES = 64 * 1024  # so much tells how fast a stream grows, where no counter does

Command = tuple[Arg, ...]
Row = dict[str, Any]
_SERVER: tuple[Command, ...] = (
    ("TIME",),
    ("HGETALL", keys.PAUSED),
    ("INFO", "server"),
    ("INFO", "memory"),
)


class GroupLook(NamedTuple):
    """One group of one stream. Ids are as the server has them, None where there is none.

    row: of XINFO GROUPS. undelivered: entries; at_least: there are more. oldest_undelivered,
    oldest_pending: ids of entries that exist, or may exist. consumers, inbox_consumers: workers
    and lanes. inbox, dead: entries.
    """

    group: bytes
    row: Row
    undelivered: int
    at_least: bool
    oldest_undelivered: bytes | None
    oldest_pending: bytes | None
    consumers: list[Consumer]
    inbox: int
    inbox_consumers: list[Consumer]
    dead: int
    oldest_dead: bytes | None
    newest_dead: bytes | None


class StreamLook(NamedTuple):
    """One stream.

    info: of XINFO STREAM, empty when there is no stream. listed: consumers that keep a lease when
    alive. leases: of those alive, the groups they say they serve. newest: ids, the newest first,
    only of a stream whose growth nothing else tells. trouble: the first thing that could not be
    looked at; hidden: nothing could.
    """

    stream: str
    info: Row
    listed: frozenset[bytes]
    leases: dict[bytes, frozenset[bytes]]
    newest: list[bytes]
    groups: list[GroupLook]
    trouble: BusError | None
    hidden: bool


class ServerLook(NamedTuple):
    """The server as a whole.

    facts: names and values of INFO. pauses: of all groups. errors: why they cannot be told.
    """

    now_ms: int
    facts: dict[str, str]
    pauses: dict[Place, Pause]
    errors: tuple[str, ...]


async def server_look(store: StreamStore) -> ServerLook:
    """Return the server's time, what it says of itself and its memory, and who is paused.

    TIME, HGETALL and two sections of INFO, one write. Nothing is said, and nobody is paused, where
    the user may not ask.
    """
    time, paused, *sections = await store.archive.look(_SERVER)
    if isinstance(time, ReplyError):
        raise time.explained("TIME")
    errors: tuple[str, ...] = ()
    if isinstance(paused, ReplyError):
        if paused.code == "WRONGTYPE":  # it hides nothing else
            errors = (str(paused.explained(keys.PAUSED)),)
        elif paused.code != "NOPERM":
            raise paused.explained(keys.PAUSED)
        paused = ()
    facts: dict[str, str] = {}
    for section in sections:
        if not isinstance(section, ReplyError):
            facts |= facts_of(section)
        elif section.code != "NOPERM":
            raise section
    now_ms = int(time[0]) * 1000 + int(time[1]) // 1000
    return ServerLook(now_ms, facts, pauses_of(paused), errors)


def facts_of(section: bytes) -> dict[str, str]:
    """Return the names and values of a reply to INFO."""
    lines = section.decode(errors="replace").splitlines()
    return {name: value for name, colon, value in (x.partition(":") for x in lines) if colon}


async def overview(
    store: StreamStore, streams: Sequence[str], now_ms: int, counted: Container[str] = ()
) -> list[StreamLook]:
    """Look at `streams` and all that belongs to them, over the connection of the history.

    now_ms: the server's time. counted: streams whose counter of appends was seen before, so that
    it tells how fast they grow.
    Two or three writes, and more where there are above 1,000 questions: see the head of this file.
    Errors: those of the server as a whole.
    """
    answers = _Answers(store)
    looks = [_Look(s, answers, now_ms, counted=s in counted) for s in streams]
    await answers.ask([c for look in looks for c in look.first()])
    uncounted = sum(look.outline() for look in looks)
    share = COUNTED_BYTES // max(1, uncounted)
    await answers.ask([c for look in looks for c in look.second(share)])
    await answers.ask([c for look in looks for c in look.third()])
    return [look.result() for look in looks]


class _Answers:
    """What was asked, and what the server said."""

    def __init__(self, store: StreamStore) -> None:
        self._store = store
        self._replies: dict[Command, Reply] = {}

    async def ask(self, commands: Iterable[Command]) -> None:
        """Send what was not asked before."""
        new = list(dict.fromkeys(commands))
        for at in range(0, len(new), COMMANDS_AT_ONCE):
            part = new[at : at + COMMANDS_AT_ONCE]
            self._replies.update(zip(part, await self._store.archive.look(part), strict=True))

    def __getitem__(self, command: Command) -> Reply:
        return self._replies[command]


class _GroupQuestions:
    """What is asked about one group; None is a question that need not be asked."""

    def __init__(self, stream: str, row: Row) -> None:
        self.row = row
        name: bytes = row["name"]
        self.delivered: bytes = row["last-delivered-id"]
        inbox, dead = beside(stream, keys.inbox, name), beside(stream, keys.dead, name)
        self.inbox: Command = ("XLEN", inbox)
        self.dead: Command = ("XLEN", dead)
        self.consumers: Command | None = None
        if row["consumers"]:
            self.consumers = ("XINFO", "CONSUMERS", stream, name)
        self.inbox_consumers: Command = ("XINFO", "CONSUMERS", inbox, name)
        self.oldest_dead: Command = ("XRANGE", dead, "-", "+", "COUNT", 1)
        self.newest_dead: Command = ("XREVRANGE", dead, "+", "-", "COUNT", 1)
        self.pending: Command | None = None
        self.ahead: Command | None = None
        self.undelivered: int | None = 0
        self.next: bytes | None = None

    def measure(self, stream: str, info: Row) -> None:
        """Find out how far the group is, or what must be asked for that."""
        first = info["first-entry"][0] if info["first-entry"] else info["last-generated-id"]
        if self.row["pending"]:
            # What was trimmed away is no longer pending for the purpose: begin at the first entry.
            self.pending = ("XPENDING", stream, self.row["name"], first, "+", 1)
        self.undelivered = undelivered_of(self.row, info)
        if self.undelivered == 0:
            return
        if order(self.delivered) < order(first):
            self.next = first
        else:
            self.ahead = ("XRANGE", stream, b"(" + self.delivered, "+", "COUNT", 1)


class _Look:
    """One stream: what is asked about it, round by round, and what comes of it."""

    def __init__(self, stream: str, answers: _Answers, now_ms: int, *, counted: bool) -> None:
        self._stream = stream
        self._answers = answers
        self._now_ms = now_ms
        self._counted = counted
        self._info: Row = {}
        self._listed: frozenset[bytes] = frozenset()
        self._groups: list[_GroupQuestions] = []
        self._page: Command | None = None  # the newest entries, to count from
        self._most = 0
        self._newest: Command | None = None
        self._trouble: BusError | None = None
        self._hidden = False

    def _got(self, command: Command | None) -> Reply:
        """Return an answer; None where there is none, for key or group are gone, or unreadable."""
        reply = None if command is None else self._answers[command]
        if not isinstance(reply, ReplyError):
            return reply
        self._note(reply, command or ())
        return None

    def _note(self, error: ReplyError, command: Command) -> None:
        if error.code in TRANSIENT:
            raise error
        if error.code != "NOGROUP" and "no such key" not in error.text:
            key = shown(command[2] if command[0] == "XINFO" else command[1])
            told = error.explained(key)
            if told is error:
                told = BusError(f"the key {key} cannot be looked at: {error}")
            self._trouble = self._trouble or told

    # --- the questions

    def first(self) -> list[Command]:
        """Ask for the groups before the stream.

        Then no group can have read more than the stream says was added.
        """
        groups, info = ("XINFO", "GROUPS", self._stream), ("XINFO", "STREAM", self._stream)
        return [groups, info, ("SMEMBERS", keys.workers(self._stream))]

    def outline(self) -> bool:
        """Take in the first answers; True if entries must be counted."""
        groups, info, workers = (self._got(c) for c in self.first())
        self._hidden = self._trouble is not None and info is None
        self._listed = frozenset(workers or ())
        if info:
            self._info = row_of(info)
            self._groups = [_GroupQuestions(self._stream, row_of(r)) for r in groups or ()]
        for group in self._groups:
            group.measure(self._stream, self._info)
        return any(g.undelivered is None for g in self._groups)

    def second(self, most_bytes: int) -> list[Command]:
        """Ask for what the first answers speak of; for about `most_bytes` to be counted."""
        asked: list[Command | None] = [self._lease(n) for n in self._listed]
        for g in self._groups:
            asked += (g.inbox, g.dead, g.consumers, g.pending, g.ahead)
        self._ask_for_entries(most_bytes)
        return [c for c in (*asked, self._page, self._newest) if c]

    def third(self) -> list[Command]:
        """Ask for what is in inboxes and dead letters, if anything is."""
        asked: list[Command] = []
        for group in self._groups:
            if self._got(group.inbox):
                asked.append(group.inbox_consumers)
            if self._got(group.dead):
                asked += (group.oldest_dead, group.newest_dead)
        return asked

    def _lease(self, consumer: bytes) -> Command:
        return ("GET", keys.lease(self._stream, consumer))

    def _ask_for_entries(self, most_bytes: int) -> None:
        ends = [self._info[n] for n in ("first-entry", "last-entry") if self._info.get(n)]
        if not ends:
            return
        entry_bytes = sum(64 + sum(map(len, fields)) for _, fields in ends) // 2
        unknown = [g.delivered for g in self._groups if g.undelivered is None]
        if unknown:
            beyond = b"(" + min(unknown, key=order)
            self._most = max(1, min(COUNTED_MOST, most_bytes // entry_bytes))
            self._page = ("XREVRANGE", self._stream, "+", beyond, "COUNT", self._most + 1)
        told = self._counted and "entries-added" in self._info
        if not told and self._now_ms - order(ends[1][0])[0] <= RECENT_MS:
            most = max(1, min(NEWEST, NEWEST_BYTES // entry_bytes))
            self._newest = ("XREVRANGE", self._stream, "+", "-", "COUNT", most + 1)

    # --- the answers

    def result(self) -> StreamLook:
        """Return what was found out."""
        leases = self._leases()
        newest = [bytes(r[0]) for r in self._got(self._newest) or ()]
        rows = self._got(self._page)
        page = None if rows is None else [order(r[0]) for r in reversed(rows)]
        groups = [self._group(g, page) for g in self._groups]
        return StreamLook(
            self._stream,
            self._info,
            self._listed,
            leases,
            newest,
            groups,
            self._trouble,
            self._hidden,
        )

    def _leases(self) -> dict[bytes, frozenset[bytes]]:
        """Return the leases there are. Whose lease may not be looked at counts as not listed."""
        found = {}
        for name in self._listed:
            reply = self._answers[self._lease(name)]
            if isinstance(reply, ReplyError):
                self._note(reply, self._lease(name))
                if reply.code != "WRONGTYPE":
                    self._listed -= {name}
                    continue
                reply = b""  # it exists
            if reply is not None:
                found[name] = frozenset(reply.split(b","))
        return found

    def _group(self, group: _GroupQuestions, page: Sequence[Id] | None) -> GroupLook:
        undelivered, at_least = group.undelivered, False
        if undelivered is None:
            undelivered, at_least = self._counted_on(page, group.delivered)
        inbox, dead = self._got(group.inbox) or 0, self._got(group.dead) or 0
        return GroupLook(
            group.row["name"],
            group.row,
            undelivered,
            at_least,
            group.next or self._id(group.ahead),
            self._id(group.pending),
            _consumers(self._got(group.consumers)),
            inbox,
            _consumers(self._got(group.inbox_consumers) if inbox else None),
            dead,
            self._id(group.oldest_dead if dead else None),
            self._id(group.newest_dead if dead else None),
        )

    def _counted_on(self, page: Sequence[Id] | None, delivered: bytes) -> tuple[int, bool]:
        """Return how many of the newest entries lie beyond an id, and whether there are more."""
        if page is None:  # it may not be looked at
            return 0, True
        ahead = len(page) - bisect_right(page, order(delivered))
        return min(ahead, self._most), ahead > self._most

    def _id(self, command: Command | None) -> bytes | None:
        rows = self._got(command)
        return bytes(rows[0][0]) if rows else None


def _consumers(rows: list[Reply] | None) -> list[Consumer]:
    """Return the consumers of XINFO. There may be hundreds of lanes: no row becomes a dict."""
    if not rows:
        return []
    names = rows[0][::2]
    name, pending, idle = (2 * names.index(n) + 1 for n in (b"name", b"pending", b"idle"))
    return [Consumer(r[name], r[pending], r[idle]) for r in rows]
