"""Connections: where the server is, how to reach it, and whether it can be used.

redis-py connects, authenticates and does TLS; packing, reading replies, retrying and timeouts are
ours, because its defaults re-send writes and time out blocking reads (docs/adr/0002).

`Server` is the seam: it says which connection serves a key. There is one implementation,
`Standalone`; Sentinel and Cluster will be others.
"""

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import hiredis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.connection import (
    AbstractConnection,
    BlockingConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.connection import Connection as TcpConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from bus.config import CONNECT_TIMEOUT_S, REPLY_TIMEOUT_S
from bus.errors import (
    AuthenticationFailed,
    BusError,
    DeclarationError,
    NotSupported,
    PermissionDenied,
    ServerUnreachable,
    ServerUnsuitable,
    WrongKeyType,
)
from bus.streams.keys import PROBE
from bus.telemetry import Telemetry

# redis-py strips the code from the text of these; our table of errors goes by code.
_CODES: dict[type[Exception], str] = {
    redis_errors.NoScriptError: "NOSCRIPT",
    redis_errors.OutOfMemoryError: "OOM",
    redis_errors.ReadOnlyError: "READONLY",
    redis_errors.NoPermissionError: "NOPERM",
    redis_errors.BusyLoadingError: "LOADING",
    redis_errors.AuthenticationWrongNumberOfArgsError: "NOAUTH",
    redis_errors.AuthenticationError: "NOAUTH",
    redis_errors.MasterDownError: "MASTERDOWN",
    redis_errors.ClusterDownError: "CLUSTERDOWN",
    redis_errors.TryAgainError: "TRYAGAIN",
    redis_errors.ExecAbortError: "EXECABORT",
}
# Not executed, and will be once the server has recovered.
TRANSIENT = frozenset(
    [
        "LOADING",
        "BUSY",
        "READONLY",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "NOREPLICAS",
        "OOM",
        "MISCONF",
        "UNBLOCKED",
    ]
)
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -?([A-Z]{2,})\b")  # how 6.2 quotes the inner error
_FIRST_WORD = re.compile(r"([A-Z][A-Z0-9]+)\b")

CLIENT_CONNECTIONS = 50  # of bus.redis; a handler that finds all in use waits its turn
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class ConnectionLost(BusError):
    """The connection ended before all replies came. `sent`: whether anything had been sent."""

    def __init__(self, text: str, *, sent: bool) -> None:
        super().__init__(text)
        self.sent = sent


class ReplyError(BusError):
    """The server answered with an error. `code` is its first word, e.g. NOGROUP, OOM, ERR.

    6.2 wraps what happens in a script ("Error running script ... -OOM ..."): the code is the
    inner one. The text may quote arguments, so it is never logged; `str()` gives the code and,
    for codes that never do, the text.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}" if code in _SAFE_TEXT else code)
        self.code = code
        self.text = text

    @classmethod
    def of(cls, error: Exception) -> "ReplyError":
        """Classify an exception of redis-py by the server's error code."""
        text = str(error)
        for kind, code in _CODES.items():
            if isinstance(error, kind):
                return cls(code, text)
        if "script" in text and ("ACL failure" in text or "executing the script can't" in text):
            return cls("NOPERM", text)
        inner = _IN_SCRIPT.search(text) if "script" in text else None
        first = _FIRST_WORD.match(text)
        return cls((inner or first)[1] if inner or first else "ERR", text)  # type: ignore[index]

    def explained(self, key: str) -> BusError:
        """Return the error a caller should see for an operation on `key`."""
        if self.code == "WRONGTYPE":
            return WrongKeyType(f"the key {key} holds another Redis type than a stream")
        if self.code == "NOPERM":
            return PermissionDenied(f"the user may not write to {key}")
        return self


_SAFE_TEXT = TRANSIENT | {"STALE", "WRONGTYPE", "NOGROUP", "BUSYGROUP"}

Arg = bytes | str | int
Reply = Any  # bytes, int, None, ReplyError or a list of them


def pack(command: tuple[Arg, ...]) -> bytes:
    """Return `command` in wire form; the C packer is 5 x redis-py's."""
    return hiredis.pack_command(command)  # type: ignore[arg-type, no-any-return] # invariant stub


# --- where the server is


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL. `repr` and `redacted` never show the password."""

    scheme: str
    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: tuple[tuple[str, str], ...] = ()

    @property
    def redacted(self) -> str:
        """The URL without its password."""
        user = f"{self.username or ''}:***@" if self.password else ""
        where = self.path if self.scheme == "unix" else f"{self.host}:{self.port}/{self.db}"
        return f"{self.scheme}://{user}{where}"


def parse_url(url: str) -> Address:
    """Parse `redis://`, `rediss://` or `unix://`. Never touches the network.

    redis://[user:password@]host[:port][/db], rediss:// the same over TLS with the options
    ssl_ca_certs, ssl_certfile, ssl_keyfile, unix://[user:password@]/path[?db=n].
    Errors: NotSupported for schemes of later releases, DeclarationError for anything else wrong.
    """
    if not isinstance(url, str) or "://" not in url:
        raise DeclarationError("the URL has no scheme; say for example redis://localhost:6379/0")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise DeclarationError("the URL cannot be parsed: check port and brackets") from None
    scheme = parts.scheme
    if scheme in ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "memory"):
        raise NotSupported(f"{scheme}:// is not part of this release")
    if scheme not in ("redis", "rediss", "unix"):
        raise DeclarationError(
            f"{scheme}:// is no known scheme: use redis://, rediss:// (TLS) or unix://"
        )
    if "@" in parts.path + parts.query + parts.fragment:  # it may be the rest of a password
        raise DeclarationError(
            "the URL has an '@' too late: write # ? / @ of a password as %23 ..."
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    allowed = {"db"} if scheme != "rediss" else {"db", *TLS_OPTIONS}
    for name in options.keys() - allowed:
        raise DeclarationError(
            f"URL option {name!r} is not known for {scheme}://; known: {', '.join(sorted(allowed))}"
        )
    if scheme == "unix":
        database = options.get("db", "0")
        if not parts.path or parts.path == "/":
            raise DeclarationError("a unix:// URL names a socket: unix:///run/redis.sock")
    else:
        database = parts.path.strip("/") or options.get("db", "0")
    if not (database.isascii() and database.isdigit()):
        raise DeclarationError("the database in the URL is not a number")
    return Address(
        scheme=scheme,
        host=parts.hostname or "localhost",
        port=port or 6379,
        path=unquote(parts.path) if scheme == "unix" else "",
        db=int(database),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=tuple((k, v) for k, v in options.items() if k in TLS_OPTIONS),
    )


class Server(Protocol):
    """Which connection serves which key. The seam where Sentinel and Cluster enter."""

    @property
    def redacted(self) -> str:
        """The address, without a password."""

    async def open(self) -> AbstractConnection:
        """Return a connected redis-py connection to the server that takes writes."""

    def client(self) -> "redis.asyncio.Redis":
        """Return a plain redis.asyncio client on a pool of its own."""


class Standalone:
    """One server at one address."""

    def __init__(self, address: Address) -> None:
        self.address = address

    @property
    def redacted(self) -> str:
        """The address, without a password."""
        return self.address.redacted

    async def open(self) -> AbstractConnection:
        """Return a connected connection. Errors: ServerUnreachable, AuthenticationFailed."""
        kind, settings = self._kind_and_settings()
        connection = kind(**settings)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except redis_errors.AuthenticationError:
            raise AuthenticationFailed(
                f"{self.redacted} refused user or password: check the credentials in the URL"
            ) from None
        except (TimeoutError, redis_errors.RedisError, OSError) as error:
            code = ReplyError.of(error).code
            if code in ("NOAUTH", "WRONGPASS"):
                raise AuthenticationFailed(f"{self.redacted} asks for a password") from None
            raise ServerUnreachable(
                f"nobody answers at {self.redacted} ({_reason(error)}):"
                " is the server running, and is the URL right?"
            ) from None
        return connection

    def client(self) -> "redis.asyncio.Redis":
        """Return a plain client: 50 connections, waits for a free one; no retries, bytes."""
        kind, settings = self._kind_and_settings()
        pool = BlockingConnectionPool(
            connection_class=kind, max_connections=CLIENT_CONNECTIONS, timeout=30, **settings
        )
        return redis.asyncio.Redis.from_pool(pool)

    def _kind_and_settings(self) -> tuple[type[AbstractConnection], dict[str, Any]]:
        address = self.address
        settings: dict[str, Any] = {
            "db": address.db,
            "username": address.username,
            "password": address.password,
            "protocol": 2,  # RESP3 switches off the check for stale replies
            "retry": Retry(NoBackoff(), 0),  # a write must never be re-sent behind our back
            "socket_timeout": None,  # it would wrap each command in wait_for; see Connection
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "health_check_interval": 0,
            "driver_info": None,
        }
        if address.scheme == "unix":
            return UnixDomainSocketConnection, {**settings, "path": address.path}
        settings |= {"host": address.host, "port": address.port, "socket_keepalive": True}
        if address.scheme == "rediss":
            return SSLConnection, {**settings, **dict(address.tls)}
        return TcpConnection, settings


def _reason(error: BaseException) -> str:
    """Return why a connection failed, in the system's words, never with arguments of commands."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__


# --- one connection, pipelined


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
        self.client_id: int | None = None  # the server's name for the connection, if it was asked

    def submit(
        self, packed: bytes, replies: int = 1, timeout_s: float = REPLY_TIMEOUT_S
    ) -> "asyncio.Future[list[Reply]]":
        """Queue `packed`, which will have `replies` replies; error replies come as ReplyError.

        Errors of the future: ConnectionLost, ServerUnreachable, AuthenticationFailed.
        """
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(ConnectionLost("the bus is closed", sent=False))
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

    async def _run(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                await self._exchange(batch)
        finally:
            self._pump = None

    async def _exchange(self, batch: list[_Request]) -> None:
        sent = False
        watchdog: asyncio.TimerHandle | None = None
        try:
            raw = self._raw
            if raw is None or not raw.is_connected:
                raw = self._raw = await self._server.open()
            watchdog = asyncio.get_running_loop().call_later(
                max(r.timeout_s for r in batch), self._give_up, raw
            )
            sent = True
            await raw.send_packed_command([r.packed for r in batch], check_health=False)
            for request in batch:
                replies = [await _reply(raw) for _ in range(request.replies)]
                if not request.future.done():
                    request.future.set_result(replies)
        except (TimeoutError, redis_errors.RedisError, OSError) as error:
            self._fail(batch, ConnectionLost(f"connection lost: {_reason(error)}", sent=sent))
        except BusError as error:
            self._fail(batch, error)
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
        _drop(raw)

    async def close(self) -> None:
        """Close the connection; what is in flight fails with ConnectionLost."""
        self._closed = True
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
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


# --- whether the server can be used


async def check_server(
    connection: Connection, server: Server, *, allow_eviction: bool = False
) -> None:
    """Refuse a server that cannot keep our promises, with the remedy in the error.

    PING; a probe for 6.2 by XADD NOMKSTREAM on a key that does not exist (adds nothing);
    maxmemory-policy from INFO, since CONFIG is forbidden on most hosted servers. Three commands
    in one write. Errors: the ServerError family.
    """
    packed = b"".join(
        pack(c)
        for c in (
            ("PING",),
            ("XADD", PROBE, "NOMKSTREAM", "*", "probe", "1"),
            ("INFO", "memory"),
        )
    )
    ping, probe, info = await connection.submit(packed, 3)
    where = server.redacted
    for reply, command in ((ping, "PING"), (probe, "XADD")):
        if isinstance(reply, ReplyError) and reply.code in ("NOAUTH", "WRONGPASS"):
            raise AuthenticationFailed(f"{where} asks for a password: put it into the URL")
        if isinstance(reply, ReplyError) and reply.code == "NOPERM":
            raise PermissionDenied(
                f"the user of {where} may not run {command} on keys bus:*;"
                " docs/wire.md lists the commands that are needed"
            )
    if isinstance(probe, ReplyError) and probe.code not in TRANSIENT:
        if probe.code == "WRONGTYPE":
            raise WrongKeyType(f"the key {PROBE} of {where} is reserved for the bus; delete it")
        raise ServerUnsuitable(
            f"the server at {where} lacks XADD NOMKSTREAM: Redis 6.2, Valkey 7.2 or newer is needed"
        )
    if isinstance(info, bytes) and not allow_eviction:
        policy = re.search(rb"maxmemory_policy:(\S+)", info)
        if policy and policy[1].startswith(b"allkeys-"):
            raise ServerUnsuitable(
                f"the server at {where} has maxmemory-policy {policy[1].decode()}, which may delete"
                " whole streams: set it to noeviction (or pass allow_eviction=True and lose events)"
            )


# --- fork

_after_fork: list[Callable[[], None]] = []


def call_after_fork(hook: Callable[[], None]) -> None:
    """Call `hook` in every child made by os.fork, until `forget_after_fork`."""
    _after_fork.append(hook)


def forget_after_fork(hook: Callable[[], None]) -> None:
    """Undo `call_after_fork`."""
    if hook in _after_fork:
        _after_fork.remove(hook)


def _in_child() -> None:
    for hook in _after_fork:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
