"""`bus history`: what happened, one line each."""

from contextlib import aclosing
from typing import Annotated

from cyclopts import Parameter

from bus.cli.entries import Choice, show_envelope, tell_unjudged
from bus.cli.options import Common
from bus.cli.output import Most

_COMMON, _CHOICE = Common(), Choice()


async def history(
    topic: str,
    /,
    *,
    since: str = "start",
    until: str = "end",
    limit: Most = None,
    reverse: Annotated[bool, Parameter(name=("--reverse", "-r"), negative="")] = False,
    choice: Choice = _CHOICE,
    common: Common = _COMMON,
) -> None:
    """Look back at a topic, oldest first, over all its partitions. No group notices.

    For example:

      bus history order --since @-2h --type order.paid --where 'data.cents > 1000'
      bus history order --reverse --limit 10

    Parameters
    ----------
    since, until
        Both included: start, end, an entry id, milliseconds, ISO 8601, or @-2h.
    limit
        So many events.
    reverse
        The newest first.
    """
    where = choice.predicate()
    async with common.looking() as bus:
        past = bus.history(
            topic,
            since,
            until,
            choice.type,
            key=choice.key,
            where=where,
            limit=limit,
            reverse=reverse,
        )
        async with aclosing(past) as envelopes:
            async for envelope in envelopes:
                show_envelope(envelope, json=common.json)
    tell_unjudged(where)
