"""Events to the fields of an entry and back, and everything that is refused on either way."""

from __future__ import annotations

import json
import math
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from itertools import permutations
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import Event, EventTooLarge, InvalidEvent, Undecodable, UnknownEventType
from bus.config import MAX_DECODE_BYTES, MAX_EVENT_BYTES
from bus.delivery import Delivery, Origin
from bus.event import info_of
from bus.streams.codec import (
    Headers,
    decode,
    encode,
    envelope_of,
    header_fields,
    info_for,
    is_redriven,
    key_of,
    locate,
    moved,
    open_envelope,
    run_of,
    without_inbox_fields,
)

CANARY = "s3cret-payload"
ENTRY_ID = b"1763629200000-7"
APPENDED = datetime(2025, 11, 20, 9, 0, tzinfo=UTC)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct, frozen=True):
    name: str
    weight: float | None = None


class Plain(Event, type="codec.plain", key="name"):
    name: str
    count: int = 0


class Packed(Event, type="codec.packed", encoding="msgpack", key="name"):
    name: str
    blob: bytes = b""
    ratio: float = 0.0


class Rich(Event, type="codec.rich", version=3):
    text: str
    number: int
    ratio: float
    flag: bool
    blob: bytes
    when: datetime
    day: date
    id: UUID
    price: Decimal
    colour: Colour
    inner: Inner
    maybe: str | None
    items: tuple[int, ...]
    names: frozenset[str]
    by_name: dict[str, list[float]]
    by_number: dict[int, str]
    anything: Any = None


class RichPacked(Rich, type="codec.rich_packed", encoding="msgpack"):
    pass


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
RICH = st.fixed_dictionaries(
    {
        "text": TEXT,
        "number": st.integers(-(2**63), 2**63 - 1),
        "ratio": FLOAT,
        "flag": st.booleans(),
        "blob": st.binary(max_size=50),
        "when": st.datetimes(timezones=st.just(UTC)),
        "day": st.dates(),
        "id": st.uuids(),
        "price": st.decimals(allow_nan=False, allow_infinity=False),
        "colour": st.sampled_from(Colour),
        "inner": st.builds(Inner, TEXT, st.none() | FLOAT),
        "maybe": st.none() | TEXT,
        "items": st.lists(st.integers(-1000, 1000)).map(tuple),
        "names": st.frozensets(TEXT),
        "by_name": st.dictionaries(TEXT, st.lists(FLOAT)),
        "by_number": st.dictionaries(st.integers(-(2**31), 2**31), TEXT),
        "anything": st.none() | st.booleans() | TEXT | st.lists(TEXT),
    }
)


NONE = Headers()


def sent(event: Event, headers: Headers = NONE, most: int = MAX_EVENT_BYTES) -> list[bytes]:
    """Return the fields of `event` as the server will hand them out."""
    info = info_of(type(event))
    fields, _ = encode(info, event, "id-1", key_of(info, event), header_fields(headers), most)
    return [f.encode() if isinstance(f, str) else f for f in fields]


def received(fields: list[bytes]) -> Event:
    located = locate(fields)
    return decode(info_for(located.type, located.version), located)


def as_dict(fields: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=True))


# --- there and back


@given(values=RICH, cls=st.sampled_from([Rich, RichPacked]))
def test_every_event_comes_back_as_it_was(values, cls):
    event = cls(**values)
    assert received(sent(event)) == event


def test_an_entry_holds_its_fields_in_this_order():
    assert sent(Plain(name="n", count=1)) == [
        *(b"id", b"id-1", b"type", b"codec.plain", b"data", b'{"name":"n","count":1}'),
        *(b"partitionkey", b"n"),
    ]


def test_what_travels_beside_an_event():
    berlin = timezone(timedelta(hours=2))
    headers = Headers(
        source="/shop",
        time=datetime(2026, 7, 1, 14, 0, tzinfo=berlin),
        correlation_id="c",
        causation_id="b",
        traceparent="00-ab-cd-01",
        tracestate="x=y",
    )
    fields = sent(Packed(name="ñ"), headers)
    envelope = open_envelope("bus:{codec:0}", ENTRY_ID, fields)
    assert as_dict(fields)[b"time"] == b"2026-07-01T12:00:00+00:00"
    assert as_dict(fields)[b"datacontenttype"] == b"application/msgpack"
    assert (envelope.source, envelope.key) == ("/shop", "ñ")
    assert envelope.time == datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
    assert (envelope.correlation_id, envelope.causation_id) == ("c", "b")
    assert (envelope.traceparent, envelope.tracestate) == ("00-ab-cd-01", "x=y")
    assert envelope.event == Packed(name="ñ")


def test_what_nobody_said_is_left_out():
    fields = sent(Rich(**_rich()))
    assert set(as_dict(fields)) == {b"id", b"type", b"data", b"v"}
    envelope = open_envelope("bus:{codec:0}", ENTRY_ID, fields)
    assert (envelope.version, envelope.time) == (3, APPENDED)
    assert (envelope.key, envelope.source, envelope.traceparent) == (None, None, None)


def _rich(**changes: Any) -> dict[str, Any]:
    return {
        "text": "",
        "number": 0,
        "ratio": 0.5,
        "flag": True,
        "blob": b"",
        "when": APPENDED,
        "day": date(2026, 1, 1),
        "id": UUID(int=1),
        "price": Decimal(1),
        "maybe": None,
        "colour": Colour.RED,
        "inner": Inner("i"),
        "items": (),
        "names": frozenset(),
        "by_name": {},
        "by_number": {},
        **changes,
    }


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_others_may_write_the_fields_in_any_order(order):
    pairs = [b"data", b'{"name":"n"}'], [b"type", b"codec.plain"], [b"id", b"i"], [b"x-own", b"?"]
    fields = [part for n in order for part in pairs[n]]
    assert received(fields) == Plain(name="n")
    assert open_envelope("s", ENTRY_ID, fields).event_id == "i"


def test_the_first_of_equal_names_counts():
    once = [b"id", b"i", b"type", b"codec.plain", b"data", b'{"name":"first"}']
    again = [b"data", b'{"name":"second"}', b"id", b"other", b"type", b"no.such"]
    for fields in (once + again, [b"x", b"y", *once, *again]):
        assert received(fields) == Plain(name="first")
        envelope = open_envelope("s", ENTRY_ID, fields)
        assert (envelope.event_id, envelope.type) == ("i", "codec.plain")


def test_a_class_that_changed_its_encoding_reads_what_was_written_before():
    packed = msgspec.msgpack.encode({"name": "old"})
    head = [b"id", b"i", b"type", b"codec.plain", b"data", packed]
    assert received([*head, b"datacontenttype", b"application/msgpack"]) == Plain(name="old")
    head = [b"id", b"i", b"type", b"codec.packed", b"data", b'{"name":"old"}']
    assert received([*head, b"datacontenttype", b"application/json"]) == Packed(name="old")
    with pytest.raises(Undecodable, match="datacontenttype is neither JSON nor msgpack"):
        received([*head, b"datacontenttype", b"text/xml"])


def test_msgpack_is_said_and_json_is_what_goes_without_saying():
    assert b"datacontenttype" not in as_dict(sent(Plain(name="n")))
    fields = as_dict(sent(Packed(name="n", blob=b"\xff\x00")))
    assert msgspec.msgpack.decode(fields[b"data"])["blob"] == b"\xff\x00"


def test_json_can_be_read_by_anybody():
    assert json.loads(as_dict(sent(Plain(name="ß")))[b"data"]) == {"name": "ß", "count": 0}


# --- refused at the publisher


@dataclass
class Boxed:
    value: float


class Judging(Event, type="codec.judging"):
    word: str

    def __post_init__(self) -> None:
        if self.word.startswith(CANARY):
            raise ValueError(f"{self.word} is no word")


class Loose(Event, type="codec.loose"):
    value: Any = None
    boxed: Boxed | None = None
    inner: Inner | None = None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "holding",
    [
        *(lambda x: Loose(value=x), lambda x: Loose(value=[1, [x]]), lambda x: Loose(value={x})),
        *(lambda x: Loose(value={"a": x}), lambda x: Loose(value=(1.0, {"b": [x]}))),
        *(lambda x: Loose(value={x: 1}), lambda x: Loose(boxed=Boxed(x))),
        *(lambda x: Loose(inner=Inner("i", x)), lambda x: Loose(value=[Inner("i", x)])),
        *(lambda x: Packed(name="n", ratio=x), lambda x: Rich(**_rich(by_name={"a": [0.5, x]}))),
    ],
    ids=[
        "bare",
        "list",
        "set",
        "dict",
        "tuple",
        "key",
        "dataclass",
        "struct",
        "in Any",
        "msgpack",
        "typed",
    ],
)
def test_numbers_that_json_lacks_are_refused_wherever_they_hide(holding, bad):
    with pytest.raises(InvalidEvent, match="NaN and Infinity cannot be published"):
        sent(holding(bad))


WRONG = [
    *(Plain(name=5), Plain(name=None), Plain(name="n", count="1"), Plain(name="n", count=1.5)),
    *(Plain(name="n", count=None), Plain(name="n", count=True), Packed(name="n", blob="text")),
    *(Packed(name="n", ratio="1"), Rich(**_rich(colour="green")), Rich(**_rich(when="now"))),
    *(Rich(**_rich(inner={"weight": 1})), Rich(**_rich(items=("1",)))),
    *(Rich(**_rich(by_name={"a": 1})), Rich(**_rich(by_name={"a": ["x"]}))),
]


@pytest.mark.parametrize("event", WRONG, ids=range(len(WRONG)))
def test_wrong_field_types_are_refused_at_the_publisher(event):
    """The constructor does not look; the reader would, and every worker would fail."""
    with pytest.raises(InvalidEvent, match=r"codec\.\w+ version \d cannot be published"):
        sent(event)


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, 2**70 - 0.5j, {1: object()}, "\ud800", {"\ud800": 1}, ["\udfff"]],
    ids=["object", "function", "complex", "nested", "surrogate", "surrogate key", "in a list"],
)
def test_what_cannot_be_encoded_is_refused(value):
    with pytest.raises(InvalidEvent, match=r"codec\.loose version 1 cannot be published"):
        sent(Loose(value=value))


def test_an_event_that_holds_itself_is_refused():
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(InvalidEvent, match="RecursionError"):
        sent(Loose(value=knot))


@pytest.mark.parametrize("name", Headers._fields)
def test_lone_surrogates_in_headers_are_refused(name):
    with pytest.raises(InvalidEvent, match=r"is not UTF-8|header values are strings"):
        sent(Plain(name="n"), Headers(**{name: "\ud800"}))


def test_a_lone_surrogate_in_a_key_or_an_id_is_refused():
    info = info_of(Loose)
    for event_id, key in (("\ud800", None), ("i", "\udfff")):
        with pytest.raises(InvalidEvent, match="is not UTF-8"):
            encode(info, Loose(), event_id, key, [], MAX_EVENT_BYTES)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        (Headers(time=datetime(2026, 1, 1)), "time has no time zone"),  # noqa: DTZ001
        (Headers(source=5), "header values are strings, not int"),
        (Headers(traceparent=b"00"), "header values are strings, not bytes"),
    ],
)
def test_bad_headers_are_refused(headers, says):
    with pytest.raises(InvalidEvent, match=says):
        sent(Plain(name="n"), headers)


def test_the_size_limit_counts_every_field():
    event = Plain(name="n" * 100)
    size = sum(map(len, sent(event)))
    assert sent(event, most=size)
    with pytest.raises(EventTooLarge, match=f"codec.plain is {size} bytes, above .* = {size - 1}"):
        sent(event, most=size - 1)
    with pytest.raises(EventTooLarge):
        sent(event, Headers(source="s"), most=size)


def test_the_size_is_counted_in_bytes_not_in_characters():
    small, large = Plain(name="e" * 100), Plain(name="é" * 100)
    assert sum(map(len, sent(large))) == sum(map(len, sent(small))) + 2 * 100
    with pytest.raises(EventTooLarge):
        sent(large, most=sum(map(len, sent(small))))


# --- undecodable entries


def entry(data: bytes, type: bytes = b"codec.plain", *more: bytes) -> list[bytes]:
    return [b"id", b"i", b"type", type, b"data", data, *more]


DEEP = 100_000
BAD_DATA = {
    "empty": b"",
    "truncated": b'{"name":"n"',
    "not JSON": b"hello",
    "not an object": b"[]",
    "null": b"null",
    "missing field": b"{}",
    "wrong type": b'{"name":5}',
    "invalid UTF-8": b'{"name":"\xff\xfe"}',
    "overlong UTF-8": b'{"name":"\xc0\xaf"}',
    "trailing": b'{"name":"n"}{}',
    "deep": b'{"name":"n","x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep and open": b"[" * DEEP,
    "huge number": b'{"name":"n","count":' + b"9" * 5000 + b"}",
    "NaN": b'{"name":"n","count":NaN}',
    "too long": b'{"name":"' + b"n" * MAX_DECODE_BYTES + b'"}',
}
BAD_PACKED = {
    "empty": b"",
    "truncated": msgspec.msgpack.encode({"name": "n"})[:-1],
    "reserved byte": b"\xc1",
    "deep": b"\x82\xa4name\xa1n\xa1x" + b"\x91" * DEEP + b"\x90",
    "says it is long": b"\xdd\xff\xff\xff\xff",
    "says its text is long": b"\x81\xa4name\xdb\xff\xff\xff\xff",
    "invalid UTF-8": b"\x81\xa4name\xa2\xff\xfe",
    "unknown extension": b"\x82\xa4name\xa1n\xa5ratio\xd4\x7f\x00",
}


@pytest.mark.parametrize("data", BAD_DATA.values(), ids=list(BAD_DATA))
def test_bad_json_is_undecodable_whatever_is_wrong(data):
    with pytest.raises(Undecodable) as raised:
        received(entry(data))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("data", BAD_PACKED.values(), ids=list(BAD_PACKED))
def test_bad_msgpack_is_undecodable_whatever_is_wrong(data):
    with pytest.raises(Undecodable):
        received(entry(data, b"codec.packed"))


def test_a_bomb_of_tiny_msgpack_is_refused_by_its_size():
    """Each byte would become an empty list of 56 bytes."""
    bomb = b"\x82\xa4name\xa1n\xa1x\xdd\x00\x80\x00\x01" + b"\x90" * (MAX_DECODE_BYTES + 1)
    with pytest.raises(Undecodable, match="above 8,388,608"):
        received(entry(bomb, b"codec.packed"))


def test_numbers_with_names_twice_take_the_last_as_json_does():
    assert received(entry(b'{"name":"a","name":"b"}')) == Plain(name="b")


@given(st.binary(max_size=200))
def test_random_bytes_decode_or_are_undecodable(data):
    for kind in (b"codec.plain", b"codec.packed", b"codec.rich", b"codec.rich_packed"):
        version = (b"v", b"3") if b"rich" in kind else ()
        try:
            received(entry(data, kind, *version))
        except UnknownEventType:
            assert kind == b"codec.rich_packed"  # its version is 1
        except Undecodable:
            pass


@given(st.lists(st.binary(max_size=12) | st.sampled_from([b"id", b"type", b"data", b"v", b"time"])))
def test_random_fields_open_or_are_undecodable(fields):
    fields = fields[: len(fields) // 2 * 2]
    try:
        envelope = open_envelope("bus:{codec:0}", ENTRY_ID, fields)
        assert envelope.event
    except Undecodable:
        pass


@pytest.mark.parametrize("missing", [b"id", b"type", b"data"])
def test_an_entry_without_one_of_the_three_says_which(missing):
    fields = {b"id": b"i", b"type": b"codec.plain", b"data": b'{"name":"n"}'}
    del fields[missing]
    flat = [part for pair in fields.items() for part in pair]
    with pytest.raises(Undecodable, match=f"has no field `{missing.decode()}`"):
        open_envelope("bus:{codec:0}", ENTRY_ID, flat)
    if missing != b"type":
        with pytest.raises(Undecodable, match=f"no field `{missing.decode()}`"):
            received(flat)


@pytest.mark.parametrize("version", [b"", b"two", b"1.0", b"\xff", b"9" * 5000])
def test_a_version_that_is_no_number_is_undecodable(version):
    with pytest.raises(Undecodable, match="field v is not a whole number"):
        received(entry(b'{"name":"n"}', b"codec.plain", b"v", version))


@pytest.mark.parametrize("version", [b"2", b"0", b"-1", b"99999999999999999999"])
def test_a_version_nobody_knows_is_told_from_bad_bytes(version):
    with pytest.raises(UnknownEventType, match=r"known versions: \[1\]"):
        received(entry(b'{"name":"n"}', b"codec.plain", b"v", version))


def test_types_that_are_unknown_or_no_text():
    with pytest.raises(UnknownEventType, match="no version of it is known"):
        received(entry(b"{}", b"codec.never_declared"))
    with pytest.raises(Undecodable, match="the type is not UTF-8"):
        received(entry(b"{}", b"\xff.\xfe"))


@pytest.mark.parametrize("name", [b"source", b"partitionkey", b"traceparent", b"time"])
def test_headers_that_are_no_text_are_undecodable(name):
    with pytest.raises(Undecodable, match=f"field {name.decode()} of entry .* is not UTF-8"):
        open_envelope("s", ENTRY_ID, entry(b"{}", b"codec.plain", name, b"\xff"))


def test_a_time_is_iso_8601_and_utc_unless_it_says_otherwise():
    def time_of(text: bytes) -> datetime:
        return open_envelope("s", ENTRY_ID, entry(b"{}", b"codec.plain", b"time", text)).time

    assert time_of(b"2026-07-01T12:00:00Z") == datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert time_of(b"2026-07-01T12:00:00") == datetime(2026, 7, 1, 12, tzinfo=UTC)
    with pytest.raises(Undecodable, match="field time is no ISO 8601 time"):
        time_of(b"yesterday")


# --- keys, and what must not be said


def test_keys_of_other_types_are_told_by_their_text():
    class Numbered(Event, type="codec.numbered", key="number"):
        number: int | None

    assert key_of(info_of(Numbered), Numbered(number=7)) == "7"
    assert key_of(info_of(Loose), Loose()) is None


@pytest.mark.parametrize(
    "event",
    [
        Plain(name=CANARY, count=CANARY),
        Rich(**_rich(text=CANARY, colour=CANARY)),
        Rich(**_rich(text=CANARY, id=CANARY)),
        Rich(**_rich(text=CANARY + "\ud800")),
        Rich(**_rich(by_name={CANARY: [CANARY]})),
        Rich(**_rich(by_name={CANARY: [math.nan]})),
        Loose(value={CANARY: object()}),
        Plain(name=CANARY * 50_000),
    ],
    ids=range(8),
)
def test_no_payload_in_the_error_of_a_refused_event(event):
    with pytest.raises(InvalidEvent) as raised:
        sent(event)
    assert CANARY not in str(raised.value)
    assert CANARY not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "fields",
    [
        entry(f'{{"name":"{CANARY}","count":"{CANARY}"}}'.encode()),
        entry(f'{{"name":"{CANARY}'.encode()),
        entry(f'{{"name":"{CANARY}'.encode() + b'\xff"}'),
        entry(msgspec.json.encode(_rich(text=CANARY, colour=CANARY)), b"codec.rich", b"v", b"3"),
        entry(msgspec.json.encode(_rich(text=CANARY, id=CANARY)), b"codec.rich", b"v", b"3"),
        entry(f'{{"word":"{CANARY}"}}'.encode(), b"codec.judging"),
    ],
    ids=["wrong type", "truncated", "invalid UTF-8", "enum", "uuid", "its own check"],
)
def test_no_payload_in_the_error_of_an_undecodable_entry(fields):
    with pytest.raises(Undecodable) as raised:
        received(fields)
    assert CANARY not in "".join(traceback.format_exception(raised.value))


def test_an_envelope_shows_no_payload():
    envelope = open_envelope("s", ENTRY_ID, sent(Plain(name="n", count=77777)))
    assert "77777" not in repr(envelope)


def test_deep_nesting_leaves_the_stack_as_it_was():
    limit = sys.getrecursionlimit()
    for _ in range(3):
        with pytest.raises(Undecodable):
            received(entry(BAD_DATA["deep and open"]))
    assert sys.getrecursionlimit() == limit
    assert received(entry(b'{"name":"n"}')) == Plain(name="n")


# --- inboxes


def test_of_equal_names_those_that_the_move_appended_count() -> None:
    own = [b"id", b"e", b"due", b"2026-12-24", b"attempts", b"7", b"origentry", b"9-9"]
    entry = [*own, b"origentry", b"5-0", b"attempts", b"2", b"due", b"1763629200000"]
    assert moved(b"6-0", entry) == (b"5-0", 2, 1_763_629_200_000)
    assert without_inbox_fields(entry) == own


@pytest.mark.parametrize("name", [b"due", b"attempts", b"run", b"origentry"])
@pytest.mark.parametrize("run", [[], [b"run", b"redrive-1"]], ids=["moved", "redriven"])
def test_an_own_field_of_such_a_name_is_the_entrys_own_wherever_it_stands(
    name: bytes, run: list[bytes]
) -> None:
    """Also if a foreign program has put it last, just before ours."""
    event = [b"id", b"e", b"type", b"t", b"data", b"{}"]
    for own in ([*event, name, b"77"], [name, b"77", *event], [name, b"1", name, b"2"], event, []):
        entry = [*own, b"origentry", b"5-0", b"attempts", b"1", b"due", b"9", *run]
        assert without_inbox_fields(entry) == own
        assert moved(b"6-0", entry) == (b"5-0", 1, 9)


def test_who_puts_an_entry_there_by_hand_may_leave_out_any() -> None:
    own = [b"due", b"2026-12-24", b"id", b"e", b"type", b"t", b"data", b"{}"]
    for added, wanted in (
        ([], (b"6-0", 0, 0)),
        ([b"attempts", b"2"], (b"6-0", 2, 0)),
        ([b"due", b"9"], (b"6-0", 0, 9)),
        ([b"origentry", b"5-0"], (b"5-0", 0, 0)),
        ([b"attempts", b"3", b"origentry", b"5-0"], (b"5-0", 3, 0)),
        ([b"run", b"replay-1", b"due", b"9"], (b"6-0", 0, 9)),
    ):
        assert moved(b"6-0", [*own, *added]) == wanted
        assert without_inbox_fields([*own, *added]) == own


@pytest.mark.parametrize(
    ("fields", "run"),
    [
        ([], ""),
        ([b"origentry", b"5-0", b"run", b"redrive-1"], "redrive-1"),
        ([b"run", b"redrive-1", b"origentry", b"5-0", b"attempts", b"1", b"due", b"0"], ""),
        ([b"run", b"x", b"origentry", b"5-0", b"run", b"redrive-1"], "redrive-1"),
        ([b"origentry", b"5-0", b"run", b"\xff"], "\ufffd"),
    ],
    ids=str,
)
def test_a_run_is_that_of_the_inbox_and_of_nothing_else(fields: list[bytes], run: str) -> None:
    home = "bus:{codec:0}"
    own = [b"run", b"redrive-2", b"id", b"e", b"type", b"t", b"data", b"{}"]
    for stream, wanted in ((f"{home}:inbox:g", run), (home, "")):
        origin = Origin("g", stream, home, None, envelope_of)  # type: ignore[arg-type]
        delivery: Delivery[Any] = Delivery(origin, b"6-0", [*own, *fields], 1, 0.0)
        assert run_of(delivery) == wanted
        assert is_redriven(delivery) == delivery.redriven == (wanted == "redrive-1")


@pytest.mark.parametrize("origin", [b"", b"no id", b"-5-0", b"5-", b"9" * 30, b"5-0\n"])
def test_an_origin_that_is_no_id_is_not_believed(origin: bytes) -> None:
    assert moved(b"6-0", [b"origentry", origin]).origin == b"6-0"
