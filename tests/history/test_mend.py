"""Letters that are mended before they are redriven: checked, and nothing sent that is wrong."""

from __future__ import annotations

import json
import math
import traceback
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bus import (
    Bus,
    DeclarationError,
    Event,
    EventTooLarge,
    InvalidEvent,
    Letter,
    Undecodable,
    UnknownEventType,
)
from tests.eyes import eyes_of
from tests.history.letters import (
    DEAD,
    INBOX,
    OTHER,
    TOPIC,
    Posted,
    Sorted,
    Stamped,
    box_of,
    bury,
    dead,
    found,
    ns_of,
    own,
    prepare,
    put,
    shown,
    why,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.everywhere


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    """A bus on the default server alone, for what the server has no part in."""
    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


class Sorted2(Event, type="mail.sorted", version=2):
    shelf: str


class Tint(Enum):
    RED = "red"


class Tinted(Event, type="mail.tinted"):
    tint: Tint
    n: int = 0


class Lid(msgspec.Struct, frozen=True):
    colour: str
    size: int = 0


class Boxed(Event, type="mail.boxed"):
    lid: Lid


async def waits(*_: Any) -> None: ...


async def mend(bus: Bus, edit: Any, **fields: Any) -> dict[bytes, bytes]:
    """Redrive the one letter with an edit; return its inbox entry, without the inbox's fields."""
    result = await bus.dead_letters("index").redrive(edit=edit, **fields)
    assert result.redriven == 1
    assert await dead(bus) == []
    ((_, entry),) = await eyes_of(bus).xrange(INBOX)
    run = entry.pop(b"run").decode()
    assert run == result.run
    inbox = {k: entry.pop(k) for k in (b"origentry", b"attempts", b"due")}
    assert inbox == {b"origentry": b"1700000000000-7", b"attempts": b"0", b"due": b"0"}
    return entry


async def test_a_changed_field_is_in_the_event_and_all_else_is_as_it_was(bus: Bus) -> None:
    headers = {
        "source": "/farm",
        "time": "2026-01-01T00:00:00+00:00",
        "correlationid": "c",
        "theirs": "x",
    }
    await put(bus, own(1, **headers) | why())
    entry = await mend(bus, {"n": 5, "weight": 2})
    assert json.loads(entry.pop(b"data")) == {"box": box_of(0), "n": 5, "weight": 2.0}
    wanted = {k: v for k, v in own(1, **headers).items() if k != "data"}
    assert entry == {k.encode(): v.encode() for k, v in wanted.items()}


async def test_a_function_gives_an_event_or_changes_or_leaves_one_out(valkey: Bus) -> None:
    await bury(valkey, 1, 2, 3)

    def edit(letter: Letter) -> Any:
        event = letter.event
        assert isinstance(event, Posted)
        if event.n == 1:
            return Posted(box=event.box, n=100)
        return {"n": 200} if event.n == 2 else None

    result = await valkey.dead_letters("index").redrive(edit=edit)
    assert (result.matched, result.redriven, result.left_out) == (3, 2, 1)
    assert await ns_of(valkey, INBOX) == [100, 200]
    assert await ns_of(valkey, DEAD) == [3]


async def test_the_limit_does_not_count_what_an_edit_leaves_out(valkey: Bus) -> None:
    await bury(valkey, *range(6))

    def edit(letter: Letter) -> Any:
        return {} if letter.event.n % 2 else None  # type: ignore[attr-defined]

    result = await valkey.dead_letters("index").redrive(edit=edit, limit=2)
    assert (result.matched, result.redriven, result.left_out) == (4, 2, 2)
    assert await ns_of(valkey, INBOX) == [1, 3]


async def test_an_old_letter_is_mended_as_the_newest_class(bus: Bus) -> None:
    data = json.dumps({"name": "A", "pieces": 1, "extra": True})
    await put(bus, {"id": "e1", "type": "mail.sorted", "data": data} | why())
    entry = await mend(bus, {"pieces": 2, "since": "2026-01-01T00:00:00Z"})
    assert entry[b"v"] == b"3"
    assert json.loads(entry[b"data"]) == {
        "shelfName": "A",
        "pieces": 2,
        "since": "2026-01-01T00:00:00Z",
    }


WHOLE = {"shelf_name": "A", "pieces": 1, "since": None}


@pytest.mark.parametrize(
    ("version", "data", "changes", "wanted"),
    [
        (3, {"shelfName": "A", "pieces": "many"}, {"pieces": 2}, {"shelfName": "A", "pieces": 2}),
        (3, {"shelfName": "A"}, {"pieces": 2}, {"shelfName": "A", "pieces": 2}),
        (1, {"name": "A", "pieces": "many"}, {"pieces": 2}, {"shelfName": "A", "pieces": 2}),
        (2, {"shelf": 5, "pieces": 1}, {"shelf_name": "A"}, {"shelfName": "A", "pieces": 1}),
        (2, {"shelf": 5, "pieces": 1}, {"shelfName": "A"}, {"shelfName": "A", "pieces": 1}),
        (3, [1, 2], WHOLE, {"shelfName": "A", "pieces": 1}),
        (1, {"pieces": 1}, WHOLE, {"shelfName": "A", "pieces": 1}),
        ("x", {"shelfName": "B", "pieces": 2}, WHOLE, {"shelfName": "A", "pieces": 1}),
    ],
    ids=str,
)
async def test_a_letter_that_cannot_be_read_is_mended_from_what_can_be_read_of_it(
    valkey: Bus, version: Any, data: Any, changes: Any, wanted: Any
) -> None:
    fields = {"id": "e1", "type": "mail.sorted", "data": json.dumps(data), "v": str(version)}
    await put(valkey, fields | why("undecodable"))
    with pytest.raises(Undecodable):
        _ = (await found(valkey.dead_letters("index")))[0].event
    entry = await mend(valkey, changes)
    assert entry[b"v"] == b"3"
    assert json.loads(entry[b"data"]) == wanted | {"since": None}


@pytest.mark.parametrize("missing", [["since"], ["pieces"], ["shelf_name", "pieces", "since"]])
@pytest.mark.parametrize(
    ("version", "data"),
    [
        ("3", b"[1, 2]"),
        ("3", b'{"shelfName":"B","pieces":2'),
        ("3", b"\xff"),
        ("3", None),
        ("1", b'{"pieces":2}'),
        ("1", b'{"name":"B","pieces":2,"since"'),
        ("x", b'{"shelfName":"B","pieces":2}'),
    ],
    ids=shown,
)
async def test_what_nobody_can_read_is_not_lost_by_a_change_of_some_fields(
    valkey: Bus, version: str, data: bytes | None, missing: list[str]
) -> None:
    """Its other fields would silently get their defaults."""
    fields = {"id": "e1", "type": "mail.sorted", "v": version}
    fields |= {} if data is None else {"data": data}
    await put(valkey, fields | why("undecodable"))
    before = await eyes_of(valkey).xrange(DEAD)
    given = {name: value for name, value in WHOLE.items() if name not in missing}
    text = rf"by a function, or all fields; missing: {', '.join(missing)}$"
    with pytest.raises(InvalidEvent, match=text):
        await valkey.dead_letters("index").redrive(edit=given)
    assert await eyes_of(valkey).xrange(DEAD) == before
    entry = await mend(valkey, lambda _: Sorted(shelf_name="A", pieces=1))
    assert json.loads(entry[b"data"]) == {"shelfName": "A", "pieces": 1, "since": None}


async def test_a_nested_value_is_replaced_whole_and_unknown_members_go(valkey: Bus) -> None:
    """What travels is the class: docs/operations.md says so."""
    data = {"lid": {"colour": "red", "size": 2}, "theirs": 1}
    await put(valkey, own(1, type="mail.boxed", data=json.dumps(data)) | why())
    entry = await mend(valkey, {"lid": {"colour": "blue"}})
    assert json.loads(entry[b"data"]) == {"lid": {"colour": "blue", "size": 0}}


async def test_bytes_and_msgpack_are_mended_as_such(bus: Bus) -> None:
    fields = {"id": b"\xff", "type": "mail.stamped", "datacontenttype": "application/msgpack"}
    await put(bus, fields | {"data": msgspec.msgpack.encode({"n": "x", "seal": b"\xff"})} | why())
    entry = await mend(bus, {"n": 1})
    assert msgspec.msgpack.decode(entry[b"data"]) == {"n": 1, "seal": b"\xff"}
    assert entry[b"datacontenttype"] == b"application/msgpack"
    assert entry[b"id"] == b"\xff", "the same event, whatever its id is"


async def test_an_event_written_in_another_encoding_gets_that_of_its_class(valkey: Bus) -> None:
    await put(valkey, {"id": "e1", "type": "mail.stamped", "data": '{"n":1}'} | why())
    entry = await mend(valkey, {"seal": b"\x00"})
    assert msgspec.msgpack.decode(entry[b"data"]) == {"n": 1, "seal": b"\x00"}
    assert entry[b"datacontenttype"] == b"application/msgpack"


def raising(_: Letter) -> Any:
    raise LookupError("mine")


BAD_EDITS: list[tuple[Any, type[Exception], str]] = [
    ({"n": "5"}, InvalidEvent, "dead letter ID: field n: Expected `int`, got `str`"),
    ({"m": 5}, InvalidEvent, r"has no field 'm': .*it has box, n, weight"),
    ({"wieght": 5}, InvalidEvent, r"no field 'wieght': did you mean weight\?"),
    ({"weight": math.nan}, InvalidEvent, "NaN and Infinity cannot"),
    ({"box": "\ud800"}, InvalidEvent, "not UTF-8"),
    (
        {"box": box_of(1)},
        InvalidEvent,
        "belongs to partition 1, not here: publish it as a new event",
    ),
    (lambda _: Stamped(n=1), InvalidEvent, "is a mail.posted and cannot become a mail.stamped"),
    (lambda _: Posted(box=box_of(1)), InvalidEvent, "belongs to partition 1"),
    (lambda _: 5, InvalidEvent, "an edit gives an event, a mapping .*, not int"),
    (lambda _: "n", InvalidEvent, "not str"),
    (lambda _: Sorted2(shelf="A"), InvalidEvent, "mail.posted and cannot become a mail.sorted"),
    (lambda letter: waits(letter, 1), DeclarationError, "edit gave a coroutine, to be awaited"),
    (raising, LookupError, "mine"),
]


@pytest.mark.parametrize(("edit", "error", "message"), BAD_EDITS, ids=shown)
async def test_an_edit_that_is_not_valid_is_told_and_sends_nothing(
    valkey: Bus, edit: Any, error: type[Exception], message: str
) -> None:
    (letter_id,) = await bury(valkey, 1)
    before = await eyes_of(valkey).xrange(DEAD)
    with pytest.raises(error, match=message.replace("ID", letter_id)) as caught:
        await valkey.dead_letters("index").redrive(edit=edit)
    if issubclass(error, InvalidEvent):
        assert letter_id in str(caught.value)
        assert not hasattr(caught.value, "__notes__")
    else:
        assert caught.value.__notes__ == [f"dead letter {letter_id}"]
    assert await eyes_of(valkey).xrange(DEAD) == before
    assert await eyes_of(valkey).exists(INBOX) == 0


async def test_an_event_may_not_grow_beyond_what_the_bus_takes(valkey: Bus) -> None:
    (letter_id,) = await bury(valkey, 1)
    async with Bus.connect(valkey.address, topics=[TOPIC], max_event_bytes=75) as small:
        letters = small.dead_letters("index")
        with pytest.raises(EventTooLarge, match=f"{letter_id}: .* above max_event_bytes = 75"):
            await letters.redrive(edit={"weight": 1.2345678901234567})
        assert (await letters.redrive(edit={"weight": 1.0})).redriven == 1


@pytest.mark.parametrize("grams", [1, "many"])
async def test_a_class_that_refuses_its_values_is_listened_to(valkey: Bus, grams: Any) -> None:
    data = json.dumps({"grams": grams, "card": SECRET})
    (await put(valkey, own(1, type="mail.weighed", data=data) | why()))
    with pytest.raises(InvalidEvent) as caught:
        await valkey.dead_letters("index").redrive(edit={"grams": -1})
    said = "its class does not take it: ValueError" if grams == 1 else "a value is not valid"
    assert said in str(caught.value)
    assert len(await dead(valkey)) == 1


async def test_what_a_class_raises_besides_goes_its_way_and_names_the_letter(valkey: Bus) -> None:
    data = '{"grams":1,"card":"x"}'
    letter_id = await put(valkey, own(1, type="mail.weighed", data=data) | why())
    with pytest.raises(AssertionError, match="too heavy") as caught:
        await valkey.dead_letters("index").redrive(edit={"grams": 5_000})
    assert caught.value.__notes__ == [f"dead letter {letter_id}"]


SECRET = "4111-1111"


@pytest.mark.parametrize(
    ("fields", "edit"),
    [
        ({"type": "mail.tinted", "data": {"tint": SECRET, "n": 1}}, {"n": 2}),
        ({"type": "mail.tinted", "data": {"tint": "red", "n": 1}}, {"tint": SECRET}),
        ({"type": "mail.tinted", "data": {"tint": "red", "n": SECRET}}, {"tint": "red"}),
        ({"type": "mail.weighed", "data": {"grams": 1, "card": SECRET}}, {"grams": -1}),
        ({"type": "mail.weighed", "data": {"grams": -1, "card": SECRET}}, {"card": SECRET}),
        ({"type": "mail.weighed", "data": {"grams": SECRET, "card": SECRET}}, {"grams": -1}),
        ({"type": "mail.weighed", "data": {"grams": 1, "card": "x"}}, {"card": 5, "grams": SECRET}),
    ],
    ids=shown,
)
async def test_an_error_quotes_nothing_of_the_event(valkey: Bus, fields: Any, edit: Any) -> None:
    fields = fields | {"data": json.dumps(fields["data"])}
    letter_id = await put(valkey, own(1, **fields) | why())
    with pytest.raises(InvalidEvent) as caught:
        await valkey.dead_letters("index").redrive(edit=edit)
    told = "".join(traceback.format_exception(caught.value))
    assert letter_id in told
    assert SECRET not in told


async def test_a_function_may_not_give_an_older_version_than_the_newest_known(valkey: Bus) -> None:
    letter_id = await put(valkey, own(1, type="mail.sorted", data='{"name":1}') | why())
    before = await eyes_of(valkey).xrange(DEAD)
    text = "the edit gives version 2 of mail.sorted: give the newest, Sorted \\(version 3\\)"
    with pytest.raises(InvalidEvent, match=text) as caught:
        await valkey.dead_letters("index").redrive(edit=lambda _: Sorted2(shelf="A"))
    assert letter_id in str(caught.value)
    assert await eyes_of(valkey).xrange(DEAD) == before


@pytest.mark.parametrize(
    ("kind", "version"), [("mail.unheard", "1"), ("mail.posted", "2"), (b"mail.\xff", "1")], ids=str
)
async def test_an_edit_that_cannot_be_checked_is_refused_and_a_plain_redrive_is_not(
    valkey: Bus, kind: Any, version: str
) -> None:
    await put(valkey, own(1, type=kind, v=version) | why("newer-version"))
    with pytest.raises(
        UnknownEventType, match=r"mail:0/.* the edit cannot be checked: .* without an"
    ):
        await valkey.dead_letters("index").redrive(edit={"n": 5})
    assert await valkey.dead_letters("index").count() == 1
    assert (await valkey.dead_letters("index").redrive()).redriven == 1
    ((_, entry),) = await eyes_of(valkey).xrange(INBOX)
    assert entry[b"v"].decode() == version


async def test_a_letter_without_an_event_id_cannot_be_mended(valkey: Bus) -> None:
    await put(valkey, {"type": "mail.posted", "data": "{}"} | why("undecodable"))
    with pytest.raises(InvalidEvent, match="it has no event id: publish it as a new event"):
        await valkey.dead_letters("index").redrive(edit={"box": box_of(0)})


async def test_a_bad_edit_in_the_middle_leaves_it_and_those_after_it_where_they_were(
    valkey: Bus,
) -> None:
    await bury(valkey, *range(250))

    def edit(letter: Letter) -> Any:
        n = letter.event.n  # type: ignore[attr-defined]
        return {"n": "bad"} if n == 150 else {"weight": 2.0}

    with pytest.raises(InvalidEvent, match="field n") as caught:
        await valkey.dead_letters("index").redrive(edit=edit)
    assert caught.value.__notes__ == ["100 dead letters were redriven before; run it again"]
    assert await ns_of(valkey, INBOX) == list(range(100)), "no batch is sent in part"
    assert await ns_of(valkey, DEAD) == list(range(100, 250))


async def test_a_key_that_was_elsewhere_all_along_may_stay(valkey: Bus) -> None:
    """As after the partitions were made more: a redrive is not the time to move it."""
    await put(valkey, own(1) | why(), stream=OTHER)
    result = await valkey.dead_letters("index").redrive(edit={"n": 2})
    assert result.redriven == 1
    assert await ns_of(valkey, f"{OTHER}:inbox:index") == [2]


async def test_edited_letters_of_many_fields_go_whole(bus: Bus) -> None:
    many = own(1) | {f"f{n}": "x" for n in range(1_500)}
    packed = msgspec.msgpack.encode([str(w).encode() for p in many.items() for w in p])
    await put(bus, {"deadfields": packed} | why())
    entry = await mend(bus, {"n": 2})
    assert json.loads(entry.pop(b"data"))["n"] == 2
    assert len(entry) == len(many) - 1
