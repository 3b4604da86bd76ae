"""A server: how to connect to it, and whether it can be used."""

import asyncio
import re
from typing import Any

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

from bus.config import CONNECT_TIMEOUT_S
from bus.errors import (
    AuthenticationFailed,
    PermissionDenied,
    ServerUnreachable,
    ServerUnsuitable,
    WrongKeyType,
)
from bus.streams.address import Address
from bus.streams.connection import Connection, ConnectionLost, Server, pack, reason_of
from bus.streams.keys import PROBE
from bus.streams.replies import TRANSIENT, ReplyError

CLIENT_CONNECTIONS = 50  # of bus.redis; a handler that finds all in use waits its turn


class Standalone:
    """One server at one address."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.clustered = False

    @property
    def redacted(self) -> str:
        """The address, without a password."""
        return self.address.redacted

    async def open(self) -> AbstractConnection:
        """Return a connected connection. Errors: ServerUnreachable, AuthenticationFailed."""
        kind, settings = self._kind_and_settings()
        connection = kind(**settings)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):  # redis-py's covers no handshake
                await connection.connect()  # type: ignore[no-untyped-call]
        except redis_errors.AuthenticationError:
            await connection.disconnect(nowait=True)
            raise AuthenticationFailed(
                f"{self.redacted} refused user or password: check the credentials in the URL"
            ) from None
        except (TimeoutError, redis_errors.RedisError, OSError) as error:
            await connection.disconnect(nowait=True)
            code = ReplyError.of(error).code
            if code in ("NOAUTH", "WRONGPASS"):
                raise AuthenticationFailed(f"{self.redacted} asks for a password") from None
            raise ServerUnreachable(
                f"nobody answers at {self.redacted} ({reason_of(error)}):"
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


async def check_server(  # noqa: C901 - one branch a reason to refuse
    connection: Connection, server: Server, *, allow_eviction: bool = False
) -> None:
    """Refuse a server that cannot keep our promises, with the remedy in the error.

    PING; a probe for 6.2 by XADD NOMKSTREAM on a key that does not exist (adds nothing);
    maxmemory-policy from INFO, since CONFIG is forbidden on most hosted servers; whether it is a
    node of a Cluster, noted in `server`. Four commands in one write. Errors: the ServerError
    family.
    """
    packed = b"".join(
        pack(c)
        for c in (
            ("PING",),
            ("XADD", PROBE, "NOMKSTREAM", "*", "probe", "1"),
            ("INFO", "memory"),
            ("INFO", "cluster"),
        )
    )
    where = server.redacted
    try:
        ping, probe, info, cluster = await connection.submit(packed, 4)
    except ConnectionLost as error:
        if "no answer" in str(error):
            raise ServerUnreachable(f"{where} accepts connections and gives {error}") from None
        raise ServerUnreachable(
            f"{where} ended the connection ({error}): is it a Redis or Valkey server,"
            " and does the URL say rediss:// where it expects TLS?"
        ) from None
    for reply, command in ((ping, "PING"), (probe, "XADD")):
        if isinstance(reply, ReplyError) and reply.code in ("NOAUTH", "WRONGPASS"):
            raise AuthenticationFailed(f"{where} asks for a password: put it into the URL")
        if isinstance(reply, ReplyError) and reply.code == "NOPERM":
            raise PermissionDenied(
                f"the user of {where} may not run {command} on keys bus:*;"
                " docs/wire.md lists the commands that are needed"
            )
    if isinstance(ping, ReplyError) and ping.code == "LOADING":
        raise ServerUnreachable(f"the server at {where} is still loading its data: try again")
    if isinstance(probe, ReplyError) and probe.code not in TRANSIENT:
        if probe.code == "WRONGTYPE":
            raise WrongKeyType(f"the key {PROBE} of {where} is reserved for the bus; delete it")
        raise ServerUnsuitable(
            f"the server at {where} lacks XADD NOMKSTREAM: Redis 6.2, Valkey 7.2 or newer is needed"
        )
    server.clustered = isinstance(cluster, bytes) and b"cluster_enabled:1" in cluster
    if isinstance(info, bytes) and not allow_eviction:
        policy = re.search(rb"maxmemory_policy:(\S+)", info)
        if policy and policy[1].startswith(b"allkeys-"):
            raise ServerUnsuitable(
                f"the server at {where} has maxmemory-policy {policy[1].decode()}, which may delete"
                " whole streams: set it to noeviction (or pass allow_eviction=True and lose events)"
            )
