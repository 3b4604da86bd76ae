"""Slow chores.

Dead workers are forgotten, mended streams read again, what is too old is trimmed, and groups that
nobody serves are named.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from bus.config import HEARD_OF_MS, UNSERVED_SHARE
from bus.errors import AuthenticationFailed, BusClosed, BusError, ServerUnreachable
from bus.shortage import tell_lost
from bus.streams import keys
from bus.streams.answers import Survey
from bus.streams.connection import ConnectionLost
from bus.streams.replies import TRANSIENT, ReplyError
from bus.streams.stream import StreamStore
from bus.streams.topics import Record
from bus.telemetry import Telemetry
from bus.worker.consumer import Consumer
from bus.worker.pressure import TURN_MS, share_used

_RETAINED_PER_CALL = 4_000  # a call that trims so many may have left more


class _Share(Protocol):
    @property
    def group(self) -> str: ...
    @property
    def share(self) -> float: ...


class _Stream(Protocol):
    @property
    def stream(self) -> str: ...
    @property
    def groups(self) -> Sequence[_Share]: ...


class _Backlog(Protocol):
    @property
    def streams(self) -> Sequence[_Stream]: ...


class JanitorsBus(Protocol):
    """What the janitor needs of a bus."""

    store: StreamStore
    telemetry: Telemetry

    async def backlog(self, topic: str) -> _Backlog:
        """Say which group pins how much of the room of each stream."""


class Janitor:
    """The chores of one process.

    records: partition -> what is recorded of its topic; the supervisor keeps it up to date.
    """

    def __init__(
        self,
        bus: JanitorsBus,
        name: str,
        consumers: Sequence[Consumer],
        records: Mapping[str, Record],
    ) -> None:
        self._bus = bus
        self._store = bus.store
        self._name = name.encode()
        self._consumers = consumers
        self._records = records
        self._telemetry = bus.telemetry
        self._alerted: set[tuple[str, str]] = set()  # unserved groups that pin too much

    async def tidy(self) -> None:
        """Do all chores once. Errors are told, and the next chore is done all the same."""
        for chore in (
            self._find_mended,
            self._forget_dead_workers,
            self._trim_what_is_too_old,
            self._alert_unserved,
        ):
            try:
                await chore()
            except BusError as error:
                self._tell(error)

    def _tell(self, error: BusError) -> None:
        self._telemetry.emit(
            "janitor.failed",
            worker=self._name.decode(),
            error_type=type(error).__name__,
            error=str(error),
        )

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Tell of what is wrong with one stream or topic; the others get their due all the same.

        Errors: those of the server as a whole, which the others would meet as well.
        """
        try:
            yield
        except BusError as error:
            if _is_of_the_server(error):
                raise
            self._tell(error)

    async def _find_mended(self) -> None:
        for consumer in self._consumers:
            if consumer.intake.broken:
                await consumer.intake.find_broken()

    # --- consumers

    async def _forget_dead_workers(self) -> None:
        for stream in list(self._records):
            with self._going_on():
                await self._forget_dead_workers_of(stream)

    async def _forget_dead_workers_of(self, stream: str) -> None:
        """Remove consumers of workers whose lease is gone, once nothing is pending for them.

        Without this every restart would leave a consumer behind for ever. One that another
        language made keeps no lease and is left alone.
        """
        groups = list(await self._store.groups_of(stream))
        places = [(stream, g) for g in groups] + [(keys.inbox(stream, g), g) for g in groups]
        survey = await self._store.leases.survey(stream, places)
        for name in survey.listed - survey.alive:
            left = False
            for (key, group), consumers in survey.consumers.items():
                for consumer in consumers:
                    if consumer.name != name or keys.lane_due_ms(name) is not None:
                        continue
                    if consumer.pending:
                        left = True
                    elif await self._store.leases.forget_consumer(key, group, name):
                        self._telemetry.emit(
                            "consumer.forgotten",
                            stream=shown(key),
                            group=shown(group),
                            consumer=name.decode(errors="replace"),
                        )
            if not left and name != self._name:
                await self._store.leases.unlist_worker(stream, name)

    # --- retention

    async def _trim_what_is_too_old(self) -> None:
        """Trim by age, one process per stream; what a group needs stays, however old."""
        aged = [s for s, r in self._records.items() if r.retention_s is not None]
        if not aged:
            return
        ours = await self._store.leases.try_chore(aged, "retention", self._name.decode(), TURN_MS)
        for stream in ours:
            with self._going_on():
                await self._trim_by_age(stream, self._records[stream].retention_s or 0)

    async def _trim_by_age(self, stream: str, retention_s: float) -> None:
        gone = _RETAINED_PER_CALL
        while gone >= _RETAINED_PER_CALL:
            gone, lost = await self._store.retain(stream, int(retention_s * 1000))
            tell_lost(self._telemetry, stream, lost)

    # --- groups that nobody serves

    async def name_unserved(self) -> None:
        """Tell of every group of our streams that nobody serves: it holds entries back."""
        for stream, group, share in await self._unserved(list(self._records)):
            self._telemetry.emit("group.unserved", stream=stream, group=group, share=share)

    async def _alert_unserved(self) -> None:
        """Tell of those that pin half of the room or more; once, until they pin less again."""
        records = dict(self._records)  # a partition may be added meanwhile
        lengths = zip(records, await self._store.lengths(list(records)), strict=True)
        high = [s for s, n in lengths if share_used(records[s], n) >= UNSERVED_SHARE]
        pinning = set()
        for stream, group, share in await self._unserved(high):
            if share >= UNSERVED_SHARE:
                pinning.add((stream, group))
                if (stream, group) not in self._alerted:
                    self._telemetry.emit("group.pinning", stream=stream, group=group, share=share)
        self._alerted = pinning

    async def _unserved(self, streams: Sequence[str]) -> list[tuple[str, str, float]]:
        """Return (stream, group, share of the room it pins) of groups that nobody serves."""
        unserved: dict[str, set[str]] = {}
        for stream in sorted(streams):
            with self._going_on():
                if left := await self._left_alone(stream):
                    unserved[stream] = {shown(g) for g in left}
        found = []
        for topic in sorted({keys.topic_of(s) for s in unserved}):
            with self._going_on():
                backlog = await self._bus.backlog(topic)
                found += [
                    (s.stream, g.group, round(g.share, 3))
                    for s in backlog.streams
                    for g in s.groups
                    if g.group in unserved.get(s.stream, ())
                ]
        return found

    async def _left_alone(self, stream: str) -> set[str]:
        """Return the groups of a stream that neither a live worker nor anybody else reads."""
        served = await self._store.leases.served_groups(stream)
        left = set(await self._store.groups_of(stream)) - served
        if left:  # one of another language need not keep a lease
            survey = await self._store.leases.survey(stream, [(stream, g) for g in left])
            left -= _read_by_others(survey)
        return left


def _read_by_others(survey: Survey) -> set[str]:
    """Return the groups with a consumer that keeps no lease and was heard of lately."""
    return {
        group
        for (_, group), consumers in survey.consumers.items()
        for name, _, idle_ms in consumers
        if idle_ms < HEARD_OF_MS and name not in survey.listed and keys.lane_due_ms(name) is None
    }


def _is_of_the_server(error: BusError) -> bool:
    if isinstance(error, ReplyError):
        return error.code in TRANSIENT
    return isinstance(error, ConnectionLost | ServerUnreachable | AuthenticationFailed | BusClosed)


def shown(name: str) -> str:
    """Return a name that others gave, fit to be logged."""
    return name.encode("utf-8", "surrogateescape").decode(errors="replace")
