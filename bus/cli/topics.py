"""`bus topics`: list, look at, change, trim."""

from datetime import timedelta
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from msgspec import UNSET, UnsetType

from bus.admin.marks import Marks, consequences
from bus.admin.trim import Trimmed
from bus.bus import Bus
from bus.cli.consent import Consent
from bus.cli.lengths import seconds
from bus.cli.options import Common
from bus.cli.output import Column, facts, json_line, many, say, show, table
from bus.cli.tables import GROUPS, STREAMS, age, groups_of, rate
from bus.errors import DeclarationError, ServerError
from bus.history.backlog import duration
from bus.history.position import as_id
from bus.history.snapshot import TopicSnapshot

app = App(name="topics", help="Topics: list, look at, change, trim.", help_format="plaintext")
_COMMON, _CONSENT = Common(), Consent()


TOPICS: tuple[Column, ...] = (
    ("topic", lambda t: t.name),
    ("partitions", lambda t: t.partitions),
    ("entries", lambda t: t.length),
    ("a second", lambda t: rate(t.appends_per_s)),
    ("keep", lambda t: t.keep),
    ("maxlen", lambda t: t.maxlen),
    ("on full", lambda t: t.on_full),
    ("retention", lambda t: age(t.retention_s)),
    ("groups", lambda t: len(t.groups)),
    ("dead", lambda t: t.dead),
    ("workers", lambda t: max((s.workers for s in t.streams), default=0)),
    ("", lambda t: "not declared" if t.implicit else ""),
)


@app.command(name="ls")
async def list_topics(*, common: Common = _COMMON) -> None:
    """List the topics that are recorded, or declared by --app."""
    async with common.looking() as bus:
        snapshot = await bus.inspect()
    if common.json:
        for topic in snapshot.topics:
            json_line(topic)
    else:
        show(table(snapshot.topics, TOPICS, empty="no topic is recorded"))
    for error in snapshot.errors:
        say(error, "red")


@app.command
async def info(topic: str, /, *, common: Common = _COMMON) -> None:
    """Show a topic: its marks, its streams and what holds them, its groups."""
    async with common.looking() as bus:
        snapshot = await bus.inspect([topic])
    found = snapshot.topic(topic)
    if common.json:
        json_line(found)
        return
    facts(_facts(found))
    show("")
    show(table(found.streams, STREAMS))
    show("")
    show(table(groups_of([found]), GROUPS, empty="no group"))


def _facts(topic: TopicSnapshot) -> list[tuple[str, object]]:
    return [
        ("topic", topic.name),
        ("declared", "no: recorded by its first use" if topic.implicit else "yes"),
        ("partitions", topic.partitions),
        ("entries", topic.length),
        ("a second", rate(topic.appends_per_s)),
        ("keep", topic.keep),
        ("maxlen", topic.maxlen),
        ("on full", topic.on_full),
        ("retention", age(topic.retention_s) or "no limit"),
        ("dead letters", topic.dead),
    ]


@app.command(name="set")
async def set_marks(
    topic: str,
    /,
    *,
    maxlen: int | None = None,
    keep: int | None = None,
    on_full: Literal["block", "reject", "drop_oldest"] | None = None,
    retention: str | None = None,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> None:
    """Change what is recorded of a topic; running processes go by it within 10 seconds.

    Change the declaration in the code, too: each process tells of the difference. The number of
    partitions cannot be changed: events of one key would lie in two of them.

    Parameters
    ----------
    maxlen
        Entries that a stream may hold; publishers wait, or are refused, beyond that.
    keep
        Entries that stay although every group is done with them; below maxlen.
    on_full
        What a publish does that finds no room.
    retention
        What is older goes, too, when every group is done with it: 7d, 12h; none for no limit.
    """
    wanted: dict[str, Any] = {"maxlen": maxlen, "keep": keep, "on_full": on_full}
    wanted["retention"] = _retention(retention)
    if all(value in (None, UNSET) for value in wanted.values()) and retention is None:
        raise DeclarationError("what is to change? --maxlen, --keep, --on-full or --retention")
    async with common.bus() as bus:
        plan = await bus.admin.set_marks(topic, **wanted, dry_run=True)
        changes = _changes(plan.before, plan.after)
        if not changes:
            say(f"{topic} has these marks already")
        elif not consent.yes:
            await _tell_consequences(bus, topic, plan.after)
        done = plan
        if consent.given(f"change {topic}: {', '.join(changes)}", nothing=not changes):
            done = await bus.admin.set_marks(topic, **wanted)
            say(f"{topic}: {', '.join(_changes(done.before, done.after))}")
    if common.json:
        json_line(done, dry_run=consent.dry_run)


async def _tell_consequences(bus: Bus, topic: str, after: Marks) -> None:
    """Say what the marks will do to what is there, as far as one may look."""
    try:
        snapshot = await bus.inspect([topic])
    except ServerError as error:
        say(f"what that does to {topic} is not known: {error}", "yellow")
        return
    for sentence in consequences(snapshot.topic(topic), after):
        say(sentence, "yellow")


def _retention(text: str | None) -> timedelta | UnsetType | None:
    if text is None:
        return UNSET
    return None if text == "none" else timedelta(seconds=seconds(text, "--retention"))


def _changes(before: Marks, after: Marks) -> list[str]:
    pairs = [(n, getattr(before, n), getattr(after, n)) for n in Marks.__dataclass_fields__]
    return [f"{_mark(n, old)} becomes {_value(n, new)}" for n, old, new in pairs if old != new]


def _mark(name: str, value: Any) -> str:
    return f"{name.removesuffix('_s').replace('_', ' ')} {_value(name, value)}"


def _value(name: str, value: Any) -> str:
    if name == "retention_s":
        return "no limit" if value is None else duration(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command
async def trim(
    topic: str,
    /,
    *,
    before: Annotated[str | None, Parameter(name=("--before", "--until"))] = None,
    keep: int | None = None,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> None:
    """Remove the oldest entries of every stream, as far as no group needs them.

    For example:

      bus topics trim order --before @-7d
      bus topics trim order --keep 10000 --dry-run

    What a group has not handled stays. If nobody is to handle it, move the group (bus groups seek)
    or remove it (bus groups rm) first.

    Parameters
    ----------
    before
        Everything before it goes: an entry id, milliseconds, ISO 8601, or @-7d.
    keep
        So many entries of each stream stay.
    """
    if before is not None:
        before = as_id(before)  # an age is of now, also when the answer comes later
    async with common.bus() as bus:
        done = await bus.admin.trim(topic, before=before, keep=keep, dry_run=True)
        _tell_held(done)
        more = "more than " if any(s.at_least for s in done.streams) else ""
        what = f"remove {more}{many(done.removed, 'entry', 'entries')} of {topic} for good"
        if consent.given(what, nothing=not done.removed):
            done = await bus.admin.trim(topic, before=before, keep=keep)
            say(f"removed {many(done.removed, 'entry', 'entries')}")
        elif not done.removed:
            say("nothing is to be removed")
    if common.json:
        json_line(done, dry_run=consent.dry_run)


def _tell_held(trimmed: Trimmed) -> None:
    for stream in trimmed.streams:
        if stream.held_by is not None:
            say(f"{stream.stream}: group {stream.held_by} needs the rest of it", "yellow")
