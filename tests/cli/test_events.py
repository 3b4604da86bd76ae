"""publish, tail, history, replay: events in, and looked at, on the command line."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

from bus import Worker
from tests.cli.conftest import CommandLine, ended
from tests.cli.shop import OrderPaid, send_receipt
from tests.witness import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from bus import Bus

PAID = '{"order_id":"o-1","cents":1250}'


def lines(*orders: tuple[str, Any]) -> str:
    return "".join(json.dumps({"order_id": o, "cents": c}) + "\n" for o, c in orders)


async def paid(bus: Bus, count: int, key: str = "") -> None:
    """Publish events of one key, which are in order, or of a key each."""
    for n in range(count):
        await bus.publish(OrderPaid(order_id=key or f"o-{n}", cents=n))


async def first(process: asyncio.subprocess.Process, count: int = 1) -> list[dict[str, Any]]:
    """The next lines of JSON of a command that goes on."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return [json.loads(await process.stdout.readline()) for _ in range(count)]


# --- publish


async def test_an_event_is_published_by_its_class(cli: CommandLine, bus: Bus) -> None:
    (said,) = await cli.json("publish", "order.paid", PAID, "--app", "shop", "--source", "shell")
    (envelope,) = [e async for e in bus.history("order")]
    assert envelope.event == OrderPaid(order_id="o-1", cents=1250)
    assert (envelope.key, envelope.source, envelope.version) == ("o-1", "shell", 1)
    assert (said["stream"], said["entry_id"]) == (envelope.stream, envelope.entry_id)
    assert said["event_id"] == envelope.event_id
    assert said["id"] == f"order:{envelope.stream[-2]}/{envelope.entry_id}"


async def test_what_its_class_does_not_take_is_not_published(cli: CommandLine, bus: Bus) -> None:
    ran = await cli("publish", "order.paid", '{"order_id":1,"cents":1}', "--app", "shop")
    assert (ran.code, "Expected `str`, got `int`" in ran.err) == (1, True)
    ran = await cli("publish", "order.paid", "{", "--app", "shop")
    assert ran.code == 1
    ran = await cli("publish", "order.paid", PAID, "--app", "shop", "--key", "x")
    assert (ran.code, "says what its key and topic are" in ran.err) == (2, True)
    ran = await cli("publish", "order.lost", "{}", "--app", "shop", "--version", "1")
    assert (ran.code, "known versions: [2]" in ran.err) == (1, True)
    assert [e async for e in bus.history("order")] == []


async def test_an_event_of_no_known_class_goes_as_it_is_and_it_says_so(
    cli: CommandLine, bus: Bus
) -> None:
    ran = await cli("publish", "order.sent", '{"x":[1]}', "--key", "k", "--version", "3")
    assert (ran.code, "is not checked" in ran.err) == (0, True)
    (envelope,) = [e async for e in bus.history("order")]
    assert (envelope.type, envelope.version, envelope.key) == ("order.sent", 3, "k")
    assert envelope.data == b'{"x":[1]}'
    ran = await cli("publish", "order.sent", "{}", "--app", "shop")
    assert (ran.code, "--raw publishes it" in ran.err) == (2, True)
    ran = await cli("publish", "order.sent", "{}", "--app", "shop", "--raw")
    assert ran.code == 0
    ran = await cli("publish", "parcel.sent", "{}")
    assert (ran.code, "there is no topic parcel" in ran.err) == (2, True)
    await cli.json("publish", "parcel.sent", "{}", "--new-topic")
    await cli.json("publish", "parcel.sent", "{}")
    assert [e.type async for e in bus.history("parcel")] == ["parcel.sent"] * 2
    for bad in ("[1]", "1", "{", "NaN", ""):
        ran = await cli("publish", "order.sent", bad)
        assert ran.code == 1, bad


async def test_all_headers_travel(cli: CommandLine, bus: Bus) -> None:
    said = ("--id", "e-1", "--correlation-id", "c", "--causation-id", "d")
    time = ("--time", "2026-11-20T09:00:00+01:00", "--traceparent", "00-1-2-01")
    await cli.json("publish", "order.paid", PAID, *said, *time, "--topic", "order")
    (e,) = [e async for e in bus.history("order")]
    assert (e.event_id, e.correlation_id, e.causation_id) == ("e-1", "c", "d")
    assert (e.time.isoformat(), e.traceparent) == ("2026-11-20T08:00:00+00:00", "00-1-2-01")


async def test_lines_of_stdin_and_of_a_file_are_an_event_each(
    cli: CommandLine, bus: Bus, shop: Path
) -> None:
    text = lines(("a", 1), ("b", 2)) + "\n\n" + lines(("c", 3)).rstrip("\n")
    said = await cli.json("publish", "order.paid", "-", "--lines", "--app", "shop", stdin=text)
    assert len(said) == 3
    (shop / "orders.jsonl").write_text(text)
    await cli.json("publish", "order.paid", "@orders.jsonl", "--lines", "--app", "shop")
    found = [e.event.cents async for e in bus.history("order", types=[OrderPaid])]
    assert sorted(found) == [1, 1, 2, 2, 3, 3]


async def test_a_document_of_many_lines_is_one_event(
    cli: CommandLine, bus: Bus, shop: Path
) -> None:
    text = json.dumps({"order_id": "o", "cents": 1}, indent=2)
    await cli.json("publish", "order.paid", "--app", "shop", stdin=text)
    (shop / "order.json").write_text(text)
    await cli.json("publish", "order.paid", "@order.json", "--app", "shop")
    assert len([e async for e in bus.history("order")]) == 2


async def test_a_bad_line_ends_it_and_is_named(cli: CommandLine, bus: Bus, shop: Path) -> None:
    text = lines(("a", 1), ("b", 2), ("c", "three"), ("d", 4))
    ran = await cli("publish", "order.paid", "-", "--lines", "--app", "shop", stdin=text)
    assert ran.code == 1
    assert (
        "it was line 3 of stdin; 2 events were published, and nothing behind it was tried"
        in ran.err
    )
    assert sorted([e.key async for e in bus.history("order")]) == ["a", "b"]
    large = lines(("a", 1), ("x" * 300_000, 2), ("b", 3), ("y" * 300_000, 4)) + lines(("c", 5)) * 3
    (shop / "large.jsonl").write_text(large)
    ran = await cli("publish", "order.paid", "@large.jsonl", "--lines", "--app", "shop")
    assert ran.code == 1
    assert "not published, or nobody knows: line 2 of large.jsonl, line 4 of large.jsonl" in ran.err
    assert "5 events were published, and nothing behind these was tried" in ran.err
    ran = await cli("publish", "order.paid", "@nowhere.json")
    assert (ran.code, "nowhere.json" in ran.err) == (1, True)


async def test_lines_are_published_as_they_come(cli: CommandLine, bus: Bus) -> None:
    """Whoever writes them may take an hour for the next."""
    process = await cli.start("publish", "order.paid", "-", "--lines", "--app", "shop", "--json")
    assert process.stdin is not None
    for n in range(3):
        process.stdin.write(lines((f"o-{n}", n)).encode())
        (said,) = await first(process)
        assert said["stream"].startswith("bus:{order:")
    process.send_signal(signal.SIGINT)
    assert (await ended(process)).code == 130


async def test_one_is_published_many_times_and_at_a_rate(cli: CommandLine, bus: Bus) -> None:
    clock = asyncio.get_running_loop().time
    began = clock()
    ran = await cli("publish", "order.paid", PAID, "--app", "shop", "--count", "40", "--rate", "40")
    assert (ran.code, "published 40 events" in ran.err, ran.out) == (0, True, "")
    assert clock() - began > 0.9
    found = [e.event_id async for e in bus.history("order")]
    assert (len(found), len(set(found))) == (40, 40)


async def test_a_topic_of_the_application_is_recorded_as_it_declares(
    cli: CommandLine, valkey_url: str
) -> None:
    await cli.json("publish", "order.paid", PAID, "--app", "shop")
    (topic,) = await cli.json("topics", "ls")
    assert (topic["name"], topic["partitions"], topic["implicit"]) == ("order", 2, False)


# --- tail


async def test_what_comes_is_followed(cli: CommandLine, bus: Bus) -> None:
    process = await cli.start("tail", "order", "--since", "start", "--json")
    await paid(bus, 3)
    said = await first(process, 3)
    assert sorted(s["data"]["cents"] for s in said) == [0, 1, 2]
    assert {s["type"] for s in said} == {"order.paid"}


async def test_a_tail_ends_after_so_many_or_when_nothing_comes(cli: CommandLine, bus: Bus) -> None:
    await paid(bus, 5)
    said = await cli.json("tail", "order", "--since", "start", "--limit", "2")
    assert len(said) == 2
    said = await cli.json("tail", "order", "--since", "@-1h", "--until-idle", "300ms")
    assert len(said) == 5
    last = said[-1]
    said = await cli.json("tail", "order", "--since", last["entry_id"], "--until-idle", "300ms")
    assert last["id"] not in [s["id"] for s in said]


async def test_a_tail_chooses(cli: CommandLine, bus: Bus) -> None:
    await paid(bus, 5)
    await bus.redis.xadd("bus:{order:1}", {"id": "1", "type": "order.sent", "data": "{}"})
    start = ("tail", "order", "--since", "start", "--until-idle", "300ms")
    said = await cli.json(*start, "--type", "order.paid", "--where", "cents > 2")
    assert sorted(s["data"]["cents"] for s in said) == [3, 4]
    said = await cli.json(*start, "--key", "o-1")
    assert [s["key"] for s in said] == ["o-1"]


# --- history


async def test_history_is_told_in_lines(cli: CommandLine, bus: Bus) -> None:
    await paid(bus, 4, key="o-0")
    said = await cli.json("history", "order", "--since", "@-1h", "--until", "end")
    assert [s["data"]["cents"] for s in said] == [0, 1, 2, 3]
    said = await cli.json("history", "order", "--reverse", "--limit", "2")
    assert [s["data"]["cents"] for s in said] == [3, 2]
    said = await cli.json("history", "order", "--since", said[0]["entry_id"])
    assert [s["data"]["cents"] for s in said] == [3]
    ran = await cli("history", "order", "--type", "order.paid", "-n", "1")
    line = r"2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z  order:\d/\d+-\d+  order\.paid  o-0  (.*)\n"
    assert re.fullmatch(line, ran.out)[1] == '{"order_id":"o-0","cents":0}'


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("data.cents >= 2", [2, 3]),
        ("cents in (0, 3) and type == 'order.paid'", [0, 3]),
        ("not cents", [0]),
        ("key == 'o-1' or order_id.endswith('-2')", [1, 2]),
        ("like('o-[12]', order_id)", [1, 2]),
        ("nothing is None and len(order_id) == 3", [0, 1, 2, 3]),
        ("time < '2000'", []),
    ],
)
async def test_an_expression_chooses(
    cli: CommandLine, bus: Bus, where: str, found: list[int]
) -> None:
    await paid(bus, 4)
    said = await cli.json("history", "order", "--where", where)
    assert sorted(s["data"]["cents"] for s in said) == found


async def test_of_what_an_expression_cannot_judge_it_says_how_many(
    cli: CommandLine, bus: Bus
) -> None:
    await paid(bus, 4)
    ran = await cli("history", "order", "--where", "cnets > 2")
    assert (ran.code, ran.out) == (0, "")
    assert "--where could not be judged of 4 events" in ran.err


async def test_what_a_terminal_would_obey_is_escaped_everywhere(cli: CommandLine, bus: Bus) -> None:
    """C0, DEL, C1, line and paragraph separators, direction marks, in every place of an event."""
    evil = "\x1b]0;owned\x07\x7f\x9b31m\u202e\u2028\u2066\x85ok"
    unsafe = set(evil) - set("]0;owned31mok")
    data = json.dumps({"order_id": evil, "cents": -1}, ensure_ascii=False)
    fields = {"id": evil, "type": f"order.paid{evil}", "data": data, "partitionkey": evil}
    await bus.admin.create_group("receipts", "order")
    await bus.redis.xadd("bus:{order:0}", fields)
    dead = {"deadreason": "failed", "deaderror": f"E: {evil}", "deadtraceback": evil}
    dead |= {"deadattempts": "1", "deadentry": "1-0", "deadtime": "1"}
    letter = (await bus.redis.xadd("bus:{order:0}:dead:receipts", fields | dead)).decode()
    await bus.redis.xreadgroup("receipts", evil, {"bus:{order:0}": ">"})
    entry = (await bus.redis.xrange("bus:{order:0}"))[0][0].decode()
    for words in (
        ["history", "order"],
        ["tail", "order", "--since", "start", "--limit", "1"],
        ["dead", "ls", "receipts"],
        ["dead", "show", "receipts", letter],
        ["dead", "export", "receipts", "-"],
        ["pending", "ls", "receipts"],
        ["pending", "show", "receipts", entry],
        ["consumers", "ls"],
        ["groups", "info", "receipts"],
        ["replay", "order", "--into", "receipts", "--dry-run"],
    ):
        for json_too in ([], ["--json"]):
            ran = await cli(*words, *json_too)
            assert ran.code == 0, (words, ran.err)
            shown = set((ran.out + ran.err).replace("\n", ""))
            assert not shown & unsafe, words
            assert "ok" in ran.out, words
            if json_too and words[:2] != ["replay", "order"]:
                assert any(evil in text for text in strings(ran.lines)), words


def strings(value: Any) -> list[str]:
    """Every text in a JSON document."""
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value] if isinstance(value, str) else []


# --- replay


async def test_a_replay_reaches_one_group(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    await paid(bus, 10)
    asked = ("replay", "order", "--into", "receipts", "--where", "cents >= 4")
    (dry,) = await cli.json(*asked, "--dry-run")
    assert (dry["read"], dry["matched"], dry["replayed"], dry["dry_run"]) == (10, 6, 0, True)
    assert sorted(s["data"]["cents"] for s in dry["sample"]) == [4, 5, 6, 7, 8, 9]
    assert await bus.redis.xlen("bus:{order:0}:inbox:receipts") == 0
    ran = await cli(*asked)
    assert (ran.code, "say --yes" in ran.err, "replay 6 of 10 events" in ran.err) == (2, True, True)
    (done,) = await cli.json(*asked, "--yes", "--limit", "5", "--rate", "1000")
    assert (done["replayed"], done["dry_run"]) == (5, False)
    inboxes = [await bus.redis.xlen(f"bus:{{order:{p}}}:inbox:receipts") for p in (0, 1)]
    assert sum(inboxes) == 5
    async with Worker(bus, [send_receipt]) as worker:
        await worker.drained()


async def test_a_replay_that_was_interrupted_goes_on(
    cli: CommandLine, bus: Bus, shop: Path
) -> None:
    await bus.admin.create_group("receipts", "order")
    await bus.publish_many([OrderPaid(order_id=str(n), cents=n) for n in range(900)])
    asked = ("replay", "order", "--into", "receipts", "--checkpoint", "again", "--yes")
    process = await cli.start(*asked, "--rate", "300")

    async def count() -> int:
        lengths = [await bus.redis.xlen(f"bus:{{order:{p}}}:inbox:receipts") for p in (0, 1)]
        return sum(lengths)

    async def some() -> bool:
        return await count() > 50

    await eventually(some)
    process.send_signal(signal.SIGINT)
    assert (await ended(process)).code == 130
    assert (shop / "again").exists()
    before = await count()
    assert before < 900
    (done,) = await cli.json(*asked)
    assert (done["resumed"], done["replayed"], await count()) == (True, 900, 900)


async def test_a_replay_for_nobody_says_so(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    await paid(bus, 1)
    ran = await cli("replay", "order", "--into", "receipts", "--yes")
    assert (ran.code, "nobody serves receipts now" in ran.err) == (0, True)
    ran = await cli("replay", "order", "--into", "reciepts", "--yes")
    assert (ran.code, "did you mean receipts?" in ran.err) == (2, True)
