"""Says that this worker lives, and renews what it holds.

Beaten from the event loop, so that a process whose loop hangs loses its lease.
"""

import asyncio
from collections.abc import Sequence

from bus.errors import BusError
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from bus.worker.consumer import Consumer

_AGAIN_S = 0.5


class Lease:
    """The lease keys of one process, one per stream, and the renewal of its deliveries.

    lease_s: after this long without a beat others take over what this worker holds.
    """

    def __init__(
        self,
        store: StreamStore,
        name: str,
        consumers: Sequence[Consumer],
        telemetry: Telemetry,
        *,
        lease_s: float,
    ) -> None:
        self._store = store
        self._name = name
        self._consumers = consumers
        self._telemetry = telemetry
        self._lease_ms = int(lease_s * 1000)
        self._renewed_at: dict[str, float] = {}
        self._gap = False  # whether the last beat failed
        self._kept_since = float("-inf")  # loop time since which none has failed
        shortest_s = min([c.handler.visibility_s for c in consumers], default=lease_s)
        # A third of whichever ends first: two beats may be lost.
        self.interval_s = min(lease_s, shortest_s) / 3

    @property
    def streams(self) -> list[str]:
        """The partitions this process serves; their inboxes share their leases."""
        return sorted({h.home for c in self._consumers for h in c.hands.values()})

    async def run(self) -> None:
        """Beat for ever; after a beat that failed, soon again, before others sweep."""
        while True:
            await asyncio.sleep(_AGAIN_S if self._gap else self.interval_s)
            await self.beat()

    async def beat(self) -> None:
        """Set the leases, and renew the deliveries whose time has come; each is tried alone."""
        loop = asyncio.get_running_loop()
        try:
            groups = [c.group for c in self._consumers]
            await self._store.leases.keep(self.streams, self._name, groups, self._lease_ms)
            if self._gap:
                self._gap, self._kept_since = False, loop.time()
        except BusError as error:
            self._gap = True
            self._tell(error)
        for consumer in self._consumers:
            due = self._renewed_at.get(consumer.group, 0.0) + consumer.handler.visibility_s / 3
            if loop.time() + self.interval_s / 2 < due:
                continue
            try:
                await consumer.holding.renew()
            except BusError as error:
                self._tell(error)
                if not isinstance(error, ReplyError):
                    break  # the server is away for the others as well
            else:
                self._renewed_at[consumer.group] = loop.time()

    def others_can_be_judged(self) -> bool:
        """Whether a worker without a lease is dead.

        After an outage that outlived the leases all of them are missing at first, ours was too:
        the others get as long as a lease lasts to set theirs again.
        """
        now = asyncio.get_running_loop().time()
        return not self._gap and now - self._kept_since >= self._lease_ms / 1000

    def _tell(self, error: BusError) -> None:
        self._telemetry.emit(
            "lease.failed", worker=self._name, error_type=type(error).__name__, error=str(error)
        )

    async def end(self) -> None:
        """Give the leases up, so that nobody has to wait for them to run out."""
        await self._store.leases.drop(self.streams, self._name)
