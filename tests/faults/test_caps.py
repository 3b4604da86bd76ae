"""Workers are killed while publishers wait at a small cap: nothing that was published is lost."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from bus import Bus, Topic
from tests.faults.deeds import STREAM, Deed, Journal
from tests.witness import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.crew import Crew, Member, Site

TOTAL, MAXLEN = 200, 30
GROUPS = ("one", "two")


class Shift:
    """The workers of one group: one is killed and replaced, again and again."""

    def __init__(self, crew: Crew, url: str, group: str) -> None:
        folder = crew.folder / group
        folder.mkdir()
        self.journal = Journal(folder)
        self._crew, self._url, self._folder = crew, url, folder
        # A kill costs what was running an attempt: here none may be the last.
        self._settings = {"group": group, "max_attempts": 100, "concurrency": 4}

    def start(self) -> Member:
        return self._crew.start(
            self._url, folder=str(self._folder), settings=self._settings, lease_s=0.4
        )

    def done(self) -> set[int]:
        return set(self.journal.times("end"))

    async def work(self, kills: int) -> None:
        """Kill a worker whenever it has done some more, then let the last one finish."""
        for turn in range(1, kills + 1):
            member = self.start()
            enough = turn * TOTAL // (kills + 2)
            await eventually(lambda n=enough: len(self.done()) >= n, f"{enough} deeds done", 60)
            member.send(signal.SIGKILL)
            await member.killed()
        last = self.start()
        await eventually(lambda: len(self.done()) == TOTAL, "all deeds done", 60)
        last.process.terminate()
        assert await last.ended() == 0


async def test_whatever_workers_are_killed_every_receipt_is_handled_by_every_group(
    crew: Crew, site: Site, url: str, tmp_path: Path
) -> None:
    topic = Topic("deed", maxlen=MAXLEN, keep=3)
    lengths: list[int] = []

    async def publisher(base: int) -> list[str]:
        async with Bus.connect(url, topics=[topic], publish_timeout_s=50) as bus:
            receipts = []
            for start in range(base, base + TOTAL // 4, 10):
                events = [Deed(n=n, kind="nap") for n in range(start, start + 10)]
                receipts += await asyncio.gather(*map(bus.publish, events[:5]))
                receipts += await bus.publish_many(events[5:])
                lengths.append(await site.redis.xlen(STREAM))
            return [r.entry_id for r in receipts]

    for group in GROUPS:
        await site.redis.xgroup_create(STREAM, group, "0", mkstream=True)
    shifts = [Shift(crew, url, group) for group in GROUPS]
    published, *_ = await asyncio.gather(
        asyncio.gather(*(publisher(base) for base in range(0, TOTAL, TOTAL // 4))),
        *(shift.work(kills) for shift, kills in zip(shifts, (2, 1), strict=True)),
    )
    assert len({i for ids in published for i in ids}) == TOTAL
    for shift, group in zip(shifts, GROUPS, strict=True):
        assert shift.done() == set(range(TOTAL)), f"every receipt was handled by {group}"
        assert await site.backend.pending(STREAM, group) == []
        assert await site.backend.dead(STREAM, group) == []
    assert max(lengths) <= MAXLEN
    assert len(await site.backend.entries(STREAM)) <= MAXLEN
