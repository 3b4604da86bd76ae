"""The file that lets a replay go on where it was stopped, or killed.

It names the run, what was asked for, and how far each stream was read. What is in an inbox the
server itself remembers, in the step that puts it there; the file only says by which name.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bus.errors import CheckpointError

_FORMAT = 1
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}  # of file systems without
_Id = Annotated[str, msgspec.Meta(pattern=r"\A([0-9]{1,20}-[0-9]{1,20})?\Z")]


class Place(msgspec.Struct):
    """How far a replay has come in one stream. All are entry ids, "" for nowhere yet.

    first, last: the range, both included, fixed when the replay began. read: everything up to it
    was looked at, and what was asked for is done. done: the last that was replayed.
    """

    first: _Id
    last: _Id
    read: _Id = ""
    done: _Id = ""


class Counts(msgspec.Struct):
    """What a replay has done so far. Entries; see `Replayed`."""

    read: int = 0
    matched: int = 0
    replayed: int = 0
    unreadable: int = 0
    gone: int = 0
    gaps: int = 0


class Saved(msgspec.Struct):
    """What stands in the file. asked: the arguments of the replay, which must be the same again."""

    run: str
    asked: dict[str, Any]
    places: dict[str, Place]
    counts: Counts = msgspec.field(default_factory=Counts)
    finished: bool = False
    bus_replay: int = _FORMAT


class Checkpoint:
    """A file, or none. Writing replaces it whole, so it is never cut off by a crash."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)

    def load(self, asked: dict[str, Any]) -> Saved | None:
        """Return what was saved of this replay; None if there is no file yet.

        Errors: CheckpointError, damaged or of another replay.
        """
        if self._path is None:
            return None
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error.strerror}") from None
        try:
            saved = msgspec.json.decode(text, type=Saved)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._path} is not a whole checkpoint ({error}). Was it cut off, or is it"
                " another file? To start over, delete it: what was replayed will be so again"
            ) from None
        if saved.bus_replay != _FORMAT:
            raise CheckpointError(f"{self._path} was written by another release of the bus")
        different = [
            f"{name} was {saved.asked.get(name)!r} and is {asked.get(name)!r}"
            for name in sorted(saved.asked.keys() | asked.keys())
            if saved.asked.get(name) != asked.get(name)
        ]
        if different:
            raise CheckpointError(
                f"{self._path} is of another replay: {'; '.join(different)}."
                " Give this one a file of its own"
            )
        return saved

    def begin(self, saved: Saved) -> bool:
        """Write the file for the first time; return False if somebody else has begun meanwhile.

        Errors: CheckpointError.
        """
        if self._path is None:
            return True
        with self._written(saved) as beside:
            try:
                os.link(beside, self._path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._begin_without_links(beside)
            finally:
                beside.unlink()
        return True

    def _begin_without_links(self, beside: Path) -> bool:
        """Do the same where files cannot be linked: cut off by a crash, it is told as damaged."""
        assert self._path is not None
        try:
            with self._path.open("xb") as file:
                file.write(beside.read_bytes())
        except FileExistsError:
            return False
        return True

    def save(self, saved: Saved) -> None:
        """Write the file anew, and see to it that it is on the disk. Errors: CheckpointError."""
        if self._path is not None:
            with self._written(saved) as beside:
                beside.replace(self._path)

    @contextmanager
    def _written(self, saved: Saved) -> Iterator[Path]:
        """Write a file beside ours, whole and on the disk, to be put in its place."""
        assert self._path is not None
        # A name that nobody else has, also on another machine that shares the folder.
        beside = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}.new")
        try:
            with beside.open("xb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(saved)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            yield beside
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise CheckpointError(f"{self._path} cannot be written: {error.strerror}") from None
