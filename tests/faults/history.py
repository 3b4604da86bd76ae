"""Decides from a history whether every effect took place exactly once. Pure: no server, no process.

A history is what publishers and workers wrote down outside Redis, line by line, and what the server
says when nothing is left to do. A worker that died wrote what it did until then, so the lines bound
what may have happened, and the server's state must lie within. Each invariant is one function that
yields what it finds wrong, in words.

    spend, spend.ok, spend.unknown, spend.refused       n: an event was to be published; what came
    change, change.ok, change.unknown, change.refused   n: so was a transaction of state and event
    start, end                                          n, attempt: a handler of `Spent` was called;
                                                        it returned, with all effects collected
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

# What must become of an event of a kind; of every other kind it is handled.
DEATHS = {"rejected": "rejected", "doomed": "failed", "broken": "effects-failed"}


class Step(NamedTuple):
    """One line."""

    name: str
    n: int
    attempt: int
    pid: int


class Spent(NamedTuple):
    """An entry of the stream that the effects are of."""

    event_id: str
    n: int
    purse: str
    amount: int
    kind: str = "plain"


class Told(NamedTuple):
    """An event that an effect published: of which n, and which event caused it."""

    event_id: str
    n: int
    cause: str
    purse: str = ""


class Dead(NamedTuple):
    """A dead letter, and the commands that took place all the same."""

    n: int
    reason: str
    applied: str = ""


@dataclass(frozen=True)
class Server:
    """What the server says at the end.

    applied, slips_applied, changes_applied: n -> how often an effect of that event took place.
    marks: n:pid:attempt of every attempt whose effects took place. left: of groups, what is pending
    or was never delivered.
    """

    opening: Mapping[str, int] = field(default_factory=dict)
    balances: Mapping[str, int] = field(default_factory=dict)
    spent: tuple[Spent, ...] = ()
    slips: tuple[Told, ...] = ()
    crossings: tuple[Told, ...] = ()
    changes: tuple[Told, ...] = ()
    dead: tuple[Dead, ...] = ()
    applied: Mapping[int, int] = field(default_factory=dict)
    marks: frozenset[tuple[int, int, int]] = frozenset()
    slips_applied: Mapping[int, int] = field(default_factory=dict)
    changes_applied: Mapping[int, int] = field(default_factory=dict)
    changed: int = 0
    change_marks: frozenset[int] = frozenset()
    left: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    steps: tuple[Step, ...]
    server: Server

    def ns(self, name: str) -> set[int]:
        """Every n of the lines of one name."""
        return {s.n for s in self.steps if s.name == name}

    def handled(self) -> list[Spent]:
        """The events all of whose effects must have taken place."""
        dead = {d.n for d in self.server.dead}
        return [s for s in self.server.spent if s.n not in dead]


def read(path: Path) -> tuple[Step, ...]:
    """Return the lines of a journal; the last may be half written."""
    rows = [line.split() for line in path.read_text().split("\n")[:-1]]
    return tuple(Step(name, int(n), int(attempt), int(pid)) for name, n, attempt, pid in rows)


# --- the invariants


def nothing_published_is_lost(history: History) -> Iterator[str]:
    there = Counter(s.n for s in history.server.spent)
    for n in sorted(history.ns("spend.ok")):
        if there[n] != 1:
            yield f"event {n} was published, and the stream has it {there[n]} times"
    for n in sorted(history.ns("spend.unknown")):
        if there[n] > 1:
            yield f"event {n} is in the stream {there[n]} times"


def nothing_comes_of_nothing(history: History) -> Iterator[str]:
    there = {s.n for s in history.server.spent}
    for n in sorted(there - history.ns("spend")):
        yield f"nobody published event {n}, and it is in the stream"
    for n in sorted(there & history.ns("spend.refused")):
        yield f"event {n} was refused, and it is in the stream"
    for n in sorted(set(history.server.applied) - there):
        yield f"an effect of event {n} took place, which is not in the stream"


def each_event_takes_effect_once(history: History) -> Iterator[str]:
    """Dead ones not at all, but for what came before the command that failed."""
    reasons = {d.n: d.reason for d in history.server.dead}
    for n in sorted({s.n for s in history.server.spent}):
        reason = reasons.get(n, "")
        wanted = 1 if reason in ("", "effects-failed") else 0
        found = history.server.applied.get(n, 0)
        if found != wanted:
            why = f", dead of {reason}," if reason else ""
            yield f"the effect of event {n}{why} took place {found} times instead of {wanted}"


def one_attempt_takes_effect(history: History) -> Iterator[str]:
    """And it is one whose handler returned: no zombie beside its heir, nothing half collected."""
    ends = {(s.n, s.pid, s.attempt) for s in history.steps if s.name == "end"}
    attempts: dict[int, list[str]] = {}
    for n, pid, attempt in sorted(history.server.marks):
        attempts.setdefault(n, []).append(f"attempt {attempt} of process {pid}")
        if (n, pid, attempt) not in ends:
            yield f"effects of event {n} took place, but attempt {attempt} of {pid} never returned"
    for n, those in attempts.items():
        if len(those) > 1:
            yield f"several attempts at event {n} took effect: {', '.join(those)}"
    reasons = {d.n: d.reason for d in history.server.dead}
    for n in sorted({s.n for s in history.server.spent} - set(attempts)):
        if reasons.get(n, "effects-failed") == "effects-failed":
            yield f"no attempt at event {n} took effect"


def only_what_must_is_dead(history: History) -> Iterator[str]:
    kinds = {s.n: s.kind for s in history.server.spent}
    letters: dict[int, list[Dead]] = {}
    for letter in history.server.dead:
        letters.setdefault(letter.n, []).append(letter)
    for n, kind in sorted(kinds.items()):
        found = [d.reason for d in letters.get(n, [])]
        wanted = [DEATHS[kind]] if kind in DEATHS else []
        if found != wanted:
            yield f"event {n} ({kind}) has dead letters {found} instead of {wanted}"
    for letter in history.server.dead:
        names = letter.applied.split("\n") if letter.applied else []
        wanted = ["HINCRBY applied", "SADD marks"] if letter.reason == "effects-failed" else []
        if names != wanted:
            yield f"the dead letter of event {letter.n} says {names} was applied, not {wanted}"


def _due(history: History) -> dict[str, int]:
    """Return purse -> what must be left in it."""
    due = dict(history.server.opening)
    for spent in history.handled():
        due[spent.purse] -= spent.amount
    return due


def sums_are_exact(history: History) -> Iterator[str]:
    for purse, due in _due(history).items():
        found = history.server.balances.get(purse)
        if found != due:
            yield f"purse {purse} holds {found} tokens instead of {due}"


def crossings_are_told_once(history: History) -> Iterator[str]:
    told = Counter(c.purse for c in history.server.crossings)
    for purse, due in _due(history).items():
        wanted = 1 if due < 0 <= history.server.opening[purse] else 0
        if told[purse] != wanted:
            yield f"the crossing of purse {purse} was told {told[purse]} times instead of {wanted}"


def each_event_has_one_follow_up(history: History) -> Iterator[str]:
    slips: dict[int, list[Told]] = {}
    for slip in history.server.slips:
        slips.setdefault(slip.n, []).append(slip)
    handled = {s.n: s.event_id for s in history.handled()}
    for n, event_id in sorted(handled.items()):
        found = slips.pop(n, [])
        if len(found) != 1:
            yield f"event {n} has {len(found)} follow-ups instead of 1"
        for slip in found:
            if slip.cause != event_id:
                yield f"the follow-up of event {n} ({event_id}) says {slip.cause} caused it"
    for n in sorted(slips):
        yield f"event {n} was not handled, and has {len(slips[n])} follow-ups"
    ids = Counter(t.event_id for t in (*history.server.slips, *history.server.crossings))
    for event_id in sorted(i for i, times in ids.items() if times > 1):
        yield f"{ids[event_id]} published events have the id {event_id}"


def follow_ups_take_effect_once(history: History) -> Iterator[str]:
    server = history.server
    for what, told, applied in (
        ("follow-up", server.slips, server.slips_applied),
        ("change", server.changes, server.changes_applied),
    ):
        ns = {t.n for t in told}
        for n in sorted(ns | set(applied)):
            wanted = 1 if n in ns else 0
            if applied.get(n, 0) != wanted:
                times = applied.get(n, 0)
                yield f"the effect of {what} {n} took place {times} times instead of {wanted}"


def transactions_take_place_once(history: History) -> Iterator[str]:
    """State and event are one: there is the same number of each, and none of what was refused."""
    server = history.server
    events = Counter(c.n for c in server.changes)
    if not server.changed == len(server.changes) == len(server.change_marks):
        yield (
            f"the state says {server.changed} changes, of {len(server.change_marks)} transactions,"
            f" and the stream has {len(server.changes)} events"
        )
    for n in sorted(history.ns("change.ok")):
        if events[n] != 1:
            yield f"transaction {n} was committed, and its event is there {events[n]} times"
    for n in sorted(history.ns("change") - history.ns("change.ok")):
        if events[n] > 1:
            yield f"the event of transaction {n} is there {events[n]} times"
    for n in sorted((set(events) | server.change_marks) - history.ns("change")):
        yield f"nobody began transaction {n}, and it took place"
    for n in sorted((set(events) | server.change_marks) & history.ns("change.refused")):
        yield f"transaction {n} was refused, and it took place"
    for n in sorted(set(events) ^ server.change_marks):
        yield f"transaction {n} took place by halves"


def nothing_is_left(history: History) -> Iterator[str]:
    for group, count in sorted(history.server.left.items()):
        if count:
            yield f"{group} still has {count} to do"


INVARIANTS: tuple[Callable[[History], Iterator[str]], ...] = (
    nothing_published_is_lost,
    nothing_comes_of_nothing,
    each_event_takes_effect_once,
    one_attempt_takes_effect,
    only_what_must_is_dead,
    sums_are_exact,
    crossings_are_told_once,
    each_event_has_one_follow_up,
    follow_ups_take_effect_once,
    transactions_take_place_once,
    nothing_is_left,
)


def violations(history: History) -> dict[str, list[str]]:
    """Return invariant -> what is wrong, of those that do not hold."""
    found = {rule.__name__: list(rule(history)) for rule in INVARIANTS}
    return {name: wrongs for name, wrongs in found.items() if wrongs}


def told(found: Mapping[str, list[str]]) -> str:
    """Return violations as text."""
    return "\n".join(f"{name}: {wrong}" for name, wrongs in found.items() for wrong in wrongs)
