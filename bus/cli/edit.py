"""Changing a dead letter on the command line: by fields, or in an editor."""

import asyncio
import os
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from bus.cli.output import json_text, say
from bus.errors import BusError, DeclarationError, Undecodable, UnknownEventType
from bus.event import newest_version
from bus.history.dead_letters import DeadLetters
from bus.history.document import document_of
from bus.history.letter import Letter
from bus.history.mend import Edit, whole


def settings(changes: Iterable[str] | None) -> Edit | None:
    """Return FIELD=VALUE pairs as changes; a value that is no JSON is text.

    Errors: DeclarationError.
    """
    found = {}
    for change in changes or ():
        field, equals, value = change.partition("=")
        if not (field and equals):
            raise DeclarationError(f"--set is FIELD=VALUE, not {change!r}")
        try:
            found[field] = msgspec.json.decode(value)
        except msgspec.MsgspecError:
            found[field] = value
    return found or None


async def edited(letters: DeadLetters, changes: Iterable[str] | None) -> Edit | None:
    """Have one letter changed in the editor: what is saved is the whole event. None: as it was.

    Errors: DeclarationError if it is not one letter, its class is not known, or it is no event
    afterwards: the file stays then, and is named.
    """
    if changes:
        raise DeclarationError("say either --edit, or --set")
    letter = await _only(letters)
    if not newest_version(letter.envelope.type):
        raise DeclarationError(
            f"no class of {letter.envelope.type} is known here: say --app PACKAGE, or redrive it as"
            " it is"
        )
    before = _text_of(letter)
    path = _file(before)
    if not await asyncio.to_thread(_opened, path) or path.read_bytes().strip() == before.strip():
        path.unlink()
        return None
    try:
        event = whole(letter.envelope.type, path.read_bytes())
    except BusError as error:
        raise DeclarationError(f"{error}. What was saved is in {path}") from None
    path.unlink()
    say(f"{letter.id} becomes {json_text(event)}")
    return lambda _: event


def _text_of(letter: Letter) -> bytes:
    """Return the event as it is read now, by upcasts and all; else what JSON says of it."""
    try:
        value: Any = letter.event
    except (Undecodable, UnknownEventType):
        value = document_of(letter.envelope).get("data", {})
    return msgspec.json.format(msgspec.json.encode(value), indent=2)


async def _only(letters: DeadLetters) -> Letter:
    found = [letter async for letter in letters]
    if len(found) != 1:
        raise DeclarationError(f"--edit is of one letter, and these are {len(found):,}: say its id")
    return found[0]


def _file(text: bytes) -> Path:
    """Write a text into a file that only its owner can read."""
    handle, name = tempfile.mkstemp(prefix="bus-letter-", suffix=".json")
    with os.fdopen(handle, "wb") as file:
        file.write(text + b"\n")
    return Path(name)


def _opened(path: Path) -> bool:
    """Open the editor on a file, and wait; return whether it ended well."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    code = os.spawnvp(os.P_WAIT, shlex.split(editor)[0], [*shlex.split(editor), str(path)])  # noqa: S606 - the editor is of the user's own choice
    if code:
        say(f"{editor} ended with {code}", "yellow")
    return not code
