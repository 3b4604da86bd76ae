"""What is wrong with a bus, and what mends it: all that was seen, judged. Pure.

A finding must not cry wolf: a bus at work, and one whose workers come and go, has none but notes.
So what passes by itself in a moment is left alone, and thresholds are named, in the three modules
that judge: `server_findings`, `topic_findings`, `group_findings`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from bus.admin import group_findings, server_findings, topic_findings
from bus.admin.finding import SEVERITIES, Finding, Severity, counted, placed
from bus.admin.server_findings import Feature
from bus.history.letter import Letter
from bus.history.snapshot import ServerFacts, Snapshot
from bus.streams.checkup import ClockSeen, ServerSeen
from bus.streams.rights import Refusal

STREAMS_NAMED = 3  # of a topic, in findings that differ in nothing else


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `Admin.examine` found.

    address: of the server, without a password. time: by its clock, None if it did not say.
    server: None if it did not say. features: what it can do. findings: the gravest first.
    """

    address: str
    time: datetime | None
    server: ServerFacts | None
    features: tuple[Feature, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is neither a problem nor a warning."""
        return self.worst in (None, "note")

    @property
    def worst(self) -> Severity | None:
        """The gravest severity there is; None without findings."""
        return self.findings[0].severity if self.findings else None

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(f for f in self.findings if f.severity == severity)

    def __str__(self) -> str:
        counts = [counted(len(self.of(s)), s) for s in SEVERITIES]
        return "\n".join([f"{self.address}: {', '.join(counts)}", *map(str, self.findings)])


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen of a bus; what could not be looked at is missing.

    roles: those whose rights matter. refused: what the user may not run, None if nobody can say.
    barred: why the user may look at no topic; "" if he may, or nobody came to that.
    wrong_records: topic -> why its record cannot be read. wrong_types: key -> the type it has, the
    type it should have. letters: (topic, group) -> the youngest. lags: (stream, group) -> what the
    server says, and how many entries there are, where that is less.
    """

    address: str
    server: ServerSeen
    roles: Sequence[str] = ()
    refused: Mapping[str, Refusal] | None = None
    clock: ClockSeen | None = None
    snapshot: Snapshot | None = None
    barred: str = ""
    wrong_records: Mapping[str, str] = field(default_factory=dict)
    wrong_types: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    letters: Mapping[tuple[str, str], Sequence[Letter]] = field(default_factory=dict)
    lags: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)


def diagnosed(seen: Seen, more: Iterable[Finding] = ()) -> Diagnosis:
    """Judge what was seen. more: what was found on the way."""
    features = server_findings.features_of(seen.server, seen.refused, seen.snapshot)
    found = [*more, *_of_the_server(seen), *server_findings.features(features), *_of_topics(seen)]
    snapshot = seen.snapshot
    return Diagnosis(
        seen.address,
        None if snapshot is None else snapshot.time,
        None if snapshot is None else snapshot.server,
        features,
        tuple(sorted(_said_once(found), key=placed)),
    )


def _said_once(found: Iterable[Finding]) -> list[Finding]:
    """Say once what holds for many streams of a topic, and is mended by one command."""
    alike: dict[Finding, list[Finding]] = {}
    for finding in found:
        same = replace(finding, text="", stream=None) if finding.stream else finding
        alike.setdefault(same, []).append(finding)
    said = []
    for findings in alike.values():
        first, *rest = findings
        if len(rest) < STREAMS_NAMED:
            said += findings
        else:
            more = f"; so it is with {len(rest):,} more streams of the topic"
            said.append(replace(first, text=first.text + more))
    return said


def unusable(address: str, why: Finding) -> Diagnosis:
    """Return the diagnosis of a server that can be asked nothing more."""
    return Diagnosis(address, None, None, (), (why,))


def _of_the_server(seen: Seen) -> list[Finding]:
    address, server = seen.address, seen.server
    found = [
        *server_findings.hidden(address, server, seen.refused, seen.barred),
        *server_findings.persistence(address, server),
        *server_findings.memory(address, server),
        *server_findings.replication(address, server),
        *server_findings.clock(address, seen.clock),
    ]
    if seen.refused is not None:
        found += server_findings.rights(address, seen.refused, seen.roles, seen.snapshot)
    return found


def _of_topics(seen: Seen) -> list[Finding]:
    found = [
        *topic_findings.records(seen.address, seen.wrong_records),
        *topic_findings.types(seen.address, seen.wrong_types),
    ]
    snapshot = seen.snapshot
    if snapshot is None:
        return found
    found += topic_findings.topics(seen.address, snapshot)
    told = frozenset(f.stream for f in found if f.check == "types" and f.stream)
    found += topic_findings.unseen(snapshot, told)
    for topic in snapshot.topics:
        letters = {g: x for (t, g), x in seen.letters.items() if t == topic.name}
        found += group_findings.groups(topic, letters, seen.lags, snapshot.time)
    return found
