"""Steps from old versions to the newest: how they are declared, and what reads through them."""

from __future__ import annotations

import functools
import sys
import time
import traceback
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import msgspec
import pytest

from bus import (
    DeclarationError,
    Event,
    InvalidEvent,
    Undecodable,
    UnknownEventType,
    event,
    event_handler,
    upcast,
)
from bus.delivery import DeadLetter, Delivery, Origin, Park
from bus.event import find, info_of, missing_steps
from bus.streams.codec import decode, encode, envelope_of, info_for, locate, open_envelope
from bus.worker.executor import Executor

CANARY = "s3cret-canary"
STREAM = "bus:{up:0}"


@pytest.fixture(autouse=True)
def own_register(monkeypatch):
    """Classes and steps declared in a test are known during that test alone."""
    for register in ("_known", "_steps", "_readers"):
        monkeypatch.setattr(event, register, dict(getattr(event, register)))


@pytest.fixture
def created():
    """The newest of three versions."""

    class Created(Event, type="up.created", version=3, key="doc"):
        doc: str
        title: str
        pages: int = 0

    return Created


def name_becomes_title(data: dict[str, Any]) -> dict[str, Any]:
    data["title"] = data.pop("name")
    return data


def id_becomes_doc(data: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in data.items() if k != "id"}, "doc": data["id"]}


@pytest.fixture
def steps(created):
    """Both steps up to it."""
    upcast(created, from_version=1)(name_becomes_title)
    upcast(created, from_version=2)(id_becomes_doc)


def entry(data: Any, version: int | None = None, type: str = "up.created", packed: bool = False):
    codec = msgspec.msgpack if packed else msgspec.json
    raw = data if isinstance(data, bytes) else codec.encode(data)
    fields = [b"id", b"e-1", b"type", type.encode(), b"data", raw]
    if version is not None:
        fields += [b"v", b"%d" % version]
    if packed:
        fields += [b"datacontenttype", b"application/msgpack"]
    return fields


def read(*args: Any, **named: Any) -> Event:
    """Read as history, later tails and dead letters do: from an envelope."""
    return open_envelope(STREAM, b"1-0", entry(*args, **named)).event


def delivery(fields: list[bytes], entry_id: str | None = None) -> Delivery[Any]:
    origin = Origin("g", STREAM, STREAM, SimpleNamespace(), envelope_of)
    at = entry_id or f"{int(time.time() * 1000)}-0"
    return Delivery(origin, at.encode(), fields, 1, 0.0)


def executor() -> Executor:
    async def handle(event: Event) -> None: ...

    return Executor(event_handler("up.*", group="g")(handle))


# --- how steps are declared


def test_the_function_stays_what_it_was(created):
    assert upcast(created, from_version=1)(name_becomes_title) is name_becomes_title
    assert name_becomes_title({"name": "n"}) == {"title": "n"}


@pytest.mark.parametrize("wrong", [0, -1, True, "1", 1.0, None])
def test_from_version_is_a_whole_number_from_1(created, wrong):
    with pytest.raises(DeclarationError, match="from_version must be a whole number from 1"):
        upcast(created, from_version=wrong)


@pytest.mark.parametrize("version", [3, 4])
def test_a_step_starts_below_the_version_of_the_class(created, version):
    with pytest.raises(DeclarationError, match=rf"must be below .* 3: raise that to {version + 1}"):
        upcast(created, from_version=version)


@pytest.mark.parametrize("what", ["up.created", None, dict, 7, msgspec.Struct])
def test_only_event_classes_have_steps(what):
    with pytest.raises(DeclarationError, match="upcast takes the event class and from_version="):
        upcast(what, from_version=1)


def test_a_class_without_a_type_has_no_steps():
    class Base(Event):
        pass

    with pytest.raises(DeclarationError, match="has no type"):
        upcast(Base, from_version=1)


async def waits(data: dict[str, Any]) -> dict[str, Any]:
    return data


async def waits_and_yields(data: dict[str, Any]) -> Any:
    yield data


def yields(data: dict[str, Any]) -> Any:
    yield data


class Waits:
    async def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return data


@pytest.mark.parametrize(
    "change",
    [waits, waits_and_yields, yields, Waits(), functools.partial(waits)],
    ids=["async", "async generator", "generator", "async object", "partial"],
)
def test_a_step_cannot_wait(created, change):
    with pytest.raises(DeclarationError, match="plain function, neither async nor a generator"):
        upcast(created, from_version=1)(change)
    assert missing_steps("up.created", 1) == [1, 2]


@pytest.mark.parametrize(
    "change",
    [lambda: None, lambda a, b: a, lambda *, data: data, lambda data, *, more: data],
    ids=["nothing", "two", "by name", "another by name"],
)
def test_a_step_takes_the_data_alone(created, change):
    with pytest.raises(DeclarationError, match=r"takes the old data alone, \(data\), not \("):
        upcast(created, from_version=1)(change)


def test_a_step_is_something_to_be_called(created):
    with pytest.raises(DeclarationError, match="decorates a function of the old data, not 'no'"):
        upcast(created, from_version=1)("no")


def test_what_has_no_signature_is_taken(created):
    upcast(created, from_version=1)(dict)
    assert missing_steps("up.created", 1) == [2]


def test_defaults_beside_the_data_are_fine(created):
    def with_default(data: dict[str, Any], more: int = 3) -> dict[str, Any]:
        return data

    upcast(created, from_version=1)(with_default)
    upcast(created, from_version=2)(functools.partial(with_default, more=4))
    assert missing_steps("up.created", 1) == []


def test_a_step_declared_twice_is_refused_by_both_names(created):
    upcast(created, from_version=1)(name_becomes_title)
    with pytest.raises(
        DeclarationError, match=r"from version 1 is declared twice: .*name_becomes.* and .*id_be"
    ):
        upcast(created, from_version=1)(id_becomes_doc)


def test_the_same_step_again_is_a_reloaded_module(created, steps):
    def declare(title: str) -> None:
        @upcast(created, from_version=1)
        def step(data: dict[str, Any]) -> dict[str, Any]:
            return {"id": data["id"], "title": title}

    event._steps.pop(("up.created", 1))
    declare("old")
    declare("new")
    assert read({"id": "d", "name": "n"}).title == "new"


def test_a_class_declared_again_is_the_one_that_old_entries_become():
    def declare() -> type[Event]:
        class Again(Event, type="up.again", version=2):
            n: int

        return Again

    upcast(declare(), from_version=1)(dict)
    before = type(read({"n": 1}, type="up.again"))
    after = declare()
    assert type(read({"n": 1}, type="up.again")) is after is not before


def test_the_class_named_may_be_a_newer_one_than_the_step_leads_to(created, steps):
    """And an older one than the newest: the steps belong to the type."""

    class Fourth(Event, type="up.created", version=4):
        heading: str

    with pytest.raises(UnknownEventType, match=r"write @upcast\(.*Fourth, from_version=3\)"):
        find("up.created", 1)

    @upcast(Fourth, from_version=3)
    def title_becomes_heading(data: dict[str, Any]) -> dict[str, Any]:
        return {"heading": data["title"]}

    assert read({"id": "d", "name": "n"}) == Fourth(heading="n")
    assert read({"doc": "d", "title": "n"}, 3) == Fourth(heading="n")


# --- what they read


def test_old_entries_are_events_of_the_newest_class(created, steps):
    expected = created(doc="d", title="n", pages=3)
    assert read({"id": "d", "name": "n", "pages": 3}) == expected
    assert read({"id": "d", "title": "n", "pages": 3}, 2) == expected
    assert read({"doc": "d", "title": "n", "pages": 3}, 3) == expected


def test_the_envelope_stays_what_the_entry_says(created, steps):
    """Also where its key has another name now: an upcast moves nothing."""
    fields = [*entry({"id": "d", "name": "n"}), b"partitionkey", b"d-of-old"]
    envelope = open_envelope(STREAM, b"1-0", fields)
    assert envelope.event == created(doc="d", title="n")
    assert (envelope.version, envelope.key, envelope.stream) == (1, "d-of-old", STREAM)
    assert envelope.data == b'{"id":"d","name":"n"}'


@pytest.mark.parametrize("now", ["json", "msgpack"])
@pytest.mark.parametrize("packed", [False, True], ids=["was json", "was msgpack"])
def test_what_travels_as_text_and_what_as_such(now, packed):
    """A step sees what the entry holds; the class judges what it returns by the same rules."""
    seen: list[dict[str, Any]] = []

    class Rich(Event, type="up.rich", version=2, encoding=now):
        at: datetime
        raw: bytes
        price: Decimal
        id: UUID
        by_number: dict[int, str]
        added: datetime | None = None

    @upcast(Rich, from_version=1)
    def add(data: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(data))
        data["added"] = datetime(2027, 1, 1, tzinfo=UTC)
        data["price"] = Decimal("2.50")
        return data

    at, doc_id = datetime(2026, 1, 1, tzinfo=UTC), UUID(int=7)
    old = {
        "at": at,
        "raw": b"\x00\x01",
        "price": Decimal("1.5"),
        "id": doc_id,
        "by_number": {1: "a"},
    }
    rich = read(old, type="up.rich", packed=packed)
    assert rich == Rich(**{**old, "price": Decimal("2.50")}, added=datetime(2027, 1, 1, tzinfo=UTC))
    if packed:
        assert seen == [{**old, "price": "1.5", "id": str(doc_id)}]
    else:
        text = {"at": "2026-01-01T00:00:00Z", "raw": "AAE=", "price": "1.5"}
        assert seen == [{**text, "id": str(doc_id), "by_number": {"1": "a"}}]


def test_each_reading_gets_data_of_its_own(created):
    @upcast(created, from_version=1)
    def empty(data: dict[str, Any]) -> dict[str, Any]:
        title = data["names"].pop()
        data.clear()
        return {"title": title, "id": "d"}

    upcast(created, from_version=2)(id_becomes_doc)
    fields = entry({"names": ["n"]})
    envelopes = [open_envelope(STREAM, b"1-0", fields) for _ in range(2)]
    assert [e.event.title for e in envelopes] == ["n", "n"]


def test_an_old_class_beside_the_new_one_reads_only_without_a_full_chain(created):
    class OldCreated(Event, type="up.created", version=1):
        id: str
        name: str

    assert read({"id": "d", "name": "n"}) == OldCreated(id="d", name="n")
    upcast(created, from_version=1)(name_becomes_title)
    assert read({"id": "d", "name": "n"}) == OldCreated(id="d", name="n"), "there is a gap"
    upcast(created, from_version=2)(id_becomes_doc)
    assert read({"id": "d", "name": "n"}) == created(doc="d", title="n")
    assert info_of(OldCreated).decode(b'{"id":"d","name":"n"}') == OldCreated(id="d", name="n")


def test_a_newer_class_opens_a_gap_and_the_old_classes_read_again(created, steps):
    class OldCreated(Event, type="up.created", version=1):
        id: str
        name: str

    assert type(read({"id": "d", "name": "n"})) is created

    class Fourth(Event, type="up.created", version=4):
        heading: str

    assert type(read({"id": "d", "name": "n"})) is OldCreated
    assert type(read({"doc": "d", "title": "n"}, 3)) is created


@pytest.mark.parametrize(
    ("declared", "version", "missing"), [([], 1, 1), ([], 2, 2), ([1], 1, 2), ([2], 1, 1)]
)
def test_a_missing_step_is_named(created, declared, version, missing):
    for step in declared:
        upcast(created, from_version=step)(name_becomes_title)
    with pytest.raises(UnknownEventType) as raised:
        read({"id": "d"}, version)
    name = created.__qualname__
    assert str(raised.value) == (
        f"up.created version {version}: known versions: [3];"
        f" to read it, write @upcast({name}, from_version={missing})"
    )


@pytest.mark.parametrize("version", [0, 4, 10**20])
def test_no_step_is_asked_for_that_would_not_help(created, version):
    with pytest.raises(UnknownEventType, match=r"known versions: \[3\]$"):
        read({"doc": "d"}, version)


def test_an_old_version_is_never_written(created, steps):
    """Whoever looks up how an entry is read gets nothing to write a new one with."""
    with pytest.raises(InvalidEvent, match=r"version 1 is only read: publish version 3"):
        find("up.created", 1).encode(created(doc="d", title="n"))
    info = info_of(created)
    fields, _ = encode(info, created(doc="d", title="n"), "e", "d", [], 10_000)
    assert fields[fields.index("v") + 1] == "3"


# --- what goes wrong


def failing(created: type[Event], change: Any) -> str:
    """Return the whole text of the error of reading version 2 through `change`."""
    upcast(created, from_version=2)(change)
    with pytest.raises(Undecodable) as raised:
        read({"id": CANARY, "title": CANARY}, 2)
    assert not isinstance(raised.value, UnknownEventType)
    assert CANARY not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


def test_an_upcast_that_raises_is_named_with_the_line_and_without_its_text(created):
    def broken(data: dict[str, Any]) -> dict[str, Any]:
        raise ValueError(data["title"])

    line = broken.__code__.co_firstlineno + 1
    assert failing(created, broken) == (
        "up.created version 2, read as version 3: the upcast from version 2"
        f" ({broken.__qualname__}) raised ValueError at test_upcasts.py:{line}"
    )


def test_the_line_is_that_of_the_step_not_of_what_it_calls(created):
    def broken(data: dict[str, Any]) -> dict[str, Any]:
        return {"doc": UUID(data["id"]), "title": ""}

    line = broken.__code__.co_firstlineno + 1
    assert failing(created, broken).endswith(f"raised ValueError at test_upcasts.py:{line}")


def test_an_upcast_that_is_no_python_function_is_named_all_the_same(created):
    assert failing(created, functools.partial(int, base=7)).endswith("(partial) raised TypeError")


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, RecursionError, UnknownEventType])
def test_no_error_of_an_upcast_ends_the_reader(created, error):
    def broken(data: dict[str, Any]) -> dict[str, Any]:
        raise error(CANARY)

    assert f"raised {error.__name__} at" in failing(created, broken)


def test_a_key_pressed_is_not_the_upcasts_error(created):
    def interrupted(data: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    upcast(created, from_version=2)(interrupted)
    with pytest.raises(KeyboardInterrupt):
        read({}, 2)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "returned NoneType, no dict: it must end with `return data`"),
        ([CANARY], "returned list, no dict"),
        (CANARY, "returned str, no dict"),
    ],
)
def test_an_upcast_that_returns_no_dict(created, returned, says):
    assert failing(created, lambda data: returned).endswith(says)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"title": "n"}, "ValidationError: Object missing required field `doc`"),
        ({"doc": 7, "title": CANARY}, "ValidationError: Expected `str`, got `int` - at `$.doc`"),
        ({"doc": "d", "title": object()}, "TypeError: Encoding objects of type object"),
        ({"doc": "d", "title": CANARY + "\ud800"}, "a string or header is not UTF-8"),
        ({"doc": "d", "title": "t", "pages": "3"}, "Expected `int`, got `str`"),
    ],
)
def test_what_the_class_refuses_is_refused_after_an_upcast_too(created, returned, says):
    text = failing(created, lambda data: returned)
    assert text.startswith("up.created version 2, read as version 3: ")
    assert says in text


def test_the_second_step_fails_under_its_own_name(created, steps):
    with pytest.raises(Undecodable, match=r"from version 2 \(id_becomes_doc\) raised KeyError"):
        read({"name": "n"})


@pytest.mark.parametrize(
    "data", [b"", b"no json", b"[1]", b'"text"', b"null", b"[" * 100_000, b'{"id":"\xff"}']
)
def test_bad_bytes_of_an_old_version_reach_no_step(created, data):
    called: list[Any] = []

    @upcast(created, from_version=2)
    def step(data: dict[str, Any]) -> dict[str, Any]:
        called.append(data)
        return data

    with pytest.raises(Undecodable, match=r"up\.created version 2, read as version 3: "):
        read(data, 2)
    assert called == []


def test_an_unknown_content_type_of_an_old_version(created, steps):
    fields = [*entry({"id": "d", "name": "n"}), b"datacontenttype", b"text/xml"]
    with pytest.raises(Undecodable, match="datacontenttype is neither JSON nor msgpack"):
        decode(info_for(b"up.created", None), locate(fields))


# --- live


def test_a_worker_reads_through_them_each_time(created, steps):
    reader = executor()
    for n in range(3):
        one = delivery(entry({"id": f"d{n}", "name": "n"}))
        two = delivery(entry({"id": f"d{n}", "title": "n"}, 2))
        assert reader.triage(one) is reader.triage(two) is None
        assert one.event == two.event == created(doc=f"d{n}", title="n")
        assert one.envelope.version == 1


def test_a_worker_whose_class_is_msgpack_by_now_reads_json_of_old():
    class Packed(Event, type="up.packed", version=2, encoding="msgpack"):
        n: int

    @upcast(Packed, from_version=1)
    def double(data: dict[str, Any]) -> dict[str, Any]:
        return {"n": 2 * data["n"]}

    reader = executor()
    for n in range(3):
        text = delivery(entry({"n": n}, type="up.packed"))
        packed = delivery(entry({"n": n}, type="up.packed", packed=True))
        new = delivery(entry({"n": n}, 2, type="up.packed", packed=True))
        assert [reader.triage(d) for d in (text, packed, new)] == [None] * 3
        assert [text.event.n, packed.event.n, new.event.n] == [2 * n, 2 * n, n]


@pytest.mark.parametrize("version", [1, 2])
def test_a_failing_upcast_is_a_dead_letter_and_spoils_no_other_entry(created, steps, version):
    reader = executor()
    good = {1: {"id": "d", "name": "n"}, 2: {"id": "d", "title": "n"}}[version]
    for _ in range(2):
        assert reader.triage(delivery(entry(good, version if version > 1 else None))) is None
        verdict = reader.triage(delivery(entry({}, version if version > 1 else None)))
        assert isinstance(verdict, DeadLetter)
        assert verdict.reason == "undecodable"
        assert verdict.error.type == "Undecodable"
        assert f"the upcast from version {version} " in verdict.error.text


def test_a_step_that_is_missing_is_a_dead_letter_that_names_it(created):
    upcast(created, from_version=2)(id_becomes_doc)
    verdict = executor().triage(delivery(entry({"id": "d", "name": "n"})))
    assert isinstance(verdict, DeadLetter)
    assert verdict.reason == "undecodable"
    assert "from_version=1)" in verdict.error.text


def test_newer_versions_wait_beside_upcasts_as_ever(created, steps):
    reader = executor()
    assert reader.triage(delivery(entry({"id": "d", "name": "n"}))) is None
    newer = entry({"doc": "d"}, 4)
    assert isinstance(reader.triage(delivery(newer)), Park)
    verdict = reader.triage(delivery(newer, "1000-0"))
    assert isinstance(verdict, DeadLetter)
    assert verdict.reason == "newer-version"


def test_events_of_the_newest_version_take_the_way_they_took_before(created, steps):
    """Nothing between the bytes and the class: not a call more than without upcasts."""
    info = info_for(b"up.created", b"3")
    assert info is info_of(created)
    calls: list[str] = []

    def trace(frame: Any, what: str, arg: Any) -> None:
        if what == "call":
            calls.append(frame.f_code.co_name)

    data = b'{"doc":"d","title":"n"}'
    info.decode(data)
    sys.setprofile(trace)
    try:
        info.decode(data)
    finally:
        sys.setprofile(None)
    assert calls == []
