"""dead: letters listed, shown, redriven, changed, purged, exported on the command line."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bus import Worker
from tests.cli.shop import OrderPaid, send_receipt

if TYPE_CHECKING:
    from bus import Bus
    from tests.cli.conftest import CommandLine, Ran


async def dead(bus: Bus, *cents: int) -> list[str]:
    """Have these orders die; return the ids of the letters."""
    async with Worker(bus, [send_receipt]) as worker:
        for n in cents:
            await bus.publish(OrderPaid(order_id="k", cents=n))
            await worker.drained()
    return [letter.id async for letter in bus.dead_letters("receipts")]


async def test_letters_are_counted_listed_and_shown(cli: CommandLine, bus: Bus) -> None:
    one, two, three = await dead(bus, -1, -2, -3)
    (count,) = await cli.json("dead", "ls")
    assert (count["topic"], count["group"], count["dead"]) == ("order", "receipts", 3)
    listed = await cli.json("dead", "ls", "receipts")
    assert [(x["id"], x["data"]["cents"]) for x in listed] == [(one, -1), (two, -2), (three, -3)]
    listed = await cli.json("dead", "ls", "receipts", "--reverse", "--limit", "1")
    assert [x["id"] for x in listed] == [three]
    (shown,) = await cli.json("dead", "show", "receipts", two)
    assert (shown["error"], shown["attempts"]) == ("ValueError: less than nothing: -2", 1)
    ran = await cli("dead", "show", "receipts", two)
    assert ('"cents": -2' in ran.out, "in send_receipt" in ran.out) == (True, True)
    ran = await cli("dead", "ls", "receipts", "-n", "2")
    assert (len(ran.out.splitlines()), "and more" in ran.err) == (3, True)


async def test_filters_choose(cli: CommandLine, bus: Bus) -> None:
    await dead(bus, -1, -2, -3)
    for wanted, found in (
        (["--error", "*nothing: -2"], [-2]),
        (["--error", "Timeout*"], []),
        (["--reason", "failed", "--reason", "crashed"], [-1, -2, -3]),
        (["--reason", "rejected"], []),
        (["--type", "order.*", "--where", "data.cents < -1"], [-2, -3]),
        (["--where", "reason == 'failed' and attempts == 1 and cents == -1"], [-1]),
        (["--since", "@-1h", "--until", "end"], [-1, -2, -3]),
        (["--until", "@-1h"], []),
        (["--topic", "order"], [-1, -2, -3]),
    ):
        listed = await cli.json("dead", "ls", "receipts", *wanted)
        assert [x["data"]["cents"] for x in listed] == found, wanted
    ran = await cli("dead", "ls", "receipts", "--reason", "bored")
    assert (ran.code, "is no reason" in ran.err) == (2, True)
    ran = await cli("dead", "ls", "--error", "x")
    assert (ran.code, "of which group?" in ran.err) == (2, True)
    ran = await cli("dead", "show", "receipts", "order:0/1-1")
    assert (ran.code, "has no dead letter" in ran.err) == (1, True)


async def test_letters_go_back_to_their_handler(cli: CommandLine, bus: Bus) -> None:
    one, *_ = await dead(bus, -1, -2, -3)
    ran = await cli("dead", "redrive", "receipts", one)
    assert (ran.code, "redrive 1 dead letter into receipts" in ran.err) == (2, True)
    (dry,) = await cli.json("dead", "redrive", "receipts", "--all", "--dry-run")
    assert (dry["matched"], dry["redriven"], len(dry["sample"])) == (3, 0, 3)
    ran = await cli("dead", "redrive", "receipts", one, "--yes", "--set", "cents=1")
    assert (ran.code, "--app" in ran.err or "Import the module" in ran.err) == (1, True)
    shop = ("--app", "shop", "--yes")
    ran = await cli("dead", "redrive", "receipts", one, "--set", "cnets=1", *shop)
    assert (ran.code, "did you mean cents?" in ran.err) == (1, True)
    (done,) = await cli.json("dead", "redrive", "receipts", one, "--set", "cents=7", *shop)
    assert (done["redriven"], done["dry_run"], done["unserved"]) == (1, False, True)
    (done,) = await cli.json("dead", "redrive", "receipts", "--limit", "1", "--yes")
    assert done["redriven"] == 1
    async with Worker(bus, [send_receipt]) as worker:
        await worker.drained()
    left = [letter.event.cents async for letter in bus.dead_letters("receipts")]
    assert sorted(left) == [-3, -2], "one was mended, one died again"


async def test_one_letter_is_changed_in_the_editor(cli: CommandLine, bus: Bus, shop: Path) -> None:
    one, two = await dead(bus, -1, -2)
    editor = shop / "editor.py"
    editor.write_text(
        "import json, sys, pathlib\n"
        "file = pathlib.Path(sys.argv[-1])\n"
        "event = json.loads(file.read_text())\n"
        "assert event == {'order_id': 'k', 'cents': -1}\n"
        "assert file.stat().st_mode & 0o077 == 0\n"
        "file.write_text(json.dumps({**event, 'cents': 5}))\n"
    )
    asked = ("dead", "redrive", "receipts", "--edit", "--app", "shop", "--yes", "--json")
    ran = await cli(*asked, one, EDITOR=f"'{sys.executable}' '{editor}'")
    assert (ran.code, ran.lines[0]["redriven"]) == (0, 1), ran
    ran = await cli(*asked, two, EDITOR="true")
    assert (ran.code, "nothing was changed" in ran.err) == (0, True)
    ran = await cli(*asked, two, EDITOR="false")
    assert (ran.code, "ended with 1" in ran.err) == (0, True)
    await dead(bus, -4)
    ran = await cli(*asked, "--all", EDITOR="true")
    assert (ran.code, "--edit is of one letter" in ran.err) == (2, True)
    async with Worker(bus, [send_receipt]) as worker:
        await worker.drained()
    assert [x.event.cents async for x in bus.dead_letters("receipts")] == [-2, -4]


async def test_what_was_saved_in_the_editor_is_the_whole_event_or_stays_in_its_file(
    cli: CommandLine, bus: Bus, shop: Path
) -> None:
    (one,) = await dead(bus, -1)
    editor = shop / "editor.py"
    write = editor.write_text

    def taken(err: str) -> str:
        """Take away the file that an error names."""
        kept = Path(err.partition("What was saved is in ")[2].strip())
        text = kept.read_text()
        kept.unlink()
        return text

    async def saved(text: str, *more: str) -> Ran:
        write(f"import sys; open(sys.argv[-1], 'w').write({text!r})")
        asked = ("dead", "redrive", "receipts", one, "--edit", "--yes", *more)
        return await cli(*asked, EDITOR=f"'{sys.executable}' '{editor}'")

    for text, said in (
        ('{"order_id": "k"}', "missing required field `cents`"),
        ('{"order_id": "k", "cents": 1, "cnets": 2}', "did you mean cents?"),
        ('{"order_id": "k", "cents": "x"}', "Expected `int`"),
        ("[1]", "it is no JSON object"),
        ("{", "it is no JSON object"),
    ):
        ran = await saved(text, "--app", "shop")
        assert (ran.code, said in ran.err) == (2, True), ran
        assert taken(ran.err) == text
    ran = await saved("{}")
    assert (ran.code, "no class of order.paid is known here" in ran.err) == (2, True)
    ran = await saved('{"order_id": "k", "cents": 4}', "--app", "shop", "--dry-run")
    assert (ran.code, f'{one} becomes {{"order_id":"k","cents":4}}' in ran.err) == (0, True)
    assert [x.event.cents async for x in bus.dead_letters("receipts")] == [-1]


async def test_ids_that_are_not_there_are_said_and_exit_with_1(cli: CommandLine, bus: Bus) -> None:
    one, two = await dead(bus, -1, -2)
    gone = "order:0/1-1"
    ran = await cli("dead", "redrive", "receipts", one, gone, "--yes")
    assert (ran.code, "1 of the ids are no dead letters" in ran.err) == (1, True)
    assert "redrove 1 dead letter" in ran.err
    ran = await cli("dead", "purge", "receipts", one, "--yes")
    assert (ran.code, "no dead letter like that" in ran.err) == (1, True)
    ran = await cli("dead", "export", "receipts", "-", two, gone)
    assert (ran.code, len(ran.lines)) == (1, 1)
    ran = await cli("dead", "purge", "receipts", "--type", "order.lost", "--yes")
    assert ran.code == 0, "a filter may find nothing"


async def test_what_where_cannot_judge_is_said(cli: CommandLine, bus: Bus) -> None:
    await dead(bus, -1, -2)
    for words in (["ls"], ["export"], ["redrive"], ["purge"]):
        more = ["-"] if words == ["export"] else []
        asked = ("dead", *words, "receipts", *more, "--where", "order_id > 5")
        ran = await cli(*asked, *(["--dry-run"] if words[0] in ("redrive", "purge") else []))
        assert ran.code == 0
        assert "--where could not be judged of 2 events" in ran.err


async def test_a_paused_group_is_said_before_anything_waits_for_it(
    cli: CommandLine, bus: Bus
) -> None:
    await dead(bus, -1)
    await bus.admin.pause_group("receipts")
    ran = await cli("dead", "redrive", "receipts", "--all", "--dry-run")
    assert "receipts is paused on order" in ran.err
    ran = await cli("replay", "order", "--into", "receipts", "--dry-run")
    assert "receipts is paused on order" in ran.err
    ran = await cli("pending", "retry", "receipts", "--all", "--dry-run")
    assert "receipts is paused on order" in ran.err


async def test_letters_are_written_down_and_deleted(cli: CommandLine, bus: Bus, shop: Path) -> None:
    one, *_ = await dead(bus, -1, -2, -3)
    (done,) = await cli.json("dead", "export", "receipts", "letters.jsonl")
    assert done == {"exported": 3, "file": "letters.jsonl"}
    written = [json.loads(line) for line in (shop / "letters.jsonl").read_text().splitlines()]
    assert [x["data"]["cents"] for x in written] == [-1, -2, -3]
    assert stat.S_IMODE((shop / "letters.jsonl").stat().st_mode) == 0o600
    ran = await cli("dead", "export", "receipts", "-", one)
    assert ran.lines == written[:1]
    ran = await cli("dead", "export", "receipts", "no/such/folder")
    assert (ran.code, "No such file" in ran.err) == (1, True)
    ran = await cli("dead", "purge", "receipts", "--all")
    assert (ran.code, "delete 3 dead letters of receipts for good" in ran.err) == (2, True)
    (dry,) = await cli.json("dead", "purge", "receipts", "--all", "--dry-run")
    assert (dry["matched"], dry["purged"], len(dry["sample"])) == (3, 0, 3)
    (done,) = await cli.json("dead", "purge", "receipts", one, "--yes")
    assert (done["matched"], done["purged"]) == (1, 1)
    (done,) = await cli.json("dead", "purge", "receipts", "--error", "Value*", "--yes")
    assert done["purged"] == 2
    assert await cli.json("dead", "ls") == []
