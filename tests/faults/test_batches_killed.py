"""Workers that die in the middle of a batch: nothing is lost, and one killer takes nobody along."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from bus import Bus, Worker
from tests.faults.deeds import LEASE_S, MAX_ATTEMPTS, Deed, deeds
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Member, Site

SETTINGS = {"batch": 10, "batch_wait_ms": 50, "concurrency": 2}
KINDS = {3: "flaky", 5: "doomed", 8: "flaky"}
DEEDS = [Deed(n=n, kind=KINDS.get(n, "quick")) for n in range(30)]


@pytest.mark.parametrize(
    ("point", "moment", "nth"),
    [("batch", "before", 2), ("batch", "after", 2), ("ack", "before", 1), ("ack", "after", 1)],
)
async def test_a_kill_in_the_middle_of_a_batch_loses_nothing(
    crew: Crew, site: Site, url: str, point: str, moment: str, nth: int
) -> None:
    async with Bus.connect(url) as bus:
        await bus.publish_many(DEEDS)
        victim = crew.start(
            url, lease_s=0.3, settings=SETTINGS, point=point, moment=moment, nth=nth
        )
        await victim.killed()
        assert all(p.deliveries <= 1 for p in await site.pending()), "a crash changes no count"
        async with Worker(bus, [deeds(crew.journal, **SETTINGS)], lease_s=LEASE_S) as worker:
            await worker.drained()
    assert set(crew.journal.times("end")) == set(range(30)) - {5}
    assert await site.dead_ns() == [5]
    assert await site.pending() == []
    assert max(crew.journal.times("end").values()) <= 2


async def test_one_that_kills_its_worker_in_a_batch_is_found_alone(
    crew: Crew, site: Site, url: str
) -> None:
    """The crash budget: its neighbours are handled, and it ends in the dead letters."""
    killer = 17
    async with Bus.connect(url) as bus:
        await bus.publish_many(
            [Deed(n=n, kind="killer" if n == killer else "bystander") for n in range(60)]
        )
        settings = {"batch": 60, "batch_wait_ms": 50, "concurrency": 4}
        deaths = 0
        member = crew.start(url, settings=settings)
        while not await site.dead():
            await eventually(lambda m=member: _ended_or_dead(m, site))
            if member.process.poll() is not None:
                deaths += 1
                assert deaths < 10
                member = crew.start(url, settings=settings)
        assert len(crew.journal.lines("start")) >= 60, "they were all in one batch"
        await eventually(lambda: _nothing_pending(site))
        member.send(signal.SIGTERM)
        assert await member.ended() == 0
    (letter,) = await site.dead()
    assert letter["deadreason"] == b"crashed"
    assert await site.dead_ns() == [killer]
    assert set(crew.journal.times("end")) == set(range(60)) - {killer}
    assert crew.journal.times("start")[killer] == MAX_ATTEMPTS + 1 == deaths


async def _ended_or_dead(member: Member, site: Site) -> bool:
    return member.process.poll() is not None or bool(await site.dead())


async def _nothing_pending(site: Site) -> bool:
    return not await site.pending()
