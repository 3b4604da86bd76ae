"""A connection that leads nowhere: what is asked is done here, at the pace of a server.

A verb takes effect a turn of the loop after it was asked for and is answered a turn later, so that
what runs beside it comes in between as it would over a network.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Never, ParamSpec, TypeVar

from bus.config import REPLY_TIMEOUT_S
from bus.errors import BusClosed, BusError, NotSupported
from bus.streams.connection import Answer, Arg, Connection
from bus.streams.memory.looks import LOOKS
from bus.streams.memory.place import Place, wire
from bus.streams.memory.values import VALUES
from bus.streams.replies import Reply, ReplyError

_COMMANDS = VALUES | LOOKS
_WITH_SUBCOMMANDS = frozenset(["XINFO", "XGROUP", "CONFIG"])
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Direct(Connection):
    """One line to a place. Errors of all of it: BusClosed, ReplyError."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._closed = False

    async def do(
        self, verb: Callable[Concatenate[Place, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Have a verb done, with nothing else between its beginning and its end."""
        self.check_open()
        await asyncio.sleep(0)
        with self.place.lock:
            answer = verb(self.place, *args, **kwargs)
        await asyncio.sleep(0)
        return answer

    def do_soon(self, answer: Answer, verb: Callable[[Place], list[Reply]]) -> None:
        """Have a verb done a turn of the loop later, and tell `answer` what it replies."""
        try:
            self.check_open()
        except BusClosed as error:
            answer.set_exception(error)
            return
        loop = asyncio.get_running_loop()

        def go() -> None:
            try:
                with self.place.lock:
                    replies = verb(self.place)
            except ReplyError as error:
                replies = [error]
            except Exception as error:  # whoever waits for the answer would wait for ever
                loop.call_soon(answer.set_exception, _amiss(error))
                return
            loop.call_soon(answer.set_result, replies)

        loop.call_soon(go)

    def check_open(self) -> None:
        """Refuse what comes after the end. Errors: BusClosed."""
        if self._closed:
            raise BusClosed("the bus is closed")

    async def call(self, *args: Arg, timeout_s: float = REPLY_TIMEOUT_S) -> Reply:  # noqa: ARG002 - nothing hangs here
        """Do one plain command and return its reply."""
        return await self.do(run, *args)

    async def pipeline(self, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
        """Do plain commands and return their replies, errors among them."""
        return await self.do(_run_all, commands) if commands else []

    def submit_for(self, *_: Any, **__: Any) -> Never:
        """Refuse what was packed for a server. Errors: NotSupported."""
        raise no_server("this verb")

    async def close(self) -> None:
        """Take nothing more."""
        self._closed = True


def _amiss(error: Exception) -> BusError:
    amiss = BusError(f"memory:// has failed, which is its own fault: {type(error).__name__}")
    amiss.__cause__ = error
    return amiss


def no_server(what: str) -> NotSupported:
    """Return the error for what only a server has."""
    return NotSupported(
        f"a memory:// bus has no server, hence no {what}: connect to one"
        " (Bus.connect('redis://...')); for tests and notebooks bus.embedded starts a private one"
    )


def run(place: Place, *command: Arg) -> Reply:
    """Do one plain command. Errors: ReplyError; NotSupported for one that is none of ours."""
    name, *args = command
    words = f"{name!s} {args.pop(0)!s}" if name in _WITH_SUBCOMMANDS else str(name)
    known = _COMMANDS.get(words)
    if known is None:
        raise no_server(words)
    return known(place, *map(wire, args))


def _run_all(place: Place, commands: Sequence[tuple[Arg, ...]]) -> list[Reply]:
    replies: list[Reply] = []
    for command in commands:
        try:
            replies.append(run(place, *command))
        except ReplyError as error:
            replies.append(error)
    return replies
