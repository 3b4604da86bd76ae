"""Crews on servers of every kind, and sweeps that do not make a test wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bus.worker import reclaimer
from tests.faults.crew import Crew, Site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep ten times a second in this process, as the crew's programs do in theirs."""
    monkeypatch.setattr(reclaimer, "SWEEP_S", 0.1)
    monkeypatch.setattr(reclaimer, "SWEEP_LEASE_MS", 400)


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path)
    yield crew
    crew.end()


@pytest.fixture
async def site(url: str) -> AsyncIterator[Site]:
    """On each kind of server."""
    site = Site(url)
    yield site
    await site.backend.close()


@pytest.fixture
async def valkey_site(valkey_url: str) -> AsyncIterator[Site]:
    """On the default server alone."""
    site = Site(valkey_url)
    yield site
    await site.backend.close()
