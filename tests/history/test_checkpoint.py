"""The file that a replay goes on from: whole at any time, of one replay, and nothing beside it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import CheckpointError
from bus.history.checkpoint import Checkpoint, Counts, Place, Saved

if TYPE_CHECKING:
    from collections.abc import Callable

STREAM = "bus:{ark:0}"
ASKED: dict[str, Any] = {"topic": "ark", "to": "index", "limit": None, "types": ["a", "b"]}


def saved(read: str = "7-0", places: int = 1, run: str = "replay-1") -> Saved:
    there = {f"bus:{{ark:{p}}}": Place("1-0", "9-0", read, "5-3") for p in range(places)}
    return Saved(run, ASKED, there, Counts(read=7, replayed=5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def test_what_was_saved_is_loaded(path: Path) -> None:
    assert Checkpoint(path).load(ASKED) is None
    Checkpoint(path).save(saved())
    assert Checkpoint(path).load(ASKED) == saved()
    Checkpoint(str(path)).save(saved(read="9-0"))
    assert Checkpoint(str(path)).load(ASKED) == saved(read="9-0")


def test_without_a_path_there_is_no_file(tmp_path: Path) -> None:
    file = Checkpoint(None)
    assert file.begin(saved())
    file.save(saved())
    assert file.load(ASKED) is None
    assert list(tmp_path.iterdir()) == []


def test_one_begins_and_the_other_reads_what_it_wrote(path: Path) -> None:
    assert Checkpoint(path).begin(saved(run="replay-1"))
    assert not Checkpoint(path).begin(saved(run="replay-2"))
    assert Checkpoint(path).load(ASKED) == saved(run="replay-1")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "asked",
    [
        {**ASKED, "limit": 5},
        {**ASKED, "where": "f#1"},
        {**ASKED, "more": 0},
        {"topic": "ark", "to": "index", "limit": None},
        {},
    ],
    ids=str,
)
def test_a_replay_that_asks_for_anything_else_is_another(path: Path, asked: dict[str, Any]) -> None:
    """Also where one of the two says nothing: another release may ask for more, or for less."""
    Checkpoint(path).save(saved())
    name = r"types was \['a', 'b'\] and is None" if len(asked) < 4 else r"(was None and) is"
    with pytest.raises(CheckpointError, match=f"of another replay: .*{name}"):
        Checkpoint(path).load(asked)


@pytest.mark.parametrize(
    "value",
    ["x", "7", "-", "7-", "-0", "7-0 ", "7-0\n", "+", "7-x", "(7-0", "1" * 21 + "-0", 7],
    ids=repr,
)
@pytest.mark.parametrize("name", ["first", "last", "read", "done"])
def test_ids_that_are_none_are_damage(path: Path, name: str, value: Any) -> None:
    Checkpoint(path).save(saved())
    content = json.loads(path.read_text())
    content["places"][STREAM][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        Checkpoint(path).load(ASKED)


def test_the_largest_id_is_one(path: Path) -> None:
    largest = saved(read=f"{2**64 - 1}-{2**64 - 1}")
    Checkpoint(path).save(largest)
    assert Checkpoint(path).load(ASKED) == largest


def broken(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "name", ["os.fsync", "os.link", "os.replace", "pathlib.Path.replace", "pathlib.Path.open"]
)
@pytest.mark.parametrize("call", [Checkpoint.begin, Checkpoint.save], ids=["begin", "save"])
def test_nothing_is_left_beside_it_when_the_disk_fails(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    call: Callable[[Checkpoint, Saved], Any],
) -> None:
    if call is Checkpoint.save:
        Checkpoint(path).save(saved())
    before = list(path.parent.iterdir())
    told = ""
    with monkeypatch.context() as patch:
        patch.setattr(name, broken)
        try:
            call(Checkpoint(path), saved(read="8-0"))
        except CheckpointError as error:
            told = str(error)
    if told:
        assert "cannot be written: No space left" in told
        # Only the folder may be what failed: then the new one is in its place.
        assert list(path.parent.iterdir()) in (before, [path])
    else:
        assert name in ("os.link", "os.replace", "pathlib.Path.replace")  # the other call's
    if path.exists():
        read = "8-0" if call is Checkpoint.begin or not told else "7-0"
        assert Checkpoint(path).load(ASKED) == saved(read=read)


def test_it_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave an empty file; and its folder, else it may leave the old one."""
    Checkpoint(path).save(saved())
    synced: list[tuple[bool, bool]] = []
    sync = os.fsync

    def watch(fd: int) -> None:
        there = Path(f"/proc/self/fd/{fd}").resolve()
        synced.append((there.is_dir(), Checkpoint(path).load(ASKED) == saved(read="8-0")))
        sync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    Checkpoint(path).save(saved(read="8-0"))
    assert synced == [(False, False), (True, True)]


def test_who_reads_never_sees_half_of_it(path: Path) -> None:
    """Two write all the time, as two containers do that share a volume and a process id."""
    Checkpoint(path).save(saved())
    errors: list[BaseException] = []
    reads = 0
    ended = threading.Event()

    def write(value: Saved) -> None:
        try:
            for _ in range(100):
                Checkpoint(path).save(value)
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        nonlocal reads
        try:
            while not ended.is_set():
                found = Checkpoint(path).load(ASKED)
                assert found in (saved(), saved(places=300))
                reads += 1
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(s,)) for s in (saved(), saved(places=300))]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    reader.join()
    assert errors == []
    assert reads > 10
    assert list(path.parent.iterdir()) == [path]
