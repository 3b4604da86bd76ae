"""`bus dead`: dead letters, listed, shown, redriven, purged, exported."""

from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, Parameter

from bus.bus import Bus
from bus.cli.codes import DONE, FAILED
from bus.cli.consent import Consent
from bus.cli.edit import edited, settings
from bus.cli.entries import Condition, Types, predicate, pretty, tell_unjudged
from bus.cli.groups import Topic, tell_paused
from bus.cli.names import Name
from bus.cli.options import Common
from bus.cli.output import Column, Limit, Listing, Most, facts, json_line, many, say, show, table
from bus.cli.progress import Bar
from bus.cli.tables import Row, age, groups_of
from bus.cli.where import Where
from bus.errors import DeclarationError
from bus.history.dead_letters import DeadLetters
from bus.history.dead_letters import Filters as Found
from bus.history.mend import Edit
from bus.history.redrive import Redriven
from bus.streams import keys

app = App(
    name="dead",
    help="Dead letters: list, show, redrive, purge, export.",
    help_format="plaintext",
)
MOST = 100  # letters that are listed unless somebody wants more


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Filters:
    """The options that choose dead letters."""

    topic: Topic = None
    type: Types = None
    error: Annotated[str | None, Parameter(help="The exception, such as 'Timeout*'.")] = None
    reason: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="failed, rejected, undecodable, newer-version, crashed or effects-failed.",
        ),
    ] = None
    since: Annotated[str | None, Parameter(help="Died since: @-2h, ISO 8601.")] = None
    until: Annotated[str | None, Parameter(help="Died until.")] = None
    where: Condition = None

    def chosen(
        self,
        bus: Bus,
        group: str,
        where: Where | None,
        ids: tuple[str, ...] = (),
        *,
        reverse: bool = False,
    ) -> DeadLetters:
        """Return what is meant. Errors: DeclarationError."""
        filters: Found = {
            "types": self.type,
            "error": self.error,
            "reason": self.reason,
            "since": self.since,
            "until": self.until,
            "where": where,
            "reverse": reverse,
        }
        if ids:
            filters["ids"] = ids
        return bus.dead_letters(group, self.topic, **filters)

    @property
    def any(self) -> bool:
        """Whether anything is chosen at all."""
        return any((self.type, self.error, self.reason, self.since, self.until, self.where))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Which(Filters):
    """The options that choose the dead letters of which something is made."""

    everything: Annotated[bool, Parameter(name="--all", negative="", help="All there are.")] = False
    limit: Most = None

    async def fixed(
        self, bus: Bus, group: str, where: Where | None, ids: tuple[str, ...]
    ) -> DeadLetters:
        """Return what is meant, as it is now: only that is done which was agreed to.

        Errors: DeclarationError.
        """
        if not (ids or self.everything or self.any or self.limit):
            raise DeclarationError("which ones? Say ids, a filter, --limit, or --all")
        return await self.chosen(bus, group, where, ids).fixed()


_COMMON, _CONSENT, _FILTERS, _WHICH = Common(), Consent(), Filters(), Which()
GROUPS: tuple[Column, ...] = (
    ("topic", lambda r: r.topic.name),
    ("group", lambda r: r.group.group),
    ("dead letters", lambda r: r.group.dead),
    ("oldest", lambda r: age(r.group.oldest_dead_age_s)),
    ("newest", lambda r: age(r.group.newest_dead_age_s)),
)
LETTERS: tuple[Column, ...] = (
    ("id", lambda x: x.id),
    ("died", lambda x: x.died_at),
    ("type", lambda x: x.envelope.type),
    ("key", lambda x: x.envelope.key),
    ("reason", lambda x: x.reason),
    ("attempts", lambda x: x.attempts),
    ("error", lambda x: x.error.partition("\n")[0][:100]),
)


@app.command(name="ls")
async def list_dead(
    group: Name | None = None,
    /,
    *,
    limit: Limit = MOST,
    reverse: Annotated[bool, Parameter(name=("--reverse", "-r"), negative="")] = False,
    filters: Filters = _FILTERS,
    common: Common = _COMMON,
) -> None:
    """List the dead letters of a group, oldest first; without a group, how many each has.

    For example:

      bus dead ls receipts --error 'Timeout*' --since @-2h

    Parameters
    ----------
    limit
        So many at most; 0 for all.
    reverse
        The newest first.
    """
    where = predicate(filters.where)
    async with common.looking() as bus:
        if group is None:
            if filters.any:
                raise DeclarationError("of which group? Say bus dead ls GROUP")
            topics = None if filters.topic is None else [filters.topic]
            _list_groups(groups_of((await bus.inspect(topics)).topics), json=common.json)
            return
        chosen = filters.chosen(bus, group, where, reverse=reverse)
        listed = Listing(LETTERS, limit, json=common.json)
        async with aclosing(aiter(chosen)) as letters:
            async for letter in letters:
                if not listed.add(letter, letter.as_json):
                    break
    listed.show(empty="no dead letters")
    tell_unjudged(where)
    if listed.more:
        say(f"and more: --limit 0 for all, or choose (bus dead ls {group} --help)")


def _list_groups(rows: list[Row], *, json: bool) -> None:
    found = [r for r in rows if r.group.dead]
    if not json:
        show(table(found, GROUPS, empty="no dead letters"))
    for row in found if json else ():
        g = row.group
        ages = {"oldest_age_s": g.oldest_dead_age_s, "newest_age_s": g.newest_dead_age_s}
        json_line({"topic": row.topic.name, "group": g.group, "dead": g.dead, **ages})


@app.command(name="show")
async def show_one(
    group: Name, letter_id: str, /, *, topic: Topic = None, common: Common = _COMMON
) -> None:
    """Show one dead letter: the event, why it died, and where.

    Parameters
    ----------
    letter_id
        As it is listed: order:0/1763629200000-0, or the part behind the / alone.
    """
    async with common.looking() as bus:
        letter = await bus.dead_letters(group, topic).get(letter_id)
    if common.json:
        json_line(letter.as_json())
        return
    facts(
        [
            ("id", letter.id),
            ("group", letter.group),
            ("died", letter.died_at),
            ("reason", letter.reason),
            ("error", letter.error),
            ("attempts", letter.attempts),
            ("applied", "; ".join(letter.applied)),
            ("published", letter.published_at),
            ("original id", letter.original_entry_id),
        ]
    )
    pretty(letter.envelope)
    if letter.traceback:
        show("")
        show(letter.traceback)


@app.command
async def redrive(
    group: Name,
    /,
    *ids: str,
    which: Which = _WHICH,
    changes: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    edit: Annotated[bool, Parameter(negative="")] = False,
    rate: float | None = None,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> int:
    """Give dead letters back to the handler that failed, and to nobody else. It cannot be undone.

    For example:

      bus dead redrive receipts --error 'Timeout*' --limit 10
      bus dead redrive receipts order:0/1763629200000-0 --set cents=0 --app handlers

    Parameters
    ----------
    ids
        These alone.
    changes
        FIELD=VALUE, in JSON or as text: checked against the event's class (--app).
    edit
        Change one letter in $EDITOR: what is saved is the whole event.
    rate
        So many a second at most.
    """
    where, change = predicate(which.where), settings(changes)
    async with common.bus() as bus:
        letters = await which.fixed(bus, group, where, ids)
        if edit:
            change = await edited(letters, changes)
            if change is None:
                say("nothing was changed")
                return DONE
        done = await letters.redrive(edit=change, limit=which.limit, dry_run=True)
        tell_unjudged(where)
        found = _tell_found(group, ids, done.matched)
        going = done.matched - done.left_out - len(done.stuck)
        await _tell_waits(bus, group, done)
        what = f"redrive {many(going, 'dead letter')} into {group}"
        if consent.given(what, nothing=not going):
            done = await _redriven(letters, group, change, rate, which.limit, going)
        elif consent.dry_run and not common.json:
            show(table(done.sample, LETTERS))
    if common.json:
        sample = [letter.as_json() for letter in done.sample]
        counts = {n: getattr(done, n) for n in Redriven.__dataclass_fields__ if n != "sample"}
        json_line(counts, dry_run=consent.dry_run, sample=sample)
    return found


async def _redriven(
    letters: DeadLetters,
    group: str,
    edit: Edit | None,
    rate: float | None,
    limit: int | None,
    going: int,
) -> Redriven:
    with Bar(f"redrive into {group}") as bar:
        done = await letters.redrive(
            edit=edit,
            rate=rate,
            limit=limit,
            progress=lambda r: bar.at(
                min(1.0, (r.redriven + r.gone) / going),
                f"{r.redriven:,}{', waits for room' if r.waiting else ''}",
            ),
        )
    gone = f", {done.gone:,} were gone" if done.gone else ""
    say(f"redrove {many(done.redriven, 'dead letter')}{gone}")
    return done


def _tell_found(group: str, ids: tuple[str, ...], matched: int) -> int:
    """Say what is not there; return the exit code: who names letters wants to know."""
    if not matched:
        say("no dead letter like that")
    missing = len(set(ids)) - matched
    if ids and missing > 0:
        say(f"{missing:,} of the ids are no dead letters of {group}, or none like that", "yellow")
        return FAILED
    return DONE


async def _tell_waits(bus: Bus, group: str, redriven: Redriven) -> None:
    """Say what will not be handled soon, and why."""
    if redriven.stuck:
        say(
            f"{len(redriven.stuck):,} have too many fields, and stay: {redriven.stuck[0]}", "yellow"
        )
    if redriven.unserved:
        say("nobody serves the group now: they will wait in its inbox", "yellow")
    await tell_paused(bus, group, {keys.topic_of(x.stream) for x in redriven.sample})


@app.command
async def purge(
    group: Name,
    /,
    *ids: str,
    which: Which = _WHICH,
    consent: Consent = _CONSENT,
    common: Common = _COMMON,
) -> int:
    """Delete dead letters for good; `bus dead export` keeps a copy.

    Parameters
    ----------
    ids
        These alone.
    """
    where = predicate(which.where)
    async with common.bus() as bus:
        letters = await which.fixed(bus, group, where, ids)
        done = await letters.purge(limit=which.limit, dry_run=True)
        tell_unjudged(where)
        found = _tell_found(group, ids, done.matched)
        what = f"delete {many(done.matched, 'dead letter')} of {group} for good"
        if consent.given(what, nothing=not done.matched):
            done = await letters.purge(limit=which.limit)
            say(f"deleted {many(done.purged, 'dead letter')}")
        elif consent.dry_run and not common.json:
            show(table(done.sample, LETTERS))
    if common.json:
        counts: dict[str, Any] = {n: getattr(done, n) for n in ("matched", "purged", "gone")}
        json_line(counts, dry_run=consent.dry_run, sample=[x.as_json() for x in done.sample])
    return found


@app.command
async def export(
    group: Name,
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *ids: str,
    filters: Filters = _FILTERS,
    common: Common = _COMMON,
) -> int:
    """Write dead letters as JSON lines into a file, or - for stdout. They stay.

    Parameters
    ----------
    file
        It appears when it is whole, readable by its owner alone.
    ids
        These alone.
    """
    where, count = predicate(filters.where), 0
    async with common.looking() as bus:
        letters = filters.chosen(bus, group, where, ids)
        if file == "-":
            async with aclosing(aiter(letters)) as found:
                async for letter in found:
                    json_line(letter.as_json())
                    count += 1
        else:
            count = await letters.export(file)
    tell_unjudged(where)
    if file == "-":
        return _tell_found(group, ids, count)
    if common.json:
        json_line({"exported": count, "file": file})
    else:
        say(f"wrote {many(count, 'dead letter')} to {file}")
    return _tell_found(group, ids, count)
