"""`python worker.py` as a process: arguments, exit codes, signals, and several under one parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import Bus, Event
from tests.guarantees.backend import Backend
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.conftest import PrivateServer

ROOT = Path(__file__).resolve().parents[2]
STREAM = "bus:{chore:0}"
HANDLERS = """
import asyncio, os
from pathlib import Path
from bus import Delivery, Event, event_handler

class ChoreAsked(Event, type="chore.asked"):
    n: int

HERE = Path(__file__).parent

async def act(event, delivery):
    (HERE / f"started-{event.n}-{delivery.attempt}-{os.getpid()}").touch()
    while event.n >= 100 and not (HERE / "go-on").exists():
        await asyncio.sleep(0.005)
    delivery.logger.info("did a chore")
    (HERE / f"done-{event.n}-{delivery.attempt}-{os.getpid()}").touch()

@event_handler(ChoreAsked, group="chores", concurrency=4)
async def chores(event: ChoreAsked, delivery: Delivery[ChoreAsked]) -> None:
    await act(event, delivery)

@event_handler(ChoreAsked, group="spare")
async def spare(event: ChoreAsked) -> None: ...
"""


class Asked(Event, type="chore.asked"):
    n: int


class Program:
    """A `worker.py` process that runs the handlers of a folder."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._output = folder / f"output-{len(list(folder.glob('output-*')))}"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "worker.py"), "--handlers", "chores", *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.split("\n")[:-1]]
        return [line for line in lines if line["event"] == event]

    async def started(self, count: int = 1) -> None:
        await eventually(lambda: self.output.count("worker.started") >= count, "it never started")

    async def ended(self) -> int:
        await eventually(lambda: self.process.poll() is not None, f"no end: {self.output}")
        return int(self.process.returncode)


class Place:
    """The folder of a handlers package, and the programs that run there."""

    def __init__(self, folder: Path, handlers: str = HANDLERS) -> None:
        self.folder = folder
        (folder / "chores.py").write_text(handlers)
        self.programs: list[Program] = []

    def run(self, *arguments: str) -> Program:
        program = Program(self.folder, *arguments)
        self.programs.append(program)
        return program

    def seen(self, what: str) -> list[tuple[int, int, int]]:
        """(n, attempt, pid) of every handler that has started or is done."""
        return sorted(
            tuple(int(x) for x in path.name.split("-")[1:])  # type: ignore[misc]
            for path in self.folder.glob(f"{what}-*")
        )

    def go_on(self) -> None:
        (self.folder / "go-on").touch()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for program in place.programs:
        for pid in [*children(program.process.pid), program.process.pid]:
            if program.process.poll() is None or pid != program.process.pid:
                os.kill(pid, signal.SIGKILL)
        program.process.wait()
        assert "Traceback" not in program.output


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url) as bus:
        yield bus


@pytest.fixture
async def backend(valkey_url: str) -> AsyncIterator[Backend]:
    backend = Backend(valkey_url)
    yield backend
    await backend.close()


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(x) for x in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")


# --- exit codes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_exits_with_0(
    place: Place, bus: Bus, backend: Backend, valkey_url: str, number: signal.Signals
) -> None:
    """What runs is finished and acked; what waits is handed back, as first attempts."""
    program = place.run("--url", valkey_url, "--only", "chores")
    await program.started()
    await bus.publish_many([Asked(n=n) for n in range(100, 110)])
    await eventually(lambda: len(place.seen("started")) == 4)
    program.process.send_signal(number)
    await eventually(lambda: "worker.stopping" in program.output)
    place.go_on()
    assert await program.ended() == 0
    assert [n for n, _, _ in place.seen("done")] == [100, 101, 102, 103]
    assert all(p.deliveries == 0 for p in await backend.pending(STREAM, "chores"))
    assert [k async for k in backend.redis.scan_iter(match="*:lease:*")] == []
    heir = place.run("--url", valkey_url, "--only", "chores")
    await eventually(lambda: len(place.seen("done")) == 10)
    assert {attempt for _, attempt, _ in place.seen("done")} == {1}
    heir.process.terminate()
    assert await heir.ended() == 0


async def test_a_second_signal_exits_at_once_with_130(
    place: Place, bus: Bus, backend: Backend, valkey_url: str
) -> None:
    program = place.run("--url", valkey_url, "--only", "chores")
    await program.started()
    await bus.publish(Asked(n=100))
    await eventually(lambda: place.seen("started"))
    program.process.terminate()
    await eventually(lambda: "worker.stopping" in program.output)
    program.process.terminate()
    assert await program.ended() == 130
    assert "second SIGTERM: stopping at once" in program.output
    assert len(await backend.pending(STREAM, "chores")) == 1, "the leases do the rest"


async def test_the_grace_is_the_users(
    place: Place, bus: Bus, backend: Backend, valkey_url: str
) -> None:
    program = place.run("--url", valkey_url, "--only", "chores", "--grace-s", "0.1")
    await program.started()
    await bus.publish(Asked(n=100))
    await eventually(lambda: place.seen("started"))
    program.process.terminate()
    assert await program.ended() == 0
    ((_, owner, deliveries),) = await backend.pending(STREAM, "chores")
    assert (owner, deliveries) == ("parked:0", 0)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_an_unreachable_server_is_69(place: Place) -> None:
    program = place.run("--url", f"redis://:hush@127.0.0.1:{closed_port()}/0")
    assert await program.ended() == 69
    assert "nobody answers at redis://:***@127.0.0.1" in program.output
    assert "hush" not in program.output


async def test_a_wrong_password_is_1(place: Place, private_server: PrivateServer) -> None:
    server = private_server(extra_args=("--requirepass", "right"))
    program = place.run("--url", server.url.replace("redis://", "redis://:wr0ng@"))
    assert await program.ended() == 1
    assert "AuthenticationFailed" in program.output
    assert "wr0ng" not in program.output


async def test_an_evicting_server_is_1(place: Place, private_server: PrivateServer) -> None:
    server = private_server(extra_args=("--maxmemory-policy", "allkeys-lru"))
    program = place.run("--url", server.url)
    assert await program.ended() == 1
    assert "set it to noeviction" in program.output


BROKEN_PACKAGES = {
    "syntax": ("def broken(:", "cannot import 'chores': SyntaxError"),
    "import": ("import no_such_module", "No module named 'no_such_module'"),
    "raises": ("raise RuntimeError('at import')", "RuntimeError: at import"),
    "exits": ("import sys; sys.exit(0)", "cannot import 'chores'"),
    "empty": ("x = 1", "'chores' holds no handlers"),
    "one group twice": (
        HANDLERS.replace('group="spare"', 'group="chores"'),
        "two handlers have the group 'chores'",
    ),
    "bad group": (HANDLERS.replace('"spare"', '"no good"'), "group name 'no good' is not valid"),
    "no coroutine": (HANDLERS.replace("async def spare", "def spare"), "must be `async def`"),
}


@pytest.mark.parametrize("kind", BROKEN_PACKAGES)
async def test_a_package_that_cannot_be_used_is_2(
    tmp_path: Path, valkey_url: str, kind: str
) -> None:
    source, words = BROKEN_PACKAGES[kind]
    program = Place(tmp_path, source).run("--url", valkey_url)
    assert await program.ended() == 2, program.output
    assert words in program.output


ARGUMENTS = [
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--concurrency", "many"], "invalid int value: 'many'"),
    (["--concurrency", "0"], "concurrency must be a whole number"),
    (["--processes", "0"], "processes must be a whole number"),
    (["--processes", "2", "--only", "nobody"], "no handler has the group nobody"),
    (["--grace-s", "-1"], "grace_s must be a number"),
    (["--grace-s", "nan"], "grace_s must be a number"),
    (["--only", "nobody"], "no handler has the group nobody; there are: chores, spare"),
    (["--log", "xml"], "invalid choice: 'xml'"),
    (["--handlers", "no_such_package"], "No module named 'no_such_package'"),
    (["--handlers", "../chores"], "is not the name of a Python package"),
    (["--handlers", "os;ls"], "is not the name of a Python package"),
    (["--url", "localhost:6379"], "the URL has no scheme"),
    (["--url", "http://localhost"], "http:// is no known scheme"),
    (["--url", "redis+cluster://localhost"], "is not part of this release"),
    (["--url", "redis://:s3cret@localhost/zero"], "the database in the URL is not a number"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), ARGUMENTS, ids=lambda a: " ".join(a) if isinstance(a, list) else ""
)
async def test_a_mistyped_argument_is_2(
    place: Place, valkey_url: str, arguments: list[str], words: str
) -> None:
    program = place.run("--url", valkey_url, *arguments)
    assert await program.ended() == 2, program.output
    assert words in program.output
    assert "s3cret" not in program.output


# --- what it runs


async def test_only_runs_the_groups_it_names(
    place: Place, backend: Backend, valkey_url: str
) -> None:
    program = place.run("--url", valkey_url, "--only", "spare", "--concurrency", "2")
    await program.started()
    assert [g["name"] for g in await backend.redis.xinfo_groups(STREAM)] == [b"spare"]
    program.process.terminate()
    assert await program.ended() == 0


async def test_every_line_of_the_json_log_is_json(place: Place, bus: Bus, valkey_url: str) -> None:
    program = place.run("--url", valkey_url, "--log", "json", "--log-level", "debug")
    await program.started()
    await bus.publish(Asked(n=1))
    await eventually(lambda: program.logged("delivery.acked"))
    (chore,) = await eventually(lambda: program.logged("did a chore"))
    assert (chore["group"], chore["stream"], chore["attempt"]) == ("chores", STREAM, 1)
    assert {"entry_id", "event_id", "time", "level", "logger"} <= set(chore)
    program.process.terminate()
    assert await program.ended() == 0
    (started,) = program.logged("worker.started")
    assert started["groups"] == ["chores", "spare"]
    assert program.logged("worker.stopped")


# --- several processes


@needs_proc
async def test_a_child_that_dies_is_started_again(
    place: Place, bus: Bus, backend: Backend, valkey_url: str
) -> None:
    parent = place.run("--url", valkey_url, "--processes", "2", "--only", "chores", "--log", "json")
    await parent.started(2)
    first = children(parent.process.pid)
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    await parent.started(3)
    (told,) = parent.logged("process.restarted")
    assert (told["pid"], told["exit_code"], told["delay_s"]) == (first[0], -9, 0.5)
    second = children(parent.process.pid)
    assert first[1] in second
    assert first[0] not in second
    await bus.publish_many([Asked(n=n) for n in range(100, 108)])
    await eventually(lambda: len(place.seen("started")) == 8)
    assert {pid for _, _, pid in place.seen("started")} == set(second), "both take their share"
    place.go_on()
    await eventually(lambda: len(place.seen("done")) == 8)
    parent.process.terminate()
    assert await parent.ended() == 0
    assert not any(alive(pid) for pid in second)
    assert await backend.pending(STREAM, "chores") == []


@needs_proc
async def test_children_end_with_their_killed_parent(place: Place, valkey_url: str) -> None:
    parent = place.run("--url", valkey_url, "--processes", "2")
    await parent.started(2)
    orphans = children(parent.process.pid)
    parent.process.kill()
    await parent.ended()
    await eventually(lambda: not any(alive(pid) for pid in orphans))
    assert parent.output.count("worker.stopped") == 2, "in good order"
    assert "parent is gone" in parent.output


@needs_proc
async def test_a_second_signal_to_the_parent_reaches_the_children(
    place: Place, bus: Bus, valkey_url: str
) -> None:
    parent = place.run("--url", valkey_url, "--processes", "2", "--only", "chores")
    await parent.started(2)
    await bus.publish_many([Asked(n=n) for n in range(100, 108)])
    await eventually(lambda: len(place.seen("started")) == 8)
    pids = children(parent.process.pid)
    parent.process.send_signal(signal.SIGINT)
    await eventually(lambda: parent.output.count("worker.stopping") == 2)
    parent.process.send_signal(signal.SIGINT)
    assert await parent.ended() == 130
    assert not any(alive(pid) for pid in pids)


async def test_several_processes_end_as_one_would_when_nobody_answers() -> None:
    """A restart cannot help a wrong URL: it is told once, and at once."""
    worker_py = Path(__file__).parents[2] / "worker.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        worker_py,
        "--processes",
        "3",
        "--url",
        "redis://127.0.0.1:1",
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 69
    assert said.count(b"nobody answers") == 1
