"""What only a terminal sees: questions, bars, colours, a screen that changes."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from bus import Bus, Worker
from tests.cli.conftest import CommandLine
from tests.cli.shop import ORDERS, OrderPaid, fail, send_receipt
from tests.witness import eventually

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from tests.cli.zygote import Zygote
    from tests.conftest import PrivateServer

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, cli: CommandLine, *arguments: str, **environment: str) -> None:
        ours, theirs = pty.openpty()
        os.set_blocking(ours, False)
        self._ours = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bus", *arguments],
            cwd=cli.folder,
            env=cli.environment | {"TERM": "xterm-256color"} | environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def read(self) -> str:
        with suppress(BlockingIOError, OSError):
            while part := os.read(self._ours, 65_536):
                self.shown += part.decode()
        return self.shown

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    async def until(self, text: str) -> None:
        await eventually(lambda: text in self.read(), f"{text!r} in {self.shown!r}")

    async def ended(self) -> int:
        await eventually(lambda: (self.read(), self.process.poll())[1] is not None)
        self.read()
        return int(self.process.returncode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._ours)


async def waiting(bus: Bus, count: int) -> None:
    await bus.admin.create_group("receipts", "order")
    await bus.publish_many([OrderPaid(order_id=str(n), cents=n) for n in range(count)])


async def test_what_cannot_be_undone_is_asked_about(cli: CommandLine, bus: Bus) -> None:
    await waiting(bus, 10)
    for answer, code in (("n\n", 1), ("\n", 1), ("maybe\n", 1)):
        with Terminal(cli, "groups", "rm", "receipts") as terminal:
            await terminal.until("go on? [y/N]")
            terminal.type(answer)
            assert await terminal.ended() == code
            assert "nothing was changed" in terminal.shown
    with Terminal(cli, "groups", "rm", "receipts") as terminal:
        await terminal.until("go on? [y/N]")
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.ended() == 130
    assert len(await cli.json("groups", "ls")) == 1
    with Terminal(cli, "groups", "rm", "receipts") as terminal:
        await terminal.until("undelivered")
        await terminal.until("go on? [y/N]")
        terminal.type("y\n")
        assert await terminal.ended() == 0
    assert await cli.json("groups", "ls") == []


async def test_a_replay_shows_a_bar_and_without_a_terminal_none(cli: CommandLine, bus: Bus) -> None:
    await waiting(bus, 300)
    asked = ("replay", "order", "--into", "receipts", "--yes")
    with Terminal(cli, *asked, "--rate", "600") as terminal:
        await terminal.until("replay into receipts")
        await terminal.until("%")
        assert await terminal.ended() == 0
        assert "replayed 300 of 300 events" in terminal.shown
    ran = await cli(*asked)
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "replayed 300 of 300 events")
    assert "%" not in ran.err


async def test_colours_are_for_terminals_that_want_them(cli: CommandLine, bus: Bus) -> None:
    await bus.publish(OrderPaid(order_id="o-1", cents=1))
    with Terminal(cli, "history", "order") as terminal:
        assert await terminal.ended() == 0
        assert COLOUR.search(terminal.shown)
    with Terminal(cli, "history", "order", NO_COLOR="1") as terminal:
        assert await terminal.ended() == 0
        assert "o-1" in terminal.shown
        assert not re.search(r"\x1b\[3[0-9]", terminal.shown)
    ran = await cli("history", "order")
    assert not COLOUR.search(ran.out)


async def test_a_screen_of_lag_changes_in_place(cli: CommandLine, bus: Bus) -> None:
    await waiting(bus, 40)
    with Terminal(cli, "groups", "lag", "--watch", "200ms") as terminal:
        await terminal.until("receipts")
        async with Worker(bus, [send_receipt]) as worker:
            await worker.drained()
            await eventually(
                lambda: re.search(r"receipts +0 +0 +0", COLOUR.sub("", terminal.read()))
            )
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.ended() == 130


async def test_what_a_worker_warns_of_is_said_above_the_bar(cli: CommandLine, bus: Bus) -> None:
    """A replay that waits for room says so, and goes on when there is some."""
    await bus.admin.set_marks("order", maxlen=1_100, keep=1_000)
    await waiting(bus, 300)
    with Terminal(cli, "replay", "order", "--into", "receipts", "--yes") as terminal:
        await terminal.until("waits for room")
        async with Worker(bus, [send_receipt]) as worker:
            assert await terminal.ended() == 0
            await worker.drained()
    assert "replayed 300 of 300 events" in terminal.shown


async def test_what_dies_during_the_question_is_not_deleted_with_the_others(
    cli: CommandLine, bus: Bus
) -> None:
    async with Worker(bus, [send_receipt]) as worker:
        await bus.publish_many([OrderPaid(order_id="k", cents=-1) for _ in range(3)])
        await worker.drained()
        for words, verb in ((["purge"], "deleted 3"), (["redrive"], "redrove 1")):
            with Terminal(cli, "dead", *words, "receipts", "--all") as terminal:
                await terminal.until("go on? [y/N]")
                await bus.publish(OrderPaid(order_id="k", cents=-2))
                await worker.drained()
                terminal.type("y\n")
                assert await terminal.ended() == 0
                assert verb in terminal.shown
            await worker.drained()
    left = [x.event.cents async for x in bus.dead_letters("receipts")]
    assert left == [-2, -2], "one was not there, one died again"


async def test_what_fails_during_the_question_is_not_given_up_with_the_others(
    cli: CommandLine, bus: Bus
) -> None:
    async with Worker(bus, [fail]) as worker:
        await bus.publish_many([OrderPaid(order_id="k", cents=n) for n in range(3)])
        await eventually_parked(bus, 3)
        with Terminal(cli, "pending", "dead-letter", "patient", "--all", "--why", "no") as terminal:
            await terminal.until("give up 3 entries")
            await terminal.until("go on? [y/N]")
            await bus.publish(OrderPaid(order_id="k", cents=9))
            await eventually_parked(bus, 4)
            terminal.type("y\n")
            assert await terminal.ended() == 0
            assert "made 3 dead letters" in terminal.shown
        await worker.stop()
    assert [e.envelope.event.cents async for e in bus.admin.pending("patient") if e.envelope] == [9]


async def eventually_parked(bus: Bus, count: int) -> None:
    async def parked() -> bool:
        return sum([e.state == "parked" async for e in bus.admin.pending("patient")]) == count

    while not await parked():
        pass


async def test_what_comes_during_the_question_is_neither_replayed_nor_skipped(
    cli: CommandLine, bus: Bus
) -> None:
    await waiting(bus, 10)
    asked = ("replay", "order", "--into", "receipts")
    with Terminal(cli, *asked) as terminal:
        await terminal.until("replay 10 of 10 events")
        await terminal.until("go on? [y/N]")
        await bus.publish(OrderPaid(order_id="later", cents=1))
        terminal.type("y\n")
        assert await terminal.ended() == 0
        assert "replayed 10 of 10 events" in terminal.shown
    with Terminal(cli, "groups", "seek", "receipts", "--to", "end") as terminal:
        await terminal.until("skips")
        await terminal.until("go on? [y/N]")
        for _ in range(20):
            await bus.publish(OrderPaid(order_id="later", cents=2))
        terminal.type("y\n")
        assert await terminal.ended() == 0
    assert (await bus.inspect(["order"])).topic("order").group("receipts").undelivered == 20


async def test_sigterm_at_the_question_ends_it(cli: CommandLine, bus: Bus) -> None:
    await waiting(bus, 1)
    with Terminal(cli, "groups", "rm", "receipts") as terminal:
        await terminal.until("go on? [y/N]")
        terminal.process.send_signal(signal.SIGTERM)
        assert await terminal.ended() == 130
    assert len(await cli.json("groups", "ls")) == 1


async def test_marks_that_block_or_drop_say_so_first(cli: CommandLine, bus: Bus) -> None:
    await waiting(bus, 300)
    asked = ("topics", "set", "order", "--keep", "1", "--maxlen", "100")
    for more, said in (
        ((), "publishers wait at once"),
        (("--on-full", "reject"), "publishers are refused at once"),
        (("--on-full", "drop_oldest"), "of them, unhandled"),
    ):
        with Terminal(cli, *asked, *more) as terminal:
            await terminal.until("go on? [y/N]")
            assert said in terminal.shown
            assert "receipts has still to do" in terminal.shown
            terminal.type("n\n")
            assert await terminal.ended() == 1
    with Terminal(cli, "topics", "set", "order", "--maxlen", "60000") as terminal:
        await terminal.until("go on? [y/N]")
        assert "receipts" not in terminal.shown
        assert "nobody can replay" not in terminal.shown


async def test_an_id_is_whole_in_a_narrow_terminal(cli: CommandLine, bus: Bus) -> None:
    """To be copied: where a row is too wide, it goes on in the next line."""
    async with Worker(bus, [send_receipt]) as worker:
        await bus.publish(OrderPaid(order_id="a-key-that-is-rather-long-" * 2, cents=-1))
        await worker.drained()
    (letter,) = [x async for x in bus.dead_letters("receipts")]
    with Terminal(cli, "dead", "ls", "receipts", COLUMNS="40") as terminal:
        assert await terminal.ended() == 0
    assert letter.id in terminal.shown.replace("\r\n", "\n")
    assert letter.envelope.key is not None
    assert letter.envelope.key in terminal.shown


async def test_a_screen_says_that_the_server_does_not_answer_and_goes_on(
    shop: Path, zygote: Zygote, private_server: PrivateServer
) -> None:
    server = private_server()
    cli = CommandLine(shop, server.url, zygote)
    async with Bus.connect(server.url, topics=[ORDERS]) as bus:
        await waiting(bus, 3)
    with Terminal(cli, "groups", "lag", "--watch", "100ms") as terminal:
        await terminal.until("receipts")
        server.kill()
        await terminal.until("no answer since")
        server.start()
        async with Bus.connect(server.url, topics=[ORDERS]) as bus:
            await bus.topics.record("order")
            await bus.admin.create_group("another", "order")
        await terminal.until("another")
        assert (
            "no answer" not in terminal.shown.rpartition("another")[0].rpartition("topic")[0][-90:]
        )
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.ended() == 130
