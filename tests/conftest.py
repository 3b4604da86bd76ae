"""Servers for the tests. Each kind runs once a session; tests that hurt a server make their own."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from bus.embedded import EmbeddedServer
from tests.eyes import MemoryServer
from tests.servers import DEFAULT, KINDS, MEMORY, SERVERS, Kind, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_ON_EVERY_KIND = {"streams", "guarantees"}
_LIKE_ANOTHER = {"redis-7.0"}


class PrivateServer(Protocol):
    """Start a server of one's own: `private_server("redis-6.2", aof=True)`."""

    def __call__(
        self, kind: str = DEFAULT, *, aof: bool = False, extra_args: Iterable[str] = ()
    ) -> EmbeddedServer: ...


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks; let what tests start be interrupted, in a background shell, too."""
    config.addinivalue_line("markers", "everywhere: runs on memory://, too")
    config.addinivalue_line("markers", "servers_only(reason): though its neighbours run everywhere")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a server on every kind of it, or on those that differ most.

    All that differs between them is dealt with in `bus/streams`: what is above it is tested on the
    newest and the oldest, and what is promised on all. What is marked `everywhere` runs on
    `memory://`, too.
    """
    marked = metafunc.definition.get_closest_marker
    about_servers = marked("servers_only") or "private_server" in metafunc.fixturenames
    memory = [MEMORY] if marked("everywhere") and not about_servers else []
    if "server_kind" in metafunc.fixturenames:
        folder = metafunc.definition.nodeid.split("/")[1]
        kinds = [k for k in KINDS if folder in _ON_EVERY_KIND or k not in _LIKE_ANOTHER]
        metafunc.parametrize("server_kind", [*kinds, *memory], indirect=True, scope="session")
    if memory and "default_kind" in metafunc.fixturenames:
        metafunc.parametrize("default_kind", [DEFAULT, *memory], indirect=True, scope="session")


def pytest_report_header() -> list[str]:
    found = [f"{kind.id}: {kind.find() or 'not here, needs ' + kind.remedy}" for kind in SERVERS]
    return [f"servers: {', '.join(found)}"]


def _binary(kind: Kind) -> Path:
    binary = kind.find()
    if binary is None:
        pytest.skip(f"no {kind.id} here; it needs {kind.remedy}")
    return binary


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Callable[[str], EmbeddedServer]]:
    """The session's server of a kind, started when it is first asked for."""
    running: dict[str, EmbeddedServer] = {}
    with ExitStack() as stack:

        def of_kind(kind: str) -> EmbeddedServer:
            if kind not in running:
                running[kind] = stack.enter_context(EmbeddedServer(_binary(KINDS[kind])))
            return running[kind]

        yield of_kind


@pytest.fixture(scope="session")
def server_kind(request: pytest.FixtureRequest) -> str:
    """Run the test once for each kind of server: `valkey-9.1`, `redis-6.2`, `redis-7.0`.

    What is marked `everywhere` runs on `memory`, too.
    """
    kind = str(request.param)
    if kind != MEMORY:
        _binary(KINDS[kind])
    return kind


@pytest.fixture(scope="session")
def default_kind(request: pytest.FixtureRequest) -> str:
    """Run the test on the default server; what is marked `everywhere` on `memory`, too."""
    return str(getattr(request, "param", DEFAULT))


@pytest.fixture(scope="session")
def server(
    server_kind: str, shared_server: Callable[[str], EmbeddedServer]
) -> EmbeddedServer | MemoryServer:
    """The running server of each kind; use `url` unless its contents do not matter."""
    return MemoryServer() if server_kind == MEMORY else shared_server(server_kind)


def _emptied(server: EmbeddedServer | MemoryServer) -> str:
    if isinstance(server, MemoryServer):
        server.flush()
    else:
        ask(server, "FLUSHALL")
    return server.url


@pytest.fixture
def url(server: EmbeddedServer | MemoryServer) -> str:
    """An empty database on each kind of server."""
    return _emptied(server)


@pytest.fixture
def valkey_url(default_kind: str, shared_server: Callable[[str], EmbeddedServer]) -> str:
    """An empty database on the default server alone."""
    return _emptied(MemoryServer() if default_kind == MEMORY else shared_server(default_kind))


@pytest.fixture
def private_server() -> Iterator[PrivateServer]:
    """Make servers to kill, restart and pause, of `server_kind` or one kind; all end here.

    aof: what they have answered survives a kill.
    """
    with ExitStack() as stack:

        def make(
            kind: str = DEFAULT, *, aof: bool = False, extra_args: Iterable[str] = ()
        ) -> EmbeddedServer:
            binary = _binary(KINDS[kind])
            if aof:  # with `everysec`, Redis 7.0 may answer before the write is in its file
                extra_args = (*extra_args, "--appendfsync", "always")
            return stack.enter_context(EmbeddedServer(binary, aof=aof, extra_args=extra_args))

        yield make
