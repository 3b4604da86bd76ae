"""What a bus on `memory://` stands on."""

from typing import Never

from bus.streams.address import Address
from bus.streams.memory.connection import no_server
from bus.streams.memory.place import place_of
from bus.streams.memory.store import MemoryStore
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry


class Memory:
    """A place in this process: `memory://name` is shared by name, `memory://` is one's own."""

    def __init__(self, address: Address) -> None:
        self.redacted = address.redacted
        self._place = place_of(address.path)

    def store(self, telemetry: Telemetry) -> MemoryStore:  # noqa: ARG002 - no connection is lost
        """Return the verbs over the place."""
        return MemoryStore(self._place)

    async def check(self, store: StreamStore, *, allow_eviction: bool) -> None:
        """Find nothing wrong with it."""

    def client(self) -> Never:
        """Have no client to give. Errors: NotSupported."""
        raise no_server("bus.redis (bus.transaction() reads and writes the state of effects)")
