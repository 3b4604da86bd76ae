"""Worker processes of a test, and what it sees of the server they work on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.deeds import CANARY, GROUP, PASSWORD, STREAM, Journal
from tests.guarantees.backend import Backend, Pending
from tests.witness import eventually

ROOT = Path(__file__).resolve().parents[2]


class Crew:
    """Starts processes of a program and ends them all. All output goes to files, and is checked."""

    def __init__(self, folder: Path, program: str = "tests.faults.program") -> None:
        self.folder = folder
        self.program = program
        self.journal = Journal(folder)
        self._members: list[Member] = []

    def start(self, url: str, **wish: Any) -> Member:
        member = Member(self.program, url, self.folder, len(self._members), wish)
        self._members.append(member)
        return member

    def end(self) -> None:
        """Kill what is left, and look for what must not be in a log."""
        for member in self._members:
            member.process.kill()  # a stopped process dies of this too
            member.process.wait()
        for member in self._members:
            text = member.output()
            assert CANARY not in text, "a payload is in the log"
            assert PASSWORD not in text, "a password is in the log"
            assert "Traceback" not in text, text
            assert "was destroyed" not in text, text


class Member:
    """One process."""

    def __init__(
        self, program: str, url: str, folder: Path, number: int, wish: dict[str, Any]
    ) -> None:
        self._path = folder / f"output-{number}"
        wish = {"url": url, "folder": str(folder), **wish}
        with self._path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", program, json.dumps(wish)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def output(self) -> str:
        return self._path.read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log records of an event so far; an unfinished last line does not count."""
        lines = self.output().split("\n")[:-1]
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return [r for r in records if r["event"] == event]

    async def started(self) -> None:
        await eventually(lambda: self.logged("worker.started"), f"started: {self.output()}")

    async def killed(self) -> None:
        """Wait until it has killed itself at its failpoint."""
        await eventually(lambda: self.process.poll() is not None, "it never came to its failpoint")
        assert self.process.returncode == -signal.SIGKILL, self.output()

    def stands(self) -> bool:
        """Whether it stands still; not one that was ended and is not yet waited for."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    async def stopped(self) -> None:
        """Wait until it stands still, by its own SIGSTOP or another's."""
        await eventually(self.stands, "it never stood still")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def ended(self) -> int:
        """Wait for its end and return the exit code."""
        await eventually(lambda: self.process.poll() is not None, "it never ended")
        return int(self.process.returncode)


class Site:
    """The stream that the crew works on."""

    def __init__(self, url: str) -> None:
        self.backend = Backend(url)
        self.redis = self.backend.redis

    async def pending(self) -> list[Pending]:
        if not await self.redis.exists(STREAM):
            return []
        return await self.backend.pending(STREAM, GROUP)

    async def dead(self) -> list[dict[str, bytes]]:
        return await self.backend.dead(STREAM, GROUP)

    async def dead_ns(self) -> list[int]:
        """The n of every dead letter."""
        return sorted(json.loads(letter["data"])["n"] for letter in await self.dead())

    async def owned_by(self, consumer: str) -> list[str]:
        return [p.entry_id for p in await self.pending() if p.owner == consumer]
