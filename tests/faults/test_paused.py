"""A worker that stood still while others took its entries wakes up harmless."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Worker
from tests.faults.deeds import LEASE_S, Deed, deeds
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Member, Site

LATE_VERDICTS = {
    "stop": "ack",
    "stop and fail": "park",
    "stop and reject": "dead_letter",
}


async def _owns(site: Site, consumer: str, count: int) -> bool:
    return len(await site.owned_by(consumer)) == count


async def _reported(member: Member, event: str, **having: Any) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [r for r in member.logged(event) if having.items() <= r.items()]

    return (await eventually(found, f"{event} {having}"))[0]


@pytest.mark.parametrize("kind", LATE_VERDICTS)
async def test_a_late_verdict_is_refused_and_the_buffer_is_not_run(
    crew: Crew, site: Site, url: str, kind: str
) -> None:
    """It stops inside its first handler; three more lie in its buffer, delivered and unstarted."""
    gate = asyncio.Event()
    async with Bus.connect(url) as bus:
        await bus.publish_many([Deed(n=0, kind=kind), *(Deed(n=n) for n in (1, 2, 3))])
        # Without on_dead, before which it would ask whether the entry is still its own.
        sleeper = crew.start(url, name="sleeper", settings={"on_dead": None})
        await sleeper.stopped()
        assert await site.owned_by("sleeper") == [p.entry_id for p in await site.pending()]
        handler = deeds(crew.journal, gate=gate)
        async with Worker(bus, [handler], lease_s=LEASE_S, name="heir", grace_s=1.0) as worker:
            await eventually(lambda: _owns(site, "heir", 4))
            await eventually(lambda: len(crew.journal.lines("start")) == 5)
            before = await site.pending()
            sleeper.send(signal.SIGCONT)
            await _reported(sleeper, "delivery.refused", verb=LATE_VERDICTS[kind], count=1)
            await _reported(sleeper, "delivery.dropped", count=3)
            after = await site.pending()
            assert [p[:2] for p in after] == [p[:2] for p in before], "nothing was taken back"
            assert await site.dead() == []
            gate.set()
            await worker.drained()
        sleeper.process.terminate()
        assert await sleeper.ended() == 0
    assert crew.journal.lines("start", sleeper.pid) == [(0, 1)], "none of its buffer was run"
    assert await site.dead() == []
    assert await site.pending() == []


async def test_on_dead_is_not_told_of_what_another_may_be_handling_well(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    gate = asyncio.Event()
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Deed(n=0, kind="stop and reject"))
        sleeper = crew.start(valkey_url, name="sleeper")
        await sleeper.stopped()
        handler = deeds(crew.journal, gate=gate)
        async with Worker(bus, [handler], lease_s=LEASE_S, name="heir", grace_s=1.0) as worker:
            await eventually(lambda: _owns(valkey_site, "heir", 1))
            sleeper.send(signal.SIGCONT)
            await _reported(sleeper, "delivery.dropped", count=1)
            gate.set()
            await worker.drained()
    assert crew.journal.lines("on_dead") == []
    assert await valkey_site.dead() == []


async def test_a_handler_that_hangs_the_loop_loses_its_lease_and_its_verdict(
    crew: Crew, site: Site, url: str
) -> None:
    async with Bus.connect(url) as bus:
        await bus.publish(Deed(n=0, kind="block"))
        hanging = crew.start(url, name="hanging")
        await eventually(lambda: crew.journal.lines("start"))
        gate = asyncio.Event()
        handler = deeds(crew.journal, gate=gate)
        async with Worker(bus, [handler], lease_s=LEASE_S, name="heir", grace_s=1.0) as worker:
            await eventually(lambda: _owns(site, "heir", 1))
            crew.journal.flag("go on").touch()
            await _reported(hanging, "delivery.refused", verb="ack", count=1)
            assert await _owns(site, "heir", 1)
            gate.set()
            await worker.drained()
        hanging.process.terminate()
        assert await hanging.ended() == 0
    assert crew.journal.lines("start")[1:] == [(0, 2)], "the hang used up an attempt"


async def test_what_lay_unread_in_the_socket_is_not_run(crew: Crew, site: Site, url: str) -> None:
    """Stopped while it waits in a read: the server hands it entries that it does not see."""
    async with Bus.connect(url) as bus:
        sleeper = crew.start(url, name="sleeper", lease_s=1.5, settings={"visibility_s": 1.5})
        await sleeper.started()
        published = 0
        while not await site.owned_by("sleeper"):
            # A read that has just ended hands nothing out: then it is let go on, and tried again.
            sleeper.send(signal.SIGCONT)
            await eventually(lambda n=published: len(crew.journal.lines("end")) == n)
            await eventually(lambda: _owns(site, "sleeper", 0))
            await eventually(lambda: _waits_in_a_read(site))
            sleeper.send(signal.SIGSTOP)
            await sleeper.stopped()
            await bus.publish_many([Deed(n=published + n) for n in range(5)])
            published += 5
        ran_before = crew.journal.lines("start", sleeper.pid)
        gate = asyncio.Event()
        handler = deeds(crew.journal, gate=gate)
        async with Worker(bus, [handler], lease_s=LEASE_S, name="heir", grace_s=1.0) as worker:
            await eventually(lambda: _owns(site, "heir", 5))
            sleeper.send(signal.SIGCONT)
            await _reported(sleeper, "delivery.dropped")
            assert await _owns(site, "heir", 5)
            gate.set()
            await worker.drained()
    assert crew.journal.lines("start", sleeper.pid) == ran_before
    assert set(crew.journal.times("end")) == set(range(published))


async def _waits_in_a_read(site: Site) -> bool:
    return any(
        c["cmd"] == "xreadgroup" and "b" in c["flags"] for c in await site.redis.client_list()
    )


TAKING = {
    # what must have gone wrong before it is needed, and what it takes then
    "take_parked": ([Deed(n=0, kind="flaky")], None),
    "take_due": ([Deed(n=0, kind="flaky")], {"point": "park", "moment": "after"}),
    "reclaim": ([Deed(n=0)], {"point": "handler", "moment": "before"}),
    "start": ([Deed(n=0)], {"point": "handler", "moment": "before"}),
    "recover": ([Deed(n=0)], None),
}


@pytest.mark.parametrize("verb", TAKING)
async def test_what_a_script_moved_here_before_the_pause_is_not_run_after_it(
    crew: Crew, valkey_site: Site, valkey_url: str, verb: str
) -> None:
    """The reply of the script is in, or nearly; the entry is taken by another in the meantime."""
    site, url = valkey_site, valkey_url
    events, fault_before = TAKING[verb]
    async with Bus.connect(url) as bus:
        await bus.publish_many(events)
        if fault_before is not None:
            await crew.start(url, **fault_before).killed()
        sleeper = crew.start(
            url,
            name="sleeper",
            point=verb,
            moment="after",
            signal="SIGSTOP",
            lose_reads=1 if verb == "recover" else 0,
        )
        await sleeper.stopped()
        assert await _owns(site, "sleeper", 1)
        gate = asyncio.Event()
        handler = deeds(crew.journal, gate=gate)
        ran_before = crew.journal.lines("start", sleeper.pid)
        async with Worker(bus, [handler], lease_s=LEASE_S, name="heir", grace_s=1.0) as worker:
            await eventually(lambda: _owns(site, "heir", 1))
            await eventually(lambda: len(crew.journal.lines("start")) > len(ran_before))
            sleeper.send(signal.SIGCONT)
            await _reported(sleeper, "delivery.dropped")
            gate.set()
            await worker.drained()
    assert crew.journal.lines("start", sleeper.pid) == ran_before
    assert await site.pending() == []


async def test_the_worker_that_woke_up_works_on(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Deed(n=0, kind="stop"))
        sleeper = crew.start(valkey_url, name="sleeper")
        await sleeper.stopped()
        gate = asyncio.Event()
        gate.set()
        handler = deeds(crew.journal, gate=gate)
        async with Worker(bus, [handler], lease_s=LEASE_S, name="heir", grace_s=1.0) as worker:
            await worker.drained()
        sleeper.send(signal.SIGCONT)
        await bus.publish_many([Deed(n=n) for n in range(1, 50)])
        await eventually(lambda: len(crew.journal.lines("end", sleeper.pid)) == 50)
        await eventually(lambda: _owns(valkey_site, "sleeper", 0))
        sleeper.process.terminate()
        assert await sleeper.ended() == 0
    assert await valkey_site.pending() == []
