"""Numbers in memory are those of a server: the same digits, and the same refusals."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus
from bus.streams.memory.connection import run
from bus.streams.memory.place import Place
from bus.streams.replies import ReplyError
from tests.eyes import raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.everywhere

NO_FLOAT = "ERR value is not a valid float"
NO_HASH_FLOAT = "ERR hash value is not a float"
NO_SUM = "ERR increment would produce NaN or Infinity"
NUMBERS = {
    "1234.56": b"1234.56000000000000005",
    "299.99": b"299.98999999999999999",
    "10.5": b"10.5",
    "+1": b"1",
    "-0": b"0",
    "0x10": b"16",
    "0X1.8p-1": b"0.75",
    ".5": b"0.5",
    "5.": b"5",
    "1e-20": b"0",
    "-1e-20": b"0",
    "1e-400": b"0",
    "123456789012345678901": b"123456789012345678904",
    "0e99999999999": b"0",
}
NO_NUMBERS = [
    *("", " ", " 1", "1 ", "1_0", "\u0661", "\uff11", "nan", "1e", "0x", ".", "--1", "1\0", "1d"),
    *("infx", "1e4933", "1e-4960", "1e99999999999", "0x1p99999999999", "1" * 5200),
]


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url) as bus:
        yield bus


async def said(bus: Bus, *words: Any) -> Any:
    """The reply as it is on the wire, or the words of a refusal."""
    try:
        return await raw(bus.store, *words)
    except ReplyError as error:
        return error.text


@pytest.mark.parametrize("text", NUMBERS)
async def test_a_number_is_read_and_written_as_by_a_server(bus: Bus, text: str) -> None:
    assert await said(bus, "INCRBYFLOAT", "new", text) == NUMBERS[text]
    assert await said(bus, "HINCRBYFLOAT", "h", "new", text) == NUMBERS[text]
    await raw(bus.store, "SET", "old", text)
    await raw(bus.store, "HSET", "h", "old", text)
    assert await said(bus, "INCRBYFLOAT", "old", "0") == NUMBERS[text]
    assert await said(bus, "HINCRBYFLOAT", "h", "old", "0") == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: repr(text)[:20])
async def test_what_is_no_number_is_refused(bus: Bus, text: str) -> None:
    await raw(bus.store, "SET", "old", text)
    await raw(bus.store, "HSET", "h", "old", text)
    assert await said(bus, "INCRBYFLOAT", "new", text) == NO_FLOAT
    assert await said(bus, "INCRBYFLOAT", "old", "1") == NO_FLOAT
    assert await said(bus, "HINCRBYFLOAT", "h", "new", text) == NO_FLOAT
    assert await said(bus, "HINCRBYFLOAT", "h", "old", "1") == NO_HASH_FLOAT
    assert await said(bus, "HINCRBYFLOAT", "h", "old", text) == NO_FLOAT
    assert await said(bus, "ZADD", "z", text, "m") == NO_FLOAT
    assert await said(bus, "ZINCRBY", "z", text, "m") == NO_FLOAT


async def test_what_is_infinite_cannot_be_added(bus: Bus) -> None:
    for infinite in ("inf", "-Infinity"):
        await raw(bus.store, "SET", "old", infinite)
        await raw(bus.store, "HSET", "h", "old", infinite)
        assert await said(bus, "INCRBYFLOAT", "new", infinite) == NO_SUM
        assert await said(bus, "INCRBYFLOAT", "old", "1") == NO_SUM
        assert await said(bus, "HINCRBYFLOAT", "h", "old", "1") == NO_SUM
        assert (
            await said(bus, "HINCRBYFLOAT", "h", "new", infinite) == "ERR value is NaN or Infinity"
        )
    await raw(bus.store, "SET", "large", "1e4932")
    assert await said(bus, "INCRBYFLOAT", "large", "1e4932") == NO_SUM


@pytest.mark.parametrize("text", ["1e309", "1e-324", "nan"])
async def test_a_score_is_a_number_of_64_bits(bus: Bus, text: str) -> None:
    assert await said(bus, "ZADD", "z", text, "m") == NO_FLOAT


@pytest.mark.parametrize("text", ["10", "0.5", "-7", "inf", "-inf", "10000000000000000", "1e+300"])
async def test_a_score_reads_as_on_a_server(bus: Bus, server_kind: str, text: str) -> None:
    await raw(bus.store, "ZADD", "z", text, "m")
    before_valkey = server_kind.startswith("redis") and text == "1e+300"
    shown = b"1.0000000000000001e+300" if before_valkey else text.encode()
    assert await said(bus, "ZSCORE", "z", "m") == shown


NEWEST_SCORES = {
    "0.1": b"0.1",
    "1e-9": b"1e-9",
    "1e-5": b"0.00001",
    "0.000123456": b"1.23456e-4",
    "-95637.53763266164": b"-9.563753763266164e+4",
    "1e17": b"100000000000000000",
    "9e18": b"9e+18",
    "9223372036854775808": b"9223372036854776000",
    "-0": b"0",
}


@pytest.mark.parametrize("text", NEWEST_SCORES)
async def test_where_servers_differ_a_score_reads_as_on_the_newest(
    bus: Bus, server_kind: str, text: str
) -> None:
    await raw(bus.store, "ZADD", "z", text, "m")
    shown = await said(bus, "ZSCORE", "z", "m")
    assert float(shown) == float(text)
    assert shown == NEWEST_SCORES[text] or server_kind.startswith("redis")


@pytest.mark.servers_only("it holds memory beside the server")
async def test_memory_adds_as_a_server_does(bus: Bus) -> None:
    """Of all sizes and forms: prices, doubles, what no double holds, exponents to the edge, hex."""
    place, dice = Place(""), random.Random(7)
    for _ in range(40):
        commands: list[tuple[str, ...]] = []
        for n in range(25):
            commands.append(("SET", f"k{n}", number(dice)))
            commands += [("INCRBYFLOAT", f"k{n}", number(dice))] * 2
            commands.append(("HSET", "h", f"f{n}", number(dice)))
            commands.append(("HINCRBYFLOAT", "h", f"f{n}", number(dice)))
        replies = await bus.store.commands.pipeline(commands)
        ours = [said_in(place, command) for command in commands]
        theirs = [r.text if isinstance(r, ReplyError) else r for r in replies]
        for command, mine, other in zip(commands, ours, theirs, strict=True):
            assert mine == other, command


def said_in(place: Place, command: tuple[str, ...]) -> Any:
    try:
        return run(place, *command)
    except ReplyError as error:
        return error.text


def number(dice: random.Random) -> str:
    double = struct.unpack("d", dice.randbytes(8))[0]
    return dice.choice(
        [
            f"{dice.randrange(100_000)}.{dice.randrange(100):02}",
            repr(dice.uniform(-1e6, 1e6)),
            repr(double),
            str(dice.randrange(-(2**66), 2**66)),
            f"{dice.randrange(10)}.{dice.randrange(10**24)}e{dice.randrange(-30, 30)}",
            f"{dice.randrange(1, 10**5)}e{dice.randrange(-4_960, 4_940)}",
            f"-0x{dice.getrandbits(40):x}.{dice.getrandbits(60):x}p{dice.randrange(-70, 70)}",
        ]
    )
