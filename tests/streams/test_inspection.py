"""What looking at streams asks of the server, and that it holds up nobody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from bus import PermissionDenied
from bus.streams.address import parse_url
from bus.streams.inspection import count, look
from bus.streams.server import Standalone
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

S0, S1 = "bus:{seen:0}", "bus:{seen:1}"


@pytest.fixture
async def store(url) -> AsyncIterator[StreamStore]:
    store = StreamStore(Standalone(parse_url(url)), Telemetry())
    yield store
    await store.close()


def add(server, stream: str, count: int) -> None:
    for n in range(1, count + 1):
        ask(server, "XADD", stream, f"{n}-0", "n", "1")


async def test_what_is_seen_of_a_stream_and_its_groups(store, server):
    add(server, S0, 4)
    ask(server, "XGROUP", "CREATE", S0, "g", "0")
    ask(server, "XREADGROUP", "GROUP", "g", "me", "COUNT", "2", "STREAMS", S0, ">")
    ask(server, "XADD", f"{S0}:inbox:g", "*", "n", "1")
    first, missing = await look(store, [S0, S1])
    assert (first.stream, first.info["length"]) == (S0, 4)
    assert first.newest == [b"4-0", b"3-0", b"2-0", b"1-0"]
    ((name, row, ahead, oldest, inbox),) = first.groups
    assert (name, ahead, oldest, inbox) == (b"g", [b"3-0", b"4-0"], b"1-0", 1)
    assert (row["pending"], row["last-delivered-id"]) == (2, b"2-0")
    assert (missing.stream, missing.info, missing.newest, missing.groups) == (S1, {}, [], [])
    assert await look(store, []) == []


async def test_the_time_is_the_servers_in_milliseconds(store, server):
    before = ask(server, "XADD", S0, "*", "n", "1").split(b"\r\n")[1]
    (seen,) = await look(store, [S0])
    after = ask(server, "XADD", S0, "*", "n", "1").split(b"\r\n")[1]
    assert int(before.split(b"-")[0]) <= seen.now_ms <= int(after.split(b"-")[0])


@pytest.mark.parametrize(("most", "counted"), [(0, 0), (1, 1), (1_500, 1_500), (9_999, 2_500)])
async def test_counting_ends_at_what_was_asked_for(store, most, counted):
    await store.commands.pipeline([("XADD", S0, f"{n}-0", "n", 1) for n in range(1, 2_501)])
    assert await count(store, S0, "-", "+", most) == counted
    assert await count(store, S0, "(10-0", "20-0", 10_000) == 10


async def test_a_slow_look_does_not_hold_up_commands(store):
    slow = store.archive._connection.submit(b"*3\r\n$5\r\nBLPOP\r\n$4\r\nnone\r\n$1\r\n5\r\n")
    looking = asyncio.create_task(look(store, [S0]))
    assert await asyncio.wait_for(store.commands.call("PING"), 4) == b"PONG"
    await asyncio.wait([looking], timeout=0.2)
    assert not looking.done()
    looking.cancel()
    slow.cancel()


async def test_a_missing_right_is_told(store, server):
    add(server, S0, 1)
    ask(server, "ACL", "SETUSER", "blind", "on", "nopass", "~*", "+@all", "-xinfo")
    url = f"redis://blind:any@127.0.0.1:{server.port}/0"
    blind = StreamStore(Standalone(parse_url(url)), Telemetry())
    try:
        with pytest.raises(PermissionDenied, match=r"lacks a right on bus:\{seen:0\}"):
            await look(blind, [S0])
    finally:
        await blind.close()
        ask(server, "ACL", "DELUSER", "blind")
