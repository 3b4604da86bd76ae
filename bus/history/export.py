"""Dead letters as JSON lines, in a file that is there whole or not at all."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

import msgspec

from bus.config import READ_BYTES
from bus.history.letter import Letter

T = TypeVar("T")


class TextFile(Protocol):
    """What can be exported to: an open text file."""

    def write(self, text: str, /) -> object:
        """Write text."""


async def export(letters: AsyncIterator[Letter], to: str | os.PathLike[str] | TextFile) -> int:
    """Write `letters` as JSON lines; return how many. See `DeadLetters.export`."""
    # One thread: what an error or a cancellation ends is over before the file is closed.
    threads = ThreadPoolExecutor(1, "export")
    try:
        if not isinstance(to, str | os.PathLike):
            return await _write(threads, letters, to)
        beside = _Beside(Path(to))
        try:
            count = await _write(threads, letters, await _in(threads, beside.open))
            await _in(threads, beside.keep)
        except BaseException:
            await _in(threads, beside.drop)
            raise
        return count
    finally:
        threads.shutdown(wait=False)


def _in(threads: Executor, call: Callable[[], T]) -> "asyncio.Future[T]":
    return asyncio.get_running_loop().run_in_executor(threads, call)


async def _write(threads: Executor, letters: AsyncIterator[Letter], file: TextFile) -> int:
    count = size = 0
    lines: list[str] = []
    async for letter in letters:
        lines.append(msgspec.json.encode(letter.as_json()).decode() + "\n")
        count += 1
        size += len(lines[-1])
        if size >= READ_BYTES:
            text, lines, size = "".join(lines), [], 0
            await _in(threads, lambda text=text: file.write(text))  # type: ignore[misc] # a lambda with a default
    await _in(threads, lambda: file.write("".join(lines)))
    return count


class _Beside:
    """A file that takes the place of another one when it is whole; readable by its owner alone.

    What is no regular file, a pipe or a device, is written to directly.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: Path | None = None
        self._file: TextIO | None = None

    def open(self) -> TextIO:
        """Return a new file. Errors: OSError, as of opening the path itself."""
        path = self._path.resolve()  # a link stays one
        if path.exists() and not path.is_file():
            self._file = path.open("w", encoding="utf-8")
            return self._file
        self._path = path
        self._beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        file = os.open(self._beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(file, "w", encoding="utf-8")
        return self._file

    def keep(self) -> None:
        """Put it in its place: on the disk, since letters may be purged next."""
        assert self._file is not None
        if self._beside is None:
            self._file.close()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._beside.replace(self._path)
        self._beside = None

    def drop(self) -> None:
        """Leave everything as it was."""
        if self._file is not None:
            with suppress(OSError):  # the disk is full, say: that was told
                self._file.close()
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)
