"""What becomes of deliveries with effects: one script applies those of many, each for itself.

    done      effects and ack are in
    refused   another worker has the delivery by now: none of its effects took place
    full      no room for what it publishes: parked, no attempt used, and handled again
    failed    a command was refused half way: it is a dead letter already, by the same script, since
              what was applied before must never be applied again; on_dead is told afterwards
    invalid   it cannot be sent at all: a dead letter like any other

See `streams/scripts/commit.lua`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from bus.committer import Committer
from bus.config import BATCH_BYTES, COMMITS_PER_CALL, EFFECTS_PER_CALL, NOT_PUBLISHED_PARK_S
from bus.delivery import DeadLetter, Delivery, Failure, Park
from bus.errors import BusError
from bus.streams.answers import Committed, Fate
from bus.telemetry import Telemetry
from bus.worker.hand import Hand, names_of

_DONE = Committed(Fate.DONE)
Doomed = Callable[[Delivery[Any], DeadLetter], None]


class Commits:
    """Applies the effects of one consumer's deliveries.

    buried: told of each that is a dead letter now. doomed: of each that has to become one.
    """

    def __init__(
        self,
        committer: Committer,
        consumer: str,
        telemetry: Telemetry,
        buried: Doomed,
        doomed: Doomed,
    ) -> None:
        self._committer = committer
        self._consumer = consumer
        self._telemetry = telemetry
        self._buried = buried
        self._doomed = doomed

    async def apply(
        self,
        hand: Hand,
        deliveries: Sequence[Delivery[Any]],
        came_through: Callable[[Hand, bytes], bool],
    ) -> Collection[bytes]:
        """Commit deliveries of one stream; return the ids that stay in hand all the same.

        came_through: whether a refused one was in truth applied by an attempt without a reply.
        Errors: those of `Committer.commit`.
        """
        fates = await self._committer.commit(hand.stream, hand.group, self._consumer, deliveries)
        doubtful = [d for d in deliveries if came_through(hand, d.entry_id)]
        failed = await self._failed_unseen(hand, doubtful) if doubtful else {}
        acked = refused = 0
        staying: set[bytes] = set()
        for delivery, answer in zip(deliveries, fates, strict=True):
            fate = answer
            if answer.fate is Fate.REFUSED and delivery in doubtful:
                fate = failed.get(delivery, _DONE)
            if fate.fate is Fate.DONE:
                acked += 1
            elif fate.fate is Fate.REFUSED:
                refused += 1
            elif fate.fate is Fate.FULL:
                staying.add(delivery.entry_id)
                reason = f"there is no room in {fate.stream} for what it publishes"
                hand.parks.append((delivery, Park(NOT_PUBLISHED_PARK_S, reason=reason)))
            elif fate.fate is Fate.INVALID:
                staying.add(delivery.entry_id)
                self._doomed(delivery, _dead_letter(fate))
            else:
                self._tell_failed(delivery, _dead_letter(fate))
        emit, stream, group = self._telemetry.emit, hand.stream, hand.group
        if acked:
            emit("delivery.acked", stream=stream, group=group, count=acked)
        if refused:
            emit("delivery.refused", stream=stream, group=group, count=refused, verb="commit")
        return staying

    async def _failed_unseen(
        self, hand: Hand, doubtful: Sequence[Delivery[Any]]
    ) -> Mapping[Delivery[Any], Committed]:
        """Return those that an attempt without a reply has made dead letters, if one can ask."""
        try:
            return await self._committer.lost_failures(hand.stream, hand.group, doubtful)
        except BusError:
            return {}

    def _tell_failed(self, delivery: Delivery[Any], verdict: DeadLetter) -> None:
        self._telemetry.emit(
            "delivery.dead_lettered",
            **names_of(delivery),
            reason=verdict.reason,
            error_type=verdict.error.type,
            error=verdict.error.text,
            where=verdict.error.where,
        )
        self._buried(delivery, verdict)


def _dead_letter(fate: Committed) -> DeadLetter:
    stays = f"; applied before, and not undone: {', '.join(fate.applied)}" if fate.applied else ""
    return DeadLetter("effects-failed", Failure("EffectsFailed", fate.error + stays))


def together(deliveries: Sequence[Delivery[Any]]) -> Iterator[list[Delivery[Any]]]:
    """Cut deliveries into those that share a script call, so that none keeps the server long."""
    part: list[Delivery[Any]] = []
    commands = size = 0
    for delivery in deliveries:
        effects = delivery.effects
        if part and (
            len(part) >= COMMITS_PER_CALL
            or commands + len(effects) > EFFECTS_PER_CALL
            or size + effects.bytes > BATCH_BYTES
        ):
            yield part
            part, commands, size = [], 0, 0
        part.append(delivery)
        commands += len(effects)
        size += effects.bytes
    if part:
        yield part
