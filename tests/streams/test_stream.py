"""The verbs: what each asks of the server, and the shape of what it gives back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus.errors import WrongKeyType
from bus.streams import keys
from bus.streams.address import parse_url
from bus.streams.answers import Limits
from bus.streams.backend import backend_at
from bus.streams.replies import ReplyError
from bus.streams.stream import StreamStore
from bus.telemetry import Telemetry
from tests.eyes import raw
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.streams.reader import Reads

pytestmark = pytest.mark.everywhere

S0, S1, G = "bus:{verbs:0}", "bus:{verbs:1}", "g"
WIDE = Limits(keep=100_000, slack=1_000, most=1_000_000)


@pytest.fixture
async def store(url) -> AsyncIterator[StreamStore]:
    store = backend_at(parse_url(url)).store(Telemetry())
    yield store
    await store.close()


@pytest.fixture(params=["own connection", "doorbell"])
async def reader(store, request, monkeypatch) -> AsyncIterator[Reads]:
    """A reader of either kind; with the others of its doorbell, if it has one."""
    monkeypatch.setattr("bus.streams.stream.SHARED_READERS_FROM", 4)
    readers = store.readers([G] if request.param == "own connection" else [G, *"hij"])
    yield readers[0]
    for one in readers:
        await one.close()


def unit(*values: str) -> list[Any]:
    """A unit of events with one field each."""
    args: list[Any] = [len(values)]
    for value in values:
        args += [2, "n", value]
    return args


async def filled(store: StreamStore, count: int, consumer: str = "me") -> list[bytes]:
    """Make the group, append entries and deliver them to a consumer; return their ids."""
    await store.create_groups([(S0, G, "0")])
    await store.append(S0, "filler", 1, [unit(*map(str, range(count)))], count, WIDE, 5)
    reader = store.readers([G])[0]
    ((_, entries),) = await reader.read(G, consumer, [S0], count, 0)
    await reader.close()
    return [entry_id for entry_id, _ in entries]


async def pending(store: StreamStore) -> dict[bytes, tuple[bytes, int]]:
    rows = await raw(store, "XPENDING", S0, G, "-", "+", 1000)
    return {row[0]: (row[1], row[3]) for row in rows}


async def test_what_a_reader_does_to_what_it_was_handed_changes_nothing(store):
    """Handlers see the fields of their delivery, as they came."""
    reader = store.readers([G])[0]
    await store.create_groups([(S0, G, "0")])
    await store.append(S0, "p", 1, [unit("a")], 1, WIDE, 5)
    ((_, [(entry_id, fields)]),) = await reader.read(G, "me", [S0], 1, 0)
    fields[1] = b"changed"
    await reader.close()
    ((_, _, taken),) = (await store.recover(S0, G, "me", 10, [])).entries
    assert taken == [b"n", b"a"]
    taken.clear()
    ((_, looked_at),) = await raw(store, "XRANGE", S0, "-", "+")
    assert looked_at == [b"n", b"a"]
    looked_at.clear()
    ((at, whole),) = await raw(store, "XRANGE", S0, "-", "+")
    assert (at, whole) == (entry_id, [b"n", b"a"])


async def test_a_group_whose_counts_cannot_be_touched_loses_nothing(store):
    """All of what is its own goes at once, or none of it."""
    await filled(store, 3)
    kept = (keys.inbox(S0, G), keys.dead(S0, G), keys.overrun(S0))
    for key in kept:
        await raw(store, "SET", key, "not of the kind it should be")
    with pytest.raises(WrongKeyType):
        await store.upkeep.remove_group(S0, G)
    assert await raw(store, "EXISTS", S0, *kept) == 4
    assert len(await pending(store)) == 3
    await raw(store, "DEL", keys.overrun(S0))
    assert await store.upkeep.remove_group(S0, G)
    assert await raw(store, "EXISTS", *kept) == 0


# --- the way in


async def test_append_says_where_the_batch_went(store):
    where = await store.append(S0, "p", 1, [unit("a", "b"), unit("c")], 3, WIDE, 5)
    again = await store.append(S0, "p", 1, [unit("a", "b"), unit("c")], 3, WIDE, 5)
    assert (where.events, where.repeated, again.repeated) == (3, False, True)
    assert again[:4] == where[:4]
    entries = await store.archive.range(S0, "-", "+", 10)
    assert entries == [
        (f"{where.ms}-{where.sequence + n}".encode(), [b"n", value])
        for n, value in enumerate([b"a", b"b", b"c"])
    ]


@pytest.mark.servers_only("it asks a server about itself")
async def test_a_server_that_forgot_the_scripts_is_given_them_again(store, server):
    ids = await filled(store, 2)
    assert await store.ack(S0, G, "me", [ids[0]]) == []
    ask(server, "SCRIPT", "FLUSH")
    assert await store.ack(S0, G, "me", [ids[1]]) == []
    assert (await store.append(S0, "filler", 2, [unit("x")], 1, WIDE, 5)).repeated is False
    assert await store.ack(S0, G, "me", [ids[1]]) == [ids[1]]


# --- topics


async def test_records_of_topics(store):
    assert await store.topic_record("verbs") == b""
    assert await store.record_topic("verbs", b"", b"one") == b"one"
    assert await store.record_topic("verbs", b"", b"two") == b"one"
    assert await store.topic_record("verbs") == b"one"


async def test_whether_streams_hold_anything(store, server):
    assert not await store.any_entries([S0, S1])
    await store.append(S1, "p", 1, [unit("a")], 1, WIDE, 5)
    assert await store.any_entries([S0, S1])
    assert not await store.any_entries([S0])
    ask(server, "SET", S0, "a string")
    assert await store.any_entries([S0])  # it holds something, if not events


# --- groups


async def test_groups_are_created_once(store, server):
    ask(server, "SET", S1, "a string")
    created, there, broken = await store.create_groups([(S0, G, "0"), (S0, G, "$"), (S1, G, "0")])
    assert (created, there) == (True, False)
    assert isinstance(broken, ReplyError)
    assert broken.code == "WRONGTYPE"
    assert await store.create_groups([]) == []
    assert set(await store.groups_of(S0)) == {G}
    assert await store.groups_of(S1) == {}
    assert await store.groups_of("bus:{nothing:0}") == {}


async def lag(store, stream: str = S0) -> int | None:
    return (await store.groups_of(stream))[G].get("lag")


@pytest.fixture
def counts(server_kind: str) -> bool:
    """Whether this kind of server counts what groups have read."""
    return server_kind != "redis-6.2"


async def test_a_group_that_starts_at_the_end_is_counted_from_the_start(store, server, counts):
    """As the server makes it, it has no count until it has read to the end."""
    for n in range(1, 6):
        ask(server, "XADD", S0, f"{n}-0", "n", "1")
    ask(server, "XDEL", S0, "5-0")  # the end is where the last entry was, not is
    wanted = [(S0, G, "$"), (S1, G, "$"), (S0, G, "$"), (S0, "all", "0")]
    assert await store.create_groups(wanted) == [True, True, False, True]
    groups = await store.groups_of(S0)
    assert groups[G]["last-delivered-id"] == b"5-0"
    assert groups["all"]["last-delivered-id"] == b"0-0"
    for stream in (S0, S1):
        for n in range(6, 9):
            ask(server, "XADD", stream, f"{n}-0", "n", "1")
    ask(server, "XREADGROUP", "GROUP", G, "me", "COUNT", "1", "STREAMS", S1, ">")
    assert await lag(store, S1) == (2 if counts else None)
    assert (await store.groups_of(S0))[G].get("entries-read") == (5 if counts else None)
    assert await store.standing(S0, G) == (0, True)


async def test_what_comes_while_a_group_is_made_is_delivered_and_counted(
    store, server, counts, monkeypatch
):
    for n in range(1, 6):
        ask(server, "XADD", S0, f"{n}-0", "n", "1")
    ends = store._counted_ends

    async def and_then_one_comes(streams: list[str]) -> dict[str, Any]:
        found = await ends(streams)
        ask(server, "XADD", S0, "6-0", "n", "1")
        return found

    monkeypatch.setattr(store, "_counted_ends", and_then_one_comes)
    assert await store.create_groups([(S0, G, "$")]) == [True]
    assert await lag(store) == (1 if counts else None)
    assert await store.standing(S0, G) == (0, counts)


async def test_a_server_that_takes_no_counts_gets_its_groups_all_the_same(
    store, server, monkeypatch
):
    ask(server, "XADD", S0, "5-0", "n", "1")

    async def refused(_: list[str]) -> dict[str, Any]:
        return {S0: (b"5-0", "MKSTREAM", "ENTRIESREAD", "many")}  # no server takes that

    monkeypatch.setattr(store, "_counted_ends", refused)
    assert await store.create_groups([(S0, G, "$"), (S1, G, "0"), (S0, G, "$")]) == [
        True,
        True,
        False,
    ]
    assert (await store.groups_of(S0))[G]["last-delivered-id"] == b"5-0"


async def test_how_far_a_group_is(store):
    assert await store.standing(S0, G) is None
    ids = await filled(store, 2)
    assert await store.standing(S0, G) == (2, False)
    await store.append(S0, "p", 1, [unit("more")], 1, WIDE, 5)
    assert await store.standing(S0, G) == (2, True)
    await store.ack(S0, G, "me", ids)
    assert await store.standing(S0, G) == (0, True)
    assert await store.standing(S0, "nobody") is None


async def test_types_of_keys(store, server):
    ask(server, "SET", S1, "a string")
    await store.append(S0, "p", 1, [unit("a")], 1, WIDE, 5)
    assert [await store.type_of(k) for k in (S0, S1, "nothing")] == [b"stream", b"string", b"none"]


# --- verdicts and taking over: the scripts themselves are tested in test_scripts


async def test_verdicts(store):
    ids = await filled(store, 4)
    assert await store.ack(S0, G, "me", [ids[0], b"9-9"]) == [b"9-9"]
    lane, refused = await store.park(S0, G, "me", [(ids[1], 0, 1), (b"9-9", 0, 1)])
    assert (lane, refused) == (b"parked:0", b"")
    letters = [(ids[2], ["id", "a"]), (ids[0], ["id", "b"])]
    assert await store.dead_letter(S0, G, "me", 0, letters) == [1, 0]
    assert await store.renew(S0, G, "me", ids) == ([ids[0], ids[1], ids[2]], [])
    assert await store.start(S0, G, "me", ids[3], 3)
    assert not await store.start(S0, G, "me", ids[1], 3)
    assert await pending(store) == {ids[1]: (b"parked:0", 1), ids[3]: (b"me", 3)}
    ((_, fields),) = await store.archive.range(keys.dead(S0, G), "-", "+", 10)
    assert fields[:3] == [b"id", b"a", b"deadtime"]


async def test_taking(store, server):
    ids = await filled(store, 5)
    await store.park(S0, G, "me", [(ids[0], 0, 1), (ids[1], 3_600_000, 1)])
    (later,) = {owner for owner, _ in (await pending(store)).values()} - {b"me", b"parked:0"}
    taken = await store.take_due(S0, G, "you", 10, [b"parked:0", later])
    assert taken == ([(ids[0], 2, [b"n", b"0"])], [])
    taken = await store.take_parked(S0, G, "you", [(later, ids[1])])
    assert taken == ([(ids[1], 2, [b"n", b"1"])], [])
    ask(server, "XDEL", S0, ids[3])
    taken = await store.recover(S0, G, "me", 10, [ids[2]])
    assert taken == ([(ids[4], 1, [b"n", b"4"])], [ids[3]])
    await store.leases.keep([S0], "me", [G], 60_000)
    assert await store.reclaim(S0, G, "you", b"me", 10, 0) == ([], [])
    await store.leases.drop([S0], "me")
    taken = await store.reclaim(S0, G, "you", b"me", 1, 0)
    assert taken == ([(ids[2], 1, [b"n", b"2"])], [])


async def test_a_survey_tells_the_living_from_the_dead(store):
    await filled(store, 1, "dead")
    await store.leases.keep([S0], "dead", [G], 60_000)
    await store.leases.keep([S0], "alive", [G], 60_000)
    await store.leases.drop([S0], "dead")
    survey = await store.leases.survey(S0, [(S0, G), (S0, "no-such-group")])
    assert (survey.listed, survey.alive) == ({b"dead", b"alive"}, {b"alive"})
    assert {g: [(c.name, c.pending) for c in found] for g, found in survey.consumers.items()} == {
        (S0, G): [(b"dead", 1)]
    }
    seconds, _ = await raw(store, "TIME")
    assert abs(survey.now_ms - int(seconds) * 1000) < 60_000


async def test_nothing_becomes_a_dead_letter_while_its_worker_lives_whatever_else_is_gone(store):
    await store.leases.keep([S0], "me", [G], 60_000)
    letters = [(b"1-1", ["type", "t"]), (b"1-2", ["type", "t"])]
    lease = keys.lease(S0, b"me")
    assert await store.dead_letter(S0, G, "me", 0, letters, lease=lease) == [0, 0]
    await store.leases.drop([S0], "me")
    with pytest.raises(ReplyError) as caught:
        await store.dead_letter(S0, G, "me", 0, letters, lease=lease)
    assert caught.value.code == "NOGROUP"


# --- leases


async def test_a_lease_says_who_serves_what(store):
    await store.leases.keep([S0, S1], "w1", ["a", "b"], 60_000)
    await store.leases.keep([S0], "w2", ["b", "c"], 60_000)
    assert await store.leases.served_groups(S0) == {"a", "b", "c"}
    assert await store.leases.served_groups(S1) == {"a", "b"}
    await store.leases.drop([S0, S1], "w1")
    assert await store.leases.served_groups(S0) == {"b", "c"}
    assert await store.leases.served_groups("bus:{nothing:0}") == set()
    await store.leases.keep([], "w1", ["a"], 60_000)


async def test_a_lease_expires(store):
    await store.leases.keep([S0], "w1", ["a"], 60_000)
    left = await raw(store, "PTTL", keys.lease(S0, "w1"))
    assert 0 < left <= 60_000


async def test_leases_over_keys_of_other_types_harm_nobody(store, server):
    ask(server, "SET", keys.workers(S0), "a string")
    await store.leases.keep([S0, S1], "w1", ["a"], 60_000)
    assert await store.leases.served_groups(S1) == {"a"}


async def test_one_process_sweeps_at_a_time(store):
    assert await store.leases.try_sweep([S0, S1], [G], "w1", 60_000) == [S0, S1]
    assert await store.leases.try_sweep([S0, S1], [G], "w2", 60_000) == []
    assert await store.leases.try_sweep([S0], ["other"], "w2", 60_000) == [
        S0
    ]  # serves other groups
    assert await raw(store, "PTTL", keys.sweep(S0, [G])) > 0


async def test_dead_workers_are_forgotten(store):
    ids = await filled(store, 1, "dead")
    await store.leases.keep([S0], "dead", [G], 60_000)
    assert not await store.leases.forget_consumer(S0, G, "dead")
    await store.leases.drop([S0], "dead")
    assert not await store.leases.forget_consumer(S0, G, "dead")
    await store.ack(S0, G, "dead", ids)
    assert await store.leases.forget_consumer(S0, G, "dead")
    await store.leases.unlist_worker(S0, "dead")
    assert (await store.leases.survey(S0, [(S0, G)])).listed == frozenset()


# --- reading


async def test_a_read_lists_all_streams_of_a_group(store, reader):
    await store.create_groups([(S0, G, "0"), (S1, G, "0")])
    await store.append(S0, "p", 1, [unit("a", "b", "c")], 3, WIDE, 5)
    await store.append(S1, "p", 1, [unit("d")], 1, WIDE, 5)
    got = {name: [f for _, f in rows] for name, rows in await reader.read(G, "me", [S0, S1], 2, 0)}
    assert got == {S0: [[b"n", b"a"], [b"n", b"b"]], S1: [[b"n", b"d"]]}
    assert len(await reader.read(G, "me", [S0, S1], 2, 0)) == 1
    assert await reader.read(G, "me", [S0, S1], 2, 0) == []
    assert await reader.read(G, "me", [S0, S1], 2, 10) == []  # after 10 ms


async def test_a_read_without_its_group_says_so(store, reader):
    with pytest.raises(ReplyError) as raised:
        await reader.read(G, "me", [S0], 2, 0)
    assert raised.value.code == "NOGROUP"


@pytest.mark.servers_only("it looks at what blocks on a server")
async def test_a_blocked_read_wakes_for_an_entry(store, reader, server):
    await store.create_groups([(S0, G, "0")])
    read = asyncio.create_task(reader.read(G, "me", [S0], 2, 5_000))
    await until_blocked(server)
    await store.append(S0, "p", 1, [unit("a")], 1, WIDE, 5)
    ((name, rows),) = await asyncio.wait_for(read, 4)
    assert (name, rows[0][1]) == (S0, [b"n", b"a"])


@pytest.mark.servers_only("it looks at what blocks on a server")
async def test_a_blocked_read_can_be_ended_and_takes_nothing(store, reader, server):
    await store.create_groups([(S0, G, "0")])
    await reader.unblock()  # before the first read there is nothing to end
    read = asyncio.create_task(reader.read(G, "me", [S0], 2, 30_000))
    await until_blocked(server)
    await reader.unblock()
    assert await asyncio.wait_for(read, 4) == []
    await store.append(S0, "p", 1, [unit("a")], 1, WIDE, 5)
    assert await store.standing(S0, G) == (0, True)
    assert len(await reader.read(G, "me", [S0], 2, 0)) == 1


async def until_blocked(server) -> None:
    while b"blocked_clients:1" not in await asyncio.to_thread(ask, server, "INFO", "clients"):
        pass


# --- looking back


async def test_a_range_is_closed_and_counted(store):
    ids = await filled(store, 5)
    text = [i.decode() for i in ids]
    assert [i for i, _ in await store.archive.range(S0, text[1], text[3], 10)] == ids[1:4]
    assert [i for i, _ in await store.archive.range(S0, "(" + text[1], "+", 2)] == ids[2:4]
    backwards = await store.archive.range(S0, "-", "(" + text[3], 2, reverse=True)
    assert [i for i, _ in backwards] == [ids[2], ids[1]]
    assert await store.archive.range("bus:{nothing:0}", "-", "+", 10) == []


@pytest.mark.servers_only("there are no connections to hold up")
async def test_a_slow_range_does_not_hold_up_a_publish(store):
    """They have connections of their own."""
    slow = store.archive._connection.submit(b"*3\r\n$5\r\nBLPOP\r\n$4\r\nnone\r\n$1\r\n5\r\n")
    where = await asyncio.wait_for(store.append(S0, "p", 1, [unit("a")], 1, WIDE, 5), 4)
    assert where.events == 1
    assert not slow.done()
    slow.cancel()
