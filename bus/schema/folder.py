"""The exported schemas: writing them, and comparing them with the classes as they are now.

One file per type and version, `document.created.v2.json`. Files of versions that have no class any
more stay: entries of those versions may be kept for long.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from bus.errors import DeclarationError
from bus.event import EventInfo, known_events, missing_steps
from bus.schema.compatibility import Problem, problems
from bus.schema.event_schema import Schema, json_schema
from bus.schema.node import Document, Facts, read_document
from bus.schema.report import Direction, Finding, Report, Severity, Who


class _Schema(NamedTuple):
    """A schema, and the file that holds it or would."""

    document: Document
    text: bytes


_Kept = dict[int, _Schema]  # exported schemas of a type, by version
_Known = dict[int, EventInfo]


class Exported(NamedTuple):
    """A file of an exported schema, and whether it was written or was up to date."""

    path: Path
    written: bool


def schemas() -> dict[str, Schema]:
    """Return the JSON Schemas of all known events, by file name.

    An event is known once the module that declares it was imported. Errors: DeclarationError if of
    a class no schema can be made.
    """
    return {_file_of(info.type, info.version): json_schema(info) for info in known_events()}


def export(folder: str | Path) -> list[Exported]:
    """Write the schemas of all known events into `folder`, and make it if it is not there.

    What is up to date is not touched, and nothing is deleted. Errors: DeclarationError, OSError.
    """
    found = schemas()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / name, _text(schema)) for name, schema in sorted(found.items())]


def check(folder: str | Path, *, for_: Direction = "both") -> Report:
    """Compare all known events with the schemas exported to `folder`, and say what breaks for whom.

    for_: "new readers" looks only at whether this code reads what was written by those schemas,
    "old readers" only at whether processes that have those schemas read what this code writes.
    Damaged files and classes of which no schema can be made are findings. Errors: OSError,
    DeclarationError for another `for_`.
    """
    if for_ not in ("both", "new readers", "old readers"):
        raise DeclarationError(f"for_ is 'both', 'new readers' or 'old readers', not {for_!r}")
    folder = Path(folder)
    findings: list[Finding] = []
    kept: dict[str, _Kept] = {}
    for file in _files(folder, findings):
        schema = _read(file, findings)
        if schema is not None:
            facts = schema.document.facts
            kept.setdefault(facts.type, {})[facts.version] = schema
    known: dict[str, _Known] = {}
    for info in known_events():
        known.setdefault(info.type, {})[info.version] = info
    if not known:
        text = "no event class is known: import the modules that declare them before the check"
        findings.append(Finding("breaks", "nobody", "", 0, "", text, str(folder)))
    for name in sorted({*kept, *known}):
        findings += _Evolution(name, kept.get(name, {}), known.get(name, {})).findings()
    asked = [f for f in findings if for_ == "both" or f.who in (for_, "both", "nobody")]
    asked.sort(key=lambda f: f.severity)
    return Report(str(folder), sum(map(len, kept.values())), tuple(asked))


def _file_of(type: str, version: int) -> str:
    return f"{type}.v{version}.json"


def _text(schema: Schema) -> bytes:
    return msgspec.json.format(msgspec.json.encode(schema, order="sorted"), indent=2) + b"\n"


def _content(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")  # git may have changed the line ends


def _write(path: Path, text: bytes) -> Exported:
    if path.exists() and _content(path) == text:
        return Exported(path, written=False)
    path.write_bytes(text)
    return Exported(path, written=True)


def _files(folder: Path, findings: list[Finding]) -> list[Path]:
    if folder.is_dir():
        return sorted(path for path in folder.glob("*.json") if path.is_file())
    text = "there is no such folder: run export and commit what it writes"
    findings.append(Finding("breaks", "nobody", "", 0, "", text, str(folder)))
    return []


def _read(file: Path, findings: list[Finding]) -> _Schema | None:
    text = _content(file)
    try:
        document = read_document(text)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        wrong = f"this is no exported schema: {error}. Restore it, or move it elsewhere"
    else:
        facts = document.facts
        if file.name == _file_of(facts.type, facts.version):
            return _Schema(document, text)
        wrong = (
            f"this is the schema of {facts.type} version {facts.version}, which belongs into"
            f" {_file_of(facts.type, facts.version)}: rename or remove it"
        )
    findings.append(Finding("breaks", "nobody", "", 0, "", wrong, file.name))
    return None


def _of_class(info: EventInfo) -> _Schema | str:
    """Return the schema of an event class, or why none can be made."""
    try:
        text = _text(json_schema(info))
    except DeclarationError as error:
        return str(error)
    return _Schema(read_document(text), text)


class _Evolution:
    """What has become of one type: its exported versions beside its classes."""

    def __init__(self, type: str, kept: _Kept, known: _Known) -> None:
        self._type = type
        self._kept = kept
        self._known = known
        self._newest = max(known, default=0)

    def findings(self) -> Iterator[Finding]:
        """Yield what there is to say about each version, older ones first."""
        for version, old in sorted(self._kept.items()):
            yield from self._of_kept(version, old)
        for version in sorted(self._known.keys() - self._kept.keys()):
            yield from self._of_new(version)
        if self._kept and self._known:
            last = self._kept[max(self._kept)].document.facts
            yield from self._of_travel(last, self._known[self._newest])

    # --- by version

    def _of_kept(self, version: int, old: _Schema) -> Iterable[Finding]:
        info = self._known.get(version)
        if version > self._newest:
            return [self._lost(version)]
        missing = missing_steps(self._type, version)
        if info is not None:
            upcast = version < self._newest and not missing
            return self._of_same(old, info, reads=not upcast)
        if not missing:
            return []  # read as the newest, by upcasts
        steps = " and ".join(self._upcast(v) for v in missing)
        text = f"entries of it that are kept cannot be read any more. Write {steps}"
        return [self._finding("breaks", "new readers", version, text)]

    def _lost(self, version: int) -> Finding:
        what = "its version was lowered" if self._known else "its class is gone (or not imported)"
        file = _file_of(self._type, version)
        text = (
            f"{what}: entries of it that are kept become dead letters (newer-version) of handlers"
            f" that ask for it. Declare it as long as entries are kept; if none are, delete {file}"
        )
        return self._finding("breaks", "new readers", version, text)

    def _of_new(self, version: int) -> Iterator[Finding]:
        info = self._known[version]
        if isinstance(schema := _of_class(info), str):
            yield self._finding("breaks", "nobody", version, schema)
        if self._kept and version > max(self._kept):
            text = (
                "is a new version: old readers park its entries until they are deployed, at most"
                " 24 hours, then dead-letter them (newer-version)"
            )
            yield self._finding("note", "old readers", version, text)
        yield self._finding("note", "nobody", version, "is not exported yet: run export")

    def _of_same(self, old: _Schema, info: EventInfo, *, reads: bool) -> Iterable[Finding]:
        """Compare an exported schema with the class of the same version.

        reads: whether that class reads the entries; otherwise it is only written, if at all.
        """
        new = _of_class(info)
        if isinstance(new, str):
            return [self._finding("breaks", "nobody", info.version, new)]
        mine, theirs = new.document, old.document
        new_readers = problems(mine, theirs, reader_is_new=True) if reads else []
        old_readers = problems(theirs, mine, reader_is_new=False)
        found = [*self._merged(info.version, new_readers, old_readers)]
        if new.text != old.text and all(f.severity == "note" for f in found):
            text = "the exported schema is not up to date: run export"
            found.append(self._finding("note", "nobody", info.version, text))
        return found

    def _merged(
        self, version: int, new_readers: list[Problem], old_readers: list[Problem]
    ) -> Iterator[Finding]:
        """Yield findings; what concerns both kinds of readers in the same words is one."""
        same = {(p.path, p.text) for p in new_readers} & {(p.path, p.text) for p in old_readers}
        for problem in new_readers:
            both = (problem.path, problem.text) in same
            yield self._of_problem(version, "both" if both else "new readers", problem)
        for problem in old_readers:
            if (problem.path, problem.text) not in same:
                yield self._of_problem(version, "old readers", problem)

    def _of_problem(self, version: int, who: Who, problem: Problem) -> Finding:
        remedies = [problem.remedy] if problem.remedy else []
        if problem.breaks and version == self._newest:
            step = self._upcast(version)
            remedies.append(f"raise version to {version + 1} and write {step}")
        elif problem.breaks:
            remedies.append(f"leave the class of version {version} as it was")
        remedy = ", or ".join(remedies)
        return self._finding(
            "breaks" if problem.breaks else "note",
            who,
            version,
            f"{problem.text}. {remedy[:1].upper()}{remedy[1:]}",
            problem.path,
        )

    # --- how it travels

    def _of_travel(self, was: Facts, info: EventInfo) -> Iterator[Finding]:
        if was.key != info.key:
            text = (
                f"key was {was.key}, is now {info.key}: later events may lie in other partitions"
                " than earlier ones, and are not ordered after them; wait until those are handled"
                " if that matters"
            )
            yield self._finding("note", "both", info.version, text)
        if was.topic != info.topic:
            text = (
                f"topic was {was.topic}, is now {info.topic}: old readers do not look there, and"
                f" what lies unhandled in {was.topic} is read no more. Keep topic={was.topic!r}, or"
                f" let handlers read both (topics=[{was.topic!r}, {info.topic!r}]) and deploy them"
                " first"
            )
            yield self._finding("breaks", "both", info.version, text)
        if was.encoding != info.encoding:
            text = (
                f"encoding was {was.encoding}, is now {info.encoding}: readers of this library take"
                " both; others may not"
            )
            yield self._finding("note", "nobody", info.version, text)

    def _upcast(self, from_version: int) -> str:
        name = self._known[self._newest].cls.__qualname__
        return f"@upcast({name}, from_version={from_version})"

    def _finding(
        self, severity: Severity, who: Who, version: int, text: str, path: str = ""
    ) -> Finding:
        file = _file_of(self._type, version)
        return Finding(severity, who, self._type, version, path, text, file)
