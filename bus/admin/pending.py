"""What a group was given and has not finished: listed, hurried, given up. See `PendingEntries`."""

import re
from collections.abc import AsyncGenerator, Container, Iterable
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Literal, NamedTuple, Self, TypedDict, get_args

from bus.admin.consumers import is_alive, survey_of
from bus.admin.scope import rows_of
from bus.config import BATCH_BYTES, checked_name, checked_number
from bus.envelope import Envelope, entry_time, order
from bus.errors import DeclarationError, NotPending
from bus.history.event_store import envelope_of
from bus.history.patience import patiently, twice_at_worst
from bus.history.selection import Selection, Types
from bus.shortage import tell_lost
from bus.streams import keys
from bus.streams.answers import Buried, Survey
from bus.streams.codec import moved, without_inbox_fields
from bus.streams.connection import Arg
from bus.streams.letters import closed
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.streams.upkeep import PendingRow
from bus.telemetry import Telemetry

State = Literal["running", "parked", "orphaned", "half-done"]
PAGE = 100  # rows, and entries with their bodies, in memory at a time


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """An entry that a group was given and has not finished.

    id: `topic:partition/entry id`; in the group's inbox `topic:partition:inbox/entry id`.
    state: "running" if a worker that lives has it, "parked" if it waits in a lane, "orphaned" if
        its worker is gone; "half-done" if some of its effects took place and the others failed, and
        there was no room for a dead letter: it never runs again by itself.
    owner: the worker; the lane `parked:<ms>`. due_at: of a parked one.
    attempts: how often it was given to a worker, what was handed back unstarted not counted.
    idle_s: since it was last touched.
    envelope: the event's own; None if the entry was deleted by hand.
    """

    id: str
    group: str
    stream: str
    state: State
    owner: str
    due_at: datetime | None
    attempts: int
    idle_s: float
    envelope: Envelope | None = field(compare=False)
    fields: tuple[bytes, ...] = field(repr=False)

    @property
    def entry_id(self) -> str:
        """The id in the stream, or in the inbox."""
        return self.id.rpartition("/")[2]

    @property
    def place(self) -> str:
        """The key that holds the entry: the stream, or the group's inbox."""
        in_inbox = self.id.rpartition("/")[0].endswith(":inbox")
        return keys.inbox(self.stream, self.group) if in_inbox else self.stream


class PendingFilters(TypedDict, total=False):
    """What `Admin.pending` takes besides group and topic; see `PendingEntries`."""

    types: Types
    state: State | None
    owner: str | None
    min_idle_s: float
    min_attempts: int
    ids: str | Iterable[str] | None


@dataclass(frozen=True, slots=True)
class Retried:
    """What became of the entries that were to be retried at once.

    matched: asked for. released: any worker may take them now. running: left to the workers that
    have them. half_done: left, since a part of them would take place twice. gone: finished or taken
    meanwhile; after a lost answer they count as released. lost: deleted by hand; acked, since
    nobody can handle them.
    """

    matched: int
    released: int
    running: int
    half_done: int
    gone: int
    lost: int


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What became of the entries that were to be dead letters; see `Retried` for the counts."""

    matched: int
    dead_lettered: int
    running: int
    gone: int
    lost: int


class _Scope(NamedTuple):
    store: StreamStore
    topics: TopicTable
    telemetry: Telemetry


class PendingEntries:
    """What a group has pending and is asked for; reads nothing until it is told to.

    `async for entry in pending` goes stream by stream, each from its oldest entry on, then its
    inbox. XPENDING, 100 rows a page, and XRANGE of each.

    topic: None for all. types: event classes, names or patterns. state: one of `PendingEntry`.
    owner: of one worker or lane. min_idle_s: not touched for so long. min_attempts: at least so
    many. ids: `PendingEntry.id`, or the entry id alone.
    Errors: DeclarationError at once; when it reads: UnknownTopic, UnknownGroup, ServerError.
    """

    def __init__(
        self,
        store: StreamStore,
        topics: TopicTable,
        telemetry: Telemetry,
        group: str,
        topic: str | None = None,
        *,
        types: Types = None,
        state: State | None = None,
        owner: str | None = None,
        min_idle_s: float = 0.0,
        min_attempts: int = 0,
        ids: str | Iterable[str] | None = None,
    ) -> None:
        self._scope = _Scope(store, topics, telemetry)
        self._group = group
        self._topic = topic
        self._selection = Selection(types, None, None)
        if state is not None and state not in get_args(State):
            raise DeclarationError(f"{state!r} is no state: there are {', '.join(get_args(State))}")
        self._state = state
        self._owner = owner
        checked_number(min_idle_s, "min_idle_s", 0, 1e10)
        checked_number(min_attempts, "min_attempts", 0, 2**53, whole=True)
        self._min_idle_ms = int(min_idle_s * 1000)
        self._min_attempts = min_attempts
        if isinstance(ids, str):
            ids = (ids,)
        self._ids = None if ids is None else [_parsed(i, topic) for i in ids]
        self._fixed: dict[str, State] | None = None

    async def fixed(self) -> Self:
        """Return the same, as it is now: nothing joins it, and what runs now counts as running.

        For who looks, asks, and does it then. All of it is read; about 100 bytes an entry stay.
        Errors: as it reads.
        """
        async with aclosing(self._entries()) as entries:
            found = {e.id: e.state async for e in entries}
        same = copy(self)
        same._fixed = found  # noqa: SLF001 - its own
        return same

    def __aiter__(self) -> AsyncGenerator[PendingEntry, None]:  # noqa: PYI058 - who stops closes it
        return self._entries()

    async def get(self, entry_id: str) -> PendingEntry:
        """Return one, whatever filters there are. Errors: NotPending."""
        one = PendingEntries(*self._scope, self._group, self._topic, ids=entry_id)
        async with aclosing(one._entries()) as entries:
            found = [e async for e in entries]
        if not found:
            raise NotPending(
                f"{entry_id} is not pending for group {self._group}: it was finished meanwhile"
            )
        if len(found) > 1:
            named = ", ".join(e.id for e in found)
            raise DeclarationError(f"several pending entries have the id {entry_id}: name {named}")
        return found[0]

    async def retry(self, *, dry_run: bool = False) -> Retried:
        """Let any worker take them now: what is parked need not wait, what is orphaned neither.

        What runs is left alone, and what is half done, unless its id was asked for. The next
        attempt follows on those that were used up. `release.lua`.
        """
        counts = dict.fromkeys(("matched", "released", "running", "half_done", "gone", "lost"), 0)
        left: tuple[State, ...] = (
            ("running",) if self._ids is not None else ("running", "half-done")
        )
        async for place, owner, entries in self._batches(counts, left):
            if dry_run:
                there = sum(e.envelope is not None for e in entries)
                counts["released"] += there
                counts["lost"] += len(entries) - there
                continue
            answers = await self._release(place, owner, entries)
            for count, answer in (("released", 1), ("gone", 0), ("lost", -1)):
                counts[count] += answers.count(answer)
        if counts["released"] and not dry_run:
            self._scope.telemetry.emit(
                "pending.released", group=self._group, count=counts["released"]
            )
        return Retried(**counts)

    async def dead_letter(self, why: str, *, dry_run: bool = False) -> GivenUp:
        """Make them dead letters, with the reason `rejected` and `why` as the error.

        Those that are half done keep the reason `effects-failed`. What runs is left alone. Of a
        group whose name cannot be opened (`Bus.dead_letters`) it is refused. `on_dead` is not told.
        `dead_letter.lua`.
        """
        checked_name(self._group, "group name")
        counts = dict.fromkeys(("matched", "dead_lettered", "running", "gone", "lost"), 0)
        async for place, owner, entries in self._batches(counts, ("running",)):
            there = [e for e in entries if e.envelope is not None]
            gone = [e for e in entries if e.envelope is None]
            if dry_run:
                counts["dead_lettered"] += len(there)
                counts["lost"] += len(gone)
                continue
            if there:
                await self._bury(place, owner, there, why, counts)
            if gone:
                answers = await self._release(place, owner, gone)
                counts["lost"] += answers.count(-1)
                counts["gone"] += len(answers) - answers.count(-1)
        if counts["dead_lettered"] and not dry_run:
            self._scope.telemetry.emit(
                "pending.given_up", group=self._group, count=counts["dead_lettered"]
            )
        return GivenUp(**counts)

    async def _release(self, place: str, owner: bytes, entries: list[PendingEntry]) -> list[int]:
        """Let others take them, and tell of ghosts; return as `Upkeep.release`."""
        ids = [e.entry_id.encode() for e in entries]
        release = partial(self._scope.store.upkeep.release, place, self._group, owner, ids)
        answers, in_doubt = await twice_at_worst(release)
        if in_doubt:  # the call before has done it
            answers = [a or (-1 if e.envelope is None else 1) for e, a in _pairs(entries, answers)]
        lost = [e.entry_id for e, a in _pairs(entries, answers) if a < 0]
        tell_lost(self._scope.telemetry, place, {self._group: lost} if lost else {})
        return answers

    async def _bury(
        self,
        place: str,
        owner: bytes,
        entries: list[PendingEntry],
        why: str,
        counts: dict[str, int],
    ) -> None:
        letters = [(e.entry_id.encode(), _letter_of(e, why)) for e in entries]
        bury = partial(
            self._scope.store.dead_letter,
            place,
            self._group,
            keys.text(owner),
            0,
            letters,
            lease=keys.lease(place, owner),  # a worker that was stopped may go on
        )
        try:
            answers, in_doubt = await twice_at_worst(bury)
        except ReplyError as error:
            raise error.explained(keys.dead(place, self._group)) from None
        counts["dead_lettered"] += answers.count(Buried.YES)
        counts["dead_lettered" if in_doubt else "gone"] += answers.count(Buried.REFUSED)

    # --- finding them

    async def _batches(
        self, counts: dict[str, int], left: Container[State]
    ) -> AsyncGenerator[tuple[str, bytes, list[PendingEntry]], None]:
        """Yield what is not left alone, as (key, owner, entries of it); counts what was asked for.

        At most PAGE of them at a time, and about 1 MiB, however many lanes there are.
        """
        held: dict[tuple[str, str], list[PendingEntry]] = {}
        size = 0
        async with aclosing(self._entries()) as entries:
            async for entry in entries:
                counts["matched"] += 1
                was = entry.state if self._fixed is None else self._fixed[entry.id]
                state = "running" if was == "running" else entry.state
                if state in left:
                    counts[state.replace("-", "_")] += 1
                    continue
                place = entry.place, entry.owner
                held.setdefault(place, []).append(entry)
                size += sum(map(len, entry.fields))
                if len(held[place]) >= PAGE or size >= BATCH_BYTES:
                    for (key, owner), those in held.items():
                        yield key, keys.wire(owner), those
                    held, size = {}, 0
        for (key, owner), those in held.items():
            yield key, keys.wire(owner), those

    async def _entries(self) -> AsyncGenerator[PendingEntry, None]:
        store, topics, _ = self._scope
        for stream in await rows_of(store, topics, self._group, self._topic):
            survey = await patiently(partial(survey_of, store, stream, self._group))
            for place in (stream, keys.inbox(stream, self._group)):
                async with aclosing(self._rows(stream, place)) as pages:
                    async for rows in pages:
                        ids = [row.entry_id for row in rows]
                        bodies = await patiently(partial(store.upkeep.bodies, place, ids))
                        for row, fields in zip(rows, bodies, strict=True):
                            entry = self._entry(stream, place, survey, row, fields)
                            if self._admits(entry):
                                yield entry

    async def _rows(self, stream: str, place: str) -> AsyncGenerator[list[PendingRow], None]:
        """Yield pages of rows of a stream, or of the inbox beside it."""
        ask = partial(
            self._scope.store.upkeep.pending,
            place,
            self._group,
            owner=self._owner,
            idle_ms=self._min_idle_ms,
        )
        if self._ids is not None:
            here = (None, _place_of(stream, place))
            for entry_id in dict.fromkeys(i.entry_id for i in self._ids if i.place in here):
                yield await patiently(partial(ask, entry_id, entry_id, 1))
            return
        first, ended = "-", False
        while not ended:
            rows = await patiently(partial(ask, first, "+", PAGE))
            ended = len(rows) < PAGE
            yield rows
            if rows:
                first = f"({rows[-1].entry_id.decode()}"

    def _entry(
        self,
        stream: str,
        place: str,
        survey: Survey,
        row: PendingRow,
        fields: list[bytes] | None,
    ) -> PendingEntry:
        due_ms = keys.lane_due_ms(row.owner)
        state: State = "parked"
        if row.owner == keys.HALF_DONE:
            state = "half-done"
        elif due_ms is None:
            state = "running" if _has_worker(survey, place, self._group, row.owner) else "orphaned"
        envelope, attempts = None, row.deliveries
        if fields is not None and place == stream:
            envelope = envelope_of(stream, (row.entry_id, fields))
        elif fields is not None:
            was = moved(row.entry_id, fields)
            envelope = envelope_of(stream, (was.origin, without_inbox_fields(fields)))
            # Its first delivery counts 1, whatever was used up before; a lane has what was used up.
            attempts = max(attempts, was.attempts + (due_ms is None))
        return PendingEntry(
            f"{_place_of(stream, place)}/{row.entry_id.decode()}",
            self._group,
            stream,
            state,
            keys.text(row.owner),
            entry_time(str(due_ms)) if state == "parked" else None,
            attempts,
            row.idle_ms / 1000,
            envelope,
            tuple(fields or ()),
        )

    def _admits(self, entry: PendingEntry) -> bool:
        if self._fixed is not None and entry.id not in self._fixed:
            return False
        if self._state not in (None, entry.state) or entry.attempts < self._min_attempts:
            return False
        patterns = self._selection.patterns
        return patterns is None or self._selection.names((b"", list(entry.fields)))


def _pairs(entries: list[PendingEntry], answers: list[int]) -> Iterable[tuple[PendingEntry, int]]:
    return zip(entries, answers, strict=True)


class _Id(NamedTuple):
    """An id that was asked for. place: what it began with; None if it may be any."""

    place: str | None
    entry_id: str


_ID = re.compile(r"(?:([^/:]+:[0-9]{1,4}(?::inbox)?)/)?([0-9]{1,20}-[0-9]{1,20})")


def _parsed(entry_id: str, topic: str | None) -> _Id:
    found = _ID.fullmatch(entry_id) if isinstance(entry_id, str) else None
    if found is None or any(int(n) >= 2**64 for n in found[2].split("-")):
        raise DeclarationError(
            f"{entry_id!r} is no id of a pending entry: they look like document:0/1763629200000-0,"
            " document:0:inbox/1763629200000-0, or 1763629200000-0 for any place"
        )
    if found[1] is not None and topic not in (None, found[1].partition(":")[0]):
        raise DeclarationError(f"{entry_id} is not of the topic {topic}")
    ms, sequence = order(found[2])
    return _Id(found[1], f"{ms}-{sequence}")


def _place_of(stream: str, place: str) -> str:
    """Return what the ids of entries in a key begin with."""
    return keys.tag_of(stream) + (":inbox" if place != stream else "")


def _has_worker(survey: Survey, place: str, group: str, owner: bytes) -> bool:
    consumers = survey.consumers.get((place, group), ())
    # One that was not there yet was heard of just now.
    idle_ms = next((c.idle_ms for c in consumers if c.name == owner), 0)
    return is_alive(survey, owner, idle_ms)


def _letter_of(entry: PendingEntry, why: str) -> list[Arg]:
    """Return the fields of the dead letter that an entry becomes."""
    assert entry.envelope is not None
    fields = list(entry.fields)
    if entry.place != entry.stream:
        fields = without_inbox_fields(fields)
    return closed(
        fields,
        reason="effects-failed" if entry.state == "half-done" else "rejected",
        error=f"GivenUp: {why}",
        traceback="",
        attempts=entry.attempts,
        origin=entry.envelope.entry_id.encode(),
    )
