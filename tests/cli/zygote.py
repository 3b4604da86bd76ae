"""Processes of the command line that need not import everything again.

One process imports `bus` and all it may need; each command is a fork of it, with streams, folder,
environment and arguments of its own. What a command does at its very start, before `main`, is
tested with `python -m bus` in `test_app.py` and `test_stdio.py`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]


# --- in the process that is forked


def preload() -> None:
    for module in pkgutil.iter_modules([str(ROOT / "bus" / "cli")]):
        importlib.import_module(f"bus.cli.{module.name}")
    for name in (
        "bus.bus",
        "bus.launcher",
        "uvloop",
        "rich.console",
        "rich.table",
        "rich.progress",
    ):
        importlib.import_module(name)


def serve(listener: socket.socket) -> None:
    """Fork a process for each request, and say how it ended; until stdin ends."""
    woken, wakes = os.pipe()
    for fd in (woken, wakes):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    waiting: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, woken, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        if woken in ready:
            os.read(woken, 1024)
            while waiting:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with waiting.pop(pid) as asker, contextlib.suppress(OSError):
                    asker.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        if listener in ready:
            asker, _ = listener.accept()
            text, fds = _received(asker)
            pid = os.fork()
            if not pid:
                _become(json.loads(text), fds)
            for fd in fds:
                os.close(fd)
            waiting[pid] = asker
            asker.sendall(f"{pid}\n".encode())


def _received(asker: socket.socket) -> tuple[bytes, list[int]]:
    fds = array.array("i")
    text, ancillary, _, _ = asker.recvmsg(1 << 20, socket.CMSG_SPACE(3 * fds.itemsize))
    for _, _, data in ancillary:
        fds.frombytes(data)
    while not text.endswith(b"\n"):
        text += asker.recv(1 << 20)
    return text, list(fds)


def _become(asked: dict[str, Any], fds: list[int]) -> None:
    """Be the process that was asked for; never returns."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for fd, own in enumerate(fds):
            os.dup2(own, fd)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.argv[1:] = asked["arguments"]
        found = [asked["folder"], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        sys.path[:0] = filter(None, found)
        sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
        code = importlib.import_module("bus.__main__").main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(code)


# --- in the tests


class Running:
    """A command that runs; to be used as `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, told: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.stdin: asyncio.StreamWriter
        self.stdout = asyncio.StreamReader(1 << 26)
        self.stderr = asyncio.StreamReader(1 << 26)
        self._writer = writer
        self._ended = asyncio.ensure_future(told.readline())

    @property
    def returncode(self) -> int | None:
        return int(self._ended.result()) if self._ended.done() else None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def wait(self) -> int:
        code = int(await asyncio.shield(self._ended))
        self._writer.close()
        return code

    async def communicate(self, said: bytes = b"") -> tuple[bytes, bytes]:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.stdin.write(said)
            await self.stdin.drain()
        self.stdin.close()
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return out, err


class Zygote:
    """The process that is forked; one for all the tests of a session."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.zygote", str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._process.communicate()

    def _ask(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        fds: Sequence[int],
    ) -> socket.socket:
        asker = socket.socket(socket.AF_UNIX)
        asker.connect(str(self._path))
        asked = {"arguments": arguments, "folder": str(folder), "environment": environment}
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        text = json.dumps(asked).encode() + b"\n"
        sent = asker.sendmsg([text], [rights])
        asker.sendall(text[sent:])
        for fd in fds:
            os.close(fd)
        return asker

    async def start(
        self, arguments: Sequence[str], folder: Path, environment: dict[str, str]
    ) -> Running:
        """Start a command with pipes for its streams."""
        loop = asyncio.get_running_loop()
        (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = (
            os.pipe() for _ in range(3)
        )
        asker = self._ask(arguments, folder, environment, (stdin, stdout, stderr))
        told, writer = await asyncio.open_unix_connection(sock=asker)
        running = Running(int(await told.readline()), told, writer)
        pipe = os.fdopen(to_stdin, "wb", 0)
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop=loop), pipe
        )
        running.stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        for fd, reader in ((from_stdout, running.stdout), (from_stderr, running.stderr)):
            await loop.connect_read_pipe(
                lambda reader=reader: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
            )
        return running

    def run(
        self, arguments: Sequence[str], folder: Path, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that nobody types into to its end."""
        null = os.open(os.devnull, os.O_RDONLY)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            fds = (null, os.dup(out.fileno()), os.dup(err.fileno()))
            with self._ask(arguments, folder, environment, fds) as asker:
                asker.settimeout(60)
                _, code = asker.makefile()
            said = [file.seek(0) or file.read().decode() for file in (out, err)]
        return subprocess.CompletedProcess(arguments, int(code), *said)


if __name__ == "__main__":
    preload()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen(64)
        os.write(1, b"ready\n")
        serve(listening)
