"""One thing that is wrong, or worth knowing, and the command that mends it. Pure values."""

import shlex
from dataclasses import dataclass
from typing import Literal

from bus.errors import DeclarationError
from bus.streams.address import Address, parse_url

# problem: events are lost, refused or not handled, now or as soon as something fails. warning: that
# is where it leads. note: good to know.
Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found.

    check: what was looked for, a short name. text: a sentence, with the numbers. mend: the command
    line that mends it, or shows what must be decided first; only a note may have none.
    topic, group, stream, consumer: where it is, as far as it is of one.
    """

    check: str
    severity: Severity
    text: str
    mend: str = ""
    topic: str | None = None
    group: str | None = None
    stream: str | None = None
    consumer: str | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}" + (f"\n  {self.mend}" if self.mend else "")


def placed(finding: Finding) -> tuple[int, str, str, str]:
    """Return by what findings are sorted: the gravest first, those of the server before others."""
    grade = SEVERITIES.index(finding.severity)
    return grade, finding.topic or "", finding.group or "", finding.stream or ""


def bus(command: str, *names: str, group: str = "", topic: str = "", options: str = "") -> str:
    """Return a line for `bus`; names are quoted for a shell."""
    said = [quoted(name) for name in names]
    more = [f"--group{'=' if group.startswith('-') else ' '}{quoted(group)}"] if group else []
    more += [options] if options else []
    more += [f"--topic {quoted(topic)}"] if topic else []
    if any(name.startswith("-") for name in names):  # no option
        return " ".join([f"bus {command}", *more, "--", *said])
    return " ".join([f"bus {command}", *said, *more])


def redis_cli(address: str, *words: str, user: str = "") -> str:
    """Return a line for `redis-cli` that goes to the server at an address, as `Bus.address` has it.

    user: who else is to do it; "" for the one of the address. His password is asked for: it stands
    in no command line.
    """
    where = address_of(address)
    line = ["redis-cli"]
    if where.scheme == "unix":
        line += ["-s", where.path]
    elif where.host not in ("localhost", "127.0.0.1"):
        line += ["-h", where.host]
    if where.scheme != "unix" and where.port != 6379:  # noqa: PLR2004 - the port of Redis
        line += ["-p", str(where.port)]
    if where.db:
        line += ["-n", str(where.db)]
    if where.scheme == "rediss":
        line.append("--tls")
    if user or where.password:
        line += ["--user", user or where.username or "default", "--askpass"]
    return " ".join(map(quoted, (*line, *words)))


def address_of(address: str) -> Address:
    """Return the parts of `Bus.address`."""
    try:
        return parse_url(address)
    except DeclarationError:  # a name in it has what a URL would have to quote
        return Address("redis")


def quoted(word: str) -> str:
    """Return a word as a shell takes it, without what a terminal would obey."""
    return shlex.quote(printable(word))


def printable(text: str) -> str:
    r"""Return a text that others gave, with `\x1b` for the bytes of what a terminal would obey."""
    return "".join(c if c.isprintable() else _bytes_of(c) for c in text)


def _bytes_of(character: str) -> str:
    one = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", one))


def counted(number: int, what: str, *, at_least: bool = False) -> str:
    """Return "1 entry", "12,034 entries", "more than 1,000 entries"."""
    many = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    more = "more than " if at_least else ""
    return f"{more}{number:,} {what if number == 1 and not at_least else many}"
