"""A bus on an empty default server, a witness of it, and the server seen from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bus import Bus
from tests.guarantees.backend import Backend
from tests.witness import Witness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def backend(valkey_url: str) -> AsyncIterator[Backend]:
    backend = Backend(valkey_url)
    yield backend
    await backend.close()


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


@pytest.fixture
def witness(bus: Bus) -> Witness:
    return Witness(bus)
