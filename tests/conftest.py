"""Servers for the tests. Each kind runs once a session; tests that hurt a server make their own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from bus.embedded import EmbeddedServer
from tests.servers import DEFAULT, SERVERS, Kind, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

KINDS = {kind.id: kind for kind in SERVERS}


class PrivateServer(Protocol):
    """Start a server of one's own: `private_server("redis-6.2", aof=True)`."""

    def __call__(
        self, kind: str = DEFAULT, *, aof: bool = False, extra_args: Iterable[str] = ()
    ) -> EmbeddedServer: ...


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


@pytest.fixture(scope="session", params=list(KINDS))
def server_kind(request: pytest.FixtureRequest) -> str:
    """Run the test once for each kind of server: `valkey-9.1`, `redis-6.2`, `redis-7.0`."""
    kind = str(request.param)
    _binary(KINDS[kind])
    return kind


@pytest.fixture(scope="session")
def server(server_kind: str, shared_server: Callable[[str], EmbeddedServer]) -> EmbeddedServer:
    """The running server of each kind; use `url` unless its contents do not matter."""
    return shared_server(server_kind)


@pytest.fixture
def url(server: EmbeddedServer) -> str:
    """An empty database on each kind of server."""
    ask(server, "FLUSHALL")
    return server.url


@pytest.fixture
def valkey_url(shared_server: Callable[[str], EmbeddedServer]) -> str:
    """An empty database on the default server alone."""
    server = shared_server(DEFAULT)
    ask(server, "FLUSHALL")
    return server.url


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
