"""A limit on dead letters parks what would die; nothing is ever dropped for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bus import Backoff, DeclarationError, Delivery, Reject, Worker, event_handler
from bus.delivery import DeadLettered, Park
from bus.worker import settler
from tests.guarantees.events import STREAM, Made
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.guarantees.backend import Backend

DEAD = f"{STREAM}:dead:g"


async def test_what_finds_the_dead_letters_full_waits_and_is_told(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settler, "_NO_ROOM", Park(0.2, reason="the dead letters are full"))
    attempts: list[tuple[int, int]] = []

    @event_handler(Made, group="g", dead_letter_maxlen=3, backoff=Backoff(base_s=0.01))
    async def refuse(event: Made, delivery: Delivery[Made]) -> None:
        attempts.append((event.n, delivery.attempt))
        raise Reject("no")

    async with backend.bus() as (bus, witness), Worker(bus, [refuse]) as worker:
        await bus.publish_many([Made(n=n) for n in range(5)])
        await eventually(lambda: witness.total("dead_letters.full") >= 2)
        assert len(await backend.dead(STREAM, "g")) == 3
        told = witness.of("dead_letters.full")[0]
        assert (told["group"], told["maxlen"]) == ("g", 3)
        postponed = witness.of("delivery.postponed", reason="the dead letters are full")
        assert {t["entry_id"] for t in postponed} <= set(await backend.entries(STREAM))
        assert len(await backend.pending(STREAM, "g")) == 2
        await eventually(lambda: len(attempts) > 7)  # tried again, and still no room
        assert len(await backend.dead(STREAM, "g")) == 3
        assert {a for _, a in attempts} == {1}, "waiting for room uses up no attempt"
        await backend.redis.xtrim(DEAD, maxlen=0, approximate=False)
        await worker.drained()
    assert len(await backend.dead(STREAM, "g")) == 2
    assert await backend.pending(STREAM, "g") == []


async def test_on_dead_is_told_once_of_what_waits_for_room(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again about once a minute for as long as nobody looks at the dead letters."""
    monkeypatch.setattr(settler, "_NO_ROOM", Park(0.1, reason="the dead letters are full"))
    told: list[int] = []

    async def tell(dead: DeadLettered, bus: object) -> None:
        told.append(dead.event.n)

    @event_handler(Made, group="g", dead_letter_maxlen=1, on_dead=tell)
    async def refuse(event: Made) -> None:
        raise Reject("no")

    async with backend.bus() as (bus, witness), Worker(bus, [refuse]) as worker:
        await bus.publish_many([Made(n=n) for n in range(2)])
        await eventually(lambda: witness.total("dead_letters.full") >= 3)
        await backend.redis.xtrim(DEAD, maxlen=0, approximate=False)
        await worker.drained()
    assert sorted(told) == [0, 1]
    assert len(await backend.dead(STREAM, "g")) == 1


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(DeclarationError, match="handler g: dead_letter_maxlen must be a whole"):
        event_handler(Made, group="g", dead_letter_maxlen=limit)  # type: ignore[arg-type]
