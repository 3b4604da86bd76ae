"""The table of pauses: what stands in the hash, whoever wrote it, and what it means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from redis.asyncio import Redis

from bus import WrongKeyType
from bus.streams.address import parse_url
from bus.streams.backend import backend_at
from bus.streams.pauses import Pause, PauseTable, pauses_of
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.eyes import eyes_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.everywhere


@pytest.fixture
async def store(url: str) -> AsyncIterator[StreamStore]:
    store = backend_at(parse_url(url)).store(Telemetry())
    yield store
    await store.close()


@pytest.fixture
def table(store: StreamStore) -> PauseTable:
    return store.pauses


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    async with eyes_on(url) as redis:
        yield redis


async def test_what_is_paused_is_found_with_the_time_of_the_server(table, redis):
    pause = Pause(5, 10**13, "bad deploy; ünïcödé")
    await table.pause(("order", "receipts"), pause)
    await table.pause(("order", "stats"), Pause(6))
    seconds, _ = await redis.time()
    now_ms, found = await table.look()
    assert seconds * 1000 <= now_ms <= seconds * 1000 + 5_000
    assert found == {("order", "receipts"): pause, ("order", "stats"): Pause(6)}
    stands = await redis.hget("bus:paused", "order:receipts")
    assert msgspec.json.decode(stands) == {
        "since_ms": 5,
        "until_ms": 10**13,
        "why": "bad deploy; ünïcödé",
    }
    await table.pause(("order", "receipts"), Pause(7))
    assert (await table.look())[1]["order", "receipts"] == Pause(7)


async def test_without_any_there_are_none(table, redis):
    assert (await table.look())[1] == {}
    assert not await redis.exists("bus:paused")


async def test_ending_one_says_whether_there_was_one(table, redis):
    for group in ("a", "b"):
        await table.pause(("order", group), Pause())
    assert await table.resume(("order", "a"))
    assert not await table.resume(("order", "a"))
    assert not await table.resume(("other", "b"))
    assert await redis.hkeys("bus:paused") == [b"order:b"]


WRONG = ["", "yes", "0", "null", "[]", '{"until_ms": "soon"}', '{"since_ms": null}', "{" * 9_000]
BYTES = [b"\xff", b'{"why": "\xff"}', b'{"x":' + b"[" * 100_000]


@pytest.mark.parametrize("value", [*(w.encode() for w in WRONG), *BYTES], ids=range(11))
def test_what_is_no_pause_of_ours_pauses_without_end(value):
    """Somebody who writes there by hand means it."""
    found = pauses_of([b"order:receipts", value])
    (pause,) = found.values()
    assert pause.holds(10**15)
    assert (pause.since_ms, pause.why) == (
        *(0, "what stands there says neither since when nor why"),
    )


def test_what_is_missing_is_unknown_and_what_later_releases_add_is_left_alone():
    found = pauses_of([b"a:b", b"{}", b"a:c", b'{"since_ms": 3, "by": "me"}'])
    assert found == {("a", "b"): Pause(), ("a", "c"): Pause(3)}


def test_groups_may_have_any_name_and_topics_have_no_colon():
    fields = [b"order:a:b", b"{}", b"order:\xff", b"{}", b"order", b"{}", b":x", b"{}"]
    assert set(pauses_of(fields)) == {
        *(("order", "a:b"), ("order", "\udcff"), ("order", ""), ("", "x")),
    }


async def test_a_group_of_any_name_can_be_paused_and_resumed(table, redis):
    await table.pause(("order", "\udcff:x"), Pause())
    assert await redis.hkeys("bus:paused") == [b"order:\xff:x"]
    assert list((await table.look())[1]) == [("order", "\udcff:x")]
    assert await table.resume(("order", "\udcff:x"))


def test_one_holds_until_its_time_has_come():
    assert Pause(5).holds(10**15)
    assert Pause(5, 100).holds(99)
    assert not Pause(5, 100).holds(100)


async def test_a_key_of_another_type_is_an_error_that_names_it(table, redis):
    await redis.set("bus:paused", "a string")
    with pytest.raises(WrongKeyType, match="bus:paused"):
        await table.look()
    with pytest.raises(WrongKeyType, match="bus:paused"):
        await table.pause(("order", "a"), Pause())
    with pytest.raises(WrongKeyType, match="bus:paused"):
        await table.resume(("order", "a"))
