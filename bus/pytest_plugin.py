"""Buses for pytest: `bus_memory` in this process, `bus_server` on a private server.

pytest loads this file by its entry point wherever the library is installed; so it imports nothing
before a test asks for a bus, and changes no setting. The fixtures are no coroutines and know no
event loop: any plugin that runs async tests will do, in any mode and loop scope.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from bus.bus import Bus
    from bus.embedded import EmbeddedServer

_places = count(1)
_passed = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Note whether the test itself has passed."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call":
        item.stash[_passed] = report.passed


@pytest.fixture
def bus_memory() -> Iterator[Bus]:
    """Give a bus on an empty `memory://` place; it needs neither opening nor closing.

    Others in the test reach the same place by `bus_memory.address`. Before other threads may
    `publish_soon`: `await bus_memory.ready()`, in the loop that is to publish.
    """
    from bus.bus import Bus  # noqa: PLC0415 - see the head of the file
    from bus.streams.memory.place import forget  # noqa: PLC0415 - as above

    name = f"pytest-{next(_places)}"
    yield Bus.connect(f"memory://{name}")
    forget(name)


@pytest.fixture(scope="session")
def bus_embedded_server() -> Iterator[EmbeddedServer]:
    """Give the server of `bus_server`: a Valkey of one's own, for the whole session."""
    from bus.embedded import EmbeddedServer, EmbeddedServerError  # noqa: PLC0415 - as above

    try:
        server = EmbeddedServer()
    except EmbeddedServerError as error:
        pytest.skip(f"bus_server needs a server to start: {error}")
    with server:
        yield server


@pytest.fixture
def bus_server(
    bus_embedded_server: EmbeddedServer, request: pytest.FixtureRequest
) -> Iterator[Bus]:
    """Give a bus on an empty database of a real server: `async with bus_server as bus:`.

    Skips where the extra `embedded` is not installed.
    """
    import redis  # noqa: PLC0415 - as above

    from bus.bus import Bus  # noqa: PLC0415 - as above

    with redis.Redis.from_url(bus_embedded_server.url) as client:
        client.flushall()
    bus = Bus.connect(bus_embedded_server.url)
    yield bus
    passed = request.node.stash.get(_passed, False)  # others may not have come as far as closing it
    if passed and bus._open:  # noqa: SLF001 - of no use to anybody else
        pytest.fail(
            "bus_server was not closed: use it as `async with bus_server as bus:`, in the test,"
            " whose event loop its connections belong to",
            pytrace=False,
        )
