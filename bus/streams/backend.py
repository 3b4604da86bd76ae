"""What a bus stands on: a server, or a place in this process. Nothing above knows which."""

from typing import Protocol

import redis.asyncio

from bus.streams.address import Address
from bus.streams.server import Standalone, check_server
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry


class Backend(Protocol):
    """One implementation of the verbs, at one address."""

    @property
    def redacted(self) -> str:
        """The address, without a password."""

    def store(self, telemetry: Telemetry) -> StreamStore:
        """Return the verbs. Touches no network."""

    async def check(self, store: StreamStore, *, allow_eviction: bool) -> None:
        """Refuse what cannot keep our promises. Errors: the ServerError family."""

    def client(self) -> "redis.asyncio.Redis":
        """Return a plain client for the application's own state. Errors: NotSupported."""


class OneServer:
    """A Redis or Valkey server."""

    def __init__(self, address: Address) -> None:
        self._server = Standalone(address)

    @property
    def redacted(self) -> str:
        """The address, without a password."""
        return self._server.redacted

    def store(self, telemetry: Telemetry) -> StreamStore:
        """Return the verbs over connections of their own."""
        return StreamStore(self._server, telemetry)

    async def check(self, store: StreamStore, *, allow_eviction: bool) -> None:
        """Connect, and see whether it can be used; see `check_server`."""
        await check_server(store.commands, self._server, allow_eviction=allow_eviction)

    def client(self) -> "redis.asyncio.Redis":
        """Return a plain client on a pool of its own."""
        return self._server.client()


def backend_at(address: Address) -> Backend:
    """Return what an address leads to."""
    if address.scheme == "memory":
        from bus.streams.memory.backend import Memory  # noqa: PLC0415 - loaded where it is used

        return Memory(address)
    return OneServer(address)
