"""One group's reading connection."""

from collections.abc import Sequence
from typing import Protocol

from bus.config import REPLY_TIMEOUT_S
from bus.streams.answers import RawEntry
from bus.streams.connection import Arg, Connection, pack
from bus.streams.replies import ReplyError


class Reads(Protocol):
    """What a read loop needs of a reader, whether it has a connection of its own or shares one."""

    async def read(
        self, group: str, consumer: str, streams: Sequence[str], count: int, block_ms: int
    ) -> list[tuple[str, list[RawEntry]]]:
        """Return new entries, at most `count` per stream, waiting up to `block_ms`."""

    async def unblock(self) -> None:
        """End a read that waits at once; it takes nothing."""

    async def close(self) -> None:
        """Give the connection up."""


def read_command(
    group: str, consumer: str, streams: Sequence[str], count: int, block_ms: int = 0
) -> tuple[Arg, ...]:
    """Return XREADGROUP of what is new in `streams`; it blocks only if `block_ms` is not 0."""
    command: tuple[Arg, ...] = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count)
    if block_ms:
        command += ("BLOCK", block_ms)
    return (*command, "STREAMS", *streams, *(">" for _ in streams))


class Reader:
    """One group's reading connection: it lists all the streams of the group."""

    def __init__(self, connection: Connection, commands: Connection) -> None:
        self._connection = connection
        self._commands = commands  # what ends a read that blocks

    async def read(
        self, group: str, consumer: str, streams: Sequence[str], count: int, block_ms: int
    ) -> list[tuple[str, list[RawEntry]]]:
        """Return new entries, at most `count` per stream, waiting up to `block_ms`.

        XREADGROUP over all streams. After any error, what the lost reply held is pending for
        `consumer` unseen: call `StreamStore.recover` before reading on.
        """
        command = read_command(group, consumer, streams, count, block_ms)
        if self._connection.client_id is None:  # known before the first read can block
            (identity,) = await self._connection.submit(pack(("CLIENT", "ID")))
            # The access list may forbid asking; then reads end by their BLOCK.
            self._connection.client_id = identity if isinstance(identity, int) else 0
        (reply,) = await self._connection.submit(
            pack(command), 1, block_ms / 1000 + REPLY_TIMEOUT_S
        )
        if isinstance(reply, ReplyError):
            raise reply
        return [(name.decode(), entries) for name, entries in reply or ()]

    async def unblock(self) -> None:
        """End a blocked read at once; it takes nothing. CLIENT UNBLOCK on the other connection."""
        if self._connection.client_id:
            await self._commands.submit(pack(("CLIENT", "UNBLOCK", self._connection.client_id)), 1)

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()
