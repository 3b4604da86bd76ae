"""What a redrive sends, how much at a time, to whom, and what it leaves where it is.

More of it is in test_dead_letters.py; what handlers make of it in tests/guarantees/test_redrive.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, UnknownGroup
from bus.config import HEARD_OF_MS
from bus.history import redrive
from bus.streams.leases import Leases
from tests.eyes import eyes_of
from tests.history.letters import (
    DEAD,
    INBOX,
    OTHER,
    STREAM,
    TIGHT,
    TOPIC,
    bury,
    found,
    ns_of,
    own,
    prepare,
    put,
    why,
)
from tests.servers import ask
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus import Letter

pytestmark = pytest.mark.everywhere


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    """A bus on the default server alone, for what the server has no part in."""
    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


# --- who would take them


@pytest.mark.parametrize("dry_run", [False, True])
async def test_a_group_that_is_not_on_the_stream_gets_nothing(bus: Bus, dry_run: bool) -> None:
    """Its letters would lie where no worker looks, and no list of dead letters."""
    await bury(bus, 1)
    await eyes_of(bus).xgroup_destroy(STREAM, "index")
    with pytest.raises(
        UnknownGroup, match=r"^bus:\{mail:0\} does not have the group index, .* mak"
    ):
        await bus.dead_letters("index").redrive(dry_run=dry_run)
    assert await ns_of(bus, DEAD) == [1]
    assert await eyes_of(bus).exists(INBOX) == 0


async def test_a_stream_without_the_group_ends_a_redrive_that_has_begun(valkey: Bus) -> None:
    await bury(valkey, *range(150))
    await bury(valkey, 150, stream=OTHER)
    await eyes_of(valkey).xgroup_destroy(OTHER, "index")
    with pytest.raises(UnknownGroup, match=r"bus:\{mail:1\} does not") as caught:
        await valkey.dead_letters("index").redrive()
    assert caught.value.__notes__ == ["100 dead letters were redriven before; run it again"]
    assert await ns_of(valkey, INBOX) == list(range(100))


async def test_a_letter_that_does_not_go_needs_no_group(valkey: Bus) -> None:
    await bury(valkey, 1)
    await eyes_of(valkey).xgroup_destroy(STREAM, "index")
    result = await valkey.dead_letters("index").redrive(edit=lambda _: None)
    assert (result.left_out, result.unserved) == (1, False)


async def test_that_nobody_serves_the_group_is_told_once(bus: Bus) -> None:
    await bury(bus, *range(150))
    await bury(bus, 1, stream=OTHER)
    witness = Witness(bus)
    result = await bus.dead_letters("index").redrive()
    assert (result.redriven, result.unserved) == (151, True)
    (told,) = witness.of("redrive.unserved")
    assert told == {"run": result.run, "stream": STREAM, "group": "index"}


async def serve(bus: Bus, how: str) -> None:
    """Do as somebody does who takes, or does not take, what is in the streams and inboxes.

    There is something to read: before Redis 7.2 only that makes a consumer.
    """
    for stream in (STREAM, OTHER):
        await eyes_of(bus).xadd(stream, {"n": 1})
        if how.startswith("worker"):
            await eyes_of(bus).sadd(f"{stream}:workers", "w")
            await eyes_of(bus).xreadgroup("index", "w", {stream: ">"}, count=1)
        if how == "worker":
            await eyes_of(bus).set(f"{stream}:lease:w", "audit,index,stats")
        if how == "worker of others":
            await eyes_of(bus).set(f"{stream}:lease:w", "audit,indexes,stats")
        if how == "foreign reader":
            await eyes_of(bus).xreadgroup("index", "java", {stream: ">"}, count=1)
        if how == "foreign reader of the inbox":
            await eyes_of(bus).xgroup_create(f"{stream}:inbox:index", "index", "0", mkstream=True)
            await eyes_of(bus).xadd(f"{stream}:inbox:index", {"n": 1})
            await eyes_of(bus).xreadgroup("index", "java", {f"{stream}:inbox:index": ">"}, count=1)
        if how == "lane":
            await eyes_of(bus).xgroup_createconsumer(stream, "index", "parked:1763629200000")


@pytest.mark.parametrize(
    ("how", "served"),
    [
        ("worker", True),
        ("worker of others", False),
        ("worker that is gone", False),
        ("foreign reader", True),
        ("foreign reader of the inbox", True),
        ("lane", False),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
async def test_who_serves_a_group(bus: Bus, how: str, served: bool, dry_run: bool) -> None:
    """As the janitor judges it: by the lease, and who keeps none by when it was heard of."""
    witness = Witness(bus)
    await serve(bus, how)
    await bury(bus, 1)
    result = await bus.dead_letters("index").redrive(dry_run=dry_run)
    assert result.unserved is not served
    assert len(witness.of("redrive.unserved")) == (not served and not dry_run)


@pytest.mark.parametrize("since_ms", [HEARD_OF_MS - 1, HEARD_OF_MS])
async def test_a_reader_that_was_not_heard_of_for_long_does_not_serve(
    valkey: Bus, monkeypatch: Any, since_ms: int
) -> None:
    await serve(valkey, "foreign reader")
    await bury(valkey, 1)
    survey = Leases.survey

    async def later(*args: Any) -> Any:
        seen = await survey(*args)
        for place, consumers in seen.consumers.items():
            seen.consumers[place] = [c._replace(idle_ms=since_ms) for c in consumers]
        return seen

    monkeypatch.setattr(Leases, "survey", later)
    result = await valkey.dead_letters("index").redrive()
    assert result.unserved is (since_ms >= HEARD_OF_MS)


# --- how many go


def purging(server: Any, n: int, ids: list[str]) -> Any:
    """An edit that leaves all as they are; at the letter `n` somebody purges others."""

    def edit(letter: Letter) -> dict[str, Any]:
        if letter.event.n == n:  # type: ignore[attr-defined]
            ask(server, "XDEL", DEAD, *(i.partition("/")[2] for i in ids))
        return {}

    return edit


async def test_a_limit_counts_what_goes_and_not_what_is_gone(bus: Bus, server: Any) -> None:
    ids = await bury(bus, *range(10))
    result = await bus.dead_letters("index").redrive(limit=3, edit=purging(server, 2, ids[:2]))
    assert (result.matched, result.redriven, result.gone) == (5, 3, 2)
    assert await ns_of(bus, INBOX) == [2, 3, 4]
    assert await ns_of(bus, DEAD) == [5, 6, 7, 8, 9]


@pytest.mark.servers_only("it takes a script to add so many fields")
@pytest.mark.parametrize("packed", [False, True])
async def test_a_limit_does_not_count_what_is_stuck(bus: Bus, server: Any, packed: bool) -> None:
    """Else `limit=1` would never come beyond it."""
    big = [f"f{n}" for n in range(7_002)]
    if packed:
        ask(server, "RPUSH", "list", *big)
        script = "return cmsgpack.pack(redis.call('LRANGE', KEYS[1], 0, -1))"
        big = ["deadfields", await eyes_of(bus).eval(script, 1, "list")]
    ask(server, "XADD", DEAD, "*", *big, *[str(w) for p in why().items() for w in p])
    await bury(bus, 1, 2)
    stuck, *_ = await found(bus.dead_letters("index"))
    dry = await bus.dead_letters("index").redrive(dry_run=True, limit=1)
    assert (dry.matched, dry.stuck, len(dry.sample)) == (2, (stuck.id,), 1)
    result = await bus.dead_letters("index").redrive(limit=1)
    assert (result.matched, result.redriven, result.stuck) == (2, 1, (stuck.id,))
    assert await ns_of(bus, INBOX) == [1]


@pytest.mark.servers_only("it takes a script to add so many fields")
@pytest.mark.parametrize("packed", [False, True])
async def test_as_many_fields_as_may_go_do_go(bus: Bus, server: Any, packed: bool) -> None:
    """What is thought to fit must fit the script, on every server."""
    big = [f"f{n}" for n in range(7_000)]
    plain = [w.encode() for w in big]
    if packed:
        ask(server, "RPUSH", "list", *big)
        script = "return cmsgpack.pack(redis.call('LRANGE', KEYS[1], 0, -1))"
        big = ["deadfields", await eyes_of(bus).eval(script, 1, "list")]
    ask(server, "XADD", DEAD, "*", *big, *[str(w) for p in why().items() for w in p])
    result = await bus.dead_letters("index").redrive()
    assert (result.redriven, result.stuck) == (1, ())
    ((_, entry),) = await bus.store.archive.range(INBOX, "-", "+", 10)
    assert entry[:7_000] == plain


async def test_what_the_server_itself_finds_stuck_is_not_counted_either(
    bus: Bus, server: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(redrive, "REDRIVEN_VALUES", 9_999)
    big = [f"f{n}" for n in range(7_002)]
    ask(server, "XADD", DEAD, "*", *big, *[str(w) for p in why().items() for w in p])
    await bury(bus, 1, 2)
    result = await bus.dead_letters("index").redrive(limit=1)
    assert (result.matched, result.redriven, len(result.stuck)) == (2, 1, 1)


# --- how much goes at a time


async def test_what_an_edit_makes_large_goes_in_smaller_calls(valkey: Bus) -> None:
    """Two hundred letters of 100 bytes would be one call of 50 MB."""
    witness = Witness(valkey)
    letters = [own(n, type="mail.padded", data='{"text":""}') | why() for n in range(10)]
    for letter in letters:
        await put(valkey, letter)
    result = await valkey.dead_letters("index").redrive(edit={"text": "x" * 250_000})
    assert result.redriven == 10
    assert [t["count"] for t in witness.of("dead_letters.redriven")] == [4, 4, 2]


async def test_what_an_edit_makes_small_goes_in_larger_calls(valkey: Bus) -> None:
    witness = Witness(valkey)
    for n in range(10):
        data = '{"text":"' + "x" * 250_000 + '"}'
        await put(valkey, own(n, type="mail.padded", data=data) | why())
    await valkey.dead_letters("index").redrive(edit={"text": ""})
    assert [t["count"] for t in witness.of("dead_letters.redriven")] == [10]


async def test_a_letter_above_a_mebibyte_goes_alone(valkey: Bus) -> None:
    witness = Witness(valkey)
    for n, size in enumerate([10, 1_500_000, 10, 10]):
        await put(valkey, own(n, junk="x" * size) | why())
    assert (await valkey.dead_letters("index").redrive()).redriven == 4
    assert [t["count"] for t in witness.of("dead_letters.redriven")] == [1, 1, 2]
    assert await ns_of(valkey, INBOX) == [0, 1, 2, 3]


# --- in order


async def drain(bus: Bus, inbox: str, ns: list[int], most: int) -> None:
    """Take a few out of an inbox, as its workers do."""
    for entry_id, fields in await eyes_of(bus).xrange(inbox, count=most):
        ns.append(int(fields[b"id"][1:]))
        await eyes_of(bus).xdel(inbox, entry_id)


async def test_beside_a_full_inbox_nobody_overtakes_within_a_partition(url: str) -> None:
    """Several batches over both partitions: ten fit into an inbox, and one is emptied slowly."""
    count = 330
    async with Bus.connect(url, topics=[TIGHT]) as bus:
        await prepare(bus)
        witness = Witness(bus)
        pipe = eyes_of(bus).pipeline()
        for n in range(count):
            stream = (STREAM, OTHER)[n % 3 == 0]
            pipe.xadd(f"{stream}:dead:index", own(n) | why(), id=f"{n + 1}-0")
        await pipe.execute()
        handled: dict[str, list[int]] = {STREAM: [], OTHER: []}
        work = asyncio.create_task(bus.dead_letters("index").redrive())
        turn = 0
        while not work.done():
            turn += 1
            await drain(bus, INBOX, handled[STREAM], 7)
            if turn % 3 == 0:
                await drain(bus, f"{OTHER}:inbox:index", handled[OTHER], 2)
            assert (
                max(await eyes_of(bus).xlen(INBOX), await eyes_of(bus).xlen(f"{OTHER}:inbox:index"))
                < 11
            )
            await asyncio.sleep(0)
        for stream in (STREAM, OTHER):
            await drain(bus, f"{stream}:inbox:index", handled[stream], 100)
        result = work.result()
    assert (result.matched, result.redriven, result.waiting) == (count, count, False)
    assert {t["stream"] for t in witness.of("redrive.waits")} == {STREAM, OTHER}
    assert handled[OTHER] == [n for n in range(count) if n % 3 == 0]
    assert handled[STREAM] == [n for n in range(count) if n % 3]


async def test_a_wait_for_room_is_ended_by_a_timeout_and_gone_on_with(valkey_url: str) -> None:
    async with Bus.connect(valkey_url, topics=[TIGHT]) as bus:
        await prepare(bus)
        witness = Witness(bus)
        await bury(bus, *range(15))

        async def give_up() -> None:
            async with asyncio.timeout(None) as limit:
                work = asyncio.ensure_future(bus.dead_letters("index").redrive())
                await eventually(lambda: witness.of("redrive.waits"))
                limit.reschedule(asyncio.get_running_loop().time())
                await work

        with pytest.raises(TimeoutError):
            await give_up()
        assert await ns_of(bus, INBOX) == list(range(10))
        await eyes_of(bus).xtrim(INBOX, 0)
        assert (await bus.dead_letters("index").redrive()).redriven == 5
        assert await ns_of(bus, INBOX) == list(range(10, 15))
