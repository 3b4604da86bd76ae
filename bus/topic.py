"""Named families of events, and which topics a set of type patterns reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

from bus.config import KEEP_SHARE, MAXLEN, MAXLEN_MAX, checked_name, checked_number
from bus.errors import DeclarationError
from bus.event import known_events, type_matches

OnFull = Literal["block", "reject", "drop_oldest"]


@dataclass(frozen=True, slots=True)
class Topic:
    """A family of events kept together.

    name: as in `bus:{name:0}`; see `config.checked_name`.
    partitions: streams the topic is spread over, 1 to 1,024; events of one key share one. Fixed
        by the first process that uses the topic.
    maxlen: entries a stream may hold; publishers outside handlers never take it past that.
    keep: entries of history that stay although every group is done with them; below `maxlen`,
        by default a tenth of it. What lies between is how far a group may fall behind.
    on_full: what a publish does that finds no room: "block" waits, "reject" raises StreamFull
        at once, "drop_oldest" deletes the oldest entries, handled or not, and says so.
    retention: what is older goes too, as soon as every group is done with it; None for no limit.
    Errors: DeclarationError.
    """

    name: str
    partitions: int = 1
    maxlen: int = MAXLEN
    keep: int = None  # type: ignore[assignment] # filled in below, so that readers find a number
    on_full: OnFull = "block"
    retention: timedelta | None = None

    def __post_init__(self) -> None:
        name = checked_name(self.name, "topic name")
        checked_number(self.partitions, f"topic {name}: partitions", 1, 1024, whole=True)
        checked_number(self.maxlen, f"topic {name}: maxlen", 2, MAXLEN_MAX, whole=True)
        if self.keep is None:
            object.__setattr__(self, "keep", max(1, self.maxlen // KEEP_SHARE))
        checked_number(self.keep, f"topic {name}: keep", 1, MAXLEN_MAX, whole=True)
        if self.keep >= self.maxlen:
            raise DeclarationError(
                f"topic {name}: keep = {self.keep:,} must be below maxlen = {self.maxlen:,}:"
                " what lies between is the room for groups that fall behind"
            )
        if self.on_full not in get_args(OnFull):
            raise DeclarationError(
                f"topic {name}: on_full is 'block', 'reject' or 'drop_oldest', not {self.on_full!r}"
            )
        if self.retention is not None and (
            not isinstance(self.retention, timedelta)
            or not timedelta(seconds=1) <= self.retention <= timedelta(days=36_500)
        ):
            raise DeclarationError(
                f"topic {name}: retention is a timedelta of 1 second to 100 years,"
                f" not {self.retention!r}"
            )


def topics_of(patterns: Iterable[str], declared: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the topics, sorted, in which events named by `patterns` can lie.

    These are the topics of all known event classes that match, the one named by a literal first
    segment (unless only classes of other topics match exactly), and `declared`.
    Errors: DeclarationError when that is none, as for a bare `*`.
    """
    topics = {checked_name(t, "topic name") for t in declared}
    for pattern in patterns:
        matching = {e.topic for e in known_events() if type_matches(pattern, e.type)}
        first = pattern.partition(".")[0]
        if "*" in pattern:
            topics |= matching
            if first != "*":
                topics.add(first)
        else:
            topics |= matching or {first}
    if not topics:
        raise DeclarationError(
            f"no topic is known for {', '.join(patterns)}: say topics=[...] at the handler"
        )
    return tuple(sorted(topics))
