"""How events are chosen and shown."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from bus.cli.output import facts, json_line, json_text, line, say, show
from bus.cli.where import Where
from bus.envelope import Envelope, entry_time
from bus.history.document import document_of
from bus.streams.keys import tag_of

Types = Annotated[
    list[str] | None,
    Parameter(name="--type", negative="", help="Type or pattern, 'order.*'; may be said again."),
]
Condition = Annotated[
    str | None, Parameter(name="--where", help="An expression, such as 'data.cents > 1000'.")
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options of commands that look at events."""

    type: Types = None
    key: Annotated[str | None, Parameter(help="The partition key.")] = None
    where: Condition = None

    def predicate(self) -> Where | None:
        """Return what `where` says. Errors: DeclarationError."""
        return predicate(self.where)


def predicate(where: str | None) -> Where | None:
    """Return what --where says. Errors: DeclarationError."""
    return None if where is None else Where(where)


def tell_unjudged(where: Where | None) -> None:
    """Say of how many events nobody knows whether they were meant, and count anew."""
    if where is not None and where.failed:
        say(f"--where could not be judged of {where.failed:,} events: {where.why}", "yellow")
        where.failed = 0


def document(envelope: Envelope) -> dict[str, Any]:
    """Return an envelope as a JSON document."""
    place = {"id": id_of(envelope), "stream": envelope.stream, "entry_id": envelope.entry_id}
    return {**place, **document_of(envelope)}


def id_of(envelope: Envelope) -> str:
    """Return where an event lies, as people write it: `order:0/1763629200000-0`."""
    return f"{tag_of(envelope.stream)}/{envelope.entry_id}"


def payload(envelope: Envelope) -> str:
    """Return the event as text in one line: JSON, or what it is in base64 where it is none."""
    said = document_of(envelope)
    if "data" in said:
        return json_text(said["data"])
    return f"base64:{said['data_base64']}"


def pretty(envelope: Envelope) -> None:
    """Show an event and all that travels with it."""
    said = document(envelope)
    data = said.pop("data", None)
    in_base64 = said.pop("data_base64", None)
    facts((name.replace("_", " "), value) for name, value in said.items() if name != "id")
    show(json_text(data, indent=2) if in_base64 is None else in_base64)


def show_envelope(envelope: Envelope, *, json: bool) -> None:
    """Show one event in one line."""
    if json:
        json_line(document(envelope))
        return
    appended = f"{entry_time(envelope.entry_id):%Y-%m-%d %H:%M:%S.%f}"[:-3]
    version = "" if envelope.version == 1 else f" v{envelope.version}"
    line(
        (f"{appended}Z", "dim"),
        (id_of(envelope), "dim"),
        (f"{envelope.type}{version}", "cyan"),
        (envelope.key or "", "yellow"),
        (payload(envelope), ""),
    )
