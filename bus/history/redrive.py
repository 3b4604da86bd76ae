"""Dead letters go back to the one handler that failed: in batches, paced, as there is room.

Every call is one script, which the server remembers until the next one of the run: a repeat, after
a lost answer, is answered as the first was. What was not reached is still a dead letter, so a
redrive that was killed is simply run again; of two at once, one gets a letter and the other counts
it as gone.
"""

import asyncio
import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from bus.config import (
    BATCH_BYTES,
    HEARD_OF_MS,
    PROGRESS_S,
    REDRIVE_PATIENCE_S,
    REDRIVEN_PER_CALL,
    REDRIVEN_VALUES,
    SAMPLE,
    checked_number,
)
from bus.delivery import REDRIVE
from bus.errors import DeclarationError, ServerRefused, UnknownGroup
from bus.history.letter import Letter
from bus.history.mend import Edit, checked_edit, mended
from bus.history.patience import patiently
from bus.history.throttle import Throttle
from bus.streams import keys
from bus.streams.answers import Returned
from bus.streams.codec import Fields
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Redriven:
    """What a redrive did, or has done so far. Letters.

    matched: asked for. redriven: those of them that are in the inbox. gone: redriven or purged by
    somebody else before it came to them. left_out: for which `edit` gave None.
    stuck: ids of those with more fields than a script can pass on; they stay.
    run: its name, in the field `run` of inbox entries. waiting: whether an inbox is full just now.
    unserved: whether there is a stream of which nobody serves the group: its letters will wait.
    sample: of a dry run, the first letters that it would redrive.
    """

    matched: int
    redriven: int
    gone: int
    left_out: int
    stuck: tuple[str, ...]
    run: str = ""
    waiting: bool = False
    unserved: bool = False
    sample: tuple[Letter, ...] = ()


OnRedrive = Callable[[Redriven], Awaitable[None] | None]


class _Ready(NamedTuple):
    """A letter as it is to be sent. instead: its fields, if not those that the server has."""

    letter: Letter
    instead: Fields

    @property
    def values(self) -> int:
        """How many names and values are to go."""
        return len(self.instead or self.letter.fields)

    @property
    def bytes(self) -> int:
        """What the server moves for it, and what of it is read there besides."""
        return sum(map(len, self.instead or self.letter.fields)) + len(self.letter.traceback)


class Redrive:
    """One redrive. Errors: DeclarationError for what it is to do, before anything is read."""

    def __init__(
        self,
        store: StreamStore,
        topics: TopicTable,
        telemetry: Telemetry,
        address: str,
        max_event_bytes: int,
        *,
        group: str,
        edit: Edit | None,
        rate: float | None,
        limit: int | None,
        dry_run: bool,
        progress: OnRedrive | None,
    ) -> None:
        self._store = store
        self._topics = topics
        self._telemetry = telemetry
        self._address = address
        self._max_event_bytes = max_event_bytes
        self._group = group
        self._edit = checked_edit(edit)
        self._throttle = Throttle(rate)
        if limit is not None:
            checked_number(limit, "limit", 1, 2**53, whole=True)
        self._limit = limit
        self._dry_run = dry_run
        if progress is not None and not callable(progress):
            raise DeclarationError(f"progress is a function of a Redriven, not {progress!r}")
        self._progress = progress
        self._run = REDRIVE + secrets.token_hex(8)
        self._calls = 0
        self._partitions: dict[str, int] = {}
        self._checked: set[str] = set()  # streams that have the group
        self._most = min(REDRIVEN_PER_CALL, self._throttle.most)
        self._batch: dict[str, list[_Ready]] = {}
        self._held = self._held_bytes = 0
        self._going = 0  # letters in the batch and those that went
        self._unpaced = 0  # moved, and not waited for yet
        self._waits: set[str] = set()  # streams of which it was told that there is no room
        self._unserved = False
        self._told_at = float("-inf")
        self._matched = self._redriven = self._gone = self._left_out = 0
        self._stuck: list[str] = []
        self._sample: list[Letter] = []

    async def run(self, letters: AsyncIterator[Letter]) -> Redriven:
        """Redrive `letters`, to their end or to the first error."""
        try:
            await self._read(letters)
            await self._tell()
        except Exception as error:
            if self._redriven:
                error.add_note(
                    f"{self._redriven:,} dead letters were redriven before; run it again"
                )
            raise
        return self._so_far()

    async def _read(self, letters: AsyncIterator[Letter]) -> None:
        async for letter in letters:
            self._matched += 1
            ready = await self._made_ready(letter)
            if ready is not None:
                await self._hold(ready)
                if self._going == self._limit:
                    await self._flush()
                    if self._going == self._limit:
                        break
            await self._tell(seldom=True)
        await self._flush()

    async def _made_ready(self, letter: Letter) -> _Ready | None:
        """Return a letter as it is to go, None if it is not to."""
        instead: Fields = list(letter.fields) if letter.packed else []
        if self._edit is not None:
            partitions = await self._partitions_of(keys.topic_of(letter.stream))
            edited = mended(letter, self._edit, partitions, self._max_event_bytes)
            if edited is None:
                self._left_out += 1
                return None
            instead = edited
        ready = _Ready(letter, instead)
        if ready.values > REDRIVEN_VALUES:
            self._stuck.append(letter.id)
            return None
        if letter.stream not in self._checked:
            await self._check_group(letter.stream)
            self._checked.add(letter.stream)
        return ready

    async def _hold(self, ready: _Ready) -> None:
        """Put a letter into the batch; what has no place in it goes before, or a full one now."""
        size = ready.bytes
        if self._held and self._held_bytes + size > BATCH_BYTES:
            await self._flush()
        self._going += 1
        if self._dry_run:
            self._sample += [ready.letter][: SAMPLE - len(self._sample)]
            return
        self._batch.setdefault(ready.letter.stream, []).append(ready)
        self._held += 1
        self._held_bytes += size
        if self._held >= self._most:
            await self._flush()

    async def _check_group(self, stream: str) -> None:
        """See to it that the letters of a stream go to somebody, or tell. XINFO GROUPS.

        Errors: UnknownGroup.
        """
        if self._group not in await patiently(partial(self._store.groups_of, stream)):
            raise UnknownGroup(
                f"{stream} does not have the group {self._group}, and nobody would take what is"
                " put into its inbox: start a worker that serves the handler, which makes it"
            )
        if not await patiently(partial(self._is_served, stream)) and not self._unserved:
            self._unserved = True
            if not self._dry_run:
                self._telemetry.emit(
                    "redrive.unserved", run=self._run, stream=stream, group=self._group
                )

    async def _is_served(self, stream: str) -> bool:
        """Return whether a worker that lives says so, or one of another language reads.

        As the janitor judges it. SMEMBERS and GET each; TIME, XINFO CONSUMERS, EXISTS each.
        """
        leases, inbox = self._store.leases, keys.inbox(stream, self._group)
        try:
            if self._group in await leases.served_groups(stream):
                return True
            survey = await leases.survey(stream, [(p, self._group) for p in (stream, inbox)])
        except ReplyError as error:
            raise error.explained(keys.workers(stream)) from None
        return any(
            idle_ms < HEARD_OF_MS and name not in survey.listed and keys.lane_due_ms(name) is None
            for consumers in survey.consumers.values()
            for name, _, idle_ms in consumers
        )

    async def _partitions_of(self, topic: str) -> int:
        if topic not in self._partitions:
            record = await patiently(partial(self._topics.recorded, topic))
            self._partitions[topic] = record.partitions
        return self._partitions[topic]

    async def _flush(self) -> None:
        batch, self._batch = self._batch, {}
        self._held = self._held_bytes = 0
        for stream, ready in batch.items():
            left = await self._send(stream, ready)
            while left:
                await self._wait_for_room(stream, len(left))
                left = await self._send(stream, left)
            self._waits.discard(stream)
        await self._tell(seldom=True)

    async def _send(self, stream: str, ready: list[_Ready]) -> list[_Ready]:
        """Make one call; return what found no room."""
        unpaced, self._unpaced = self._unpaced, 0
        if unpaced:
            await self._throttle.passed(unpaced)
        self._calls += 1
        answers = await self._ask(stream, ready)
        moved = answers.count(Returned.YES)
        self._redriven += moved
        self._unpaced = moved
        gone = answers.count(Returned.GONE)
        self._gone += gone
        told = [*zip(ready, answers, strict=True)]
        unfit = [r.letter.id for r, a in told if a is Returned.UNFIT]
        self._stuck += unfit
        self._going -= gone + len(unfit)
        if moved:
            self._telemetry.emit(
                "dead_letters.redriven",
                run=self._run,
                stream=stream,
                group=self._group,
                count=moved,
            )
        return [r for r, a in told if a is Returned.FULL]

    async def _ask(self, stream: str, ready: list[_Ready]) -> list[Returned]:
        topic, number = keys.topic_of(stream), self._calls
        letters = [
            (
                r.letter.entry_id.encode(),
                r.letter.original_entry_id,
                len(r.letter.fields),
                r.instead,
            )
            for r in ready
        ]

        async def ask() -> list[Returned]:
            record = await self._topics.recorded(topic)  # its marks may be raised while we wait
            return await self._store.archive.redrive(
                stream, self._group, self._run, number, record.inbox_most, letters
            )

        def tell(error: BaseException) -> None:
            self._telemetry.emit(
                "redrive.retried",
                run=self._run,
                stream=stream,
                group=self._group,
                count=len(ready),
                error_type=type(error).__name__,
                error=str(error),
            )

        try:
            return await patiently(ask, REDRIVE_PATIENCE_S, tell)
        except ServerRefused as error:
            if isinstance(error.__cause__, ReplyError):
                raise error.__cause__.refusal(self._address) from None
            raise

    async def _wait_for_room(self, stream: str, count: int) -> None:
        if stream not in self._waits:
            self._waits.add(stream)
            self._telemetry.emit(
                "redrive.waits", run=self._run, stream=stream, group=self._group, count=count
            )
        await self._tell(seldom=True)
        await self._throttle.no_room()

    async def _tell(self, *, seldom: bool = False) -> None:
        """Tell how far it is; `seldom`: only now and then."""
        now = asyncio.get_running_loop().time()
        if self._progress is None or (seldom and now - self._told_at < PROGRESS_S):
            return
        self._told_at = now
        told = self._progress(self._so_far())
        if inspect.isawaitable(told):
            await told

    def _so_far(self) -> Redriven:
        return Redriven(
            self._matched,
            self._redriven,
            self._gone,
            self._left_out,
            tuple(self._stuck),
            "" if self._dry_run else self._run,
            bool(self._waits),
            self._unserved,
            tuple(self._sample),
        )
