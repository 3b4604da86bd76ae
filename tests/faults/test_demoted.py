"""A primary that becomes a replica and cuts nobody off: those who only read move on, too."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from bus import Bus, Event, Topic
from bus.history import hub
from bus.streams.address import parse_url
from bus.streams.follower import sound_extents
from bus.streams.replies import ReplyError
from bus.streams.server import Standalone
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.proxy import Proxy
from tests.servers import ask, follow_another, in_step
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from bus import ChannelTail, Tail
    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

TOPIC = Topic("demoted")
SOON = ("--repl-diskless-sync-delay", "0")


class Said(Event, type="demoted.said"):
    n: int


def looks(server: EmbeddedServer) -> int:
    """How often somebody looked where a stream ends."""
    lines = ask(server, "INFO", "commandstats").decode().splitlines()
    found = [line for line in lines if line.startswith("cmdstat_xinfo")]
    return sum(int(line.partition("calls=")[2].partition(",")[0]) for line in found)


async def heard(tail: Tail | ChannelTail, numbers: list[int]) -> None:
    async for envelope in tail:
        numbers.append(envelope.event.n)  # type: ignore[attr-defined] # noqa: PERF401


@pytest.mark.parametrize("name_follows", ["at once", "late"])
async def test_tails_leave_a_primary_that_was_demoted_and_are_set_back_by_nothing_it_says(
    server_kind: str,
    private_server: PrivateServer,
    monkeypatch: pytest.MonkeyPatch,
    name_follows: str,
) -> None:
    """Its data stays what it was; the name leads to the new one at once, or some time later."""
    monkeypatch.setattr(hub, "BLOCK_MS", 50)
    monkeypatch.setattr(hub, "_LOOK_EVERY_S", 0.05)
    old, new = (private_server(server_kind, extra_args=SOON) for _ in range(2))
    async with Proxy(old.port) as name, Bus.connect(name.url, topics=[TOPIC]) as bus:
        channel, witness = bus.channel("run"), Witness(bus)
        tails, got = [channel.tail(), bus.tail(TOPIC.name)], list[list[int]]([[], []])
        following = [asyncio.create_task(heard(t, n)) for t, n in zip(tails, got, strict=True)]
        await eventually(lambda: len(bus._hub._followed) == 2)

        async def say(*numbers: int) -> None:
            for n in numbers:
                await asyncio.gather(channel.publish(Said(n=n)), bus.publish(Said(n=n)))
                await eventually(lambda: all(n in mine for mine in got) or dead())  # noqa: B023

        def dead() -> bool:
            return any(task.done() for task in following)

        await say(0, 1)
        follow_another(new, "127.0.0.1", str(old.port))
        await eventually(lambda: in_step(new, old))
        if name_follows == "at once":
            name.target = new.port
        follow_another(new, "NO", "ONE")
        follow_another(old, "127.0.0.1", "1")  # whom it does not reach
        if name_follows == "late":
            refused = "READONLY You can't write against a read only replica."
            await eventually(lambda: witness.of("tail.failed", error=refused))
            name.target = new.port
        for n in range(2, 8):
            await say(n)
            seen = looks(new)
            await eventually(lambda: looks(new) > seen + 1 or dead())  # noqa: B023
        for task in following:
            task.cancel()
        ends = await asyncio.gather(*following, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
        assert got == [list(range(8))] * 2
        assert not witness.of("tail.gap")


async def test_nobody_is_told_by_a_replica_where_a_stream_ends(private_server) -> None:
    """It may not have come so far, or never heard of it."""
    primary, replica = (private_server(extra_args=SOON) for _ in range(2))
    follow_another(replica, "127.0.0.1", str(primary.port))
    store = StreamStore(Standalone(parse_url(replica.url)), Telemetry())
    follower = store.follower()
    for asked in (
        lambda: sound_extents(store.archive, ["bus:{demoted:0}"]),
        lambda: store.channels.look("bus:channel:{run}"),
        lambda: follower.prepare(check=False),
    ):
        with pytest.raises(ReplyError, match="READONLY"):
            await asked()
    follow_another(replica, "NO", "ONE")
    assert await sound_extents(store.archive, ["bus:{demoted:0}"]) == [None]
    assert await store.channels.look("bus:channel:{run}") is None
    await follower.prepare(check=False)
    follow_another(replica, "127.0.0.1", str(primary.port))
    with pytest.raises(ReplyError, match="READONLY"):
        await follower.prepare(check=True)
    await follower.close()
    await store.close()
