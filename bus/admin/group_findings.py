"""What is wrong with groups, their consumers, inboxes and dead letters. Pure functions."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from bus.admin.finding import Finding, Severity, bus, counted, printable
from bus.admin.pauses import held
from bus.admin.topic_findings import staffing
from bus.history.backlog import duration
from bus.history.letter import Letter
from bus.history.snapshot import ConsumerSnapshot, GroupSnapshot, StreamSnapshot, TopicSnapshot

GONE_S = 120.0  # by then live workers have taken what a dead one had, and removed it
FOREIGN_S = 300.0  # of another language: no handler of ours is given so long without a word
RECENT_S = 86_400.0  # dead letters of a day are news
NEVER_S = 2 * 366 * 86_400.0  # longer than any delay: the lane of effects that failed half way
INBOX_SHARE = 0.8  # of what may be moved aside into an inbox
NAMED = 5  # consumers of a group that are named, each in a finding of its own


def groups(
    topic: TopicSnapshot,
    letters: Mapping[str, Sequence[Letter]],
    lags: Mapping[tuple[str, str], tuple[int, int]],
    now: datetime,
) -> Iterator[Finding]:
    """Judge all groups of a topic.

    letters: by group, the youngest dead letters. lags: of (stream, group), what the server says
    and how many entries there are, where that is less. now: by the server's clock.
    """
    for group in topic.groups:
        parts = [(s, g) for s in topic.streams for g in s.groups if g.group == group.group]
        yield from unserved(topic, group)
        yield from paused(topic, group, parts, now)
        yield from lag(topic, group, parts, lags)
        yield from dead(topic, group, letters.get(group.group, ()))
        yield from inbox(topic, group, parts)
        yield from stuck(topic, group)
        yield from consumers(topic, group)


Parts = Sequence[tuple[StreamSnapshot, GroupSnapshot]]  # a group, stream by stream


def unserved(topic: TopicSnapshot, group: GroupSnapshot) -> Iterator[Finding]:
    """Judge a group that nobody serves: it needs all that comes."""
    if group.served:
        return
    severity: Severity = "problem"
    waits = f"has {counted(group.total, 'entry', at_least=group.at_least)} waiting"
    if group.oldest_age_s is not None:
        waits += f", the oldest for {duration(group.oldest_age_s)}"
    if not group.total:
        # Before 7.2 a reader of another language that waits in vain does not show.
        foreign = any(not c.leased for c in group.consumers)
        waits, severity = "will hold all that comes", "note" if foreign else "warning"
    yield _of(
        topic,
        group,
        "unserved",
        severity,
        f"nobody serves group {printable(group.group)} of topic {topic.name}, which {waits}: start"
        " its workers, or remove it if its handler is gone",
        staffing(topic, group),
    )


def paused(
    topic: TopicSnapshot, group: GroupSnapshot, parts: Parts, now: datetime
) -> Iterator[Finding]:
    """Judge a pause: who has forgotten it, or whom it will hurt before it ends."""
    pause = group.paused
    if pause is None:
        return
    times = [t for s, g in parts if (t := held(s, g).full_in_s) is not None]
    full_in_s = min(times, default=None)
    ends = "without an end" if pause.until is None else f"until {pause.until:%Y-%m-%d %H:%M:%S}Z"
    why = f" ({printable(pause.why)})" if pause.why else ""
    since = "" if pause.since is None else f" since {pause.since:%Y-%m-%d %H:%M:%S}Z"
    felt = "nothing is published there now"
    if full_in_s is not None:
        felt = f"publishers feel it in about {duration(full_in_s)}"
    in_time = pause.until is not None and (
        full_in_s is None or full_in_s > (pause.until - now).total_seconds()
    )
    yield _of(
        topic,
        group,
        "paused",
        "note" if in_time else "warning",
        f"group {printable(group.group)} of topic {topic.name} is paused{since},"
        f" {ends}{why}: {felt}",
        bus("groups resume", group.group, topic=topic.name),
    )


def lag(
    topic: TopicSnapshot,
    group: GroupSnapshot,
    parts: Parts,
    wrong: Mapping[tuple[str, str], tuple[int, int]],
) -> Iterator[Finding]:
    """Judge what the server itself says a group lags by: other monitors go by that."""
    mend = bus("groups seek", group.group, options="--recount", topic=topic.name)
    where = f"group {printable(group.group)} of topic {topic.name}"
    unknown = [s for s, g in parts if s.added is not None and s.length and g.lag is None]
    if unknown:
        yield _of(
            topic,
            group,
            "lag",
            "warning",
            f"the server has lost count of what {where} was given, until that has read to the end:"
            " KEDA and redis_exporter take that for no lag",
            mend,
            unknown[0],
        )
    for stream, _ in parts:
        if (stream.stream, group.group) in wrong:
            said, there = wrong[stream.stream, group.group]
            yield _of(
                topic,
                group,
                "lag",
                "warning",
                f"the server says that {where} lags by {counted(said, 'entry')}, and there are"
                f" {there:,}: some were trimmed or deleted by hand before it",
                mend,
                stream,
            )


def dead(
    topic: TopicSnapshot, group: GroupSnapshot, letters: Sequence[Letter]
) -> Iterator[Finding]:
    """Tell of dead letters, and what most of the youngest died of."""
    if not group.dead:
        return
    age_s = group.newest_dead_age_s
    age = "" if age_s is None else f", the youngest {duration(age_s)} old"
    most = ""
    if letters:
        (kind, times), *_ = Counter((x.reason, x.error_type) for x in letters).most_common(1)
        said = ", ".join(printable(k) for k in kind if k) or "no reason"
        most = f"; {times:,} of the youngest {len(letters):,} died of: {said}"
    half_way = any(x.reason == "effects-failed" for x in letters)
    recent = age_s is not None and age_s < RECENT_S
    yield _of(
        topic,
        group,
        "dead",
        "warning" if recent or half_way else "note",
        f"group {printable(group.group)} of topic {topic.name} has"
        f" {counted(group.dead, 'dead letter')}{age}{most}",
        bus("dead ls", group.group, topic=topic.name),
    )


def inbox(topic: TopicSnapshot, group: GroupSnapshot, parts: Parts) -> Iterator[Finding]:
    """Judge what waits for one group alone: whether anybody takes it, and whether more fits."""
    where = f"the inbox of group {printable(group.group)} of topic {topic.name}"
    # Who keeps no lease reads the stream and knows of no inbox.
    waits = sum(
        g.inbox - g.inbox_pending
        for _, g in parts
        if g.workers <= sum(c.alive and not c.leased for c in g.consumers)
    )
    if waits:
        yield _of(
            topic,
            group,
            "inbox",
            "warning",
            f"{counted(waits, 'entry')} in {where}, redriven, replayed or moved there, and no"
            " worker takes any",
            bus("worker", "PACKAGE"),
        )
    most = topic.maxlen - topic.keep
    for stream, part in parts:
        if part.inbox >= INBOX_SHARE * most:
            yield _of(
                topic,
                group,
                "inbox",
                "warning",
                f"{where} has {counted(part.inbox, 'entry')} of {most:,}: when it is full, failing"
                " events are not moved aside any more, and publishers will feel them",
                bus("topics set", topic.name, options=f"--maxlen {2 * topic.maxlen}"),
                stream,
            )


def stuck(topic: TopicSnapshot, group: GroupSnapshot) -> Iterator[Finding]:
    """Tell of entries that are never due: their effects failed half way, with nowhere to go."""
    entries = sum(lane.pending for lane in group.lanes if lane.due_in_s > NEVER_S)
    if entries:
        yield _of(
            topic,
            group,
            "stuck",
            "problem",
            f"the effects of {counted(entries, 'entry')} of group {printable(group.group)} of"
            f" topic {topic.name} failed half way, and nothing will run again until somebody has"
            " looked: until then they hold the stream",
            bus("pending ls", group.group, topic=topic.name),
        )


def consumers(topic: TopicSnapshot, group: GroupSnapshot) -> Iterator[Finding]:
    """Judge consumers that are gone, ours and those of other languages."""
    # Where others are at work they take what it had within seconds, and its name within a minute.
    after_s = GONE_S if group.served and group.paused is None else 0.0
    left = [c for c in group.consumers if not c.alive and c.leased and c.idle_s >= after_s]
    foreign = [c for c in group.consumers if not c.alive and not c.leased and c.pending]
    silent = [c for c in foreign if c.idle_s >= FOREIGN_S]
    where = f"group {printable(group.group)} of topic {topic.name}"
    laden = [c for c in left if c.pending]
    for one in laden[:NAMED]:
        text = (
            f"worker {printable(one.name)} of {where} is gone for {duration(one.idle_s)} and has"
            f" {counted(one.pending, 'entry')} that nobody took over{_more(one, laden)}"
        )
        yield _gone(topic, group, "consumers", "warning", text, one)
    idle = [c for c in left if not c.pending]
    if idle:
        text = f"{counted(len(idle), 'worker')} of {where} with nothing in hand left no more than"
        text += f" a name behind, {printable(idle[0].name)} for one"
        yield _gone(topic, group, "consumers", "note", text, idle[0])
    for one in silent[:NAMED]:
        text = (
            f"consumer {printable(one.name)} of {where}, of another language, was not heard of for"
            f" {duration(one.idle_s)} and has {counted(one.pending, 'entry')}{_more(one, silent)}"
        )
        yield _gone(topic, group, "foreign", "warning", text, one)


def _more(one: ConsumerSnapshot, such: Sequence[ConsumerSnapshot]) -> str:
    """Return how many there are that are not named, if it is the last one that is."""
    more = len(such) - NAMED
    return f"; there are {more:,} more such" if more > 0 and one is such[NAMED - 1] else ""


def _gone(
    topic: TopicSnapshot,
    group: GroupSnapshot,
    check: str,
    severity: Severity,
    text: str,
    consumer: ConsumerSnapshot,
) -> Finding:
    return Finding(
        check,
        severity,
        text,
        bus("consumers rm", consumer.name, group=group.group, topic=topic.name),
        topic=topic.name,
        group=group.group,
        consumer=consumer.name,
    )


def _of(
    topic: TopicSnapshot,
    group: GroupSnapshot,
    check: str,
    severity: Severity,
    text: str,
    mend: str,
    stream: StreamSnapshot | None = None,
) -> Finding:
    return Finding(
        check,
        severity,
        text,
        mend,
        topic=topic.name,
        group=group.group,
        stream=None if stream is None else stream.stream,
    )
