"""The work every system does, and how it is measured: the same events, the same counts.

Imports neither the bus nor a Redis client: peers live in environments of their own.
"""

import asyncio
import mmap
import random
import string
import struct
import time
from pathlib import Path
from typing import Any

LANES = 100  # concurrent publishers, and concurrent calls of a handler that sleeps
BATCH = 500  # events of one publish_many
SLEEP_S = 0.001
_DISTINCT = 2_000

Fields = dict[str, Any]


def make_fields(count: int, seed: int = 7) -> list[Fields]:
    """Return the fields of `count` events, about 250 bytes as JSON, the same in every process.

    Two thousand are distinct: making them takes longer than publishing them.
    """
    rng = random.Random(seed)
    letters = string.ascii_lowercase + string.digits

    def word(length: int) -> str:
        return "".join(rng.choices(letters, k=length))

    distinct = [
        {
            "document_id": word(32),
            "dataset_id": word(32),
            "title": word(60),
            "tokens": rng.randrange(100_000),
            "tags": [word(8), word(6), word(10)],
        }
        for _ in range(min(count, _DISTINCT))
    ]
    return [distinct[n % _DISTINCT] for n in range(count)]


def peak_rss_mb() -> float:
    """Return the largest resident size of this process so far, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Board:
    """A file in shared memory: what the workers say of themselves while they work.

    Row 0 is the parent's: 1 for go, 1 for stop. Every worker has a row: whether it is ready, how
    many events it has handled, its CPU time in ns.
    """

    _ROW = struct.Struct("<QQQ8x")

    def __init__(self, path: Path, rows: int = 0) -> None:
        if rows:
            path.write_bytes(bytes(self._ROW.size * (rows + 1)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def put(self, row: int, *values: int) -> None:
        """Write a row of three numbers."""
        self._ROW.pack_into(self._memory, row * self._ROW.size, *values)

    def row(self, row: int) -> tuple[int, int, int]:
        """Return a row."""
        ready, handled, cpu_ns = self._ROW.unpack_from(self._memory, row * self._ROW.size)
        return ready, handled, cpu_ns


class Work:
    """What a worker is given: a handler to call once per event, and when to begin and to end.

    kind: "noop", "sleep" (1 ms), or "latency", which notes how old events are: their field
    `tokens` is when they were published, as `time.perf_counter_ns` has it.
    """

    def __init__(self, board: Board, row: int, kind: str, group: str, concurrency: int) -> None:
        self.group = group
        self.concurrency = concurrency
        self.row = row
        self.stopped: asyncio.Event
        self.ages_ns: list[int] = []
        self._board = board
        self._kind = kind
        self._handled = 0
        self._cpu_ns = 0
        self._ticker: asyncio.Task[None]

    @property
    def handler(self) -> Any:
        """The handler: async, of one event, which is an object or a dict."""
        return getattr(self, self._kind)

    async def noop(self, _: Any) -> None:
        """Do nothing."""
        self._handled += 1

    async def sleep(self, _: Any) -> None:
        """Wait for a millisecond, as for another service."""
        await asyncio.sleep(SLEEP_S)
        self._handled += 1

    async def latency(self, event: Any) -> None:
        """Note how old it is."""
        made_ns = event["tokens"] if isinstance(event, dict) else event.tokens
        self.ages_ns.append(time.perf_counter_ns() - made_ns)
        self._handled += 1

    async def batch(self, deliveries: list[Any]) -> None:
        """Do nothing, for all of them."""
        self._handled += len(deliveries)

    async def gate(self) -> None:
        """Say that everything is imported and connected, and wait until all may begin."""
        self.stopped = asyncio.Event()
        self._board.put(self.row, 1, 0, 0)
        while not self._board.row(0)[0]:  # noqa: ASYNC110 - the other side is another process
            await asyncio.sleep(0.002)
        self._cpu_ns = time.process_time_ns()
        self._ticker = asyncio.ensure_future(self._tick())

    async def _tick(self) -> None:
        while not self._board.row(0)[1]:
            self._board.put(self.row, 1, self._handled, time.process_time_ns() - self._cpu_ns)
            await asyncio.sleep(0.002)
        self._board.put(self.row, 1, self._handled, time.process_time_ns() - self._cpu_ns)
        self.stopped.set()

    def figures(self) -> dict[str, float]:
        """Return what the worker itself knows at its end; of the ages without the first 5 %."""
        found = {"handled": float(self._handled), "rss_mb": peak_rss_mb()}
        ages = sorted(self.ages_ns[len(self.ages_ns) // 20 :])
        if ages:
            found["p50_ms"] = ages[len(ages) // 2] / 1e6
            found["p99_ms"] = ages[len(ages) * 99 // 100] / 1e6
        return found
