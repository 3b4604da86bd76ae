"""What the schema of an event class says, also where JSON Schema has no words."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypedDict, TypeVar
from uuid import UUID

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Meta, UnsetType

from bus import DeclarationError
from bus.event import EventInfo
from bus.schema.event_schema import json_schema
from tests.schema.shapes import Colour, Level, Rights, built, struct_plans

ROOT = Path(__file__).parent.parent.parent


def schema_of(cls: Any) -> dict[str, Any]:
    return json_schema(EventInfo(cls, "told.probe", 2, "a", "told", "json"))


def told(annotation: Any, default: Any = msgspec.NODEFAULT) -> dict[str, Any]:
    """The schema of a field, its reference followed."""
    field = ("a", annotation) if default is msgspec.NODEFAULT else ("a", annotation, default)
    schema = schema_of(msgspec.defstruct("Probe", [field], kw_only=True, frozen=True))
    node = schema["properties"]["a"]
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


class Open(enum.IntFlag):
    """Takes any number."""

    READ = 1


class Inner(msgspec.Struct, frozen=True):
    at: datetime


class Circle(msgspec.Struct, frozen=True, tag="circle"):
    radius: Decimal


class Square(msgspec.Struct, frozen=True, tag="square"):
    side: Decimal


class Row(msgspec.Struct, frozen=True, array_like=True, tag="row"):
    at: datetime
    note: str = ""


class Sparse(msgspec.Struct, frozen=True, omit_defaults=True):
    at: datetime
    note: str = ""


class Typed(TypedDict):
    at: datetime
    note: NotRequired[str]


class Pair(NamedTuple):
    at: datetime
    note: str = ""


@dataclass(frozen=True)
class Record:
    at: datetime
    note: str = ""
    more: str | UnsetType = UNSET


T = TypeVar("T")


class Box(msgspec.Struct, Generic[T], frozen=True):
    held: T
    more: int | UnsetType = UNSET


TEXTS = [
    (datetime, {"x-bus-type": "datetime"}),
    (Annotated[datetime, Meta(tz=True)], {"x-bus-type": "datetime", "x-bus-tz": True}),
    (Annotated[datetime, Meta(tz=False)], {"x-bus-type": "datetime", "x-bus-tz": False}),
    (time, {"x-bus-type": "time"}),
    (Annotated[time, Meta(tz=False)], {"x-bus-type": "time", "x-bus-tz": False}),
    (date, {"x-bus-type": "date"}),
    (timedelta, {"x-bus-type": "duration"}),
    (UUID, {"x-bus-type": "uuid"}),
    (Decimal, {"x-bus-type": "decimal"}),
    (bytes, {"x-bus-type": "bytes"}),
    (bytearray, {"x-bus-type": "bytes"}),
    (Annotated[bytes, Meta(min_length=1, max_length=7)], {"x-bus-minBytes": 1}),
    (Annotated[bytes, Meta(min_length=1, max_length=7)], {"x-bus-maxBytes": 7}),
]


@pytest.mark.parametrize(("annotation", "notes"), TEXTS, ids=range(len(TEXTS)))
def test_a_text_says_what_it_stands_for(annotation, notes):
    """Where msgspec says no more than "string", a change from text to time would not be seen."""
    node = told(annotation)
    assert node["type"] == "string"
    assert node.items() >= notes.items()
    assert node.keys() - {"type", "format", "contentEncoding", "minLength", "maxLength"} <= {
        *("x-bus-type", "x-bus-tz", "x-bus-minBytes", "x-bus-maxBytes")
    }


@pytest.mark.parametrize(
    ("annotation", "node"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (None, {"type": "null"}),
        (Any, {}),
        (Literal["a", 1], {"enum": [1, "a"]}),
        (Colour, {"title": "Colour", "enum": ["blue", "red"]}),
        (Annotated[int, Meta(ge=0, lt=5)], {"minimum": 0, "exclusiveMaximum": 5}),
        (Annotated[str, Meta(pattern="^a", max_length=3)], {"pattern": "^a", "maxLength": 3}),
        (Annotated[list[int], Meta(min_length=1)], {"minItems": 1}),
        (set[str], {"uniqueItems": True}),
        (tuple[int, str], {"minItems": 2, "maxItems": 2, "items": False}),
        (Rights, {"type": "integer", "x-bus-type": "flags", "x-bus-flags": [1, 2]}),
        (Open, {"type": "integer"}),
    ],
    ids=str,
)
def test_what_json_schema_has_words_for(annotation, node):
    schema = told(annotation)
    assert schema.items() >= node.items()
    if "x-bus-type" not in node:
        assert not any(name.startswith("x-bus") for name in schema)


def test_flags_are_no_list_of_values():
    assert "enum" not in told(Rights)
    assert "enum" not in told(Open)


@pytest.mark.parametrize(
    ("keys", "node"),
    [
        (str, None),
        (Any, {}),
        (int, {"type": "integer"}),
        (UUID, {"type": "string", "x-bus-type": "uuid"}),
        (Annotated[str, Meta(max_length=3)], {"type": "string", "maxLength": 3}),
        (Level, {"enum": [1, 2]}),
        (Rights, {"type": "integer", "x-bus-type": "flags", "x-bus-flags": [1, 2]}),
        (Literal["b", "a"], {"enum": ["a", "b"]}),
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (tuple[int, int], "other"),
    ],
    ids=str,
)
def test_the_keys_of_a_map(keys, node):
    said = told(dict[keys, int]).get("x-bus-keys")
    if node == "other":
        assert said["x-bus-type"] == "other"
        assert said["const"] != told(dict[tuple[int, str], int])["x-bus-keys"]["const"]
    else:
        assert said == node


DATETIME = {"type": "string", "x-bus-type": "datetime"}


@pytest.mark.parametrize(
    ("annotation", "way"),
    [
        (list[datetime], ["items"]),
        (frozenset[datetime], ["items"]),
        (tuple[datetime, ...], ["items"]),
        (tuple[int, datetime], ["prefixItems", 1]),
        (dict[int, dict[str, datetime]], ["additionalProperties", "additionalProperties"]),
        (int | None | datetime, ["anyOf", 1]),
        (list[datetime | None], ["items", "anyOf", 0]),
        (Annotated[datetime, Meta(title="When")] | None, ["anyOf", 0]),
        (Inner, ["properties", "at"]),
        (Row, ["prefixItems", 1]),
        (Sparse, ["properties", "at"]),
        (Typed, ["properties", "at"]),
        (Pair, ["prefixItems", 0]),
        (Record, ["properties", "at"]),
        (Box[datetime], ["properties", "held"]),
    ],
    ids=str,
)
def test_notes_are_at_every_depth(annotation, way):
    node: Any = told(annotation)
    for step in way:
        node = node[step]
    assert {k: node[k] for k in DATETIME} == DATETIME


def test_every_member_of_a_union_has_its_own_notes():
    """They are in an order of msgspec's own: structs in a group, null last."""
    annotation = None | Circle | datetime | Square | Level | list[date]
    schema = schema_of(msgspec.defstruct("Probe", [("a", annotation)], kw_only=True))
    node = schema["properties"]["a"]
    (group,) = [o for o in node["anyOf"] if "discriminator" in o]
    assert [o["$ref"] for o in group["anyOf"]] == ["#/$defs/Circle", "#/$defs/Square"]
    assert [o for o in node["anyOf"] if o is not group] == [
        {"$ref": "#/$defs/Level"},
        {"items": {"type": "string", "format": "date", "x-bus-type": "date"}, "type": "array"},
        {"type": "string", "x-bus-type": "datetime"},
        {"type": "null"},
    ]
    for name in ("Circle", "Square"):
        assert schema["$defs"][name]["x-bus-tag"] == "type"
        radius = schema["$defs"][name]["properties"]
        assert "decimal" in [p.get("x-bus-type") for p in radius.values()]


@pytest.mark.parametrize(
    ("annotation", "left_out"),
    [
        (Inner, None),
        (Sparse, ["note"]),
        (Typed, ["note"]),
        (Record, ["more"]),
        (Box[int], ["more"]),
        (Row, None),
        (Pair, None),
    ],
    ids=str,
)
def test_what_a_writer_leaves_out(annotation, left_out):
    assert told(annotation).get("x-bus-left-out") == left_out


def test_the_head_of_a_schema():
    class Told(msgspec.Struct, frozen=True):
        """Has been told.

        More of it.
        """

        a: int = 3
        b: Annotated[str, Meta(description="of b")] = ""

    schema = schema_of(Told)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "Told"
    assert schema["description"] == "Has been told.\n\nMore of it."
    facts = {"type": "told.probe", "version": 2, "key": "a", "topic": "told", "encoding": "json"}
    assert schema["x-bus"] == facts
    assert schema["properties"]["a"] == {"type": "integer", "default": 3}
    assert schema["properties"]["b"]["description"] == "of b"
    assert "$defs" not in schema


def test_a_field_has_its_name_on_the_wire():
    class Renamed(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
        file_name: str
        size: int = msgspec.field(name="bytes")

    schema = schema_of(Renamed)
    assert schema["required"] == ["bytes", "fileName"]
    assert schema["additionalProperties"] is False


class Tree(msgspec.Struct, frozen=True):
    at: datetime
    below: tuple[Tree, ...] = ()


def test_a_class_that_holds_itself():
    schema = schema_of(Tree)
    assert schema["$ref"] == "#/$defs/Tree"
    at = schema["$defs"]["Tree"]["properties"]["at"]
    assert at == {"type": "string", "x-bus-type": "datetime"}


def test_a_row_without_columns_is_a_list():
    """JSON Schema has no empty prefixItems."""
    assert told(msgspec.defstruct("Nothing", [], array_like=True)) == {
        "title": "Nothing",
        "type": "array",
        "minItems": 0,
    }


class Odd:
    """Nothing msgspec knows."""


@pytest.mark.parametrize("annotation", [Odd, complex, list["NoSuchName"]], ids=str)  # noqa: F821
def test_a_class_without_a_schema_says_so(annotation):
    with pytest.raises(DeclarationError, match=r"Probe: no schema of told\.probe version 2 can"):
        told(annotation)


DEFAULTS = """
import sys, msgspec
from typing import List, Optional, Union
if sys.argv[1] == "1":  # Python keeps the order in which a union was met first
    List[Union[int, str]], Optional[Union[int, str]]
class Probe(msgspec.Struct, frozen=True):
    a: frozenset[str] = frozenset("abcdefgh")
    b: "List[Union[str, int]]" = []
    c: "dict[Union[str, int], Optional[Union[str, int]]]" = {}
from bus.event import EventInfo
from bus.schema.event_schema import json_schema
info = EventInfo(Probe, "told.probe", 1, None, "told", "json")
sys.stdout.buffer.write(msgspec.json.encode(json_schema(info), order="sorted"))
"""


def test_a_schema_is_the_same_in_every_process():
    texts = {
        subprocess.run(
            [sys.executable, "-c", DEFAULTS, seed],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1
    assert b'"default":["a","b","c","d","e","f","g","h"]' in texts.pop()


@st.composite
def classes(draw: Any) -> tuple[Any, Any]:
    made = draw(built(draw(struct_plans(2, event=True))))
    return made.type, draw(made.values)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(classes())
def test_what_is_written_is_valid_by_its_schema(made):
    """By a validator that is not ours; it does not look at what a text stands for."""
    cls, value = made
    schema = schema_of(cls)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(msgspec.json.decode(msgspec.json.encode(value)), schema)
