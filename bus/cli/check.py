"""`bus check`: numbers compared with limits, in the words and exit codes of monitors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import App, Parameter

from bus.admin.checks import CheckName
from bus.admin.exposition import nagios, prometheus
from bus.cli.groups import Topics
from bus.cli.options import Common
from bus.cli.output import json_line, printable

app = App(
    name="check",
    help="Compare with limits. Exit codes: 0 ok, 1 warning, 2 critical, 3 unknown.",
    help_format="plaintext",
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Limits:
    """The options of all checks."""

    group: Annotated[
        list[str] | None, Parameter(negative="", help="This group; may be said again.")
    ] = None
    topic: Topics = None
    warn: Annotated[
        str | None, Parameter(name=("--warn", "-w"), help="1000 entries, or an age: 5m, 2h.")
    ] = None
    crit: Annotated[str | None, Parameter(name=("--crit", "-c"), help="Likewise.")] = None
    format: Annotated[
        Literal["text", "json", "prometheus"],
        Parameter(help="A line for Nagios, a JSON document, or metrics."),
    ] = "text"


_COMMON, _LIMITS = Common(), Limits()


async def _check(name: CheckName, limits: Limits, common: Common) -> int:
    async with common.looking() as bus:
        checked = await bus.admin.check(
            name,
            topics=limits.topic,
            groups=limits.group,
            warn=limits.warn,
            crit=limits.crit,
        )
    if common.json or limits.format == "json":
        json_line(checked)
    else:
        said = nagios(checked) if limits.format == "text" else prometheus(checked)
        print(printable(said.rstrip("\n"), lines=True))  # noqa: T201 - the words of others
    return int(checked.status)


@app.command
async def lag(*, limits: Limits = _LIMITS, common: Common = _COMMON) -> int:
    """Entries that groups were not given, or how old the oldest of them is; by default 60s, 300s.

    For example:

      bus check lag --group receipts --warn 5m --crit 1h
      bus check lag --warn 10000 --format prometheus
    """
    return await _check("lag", limits, common)


@app.command
async def pending(*, limits: Limits = _LIMITS, common: Common = _COMMON) -> int:
    """Entries that were given out and are not finished, or their age; by default 5m, 1h."""
    return await _check("pending", limits, common)


@app.command
async def dead(*, limits: Limits = _LIMITS, common: Common = _COMMON) -> int:
    """Dead letters; by default one is a warning."""
    return await _check("dead", limits, common)


@app.command
async def workers(*, limits: Limits = _LIMITS, common: Common = _COMMON) -> int:
    """Workers that live and serve a group: fewer are worse; by default none is critical."""
    return await _check("workers", limits, common)
