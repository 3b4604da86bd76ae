"""A group over several streams, and what is printed for people."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from bus.history.snapshot import (
    ConsumerSnapshot,
    GroupSnapshot,
    LaneSnapshot,
    Paused,
    ServerFacts,
    Snapshot,
    StreamSnapshot,
    TopicSnapshot,
    summed,
)


def part(**other: Any) -> GroupSnapshot:
    """One running, two parked."""
    worker, lane = ConsumerSnapshot("w", True, 1, 2.0, True), LaneSnapshot(0.5, 2)
    ages = ("oldest_undelivered", "oldest_pending", "oldest_dead", "newest_dead")
    numbers = dict.fromkeys(("undelivered", "inbox", "inbox_pending", "due", "orphaned", "dead"), 0)
    numbers |= {"pending": 3, "running": 1, "parked": 2}
    found: dict[str, Any] = {"group": "g", "at_least": False, "served": True, **numbers}
    found |= {f"{age}_age_s": None for age in ages}
    found |= {"paused": None, "lag": 0, "consumers": (worker,), "lanes": (lane,), **other}
    return GroupSnapshot(**found)


def test_a_group_is_summed_over_its_streams():
    one = part(undelivered=5, inbox=1, inbox_pending=1, dead=2, oldest_dead_age_s=9.0)
    two = part(undelivered=6, dead=1, oldest_dead_age_s=20.0, newest_dead_age_s=3.0)
    three = part(at_least=True, newest_dead_age_s=4.0, oldest_pending_age_s=7.0, due=1)
    total = summed([one, two, three])
    assert (total.undelivered, total.at_least, total.pending) == (11, True, 9)
    assert (total.inbox, total.inbox_pending, total.dead, total.due) == (1, 1, 3, 1)
    assert (total.running, total.parked, total.orphaned) == (3, 6, 0)
    assert (total.oldest_dead_age_s, total.newest_dead_age_s) == (20.0, 3.0)
    assert (total.oldest_pending_age_s, total.oldest_undelivered_age_s) == (7.0, None)
    assert total.lanes == (LaneSnapshot(0.5, 6),)
    assert total.consumers == (ConsumerSnapshot("w", True, 3, 2.0, True),)
    assert total.served
    assert summed([one]) is one


def test_a_group_is_served_if_every_stream_is_and_a_consumer_lives_if_anywhere():
    left = (ConsumerSnapshot("v", False, 0, 0.0), ConsumerSnapshot("w", False, 1, 1.0))
    dead = part(running=0, orphaned=1, parked=0, lanes=(), consumers=left, served=False)
    total = summed([part(), dead])
    assert (total.served, total.running, total.orphaned) == (False, 1, 1)
    assert total.consumers == (
        ConsumerSnapshot("v", False, 0, 0.0),
        ConsumerSnapshot("w", True, 2, 1.0, True),
    )


def test_a_group_has_as_many_workers_as_serve_each_of_its_streams():
    assert summed([part(workers=3), part(workers=1), part(workers=2)]).workers == 1


PAUSED = Paused(datetime(2026, 11, 20, tzinfo=UTC), None, "bad deploy")


def test_a_group_is_paused_on_all_streams_of_a_topic_and_its_lag_known_if_each_is():
    total = summed([part(lag=3, paused=PAUSED), part(lag=4, paused=PAUSED)])
    assert (total.paused, total.lag) == (PAUSED, 7)
    assert summed([part(lag=3), part(lag=None)]).lag is None
    assert summed([part(lag=0), part(lag=0)]).lag == 0
    assert summed([part(), part(paused=PAUSED)]).paused == PAUSED


def test_a_group_that_does_nothing_says_why():
    until = replace(PAUSED, until=datetime(2026, 11, 20, 9, 30, 15, tzinfo=UTC))
    groups = (
        part(group="a"),
        part(group="b", paused=PAUSED),
        part(group="c", paused=until),
        part(group="d", paused=PAUSED, served=False),
        part(group="e", served=False),
    )
    topic = TopicSnapshot("order", 1, 10, 5, "block", None, False, (), groups)
    lines = str(Snapshot(PAUSED.since, None, (topic,))).splitlines()
    said = [line.partition("       -")[2].strip() for line in lines[4:]]
    assert said == [
        "",
        "paused",
        "paused until 2026-11-20 09:30:15Z",
        "not served, paused",
        "not served",
    ]


def test_a_snapshot_is_a_table_to_read():
    idle = part(group="audit", running=0, parked=0, lanes=(), served=True)
    slow = part(group="rec\x1bpt", undelivered=100_022, at_least=True, due=1, orphaned=3, dead=4)
    slow = replace(
        slow, oldest_undelivered_age_s=180.0, oldest_pending_age_s=7_300.0, served=False, inbox=5
    )
    stream = StreamSnapshot(
        "bus:{order:0}",
        partition=0,
        length=112_034,
        added=None,
        maxlen=1_000_000,
        keep=100_000,
        room=887_966,
        first_id="1-0",
        last_id="2-0",
        oldest_age_s=1.0,
        newest_age_s=1.0,
        appends_per_s=12.34,
        pinned_by="rec\x1bpt",
        pinned_age_s=180.0,
        full_in_s=14_400.0,
        workers=2,
        dead=4,
        error=None,
        groups=(idle, slow),
    )
    other = replace(
        stream, stream="bus:{order:1}", pinned_age_s=59.0, length=1, error="lacks a right"
    )
    topic = TopicSnapshot(
        "order", 2, 1_000_000, 100_000, "block", None, False, (stream, other), (idle, slow)
    )
    empty = TopicSnapshot("empty", 1, 10, 5, "block", None, True, (), ())
    facts = ServerFacts("valkey", "9.1.0", 60, 212_400_000, 1_000_000_000)
    taken = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
    left = "room for 887,966 of 1,000,000, full in about 4 h"
    assert str(Snapshot(taken, facts, (topic, empty))).splitlines() == [
        "2026-11-20 09:00:00Z  valkey 9.1.0, 212 of 1,000 MB",
        "",
        "order: 112,035 entries in 2 streams, 24.7 a second, 2 workers",
        "  group   undelivered  running  parked  due  orphaned  inbox  dead  oldest",
        "  audit             0        0       0    0         0      0     0       -",
        "  rec�pt     >100,022        1       2    1         3      5     4     2 h  not served",
        f"  bus:{{order:0}} is pinned by rec�pt for 3 min, {left}",
        "  bus:{order:1}: lacks a right",
        "",
        "empty: 0 entries in 0 streams, 0.0 a second, 0 workers",
    ]
    assert str(Snapshot(taken, None, ())) == "2026-11-20 09:00:00Z"
