"""Measure the bus beside the bare loops: interleaved rounds in one run, medians, ratios.

And publishing into streams that stand at their cap beside publishing far below it.
Machines are shared and noisy: the ratios of one run mean something, single rates do not.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import redis
import uvloop

from bench.work import LANES, STANDINGS, STREAM, TOPIC, make_events
from bus import Bus, Topic
from bus.embedded import EmbeddedServer

_PAIRS = (("consume", "bare-redis-py", 0.5), ("publish", "bare-hiredis", 0.3))
# Beside the no-op handler of the same bus, in the same run: with effects, and looking back.
_BESIDE = (("quota", 0.4), ("quota-event", 0.2), ("history", 0.4))
_STANDING = "publish-standing"
_COST_AT_MOST = 1.5  # of a publish at `keep` and above, where appends trim, to one far below it


async def preload(url: str, count: int) -> None:
    """Fill the stream that everybody drains, in a topic that keeps what was drained."""
    events = make_events(count)
    topic = Topic(TOPIC, keep=10 * count, maxlen=20 * count)
    async with Bus.connect(url, topics=[topic]) as bus:
        for start in range(0, count, 1000):
            await bus.publish_many(events[start : start + 1000])


def measure(url: str, system: str, test: str, group: str, count: int) -> dict[str, Any]:
    """Run one child and return its figures."""
    command = [sys.executable, "-m", "bench.child", system, test, "--url", url]
    command += ["--group", group, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{system} {test} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def run(rounds: int, count: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run all tests of all systems in turn, `rounds` times."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        with EmbeddedServer() as server:
            uvloop.run(preload(server.url, count))
            systems = ["bus", *(system for system, _ in _BESIDE)]
            first = number % len(systems)
            for system in systems[first:] + systems[:first]:
                figures = measure(server.url, system, "beside", f"beside-{system}", count)
                results["beside"][system].append(figures)
            for test, other, _ in _PAIRS:  # publishing last: it adds to the stream
                order = ("bus", other) if number % 2 else (other, "bus")
                for system in order:
                    group = f"{system}-{number}"
                    amount = count if test == "consume" else count // 2
                    figures = measure(server.url, system, test, group, amount)
                    results[test][system].append(figures)
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
    found: dict[str, Any] = {"python": platform.python_version(), "tests": {}}
    print(f"{'':10} {'bus':>24} {'beside':>30} {'ratio':>6}  at least")
    for test, other, least in _PAIRS:
        ours = [f["rate"] for f in results[test]["bus"]]
        theirs = [f["rate"] for f in results[test][other]]
        ratio = statistics.median(ours) / statistics.median(theirs)
        beside = f"{other} {_rates(theirs)}"
        print(f"{test:10} {_rates(ours):>24} {beside:>30} {ratio:6.2f}  {least}")
        found["tests"][test] = {"bus": ours, other: theirs, "ratio": ratio, "at_least": least}
    noop = [f["rate"] for f in results["beside"]["bus"]]
    for system, least in _BESIDE:
        ours = [f["rate"] for f in results["beside"][system]]
        ratio = statistics.median(ours) / statistics.median(noop)
        print(f"{system:11}{_rates(ours):>24} {f'no-op {_rates(noop)}':>30} {ratio:6.2f}  {least}")
        found["tests"][system] = {"bus": ours, "no-op": noop, "ratio": ratio, "at_least": least}
    found["standing"] = _report_standing(results[_STANDING])
    rss_mb = max(f["rss_mb"] for f in results["consume"]["bus"])
    print(f"worker memory {rss_mb:.0f} MB (peak, limit 45)")
    found["worker_rss_mb"] = rss_mb
    return found


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


def main() -> int:
    """Run everything; the exit code is 1 when a figure misses its mark."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--count", type=int, default=200_000, help="entries drained per run")
    p.add_argument("--json", type=Path, help="write the figures here, too")
    a = p.parse_args()
    found = report(run(a.rounds, a.count))
    if a.json:
        a.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    missed = [n for n, t in found["tests"].items() if t["ratio"] < t["at_least"]]
    missed += [n for n, t in found["standing"].items() if t["cost"] > t["at_most"]]
    return 1 if missed or found["worker_rss_mb"] > 45 else 0  # noqa: PLR2004 - the mark


if __name__ == "__main__":
    sys.exit(main())
