"""The dead letters of one group: found, shown, redriven, purged, exported. See `DeadLetters`."""

import os
from collections.abc import AsyncGenerator, Callable, Container, Iterable
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple, Self, TypedDict, TypeVar

from bus.config import (
    LETTERS_PER_LOOK,
    PURGED_PER_CALL,
    SAMPLE,
    checked_name,
    checked_number,
)
from bus.envelope import order
from bus.errors import DeclarationError, LetterGone, Undecodable, UnknownGroup, WrongKeyType
from bus.history.event_store import Found, merged
from bus.history.export import TextFile, export
from bus.history.groups import streams_with
from bus.history.letter import Letter, letter_of
from bus.history.letter_id import LetterId, parsed
from bus.history.mend import Edit
from bus.history.patience import patiently
from bus.history.position import Position, span
from bus.history.redrive import OnRedrive, Redrive, Redriven
from bus.history.selection import Selection, Types, checked_function, plain_answer
from bus.streams import keys
from bus.streams.answers import RawEntry
from bus.streams.stream import StreamStore
from bus.streams.topics import Record, TopicTable
from bus.telemetry import Telemetry

REASONS = ("failed", "rejected", "undecodable", "newer-version", "crashed", "effects-failed")
_STREAMS_PER_LOOK = 64  # two letters of each are in memory together
T = TypeVar("T")

LetterPredicate = Callable[[Letter], bool]
_Ends = tuple[str, RawEntry | None, RawEntry | None]  # stream, the first and the last


class Filters(TypedDict, total=False):
    """What `Bus.dead_letters` takes besides group and topic; see `DeadLetters`."""

    types: Types
    error: str | None
    reason: str | Iterable[str] | None
    since: Position
    until: Position
    ids: str | Iterable[str] | None
    where: LetterPredicate | None
    reverse: bool


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge did: letters that were asked for, deleted, and gone before it came to them.

    sample: of a dry run, the first letters that it would delete.
    """

    matched: int
    purged: int
    gone: int
    sample: tuple[Letter, ...] = ()


class Access(NamedTuple):
    """What dead letters need of a bus. address: of its server, without a password."""

    store: StreamStore
    topics: TopicTable
    telemetry: Telemetry
    address: str
    max_event_bytes: int


class DeadLetters:
    """The dead letters of a group that are asked for; reads nothing until it is told to.

    `async for letter in letters` goes from the oldest to the newest over all partitions, and finds
    what is there when it begins. XRANGE, in pages of up to 1 MiB.

    topic: None for all that are recorded or declared. types: event classes, names or patterns.
    error: a pattern for the exception's class or its whole text, "Timeout*": `*` stands for any
    text, `?` for any character. reason: one or several of `Letter.reason`. since, until: when they
    died, both included; as `history`. ids: `Letter.id`, or the entry id alone. where: a plain
    function of a `Letter`; what raises Undecodable there is left out. reverse: the newest first.
    Errors: DeclarationError at once; when it reads: UnknownTopic, UnknownGroup, ServerError. Of all
    topics, a key of another type is left out, and told (`dead_letters.unreadable`).
    """

    def __init__(
        self,
        access: Access,
        group: str,
        topic: str | None = None,
        *,
        types: Types = None,
        error: str | None = None,
        reason: str | Iterable[str] | None = None,
        since: Position = None,
        until: Position = None,
        ids: str | Iterable[str] | None = None,
        where: LetterPredicate | None = None,
        reverse: bool = False,
    ) -> None:
        self._access = access
        self._store = access.store
        self._group = checked_name(group, "group name")
        self._topic = None if topic is None else checked_name(topic, "topic name")
        self._selection = Selection(types, None, None)
        if error is not None and not isinstance(error, str):
            raise DeclarationError(f"error is a pattern such as 'Timeout*', not {error!r}")
        self._error = None if error is None else error.replace("[", "[[]")  # for fnmatch
        self._reasons = _checked_reasons(reason)
        self._span = span(since, until)
        if ids is not None and (since is not None or until is not None):
            raise DeclarationError("ids name the letters: leave since and until out")
        if isinstance(ids, str):
            ids = (ids,)
        self._ids = None if ids is None else [parsed(i, self._topic) for i in ids]
        if where is not None:
            checked_function(where, "where", "a letter")
        self._where = where
        self._reverse = reverse
        self._fixed: dict[str, tuple[str, str]] | None = None

    async def fixed(self) -> Self:
        """Return the same, as it is now: what dies from now on is not among them.

        For who looks, asks, and does it then. XRANGE of the first and last of each stream.
        Errors: as it reads.
        """
        same = copy(self)
        if self._ids is None:
            same._fixed = await self._there()  # noqa: SLF001 - its own
        return same

    def __aiter__(self) -> AsyncGenerator[Letter, None]:  # noqa: PYI058 - who stops closes it
        return self._letters()

    async def count(self) -> int:
        """Return how many there are. XLEN each without a filter, else all of them are read."""
        if self._is_everything() and self._fixed is None:
            dead = [keys.dead(s, self._group) for s in await self._there()]
            lengths = await patiently(partial(self._store.lengths, dead))
            if -1 not in lengths:  # none is forbidden, say
                return sum(lengths)
        async with aclosing(self._letters()) as letters:
            count = 0
            async for _ in letters:
                count += 1
            return count

    async def get(self, letter_id: str) -> Letter:
        """Return one, whatever filters there are. XRANGE.

        letter_id: `Letter.id`, or its entry id alone. Errors: LetterGone, when it was redriven or
        purged; DeclarationError for what is no id, or when several partitions have it.
        """
        wanted = parsed(letter_id, self._topic)
        streams = [wanted.stream] if wanted.stream else list(await self._records())
        found = [f async for f in self._fetched(streams, [wanted])]
        if not found:
            await self._there()  # an unknown group is another error
            raise LetterGone(
                f"group {self._group} has no dead letter {letter_id}: it was redriven or purged"
                " meanwhile, or is another group's"
            )
        letters = [letter_of(self._group, *f) for f in found]
        if len(letters) > 1:
            named = ", ".join(letter.id for letter in letters)
            raise DeclarationError(f"several dead letters have the id {letter_id}: name {named}")
        return letters[0]

    async def redrive(
        self,
        *,
        edit: Edit | None = None,
        rate: float | None = None,
        limit: int | None = None,
        dry_run: bool = False,
        progress: OnRedrive | None = None,
    ) -> Redriven:
        """Move them back into the inbox of the handler that failed, each once; nobody else sees.

        They come with a fresh budget of attempts and their own event and entry id, and wait for a
        worker. It cannot be undone: try `limit=10` first. While an inbox holds half of the room
        between keep and maxlen, it waits for more, without end: `asyncio.timeout` ends it.

        edit: fields to change, by name, or a plain function that gives an event of the same type
            and the newest class, such changes, or None to leave a letter out. A field is replaced
            whole; members that the class does not know go. Of a letter that cannot be read as an
            object, or by its upcast, all fields are to be given. Checked against the event's class
            before a batch is sent; the first that is not valid ends the redrive.
        rate: a second at most. limit: letters that go, at most. dry_run: checks and counts, gives a
            sample. progress: called with a `Redriven` when it begins, about 5 times a second while
            it works, and in the end.
        May be killed and run again, also twice at once. Before the first letter of a stream it
        looks who serves the group; then `redrive.lua` for up to 100 letters or 1 MiB, 10-15 us of
        server per letter.
        Errors: UnknownGroup where the stream has no such group. InvalidEvent and UnknownEventType
        for an edit, which name the letter; it, those after it and those of its batch are still dead
        letters. ServerError, after a minute. A note says how many were redriven before.
        """
        job = Redrive(
            self._access.store,
            self._access.topics,
            self._access.telemetry,
            self._access.address,
            self._access.max_event_bytes,
            group=self._group,
            edit=edit,
            rate=rate,
            limit=limit,
            dry_run=dry_run,
            progress=progress,
        )
        async with aclosing(self._letters()) as letters:
            return await job.run(letters)

    async def purge(self, *, limit: int | None = None, dry_run: bool = False) -> Purged:
        """Delete them. XDEL of up to 500.

        limit: letters at most. dry_run: counts, and gives a sample. After a lost answer what is
        no longer there counts as purged. Errors: a note says how many were deleted before.
        """
        if limit is not None:
            checked_number(limit, "limit", 1, 2**53, whole=True)
        matched = purged = 0
        sample: list[Letter] = []
        held: dict[str, list[bytes]] = {}
        try:
            async with aclosing(self._letters()) as letters:
                async for letter in letters:
                    matched += 1
                    if dry_run:
                        sample += [letter][: SAMPLE - len(sample)]
                    else:
                        ids = held.setdefault(letter.stream, [])
                        ids.append(letter.entry_id.encode())
                        if len(ids) >= PURGED_PER_CALL:
                            purged += await self._purge(letter.stream, held.pop(letter.stream))
                    if matched == limit:
                        break
            for each in held.items():
                purged += await self._purge(*each)
        except Exception as error:
            if purged:
                error.add_note(f"{purged:,} dead letters were deleted before; run it again")
            raise
        return Purged(matched, purged, 0 if dry_run else matched - purged, tuple(sample))

    async def export(self, to: str | os.PathLike[str] | TextFile) -> int:
        """Write them as JSON lines, see `Letter.as_json`; return how many. They stay.

        to: a path, or an open text file. A file appears when it is whole, instead of any that was
        there, and is its owner's alone (mode 0600). Errors: OSError, and those of reading: then
        everything is as it was.
        """
        async with aclosing(self._letters()) as letters:
            return await export(letters, to)

    # --- finding them

    def _is_everything(self) -> bool:
        asked = (self._selection.patterns, self._error, self._reasons, self._ids, self._where)
        return all(a is None for a in asked) and self._span == ("-", "+")

    async def _letters(self) -> AsyncGenerator[Letter, None]:
        async with aclosing(self._entries()) as entries:
            async for stream, entry in entries:
                letter = letter_of(self._group, stream, entry)
                if self._admits(letter):
                    yield letter

    def _admits(self, letter: Letter) -> bool:
        if self._selection.patterns is not None and not self._selection.names(
            (b"", list(letter.fields))
        ):
            return False
        if self._reasons is not None and letter.reason not in self._reasons:
            return False
        if self._error is not None and not (
            fnmatchcase(letter.error_type, self._error) or fnmatchcase(letter.error, self._error)
        ):
            return False
        if self._where is None:
            return True
        try:
            return bool(plain_answer(self._where(letter), "where"))
        except Undecodable:
            return False

    async def _entries(self) -> AsyncGenerator[Found, None]:
        """Yield (the partition's own stream, entry) of what is there now."""
        if self._ids is not None:
            streams = list(await self._records())
            nothing = True
            async for found in self._fetched(streams, self._ids):
                nothing = False
                yield found
            if nothing:
                await self._there()
            return
        there = await self._there() if self._fixed is None else self._fixed
        home = {keys.dead(stream, self._group): stream for stream in there}
        bounds = {dead: there[stream] for dead, stream in home.items()}
        async with aclosing(merged(self._store, bounds, reverse=self._reverse)) as entries:
            async for dead, entry in entries:
                yield home[dead], entry

    async def _records(self) -> dict[str, Record]:
        """Return the streams of all topics that are asked for, and their topics' records."""
        topics = self._access.topics
        if self._topic is not None:
            record = await patiently(partial(topics.existing, self._topic))
            records = {self._topic: record}
        else:
            records = await patiently(topics.known)
        return {s: r for name, r in records.items() for s in topics.streams(name, r.partitions)}

    async def _there(self) -> dict[str, tuple[str, str]]:
        """Return the streams with letters in the range, and their first and last; none after now.

        What fails again while it is redriven is not found for ever. Errors: UnknownGroup.
        """
        streams = list(await self._records())
        there = {}
        for part in _parts(streams, _STREAMS_PER_LOOK):
            for stream, oldest, newest in await self._ends_of_readable(part):
                if oldest is not None and newest is not None:
                    there[stream] = (oldest[0].decode(), newest[0].decode())
        if not there:
            await self._check_group(streams)
        return there

    async def _ends_of_readable(self, streams: list[str]) -> list[_Ends]:
        try:
            return await self._ends(streams)
        except WrongKeyType:
            named = () if self._topic is None else streams
            return await self._ends(await self._readable(streams, named))

    async def _ends(self, streams: list[str]) -> list[_Ends]:
        """Return the first and the last letter of each stream in the range."""
        dead = [keys.dead(s, self._group) for s in streams]
        ends = await patiently(partial(self._store.archive.ends, dead, *self._span))
        return list(zip(streams, ends[::2], ends[1::2], strict=True))

    async def _readable(self, streams: Iterable[str], named: Container[str]) -> list[str]:
        """Return the streams whose dead letters can be read, one of which cannot; tell of others.

        What somebody put where another topic's letters would be must not hide all of them.
        named: those that were asked for by name. Errors: WrongKeyType, of one of these.
        """
        readable = []
        for stream in streams:
            try:
                await self._ends([stream])
            except WrongKeyType as error:
                if stream in named:
                    raise
                self._access.telemetry.emit(
                    "dead_letters.unreadable", stream=stream, group=self._group, error=str(error)
                )
            else:
                readable.append(stream)
        return readable

    async def _check_group(self, streams: list[str]) -> None:
        """Look whether any stream has the group, or has had dead letters of it."""
        try:
            await streams_with(self._store, streams, self._group, self._topic)
        except UnknownGroup:
            for stream in streams:
                dead = keys.dead(stream, self._group)
                if await patiently(partial(self._store.type_of, dead)) != b"none":
                    return
            raise

    async def _fetched(
        self, streams: list[str], wanted: list[LetterId]
    ) -> AsyncGenerator[Found, None]:
        """Yield those of `wanted` that are there, in the order of ids; `streams`: for bare ids."""
        pairs = {(w.entry_id, s) for w in wanted for s in ([w.stream] if w.stream else streams)}
        ordered = sorted(pairs, key=lambda p: (order(p[0]), p[1]), reverse=self._reverse)
        for part in _parts(ordered, LETTERS_PER_LOOK):
            try:
                found = await self._fetch(part)
            except WrongKeyType:
                named = {w.stream for w in wanted if w.stream} if self._topic is None else streams
                readable = await self._readable(sorted({s for _, s in part}), named)
                found = await self._fetch([p for p in part if p[1] in readable])
            for each in found:
                yield each

    async def _fetch(self, pairs: list[tuple[str, str]]) -> list[Found]:
        asked = [(keys.dead(stream, self._group), i) for i, stream in pairs]
        entries = await patiently(partial(self._store.archive.fetch, asked))
        found = zip([stream for _, stream in pairs], entries, strict=True)
        return [(stream, entry) for stream, entry in found if entry is not None]

    # --- deleting them

    async def _purge(self, stream: str, ids: list[bytes]) -> int:
        in_doubt = False

        def tell(error: BaseException) -> None:
            nonlocal in_doubt
            in_doubt = in_doubt or getattr(error, "sent", False)

        there = await patiently(
            lambda: self._store.archive.purge(stream, self._group, ids), told=tell
        )
        count = len(ids) if in_doubt else there
        if count:
            self._access.telemetry.emit(
                "dead_letters.purged", stream=stream, group=self._group, count=count
            )
        return count


def _checked_reasons(reason: str | Iterable[str] | None) -> frozenset[str] | None:
    if reason is None:
        return None
    reasons = frozenset([reason] if isinstance(reason, str) else reason)
    for each in reasons:
        if each not in REASONS:
            raise DeclarationError(f"{each!r} is no reason: there are {', '.join(REASONS)}")
    return reasons


def _parts(all_of_them: list[T], most: int) -> Iterable[list[T]]:
    return (all_of_them[at : at + most] for at in range(0, len(all_of_them), most))
