"""What a comparison of schemas has found, as values and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Severity = Literal["breaks", "note"]
Who = Literal["old readers", "new readers", "both", "nobody"]
Direction = Literal["both", "new readers", "old readers"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a change breaks, or that one should know of it.

    severity: "breaks" or "note". who: "new readers" are this code, which reads what the exported
    schemas wrote; "old readers" are processes not deployed yet, which read what this code writes.
    type, version: of the event; "" and 0 if it is about a file or folder. path: of the field, such
    as `lines[].price`; "" for the event itself. text: what has changed and what can be done.
    file: the exported schema.
    """

    severity: Severity
    who: Who
    type: str
    version: int
    path: str
    text: str
    file: str

    def __str__(self) -> str:
        told = self.severity.upper() if self.severity == "breaks" else self.severity
        whom = "" if self.who == "nobody" else f" {_WHOM[self.who]}"
        where = f"{self.type} version {self.version}" if self.type else self.file
        return f"{told}{whom}: {where}{self.path and f', {self.path}'}: {self.text}"


_WHOM = {"both": "old and new readers", "old readers": "old readers", "new readers": "new readers"}


@dataclass(frozen=True, slots=True)
class Report:
    """The findings of a check, those that break something first. Printed, it is for a CI log."""

    folder: str
    compared: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing breaks."""
        return not any(self._breaks())

    def _breaks(self) -> Iterator[Finding]:
        return (f for f in self.findings if f.severity == "breaks")

    def __str__(self) -> str:
        breaks = len([*self._breaks()])
        notes = len(self.findings) - breaks
        end = f"{breaks or 'nothing'} break{'s' if breaks < 2 else ''}"  # noqa: PLR2004 - plural
        if notes:
            end += f", {notes} note{'s' if notes > 1 else ''}"
        files = f"{self.compared} schema{'s' if self.compared != 1 else ''}"
        return "\n".join([*map(str, self.findings), f"{files} in {self.folder}: {end}"])
