from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from tests.handlers.application import KeepingBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Any]:
    """A client of an empty database."""
    async with Redis.from_url(valkey_url) as client:
        yield client


@pytest.fixture
def bus(redis: Any) -> KeepingBus:
    return KeepingBus(redis)
