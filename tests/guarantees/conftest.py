"""What the suite runs on, memory beside the servers, and short waits so that it runs quickly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bus.worker import reclaimer, supervisor
from tests.guarantees.backend import Backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What is promised holds everywhere."""
    if isinstance(collector, pytest.Module):
        collector.add_marker("everywhere")


@pytest.fixture
async def backend(url: str) -> AsyncIterator[Backend]:
    """An empty database on each kind of server, and an empty place in memory."""
    backend = Backend(url)
    yield backend
    await backend.close()


@pytest.fixture
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep five times a second instead of once, and pass turns round as fast."""
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.2)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)


@pytest.fixture
def quick_chores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the janitor's chores five times a second instead of twice a minute."""
    monkeypatch.setattr(supervisor, "JANITOR_S", 0.2)
