"""What happened: event classes, their names, and how types are matched by pattern.

    class DocumentCreated(Event, type="document.created", version=2, key="document_id"):
        document_id: str
        title: str

An event is a frozen msgspec Struct with keyword-only fields. The class keywords say how it
travels; they are no fields, so an event may have fields named `type` or `key`:

    type      dotted name, `family.what_happened`; a class without it is a base for others
    version   whole number from 1; raise it only for changes that old readers cannot take
    key       name of the field whose value decides the partition, hence the order
    topic     where it is kept, if not the first segment of its type
    family    on a base class: what the types of all its children begin with
    encoding  "json" (default, readable with redis-cli) or "msgpack"

The first segment of a type is its family. Patterns route by it (`model.*`), and a `hook.` event is
a question, which `bus.intervene` asks in this process: it is never published.

An event is a value: frozen, slotted, compared and hashed by its fields. So it is hashable as far as
they are: with tuples and frozensets, and not with lists, dicts or sets.

Classes are known process-wide by (type, version), and so are the steps that lead an older version
up to the newest (bus/upcasts.py). No I/O happens here.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, dataclass_transform

import msgspec
from msgspec import StructMeta, inspect

from bus.config import checked_name, checked_number
from bus.errors import DeclarationError, UnknownEventType

Encoding = Literal["json", "msgpack"]
QUESTIONS = "hook"  # the family of what is asked in this process alone, and never published

_TYPE = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]*(\.[a-zA-Z0-9_-]+)+")
_FAMILY = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]*")
_PATTERN = re.compile(r"(\*|[a-zA-Z][a-zA-Z0-9_-]*)(\.(\*|[a-zA-Z0-9_-]+))*")


class EventInfo:
    """How one event class travels; made once, when the class is declared."""

    def __init__(
        self,
        cls: "type[Event]",
        type: str,
        version: int,
        key: str | None,
        topic: str,
        encoding: Encoding,
    ) -> None:
        self.cls = cls
        self.type = type
        self.family = type.partition(".")[0]
        self.version = version
        self.key = key
        self.topic = topic
        self.encoding: Encoding = encoding
        codec = msgspec.json if encoding == "json" else msgspec.msgpack
        self.encode: Callable[[Any], bytes] = codec.Encoder().encode

    @cached_property
    def decode(self) -> "Callable[[bytes], Event]":
        """The decoder for the class's own encoding."""
        return self.decoder(self.encoding)

    def decoder(self, encoding: Encoding) -> "Callable[[bytes], Event]":
        """Make the strict decoder of the class; late, when all annotations can be resolved."""
        codec = msgspec.json if encoding == "json" else msgspec.msgpack
        decode: Callable[[bytes], Event] = codec.Decoder(self.cls).decode
        return decode

    @property
    def read_as(self) -> str:
        """What errors of reading call it; never a value of an event."""
        return self.type

    @cached_property
    def may_hold_floats(self) -> bool:
        """Whether any field can hold a float, so that NaN and Infinity must be looked for."""
        return _may_hold_floats(inspect.type_info(self.cls), set())

    def __repr__(self) -> str:
        return f"<{self.type} v{self.version}>"


class Step(Protocol):
    """One upcast: from a version of a type to the next. See bus/upcasts.py."""

    def reader(self, newest: EventInfo, steps: "Sequence[Step]") -> EventInfo:
        """Return what reads entries of this step's version, through `steps`, as the newest."""


_known: dict[tuple[str, int], EventInfo] = {}  # the classes
_steps: dict[tuple[str, int], Step] = {}  # by the version they start from
_readers: dict[tuple[str, int], EventInfo] = {}  # what reads entries: a class, or steps up to one


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class EventMeta(StructMeta):
    """Metaclass of Event: takes the travel keywords, which msgspec itself refuses."""

    def __new__(  # noqa: PYI034 - a metaclass makes classes of its own kind
        mcs,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        *,
        type: str | None = None,
        version: int = 1,
        key: str | None = None,
        topic: str | None = None,
        encoding: Encoding | None = None,
        family: str | None = None,
        **struct_options: Any,
    ) -> "EventMeta":
        """Make the Struct class and, if it has a type, make it known process-wide."""
        for option, required in (("frozen", True), ("kw_only", True)):
            if struct_options.setdefault(option, required) is not required:
                raise DeclarationError(f"{name}: events are always {option}")
        for option in ("tag", "tag_field", "array_like"):
            if struct_options.get(option):
                raise DeclarationError(
                    f"{name}: {option!r} does not go with events; the type travels in its own field"
                )
        cls: Any = super().__new__(mcs, name, bases, namespace, **struct_options)
        travel: dict[str, Any] = {
            "key": _inherited(bases, "key") if key is None else key,
            "topic": _inherited(bases, "topic") if topic is None else topic,
            "encoding": encoding if encoding is not None else _inherited(bases, "encoding"),
            "family": _checked_family(_inherited(bases, "family"), family, name),
        }
        cls.__event_travel__ = travel
        cls.__event_info__ = None
        if type is not None:
            cls.__event_info__ = _declare(cls, type, version, **travel)
        return cls  # type: ignore[no-any-return]


def _inherited(bases: tuple[type, ...], what: str) -> Any:
    for base in bases:
        value = getattr(base, "__event_travel__", {}).get(what)
        if value is not None:
            return value
    return None


def _checked_family(inherited: str | None, family: str | None, name: str) -> str | None:
    if family is None:
        return inherited
    if not isinstance(family, str) or not _FAMILY.fullmatch(family):
        raise DeclarationError(
            f"{name}: family {family!r} is not the first segment of a type, such as 'document'"
        )
    if inherited not in (None, family):
        raise DeclarationError(f"{name}: its base class is of the family {inherited!r} already")
    return family


# Said again: Struct is one to type checkers, and a base class goes before a metaclass.
@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, metaclass=EventMeta):
    """Base of all events: frozen, keyword-only, hashable, tolerant of unknown fields.

    `hash(event)` is that of its fields: TypeError if one holds a list, dict or set.
    Errors: DeclarationError for a bad type, version, key, topic, encoding or family, and for a
    second class with the same type and version.
    """

    __event_info__: ClassVar[EventInfo | None]
    __event_travel__: ClassVar[dict[str, Any]]

    if TYPE_CHECKING:

        def __init_subclass__(
            cls,
            *,
            type: str | None = None,
            version: int = 1,
            key: str | None = None,
            topic: str | None = None,
            encoding: Encoding | None = None,
            family: str | None = None,
        ) -> None: ...


def _declare(
    cls: type[Event],
    type: str,
    version: int,
    key: str | None,
    topic: str | None,
    encoding: Encoding | None,
    family: str | None,
) -> EventInfo:
    name = cls.__qualname__
    checked_type(type, name)
    if family is not None and type.partition(".")[0] != family:
        raise DeclarationError(
            f"{name}: type {type!r} is not of the family of its base class: it begins with"
            f" '{family}.'"
        )
    checked_number(version, f"{name}: version", 1, 1_000_000, whole=True)
    if key is not None and key not in cls.__struct_fields__:
        raise DeclarationError(f"{name}: key {key!r} is no field of the event")
    encoding = "json" if encoding is None else encoding
    if encoding not in ("json", "msgpack"):
        raise DeclarationError(f"{name}: encoding is 'json' or 'msgpack', not {encoding!r}")
    if topic is None:
        topic = type.partition(".")[0]
    checked_name(topic, f"{name}: topic")
    info = EventInfo(cls, type, version, key, topic, encoding)
    other = _known.get((type, version))
    # The same class again is a module that was reloaded, not a conflict.
    if other is not None and _place(other.cls) != _place(cls):
        raise DeclarationError(
            f"{type} version {version} is declared twice:"
            f" {'.'.join(_place(other.cls))} and {'.'.join(_place(cls))}"
        )
    _known[type, version] = info
    _connect(type)
    return info


def checked_type(type: object, what: str) -> str:
    """Return `type` if it is the name of an event type, else raise DeclarationError."""
    if not isinstance(type, str) or not _TYPE.fullmatch(type) or len(type) > 100:  # noqa: PLR2004 - longer ones are no names
        raise DeclarationError(
            f"{what}: type {type!r} is not a dotted name such as 'document.created'"
            f"{_of_family(type)}"
        )
    return type


def _of_family(type: object) -> str:
    """Return what is wrong with the family of a type, "" if that is not what is wrong."""
    family, dot, _ = type.partition(".") if isinstance(type, str) else ("", "", "")
    if not dot or _FAMILY.fullmatch(family):
        return ""
    return f": its family, {family!r}, must begin with a letter, then letters, digits, _ and -"


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def info_of(cls: type[Event]) -> EventInfo:
    """Return how `cls` travels. Errors: DeclarationError for a class without a type."""
    info = getattr(cls, "__event_info__", None)
    if not isinstance(info, EventInfo):
        raise DeclarationError(
            f"{getattr(cls, '__qualname__', cls)!r} has no type:"
            " declare it as class X(Event, type='family.what_happened')"
        )
    return info


def find(type: str, version: int) -> EventInfo:
    """Return what reads the entries of (type, version).

    That is the newest class, if upcasts lead to it from that version without a gap, else the class
    of exactly that version. Errors: UnknownEventType, which says what is known and what is missing.
    """
    info = _readers.get((type, version))
    if info is None:
        versions = sorted(v for t, v in _known if t == type)
        have = f"known versions: {versions}" if versions else "no version of it is known"
        if versions and 0 < version < versions[-1]:
            newest = _known[type, versions[-1]].cls.__qualname__
            step = missing_steps(type, version)[0]
            have += f"; to read it, write @upcast({newest}, from_version={step})"
        raise UnknownEventType(f"{type} version {version}: {have}")
    return info


def step_from(type: str, version: int) -> Step | None:
    """Return the step declared from that version to the next, if there is one."""
    return _steps.get((type, version))


def add_step(type: str, version: int, step: Step) -> None:
    """Make a step known, from that version to the next, instead of any that was."""
    _steps[type, version] = step
    _connect(type)


def missing_steps(type: str, version: int) -> list[int]:
    """Return the versions, from `version` on, that no step leaves on the way to the newest."""
    return [v for v in range(version, newest_version(type)) if (type, v) not in _steps]


def _connect(type: str) -> None:
    """Settle what reads each version of `type`, after a class or a step of it was declared."""
    newest = newest_version(type)
    for version in {v for t, v in (*_known, *_steps) if t == type}:
        info = _known.get((type, version))
        if version < newest and not missing_steps(type, version):
            steps = [_steps[type, v] for v in range(version, newest)]
            info = steps[0].reader(_known[type, newest], steps)
        if info is None:
            _readers.pop((type, version), None)
        else:
            _readers[type, version] = info


def newest_version(type: str) -> int:
    """Return the highest version known of `type`, 0 if none is."""
    return max((v for t, v in _known if t == type), default=0)


def known_events() -> list[EventInfo]:
    """Return every declared event class, in order of type and version."""
    return [_known[k] for k in sorted(_known)]


def pattern_of(what: "str | type[Event]") -> str:
    """Return the pattern that an event class, a type or a pattern stands for.

    Errors: DeclarationError.
    """
    if not isinstance(what, str):
        return info_of(what).type
    type_matches(what, "")  # raises for one that is none
    return what


@lru_cache(maxsize=4096)
def type_matches(pattern: str, type: str) -> bool:
    """Return whether `type` is named by `pattern`.

    `*` stands for one segment; as the last segment it stands for one or more: `document.*`,
    `*.deleted`, `*`. Errors: DeclarationError for anything else than segments and `*`.
    """
    return _compiled(pattern).fullmatch(type) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
        raise DeclarationError(
            f"type pattern {pattern!r} is not valid:"
            " dotted segments, each a name or '*', such as 'document.*'"
        )
    *head, last = pattern.split(".")
    parts = [r"[^.]+" if s == "*" else re.escape(s) for s in head]
    parts.append(r".+" if last == "*" else re.escape(last))
    return re.compile(r"\.".join(parts))


def _may_hold_floats(node: Any, seen: set[type]) -> bool:
    if isinstance(node, inspect.FloatType | inspect.AnyType | inspect.CustomType):
        return True
    if isinstance(node, inspect.StructType | inspect.DataclassType):
        if node.cls in seen:
            return False
        seen.add(node.cls)
        return any(_may_hold_floats(f.type, seen) for f in node.fields)
    if isinstance(node, inspect.TypedDictType | inspect.NamedTupleType):
        return any(_may_hold_floats(f.type, seen) for f in node.fields)
    inner = [getattr(node, a, None) for a in ("item_type", "key_type", "value_type")]
    inner += [*getattr(node, "item_types", ()), *getattr(node, "types", ())]
    return any(_may_hold_floats(n, seen) for n in inner if n is not None)
