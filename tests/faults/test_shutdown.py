"""Workers come and go in good order while events stream in: every entry is handled exactly once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bus import Bus
from tests.faults.deeds import GROUP, STREAM, Deed
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Site


async def test_a_rolling_restart_under_load_handles_everything_exactly_once(
    crew: Crew, site: Site, url: str
) -> None:
    """Three workers are replaced by three others, one by one; no lease may run out meanwhile."""
    stop = asyncio.Event()
    published = 0

    async def publish() -> None:
        nonlocal published
        while not stop.is_set():
            await bus.publish_many([Deed(n=published + n, kind="nap") for n in range(20)])
            published += 20
            await eventually(lambda n=published: len(crew.journal.lines("end")) > n - 200)

    async with Bus.connect(url) as bus:
        old = [crew.start(url, stock=True) for _ in range(3)]
        for member in old:
            await member.started()
        publishing = asyncio.create_task(publish())
        for member in old:
            heir = crew.start(url, stock=True)
            await heir.started()
            await eventually(lambda m=member: crew.journal.lines("end", m.pid))
            member.process.terminate()
            assert await member.ended() == 0, member.output()
            await eventually(lambda h=heir: crew.journal.lines("end", h.pid))
        stop.set()
        await publishing
        await eventually(lambda: set(crew.journal.times("end")) == set(range(published)))
        await eventually(lambda: _drained(site))
    assert sorted(crew.journal.lines("end")) == [(n, 1) for n in range(published)]
    assert sorted(crew.journal.lines("start")) == [(n, 1) for n in range(published)]
    for member in old:
        (told,) = member.logged("worker.stopped")
        assert told["cancelled"] == 0
    names = await site.backend.consumers(STREAM, GROUP)
    assert len({n for n in names if not n.startswith("parked:")}) == 3, "the old ones left"


async def _drained(site: Site) -> bool:
    return not await site.pending()
