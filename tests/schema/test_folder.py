"""Schemas in files, and what a check of them says about a changed program."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bus import DeclarationError, Event, event, upcast
from bus.schema import Finding, Report, check, export, schemas

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORGOTTEN = ("_known", "_steps", "_readers")


@pytest.fixture(autouse=True)
def own_register(monkeypatch):
    """Nothing is known but what a test declares."""
    for register in FORGOTTEN:
        monkeypatch.setattr(event, register, {})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "schemas"


class Line(msgspec.Struct, frozen=True):
    sku: str
    price: int


def created(fields: dict[str, Any] | None = None, **travel: Any) -> type[Event]:
    """Declare the class of `doc.created`, with an id and these fields, as one program would."""
    travel = {"version": 2, "key": "id", **travel}
    annotations = {"id": str, **(fields or {})}
    defaults = {name: of[1] for name, of in annotations.items() if isinstance(of, tuple)}
    types = {name: of[0] if isinstance(of, tuple) else of for name, of in annotations.items()}
    body = {"__module__": __name__, "__annotations__": types, **defaults}
    return event.EventMeta("Created", (Event,), body, type="doc.created", **travel)  # type: ignore[return-value]


def next_program() -> None:
    """Forget every class and step, as in a process that runs the next release."""
    for register in FORGOTTEN:
        getattr(event, register).clear()


def told(report: Report) -> list[tuple[str, str, str]]:
    return [(f.severity, f.who, f.path) for f in report.findings]


# --- files


def test_a_file_for_each_type_and_version(folder):
    created({"title": str}, version=1)
    created({"title": str, "lines": list[Line]})
    assert list(schemas()) == ["doc.created.v1.json", "doc.created.v2.json"]
    written = export(folder)
    assert written == [(folder / name, True) for name in schemas()]
    text = (folder / "doc.created.v2.json").read_text()
    assert text.startswith('{\n  "$defs": {\n    "Line": {\n      "properties": {')
    assert text.endswith("\n}\n")
    assert msgspec.json.decode(text) == schemas()["doc.created.v2.json"]
    assert all(line == line.rstrip() for line in text.splitlines())


def test_what_is_up_to_date_is_not_touched(folder):
    created()
    export(folder)
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns
    assert export(str(folder)) == [(file, False)]
    assert file.stat().st_mtime_ns == before
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert export(folder) == [(file, False)], "git on Windows has changed the line ends"
    assert check(folder).findings == ()


def test_older_versions_stay_in_the_folder(folder):
    created(version=1)
    export(folder)
    next_program()
    created(version=2)
    assert [w.path.name for w in export(folder)] == ["doc.created.v2.json"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "doc.created.v1.json",
        "doc.created.v2.json",
    ]


def test_a_class_of_which_no_schema_can_be_made(folder):
    """Export stops before it writes anything; a check says so and goes on."""
    created()
    export(folder)
    before = (folder / "doc.created.v2.json").read_bytes()
    next_program()
    created({"odd": complex})
    created({"odd": complex}, version=3)
    with pytest.raises(DeclarationError, match=r"Created: no schema of doc\.created version 2 can"):
        export(folder)
    assert (folder / "doc.created.v2.json").read_bytes() == before
    report = check(folder)
    assert not report.ok
    assert [f.version for f in report.findings if "no schema of" in f.text] == [2, 3]


# --- one version


def test_nothing_has_changed(folder):
    created({"lines": list[Line], "at": datetime})
    export(folder)
    report = check(folder)
    assert report.ok
    assert report.findings == ()
    assert str(report) == f"1 schema in {folder}: nothing breaks"


def test_what_changes_for_whom(folder):
    created({"title": str, "weight": bool, "at": str, "pages": int, "gone": int})
    export(folder)
    next_program()
    created({"title": str, "weight": float, "at": datetime, "pages": float, "lang": str})
    report = check(folder)
    assert not report.ok
    assert told(report) == [
        ("breaks", "new readers", "at"),
        ("breaks", "new readers", "lang"),
        ("breaks", "both", "weight"),
        ("breaks", "old readers", "gone"),
        ("breaks", "old readers", "pages"),
    ]
    weight = next(f for f in report.findings if f.path == "weight")
    assert weight == Finding(
        severity="breaks",
        who="both",
        type="doc.created",
        version=2,
        path="weight",
        text="was boolean, is now number."
        " Raise version to 3 and write @upcast(Created, from_version=2)",
        file="doc.created.v2.json",
    )
    lang = next(f for f in report.findings if f.path == "lang")
    assert lang.text == (
        "is new and has no default: entries written before lack it. Give it a default,"
        " or raise version to 3 and write @upcast(Created, from_version=2)"
    )


@pytest.mark.parametrize(
    ("for_", "paths"),
    [
        ("both", {"at", "lang", "pages", "weight"}),
        ("new readers", {"at", "lang", "weight"}),
        ("old readers", {"pages", "weight"}),
    ],
)
def test_one_direction_alone(folder, for_, paths):
    created({"weight": bool, "at": str, "pages": int})
    export(folder)
    next_program()
    created({"weight": float, "at": datetime, "pages": float, "lang": str})
    assert {f.path for f in check(folder, for_=for_).findings} == paths


def test_only_known_directions(folder):
    with pytest.raises(DeclarationError, match="for_ is 'both', 'new readers' or 'old readers'"):
        check(folder, for_="new")  # type: ignore[arg-type]


def test_a_harmless_change_is_to_be_exported(folder):
    created({"title": str})
    export(folder)
    next_program()
    created({"title": str, "lang": (str, "en")})
    report = check(folder)
    assert report.ok
    assert told(report) == [("note", "nobody", "")]
    assert "is not up to date: run export" in report.findings[0].text
    export(folder)
    assert check(folder).findings == ()


def test_a_rename_that_breaks_nothing_is_a_note(folder):
    created({"name": (str, "")})
    export(folder)
    next_program()
    created({"title": (str, "")})
    report = check(folder)
    assert report.ok
    assert ("note", "new readers", "title") in told(report)


# --- how it travels


def test_another_key_is_a_note(folder):
    created({"shelf": str})
    export(folder)
    next_program()
    created({"shelf": str}, key="shelf")
    report = check(folder)
    assert report.ok
    assert ("note", "both", "") in told(report)
    assert "key was id, is now shelf: later events may lie in other partitions" in str(report)


def test_another_topic_breaks_both(folder):
    created()
    export(folder)
    next_program()
    created(topic="paper")
    report = check(folder)
    assert told(report)[0] == ("breaks", "both", "")
    assert "topic was doc, is now paper: old readers do not look there" in str(report)
    assert "Keep topic='doc', or let handlers read both (topics=['doc', 'paper'])" in str(report)


def test_another_encoding_is_a_note_unless_its_types_matter(folder):
    created({"title": str})
    export(folder)
    next_program()
    created({"title": str}, encoding="msgpack")
    report = check(folder)
    assert report.ok
    assert "encoding was json, is now msgpack" in str(report)
    next_program()
    created({"title": str, "raw": (bytes, b"")})
    export(folder)
    next_program()
    created({"title": str, "raw": (str, "")}, encoding="msgpack")
    assert ("breaks", "both", "raw") not in told(check(folder))
    assert ("breaks", "old readers", "raw") in told(check(folder))


# --- versions


def test_a_raised_version_needs_steps_from_all_before_it(folder):
    created(version=1)
    created({"title": str}, version=2)
    export(folder)
    next_program()
    cls = created({"heading": str}, version=3)
    report = check(folder)
    breaks = [f for f in report.findings if f.severity == "breaks"]
    assert [(f.who, f.version) for f in breaks] == [("new readers", 1), ("new readers", 2)]
    assert breaks[0].text.endswith(
        "Write @upcast(Created, from_version=1) and @upcast(Created, from_version=2)"
    )
    assert breaks[1].text.endswith("Write @upcast(Created, from_version=2)")

    upcast(cls, from_version=2)(dict)
    assert [f.version for f in check(folder).findings if f.severity == "breaks"] == [1]
    upcast(cls, from_version=1)(dict)
    report = check(folder)
    assert report.ok
    assert told(report) == [("note", "old readers", ""), ("note", "nobody", "")]
    assert "old readers park its entries until they are deployed, at most 24 hours" in str(report)
    assert check(folder, for_="new readers").findings == report.findings[1:]
    export(folder)
    assert check(folder).findings == ()


def test_a_class_kept_beside_the_newer_one_reads_its_own_entries(folder):
    """And only if no steps lead past it; then it is at most written."""
    created({"pages": int}, version=1)
    export(folder)
    next_program()
    created({"pages": int}, version=1)
    newest = created({"leaves": int}, version=2)
    assert check(folder).ok

    next_program()
    created({"pages": int, "lang": str}, version=1)
    newest = created({"leaves": int}, version=2)
    (finding,) = (f for f in check(folder).findings if f.severity == "breaks")
    assert (finding.who, finding.version, finding.path) == ("new readers", 1, "lang")
    assert finding.text.endswith("or leave the class of version 1 as it was")
    upcast(newest, from_version=1)(dict)
    assert check(folder).ok

    next_program()
    created({}, version=1)
    newest = created({"leaves": int}, version=2)
    upcast(newest, from_version=1)(dict)
    (finding,) = (f for f in check(folder).findings if f.severity == "breaks")
    assert (finding.who, finding.version, finding.path) == ("old readers", 1, "pages")


def test_a_lowered_version_loses_what_is_kept(folder):
    created(version=1)
    created({"title": str}, version=2)
    export(folder)
    next_program()
    created(version=1)
    report = check(folder)
    assert told(report) == [("breaks", "new readers", "")]
    (finding,) = report.findings
    assert finding.version == 2
    assert "its version was lowered" in finding.text
    assert finding.text.endswith("if none are, delete doc.created.v2.json")


def test_a_class_that_is_gone_loses_what_is_kept(folder):
    created()
    export(folder)
    next_program()

    class Unrelated(Event, type="other.thing"):
        pass

    report = check(folder)
    assert told(report)[0] == ("breaks", "new readers", "")
    assert "its class is gone (or not imported)" in report.findings[0].text
    (folder / "doc.created.v2.json").unlink()
    assert check(folder).ok


def test_a_new_type_is_to_be_exported(folder):
    folder.mkdir()
    created()
    report = check(folder)
    assert report.ok
    assert told(report) == [("note", "nobody", "")]
    assert report.findings[0].text == "is not exported yet: run export"


# --- folders and files that are not what they should be


def damage(file: Path, how: Callable[[bytes], bytes]) -> None:
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda text: text[:-20], "truncated"),
        (lambda _: b"", "truncated"),
        (lambda _: b"[]", "Expected `object`"),
        (lambda _: b'{"type":"object"}', "missing required field `x-bus`"),
        (lambda text: b"\xff" + text, "malformed"),
        (lambda text: text.replace(b'"string"', b'"strong"'), "Invalid enum value 'strong'"),
        (lambda text: text.replace(b"#/$defs/Line", b"#/$defs/Lane"), "which it does not have"),
        (lambda _: b'{"a":' * 100_000, ""),
    ],
    ids=["cut", "empty", "a list", "foreign", "no UTF-8", "bad type", "bad ref", "deep"],
)
def test_a_damaged_file_is_a_finding_of_its_own(folder, how, says):
    created({"lines": list[Line]})
    export(folder)
    damage(folder / "doc.created.v2.json", how)
    report = check(folder)
    assert not report.ok
    first = report.findings[0]
    assert (first.severity, first.who, first.type) == ("breaks", "nobody", "")
    assert first.file == "doc.created.v2.json"
    assert first.text.startswith("this is no exported schema: ")
    assert says in first.text
    assert first.text.endswith("Restore it, or move it elsewhere")


def test_a_file_under_another_name_is_a_finding(folder):
    created()
    export(folder)
    (folder / "doc.created.v2.json").rename(folder / "doc.changed.v2.json")
    (folder / "README.md").write_text("not ours, and not JSON")
    (folder / "sub.json").mkdir()
    report = check(folder)
    assert "BREAKS: doc.changed.v2.json: this is the schema of doc.created version 2" in str(report)
    assert "belongs into doc.created.v2.json" in str(report)


def test_no_folder_is_not_nothing_to_compare(folder):
    created()
    report = check(folder)
    assert not report.ok
    assert "there is no such folder: run export" in str(report)


def test_no_class_at_all_is_a_program_that_forgot_its_imports(folder):
    folder.mkdir()
    report = check(folder)
    assert not report.ok
    assert "no event class is known: import the modules that declare them" in str(report)


# --- what a report is


def test_a_report_reads_well_in_a_log(folder):
    created({"lines": list[Line], "at": str})
    export(folder)
    next_program()
    changed = msgspec.defstruct("Line", [("sku", str), ("price", bool)])
    created({"lines": list[changed], "at": str}, key="at")
    assert str(check(folder)) == (
        "BREAKS old and new readers: doc.created version 2, lines[].price: was integer, is now"
        " boolean. Raise version to 3 and write @upcast(Created, from_version=2)\n"
        "note old and new readers: doc.created version 2: key was id, is now at: later events may"
        " lie in other partitions than earlier ones, and are not ordered after them; wait until"
        " those are handled if that matters\n"
        f"1 schema in {folder}: 1 breaks, 1 note"
    )


def test_findings_are_values(folder):
    created()
    report = check(folder)
    assert report == check(folder)
    assert hash(report.findings[0]) == hash(check(folder).findings[0])
    with pytest.raises(FrozenInstanceError):
        report.findings[0].text = ""  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        report.folder = ""  # type: ignore[misc]
