"""Removing consumers whose worker is gone."""

from dataclasses import dataclass
from functools import partial

from bus.admin.scope import rows_of
from bus.config import HEARD_OF_MS, VERDICTS_PER_CALL
from bus.errors import DeclarationError, InUse
from bus.history.patience import patiently, twice_at_worst
from bus.shortage import tell_lost
from bus.streams import keys
from bus.streams.answers import Survey
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class RemovedConsumer:
    """A consumer of one group that was removed, or would be.

    stream: it may be an inbox. handed_back: entries it had, which any worker may take now.
    lost: entries it had that were deleted by hand.
    """

    name: str
    stream: str
    group: str
    handed_back: int
    lost: int


def is_alive(survey: Survey, name: bytes, idle_ms: int) -> bool:
    """Return whether a consumer is at work: by its lease, or if it keeps none, heard of lately."""
    return name in survey.alive if name in survey.listed else idle_ms < HEARD_OF_MS


async def remove_consumer(
    store: StreamStore,
    topics: TopicTable,
    telemetry: Telemetry,
    name: str,
    group: str,
    topic: str | None,
    *,
    dry_run: bool,
) -> tuple[RemovedConsumer, ...]:
    """Remove a consumer from a group. See `Admin.remove_consumer`."""
    consumer = keys.wire(name)
    if keys.lane_due_ms(consumer) is not None:
        raise DeclarationError(
            f"{name} is a lane: it goes by itself when what waits in it has gone"
        )
    places: list[tuple[str, int]] = []
    for stream in await rows_of(store, topics, group, topic):
        survey = await patiently(partial(survey_of, store, stream, group))
        for (key, _), consumers in survey.consumers.items():
            for found in consumers:
                if found.name == consumer:
                    if is_alive(survey, consumer, found.idle_ms):
                        raise _alive(name, key)
                    places.append((key, found.pending))
    if dry_run:
        return tuple([RemovedConsumer(name, key, group, n, 0) for key, n in places])
    removed = []
    for key, _ in places:
        handed_back, lost = await _hand_back(store, telemetry, key, group, consumer)
        if not await _forgotten(store, key, group, consumer):
            raise _alive(name, key)
        removed.append(RemovedConsumer(name, key, group, handed_back, lost))
        telemetry.emit("consumer.forgotten", stream=key, group=group, consumer=name)
    return tuple(removed)


def _alive(name: str, stream: str) -> InUse:
    return InUse(f"{name} is at work on {stream}: stop that worker first")


async def survey_of(store: StreamStore, stream: str, group: str) -> Survey:
    """Look at the consumers of a group on one stream, and of its inbox there."""
    try:
        return await store.leases.survey(
            stream, [(stream, group), (keys.inbox(stream, group), group)]
        )
    except ReplyError as error:
        raise error.explained(keys.workers(stream)) from None


async def _hand_back(
    store: StreamStore, telemetry: Telemetry, stream: str, group: str, consumer: bytes
) -> tuple[int, int]:
    """Let others take what a consumer had; return how many, and how many had no entry."""
    handed_back = lost = 0
    refused: list[bytes] = []
    ask = partial(
        store.upkeep.pending, stream, group, "-", "+", VERDICTS_PER_CALL, owner=keys.text(consumer)
    )
    while rows := await patiently(ask):
        ids = [row.entry_id for row in rows]
        if ids == refused:  # it has a lease again; else another worker took them meanwhile
            raise _alive(keys.text(consumer), stream)
        answers, in_doubt = await twice_at_worst(
            partial(store.upkeep.release, stream, group, consumer, ids)
        )
        refused = [] if any(answers) else ids
        gone = [i.decode() for i, a in zip(ids, answers, strict=True) if a < 0]
        tell_lost(telemetry, stream, {group: gone} if gone else {})
        handed_back += answers.count(1) + (answers.count(0) if in_doubt else 0)
        lost += len(gone)
    return handed_back, lost


async def _forgotten(store: StreamStore, stream: str, group: str, consumer: bytes) -> bool:
    forget = partial(store.leases.forget_consumer, stream, group, consumer)
    try:
        return await patiently(forget)
    except ReplyError as error:
        raise error.explained(stream) from None
