"""Workers that die in the middle of an outage: what they did about it may be half done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bus import Bus
from tests.faults.deeds import Deed
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Site

SETTINGS = {
    "breaker": {"min_calls": 10, "window_s": 1.0, "probe_s": 0.1},
    "max_attempts": 3,
}


@pytest.mark.parametrize(
    ("point", "moment"),
    [("refund", "before"), ("refund", "after"), ("park", "after"), ("", "")],
)
async def test_a_worker_killed_while_open_loses_nothing(
    crew: Crew, site: Site, url: str, point: str, moment: str
) -> None:
    """A refund that did not arrive costs an attempt, and no more."""
    async with Bus.connect(url) as bus:
        await bus.publish_many([Deed(n=n, kind="call") for n in range(30)])
        victim = crew.start(url, settings=SETTINGS, point=point, moment=moment)
        if point:
            await victim.killed()
        else:
            await eventually(lambda: len(victim.logged("breaker.probed")) >= 2)
            victim.process.kill()
            await victim.ended()
        assert all(p.deliveries <= 2 for p in await site.pending())
        crew.journal.flag("service is up").touch()
        crew.start(url, settings=SETTINGS)
        await eventually(lambda: set(crew.journal.times("end")) == set(range(30)))
        await eventually(lambda: _drained(site))
        assert await site.dead() == []


async def _drained(site: Site) -> bool:
    return not await site.pending()
