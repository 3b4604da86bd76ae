"""The verbs of looking back, on a connection of their own.

Bodies hold up neither verdicts nor publishes there. Errors of all of them as of `stream.py`.
"""

from collections.abc import Sequence

from bus.streams.answers import RawEntry
from bus.streams.connection import Arg, Connection, Server
from bus.streams.replies import Reply, ReplyError
from bus.telemetry import Telemetry


class Archive:
    """What streams, inboxes and dead letters hold, and what is done with it afterwards."""

    def __init__(self, server: Server, telemetry: Telemetry) -> None:
        self._connection = Connection(server, "history", telemetry)

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def range(
        self, stream: str, first: str, last: str, count: int, *, reverse: bool = False
    ) -> list[RawEntry]:
        """Return up to `count` entries from `first` to `last`, both ids included.

        XRANGE, oldest first; reverse: XREVRANGE, newest first. `(` before an id leaves it out.
        """
        command = ("XREVRANGE", stream, last, first) if reverse else ("XRANGE", stream, first, last)
        try:
            rows = await self._connection.call(*command, "COUNT", count)
        except ReplyError as error:
            raise error.explained(stream) from None
        return [(r[0], r[1]) for r in rows]

    async def look(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Send commands that only read, in one write; errors are among the replies."""
        return await self._connection.pipeline(commands)
