"""The benchmark runs, checks its counts, and writes what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("test", "keys"),
    [
        ("sleep", {"consume_sleep_1ms_c100"}),
        ("many", {"publish_many"}),
        ("latency", {"latency_p50_ms_at_1k", "latency_p99_ms_at_1k"}),
    ],
)
def test_it_writes_what_it_has_measured(tmp_path: Path, test: str, keys: set[str]) -> None:
    """Whether the targets are met (0 or 1) is no question for a machine that runs tests."""
    file = tmp_path / "figures.json"
    asked = ["--quick", "--rounds", "1", "--only", test, "--json", str(file)]
    ran = subprocess.run(
        [sys.executable, "-m", "bench", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stderr
    assert "bus" in ran.stdout
    systems = json.loads(file.read_text())["systems"]
    assert set(systems) == {"bus", "bare-redis-py", "bare-hiredis"}
    for figures in systems.values():
        assert set(figures) == keys
        assert all(value > 0 for value in figures.values())


def own(system: str) -> dict[str, float]:
    """Run what needs no server, of `make bench-own`; its counts are checked there."""
    asked = [system, "local", "--count", "20000"]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.own_child", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


def test_telling_ten_observers_costs_under_5_us_each() -> None:
    """A tenth of that on a machine that does nothing else."""
    figures = own("observers")
    assert 0 < figures["tell_us"] < 5
    assert figures["tell_us"] < figures["seen_us"]


def test_creating_an_event_is_not_slower_than_a_frozen_slotted_dataclass() -> None:
    """It takes a third of the time."""
    figures = own("creation")
    assert 0 < figures["event_us"] <= figures["dataclass_us"]
    assert figures["bytes"] <= 72
