"""Numbers and limits, and how monitors are told. Without a server, but for the last part."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from typing import Any, get_args

import msgspec
import pytest
from redis.asyncio import Redis

from bus import Bus, DeclarationError, Topic
from bus.admin.checks import (
    DEFAULTS,
    Checked,
    CheckName,
    Limit,
    Limits,
    Status,
    compared,
    limits_of,
    unknown,
)
from bus.admin.exposition import nagios, prometheus
from bus.errors import BusClosed
from bus.history.snapshot import GroupSnapshot, Snapshot, StreamSnapshot
from tests.admin.test_diagnosis import NOW, group, pause, stream, topic
from tests.servers import ask
from tests.streams.wire import CANARY, with_user

CHECKS = get_args(CheckName)
OLD = {"undelivered": 12_034, "oldest_undelivered_age_s": 312.4}


def snapshot(*groups: GroupSnapshot, **other: Any) -> Snapshot:
    return Snapshot(NOW, None, (topic(stream(*groups)),), **other)


def check(
    name: CheckName,
    *groups: GroupSnapshot,
    warn: str | None = None,
    crit: str | None = None,
    of: list[str] | None = None,
) -> Checked:
    return compared(name, snapshot(*groups), of, limits_of(name, warn, crit))


# --- limits


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("1000", Limit(1_000, "entries")),
        ("0", Limit(0, "entries")),
        (" 12.5 ", Limit(12.5, "entries")),
        ("90s", Limit(90, "s")),
        ("5m", Limit(300, "s")),
        ("1.5h", Limit(5_400, "s")),
        ("2d", Limit(172_800, "s")),
    ],
)
def test_a_limit_is_a_number_or_an_age(text, limit):
    assert Limit.of(text, "lag") == limit
    assert Limit.of(limit, "lag") is limit


@pytest.mark.parametrize("text", ["", "x", "5 m", "-5", "5y", "1e3", "5sec", "1,000", "m", None, 5])
def test_what_is_no_limit(text):
    with pytest.raises(DeclarationError, match="a limit is a number such as 1000, or an age"):
        Limit.of(text, "lag")


def test_limits_of_workers_are_workers():
    assert Limit.of("2", "workers") == Limit(2, "workers")
    with pytest.raises(DeclarationError, match="a limit is a number such as 1000, not '5m'"):
        Limit.of("5m", "workers")
    with pytest.raises(DeclarationError):
        limits_of("workers", crit=Limit(60, "s"))
    with pytest.raises(DeclarationError):
        limits_of("lag", crit=Limit(1, "workers"))


def test_who_gives_one_limit_has_no_other():
    assert limits_of("lag") == DEFAULTS["lag"] == Limits(Limit(60, "s"), Limit(300, "s"))
    assert limits_of("pending") == Limits(Limit(300, "s"), Limit(3_600, "s"))
    assert limits_of("dead") == Limits(Limit(1, "entries"), None)
    assert limits_of("workers") == Limits(None, Limit(1, "workers"))
    assert limits_of("lag", warn="10m") == Limits(Limit(600, "s"), None)
    assert limits_of("lag", crit="10") == Limits(None, Limit(10, "entries"))


@pytest.mark.parametrize(
    ("name", "warn", "crit", "well"),
    [
        ("lag", "5m", "60s", False),
        ("lag", "60s", "60s", True),
        ("lag", "11", "10", False),
        ("lag", "1000000", "1s", True),  # of two kinds
        ("workers", "1", "2", False),
        ("workers", "2", "1", True),
        ("workers", "1", "1", True),
    ],
)
def test_a_warning_comes_before_the_critical_state(name, warn, crit, well):
    if well:
        limits_of(name, warn, crit)
    else:
        with pytest.raises(DeclarationError, match="would come after the critical state"):
            limits_of(name, warn, crit)


def test_there_are_four_checks():
    with pytest.raises(DeclarationError, match="there are lag, pending, dead, workers"):
        limits_of("backlog")  # type: ignore[arg-type]


# --- statuses


@pytest.mark.parametrize(
    ("name", "found", "status"),
    [
        ("lag", {"undelivered": 9, "oldest_undelivered_age_s": 59.9}, Status.OK),
        ("lag", {"undelivered": 9, "oldest_undelivered_age_s": 60.0}, Status.WARNING),
        ("lag", {"undelivered": 9, "oldest_undelivered_age_s": 300.0}, Status.CRITICAL),
        ("lag", {"pending": 9, "oldest_pending_age_s": 9e9}, Status.OK),
        ("pending", {"pending": 9, "oldest_pending_age_s": 299.0}, Status.OK),
        ("pending", {"pending": 9, "oldest_pending_age_s": 300.0}, Status.WARNING),
        ("pending", {"pending": 9, "oldest_pending_age_s": 3_600.0}, Status.CRITICAL),
        ("pending", {"undelivered": 9, "oldest_undelivered_age_s": 9e9}, Status.OK),
        ("dead", {"dead": 0}, Status.OK),
        ("dead", {"dead": 1}, Status.WARNING),
        ("dead", {"dead": 10**6}, Status.WARNING),
        ("workers", {"workers": 1}, Status.OK),
        ("workers", {"workers": 0}, Status.CRITICAL),
    ],
)
def test_what_the_defaults_say(name, found, status):
    checked = check(name, group(**found))
    assert checked.status == status
    assert [r.status for r in checked.readings] == [status]


@pytest.mark.parametrize(
    ("name", "field"), [("lag", "undelivered"), ("pending", "pending"), ("dead", "dead")]
)
@pytest.mark.parametrize(
    ("value", "status"),
    [(9, Status.OK), (10, Status.WARNING), (19, Status.WARNING), (20, Status.CRITICAL)],
)
def test_a_number_that_is_as_large_as_a_limit_has_reached_it(name, field, value, status):
    assert check(name, group(**{field: value}), warn="10", crit="20").status == status


@pytest.mark.parametrize(
    ("workers", "status"),
    [(3, Status.OK), (2, Status.WARNING), (1, Status.CRITICAL), (0, Status.CRITICAL)],
)
def test_fewer_workers_than_a_limit_have_reached_it(workers, status):
    assert check("workers", group(workers=workers), warn="3", crit="2").status == status


def test_a_limit_of_age_knows_no_entries_and_the_other_way_round():
    many = group(undelivered=1_000_000, oldest_undelivered_age_s=1.0)
    assert check("lag", many, crit="5m").status == Status.OK
    assert check("lag", many, crit="10").status == Status.CRITICAL
    assert check("lag", many, warn="10", crit="5m").status == Status.WARNING
    gone = group(pending=3, oldest_pending_age_s=None)  # their entries were deleted
    assert check("pending", gone).status == Status.OK


def test_the_age_of_dead_letters_is_that_of_the_oldest():
    letters = group(dead=2, oldest_dead_age_s=7_200.0, newest_dead_age_s=1.0)
    assert check("dead", letters, crit="1h").status == Status.CRITICAL


def test_what_waits_in_an_inbox_and_was_given_out_is_pending():
    assert check("pending", group(pending=3, inbox_pending=4)).readings[0].value == 7


def test_the_worst_status_wins():
    groups = [group("a"), group("b", **OLD), group("c", undelivered=1)]
    checked = check("lag", *groups)
    assert [(r.group, r.status) for r in checked.readings] == [
        ("a", Status.OK),
        ("b", Status.CRITICAL),
        ("c", Status.OK),
    ]
    assert checked.status == Status.CRITICAL


@pytest.mark.parametrize(
    ("found", "status"),
    [({}, Status.UNKNOWN), ({"dead": 1}, Status.WARNING)],
)
def test_what_is_certainly_wrong_comes_before_what_nobody_knows(found, status):
    """And neither is hidden."""
    checked = check("dead", group(**found), of=["receipts", "nobody"])
    assert checked.status == status
    assert checked.text.endswith("there is no group nobody")


# --- which groups


def test_groups_and_topics_that_are_asked_for():
    two = Snapshot(
        NOW,
        None,
        (
            topic(stream(group("a"), group("b"))),
            topic(stream(group("a"), stream="bus:{other:0}"), name="other"),
        ),
    )
    limits = limits_of("lag")
    every = compared("lag", two, None, limits)
    assert [(r.topic, r.group) for r in every.readings] == [
        ("order", "a"),
        ("order", "b"),
        ("other", "a"),
    ]
    some = compared("lag", two, iter(["a"]), limits)
    assert [(r.topic, r.group) for r in some.readings] == [("order", "a"), ("other", "a")]
    none = compared("lag", two, ["c", "d"], limits)
    assert (none.status, none.readings) == (Status.UNKNOWN, ())
    assert none.text == "there is no group c; there is no group d"


def test_nothing_to_look_at_is_unknown():
    empty = compared("lag", Snapshot(NOW, None, ()), None, limits_of("lag"))
    assert (empty.status, empty.text) == (Status.UNKNOWN, "there is no group to look at")
    bare = compared("lag", snapshot(), [], limits_of("lag"))
    assert bare.status == Status.UNKNOWN


def test_what_could_not_be_looked_at_is_unknown():
    broken = Snapshot(NOW, None, (topic(stream(group(), error="WRONGTYPE")),))
    checked = compared("lag", broken, None, limits_of("lag"))
    assert checked.status == Status.UNKNOWN
    assert "bus:{order:0} could not be looked at whole" in checked.text
    record = compared("lag", snapshot(group(), errors=("bus:topics: x",)), None, limits_of("lag"))
    assert (record.status, record.text.endswith("bus:topics: x")) == (Status.UNKNOWN, True)
    missing = compared("lag", snapshot(group()), None, limits_of("lag"), ["no topic x"])
    assert (missing.status, missing.text.endswith("no topic x")) == (Status.UNKNOWN, True)


def test_a_group_is_as_well_served_as_the_worst_of_its_streams():
    parts = [stream(group(workers=n), stream=f"bus:{{order:{n}}}") for n in (2, 0)]
    checked = compared("workers", Snapshot(NOW, None, (topic(*parts),)), None, limits_of("workers"))
    assert checked.readings[0].value == 0
    assert checked.status == Status.CRITICAL


# --- texts


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("lag", OLD, "order/receipts is 5 min behind (12,034 entries)"),
        (
            "lag",
            OLD | {"at_least": True},
            "order/receipts is 5 min behind (more than 12,034 entries)",
        ),
        (
            "pending",
            {"pending": 1, "oldest_pending_age_s": 7_200.0},
            "order/receipts has 1 entry pending, the oldest 2 h old",
        ),
        ("dead", {"dead": 2, "oldest_dead_age_s": 60.0}, "order/receipts has 2 dead letters"),
        ("workers", {"workers": 0}, "order/receipts is served by 0 workers"),
        ("lag", {}, "1 group looked at: none is behind"),
        ("pending", {}, "1 group looked at: nothing is pending"),
        ("dead", {}, "1 group looked at: none died"),
        ("workers", {"workers": 3}, "1 group looked at: 3 workers or more each"),
        (
            "lag",
            {"undelivered": 5, "oldest_undelivered_age_s": 2.0},
            "1 group looked at: 5 entries at most, the oldest 2 s old",
        ),
    ],
)
def test_what_is_said(name, found, text):
    assert check(name, group(**found)).text.startswith(text)


def test_the_worst_are_named_first_and_the_rest_counted():
    groups = [group(f"g{n}", undelivered=1, oldest_undelivered_age_s=60.0 * n) for n in range(1, 9)]
    checked = check("lag", *groups)
    assert checked.text == (
        "order/g8 is 8 min behind (1 entry); order/g7 is 7 min behind (1 entry); order/g6 is 6 min"
        " behind (1 entry); and 5 groups more"
    )


def test_groups_that_are_paused_are_named_and_judged_as_all():
    held = group(paused=pause(1), **OLD)
    checked = check("lag", held, group("audit"))
    assert checked.status == Status.CRITICAL
    assert checked.text.endswith("; paused: order/receipts")
    assert [r.paused for r in checked.readings] == [False, True]


# --- the words of monitors


def test_a_line_for_nagios():
    checked = check("lag", group(**OLD), group("audit"))
    assert nagios(checked) == (
        "BUS LAG CRITICAL - order/receipts is 5 min behind (12,034 entries) | 'order/audit'=0;;;0"
        " 'order/audit age'=0.000s;60;300;0 'order/receipts'=12034;;;0"
        " 'order/receipts age'=312.400s;60;300;0"
    )
    entries = check("lag", group(**OLD), warn="1000", crit="20000")
    assert " | 'order/receipts'=12034;1000;20000;0 'order/receipts age'=312.400s;;;0" in nagios(
        entries
    )
    workers = check("workers", group(workers=1), warn="3", crit="1")
    assert nagios(workers) == (
        "BUS WORKERS WARNING - order/receipts is served by 1 worker | 'order/receipts'=1;3:;1:;0"
    )
    away = unknown("lag", "nobody answers", limits_of("lag"))
    assert nagios(away) == "BUS LAG UNKNOWN - nobody answers"


_DATUM = re.compile(r"'(?:[^'=|]|'')+'=\d+(?:\.\d+)?s?(?:;[^;' ]*){3}")


@pytest.mark.parametrize("name", ["it's", "a|b", "a=b", "a b", "line\nbreak", "'", "''", "\x1b[2J"])
def test_names_do_not_break_the_line_for_nagios(name):
    line = nagios(check("lag", group(name, **OLD)))
    assert line.count("|") == 1
    assert line.isprintable()
    data = line.partition(" | ")[2]
    assert _DATUM.sub("", data).strip() == ""
    assert len(_DATUM.findall(data)) == 2


def samples(text: str) -> dict[str, dict[str, float]]:
    """Parse the text exposition: family -> labels -> value; HELP and TYPE once, before samples."""
    found: dict[str, dict[str, float]] = {}
    described: list[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert line.split(" ", 3)[3]
            described.append(line.split()[2])
        elif line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert (name, kind) == (described[-1], "gauge")
            assert name not in found
            found[name] = {}
        else:
            name, labels, value = re.fullmatch(  # type: ignore[union-attr]
                r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (\S+)', line
            ).groups()
            found[name][labels] = float(value)
    assert text.endswith("\n")
    return found


def test_metrics_for_prometheus():
    both = [group(**OLD, pending=3, oldest_pending_age_s=9.5, dead=2, workers=4), group("audit")]
    text = prometheus(*[check(name, *both) for name in CHECKS])
    receipts, audit = 'topic="order",group="receipts"', 'topic="order",group="audit"'
    assert samples(text) == {
        "bus_group_undelivered_events": {receipts: 12_034, audit: 0},
        "bus_group_oldest_undelivered_age_seconds": {receipts: 312.4, audit: 0},
        "bus_group_pending_events": {receipts: 3, audit: 0},
        "bus_group_oldest_pending_age_seconds": {receipts: 9.5, audit: 0},
        "bus_dead_letters": {receipts: 2, audit: 0},
        "bus_group_workers": {receipts: 4, audit: 1},
        "bus_check_status": {
            'check="lag"': 2,
            'check="pending"': 0,
            'check="dead"': 1,
            'check="workers"': 0,
        },
    }


def test_what_prometheus_is_told_of_what_is_unknown():
    text = prometheus(unknown("dead", "nobody answers", limits_of("dead")))
    assert samples(text) == {"bus_dead_letters": {}, "bus_check_status": {'check="dead"': 3}}


def test_labels_are_escaped():
    text = prometheus(check("dead", group('a"b\\c\nd', dead=1)))
    assert r'bus_dead_letters{topic="order",group="a\"b\\c\nd"} 1' in text.splitlines()
    assert samples(text)["bus_dead_letters"]


def test_it_is_ready_for_json():
    plain = msgspec.to_builtins(check("lag", group(**OLD)))
    assert plain["status"] == 2
    assert plain["readings"][0] == {
        "topic": "order",
        "group": "receipts",
        "value": 12_034,
        "at_least": False,
        "unit": "entries",
        "age_s": 312.4,
        "status": 2,
        "paused": False,
    }
    assert plain["warn"] == {"value": 60, "unit": "s"}
    assert plain["check"] == "lag"
    json.dumps(plain)


# --- on a server

S, G = "bus:{order:0}", "receipts"


async def test_what_a_server_says_is_compared(url):
    async with (
        Bus.connect(url, topics=[Topic("order"), Topic("empty")]) as bus,
        Redis.from_url(url, protocol=2) as redis,
    ):
        now_s, _ = await redis.time()
        await redis.xgroup_create(S, G, "0", mkstream=True)
        for n in range(3):
            await redis.xadd(S, {"n": "1"}, id=f"{(int(now_s) - 400) * 1000}-{n + 1}")
        lag = await bus.admin.check("lag")
        assert (lag.status, lag.readings[0].value) == (Status.CRITICAL, 3)
        assert lag.text == "order/receipts is 7 min behind (3 entries)"
        assert (await bus.admin.check("workers")).status == Status.CRITICAL
        assert (await bus.admin.check("dead")).status == Status.OK
        await redis.xreadgroup(G, "w", {S: ">"}, count=2)
        pending = await bus.admin.check("pending", groups=[G], topics=["order"])
        assert (pending.status, pending.readings[0].value) == (Status.WARNING, 2)
        assert (await bus.admin.check("pending", warn="3")).status == Status.OK
        assert (await bus.admin.check("workers")).status == Status.OK  # it was heard of
        await redis.xadd(f"{S}:dead:{G}", {"n": "1"})
        assert (await bus.admin.check("dead")).status == Status.WARNING
        await bus.admin.pause_group(G, until=timedelta(hours=1))
        assert (await bus.admin.check("lag")).text.endswith("; paused: order/receipts")


async def test_topics_and_groups_that_are_not_there(url):
    async with (
        Bus.connect(url, topics=[Topic("order"), Topic("empty")]) as bus,
        Redis.from_url(url, protocol=2) as redis,
    ):
        await redis.xgroup_create(S, G, "0", mkstream=True)
        await redis.xadd(f"{S}:dead:{G}", {"n": "1"})
        for topics, groups, said in (
            (["ordre"], None, "there is no topic ordre: did you mean order?"),
            (["empty"], None, "there is no group to look at"),
            (None, ["receipt"], "there is no group receipt"),
        ):
            checked = await bus.admin.check("lag", topics=topics, groups=groups)
            assert checked.status == Status.UNKNOWN
            assert said in checked.text
        # What is there is looked at all the same.
        checked = await bus.admin.check("dead", topics=["ordre", "order"])
        assert checked.status == Status.WARNING
        assert "there is no topic ordre" in checked.text
        for wrong in (
            {"name": "backlog"},
            {"name": "lag", "warn": "5x"},
            {"name": "lag", "warn": "5m", "crit": "1m"},
            {"name": "lag", "topics": "order"},
            {"name": "lag", "topics": ["a b"]},
            {"name": "lag", "groups": "receipts"},
        ):
            with pytest.raises(DeclarationError):
                await bus.admin.check(**wrong)
    with pytest.raises(BusClosed):
        await bus.admin.check("lag")


async def test_a_server_that_cannot_be_asked_is_unknown(private_server, server_kind):
    server = private_server(server_kind, extra_args=("--requirepass", CANARY))
    for url, said in (
        ("redis://127.0.0.1:1/0", "nobody answers at redis://127.0.0.1:1/0"),
        (server.url, "asks for a password"),
        (with_user(server.url, "x:wrong"), "refused user or password"),
    ):
        bus = Bus.connect(url)
        checked = await bus.admin.check("lag", warn="5m")
        await bus.close()
        assert (checked.status, checked.readings) == (Status.UNKNOWN, ())
        assert said in checked.text
        assert CANARY not in checked.text
        assert nagios(checked).startswith("BUS LAG UNKNOWN - ")


async def test_a_user_who_may_look_at_nothing_is_told_so(server, url):
    ask(server, "ACL", "SETUSER", "eye", "on", ">pw", "~*", "+@all", "-hgetall")
    bus = Bus.connect(with_user(url, "eye:pw"))
    checked = await bus.admin.check("lag")
    await bus.close()
    ask(server, "ACL", "DELUSER", "eye")
    assert checked.status == Status.UNKNOWN
    assert "lacks a right on bus:topics" in checked.text


def test_a_reading_says_what_a_snapshot_says():
    """Field by field, so that no check compares another number."""
    numbers = {"undelivered": 1, "pending": 2, "inbox_pending": 4, "dead": 8, "workers": 16}
    ages = {
        "oldest_undelivered_age_s": 1.0,
        "oldest_pending_age_s": 2.0,
        "oldest_dead_age_s": 3.0,
        "newest_dead_age_s": 4.0,
    }
    found = group(**numbers, **ages, at_least=True)
    read = {n: check(n, found).readings[0] for n in CHECKS}
    assert {n: (r.value, r.age_s, r.at_least) for n, r in read.items()} == {
        "lag": (1, 1.0, True),
        "pending": (6, 2.0, False),
        "dead": (8, 3.0, False),
        "workers": (16, None, False),
    }


def test_streams_may_be_many():
    parts: list[StreamSnapshot] = [
        replace(stream(group(**OLD)), stream=f"bus:{{order:{n}}}", partition=n) for n in range(4)
    ]
    checked = compared("lag", Snapshot(NOW, None, (topic(*parts),)), None, limits_of("lag"))
    (reading,) = checked.readings
    assert (reading.value, reading.age_s) == (4 * 12_034, 312.4)
