"""History again: what happened, once more for one handler, one function, or everybody.

A replay reads a range of a topic that is fixed when it begins, and puts what is asked for where it
is to go, batch by batch. With a checkpoint it can be stopped or killed, and goes on where it was:
what the destination's server has, it remembers in the step that puts it there, so that nothing is
twice in an inbox, nor published twice. Only a function may be called again, with the events of the
last half second.
"""

import asyncio
import inspect
import secrets
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from bus.config import (
    BATCH_BYTES,
    CHECKPOINT_S,
    PROGRESS_S,
    REPLAY_OVER_S,
    REPLAY_PATIENCE_S,
    SAMPLE,
)
from bus.delivery import REPLAY
from bus.envelope import Envelope, entry_time, order
from bus.errors import CheckpointError, InvalidEvent, Undecodable
from bus.history.checkpoint import Checkpoint, Counts, Place, Saved
from bus.history.destinations import Destination, OutOfStep, tell_unreadable
from bus.history.event_store import envelope_of, merged, streams_of
from bus.history.patience import patiently
from bus.history.position import span
from bus.history.throttle import Throttle
from bus.history.wanted import Progress, Wanted
from bus.streams.answers import RawEntry
from bus.streams.codec import locate
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry

_MOST_FIELDS = 7_000  # names and values that a script can pass on; only others write such entries
_LOOK_EVERY = 64  # entries between two looks at the clock


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did; see `Progress` for the counts.

    run: its name, in the field `run` of inbox entries. resumed: whether it went on from a
    checkpoint. sample: of a dry run, the first envelopes that it would replay.
    last: the last entry id of the range, "" when there was nothing in it.
    """

    read: int
    matched: int
    replayed: int
    unreadable: int
    gone: int
    gaps: int = 0
    run: str = ""
    resumed: bool = False
    sample: tuple[Envelope, ...] = ()
    last: str = ""


async def replay(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    wanted: Wanted,
    destination: Destination,
) -> Replayed:
    """Replay what is wanted. See `Bus.replay`."""
    throttle = Throttle(wanted.rate)
    bounds = span(wanted.since, wanted.until)
    record = await patiently(lambda: topics.existing(wanted.topic))
    streams = streams_of(record, wanted.topic, wanted.selection.key)
    await patiently(lambda: destination.check(streams, record))
    asked = wanted.said(store.address, destination.name)
    saved = Checkpoint(wanted.checkpoint).load(asked)
    file = Checkpoint(None if wanted.dry_run else wanted.checkpoint)
    resumed = saved is not None
    while saved is None:
        places = await _places(store, streams, *bounds)
        saved = Saved(REPLAY + secrets.token_hex(8), asked, places)
        # The name of the run must be known before anything has it; of two, one begins.
        if not file.begin(saved):
            saved = file.load(asked)
            resumed = saved is not None
    if resumed and not saved.finished:
        await _find_out(saved, destination)
    run = _Run(store, telemetry, wanted, destination, throttle, file, saved)
    if not saved.finished:
        await run.go()
    counts = run.counts
    return Replayed(
        counts.read,
        counts.matched,
        counts.replayed,
        counts.unreadable,
        counts.gone,
        counts.gaps,
        "" if wanted.dry_run else saved.run,
        resumed,
        tuple(run.sample),
        max((place.last for place in saved.places.values()), key=order, default=""),
    )


async def _places(
    store: StreamStore, streams: list[str], first: str, last: str
) -> dict[str, Place]:
    """Fix the range: what is appended from now on is not replayed, and not read for ever."""
    ends = await patiently(lambda: store.archive.ends(streams, first, last))
    places = {}
    for stream, oldest, newest in zip(streams, ends[::2], ends[1::2], strict=True):
        if oldest is not None and newest is not None:
            places[stream] = Place(oldest[0].decode(), newest[0].decode())
    return places


async def _find_out(saved: Saved, destination: Destination) -> None:
    """Correct what the checkpoint says by what the server remembers: it may be older, or newer."""
    memory = await destination.recall(saved.run, list(saved.places))
    if memory is None:
        return
    for stream, place in saved.places.items():
        last, _ = memory.get(stream, (b"", 0))
        if not last and place.done:
            raise CheckpointError(
                f"the server no longer remembers the run {saved.run} in {stream}: it has lost its"
                " data, or 30 days have passed. What it has of the run is not known: look there,"
                " delete the checkpoint if there is one, and start over"
            )
        # An older one: the server was restored to what it was before, with what had been put.
        if last and (order(last) < order(place.done) or order(last) > order(place.read)):
            place.read = last.decode()
        place.done = last.decode()
    saved.counts.replayed = sum(total for _, total in memory.values())


class _Run:
    """One session of a replay."""

    def __init__(
        self,
        store: StreamStore,
        telemetry: Telemetry,
        wanted: Wanted,
        destination: Destination,
        throttle: Throttle,
        file: Checkpoint,
        saved: Saved,
    ) -> None:
        self._store = store
        self._telemetry = telemetry
        self._wanted = wanted
        self._destination = destination
        self._throttle = throttle
        self._file = file
        self._saved = saved
        self._before = saved.counts.replayed
        # What is held is not in the file. A dry run counts what is left.
        self.counts = Counts() if wanted.dry_run else msgspec.structs.replace(saved.counts)
        self._batch: dict[str, list[RawEntry]] = {}
        self._held = self._held_bytes = 0
        self._seen: dict[str, bytes] = {}  # stream -> what was read of it, to be noted when done
        self._last: bytes = b""
        self._waits = False  # for room; told once until something is taken
        self._saved_at = self._told_at = float("-inf")
        self.sample: list[Envelope] = []

    async def go(self) -> None:
        """Read, put, and note how far it came, to the end or to the first error."""
        wanted, saved = self._wanted, self._saved
        started = asyncio.get_running_loop().time()
        if not wanted.dry_run:
            self._telemetry.emit(
                "replay.started", run=saved.run, topic=wanted.topic, to=self._destination.name
            )
        try:
            await self._read_to_the_end()
            saved.finished = not wanted.dry_run
            self._file.save(saved)
        except BaseException as error:
            self._save_after(error)
            raise
        await self._tell()
        if not wanted.dry_run:
            # Somebody else may be at it with the same checkpoint, and not be done yet.
            after_s = 0 if wanted.checkpoint is None else REPLAY_OVER_S
            await self._destination.forget(saved.run, list(saved.places), after_s)
            self._telemetry.emit(
                "replay.finished",
                run=saved.run,
                topic=wanted.topic,
                to=self._destination.name,
                replayed=self.counts.replayed,
                unreadable=self.counts.unreadable,
                duration_s=asyncio.get_running_loop().time() - started,
            )

    async def _read_to_the_end(self) -> None:
        """Read; if the server went back, or somebody else is at it, too, from where that is."""
        while True:
            try:
                return await self._read()
            except OutOfStep:
                self._batch.clear()
                self._seen.clear()
                self._held = self._held_bytes = 0
                await _find_out(self._saved, self._destination)
                self.counts = msgspec.structs.replace(self._saved.counts)
                self._telemetry.emit(
                    "replay.rewound",
                    run=self._saved.run,
                    topic=self._wanted.topic,
                    to=self._destination.name,
                )

    def _save_after(self, error: BaseException) -> None:
        """Note how far it came before an error, which says so if that fails, too."""
        try:
            self._file.save(self._saved)
        except CheckpointError as another:
            error.add_note(str(another))
        if not self._wanted.dry_run:
            self._telemetry.emit(
                "replay.failed",
                run=self._saved.run,
                topic=self._wanted.topic,
                to=self._destination.name,
                replayed=self._saved.counts.replayed,
                error_type=type(error).__name__,
                error=str(error),
            )

    async def _read(self) -> None:
        places = self._saved.places
        bounds = {stream: (place.first, place.last) for stream, place in places.items()}
        after = {stream: place.read.encode() for stream, place in places.items() if place.read}
        unmet = {stream: place.first.encode() for stream, place in places.items() if not place.read}
        most = min(self._throttle.most, self._destination.most)
        if self._left() <= 0:
            return
        past = merged(
            self._store, bounds, on_gap=self._note_gap, after=after, patience_s=REPLAY_PATIENCE_S
        )
        async with aclosing(past) as entries:
            async for stream, entry in entries:
                self.counts.read += 1
                if unmet:
                    self._meet(unmet, stream, entry[0])
                self._seen[stream] = self._last = entry[0]
                if self._takes(stream, entry):
                    self.counts.matched += 1
                    self._hold(stream, entry)
                    full = self._held >= most or self._held_bytes >= BATCH_BYTES // 2
                    if full or self._left() <= 0:
                        await self._flush()
                        # Something held may not have been there to be put, and leave room.
                        if self._left() <= 0:
                            return
                if self.counts.read % _LOOK_EVERY == 0:
                    await self._look_at_the_clock()
        for stream in list(unmet):
            self._meet(unmet, stream, b"")
        await self._flush()

    def _meet(self, unmet: dict[str, bytes], stream: str, entry_id: bytes) -> None:
        """Note a gap if what was the first of a stream has gone before it was read."""
        if unmet.pop(stream, entry_id) != entry_id:
            self._note_gap(stream, b"", entry_id)

    def _note_gap(self, stream: str, after: bytes, first: bytes) -> None:
        self.counts.gaps += 1
        self._telemetry.emit(
            "history.gap", stream=stream, after=after.decode(), first=first.decode()
        )

    def _left(self) -> float:
        """Return how many more may be taken, beside those that are held."""
        limit = self._wanted.limit
        if limit is None:
            return float("inf")
        if self._wanted.dry_run:  # nothing is put: what matched is counted
            return limit - self._before - self.counts.matched
        return limit - self.counts.replayed - self._held

    def _takes(self, stream: str, entry: RawEntry) -> bool:
        """Return whether an entry is asked for; what is no event, or not readable, is told."""
        selection = self._wanted.selection
        if not selection.names(entry):
            return False
        try:
            _check_is_event(entry)
            if not self._destination.wants((locate(entry[1]).type or b"").decode(errors="replace")):
                return False
            if selection.where is None and not self._wanted.dry_run:
                return True
            envelope = envelope_of(stream, entry)
            taken = selection.where is None or bool(selection.where(envelope))
        except (Undecodable, InvalidEvent) as error:
            self.counts.unreadable += 1
            tell_unreadable(self._telemetry, stream, entry[0], error)
            return False
        if taken and self._wanted.dry_run and len(self.sample) < SAMPLE:
            self.sample.append(envelope)
        return taken

    def _hold(self, stream: str, entry: RawEntry) -> None:
        if not self._wanted.dry_run:
            self._batch.setdefault(stream, []).append(entry)
            self._held_bytes += sum(map(len, entry[1]))
        self._held += 1

    async def _flush(self) -> None:
        """Put what is held where it is to go, then note that it is there."""
        held, self._held, self._held_bytes = self._held, 0, 0
        batch, self._batch = self._batch, {}
        for stream, entries in batch.items():
            left: list[RawEntry] = entries
            while left:
                outcome = await self._destination.put(self._saved.run, stream, left)
                self.counts.replayed += outcome.replayed
                self.counts.gone += outcome.gone
                self.counts.unreadable += outcome.unreadable
                if outcome.replayed:
                    self._waits = False
                    place = self._saved.places[stream]
                    place.done = place.done or place.first  # it must be remembered from now on
                if outcome.left:
                    await self._wait_for_room(stream)
                left = list(outcome.left)
            self._saved.places[stream].done = entries[-1][0].decode()
        for stream, entry_id in self._seen.items():
            self._saved.places[stream].read = entry_id.decode()
        self._seen.clear()
        self._saved.counts = msgspec.structs.replace(self.counts)
        if held and not self._wanted.dry_run:
            await self._throttle.passed(held)
        await self._look_at_the_clock()

    async def _wait_for_room(self, stream: str) -> None:
        await self._tell(waiting=True)
        if not self._waits:
            self._waits = True
            self._telemetry.emit(
                "replay.waits", run=self._saved.run, stream=stream, to=self._destination.name
            )
        await self._throttle.no_room()

    async def _look_at_the_clock(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._saved_at >= CHECKPOINT_S:
            self._saved_at = now
            await self._flush()  # what is rare must not wait for a whole batch
            self._file.save(self._saved)
        if now - self._told_at >= PROGRESS_S:
            self._told_at = now
            await self._tell()

    async def _tell(self, *, waiting: bool = False) -> None:
        if self._wanted.progress is None:
            return
        counts = self.counts
        told = self._wanted.progress(
            Progress(
                counts.read,
                counts.matched,
                counts.replayed,
                counts.unreadable,
                counts.gone,
                counts.gaps,
                self._share(),
                entry_time(self._last) if self._last else None,
                waiting,
            )
        )
        if inspect.isawaitable(told):
            await told

    def _share(self) -> float:
        """Return how much of the range is behind it, by time: ids are milliseconds."""
        if not self._last:
            return 1.0 if self._saved.finished else 0.0
        first = min(order(p.first)[0] for p in self._saved.places.values())
        last = max(order(p.last)[0] for p in self._saved.places.values())
        return min(1.0, (order(self._last)[0] - first + 1) / (last - first + 1))


def _check_is_event(entry: RawEntry) -> None:
    """Refuse an entry that is none. Errors: Undecodable, InvalidEvent."""
    fields = entry[1]
    located = locate(fields)
    for name in ("id", "type", "data"):
        if getattr(located, name) is None:
            raise Undecodable(f"the entry has no field `{name}`")
    if len(fields) > _MOST_FIELDS:
        raise InvalidEvent(f"the entry has {len(fields) // 2:,} fields, too many to be copied")
