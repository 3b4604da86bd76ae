"""topics: listed, looked at, changed, trimmed on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.cli.shop import OrderPaid

if TYPE_CHECKING:
    from bus import Bus
    from tests.cli.conftest import CommandLine


async def test_topics_are_listed_and_looked_at(cli: CommandLine, bus: Bus) -> None:
    await bus.publish_many([OrderPaid(order_id=str(n), cents=n) for n in range(20)])
    await bus.admin.create_group("receipts", "order")
    (topic,) = await cli.json("topics", "ls")
    assert (topic["name"], topic["partitions"], topic["keep"]) == ("order", 2, 1_000)
    assert sum(s["length"] for s in topic["streams"]) == 20
    (same,) = await cli.json("topics", "info", "order")
    assert same["groups"][0]["undelivered"] == 20
    ran = await cli("topics", "ls")
    header, row = ran.out.splitlines()
    assert header.split()[:3] == ["topic", "partitions", "entries"]
    assert row.split()[:3] == ["order", "2", "20"]
    ran = await cli("topics", "info", "order")
    assert all(word in ran.out for word in ("maxlen", "50,000", "bus:{order:1}", "receipts"))


async def test_a_record_that_cannot_be_read_is_named(cli: CommandLine, bus: Bus) -> None:
    await bus.redis.hset("bus:topics", "broken", "{")
    ran = await cli("topics", "ls")
    assert (ran.code, "broken" in ran.err, "order" in ran.out) == (0, True, True)


async def test_marks_are_changed_after_a_question(cli: CommandLine, bus: Bus) -> None:
    asked = ("topics", "set", "order", "--maxlen", "60000", "--retention", "7d")
    ran = await cli(*asked)
    assert (ran.code, "say --yes" in ran.err) == (2, True)
    assert "maxlen 50,000 becomes 60,000, retention no limit becomes 7 d" in ran.err
    (dry,) = await cli.json(*asked, "--dry-run")
    assert (dry["before"]["maxlen"], dry["after"]["maxlen"], dry["dry_run"]) == (
        50_000,
        60_000,
        True,
    )
    assert (await bus.topics.recorded("order")).maxlen == 50_000
    (done,) = await cli.json(*asked, "--yes")
    assert (done["after"]["retention_s"], done["dry_run"]) == (604_800, False)
    record = await bus.topics.recorded("order")
    assert (record.maxlen, record.keep, record.retention_s) == (60_000, 1_000, 604_800)
    (done,) = await cli.json("topics", "set", "order", "--retention", "none", "--yes")
    assert done["after"]["retention_s"] is None
    ran = await cli("topics", "set", "order", "--retention", "none", "--yes")
    assert (ran.code, "has these marks already" in ran.err) == (0, True)
    ran = await cli("topics", "set", "order", "--keep", "60000", "--yes")
    assert (ran.code, "must be below maxlen" in ran.err) == (2, True)


async def test_a_trim_removes_what_nobody_needs(cli: CommandLine, bus: Bus) -> None:
    await bus.publish_many([OrderPaid(order_id="k", cents=n) for n in range(300)])
    ids = [e.entry_id async for e in bus.history("order")]
    await bus.admin.create_group("receipts", "order", at=ids[100])
    asked = ("topics", "trim", "order", "--keep", "50")
    ran = await cli(*asked)
    assert (ran.code, "remove 100 entries of order for good" in ran.err) == (2, True)
    assert "group receipts needs the rest of it" in ran.err
    (dry,) = await cli.json(*asked, "--dry-run")
    assert (sum(s["removed"] for s in dry["streams"]), dry["dry_run"]) == (100, True)
    (done,) = await cli.json(*asked, "--yes")
    assert sum(s["removed"] for s in done["streams"]) == 100
    assert [e.entry_id async for e in bus.history("order")] == ids[100:]
    ran = await cli("topics", "trim", "order", "--before", ids[100])
    assert (ran.code, "nothing is to be removed" in ran.err) == (0, True)
