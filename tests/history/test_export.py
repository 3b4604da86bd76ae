"""Dead letters as JSON lines: what a line says, and files that are whole or as they were."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bus import Bus, UnknownGroup
from tests.history.letters import STREAM, TOPIC, box_of, bury, found, own, prepare, put, why
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(valkey_url, topics=[TOPIC]) as bus:
        await prepare(bus)
        yield bus


async def test_an_export_has_a_line_for_each_and_leaves_them(valkey: Bus, tmp_path: Any) -> None:
    await bury(valkey, 1)
    await put(
        valkey,
        {
            "id": "e2",
            "type": "mail.stamped",
            "data": msgspec.msgpack.encode({"n": 2}),
            "datacontenttype": "application/msgpack",
        }
        | why(),
    )
    await put(valkey, own(3, data=b"\xff\x00") | why("rejected", "Reject: é\n"))
    path = tmp_path / "letters.jsonl"
    path.write_text("old\n" * 100)
    assert await valkey.dead_letters("index").export(path) == 3
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    letters = await found(valkey.dead_letters("index"))
    assert lines == [x.as_json() for x in letters]
    assert lines[0] == {
        "id": letters[0].id,
        "group": "index",
        "stream": STREAM,
        "reason": "failed",
        "error": "ValueError: no",
        "error_type": "ValueError",
        "traceback": "line 1\nline 2",
        "attempts": 5,
        "died_at": letters[0].died_at.isoformat(),
        "published_at": "2023-11-14T22:13:20+00:00",
        "original_entry_id": "1700000000000-7",
        "applied": [],
        "event_id": "e1",
        "type": "mail.posted",
        "version": 1,
        "key": box_of(0),
        "time": "2023-11-14T22:13:20+00:00",
        "source": None,
        "correlation_id": None,
        "causation_id": None,
        "causation_depth": 0,
        "traceparent": None,
        "tracestate": None,
        "content_type": "application/json",
        "data": {"box": box_of(0), "n": 1},
    }
    assert lines[1]["data"] == {"n": 2}
    assert lines[1]["content_type"] == "application/msgpack"
    assert "data" not in lines[2]
    assert base64.b64decode(lines[2]["data_base64"]) == b"\xff\x00"
    assert lines[2]["error"] == "Reject: é\n"
    text = io.StringIO()
    assert await valkey.dead_letters("index", reason="rejected").export(text) == 1
    assert json.loads(text.getvalue()) == lines[2]
    assert await valkey.dead_letters("index", reason="crashed").export(path) == 0
    assert path.read_text() == ""
    with pytest.raises(IsADirectoryError):
        await valkey.dead_letters("index").export(tmp_path)


@pytest.mark.parametrize(
    ("data", "packed", "value"),
    [
        (b'{"a": [1, 2.5, null, "\xc3\xa9"]}', False, {"a": [1, 2.5, None, "é"]}),
        (b"123456789012345678901234567890", False, 123456789012345678901234567890),
        (b"no JSON", False, None),
        (b"NaN", False, None),
        (b"[" * 100_000, False, None),
        (b'"\xff"', False, None),
        (msgspec.msgpack.encode({"a": [1, "x"]}), True, {"a": [1, "x"]}),
        (msgspec.msgpack.encode({"a": b"bytes"}), True, None),
        (msgspec.msgpack.encode({"a": math.nan}), True, None),
        (msgspec.msgpack.encode({"a": datetime(2026, 1, 1, tzinfo=UTC)}), True, None),
        (msgspec.msgpack.encode({1: 2}), True, None),
        (b"\xc1", True, None),
    ],
    ids=lambda v: str(v)[:30],
)
async def test_data_is_a_json_value_only_if_that_is_all_of_it(
    valkey: Bus, data: bytes, packed: bool, value: Any
) -> None:
    kind = {"datacontenttype": "application/msgpack"} if packed else {}
    await put(valkey, own(1, data=data, **kind) | why())
    (letter,) = await found(valkey.dead_letters("index"))
    said = json.loads(json.dumps(letter.as_json()))
    if value is None:
        assert "data" not in said
        assert base64.b64decode(said["data_base64"]) == data
    else:
        assert said["data"] == value
        assert "data_base64" not in said
    assert "fields_base64" not in said


@pytest.mark.parametrize(
    "fields",
    [
        {"hello": "world"},
        {b"id": b"\xff", b"type": b"mail.posted", b"data": b"{}"},
        {"id": "e", "type": "mail.posted", "data": "{}", "v": "two"},
        {"id": "e", "type": "mail.posted", "data": "{}", "theirs": "1"},
        {"type": "mail.posted", "data": "{}"},
    ],
    ids=str,
)
async def test_what_the_document_does_not_tell_is_in_it_as_it_was(valkey: Bus, fields: Any) -> None:
    await put(valkey, fields | why())
    (letter,) = await found(valkey.dead_letters("index"))
    said = json.loads(json.dumps(letter.as_json()))
    assert tuple(base64.b64decode(part) for part in said["fields_base64"]) == letter.fields


# --- the file


def listed(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


async def test_a_file_is_its_owners_alone_also_in_place_of_another(
    valkey: Bus, tmp_path: Path
) -> None:
    await bury(valkey, 1)
    path = tmp_path / "letters.jsonl"
    for mode in (None, 0o644):
        if mode is not None:
            path.chmod(mode)
        assert await valkey.dead_letters("index").export(path) == 1
        assert path.stat().st_mode & 0o777 == 0o600
    assert listed(tmp_path) == ["letters.jsonl"]


async def test_a_file_does_not_appear_before_it_is_whole(valkey: Bus, tmp_path: Path) -> None:
    await bury(valkey, 1, 2)
    path, while_written = tmp_path / "letters.jsonl", []

    def look(_: Any) -> bool:
        while_written.append([(n, (tmp_path / n).stat().st_mode & 0o777) for n in listed(tmp_path)])
        return True

    await valkey.dead_letters("index", where=look).export(path)
    (((name, mode),), *_) = while_written
    assert name.startswith("letters.jsonl.")
    assert name.endswith(".new")
    assert mode == 0o600
    assert listed(tmp_path) == ["letters.jsonl"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("ends", ["unknown group", "where", "write", "cancelled"])
async def test_what_ends_early_leaves_everything_as_it_was(
    valkey: Bus, tmp_path: Path, monkeypatch: Any, ends: str, there: bool
) -> None:
    await bury(valkey, *range(10))
    path = tmp_path / "letters.jsonl"
    if there:
        path.write_text("precious\n")
    begun = asyncio.Event()
    group = "idnex" if ends == "unknown group" else "index"

    def where(letter: Any) -> bool:
        begun.set()
        return bool(ends != "where" or 1 / (5 - letter.event.n))

    if ends == "write":
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    work = asyncio.create_task(valkey.dead_letters(group, where=where).export(path))
    if ends == "cancelled":
        await begun.wait()
        work.cancel()
    (error,) = await asyncio.gather(work, return_exceptions=True)
    wanted = {
        "unknown group": UnknownGroup,
        "where": ZeroDivisionError,
        "write": OSError,
        "cancelled": asyncio.CancelledError,
    }
    assert isinstance(error, wanted[ends])
    assert listed(tmp_path) == (["letters.jsonl"] if there else [])
    if there:
        assert path.read_text() == "precious\n"


async def test_a_link_stays_one_and_a_pipe_is_written_to(valkey: Bus, tmp_path: Path) -> None:
    await bury(valkey, 1)
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    assert await valkey.dead_letters("index").export(link) == 1
    assert link.is_symlink()
    assert len(target.read_text().splitlines()) == 1
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert await valkey.dead_letters("index").export(pipe) == 1
    await eventually(lambda: read == [target.read_text()])
    reader.join()
    assert listed(tmp_path) == ["link", "pipe", "target"]
