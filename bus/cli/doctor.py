"""`bus doctor`: what is wrong, and what mends it."""

from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from bus.admin.diagnosis import Diagnosis
from bus.admin.doctor import EXAMINED_ROLES
from bus.admin.finding import SEVERITIES
from bus.cli.codes import DONE, FAILED, UNREACHABLE
from bus.cli.options import Common
from bus.cli.output import json_line, many, out, printable, show

_COMMON = Common()
STYLES = {"problem": "bold red", "warning": "yellow", "note": "dim"}


async def doctor(
    *,
    role: Annotated[list[str] | None, Parameter(negative="")] = None,
    common: Common = _COMMON,
) -> int:
    """Look for whatever is wrong with server, topics and groups, and say what mends it.

    It only looks. Exit codes: 0 nothing but notes, 1 there are problems or warnings, 69 the server
    cannot be used at all.

    Parameters
    ----------
    role
        Judge the rights of the user for this role of docs/wire.md; may be said again.
    """
    async with common.looking() as bus:
        found = await bus.admin.examine(tuple(role) if role else EXAMINED_ROLES)
    if common.json:
        json_line(found, ok=found.ok)
    else:
        _show(found)
    if found.server is None and not found.ok:
        return UNREACHABLE
    return DONE if found.ok else FAILED


def _show(diagnosis: Diagnosis) -> None:
    server = diagnosis.server
    kind = "" if server is None else f", {server.kind} {server.version}"
    show(f"{diagnosis.address}{kind}")
    for feature in diagnosis.features:
        if feature.found is None:  # of what is not there, a finding says so
            said = f"whether the server has {feature.name} could not be seen: without, "
            _line("dim", "feature", said + feature.without)
    for finding in diagnosis.findings:
        _line(STYLES[finding.severity], finding.severity, finding.text)
        if finding.mend:
            out().print(Text(f"         {printable(finding.mend)}", style="cyan"), soft_wrap=True)
    counts = [many(len(diagnosis.of(s)), s) for s in SEVERITIES if diagnosis.of(s)]
    show(", ".join(counts) or "nothing is wrong")


def _line(style: str, grade: str, text: str) -> None:
    said = Text.assemble((grade.ljust(9), style), printable(text))
    out().print(said, soft_wrap=True)
