"""Random event classes, small changes of them, and values they may hold."""

from __future__ import annotations

import enum
import itertools
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union
from uuid import UUID

import msgspec
from hypothesis import strategies as st
from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Callable

_numbers = itertools.count()


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class MoreColours(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag, boundary=enum.STRICT):  # the default is another before 3.11.4
    READ = 1
    WRITE = 2


class MoreRights(enum.Flag, boundary=enum.STRICT):
    READ = 1
    WRITE = 2
    OWN = 4


class Shape(NamedTuple):
    """A type, and how to make its values. kind: no two of one kind may be in a union."""

    type: Any
    values: st.SearchStrategy[Any]
    kind: str


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_WHOLE = st.integers(-(2**63), 2**64 - 1)  # what msgpack takes
_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
_AWARE = st.datetimes(timezones=st.just(UTC)).filter(lambda t: 1 < t.year < 9999)
_NAIVE = st.datetimes()
_SECONDS = st.integers(-(10**6), 10**6)

LEAVES = [
    Shape(int, _WHOLE, "int"),
    Shape(Annotated[int, Meta(ge=0, le=9)], st.integers(0, 9), "int"),
    Shape(Annotated[int, Meta(gt=0, lt=5)], st.integers(1, 4), "int"),
    Shape(Annotated[int, Meta(ge=1)], st.integers(1, 2**63), "int"),
    Shape(Annotated[int, Meta(multiple_of=3)], st.integers(-9, 9).map(lambda n: n * 3), "int"),
    Shape(Annotated[int, Meta(multiple_of=6)], st.integers(-9, 9).map(lambda n: n * 6), "int"),
    Shape(Literal[1, 2], st.sampled_from([1, 2]), "int"),
    Shape(Literal[0, 1, 2, 3], st.sampled_from([0, 1, 2, 3]), "int"),
    Shape(Level, st.sampled_from(Level), "int"),
    Shape(Rights, st.sampled_from([*Rights, Rights.READ | Rights.WRITE, Rights(0)]), "int"),
    Shape(MoreRights, st.sampled_from([*MoreRights, MoreRights(6)]), "int"),
    Shape(float, _FLOAT | st.integers(-9, 9), "float"),
    Shape(Annotated[float, Meta(ge=0)], st.floats(0, 99) | st.integers(0, 9), "float"),
    Shape(Annotated[float, Meta(gt=0, le=9)], st.floats(0, 9, exclude_min=True), "float"),
    Shape(bool, st.booleans(), "bool"),
    Shape(str, _TEXT, "str"),
    Shape(Annotated[str, Meta(max_length=3)], st.text("abé", max_size=3), "str"),
    Shape(Annotated[str, Meta(min_length=1)], st.text("abé", min_size=1), "str"),
    Shape(Annotated[str, Meta(pattern="a")], _TEXT.map(lambda t: t + "a"), "str"),
    Shape(Literal["red", "blue"], st.sampled_from(["red", "blue"]), "str"),
    Shape(Literal["red"], st.just("red"), "str"),
    Shape(Colour, st.sampled_from(Colour), "str"),
    Shape(MoreColours, st.sampled_from(MoreColours), "str"),
    Shape(bytes, st.binary(max_size=9), "str"),
    Shape(Annotated[bytes, Meta(max_length=8)], st.binary(max_size=8), "str"),
    Shape(Annotated[bytes, Meta(max_length=7)], st.binary(max_size=7), "str"),
    Shape(datetime, _AWARE | _NAIVE, "str"),
    Shape(Annotated[datetime, Meta(tz=True)], _AWARE, "str"),
    Shape(Annotated[datetime, Meta(tz=False)], _NAIVE, "str"),
    Shape(time, st.times() | st.times(timezones=st.just(UTC)), "str"),
    Shape(Annotated[time, Meta(tz=False)], st.times(), "str"),
    Shape(date, st.dates(), "str"),
    Shape(timedelta, _SECONDS.map(lambda s: timedelta(seconds=s)), "str"),
    Shape(UUID, st.uuids(), "str"),
    Shape(Decimal, st.decimals(allow_nan=False, allow_infinity=False), "str"),
    Shape(Any, st.none() | st.booleans() | _WHOLE | _TEXT | st.lists(_TEXT, max_size=2), "any"),
    Shape(None, st.none(), "null"),
]
_UNMIXABLE = {"any", "union"}
# msgspec 0.22 corrupts memory when it makes a decoder of a union of a tuple and anything with a
# bound, or of a text with a pattern and a list or map.
_PATTERNED = next(s for s in LEAVES if s.type == Annotated[str, Meta(pattern="a")])
_KEYS = [s for s in LEAVES if s.kind in ("int", "str") and s.type is not Rights]
_KEYS = [s for s in _KEYS if s.type not in (MoreRights, Decimal)]
_KEYS.append(Shape(int | str, _WHOLE | _TEXT.map("k".__add__), "union"))


class Field(NamedTuple):
    """A field of a struct; `default` counts if it has one."""

    name: str
    shape: Shape
    default: Any = msgspec.NODEFAULT


def struct(fields: list[Field], **options: Any) -> Shape:
    """A struct of these fields, written with some of the defaults left as they are."""
    declared = [
        (f.name, f.shape.type)
        if f.default is msgspec.NODEFAULT
        else (f.name, f.shape.type, msgspec.field(default_factory=lambda v=f.default: v))
        for f in fields
    ]
    cls = msgspec.defstruct(f"S{next(_numbers)}", declared, kw_only=True, frozen=True, **options)
    given = {f.name: f.shape.values for f in fields if f.default is msgspec.NODEFAULT}
    spare = {f.name: f.shape.values for f in fields if f.default is not msgspec.NODEFAULT}
    values = st.fixed_dictionaries(given, optional=spare).map(lambda v: cls(**v))
    return Shape(cls, values, "tuple" if options.get("array_like") else "object")


# A plan says what a shape is made of, so that it can be changed a little: (name, parts ...).
Plan = tuple[Any, ...]
_NAMES = ("a", "b", "c")


@st.composite
def plans(draw: Callable[..., Any], depth: int = 2) -> Plan:  # noqa: PLR0911 - one a kind
    """Draw the plan of a shape."""
    if depth == 0:
        return ("leaf", draw(st.integers(0, len(LEAVES) - 1)))
    kind = draw(
        st.sampled_from(["leaf", "leaf", "list", "set", "tuple", "map", "struct", "or", "tagged"])
    )
    below = plans(depth - 1)
    match kind:
        case "list":
            return ("list", draw(below), *draw(_spans))
        case "set":
            return ("set", draw(st.integers(0, len(_KEYS) - 1)), *draw(_spans))
        case "tuple":
            return ("tuple", *draw(st.lists(below, max_size=3)))
        case "map":
            return ("map", draw(st.integers(0, len(_KEYS) - 1)), draw(below), *draw(_spans))
        case "struct":
            return draw(struct_plans(depth - 1))
        case "or":
            return ("or", *draw(st.lists(below, min_size=2, max_size=3)))
        case "tagged":
            members = st.tuples(st.sampled_from("xyz"), struct_plans(depth - 1))
            some = st.lists(members, min_size=1, max_size=3, unique_by=lambda m: m[0])
            return ("tagged", *draw(some))
    return ("leaf", draw(st.integers(0, len(LEAVES) - 1)))


_spans = st.sampled_from([(None, None), (None, None), (1, None), (None, 2), (1, 3), (2, 3)])
_options = st.fixed_dictionaries(
    {
        "forbid_unknown_fields": st.sampled_from([False, False, True]),
        "omit_defaults": st.sampled_from([False, False, True]),
        "array_like": st.sampled_from([False, False, False, True]),
    }
)


@st.composite
def struct_plans(draw: Callable[..., Any], depth: int, *, event: bool = False) -> Plan:
    """Draw the plan of a struct. event: of an event class, which is no array."""
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True, max_size=3))
    fields = [(name, draw(plans(depth)), draw(st.booleans())) for name in names]
    options = draw(_options)
    return ("struct", {**options, "array_like": options["array_like"] and not event}, *fields)


@st.composite
def changed(  # noqa: C901, PLR0911 - one branch a kind
    draw: Callable[..., Any], plan: Plan, depth: int = 2
) -> Plan:
    """Draw a plan that is a little different, or not at all."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(plans(depth))
    if how == 1:
        return ("or", plan, ("leaf", len(LEAVES) - 1))
    if how < 5 and plan[0] not in ("struct", "tagged"):
        return plan
    below = max(0, depth - 1)
    match plan:
        case ("leaf", _):
            return ("leaf", draw(st.integers(0, len(LEAVES) - 1)))
        case ("list", item, *span):
            return (draw(_arrays), draw(changed(item, below)), *draw(st.just(span) | _spans))
        case ("tuple", *items):
            items = [draw(changed(item, below)) for item in items]
            return ("tuple", *items[: draw(st.sampled_from([3, 3, 1]))])
        case ("map", key, value, *span):
            key = draw(st.just(key) | st.integers(0, len(_KEYS) - 1))
            return ("map", key, draw(changed(value, below)), *draw(st.just(span) | _spans))
        case ("or", *options):
            return ("or", *[draw(changed(o, below)) for o in options])
        case ("struct", *_):
            return draw(changed_struct(plan, below))
        case ("tagged", *members):
            some = [(tag, draw(changed_struct(s, below))) for tag, s in members]
            return ("tagged", *(some[draw(st.sampled_from([0, 0, 1])) :] or some))
    return plan


_arrays = st.sampled_from(["list", "list", "items"])


@st.composite
def changed_struct(draw: Callable[..., Any], plan: Plan, depth: int) -> Plan:
    """Draw a struct with fields added, removed, changed, or given a default."""
    _, options, *fields = plan
    fields = [
        (name, draw(changed(shape, depth)), draw(st.just(default) | st.booleans()))
        for name, shape, default in fields
        if draw(st.integers(0, 9))
    ]
    for name in _NAMES:
        if name not in [f[0] for f in fields] and draw(st.integers(0, 4)) == 0:
            fields.append((name, draw(plans(depth)), draw(st.booleans())))
    other = draw(_options)
    if draw(st.booleans()):
        options = {**other, "array_like": options["array_like"]}
    return ("struct", options, *fields)


@st.composite
def built(  # noqa: PLR0911 - one a kind
    draw: Callable[..., Any], plan: Plan, **more: Any
) -> Shape:
    """Make the shape of a plan; what msgspec does not allow in a union is left out."""
    match plan:
        case ("leaf", n):
            return LEAVES[n]
        case ("list" | "items", item, least, most):
            made = draw(built(item))
            kind = list[made.type] if plan[0] == "list" else tuple[made.type, ...]
            values = st.lists(made.values, min_size=least or 0, max_size=most or 4)
            values = values if plan[0] == "list" else values.map(tuple)
            return Shape(Annotated[kind, Meta(min_length=least, max_length=most)], values, "array")
        case ("set", n, least, most):
            made = _KEYS[n]
            values = st.frozensets(made.values, min_size=0, max_size=most or 4)
            values = values.filter(lambda v: len(v) >= (least or 0))
            kind = Annotated[frozenset[made.type], Meta(min_length=least, max_length=most)]
            return Shape(kind, values, "array")
        case ("tuple", *items):
            shapes = [draw(built(item)) for item in items]
            kinds = tuple(s.type for s in shapes)
            kind = tuple[kinds] if kinds else tuple[()]
            return Shape(kind, st.tuples(*[s.values for s in shapes]), "tuple")
        case ("map", n, value, least, most):
            key, made = _KEYS[n], draw(built(value))
            values = st.dictionaries(key.values, made.values, max_size=most or 3)
            values = values.filter(lambda v: len(v) >= (least or 0))
            kind = Annotated[dict[key.type, made.type], Meta(min_length=least, max_length=most)]
            return Shape(kind, values, "object")
        case ("or", *options):
            return _union([draw(built(o)) for o in options])
        case ("tagged", *members):
            tagged = [draw(built(s, tag=tag, array_like=False)) for tag, s in members]
            types = Union[tuple(t.type for t in tagged)]  # noqa: UP007 - of any number
            return Shape(types, st.one_of([t.values for t in tagged]), "object")
        case ("struct", options, *fields):
            made = []
            for name, shape, has_default in fields:
                of = draw(built(shape))
                default = draw(of.values) if has_default else msgspec.NODEFAULT
                made.append(Field(name, of, default))
            return struct(made, **{**options, **more})
    raise AssertionError(plan)


def _union(options: list[Shape]) -> Shape:
    by_kind: dict[str, Shape] = {}
    for option in options:
        by_kind.setdefault(option.kind, option)
    fragile = "tuple" in by_kind or _PATTERNED in by_kind.values()
    if fragile and not (len(by_kind) == 2 and "null" in by_kind):
        return options[0]
    if len(by_kind) == 1 or _UNMIXABLE & by_kind.keys():
        return options[0]
    types = Union[tuple(o.type for o in by_kind.values())]  # noqa: UP007 - of any number
    kinds = by_kind.keys() - {"null"}
    kind = kinds.pop() if len(kinds) == 1 else "union"
    return Shape(types, st.one_of([o.values for o in by_kind.values()]), kind)
