"""`bus groups`: list, lag, create, move, pause, remove."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated

from cyclopts import App, Parameter

from bus.admin.groups import Removed, Sought
from bus.admin.pauses import PausedGroup
from bus.bus import Bus
from bus.cli.codes import DONE, FAILED
from bus.cli.consent import Consent
from bus.cli.lag import watch
from bus.cli.lengths import seconds
from bus.cli.names import Name, shown
from bus.cli.options import Common
from bus.cli.output import Column, facts, json_line, many, say, show, table
from bus.cli.tables import GROUPS, Row, age, groups_of, state, undelivered
from bus.envelope import entry_time
from bus.errors import DeclarationError, ServerError
from bus.history.groups import no_such_group
from bus.history.lengths import length_s
from bus.history.position import as_id

app = App(
    name="groups",
    help="Groups: list, lag, create, move, pause, remove.",
    help_format="plaintext",
)
_COMMON, _CONSENT = Common(), Consent()
Topics = Annotated[
    list[str] | None, Parameter(name="--topic", negative="", help="This topic; may be said again.")
]
Topic = Annotated[
    str | None, Parameter(name="--topic", help="This topic; by default all that have the group.")
]


async def rows(bus: Bus, groups: tuple[str, ...], topics: list[str] | None) -> list[Row]:
    """Return the groups that are meant. Errors: UnknownTopic, UnknownGroup."""
    found = groups_of((await bus.inspect(topics)).topics)
    names = {r.group.group for r in found}
    wanted = [shown(group) for group in groups]
    for group in wanted:
        if group not in names:
            one = topics[0] if topics and len(topics) == 1 else None
            raise no_such_group(group, one, names)
    return [r for r in found if not groups or r.group.group in wanted]


async def tell_paused(bus: Bus, group: str, topics: Iterable[str] | None) -> None:
    """Say if a group is paused: what is given to it will wait. topics: None for all."""
    try:
        paused = await bus.admin.paused_topics(group)
    except ServerError as error:
        say(f"whether {shown(group)} is paused is not known: {error}", "yellow")
        return
    for topic in sorted(paused if topics is None else paused & set(topics)):
        say(f"{shown(group)} is paused on {topic}: nothing of it starts until then", "yellow")


@app.command(name="ls")
async def list_groups(*groups: Name, topic: Topics = None, common: Common = _COMMON) -> None:
    """List groups: what each has still to do, and who serves it.

    Parameters
    ----------
    groups
        These alone.
    """
    async with common.looking() as bus:
        found = await rows(bus, groups, topic)
    if common.json:
        for row in found:
            json_line(row.group, topic=row.topic.name)
    else:
        show(table(found, GROUPS, empty="no group"))


CONSUMERS: tuple[Column, ...] = (
    ("consumer", lambda c: c.name),
    ("", lambda c: "alive" if c.alive else "gone"),
    ("pending", lambda c: c.pending),
    ("idle", lambda c: age(c.idle_s)),
)


@app.command
async def info(group: Name, /, *, topic: Topic = None, common: Common = _COMMON) -> None:
    """Show a group: what it has to do, its consumers, and what waits for when."""
    async with common.looking() as bus:
        found = await rows(bus, (group,), None if topic is None else [topic])
    for row in found:
        if common.json:
            json_line(row.group, topic=row.topic.name)
            continue
        of = row.group
        facts(
            [
                ("group", of.group),
                ("topic", row.topic.name),
                ("workers", of.workers or "none alive"),
                ("undelivered", undelivered(of)),
                ("running", of.running),
                ("parked", f"{of.parked:,}, {of.due:,} of them due"),
                ("orphaned", of.orphaned),
                ("inbox", of.inbox),
                ("dead letters", of.dead),
                ("oldest", age(of.oldest_age_s) or "-"),
                ("server's lag", "unknown" if of.lag is None else of.lag),
                ("but", state(of)),
            ]
        )
        show(table(of.consumers, CONSUMERS))
        for lane in of.lanes[:20]:
            when = f"in {age(lane.due_in_s)}" if lane.due_in_s else "now"
            show(f"{lane.pending:,} due {when}")
        show("")


@app.command
async def lag(
    *groups: Name,
    topic: Topics = None,
    watch_s: Annotated[str | None, Parameter(name=("--watch", "-w"))] = None,
    common: Common = _COMMON,
) -> None:
    """Show how far groups are behind, in entries and in time.

    For example:

      bus groups lag --watch 2s
      bus groups lag receipts --json

    Parameters
    ----------
    groups
        These alone.
    watch_s
        Again and again, every 2s, say, with the rates in between, until Ctrl-C.
    """
    every_s = None if watch_s is None else seconds(watch_s, "--watch")
    if every_s is not None and not 0.1 <= every_s <= 86_400:  # noqa: PLR2004 - a day
        raise DeclarationError("--watch is from 0.1s to 1d")
    async with common.looking() as bus:
        await watch(lambda: rows(bus, groups, topic), every_s, json=common.json)


@app.command
async def create(
    group: Name,
    /,
    *,
    topic: str,
    at: str = "start",
    common: Common = _COMMON,
) -> None:
    """Make a group before its handler is deployed: it is given what is there, and what comes.

    Parameters
    ----------
    at
        The first entry it is given: start (the default), end (what comes from now on), an entry
        id, ISO 8601, or @-2h.
    """
    async with common.bus() as bus:
        made = await bus.admin.create_group(group, topic, at=at)
    if common.json:
        json_line(made)
        return
    for stream in made.streams:
        say(f"{group} is made on {stream}")
    for stream in made.existed:
        say(f"{group} was there on {stream}, and is as it was", "yellow")


@app.command(name="rm")
async def remove(
    group: Name,
    /,
    *,
    topic: Topic = None,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> None:
    """Delete a group, with what waits in its inbox and its dead letters.

    Of a group that a worker serves it is refused: the worker would make it again, from the
    beginning.
    """
    async with common.bus() as bus:
        left = await bus.admin.remove_group(group, topic, dry_run=True)
        for each in left:
            say(_left(each))
        streams = many(len(left), "stream")
        if consent.given(f"delete group {shown(group)} from {streams}, with all of that"):
            left = await bus.admin.remove_group(group, topic)
            say(f"{shown(group)} is deleted from {streams}")
    if common.json:
        for each in left:
            json_line(each, dry_run=consent.dry_run)


def _left(removed: Removed) -> str:
    more = "more than " if removed.at_least else ""
    return (
        f"{removed.stream}: {more}{removed.undelivered:,} undelivered, {removed.pending:,} pending,"
        f" {removed.inbox:,} in the inbox, {removed.dead:,} dead letters"
    )


@app.command
async def seek(
    group: Name,
    /,
    *,
    to: str | None = None,
    recount: Annotated[bool, Parameter(negative="")] = False,
    topic: Topic = None,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> int:
    """Set which entry a group is given next.

    For example:

      bus groups seek receipts --to end --topic order
      bus groups seek receipts --to @-1h --dry-run
      bus groups seek receipts --recount

    Forwards, entries are skipped for good. Backwards, they are handled again; `bus replay` does
    that, too, chosen, paced, and without holding up what is new.

    Parameters
    ----------
    to
        That entry, or the first after a time: start, end, an entry id, ISO 8601, or @-2h.
    recount
        Stay, and tell the server how many entries the group has passed, where it has lost count.
    """
    if (to is None) is not recount:
        raise DeclarationError("say either --to, or --recount")
    async with common.bus() as bus:
        code = DONE
        if to is None:
            found = await bus.admin.recount_group(group, topic, dry_run=consent.dry_run)
            code = _tell_recounted(found, dry=consent.dry_run)
        else:
            found = await bus.admin.seek_group(group, to, topic, dry_run=True)
            for each in found:
                say(_sought(each))
            moves = tuple(each for each in found if each.before != each.after)
            if consent.given(f"move {shown(group)} to {to}", nothing=not moves):
                done = await bus.admin.seek_group(group, moves, topic)
                _tell_moved(group, moves, done)
                found = done
    if common.json:
        for each in found:
            json_line(each, dry_run=consent.dry_run)
    return code


def _tell_recounted(found: tuple[Sought, ...], *, dry: bool) -> int:
    """Say what the server knows; return the exit code: it was asked to know."""
    for each in found:
        knows = "can be told" if dry else "knows"
        does_not = "cannot be told" if dry else "does not know"
        known = knows if each.counted else does_not
        say(f"{each.stream}: the server {known} how far {shown(each.group)} is")
    if all(each.counted for each in found):
        return DONE
    say(
        "a busy group is paused first (bus groups pause); before an entry that was deleted by hand,"
        " beyond 100,000 entries, and on Redis 6.2 nothing can be counted",
        "yellow",
    )
    return FAILED


def _tell_moved(group: str, planned: tuple[Sought, ...], done: tuple[Sought, ...]) -> None:
    say(f"{shown(group)} is moved")
    wanted = {each.stream: each for each in planned}
    for each in done:
        if each.after != wanted[each.stream].after:
            say(f"{each.stream}: {shown(group)} had come past it by itself meanwhile", "yellow")


def _sought(sought: Sought) -> str:
    more = "more than " if sought.at_least else ""
    what = "stays where it is"
    if sought.skipped:
        what = f"skips {more}{many(sought.skipped, 'entry', 'entries')} that it was not given"
    elif sought.again:
        what = f"is given {more}{many(sought.again, 'entry', 'entries')} again"
    elif sought.before != sought.after:
        what = "moves past nothing"
    return f"{sought.stream}: {shown(sought.group)} {what}"


@app.command
async def pause(
    group: Name,
    /,
    *,
    topic: Topic = None,
    until: str | None = None,
    why: str = "",
    common: Common = _COMMON,
) -> None:
    """Have nothing of a group start any more; what runs goes on. It survives restarts.

    For example:

      bus groups pause receipts --until 30m --why 'mail server is moved'

    Workers notice within a second or two. They keep what they serve: nobody takes over.

    Parameters
    ----------
    until
        When it ends by itself: a length of time such as 30m, or ISO 8601. Else `bus groups resume`.
    why
        To be shown to others.
    """
    async with common.bus() as bus:
        paused = await bus.admin.pause_group(group, topic, until=_until(until), why=why)
    for each in paused:
        if common.json:
            json_line(each, full_in_s=each.full_in_s)
        else:
            say(_paused(each))


def _until(text: str | None) -> datetime | timedelta | None:
    if text is None:
        return None
    age_s = length_s(text)
    try:
        if age_s is not None:
            return timedelta(seconds=age_s)
        place = as_id(text)
    except (DeclarationError, OverflowError):
        place = "+"
    if place in ("-", "+"):
        raise DeclarationError(
            f"--until is a length of time such as 30m, or ISO 8601, not {text!r}"
        )
    return entry_time(place)


def _paused(paused: PausedGroup) -> str:
    until = paused.paused.until
    ends = "until it is resumed" if until is None else f"until {until:%Y-%m-%d %H:%M:%S}Z"
    full_in_s = paused.full_in_s
    felt = "nothing is published there now"
    if full_in_s is not None:
        felt = f"publishers will feel it in about {age(full_in_s)} at the present rate"
    return f"{shown(paused.group)} is paused on {paused.topic} {ends}; {felt}"


@app.command
async def resume(group: Name, /, *, topic: Topic = None, common: Common = _COMMON) -> None:
    """Let a group go on."""
    async with common.bus() as bus:
        resumed = await bus.admin.resume_group(group, topic)
    if common.json:
        json_line({"group": group, "topics": resumed})
    elif resumed:
        say(f"{shown(group)} goes on, on {', '.join(resumed)}")
    else:
        say(f"{shown(group)} was not paused")
