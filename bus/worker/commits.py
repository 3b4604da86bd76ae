"""What becomes of deliveries with effects: one script applies those of many, each for itself.

    done      effects and ack are in
    refused   another worker has the delivery by now: none of its effects took place
    full      no room for what it publishes: parked, no attempt used, and handled again
    failed    a command was refused half way: it is a dead letter already, by the same script, since
              what was applied before must never be applied again; on_dead is told afterwards
    undone    refused before anything was done: a failed attempt, as if the handler had raised

See `streams/scripts/commit.lua`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from bus.committer import Committer
from bus.config import (
    BATCH_BYTES,
    COMMITS_PER_CALL,
    EFFECTS_PER_CALL,
    EFFECTS_VALUES,
    NOT_PUBLISHED_PARK_S,
)
from bus.delivery import DeadLetter, Delivery, Failure, Park
from bus.errors import BusError
from bus.streams.answers import Committed, Fate
from bus.streams.replies import ReplyError
from bus.telemetry import Telemetry
from bus.worker.hand import Hand, names_of

_DONE = Committed(Fate.DONE)
_TEXT_CHARS = 2_000  # of an error; the dead letter has more


class Commits:
    """Applies the effects of one consumer's deliveries.

    buried: told of each that is a dead letter now. undone: of each that has failed without effect.
    """

    def __init__(
        self,
        committer: Committer,
        consumer: str,
        telemetry: Telemetry,
        buried: Callable[[Delivery[Any], DeadLetter], None],
        undone: Callable[[Delivery[Any], Failure], None],
    ) -> None:
        self._committer = committer
        self._consumer = consumer
        self._telemetry = telemetry
        self._buried = buried
        self._undone = undone

    async def apply(
        self,
        hand: Hand,
        deliveries: Sequence[Delivery[Any]],
        came_through: Callable[[Hand, bytes], bool] | None,
    ) -> Collection[bytes]:
        """Commit deliveries of one stream; return the ids that stay in hand all the same.

        came_through: whether a refused one was in truth applied by an attempt without a reply; None
        if there was no such attempt of any.
        Errors: those of `Committer.commit`.
        """
        fates = await self._commit(hand, deliveries)
        if came_through is None:
            doubtful: list[Delivery[Any]] = []
        else:
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
            elif fate.fate is Fate.UNDONE:
                staying.add(delivery.entry_id)
                self._undone(delivery, _failure(fate))
            else:
                self._tell_failed(delivery, DeadLetter("effects-failed", _failure(fate)))
        emit, stream, group = self._telemetry.emit, hand.stream, hand.group
        if acked:
            emit("delivery.acked", stream=stream, group=group, count=acked)
        if refused:
            emit("delivery.refused", stream=stream, group=group, count=refused, verb="commit")
        return staying

    async def _commit(self, hand: Hand, deliveries: Sequence[Delivery[Any]]) -> list[Committed]:
        commit, stream, group = self._committer.commit, hand.stream, hand.group
        try:
            return await commit(stream, group, self._consumer, deliveries)
        except ReplyError as error:
            if error.code != "NOPERM":
                raise
        # The server looks at the keys of all before it runs anything: find out whose it was.
        fates: list[Committed] = []
        for delivery in deliveries:
            try:
                fates += await commit(stream, group, self._consumer, [delivery])
            except ReplyError as error:
                if error.code != "NOPERM":
                    raise
                named = ", ".join(delivery.effects.keys)[:_TEXT_CHARS]
                text = f"the server's user may not use one of these keys: {named}"
                fates.append(Committed(Fate.UNDONE, error=text))
        return fates

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


def _failure(fate: Committed) -> Failure:
    stays = "; nothing was applied"
    if fate.applied:
        stays = f"; applied before, and not undone: {', '.join(fate.applied)}"
    text = (fate.error[:_TEXT_CHARS] + stays)[:_TEXT_CHARS]
    return Failure("EffectsFailed", text, where="when its effects were applied")


def together(deliveries: Sequence[Delivery[Any]]) -> Iterator[list[Delivery[Any]]]:
    """Cut deliveries into those that share a script call, so that none keeps the server long."""
    part: list[Delivery[Any]] = []
    commands = values = size = 0
    for delivery in deliveries:
        effects = delivery.effects
        if part and (
            len(part) >= COMMITS_PER_CALL
            or commands + len(effects) > EFFECTS_PER_CALL
            or values + effects.values > EFFECTS_VALUES
            or size + effects.bytes > BATCH_BYTES
        ):
            yield part
            part, commands, values, size = [], 0, 0, 0
        part.append(delivery)
        commands += len(effects)
        values += effects.values
        size += effects.bytes
    if part:
        yield part
