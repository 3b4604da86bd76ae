"""Steps from an old version of an event to the next, run on whatever is read.

    class DocumentCreated(Event, type="document.created", version=3): ...

    @upcast(DocumentCreated, from_version=1)
    def name_becomes_title(data: dict[str, Any]) -> dict[str, Any]:
        data["title"] = data.pop("name")
        return data

    @upcast(DocumentCreated, from_version=2)
    def ...

Old entries stay as they were written; each time one is read (live, by a retry, in history, as a
dead letter) its data goes through the steps from its version to the newest and becomes an event of
the newest class. A handler knows that class alone. The entry keeps its id, key, topic, partition
and version (`delivery.envelope.version`).

A step sees builtins as the entry has them: from JSON text for times, UUIDs, decimals and bytes;
from msgpack times and bytes as such. What the last step returns is encoded the same way again and
decoded by the class, so that it is judged exactly as a new entry is. [m] 1.3 us for a small event
and two steps, beside 0.2 us without. Events of the newest version pay nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

import msgspec

from bus.errors import DeclarationError, InvalidEvent, Undecodable
from bus.event import Encoding, Event, EventInfo, Step, add_step, info_of, step_from

Change = Callable[[dict[str, Any]], dict[str, Any]]
_C = TypeVar("_C", bound=Change)


def upcast(event: type[Event], *, from_version: int) -> Callable[[_C], _C]:
    """Declare how the data of version `from_version` becomes that of the next version.

    event: the class of the newest version. The function takes the old data as a dict of its own,
    which it may change in place, and returns the new data; it must not wait, and should depend on
    nothing else: it runs again with every read. It is returned unchanged, to be tested by itself.

    Steps chain. Where one is missing, entries from before it are read by the class of exactly
    their version if there is one, and are undecodable if not. A function that raises, or whose data
    the class refuses, makes the entry undecodable, too: a dead letter, to be redriven when the
    function has been corrected. Errors: DeclarationError.
    """
    if not (isinstance(event, type) and issubclass(event, Event)):
        raise DeclarationError(f"upcast takes the event class and from_version=, not {event!r}")
    info = info_of(event)
    name = f"upcast of {event.__qualname__}"
    if isinstance(from_version, bool) or not isinstance(from_version, int) or from_version < 1:
        raise DeclarationError(
            f"{name}: from_version must be a whole number from 1, not {from_version!r}"
        )
    if from_version >= info.version:
        raise DeclarationError(
            f"{name}: from_version={from_version} must be below the version of the class,"
            f" {info.version}: raise that to {from_version + 1} first, or name the newest class"
        )

    def declare(change: _C) -> _C:
        _check_signature(change, f"{name} from version {from_version}")
        step = _Change(info.type, from_version, change)
        other = step_from(info.type, from_version)
        # The same function again is a module that was reloaded, as with event classes.
        if isinstance(other, _Change) and other.place != step.place:
            raise DeclarationError(
                f"{name} from version {from_version} is declared twice:"
                f" {'.'.join(other.place)} and {'.'.join(step.place)}; remove one"
            )
        add_step(info.type, from_version, step)
        return change

    return declare


def _check_signature(change: Any, name: str) -> None:
    if not callable(change):
        raise DeclarationError(f"{name}: decorates a function of the old data, not {change!r}")
    waits = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(w(f) for w in waits for f in (change, getattr(change, "__call__", None))):  # noqa: B004
        raise DeclarationError(
            f"{name}: must be a plain function, neither async nor a generator: take what it would"
            " wait for into the handler"
        )
    try:
        signature = inspect.signature(change)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind({})
    except TypeError:
        raise DeclarationError(
            f"{name}: takes the old data alone, (data), not {signature}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Change:
    """A declared step: the function, and where it belongs."""

    type: str
    from_version: int
    change: Change

    @property
    def place(self) -> tuple[str, str]:
        """Where the function was defined; of an object that is none, its class."""
        named = self.change if hasattr(self.change, "__qualname__") else type(self.change)
        return named.__module__, named.__qualname__

    def reader(self, newest: EventInfo, steps: Sequence[Step]) -> EventInfo:
        """Return what reads entries of this version as the newest."""
        return _Upcast(newest, self.from_version, [s for s in steps if isinstance(s, _Change)])

    def __call__(self, data: Any) -> dict[str, Any]:
        """Make the step. Errors: Undecodable, which quotes nothing of the event."""
        try:
            changed = self.change(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too: an old entry must not end a worker
            raise Undecodable(f"{self.named} raised {_shown(error, self.change)}") from None
        if not isinstance(changed, dict):
            hint = ": it must end with `return data`" if changed is None else ""
            raise Undecodable(f"{self.named} returned {type(changed).__name__}, no dict{hint}")
        return changed

    @property
    def named(self) -> str:
        return f"the upcast from version {self.from_version} ({self.place[1]})"


class _Upcast(EventInfo):
    """Reads entries of an older version as events of the newest class."""

    def __init__(self, newest: EventInfo, version: int, steps: Sequence[_Change]) -> None:
        facts = (newest.key, newest.topic, newest.encoding)
        super().__init__(newest.cls, newest.type, version, *facts)
        self.encode = self._refuse
        self._newest = newest
        self._steps = steps

    def decoder(self, encoding: Encoding) -> Callable[[bytes], Event]:
        """Return a decoder that makes the steps between the bytes and the class."""
        codec: Any = msgspec.json if encoding == "json" else msgspec.msgpack
        return partial(
            self._decode,
            codec.Decoder().decode,
            codec.Encoder().encode,
            self._newest.decoder(encoding),
        )

    @property
    def read_as(self) -> str:
        """Which entry it was, and what it was read as."""
        return f"{self.type} version {self.version}, read as version {self._newest.version}"

    def _decode(
        self,
        load: Callable[[bytes], Any],
        dump: Callable[[Any], bytes],
        judge: Callable[[bytes], Event],
        data: bytes,
    ) -> Event:
        value = load(data)
        if not isinstance(value, dict):
            raise Undecodable(f"the data is {type(value).__name__}, not an object")
        for step in self._steps:
            value = step(value)
        return judge(dump(value))

    def _refuse(self, _: Any) -> bytes:
        raise InvalidEvent(
            f"{self.type} version {self.version} is only read: publish version"
            f" {self._newest.version}"
        )


def _shown(error: BaseException, change: Change) -> str:
    """Return kind and place of an error, without its text: that may quote the event."""
    code = getattr(change, "__code__", None)
    lines = [
        f"{Path(frame.f_code.co_filename).name}:{line}"
        for frame, line in walk_tb(error.__traceback__)
        if code is not None and frame.f_code.co_filename == code.co_filename
    ]
    return f"{type(error).__name__} at {lines[-1]}" if lines else type(error).__name__
