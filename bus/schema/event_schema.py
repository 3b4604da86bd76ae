"""How an event class is told in JSON Schema, and what of it that language has no words for.

The schema is msgspec's, of the class as it travels in JSON. Into it are written

    x-bus            of the event: type, version, key, topic, encoding
    x-bus-type       what a text stands for: datetime, time, date, duration, uuid, decimal, bytes;
                     or a number: flags, that is members of an enum that may be combined
    x-bus-flags      those members
    x-bus-tz         whether such a time must have a time zone
    x-bus-minBytes   bounds of bytes; minLength and maxLength are those of their text
    x-bus-maxBytes
    x-bus-keys       the keys of a map that are not just text (in msgpack, 1 is not "1")
    x-bus-tag        the property that tells the members of a union apart
    x-bus-left-out   properties that a writer leaves out when they have their defaults, or are unset

without which a change from text to datetime, say, would not be seen (bus/schema/compatibility.py).
"""

import enum
import inspect as code
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from msgspec import inspect

from bus.errors import DeclarationError
from bus.event import EventInfo

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def json_schema(info: EventInfo) -> Schema:
    """Return the schema of an event class. Errors: DeclarationError if one cannot be made."""
    cls = info.cls
    try:
        (root,), parts = msgspec.json.schema_components([cls])
        _Notes(parts).write(root, inspect.type_info(cls))
    except Exception as error:  # also what resolving the annotations of the class raises
        raise DeclarationError(
            f"{cls.__qualname__}: no schema of {info.type} version {info.version} can be made:"
            f" {type(error).__name__}: {error}"
        ) from None
    if not _refers_to(root["$ref"], parts):
        root = parts.pop(_part_name(root["$ref"]))
    facts = ("type", "version", "key", "topic", "encoding")
    return {
        "$schema": DIALECT,
        **root,
        "title": cls.__name__,
        **({"description": code.cleandoc(cls.__doc__)} if cls.__doc__ else {}),
        "x-bus": {fact: getattr(info, fact) for fact in facts},
        **({"$defs": parts} if parts else {}),
    }


def _part_name(ref: str) -> str:
    return ref.rpartition("/")[2]


def _refers_to(ref: str, node: Any) -> bool:
    if isinstance(node, dict):
        return node.get("$ref") == ref or any(_refers_to(ref, v) for v in node.values())
    return isinstance(node, list) and any(_refers_to(ref, v) for v in node)


class _Notes:
    """Walks through a schema and the types it was made of, and notes what the schema lacks."""

    def __init__(self, parts: dict[str, Schema]) -> None:
        self._parts = parts
        self._written: set[str] = set()

    def write(self, node: Schema, kind: inspect.Type) -> None:
        """Note in `node` and below what is to be said of `kind`."""
        while isinstance(kind, inspect.Metadata):
            kind = kind.type
        if "$ref" in node:
            name = _part_name(node["$ref"])
            if name in self._written:
                return
            self._written.add(name)
            node = self._parts[name]
        node.update(_facts(kind))
        if node.get("type") == "integer":
            node.pop("enum", None)  # of flags, which may be combined
        if (below := self._BELOW.get(type(kind))) is not None:
            below(self, node, kind)

    def _list(self, node: Schema, kind: Any) -> None:
        if "items" in node:
            self.write(node["items"], kind.item_type)

    def _tuple(self, node: Schema, kind: Any) -> None:
        for item, item_kind in zip(node.get("prefixItems", ()), kind.item_types, strict=True):
            self.write(item, item_kind)

    def _map(self, node: Schema, kind: Any) -> None:
        if "additionalProperties" in node:
            self.write(node["additionalProperties"], kind.value_type)
        keys = _key_schema(kind.key_type)
        if keys != {"type": "string"}:
            node["x-bus-keys"] = keys

    def _union(self, node: Schema, kind: Any) -> None:
        # msgspec lists the structs after the others, in a group if there are several, then null.
        kinds = sorted(kind.types, key=_place_in_union)
        for option, option_kind in zip(_flat(node), kinds, strict=True):
            self.write(option, option_kind)
        for group in [o for o in node["anyOf"] if "anyOf" in o] + [node]:
            group["anyOf"] = _sorted(group["anyOf"])

    def _object(self, node: Schema, kind: Any) -> None:
        tag = getattr(kind, "tag_field", None)
        if node["type"] == "array":  # whose writers leave out nothing
            told = node["prefixItems"][tag is not None :]
            if not node["prefixItems"]:
                del node["prefixItems"]  # JSON Schema wants one at least
        else:
            told = [node["properties"][f.encode_name] for f in kind.fields]
            node["required"] = sorted(node["required"])
            if left_out := sorted(_left_out(kind)):
                node["x-bus-left-out"] = left_out
            if tag is not None:
                node["x-bus-tag"] = tag
        for field, property_ in zip(kind.fields, told, strict=True):
            if "default" in property_ and field.default is not msgspec.NODEFAULT:
                # Otherwise the order of a set would change from run to run.
                property_["default"] = msgspec.to_builtins(
                    field.default, str_keys=True, order="sorted"
                )
            self.write(property_, field.type)

    _BELOW: typing.ClassVar[dict[type, Callable[["_Notes", Schema, Any], None]]] = {
        **dict.fromkeys(
            (
                inspect.ListType,
                inspect.SetType,
                inspect.FrozenSetType,
                inspect.VarTupleType,
                inspect.CollectionType,
            ),
            _list,
        ),
        inspect.TupleType: _tuple,
        inspect.DictType: _map,
        inspect.FrozenDictType: _map,
        inspect.UnionType: _union,
        inspect.StructType: _object,
        inspect.DataclassType: _object,
        inspect.TypedDictType: _object,
        inspect.NamedTupleType: _object,
    }


def _flat(node: Schema) -> list[Schema]:
    """Return the options of a union; those of a group in it, too."""
    options: Iterable[Schema] = node["anyOf"]
    return [o for option in options for o in (_flat(option) if "anyOf" in option else [option])]


def _sorted(options: list[Schema]) -> list[Schema]:
    """Order the options: Python keeps them as it met them first, which depends on the imports."""
    return sorted(
        options,
        key=lambda o: (o.get("type") == "null", msgspec.json.encode(o, order="sorted")),
    )


def _place_in_union(kind: inspect.Type) -> int:
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.NoneType):
        return 2
    return int(isinstance(kind, inspect.StructType) and not kind.array_like)


_TEXTS: dict[type, str] = {
    inspect.DateTimeType: "datetime",
    inspect.TimeType: "time",
    inspect.DateType: "date",
    inspect.TimeDeltaType: "duration",
    inspect.UUIDType: "uuid",
    inspect.DecimalType: "decimal",
    inspect.BytesType: "bytes",
    inspect.ByteArrayType: "bytes",
    inspect.MemoryViewType: "bytes",
}


def _facts(kind: Any) -> Schema:
    """Return what is to be noted of a type itself."""
    facts: Schema = {}
    if (stands_for := _TEXTS.get(type(kind))) is not None:
        facts["x-bus-type"] = stands_for
        facts["x-bus-tz"] = getattr(kind, "tz", None)
        if stands_for == "bytes":
            facts["x-bus-minBytes"] = kind.min_length
            facts["x-bus-maxBytes"] = kind.max_length
    elif isinstance(kind, inspect.EnumType) and issubclass(kind.cls, enum.Flag):
        facts["type"] = "integer"
        # Others take values that no member stands for: any.
        if kind.cls._boundary_ is enum.STRICT:  # type: ignore[attr-defined] # the stubs lack it
            facts["x-bus-type"] = "flags"
            facts["x-bus-flags"] = sorted(member.value for member in kind.cls)
    return {name: fact for name, fact in facts.items() if fact is not None}


_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "min_length": "minLength",
    "max_length": "maxLength",
    "pattern": "pattern",
}
_KEYS: dict[type, str] = {
    inspect.StrType: "string",
    inspect.IntType: "integer",
    inspect.FloatType: "number",
    inspect.BoolType: "boolean",
    inspect.NoneType: "null",
    **dict.fromkeys(_TEXTS, "string"),
}


def _key_schema(kind: Any) -> Schema:
    """Return the schema of a map's keys, of which JSON Schema knows only texts."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.AnyType):
        return {}
    if isinstance(kind, inspect.UnionType):
        return {"anyOf": _sorted([_key_schema(k) for k in kind.types])}
    if isinstance(kind, inspect.LiteralType):
        return {"enum": sorted(kind.values, key=repr)}
    if isinstance(kind, inspect.EnumType):
        return _facts(kind) or {"enum": sorted(member.value for member in kind.cls)}
    if type(kind) not in _KEYS:  # a tuple, for example, which only msgpack takes
        return {"x-bus-type": "other", "const": str(kind)}
    bounds = {name: getattr(kind, bound, None) for bound, name in _BOUNDS.items()}
    told = {name: bound for name, bound in bounds.items() if bound is not None}
    return {"type": _KEYS[type(kind)], **told, **_facts(kind)}


def _left_out(kind: Any) -> Iterable[str]:
    """Return the fields that a writer leaves out at times."""
    cls = getattr(kind.cls, "__origin__", kind.cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    omits = isinstance(kind, inspect.TypedDictType) or (
        isinstance(kind, inspect.StructType) and cls.__struct_config__.omit_defaults
    )
    for field in kind.fields:
        if (omits and not field.required) or _may_be_unset(hints.get(field.name)):
            yield field.encode_name


def _may_be_unset(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType):
        return any(map(_may_be_unset, typing.get_args(hint)))
    return hint is msgspec.UnsetType
