"""What is read: from the command line, a file or stdin; the loop goes on while nothing comes."""

import asyncio
import os
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from bus.config import MAX_DECODE_BYTES
from bus.errors import DeclarationError

_CHUNK_BYTES = 1024 * 1024


Document = tuple[str, bytes]  # which line it was, and what it is


async def documents(said: str | None, *, lines: bool) -> AsyncGenerator[list[Document], None]:
    """Yield what is to be read, as many at a time as have come.

    said: the document itself, @FILE, - for stdin; None for stdin, unless that is a terminal.
    lines: every line that is not empty is one. Errors: DeclarationError, OSError.
    """
    if said is None and sys.stdin.isatty():
        raise DeclarationError("what is to be published? Say it as JSON, @FILE, or - for stdin")
    if said is not None and said != "-" and not said.startswith("@"):
        yield [("", said.encode("utf-8", "surrogateescape"))]
        return
    name = "stdin" if said in (None, "-") else str(said)[1:]
    fd = sys.stdin.fileno() if said in (None, "-") else os.open(Path(name), os.O_RDONLY)
    try:
        async with aclosing(_chunks(fd)) as chunks:
            if not lines:
                yield [("", b"".join([chunk async for chunk in chunks]))]
                return
            number, rest = 0, bytearray()
            async for chunk in chunks:
                first, *others = chunk.split(b"\n")
                rest += first
                if len(rest) > MAX_DECODE_BYTES:
                    raise DeclarationError(
                        f"line {number + 1} of {name} is too long to be an event"
                    )
                if others:
                    whole = [bytes(rest), *others[:-1]]
                    yield _numbered(name, number, whole)
                    number += len(whole)
                    rest = bytearray(others[-1])
            yield _numbered(name, number, [bytes(rest)])
    finally:
        if fd != sys.stdin.fileno():
            os.close(fd)


def _numbered(name: str, before: int, lines: list[bytes]) -> list[Document]:
    numbered = enumerate(lines, before + 1)
    return [(f"line {number} of {name}", text) for number, text in numbered if text.strip()]


async def _chunks(fd: int) -> AsyncGenerator[bytes, None]:
    """Yield what can be read; of a pipe, a socket or a terminal as soon as it comes."""
    kind = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(fd)):
        while chunk := os.read(fd, _CHUNK_BYTES):
            yield chunk
        return
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    file = os.fdopen(os.dup(fd), "rb", 0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            yield chunk
    finally:
        transport.close()
