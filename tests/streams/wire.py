"""What the tests of connections share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from bus.streams.address import parse_url
from bus.streams.connection import Connection
from bus.streams.server import Standalone
from bus.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


CANARY = "s3cret-passw0rd"


@contextlib.asynccontextmanager
async def connected(
    url: str, telemetry: Telemetry | None = None, writes: int = 1
) -> AsyncIterator[Connection]:
    server = Standalone(parse_url(url))
    connection = Connection(server, "test", telemetry or Telemetry(), writes=writes)
    try:
        yield connection
    finally:
        await connection.close()


def with_user(url: str, user: str) -> str:
    """Put `user:password` into a URL."""
    return url.replace("://", f"://{user}@")
