"""Reaching a server, and whether it can be used as it is."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from bus import (
    AuthenticationFailed,
    Bus,
    Event,
    PermissionDenied,
    ServerError,
    ServerUnreachable,
    ServerUnsuitable,
    Worker,
    WrongKeyType,
    event_handler,
)
from bus.streams.address import parse_url
from bus.streams.server import Standalone, check_server
from tests.proxy import listening
from tests.servers import ask
from tests.streams.wire import CANARY, connected, with_user

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus.embedded import EmbeddedServer


async def check(url: str, *, allow_eviction: bool = False) -> None:
    server = Standalone(parse_url(url))
    async with connected(url) as connection:
        await check_server(connection, server, allow_eviction=allow_eviction)


def free_port() -> int:
    """A port that is free at the moment, below those that clients are given."""
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def test_nobody_at_the_address():
    url = f"redis://user:{CANARY}@127.0.0.1:{free_port()}/0"
    with pytest.raises(ServerUnreachable, match="nobody answers at redis://user:") as raised:
        await check(url)
    assert CANARY not in str(raised.value)


async def test_no_socket_at_the_path(tmp_path):
    with pytest.raises(ServerUnreachable, match=r"nobody answers at unix:///.*No such file"):
        await check(f"unix://{tmp_path}/redis.sock")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "a" * 70 + ".b", "-", "%20"])
async def test_a_host_that_is_none(host):
    """Some are refused by the resolver, some by Python before it is asked."""
    async with asyncio.timeout(10):
        with pytest.raises(ServerError, match="nobody answers at"):
            await check(f"redis://{host}:6379/0")


async def test_a_server_that_speaks_another_language():
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with listening(web) as url:
        with pytest.raises(ServerError):
            await check(url)


async def test_passwords(private_server, server_kind):
    url = private_server(server_kind, extra_args=("--requirepass", CANARY)).url
    await check(with_user(url, f":{CANARY}"))
    await check(with_user(url, f"default:{CANARY}"))
    for user in (":wrong-one", "nobody:wrong-one", f"nobody:{CANARY}"):
        with pytest.raises(AuthenticationFailed, match="refused user or password") as raised:
            await check(with_user(url, user))
        assert user.partition(":")[2] not in str(raised.value)
    for missing in (url, url.replace("/0", "/1")):
        with pytest.raises(AuthenticationFailed, match="password"):
            await check(missing)


async def test_a_user_who_may_not_do_what_is_needed(private_server, server_kind):
    server = private_server(server_kind)
    users = {
        "reader": ("~*", "+@read", "+@connection"),
        "elsewhere": ("~other:*", "+@all"),
        "mute": ("~*", "-@all"),
    }
    for user, rules in users.items():
        ask(server, "ACL", "SETUSER", user, "on", f">{CANARY}", *rules)
        with pytest.raises(PermissionDenied, match=r"may not run (PING|XADD) on keys bus:") as no:
            await check(with_user(server.url, f"{user}:{CANARY}"))
        assert CANARY not in str(no.value)
    ask(server, "ACL", "SETUSER", "enough", "on", f">{CANARY}", "~bus:*", "+ping", "+xadd")
    await check(with_user(server.url, f"enough:{CANARY}"))  # INFO is not needed


async def test_a_server_that_may_evict_streams(private_server, server_kind):
    server = private_server(server_kind)
    for policy in ("allkeys-lru", "allkeys-lfu", "allkeys-random"):
        ask(server, "CONFIG", "SET", "maxmemory-policy", policy)
        with pytest.raises(ServerUnsuitable, match=f"has maxmemory-policy {policy}, which may"):
            await check(server.url)
        await check(server.url, allow_eviction=True)
    for policy in ("volatile-lru", "noeviction"):
        ask(server, "CONFIG", "SET", "maxmemory-policy", policy)
        await check(server.url)


async def test_the_check_leaves_nothing_behind(url, server):
    await check(url)
    assert ask(server, "DBSIZE") == b":0\r\n"


async def test_a_probe_key_of_another_type_is_told(url, server):
    ask(server, "SET", "bus:probe", "1")
    with pytest.raises(WrongKeyType, match=r"the key bus:probe of redis://.* is reserved"):
        await check(url)


REDIS_5 = {
    b"PING": b"+PONG\r\n",
    b"XADD": b"-ERR Invalid stream ID specified as stream command argument\r\n",
    b"INFO": b"$29\r\nmaxmemory_policy:noeviction\r\n\r\n",
}
REDIS_4 = {**REDIS_5, b"XADD": b"-ERR unknown command `XADD`, with args beginning with: ...\r\n"}


@pytest.mark.parametrize("answers", [REDIS_5, REDIS_4], ids=["5", "4"])
async def test_a_server_that_is_too_old(answers):
    """A small fake answers as those servers do: neither can be installed for a test today."""

    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ValueError, asyncio.IncompleteReadError):
            while True:
                count = int((await reader.readline())[1:])
                words = []
                for _ in range(count):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                writer.write(answers.get(words[0], b"-ERR unknown command\r\n"))

    async with listening(old) as url:
        with pytest.raises(ServerUnsuitable, match=r"lacks XADD NOMKSTREAM: Redis 6\.2, Valkey 7"):
            await check(url)


async def test_a_unix_socket(private_server, server_kind, tmp_path):
    path = tmp_path / "redis.sock"
    private_server(server_kind, extra_args=("--unixsocket", str(path)))
    await check(f"unix://{path}")
    async with connected(f"unix://{path}?db=3") as connection:
        await connection.call("SET", "where", "three")
    async with connected(f"unix://{path}") as connection:
        assert await connection.call("GET", "where") is None


@pytest.fixture
def tls_server(private_server, tmp_path) -> Iterator[tuple[EmbeddedServer, int, str]]:
    """The system's server with a certificate of its own making, its TLS port, and the paths."""
    ca, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            str(key),
            "-out",
            str(ca),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no openssl here to make a certificate: {made.stderr.decode()}")
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", str(ca), "--tls-key-file", str(key))
    try:
        server = private_server(
            "redis-7.0",
            extra_args=(*options, "--tls-ca-cert-file", str(ca), "--tls-auth-clients", "no"),
        )
    except RuntimeError as error:
        pytest.skip(f"this redis-server is built without TLS: {error}")
    return server, port, str(ca)


async def test_tls(tls_server):
    server, port, ca = tls_server
    await check(f"rediss://localhost:{port}/0?ssl_ca_certs={ca}")
    ask(server, "CONFIG", "SET", "requirepass", CANARY)
    url = f"rediss://:{CANARY}@localhost:{port}/0?ssl_ca_certs={ca}"
    async with Bus.connect(url) as bus:
        assert CANARY not in repr(bus)
        assert await bus.redis.ping()


class Sealed(Event, type="sealed.sent"):
    n: int
    text: str


async def test_events_go_through_tls_and_through_its_end(tls_server):
    """Large ones, both ways; and a connection that is cut while it is idle is made again."""
    _, port, ca = tls_server
    seen = Counter[int]()

    @event_handler(Sealed, group="g")
    async def handle(event: Sealed) -> None:
        assert len(event.text) == 20_000
        seen[event.n] += 1

    url = f"rediss://localhost:{port}/0?ssl_ca_certs={ca}"
    async with Bus.connect(url) as bus, Worker(bus, [handle]) as worker:
        for first in range(0, 300, 100):
            events = [Sealed(n=first + n, text="x" * 20_000) for n in range(100)]
            await asyncio.gather(*map(bus.publish, events))
            await worker.drained()
            await bus.redis.client_kill_filter(_type="normal", skipme=True)
    assert seen == Counter(range(300))


async def test_tls_trusts_nobody_without_reason(tls_server):
    _, port, ca = tls_server
    for url in (
        f"rediss://localhost:{port}/0",  # an unknown authority
        f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={ca}",  # another name than the certificate's
        f"rediss://localhost:{port}/0?ssl_ca_certs={ca}.missing",
        f"redis://localhost:{port}/0",  # no TLS at all
    ):
        with pytest.raises(ServerError):
            await check(url)


async def test_tls_where_the_server_speaks_none(valkey_url, monkeypatch):
    monkeypatch.setattr("bus.streams.server.CONNECT_TIMEOUT_S", 0.3)  # it waits for more
    with pytest.raises(ServerUnreachable, match="nobody answers at rediss://"):
        await check(valkey_url.replace("redis://", "rediss://"))
