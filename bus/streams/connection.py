"""One connection, pipelined.

redis-py connects, authenticates and does TLS; packing, reading replies, retrying and timeouts are
ours, because its defaults re-send writes and time out blocking reads (docs/adr/0002), and the hot
path has no time for its streams (docs/adr/0018).

`Server` is the seam: it says which connection serves. Its one implementation is
`server.Standalone`; Sentinel and Cluster will be others.
"""

import asyncio
import select
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import hiredis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from bus.config import REPLY_TIMEOUT_S
from bus.errors import BusClosed, BusError, ServerUnreachable
from bus.streams.replies import NOT_THE_PRIMARY, TRANSIENT, Reply, ReplyError
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


class Answer(Protocol):
    """Who is told the replies to a request: a future, or what takes them without another turn."""

    def done(self) -> bool:
        """Whether nobody wants to know any more."""

    def set_result(self, result: list[Reply], /) -> None:
        """Take the replies. Raises nothing."""

    def set_exception(self, exception: BusError, /) -> None:
        """Take why there are none. Raises nothing."""

    def exception(self) -> object:
        """Return what was taken; asked, so that nobody complains that nobody did."""


@dataclass(slots=True, eq=False)
class _Request:
    packed: bytes
    replies: int
    future: Answer
    timeout_s: float
    gives_up_at: float = 0.0  # loop time; of the write it left in
    ends_write: bool = False  # whether it is the last of its write


class _Link(asyncio.Protocol):
    """One transport, taken over from redis-py's connection once that has shaken hands.

    Its own stream reader and writer cost two tasks, a wait for each reply and a copy of each (1.3 x
    on reads, 3 x on single publishes, docs/adr/0018).
    """

    def __init__(self, raw: AbstractConnection, owner: "Connection") -> None:
        # Its own end would close the transport, and so would its writer's.
        reader, self._writer = raw._reader, raw._writer  # noqa: SLF001 - no other way
        raw._reader = raw._writer = None  # noqa: SLF001 - as above
        assert reader is not None
        assert self._writer is not None
        self.transport: asyncio.WriteTransport = self._writer.transport
        # What has come already, a refusal perhaps, came before anything was asked.
        self.lost = self.transport.is_closing() or reader.at_eof() or bool(reader._buffer)  # type: ignore[attr-defined] # noqa: SLF001 - no other way
        self.reader = hiredis.Reader(replyError=_reply_error, notEnoughData=_NOT_YET)
        self._owner = owner
        self._poll = select.poll()
        self._poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        self.transport.set_protocol(self)

    def has_something_to_read(self) -> bool:
        """Whether the socket is readable: closed, or something that nobody has asked for."""
        return bool(self._poll.poll(0))

    def data_received(self, data: bytes) -> None:
        """Hand replies to their callers."""
        self._owner.received(self, data)

    def eof_received(self) -> None:
        """Note that the server has closed it."""
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that it has ended."""
        if not self.lost:
            self.lost = True
            self._owner.ended(self, exc)

    def drop(self) -> None:
        """Close it at once."""
        self.lost = True
        self.transport.abort()


class Connection:
    """A pipelined connection that is made when first used and made again after it broke.

    Commands queued in one turn of the loop leave in one write; the next write waits for replies
    while `writes` have not been answered. Nothing is ever sent twice: what was in flight when the
    connection broke fails with ConnectionLost, and the caller decides. Cancelling a caller leaves
    the connection intact.
    """

    def __init__(self, server: Server, role: str, telemetry: Telemetry, *, writes: int = 1) -> None:
        self._server = server
        self._role = role
        self._telemetry = telemetry
        self._link: _Link | None = None
        self._queue: list[_Request] = []
        self._flight: deque[_Request] = deque()  # what has not all its replies
        self._writes = 0  # that it left in
        self._most_writes = writes
        self._replies: list[Reply] = []  # of the first that has not
        self._moved = False  # whether a reply said that this is not the primary
        self._opening: asyncio.Task[None] | None = None
        self._flushing = False  # whether a write is due in this turn of the loop
        self._looked = False  # whether it is due because the socket was readable in the last one
        self._watchdog: asyncio.TimerHandle | None = None
        self._closed = False
        self._was_lost = False
        self.client_id: int | None = None  # the server's name for the connection, if it was asked

    def submit(
        self, packed: bytes, replies: int = 1, timeout_s: float = REPLY_TIMEOUT_S
    ) -> "asyncio.Future[list[Reply]]":
        """Queue `packed`, which will have `replies` replies; error replies come as ReplyError.

        Errors of the future: ConnectionLost, ServerUnreachable, AuthenticationFailed.
        """
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self.submit_for(future, packed, replies, timeout_s)
        return future

    def submit_for(
        self,
        answer: Answer,
        packed: bytes,
        replies: int = 1,
        timeout_s: float = REPLY_TIMEOUT_S,
        *,
        at_once: bool = False,
    ) -> None:
        """Do the same for whoever is to be told; `at_once`: nothing else comes in this turn."""
        if self._closed:
            answer.set_exception(BusClosed("the bus is closed"))
            return
        self._queue.append(_Request(packed, replies, answer, timeout_s))
        if self._flushing or self._opening or self._writes == self._most_writes:
            return
        if at_once:
            self._flush()
            return
        self._flushing = True
        asyncio.get_running_loop().call_soon(self._flush)

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

    # --- an exchange: a write, and the replies to it

    def _flush(self) -> None:
        """Write what is queued; first connect if there is no connection."""
        self._flushing = False
        if not self._queue or self._opening or self._writes == self._most_writes:
            return
        if self._writes and self._moved:  # when all is answered, to whom it may concern
            return
        loop = asyncio.get_running_loop()
        link = self._link
        if (
            link is not None
            and not self._writes
            and not self._looked
            and link.has_something_to_read()
        ):
            # The server has closed it meanwhile (or sent what nobody asked for): a command written
            # to it now would leave its caller in doubt for nothing. The loop knows in a turn.
            self._looked = self._flushing = True
            loop.call_soon(self._flush)
            return
        self._looked = False
        batch, self._queue = self._queue, []
        if link is None:
            self._opening = loop.create_task(self._open(batch))
        else:
            self._write(link, batch)

    async def _open(self, batch: list[_Request]) -> None:
        """Connect, and write what was queued when that was found to be necessary."""
        self.client_id = None
        error: BusError
        try:
            link = await self._connected()
        except asyncio.CancelledError:
            self._fail(batch, ConnectionLost("the bus is closing", sent=False), quiet=True)
            raise
        except Exception as failed:
            error = failed if isinstance(failed, BusError) else _lost(failed, sent=False)
            self._opening = None
            self._fail(batch, error)
            self._go_on()
            return
        self._link, self._opening = link, None
        if self._was_lost:
            self._was_lost = False
            self._telemetry.emit("connection.restored", role=self._role)
        self._write(link, batch)

    async def _connected(self) -> _Link:
        link = _Link(await self._server.open(), self)
        if link.lost:
            link.drop()
            raise _lost(None, sent=False)
        return link

    def _write(self, link: _Link, batch: list[_Request]) -> None:
        self._flight += batch
        self._writes += 1
        if len(batch) == 1:
            timeout_s, packed = batch[0].timeout_s, batch[0].packed
        else:
            timeout_s = max(r.timeout_s for r in batch)
            packed = b"".join([r.packed for r in batch])
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + timeout_s
        for request in batch:
            request.gives_up_at, request.timeout_s = gives_up_at, timeout_s
        request.ends_write = True
        if self._watchdog is None or self._watchdog.when() > gives_up_at:
            self._watch(loop, gives_up_at)
        try:
            link.transport.write(packed)
        except Exception as error:  # uvloop raises RuntimeError for a transport that was closed
            self.ended(link, error)

    def received(self, link: _Link, data: bytes) -> None:
        """Take in what came; give whoever has all his replies what he waits for."""
        if link is not self._link:
            return
        reader, flight, replies = link.reader, self._flight, self._replies
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not _NOT_YET:
                if reply.__class__ is ReplyError:
                    self._look_at(reply)
                replies.append(reply)
                request = flight[0]
                if len(replies) < request.replies:
                    continue
                flight.popleft()
                if request.ends_write:
                    self._writes -= 1
                if not request.future.done():
                    request.future.set_result(replies)
                replies = self._replies = []
        except Exception as error:  # no protocol that we know, or a reply that nobody asked for
            self.ended(link, error)
            return
        if self._moved and not flight:  # the name may lead to another server by now
            self._forget_link()
        if self._writes < self._most_writes:
            self._go_on()

    def _look_at(self, error: ReplyError) -> None:
        """See whether an error is about the connection itself."""
        if _NO_CONNECTION in error.text:
            raise ConnectionRefusedError(error.text)
        self._moved = self._moved or error.code in NOT_THE_PRIMARY

    def _go_on(self) -> None:
        """Write what was queued meanwhile, after whoever was told something has had his turn."""
        if self._queue and not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    # --- its end

    def ended(self, link: _Link, error: Exception | None) -> None:
        """Note that a connection has ended, with `error` or because the server closed it."""
        if link is not self._link:
            return
        batch = self._taken_back()
        if not batch:  # the next request makes another, and there is nothing to tell
            self._forget_link()
            return
        self._fail(batch, _lost(error, sent=True))
        self._go_on()

    def _taken_back(self) -> list[_Request]:
        """Return what was in flight, for which no reply is waited for any more."""
        batch = list(self._flight)
        self._flight.clear()
        self._writes = 0
        return batch

    def _forget_link(self) -> None:
        if self._link is not None:
            self._link.drop()
        self._link = self.client_id = None
        self._replies, self._moved = [], False

    def _fail(self, batch: list[_Request], error: BusError, *, quiet: bool = False) -> None:
        if self._link is not None:
            self._forget_link()
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

    def _watch(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        """Look when the time of an exchange is up; one timer serves many exchanges."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = loop.call_at(at, self._look)

    def _look(self) -> None:
        """End a hung exchange."""
        self._watchdog = None
        if not self._flight:
            return
        loop = asyncio.get_running_loop()
        hung = min(self._flight, key=lambda r: r.gives_up_at)
        if loop.time() < hung.gives_up_at:
            self._watch(loop, hung.gives_up_at)
            return
        error = ConnectionLost(f"no answer within {hung.timeout_s:g} s", sent=True)
        self._fail(self._taken_back(), error)
        self._go_on()

    async def close(self) -> None:
        """Close the connection; what is in flight fails with ConnectionLost."""
        self._closed = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        queued, self._queue = self._queue, []
        closing = ConnectionLost("the bus is closing", sent=True)
        self._fail(self._taken_back(), closing, quiet=True)
        self._fail(queued, ConnectionLost("the bus is closed", sent=False), quiet=True)
        self._forget_link()


_NOT_YET = object()
_NO_CONNECTION = "max number of clients reached"  # the answer to a connection, not to a command


def _lost(error: Exception | None, *, sent: bool) -> ConnectionLost:
    why = reason_of(error) if error is not None else "Connection closed by server."
    if error is not None and not isinstance(error, OSError):
        why = f"{type(error).__name__}: {why}"
    return ConnectionLost(f"connection lost: {why}", sent=sent)


def _reply_error(text: str) -> ReplyError:
    return ReplyError.of(Exception(text))


async def next_reply(raw: AbstractConnection) -> Reply:
    """Read one reply; a server's error is a value, a broken connection an exception."""
    try:
        return await raw.read_response(disconnect_on_error=False)
    except (
        redis_errors.ResponseError,
        redis_errors.BusyLoadingError,
        redis_errors.AuthenticationError,
    ) as error:
        return ReplyError.of(error)


def is_transient(error: BaseException) -> bool:
    """Return whether the same thing may work later, unchanged."""
    if isinstance(error, ReplyError):
        return error.code in TRANSIENT
    return isinstance(error, ConnectionLost | ServerUnreachable)


def reason_of(error: BaseException) -> str:
    """Return why a connection failed, in the system's words, never with arguments of commands."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__
