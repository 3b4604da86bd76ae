"""A worker as a program: signals, exit codes, and several processes under one parent.

Exit codes: 0 drained, 1 failed, 2 usage or declaration, 69 server unreachable, 130 second signal.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bus.config import GRACE_S, checked_number
from bus.errors import BusError, DeclarationError, ServerUnreachable
from bus.handler import Registry
from bus.telemetry import Telemetry
from bus.worker.supervisor import Worker, WorkersBus

DRAINED, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 69, 130

PARENT_VARIABLE = (
    "BUS_WORKER_PARENT"  # pid of the process that started us and wants us to end with it
)
_RESTART_FIRST_S, _RESTART_MAX_S, _LIVED_WELL_S = 0.5, 30.0, 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What a worker program is told; the fields are the command line's."""

    url: str | None = None
    handlers: str = "handlers"
    only: tuple[str, ...] = ()
    concurrency: int | None = None
    processes: int = 1
    grace_s: float = GRACE_S
    log: Literal["json", "text"] = "text"

    def __post_init__(self) -> None:
        checked_number(self.processes, "processes", 1, 1_000, whole=True)


async def preflight(bus: WorkersBus, options: Options) -> int:
    """Collect the handlers and check the server as a worker would, and start nothing.

    Returns the exit code that every process would end with, 0 if they can start.
    """
    try:
        _worker(bus, options)
        await bus.ready()
    except BusError as error:
        return _code_of(error)
    return DRAINED


def _code_of(error: BusError) -> int:
    """Log what ended the program, and return its exit code."""
    log = logging.getLogger("bus")
    if isinstance(error, DeclarationError):
        log.error("%s", error)
        return USAGE
    if isinstance(error, ServerUnreachable):
        log.error("%s", error)
        return UNREACHABLE
    log.error("%s: %s", type(error).__name__, error)
    return FAILED


def _worker(bus: WorkersBus, options: Options) -> Worker:
    return Worker(
        bus,
        Registry.collect(options.handlers),
        only=options.only,
        concurrency=options.concurrency,
        grace_s=options.grace_s,
    )


async def serve(bus: WorkersBus, options: Options) -> int:
    """Run a worker until SIGTERM or SIGINT has drained it; return the exit code.

    A second signal ends the process at once with 130; the leases do the rest.
    """
    log = logging.getLogger("bus")
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[str] = loop.create_future()

    def on_signal(name: str) -> None:
        if asked.done():
            log.warning("second %s: stopping at once", name)
            logging.shutdown()
            os._exit(INTERRUPTED)
        asked.set_result(name)

    # Before anything is read: a signal must find its handler from the first entry on.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)
    orphaned = asyncio.create_task(_orphaned())
    try:
        worker = _worker(bus, options)
        starting = asyncio.create_task(worker.start())
        either: set[asyncio.Future[Any]] = {starting, asked}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # a signal while it starts: nothing has been read
            starting.cancel()
            await asyncio.wait({starting})
            return DRAINED
        await starting
        broke = asyncio.create_task(worker.wait())
        ends: set[asyncio.Future[Any]] = {asked, broke, orphaned}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        reason = asked.result() if asked.done() else "broken" if broke.done() else "parent is gone"
        await worker.stop(reason)
        if worker.stuck:  # the event loop would wait for it for ever
            log.error("a handler ignores its cancellation: leaving it behind")
            logging.shutdown()
            os._exit(FAILED)
        if broke.done():
            await broke
        broke.cancel()
    except BusError as error:
        return _code_of(error)
    except Exception:
        log.exception("the worker failed")
        return FAILED
    finally:
        orphaned.cancel()
    return DRAINED


async def _orphaned() -> None:
    """Return when the parent that started this process is gone; never if there is none."""
    parent = os.environ.get(PARENT_VARIABLE)
    while parent is None or os.getppid() == int(parent):  # noqa: ASYNC110 - nothing tells us
        await asyncio.sleep(1.0)


async def supervise(  # noqa: C901 - the life of a process is told in one place
    command: Sequence[str], processes: int, telemetry: Telemetry
) -> int:
    """Run `command` in `processes` processes until a signal; start those that die again.

    A process that dies is restarted after 0.5 s, doubling up to 30 s; one that lived for a
    minute starts at 0.5 s again. Exit code 2 (declaration) ends them all: a restart cannot help.
    Returns the worst exit code of the processes.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    running: set[asyncio.subprocess.Process] = set()

    def on_signal(number: signal.Signals) -> None:
        stopping.set()
        for child in running:
            if child.returncode is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)

    async def keep_one() -> int:
        delay_s = _RESTART_FIRST_S
        while True:
            started = loop.time()
            child = await asyncio.create_subprocess_exec(
                *command,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )
            running.add(child)
            if stopping.is_set():
                child.terminate()
            code = await child.wait()
            running.discard(child)
            if stopping.is_set() or code == USAGE:
                if code == USAGE:
                    on_signal(signal.SIGTERM)
                return code
            if loop.time() - started >= _LIVED_WELL_S:
                delay_s = _RESTART_FIRST_S
            telemetry.emit("process.restarted", pid=child.pid, exit_code=code, delay_s=delay_s)
            try:
                async with asyncio.timeout(delay_s):
                    await stopping.wait()
                return code
            except TimeoutError:
                delay_s = min(delay_s * 2, _RESTART_MAX_S)

    codes = await asyncio.gather(*(keep_one() for _ in range(processes)))
    # A child that had not installed its handlers yet ends by our signal itself: drained, too.
    ours = (-signal.SIGTERM, -signal.SIGINT)
    codes = [DRAINED if c in ours else c for c in codes]
    return USAGE if USAGE in codes else max(abs(c) for c in codes)


def child_command(program: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the command of one process: the same arguments with `--processes 1` behind them.

    program: what comes behind the interpreter.
    """
    return [sys.executable, *program, *arguments, "--processes", "1"]
