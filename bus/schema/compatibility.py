"""Whether what one schema writes can be read by another, as msgspec would read it.

Both directions of a change are this one question: new readers read what the old schema wrote, old
readers read what the new one writes. The answer follows msgspec's strict decoding where that is
more lenient than JSON Schema (a whole number may be read as a float or a decimal, unknown fields
are skipped, a set may be read as a list) or depends on the encoding (msgpack writes times and bytes
as such, and the keys of a map as what they are). Where a schema cannot tell, it says "breaks".

Taken as given: whole numbers that become floats are below 1e308, and values are in the range of
their type. `tests/schema/test_compatibility.py` compares its answers with msgspec's.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bus.schema.node import (
    ANYTHING,
    TEXT,
    Alternative,
    Document,
    Node,
    Value,
    alternatives,
    described,
    resolved,
)
from bus.schema.plain import TEXTS, fits, or_endless, takes_any_text


class Problem(NamedTuple):
    """What a reader cannot read, or, if it does not break anything, would hardly expect.

    path: of the field, such as `lines[].price`; "" for the event itself. remedy: what can be done
    about it other than raising the version; "" if nothing.
    """

    path: str
    text: str
    remedy: str = ""
    breaks: bool = True


def problems(reader: Document, writer: Document, *, reader_is_new: bool) -> list[Problem]:
    """Return what `reader` cannot read of what `writer` writes.

    reader_is_new: whether the reader is this code and the writer what was exported; otherwise it is
    the other way round. An exported schema may have been written by older classes than that: of
    what it does not require anything may be missing.
    """
    comparison = _Comparison(reader, writer, reader_is_new=reader_is_new)
    return list(dict.fromkeys(comparison.check("", reader, writer)))


# What reads a number: the first of these that a union has, and then no other.
_WHOLE = (frozenset(("integer", "numbers", "flags")), frozenset(["number"]), frozenset(["decimal"]))
_OBJECTS = frozenset(("object", "map"))


class _Comparison:
    """One direction of the comparison of two schemas."""

    def __init__(self, reader: Document, writer: Document, *, reader_is_new: bool) -> None:
        self._reader = reader
        self._writer = writer
        self._reader_is_new = reader_is_new
        self._packed = writer.facts.encoding == "msgpack"
        self._under_way: set[tuple[int, int]] = set()

    def check(self, path: str, reader: Node, writer: Node) -> list[Problem]:
        """Return the problems of one place in the event, and of all below."""
        reader, writer = resolved(self._reader, reader), resolved(self._writer, writer)
        pair = id(reader), id(writer)
        readers = alternatives(self._reader, reader)
        if pair in self._under_way or any(r.kind == "anything" for r in readers):
            return []
        self._under_way.add(pair)
        changed = self._changed(path, reader, writer)
        try:
            return [
                problem
                for written in self._written(writer)
                for problem in self._one(path, readers, written, changed)
            ]
        finally:
            self._under_way.discard(pair)

    def _written(self, node: Node) -> Iterable[Alternative]:
        options = alternatives(self._writer, node)
        yield from options
        # Python puts an int where a float is declared; beside an int it has to be one of those.
        if not any(o.kind in _WHOLE[0] for o in options):
            yield from (Alternative("integer", o.node) for o in options if o.kind == "number")

    def _one(
        self, path: str, readers: Sequence[Alternative], written: Alternative, changed: Problem
    ) -> list[Problem]:
        tiers = ([r for r in readers if r.kind in tier] for tier in self._tiers(written))
        takers = next((takers for takers in tiers if takers), [])
        if not takers:
            return [changed]
        members = self._members(takers, written)
        if not members:
            return [self._unknown_member(path, written, changed)]
        answers = [self._compare(path, member, written, changed) for member in members]
        fine = (answer for answer in answers if not any(p.breaks for p in answer))
        return next(fine, answers[0])

    def _tiers(self, written: Alternative) -> Sequence[frozenset[str]]:
        """Return the kinds that read what is written, those that msgspec prefers first."""
        kind = written.kind
        if kind in _WHOLE[0]:
            return _WHOLE
        if kind == "number":
            return _WHOLE[1:]
        if kind in _OBJECTS:
            return (_OBJECTS,)
        if kind == "anything":
            return ()
        as_such = kind == "bytes" or (kind == "datetime" and written.node.tz is not False)
        if kind in TEXTS and not (self._packed and as_such):
            return (TEXTS,)
        return (frozenset([kind]),)

    def _compare(
        self, path: str, reader: Alternative, written: Alternative, changed: Problem
    ) -> list[Problem]:
        match reader.kind:
            case "object":
                return self._into_object(path, reader.node, written, changed)
            case "map":
                return self._into_map(path, reader.node, written, changed)
            case "array":
                return self._into_array(path, reader.node, written.node, changed)
            case "texts" | "numbers" | "flags":
                return self._into_listed(path, reader, written, changed)
        return [] if fits(reader, written) else [changed]

    # --- values

    def _into_listed(
        self, path: str, reader: Alternative, written: Alternative, changed: Problem
    ) -> list[Problem]:
        if not written.values or (written.kind == "flags" and reader.kind != "flags"):
            return [changed]
        unknown = [v for v in written.values if v not in reader.values]
        if not unknown:
            return []
        values = ", ".join(map(repr, unknown))
        several = len(unknown) > 1
        if self._reader_is_new:
            text = f"{values} {'are no values' if several else 'is no value'} any more"
            return [Problem(path, text, "Keep it" if not several else "Keep them")]
        text = f"{values} {'are new values' if several else 'is a new value'}"
        return [Problem(path, text, _READERS_FIRST)]

    def _changed(self, path: str, reader: Node, writer: Node) -> Problem:
        read = described(self._reader, reader)
        written = described(self._writer, writer)
        old, new = (written, read) if self._reader_is_new else (read, written)
        text = f"was {old}, is now {new}" if old != new else f"is another {new} now"
        return Problem(path, text, "" if self._reader_is_new else _READERS_FIRST)

    # --- lists and tuples

    def _into_array(self, path: str, reader: Node, writer: Node, changed: Problem) -> list[Problem]:
        least, most = self._lengths(writer)
        in_bounds = (reader.min_items or 0) <= least and most <= or_endless(reader.max_items)
        # In JSON msgspec counts the items of a set after those that are equal have become one.
        may_shrink = reader.unique_items and not writer.unique_items and not self._packed
        if not in_bounds or (may_shrink and (reader.min_items or 0) > 1):
            return [changed]
        fixed = max(len(reader.prefix_items), len(writer.prefix_items))
        found = [
            problem
            for n in range(int(min(fixed, most)))
            for problem in self.check(f"{path}[{n}]", _item(reader, n), _item(writer, n))
        ]
        if most > fixed:
            found += self.check(f"{path}[]", _item(reader, fixed), _item(writer, fixed))
        return found

    def _lengths(self, writer: Node) -> tuple[int, float]:
        """Return how few and how many items may be written."""
        fixed = len(writer.prefix_items)
        if not fixed:
            return writer.min_items or 0, or_endless(writer.max_items)
        return (writer.min_items or 0) if self._reader_is_new else fixed, fixed

    # --- objects and maps

    def _into_object(
        self, path: str, reader: Node, written: Alternative, changed: Problem
    ) -> list[Problem]:
        properties = reader.properties or {}
        required = reader.required - {reader.tag}
        writer = written.node
        if written.kind == "map":
            if required or reader.additional_properties is False or not self._keys_are_text(writer):
                return [changed]
            there = dict.fromkeys(properties, writer.values)
        else:
            there = writer.properties or {}
        found = []
        for name in properties:
            below = f"{path}.{name}" if path else name
            if name in there:
                if name in required and self._may_lack(writer, name):
                    found.append(self._lacks(below))
                found += self.check(below, properties[name], there[name])
            elif name in required:
                found.append(self._missing(below, name, reader, writer))
            elif (
                self._reader_is_new and (old := self._other_name(name, reader, writer)) is not None
            ):
                found.append(_maybe_renamed(below, old, name))
        if reader.additional_properties is False:
            unknown = [name for name in there if name not in properties]
            found += [self._unknown(f"{path}.{name}" if path else name) for name in unknown]
        return found

    def _into_map(
        self, path: str, reader: Node, written: Alternative, changed: Problem
    ) -> list[Problem]:
        writer = written.node
        if written.kind == "map":
            held = {f"{path}{{}}": writer.values}
            keys = writer.keys or TEXT
            least, most = writer.min_properties or 0, or_endless(writer.max_properties)
        else:
            properties = writer.properties or {}
            held = {f"{path}.{name}": node for name, node in properties.items()}
            keys = Node(enum=tuple(properties))
            least = sum(not self._may_lack(writer, name) for name in properties)
            most = len(properties)
        if (reader.min_properties or 0) > least or most > or_endless(reader.max_properties):
            return [changed]
        found = self._keys(f"{path}{{key}}", reader.keys or TEXT, keys) if most else []
        for below, node in held.items():
            found += self.check(below, reader.values, node)
        return found

    def _keys(self, path: str, reader: Node, writer: Node) -> list[Problem]:
        texts = [r for r in alternatives(self._reader, reader) if r.kind == "string"]
        if not self._packed and any(takes_any_text(r.node) for r in texts):
            return []  # in JSON all keys are text
        return self.check(path, reader, writer)

    def _keys_are_text(self, writer: Node) -> bool:
        keys = alternatives(self._writer, writer.keys or TEXT)
        return not self._packed or all(self._tiers(key) == (TEXTS,) for key in keys)

    def _may_lack(self, writer: Node, name: str) -> bool:
        if self._reader_is_new:
            return name not in writer.required
        return name in writer.left_out

    # --- the members of a union

    def _members(self, takers: list[Alternative], written: Alternative) -> list[Alternative]:
        """Return those that the tag of what is written leads to; all, where tags do not matter."""
        if takers[0].kind not in ("object", "array"):
            return takers
        said = _tag(self._writer, written)
        tags = [_tag(self._reader, taker) for taker in takers]
        if len(takers) == 1:
            lone = tags[0]
            if written.kind == "array" or not said or not lone or said[0] != lone[0]:
                return takers
        return [t for t, tag in zip(takers, tags, strict=True) if said and tag == said]

    def _unknown_member(self, path: str, written: Alternative, changed: Problem) -> Problem:
        tag = _tag(self._writer, written)
        if not tag:
            return changed
        name = ", ".join(map(repr, tag[1]))
        if self._reader_is_new:
            return Problem(path, f"member {name} was removed from the union", "Keep it")
        return Problem(path, f"member {name} is new in the union", _READERS_FIRST)

    # --- fields that only one side has

    def _missing(self, path: str, name: str, reader: Node, writer: Node) -> Problem:
        other = self._other_name(name, reader, writer)
        if self._reader_is_new:
            text = "is new and has no default: entries written before lack it"
            remedy = "Give it a default" + _if_renamed(other, name)
        else:
            text = "was removed, and old readers need it"
            remedy = (
                "Keep writing it until every reader has been deployed that has a default for it"
                + _if_renamed(name, other)
            )
        return Problem(path, text, remedy)

    def _lacks(self, path: str) -> Problem:
        if self._reader_is_new:
            text = "has no default any more: entries written before it was added lack it"
            return Problem(path, text, "Keep the default")
        text = "is left out at times (by omit_defaults, or as UNSET), and old readers need it"
        return Problem(path, text, _READERS_FIRST)

    def _unknown(self, path: str) -> Problem:
        if self._reader_is_new:
            text = "was removed, and its class forbids unknown fields"
            return Problem(path, text, "Keep it, or drop forbid_unknown_fields")
        text = "is new, and old readers forbid unknown fields"
        return Problem(path, text, _READERS_FIRST)

    def _other_name(self, name: str, reader: Node, writer: Node) -> str | None:
        """Return the one field of the writer that the reader's `name` may have been renamed to."""
        mine, theirs = reader.properties or {}, writer.properties or {}
        words = described(self._reader, mine[name])
        if name == reader.tag:
            return None
        only_there = [n for n in theirs if n not in mine and n != writer.tag]
        alike = [n for n in only_there if described(self._writer, theirs[n]) == words]
        return alike[0] if len(alike) == 1 else None


_READERS_FIRST = "Deploy readers that take it before anything writes it"


def _if_renamed(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return ""
    return (
        f" (or, if `{old}` has become `{new}`, keep the old name on the wire:"
        f" {new} = msgspec.field(name={old!r}))"
    )


def _maybe_renamed(path: str, old: str, new: str) -> Problem:
    return Problem(
        path,
        f"is new, and `{old}` of the same type is gone: if it was renamed, what entries hold under"
        " the old name is lost on new readers, which see the default",
        f"In that case keep the old name on the wire: {new} = msgspec.field(name={old!r})",
        breaks=False,
    )


def _tag(document: Document, one: Alternative) -> tuple[str, tuple[Value, ...]] | None:
    """Return name and value of what tells the members of a union apart, None if nothing does."""
    node = one.node
    if node.tag is not None and node.properties is not None and node.tag in node.properties:
        said = alternatives(document, node.properties[node.tag])
        return node.tag, said[0].values
    if node.prefix_items and (said := alternatives(document, node.prefix_items[0]))[0].values:
        return "", said[0].values
    return None


def _item(node: Node, n: int) -> Node:
    if n < len(node.prefix_items):
        return node.prefix_items[n]
    return node.items if isinstance(node.items, Node) else ANYTHING
