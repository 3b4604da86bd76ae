"""What is recorded of topics, by whom, and who is refused."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from bus import BusError, DeclarationError, Topic, TopicMismatch
from bus.streams.address import parse_url
from bus.streams.server import Standalone
from bus.streams.stream import StreamStore
from bus.streams.topics import TopicTable
from bus.telemetry import Telemetry
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def process(url: str, *declared: Topic) -> AsyncIterator[TopicTable]:
    """The table of one process."""
    telemetry = Telemetry()
    store = StreamStore(Standalone(parse_url(url)), telemetry)
    try:
        yield TopicTable(store, declared, telemetry)
    finally:
        await store.close()


async def agreed(table: TopicTable, name: str = "paper") -> tuple[int, bool]:
    """The partition count that holds for a process, and whether it may still change."""
    record = await table.record(name)
    return record.partitions, record.implicit


def written(partitions: int, *, implicit: bool = False) -> bytes:
    """What is recorded of a topic with the usual marks."""
    return (
        f'{{"partitions":{partitions},"maxlen":1000000,"keep":100000,"on_full":"block",'
        f'"retention_s":null,"implicit":{str(implicit).lower()}}}'
    ).encode()


def record(server, name: str = "paper") -> bytes:
    return ask(server, "HGET", "bus:topics", name).partition(b"\r\n")[2].removesuffix(b"\r\n")


async def test_the_first_declaration_is_recorded(url, server):
    async with process(url, Topic("paper", partitions=4)) as first, process(url) as other:
        assert await agreed(first) == (4, False)
        assert record(server) == written(4)
        assert await agreed(other) == (4, False)
        assert other.streams("paper", 2) == ["bus:{paper:0}", "bus:{paper:1}"]


async def test_a_topic_nobody_declared_is_recorded_as_such(url, server):
    async with process(url) as table:
        assert await agreed(table) == (1, True)
        assert record(server) == written(1, implicit=True)


async def test_first_users_at_the_same_time_agree(url, server):
    async with (
        process(url, Topic("paper", partitions=3)) as a,
        process(url) as b,
        process(url) as c,
    ):
        await asyncio.gather(*(agreed(t) for t in (b, c)))
        counts = await asyncio.gather(*(agreed(t) for t in (a, b, c)))
        assert counts[0] == (3, False)
        assert record(server) == written(3)


async def test_an_implicit_record_is_replaced_while_its_stream_is_empty(url, monkeypatch):
    monkeypatch.setattr("bus.streams.topics.RECORD_TTL_S", 0)
    async with process(url) as early, process(url, Topic("paper", partitions=4)) as late:
        assert await agreed(early) == (1, True)
        assert await agreed(late) == (4, False)
        assert await agreed(early) == (4, False)  # it notices


async def test_an_implicit_record_with_entries_stands(url, server):
    async with process(url) as early, process(url, Topic("paper", partitions=4)) as late:
        await agreed(early)
        ask(server, "XADD", "bus:{paper:0}", "*", "a", "b")
        with pytest.raises(
            TopicMismatch, match=r"4 partitions here and recorded with 1 \(by its f"
        ):
            await agreed(late)


async def test_a_declaration_that_agrees_makes_an_implicit_record_firm(url, server):
    async with process(url) as early, process(url, Topic("paper")) as late:
        await agreed(early)
        ask(server, "XADD", "bus:{paper:0}", "*", "a", "b")
        assert await agreed(late) == (1, False)
        assert record(server) == written(1)


async def test_two_declarations_that_differ_name_both_counts(url, server):
    async with process(url, Topic("paper", partitions=4)) as first:
        await agreed(first)
    async with process(url, Topic("paper", partitions=2)) as second:
        for _ in range(2):
            with pytest.raises(TopicMismatch, match="with 2 partitions here and recorded with 4:"):
                await agreed(second)
    assert record(server) == written(4)


async def test_looking_back_records_nothing(url, server):
    async with process(url, Topic("paper", partitions=4)) as declared, process(url) as other:
        assert (await other.recorded("paper")).partitions == 1
        assert (await declared.recorded("paper")).partitions == 4
        assert ask(server, "EXISTS", "bus:topics") == b":0\r\n"
        await agreed(declared)
        assert (await other.recorded("paper")).partitions == 4


async def test_what_is_known_is_not_asked_again(url, server):
    async with process(url, Topic("paper", partitions=4)) as table:
        await agreed(table)
        ask(server, "DEL", "bus:topics")
        assert await agreed(table) == (4, False)
        assert ask(server, "EXISTS", "bus:topics") == b":0\r\n"


async def test_many_first_users_in_one_process_ask_once(url, server):
    ask(server, "CONFIG", "RESETSTAT")
    async with process(url) as table:
        assert set(await asyncio.gather(*(agreed(table) for _ in range(50)))) == {(1, True)}
    stats = ask(server, "INFO", "commandstats")
    assert b"cmdstat_hget:calls=2," in stats  # ours, and the one in the script that records


def test_declarations_of_one_process_must_agree():
    table = TopicTable(None, [Topic("paper"), Topic("paper", partitions=1)], Telemetry())
    assert table.declared == [Topic("paper")]
    with pytest.raises(DeclarationError, match="topic paper is declared twice, differently"):
        table.declare(Topic("paper", partitions=2))
    with pytest.raises(
        DeclarationError, match=r"topics are declared as Topic\(\.\.\.\), not 'paper'"
    ):
        table.declare("paper")


@pytest.mark.parametrize(
    "foreign",
    [
        b"4",
        b"{}",
        b"not JSON",
        b'{"partitions":"4"}',
        b"\xff",
        b"[]",
        b'{"partitions":0}',
        b'{"partitions":-1}',
        b'{"partitions":1000000000}',
        b'{"partitions":true}',
    ],
)
async def test_a_record_that_is_none_is_told_in_words(valkey_url, shared_server, foreign):
    server = shared_server("valkey-9.1")
    ask(server, "HSET", "bus:topics", "paper", foreign)
    async with process(valkey_url) as table:
        with pytest.raises(DeclarationError, match="bus:topics holds something else than a topic"):
            await agreed(table)
    assert ask(server, "HGET", "bus:topics", "paper").endswith(foreign + b"\r\n")


async def test_records_of_later_releases_and_of_others_are_left_alone(url, server):
    ask(server, "HSET", "bus:topics", "paper", b'{"partitions":4,"maxlen":1000}', b"\xff\xfe", b"?")
    async with process(url, Topic("paper", partitions=4)) as table:
        assert await agreed(table) == (4, False)
    assert record(server) == b'{"partitions":4,"maxlen":1000}'


async def test_a_hash_that_is_none_is_told_in_words(url, server):
    ask(server, "SET", "bus:topics", "a string")
    async with process(url) as table:
        with pytest.raises(BusError, match="bus:topics holds another Redis type"):
            await agreed(table)
