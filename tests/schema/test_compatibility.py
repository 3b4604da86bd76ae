"""Whether the comparison of schemas agrees with what msgspec does."""

from __future__ import annotations

import dataclasses
import enum
import gc
import os
import subprocess
import sys
from collections import Counter
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Meta, Struct, UnsetType, defstruct, field

from bus.event import EventInfo
from bus.schema.compatibility import Problem, problems
from bus.schema.event_schema import json_schema
from bus.schema.node import Document, read_document
from tests.schema.shapes import (
    Colour,
    Level,
    MoreColours,
    MoreRights,
    Rights,
    built,
    changed_struct,
    struct_plans,
)

ROOT = Path(__file__).parents[2]
CODECS: dict[str, Any] = {"json": msgspec.json, "msgpack": msgspec.msgpack}


def document(cls: Any, encoding: Any = "json") -> Document:
    """The schema of a class as it comes out of its file."""
    info = EventInfo(cls, "compat.probe", 1, None, "compat", encoding)
    return read_document(msgspec.json.encode(json_schema(info)))


def found(
    reader: Any, writer: Any, encoding: str = "json", *, reader_is_new: bool = True
) -> list[Problem]:
    return problems(
        document(reader, encoding), document(writer, encoding), reader_is_new=reader_is_new
    )


def breaks(*args: Any, **named: Any) -> list[Problem]:
    return [p for p in found(*args, **named) if p.breaks]


def decodes(codec: Any, entry: bytes, cls: Any) -> bool:
    try:
        codec.decode(entry, type=cls)
    except msgspec.ValidationError:
        return False
    return True


# --- any classes


@st.composite
def evolutions(draw: Any) -> tuple[Any, Any, list[Any]]:
    """Draw a class, a changed one, and values of the first."""
    plan = draw(struct_plans(2, event=True))
    writer = draw(built(plan))
    reader = draw(built(draw(changed_struct(plan, 2)), array_like=False))
    return writer.type, reader.type, [draw(writer.values) for _ in range(3)]


def of_an_older_class(codec: Any, entry: bytes, writer: Any, data: Any) -> bytes:
    """Leave out some fields that have a default by now, as a class without them would have."""
    fields = codec.decode(entry)
    required = {f.encode_name for f in msgspec.structs.fields(writer) if f.required}
    spare = sorted(fields.keys() - required)
    gone = data.draw(st.sets(st.sampled_from(spare))) if spare else set()
    return codec.encode({name: value for name, value in fields.items() if name not in gone})


def search(examples: int) -> Counter[tuple[str, bool]]:
    """Compare random classes; return how often the check and the decoder said what."""
    tally: Counter[tuple[str, bool]] = Counter()

    # The same examples each time: what it is to find new, it is to find with more of them.
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(evolutions(), st.sampled_from(["json", "msgpack"]), st.booleans(), st.data())
    def compare(evolution: Any, encoding: str, reader_is_new: bool, data: Any) -> None:
        writer, reader, values = evolution
        codec = CODECS[encoding]
        broken = breaks(reader, writer, encoding, reader_is_new=reader_is_new)
        for value in values:
            entry = codec.encode(value)
            if not decodes(codec, entry, writer):
                continue  # such as 3 in `float | Literal[1]`: nobody could publish it
            if reader_is_new:
                entry = of_an_older_class(codec, entry, writer, data)
            read = decodes(codec, entry, reader)
            tally["breaks" if broken else "fine", read] += 1
            assert broken or read

    compare()
    return tally


def test_what_does_not_break_can_be_decoded():
    """Whatever is written: no schema change that costs an entry goes unseen.

    In a process of its own: msgspec 0.22 at times leaves memory in disorder when it has made
    decoders for some hundreds of random unions, and the next collection ends the process.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from tests.schema.test_compatibility import *; judge(200)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def judge(examples: int) -> None:
    """Search, and see whether enough was found, and whether it cried wolf."""
    gc.disable()  # see above
    tally = search(examples)
    assert tally["fine", True] > 100, tally
    assert tally["breaks", False] > 4 * tally["breaks", True], "it cries wolf"
    sys.stdout.flush()
    os._exit(0)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(struct_plans(2, event=True).flatmap(built), st.sampled_from(["json", "msgpack"]))
def test_a_class_that_has_not_changed_reads_itself(made, encoding):
    for reader_is_new in (True, False):
        if reader_is_new or not may_leave_out(made.type):
            assert found(made.type, made.type, encoding, reader_is_new=reader_is_new) == []


def may_leave_out(cls: Any) -> bool:
    return "x-bus-left-out" in str(json_schema(EventInfo(cls, "a.b", 1, None, "a", "json")))


# --- changes one by one


class Cell(Struct, frozen=True):
    n: int


class WiderCell(Struct, frozen=True):
    n: float


class Circle(Struct, frozen=True, tag="circle"):
    r: int


class Square(Struct, frozen=True, tag="square"):
    a: int


class Other(Struct, frozen=True, tag="circle", tag_field="kind"):
    r: int


class Row(Struct, frozen=True, array_like=True):
    n: int
    note: str = ""


class LongRow(Struct, frozen=True, array_like=True):
    n: int
    note: str
    more: int


class FullRow(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    n: int


class Pair(NamedTuple):
    n: int
    note: str = ""


class Tag(enum.Enum):
    RED = "red"


class Tree(Struct, frozen=True):
    n: int
    below: tuple[Tree, ...] = ()


class FloatTree(Struct, frozen=True):
    n: float
    below: tuple[FloatTree, ...] = ()


class Typed(TypedDict):
    n: int


class Loose(TypedDict):
    n: NotRequired[int]


@dataclasses.dataclass(frozen=True)
class Record:
    n: int


AWARE, NAIVE = Annotated[datetime, Meta(tz=True)], Annotated[datetime, Meta(tz=False)]
NOON = datetime.fromisoformat("2026-01-01T12:00:00Z")
A_TIME = datetime.fromisoformat("2026-01-01T12:00:00")
ID = UUID(int=7)


def small(**bounds: Any) -> Any:
    return Annotated[int, Meta(**bounds)]


def text(**bounds: Any) -> Any:
    return Annotated[str, Meta(**bounds)]


# (written as, read as): what every value of the first can be read as.
BOTH_READ = [
    *((int, float), (int, Decimal), (int, int | None), (int, Any), (int, str | int)),
    *((float, Decimal), (float, int | float), (Literal[1], int), (Level, int), (int, int | float)),
    *((Literal[1, 2], Level), (Level, Literal[1, 2, 3]), (Rights, int), (Rights, MoreRights)),
    *((Level, float), (Level, small(ge=1, le=2)), (Literal[1, 2], Rights), (Literal[6], Decimal)),
    *((small(ge=1), small(ge=0)), (small(gt=0), small(ge=1)), (small(lt=5), small(le=4))),
    *((small(ge=1), small(gt=0)), (small(ge=1, le=5), float), (small(multiple_of=6), int)),
    *((small(multiple_of=6), small(multiple_of=3)), (int, small(multiple_of=1))),
    *((small(ge=0), Annotated[float, Meta(ge=0)]), (small(ge=1), Annotated[float, Meta(gt=0)])),
    *((str, str | None), (text(max_length=3), str), (text(pattern="a"), str)),
    *((text(max_length=3), text(max_length=5)), (text(min_length=2), text(min_length=1))),
    *((text(pattern="a"), text(pattern="a")), (Literal["a"], str), (Literal["a"], Any)),
    *((Literal["red"], Colour), (Colour, MoreColours), (Colour, str), (Tag, Literal["red"])),
    *((Literal["abc"], text(max_length=3)), (Literal["abc"], text(pattern="b"))),
    *((UUID, str), (date, str), (timedelta, str), (time, str), (Decimal, str), (NAIVE, str)),
    *((AWARE, datetime), (NAIVE, datetime), (bytes, bytes | None), (bytes, bytearray)),
    *(
        (Annotated[time, Meta(tz=True)], time),
        (None, int | None),
        (Literal["a"] | None, str | None),
    ),
    (Annotated[bytes, Meta(max_length=7)], Annotated[bytes, Meta(max_length=8)]),
    *((list[int], list[float]), (list[int], set[int]), (set[int], list[int]), (list[int], list)),
    *((tuple[int, ...], list[int]), (tuple[int, str], list[int | str]), (tuple[()], list[int])),
    *((Row, list[int | str]), (tuple[int, str], Pair), (Row, Pair), (LongRow, Row), (Row, Row)),
    *((Annotated[list[int], Meta(max_length=2)], list[int]), (FullRow, Row), (FullRow, Pair)),
    (Annotated[list[int], Meta(min_length=2, max_length=2)], tuple[int, int]),
    *(
        (dict[str, int], dict[str, float]),
        (dict[str, int], dict),
        (dict[UUID, int], dict[str, int]),
    ),
    *((dict[int, int], dict[float, int]), (dict[int, int], dict[int | str, int])),
    *((dict[Literal["a"], int], dict[str, int]), (dict[str, int], Loose), (Cell, dict[str, int])),
    *((Cell, WiderCell), (Cell, Typed), (Cell, Record), (Record, Cell), (Typed, Cell)),
    *((Cell, Loose), (Tree, FloatTree), (Circle, Circle | Square), (Circle, Other)),
    *((Circle | None, Circle | Square | None), (dict[str, Cell], dict[str, WiderCell])),
]


@pytest.mark.parametrize("encoding", CODECS)
@pytest.mark.parametrize(("writer", "reader"), BOTH_READ, ids=range(len(BOTH_READ)))
def test_a_change_that_breaks_nothing(writer, reader, encoding):
    written, read = (defstruct("Probe", [("a", of)], kw_only=True) for of in (writer, reader))
    assert found(read, written, encoding) == []
    assert found(read, written, encoding, reader_is_new=False) == []


# (written as, read as, a value that shows it). None for the encoding: both.
BREAKS = [
    *((int, str, 1), (str, int, "1"), (float, int, 1.5), (int, bool, 1), (bool, int, True)),
    *((int | None, int, None), (int | str, int, "a"), (Any, int, "a"), (Decimal, float, "1.5")),
    *((str, datetime, "a"), (str, UUID, "a"), (str, Decimal, "a"), (str, date, "a")),
    *((date, datetime, date(2026, 1, 1)), (datetime, AWARE, A_TIME), (datetime, NAIVE, NOON)),
    *((AWARE, NAIVE, NOON), (NAIVE, AWARE, A_TIME), (UUID, bytes, ID), (bytes, UUID, b"a")),
    *((time, Annotated[time, Meta(tz=True)], time(1)), (timedelta, time, timedelta(1))),
    *((int, small(ge=0), -1), (small(ge=0), small(gt=0), 0), (small(le=5), small(lt=5), 5)),
    *((small(ge=0), small(ge=0, le=9), 10), (int, small(multiple_of=2), 1)),
    *(
        (small(multiple_of=3), small(multiple_of=6), 3),
        (small(ge=0), Annotated[float, Meta(gt=0)], 0),
    ),
    *((Annotated[float, Meta(ge=0)], Annotated[float, Meta(gt=0)], 0.0), (float, small(ge=0), 0.5)),
    *((int, Literal[1], 2), (Literal[1, 2], Literal[1], 2), (Level, Literal[1], 2)),
    *(
        (MoreRights, Rights, 4),
        (Rights, Literal[1, 2], 3),
        (Rights, Level, 3),
        (Level, small(gt=1), 1),
    ),
    *((float, float | Literal[1], 3), (int, small(ge=5) | float, 3), (int, Rights, 9)),
    *(
        (str, text(max_length=3), "abcd"),
        (str, text(min_length=1), ""),
        (str, text(pattern="a"), "b"),
    ),
    *((text(pattern="b"), text(pattern="a"), "b"), (str, Literal["a"], "b")),
    *(
        (text(max_length=5), text(max_length=3), "abcd"),
        (Literal["abcd"], text(max_length=3), "abcd"),
    ),
    *(
        (Literal["b"], text(pattern="a"), "b"),
        (UUID, text(max_length=3), ID),
        (Colour, Tag, "blue"),
    ),
    *((MoreColours, Colour, "green"), (Literal["a"] | None, Literal["a"], None)),
    (Annotated[bytes, Meta(max_length=8)], Annotated[bytes, Meta(max_length=7)], b"12345678"),
    *((list[int], list[str], [1]), (list[float], list[int], [1.5]), (list[int], int, [1])),
    *((list[int], tuple[int, int], [1]), (tuple[int, int], tuple[int, str], (1, 1))),
    *((tuple[int, int], tuple[int], (1, 1)), (tuple[int], tuple[int, int], (1,))),
    *(
        (list[int], Annotated[list[int], Meta(min_length=1)], []),
        (list[int], list[small(ge=0)], [-1]),
    ),
    (list[int], Annotated[list[int], Meta(max_length=1)], [1, 2]),
    (Annotated[list[int], Meta(min_length=2)], tuple[int, int], [1, 2, 3]),
    *((Row, LongRow, Row(1)), (Row, FullRow, Row(1)), (LongRow, Pair, LongRow(1, "", 1))),
    *((dict[str, int], dict[str, str], {"a": 1}), (dict[str, int], dict[int, int], {"a": 1})),
    *(
        (dict[str, int], Cell, {"b": 1}),
        (dict[str, int], Circle, {"a": 1}),
        (dict, Loose, {"n": ""}),
    ),
    (dict[str, int], Annotated[dict[str, int], Meta(max_length=0)], {"a": 1}),
    (dict[str, int], dict[text(max_length=1), int], {"ab": 1}),
    *((Cell, dict[str, str], Cell(1)), (Cell, dict[Literal["b"], int], Cell(1))),
    *((Cell, Annotated[dict[str, int], Meta(min_length=2)], Cell(1)), (Cell, list[int], Cell(1))),
    *((WiderCell, Cell, WiderCell(1.5)), (FloatTree, Tree, FloatTree(1.0, (FloatTree(0.5),)))),
    *((Circle | Square, Circle, Square(1)), (Cell, Circle | Square, Cell(1))),
    *(
        (Square, Circle, Square(1)),
        (Circle | Square, Square, Circle(1)),
        (Other, Circle | Square, Other(1)),
    ),
    (Loose, Typed, {}),
]
TWO = Annotated[list[int], Meta(min_length=2)]
TWO_OTHERS = Annotated[set[int], Meta(min_length=2)]
BREAKS_IN = {
    "json": [(bytes, text(max_length=3), b"12345"), (TWO, TWO_OTHERS, [1, 1])],
    "msgpack": [
        *((bytes, str, b"a"), (datetime, str, NOON), (AWARE, str, NOON)),
        *(
            (dict[int, int], dict[str, int], {1: 1}),
            (dict[datetime, int], dict[str, int], {NOON: 1}),
        ),
        (dict[tuple[int, int], int], dict[tuple[str, str], int], {(1, 1): 1}),
        (dict[int, int], Loose, {1: 1}),
    ],
}
FINE_IN = {
    "json": [
        (bytes, str),
        (datetime, str),
        (dict[int, int], dict[str, int]),
        (dict[int, int], Loose),
    ],
    "msgpack": [
        (dict[tuple[int, int], int], dict[tuple[int, int], int]),
        (dict[Any, int], dict),
        (TWO, TWO_OTHERS),
    ],
}
ALL_BREAKS = [(e, *case) for e in CODECS for case in (*BREAKS, *BREAKS_IN[e])]


@pytest.mark.parametrize(
    ("encoding", "writer", "reader", "witness"), ALL_BREAKS, ids=range(len(ALL_BREAKS))
)
def test_a_change_that_breaks_has_a_witness(encoding, writer, reader, witness):
    written, read = (defstruct("Probe", [("a", of)], kw_only=True) for of in (writer, reader))
    entry = CODECS[encoding].encode({"a": witness})
    assert decodes(CODECS[encoding], entry, written), "the witness is no such value"
    assert not decodes(CODECS[encoding], entry, read)
    for reader_is_new in (True, False):
        problem, *more = breaks(read, written, encoding, reader_is_new=reader_is_new)
        assert problem.path.startswith("a")
        assert more == []


@pytest.mark.parametrize("encoding", CODECS)
def test_what_depends_on_the_encoding(encoding):
    for writer, reader in FINE_IN[encoding]:
        written, read = (defstruct("Probe", [("a", of)], kw_only=True) for of in (writer, reader))
        assert found(read, written, encoding) == []


# --- fields


def test_a_new_field_without_a_default_is_lacked_by_what_is_kept():
    class Old(Struct):
        a: int

    class New(Struct):
        a: int
        b: int

    (problem,) = found(New, Old)
    assert problem.path == "b"
    assert problem.text == "is new and has no default: entries written before lack it"
    assert problem.remedy == "Give it a default"
    assert found(Old, New, reader_is_new=False) == []


def test_a_new_field_with_a_default_breaks_nobody():
    class Old(Struct):
        a: int

    class New(Struct):
        a: int
        b: int = 0
        c: list[int] = field(default_factory=list)

    assert found(New, Old) == found(Old, New, reader_is_new=False) == []


def test_a_field_that_goes_is_needed_by_old_readers_unless_it_had_a_default():
    class Old(Struct):
        a: int
        b: str
        c: int = 0

    class New(Struct):
        a: int

    (problem,) = found(Old, New, reader_is_new=False)
    assert (problem.path, problem.text) == ("b", "was removed, and old readers need it")
    assert problem.remedy.startswith("Keep writing it until every reader has been deployed that")
    assert found(New, Old) == []


def test_a_default_that_goes_is_missed_by_entries_from_before_the_field():
    class Old(Struct):
        a: int
        b: int = 0

    class New(Struct):
        a: int
        b: int

    (problem,) = found(New, Old)
    assert problem.path == "b"
    assert problem.text.startswith("has no default any more: entries written before it was added")
    assert found(Old, New, reader_is_new=False) == []


def test_a_default_that_comes_breaks_nobody_as_long_as_it_is_written():
    class Old(Struct):
        a: int
        b: int
        c: int

    class New(Struct):
        a: int
        b: int = 0
        c: int = 0

    class Terse(Struct, omit_defaults=True):
        a: int
        b: int = 0
        c: int = 0

    class Unset(Struct):
        a: int
        b: int
        c: int | UnsetType = UNSET

    assert found(Old, New, reader_is_new=False) == []
    assert [p.path for p in found(Old, Terse, reader_is_new=False)] == ["b", "c"]
    assert [p.path for p in found(Old, Unset, reader_is_new=False)] == ["c"]
    assert found(New, Old) == found(Terse, Old) == []


def test_a_renamed_field_is_recognised_by_its_type():
    class Old(Struct):
        a: int
        name: str

    class New(Struct):
        a: int
        title: str

    hint = (
        " (or, if `name` has become `title`, keep the old name on the wire:"
        " title = msgspec.field(name='name'))"
    )
    (for_new,) = found(New, Old)
    (for_old,) = found(Old, New, reader_is_new=False)
    assert (for_new.path, for_old.path) == ("title", "name")
    assert for_new.remedy.endswith(hint)
    assert for_old.remedy.endswith(hint)

    class Kept(Struct):
        a: int
        title: str = field(name="name")

    assert found(Kept, Old) == found(Old, Kept, reader_is_new=False) == []


def test_two_fields_that_may_be_the_renamed_one_are_no_hint():
    class Old(Struct):
        one: str
        two: str

    class New(Struct):
        title: str

    (problem,) = found(New, Old)
    assert problem.remedy == "Give it a default"


def test_a_rename_that_only_loses_what_is_kept_is_a_note():
    class Old(Struct):
        name: str = ""

    class New(Struct):
        title: str = ""

    (note,) = found(New, Old)
    assert not note.breaks
    assert note.path == "title"
    assert "`name` of the same type is gone: if it was renamed" in note.text
    assert found(Old, New, reader_is_new=False) == []


@pytest.mark.parametrize("encoding", CODECS)
def test_whoever_forbids_unknown_fields_is_broken_by_more_of_them(encoding):
    class Old(Struct, forbid_unknown_fields=True):
        a: int

    class New(Struct, forbid_unknown_fields=True):
        a: int
        b: int = 0

    class Tagged(Struct, tag="t"):
        a: int

    (for_old,) = found(Old, New, encoding, reader_is_new=False)
    assert (for_old.path, for_old.text) == ("b", "is new, and old readers forbid unknown fields")
    assert found(New, Old, encoding) == []
    (for_new,) = found(Old, New, encoding)
    assert for_new.text == "was removed, and its class forbids unknown fields"
    assert [p.path for p in found(Old, Tagged, encoding)] == ["type"]
    assert found(Tagged, Old, encoding) == []


# --- what it is called, and what is said


def probe(of: Any) -> Any:
    return defstruct("Probe", [("a", of)], kw_only=True)


@pytest.mark.parametrize(
    ("writer", "reader", "path"),
    [
        (list[WiderCell], list[Cell], "a[].n"),
        (dict[str, WiderCell], dict[str, Cell], "a{}.n"),
        (dict[str, int], dict[int, int], "a{key}"),
        (tuple[int, WiderCell], tuple[int, Cell], "a[1].n"),
        (list[tuple[int, int]], list[tuple[int, str]], "a[][1]"),
        (WiderCell | None, Cell | None, "a.n"),
        (Cell, dict[str, str], "a.n"),
        (FloatTree, Tree, "a.n"),
        (dict[str, list[int]], dict[str, list[str]], "a{}[]"),
    ],
    ids=str,
)
def test_the_path_leads_to_the_field(writer, reader, path):
    assert [p.path for p in found(probe(reader), probe(writer))] == [path]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (int, str, "was integer, is now text"),
        (str, datetime, "was text, is now datetime"),
        (datetime, AWARE, "was datetime, is now datetime with a time zone"),
        (int | None, int, "was integer or null, is now integer"),
        (int, small(ge=1, lt=5), "was integer, is now integer >= 1 and < 5"),
        (str, text(min_length=1, max_length=3), "was text, is now text of 1 to 3 characters"),
        (str, text(pattern="^a"), "was text, is now text matching '^a'"),
        (list[int], set[str] | None, "was integer, is now text"),
        (list[int], bool, "was list of integer, is now boolean"),
        (
            list[int],
            Annotated[list[int], Meta(min_length=2)],
            "is now list of integer of 2 or more",
        ),
        (tuple[int, str], tuple[int], "was tuple (integer, text), is now tuple (integer)"),
        (set[int], str, "was set of integer, is now text"),
        (dict[int, int], list[int], "was map of integer to integer, is now list of integer"),
        (Cell, int, "was object Cell, is now integer"),
        (int, Literal[1, 2], "was integer, is now one of 1, 2"),
        (int, Rights, "was integer, is now flags of 1, 2"),
        (Literal["a", "b"], Literal["a"], "'b' is no value any more"),
        (Literal["a", "b", "c"], Literal["a"], "'b', 'c' are no values any more"),
        (Circle | Square, Circle, "member 'square' was removed from the union"),
    ],
    ids=str,
)
def test_what_is_said_to_new_readers(old, new, says):
    (problem, *_) = found(probe(new), probe(old))
    assert says in problem.text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (int, str, "was integer, is now text"),
        (int, int | None, "was integer, is now integer or null"),
        (Literal["a"], Literal["a", "b"], "'b' is a new value"),
        (Literal["a"], Literal["a", "b", "c"], "'b', 'c' are new values"),
        (Circle, Circle | Square, "member 'square' is new in the union"),
    ],
    ids=str,
)
def test_what_is_said_to_old_readers(old, new, says):
    (problem,) = found(probe(old), probe(new), reader_is_new=False)
    assert problem.text == says
    assert problem.remedy == "Deploy readers that take it before anything writes it"


def test_a_tuple_with_defaults_may_have_been_shorter():
    """So what new readers make of it is not what old readers do."""
    (problem,) = breaks(probe(tuple[int, str]), probe(Pair))
    assert problem.text == "is another tuple (integer, text) now"
    assert breaks(probe(tuple[int, str]), probe(Pair), reader_is_new=False) == []
    assert breaks(probe(Pair), probe(Pair)) == []


# --- files that somebody has edited

FACTS = {"type": "a.b", "version": 1, "key": None, "topic": "a", "encoding": "json"}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"x-bus": {**FACTS, "version": "1"}},
        {"x-bus": FACTS, "properties": {"a": {"$ref": "#/$defs/Gone"}}},
        {"x-bus": FACTS, "properties": {"a": {"items": {"anyOf": [{"$ref": "#/$defs/Gone"}]}}}},
        {"x-bus": FACTS, "$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {
            "x-bus": FACTS,
            "$ref": "#/$defs/A",
            "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/B"}]}, "B": {"$ref": "#/$defs/A"}},
        },
        {"x-bus": FACTS, "type": "float"},
        {"x-bus": FACTS, "properties": []},
    ],
    ids=range(8),
)
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(ValueError, match=r"."):
        read_document(msgspec.json.encode(schema))


def test_a_pattern_that_is_none_matches_nothing():
    schema = json_schema(EventInfo(probe(text(pattern="a")), "a.b", 1, None, "a", "json"))
    schema["properties"]["a"]["pattern"] = "("
    reader = read_document(msgspec.json.encode(schema))
    assert problems(reader, document(probe(Literal["a"])), reader_is_new=False)


def test_a_list_of_itself_comes_to_an_end():
    """No class can be one; an edited file can."""
    schema = {
        "x-bus": FACTS,
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}},
    }
    endless = read_document(msgspec.json.encode(schema))
    assert problems(endless, endless, reader_is_new=True) == []
    assert problems(document(probe(int)), endless, reader_is_new=True)
