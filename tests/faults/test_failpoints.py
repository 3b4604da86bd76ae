"""kill -9 of a worker at any point of an entry's life loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Worker
from tests.faults.deeds import GROUP, LEASE_S, MAX_ATTEMPTS, STREAM, Deed, deeds
from tests.witness import eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Site

KINDS = {3: "flaky", 5: "doomed", 8: "flaky"}
DEEDS = [Deed(n=n, kind=KINDS.get(n, "quick")) for n in range(12)]
DOOMED = [5]

# What must have gone wrong before a verb is needed at all.
ORPHANS: dict[str, Any] = {"point": "handler", "moment": "before", "nth": 2}
LANES: dict[str, Any] = {"point": "park", "moment": "after", "nth": 1}
FIRST_FAULT = {"reclaim": ORPHANS, "start": ORPHANS, "take_due": LANES}
SETTINGS = {"recover": {"lose_reads": 1}}

POINTS = [
    *(("read", m) for m in ("before", "after")),
    *(("handler", m) for m in ("before", "after")),
    *(("ack", m) for m in ("before", "after")),
    *(("park", m) for m in ("before", "after")),
    *(("take_parked", m) for m in ("before", "after")),
    *(("take_due", m) for m in ("before", "after")),
    *(("reclaim", m) for m in ("before", "after")),
    *(("start", m) for m in ("before", "after")),
    *(("recover", m) for m in ("before", "after")),
    *(("on_dead", m) for m in ("before", "after")),
    *(("dead_letter", m) for m in ("before", "after")),
    *(("renew", m) for m in ("before", "after")),
]
VICTIM_LEASE_S = 0.3  # what is waited for after each kill
SMOKE = [("handler", "after"), ("park", "after"), ("start", "after"), ("dead_letter", "after")]


async def run_case(crew: Crew, site: Site, url: str, point: str, moment: str, **wish: Any) -> None:
    async with Bus.connect(url) as bus:
        await bus.publish_many(DEEDS)
        faults = [FIRST_FAULT[point]] if point in FIRST_FAULT else []
        faults.append({"point": point, "moment": moment, **SETTINGS.get(point, {})})
        if point == "renew":  # something must be held for as long as that
            await bus.publish(Deed(n=12, kind="hold"))
        for fault in faults:
            await crew.start(url, lease_s=VICTIM_LEASE_S, **fault, **wish).killed()
        handler = deeds(crew.journal)
        crew.journal.flag("go on").touch()
        async with Worker(bus, [handler], lease_s=LEASE_S) as worker:
            await worker.drained()
    ended = crew.journal.times("end")
    wanted = {d.n for d in DEEDS if d.kind != "doomed"} | ({12} if point == "renew" else set())
    assert set(ended) == wanted, "every event was handled to its end"
    assert await site.dead_ns() == DOOMED, "and only what cannot be handled is dead, once"
    (letter,) = await site.dead()
    assert letter["deadreason"] in (b"failed", b"crashed")
    assert await site.pending() == []
    assert crew.journal.times("on_dead")[5] >= 1
    assert all(attempt <= MAX_ATTEMPTS + 1 for _, attempt in crew.journal.lines("start"))


@pytest.mark.parametrize(("point", "moment"), POINTS)
async def test_a_kill_at_any_point_loses_nothing(
    crew: Crew, valkey_site: Site, valkey_url: str, point: str, moment: str
) -> None:
    await run_case(crew, valkey_site, valkey_url, point, moment)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("point", ["read", "recover"])
async def test_a_kill_while_reading_at_a_doorbell_loses_nothing(
    crew: Crew, valkey_site: Site, valkey_url: str, point: str, moment: str
) -> None:
    await run_case(crew, valkey_site, valkey_url, point, moment, doorbell=True)


@pytest.mark.parametrize(("point", "moment"), SMOKE)
async def test_a_kill_loses_nothing_on_any_server(
    crew: Crew, site: Site, url: str, point: str, moment: str
) -> None:
    await run_case(crew, site, url, point, moment)


async def test_on_dead_is_repeated_after_a_crash_before_the_dead_letter(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Deed(n=1, kind="doomed"))
        await crew.start(valkey_url, point="dead_letter", moment="before").killed()
        assert crew.journal.times("on_dead") == {1: 1}
        assert await valkey_site.dead() == []
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await worker.drained()
    assert crew.journal.times("on_dead") == {1: 2}
    assert await valkey_site.dead_ns() == [1]


async def test_a_crash_uses_up_an_attempt_of_what_was_running_and_nothing_else(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    """The started one comes back as attempt 2; those that waited behind it do not lose more."""
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Deed(n=0, kind="killer"))
        await crew.start(valkey_url).killed()
        (pending,) = await valkey_site.pending()
        assert pending.deliveries == 1, "the crash itself changes nothing"
        await crew.start(valkey_url).killed()
        (pending,) = await valkey_site.pending()
        assert pending.deliveries == 2, "starting a reclaimed entry counts"
    assert crew.journal.lines("start") == [(0, 1), (0, 2)]


async def test_one_killer_among_500_prefetched_is_alone_dead_lettered(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    killer = 250
    settings = {"concurrency": 500}
    async with Bus.connect(valkey_url) as bus:
        await bus.publish_many(
            [Deed(n=n, kind="killer" if n == killer else "bystander") for n in range(500)]
        )
        first = crew.start(valkey_url, settings=settings)
        await first.killed()
        assert len(crew.journal.lines("start", first.pid)) > 1, "others were running beside it"
        assert len({p.owner for p in await valkey_site.pending()}) == 1
        deaths = 1
        last = crew.start(valkey_url, settings=settings)
        while not await valkey_site.dead():
            await eventually(lambda m=last: _ended_or_dead(m, valkey_site))
            if last.process.poll() is not None:
                deaths += 1
                assert deaths < 10
                last = crew.start(valkey_url, settings=settings)
        await eventually(lambda: _nothing_pending(valkey_site))
        last.process.terminate()
        assert await last.ended() == 0
    (letter,) = await valkey_site.dead()
    assert letter["deadreason"] == b"crashed"
    assert await valkey_site.dead_ns() == [killer]
    assert set(crew.journal.times("end")) == set(range(500)) - {killer}
    assert crew.journal.times("start")[killer] == MAX_ATTEMPTS + 1 == deaths


async def _ended_or_dead(member: Any, site: Site) -> bool:
    return member.process.poll() is not None or bool(await site.dead())


async def _nothing_pending(site: Site) -> bool:
    return not await site.pending()


async def test_a_killed_worker_is_forgotten_once_it_has_nothing_left(
    crew: Crew, valkey_site: Site, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.worker.supervisor.JANITOR_S", 0.2)
    async with Bus.connect(valkey_url) as bus:
        await bus.publish(Deed(n=1))
        await crew.start(valkey_url, name="victim", point="ack", moment="before").killed()
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S, name="heir") as worker:
            await worker.drained()
            await eventually(lambda: _consumers(valkey_site, {"heir"}))
            await eventually(lambda: _workers(valkey_site, {b"heir"}))


async def _workers(site: Site, names: set[bytes]) -> bool:
    return await site.redis.smembers(f"{STREAM}:workers") == names


async def _consumers(site: Site, names: set[str]) -> bool:
    return await site.backend.consumers(STREAM, GROUP) == names


async def test_the_default_times_recover_from_a_kill_too(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    """As a user runs it: the lease of 15 s is over when it runs out, here by hand."""
    async with Bus.connect(valkey_url) as bus:
        await bus.publish_many([Deed(n=n) for n in range(20)])
        victim = crew.start(valkey_url, stock=True, name="victim", point="ack", moment="before")
        await victim.killed()
        handler = deeds(crew.journal, visibility_s=30.0)
        async with Worker(bus, [handler]) as worker:
            assert len(await valkey_site.owned_by("victim")) > 0, "alive as long as its lease"
            assert await valkey_site.redis.delete(f"{STREAM}:lease:victim") == 1
            await worker.drained()
    assert set(crew.journal.times("end")) == set(range(20))
