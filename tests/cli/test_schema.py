"""schema: listed, exported and checked on the command line; no server is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import CommandLine


async def test_schemas_are_listed_exported_and_checked(cli: CommandLine, shop: Path) -> None:
    listed = await cli.json("schema", "ls", "--app", "shop")
    assert [(x["type"], x["version"], x["key"]) for x in listed] == [
        ("order.lost", 2, "order_id"),
        ("order.paid", 1, "order_id"),
    ]
    written = await cli.json("schema", "export", "schemas", "--app", "shop")
    assert [x["written"] for x in written] == [True, True]
    assert sorted(p.name for p in (shop / "schemas").iterdir()) == [
        "order.lost.v2.json",
        "order.paid.v1.json",
    ]
    written = await cli.json("schema", "export", "--app", "shop")
    assert [x["written"] for x in written] == [False, False]
    assert await cli.json("schema", "check", "--app", "shop") == []

    changed = (shop / "shop.py").read_text().replace("cents: int", "cents: int\n    tax: int")
    (shop / "shop.py").write_text(changed)
    ran = await cli("schema", "check", "--app", "shop")
    assert (ran.code, "BREAKS" in ran.out, "tax" in ran.out) == (1, True, True)
    ran = await cli("schema", "check", "--app", "shop", "--readers", "old")
    assert ran.code == 0
    ran = await cli("schema", "check", "--app", "shop", "--json")
    assert ran.lines[0]["severity"] == "breaks"
    ran = await cli("schema", "check", "nowhere", "--app", "shop")
    assert (ran.code, "there is no such folder" in ran.out) == (1, True)


async def test_the_application_may_be_named_in_the_environment(cli: CommandLine) -> None:
    ran = await cli("schema", "ls", BUS_APP="shop")
    assert (ran.code, "shop.OrderPaid" in ran.out) == (0, True)
