"""The server dies, comes back with or without its data, or loses what the worker relies on."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Bus, PublishError, Worker
from tests.faults.crew import Site
from tests.faults.deeds import CANARY, GROUP, LEASE_S, PASSWORD, STREAM, Deed, deeds
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.conftest import PrivateServer
    from tests.faults.crew import Crew

# A worker that meets trouble says so, and says so again with growing pauses: some lines a second.
QUIET = 60


async def test_a_server_killed_again_and_again_loses_nothing_with_an_aof(
    crew: Crew, private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind, aof=True)
    certain: set[int] = set()
    async with Bus.connect(server.url, publish_timeout_s=15) as bus:
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:

            async def publish(start: int) -> None:
                for n in range(start, start + 100):
                    try:
                        await bus.publish(Deed(n=n, kind="flaky" if n % 10 == 0 else "quick"))
                        certain.add(n)
                    except PublishError:
                        pass

            for start in (0, 100):
                publisher = asyncio.create_task(publish(start))
                await eventually(lambda s=start: len(certain) > s + 20)
                server.kill()
                server.restart()
                await publisher
            await worker.drained()
        site = Site(server.url)
        assert set(crew.journal.times("end")) >= certain
        assert len(certain) > 190
        assert await site.dead() == []
        await site.backend.close()


async def _delete_stream(redis: Any) -> None:
    await redis.delete(STREAM)


async def _destroy_group(redis: Any) -> None:
    await redis.xgroup_destroy(STREAM, GROUP)


async def _flush(redis: Any) -> None:
    await redis.flushall()


async def _rename(redis: Any) -> None:
    await redis.rename(STREAM, "elsewhere")


LOSSES: list[Callable[[Any], Awaitable[None]]] = [_delete_stream, _destroy_group, _flush, _rename]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda f: f.__name__.strip("_"))
async def test_a_worker_goes_on_after_its_stream_or_group_has_vanished(
    crew: Crew, site: Site, url: str, lose: Callable[[Any], Awaitable[None]]
) -> None:
    async with Bus.connect(url) as bus, Bus.connect(url) as out:
        witness = Witness(bus)
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await out.publish_many([Deed(n=n) for n in range(5)])
            await worker.drained()
            await lose(site.redis)
            await out.publish_many([Deed(n=n) for n in range(5, 10)])
            await eventually(lambda: {5, 6, 7, 8, 9} <= set(crew.journal.times("end")))
            await worker.drained()
            assert len(witness.of("group.recreated")) == 1
            assert witness.counts()["read.failed"] < 10
            # And again, so that nothing of the first time is left over.
            await lose(site.redis)
            await out.publish(Deed(n=10))
            await eventually(lambda: 10 in crew.journal.times("end"))
            await worker.drained()
    assert await site.pending() == []


async def test_handlers_that_run_while_the_stream_vanishes_do_no_harm(
    crew: Crew, site: Site, url: str
) -> None:
    async with Bus.connect(url) as bus, Bus.connect(url) as out:
        witness = Witness(bus)
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await out.publish_many([Deed(n=n, kind="hold") for n in range(3)])
            await eventually(lambda: len(crew.journal.lines("start")) == 3)
            await site.redis.delete(STREAM)
            await eventually(lambda: witness.of("group.recreated"))
            crew.journal.flag("go on").touch()
            await out.publish(Deed(n=3))
            await eventually(lambda: 3 in crew.journal.times("end"))
            await worker.drained()
            assert len([1 for name, _ in witness.seen if name != "read.received"]) < QUIET


async def test_a_server_that_comes_back_empty(
    crew: Crew, private_server: PrivateServer, server_kind: str
) -> None:
    server = private_server(server_kind)
    async with Bus.connect(server.url) as bus:
        witness = Witness(bus)
        async with Worker(bus, [deeds(crew.journal)], lease_s=LEASE_S) as worker:
            await bus.publish(Deed(n=0))
            await worker.drained()
            server.kill()
            await eventually(lambda: len(witness.of("read.failed")) >= 4)
            server.restart()
            await bus.publish(Deed(n=1))
            await eventually(lambda: 1 in crew.journal.times("end"))
            await worker.drained()
            assert len(witness.of("group.recreated")) == 1
            troubles = ("connection.lost", "read.failed", "verdict.failed", "publish.retried")
            assert sum(witness.counts()[name] for name in troubles) < QUIET, witness.counts()


async def test_a_server_that_stands_still_for_a_while(
    crew: Crew, private_server: PrivateServer
) -> None:
    """Longer than the leases: nobody else is there to take anything, and nothing is lost."""
    server = private_server()
    loop = asyncio.get_running_loop()
    handler = deeds(crew.journal)
    async with Bus.connect(server.url) as bus, Worker(bus, [handler], lease_s=LEASE_S) as worker:
        await bus.publish_many([Deed(n=n, kind="nap") for n in range(50)])
        await eventually(lambda: len(crew.journal.lines("end")) > 3)
        server.pause()
        over = loop.time() + 2 * LEASE_S
        await eventually(lambda: loop.time() > over)
        server.resume()
        await worker.drained()
    assert set(crew.journal.times("end")) == set(range(50))


async def test_neither_payloads_nor_passwords_are_logged(
    crew: Crew, private_server: PrivateServer
) -> None:
    """INFO logs of workers that fail, crash, lose their server and cannot log in."""
    server = private_server(aof=True, extra_args=("--requirepass", PASSWORD))
    url = server.url.replace("redis://", f"redis://:{PASSWORD}@")
    async with Bus.connect(url) as bus:
        worker = crew.start(url)
        await worker.started()
        kinds = ["flaky", "doomed", "quick", "stop and reject"]
        await bus.publish_many([Deed(n=n, kind=kind) for n, kind in enumerate(kinds)])
        await worker.stopped()
        worker.send(signal.SIGCONT)
        await eventually(lambda: len(worker.logged("delivery.dead_lettered")) == 2)
        async with Redis.from_url(url) as redis:
            await redis.xadd(STREAM, {"id": "1", "type": "deed.done", "data": f"no JSON, {CANARY}"})
            await redis.xadd(
                STREAM, {"id": "1", "type": "deed.done", "data": f'{{"n":"{PASSWORD}"}}'}
            )
        await eventually(lambda: len(worker.logged("delivery.dead_lettered")) == 4)
        server.kill()
        await eventually(lambda: worker.logged("connection.lost"))
        server.restart()
        await bus.publish(Deed(n=9, kind="killer"))
        await worker.killed()
    said = worker.output()
    for name in ("delivery.retried", "delivery.dead_lettered", "connection.lost", "read.failed"):
        assert name in said
    # That neither canary is in it is asserted of every crew, when it ends.
