"""Event classes: what they may say about themselves, and how types are matched."""

from __future__ import annotations

import gc
import re
import sys
import tracemalloc
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import DeclarationError, Event, UnknownEventType, event
from bus.event import find, info_of, known_events, newest_version, type_matches


@pytest.fixture(autouse=True)
def own_register(monkeypatch):
    """Classes declared in a test are known during that test alone."""
    monkeypatch.setattr(event, "_known", dict(event._known))


class Uploaded(Event, type="upload.finished", version=2, key="file_id"):
    file_id: str
    size: int = 0


def test_a_class_knows_how_it_travels():
    info = info_of(Uploaded)
    assert (info.type, info.version, info.key, info.topic, info.encoding) == (
        *("upload.finished", 2, "file_id"),
        *("upload", "json"),
    )


def test_events_are_values():
    one, same = Uploaded(file_id="f", size=1), Uploaded(file_id="f", size=1)
    assert one == same
    assert len({one, same}) == 1
    assert Uploaded(file_id="f").size == 0
    with pytest.raises(AttributeError, match="immutable"):
        one.size = 2
    with pytest.raises(TypeError, match="positional"):
        Uploaded("f")


def test_an_event_has_neither_a_dict_nor_room_for_more():
    event = Uploaded(file_id="f")
    assert not hasattr(event, "__dict__")
    with pytest.raises(AttributeError):
        event.colour = "red"


def test_a_small_event_takes_at_most_72_bytes():
    """With what the garbage collector keeps in front of it, which `sys.getsizeof` counts."""

    class Small(Event, type="small.made"):
        a: str
        b: str
        c: int
        d: float

    small = Small(a="a", b="b", c=1, d=2.0)
    assert not gc.is_tracked(small), "the garbage collector has nothing to do with it"
    assert sys.getsizeof(small) <= 72
    before = tracemalloc_of(lambda: [small for _ in range(10_000)])
    made = tracemalloc_of(lambda: [Small(a="a", b="b", c=1, d=2.0) for _ in range(10_000)])
    assert (made - before) / 10_000 <= 72


def tracemalloc_of(make: Any) -> int:
    """Return the bytes that are taken by what `make` returns."""
    tracemalloc.start()
    try:
        kept = make()
        return tracemalloc.get_traced_memory()[0] if kept else 0
    finally:
        tracemalloc.stop()


def test_an_event_is_hashable_as_far_as_its_fields_are():
    class Tagged(Event, type="tag.put"):
        tags: tuple[str, ...] | frozenset[str] | list[str] | dict[str, int]

    assert len({Tagged(tags=("a", "b")), Tagged(tags=("a", "b")), Tagged(tags=("a",))}) == 2
    assert hash(Tagged(tags=frozenset("ab"))) == hash(Tagged(tags=frozenset("ba")))
    for container in (["a"], {"a": 1}):
        with pytest.raises(TypeError, match="unhashable type"):
            hash(Tagged(tags=container))


@pytest.mark.parametrize(
    ("type", "match"),
    [
        ("9lives.lost", "its family, '9lives', must begin with a letter"),
        (".made", "its family, '', must begin"),
        ("bad family.made", "its family, 'bad family', must"),
        ("*.made", r"its family, '\*', must"),
        ("family", "not a dotted name such as 'document.created'$"),
        ("family.", "not a dotted name such as 'document.created'$"),
    ],
)
def test_a_malformed_family_is_refused_and_named(type, match):
    with pytest.raises(DeclarationError, match=match):

        class _Bad(Event, type=type):
            pass


def test_a_base_class_may_say_the_family_of_its_children():
    class Model(Event, family="model", topic="agent"):
        run: str

    class Delta(Model, type="model.delta_of_test"):
        text: str

    assert (info_of(Delta).family, info_of(Delta).topic) == ("model", "agent")
    assert type_matches("model.*", info_of(Delta).type)
    with pytest.raises(
        DeclarationError, match=r"type 'agent.delta' is not of the family.*'model\.'"
    ):

        class _Stray(Model, type="agent.delta"):
            pass

    with pytest.raises(DeclarationError, match="of the family 'model' already"):

        class _Other(Model, family="agent"):
            pass


@pytest.mark.parametrize("family", ["", "a.b", "*", "9a", 5])
def test_a_family_is_one_segment(family):
    with pytest.raises(DeclarationError, match="is not the first segment of a type"):

        class _Bad(Event, family=family):
            pass


def test_fields_may_have_the_names_of_the_class_keywords():
    class Odd(Event, type="odd.made", key="key"):
        type: str
        key: str
        version: int
        topic: str
        encoding: str

    made = Odd(type="t", key="k", version=9, topic="x", encoding="y")
    assert info_of(Odd).decode(info_of(Odd).encode(made)) == made
    assert (info_of(Odd).type, info_of(Odd).version) == ("odd.made", 1)


def test_a_reader_tolerates_fields_it_does_not_know():
    assert info_of(Uploaded).decode(b'{"file_id":"f","colour":"red"}') == Uploaded(file_id="f")


def test_a_base_without_type_hands_down_its_keywords():
    class Base(Event, key="tenant", topic="tenants", encoding="msgpack"):
        tenant: str

    class Added(Base, type="tenant.added"):
        pass

    class Moved(Base, type="tenant.moved", key="region", topic="moves", encoding="json"):
        region: str

    added, moved = info_of(Added), info_of(Moved)
    assert (added.key, added.topic, added.encoding) == ("tenant", "tenants", "msgpack")
    assert (moved.key, moved.topic, moved.encoding) == ("region", "moves", "json")


def test_a_class_without_type_is_no_event_of_its_own():
    class Base(Event):
        pass

    class Child(Uploaded):
        pass

    for cls in (Base, Child, Event):
        with pytest.raises(DeclarationError, match=r"has no type.*type='family"):
            info_of(cls)


@pytest.mark.parametrize(
    "type",
    [
        "",
        "created",
        ".created",
        "document.",
        "document..created",
        "document created",
        "1document.created",
        "document.cre*ted",
        "dökument.created",
        "a.b\n",
        "a." + "b" * 99,
        7,
    ],
)
def test_bad_types_are_refused(type):
    with pytest.raises(DeclarationError, match=r"Bad: type .* is not a dotted name"):

        class Bad(Event, type=type):
            pass


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"version": 0}, "version must be a whole number from 1"),
        ({"version": "2"}, "version must be a whole number"),
        ({"version": True}, "version must be a whole number"),
        ({"version": 1.0}, "version must be a whole number"),
        ({"key": "nobody"}, "key 'nobody' is no field"),
        ({"topic": "no spaces"}, "topic 'no spaces' is not valid"),
        ({"topic": "{brace}"}, "topic '{brace}' is not valid"),
        ({"encoding": "yaml"}, "encoding is 'json' or 'msgpack', not 'yaml'"),
        ({"frozen": False}, "events are always frozen"),
        ({"kw_only": False}, "events are always kw_only"),
        ({"tag": True}, "'tag' does not go with events"),
        ({"tag_field": "kind"}, "'tag_field' does not go with events"),
        ({"array_like": True}, "'array_like' does not go with events"),
    ],
)
def test_bad_class_keywords_are_refused(keywords, says):
    with pytest.raises(DeclarationError, match="Bad: " + re.escape(says)):

        class Bad(Event, type="bad.declared", **keywords):
            name: str = ""

    with pytest.raises(UnknownEventType):
        find("bad.declared", 1)


def test_two_classes_with_one_type_and_version_are_refused_by_both_names():
    class First(Event, type="twice.declared"):
        pass

    with pytest.raises(DeclarationError, match=r"twice\.declared version 1.*First and .*Second"):

        class Second(Event, type="twice.declared"):
            pass

    class Later(Event, type="twice.declared", version=2):
        pass

    assert find("twice.declared", 1).cls is First
    assert find("twice.declared", 2).cls is Later
    assert newest_version("twice.declared") == 2


def test_the_same_class_again_is_a_reloaded_module():
    def declare() -> type[Event]:
        class Reloaded(Event, type="module.reloaded"):
            pass

        return Reloaded

    first, again = declare(), declare()
    assert first is not again
    assert find("module.reloaded", 1).cls is again


def test_an_unknown_type_is_told_from_an_unknown_version():
    with pytest.raises(UnknownEventType, match=r"no\.such version 1: no version of it is known"):
        find("no.such", 1)
    with pytest.raises(UnknownEventType, match=r"known versions: \[2\]"):
        find("upload.finished", 1)
    assert newest_version("no.such") == 0


def test_known_events_are_listed_by_type_and_version():
    listed = [(e.type, e.version) for e in known_events()]
    assert ("upload.finished", 2) in listed
    assert listed == sorted(listed)


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("document.created", ["document.created"], ["document.created.x", "document.create"]),
        ("document.*", ["document.created", "document.page.added"], ["documents.x", "document"]),
        ("*.deleted", ["document.deleted"], ["a.b.deleted", "document.deleted.x", ".deleted"]),
        ("*", ["document.created", "a.b.c"], []),
        ("a.*.c", ["a.b.c"], ["a.c", "a.b.b.c", "a.b.d"]),
        ("a.*.*", ["a.b.c", "a.b.c.d"], ["a.b"]),
    ],
)
def test_patterns(pattern, matches, others):
    assert [t for t in matches + others if type_matches(pattern, t)] == matches


@pytest.mark.parametrize(
    "pattern",
    ["", ".", "document.", ".*", "doc*", "document.cre*", "**", "a..b", "a b", "document.*\n", 7],
)
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(DeclarationError, match=r"type pattern .* is not valid"):
        type_matches(pattern, "document.created")


NAMES = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_-]{0,5}(\.[a-zA-Z0-9_-]{1,5}){1,3}", fullmatch=True)


@given(name=NAMES, other=NAMES)
def test_a_name_matches_itself_alone(name, other):
    """Also when it holds characters that mean something to regular expressions."""
    assert type_matches(name, name)
    assert type_matches(name, other) == (name == other)
    assert type_matches("*", name)
    assert type_matches(name.partition(".")[0] + ".*", name)


@dataclass
class Point:
    x: float


class Line(TypedDict):
    length: float


class Pair(NamedTuple):
    left: str
    right: float


class Tree(msgspec.Struct):
    children: list[Tree]


class Leaf(msgspec.Struct):
    weight: float | None = None


WITH_FLOATS = [
    *(float, float | None, list[float], dict[str, float], tuple[int, float], tuple[float, ...]),
    *(dict[str, list[Leaf]], Point, Line, Pair, Any, list, set[float]),
]
WITHOUT = [int, str | None, list[dict[str, int]], Tree, bytes, tuple[str, bool]]


@pytest.mark.parametrize("annotation", WITH_FLOATS + WITHOUT, ids=str)
def test_whether_a_class_can_hold_floats(annotation):
    """Where it cannot, nobody looks for NaN; a wrong no would let null into the stream."""
    cls = msgspec.defstruct("Probe", [("value", annotation)])
    info = info_of(Uploaded)
    probe = type(info)(cls, "a.b", 1, None, "a", "json")
    assert probe.may_hold_floats is (annotation in WITH_FLOATS)
