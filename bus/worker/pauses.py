"""Keeps this process to the pauses that stand in `bus:paused`.

A pause stops what would start, and nothing that runs: neither streams nor inbox of the group are
read, nothing is taken from lanes or from dead workers, and what was fetched and has not started is
handed back. The leases stay: the group is served, and nobody takes over what runs.
"""

from collections.abc import Sequence

from bus.errors import BusError, WrongKeyType
from bus.streams.keys import topic_of
from bus.streams.pauses import Pause, Place
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.consumer import Consumer
from bus.worker.hand import Hand

Seen = tuple[int, dict[Place, Pause]]  # the server's time in ms, and what stands there


class Pauses:
    """The pauses of the groups that one process serves."""

    def __init__(
        self,
        store: StreamStore,
        name: str,
        consumers: Sequence[Consumer],
        telemetry: Telemetry,
    ) -> None:
        self._table = store.pauses
        self._name = name
        self._consumers = consumers
        self._telemetry = telemetry

    async def keep(self) -> None:
        """Look, and do so; tell of errors: what was known holds on."""
        try:
            await self.apply(await self._table.look())
        except BusError as error:
            self._tell(error)

    async def first_look(self) -> Seen:
        """Return what is paused. Whatever somebody put where that should stand stops nobody."""
        try:
            return await self._table.look()
        except WrongKeyType as error:
            self._tell(error)
            return 0, {}

    async def apply(self, seen: Seen) -> None:
        """Pause and resume what has changed."""
        now_ms, found = seen
        changed: dict[Consumer, dict[Place, list[Hand]]] = {}
        for consumer in self._consumers:  # of all of them before anything is waited for
            for hand in consumer.hands.values():
                place = topic_of(hand.stream), hand.group
                pause = found.get(place)
                if hand.paused != (pause is not None and pause.holds(now_ms)):
                    hand.paused = not hand.paused
                    changed.setdefault(consumer, {}).setdefault(place, []).append(hand)
        for consumer, places in changed.items():
            await self._apply(consumer, places, found)

    def _tell(self, error: BusError) -> None:
        self._telemetry.emit(
            "pauses.failed",
            worker=self._name,
            error_type=type(error).__name__,
            error=str(error),
        )

    async def _apply(
        self, consumer: Consumer, changed: dict[Place, list[Hand]], found: dict[Place, Pause]
    ) -> None:
        for (topic, group), hands in changed.items():
            if hands[0].paused:
                self._telemetry.emit(
                    "group.paused",
                    worker=self._name,
                    topic=topic,
                    group=group,
                    why=found[topic, group].why,
                )
            else:
                self._telemetry.emit("group.resumed", worker=self._name, topic=topic, group=group)
        consumer.give_up_paused()
        await consumer.intake.list_anew()
