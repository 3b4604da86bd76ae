"""Whether the comparison of schemas agrees with what msgspec does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.event import EventInfo
from bus.schema.compatibility import problems
from bus.schema.event_schema import json_schema
from bus.schema.node import Document, read_document
from tests.schema.shapes import built, changed_struct, struct_plans


def document(cls: Any, encoding: Any = "json") -> Document:
    """The schema of a class as it comes out of its file."""
    info = EventInfo(cls, "compat.probe", 1, None, "compat", encoding)
    return read_document(msgspec.json.encode(json_schema(info)))


CODECS: dict[str, Any] = {"json": msgspec.json, "msgpack": msgspec.msgpack}


@st.composite
def evolutions(draw: Any) -> tuple[Any, Any, list[Any]]:
    """Draw a class, a changed one, and values of the first."""
    plan = draw(struct_plans(2, event=True))
    writer = draw(built(plan))
    reader = draw(built(draw(changed_struct(plan, 2)), array_like=False))
    return writer.type, reader.type, [draw(writer.values) for _ in range(3)]


def _breaks(reader: Any, writer: Any, encoding: str, *, reader_is_new: bool) -> list[Any]:
    found = problems(
        document(reader, encoding), document(writer, encoding), reader_is_new=reader_is_new
    )
    return [p for p in found if p.breaks]


TALLY = {"fine": 0, "breaks": 0, "false alarm": 0}


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(evolutions(), st.sampled_from(["json", "msgpack"]), st.booleans(), st.data())
def test_what_does_not_break_can_be_decoded(evolution, encoding, reader_is_new, data):
    writer, reader, values = evolution
    codec = CODECS[encoding]
    found = _breaks(reader, writer, encoding, reader_is_new=reader_is_new)
    for value in values:
        entry = codec.encode(value)
        if reader_is_new:
            # An older class of that schema did not have the fields that have a default now.
            fields = codec.decode(entry)
            required = {f.encode_name for f in msgspec.structs.fields(writer) if f.required}
            gone = data.draw(st.sets(st.sampled_from(sorted(fields.keys() - required)))) \
                if fields.keys() - required else set()
            entry = codec.encode({k: v for k, v in fields.items() if k not in gone})
        if found:
            try:
                codec.decode(entry, type=reader)
                TALLY["false alarm"] += 1
            except msgspec.ValidationError:
                TALLY["breaks"] += 1
        else:
            TALLY["fine"] += 1
            codec.decode(entry, type=reader)
