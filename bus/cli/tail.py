"""`bus tail`: what comes, one line each, until Ctrl-C."""

import asyncio
from typing import Annotated

from cyclopts import Parameter

from bus.cli.entries import Choice, show_envelope, tell_unjudged
from bus.cli.lengths import seconds
from bus.cli.options import Common
from bus.cli.output import Most

_COMMON, _CHOICE = Common(), Choice()


async def tail(
    topics: Annotated[tuple[str, ...], Parameter(name="topic", negative="")],
    /,
    *,
    since: str = "end",
    limit: Most = None,
    until_idle: Annotated[str | None, Parameter()] = None,
    choice: Choice = _CHOICE,
    common: Common = _COMMON,
) -> None:
    """Follow topics: what comes, or from any point on; connections that drop lose nothing.

    For example:

      bus tail order user --type 'order.*'
      bus tail order --since @-10m --where 'data.cents > 1000' --json

    Parameters
    ----------
    topics
        One topic or several.
    since
        start, end, an entry id (what comes after it), milliseconds, ISO 8601, or @-10m.
    limit
        So many events, then it ends.
    until_idle
        End when nothing came for so long, such as 5s.
    """
    idle_s = None if until_idle is None else seconds(until_idle, "--until-idle")
    where, shown = choice.predicate(), 0
    async with common.looking() as bus:
        follow = bus.tail(topics, after=since, types=choice.type, key=choice.key, where=where)
        try:
            async with follow as tail:
                while limit is None or shown < limit:
                    async with asyncio.timeout(idle_s):
                        envelope = await anext(tail)
                    show_envelope(envelope, json=common.json)
                    shown += 1
        except TimeoutError:
            pass
        finally:
            tell_unjudged(where)
