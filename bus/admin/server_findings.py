"""What is wrong with a server: how it keeps data, its memory, replicas, clock, and rights on it.

Pure functions over what `streams/checkup.py` and `streams/rights.py` saw. What could not be asked
is no finding of its own: `hidden` says that it could not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bus.admin.finding import Finding, Severity, address_of, redis_cli
from bus.config import CROWDED_SHARE
from bus.history.backlog import duration
from bus.history.snapshot import Snapshot
from bus.streams.checkup import ClockSeen, ServerSeen
from bus.streams.rights import ROLES, Refusal

SKEW_S = 2.0  # clocks that are kept in time differ by less; a look for `@-2h` is off by as much
MORE_MEMORY = 1.5  # times what there is: leaves time to find out why it was not enough
# Roles do without these; see the end of docs/wire.md.
SPARE = frozenset(["CLIENT|ID", "CLIENT|UNBLOCK", "INFO"])
DROPPING = frozenset(["XGROUP|SETID", "HINCRBY"])  # publishers need them for on_full="drop_oldest"


@dataclass(frozen=True, slots=True)
class Feature:
    """What a server may have or not, found out by trying. found: None if it could not be tried.

    without: what it means when it is missing.
    """

    name: str
    found: bool | None
    without: str


def features_of(
    server: ServerSeen, refused: Mapping[str, Refusal] | None, snapshot: Snapshot | None
) -> tuple[Feature, ...]:
    """Return what the server can do that matters here."""

    def takes(word: str) -> bool | None:
        why = "command" if refused is None else refused.get(word)
        return {None: True, "unknown": False}.get(why)

    streams = [s for t in snapshot.topics for s in t.streams] if snapshot is not None else []
    counts = [s.added is not None for s in streams if s.generated_id is not None]
    return (
        Feature(
            "entries-added",
            any(counts) if counts else None,
            "it does not count what groups have read, so long backlogs are shown as 'more than',"
            " and monitors that go by its lag see none",
        ),
        Feature(
            "ENTRIESREAD",
            server.takes_counts,
            "it takes no count for a group that is made or moved, so it knows no lag of such a"
            " group until that has read to the end",
        ),
        Feature(
            "CLIENT UNBLOCK",
            takes("CLIENT|UNBLOCK"),
            "it ends no read early, so workers and tails take up to 2 s longer to stop",
        ),
        Feature("WAIT", takes("WAIT"), "nobody can wait until its replicas have an event"),
        Feature("WAITAOF", takes("WAITAOF"), "nobody can wait until it has an event on disk"),
    )


def features(found: Sequence[Feature]) -> Iterator[Finding]:
    """Tell what is missing."""
    for feature in found:
        if feature.found is False:
            text = f"the server has no {feature.name}: {feature.without}"
            yield Finding("features", "note", text)


# --- whether it can be used at all


def connection(address: str, server: ServerSeen) -> Finding | None:
    """Return why the server is of no use now; None if it is."""
    facts = server.facts
    if server.trouble in ("NOAUTH", "WRONGPASS"):
        return locked(address, f"{address} asks for a password")
    if server.trouble == "LOADING" or facts.get("loading") == "1":
        left = facts.get("loading_eta_seconds", "")
        text = f"the server at {address} is still loading its data"
        text += f", for about {duration(int(left))} more" if left.isdigit() else ""
        return _useless(text, redis_cli(address, "INFO", "persistence"))
    if server.refuses == "READONLY" or facts.get("role") in ("slave", "replica"):
        host, port = facts.get("master_host"), facts.get("master_port")
        of, mend = "", redis_cli(address, "ROLE")
        if host and port:
            of, mend = f" of {host}:{port}", redis_cli(f"redis://{host}:{port}/0", "ROLE")
        text = f"the server at {address} is a replica{of}, and takes no events"
        return _useless(f"{text}: let the URL name the primary", mend)
    if server.trouble == "BUSY":
        text = f"the server at {address} runs somebody's script, and answers nobody meanwhile"
        return _useless(text, redis_cli(address, "SCRIPT", "KILL"))
    return None


def away(address: str, why: str) -> Finding:
    """Return the finding for a server that cannot be reached; `why` as the error says it."""
    return _useless(why, redis_cli(address, "PING"))


def locked(address: str, why: str) -> Finding:
    """Return the finding for a server that wants another password, or any."""
    mend = redis_cli(address, "PING", user=address_of(address).username or "default")
    return _useless(f"{why}; what works here belongs into the URL", mend)


def _useless(text: str, mend: str) -> Finding:
    return Finding("connection", "problem", text, mend)


def hidden(
    address: str, server: ServerSeen, refused: Mapping[str, Refusal] | None, barred: str
) -> Iterator[Finding]:
    """Tell what the user may not ask, so that it was not looked at. barred: why no topic was."""
    missing = {w for w in ROLES["doctor"] if w in (refused or ())}
    if not server.facts:
        missing.add("INFO")
    if not server.config:
        missing.add("CONFIG|GET")
    if refused is None:
        missing.add("MULTI")
        yield Finding(
            "rights",
            "note",
            "the rights of the user cannot be looked at, since he may not run MULTI",
            _granting(address, ["MULTI", "DISCARD"]),
        )
    if barred:
        mend = _granting(address, sorted(missing or ROLES["doctor"]))
        yield Finding("hidden", "warning", f"no topic could be looked at: {barred}", mend)
    elif missing:
        yield Finding(
            "hidden",
            "note",
            "not everything could be looked at: the user of this connection may not use"
            f" {_named(sorted(missing))}",
            _granting(address, sorted(missing)),
        )


# --- rights


def rights(
    address: str,
    refused: Mapping[str, Refusal],
    roles: Sequence[str],
    snapshot: Snapshot | None,
) -> Iterator[Finding]:
    """Tell, by role, what the user of this connection lacks for it."""
    topics = snapshot.topics if snapshot is not None else ()
    dropping = any(t.on_full == "drop_oldest" for t in topics)
    everywhere = ROLES["every connection"]
    for role in roles:
        words = [w for w in dict.fromkeys((*everywhere, *ROLES[role])) if w in refused]
        lacking = [w for w in words if refused[w] == "command"]
        blind = any(refused[w] == "keys" for w in words)
        if not lacking and not blind:
            continue
        spare = SPARE if dropping or role not in ("publisher", "worker") else SPARE | DROPPING
        spared = not blind and spare.issuperset(lacking)
        yield Finding(
            "rights",
            "note" if spared or role == "admin" else "warning",
            f"in the role {role}, the user of this connection lacks"
            f" {_named(lacking, ['the keys bus:*'] if blind else [])}",
            _granting(address, lacking, keys=blind),
        )


def _named(words: Sequence[str], more: Sequence[str] = ()) -> str:
    return ", ".join([*(w.replace("|", " ") for w in words), *more])


def _granting(address: str, words: Sequence[str], *, keys: bool = False) -> str:
    """Return the command that grants what is lacking; another user has to give it."""
    user = address_of(address).username
    rules = [f"+{w.lower()}" for w in words] + (["~bus:*"] if keys else [])
    admin = "default" if user not in (None, "default") else ""
    return redis_cli(address, "ACL", "SETUSER", user or "default", *rules, user=admin)


# --- how it keeps data


def persistence(address: str, server: ServerSeen) -> Iterator[Finding]:
    """Judge what survives the end of the server."""
    facts, config = server.facts, server.config
    if "aof_enabled" not in facts:
        return
    if facts["aof_enabled"] == "0":
        saved = facts.get("rdb_last_bgsave_time_sec", "-1") != "-1"
        saves = bool(config["save"]) if "save" in config else saved
        loss = (
            "all events since its last snapshot are lost"
            if saves
            else "all events are lost, unless it saves as it stops"
        )
        yield Finding(
            "persistence",
            "warning" if saves else "problem",
            f"the server writes no append-only file: when it ends, {loss}",
            redis_cli(address, "CONFIG", "SET", "appendonly", "yes"),
        )
    elif config.get("appendfsync") == "no":
        yield Finding(
            "persistence",
            "warning",
            "the append-only file reaches the disk when the kernel likes: up to 30 s of events are"
            " lost when the machine fails (appendfsync is no)",
            redis_cli(address, "CONFIG", "SET", "appendfsync", "everysec"),
        )
    yield from _failed_writes(address, server)


def _failed_writes(address: str, server: ServerSeen) -> Iterator[Finding]:
    facts = server.facts
    if facts.get("aof_last_write_status", "ok") != "ok":
        yield Finding(
            "persistence",
            "problem",
            "the server cannot write its append-only file and takes no events until it can: is its"
            " disk full?",
            redis_cli(address, "CONFIG", "GET", "dir"),
        )
    if facts.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield Finding(
            "persistence",
            "warning",
            "the server could not rewrite its append-only file, which grows until it can: is its"
            " disk full?",
            redis_cli(address, "BGREWRITEAOF"),
        )
    if facts.get("rdb_last_bgsave_status", "ok") != "ok":
        stops = server.config.get("stop-writes-on-bgsave-error", "yes") == "yes"
        stops = stops and bool(server.config.get("save", "unknown"))
        meanwhile = "takes no events until it can" if stops else "goes on without"
        yield Finding(
            "persistence",
            "problem" if stops else "warning",
            f"the server could not save its last snapshot and {meanwhile}: is its disk full?",
            redis_cli(address, "BGSAVE"),
        )


# --- its memory


def memory(address: str, server: ServerSeen) -> Iterator[Finding]:
    """Judge whether keys are, or may be, deleted for want of memory, and how near that is."""
    facts = server.facts
    policy = facts.get("maxmemory_policy", "noeviction")
    never = redis_cli(address, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    grave: Severity = "problem" if policy.startswith("allkeys-") else "warning"
    if policy != "noeviction":
        what = "streams" if grave == "problem" else "leases, memories of publishers and marks"
        yield Finding(
            "eviction",
            grave,
            f"the server may delete {what} when its memory is full: maxmemory-policy is {policy}",
            never,
        )
    evicted = int(facts.get("evicted_keys", 0))
    if evicted:
        yield Finding(
            "eviction",
            grave,
            f"the server has deleted {evicted:,} keys for want of memory since its start, or since"
            " CONFIG RESETSTAT",
            redis_cli(address, "CONFIG", "RESETSTAT") if policy == "noeviction" else never,
        )
    used, most = int(facts.get("used_memory", 0)), int(facts.get("maxmemory", 0))
    if most and (used >= CROWDED_SHARE * most or server.refuses == "OOM"):
        full = used >= most or server.refuses == "OOM"
        felt = "takes no events" if full else "takes no events beyond that, and replays wait now"
        yield Finding(
            "memory",
            "problem" if full else "warning",
            f"the server uses {used / 1e6:,.0f} of {most / 1e6:,.0f} MB (maxmemory), and {felt}",
            redis_cli(address, "CONFIG", "SET", "maxmemory", str(int(most * MORE_MEMORY))),
        )


# --- the rest


def replication(address: str, server: ServerSeen) -> Iterator[Finding]:
    """Judge whether a primary has the replicas it needs, and whether it needs any."""
    replicas = int(server.facts.get("connected_slaves", 0))
    if server.refuses == "NOREPLICAS":
        wanted = server.config.get("min-replicas-to-write", "some")
        good = server.facts.get("min_slaves_good_slaves", "fewer")
        yield Finding(
            "replication",
            "problem",
            f"the server takes no events: it wants {wanted} replicas that keep up, and has {good}"
            " (min-replicas-to-write)",
            redis_cli(address, "CONFIG", "SET", "min-replicas-to-write", "0"),
        )
    elif replicas and "min_slaves_good_slaves" not in server.facts:
        has = "1 replica" if replicas == 1 else f"{replicas} replicas"
        yield Finding(
            "replication",
            "note",
            f"the server has {has} and takes events without any (min-replicas-to-write is 0): what"
            " it took alone is lost in a failover",
            redis_cli(address, "CONFIG", "SET", "min-replicas-to-write", "1"),
        )


def clock(address: str, seen: ClockSeen | None) -> Iterator[Finding]:
    """Judge the difference of two clocks, as far as it is certain."""
    if seen is None or abs(seen.ahead_s) - seen.within_s < SKEW_S:
        return
    which = "ahead of" if seen.ahead_s > 0 else "behind"
    yield Finding(
        "clock",
        "warning",
        f"the server's clock is {duration(abs(seen.ahead_s))} {which} this machine's: looks for"
        " a time such as @-2h are off by as much until both are kept in time",
        redis_cli(address, "TIME"),
    )
