from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from handlers.services import DocumentService
from tests.handlers.application import connect, prepare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Bus


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    """A bus on an empty database."""
    async with connect(valkey_url) as bus:
        yield bus


@pytest.fixture
def redis(bus: Bus) -> Any:
    """Its client."""
    return bus.redis


@pytest.fixture
async def documents(bus: Bus) -> DocumentService:
    """Documents that can be created in the dataset `DATASET`; no event has been published yet."""
    await prepare(bus)
    return DocumentService(bus)
