"""Slow chores: dead workers are forgotten, mended streams read again, unserved groups named."""

from collections.abc import Sequence

from bus.errors import BusError
from bus.streams.keys import lane_due_ms
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.consumer import Consumer


class Janitor:
    """The chores of one process."""

    def __init__(
        self,
        store: StreamStore,
        name: str,
        consumers: Sequence[Consumer],
        telemetry: Telemetry,
    ) -> None:
        self._store = store
        self._name = name.encode()
        self._consumers = consumers
        self._telemetry = telemetry

    async def tidy(self) -> None:
        """Do all chores once. Errors are told and left for the next time."""
        try:
            for consumer in self._consumers:
                if consumer.intake.broken:
                    await consumer.intake.find_broken()
            for stream in {s for c in self._consumers for s in c.hands}:
                await self._forget_dead_workers(stream)
        except BusError as error:
            self._telemetry.emit(
                "janitor.failed",
                worker=self._name.decode(),
                error_type=type(error).__name__,
                error=str(error),
            )

    async def _forget_dead_workers(self, stream: str) -> None:
        """Remove consumers of workers whose lease is gone, once nothing is pending for them.

        Without this every restart would leave a consumer behind for ever. One that another
        language made keeps no lease and is left alone.
        """
        groups = list(await self._store.groups_of(stream))
        survey = await self._store.survey(stream, groups)
        for name in survey.listed - survey.alive:
            left = False
            for group, consumers in survey.groups.items():
                for consumer in consumers:
                    if consumer.name != name or lane_due_ms(name) is not None:
                        continue
                    if consumer.pending:
                        left = True
                    elif await self._store.forget_consumer(stream, group, name):
                        self._telemetry.emit(
                            "consumer.forgotten",
                            stream=stream,
                            group=shown(group),
                            consumer=name.decode(errors="replace"),
                        )
            if not left and name != self._name:
                await self._store.unlist_worker(stream, name)

    async def name_unserved(self) -> None:
        """Tell of every group of our streams that no live worker serves: it holds entries back."""
        for stream in sorted({s for c in self._consumers for s in c.hands}):
            served = await self._store.served_groups(stream)
            for group in sorted(set(await self._store.groups_of(stream)) - served):
                self._telemetry.emit("group.unserved", stream=stream, group=shown(group))


def shown(name: str) -> str:
    """Return a name that others gave, fit to be logged."""
    return name.encode("utf-8", "surrogateescape").decode(errors="replace")
