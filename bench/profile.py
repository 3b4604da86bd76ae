"""Where the time of our process goes: py-spy beside the work of the benchmark.

Prints, per kind of work, the share of samples in which a function itself ran.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import redis

from bench.compare import SYSTEMS, Bench, child_of
from bench.work import Board
from bus.embedded import EmbeddedServer

_S = 6  # of sampling
_RATE = 400  # samples per second
_SHOWN = 14
_WAYS = {
    "publish one at a time": "sequential",
    "publish, 100 callers": "concurrent",
    "publish many": "many",
}


def main(only: str) -> int:
    """Profile publishing in three ways, and consuming."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        print("py-spy is not here: make bench-profile installs it", file=sys.stderr)
        return 1
    with EmbeddedServer() as server, tempfile.TemporaryDirectory() as folder:
        for name, way in _WAYS.items():
            if only in name:
                stacks = _publishing(spy, server.url, way, Path(folder))
                _show(name, stacks)
        if only in "consume":
            _show("consume", _consuming(spy, server, Path(folder)))
    return 0


def _sampled(spy: str, pid: int, folder: Path) -> subprocess.Popen[bytes]:
    asked = ["record", "--pid", str(pid), "--duration", str(_S), "--rate", str(_RATE)]
    asked += ["--format", "raw", "--function", "--output", str(folder / "stacks")]
    return subprocess.Popen([spy, *asked], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603 - the py-spy that was found


def _stacks(sampling: "subprocess.Popen[bytes]", folder: Path) -> list[str]:
    _, said = sampling.communicate()
    if sampling.returncode != 0:
        raise SystemExit(f"py-spy failed; it must be allowed to trace processes:\n{said.decode()}")
    return (folder / "stacks").read_text(encoding="utf-8").splitlines()


def _publishing(spy: str, url: str, way: str, folder: Path) -> list[str]:
    with redis.Redis.from_url(url, protocol=2) as client, child_of(SYSTEMS["bus"]) as child:
        client.flushall()
        order = {"do": "publish", "url": url, "way": way, "count": 1_500_000}
        child.order(**order, most_s=_S + 6)
        while client.dbsize() == 0:
            time.sleep(0.01)
        return _stacks(_sampled(spy, child.process.pid, folder), folder)


def _consuming(spy: str, server: EmbeddedServer, folder: Path) -> list[str]:
    bench = Bench(["bus"], most_s=2.0, paced=0)
    with redis.Redis.from_url(server.url, protocol=2) as client:
        bench.server, bench.client = server, client
        bench._fill("bus", 1_500_000)  # noqa: SLF001 - the same bench
        board = Board(folder / "board", 1)
        with child_of(SYSTEMS["bus"]) as child:
            order = {"do": "work", "url": server.url, "board": str(folder / "board"), "row": 1}
            child.order(**order, kind="noop", group="g", concurrency=1, how="work")
            while not board.row(1)[0]:
                time.sleep(0.01)
            board.put(0, 1, 0, 0)
            stacks = _stacks(_sampled(spy, child.process.pid, folder), folder)
        bench.close()
    return stacks


def _show(name: str, stacks: list[str]) -> None:
    alone: Counter[str] = Counter()
    total = 0
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        alone[stack.rpartition(";")[2]] += int(count)
        total += int(count)
    print(f"{name}: {total:,} samples")
    for function, samples in alone.most_common(_SHOWN):
        print(f"  {samples / total:6.1%}  {function}")
