"""What is judged of what was seen: no server is needed for that."""

from __future__ import annotations

import shlex
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from bus.admin import server_findings
from bus.admin.diagnosis import Diagnosis, Seen, diagnosed
from bus.admin.finding import Finding, bus, counted, redis_cli
from bus.history.letter import letter_of
from bus.history.snapshot import (
    ConsumerSnapshot,
    GroupSnapshot,
    LaneSnapshot,
    Paused,
    Snapshot,
    StreamSnapshot,
    TopicSnapshot,
    summed,
)
from bus.streams.checkup import ClockSeen, ServerSeen
from bus.streams.rights import ROLES

ADDRESS = "redis://localhost:6379/0"
NOW = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
S = "bus:{order:0}"
DAY_S = 86_400.0
# Of a server that is well.
FACTS = {
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "maxmemory_policy": "noeviction",
    "used_memory": "100",
    "maxmemory": "1000",
    "evicted_keys": "0",
    "role": "master",
    "connected_slaves": "0",
}
CONFIG = {
    "appendfsync": "everysec",
    "save": "",
    "min-replicas-to-write": "0",
    "stop-writes-on-bgsave-error": "yes",
}


def server(
    facts: dict[str, str] | None = None, config: dict[str, str] | None = None, **other: Any
) -> ServerSeen:
    seen = {"trouble": "", "takes_counts": True, "refuses": "", **other}
    return ServerSeen(facts=FACTS | (facts or {}), config=CONFIG | (config or {}), **seen)


def group(name: str = "receipts", **other: Any) -> GroupSnapshot:
    """A group that is done with everything, and served by one worker."""
    numbers = ("undelivered", "pending", "inbox", "inbox_pending", "running", "parked", "due")
    found: dict[str, Any] = dict.fromkeys((*numbers, "orphaned", "dead", "lag"), 0)
    ages = ("oldest_undelivered", "oldest_pending", "oldest_dead", "newest_dead")
    found |= {f"{age}_age_s": None for age in ages}
    found |= {"group": name, "at_least": False, "served": True, "paused": None, "lanes": ()}
    found |= {"consumers": (consumer(),), "workers": 1}
    return GroupSnapshot(**found | other)


def consumer(name: str = "w-1", **other: Any) -> ConsumerSnapshot:
    return ConsumerSnapshot(
        **{"name": name, "alive": True, "pending": 0, "idle_s": 1.0, "leased": True} | other
    )


def gone(name: str = "w-1", idle_s: float = 3_600.0, **other: Any) -> ConsumerSnapshot:
    return consumer(name, alive=False, idle_s=idle_s, **other)


def unserved(**other: Any) -> GroupSnapshot:
    return group(**{"served": False, "workers": 0, "consumers": ()} | other)


def stream(*groups: GroupSnapshot, **other: Any) -> StreamSnapshot:
    """A stream of 100 entries, a thousand fit."""
    found: dict[str, Any] = {
        "stream": S,
        "partition": 0,
        "length": 100,
        "added": 100,
        "maxlen": 1_000,
        "keep": 100,
        "room": 1_000 - other.get("length", 100),
        "first_id": "1-0",
        "last_id": "2-0",
        "oldest_age_s": 60.0,
        "newest_age_s": 1.0,
        "appends_per_s": 1.0,
        "pinned_by": None,
        "pinned_age_s": None,
        "full_in_s": None,
        "workers": 1,
        "dead": 0,
        "error": None,
        "generated_id": "1763629200000-0",
    }
    return StreamSnapshot(**found | other, groups=groups)


def topic(*streams: StreamSnapshot, **other: Any) -> TopicSnapshot:
    names = sorted({g.group for s in streams for g in s.groups})
    groups = tuple(summed([g for s in streams for g in s.groups if g.group == n]) for n in names)
    found: dict[str, Any] = {
        "name": "order",
        "partitions": len(streams),
        "maxlen": 1_000,
        "keep": 100,
        "on_full": "block",
        "retention_s": None,
        "implicit": False,
    }
    return TopicSnapshot(**found | other, streams=streams, groups=groups)


def examined(*topics: TopicSnapshot, **other: Any) -> Diagnosis:
    snapshot = Snapshot(NOW, None, topics)
    seen = {"address": ADDRESS, "server": server(), "refused": {}, "snapshot": snapshot}
    return diagnosed(Seen(**seen | other))


def of_group(found: GroupSnapshot, **other: Any) -> tuple[Finding, ...]:
    return examined(topic(stream(found, **other))).findings


def of_stream(*groups: GroupSnapshot, on_full: str = "block", **other: Any) -> tuple[Finding, ...]:
    return examined(topic(stream(*groups, **other), on_full=on_full)).findings


def of_server(seen: ServerSeen, **other: Any) -> tuple[Finding, ...]:
    return examined(server=seen, **other).findings


def only(findings: tuple[Finding, ...]) -> Finding:
    """The one finding; whatever is graver than a note has a command that can be run."""
    (finding,) = findings
    if finding.severity != "note":
        assert finding.mend
    assert not finding.mend or shlex.split(finding.mend)[0] in ("bus", "redis-cli")
    assert "\n" not in finding.text
    return finding


# --- a bus that is well


def test_a_bus_that_is_well_has_no_finding():
    diagnosis = examined(topic(stream(group())), clock=ClockSeen(0.2, 0.001), roles=("worker",))
    assert diagnosis.findings == ()
    assert diagnosis.ok
    assert diagnosis.worst is None
    assert all(f.found is not False for f in diagnosis.features)


def test_the_gravest_comes_first_and_the_server_before_topics():
    diagnosis = examined(
        topic(stream(unserved(undelivered=1)), implicit=True),
        server=server({"aof_enabled": "0", "connected_slaves": "1"}, {"appendfsync": "no"}),
    )
    found = [(f.severity, f.check) for f in diagnosis.findings]
    assert found == [
        ("problem", "persistence"),
        ("problem", "unserved"),
        ("note", "replication"),
        ("note", "implicit"),
    ]
    assert (diagnosis.ok, diagnosis.worst) == (False, "problem")
    assert [f.check for f in diagnosis.of("note")] == ["replication", "implicit"]
    assert str(diagnosis).startswith("redis://localhost:6379/0: 2 problems, 0 warnings, 2 notes\n")
    assert "\n  redis-cli CONFIG SET appendonly yes\n" in str(diagnosis)


def test_notes_alone_are_well():
    assert examined(topic(stream(group()), implicit=True)).ok
    assert not examined(topic(stream(group(dead=1, newest_dead_age_s=5.0)))).ok


def test_it_is_ready_for_json():
    plain = msgspec.to_builtins(examined(topic(stream(unserved(undelivered=1)))))
    (finding,) = plain["findings"]
    assert finding["group"] == "receipts"
    assert msgspec.convert(plain, Diagnosis).findings[0].topic == "order"


# --- the command lines


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("redis://localhost:6379/0", "redis-cli PING"),
        ("redis://127.0.0.1:6380/2", "redis-cli -p 6380 -n 2 PING"),
        ("redis://cache.internal:6379/0", "redis-cli -h cache.internal PING"),
        ("redis://ops:***@cache:6379/0", "redis-cli -h cache --user ops --askpass PING"),
        ("redis://:***@localhost:6379/0", "redis-cli --user default --askpass PING"),
        ("rediss://cache:6379/0", "redis-cli -h cache --tls PING"),
        ("unix:///run/redis.sock", "redis-cli -s /run/redis.sock PING"),
        ("redis://a?b:***@cache:6379/0", "redis-cli PING"),  # cannot be told apart any more
    ],
)
def test_redis_cli_goes_to_the_server_that_was_examined(address, line):
    assert redis_cli(address, "PING") == line


def test_names_are_quoted_for_a_shell():
    assert redis_cli(ADDRESS, "HGET", S, "a b") == "redis-cli HGET 'bus:{order:0}' 'a b'"
    assert bus("groups rm", "$(x)", topic="order") == "bus groups rm '$(x)' --topic order"
    assert (
        bus("consumers rm", "w", group="g", topic="t") == "bus consumers rm w --group g --topic t"
    )
    assert "\x1b" not in bus("groups rm", "\x1b[2J")


def test_counts_are_said_as_people_say_them():
    said = [counted(n, "entry") for n in (0, 1, 12_034)]
    assert said == ["0 entries", "1 entry", "12,034 entries"]
    assert counted(1, "entry", at_least=True) == "more than 1 entries"
    assert counted(2, "worker") == "2 workers"


# --- the server: whether it can be used


@pytest.mark.parametrize(
    ("seen", "said", "mend"),
    [
        (
            server(trouble="NOAUTH"),
            "asks for a password",
            "redis-cli --user default --askpass PING",
        ),
        (
            server({"loading_eta_seconds": "12"}, trouble="LOADING"),
            "still loading its data, for about 12 s more",
            "redis-cli INFO persistence",
        ),
        (server({"loading": "1"}), "still loading its data", "redis-cli INFO persistence"),
        (
            server({"role": "slave", "master_host": "10.0.0.5", "master_port": "6380"}),
            "is a replica of 10.0.0.5:6380, and takes no events",
            "redis-cli -h 10.0.0.5 -p 6380 ROLE",
        ),
        (server({"role": ""}, refuses="READONLY"), "is a replica, and", "redis-cli ROLE"),
        (server(trouble="BUSY"), "runs somebody's script", "redis-cli SCRIPT KILL"),
    ],
)
def test_a_server_that_is_of_no_use_now(seen, said, mend):
    found = server_findings.connection(ADDRESS, seen)
    assert found is not None
    assert (found.check, found.severity) == ("connection", "problem")
    assert said in found.text
    assert found.mend.endswith(mend)


@pytest.mark.parametrize("trouble", ["", "MISCONF", "NOPERM"])
def test_what_has_findings_of_its_own_is_no_reason_to_give_up(trouble):
    assert server_findings.connection(ADDRESS, server(trouble=trouble)) is None


# --- how it keeps data


@pytest.mark.parametrize(
    ("facts", "config", "severity", "said", "mend"),
    [
        ({"aof_enabled": "0"}, {}, "problem", "all events are lost, unless", "appendonly yes"),
        ({"aof_enabled": "0"}, {"save": "60 1"}, "warning", "its last snapshot", "appendonly yes"),
        ({}, {"appendfsync": "no"}, "warning", "up to 30 s of events", "appendfsync everysec"),
        ({"aof_last_write_status": "err"}, {}, "problem", "cannot write its append", "GET dir"),
        ({"aof_last_bgrewrite_status": "err"}, {}, "warning", "could not rewrite", "BGREWRITEAOF"),
        (
            {"rdb_last_bgsave_status": "err"},
            {"save": "60 1"},
            "problem",
            "could not save its last snapshot and takes no events until it can",
            "BGSAVE",
        ),
        (
            {"rdb_last_bgsave_status": "err"},
            {"save": "60 1", "stop-writes-on-bgsave-error": "no"},
            "warning",
            "goes on without",
            "BGSAVE",
        ),
        ({"rdb_last_bgsave_status": "err"}, {}, "warning", "goes on without", "BGSAVE"),
    ],
)
def test_what_survives_the_end_of_the_server(facts, config, severity, said, mend):
    found = only(of_server(server(facts, config)))
    assert (found.check, found.severity) == ("persistence", severity)
    assert said in found.text
    assert found.mend.endswith(mend)


@pytest.mark.parametrize("fsync", ["everysec", "always"])
def test_an_append_only_file_that_reaches_the_disk_is_well(fsync):
    assert of_server(server(config={"appendfsync": fsync})) == ()


@pytest.mark.parametrize(("took_s", "severity"), [("-1", "problem"), ("0", "warning")])
def test_where_settings_are_hidden_a_snapshot_that_was_made_tells(took_s, severity):
    seen = server({"aof_enabled": "0", "rdb_last_bgsave_time_sec": took_s})._replace(config={})
    found = {f.check: f.severity for f in of_server(seen)}
    assert found == {"persistence": severity, "hidden": "note"}


# --- its memory


@pytest.mark.parametrize(
    ("policy", "severity", "what"),
    [
        ("allkeys-lru", "problem", "may delete streams"),
        ("allkeys-random", "problem", "may delete streams"),
        ("volatile-ttl", "warning", "leases"),
    ],
)
def test_a_policy_that_deletes_keys(policy, severity, what):
    found = only(of_server(server({"maxmemory_policy": policy})))
    assert (found.check, found.severity) == ("eviction", severity)
    assert what in found.text
    assert policy in found.text
    assert found.mend == "redis-cli CONFIG SET maxmemory-policy noeviction"


@pytest.mark.parametrize(
    ("policy", "severity", "mend"),
    [
        ("noeviction", "warning", "CONFIG RESETSTAT"),
        ("volatile-lru", "warning", "CONFIG SET maxmemory-policy noeviction"),
        ("allkeys-lru", "problem", "CONFIG SET maxmemory-policy noeviction"),
    ],
)
def test_keys_that_were_deleted(policy, severity, mend):
    facts = {"maxmemory_policy": policy, "evicted_keys": "1200"}
    found = [f for f in of_server(server(facts)) if "1,200 keys" in f.text]
    assert [(f.severity, f.mend) for f in found] == [(severity, f"redis-cli {mend}")]


@pytest.mark.parametrize(
    ("used", "refuses", "severity"),
    [("899", "", None), ("900", "", "warning"), ("1000", "", "problem"), ("950", "OOM", "problem")],
)
def test_memory_that_is_nearly_full(used, refuses, severity):
    found = of_server(server({"used_memory": used}, refuses=refuses))
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert all(f.mend == "redis-cli CONFIG SET maxmemory 1500" for f in found)


def test_a_server_without_a_limit_is_never_full():
    assert of_server(server({"used_memory": "99999", "maxmemory": "0"})) == ()


# --- replicas, clock, what it cannot do


def test_a_primary_that_goes_on_without_its_replicas():
    found = only(of_server(server({"connected_slaves": "2"})))
    assert (found.check, found.severity) == ("replication", "note")
    assert "has 2 replicas and takes events without any" in found.text
    well = {"connected_slaves": "2", "min_slaves_good_slaves": "2"}
    assert of_server(server(well, {"min-replicas-to-write": "1"})) == ()


def test_a_primary_that_waits_for_replicas():
    facts = {"connected_slaves": "1", "min_slaves_good_slaves": "1"}
    seen = server(facts, {"min-replicas-to-write": "2"}, refuses="NOREPLICAS")
    found = only(of_server(seen))
    assert (found.check, found.severity) == ("replication", "problem")
    assert "it wants 2 replicas that keep up, and has 1" in found.text


@pytest.mark.parametrize(
    ("ahead_s", "within_s", "said"),
    [
        (1.9, 0.0, None),
        (-1.9, 0.0, None),
        (3.0, 1.1, None),  # perhaps it is well
        (3.0, 0.9, "3 s ahead of"),
        (-7_200.0, 0.1, "2 h behind"),
    ],
)
def test_clocks_that_differ(ahead_s, within_s, said):
    found = of_server(server(), clock=ClockSeen(ahead_s, within_s))
    assert [f.severity for f in found] == (["warning"] if said else [])
    assert all(said in f.text for f in found)


def test_what_a_server_cannot_do_is_a_note():
    bare = topic(stream(group(lag=None), added=None))
    refused = {"WAITAOF": "unknown", "CLIENT|UNBLOCK": "command"}
    diagnosis = examined(bare, server=server(takes_counts=False), refused=refused)
    assert [(f.name, f.found) for f in diagnosis.features] == [
        ("entries-added", False),
        ("ENTRIESREAD", False),
        ("CLIENT UNBLOCK", None),
        ("WAIT", True),
        ("WAITAOF", False),
    ]
    notes = [f for f in diagnosis.findings if f.check == "features"]
    assert [f.severity for f in notes] == ["note"] * 3
    assert diagnosis.ok


def test_what_could_not_be_tried_is_not_missing():
    diagnosis = examined(server=server(takes_counts=None), refused=None)
    assert {f.name: f.found for f in diagnosis.features} == dict.fromkeys(
        ("entries-added", "ENTRIESREAD", "CLIENT UNBLOCK", "WAIT", "WAITAOF")
    )
    assert [f.check for f in diagnosis.findings if f.check == "features"] == []


# --- rights


def of_rights(refused: dict[str, str] | None, *roles: str, **other: Any) -> tuple[Finding, ...]:
    return examined(*other.pop("topics", ()), refused=refused, roles=roles, **other).findings


def test_what_a_user_lacks_is_said_by_role_with_the_rule_that_grants_it():
    address = "redis://app:***@localhost:6379/0"
    refused = {"XGROUP|CREATE": "command", "XREADGROUP": "command", "HDEL": "command"}
    found = of_rights(refused, "publisher", "worker", "admin", address=address)
    grants = "redis-cli --user default --askpass ACL SETUSER app"
    assert [(f.severity, f.mend) for f in found] == [
        ("warning", f"{grants} +xreadgroup '+xgroup|create'"),
        ("note", f"{grants} +hdel '+xgroup|create'"),
    ]
    assert found[0].text == (
        "in the role worker, the user of this connection lacks XREADGROUP, XGROUP CREATE"
    )


def test_a_user_who_may_not_touch_the_keys():
    refused = dict.fromkeys(ROLES["worker"], "keys")
    found = only(tuple(f for f in of_rights(refused, "worker") if f.check == "rights"))
    assert found.severity == "warning"
    assert "lacks the keys bus:*" in found.text
    assert found.mend == "redis-cli ACL SETUSER default '~bus:*'"


def test_rights_that_are_spared_are_a_note():
    (found,) = of_rights({"CLIENT|ID": "command"}, "worker")
    assert found.severity == "note"
    (found,) = of_rights({"CLIENT|ID": "command", "XACK": "command"}, "worker")
    assert found.severity == "warning"


@pytest.mark.parametrize(("on_full", "severity"), [("block", "note"), ("drop_oldest", "warning")])
def test_what_only_dropping_needs_is_missed_where_something_is_dropped(on_full, severity):
    refused = {"XGROUP|SETID": "command", "HINCRBY": "command"}
    dropping = topic(stream(group()), on_full=on_full)
    (found,) = of_rights(refused, "publisher", topics=(dropping,))
    assert found.severity == severity


def test_a_command_that_the_server_does_not_have_is_no_matter_of_rights():
    assert of_rights({"XACK": "unknown"}, "worker") == ()


def test_rights_that_cannot_be_looked_at():
    found = {f.check: f for f in of_rights(None, "worker")}
    assert set(found) == {"rights", "hidden"}
    assert "cannot be looked at" in found["rights"].text
    assert found["rights"].mend == "redis-cli ACL SETUSER default +multi +discard"


def test_what_the_doctor_may_not_ask_is_a_note_unless_it_hides_everything():
    refused = {"SMEMBERS": "command", "INFO": "command"}
    bare = server()._replace(facts={}, config={})
    found = only(examined(server=bare, refused=refused).findings)
    assert (found.check, found.severity) == ("hidden", "note")
    assert found.text.endswith("may not use CONFIG GET, INFO, SMEMBERS")
    assert found.mend == "redis-cli ACL SETUSER default '+config|get' +info +smembers"
    found = only(examined(refused=refused, snapshot=None, barred="no HGETALL").findings)
    assert (found.severity, found.text) == ("warning", "no topic could be looked at: no HGETALL")


# --- streams


def pinned(by: GroupSnapshot, age_s: float = 3_600.0, **other: Any) -> tuple[Finding, ...]:
    return of_stream(by, **{"pinned_by": by.group, "pinned_age_s": age_s} | other)


@pytest.mark.parametrize(
    ("on_full", "said"),
    [("block", "wait"), ("reject", "are refused"), ("drop_oldest", "dropped unhandled")],
)
def test_a_stream_that_is_full(on_full, said):
    slow = group(undelivered=900, oldest_undelivered_age_s=3_600.0)
    found = only(pinned(slow, length=1_000, room=0, full_in_s=0.0, on_full=on_full))
    assert (found.check, found.severity, found.stream) == ("full", "problem", S)
    assert found.text.startswith(f"{S} is full, with 1,000 entries of 1,000, and ")
    assert said in found.text
    assert found.text.endswith("group receipts needs what came 1 h ago")
    assert found.mend == "bus topics set order --maxlen 2000"


def test_a_stream_that_is_full_for_a_moment_is_a_note():
    slow = group(undelivered=900, oldest_undelivered_age_s=59.0)
    assert only(pinned(slow, 59.0, length=1_000, room=0)).severity == "note"


@pytest.mark.parametrize(
    ("length", "full_in_s", "age_s", "found"),
    [
        (200, DAY_S - 1, 60.0, True),  # soon
        (200, DAY_S, 60.0, False),
        (200, None, 9_999.0, False),  # nothing comes
        (550, None, 60.0, True),  # half of the room
        (549, None, 60.0, False),
        (900, 1.0, 59.9, False),  # it is at work
    ],
)
def test_a_stream_that_a_group_pins(length, full_in_s, age_s, found):
    slow = group(undelivered=1, oldest_undelivered_age_s=age_s)
    findings = pinned(slow, age_s, length=length, full_in_s=full_in_s)
    assert [(f.check, f.severity) for f in findings] == [("pinned", "warning")] * found


def test_what_is_said_of_a_stream_that_is_pinned():
    slow = group(undelivered=500, oldest_undelivered_age_s=7_200.0)
    found = only(pinned(slow, 7_200.0, length=600, appends_per_s=2.5, full_in_s=160.0))
    assert found.text == (
        f"{S} takes 2.5 entries a second and has room for 400 of 1,000, full in about 3 min: group"
        " receipts needs what came 2 h ago"
    )


@pytest.mark.parametrize(
    ("by", "mend"),
    [
        ({"paused": Paused(NOW, None, "")}, "bus groups resume receipts --topic order"),
        ({"served": False, "consumers": (), "workers": 0}, "bus worker PACKAGE"),
        (
            {"served": False, "consumers": (gone(),), "workers": 0},
            "bus worker PACKAGE",
        ),
        (
            {"oldest_pending_age_s": 7_201.0, "pending": 1},
            "bus pending ls receipts --topic order",
        ),
        ({}, "bus topics set order --maxlen 2000"),
    ],
)
def test_what_frees_a_stream_is_what_its_group_lacks(by, mend):
    slow = group(**{"undelivered": 1, "oldest_undelivered_age_s": 7_200.0} | by)
    (found,) = [f for f in pinned(slow, 7_200.0, length=600, full_in_s=9.0) if f.check == "pinned"]
    assert found.mend == mend


def test_what_waits_for_its_next_attempt_pins_nothing_that_matters():
    """Workers move it aside before publishers feel it."""
    retried = group(pending=1, parked=1, oldest_pending_age_s=600.0)
    assert pinned(retried, 600.0, length=900, full_in_s=9.0) == ()
    lost = replace(retried, orphaned=1)
    assert [f.check for f in pinned(lost, 600.0, length=900, full_in_s=9.0)] == ["pinned"]


@pytest.mark.parametrize(("length", "found"), [(300, False), (301, True), (1_500, True)])
def test_a_stream_above_keep_that_nobody_needs(length, found):
    findings = of_stream(group(), length=length, room=0)
    assert [(f.check, f.severity) for f in findings] == [("oversize", "note")] * found
    assert [f.mend for f in findings] == ["bus topics trim order --keep 100"] * found


def test_topics_without_group_or_declaration_are_notes_if_they_have_entries():
    found = examined(topic(stream(), implicit=True)).findings
    assert [(f.check, f.severity) for f in found] == [("implicit", "note"), ("no-group", "note")]
    assert "has 100 entries" in found[0].text
    assert examined(topic(stream(length=0), implicit=True)).findings == ()


@pytest.mark.parametrize(
    ("retention_s", "age_s", "severity"),
    [
        (DAY_S, 0.8 * DAY_S - 1, None),
        (DAY_S, 0.8 * DAY_S, "warning"),
        (DAY_S, DAY_S + 60, "warning"),  # it is about to go
        (DAY_S, DAY_S + 61, "problem"),
        (10.0, 59.0, None),  # so short a time passes before anybody looks
        (10.0, 71.0, "problem"),
        (None, 99 * DAY_S, None),
    ],
)
def test_what_a_group_needs_longer_than_the_retention(retention_s, age_s, severity):
    slow = group(undelivered=1, oldest_undelivered_age_s=age_s)
    found = examined(topic(stream(slow), retention_s=retention_s)).findings
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert all(f.mend == "bus groups lag receipts --topic order" for f in found)


def test_an_entry_that_is_not_finished_counts_for_the_retention_too():
    slow = group(pending=1, oldest_pending_age_s=2 * DAY_S)
    found = only(examined(topic(stream(slow), retention_s=DAY_S)).findings)
    assert found.text == (
        f"an entry of {S} is 2 d old, of 1 d of retention, and is kept beyond that: group receipts"
        " needs it"
    )
    assert found.mend == "bus pending ls receipts --topic order"


def test_what_is_too_old_and_needed_by_nobody_ought_to_be_trimmed():
    old = stream(group(), oldest_age_s=DAY_S + 301)
    found = only(examined(topic(old, retention_s=DAY_S)).findings)
    assert (found.check, found.severity) == ("retention", "warning")
    assert found.mend == "bus topics trim order --before @-86400s"
    for well in (
        replace(old, oldest_age_s=DAY_S + 300),  # the next chore takes it
        replace(old, pinned_by="receipts", pinned_age_s=DAY_S + 1),
    ):
        findings = examined(topic(well, retention_s=DAY_S)).findings
        assert [f for f in findings if "begins" in f.text] == []


NOW_MS = int(NOW.timestamp() * 1000)


@pytest.mark.parametrize(
    ("last_id", "severity", "said"),
    [
        (f"{NOW_MS + 59_000}-0", None, ""),
        (f"{NOW_MS + 61_000}-5", "warning", "lies 1 min in the future"),
        ("18446744073709551615-0", "warning", "in the future"),
        ("18446744073709551615-18446744073709551615", "problem", "nothing can be published"),
        (None, None, ""),
    ],
)
def test_ids_of_the_future(last_id, severity, said):
    found = of_stream(group(), generated_id=last_id)
    assert [f.severity for f in found] == ([severity] if severity else [])
    for each in found:
        assert (each.check, each.stream) == ("ids", S)
        assert said in each.text
        assert each.mend == "redis-cli XREVRANGE 'bus:{order:0}' + - COUNT 10"


def test_what_holds_for_many_streams_is_said_once():
    slow = unserved(undelivered=1, oldest_undelivered_age_s=3_600.0)
    pins = {"pinned_by": "receipts", "pinned_age_s": 3_600.0, "length": 900}
    parts = [stream(slow, stream=f"bus:{{order:{n}}}", partition=n, **pins) for n in range(64)]
    found = [f for f in examined(topic(*parts)).findings if f.check == "pinned"]
    assert [f.stream for f in found] == ["bus:{order:0}"]
    assert found[0].text.endswith("; so it is with 63 more streams of the topic")
    found = [f for f in examined(topic(*parts[:3])).findings if f.check == "pinned"]
    assert len(found) == 3
    paused_too = replace(slow, group="audit", paused=pause(None))
    parts[9] = stream(slow, paused_too, **pins | {"pinned_by": "audit"})
    found = [f for f in examined(topic(*parts)).findings if f.check == "pinned"]
    assert [f.group for f in found] == ["audit", "receipts"]


# --- what cannot be read


def test_records_and_keys_that_are_broken():
    wrong = {"order": "bus:topics holds something else", "a b": "no name"}
    kinds = {S: ("string", "stream"), "bus:topics": ("list", "hash")}
    found = examined(wrong_records=wrong, wrong_types=kinds, snapshot=None).findings
    assert [(f.check, f.severity, f.topic) for f in found] == [
        ("types", "problem", None),
        ("records", "problem", "a b"),
        ("records", "problem", "order"),
        ("types", "problem", "order"),
    ]
    assert found[1].mend == "redis-cli HDEL bus:topics 'a b'"
    assert found[3].mend == "redis-cli RENAMENX 'bus:{order:0}' 'aside:bus:{order:0}'"
    assert found[3].text.startswith("bus:{order:0} is a string and should be a stream")


def test_a_stream_that_could_not_be_looked_at_whole_is_told_of_once():
    broken = topic(stream(group(), error="the user lacks a right"))
    found = only(examined(broken).findings)
    assert (found.check, found.severity, found.stream) == ("hidden", "warning", S)
    told = examined(broken, wrong_types={f"{S}:workers": ("hash", "set")}).findings
    assert [f.check for f in told] == ["types"]


# --- groups


def test_a_group_that_nobody_serves():
    waiting = unserved(undelivered=5, pending=2, at_least=True, oldest_undelivered_age_s=7_200.0)
    found = only(of_group(waiting))
    assert (found.check, found.severity, found.topic, found.group) == (
        "unserved",
        "problem",
        "order",
        "receipts",
    )
    assert "which has more than 7 entries waiting, the oldest for 2 h" in found.text
    assert found.mend == "bus worker PACKAGE", "its workers may just be being deployed"
    for_long = unserved(undelivered=5, oldest_undelivered_age_s=7.0 * DAY_S)
    assert only(of_group(for_long)).mend == "bus groups rm receipts --topic order"


@pytest.mark.parametrize(
    ("consumers", "severity", "mend"),
    [
        ((), "warning", "bus worker PACKAGE"),
        ((gone(idle_s=7 * DAY_S - 1),), "warning", "bus worker PACKAGE"),
        ((gone(idle_s=7 * DAY_S),), "warning", "bus groups rm receipts --topic order"),
        ((gone(leased=False),), "note", "bus worker PACKAGE"),  # before 7.2 it may well be there
    ],
)
def test_a_group_that_nobody_serves_and_that_has_nothing_to_do(consumers, severity, mend):
    (found, *_) = of_group(unserved(consumers=consumers))
    assert (found.check, found.severity, found.mend) == ("unserved", severity, mend)


def test_a_group_that_is_served_on_one_stream_only_is_not_served():
    waits = stream(unserved(undelivered=1), stream="bus:{order:1}", partition=1)
    assert [f.check for f in examined(topic(stream(group()), waits)).findings] == ["unserved"]


def pause(hours: float | None, why: str = "") -> Paused:
    until = None if hours is None else NOW + timedelta(hours=hours)
    return Paused(NOW - timedelta(hours=1), until, why)


@pytest.mark.parametrize(
    ("hours", "per_s", "severity", "said"),
    [
        (None, 0.0, "warning", "without an end: nothing is published there now"),
        (1, 0.0, "note", "until 2026-11-20 10:00:00Z: nothing is published there now"),
        (2.5, 0.1, "note", "publishers feel it in about 3 h"),
        (3, 0.1, "warning", "publishers feel it in about 3 h"),
    ],
)
def test_a_group_that_is_paused(hours, per_s, severity, said):
    """1,000 entries fit, 10 are needed: 990 more are 2 h 45 min at one in ten seconds."""
    held = group(paused=pause(hours), undelivered=10)
    found = only(of_group(held, appends_per_s=per_s))
    assert (found.check, found.severity) == ("paused", severity)
    assert said in found.text
    assert "is paused since 2026-11-20 08:00:00Z" in found.text
    assert found.mend == "bus groups resume receipts --topic order"


def test_why_a_group_is_paused_is_said():
    found = only(of_group(group(paused=pause(1, "the mail\x1b server moves"))))
    assert "(the mail\\x1b server moves)" in found.text


def test_a_lag_that_the_server_does_not_know():
    found = only(of_group(group(lag=None)))
    assert (found.check, found.severity, found.stream) == ("lag", "warning", S)
    assert "KEDA" in found.text
    assert found.mend == "bus groups seek receipts --recount --topic order"
    uncounted = of_group(group(lag=None), added=None)  # it counts nothing at all
    assert [f.check for f in uncounted] == ["features"]
    assert of_group(group(lag=None), length=0) == ()


def test_a_lag_that_is_too_high():
    found = only(examined(topic(stream(group(lag=15))), lags={(S, "receipts"): (15, 10)}).findings)
    assert (found.check, found.severity, found.stream) == ("lag", "warning", S)
    assert "lags by 15 entries, and there are 10" in found.text
    assert found.mend == "bus groups seek receipts --recount --topic order"


def letter(reason: str, error: str) -> Any:
    fields = [b"id", b"e", b"type", b"order.made", b"data", b"{}", b"deadreason", reason.encode()]
    fields += [b"deaderror", error.encode()]
    return letter_of("receipts", S, (b"1763629200000-0", fields))


@pytest.mark.parametrize(
    ("age_s", "severity"), [(DAY_S - 1, "warning"), (DAY_S, "note"), (None, "note")]
)
def test_dead_letters_of_a_day_are_news(age_s, severity):
    found = only(of_group(group(dead=3, newest_dead_age_s=age_s)))
    assert (found.check, found.severity) == ("dead", severity)
    assert "has 3 dead letters" in found.text
    assert found.mend == "bus dead ls receipts --topic order"


def test_what_most_of_the_youngest_died_of():
    letters = [letter("failed", "Timeout: x")] * 2 + [letter("rejected", "Refused: y")]
    seen = {("order", "receipts"): letters, ("other", "receipts"): [letter("crashed", "")] * 9}
    dead = topic(stream(group(dead=12, newest_dead_age_s=60.0)))
    found = only(examined(dead, letters=seen).findings)
    assert found.text == (
        "group receipts of topic order has 12 dead letters, the youngest 1 min old; 2 of the"
        " youngest 3 died of: failed, Timeout"
    )


def test_what_was_applied_half_way_is_a_warning_for_ever():
    dead = topic(stream(group(dead=2, newest_dead_age_s=9 * DAY_S)))
    letters = [letter("failed", "E"), letter("effects-failed", "EffectsFailed: x")]
    found = only(examined(dead, letters={("order", "receipts"): letters}).findings)
    assert (found.severity, found.mend) == ("warning", "bus dead ls receipts --topic order")


def test_an_inbox_that_no_worker_reads():
    found = [f for f in of_group(unserved(inbox=3, inbox_pending=1)) if f.check == "inbox"]
    assert [(f.severity, f.mend) for f in found] == [("warning", "bus worker PACKAGE")]
    assert found[0].text.startswith("2 entries in the inbox of group receipts")
    foreign = group(inbox=1, consumers=(consumer(leased=False),))
    assert only(of_group(foreign)).check == "inbox"  # it is served, by one who knows no inbox
    both = replace(foreign, workers=2)
    assert of_group(both) == ()
    assert of_group(group(inbox=3, inbox_pending=3)) == ()
    assert of_group(group(inbox=3)) == ()  # its worker takes them


@pytest.mark.parametrize(("inbox", "found"), [(719, False), (720, True)])
def test_an_inbox_near_its_bound(inbox, found):
    findings = of_group(group(inbox=inbox))
    assert [f.severity for f in findings] == ["warning"] * found
    for each in findings:
        assert "has 720 entries of 900" in each.text
        assert (each.stream, each.mend) == (S, "bus topics set order --maxlen 2000")


def test_entries_that_are_never_due():
    year = 366 * DAY_S
    lanes = (LaneSnapshot(0.0, 1), LaneSnapshot(year, 2), LaneSnapshot(9e11, 3))
    found = only(of_group(group(lanes=lanes)))
    assert (found.check, found.severity) == ("stuck", "problem")
    assert found.text.startswith("the effects of 3 entries of group receipts")
    assert found.mend == "bus pending ls receipts --topic order"


# --- consumers


def test_a_worker_that_is_gone_with_entries_that_nobody_took():
    left = gone("host-1", idle_s=3_600.0, pending=4)
    found = only(of_group(group(consumers=(consumer(), left), orphaned=4, pending=4)))
    assert (found.check, found.severity, found.consumer) == ("consumers", "warning", "host-1")
    assert "is gone for 1 h and has 4 entries that nobody took over" in found.text
    assert found.mend == "bus consumers rm host-1 --group receipts --topic order"
    just_now = replace(left, idle_s=119.0)
    assert of_group(group(consumers=(consumer(), just_now))) == ()
    alone = of_group(unserved(consumers=(just_now,), orphaned=4, pending=4))
    assert [f.check for f in alone] == ["unserved", "consumers"]  # nobody will take over
    held = of_group(group(consumers=(consumer(), just_now), paused=pause(1)))
    assert [f.check for f in held] == ["paused", "consumers"]


def test_names_that_workers_left_behind_are_one_note():
    left = tuple(gone(f"host-{n}") for n in range(30))
    found = only(of_group(group(consumers=(consumer(), *left))))
    assert (found.check, found.severity, found.consumer) == ("consumers", "note", "host-0")
    assert found.text.startswith("30 workers of group receipts")


def test_consumers_of_other_languages():
    idle = gone("go-1", idle_s=300.0, pending=2, leased=False)
    found = only(of_group(group(consumers=(consumer(), idle))))
    assert (found.check, found.severity, found.consumer) == ("foreign", "warning", "go-1")
    assert found.mend == "bus consumers rm go-1 --group receipts --topic order"
    for well in (replace(idle, idle_s=299.0), replace(idle, pending=0), replace(idle, alive=True)):
        assert of_group(group(consumers=(consumer(), well))) == ()


def test_a_thousand_consumers_are_not_a_thousand_findings():
    left = [gone(f"w-{n}", pending=1) for n in range(1_000)]
    left += [gone(f"go-{n}", pending=1, leased=False) for n in range(1_000)]
    found = of_group(group(consumers=tuple(left)))
    assert len(found) == 10
    assert [f.consumer for f in found if "995 more such" in f.text] == ["w-4", "go-4"]


def test_names_that_look_like_options_are_none():
    assert bus("groups rm", "-x", topic="order") == "bus groups rm --topic order -- -x"
    line = bus("consumers rm", "w", group="-x", topic="order")
    assert line == "bus consumers rm w --group=-x --topic order"


def test_names_that_others_gave_do_not_reach_the_terminal():
    evil = "\x1b[2J'; rm -rf /"
    odd = unserved(group=evil, undelivered=1, inbox=1, dead=1, consumers=(gone(evil, pending=1),))
    for found in of_group(odd):
        assert "\x1b" not in found.text + found.mend
        if evil[4:] in found.mend:
            assert "\\x1b[2J'; rm -rf /" in shlex.split(found.mend)
