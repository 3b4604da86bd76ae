"""What servers make of a channel's appends: the script asks for memory before it does anything."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from bus import Bus, Event, PublishRefused
from bus.streams.answers import Limits
from bus.streams.forms import unit_of
from tests.servers import ask

if TYPE_CHECKING:
    from tests.conftest import PrivateServer


class Said(Event, type="full.said"):
    n: int


async def test_a_server_that_is_full_takes_nothing_for_channels(
    server_kind: str, private_server: PrivateServer
) -> None:
    server = private_server(server_kind)
    async with Bus.connect(server.url, publish_timeout_s=0.5) as bus:
        begun, new = bus.channel("begun"), bus.channel("new")
        await begun.publish(Said(n=0))
        await bus.redis.pexpire(begun.key, 60_000)
        ask(server, "CONFIG", "SET", "maxmemory", "1")
        attempts = [begun.publish(Said(n=1)), new.publish(Said(n=2)), new.end()]
        refused = await asyncio.gather(*attempts, return_exceptions=True)
        assert [type(error) for error in refused] == [PublishRefused] * 3
        assert all("OOM" in str(error) for error in refused)
        with pytest.raises(PublishRefused):
            await begun.end()
        assert await bus.redis.xlen(begun.key) == 1
        assert await bus.redis.pttl(begun.key) <= 60_000, "nor is its expiry put off"
        assert await bus.redis.keys("bus:channel:*") == [begun.key.encode()]
        ask(server, "CONFIG", "SET", "maxmemory", "0")
        for channel in (begun, new):
            await channel.publish(Said(n=3))
            await channel.end()
        assert [await bus.redis.xlen(c.key) for c in (begun, new)] == [3, 2]
        assert len(await bus.redis.keys("bus:channel:*")) == 2


async def test_what_was_sent_before_is_looked_for_no_longer_than_it_can_be_there(url: str) -> None:
    """Up to a minute before it was first sent: a script does not read all of a long channel."""
    async with Bus.connect(url) as bus:
        key, limits = "bus:channel:{long}", Limits(1, 1, 1_000)
        appends = bus.store.channels.appends(60_000)
        fields = ["id", "i", "type", "a.b", "data", "{}"]

        async def append(again_ms: int) -> bool:
            call = appends.append(key, "p", 1, [unit_of(fields)], 1, limits, 5, again_ms=again_ms)
            return (await call).repeated

        two_minutes_ago = int(time.time() * 1000) - 120_000
        pairs = dict(zip(fields[::2], fields[1::2], strict=True))
        await bus.redis.xadd(key, pairs, id=f"{two_minutes_ago}-0")
        assert [await append(again_ms) for again_ms in (120_000, 0, 1)] == [True, False, True]
        assert await bus.redis.xlen(key) == 2
        await bus.redis.delete(key)
        await bus.redis.xadd(key, pairs, id=f"{two_minutes_ago}-0")
        assert await append(1) is False
