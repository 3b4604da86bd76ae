"""Programs that were started without standard streams, as some daemons are, or with odd ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bus.embedded import EmbeddedServer

ROOT = Path(__file__).parent.parent
SHOP = ROOT / "tests" / "cli"


@pytest.fixture(scope="module")
def url():
    with EmbeddedServer() as server:
        yield server.url


def ran(url: str, line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell; `$bus` is the command."""
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("$bus", '"$python" -m bus')],
        cwd=SHOP,
        env={
            **os.environ,
            "BUS_URL": url,
            "python": sys.executable,
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        timeout=60,
        check=False,
    )


EVENT = """'{"order_id":"o-1","cents":1}'"""


@pytest.mark.parametrize("closed", ["<&-", "<&- 2>&-", "2>&-", "<&- >/dev/null 2>&-"])
def test_a_command_without_streams_does_its_work(url, closed):
    def count() -> int:
        return len(ran(url, "$bus history order").stdout.splitlines())

    before = count()
    assert ran(url, f"$bus publish order.paid {EVENT} --app shop {closed}").returncode == 0
    assert count() == before + 1


def test_what_cannot_be_written_is_an_error_and_said_once(url):
    ran(url, f"$bus publish order.paid {EVENT} --app shop")
    found = ran(url, "$bus history order >&-")
    assert found.returncode == 1
    assert found.stderr.decode().splitlines() == ["error: [Errno 9] Bad file descriptor"]
    full = ran(url, "$bus history order >/dev/full")
    assert full.returncode == 1
    assert full.stderr.decode().splitlines() == ["error: [Errno 28] No space left on device"]


@pytest.mark.parametrize("source", ["/dev/null", "/dev/zero"])
def test_what_is_no_pipe_is_read_all_the_same(url, source):
    take = "" if source == "/dev/null" else "--lines"
    found = ran(url, f"$bus publish order.paid - {take} --app shop <{source}")
    assert found.returncode in (1, 2)
    assert b"Traceback" not in found.stderr
    said = b"Input data was truncated" if source == "/dev/null" else b"line 1 of stdin is too long"
    assert said in found.stderr


def test_no_lines_are_no_events(url):
    found = ran(url, "$bus publish order.paid - --lines --app shop --json </dev/null")
    assert (found.returncode, found.stdout) == (0, b"")


@pytest.mark.parametrize("start", ["$bus worker shop", '"$python" worker.py --handlers shop'])
def test_a_worker_without_streams_runs_and_drains(url, start, tmp_path):
    python = f"cd '{ROOT}'; export PYTHONPATH='{SHOP}'; " if "worker.py" in start else ""
    line = start.replace("$bus", '"$python" -m bus')
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"{python}exec {line} <&- >&- 2>&-"],
        cwd=SHOP,
        env={
            **os.environ,
            "BUS_URL": url,
            "python": sys.executable,
            "PYTHONPATH": str(ROOT),
        },
    )
    try:
        deadline = time.monotonic() + 30
        while b'"served":true' not in ran(url, "$bus groups ls receipts --json").stdout:
            assert process.poll() is None, process.returncode
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
