"""One connection, pipelined.

redis-py connects, authenticates and does TLS; packing, reading replies, retrying and timeouts are
ours, because its defaults re-send writes and time out blocking reads (docs/adr/0002).

`Server` is the seam: it says which connection serves. Its one implementation is
`server.Standalone`; Sentinel and Cluster will be others.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import hiredis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from bus.config import REPLY_TIMEOUT_S
from bus.errors import BusClosed, BusError
from bus.streams.replies import NOT_THE_PRIMARY, Reply, ReplyError
from bus.telemetry import Telemetry

Arg = bytes | str | int


class ConnectionLost(BusError):
    """The connection ended before all replies came. `sent`: whether anything had been sent."""

    def __init__(self, text: str, *, sent: bool) -> None:
        super().__init__(text)
        self.sent = sent


def pack(command: tuple[Arg, ...]) -> bytes:
    """Return `command` in wire form; the C packer is 5 x redis-py's."""
    return hiredis.pack_command(command)  # type: ignore[arg-type, no-any-return] # invariant stub


class Server(Protocol):
    """Which connection serves which key. The seam where Sentinel and Cluster enter."""

    clustered: bool  # whether it is a node of a Cluster; found out by `check_server`

    @property
    def redacted(self) -> str:
        """The address, without a password."""

    async def open(self) -> AbstractConnection:
        """Return a connected redis-py connection to the server that takes writes."""

    def client(self) -> "redis.asyncio.Redis":
        """Return a plain redis.asyncio client on a pool of its own."""


@dataclass(slots=True, eq=False)
class _Request:
    packed: bytes
    replies: int
    future: "asyncio.Future[list[Reply]]"
    timeout_s: float


class Connection:
    """A pipelined connection that is made when first used and made again after it broke.

    Commands queued in one turn of the loop leave in one write; the next write waits for their
    replies. Nothing is ever sent twice: what was in flight when the connection broke fails with
    ConnectionLost, and the caller decides. Cancelling a caller leaves the connection intact.
    """

    def __init__(self, server: Server, role: str, telemetry: Telemetry) -> None:
        self._server = server
        self._role = role
        self._telemetry = telemetry
        self._raw: AbstractConnection | None = None
        self._queue: list[_Request] = []
        self._pump: asyncio.Task[None] | None = None
        self._closed = False
        self._given_up = False  # whether the exchange under way was ended by the watchdog
        self._was_lost = False
        self.client_id: int | None = None  # the server's name for the connection, if it was asked

    def submit(
        self, packed: bytes, replies: int = 1, timeout_s: float = REPLY_TIMEOUT_S
    ) -> "asyncio.Future[list[Reply]]":
        """Queue `packed`, which will have `replies` replies; error replies come as ReplyError.

        Errors of the future: ConnectionLost, ServerUnreachable, AuthenticationFailed.
        """
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(BusClosed("the bus is closed"))
            return future
        self._queue.append(_Request(packed, replies, future, timeout_s))
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._run())
        return future

    async def call(self, *args: Arg, timeout_s: float = REPLY_TIMEOUT_S) -> Reply:
        """Send one command and return its reply. Errors: ReplyError, and those of `submit`."""
        (reply,) = await self.submit(pack(args), 1, timeout_s)
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    async def pipeline(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Send `commands` in one write and return their replies, errors among them."""
        if not commands:
            return []
        return await self.submit(b"".join(pack(c) for c in commands), len(commands))

    async def _run(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                await self._exchange(batch)
        finally:
            self._pump = None

    async def _exchange(self, batch: list[_Request]) -> None:  # noqa: C901, PLR0912 - one branch an end
        sent = self._given_up = False
        timeout_s = 0.0
        watchdog: asyncio.TimerHandle | None = None
        try:
            raw = self._raw
            if raw is not None and raw.is_connected and await raw.can_read():
                # The server has closed it meanwhile (or sent what nobody asked for): a command
                # written to it now would leave its caller in doubt for nothing.
                await raw.disconnect(nowait=True)
            if raw is None or not raw.is_connected:
                self.client_id = None
                raw = self._raw = await self._server.open()
                if self._was_lost:
                    self._was_lost = False
                    self._telemetry.emit("connection.restored", role=self._role)
            timeout_s = max(r.timeout_s for r in batch)
            watchdog = asyncio.get_running_loop().call_later(timeout_s, self._give_up, raw)
            sent = True
            await raw.send_packed_command([r.packed for r in batch], check_health=False)
            moved = False
            for request in batch:
                replies = [await _reply(raw) for _ in range(request.replies)]
                moved = moved or any(
                    isinstance(r, ReplyError) and r.code in NOT_THE_PRIMARY for r in replies
                )
                if not request.future.done():
                    request.future.set_result(replies)
            if moved:  # the name may lead to another server by now
                self._raw = self.client_id = None
                await raw.disconnect(nowait=True)
        except (TimeoutError, redis_errors.RedisError, OSError) as error:
            why = f"connection lost: {reason_of(error)}"
            if self._given_up:
                why = f"no answer within {timeout_s:g} s"
            self._fail(batch, ConnectionLost(why, sent=sent))
        except BusError as error:
            self._fail(batch, error)
        except Exception as error:  # uvloop raises RuntimeError for a transport that was closed
            name = type(error).__name__
            self._fail(batch, ConnectionLost(f"connection lost: {name}: {error}", sent=sent))
        except asyncio.CancelledError:
            self._fail(batch, ConnectionLost("the bus is closing", sent=sent), quiet=True)
            raise
        finally:
            if watchdog is not None:
                watchdog.cancel()

    def _fail(self, batch: list[_Request], error: BusError, *, quiet: bool = False) -> None:
        if self._raw is not None:
            _drop(self._raw)
            self._raw = self.client_id = None
            self._was_lost = True
            if not quiet and not self._closed:
                self._telemetry.emit(
                    "connection.lost",
                    role=self._role,
                    error_type=type(error).__name__,
                    error=str(error),
                )
        for request in batch:
            if not request.future.done():
                request.future.set_exception(error)
                # A caller that was cancelled never looks; that is no "exception never retrieved".
                request.future.exception()

    def _give_up(self, raw: AbstractConnection) -> None:
        """End a hung exchange: the read in progress fails within a millisecond."""
        self._given_up = True
        _drop(raw)

    async def close(self) -> None:
        """Close the connection; what is in flight fails with ConnectionLost."""
        self._closed = True
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        queued, self._queue = self._queue, []
        self._fail(queued, ConnectionLost("the bus is closed", sent=False), quiet=True)
        raw, self._raw = self._raw, None
        if raw is not None:
            await raw.disconnect(nowait=True)


async def _reply(raw: AbstractConnection) -> Reply:
    """Read one reply; a server's error is a value, a broken connection an exception."""
    try:
        return await raw.read_response(disconnect_on_error=False)
    except (
        redis_errors.ResponseError,
        redis_errors.BusyLoadingError,
        redis_errors.AuthenticationError,
    ) as error:
        return ReplyError.of(error)


_dropping: set["asyncio.Task[None]"] = set()


def _drop(raw: AbstractConnection) -> None:
    """Close a connection from a callback; a read waiting on it ends."""
    task = asyncio.get_running_loop().create_task(raw.disconnect(nowait=True))
    _dropping.add(task)  # the loop keeps weak references only
    task.add_done_callback(_dropping.discard)


def reason_of(error: BaseException) -> str:
    """Return why a connection failed, in the system's words, never with arguments of commands."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__
