"""How fast replays and redrives go, and how often what fails is asked again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus import DeclarationError, ServerRefused, ServerUnreachable
from bus.history.patience import patiently
from bus.history.throttle import Throttle
from bus.streams.connection import ConnectionLost
from bus.streams.replies import ReplyError


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeps are noted, and take no time."""
    pauses: list[float] = []
    plain = asyncio.sleep

    async def note(delay_s: float) -> None:
        pauses.append(delay_s)
        await plain(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return pauses


@pytest.mark.parametrize(
    ("rate", "most"), [(None, 500), (1, 1), (0.5, 1), (100, 10), (3_000, 300), (1e6, 500)]
)
def test_a_step_is_a_tenth_of_a_second(rate: float | None, most: int) -> None:
    assert Throttle(rate).most == most


@pytest.mark.parametrize("rate", [0, -1, "5", True, float("nan"), float("inf")])
def test_bad_rates_are_refused(rate: Any) -> None:
    with pytest.raises(DeclarationError, match="rate must be a number"):
        Throttle(rate)


async def test_the_rate_is_kept_on_the_whole(slept: list[float]) -> None:
    """Each pause is until the next batch is due, counted from the beginning."""
    throttle = Throttle(100)
    for _ in range(5):
        await throttle.passed(10)
    # As if no time had passed: the n-th batch is due after n tenths of a second.
    assert slept == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.05)


async def test_without_a_rate_nothing_waits(slept: list[float]) -> None:
    for _ in range(5):
        await Throttle(None).passed(1_000_000)
    assert slept == []


async def test_pauses_for_room_grow_until_something_passed(slept: list[float]) -> None:
    throttle = Throttle(None)
    for _ in range(10):
        await throttle.no_room()
    assert slept[:4] == [0.01, 0.02, 0.04, 0.08]
    assert slept[-1] == 1.0
    await throttle.passed(1)
    await throttle.no_room()
    assert slept[-1] == 0.01


async def test_what_was_missed_while_waiting_is_not_made_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    slept: list[float] = []

    async def pass_by(delay_s: float) -> None:
        nonlocal now
        slept.append(delay_s)
        now += delay_s

    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    monkeypatch.setattr(asyncio, "sleep", pass_by)
    throttle = Throttle(10)
    await throttle.passed(1)
    now += 3_600  # no room for an hour
    for _ in range(20):
        await throttle.passed(1)
    assert sum(slept) == pytest.approx(2.0, abs=0.2)


async def test_what_time_heals_is_asked_again_and_told() -> None:
    errors = [ConnectionLost("cut", sent=True), ReplyError("LOADING", "LOADING ..."), None]
    told: list[BaseException] = []

    async def ask() -> str:
        error = errors.pop(0)
        if error is not None:
            raise error
        return "answer"

    assert await patiently(ask, told=told.append) == "answer"
    assert [type(e) for e in told] == [ConnectionLost, ReplyError]


async def test_other_errors_are_not_asked_again() -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        raise ReplyError("NOPERM", "NOPERM ...")

    with pytest.raises(ReplyError):
        await patiently(ask)
    assert asked == 1


async def test_patience_ends() -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        raise ConnectionLost("cut", sent=False)

    with pytest.raises(ServerUnreachable, match="cut"):
        await patiently(ask, 0.2)
    assert asked > 1


async def test_a_server_that_refuses_to_the_end_is_named_with_a_remedy() -> None:
    async def ask() -> None:
        raise ReplyError("OOM", "OOM command not allowed ...")

    with pytest.raises(ServerRefused, match="raise maxmemory") as refused:
        await patiently(ask, 0.1)
    assert refused.value.code == "OOM"
