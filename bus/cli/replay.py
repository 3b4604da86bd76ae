"""`bus replay`: events of the past, for one group, again."""

from typing import Annotated, Any

from cyclopts import Parameter

from bus.bus import Bus
from bus.cli.consent import Consent
from bus.cli.entries import Choice, document, show_envelope, tell_unjudged
from bus.cli.groups import tell_paused
from bus.cli.options import Common
from bus.cli.output import Most, json_line, many, say
from bus.cli.progress import Bar
from bus.errors import ServerError
from bus.history.position import span
from bus.history.replay import Replayed
from bus.history.wanted import Progress

_COMMON, _CHOICE, _CONSENT = Common(), Choice(), Consent()


async def replay(
    topic: str,
    /,
    *,
    into: str,
    since: Annotated[str, Parameter(name=("--from", "--since"))] = "start",
    until: Annotated[str, Parameter(name=("--to", "--until"))] = "end",
    rate: float | None = None,
    limit: Most = None,
    checkpoint: str | None = None,
    choice: Choice = _CHOICE,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> None:
    """Put events of the past into one group's inbox: its workers handle them again, nobody else.

    For example:

      bus replay order --into receipts --from @-2h --where 'data.cents > 1000' --dry-run
      bus replay order --into receipts --from 2026-11-20 --rate 500 --checkpoint receipts.replay

    Parameters
    ----------
    into
        The group.
    since, until
        Both included: start, end, an entry id, milliseconds, ISO 8601, or @-2h.
    rate
        So many a second at most.
    limit
        So many events.
    checkpoint
        A file that is made: the same command goes on from there, also after a kill, and puts
        nothing twice into the inbox. A dry run counts what is left.
    """
    where = choice.predicate()
    asked: dict[str, Any] = {
        "to": into,
        "since": since,
        "until": until,
        "types": choice.type,
        "key": choice.key,
        "where": where,
        "limit": limit,
        "checkpoint": checkpoint,
    }
    if checkpoint is None:  # what was counted is what goes; with one, the range is in the file
        asked["since"], asked["until"] = span(since, until)
    async with common.bus() as bus:
        await _tell_waits(bus, topic, into)
        if not consent.yes:
            found = await _counted(bus, topic, asked)
            tell_unjudged(where)
            if checkpoint is None and found.last:
                asked["until"] = found.last
            if not consent.given(_planned(topic, into, found), nothing=not found.matched):
                _show(found, json=common.json, dry=True)
                return
        with Bar(f"replay into {into}") as bar:
            done = await bus.replay(
                topic,
                rate=rate,
                progress=lambda p: bar.at(p.share, _said(p)),
                **asked,
            )
    tell_unjudged(where)
    _show(done, json=common.json)


def _planned(topic: str, group: str, found: Replayed) -> str:
    rest = " that are left" if found.resumed else ""
    of = f"{many(found.read, 'event')} of {topic}{rest}"
    return f"replay {found.matched:,} of {of} into {group}: its handler runs them again"


async def _counted(bus: Bus, topic: str, asked: dict[str, Any]) -> Replayed:
    with Bar("count") as bar:
        return await bus.replay(
            topic,
            dry_run=True,
            progress=lambda p: bar.at(p.share, f"{p.matched:,} of {p.read:,}"),
            **asked,
        )


def _said(progress: Progress) -> str:
    waits = ", waits for room" if progress.waiting else ""
    return f"{progress.replayed:,}{waits}"


async def _tell_waits(bus: Bus, topic: str, group: str) -> None:
    """Warn if nobody would take what is put into the inboxes, as far as one may look."""
    try:
        snapshot = await bus.inspect([topic])
    except ServerError as error:
        say(f"whether anybody serves {group} is not known: {error}", "yellow")
        return
    found = [g for g in snapshot.topic(topic).groups if g.group == group]
    if found and not found[0].served:
        say(f"nobody serves {group} now: its events will wait in the inbox", "yellow")
    await tell_paused(bus, group, [topic])


def _show(done: Replayed, *, json: bool, dry: bool = False) -> None:
    left_out = ("sample", "last")
    counts = {n: getattr(done, n) for n in Replayed.__dataclass_fields__ if n not in left_out}
    if json:
        sample = [document(e) for e in done.sample]
        json_line(counts, dry_run=dry, sample=sample)
        return
    for envelope in done.sample:
        show_envelope(envelope, json=False)
    left = {"could not be read": done.unreadable, "were gone": done.gone, "gaps": done.gaps}
    also = "".join(f", {n:,} {what}" for what, n in left.items() if n)
    goes_on = ", went on from the checkpoint" if done.resumed else ""
    if dry and done.resumed and not done.read:
        say("nothing is left to be replayed: the checkpoint says that all of it was")
        return
    verb = "would replay" if dry else "replayed"
    number = done.matched if dry else done.replayed
    say(f"{verb} {number:,} of {many(done.read, 'event')}{also}{goes_on}")
