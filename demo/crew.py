"""The demo's worker processes: start, kill, stop, and what they said when something went wrong."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bus.worker.program import PARENT_VARIABLE

WORKER_PY = Path(__file__).resolve().parent.parent / "worker.py"

GRACE_S = 2.0  # its handlers take milliseconds
STOP_TIMEOUT_S = GRACE_S + 6.0
LAST_LINES = 30


class WorkerGone(Exception):
    """A worker process ended by itself; the message holds its last words."""


@dataclass(frozen=True, slots=True, eq=False)
class WorkerProcess:
    """One worker process; what it logs goes to a file."""

    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        """Its process id, which is part of its consumer's name."""
        return self.process.pid

    def last_words(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


class Crew:
    """The workers of one demo. An async context manager: none is left when it ends."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.workers: list[WorkerProcess] = []
        self.exit_codes: list[int] = []
        self._directory = tempfile.TemporaryDirectory(prefix="bus-demo-")
        self._logs: list[Path] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            self._directory.cleanup()

    async def hire(self) -> WorkerProcess:
        """Start one more worker; it is not ready yet."""
        log = Path(self._directory.name) / f"worker-{len(self._logs) + 1}.log"
        self._logs.append(log)
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(WORKER_PY), "--url", self.url),
                *("--handlers", "demo.workload", "--log", "json", "--grace-s", str(GRACE_S)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops them
            )
        worker = WorkerProcess(process, log)
        self.workers.append(worker)
        return worker

    async def kill(self, worker: WorkerProcess) -> None:
        """End a worker as a crash would (SIGKILL)."""
        self.workers.remove(worker)
        worker.process.send_signal(signal.SIGKILL)
        await worker.process.wait()

    def freeze(self, worker: WorkerProcess) -> None:
        """Let a worker stand still (SIGSTOP), so that one can look at it."""
        _signal(worker, signal.SIGSTOP)

    def thaw(self, worker: WorkerProcess) -> None:
        """Let it go on."""
        _signal(worker, signal.SIGCONT)

    def emitted(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield what the workers, dead ones too, have logged under a name of the telemetry."""
        for log in self._logs:
            for line in log.read_text(errors="replace").splitlines():
                if f'"event":"{name}"' in line:
                    with suppress(ValueError):  # the last line of the killed may be half a line
                        yield json.loads(line)

    async def all_ready(self) -> bool:
        """Return whether every worker has begun to read. Errors: WorkerGone."""
        self.check()
        return len(list(self.emitted("worker.started"))) >= len(self._logs)

    def check(self) -> None:
        """Raise WorkerGone when a worker has ended by itself."""
        for worker in self.workers:
            code = worker.process.returncode
            if code is not None:
                raise WorkerGone(
                    f"worker {worker.pid} ended with exit code {code}; it said last:\n"
                    f"{worker.last_words()}"
                )

    def last_words(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(f"worker {w.pid} said last:\n{w.last_words()}" for w in self.workers)

    async def stop(self) -> None:
        """Let all workers drain and end (SIGTERM); those that do not are killed."""
        try:
            for worker in self.workers:
                _signal(worker, signal.SIGTERM)
            ends = [asyncio.create_task(worker.process.wait()) for worker in self.workers]
            if ends:
                await asyncio.wait(ends, timeout=STOP_TIMEOUT_S)
        finally:
            self.kill_all()
            while self.workers:
                self.exit_codes.append(await self.workers[-1].process.wait())
                self.workers.pop()

    def kill_all(self) -> None:
        """Kill what is left, without waiting."""
        for worker in self.workers:
            _signal(worker, signal.SIGKILL)


def _signal(worker: WorkerProcess, number: signal.Signals) -> None:
    if worker.process.returncode is None:
        worker.process.send_signal(number)
