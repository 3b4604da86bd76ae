"""The main job on a small folder: as a user starts it, and with everything a user can do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from bus import Registry
from demo import outcome, poison, report, workload
from demo.accounts import Accounts, read_accounts
from demo.ingest import find_files
from demo.ledger import GROUPS, Book, DeadLetter, Entry, GroupRecord, Published
from demo.removal import Removal
from demo.takeover import CHARGING, Takeover
from demo.views import Views
from tests.servers import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bus.embedded import EmbeddedServer
    from tests.conftest import PrivateServer

ROOT = Path(__file__).resolve().parent.parent
MARK = "BUS_DEMO_TEST"
RUN_TIMEOUT_S = 45.0
GONE_TIMEOUT_S = 15.0
FILES = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text in folders, and what is no text beside it."""
    for number in range(FILES):
        path = tmp_path / f"part-{number % 3}" / f"text-{number}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"chapter{number} about streams\n" * (number + 1))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (tmp_path / "old.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden").write_text("nobody asked")
    return tmp_path


class Run:
    """`python worker.py --demo` as a process of its own, whose descendants can be told."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "worker.py"), "--demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, MARK: self.mark},
            start_new_session=True,
        )
        self.output = ""
        self.known: set[str] = set()

    def read_until(self, words: str) -> None:
        """Read its output up to a line that holds `words`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if words in line:
                return
        pytest.fail(f"it ended without saying {words!r}:\n{self.output}")

    def finish(self) -> int:
        """Read the rest and return the exit code."""
        self.output += self.process.communicate(timeout=RUN_TIMEOUT_S)[0]
        return self.process.returncode

    def descendants(self) -> dict[str, str]:
        """The processes it has started, or one of its children: what /proc says of them.

        Known by the mark in their environment, or as its child: the server writes its title over
        its environment. Those seen once stay known by pid and start time when it is gone itself.
        """
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                _, _, after_name = (process / "stat").read_text().rpartition(")")
                status, parent, started_at = (after_name.split()[n] for n in (0, 1, 19))
                identity = f"{process.name} started at {started_at}"
                marked = f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes()
                title = (process / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has just ended
            ours = marked or int(parent) == self.process.pid or identity in self.known
            if ours and int(process.name) != self.process.pid and status != "Z":
                found[identity] = title
        self.known |= found.keys()
        return found


@contextmanager
def running(*arguments: str) -> Iterator[Run]:
    run = Run(*arguments)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.communicate()


def eventually(holds: Callable[[], bool], timeout_s: float = GONE_TIMEOUT_S) -> bool:
    """Look again and again: what is looked at happens in another process."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")


@linux_only
def test_every_event_is_accounted_for_and_no_process_is_left(folder: Path) -> None:
    with running(str(folder)) as run:
        assert run.finish() == 0, run.output
        assert run.descendants() == {}
    for words in (
        "workers are ready",
        "killed (SIGKILL)",
        "lost: 0",
        "reclaimed after the kill",
        "dead letters of index: 2 failed, 4 rejected, 3 undecodable",
        "every balance is what was granted minus what was used",
        "quota.exceeded was told 4 times, of user-0, user-3, user-6, user-9",
        "the deleted dataset: 5 documents, each told to be deleted once; 0 keys are left",
        "0 wrong when all was quiet",
        "p99",
        "searches",
        "nothing is lost and every count agrees",
    ):
        assert words in run.output, run.output
    assert "OFF" not in run.output


# Of one that waits for its next attempt in one group, and that the other group is done with.
DELETE_A_DEAD_LETTER = """
for partition = 0, 3 do
  local stream = 'bus:{document:' .. partition .. '}:dead:index'
  for _, letter in ipairs(redis.call('XRANGE', stream, '-', '+')) do
    local fields = {}
    for i = 1, #letter[2], 2 do fields[letter[2][i]] = letter[2][i + 1] end
    if fields.deadreason == 'rejected' then
      redis.call('XDEL', stream, letter[1])
      return fields.deadentry
    end
  end
end
return ''
"""


@linux_only
def test_a_dead_letter_deleted_by_hand_is_reported_as_lost(
    folder: Path, private_server: PrivateServer
) -> None:
    """Somebody runs XDEL on the dead letters: nothing tells any more what became of the event."""
    server = private_server()
    deleted: list[str] = []

    def delete_one() -> bool:
        deleted[:] = [_eval(server, DELETE_A_DEAD_LETTER)]
        return "-" in deleted[0]

    with running(str(folder), "--url", server.url) as run:
        run.read_until("workers are ready")
        assert eventually(delete_one)
        assert run.finish() == 1, run.output
        assert run.descendants() == {}
    assert "lost: 1\n" in run.output, run.output
    assert f"never saw the end of entry {deleted[0]}" in run.output
    assert "OFF: index: lost: expected 0, found 1" in run.output
    assert "counts do not agree" in run.output


def _eval(server: EmbeddedServer, script: str) -> str:
    _length, answer, *_ = ask(server, "EVAL", script, "0").decode().split("\r\n")
    return answer


@linux_only
@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, False, 129),
        (signal.SIGKILL, False, -9),
    ],
    ids=["Ctrl-C", "SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_stopped_half_way_it_leaves_no_process(
    folder: Path, number: signal.Signals, whole_group: bool, code: int
) -> None:
    with running(str(folder)) as run:
        run.read_until("workers are ready")
        assert len(run.descendants()) >= 3  # the server and two workers
        if whole_group:
            os.killpg(run.process.pid, number)
        else:
            run.process.send_signal(number)
        assert run.finish() == code, run.output
        assert eventually(lambda: run.descendants() == {}), run.descendants()
    assert "Traceback" not in run.output


@linux_only
def test_a_worker_that_ends_by_itself_ends_the_demo_with_its_last_words(folder: Path) -> None:
    with running(str(folder)) as run:
        run.read_until("workers are ready")
        [*_, worker] = [i for i, title in run.descendants().items() if "--handlers" in title]
        os.kill(int(worker.split()[0]), signal.SIGABRT)
        assert run.finish() == 1, run.output
        assert eventually(lambda: run.descendants() == {}), run.descendants()
    assert "ended with exit code -6; it said last:" in run.output, run.output
    assert '"event":"worker.started"' in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("what", ["no folder", "nothing in it", "in use", "nobody there"])
def test_what_it_cannot_run_on_is_said_in_one_line(
    folder: Path, private_server: PrivateServer, what: str
) -> None:
    server = private_server()
    ask(server, "SET", "somebody", "else's")
    if what == "nobody there":
        server.stop()
    (folder / "empty").mkdir()
    arguments, code, says = {
        "no folder": ([str(folder / "missing")], 2, "is not a folder"),
        "nothing in it": ([str(folder / "empty")], 2, "no text file"),
        "in use": ([str(folder), "--url", server.url], 2, "not empty"),
        "nobody there": ([str(folder), "--url", server.url], 69, "127.0.0.1"),
    }[what]
    with running(*arguments) as run:
        assert run.finish() == code, run.output
    assert says in run.output
    assert "Traceback" not in run.output


# --- the parts


def test_the_files_are_the_text_of_the_folder(folder: Path) -> None:
    found = find_files(str(folder))
    assert len(found.files) == FILES
    assert found.files[0].title == "part-0/text-0.md"
    assert len({file.document_id for file in found.files}) == FILES


def test_the_files_of_nobodys_choice_are_the_standard_library() -> None:
    found = find_files(None)
    titles = {file.title for file in found.files}
    assert {"asyncio/events.py", "socket.py"} <= titles
    assert not any("site-packages" in title for title in titles)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert report.percentile([5.0], 99) == 5.0
    assert report.percentile(range(1, 101), 50) == 50
    assert report.percentile(range(1, 101), 99) == 99
    assert report.percentile([3.0, 1.0, 2.0], 50) == 2.0


PLACES = [("s", f"{n}-0") for n in range(4)]


def record(**changes: object) -> GroupRecord:
    """Three events handled, the fourth rejected after one run."""
    values: dict[str, object] = {
        "group": "unindex",
        "wanted": {place: f"e{n}" for n, place in enumerate(PLACES)},
        "started": {f"e{n}": 1 for n in range(4)},
        "failed": {"e3": 1},
        "finished": {f"e{n}": 1 for n in range(3)},
        "handled_at_ms": {f"e{n}": float(n) for n in range(3)},
        "dead": [DeadLetter(PLACES[3], "rejected")],
    }
    return GroupRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_lost_is_what_was_neither_handled_nor_dead_lettered() -> None:
    assert record().lost == []
    assert record(dead=[]).lost == [PLACES[3]]
    assert record(handled_at_ms={}).lost == PLACES[:3]


def test_runs_are_told_apart() -> None:
    retried = record(started={"e0": 3}, failed={"e0": 2}, finished={"e0": 1}, dead=[])
    assert (retried.retried, retried.cut_off) == (2, 0)
    cut_off = record(started={"e0": 2}, failed={}, finished={"e0": 1}, dead=[])
    assert (cut_off.retried, cut_off.cut_off) == (0, 1)


NUMBERS = count(1)  # as several changes let one count be off
ENTRY = Entry(PLACES[0], "e0", "document.deleted")
ACCOUNTS = Accounts(
    messages=2,
    used=Counter({"user-0": 5, "user-1": 7}),
    balances={"user-0": -5, "user-1": 1_000_000 - 7},
    told=Counter({"user-0": 1}),
)


def _outcome(**changes: object) -> outcome.Outcome:
    event = Published(PLACES[0], "e0", "document.deleted", "ingest", 0.0)
    index = record(
        group="index",
        failed={"late": 2},
        handled_at_ms={"late": 1.0},
        wanted={},
        started={"late": 3},
        finished={"late": 1},
        dead=[],
    )
    values: dict[str, object] = {
        "book": Book(entries=[event]),
        "entries": [ENTRY],
        "groups": [index],
        "takeover": Takeover(held=[(CHARGING, PLACES[0])], reclaimed=1),
        "accounts": ACCOUNTS,
        "removal": Removal(documents=1, told=Counter(d=1)),
        "views": Views(hits=1),
        "late_event_id": "late",
        "statuses": Counter(indexed=1),
        "expected_statuses": Counter(indexed=1),
        "findable": 0,
        "retries_logged": Counter(index=2),
        "exit_codes": [0, 0],
        "searches": [("words", [object()])],
    }
    return outcome.Outcome(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"entries": []}, "entries in the streams"),
        ({"takeover": Takeover(held=[(CHARGING, PLACES[0])])}, "taken over"),
        ({"takeover": Takeover()}, "was charging messages"),
        ({"entries": [ENTRY, *[replace(ENTRY, by_handler=True)] * 2]}, "published twice"),
        ({"accounts": replace(ACCOUNTS, used=Counter({"user-0": 5, "user-1": 6}))}, "balances"),
        ({"accounts": replace(ACCOUNTS, told=Counter())}, "quota.exceeded"),
        ({"accounts": replace(ACCOUNTS, told=Counter({"user-0": 2}))}, "quota.exceeded"),
        ({"removal": Removal(1, Counter(d=1), ["kb:document:d"])}, "keys left"),
        ({"removal": Removal(1, Counter(d=2))}, "document.deleted"),
        ({"removal": Removal(1, Counter(d=0))}, "document.deleted"),
        ({"views": Views(hits=1, wrong=1)}, "answered wrongly"),
        ({"views": Views()}, "the cache answered"),
        ({"statuses": Counter(indexed=1, new=1)}, "documents by status"),
        ({"findable": 1}, "deleted documents"),
        ({"retries_logged": Counter(index=3)}, "logged as retried"),
        ({"exit_codes": [0, -9]}, "exit codes"),
        ({"late_event_id": "never"}, "the text that came late"),
        ({"searches": [("words", [])]}, "searches"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{next(NUMBERS)}",
)
def test_each_count_that_is_off_is_named(
    changes: dict[str, object], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(poison.DEAD_LETTERS, "index", {})
    assert [c.what for c in outcome.checks(_outcome()) if not c.agrees] == []
    off = [c.what for c in outcome.checks(_outcome(**changes)) if not c.agrees]
    assert len(off) == 1
    assert what in off[0]


async def test_what_was_used_is_read_from_the_entries(valkey_url: str) -> None:
    def entry(type_: str, **fields: object) -> Entry:
        return Entry(PLACES[0], "e", type_, data=json.dumps(fields).encode())

    entries = [
        entry("message.created", user_id="user-1", tokens=3),
        entry("message.created", user_id="user-1", tokens=4),
        entry("quota.exceeded", user_id="user-0"),
        Entry(PLACES[0], None, "document.created", data=b"{"),
    ]
    async with Redis.from_url(valkey_url) as redis:
        await redis.hset("kb:quota:user-1", "balance", 5)
        accounts = await read_accounts(redis, entries)
    assert (accounts.messages, accounts.used) == (2, Counter({"user-1": 7}))
    assert accounts.told == Counter({"user-0": 1})
    assert {user: n for user, n in accounts.balances.items() if n} == {"user-1": 5}


def test_the_workload_is_the_application_with_shorter_waits() -> None:
    registry = Registry.collect("handlers")
    assert {h.group for h in GROUPS} == {"audit", *(h.group for h in registry.handlers)}
    for handler in GROUPS:
        assert handler.takes_delivery
        assert handler.visibility_s == workload.VISIBILITY_S
        assert handler.backoff is workload.BACKOFF
        assert handler.breaker is workload.BREAKER
    assert workload.index.max_attempts == 5
