"""Whatever one part raises as it is closed, the others are closed, too."""

from __future__ import annotations

import asyncio

import pytest

from bus import Bus
from bus.closing import close_all


async def test_all_are_closed_in_rounds_and_the_error_is_raised_in_the_end() -> None:
    closed: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(0)
        closed.append("slow")

    def breaks() -> None:
        raise ZeroDivisionError

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(ZeroDivisionError):
        await close_all([breaks, slow], [lambda: closed.append("plain")], [], [slow])
    assert closed == ["slow", "plain", "slow"]
    with pytest.raises(asyncio.CancelledError):
        await close_all([cancelled], [slow])
    assert closed[3:] == ["slow"]


async def test_one_alone_is_closed_in_the_task_that_asks() -> None:
    async def whose() -> None:
        tasks.append(asyncio.current_task())

    tasks: list[asyncio.Task[None] | None] = []
    await close_all([whose])
    assert tasks == [asyncio.current_task()]


async def test_a_bus_closes_its_connection_whatever_one_part_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = Bus.connect("memory://")
    await bus.ready()

    async def breaks() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bus._line, "close", breaks)
    with pytest.raises(ZeroDivisionError):
        await bus.close()
    assert bus.store.commands._closed
