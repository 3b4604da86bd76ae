"""pending: listed, shown, retried, given up on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus import Worker
from tests.cli.shop import OrderPaid, fail
from tests.witness import Witness, eventually

if TYPE_CHECKING:
    from bus import Bus
    from tests.cli.conftest import CommandLine


async def parked(bus: Bus, count: int) -> None:
    """Have so many entries wait for their second attempt."""
    witness = Witness(bus)
    async with Worker(bus, [fail]):
        await bus.publish_many([OrderPaid(order_id="k", cents=n) for n in range(count)])
        await eventually(lambda: len(witness.of("delivery.retried")) == count)


async def test_what_waits_is_listed_shown_retried_and_given_up(cli: CommandLine, bus: Bus) -> None:
    await parked(bus, 4)
    listed = await cli.json("pending", "ls", "patient")
    assert [(e["state"], e["attempts"]) for e in listed] == [("parked", 1)] * 4
    assert [e["event"]["data"]["cents"] for e in listed] == [0, 1, 2, 3]
    one = listed[2]["id"]
    (shown,) = await cli.json("pending", "show", "patient", one)
    assert shown["event"]["data"] == {"order_id": "k", "cents": 2}
    ran = await cli("pending", "show", "patient", one)
    assert ('"cents": 2' in ran.out, "parked" in ran.out) == (True, True)
    ran = await cli("pending", "ls", "patient", "--limit", "2")
    assert (len(ran.out.splitlines()), "and more: --limit 0" in ran.err) == (3, True)
    assert len(await cli.json("pending", "ls", "patient", "--limit", "0")) == 4

    ran = await cli("pending", "retry", "patient", one)
    assert (ran.code, "retry 1 entry of patient now" in ran.err) == (2, True)
    (dry,) = await cli.json("pending", "retry", "patient", "--all", "--dry-run")
    assert (dry["matched"], dry["released"], dry["dry_run"]) == (4, 4, True)
    (done,) = await cli.json("pending", "retry", "patient", one, "--yes")
    assert (done["matched"], done["released"]) == (1, 1)
    witness = Witness(bus)
    async with Worker(bus, [fail]):
        await eventually(lambda: witness.of("delivery.retried", attempt=2))
    listed = await cli.json("pending", "ls", "patient", "--min-attempts", "2")
    assert [e["id"] for e in listed] == [one]

    asked = ("pending", "dead-letter", "patient", "--state", "parked", "--why", "no use")
    ran = await cli(*asked)
    assert (ran.code, "give up 4 entries of patient" in ran.err) == (2, True)
    (done,) = await cli.json(*asked, "--yes")
    assert (done["matched"], done["dead_lettered"]) == (4, 4)
    assert await cli.json("pending", "ls", "patient") == []
    letters = [(x.reason, x.error, x.event.cents) async for x in bus.dead_letters("patient")]
    assert sorted(letters) == [("rejected", "GivenUp: no use", n) for n in range(4)]


async def test_filters_choose(cli: CommandLine, bus: Bus) -> None:
    await parked(bus, 2)
    for nothing in (
        ["--state", "running"],
        ["--type", "order.lost"],
        ["--min-idle", "1h"],
        ["--consumer", "nobody"],
        ["--topic", "order", "--min-attempts", "2"],
    ):
        assert await cli.json("pending", "ls", "patient", *nothing) == [], nothing
    assert len(await cli.json("pending", "ls", "patient", "--type", "order.*")) == 2
    ran = await cli("pending", "retry", "patient", "--state", "running", "--yes")
    assert (ran.code, "nothing like that is pending" in ran.err) == (0, True)
    ran = await cli("pending", "show", "patient", "order:0/1-1")
    assert (ran.code, "is not pending" in ran.err) == (1, True)
    ran = await cli("pending", "show", "patient", "the-first")
    assert (ran.code, "they look like" in ran.err) == (2, True)
