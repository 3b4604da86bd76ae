"""Commands as a user types them: processes of their own, in a folder with an application."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus
from tests.cli.shop import ORDERS
from tests.cli.zygote import Running, Zygote

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 40.0


@dataclass(frozen=True)
class Ran:
    """What a command has said."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class CommandLine:
    """Runs `bus ...` in a folder, with the address of a server in its environment."""

    def __init__(self, folder: Path, url: str, zygote: Zygote) -> None:
        self._zygote = zygote
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("BUS_APP", "REDIS_URL")},
            "BUS_URL": url,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        self.running: list[Running] = []

    async def start(self, *arguments: str, **environment: str) -> Running:
        """Start a command that goes on until it is told to stop."""
        process = await self._zygote.start(arguments, self.folder, self.environment | environment)
        self.running.append(process)
        return process

    async def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> Ran:
        """Run a command to its end."""
        process = await self.start(*arguments, **environment)
        return await ended(process, stdin)

    async def json(self, *arguments: str, stdin: str = "") -> list[dict[str, Any]]:
        """Run a command that must go well; return what it says as JSON."""
        ran = await self(*arguments, "--json", stdin=stdin)
        assert ran.code == 0, ran
        return ran.lines

    async def close(self) -> None:
        for process in self.running:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()


async def ended(process: Running, stdin: str = "") -> Ran:
    """Wait for the end of a command."""
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate(stdin.encode())
    said = out.decode(), err.decode()
    assert "Traceback (most recent call last)" not in said[1], said[1]
    return Ran(process.returncode or 0, *said)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with an application."""
    shutil.copy(Path(__file__).parent / "shop.py", tmp_path / "shop.py")
    return tmp_path


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What every command is a fork of."""
    with tempfile.TemporaryDirectory() as folder:  # short: paths of sockets have a hundred bytes
        made = Zygote(Path(folder) / "zygote")
        yield made
        made.close()


@pytest.fixture
def command(zygote: Zygote) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in the project's folder: `command("topics", "ls", BUS_URL=url)`."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return zygote.run(arguments, ROOT, {**os.environ, **environment})

    return run


@pytest.fixture
async def cli(shop: Path, valkey_url: str, zygote: Zygote) -> AsyncIterator[CommandLine]:
    """The command line, with an empty server."""
    made = CommandLine(shop, valkey_url, zygote)
    yield made
    await made.close()


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    """A bus on the same server, with the topic declared and recorded."""
    async with Bus.connect(valkey_url, topics=[ORDERS]) as bus:
        await bus.topics.record("order")
        yield bus
