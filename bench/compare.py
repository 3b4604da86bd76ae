"""All systems beside each other in one run: in turn, round by round; medians, ranges, ratios.

Machines are shared and noisy: the ratios of one run mean something, single rates do not.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import redis

from bench.work import LANES, Board
from bus.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0
_QUICK_S = 50.0
_OWN = ".venv"  # the environment that this runs in

Left = Callable[[Any, str], int]  # (client, group) -> entries that are not handled and acked


def _left_of_group(stream: str, group: str = "") -> Left:
    def left(client: Any, own_group: str) -> int:
        for row in client.xinfo_groups(stream):
            if row["name"].decode() == (group or own_group):
                lag = row.get("lag")
                return int(row["pending"]) + (1 if lag is None else int(lag))
        return 1

    return left


def _left_in(stream: str) -> Left:
    return lambda client, _: int(client.xlen(stream))


@dataclass(frozen=True)
class System:
    """A system, and how much it is given to do, by its speed.

    left: how much of a backlog is not acked. slept: events for the handler that sleeps. how: the
    function of its module that works, by test. many: whether it publishes many at once.
    """

    module: str
    left: Left
    backlog: int
    slept: int
    environment: str = _OWN
    how: dict[str, str] = field(default_factory=dict)
    many: bool = True
    concurrency: int = 1
    skips: frozenset[str] = frozenset()

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        if self.environment == _OWN:
            return Path(sys.executable)
        return ROOT / self.environment / "bin" / "python"


_ours = _left_of_group("bus:{bench:0}")
SYSTEMS = {
    "bus": System("bus_", _ours, 200_000, 20_000),
    "bare-redis-py": System("bare_redispy", _ours, 200_000, 20_000),
    "bare-hiredis": System("bare_hiredis", _ours, 200_000, 20_000),
    "faststream": System(
        "faststream_", _left_of_group("faststream", "bench"), 10_000, 10_000, ".venv-peers"
    ),
    "faststream-batch": System(
        "faststream_",
        _left_of_group("faststream", "bench"),
        50_000,
        0,
        ".venv-peers",
        how={"consume": "work_in_batches", "consume_two_workers": "work_in_batches"},
        skips=frozenset({"sleep", "publish", "latency"}),
    ),
    "repid": System(
        "repid_",
        _left_of_group("repid:bench", "repid:bench:group"),
        10_000,
        10_000,
        ".venv-repid",
        many=False,
    ),
    "taskiq": System(
        "taskiq_", _left_of_group("taskiq", "bench"), 10_000, 10_000, ".venv-peers", many=False
    ),
    "streaq": System(
        "streaq_", _left_in("streaq:bench:queues:normal"), 5_000, 5_000, ".venv-peers"
    ),
}
QUICK = ("bus", "bare-redis-py", "bare-hiredis")
_SHARED = frozenset(QUICK)  # one backlog serves them all: they read the same entries
_FIRST = 10  # events before the paced ones: those that find a worker just started
_WAYS = {
    "publish_sequential": ("sequential", 10_000),
    "publish_concurrent_100": ("concurrent", 100_000),
    "publish_many": ("many", 150_000),
}
KEYS = (
    "consume",
    "consume_two_workers",
    "consume_sleep_1ms_c100",
    "consume_batch_100",
    "publish_sequential",
    "publish_concurrent_100",
    "publish_many",
    "latency_p50_ms_at_1k",
    "latency_p99_ms_at_1k",
    "worker_cpu_us_per_event",
    "rss_mb",
)


class Child:
    """A process of one system that takes orders."""

    def __init__(self, system: System) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreters
            [system.python, "-m", "bench.child", system.module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._system = system

    def order(self, **order: Any) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for its answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise SystemExit(f"{self._system.module} failed:\n{self.process.stderr.read()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        self.order(**order)
        return self.answer()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def child_of(system: System) -> Iterator[Child]:
    """Have a process for one test."""
    child = Child(system)
    try:
        yield child
    finally:
        child.close()


class Bench:
    """One run: a server, and what was found."""

    def __init__(
        self, names: list[str], *, most_s: float, paced: int, only: str = "", less: int = 1
    ) -> None:
        self.names = names
        self._less = less  # how much less work than usual
        self._only = only
        self.found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.server: EmbeddedServer
        self.client: Any
        self._most_s = most_s
        self._paced = paced
        self._groups = count()
        self._kept: dict[str, Child] = {}
        self._folder = Path(tempfile.mkdtemp())

    def round(self, number: int) -> None:
        """Run every test of every system once, in an order that moves on from round to round."""
        with ExitStack() as stack:
            self.server = stack.enter_context(EmbeddedServer())
            self.client = stack.enter_context(redis.Redis.from_url(self.server.url, protocol=2))
            tests: dict[str, Callable[[str], None]] = {
                "consume": self._consume,
                "sleep": self._sleep,
                "two": self._two_workers,
                "latency": self._latency,
            }
            tests |= {key: partial(self._publish, key=key) for key in _WAYS}
            for test in [t for name, t in tests.items() if self._only in name]:
                names = self.names[number % len(self.names) :] + self.names
                for name in dict.fromkeys(names):
                    test(name)

    def close(self) -> None:
        """End what still runs."""
        for child in self._kept.values():
            child.close()

    def _publisher(self, name: str) -> Child:
        if name not in self._kept:
            self._kept[name] = Child(SYSTEMS[name])
        return self._kept[name]

    def _fill(self, name: str, amount: int) -> None:
        """Have a backlog of `amount` entries, written by the system itself."""
        if name in _SHARED:
            if self.client.xlen("bus:{bench:0}") == amount:
                return
            name = "bus"
        self.client.flushall()
        self._publisher(name).ask(do="fill", url=self.server.url, count=amount)

    # --- the tests

    def _consume(self, name: str) -> None:
        system = SYSTEMS[name]
        figures = self._drained(name, "consume", system.backlog // self._less)
        self._note(name, "consume", figures["rate"])
        self._note(name, "worker_cpu_us_per_event", figures["cpu_us"])
        self._note(name, "rss_mb", figures["rss_mb"])
        if name == "bus":
            figures = self._drained(
                name, "consume_batch_100", system.backlog // self._less, batch=100, kind="batch"
            )
            self._note(name, "consume_batch_100", figures["rate"])

    def _two_workers(self, name: str) -> None:
        amount = 2 * SYSTEMS[name].backlog // self._less
        figures = self._drained(name, "consume_two_workers", amount, workers=2)
        self._note(name, "consume_two_workers", figures["rate"])

    def _sleep(self, name: str) -> None:
        system = SYSTEMS[name]
        if "sleep" in system.skips:
            return
        figures = self._drained(
            name, "sleep", system.slept // self._less, kind="sleep", concurrency=LANES
        )
        self._note(name, "consume_sleep_1ms_c100", figures["rate"])

    def _latency(self, name: str) -> None:
        if "latency" in SYSTEMS[name].skips:
            return
        self.client.flushall()
        # Systems that make their stream when they are first published to.
        publisher = self._publisher(name)
        publisher.ask(do="pace", url=self.server.url, rate=1000, count=_FIRST)
        figures = self._drained(name, "latency", self._paced + _FIRST, kind="latency", paced=True)
        self._note(name, "latency_p50_ms_at_1k", figures["p50_ms"])
        self._note(name, "latency_p99_ms_at_1k", figures["p99_ms"])

    def _publish(self, name: str, key: str) -> None:
        system = SYSTEMS[name]
        way, amount = _WAYS[key]
        amount //= self._less
        if "publish" in system.skips or (way == "many" and not system.many):
            return
        self.client.flushall()
        answer = self._publisher(name).ask(
            do="publish", url=self.server.url, way=way, count=amount, most_s=self._most_s
        )
        there = self._published(name)
        if there != answer["published"]:
            raise SystemExit(f"{name}: {there} entries for {answer['published']} publishes")
        self._note(name, key, answer["rate"])

    def _published(self, name: str) -> int:
        """Return how many entries there are in the system's stream, the longest there is."""
        kinds = ((k, self.client.type(k)) for k in self.client.scan_iter(count=100_000))
        if name == "streaq":  # enqueued ones may still be on their way into the stream
            return sum(1 for k in self.client.scan_iter("streaq:bench:task:*", count=100_000))
        return max(int(self.client.xlen(k)) for k, kind in kinds if kind == b"stream")

    def _drained(
        self,
        name: str,
        test: str,
        amount: int,
        *,
        workers: int = 1,
        kind: str = "noop",
        concurrency: int = 1,
        batch: int | None = None,
        paced: bool = False,
    ) -> dict[str, float]:
        """Have workers handle a backlog; check that all of it was handled once, and acked."""
        system = SYSTEMS[name]
        group = f"g{next(self._groups)}"
        if not paced:
            self._fill(name, amount)
        board = Board(self._folder / group, workers)
        with ExitStack() as stack:
            children = [stack.enter_context(child_of(system)) for _ in range(workers)]
            for row, child in enumerate(children, 1):
                child.order(
                    do="work",
                    url=self.server.url,
                    board=str(self._folder / group),
                    row=row,
                    kind=kind,
                    group=group,
                    concurrency=concurrency,
                    how=system.how.get(test, "work"),
                    **({} if batch is None else {"batch": batch}),
                )
            rows = range(1, workers + 1)

            def handled() -> int:
                return sum(board.row(r)[1] for r in rows)

            self._until(lambda: all(board.row(r)[0] for r in rows), children, "to be ready")
            board.put(0, 1, 0, 0)
            if paced:
                self._until(lambda: handled() >= _FIRST, children, "the first events")
                self._publisher(name).ask(
                    do="pace", url=self.server.url, rate=1000, count=amount - _FIRST
                )
            self._until(lambda: handled() > 0, children, "a first event")
            started, before = time.perf_counter(), handled()
            self._until(lambda: handled() >= amount, children, f"{amount} events", 0.001)
            cpu_ns = sum(board.row(r)[2] for r in rows)
            self._until(lambda: not system.left(self.client, group), children, "the acks", 0.0005)
            seconds = time.perf_counter() - started
            board.put(0, 1, 1, 0)
            answers = [child.answer() for child in children]
        if (total := sum(a["handled"] for a in answers)) != amount:
            raise SystemExit(f"{name} {test}: {total:.0f} handled of {amount}")
        found = dict(answers[0])
        found["rate"] = (amount - before) / seconds
        found["cpu_us"] = cpu_ns / 1e3 / amount
        return found

    def _until(
        self, holds: Callable[[], bool], children: list[Child], what: str, pause_s: float = 0.002
    ) -> None:
        ends = time.perf_counter() + PATIENCE_S
        while not holds():
            dead = [c for c in children if c.process.poll() is not None]
            if dead or time.perf_counter() > ends:
                for child in children:
                    child.process.kill()
                said = "".join(child.process.communicate()[1] for child in children)
                raise SystemExit(f"waited in vain for {what}:\n{said}")
            time.sleep(pause_s)

    def _note(self, name: str, key: str, value: float) -> None:
        self.found[name][key].append(value)


# --- what it shows


@dataclass(frozen=True)
class Target:
    """A figure of the bus, beside one of its own or of another: `ours` at least `least` x it.

    most: for what should be small: at most that.
    """

    ours: str
    beside: str
    key: str
    least: float | None = None
    most: float | None = None

    def ratio(self, medians: dict[str, dict[str, float]]) -> float | None:
        """Return ours / theirs; None if that was not measured."""
        ours = medians.get("bus", {}).get(self.ours)
        if self.beside == "the best peer":
            peers = [m.get(self.key, 0.0) for n, m in medians.items() if n not in QUICK]
            theirs = max(peers, default=0.0) or None
        else:
            theirs = medians.get(self.beside, {}).get(self.key)
        return None if ours is None or theirs is None else ours / theirs


TARGETS = (
    Target("consume", "bare-redis-py", "consume", 0.9),
    Target("consume", "faststream", "consume", 40),
    Target("consume", "faststream-batch", "consume", 3),
    Target("consume_two_workers", "bus", "consume", 1.25),
    Target("consume_sleep_1ms_c100", "bare-redis-py", "consume_sleep_1ms_c100", 0.9),
    Target("consume_batch_100", "bus", "consume", 1.2),
    Target("publish_concurrent_100", "bare-hiredis", "publish_concurrent_100", 0.55),
    Target("publish_concurrent_100", "the best peer", "publish_concurrent_100", 10),
    Target("publish_many", "bare-hiredis", "publish_many", 0.6),
    Target("publish_many", "the best peer", "publish_many", 5),
    Target("publish_sequential", "bare-redis-py", "publish_sequential", 0.9),
    Target("latency_p50_ms_at_1k", "bare-redis-py", "latency_p50_ms_at_1k", most=1.3),
    Target("latency_p99_ms_at_1k", "bare-redis-py", "latency_p99_ms_at_1k", most=2.0),
)
MOST_RSS_MB = 45


def report(bench: Bench, versions: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """Print the tables; return the same as data, and whether every target was met."""
    medians = {
        name: {key: statistics.median(values) for key, values in keys.items()}
        for name, keys in bench.found.items()
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="\n\n")
    for key in KEYS:
        print(f"{key:24} {'median':>12}   {'range':25} bus / it")
        for name in bench.names:
            values = bench.found[name].get(key)
            if not values:
                continue
            median = statistics.median(values)
            between = f"{_number(min(values))} - {_number(max(values))}"
            ratio = medians.get("bus", {}).get(key, float("nan")) / median
            print(f"  {name:22} {_number(median):>12}   {between:25} {ratio:8.2f}")
    print("\ntargets")
    met = True
    for target in TARGETS:
        ratio_or_none = target.ratio(medians)
        if ratio_or_none is None:
            continue
        ratio = ratio_or_none
        ok = ratio >= target.least if target.least is not None else ratio <= (target.most or 0)
        met = met and ok
        limit = f"at least {target.least}" if target.least is not None else f"at most {target.most}"
        beside = target.beside if target.key == target.ours else f"its {target.key}"
        words = f"{target.ours} / {beside}"
        print(f"  {words:48} {ratio:8.2f}   {limit:14} {'' if ok else 'MISSED'}")
    rss_mb = medians.get("bus", {}).get("rss_mb")
    if rss_mb is not None:
        met = met and rss_mb <= MOST_RSS_MB
        print(f"  {'memory of a worker, MB':48} {rss_mb:8.1f}   at most {MOST_RSS_MB}")
    data = {
        "versions": versions,
        "systems": medians,
        "ranges": {
            name: {key: [min(v), max(v)] for key, v in keys.items()}
            for name, keys in bench.found.items()
        },
    }
    return data, met


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"  # noqa: PLR2004 - from there on nobody reads more digits


def versions_of(names: list[str], client: Any) -> dict[str, str]:
    """Return the versions of the server, of Python, and of what is in the environments."""
    info = client.info("server")
    name = "valkey" if "valkey_version" in info else "redis"
    found = {name: info.get("valkey_version", info["redis_version"])}
    found["python"] = platform.python_version()
    wanted = ("redis", "hiredis", "faststream", "repid", "taskiq-redis", "streaq")
    for environment in dict.fromkeys(SYSTEMS[n].environment for n in names):
        python = next(s.python for s in SYSTEMS.values() if s.environment == environment)
        code = "import sys, importlib.metadata as m\nfor d in m.distributions():\n"
        code += "    print(d.metadata['Name'], d.version)"
        listed = subprocess.run(  # noqa: S603 - our own interpreters
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for line in listed.splitlines():
            name, _, version = line.partition(" ")
            if name.lower() in wanted:
                where = "" if environment == _OWN else f" in {environment}"
                if where and name.lower() in ("redis", "hiredis"):
                    continue
                found[name.lower()] = version
    return found


def run(names: list[str], rounds: int, *, quick: bool, only: str, file: Path | None) -> int:
    """Measure, print, and write `file`; the exit code is 1 when a target was missed."""
    missing = [n for n in names if not SYSTEMS[n].python.exists()]
    if missing:
        print(f"no environment for {', '.join(missing)}: run `make bench`", file=sys.stderr)
        return 2
    bench = Bench(
        names,
        most_s=0.4 if quick else 3.0,
        paced=500 if quick else 4_000,
        only=only,
        less=4 if quick else 1,
    )
    started = time.monotonic()
    try:
        for number in range(rounds):
            # As many rounds as a minute has time for, and one at least.
            took_s = time.monotonic() - started
            if quick and number and took_s * (number + 1) / number > _QUICK_S:
                break
            bench.round(number)
            print(
                f"round {number + 1} of {rounds}, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
            )
    finally:
        bench.close()
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        versions = versions_of(names, client)
    data, met = report(bench, versions)
    if file is not None:
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1
