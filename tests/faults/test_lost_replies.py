"""The server has done it and the answer never arrives: nothing is lost and nothing done twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from bus import Bus, Worker
from bus.streams import stream
from tests.faults.deeds import LEASE_S, Deed, deeds
from tests.faults.proxy import Proxy, digest
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from tests.faults.crew import Crew, Site

SCRIPTS = {
    "ack": stream._ack,
    "park": stream._park,
    "dead_letter": stream._dead_letter,
    "take_parked": stream._take_parked,
    "renew": stream._renew,
}


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


async def test_lost_reads_lose_no_entry_and_no_attempt(crew: Crew, site: Site, url: str) -> None:
    async with Proxy(port_of(url)) as proxy, Bus.connect(proxy.url) as bus, Bus.connect(url) as out:
        witness = Witness(bus)
        handler = deeds(crew.journal, visibility_s=30.0)
        async with Worker(bus, [handler]) as worker:
            for round_ in range(4):
                proxy.lose(b"XREADGROUP", 1)
                await out.publish_many([Deed(n=round_ * 10 + n) for n in range(10)])
                await eventually(lambda r=round_: len(crew.journal.lines("end")) == r * 10 + 10)
            await worker.drained()
        assert proxy.lost == 4
        assert witness.total("delivery.recovered") >= 4
        assert sorted(crew.journal.lines("start")) == [(n, 1) for n in range(40)]


@pytest.mark.parametrize("verb", SCRIPTS)
async def test_lost_answers_to_scripts_change_nothing(
    crew: Crew, valkey_site: Site, valkey_url: str, verb: str
) -> None:
    kinds = {3: "flaky", 5: "doomed"}
    events = [
        Deed(n=n, kind=kinds.get(n, "hold" if verb == "renew" else "quick")) for n in range(10)
    ]
    async with (
        Proxy(port_of(valkey_url)) as proxy,
        Bus.connect(proxy.url) as bus,
        Bus.connect(valkey_url) as out,
    ):
        witness = Witness(bus)
        handler = deeds(crew.journal, concurrency=16)
        async with Worker(bus, [handler], lease_s=LEASE_S) as worker:
            await _load_scripts(valkey_url)
            proxy.lose(digest(SCRIPTS[verb]), 3 if verb != "take_parked" else 1)
            await out.publish_many(events)
            await eventually(lambda: proxy.lost >= 1)
            crew.journal.flag("go on").touch()
            await worker.drained()
        assert witness.counts()["connection.lost"] >= 1
        assert witness.of("delivery.lost") == []
    assert crew.journal.times("end") == dict.fromkeys([n for n in range(10) if n != 5], 1)
    assert await valkey_site.dead_ns() == [5]
    assert await valkey_site.pending() == []
    assert sorted(a for n, a in crew.journal.lines("start") if n == 5) == [1, 2, 3]


async def _load_scripts(url: str) -> None:
    """So that the first call by digest is already the one that counts."""
    async with Redis.from_url(url) as redis:
        for script in SCRIPTS.values():
            await redis.script_load(script._text)


async def test_a_connection_that_breaks_again_and_again(
    crew: Crew, valkey_site: Site, valkey_url: str
) -> None:
    """Every script at once, and reads: each loses some of its answers."""
    async with (
        Proxy(port_of(valkey_url)) as proxy,
        Bus.connect(proxy.url) as bus,
        Bus.connect(valkey_url) as out,
    ):
        handler = deeds(crew.journal, max_attempts=10)
        async with Worker(bus, [handler], lease_s=LEASE_S) as worker:
            for n in range(12):
                proxy.lose([b"XREADGROUP", b"EVALSHA"][n % 2], 1)
                await out.publish_many(
                    [Deed(n=5 * n + i, kind="quick" if i else "flaky") for i in range(5)]
                )
                await eventually(lambda n=n: proxy.lost == n + 1)
            await worker.drained()
    assert set(crew.journal.times("end")) == set(range(60))
    assert await valkey_site.dead() == []
    assert await valkey_site.pending() == []
