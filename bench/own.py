"""The bus beside itself, in interleaved rounds: what effects, looking back, a full stream cost.

And what needs no server: telling observers, creating events.

Machines are shared and noisy: the ratios of one run mean something, single rates do not.
"""

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from typing import Any

import redis
import uvloop

from bench.own_child import STANDINGS, STREAM, make_events
from bench.systems.bus_ import TOPIC
from bench.work import LANES
from bus import Bus
from bus.embedded import EmbeddedServer

# Beside the no-op handler of the same bus, in the same run: with effects, and looking back.
_BESIDE = (("quota", 0.4), ("quota-event", 0.2), ("history", 0.4))
_TELL_US_AT_MOST = 5.0  # per observer, of ten
_EVENT_BYTES_AT_MOST = 72  # a small one, with what the garbage collector keeps in front of it
_STANDING = "publish-standing"
_COST_AT_MOST = 1.5  # of a publish at `keep` and above, where appends trim, to one far below it


async def preload(url: str, count: int) -> None:
    """Fill the stream that everybody drains, in a topic that keeps what was drained."""
    events = make_events(count)
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        for start in range(0, count, 1000):
            await bus.publish_many(events[start : start + 1000])


def measure(url: str, system: str, test: str, group: str, count: int) -> dict[str, Any]:
    """Run one child and return its figures."""
    command = [sys.executable, "-m", "bench.own_child", system, test, "--url", url]
    command += ["--group", group, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    if done.returncode:
        raise SystemExit(f"{system} {test} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def run(rounds: int, count: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run all tests of all systems in turn, `rounds` times."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for system in ("observers", "creation"):
            results["local"][system].append(measure("", system, "local", "", count // 4))
        with EmbeddedServer() as server:
            uvloop.run(preload(server.url, count))
            systems = ["bus", *(system for system, _ in _BESIDE)]
            first = number % len(systems)
            for system in systems[first:] + systems[:first]:
                figures = measure(server.url, system, "beside", f"beside-{system}", count)
                results["beside"][system].append(figures)
            with redis.Redis.from_url(server.url) as client:
                client.delete(STREAM)
        for place in range(len(STANDINGS)):
            standing = STANDINGS[(place + number) % len(STANDINGS)]
            with EmbeddedServer() as server:
                figures = measure(server.url, standing, _STANDING, "", max(1000, count // 8))
                results[_STANDING][standing].append(figures)
    return results


def report(results: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Print the table; return the same as data."""
    found: dict[str, Any] = {"tests": {}}
    print(f"{'':10} {'':>24} {'beside':>30} {'ratio':>6}  at least")
    noop = [f["rate"] for f in results["beside"]["bus"]]
    for system, least in _BESIDE:
        ours = [f["rate"] for f in results["beside"][system]]
        ratio = statistics.median(ours) / statistics.median(noop)
        print(f"{system:11}{_rates(ours):>24} {f'no-op {_rates(noop)}':>30} {ratio:6.2f}  {least}")
        found["tests"][system] = {"bus": ours, "no-op": noop, "ratio": ratio, "at_least": least}
    found["standing"] = _report_standing(results[_STANDING])
    found["local"] = _report_local(results["local"])
    return found


def _report_local(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print what observers and events cost; return the same as data."""
    observers, creation = results["observers"], results["creation"]
    figures = {name: statistics.median(f[name] for f in observers) for name in observers[0]}
    figures |= {name: statistics.median(f[name] for f in creation) for name in creation[0]}
    rows = (
        ("tell", "us per observer, of ten", figures["tell_us"], _TELL_US_AT_MOST),
        ("tell and be seen", "us per observer", figures["seen_us"], _TELL_US_AT_MOST),
        (
            "create an event",
            "us, a dataclass at most",
            figures["event_us"],
            figures["dataclass_us"],
        ),
        ("an event takes", "bytes", figures["bytes"], _EVENT_BYTES_AT_MOST),
    )
    print()
    for name, unit, value, at_most in rows:
        print(f"{name:19} {value:8.2f} {unit:24} at most {at_most:.2f}")
    return {name: {"value": value, "at_most": most} for name, _, value, most in rows}


def _report_standing(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print what publishing costs where appends trim; return the same as data."""
    found: dict[str, Any] = {}
    print(f"\n{'publish':19} {'':>24} {'far below keep':>24} {'cost':>6}  at most")
    for standing, where in (("keep", "at keep"), ("pinned", "above, pinned")):
        for lanes in (LANES, 1):
            ours = [f[f"rate_{lanes}"] for f in results[standing]]
            below = [f[f"rate_{lanes}"] for f in results["below"]]
            cost = statistics.median(below) / statistics.median(ours)
            name = f"{where} x{lanes}"
            print(f"{name:19} {_rates(ours):>24} {_rates(below):>24} {cost:6.2f}  {_COST_AT_MOST}")
            found[name] = {standing: ours, "below": below, "cost": cost, "at_most": _COST_AT_MOST}
    return found


def _rates(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f}/s ({min(values):,.0f}-{max(values):,.0f})"


def main(rounds: int, count: int = 200_000) -> int:
    """Run everything; the exit code is 1 when a figure misses its mark."""
    found = report(run(rounds, count))
    missed = [n for n, t in found["tests"].items() if t["ratio"] < t["at_least"]]
    missed += [n for n, t in found["local"].items() if t["value"] > t["at_most"]]
    missed += [n for n, t in found["standing"].items() if t["cost"] > t["at_most"]]
    return 1 if missed else 0
