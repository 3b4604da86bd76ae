"""Named families of events, and which topics a set of type patterns reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from bus.config import checked_name, checked_number
from bus.errors import DeclarationError, NotSupported
from bus.event import known_events, type_matches


@dataclass(frozen=True, slots=True)
class Topic:
    """A family of events kept together.

    name: as in `bus:{name:0}`; see `config.checked_name`.
    partitions: streams the topic is spread over, 1 to 1,024; events of one key share one. Fixed
        by the first process that uses the topic.
    maxlen, keep, on_full, retention: caps and time retention are not part of this release;
        anything but None raises NotSupported.
    """

    name: str
    partitions: int = 1
    maxlen: int | None = None
    keep: int | None = None
    on_full: str | None = None
    retention: timedelta | None = None

    def __post_init__(self) -> None:
        checked_name(self.name, "topic name")
        checked_number(self.partitions, f"topic {self.name}: partitions", 1, 1024, whole=True)
        for parameter in ("maxlen", "keep", "on_full", "retention"):
            if getattr(self, parameter) is not None:
                raise NotSupported(
                    f"topic {self.name}: {parameter} is not part of this release;"
                    " streams grow until they are trimmed by hand"
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
