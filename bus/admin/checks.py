"""Comparing numbers with limits, for monitors: pure, over a snapshot.

check     compared                                                 warning   critical
lag       undelivered entries, or the age of the oldest of them    60 s      300 s
pending   entries given out and not finished, or the age of the    300 s     3,600 s
          oldest of them (since it was published)
dead      dead letters, or the age of the oldest                   1         none
workers   those that live and serve the group: fewer are worse     none      1

A number that is as large as a limit has reached it; of workers, only a smaller one. A limit is one
of entries or one of age, and of both kinds each is compared with its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

from bus.admin.finding import counted, printable
from bus.errors import DeclarationError
from bus.history.backlog import duration
from bus.history.lengths import length_s
from bus.history.snapshot import GroupSnapshot, Snapshot, TopicSnapshot

CheckName = Literal["lag", "pending", "dead", "workers"]
Unit = Literal["entries", "workers", "s"]
NAMED = 3  # groups that a text names before it only counts them
_NUMBER = re.compile(r"\d{1,15}(\.\d+)?")


class Status(IntEnum):
    """As monitors number it."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


# What is certainly wrong comes before what nobody knows, and that before what is well.
_WORSE = (Status.OK, Status.UNKNOWN, Status.WARNING, Status.CRITICAL)


@dataclass(frozen=True, slots=True)
class Limit:
    """What a number is compared with: entries, workers, or an age in seconds."""

    value: float
    unit: Unit

    @classmethod
    def of(cls, text: "str | Limit", check: CheckName) -> "Limit":
        """Return the limit that a text says: `1000`, or an age such as `90s`, `5m`, `2h`, `1d`.

        Errors: DeclarationError.
        """
        if isinstance(text, Limit) and (text.unit == "workers") is (check == "workers"):
            return text
        said = text
        text = text.strip() if isinstance(text, str) else ""
        if _NUMBER.fullmatch(text):
            return cls(float(text), "workers" if check == "workers" else "entries")
        age_s = None if check == "workers" else length_s(text)
        if age_s is None:
            ages = "" if check == "workers" else ", or an age such as 90s, 5m, 2h or 1d"
            raise DeclarationError(f"a limit is a number such as 1000{ages}, not {said!r}")
        return cls(age_s, "s")

    def __str__(self) -> str:
        return f"{self.value:g}{'s' if self.unit == 's' else ''}"


class Limits(NamedTuple):
    """What is a warning, and what is critical; None: nothing is."""

    warn: Limit | None
    crit: Limit | None


DEFAULTS: Mapping[CheckName, Limits] = {
    "lag": Limits(Limit(60, "s"), Limit(300, "s")),
    "pending": Limits(Limit(300, "s"), Limit(3_600, "s")),
    "dead": Limits(Limit(1, "entries"), None),
    "workers": Limits(None, Limit(1, "workers")),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of one group of one topic.

    value: entries, or workers; at_least: there are more. age_s: of the oldest of them; None when
    there is none, and of workers. paused: whether an operator has told the group to start nothing.
    """

    topic: str
    group: str
    value: int
    at_least: bool
    unit: Unit
    age_s: float | None
    status: Status
    paused: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found. status: the worst of its readings. text: for people, one line."""

    check: CheckName
    status: Status
    readings: tuple[Reading, ...]
    text: str
    warn: Limit | None
    crit: Limit | None


def limits_of(
    check: CheckName, warn: "str | Limit | None" = None, crit: "str | Limit | None" = None
) -> Limits:
    """Return the limits of a check. Who gives one of the two has no other.

    Errors: DeclarationError, also for a warning that would come after the critical state.
    """
    if check not in get_args(CheckName):
        names = ", ".join(get_args(CheckName))
        raise DeclarationError(f"there is no check {check!r}: there are {names}")
    if warn is None and crit is None:
        return DEFAULTS[check]
    limits = Limits(
        None if warn is None else Limit.of(warn, check),
        None if crit is None else Limit.of(crit, check),
    )
    if limits.warn is not None and limits.crit is not None and limits.warn.unit == limits.crit.unit:
        low, high = limits.warn.value, limits.crit.value
        if check == "workers":
            low, high = high, low
        if low > high:
            raise DeclarationError(
                f"a warning at {limits.warn} would come after the critical state at {limits.crit}"
            )
    return limits


def compared(
    check: CheckName,
    snapshot: Snapshot,
    groups: Iterable[str] | None,
    limits: Limits,
    missing: Iterable[str] = (),
) -> Checked:
    """Compare what a snapshot says of all groups, or of those named, with limits.

    missing: what is said of topics that were asked for, and are not there.
    """
    wanted = None if groups is None else dict.fromkeys(groups)
    readings = tuple(
        _judged(reading, limits)
        for topic in snapshot.topics
        for group in topic.groups
        if wanted is None or group.group in wanted
        for reading in [_read(check, topic, group)]
    )
    told = [*map(printable, missing), *_missing(wanted, readings), *_unseen(snapshot)]
    if not readings and not told:
        told = ["there is no group to look at"]
    statuses = [r.status for r in readings] + [Status.UNKNOWN] * bool(told)
    status = max(statuses, key=_WORSE.index)
    text = "; ".join([*_said(check, readings), *told, *_paused(readings)])
    return Checked(check, status, readings, text, *limits)


def unknown(check: CheckName, why: str, limits: Limits) -> Checked:
    """Return the result of a check that could not look."""
    return Checked(check, Status.UNKNOWN, (), printable(why), *limits)


# --- reading


def _read(check: CheckName, topic: TopicSnapshot, group: GroupSnapshot) -> Reading:
    value, at_least, age_s = {
        "lag": (group.undelivered, group.at_least, group.oldest_undelivered_age_s),
        "pending": (group.pending + group.inbox_pending, False, group.oldest_pending_age_s),
        "dead": (group.dead, False, group.oldest_dead_age_s),
        "workers": (group.workers, False, None),
    }[check]
    unit: Unit = "workers" if check == "workers" else "entries"
    paused = group.paused is not None
    return Reading(topic.name, group.group, value, at_least, unit, age_s, Status.OK, paused)


def _judged(reading: Reading, limits: Limits) -> Reading:
    for limit, status in ((limits.crit, Status.CRITICAL), (limits.warn, Status.WARNING)):
        if limit is not None and _reaches(reading, limit):
            return replace(reading, status=status)
    return reading


def _reaches(reading: Reading, limit: Limit) -> bool:
    if limit.unit == "workers":
        return reading.value < limit.value
    if limit.unit == "s":
        return reading.age_s is not None and reading.age_s >= limit.value
    return reading.value >= limit.value


def _missing(wanted: Iterable[str] | None, readings: Iterable[Reading]) -> Iterator[str]:
    there = {r.group for r in readings}
    for group in wanted or ():
        if group not in there:
            yield f"there is no group {printable(group)}"


def _unseen(snapshot: Snapshot) -> Iterator[str]:
    for topic in snapshot.topics:
        for stream in topic.streams:
            if stream.error is not None:
                yield f"{stream.stream} could not be looked at whole"
    yield from map(printable, snapshot.errors)


# --- saying


def _said(check: CheckName, readings: tuple[Reading, ...]) -> list[str]:
    """Return what is worst, group by group; or that all is well."""
    bad = [r for r in readings if r.status is not Status.OK]
    if not bad:
        groups = counted(len(readings), "group")
        return [f"{groups} looked at: {_worst_of(check, readings)}"] if readings else []
    bad.sort(key=lambda r: (-_WORSE.index(r.status), -(r.age_s or 0.0), r.topic, r.group))
    told = [_one(check, r) for r in bad[:NAMED]]
    if len(bad) > NAMED:
        told.append(f"and {counted(len(bad) - NAMED, 'group')} more")
    return told


def _worst_of(check: CheckName, readings: tuple[Reading, ...]) -> str:
    ages = [r.age_s for r in readings if r.age_s is not None]
    values = [r.value for r in readings]
    if check == "workers":
        return f"{counted(min(values), 'worker')} or more each"
    if not any(values):
        return {"lag": "none is behind", "pending": "nothing is pending", "dead": "none died"}[
            check
        ]
    oldest = f", the oldest {duration(max(ages))} old" if ages else ""
    return f"{counted(max(values), 'entry')} at most{oldest}"


def _one(check: CheckName, reading: Reading) -> str:
    where = f"{printable(reading.topic)}/{printable(reading.group)}"
    if check == "workers":
        return f"{where} is served by {counted(reading.value, 'worker')}"
    age = None if reading.age_s is None else duration(reading.age_s)
    entries = counted(reading.value, "entry", at_least=reading.at_least)
    if check == "lag":
        return f"{where} is {age} behind ({entries})" if age else f"{where} is {entries} behind"
    old = f", the oldest {age} old" if age else ""
    if check == "pending":
        return f"{where} has {entries} pending{old}"
    return f"{where} has {counted(reading.value, 'dead letter')}{old}"


def _paused(readings: Iterable[Reading]) -> list[str]:
    names = [f"{printable(r.topic)}/{printable(r.group)}" for r in readings if r.paused]
    return [f"paused: {', '.join(names)}"] if names else []
