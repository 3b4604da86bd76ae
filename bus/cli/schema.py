"""`bus schema`: the schemas of events, listed, exported, checked."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from bus.cli.options import Apps, Json, import_apps
from bus.cli.output import Column, json_line, line, say, show, table
from bus.errors import DeclarationError
from bus.event import EventInfo, known_events
from bus.schema import check, export

app = App(
    name="schema", help="Schemas of events: list, export, check a change.", help_format="plaintext"
)
COLUMNS: tuple[Column, ...] = (
    ("type", lambda i: i.type),
    ("version", lambda i: str(i.version)),
    ("topic", lambda i: i.topic),
    ("key", lambda i: i.key),
    ("encoding", lambda i: i.encoding),
    ("class", lambda i: f"{i.cls.__module__}.{i.cls.__qualname__}"),
)
BREAKS = 1


def _known(apps: list[str] | None) -> list[EventInfo]:
    import_apps(apps)
    found = known_events()
    if not found:
        raise DeclarationError("no event class is known: say --app PACKAGE, which is imported")
    return found


@app.command(name="ls")
def list_schemas(*, app: Apps = None, json: Json = False) -> None:
    """List the event classes of an application."""
    found = _known(app)
    if not json:
        show(table(found, COLUMNS))
    for info in found if json else ():
        said = {
            name: getattr(info, name) for name in ("type", "version", "topic", "key", "encoding")
        }
        json_line({**said, "class": f"{info.cls.__module__}.{info.cls.__qualname__}"})


@app.command(name="export")
def export_schemas(
    folder: Path = Path("schemas"), /, *, app: Apps = None, json: Json = False
) -> None:
    """Write the JSON Schema of every event into a folder, to be committed.

    What is up to date is not touched, and nothing is deleted.
    """
    _known(app)
    for file in export(folder):
        if json:
            json_line({"file": str(file.path), "written": file.written})
        else:
            line((str(file.path), ""), ("written" if file.written else "up to date", "dim"))


@app.command(name="check")
def check_schemas(
    folder: Path = Path("schemas"),
    /,
    *,
    readers: Literal["both", "new", "old"] = "both",
    app: Apps = None,
    json: Json = False,
) -> int:
    """Compare the event classes with the schemas that were committed; 1 if something breaks.

    For example, in CI:

      bus schema check --app handlers

    Parameters
    ----------
    readers
        What to look at: whether this code reads what was written (new), whether what is deployed
        reads what this code writes (old), or both.
    """
    _known(app)
    direction: Literal["both", "new readers", "old readers"] = (
        "both" if readers == "both" else "new readers" if readers == "new" else "old readers"
    )
    report = check(folder, for_=direction)
    if json:
        for finding in report.findings:
            json_line(finding)
    else:
        show(str(report))
    if not report.ok:
        say("something breaks", "red")
    return 0 if report.ok else BREAKS
