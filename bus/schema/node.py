"""A JSON Schema as `event_schema.py` writes it, read back, and put into words."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

Value = str | int | None
Number = int | float


class Node(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One schema, or a part of one. None: not said, hence not limited."""

    ref: str | None = msgspec.field(default=None, name="$ref")
    title: str = ""
    type: Literal["null", "boolean", "integer", "number", "string", "array", "object"] | None = None
    any_of: tuple["Node", ...] | None = None
    enum: tuple[Value, ...] | None = None
    const: str | None = None
    minimum: Number | None = None
    exclusive_minimum: Number | None = None
    maximum: Number | None = None
    exclusive_maximum: Number | None = None
    multiple_of: Number | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None
    items: "Node | bool | None" = None
    prefix_items: tuple["Node", ...] = ()
    unique_items: bool = False
    min_items: int | None = None
    max_items: int | None = None
    properties: dict[str, "Node"] | None = None
    required: frozenset[str] = frozenset()
    additional_properties: "Node | bool | None" = None
    min_properties: int | None = None
    max_properties: int | None = None
    stands_for: str | None = msgspec.field(default=None, name="x-bus-type")
    flags: tuple[int, ...] = msgspec.field(default=(), name="x-bus-flags")
    tz: bool | None = msgspec.field(default=None, name="x-bus-tz")
    min_bytes: int | None = msgspec.field(default=None, name="x-bus-minBytes")
    max_bytes: int | None = msgspec.field(default=None, name="x-bus-maxBytes")
    keys: "Node | None" = msgspec.field(default=None, name="x-bus-keys")
    tag: str | None = msgspec.field(default=None, name="x-bus-tag")
    left_out: frozenset[str] = msgspec.field(default=frozenset(), name="x-bus-left-out")

    @property
    def values(self) -> "Node":
        """What a map holds."""
        values = self.additional_properties
        return values if isinstance(values, Node) else ANYTHING


ANYTHING = Node()
TEXT = Node(type="string")


class Facts(msgspec.Struct, frozen=True):
    """How the events of a schema travel."""

    type: str
    version: int
    key: str | None
    topic: str
    encoding: Literal["json", "msgpack"]


class Document(Node, frozen=True, kw_only=True):
    """The schema of one version of an event."""

    facts: Facts = msgspec.field(name="x-bus")
    parts: dict[str, Node] = msgspec.field(default_factory=dict, name="$defs")


class Alternative(NamedTuple):
    """One of the things a value may be.

    kind: the JSON type, or what the text or number stands for; `texts` and `numbers` are lists of
    values; `object` has named properties, `map` any; `anything` is any of all this.
    """

    kind: str
    node: Node
    values: tuple[Value, ...] = ()


def read_document(data: bytes) -> Document:
    """Read an exported schema. Errors: ValueError for anything else."""
    document = msgspec.json.decode(data, type=Document)
    for node in (document, *document.parts.values()):
        _check_refs(document, node)
    return document


def resolved(document: Document, node: Node) -> Node:
    """Follow a reference to what it means."""
    while node.ref is not None:
        node = document.parts[_named(node.ref)]
    return node


def alternatives(document: Document, node: Node) -> list[Alternative]:
    """Return what a value of `node` may be; references are followed, unions taken apart."""
    node = resolved(document, node)
    if node.any_of is not None:
        return [a for option in node.any_of for a in alternatives(document, option)]
    if node.enum is not None and node.type is None:
        return list(_listed(node))
    kind = node.stands_for or node.type or "anything"
    if kind == "object" and node.properties is None:
        kind = "map"
    return [Alternative(kind, node, node.flags)]


def described(document: Document, node: Node, *, deep: bool = True) -> str:
    """Return what a value may be, in words; of lists and maps what they hold, if `deep`."""
    words = [_words(document, a, deep=deep) for a in alternatives(document, node)]
    return " or ".join(dict.fromkeys(words))


def _named(ref: str) -> str:
    return ref.removeprefix("#/$defs/")


def _check_refs(document: Document, node: Node, seen: frozenset[str] = frozenset()) -> None:
    """Refuse references to nothing, and those that lead to themselves with nothing between."""
    if node.ref is not None:
        name = _named(node.ref)
        if name not in document.parts:
            raise ValueError(f"it refers to {node.ref}, which it does not have")
        if name in seen:
            raise ValueError(f"{node.ref} refers to itself")
        _check_refs(document, document.parts[name], seen | {name})
        return
    for option in node.any_of or ():
        _check_refs(document, option, seen)
    for below in _below(node):
        if below.ref is not None and _named(below.ref) in document.parts:
            continue  # looked at as a part of the document
        _check_refs(document, below)


def _below(node: Node) -> Iterable[Node]:
    yield from node.prefix_items
    yield from (node.properties or {}).values()
    for single in (node.items, node.additional_properties, node.keys):
        if isinstance(single, Node):
            yield single


def _listed(node: Node) -> Iterable[Alternative]:
    values = node.enum or ()
    if None in values:
        yield Alternative("null", node)
    for kind, of in (("texts", str), ("numbers", int)):
        if some := tuple(v for v in values if isinstance(v, of)):
            yield Alternative(kind, node, some)


def _words(document: Document, one: Alternative, *, deep: bool) -> str:
    kind, node = one.kind, one.node
    match kind:
        case "texts" | "numbers":
            words = listed(one.values)
        case "object":
            words = f"object {node.title}".rstrip()
        case "array":
            words = _array_words(document, node, deep=deep)
        case "map":
            words = _map_words(document, node, deep=deep)
        case "string":
            pattern = f" matching {node.pattern!r}" if node.pattern is not None else ""
            words = "text" + _span(node.min_length, node.max_length, "characters") + pattern
        case "integer" | "number":
            words = kind + _bounds(node)
        case "flags":
            words = "flags of" + listed(one.values).removeprefix("one of")
        case _:
            zone = {True: " with a time zone", False: " without a time zone", None: ""}[node.tz]
            words = kind + zone + _span(node.min_bytes, node.max_bytes, "bytes")
    return words


def listed(values: Iterable[Value]) -> str:
    """Return values, in words."""
    return "one of " + ", ".join(repr(v) for v in values)


def _map_words(document: Document, node: Node, *, deep: bool) -> str:
    span = _span(node.min_properties, node.max_properties, "entries")
    if not deep:
        return "map" + span
    keys = described(document, node.keys or TEXT, deep=False)
    return f"map of {keys} to {described(document, node.values, deep=False)}" + span


def _array_words(document: Document, node: Node, *, deep: bool) -> str:
    if node.prefix_items:
        items = ", ".join(described(document, i, deep=False) for i in node.prefix_items)
        return f"tuple ({items})" if deep else "tuple"
    word = "set" if node.unique_items else "list"
    of = ""
    if deep and isinstance(node.items, Node):
        of = f" of {described(document, node.items, deep=False)}"
    return word + of + _span(node.min_items, node.max_items, "items")


def _span(least: int | None, most: int | None, what: str) -> str:
    if least is None and most is None:
        return ""
    if most is None:
        return f" of {least} or more {what}"
    return f" of {f'{least} to ' if least is not None else 'up to '}{most} {what}"


def _bounds(node: Node) -> str:
    bounds = {
        ">=": node.minimum,
        ">": node.exclusive_minimum,
        "<=": node.maximum,
        "<": node.exclusive_maximum,
        "divisible by": node.multiple_of,
    }
    said = [f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None]
    return " " + " and ".join(said) if said else ""
